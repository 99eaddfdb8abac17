"""Load two models to compare, or make two models with the same random weights."""

import math
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from miniclip.checkpoint import Loaded
from miniclip.config import CLIPConfig
from miniclip.errors import CheckpointError
from miniclip.files.configs import beyond_transformers
from miniclip.files.hub import has_files, is_local, resolve
from miniclip.files.models import meta_device
from miniclip.files.names import TRANSFORMERS, layout_name
from miniclip.files.reading import read_json
from miniclip.follow import end_token
from miniclip.model import CLIP
from miniclip.parity.report import raises
from miniclip.peers import import_transformers
from miniclip.published import PUBLISHED, published_shape
from miniclip.tokenizer import Tokenizer
from miniclip.transform import ImageTransform

if TYPE_CHECKING:
    from transformers import CLIPModel

Name = str | os.PathLike[str]


def load_pair(
    name: Name, against: Name = "transformers", names: Name | None = None, **options: Any
) -> tuple[Loaded, Loaded]:
    """Load two models to compare: one checkpoint in both libraries, or two checkpoints or forks.

    Args:
        name: an embedded name, a directory, a hub id, or a fork's Python file. "fork.py" means
            the variable `model` in the file, and "fork.py:build" means `build`. The variable is a
            model, or a triple like the result of `miniclip.load`, or a function without arguments
            that returns a model or a triple.
        against: the second model, given in the same ways as `name`. For "transformers", the second
            model is `name`, loaded with transformers.
        names: a JSON file with `tensor_names`, the table from our names to the fork's names.
        options: where checkpoints come from, as in `miniclip.load`.
    Returns:
        Two triples. A tokenizer or transform is None if there are no files for it.
    Raises:
        CheckpointError: for the same reasons as `miniclip.load`.
        ValueError: transformers cannot load the model, or a Python file does not give a model.
    """
    if against == "transformers" and (os.path.isfile(name) or CODE.fullmatch(str(name))):
        raise ValueError(
            f"{name} is a file, but transformers loads directories: give a directory, or another "
            "model to compare with (--against)"
        )
    one = _load(name, options)
    model: Any = one.model
    if names is not None:
        if isinstance(model, CLIP):
            raise ValueError(f"{name} has our module names, so it needs no table of names: {names}")
        model.tensor_names = read_json(Path(names))
    if against != "transformers":
        return one, _load(against, options)
    _check_expressible(model.config)
    return one, _load_with_transformers(name, one, options)


CODE = re.compile(r"(?P<file>.+\.py)(?::(?P<name>\w+))?")


def alone(model: Any) -> Loaded:
    """Return the triple (model, None, None), without tokenizer and transform."""
    nothing: Any = None
    return Loaded(model, nothing, nothing)


def _load(name: Name, options: dict[str, Any]) -> Loaded:
    """Load a model, its tokenizer and its transform. If the tokenizer or the transform cannot be
    loaded, replace it with a function that raises the error. The comparison then reports it."""
    if code := CODE.fullmatch(str(name)):
        return _made_by(Path(code["file"]), code["name"] or "model")
    if is_local(name):  # the revision belongs to the other model
        options = options | {"revision": None}
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


def _made_by(file: Path, name: str) -> Loaded:
    """Return the model in a Python file, as a triple. The file can import from its own folder."""
    spec: Any = spec_from_file_location(f"fork_{file.stem}", file)
    module = sys.modules[spec.name] = module_from_spec(spec)
    before = {*sys.modules}
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
        made: Any = getattr(module, name)
        made = made if isinstance(made, nn.Module | tuple) else made()
    except Exception as error:  # a user's file can raise any error
        raise ValueError(f"{file}: {name} {raises(error)}") from error
    finally:
        sys.path.remove(str(file.parent))
        # Forget the folder's modules, because a second file may import modules with the same names.
        own = {path.name.partition(".")[0] for path in file.parent.glob("*")} - before
        for new in {*sys.modules} - before:
            if new.partition(".")[0] in own:
                del sys.modules[new]
    made = Loaded(*made) if isinstance(made, tuple) else alone(made)
    if not isinstance(made.model, nn.Module):
        raise ValueError(f"{file}: {name} is a {type(made.model).__name__}; expected an nn.Module")
    return made


