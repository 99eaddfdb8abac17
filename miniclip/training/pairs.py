"""What training data is made of: pairs of a picture and a caption."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol
from zlib import crc32

import torch
from torch import Tensor

from miniclip.transform import ImageTransform


class Pair(NamedTuple):
    """A picture and a caption that is true of it."""

    pixels: Tensor  # (3, S, S) uint8
    caption: str
    label: int  # pairs of equal label are true of each other
    negative: str = ""  # a caption that is false of the picture, if the source makes such
    also: Sequence[int] = ()  # labels of all its captions, as many in each pair of a source


class Batch(NamedTuple):
    """B pairs."""

    pixels: Tensor  # (B, 3, S, S) uint8
    captions: list[str]
    labels: Tensor  # (B,)
    negatives: list[str]
    also: Tensor  # (B, K)


class TrainingData(Protocol):
    """Where pairs come from. `data[item, draw]` draws one of an item's captions by `draw`."""

    skipped: list[str]  # why each unreadable picture was left out

    def __len__(self) -> int: ...

    def items(self, seed: int) -> Iterator[Any]:
        """Each item once, in an order that the seed decides."""
        ...

    def captions(self) -> Iterable[str]:
        """Captions with every word of the data, for a tokenizer to learn from."""
        ...

    def __getitem__(self, item_and_draw: tuple[Any, int]) -> Pair | None: ...


def caption_label(caption: str) -> int:
    """Equal captions share a label, in every process of every run."""
    return crc32(caption.encode())


def shuffled(count: int, seed: int) -> Iterator[int]:
    """0 to count - 1 in an order that the seed decides."""
    return iter(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist())


def to_bytes(transform: ImageTransform) -> Callable[[Any], Tensor]:
    """The transform up to the crop: a picture to uint8 (3, S, S)."""
    plain = replace(transform, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    return lambda picture: (plain(picture) * 255).round().to(torch.uint8)


def note_once(notes: list[str], note: str) -> None:
    """Append a note that is not among the notes already."""
    if note not in notes:
        notes.append(note)
