"""Pictures and their captions, from folders, from metadata files or from tar shards.

Whatever the source, a batch is decided by three numbers: the seed, the epoch and the step. So a
run that is resumed, or spread over more processes, sees what an undisturbed run would have seen.
"""

import csv
import json
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

from miniclip.errors import ImageError, listed, shown
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
)
from miniclip.training.shards import Shards, is_address
from miniclip.transform import ImageTransform
from miniclip.zeroshot.data import is_visible_file, labelled_images

TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "a photo of a {}.",
    "a photo of the {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of a {}.",
    "a close-up photo of a {}.",
    "a picture of a small {}.",
    "a picture of a large {}.",
    "this is a photo of a {}.",
    "an image of a {}.",
)

MEMORY = 2**31
"""Pictures are decoded once and kept, where all of a data set takes at most so many bytes."""


Entry = tuple[Path, Sequence[str], int | None]
"""A picture file, captions that are true of it, and a label or None."""


class Pictures:
    """Picture files, each with the captions that are true of it, and a label or None."""

    def __init__(
        self,
        entries: Sequence[Entry],
        transform: ImageTransform,
    ) -> None:
        self.entries = entries
        self.skipped: list[str] = []
        self._to_bytes = to_bytes(transform)
        self._also = labels_of_all(entries)
        self._keeps = len(entries) * 3 * transform.crop_size**2 <= MEMORY
        self._kept: dict[Path, Tensor] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def items(self, seed: int) -> Iterator[int]:
        """The numbers of all files, in an order that the seed decides."""
        return shuffled(len(self), seed)

    def captions(self) -> Iterator[str]:
        """Every caption, once for each set of captions that it stands in."""
        for captions in {id(captions): captions for _, captions, _ in self.entries}.values():
            yield from captions

    def __getitem__(self, item_and_draw: tuple[int, int]) -> Pair | None:
        i, draw = item_and_draw
        path, captions, label = self.entries[i]
        if (pixels := self._pixels(path)) is None:
            return None
        caption = random.Random(draw).choice(captions)
        if label is not None:
            return Pair(pixels, caption, label)
        return Pair(pixels, caption, caption_label(caption), also=self._also[path])

    def _pixels(self, path: Path) -> Tensor | None:
        if path in self._kept:
            return self._kept[path]
        try:
            pixels = self._to_bytes(open_image(path))
        except ImageError as error:
            note_once(self.skipped, with_name(str(path), error))
            return None
        if self._keeps:
            self._kept[path] = pixels
        return pixels


def labels_of_all(entries: Iterable[Entry]) -> dict[Path, list[int]]:
    """The labels of all captions of each picture, over all its rows. The picture with the most
    captions decides how many; another repeats its first. None at all if no picture has two."""
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
    """Everything that may be said of a picture of a class: its label, in each template.

    >>> class_captions("tea cup")[3]
    'a photo of a tea cup.'
    """
    return tuple(template.replace("{}", label) for template in TEMPLATES)


def class_folders(root: Path, transform: ImageTransform) -> Pictures:
    """`root/<class>/`, with pictures in it and deeper; the classes are called as `miniclip eval`
    calls them. Raises ValueError where there are no two."""
    images = labelled_images(root)
    if (found := len(set(images.classes))) < 2:
        raise ValueError(
            f"{root}: expected at least two folders of pictures, one for each class, found "
            f"{found}: with nothing to tell apart there is nothing to learn"
        )
    captions = [class_captions(label) for label in images.labels]
    entries = zip(images.paths, images.classes, strict=True)
    return Pictures([(path, captions[label], label) for path, label in entries], transform)


def texts_beside(root: Path, transform: ImageTransform) -> Pictures | None:
    """Pictures in `root` and deeper, each with its caption in a .txt of its name, as img2dataset
    writes them. None if no picture has one. Those without, or with an empty one, are counted."""
    files = sorted(path for path in root.rglob("*") if is_visible_file(path, root))
    kinds = {f".{kind}" for kind in Shards.PICTURES}
    found = {path: path.with_suffix(".txt") for path in files if path.suffix.lower() in kinds}
    if not {*found.values()} & {*files}:
        return None
    entries: list[Entry] = []
    for path, text in found.items():
        caption = text.read_text("utf-8-sig", "replace").strip() if text.is_file() else ""
        entries += [(path, (caption,), None)] if caption else []
    pictures = Pictures(entries, transform)
    if missing := len(found) - len(entries):
        pictures.skipped.append(f"{root}: pictures without a caption in a .txt: {missing:,}")
    return pictures


METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
COLUMNS = ("file_name", "text")


def captioned_pictures(
    metadata: Path, transform: ImageTransform, columns: tuple[str, str] = COLUMNS
) -> Pictures:
    """The `imagefolder` convention of Hugging Face's datasets: a row for each picture beside the
    file, with its `file_name` and its `text`, or other `columns`. `text` may be a list of captions:
    one is drawn each time. Each is true of every picture that lists it, in this row or another.
    Empty captions are left out and counted in `skipped`. Raises ValueError, which names the row.
    """
    entries: list[Entry] = []
    lists: dict[tuple[str, ...], tuple[str, ...]] = {}  # pictures with equal lists share one
    empty: list[int] = []  # the row of each empty caption
    for row, values in _rows(metadata):
        if missing := [column for column in columns if column not in values]:
            raise ValueError(
                f"{metadata}, row {row}: no column {missing[0]!r}; say by --image-column and "
                f"--text-column which to read, of {listed(map(str, values), 9)}"
            )
        name, text = (values[column] for column in columns)
        texts = text if isinstance(text, list) and text else [text]
        captions = tuple(text for text in texts if text not in (None, []) and str(text).strip())
        empty += [row] * (len(texts) - len(captions))
        if not isinstance(name, str) or not all(isinstance(each, str) for each in captions):
            raise ValueError(f"{metadata}, row {row}: expected a {columns[0]} and a {columns[1]}")
        if captions:
            entries.append((metadata.parent / name, lists.setdefault(captions, captions), None))
    if not entries:
        raise ValueError(f"{metadata}: no rows with a caption; expected one for each picture")
    pictures = Pictures(entries, transform)
    if empty:
        note = f"empty captions left out: {len(empty):,}, the first in row {empty[0]}"
        pictures.skipped.append(f"{metadata}: {note}")
    return pictures


