"""The error classes of miniclip, and functions that write error messages."""

import reprlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike


class CheckpointError(ValueError):
    """A checkpoint's files are missing, damaged, or in an unexpected format."""


class ContextLengthError(ValueError):
    """A text has more tokens than the text tower has positions."""


class ImageError(ValueError):
    """An image cannot be decoded, or it is unclear how its values represent pixels."""


def wrong(name: str, value: object, expected: str) -> ValueError:
    """Make the error for an unexpected value.

    >>> wrong("heads", 0, "1 or more")
    ValueError('heads is 0; expected 1 or more')
    """
    return ValueError(f"{name} is {shown(value)}; expected {expected}")


@contextmanager
def blaming(path: str | PathLike[str]) -> Iterator[None]:
    """Turn a ValueError about a file's content into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def warn(message: str) -> None:
    """Issue a warning that shows the line of the user's code, not a line of miniclip."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == "miniclip":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


def shown(value: object) -> str:
    """The repr of a value, shortened if it is long.

    >>> shown([1] * 10**6)
    '[1, 1, 1, 1, 1, 1, ...]'
    """
    return _short.repr(value)[:200]  # reprlib limits each level of a nested value, not the total


def listed(names: Iterable[str], most: int = 3) -> str:
    """Join the first names, and say how many more there are.

    >>> listed(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    names = [f"{name:.200}" for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" * (len(names) > most))
