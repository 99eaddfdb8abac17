"""Pairs to compare: a checkpoint as two libraries load it, two checkpoints, or random weights."""

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from miniclip.checkpoint import Loaded
from miniclip.config import CLIPConfig
from miniclip.errors import CheckpointError
from miniclip.files.configs import beyond_transformers
from miniclip.files.hub import has_files, resolve
from miniclip.files.models import meta_device
from miniclip.files.names import TRANSFORMERS, layout_name
from miniclip.model import CLIP
from miniclip.parity.random_weights import randomize
from miniclip.peers import import_transformers
from miniclip.published import PUBLISHED
from miniclip.tokenizer import Tokenizer
from miniclip.transform import ImageTransform

if TYPE_CHECKING:
    from transformers import CLIPModel


def load_pair(
    name: str | os.PathLike[str], against: str | os.PathLike[str] = "transformers", **options: Any
) -> tuple[Loaded, Loaded]:
    """A checkpoint as miniclip loads it, and as transformers does. Or two checkpoints.

    `name` and `against` are embedded names, directories or hub ids; `options` are those of
    `miniclip.load` that say where from. Tokenizer and transform are None if a directory has only
    weights. Raises CheckpointError, and ValueError if transformers cannot load such a model. For a
    fork's checkpoint, load both models yourself and `compare` them.
    """
    if against != "transformers":
        return _load(name, options), _load(against, options)
    if os.path.isfile(name):
        raise ValueError(f"{name} is a file; transformers loads directories: name the one it is in")
    ours = _load(name, options)
    _check_expressible(ours.model.config)
    return ours, _load_with_transformers(name, ours, options)


def _load(name: str | os.PathLike[str], options: dict[str, Any]) -> Loaded:
    model = CLIP.from_pretrained(name, **options)
    kinds: dict[str, Any] = {"tokenizer": Tokenizer, "transform": ImageTransform}
    parts: list[Any] = [
        _load_part(kind, name, options) if has_files(part, name, **options) else None
        for part, kind in kinds.items()
    ]
    return Loaded(model, *parts)


def _load_part(kind: Any, name: str | os.PathLike[str], options: dict[str, Any]) -> Any:
    """A tokenizer or a transform. If it is refused: a function that raises the reason.

    So a directory whose transform is not a CLIP's is compared, and found to differ.
    """
    try:
        return kind.from_pretrained(name, **options)
    except CheckpointError as error:
        return partial(_raise, error)


def _raise(error: Exception, *args: Any, **options: Any) -> None:
    raise error


def _load_with_transformers(
    name: str | os.PathLike[str], ours: Loaded, options: dict[str, Any]
) -> Loaded:
    """transformers' model, tokenizer and processor, the latter two as functions like ours."""
    transformers = import_transformers()
    directory = resolve(name, "model", **options)
    model = transformers.CLIPModel.from_pretrained(directory, dtype=torch.float32)
    tokenizer: Any = None
    transform: Any = None
    if ours.tokenizer:
        directory = resolve(name, "tokenizer", **options)
        their_tokenizer = transformers.CLIPTokenizer.from_pretrained(directory)

        def ids_of(texts: Sequence[str], truncate: bool) -> Tensor:
            rows = their_tokenizer(list(texts), padding=True, truncation=truncate)
            return torch.tensor(rows["input_ids"])

        tokenizer = ids_of
    if ours.transform:
        directory = resolve(name, "transform", **options)
        processor = transformers.CLIPImageProcessorPil.from_pretrained(directory)

        def pixels_of(picture: Image.Image) -> Tensor:
            return processor(picture, return_tensors="pt")["pixel_values"][0]

        transform = pixels_of
    return Loaded(model, tokenizer, transform)


def random_pair(shape: str) -> "tuple[CLIP, CLIPModel]":
    """A model of ours and one of transformers' with the same random weights, in a published shape.

    Needs no checkpoint. Raises ValueError for another shape.
    """
    if shape not in PUBLISHED:
        raise ValueError(f"no shape is called {shape!r}; expected {', '.join(PUBLISHED)}")
    import_transformers()
    with meta_device():
        model = CLIP(PUBLISHED[shape])
    randomize(model.to_empty(device="cpu"))
    return model, transformers_twin(model)


def transformers_twin(model: CLIP) -> "CLIPModel":
    """A CLIPModel of transformers with a copy of our weights. ValueError for what it cannot be."""
    transformers = import_transformers()
    if model.model_type != "clip":
        raise ValueError(
            f"transformers' CLIPModel does not compute what {type(model).__name__} computes"
        )
    _check_expressible(model.config)
    config = transformers.CLIPConfig.from_dict(model.config.to_dict())
    with torch.device("meta"):
        theirs = transformers.CLIPModel(config)
    copy_weights(model, theirs)
    return theirs.eval()


def _check_expressible(config: CLIPConfig) -> None:
    if odd := beyond_transformers(vars(config.vision)) + beyond_transformers(vars(config.text)):
        raise ValueError(f"transformers' CLIP cannot express {', '.join(odd)}: nothing to compare")


def copy_weights(ours: CLIP, theirs: "CLIPModel") -> None:
    """Give transformers' model a copy of our weights, in our precision and on our device."""
    weights = ours.state_dict().items()
    copies = {layout_name(name, TRANSFORMERS): weight.detach().clone() for name, weight in weights}
    theirs.load_state_dict(copies, strict=True, assign=True)
    for module in theirs.modules():  # a buffer, still on the meta device: no checkpoint has it
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor):
            module.position_ids = torch.arange(ids.shape[-1], device=ours.logit_scale.device)[None]
