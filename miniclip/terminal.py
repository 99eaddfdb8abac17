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


def columns(text: str) -> int:
    """How many columns of a terminal a printable text takes: a Chinese character takes two.

    >>> columns("cat"), columns("猫")
    (3, 2)
    """
    from ftfy.formatting import monospaced_width  # here, because `miniclip --help` has no tables

    return len(text) if text.isascii() else max(monospaced_width(text), 0)


def shorten(text: str, width: int = 24) -> str:
    """Make a text `printable`, and cut it to `width` columns if it is longer."""
    text = printable(text)
    if columns(text) <= width:
        return text
    text = text[:width]
    while columns(text) > width - 1:
        text = text[:-1]
    return text + "…"


def cell(text: str, width: int) -> str:
    """A text as the cell of a table: cut or filled up with spaces to `width` columns."""
    text = shorten(text, width)
    return text + " " * (width - columns(text))


def counted(count: int, noun: str) -> str:
    """A count with its noun, whose plural ends in "s".

    >>> counted(1, "picture"), counted(1200, "picture")
    ('1 picture', '1,200 pictures')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"
