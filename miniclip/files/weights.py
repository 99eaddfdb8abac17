"""A weights file -> a config's fields and tensors under our names, and back.

Nothing is guessed and nothing is repaired. Each tensor in the file must have its place in the
model, each parameter must have its tensor of the same shape, and no weight is changed on the way.
"""

import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miniclip.errors import CheckpointError, blaming, listed, shown
from miniclip.files.configs import (
    TOWER_TYPES,
    Fields,
    from_shapes,
    from_transformers,
    openai_numbers,
    refuse_inexpressible,
    to_transformers,
    tower_from_transformers,
)
from miniclip.files.hub import (
    CONFIGS,
    HUB_FILES,
    SUFFIXES,
    VOCABULARIES,
    WEIGHTS,
    as_path,
    is_clips,
    resolve,
    weights_in,
)
from miniclip.files.names import (
    LAYOUTS,
    OPENAI_NUMBERS,
    Layout,
    Place,
    depth,
    layout_name,
    pack,
    place,
    recognize,
)
from miniclip.files.open_clip import from_open_clip, to_open_clip
from miniclip.files.pickles import MOST_TENSORS, PickledTensors
from miniclip.files.reading import read_json, read_json_if_there
from miniclip.files.writing import blaming_disk, replacing, saving, write_json

WRITTEN = dict.fromkeys(LAYOUTS, WEIGHTS[0]) | {"open_clip": "open_clip_model.safetensors"}


class Fork(NamedTuple):
    """How the files of a class differ from those of CLIP."""

    model_type: str = "clip"
    class_name: str = "CLIP"
    tensor_names: Layout = {}  # our name of a parameter of its own -> its place in a file


PLAIN = Fork()

Expected = dict[str, tuple[Place, tuple[int, ...]]]  # our name: its place, its shape

# ------------------------------------------------------------------------------------------------
# file -> tensors


def read_tensors(path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of a weights file or of a sharded index, memory-mapped.

    Floating point tensors of another dtype than `dtype` are converted a few at a time, so that the
    file is never in memory beside the model. Code in .bin and .pt files never runs: see pickles.py.
    Raises CheckpointError.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path, dtype)
    try:
        tensors = _read_in_turn(path, dtype)
    except Exception as error:  # damage raises many kinds of errors
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        reason = "".join(filter(str.isprintable, reason))  # it may quote the file
        size = f"{path.stat().st_size:,} bytes" if path.exists() else "no such file"
        raise CheckpointError(
            f"{path}: no weights file that can be read, or one cut short ({size}): {reason}"
        ) from error
    if not all(map(str.isprintable, tensors)):
        raise CheckpointError(f"{path}: has tensors whose names cannot be printed")
    return tensors


def _read_in_turn(path: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    is_safe = path.suffix == ".safetensors"
    with open(path, "rb") as start:
        header = int.from_bytes(start.read(8), "little")
    if is_safe and header > 6_000_000:  # parsed, it takes many times that; a CLIP's has 200,000
        raise ValueError(f"expected a header of at most 6,000,000 bytes, found {header:,}")
    file: Any = safe_open(path, framework="pt") if is_safe else PickledTensors(path)
    if len(file.keys()) > MOST_TENSORS:
        raise ValueError(f"expected at most {MOST_TENSORS:,} tensors, found {len(file.keys()):,}")
    size = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}
    tensors: dict[str, Tensor] = {}
    read = 0
    for name in sorted(size, key=size.__getitem__, reverse=True):
        mapped = file.get_tensor(name)
        tensors[name] = mapped.to(dtype) if mapped.is_floating_point() else mapped
        read += mapped.nbytes if tensors[name] is not mapped else 0
        if read > 1 << 24:
            del mapped  # the pages that were read go with the last tensor that maps them
            file = safe_open(path, framework="pt") if is_safe else file.remapped()
            read = 0
    return {name: tensors[name] for name in size}


def _read_shards(index: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        name.isprintable() and isinstance(shard, str) for name, shard in places.items()
    ):
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        path = index.parent / shard
        if Path(shard).name != shard or path.suffix not in SUFFIXES or not os.path.isfile(path):
            raise CheckpointError(
                f"{index}: names a shard {shown(shard)} that is not a weights file beside it"
            )
        more = read_tensors(path, dtype)
        if twice := sorted(tensors.keys() & more.keys()):
            raise CheckpointError(f"{path}: tensors of another shard again: {listed(twice)}")
        tensors |= more
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise CheckpointError(f"{index}: {len(absent)} tensors are in no shard: {listed(absent)}")
    return tensors


