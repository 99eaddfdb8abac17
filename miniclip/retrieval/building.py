"""Pictures -> an index. The same command continues it after a kill, and updates it later."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
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
from miniclip.errors import ImageError
from miniclip.files.ahead import read_ahead
from miniclip.files.tars import Member
from miniclip.files.writing import lock
from miniclip.retrieval.index import BLOCK, Encoder, Index, Strings, describe, embed
from miniclip.retrieval.pictures import Stamp, pixels_of, stamp
from miniclip.terminal import counted, progress

PART = 512
"""Pictures between two savings: so many, at most, are embedded again after a kill."""

Stamped = tuple[str | Member, Stamp]


def embed_images(
    loaded: Loaded,
    pictures: Sequence[str | Member],
    name: str = "a model in memory",
    batch: int = 64,
    workers: int | None = None,
) -> Index:
    """An index in memory of pictures that `find_pictures` has found, or of paths.

    Threads (`workers`, or as many as torch uses) decode ahead of the encoder; processes were no
    faster, because Pillow decodes outside Python's lock. A picture that cannot be read is listed in
    `skipped`. Raises ValueError if an embedding is not a unit vector.
    """
    check_counts(batch, workers)
    stamped = [(picture, stamp(picture)) for picture in pictures]
    ((embeddings, paths, stamps, skipped),) = embed_parts(loaded, [stamped], batch, workers)
    return Index(embeddings, paths, describe(loaded, name), skipped, os.getcwd(), stamps)


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
    """`embed_images` into the file `out`, with what `find_pictures` found damaged among `skipped`.

    An index that is there already is updated: it then has the pictures given and no others, and an
    embedding whose picture has not changed is kept, bit for bit. A picture is known by its path as
    it is written, its size and its time of change. A hash would mean reading every file again.
    `force` embeds everything again.

    A part is saved every 512 pictures, in a folder beside `out` that goes when the index is whole.
    A build that was killed and is started again continues, and ends in the same bytes; so does one
    under torchrun, each of whose processes calls this. Raises ValueError if another model made what
    is there, or no picture can be read.
    """
    check_counts(batch, workers)
    if Path(out).is_dir():
        raise ValueError(f"{out}: is a folder; expected the name of a file to be written")
    with only_builder(Path(out).with_name(f"{Path(out).name}.parts")):
        return _build(Path(out), loaded, pictures, encoder, damage, batch, workers, force)


@contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Make the folder of the parts, and lock it. Raises ValueError if another process has it.

    Under torchrun the first process does this for all.
    """
    if dist.is_initialized() and dist.get_rank():
        return (yield)
    held = -1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder)
    except BlockingIOError:
        raise ValueError(f"{folder}: another process writes this index now") from None
    except OSError as error:
        if not folder.is_dir():
            raise ValueError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # if there is no part in it
        if held >= 0:
            os.close(held)


def _build(
    out: Path,
    loaded: Loaded,
    pictures: Sequence[str | Member],
    encoder: Encoder,
    damage: Sequence[str],
    batch: int,
    workers: int | None,
    force: bool,
) -> Index:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    barrier = dist.barrier if dist.is_initialized() else lambda: None
    folder = out.with_name(f"{out.name}.parts")
    old = Index.load(out) if out.exists() else None  # nothing but an index is replaced
    if force:
        old = None
        if rank == 0:
            for left in folder.glob("*"):
                left.unlink()
        barrier()
    for path in [out] * bool(old) + sorted(folder.glob("*.safetensors"))[:1]:
        advice = "name another file, or replace it with --force"
        Index.load(path).encoder.check(encoder, str(path), advice)

    stamped = [(picture, stamp(picture)) for picture in pictures]
    kept = unchanged(old, stamped) if old else {}
    todo = [one for one in stamped if str(one[0]) not in kept]
    parts = [todo[i : i + PART] for i in range(0, len(todo), PART)]
    decides = (encoder.fingerprint, encoder.transform, loaded.model.logit_scale.device.type, batch)
    keys = [sha256(repr((decides, part)).encode()).hexdigest() for part in parts]
    files = [folder / f"{i:06}-{key[:16]}.safetensors" for i, key in enumerate(keys)]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    if rank == 0:
        if old:
            total = counted(len(pictures), "picture")
            gone = len(set(old.paths) - {str(picture) for picture in pictures})
            says = f"{len(kept):,} of {total} are as they were, {gone:,} are gone"
            print(f"{out}: updated, {says}", file=sys.stderr)
        if done := len(parts) - len(missing):
            print(f"{out}: continued, {done} of {len(parts)} parts were done", file=sys.stderr)
    barrier()  # before a part is added to those that the others count

    mine = missing[rank::world]
    made = embed_parts(loaded, [parts[i] for i in mine], batch, workers, silent=rank > 0)
    for i, (embeddings, paths, stamps, skipped) in zip(mine, made, strict=True):
        Index(embeddings, paths, encoder, skipped, os.getcwd(), stamps).save(files[i])
    barrier()
    if rank == 0:
        new = [Index.load(file) for file in files]
        reasons = [*damage, *chain(*(part.skipped for part in new))]
        where = {name: (0, row) for name, row in kept.items()}
        for i, part in enumerate(new, 1):
            where |= {name: (i, row) for row, name in enumerate(part.paths)}
        if not where:
            shutil.rmtree(folder)  # another time they may be readable
            raise ValueError(
                f"none of the pictures can be read, {len(reasons)}; the first: {reasons[0]}"
            )
        names = [name for name in map(str, pictures) if name in where]
        rows = gather([old or new[0], *new], [where[name] for name in names], folder / "embeddings")
        Index(rows[0], Strings.pack(names), encoder, reasons, os.getcwd(), rows[1]).save(out)
        shutil.rmtree(folder)
    barrier()
    return Index.load(out)


