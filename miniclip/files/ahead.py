"""Read the next files in threads while the model runs. Pillow releases the GIL to decode."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from miniclip.errors import ImageError

T = TypeVar("T")


def read_ahead(
    read: Callable[[Any], T], items: Iterable[Any], ahead: int, threads: int | None = None
) -> Generator[T | ImageError, None, None]:
    """Yield `read(item)` for each item, in order. An ImageError of `read` is yielded, not raised.

    Threads (by default as many as torch uses) read up to `ahead` items in advance. If the
    generator is closed, items that still wait for a thread are not read.
    """

    def result(item: Any) -> T | ImageError:
        try:
            return read(item)
        except ImageError as error:
            return error

    pool = ThreadPoolExecutor(threads or torch.get_num_threads())
    waiting: deque[Future[T | ImageError]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(result, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