# ------------------------------------------------------------------------------------------------
# tensors -> what a class builds itself from


class Stored(NamedTuple):
    """A checkpoint's model as its files have it."""

    fields: Fields  # of its CLIPConfig; one tower alone has no entry for the other
    tensors: dict[str, Tensor]  # under the names of the layout
    layout: str
    table: Layout
    path: Path  # of the weights

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
        return self.fields["embed_dim"] if is_projected else None

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

    def state_dict(
        self,
        model: nn.Module,
        device: str | torch.device = "cpu",
        prefix: str = "",
    ) -> dict[str, Tensor]:
        """The tensors under the names of a model's `state_dict`; `model` may be of shapes alone.

        `prefix` is "vision." or "text." for a tower. If something does not fit, one CheckpointError
        lists it all, up to a thousand lines. Warns of NaN and infinity.
        """
        check_device(device)
        with blaming(self.path):
            expected = {
                prefix + name: (place(prefix + name, self.table), tuple(tensor.shape))
                for name, tensor in model.state_dict().items()
            }
        self._check_depth(expected, prefix)
        self._check_fit(expected, prefix)
        state = {
            name.removeprefix(prefix): where.take(self.tensors[where.key]).to(device).contiguous()
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
        stored = {where.key: (where.stored_shape(s), ours) for ours, (where, s) in expected.items()}
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
    fork: Fork = PLAIN,
    **options: Any,
) -> Stored:
    """The model of a checkpoint, before a class is built for it; options as of `resolve`.

    `dtype` is what floating point tensors are converted to; None keeps the file's. Raises
    CheckpointError.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; expected a floating point type like torch.float32")
    directory, path = resolve(name, "model", **options), as_path(name)
    weights = path if os.path.isfile(path) else weights_in(directory)
    if weights is None:
        raise CheckpointError(f"{directory}: no weights; expected {' or '.join(WEIGHTS[::2])}")
    return _open(directory, weights, dtype, fork)


def _open(directory: Path, weights: Path, dtype: torch.dtype | None, fork: Fork) -> Stored:
    tensors = read_tensors(weights, dtype)
    is_open_clip = (directory / CONFIGS["open_clip"]).is_file()
    with blaming(weights):
        try:
            layout, table, tensors = recognize(tensors, fork.tensor_names)
        except ValueError:
            if is_open_clip:
                _read_fields(directory, "open_clip", fork)  # its error names the config's field
            raise
    if layout == "openai or open_clip":
        layout = "open_clip" if is_open_clip else "openai"
        if layout == "openai":
            warnings.warn(
                f"{weights}: read as OpenAI's, with QuickGELU and heads of 64. If open_clip wrote "
                "it, put its open_clip_config.json beside it",
                stacklevel=2,
            )
    if layout == "openai":
        with blaming(weights):
            fields = from_shapes(tensors)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in OPENAI_NUMBERS}
    else:
        fields = _read_fields(directory, layout, fork)
    return Stored(fields, _without_position_ids(tensors, weights), layout, table, weights)


def _read_fields(directory: Path, layout: str, fork: Fork) -> Fields:
    path = directory / CONFIGS[layout]
    settings = read_json(path)
    with blaming(path):
        if layout == "open_clip":
            return from_open_clip(settings)
        if settings.get("model_type") in [*TOWER_TYPES]:
            return tower_from_transformers(settings)
        return from_transformers(settings, tuple(dict.fromkeys(("clip", fork.model_type))))


def read_fields(name: str | PathLike[str], fork: Fork = PLAIN, **options: Any) -> Fields:
    """The config of a checkpoint of two towers, by any of the names of `load`, as fields.

    It is read from the config file. OpenAI's layout has none: there the shapes of the weights say
    the same. Raises CheckpointError.
    """
    if os.path.isfile(as_path(name)):
        fields = open_model(name, fork=fork, **options).fields
    else:
        directory = resolve(name, "config", **options)
        layouts = [layout for layout, file in CONFIGS.items() if (directory / file).is_file()]
        weights = weights_in(directory)
        if layouts or weights is None:
            layout = "open_clip" if layouts and not is_clips(directory) else "transformers"
            fields = _read_fields(directory, layouts[0] if len(layouts) == 1 else layout, fork)
        else:
            fields = _open(directory, weights, None, fork).fields
    if "vision" not in fields or "text" not in fields:
        tower = "vision" if "vision" in fields else "text"
        raise CheckpointError(f"{name}: a {tower} tower alone; expected a whole CLIP")
    return fields


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
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax())
    ]
    if odd:
        warnings.warn(f"{path}: NaN or infinity in {len(odd)} tensors: {listed(odd)}", stacklevel=4)


# ------------------------------------------------------------------------------------------------
# model -> file


def write_model(
    directory: str | PathLike[str],
    fields: Fields,
    state: Mapping[str, Tensor],
    layout: str = "transformers",
    fork: Fork = PLAIN,
) -> None:
    """Write a model's config and its weights in their own dtype, both files or none.

    Image settings of open_clip that are there stay. Raises CheckpointError if nothing can be
    written, the layout cannot express the model, or the directory holds another checkpoint's
    files, which `load` would read instead.
    """
    directory = Path(directory)
    check_layout(layout)
    refuse_other_files(directory, layout)
    with blaming(directory):
        refuse_inexpressible(fields, layout)
        if layout != "transformers" and fork.model_type != "clip":
            raise ValueError(
                f"the layout {layout!r} has no place for the class {fork.class_name}; "
                "'transformers' has"
            )
        tensors = pack(
            {name: tensor.cpu() for name, tensor in state.items()},
            LAYOUTS[layout] | fork.tensor_names,
        )
    config = directory / CONFIGS.get(layout, "")
    with blaming_disk(directory), saving(directory) as folder:
        if layout == "open_clip":
            settings = read_json_if_there(config) | {"model_cfg": to_open_clip(fields)}
            write_json(folder / config.name, {"model_cfg": {}, "preprocess_cfg": {}} | settings)
        elif layout == "openai":
            tensors |= openai_numbers(fields)
        else:
            is_clip = fork.model_type == "clip"
            class_name = "CLIPModel" if is_clip else fork.class_name
            write_json(folder / config.name, to_transformers(fields, fork.model_type, class_name))
        with replacing(folder / WRITTEN[layout]) as temporary:
            try:
                save_file(tensors, temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(error) from error


def check_shapes(
    directory: str | PathLike[str], state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Raise CheckpointError unless a state dict has the expected names and shapes."""
    shapes, found = ({n: t.shape for n, t in tensors.items()} for tensors in (expected, state))
    if odd := sorted(dict(shapes.items() ^ found.items())):
        raise CheckpointError(
            f"{directory}: not saved, because nothing could load it: {len(odd)} tensors are "
            f"missing, unexpected or not of the shape in model.config: {listed(odd)}"
        )


