"""What a person at a terminal sees: a progress bar, and text that cannot move the cursor."""

from collections.abc import Iterable
from typing import Any


def progress(items: Iterable[Any] | None = None, unit: str = "it", **options: Any) -> Any:
    """Wrap items in a progress bar, which appears if they take longer than two seconds.

    It is drawn only if stderr is a terminal. `options` are tqdm's; without items they have the
    `total`, and the caller calls `update`.
    """
    from tqdm import tqdm  # here, because `miniclip --help` shows no bar

    return tqdm(items, unit=unit, **{"delay": 2, "disable": None, "leave": False} | options)


def printable(text: str) -> str:
    """Escape the characters that move the cursor or colour a terminal, and lone surrogates.

    >>> print(printable("café" + chr(10) + chr(27)))
    café\\n\\x1b
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, width: int = 24) -> str:
    """Make a text `printable`, and cut it to `width` characters if it is longer."""
    text = printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"
