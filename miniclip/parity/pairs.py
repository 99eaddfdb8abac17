"""Pairs to compare: a checkpoint as two libraries load it, two checkpoints, or random weights.

Random weights and random inputs are such that a fault shows: no parameter is 0, 1 or a default.
"""

import math
import os
import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from miniclip.checkpoint import Loaded
from miniclip.config import CLIPConfig
from miniclip.errors import CheckpointError
from miniclip.files.configs import beyond_transformers
from miniclip.files.hub import has_files, resolve
from miniclip.files.models import meta_device
from miniclip.files.names import TRANSFORMERS, layout_name
from miniclip.follow import end_token
from miniclip.model import CLIP
from miniclip.peers import import_transformers
from miniclip.published import PUBLISHED, published_shape
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
    """A model, and its tokenizer and transform. One that is refused is a function that raises the
    reason, so that it is compared, and found to differ."""
    parts: dict[str, Any] = {"tokenizer": Tokenizer, "transform": ImageTransform}
    for part, kind in parts.items():
        try:
            found = has_files(part, name, **options)
            parts[part] = kind.from_pretrained(name, **options) if found else None
        except CheckpointError as error:
            parts[part] = partial(_raise, error)
    return Loaded(CLIP.from_pretrained(name, **options), **parts)


def _raise(error: Exception, *args: Any, **options: Any) -> None:
    raise error


def _load_with_transformers(
    name: str | os.PathLike[str], ours: Loaded, options: dict[str, Any]
) -> Loaded:
    """transformers' model, tokenizer and processor, the latter two as functions like ours."""
    transformers = import_transformers()

    def load_part(kind: Any, part: str, **more: Any) -> Any:
        return kind.from_pretrained(resolve(name, part, **options), **more)

    tokenizer: Any = None
    transform: Any = None
    if ours.tokenizer:
        their_tokenizer = load_part(transformers.CLIPTokenizer, "tokenizer")

        def tokenizer(texts: Sequence[str], truncate: bool) -> Tensor:
            rows = their_tokenizer(list(texts), padding=True, truncation=truncate)
            return torch.tensor(rows["input_ids"])

    if ours.transform:
        processor = load_part(transformers.CLIPImageProcessorPil, "transform")

        def transform(picture: Image.Image) -> Tensor:
            return processor(picture, return_tensors="pt")["pixel_values"][0]

    model = load_part(transformers.CLIPModel, "model", dtype=torch.float32)
    return Loaded(model, tokenizer, transform)


def random_pair(shape: str) -> "tuple[CLIP, CLIPModel]":
    """A model of ours and one of transformers' with the same random weights, in a published shape.

    Needs no checkpoint. Raises ValueError for another shape.
    """
    shape = published_shape(shape)
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


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Redraw every parameter, so that activations keep a size near 1 and each weight counts.

    Initial weights hide faults: nobody sees a bias of zeros that is lost. The logit scale is
    ln 100, the largest that OpenAI's training allows. There rounding shows most.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == "logit_scale":
            parameter.fill_(math.log(100))
            continue
        is_table = name.endswith(("token_embed.weight", "pos_embed", "register_embed"))
        std = 0.3 if parameter.ndim < 2 or is_table else parameter[0].numel() ** -0.5
        mean = 1.0 if re.search(r"ln_\w+\.weight$", name) else 0.0
        parameter.copy_(torch.empty(parameter.shape).normal_(mean, std, generator=generator))


def random_inputs(
    config: CLIPConfig, images: int = 2, texts: int = 3, tokens: int = 9, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Noise (images, channels, height, width), and ids (texts, tokens).

    The end token is at another position in each row. Random ids follow it: padding may be anything.
    """
    generator = torch.Generator().manual_seed(seed)
    vision, text = config.vision, config.text
    size = (images, vision.channels, *vision.height_width)
    ids = torch.randint(3, text.vocab_size - 2, (texts, tokens), generator=generator)
    rows = torch.arange(texts)
    ids[rows, tokens - 1 - rows % (tokens - 1)] = end_token(text)
    return torch.randn(size, generator=generator), ids
