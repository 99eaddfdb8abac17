"""A checkpoint's model as its files have it: a config's fields, and tensors under our names.

Nothing is guessed and nothing is repaired. Each tensor in the file must have its place in the
model, each parameter must have its tensor of the same shape, and no weight is changed on the way.
This file is long because a config and its weights can only be checked against each other.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miniclip.errors import CheckpointError, blaming, listed, shown, warn
from miniclip.files.checks import LEGACY_EOS
from miniclip.files.configs import (
    TOWER_TYPES,
    from_transformers,
    tower_from_transformers,
    without_config,
)
from miniclip.files.hub import (
    CONFIGS,
    OPENAI_VOCABULARY,
    WEIGHTS,
    as_path,
    commit_of,
    has_files,
    is_clips,
    resolve,
    weights_in,
)
from miniclip.files.names import (
    OPENAI_NUMBERS,
    TIMM,
    Layout,
    Place,
    depth,
    names_of,
    place,
    recognize,
)
from miniclip.files.open_clip import from_open_clip
from miniclip.files.published import Fields, published, vision_of_timm
from miniclip.files.reading import read_json
from miniclip.files.tensors import read_tensors

TOWERS = ("vision", "text")
XLM_V = "facebook/xlm-v-base"  # the tokenizer of MetaCLIP 2


class Fork(NamedTuple):
    """How the files of a class differ from those of CLIP."""

    model_type: str = "clip"
    class_name: str = "CLIP"
    tensor_names: Layout = {}  # our name of a parameter of its own -> its place in a file


PLAIN = Fork()


Expected = dict[str, tuple[Place, tuple[int, ...]]]  # our name: its place, its shape


class Stored(NamedTuple):
    """A checkpoint's model as its files have it."""

    fields: Fields  # of its CLIPConfig; one tower alone has no entry for the other
    tensors: dict[str, Tensor]  # under the names of the layout
    layout: str
    table: Layout
    path: Path  # of the weights
    config_path: Path  # of the file that the fields are from
    device: str | torch.device  # that a model should be on

    @property
    def towers(self) -> list[str]:
        """The towers it has: "vision", "text" or both."""
        return [tower for tower in TOWERS if tower in self.fields]

    @property
    def commit(self) -> str | None:
        """The commit that the hub's files are of."""
        return commit_of(self.path)

    def check_towers(self, towers: tuple[str, ...]) -> None:
        """Raise CheckpointError unless it has these towers."""
        if len(towers) > len(self.towers):
            kind = f"{self.towers[0].title()}Tower"
            raise CheckpointError(
                f"{self.path}: one tower alone: load it with {kind}.from_pretrained"
            )
        if not {*towers} <= {*self.towers}:
            raise CheckpointError(
                f"{self.path}: has no {towers[0]} tower, but a {self.towers[0]} tower alone"
            )

    def has(self, part: str, name: str | PathLike[str], **options: Any) -> bool:
        """Whether to read its "tokenizer" or "transform", which a tower alone often has elsewhere.

        Warns of a vocabulary that is not CLIP's. `name` and options as of `resolve`.
        """
        text = self.fields.get("text", {})
        other = text.get("tokenizer")
        if part == "tokenizer" and (other or text.get("literal_eos")):
            if not str(other).startswith("openai/clip-") and not self._has_vocabulary():
                other = other or (XLM_V if text.get("vocab_size") == 901_629 else name)
                warn(
                    f"{name}: its vocabulary is not CLIP's BPE, so there is no tokenizer. Make the "
                    f"ids with transformers.AutoTokenizer.from_pretrained({str(other)!r})"
                )
                return False
        tower = {"tokenizer": "text", "transform": "vision"}[part]
        return tower in self.towers and (len(self.towers) == 2 or has_files(part, name, **options))

    def has_openais_transform(self, name: str | PathLike[str], **options: Any) -> bool:
        """Whether its transform is OpenAI's, which has no file."""
        is_openais = self.layout == "openai" and "vision" in self.towers
        return is_openais and not has_files("transform", name, **options)

    def _has_vocabulary(self) -> bool:
        names = ("vocab.json", OPENAI_VOCABULARY)
        return any((self.path.parent / name).is_file() for name in names)

    def embed_dim(self, tower: str) -> int | None:
        """The width of a tower's embeddings, or None for a tower without projection."""
        projection = place(f"{tower}.proj.weight", self.table).key
        is_projected = len(self.towers) == 2 or projection in self.tensors
        return self.fields.get("embed_dim") if is_projected else None

    @contextmanager
    def skeleton(self) -> Iterator[None]:
        """A block in which models have shapes and no weights, and config errors name the file."""
        try:
            with blaming(self.config_path), meta_device():
                yield
        except RuntimeError as error:  # more bytes than 64 bits can count
            raise CheckpointError(
                f"{self.config_path}: no model can be so large: {error}"
            ) from None

    def state_dict(self, model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
        """The tensors under the names of a model's `state_dict`; `model` may be of shapes alone.

        `prefix` is "vision." or "text." for a tower. If something does not fit, one CheckpointError
        lists it all, up to a thousand lines. Warns of NaN and infinity.
        """
        with blaming(self.path):
            expected = {
                prefix + name: (place(prefix + name, self.table), tuple(tensor.shape))
                for name, tensor in model.state_dict().items()
            }
        self._check_depth(expected, prefix)
        self._check_fit(expected, prefix)
        state = {
            name.removeprefix(prefix): where.take(self.tensors[where.key]).to(self.device)
            for name, (where, _) in expected.items()
        }
        _warn_of_damage(state, self.path)
        return state

    def _check_depth(self, expected: Expected, prefix: str) -> None:
        """First of all: a wrong number of layers would fill the error with their tensors."""
        for tower in self.towers:
            blocks = {n.split(".")[2] for n in expected if n.startswith(f"{tower}.blocks.")}
            found = depth(tower, self.table, self.tensors)
            if blocks and found != len(blocks):
                raise CheckpointError(
                    f"{self.path}: the {tower} tower has {found} layers in the layout of "
                    f"{self.layout}, but its config says {len(blocks)}"
                )

    def _check_fit(self, expected: Expected, prefix: str) -> None:
        tensors = self.tensors
        if prefix:  # the tensors of the other tower are not needed
            rest = {*TOWERS, "logit_scale"} - {prefix.rstrip(".")}
            others = set().union(*(names_of(part, self.table, tensors) for part in rest))
            on_top = sorted(key for key in tensors if key.startswith("classifier."))
            if on_top:  # of CLIPForImageClassification, which has a text tower's config and no more
                warn(f"{self.path}: {listed(on_top)} are no part of the tower, and are left out")
            tensors = {k: t for k, t in tensors.items() if k not in others and k not in on_top}
        stored: dict[str, tuple[tuple[int, ...], str]] = {}
        for ours, (where, shape) in expected.items():  # of q, k and v in one tensor, q is named
            stored.setdefault(where.key, (where.stored_shape(shape), ours))
        complaints = [
            f"missing: {key} {shape}, our {ours}"
            for key, (shape, ours) in stored.items()
            if key not in tensors
        ]
        complaints += [
            f"unexpected: {key:.200} {shown(tuple(tensor.shape))}"
            for key, tensor in tensors.items()
            if key not in stored
        ]
        complaints += [
            f"wrong shape: {key} {shown(tuple(tensors[key].shape))}, our {ours} {shape}"
            for key, (shape, ours) in stored.items()
            if key in tensors and tuple(tensors[key].shape) != shape
        ]
        complaints += [
            f"wrong type: {key} holds {tensors[key].dtype}, expected floating point numbers"
            for key in stored
            if key in tensors and not tensors[key].is_floating_point()
        ]
        if complaints:
            raise CheckpointError(
                f"{self.path}: {len(complaints)} tensors do not fit the model that its config "
                f"describes; the first, {complaints[0]}\n" + "\n".join(complaints[:1000])
            )


def open_model(
    name: str | PathLike[str],
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    fork: Fork = PLAIN,
    config: Any = None,
    **options: Any,
) -> Stored:
    """The model of a checkpoint, before a class is built for it; options as of `resolve`.

    `dtype` is what floating point tensors are converted to; None keeps the file's. `config` takes
    the place of the checkpoint's: a CLIPConfig, an official name ("ViT-L/14"), or what `load` reads
    a config from. Raises CheckpointError, or ValueError for the dtype or the device, before
    anything is downloaded.
    """
    check_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; expected a floating point type like torch.float32")
    given = None if config is None else _given_fields(config, fork)
    directory, path = resolve(name, "model", **options), as_path(name)
    weights = path if os.path.isfile(path) else weights_in(directory)
    if weights is None:
        raise CheckpointError(f"{directory}: no weights; expected {' or '.join(WEIGHTS[::2])}")
    return _open(directory, weights, dtype, fork, device, given)


def _given_fields(config: Any, fork: Fork) -> tuple[Path, Fields]:
    """The fields of `config=`, and where they are from."""
    if is_dataclass(config) and not isinstance(config, type):
        return Path("config="), asdict(config)
    if not isinstance(config, str | PathLike):
        raise ValueError(
            f"config is {shown(config)}; expected a CLIPConfig, a path or a name like 'ViT-L/14'"
        )
    if fields := published(str(config)):
        return Path(f"config={config}"), fields
    if os.path.isfile(as_path(config)) and as_path(config).suffix == ".json":
        return as_path(config), _read_fields(as_path(config), fork)
    return _fields_of(config, fork)


def _open(
    directory: Path,
    weights: Path,
    dtype: torch.dtype | None,
    fork: Fork,
    device: str | torch.device = "cpu",
    given: tuple[Path, Fields] | None = None,
) -> Stored:
    tensors = read_tensors(weights, dtype)
    config, open_clip = (directory / file for file in CONFIGS.values())
    with blaming(weights):
        try:
            layout, table, tensors = recognize(tensors, fork.tensor_names)
            towers = [tower for tower in TOWERS if names_of(tower, table, tensors)]
            if not towers:
                raise ValueError(
                    f"no CLIP's tensors, but {listed(tensors)}. Expected names such as "
                    "vision_model.* and text_model.* (transformers) or visual.* (openai/CLIP, "
                    "open_clip)"
                )
        except ValueError:  # the config's own error says more: its field, or the class of a fork
            if file := next((f for f in (open_clip, config) if f.is_file()), None):
                _read_fields(file, fork)
            raise
    if layout == "openai" and open_clip.is_file():
        layout = "open_clip"
    file = {"transformers": config, "open_clip": open_clip}.get(layout)
    if table is TIMM and not open_clip.is_file():
        file = config
    warning = ""
    if given is None and file is not None and file.is_file():
        given = file, _read_fields(file, fork)
    elif given is None:
        try:
            fields, warning = without_config(tensors, table, towers)
        except ValueError as error:
            missing = f"{file.name}: No such file. " if file is not None else ""
            raise CheckpointError(f"{weights}: {missing}{error}") from None
        given = weights, fields
    config_path, fields = given
    if warning:
        warn(f"{weights}: {warning}")
    others = {*TOWERS} - {*towers} if towers else set()
    fields = {name: value for name, value in fields.items() if name not in others}
    tensors = {name: t for name, t in tensors.items() if name not in OPENAI_NUMBERS}
    return Stored(fields, tensors, layout, table, weights, config_path, device)


def _read_fields(path: Path, fork: Fork) -> Fields:
    """The fields in a config file of transformers, open_clip or timm."""
    settings = read_json(path)
    with blaming(path):
        if "model_cfg" in settings or path.name == CONFIGS["open_clip"]:
            return from_open_clip(settings)
        if "architecture" in settings:
            return _from_timm(settings)
        if settings.get("model_type") in [*TOWER_TYPES]:
            return tower_from_transformers(settings)
        return from_transformers(settings, tuple(dict.fromkeys(("clip", fork.model_type))))


def _from_timm(settings: dict[str, Any]) -> Fields:
    """timm's config.json of one vision tower."""
    name = settings["architecture"]
    trained = settings.get("pretrained_cfg") or {}
    tag = str(trained.get("tag")) if isinstance(trained, dict) else ""
    vision = vision_of_timm(name)
    if vision is None or settings.get("global_pool", "token") != "token":
        raise ValueError(f"architecture is {shown(name)}; of timm's, expected vit_*_patch*_clip_*")
    if vision["act"] == "gelu" and re.fullmatch(r"openai|metaclip_(400m|2pt5b)|dfn5b", tag):
        raise ValueError(
            f"architecture is {shown(name)}, which has GELU, and the weights {tag!r} were trained "
            "with QuickGELU. Say which to use, such as config='openai/clip-vit-base-patch32'"
        )
    return {"vision": vision, "embed_dim": settings.get("num_classes")}


def read_fields(
    name: str | PathLike[str], fork: Fork = PLAIN, config: Any = None, **options: Any
) -> tuple[Path, Fields]:
    """The config of a checkpoint of two towers, by any of the names of `load`: its file and fields.

    OpenAI's layout has no config file: there the shapes of the weights say the same. Raises
    CheckpointError.
    """
    path, fields = _given_fields(config, fork) if config else _fields_of(name, fork, **options)
    if "vision" not in fields or "text" not in fields:
        tower = "vision" if "vision" in fields else "text"
        raise CheckpointError(f"{name}: a {tower} tower alone; expected a whole CLIP")
    return path, fields


def _fields_of(name: str | PathLike[str], fork: Fork, **options: Any) -> tuple[Path, Fields]:
    """The config of any checkpoint: its file and fields."""
    if os.path.isfile(as_path(name)):
        stored = open_model(name, None, fork=fork, **options)
        return stored.config_path, stored.fields
    directory = resolve(name, "config", **options)
    files = [directory / file for file in CONFIGS.values() if (directory / file).is_file()]
    weights = weights_in(directory)
    if files or weights is None:
        config = files[0] if len(files) == 1 or is_clips(directory) else files[-1]
        return config, _read_fields(config, fork)
    return weights, _open(directory, weights, None, fork).fields


@contextmanager
def meta_device() -> Iterator[None]:
    """A block in which models have shapes and no weights.

    Nothing is drawn either: to draw a normal on its meta device, torch imports its compiler.
    """
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **kwargs)


