"""Pairs from folders, metadata files and tar shards, and batches of pairs.

Only the seed and the step decide what is in a batch. So the batches stay the same after a restart,
and with another number of processes.
"""

import os
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.errors import ImageError, shown
from miniclip.evaluation.captions import COLUMNS, rows_with_captions
from miniclip.files.ahead import read_ahead
from miniclip.files.pictures import open_image, with_name
from miniclip.training.pairs import (
    Batch,
    Pair,
    TrainingData,
    caption_label,
    note_once,
    shuffled,
    to_bytes,
)  # fmt: skip
from miniclip.training.shards import Shards, is_address
from miniclip.transform import ImageTransform
from miniclip.zeroshot.data import check_classes, labelled_images

TEMPLATES = (
    "{}", "a {}", "the {}", "a photo of a {}.", "a photo of the {}.", "a blurry photo of a {}.",
    "a low resolution photo of a {}.", "a close-up photo of a {}.", "a picture of a small {}.",
    "a picture of a large {}.", "this is a photo of a {}.", "an image of a {}.",
)  # fmt: skip

MEMORY = 2**31
"""The decoded images stay in memory if they have at most this many bytes in total."""

Entry = tuple[Path, Sequence[str], int | None]
"""An image file, captions that are true of the image, and its class or None."""


class Pictures:
    """Image files with their captions, as training data."""

    def __init__(self, entries: Sequence[Entry], transform: ImageTransform) -> None:
        self.entries = entries
        self.skipped: list[str] = []
        self._to_bytes = to_bytes(transform)
        self._also = labels_of_all(entries)
        self._keeps = len(entries) * 3 * transform.crop_size**2 <= MEMORY
        self._kept: dict[Path, Tensor] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def items(self, seed: int) -> Iterator[int]:
        """Return the indices of all files, in an order that the seed decides."""
        return shuffled(len(self), seed)

    def captions(self) -> Iterator[str]:
        """Return all captions. If images share one list, its captions are returned once."""
        return chain(*{id(captions): captions for _, captions, _ in self.entries}.values())

    def __getitem__(self, item_and_draw: tuple[int, int]) -> Pair | None:
        i, draw = item_and_draw
        path, captions, label = self.entries[i]
        if (pixels := self._kept.get(path)) is None:
            try:
                pixels = self._to_bytes(open_image(path))
            except ImageError as error:
                note_once(self.skipped, with_name(str(path), error))
                return None
            if self._keeps:
                self._kept[path] = pixels
        caption = random.Random(draw).choice(captions)
        label = caption_label(caption) if label is None else label
        return Pair(pixels, caption, label, also=self._also.get(path, ()))


def labels_of_all(entries: Iterable[Entry]) -> dict[Path, list[int]]:
    """Collect the labels of each image's captions. An image may be in several entries.

    All lists are equally long, because shorter lists repeat their first label. If no image has two
    different captions, all lists are empty. Entries with a class are left out.
    """
    lists: dict[Path, tuple[str, ...]] = {}
    for path, captions, label in entries:
        if label is None:
            lists[path] = (*lists[path], *captions) if path in lists else tuple(captions)
    labels = {captions: sorted(set(map(caption_label, captions))) for captions in lists.values()}
    most = max(map(len, labels.values()), default=0)
    for found in labels.values():
        found[:] = [*found, *found[:1] * (most - len(found))] * (most > 1)
    return {path: labels[captions] for path, captions in lists.items()}


def class_captions(label: str) -> tuple[str, ...]:
    """Return the captions of a class, made by putting its label into each template.

    >>> class_captions("tea cup")[3]
    'a photo of a tea cup.'
    """
    return tuple(template.replace("{}", label) for template in TEMPLATES)


def open_data(
    name: str | os.PathLike[str], transform: ImageTransform, columns: tuple[str, str] = COLUMNS
) -> TrainingData:
    """Open training data.

    Args:
        name: a path, command or address in one of the forms that `miniclip.training` lists, or
            `shapes` for the drawn world.
        transform: the model's transform, which resizes and crops images. `shapes` does not use it.
        columns: the names of a metadata file's two columns, for image files and for captions.

    Raises:
        ValueError: `name` has none of these forms, `check_classes` refuses its folders, or `name`
            is `shapes` and a folder has this name too.
    """
    if name == "shapes":
        if os.path.isdir("shapes"):
            raise ValueError(
                "shapes is the drawn world, but a folder here has the same name: write ./shapes "
                "to use the folder, or work in another folder to use the drawn world"
            )
        from miniclip.training.drawn import Shapes

        return Shapes()
    root = Path(name).expanduser()
    if is_address(name):
        return Shards([str(name)], transform)
    if root.is_file() and root.suffix == ".tar":
        return Shards([str(root)], transform)
    if found := rows_with_captions(root, columns):
        rows, skipped = found
        data = Pictures([(Path(str(path)), texts, None) for path, texts in rows], transform)
        data.skipped += skipped
        return data
    if not root.is_dir():
        raise ValueError(f"{root}: expected a folder of training data, a .tar or a metadata file")
    if shards := list(map(str, root.glob("*.tar"))):
        return Shards(shards, transform)
    images = labelled_images(root)
    check_classes(images, root, named=False)
    captions = [class_captions(label) for label in images.labels]
    names = [label.lower() for label in images.labels]
    first = {name: i for i, name in reversed([*enumerate(names)])}  # names of classes can repeat
    files = zip(images.paths, images.classes, strict=True)
    return Pictures([(path, captions[i], first[names[i]]) for path, i in files], transform)


