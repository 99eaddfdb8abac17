"""Pictures -> an index, in parts that survive the end of the process."""

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from miniclip.checkpoint import Loaded
from miniclip.errors import ImageError
from miniclip.files.reading import read_json
from miniclip.files.writing import write_json
from miniclip.retrieval.index import Encoder, Index, Strings, describe, embed
from miniclip.retrieval.pictures import Source, pixels_of
from miniclip.zeroshot.data import read_ahead

PART = 512
"""Pictures between two savings: so many, at most, are embedded again after a kill."""


def embed_images(
    loaded: Loaded,
    pictures: Sequence[Source],
    name: str = "a model in memory",
    batch: int = 64,
    workers: int | None = None,
) -> Index:
    """An index in memory of pictures that `find_pictures` has found, or of paths.

    Threads (`workers`, or as many as torch uses) decode ahead of the encoder. A picture that cannot
    be read is listed in `skipped`. Raises ValueError where an embedding is no unit vector.

    Threads and not processes: of a JPEG of 640 x 480 Python's lock is held for 3 % of the time
    (0.2 of 7 ms), and two processes of a DataLoader, alternated with two threads on two busy cores,
    were no faster: threads gave 1.02, 1.12 and 0.90 times as many images a second (an encoder of
    one thin layer, the checkpoints shapes and cifar10; torch 2.13.0, 2026-11-24).
    """
    check_counts(batch, workers)
    ((embeddings, paths, skipped),) = embed_parts(loaded, [pictures], batch, workers)
    return Index(embeddings, Strings.pack(paths), describe(loaded, name), skipped, os.getcwd())


def build_index(
    out: str | PathLike[str],
    loaded: Loaded,
    pictures: Sequence[Source],
    encoder: Encoder,
    damage: Sequence[str] = (),
    batch: int = 64,
    workers: int | None = None,
) -> Index:
    """`embed_images` into the file `out`, with what `find_pictures` found damaged among `skipped`.

    Saves a part every 512 pictures, in a folder beside `out` that goes when the index is whole. A
    build that was killed and is started again continues, and ends in the same bytes; so does one
    under torchrun, each of whose processes calls this. Raises ValueError where the folder holds the
    parts of another build, or no picture can be read.
    """
    check_counts(batch, workers)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    barrier = dist.barrier if dist.is_initialized() else lambda: None
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; expected the name of a file to be written")
    if out.exists():
        Index.load(out)  # an older index is replaced, and nothing else is
    folder = out.with_name(f"{out.name}.parts")
    parts = [pictures[i : i + PART] for i in range(0, len(pictures), PART)]
    files = [folder / f"{i:06}.safetensors" for i in range(len(parts))]
    if rank == 0:
        begin(folder, build_settings(loaded, pictures, encoder, batch))
    barrier()
    missing = [i for i, file in enumerate(files) if not file.exists()]
    if rank == 0 and len(missing) < len(parts):
        print(
            f"{out}: continued, {len(parts) - len(missing)} of {len(parts)} parts were done",
            file=sys.stderr,
        )
    barrier()  # before a part is added to those that the others count

    mine = missing[rank::world]
    made = embed_parts(loaded, [parts[i] for i in mine], batch, workers, silent=rank > 0)
    for i, (embeddings, paths, skipped) in zip(mine, made, strict=True):
        index = Index(embeddings, Strings.pack(paths), encoder, skipped, os.getcwd())
        index.save(files[i])
    barrier()
    if rank == 0:
        merged([Index.load(file) for file in files], damage, folder / "embeddings").save(out)
        shutil.rmtree(folder)
    barrier()
    return Index.load(out)


def check_counts(batch: int, workers: int | None) -> None:
    """Raises ValueError for a batch or a number of workers below 1."""
    for name, count in (("batch", batch), ("workers", workers)):
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")


