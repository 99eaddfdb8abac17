"""A checkpoint's model as its files have it: a config's fields, and tensors under our names.

Nothing is guessed and nothing is repaired. Each tensor in the file must have its place in the
model, each parameter must have its tensor of the same shape, and no weight is changed on the way.
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miniclip.errors import CheckpointError, blaming, listed, shown
from miniclip.files.configs import (
    TOWER_TYPES,
    Fields,
    from_shapes,
    from_transformers,
    tower_from_transformers,
)
from miniclip.files.hub import (
    CONFIGS,
    WEIGHTS,
    as_path,
    is_clips,
    resolve,
    weights_in,
)
from miniclip.files.names import (
    OPENAI_NUMBERS,
    Layout,
    Place,
    depth,
    layout_name,
    place,
    recognize,
)
from miniclip.files.open_clip import from_open_clip
from miniclip.files.reading import read_json
from miniclip.files.tensors import read_tensors


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
    device: str | torch.device  # that a model should be on

    @property
    def towers(self) -> list[str]:
        """The towers it has: "vision", "text" or both."""
        return [tower for tower in ("vision", "text") if tower in self.fields]

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

    @property
    def config_path(self) -> Path:
        """The file that the fields are from."""
        return self.path.parent / CONFIGS.get(self.layout, self.path.name)

    def embed_dim(self, tower: str) -> int | None:
        """The width of a tower's embeddings, or None for a tower without projection."""
        projection = layout_name(f"{tower}.proj.weight", self.table)
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
            rest = [theirs for ours, theirs in self.table.items() if not ours.startswith(prefix)]
            patterns = (re.escape(re.sub(r"\.T$|\[\d\]$", "", theirs)) for theirs in rest)
            pattern = "|".join(patterns).replace(r"\{\}", r"\d+")
            is_other = re.compile(rf"(?:{pattern})(?:\.weight|\.bias)?")
            tensors = {key: t for key, t in tensors.items() if not is_other.fullmatch(key)}
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
    **options: Any,
) -> Stored:
    """The model of a checkpoint, before a class is built for it; options as of `resolve`.

    `dtype` is what floating point tensors are converted to; None keeps the file's. Raises
    CheckpointError, or ValueError for the dtype or the device, before anything is downloaded.
    """
    check_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; expected a floating point type like torch.float32")
    directory, path = resolve(name, "model", **options), as_path(name)
    weights = path if os.path.isfile(path) else weights_in(directory)
    if weights is None:
        raise CheckpointError(f"{directory}: no weights; expected {' or '.join(WEIGHTS[::2])}")
    return _open(directory, weights, dtype, fork, device)


def _open(
    directory: Path,
    weights: Path,
    dtype: torch.dtype | None,
    fork: Fork,
    device: str | torch.device = "cpu",
) -> Stored:
    tensors = read_tensors(weights, dtype)
    is_open_clip = (directory / CONFIGS["open_clip"]).is_file()
    with blaming(weights):
        try:
            layout, table, tensors = recognize(tensors, fork.tensor_names)
        except ValueError:  # the config's own error says more: its field, or the class of a fork
            kind = "open_clip" if is_open_clip else "transformers"
            if (directory / CONFIGS[kind]).is_file():
                _read_fields(directory, kind, fork)
            raise
    if layout == "openai or open_clip":
        layout = "open_clip" if is_open_clip else "openai"
        if layout == "openai":
            warnings.warn(
                f"{weights}: read as OpenAI's, with QuickGELU and heads of 64. If open_clip wrote "
                "it, put its open_clip_config.json beside it",
                stacklevel=4,  # who called `load` or `from_pretrained`
            )
    if layout == "openai":
        with blaming(weights):
            fields = from_shapes(tensors)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in OPENAI_NUMBERS}
    else:
        fields = _read_fields(directory, layout, fork)
    tensors = _without_position_ids(tensors, weights)
    return Stored(fields, tensors, layout, table, weights, device)


def _read_fields(directory: Path, layout: str, fork: Fork) -> Fields:
    path = directory / CONFIGS[layout]
    settings = read_json(path)
    with blaming(path):
        if layout == "open_clip":
            return from_open_clip(settings)
        if settings.get("model_type") in [*TOWER_TYPES]:
            return tower_from_transformers(settings)
        return from_transformers(settings, tuple(dict.fromkeys(("clip", fork.model_type))))


def read_fields(
    name: str | PathLike[str], fork: Fork = PLAIN, **options: Any
) -> tuple[Path, Fields]:
    """The config of a checkpoint of two towers, by any of the names of `load`: its file and fields.

    OpenAI's layout has no config file: there the shapes of the weights say the same. Raises
    CheckpointError.
    """
    if os.path.isfile(as_path(name)):
        stored = open_model(name, None, fork=fork, **options)
        path, fields = stored.config_path, stored.fields
    else:
        directory = resolve(name, "config", **options)
        layouts = [layout for layout, file in CONFIGS.items() if (directory / file).is_file()]
        weights = weights_in(directory)
        if layouts or weights is None:
            layout = "open_clip" if layouts and not is_clips(directory) else "transformers"
            layout = layouts[0] if len(layouts) == 1 else layout
            path, fields = directory / CONFIGS[layout], _read_fields(directory, layout, fork)
        else:
            path, fields = weights, _open(directory, weights, None, fork).fields
    if "vision" not in fields or "text" not in fields:
        tower = "vision" if "vision" in fields else "text"
        raise CheckpointError(f"{name}: a {tower} tower alone; expected a whole CLIP")
    return path, fields


def _without_position_ids(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Drop the buffers 0..n-1 that transformers saved until 4.31, after checking their values."""
    kept = dict(tensors)
    for name in ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"):
        ids = kept.pop(name, torch.empty(0)).flatten()
        if len(ids) > 100_000 or ids.tolist() != [*range(len(ids))]:
            raise CheckpointError(
                f"{path}: {name} is not 0, 1, 2, ..., so this checkpoint has its positions in an "
                "order that no CLIP uses"
            )
    return kept


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
    except (RuntimeError, AssertionError) as error:  # which of them depends on the device
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from None


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
        warnings.warn(f"{path}: NaN or infinity in {len(odd)} tensors: {listed(odd)}", stacklevel=5)


def check_vocab_fits(name: str | PathLike[str], vocab_size: int, text: Fields) -> None:
    """Raise CheckpointError if a tokenizer has more tokens than a text tower embeds."""
    if vocab_size > text.get("vocab_size", 49408):
        raise CheckpointError(
            f"{name}: the tokenizer has {vocab_size} tokens and the model embeds only "
            f"{text.get('vocab_size', 49408)}; they must come from the same checkpoint"
        )
