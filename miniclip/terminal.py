"""Output in a terminal: a progress bar, and text with escaped control characters."""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def progress(items: Iterable[Any] | None = None, unit: str = "it", **options: Any) -> Any:
    """Wrap items in a progress bar, which appears after two seconds.

    If stderr is not a terminal, a line is printed every 30 seconds instead. `options` are
    arguments of tqdm. If `items` is None, pass `total`, and call `update` on the result.
    """
    from tqdm import tqdm  # imported only here, so that `miniclip --help` is fast

    if sys.stderr and sys.stderr.isatty():
        return tqdm(items, unit=unit, **{"delay": 2, "leave": False} | options)

    class Lines(tqdm):  # type: ignore[type-arg]
        disable: bool
        monitor_interval = 0  # otherwise tqdm would start a useless thread for each class

        def display(self, *args: Any, **options: Any) -> bool:
            print(f"miniclip: {self}", file=sys.stderr)
            return True

        def refresh(self, nolock: bool = False, **options: Any) -> None:
            # Print nothing in a notebook, or if `tqdm.write` calls this (with nolock=True).
            is_notebook = type(sys.stderr).__module__.startswith("ipykernel")
            if not (nolock or self.disable or is_notebook):
                self.display()

        def clear(self, *args: Any, **options: Any) -> None:
            pass

        def close(self) -> None:
            if not self.disable:
                self.disable = True
                self._decr_instances(self)

    form = "{n_fmt} of {total_fmt} {unit}s, {rate_noinv_fmt}, {remaining} left{postfix}"
    times = {"delay": 30, "mininterval": 30, "maxinterval": math.inf, "miniters": 1}
    return Lines(items, unit=unit, bar_format=form, **times | options)


@contextmanager
def delaying_interrupt(message: str) -> Iterator[Callable[[], bool]]:
    """Delay Ctrl-C in a `with` block, so that a program can save its work before it stops.

    The first Ctrl-C prints the message. From then on, the yielded function returns True. The second
    Ctrl-C raises KeyboardInterrupt.
    """
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(2, f"\nminiclip: {message}; press Ctrl-C again to stop at once\n".encode())

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def printable(text: str) -> str:
    """Escape lone surrogates and all characters that move the cursor or change the colours.

    >>> print(printable("café" + chr(10) + chr(27)))
    café\\n\\x1b
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def columns(text: str) -> int:
    """The number of terminal columns of a printable text. A Chinese character takes two columns.

    >>> columns("cat"), columns("猫")
    (3, 2)
    """
    from ftfy.formatting import monospaced_width  # imported late, so that --help is fast

    return len(text) if text.isascii() else max(monospaced_width(text), 0)


def shorten(text: str, width: int = 24) -> str:
    """Escape a text with `printable`, and cut it to `width` columns if it is longer."""
    text = printable(text)
    if columns(text) <= width:
        return text
    text = text[:width]
    while columns(text) > width - 1:
        text = text[:-1]
    return text + "…"


def cell(text: str, width: int) -> str:
    """Make a table cell of `width` columns: cut a long text, or pad a short text with spaces."""
    text = shorten(text, width)
    return text + " " * (width - columns(text))


def counted(count: int, noun: str) -> str:
    """Return a count with its noun. The noun's plural must end in "s".

    >>> counted(1, "picture"), counted(1200, "picture")
    ('1 picture', '1,200 pictures')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"