def check_device(device: str | torch.device) -> None:
    """Raise ValueError if tensors cannot be put on this device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # which depends on the device
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        found += ["mps"] * torch.backends.mps.is_available()
        raise ValueError(
            f"device {str(device)!r} cannot be used: this PyTorch ({torch.__version__}) finds "
            f"{', '.join(found)} here"
        ) from None


def _warn_of_damage(tensors: dict[str, Tensor], path: Path) -> None:
    """One NaN or infinity in a weight silently turns every logit into NaN."""
    odd = [
        name
        for name, tensor in tensors.items()
        if tensor.numel()
        and not tensor.is_meta  # which has no numbers to check
        and not all(extreme.isfinite() for extreme in tensor.aminmax())
    ]
    if odd:
        warn(f"{path}: NaN or infinity in {len(odd)} tensors: {listed(odd)}")


def check_fits(name: Any, fields: Fields, tokenizer: Any, transform: Any) -> None:
    """Raise CheckpointError if a tokenizer or a transform is not for the model with these fields.

    The tokenizer may have at most as many tokens as the text tower embeds, and the transform's crop
    must be the image that the vision tower reads. transformers finds out in the forward pass.
    """
    text, vision = fields.get("text", {}), fields.get("vision")
    if vision and transform:
        size, side = vision.get("image_size", 224), transform.crop_size
        height, width = size if isinstance(size, tuple | list) else (size, size)
        if (height, width) != (side, side):
            raise CheckpointError(
                f"{name}: the transform makes images of {side} x {side} pixels and the model reads "
                f"{height} x {width}. Correct crop_size, or take the model and a transform by "
                "themselves: CLIP.from_pretrained, ImageTransform"
            )
    if not tokenizer:
        return
    count, embedded = tokenizer.vocab_size, text.get("vocab_size", 49408)
    if count > embedded:
        raise CheckpointError(
            f"{name}: the tokenizer has {count} tokens and the model embeds only {embedded}; they "
            "must come from the same checkpoint"
        )
    end = tokenizer.eos_token_id
    is_legacy = text.get("eos_token_id") == LEGACY_EOS and not text.get("literal_eos")
    if count > end + 1 and is_legacy:
        warn(
            f"{name}: its config has eos_token_id {LEGACY_EOS}, so transformers and miniclip read "
            f"a text at its largest id. Tokens were added after the end token: a text that has one "
            f"is read there. Put {end} in the config to read it at its end"
        )