def embed_parts(
    loaded: Loaded,
    parts: Sequence[Sequence[Source]],
    batch: int = 64,
    workers: int | None = None,
    silent: bool = False,
) -> Iterator[tuple[Tensor, list[str], list[str]]]:
    """For each part its embeddings (N, E), their N paths, and why the others were skipped.

    Which pictures share a batch is decided by their places in the part alone: the rounding of an
    embedding depends on it.
    """
    model, _, transform = loaded
    decode = partial(pixels_of, transform=transform)
    decoded = read_ahead(decode, chain(*parts), 2 * batch, workers)
    total = sum(map(len, parts))
    with tqdm(total=total, unit="image", delay=2, disable=silent or None, leave=False) as bar:
        for part in parts:
            rows = [torch.empty(0, model.config.embed_dim)]
            paths: list[str] = []
            skipped: list[str] = []
            for start in range(0, len(part), batch):
                some = part[start : start + batch]
                found = list(zip(map(str, some), islice(decoded, len(some)), strict=True))
                good = [(path, x) for path, x in found if isinstance(x, Tensor)]
                skipped += [str(x) for _, x in found if isinstance(x, ImageError)]
                if good:
                    names, pixels = zip(*good, strict=True)
                    rows.append(embed(model, torch.stack(pixels)))
                    paths += names
                bar.update(len(some))
            yield torch.cat(rows), paths, skipped


def build_settings(
    loaded: Loaded, pictures: Sequence[Source], encoder: Encoder, batch: int
) -> dict[str, Any]:
    """What decides the bytes of a part."""
    listed = "\0".join(map(repr, pictures)).encode("utf-8", "surrogateescape")
    return encoder._asdict() | {
        "transform": repr(encoder.transform),
        "device": loaded.model.logit_scale.device.type,
        "batch": batch,
        "part": PART,
        "pictures": sha256(listed).hexdigest(),
        "folder": os.getcwd(),
    }


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder for parts, or see that those in it were made with the same settings."""
    path = folder / "settings.json"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written: {error.strerror}") from None
    found = read_json(path)
    if changed := [name for name, value in settings.items() if found.get(name) != value]:
        raise ValueError(
            f"{folder}: holds an unfinished index with another {', '.join(changed)}; give the same "
            "again to continue it, or delete the folder"
        )


def merged(parts: Sequence[Index], damage: Sequence[str], scratch: Path) -> Index:
    """The parts as one index, which lies in the file `scratch` and not in memory."""
    skipped = [*damage, *chain(*(part.skipped for part in parts))]
    rows = sum(map(len, parts))
    if not rows:
        shutil.rmtree(scratch.parent)  # another time they may be readable
        raise ValueError(
            f"none of the pictures can be read, {len(skipped)}; the first: {skipped[0]}"
        )
    width = parts[0].embeddings.shape[1]
    size = rows * width
    embeddings = torch.from_file(str(scratch), shared=True, size=size).view(rows, width)
    torch.cat([part.embeddings for part in parts], out=embeddings)
    paths = Strings.pack(chain(*(part.paths for part in parts)))
    return Index(embeddings, paths, parts[0].encoder, skipped, parts[0].folder)


class Throughput(NamedTuple):
    """Pictures a second."""

    decoding: float  # to pixels, by the workers, with nothing else to do
    encoding: float  # by the vision tower, of pixels that are there
    together: float


def throughput(
    loaded: Loaded, pictures: Sequence[Source], batch: int = 64, workers: int | None = None
) -> Throughput:
    """How fast `embed_images` is, and how fast each half of its work alone."""
    check_counts(batch, workers)
    model, _, transform = loaded
    pixels = torch.zeros(batch, 3, transform.crop_size, transform.crop_size)
    sizes = [min(batch, len(pictures) - i) for i in range(0, len(pictures), batch)]
    embed(model, pixels)  # the first call of a model takes longer

    def rate(work: Iterable[Any]) -> float:
        start = time.perf_counter()
        deque(work, maxlen=0)
        return len(pictures) / (time.perf_counter() - start)

    return Throughput(
        rate(read_ahead(partial(pixels_of, transform=transform), pictures, 2 * batch, workers)),
        rate(embed(model, pixels[:size]) for size in sizes),
        rate(embed_parts(loaded, [pictures], batch, workers)),
    )