def check_counts(batch: int, workers: int | None) -> None:
    """Raises ValueError for a batch or a number of workers below 1."""
    for name, count in (("batch", batch), ("workers", workers)):
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")


def unchanged(old: Index, pictures: Sequence[Stamped]) -> dict[str, int]:
    """The row in `old` of each picture that is as it was."""
    rows = {key: i for i, key in enumerate(zip(old.paths, map(tuple, old.stamps.tolist())))}
    now = ((str(picture), stamp) for picture, stamp in pictures)
    return {key[0]: rows[key] for key in now if key in rows}


def embed_parts(
    loaded: Loaded,
    parts: Sequence[Sequence[Stamped]],
    batch: int = 64,
    workers: int | None = None,
    silent: bool = False,
) -> Iterator[tuple[Tensor, Strings, Tensor, list[str]]]:
    """For each part its embeddings (N, E), their N paths, their stamps (N, 2), and why the others
    were skipped.

    Which pictures share a batch is decided by their places in the part alone: the rounding of an
    embedding depends on it.
    """
    model, _, transform = loaded
    pictures = (picture for part in parts for picture, _ in part)
    decoded = read_ahead(partial(pixels_of, transform=transform), pictures, 2 * batch, workers)
    with progress(total=sum(map(len, parts)), unit="image", disable=silent) as bar:
        for part in parts:
            rows = [torch.empty(0, model.config.embed_dim)]
            good: list[Stamped] = []
            skipped: list[str] = []
            for start in range(0, len(part), batch):
                some = part[start : start + batch]
                found = list(zip(some, islice(decoded, len(some)), strict=True))
                skipped += [str(x) for _, x in found if isinstance(x, ImageError)]
                good += [one for one, x in found if isinstance(x, Tensor)]
                if pixels := [x for _, x in found if isinstance(x, Tensor)]:
                    rows.append(embed(model, torch.stack(pixels)))
                bar.update(len(some))
            paths = Strings.pack(str(picture) for picture, _ in good)
            stamps = torch.tensor([stamp for _, stamp in good], dtype=torch.int64).view(-1, 2)
            yield torch.cat(rows), paths, stamps, skipped


def gather(
    indexes: Sequence[Index], taken: Sequence[tuple[int, int]], scratch: Path
) -> tuple[Tensor, Tensor]:
    """The embeddings and stamps of some rows, each given by its index and its place there. The
    embeddings lie in the file `scratch` and not in memory."""
    which, places = torch.tensor(taken).T
    width = indexes[0].embeddings.shape[1]
    embeddings = torch.from_file(str(scratch), shared=True, size=len(taken) * width).view(-1, width)
    stamps = torch.empty(len(taken), 2, dtype=torch.int64)
    for i, index in enumerate(indexes):
        for rows in (which == i).nonzero()[:, 0].split(BLOCK):
            embeddings[rows] = index.embeddings[places[rows]]
            stamps[rows] = index.stamps[places[rows]]
    return embeddings, stamps