def batches(
    data: TrainingData, batch: int, seed: int, first: int = 0, rank: int = 0, world_size: int = 1
) -> Generator[Batch, None, None]:
    """Yield batches forever, while threads decode the images of the next batches.

    If the last batch of an epoch is incomplete, it is left out. If an image cannot be read, another
    image of the batch takes its place, and `data.skipped` names the unreadable image.

    Args:
        data: the source of the pairs.
        batch: the number of pairs in a batch, over all processes.
        seed: decides the order of the pairs and the choice of captions.
        first: the step to start from.
        rank: the number of this process. It gets every `world_size`-th pair of a batch.
        world_size: the number of processes.

    Raises:
        ValueError: the data is smaller than a batch, or no image can be read.
    """

    def read(item_and_draw: tuple[Any, int]) -> Pair | None:
        try:
            return None if item_and_draw[0] is None else data[item_and_draw]
        except Exception as error:  # one bad item must not end a run
            reason = f"{type(error).__name__}: {error}"
            note_once(data.skipped, f"item {shown(item_and_draw[0])}: {reason}")
            return None

    steps = len(data) // batch
    if not steps:
        raise ValueError(f"expected at least {batch} images, for one batch; found {len(data)}")
    size = len(range(rank, batch, world_size))
    threads = max(1, (os.cpu_count() or 2) - 1)
    items = _items_and_draws(data, batch, seed, first, steps, rank, world_size)
    with closing(read_ahead(read, items, 2 * size, threads)) as decoded:
        while True:
            loaded = list(islice(decoded, size))
            pairs = [pair for pair in loaded if isinstance(pair, Pair)]
            pairs = pairs or [_readable(data, read, seed)]
            pairs += [pairs[i % len(pairs)] for i in range(len(loaded) - len(pairs))]
            pixels, captions, labels, negatives, also = zip(*pairs, strict=True)
            yield Batch(
                torch.stack(pixels),
                list(captions),
                torch.tensor(labels),
                list(negatives),
                torch.tensor(also, dtype=torch.long),
            )


def _readable(data: TrainingData, read: Callable[[tuple[Any, int]], Any], seed: int) -> Pair:
    """Return the first readable pair of the data, for a batch that has no readable image."""
    for item in data.items(seed):
        if isinstance(pair := read((item, seed)), Pair):
            return pair
    raise ValueError(f"none of {len(data)} images can be read; the first error: {data.skipped[0]}")


def draw_seed(seed: int, step: int, i: int = 0) -> int:
    """Return a seed for a random draw. It depends on the run's seed, the step and a number `i`."""
    return ((seed * 1_000_003 + step) * 1_000_003 + i) % 2**63


def _items_and_draws(
    data: TrainingData, batch: int, seed: int, first: int, steps: int, rank: int, world_size: int
) -> Iterator[tuple[Any, int]]:
    step = first
    while True:
        epoch, skip = divmod(step, steps)
        found = islice(data.items(draw_seed(seed, epoch)), skip * batch, steps * batch)
        items = chain(found, repeat(None))  # None if a shard now has fewer samples than before
        for step in range(step, step + steps - skip):
            for i, item in enumerate(islice(items, batch)):
                if i % world_size == rank:
                    yield item, draw_seed(seed, step, i)
        step += 1


def augment(pixels: Tensor) -> Tensor:
    """Mirror, enlarge and shift images at random. Pixels are uint8 (B, 3, S, S).

    An image is mirrored with probability 1/2, enlarged by up to 100 % with probability 1/2, and
    shifted by up to 15 % of its side. Reflection fills the area outside an image.
    """
    b = len(pixels)
    side = 1 - (torch.rand(b) - 0.5).clamp(min=0)  # the crop's side, as a share of the image's side
    x, y = 0.3 * (2 * torch.rand(2, b) - 1)  # the crop's centre, from -1 to 1 across the image
    mirror = torch.randint(0, 2, (b,)) * 2 - 1
    none = torch.zeros(b)
    affine = torch.stack([side * mirror, none, x, none, side, y], dim=1).view(b, 2, 3)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    cut = F.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)
    return cut.round().to(torch.uint8)