def _rows(metadata: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(metadata, encoding="utf-8-sig", newline="") as file:  # -sig: Excel writes one
            if metadata.suffix != ".jsonl":
                delimiter = max(",\t;", key=file.readline().count)  # of the header
                file.seek(0)
                yield from enumerate(csv.DictReader(file, delimiter=delimiter), 1)
                return
            for i, line in enumerate(file, 1):
                value = json.loads(line) if line.strip() else None
                if isinstance(value, dict):
                    yield i, value
                elif value is not None:
                    raise ValueError(f"row {i} is not an object")
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{metadata}: expected rows that can be read: {error}") from None


def open_data(
    name: str | os.PathLike[str],
    transform: ImageTransform,
    columns: tuple[str, str] = COLUMNS,
) -> TrainingData:
    """The training data that a name stands for: `shapes`, the world this package draws; a folder
    with metadata.jsonl, .csv or .tsv, or such a file; a folder of tar shards, or one, or a
    command or an address of such; a folder of pictures with a .txt beside each; a folder of class
    folders.

    Raises ValueError, which says what was found instead.
    """
    if name == "shapes":
        from miniclip.training.drawn import Shapes

        return Shapes()
    if is_address(name):
        return Shards([str(name)], transform)
    root = Path(name).expanduser()
    if root.is_file() and root.suffix == ".tar":
        return Shards([str(root)], transform)
    for metadata in (root, *(root / file for file in METADATA)):
        if metadata.is_file() and metadata.suffix in (".jsonl", ".csv", ".tsv"):
            return captioned_pictures(metadata, transform, columns)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder of training data, nor a .tar or a metadata file")
    shards = [str(path) for path in root.glob("*.tar")]
    if shards:
        return Shards(shards, transform)
    return texts_beside(root, transform) or class_folders(root, transform)


def batches(
    data: TrainingData, batch: int, seed: int, first: int = 0, rank: int = 0, world_size: int = 1
) -> Generator[Batch, None, None]:
    """This process's share of every batch from step `first` on, without end.

    A batch has `batch` pairs over all processes; an epoch's last, incomplete batch is left out.
    Threads decode the pictures ahead of the model. Another picture of the batch takes the place of
    one that cannot be read, and an error of the data is noted. Raises ValueError if none can.
    """

    def read(item_and_draw: tuple[Any, int]) -> Pair | None:
        try:
            return None if item_and_draw[0] is None else data[item_and_draw]
        except Exception as error:  # one item out of millions must not end a run
            reason = f"{type(error).__name__}: {error}"
            note_once(data.skipped, f"item {shown(item_and_draw[0])}: {reason}")
            return None

    steps = len(data) // batch
    if not steps:
        raise ValueError(f"{len(data)} pictures are fewer than a batch of {batch}")
    drawn = (
        [(item, draw_seed(seed, step, i)) for i, item in share]
        for step, share in _shares(data, batch, seed, first, steps, rank, world_size)
    )
    size = len(range(rank, batch, world_size))
    threads = max(1, (os.cpu_count() or 2) - 1)
    items = chain.from_iterable(drawn)
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
    """A pair to stand in for a whole batch that cannot be read."""
    for item in data.items(seed):
        if isinstance(pair := read((item, seed)), Pair):
            return pair
    raise ValueError(f"no picture can be read, of {len(data)}; the first: {data.skipped[0]}")


def draw_seed(seed: int, step: int, i: int = 0) -> int:
    """One number for each (seed, step, place in the batch), to draw from."""
    return ((seed * 1_000_003 + step) * 1_000_003 + i) % 2**63


def _shares(
    data: TrainingData, batch: int, seed: int, first: int, steps: int, rank: int, world_size: int
) -> Iterator[tuple[int, list[tuple[int, Any]]]]:
    step = first
    while True:
        epoch, skip = divmod(step, steps)
        found = islice(data.items(draw_seed(seed, epoch)), skip * batch, steps * batch)
        items = chain(found, repeat(None))  # a shard may lack what it had when it was counted
        for _ in range(steps - skip):
            numbered = enumerate(islice(items, batch))
            yield step, [(i, item) for i, item in numbered if i % world_size == rank]
            step += 1


def augment(pixels: Tensor) -> Tensor:
    """Mirror half of the pictures, zoom into half by up to 2, and move each by up to 15 %.

    (B, 3, S, S) uint8. What comes in over an edge is the picture's own reflection.
    """
    b = len(pixels)
    side = 1 - (torch.rand(b) - 0.5).clamp(min=0)  # of the square cut out; the picture's is 1
    x, y = 0.3 * (2 * torch.rand(2, b) - 1)  # its centre; the picture's edges are at -1 and 1
    mirror = torch.randint(0, 2, (b,)) * 2 - 1
    none = torch.zeros(b)
    affine = torch.stack([side * mirror, none, x, none, side, y], dim=1).view(b, 2, 3)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    cut = F.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)
    return cut.round().to(torch.uint8)
