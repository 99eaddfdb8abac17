"""Suites of what comes before the model: texts to ids, and files to pixels."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from miniclip.bench.material import (
    Setting,
    captions,
    invented_captions,
    mixed_captions,
    plural,
)
from miniclip.bench.measuring import Case, Contender, timed
from miniclip.transform import resize_short_side


def tokenizer_suite(setting: Setting) -> Iterator[Case]:
    """Texts to ids: captions, other scripts, and words that no cache has seen."""
    end, count = setting.config.text.eos_token_id, 1000

    def without_padding(ids: Tensor) -> list[list[int]]:
        return [row[: row.index(end)] for row in ids.tolist()]

    def next_of(tokenize: Callable[[list[str]], Tensor], stream: Iterator[list[str]]) -> Tensor:
        return tokenize(next(stream))

    streams: dict[str, Callable[[], Iterator[list[str]]]] = {
        "ASCII captions": lambda: itertools.repeat(captions(count)),
        "mixed scripts and emoji": lambda: itertools.repeat(mixed_captions(count)),
        "words never seen before": lambda: invented_captions(count),
    }
    for work, stream in streams.items():
        contenders = [
            Contender(library.name, timed(partial(next_of, library.tokenize, stream())))
            for library in setting.libraries
        ]
        work = f"{plural(count, 'text')}, {work}"
        yield Case("tokenizer", work, count, "texts", contenders, without_padding)


def transform_suite(setting: Setting) -> Iterator[Case]:
    """Files to pixels: one photograph, and sixteen."""
    size = setting.config.vision.side

    def pillow_alone() -> None:
        resize_short_side(Image.open(setting.photographs[0]), size)

    for paths in (setting.photographs[:1], setting.photographs):
        runs: dict[str, Callable[[], Any]] = {
            library.name: partial(library.transform, paths) for library in setting.libraries
        }
        if len(paths) == 1:
            runs["Pillow, decode + resize"] = pillow_alone
        contenders = [Contender(name, timed(run)) for name, run in runs.items()]
        work = f"{plural(len(paths), 'JPEG file')} of 640 x 480 pixels"
        yield Case("transform", work, len(paths), "images", contenders, lambda pixels: pixels)
