"""The interface of training data: pairs of an image and a caption."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol
from zlib import crc32

import torch
from torch import Tensor

from miniclip.transform import ImageTransform


class Pair(NamedTuple):
    """An image and a caption that is true of the image."""

    pixels: Tensor  # (3, S, S) uint8
    caption: str
    label: int  # if two pairs have the same label, each caption is true of both images
    negative: str = ""  # a caption that is false of the image, if the data has false captions
    also: Sequence[int] = ()  # labels of all captions of the image; equally long in all pairs


class Batch(NamedTuple):
    """A batch of B pairs."""

    pixels: Tensor  # (B, 3, S, S) uint8
    captions: list[str]
    labels: Tensor  # (B,)
    negatives: list[str]
    also: Tensor  # (B, K)


class TrainingData(Protocol):
    """A source of pairs. `data[item, draw]` is a pair, or None if its image cannot be read.

    The number `draw` chooses one of the image's captions.
    """

    skipped: list[str]  # a message for each unreadable file

    def __len__(self) -> int: ...

    def items(self, seed: int) -> Iterator[Any]:
        """Return each item once, in an order that the seed decides."""
        ...

    def captions(self) -> Iterable[str]:
        """Return captions that contain all words of the data, to learn a tokenizer from."""
        ...

    def __getitem__(self, item_and_draw: tuple[Any, int]) -> Pair | None: ...


def caption_label(caption: str) -> int:
    """Turn a caption into a number that is the same in all processes and runs.

    Tokenizers ignore case and extra whitespace, so "A dog" and "a  dog" have the same number.
    """
    return crc32(" ".join(caption.lower().split()).encode())


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Return the numbers 0 to count - 1, in an order that the seed decides."""
    return iter(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist())


def to_bytes(transform: ImageTransform) -> Callable[[Any], Tensor]:
    """Return the transform without normalization: a function from an image to uint8 (3, S, S)."""
    plain = replace(transform, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    return lambda picture: (plain(picture) * 255).round().to(torch.uint8)


def note_once(notes: list[str], note: str) -> None:
    """Append a note, unless the list has it already."""
    if note not in notes:
        notes.append(note)
