"""Compute the features of images. Index files can cache the features for the next task."""

import os
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.checkpoint import Loaded
from miniclip.engines import engine_of
from miniclip.files.tars import Member
from miniclip.model import CLIP
from miniclip.retrieval.building import encode_parts
from miniclip.retrieval.index import Index, Strings, describe, embed
from miniclip.retrieval.pictures import stamp

KINDS = ("proj", "ln_post")
"""`proj` is the embeddings, unit vectors (N, E). `ln_post` is the projection's input (N, W)."""


class Features(NamedTuple):
    """The features of N readable images."""

    vectors: dict[str, Tensor]  # float32: `proj` is (N, E), `ln_post` is (N, W)
    rows: list[int]  # the positions of the readable images in the list of all images
    skipped: list[str]  # a line for each unreadable image: its name and the reason


def encode_both(model: CLIP, pixels: Tensor) -> Tensor:
    """Compute `proj` (B, E) of pixels (B, 3, S, S). Append `ln_post` (B, W) if it can be read."""
    if engine_of(model) != "eager":  # the tensors inside an engine cannot be read
        return embed(model, pixels)
    projected: list[Tensor] = []
    hook = model.vision.proj.register_forward_pre_hook(lambda _, args: projected.append(args[0]))
    try:
        embeds = embed(model, pixels)  # (B, E)
    finally:
        hook.remove()
    if [x.ndim for x in projected] != [2]:  # a fork that does not use `proj` as CLIP does
        return embeds
    return torch.cat([embeds, projected[0].float().cpu()], dim=1)


def picture_features(
    loaded: Loaded,
    pictures: Sequence[str | Member],
    cache: str | os.PathLike[str] | None = None,
    name: tuple[str, str | None] = ("a model in memory", None),
    batch: int = 64,
) -> Features:
    """Compute the features of images, or read them from a cache.

    Args:
        loaded: the model, tokenizer and transform.
        pictures: paths of images, or members of tars, as `find_pictures` returns them.
        cache: a folder that keeps the features in index files. All features are computed again if
            an image or the model changes.
        name: the model's name and revision, which the cache stores.
        batch: the number of images in a batch.

    Returns:
        Both KINDS of features. An engine, or a fork with its own projection, gives only `proj`.

    Raises:
        ValueError: no image can be read.
    """
    names = [os.path.abspath(str(picture)) for picture in pictures]
    if cache is not None:
        encoder = describe(loaded, *name)
        stamps, engine = [*zip(names, map(stamp, pictures))], engine_of(loaded.model)
        about = (encoder.fingerprint, encoder.transform, stamps, engine)
        key = sha256(repr(about).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        files = {kind: Path(cache) / f"{key}.{kind}.safetensors" for kind in KINDS}
        if files["proj"].exists():
            kept = {kind: Index.load(file) for kind, file in files.items() if file.exists()}
            readable = {*kept["proj"].paths}
            rows = [i for i, one in enumerate(names) if one in readable]
            vectors = {kind: index.embeddings for kind, index in kept.items()}
            return Features(vectors, rows, list(kept["proj"].skipped))
    encode, width = partial(encode_both, loaded.model), loaded.model.config.embed_dim
    ((made, rows, skipped),) = encode_parts(encode, loaded.transform, [pictures], batch)
    if not made:
        raise ValueError(
            f"none of the {len(skipped)} files can be read; the first error: {skipped[0]}"
        )
    both = torch.cat(made)
    vectors = {"proj": both[:, :width].contiguous()}
    if both.shape[1] > width:
        vectors["ln_post"] = both[:, width:].contiguous()
    # The file of `proj` is written last: if it exists, the cache is complete.
    for kind in reversed([*vectors] if cache is not None else []):
        files[kind].parent.mkdir(parents=True, exist_ok=True)
        made_by = encoder
        if kind == "ln_post":  # its own fingerprint, so that a search by text refuses this index
            made_by = encoder._replace(fingerprint=f"ln_post:{encoder.fingerprint}")
        paths = Strings.pack(names[row] for row in rows)
        Index(vectors[kind], paths, made_by, skipped).save(files[kind])
    return Features(vectors, rows, skipped)
