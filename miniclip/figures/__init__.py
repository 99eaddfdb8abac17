"""Figures of results, one file for each kind."""

from importlib.util import find_spec

if find_spec("matplotlib") is None:
    raise ValueError("figures need matplotlib: pip install 'miniclip[demo]'")
