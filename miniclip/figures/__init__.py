"""Figures of results. Each module draws one kind of figure."""

from importlib.util import find_spec

if find_spec("matplotlib") is None:
    raise ValueError("figures need matplotlib: pip install 'miniclip[demo]'")