@contextmanager
def saving_checkpoint(
    directory: str | PathLike[str], layout: str, has_tokenizer: bool, has_transform: bool
) -> Iterator[Path]:
    """Yield a folder for the files of a whole checkpoint; see `saving`.

    Raises CheckpointError if the directory holds other files that `load` would read.
    """
    directory = Path(directory)
    check_layout(layout)
    absent: tuple[str, ...] = () if has_tokenizer else VOCABULARIES
    absent += () if has_transform else tuple(HUB_FILES["transform"][0][:2])
    refuse_other_files(directory, layout, *absent)
    with blaming_disk(directory), saving(directory) as folder:
        processor = directory / "processor_config.json"
        if has_transform and processor.is_file():
            shutil.copy(processor, folder)  # where it is brought up to date
        yield folder
        if has_tokenizer:
            for stale in ("tokenizer.json", "added_tokens.json"):
                (folder / stale).touch()  # deletes the file, which transformers would read first


def check_vocab_fits(name: str | PathLike[str], vocab_size: int, text: Fields) -> None:
    """Raise CheckpointError if a tokenizer has more tokens than a text tower embeds."""
    if vocab_size > text.get("vocab_size", 49408):
        raise CheckpointError(
            f"{name}: the tokenizer has {vocab_size} tokens and the model embeds only "
            f"{text.get('vocab_size', 49408)}; they must come from the same checkpoint"
        )


def check_layout(layout: str) -> None:
    """Raise ValueError for a layout that there is not."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")


def refuse_other_files(directory: Path, layout: str, *more: str) -> None:
    """Raise CheckpointError if a directory has files that `load` would read instead."""
    others = [name for key, name in CONFIGS.items() if key != layout]
    others += [*WEIGHTS[: WEIGHTS.index(WRITTEN[layout])], *more]
    if there := [name for name in others if (directory / name).is_file()]:
        raise CheckpointError(
            f"{directory}: has {listed(there)}, which would be loaded instead. Save to another "
            "directory, or first delete the files of the other checkpoint"
        )
