"""Read a checkpoint's tensors and the fields of its config. A class builds the model from both.

Each tensor in the file must have a place in the model. Each parameter must have a tensor of the
same shape. Nothing is repaired, and no weight is changed.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miniclip.errors import CheckpointError, blaming, listed, shown, warn, wrong
from miniclip.files import configs, hub, names
from miniclip.files.checks import LEGACY_EOS
from miniclip.files.open_clip import from_open_clip
from miniclip.files.published import Fields, fields_of_timm, published
from miniclip.files.reading import read_json
from miniclip.files.tensors import read_tensors

M = TypeVar("M", bound=nn.Module)
TOWERS = ("vision", "text")
XLM_V = "facebook/xlm-v-base"  # the tokenizer of MetaCLIP 2


class Fork(NamedTuple):
    """How the files of a fork's class differ from the files of CLIP."""

    model_type: str = "clip"
    class_name: str = "CLIP"
    tensor_names: names.Layout = {}  # a fork's own parameter -> its name in a file


PLAIN = Fork()


class Stored(NamedTuple):
    """The contents of a model's files."""

    fields: Fields  # the CLIPConfig's fields, without a tower that the files lack
    tensors: dict[str, Tensor]  # the keys are the layout's names
    layout: str
    table: names.Layout
    path: Path  # the weights file
    config_path: Path  # the file that the fields come from
    device: str | torch.device  # where the model will be

    @property
    def towers(self) -> list[str]:
        """The towers in the files: "vision", "text" or both."""
        return [tower for tower in TOWERS if tower in self.fields]

    @property
    def commit(self) -> str | None:
        """The hub's commit that the files come from. None for local files."""
        return hub.commit_of(self.path)

    def check_towers(self, towers: tuple[str, ...]) -> None:
        """Raise CheckpointError unless the files have all of `towers`."""
        if {*towers} <= {*self.towers}:
            return
        only = self.towers[0]
        reason = f"has no {towers[0]} tower, only a {only} tower"
        if len(towers) == 2:
            reason = f"has only one tower; load it with {only.title()}Tower.from_pretrained"
        raise CheckpointError(f"{self.path}: {reason}")

    def has(self, part: str, name: str | PathLike[str], **options: Any) -> bool:
        """Whether `load` must read this `part` ("tokenizer" or "transform") for the model.

        Warns, and returns False, if the vocabulary is not CLIP's. `options` go to `resolve`.
        """
        text = self.fields.get("text", {})
        other = text.get("tokenizer")
        if part == "tokenizer" and (other or text.get("literal_eos")):
            files = ("vocab.json", hub.OPENAI_VOCABULARY)
            has_vocabulary = any((self.path.parent / file).is_file() for file in files)
            if not str(other).startswith("openai/clip-") and not has_vocabulary:
                other = other or (XLM_V if text.get("vocab_size") == 901_629 else name)
                warn(
                    f"{name}: its vocabulary is not CLIP's, so miniclip has no tokenizer. Make the "
                    f"ids with transformers.AutoTokenizer.from_pretrained({str(other)!r})"
                )
                return False
        tower = {"tokenizer": "text", "transform": "vision"}[part]
        return tower in self.towers and (
            len(self.towers) == 2 or hub.has_files(part, name, **options)
        )

    def has_openais_transform(self, name: str | PathLike[str], **options: Any) -> bool:
        """Whether the layout is OpenAI's and no file has a transform. Then OpenAI's is used."""
        is_openais = self.layout == "openai" and "vision" in self.towers
        return is_openais and not hub.has_files("transform", name, **options)

    def embed_dim(self, tower: str) -> int | None:
        """The width of a tower's embeddings, or None for a tower without projection."""
        projection = names.place(f"{tower}.proj.weight", self.table).key
        is_projected = len(self.towers) == 2 or projection in self.tensors
        return self.fields.get("embed_dim") if is_projected else None

    @contextmanager
    def skeleton(self) -> Iterator[None]:
        """If building a model fails inside this context, the error names the config's file."""
        try:
            with blaming(self.config_path):
                yield
        except RuntimeError as error:  # the number of bytes does not fit in 64 bits
            reason = f"no model can be so large: {error}"
            raise CheckpointError(f"{self.config_path}: {reason}") from None

    def state_dict(self, model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
        """Make the state dict of `model` from the tensors. `model` may be on the meta device.

        `prefix` is "vision." or "text." for a tower. If tensors do not fit, one CheckpointError
        lists them, at most a thousand. Warns of NaN and infinity.
        """
        with blaming(self.path):
            ours = {prefix + name: tensor for name, tensor in model.state_dict().items()}
            places = {name: names.place(name, self.table) for name in ours}
        self._check_depth(places)
        self._check_fit(places, ours, prefix)
        state = {
            name.removeprefix(prefix): where.take(self.tensors[where.key]).to(self.device)
            for name, where in places.items()
        }
        # One NaN or infinity in a weight can silently turn every logit into NaN. A sum is
        # three times as fast as `aminmax`, but may overflow. So `aminmax` checks tensors with a
        # non-finite sum.
        real = {name: t for name, t in state.items() if t.numel() and not t.is_meta}
        odd = [name for name, t in real.items() if not _wide(t).sum().isfinite()]
        ends = {name: _wide(real[name]).aminmax() for name in odd}
        odd = [name for name in odd if not all(end.isfinite() for end in ends[name])]
        if odd:
            warn(f"{self.path}: NaN or infinity in {len(odd)} tensors: {listed(odd)}")
        return state

    def _check_depth(self, places: dict[str, names.Place]) -> None:
        """Check the layer count first, or an error would list every tensor of the absent layers."""
        for tower in self.towers:
            blocks = {n.split(".")[2] for n in places if n.startswith(f"{tower}.blocks.")}
            found = names.depth(tower, self.table, self.tensors)
            if blocks and found != len(blocks):
                raise CheckpointError(
                    f"{self.path}: the {tower} tower has {found} layers in the layout of "
                    f"{self.layout}, but its config says {len(blocks)}"
                )

    def _check_fit(
        self, places: dict[str, names.Place], parameters: dict[str, Tensor], prefix: str
    ) -> None:
        tensors = self.tensors
        if prefix:  # the tensors of the other tower are not needed
            rest = {*TOWERS, "logit_scale"} - {prefix.rstrip(".")}
            others = set().union(*(names.names_of(part, self.table, tensors) for part in rest))
            on_top = sorted(key for key in tensors if key.startswith("classifier."))
            if on_top:  # CLIPForImageClassification: a vision tower and a classifier on top
                warn(f"{self.path}: {listed(on_top)} do not belong to the tower, and are left out")
            tensors = {k: t for k, t in tensors.items() if k not in others and k not in on_top}
        stored: dict[str, tuple[tuple[int, ...], str]] = {}
        for ours, where in places.items():  # if q, k and v are one tensor, an error will name q
            stored.setdefault(where.key, (where.stored_shape(parameters[ours].shape), ours))
        missing, misshapen, mistyped = [], [], []
        for key, (shape, ours) in stored.items():
            tensor = tensors.get(key)
            if tensor is None:
                missing.append(f"missing: {key} {shape}, miniclip's {ours}")
                continue
            if tuple(tensor.shape) != shape:
                found = shown(tuple(tensor.shape))
                misshapen.append(f"wrong shape: {key} {found}, miniclip's {ours} {shape}")
            is_float = parameters[ours].is_floating_point()  # False for some buffers of a fork
            if tensor.is_floating_point() != is_float:
                expected = "floating point numbers" if is_float else parameters[ours].dtype
                found = f"holds {tensor.dtype}, expected {expected}"
                mistyped.append(f"wrong type: {key} {found}")
        unexpected = [
            f"unexpected: {key:.200} {shown(tuple(tensor.shape))}"
            for key, tensor in tensors.items()
            if key not in stored
        ]
        if complaints := missing + unexpected + misshapen + mistyped:
            raise CheckpointError(
                f"{self.path}: {len(complaints)} tensors do not fit the model that its config "
                f"describes. The first error: {complaints[0]}\n" + "\n".join(complaints[:1000])
            )


def _wide(tensor: Tensor) -> Tensor:
    """Convert float8 to float32, because torch cannot sum float8 tensors."""
    return tensor.float() if tensor.itemsize == 1 else tensor


def open_model(
    name: str | PathLike[str],
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    fork: Fork = PLAIN,
    config: Any = None,
    **options: Any,
) -> Stored:
    """Read the config and the tensors of a checkpoint's model.

    Args:
        dtype: floating point tensors are converted to this type. None keeps the file's type.
        config: a CLIPConfig, an official name ("ViT-L/14"), a config.json, or the name of another
            checkpoint. It replaces the checkpoint's config.
        options: further arguments for `resolve`.
    Raises:
        CheckpointError: a file is missing or damaged, or describes another model.
        ValueError: the dtype or the device is wrong. This is checked before a download.
    """
    check_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise wrong("dtype", dtype, "a floating point type like torch.float32")
    given = None if config is None else _given_fields(config, fork)
    directory, path = hub.resolve(name, "model", **options), hub.as_path(name)
    weights = path if os.path.isfile(path) else hub.weights_in(directory)
    if weights is None:
        raise CheckpointError(f"{directory}: no weights; expected {' or '.join(hub.WEIGHTS[::2])}")
    if weights != path and (directory / hub.ADAPTER).is_file():
        warn(
            f"{directory}: the adapter that {hub.ADAPTER} describes is left out. To include it, "
            "load the model with PEFT, and save it after merge_and_unload"
        )
    return _open(directory, weights, dtype, fork, device, given)


def _given_fields(config: Any, fork: Fork) -> tuple[Path, Fields]:
    """Read the argument `config`. Returns its path or name, and its fields."""
    if is_dataclass(config) and hasattr(config, "vision") and not isinstance(config, type):
        return Path("config="), asdict(config)
    if not isinstance(config, str | PathLike):
        raise wrong("config", config, "a CLIPConfig, a path or a name like 'ViT-L/14'")
    if fields := published(str(config)):
        return Path(f"config={config}"), fields
    path = hub.as_path(config)
    if os.path.isfile(path) and path.suffix == ".json":
        return path, _read_fields(path, fork)
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
    config, open_clip = (directory / file for file in hub.CONFIGS.values())
    with blaming(weights):
        try:
            layout, table, tensors = names.recognize(tensors, fork.tensor_names)
            towers = [tower for tower in TOWERS if names.names_of(tower, table, tensors)]
            if not towers:
                raise ValueError(
                    f"the tensors are not a CLIP's: {listed(tensors)}. Expected names such as "
                    "vision_model.* and text_model.* (transformers) or visual.* (openai/CLIP, "
                    "open_clip)"
                )
        except ValueError:  # an error of the config, if there is one, explains more than this error
            if file := next((f for f in (open_clip, config) if f.is_file()), None):
                _read_fields(file, fork)
            raise
    if layout == "openai" and open_clip.is_file():
        layout = "open_clip"
    file = {"transformers": config, "open_clip": open_clip}.get(layout)
    if table is names.TIMM and not open_clip.is_file():
        file = config
    if given is None and file is not None and file.is_file():
        given = file, _read_fields(file, fork)
    if given is None:
        try:
            fields, warning = configs.without_config(tensors, table, towers)
        except ValueError as error:
            missing = f"{file.name}: No such file. " if file is not None else ""
            raise CheckpointError(f"{weights}: {missing}{error}") from None
        given = weights, fields
        if warning:
            warn(f"{weights}: {warning}")
    config_path, fields = given
    others = {*TOWERS} - {*towers}
    fields = {name: value for name, value in fields.items() if name not in others}
    tensors = {name: t for name, t in tensors.items() if name not in names.OPENAI_NUMBERS}
    return Stored(fields, tensors, layout, table, weights, config_path, device)


def _read_fields(path: Path, fork: Fork) -> Fields:
    """The fields in a config file of transformers, open_clip or timm."""
    settings = read_json(path)
    with blaming(path):
        if "model_cfg" in settings or path.name == hub.CONFIGS["open_clip"]:
            return from_open_clip(settings)
        if "architecture" in settings:
            return fields_of_timm(settings)
        if settings.get("model_type") in [*configs.TOWER_TYPES]:
            return configs.tower_from_transformers(settings)
        return configs.from_transformers(settings, tuple(dict.fromkeys(("clip", fork.model_type))))


def read_fields(
    name: str | PathLike[str], fork: Fork = PLAIN, config: Any = None, **options: Any
) -> tuple[Path, Fields]:
    """The config of a checkpoint with two towers: its file and its fields.

    `name` is any name that `load` takes. OpenAI's layout has no config file: the fields come from
    the shapes of the weights. Raises CheckpointError.
    """
    path, fields = _given_fields(config, fork) if config else _fields_of(name, fork, **options)
    if "vision" not in fields or "text" not in fields:
        tower = "vision" if "vision" in fields else "text"
        raise CheckpointError(f"{name}: has only a {tower} tower; expected a whole CLIP")
    return path, fields


def _fields_of(name: str | PathLike[str], fork: Fork, **options: Any) -> tuple[Path, Fields]:
    """The config file of any checkpoint, and its fields."""
    if os.path.isfile(hub.as_path(name)):
        stored = open_model(name, None, fork=fork, **options)
        return stored.config_path, stored.fields
    directory = hub.resolve(name, "config", **options)
    files = [directory / file for file in hub.CONFIGS.values() if (directory / file).is_file()]
    weights = hub.weights_in(directory)
    if files or weights is None:
        config = files[0] if len(files) == 1 or hub.is_clips(directory) else files[-1]
        return config, _read_fields(config, fork)
    return weights, _open(directory, weights, None, fork).fields


class _Undrawn(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_drawing = func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
        return kwargs["tensor"] if is_drawing else func(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """A context manager: models that are made inside have shapes but no weights.

    Random initialisation is skipped: on the meta device it imports torch's compiler, which is slow.
    """
    with torch.device("meta"), _Undrawn():
        yield


def without_weights(build: Callable[[], M]) -> M:
    """Build a model on the meta device, or on the CPU if its class reads the values of a tensor."""
    try:
        with meta_device():
            return build()
    except RuntimeError as error:  # such as "Tensor.item() cannot be called on meta tensors"
        if "meta tensor" not in str(error):
            raise
    with torch.random.fork_rng(devices=[]):
        return build()


def check_device(device: str | torch.device) -> None:
    """Raise ValueError if tensors cannot be put on this device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # the error's type varies
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        found += ["mps"] * torch.backends.mps.is_available()
        raise ValueError(
            f"device {str(device)!r} cannot be used: this PyTorch ({torch.__version__}) finds "
            f"{', '.join(found)} here"
        ) from None


def check_fits(name: Any, fields: Fields, tokenizer: Any, transform: Any) -> None:
    """Raise CheckpointError if a tokenizer or a transform does not fit the model with these fields.

    The tokenizer's vocabulary must not be larger than the text tower's. The tokenizer must end a
    text with the id that the text tower looks for. The transform's crop must have the size that the
    vision tower reads. transformers does not check this before the forward pass.
    """
    text, vision = fields.get("text", {}), fields.get("vision")
    if vision and transform:
        size, side = vision.get("image_size", 224), transform.crop_size
        height, width = size if isinstance(size, tuple | list) else (size, size)
        if (height, width) != (side, side):
            raise CheckpointError(
                f"{name}: the transform makes images of {side} x {side} pixels and the model reads "
                f"{height} x {width}. Correct crop_size, or use CLIP.from_pretrained and an "
                "ImageTransform of your own"
            )
    if not tokenizer:
        return
    count, embedded = tokenizer.vocab_size, text.get("vocab_size", 49408)
    if count > embedded:
        raise CheckpointError(
            f"{name}: the tokenizer has {count} tokens, but the model embeds only {embedded}; both "
            "must come from the same checkpoint"
        )
    end, models_end = tokenizer.eos_token_id, text.get("eos_token_id", 49407)
    is_legacy = models_end == LEGACY_EOS and not text.get("literal_eos")
    if end != models_end and not is_legacy:
        raise CheckpointError(
            f"{name}: the tokenizer ends a text with the id {end}, but the model looks for its "
            f"eos_token_id {models_end}. Take both from the same checkpoint, or set eos_token_id "
            f"to {end}"
        )
    if count > end + 1 and is_legacy:
        warn(
            f"{name}: its config has eos_token_id {LEGACY_EOS}, so transformers and miniclip pool "
            "a text at its largest id. This tokenizer's end token does not have the largest id, so "
            "some texts are not pooled at their end. "
            f"Set eos_token_id to {end} to pool every text at its end"
        )
