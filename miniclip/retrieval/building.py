"""Build an index of images. A second build continues a killed build, or updates the index."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from os import PathLike
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from miniclip.checkpoint import Loaded
from miniclip.engines import engine_of
from miniclip.errors import ImageError
from miniclip.files.ahead import read_ahead
from miniclip.files.tars import Member
from miniclip.files.writing import blaming_disk, lock
from miniclip.retrieval.index import BLOCK, Encoder, Index, Strings, describe, embed
from miniclip.retrieval.pictures import Stamp, pixels_of, stamp
from miniclip.terminal import counted, progress
from miniclip.transform import ImageTransform

PART = 512
"""The number of images in a part. A killed build continues after the last part that it saved."""

Stamped = tuple[str | Member, Stamp]


def encode_parts(
    encode: Callable[[Tensor], Tensor],
    transform: ImageTransform,
    parts: Sequence[Sequence[str | Member]],
    batch: int = 64,
    workers: int | None = None,
    silent: bool = False,
) -> Iterator[tuple[list[Tensor], list[int], list[str]]]:
    """Encode images in batches, while threads decode the next images.

    Yields three lists for each part: the results of `encode` for batches of pixels (B, 3, S, S),
    the positions of the readable images, and an error message for each unreadable image. The
    batch of an image depends only on the image's position in the part. So a repeated build has the
    same batches and the same rounding errors.
    """
    check_counts(batch, workers)
    read = partial(pixels_of, transform=transform)
    decoded = read_ahead(read, chain(*parts), 2 * batch, workers)
    with progress(total=sum(map(len, parts)), unit="image", disable=silent) as bar:
        for part in parts:
            made: list[Tensor] = []
            rows: list[int] = []
            skipped: list[str] = []
            for start in range(0, len(part), batch):
                found = list(islice(decoded, min(batch, len(part) - start)))
                skipped += [str(x) for x in found if isinstance(x, ImageError)]
                rows += [i for i, x in enumerate(found, start) if isinstance(x, Tensor)]
                if pixels := [x for x in found if isinstance(x, Tensor)]:
                    made.append(encode(torch.stack(pixels)))
                bar.update(len(found))
            yield made, rows, skipped


def embed_parts(
    loaded: Loaded,
    parts: Sequence[Sequence[Stamped]],
    encoder: Encoder,
    batch: int = 64,
    workers: int | None = None,
    silent: bool = False,
) -> Iterator[Index]:
    """Embed each part as an index in memory."""
    encode, width = partial(embed, loaded.model), loaded.model.config.embed_dim
    pictures = [[picture for picture, _ in part] for part in parts]
    encoded = encode_parts(encode, loaded.transform, pictures, batch, workers, silent)
    for part, (made, rows, skipped) in zip(parts, encoded, strict=True):
        paths = Strings.pack(str(part[row][0]) for row in rows)
        stamps = torch.tensor([part[row][1] for row in rows], dtype=torch.int64).view(-1, 2)
        embeddings = torch.cat([torch.empty(0, width, dtype=torch.float32), *made])
        yield Index(embeddings, paths, encoder, skipped, os.getcwd(), stamps)


def embed_images(
    loaded: Loaded,
    pictures: Sequence[str | Member],
    name: str = "a model in memory",
    batch: int = 64,
    workers: int | None = None,
) -> Index:
    """Embed images as an index in memory.

    Args:
        loaded: model, tokenizer and transform.
        pictures: paths, or images from `find_pictures`. Unreadable images are in `Index.skipped`.
        name: the name with which `Index.load_encoder` loads the model.
        batch: the number of images in a batch.
        workers: the number of decoding threads. The default is torch's number of threads.

    Raises:
        ValueError: an embedding is NaN or infinite.
    """
    stamped = [(picture, stamp(picture)) for picture in pictures]
    (index,) = embed_parts(loaded, [stamped], describe(loaded, name), batch, workers)
    return index


def build_index(
    out: str | PathLike[str],
    loaded: Loaded,
    pictures: Sequence[str | Member],
    encoder: Encoder,
    damage: Sequence[str] = (),
    batch: int = 64,
    workers: int | None = None,
    force: bool = False,
) -> Index:
    """Write or update an index file, for a large collection of images.

    An update keeps the embeddings of unchanged images bit for bit, embeds new and changed images,
    and drops missing images. An update compares only path, size and modification time, because
    hashing would read every file. Each part of 512 images is saved in a folder beside `out`. So a
    killed build can continue and gives the same bytes. Under torchrun, each process calls this
    function.

    Args:
        out: the file to write.
        loaded: model, tokenizer and transform.
        pictures: paths, or images from `find_pictures`.
        encoder: describes the model, see `describe`.
        damage: messages about damaged tars, from `find_pictures`. They go into `Index.skipped`.
        batch: the number of images in a batch.
        workers: the number of decoding threads. The default is torch's number of threads.
        force: embed everything again, even if another model made the index.

    Raises:
        ValueError: another model made `out`, another process writes `out`, or no image is readable.
    """
    check_counts(batch, workers)
    if Path(out).is_dir():
        raise ValueError(f"{out}: is a folder; expected the name of a file to write")
    with only_writer(Path(out).with_name(f"{Path(out).name}.parts")) as folder:
        return _build(Path(out), folder, loaded, pictures, encoder, damage, batch, workers, force)


@contextmanager
def only_writer(folder: Path) -> Iterator[Path]:
    """Make a folder and lock it. Raises ValueError if another process has the lock.

    Under torchrun, only the first process makes and locks the folder.
    """
    if dist.is_initialized() and dist.get_rank():
        return (yield folder)
    held = -1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder)
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is writing here") from None
    except OSError as error:
        if not folder.is_dir():
            raise ValueError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()  # this fails if the folder is not empty
        if held >= 0:
            os.close(held)


def _build(
    out: Path, folder: Path, loaded: Loaded, pictures: Sequence[str | Member], encoder: Encoder,
    damage: Sequence[str], batch: int, workers: int | None, force: bool,
) -> Index:  # fmt: skip
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    barrier = dist.barrier if dist.is_initialized() else lambda: None
    old = Index.load(out) if out.exists() else None  # raises if the file is not an index
    if force:
        old = None
        if rank == 0:
            for left in folder.glob("*"):
                left.unlink()
        barrier()
    for path in [out] * bool(old) + sorted(folder.glob("*.safetensors"))[:1]:
        advice = "give another file name, or replace this file with --force"
        Index.load(path).encoder.check(encoder, str(path), advice)

    stamped = [(picture, stamp(picture)) for picture in pictures]
    kept = unchanged(old, stamped) if old else {}
    todo = [one for one in stamped if str(one[0]) not in kept]
    parts = [todo[i : i + PART] for i in range(0, len(todo), PART)]
    # A part's file name contains a hash of `decides` and `part`, which determine the embeddings.
    device, engine = loaded.model.logit_scale.device.type, engine_of(loaded.model)
    decides = (encoder.fingerprint, encoder.transform, device, batch, engine)
    keys = [sha256(repr((decides, part)).encode()).hexdigest() for part in parts]
    files = [folder / f"{i:06}-{key[:16]}.safetensors" for i, key in enumerate(keys)]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    if rank == 0:
        if old:
            total = counted(len(pictures), "image")
            gone = len(set(old.paths) - {str(picture) for picture in pictures})
            says = f"{len(kept):,} of {total} are unchanged, {gone:,} are gone"
            print(f"{out}: updated, {says}", file=sys.stderr)
        if done := len(parts) - len(missing):
            print(f"{out}: continued after {done} of {len(parts)} parts", file=sys.stderr)
    barrier()  # all processes must list the files before one process adds a file

    mine = missing[rank::world]
    some = [parts[i] for i in mine]
    for i, index in zip(mine, embed_parts(loaded, some, encoder, batch, workers, rank > 0)):
        index.save(files[i])
    barrier()
    if rank == 0:
        indexes = [*([old] if old else []), *map(Index.load, files)]
        reasons = [*damage, *chain(*(index.skipped for index in indexes[bool(old) :]))]
        where = {name: (0, row) for name, row in kept.items()}
        for i, index in list(enumerate(indexes))[bool(old) :]:
            where |= {name: (i, row) for row, name in enumerate(index.paths)}
        if not where:
            shutil.rmtree(folder)  # so that the next build tries the images again
            found = f"{counted(len(reasons), 'error')}; the first: {reasons[0]}"
            raise ValueError(f"none of the images can be read: {found}")
        names = [name for name in map(str, pictures) if name in where]
        rows = gather(indexes, [where[name] for name in names], folder / "embeddings")
        Index(rows[0], Strings.pack(names), encoder, reasons, os.getcwd(), rows[1]).save(out)
        shutil.rmtree(folder)
    barrier()
    return Index.load(out)


def check_counts(batch: int, workers: int | None) -> None:
    """Raise ValueError for a batch or a number of workers below 1."""
    for name, count in (("batch", batch), ("workers", workers)):
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")


def unchanged(old: Index, pictures: Sequence[Stamped]) -> dict[str, int]:
    """Return {name: row in `old`} for the unchanged images."""
    rows = {key: i for i, key in enumerate(zip(old.paths, map(tuple, old.stamps.tolist())))}
    now = ((str(picture), stamp) for picture, stamp in pictures)
    return {key[0]: rows[key] for key in now if key in rows}


def gather(
    indexes: Sequence[Index], taken: Sequence[tuple[int, int]], scratch: Path
) -> tuple[Tensor, Tensor]:
    """Collect embeddings (N, E) and stamps (N, 2) from several indexes.

    Each item of `taken` is a pair: an index's position in `indexes`, and a row of this index.
    The collected embeddings are in the file `scratch`, because they may not fit into memory.
    """
    which, places = torch.tensor(taken).T
    width = indexes[0].embeddings.shape[1]
    size = len(taken) * width
    if hasattr(os, "posix_fallocate"):  # if the disk is full, a write to a mapped file ends Python
        with blaming_disk(scratch), open(scratch, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * size)
    mapped = torch.from_file(str(scratch), shared=True, size=size, dtype=torch.float32)
    embeddings = mapped.view(-1, width)
    stamps = torch.empty(len(taken), 2, dtype=torch.int64)
    for i, index in enumerate(indexes):
        for rows in (which == i).nonzero()[:, 0].split(BLOCK):
            embeddings[rows] = index.embeddings[places[rows]]
            stamps[rows] = index.stamps[places[rows]]
    return embeddings, stamps
