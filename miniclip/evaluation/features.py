"""Features of pictures, computed once: in memory, or kept in index files for the next task."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.checkpoint import Loaded
from miniclip.errors import ImageError
from miniclip.files.ahead import read_ahead
from miniclip.files.tars import Member
from miniclip.model import CLIP
from miniclip.retrieval.index import Encoder, Index, Strings, describe, embed
from miniclip.retrieval.pictures import pixels_of
from miniclip.terminal import progress
from miniclip.transform import ImageTransform

KINDS = ("proj", "ln_post")
"""Unit vectors in the shared space, (N, E); and what the vision tower projects, (N, W)."""


class Features(NamedTuple):
    """What an image encoder makes of pictures."""

    vectors: dict[str, Tensor]  # by kind, (N, E) or (N, W) float32
    rows: list[int]  # of the N pictures that can be read: their places among those asked for
    skipped: list[str]  # for each of the others, which and why


@torch.no_grad()
def encode_pictures(
    encode: Callable[[Tensor], Tensor],
    transform: ImageTransform,
    pictures: Sequence[str | Member],
    batch_size: int = 64,
) -> tuple[Tensor, list[int], list[str]]:
    """`encode` batches of pixels (B, 3, S, S), which threads decode ahead of it.

    Returns what it made of N pictures, (N, ...), their places among `pictures`, and for each
    picture that cannot be read, which and why. Raises ValueError if none can be.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1 image")
    rows: list[int] = []
    skipped: list[str] = []

    def readable() -> Iterator[Tensor]:
        read = partial(pixels_of, transform=transform)
        results = read_ahead(read, pictures, ahead=2 * batch_size)
        for i, pixels in enumerate(progress(results, "image", total=len(pictures))):
            if isinstance(pixels, ImageError):
                skipped.append(str(pixels))
            else:
                rows.append(i)
                yield pixels

    stream, made = readable(), []
    while batch := list(islice(stream, batch_size)):
        made.append(encode(torch.stack(batch)))
    if not made:
        raise ValueError(f"none of the {len(skipped)} files can be read; the first is {skipped[0]}")
    return torch.cat(made), rows, skipped


def encode_both(model: CLIP, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, S, S) to both KINDS of features, side by side: (B, E + W)."""
    projected: list[Tensor] = []
    hook = model.vision.proj.register_forward_pre_hook(lambda _, args: projected.append(args[0]))
    try:
        embeds = embed(model, pixels)  # (B, E)
    finally:
        hook.remove()
    if [x.ndim for x in projected] != [2]:  # a fork that projects something else, or nothing
        return embeds
    return torch.cat([embeds, projected[0].float().cpu()], dim=1)


def picture_features(
    loaded: Loaded,
    pictures: Sequence[str | Member],
    cache: str | os.PathLike[str] | None = None,
    name: tuple[str, str | None] = ("a model in memory", None),
    batch_size: int = 64,
) -> Features:
    """Features of pictures, of both KINDS; of a fork that projects in its own way, only `proj`.

    `cache` is a folder that keeps them as index files, which `miniclip search` can search. They are
    read again for the same pictures, unchanged, and the same model, whose name and revision `name`
    is. Raises ValueError if no picture can be read.
    """
    names = [os.path.abspath(str(picture)) for picture in pictures]
    files: dict[str, Path] = {}
    encoders: dict[str, Encoder] = {}
    if cache is not None:
        proj = describe(loaded, *name)
        # The fingerprint of another model, so that no search takes it for embeddings.
        ln_post = proj._replace(fingerprint=f"ln_post:{proj.fingerprint}")
        encoders = dict(zip(KINDS, (proj, ln_post), strict=True))
        listed = "\0".join([proj.fingerprint, repr(proj.transform), *map(written, pictures)])
        key = sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        files = {kind: Path(cache) / f"{key}.{kind}.safetensors" for kind in KINDS}
        indices = {kind: Index.load(file) for kind, file in files.items() if file.exists()}
        if found := indices.get("proj"):
            readable = {*found.paths}
            rows = [i for i, one in enumerate(names) if one in readable]
            vectors = {kind: index.embeddings for kind, index in indices.items()}
            return Features(vectors, rows, list(found.skipped))
    encode = partial(encode_both, loaded.model)
    both, rows, skipped = encode_pictures(encode, loaded.transform, pictures, batch_size)
    width = loaded.model.config.embed_dim
    vectors = {"proj": both[:, :width].contiguous(), "ln_post": both[:, width:].contiguous()}
    if both.shape[1] == width:
        del vectors["ln_post"]
    for kind in reversed([*vectors] if files else []):  # `proj` last: it says that all is there
        files[kind].parent.mkdir(parents=True, exist_ok=True)
        paths = Strings.pack(names[row] for row in rows)
        Index(vectors[kind], paths, encoders[kind], skipped).save(files[kind])
    return Features(vectors, rows, skipped)


def written(picture: str | Member) -> str:
    """A picture's full name, and when and how large its file was written."""
    try:
        about = os.stat(picture.archive if isinstance(picture, Member) else picture)
    except OSError:
        return f"{os.path.abspath(str(picture))} cannot be read"
    return f"{os.path.abspath(str(picture))} {about.st_mtime_ns} {about.st_size}"
