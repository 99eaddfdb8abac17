"""Pictures of results. style.py has what they share; each drawing has a file of its own."""

from importlib.util import find_spec

if find_spec("matplotlib") is None:
    raise ValueError("pictures need matplotlib: pip install 'miniclip[demo]'")