def _load_with_transformers(name: Name, ours: Loaded, options: dict[str, Any]) -> Loaded:
    """Load a checkpoint with transformers. Wrap the tokenizer and the image processor in
    functions that a comparison can call like ours."""
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
    """Make a miniclip and a transformers model with the same random weights, in a published shape.

    Needs no checkpoint. Raises ValueError if the shape is not a published one.
    """
    shape = published_shape(shape)
    import_transformers()
    with meta_device():
        model = CLIP(PUBLISHED[shape])
    randomize(model.to_empty(device="cpu"))
    return model, transformers_twin(model)


def transformers_twin(model: CLIP) -> "CLIPModel":
    """Return transformers' CLIPModel with a copy of our weights.

    Raises ValueError if CLIPModel cannot compute what our model computes.
    """
    transformers = import_transformers()
    if model.model_type != "clip":
        raise ValueError(
            f"transformers' CLIPModel does not compute the same as {type(model).__name__}"
        )
    _check_expressible(model.config)
    config = transformers.CLIPConfig.from_dict(model.config.to_dict())
    with torch.device("meta"):
        theirs = transformers.CLIPModel(config)
    copy_weights(model, theirs)
    return theirs.eval()


def _check_expressible(config: CLIPConfig) -> None:
    if odd := beyond_transformers(vars(config.vision)) + beyond_transformers(vars(config.text)):
        raise ValueError(f"transformers' CLIP cannot express {', '.join(odd)}")


def copy_weights(ours: CLIP, theirs: "CLIPModel") -> None:
    """Copy our weights to transformers' model, and keep our precision and our device."""
    weights = ours.state_dict().items()
    copies = {layout_name(name, TRANSFORMERS): weight.detach().clone() for name, weight in weights}
    theirs.load_state_dict(copies, strict=True, assign=True)
    for module in theirs.modules():  # `position_ids` are not in `copies` and may be meta tensors
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor):
            module.position_ids = torch.arange(ids.shape[-1], device=ours.logit_scale.device)[None]


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Randomize every parameter, so that activations stay near 1 and each weight has an effect.

    Initial weights hide faults. If a bias is zero, a missing bias changes nothing. The logit scale
    is ln 100, the largest value in OpenAI's training, because a large scale shows rounding errors.
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
    """Return random pixels (images, channels, height, width) and random ids (texts, tokens).

    The texts have their end tokens at different positions. The ids after an end token are random.
    """
    generator = torch.Generator().manual_seed(seed)
    vision, text = config.vision, config.text
    size = (images, vision.channels, *vision.height_width)
    ids = torch.randint(3, text.vocab_size - 2, (texts, tokens), generator=generator)
    rows = torch.arange(texts)
    ids[rows, tokens - 1 - rows % (tokens - 1)] = end_token(text)
    return torch.randn(size, generator=generator), ids


def common_inputs(
    ours: CLIPConfig, theirs: CLIPConfig, seed: int, shorter: int, images: int = 2, texts: int = 8
) -> tuple[Tensor, Tensor]:
    """Return random pixels and ids that both models can read.

    Each text contains both models' end tokens; their positions differ from text to text. The number
    of tokens of a text is the context length minus `shorter`. A model that wrongly counts positions
    from the end of the context differs only if `shorter` is above 0.
    """
    tokens = max(2, min(ours.text.context_length, theirs.text.context_length) - shorter)
    pixels, ids = random_inputs(ours, images=images, texts=texts, tokens=tokens, seed=seed)
    ids %= min(ours.text.vocab_size, theirs.text.vocab_size)  # the vocabularies' sizes may differ
    ids[:, 0] = ours.text.bos_token_id
    ids[1, -1] = 0  # openai/CLIP pads with 0
    ends = [end_token(text) for text in (ours.text, theirs.text)]
    rows = torch.arange(texts)
    position = rows * (tokens - 2) // (texts - 1)
    for i, end in enumerate(dict.fromkeys(ends)):
        ids[rows, 1 + (position + i) % (tokens - 1)] = end
    return pixels, ids
