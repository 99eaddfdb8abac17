"""Figures of results, one file for each kind."""

from importlib.util import find_spec

if find_spec("matplotlib") is None:
    raise ValueError("pictures need matplotlib: pip install 'miniclip[demo]'")
