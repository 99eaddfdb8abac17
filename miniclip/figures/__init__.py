"""Pictures of results, one file for each kind. style.py holds their shared fonts and colours."""

from importlib.util import find_spec

if find_spec("matplotlib") is None:
    raise ValueError("pictures need matplotlib: pip install 'miniclip[demo]'")
