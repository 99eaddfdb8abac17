"""From a name to a model, and back to a directory.

    name -> directory -> tensors in the file's own names -> tensors in ours -> model

A name is an embedded checkpoint, a directory, a weights file or a repository on the Hugging Face
hub; layouts.py has the names that others give the tensors. Nothing is guessed and nothing is
repaired: every tensor in the file must have its place in the model and every parameter its tensor,
of the same shape, and no weight is changed on the way.
"""

import hashlib
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miniclip.config import (
    SAVED,
    TOWERS,
    CheckpointError,
    CLIPConfig,
    TextConfig,
    TowerConfig,
    VisionConfig,
    blaming,
    finish_save,
    read_json,
    replacing,
    saving,
    shown,
    write_json,
)
from miniclip.layouts import (
    LAYOUTS,
    OPENAI_NUMBERS,
    Layout,
    Place,
    config_from_open_clip,
    config_from_shapes,
    config_to_open_clip,
    depth,
    layout_name,
    openai_numbers,
    pack,
    place,
    preprocessing_to_open_clip,
    recognize,
    refuse_unsayable,
)
from miniclip.model import CLIP, TextTower, VisionTower
from miniclip.pickles import MOST_TENSORS, PickledTensors
from miniclip.tokenizer import VOCABULARIES, Tokenizer
from miniclip.transform import ImageTransform

# ------------------------------------------------------------------------------------------------
# name -> directory

PACKAGE = Path(__file__).resolve().parent
# The weights lie inside an installed package, and beside it in a checkout of the repository.
EMBEDDED = next(
    (d for d in (PACKAGE / "weights", PACKAGE.parent / "weights") if d.is_dir()),
    PACKAGE / "weights",
)

CONFIGS = {"transformers": "config.json", "open_clip": "open_clip_config.json"}
HUB_FILES = {
    "config": ([*CONFIGS.values()],),
    "model": (
        [*CONFIGS.values(), "model.safetensors", "model.safetensors.index.json"]
        + ["model-*.safetensors"],
        ["config.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"],
        ["open_clip_config.json", "open_clip_model.safetensors"],
        ["open_clip_config.json", "open_clip_pytorch_model.bin"],
    ),
    "tokenizer": (
        [*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
        + ["added_tokens.json", "open_clip_config.json"],
    ),
    "transform": (["preprocessor_config.json", "processor_config.json", "open_clip_config.json"],),
}
CHECKED = ".miniclip-checked"  # in a repository's cache: its files whose hash was seen to be right
SUFFIXES = (".safetensors", ".bin", ".pt")
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
WRITTEN = dict.fromkeys(LAYOUTS, WEIGHTS[0]) | {"open_clip": "open_clip_model.safetensors"}


def embedded_names() -> list[str]:
    """The checkpoints that come with the package."""
    return sorted(config.parent.name for config in EMBEDDED.glob("*/config.json"))


def resolve(
    name: str | PathLike[str],
    kind: str,
    *,
    revision: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The directory of a checkpoint, or the part of it that `kind` names in HUB_FILES.

    An embedded name wins over a directory of that name: write ./cifar10 for the directory. Of a
    hub repository only the files of that kind are downloaded. Raises CheckpointError.
    """
    embedded = embedded_names()
    if name in embedded:
        return EMBEDDED / name
    path = _as_path(name)
    if str(name) and os.path.isdir(path):
        return _finished(path)
    if os.path.isfile(path):
        return _finished(path.parent)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) or path.suffix in SUFFIXES:
        raise CheckpointError(
            f"no checkpoint called {shown(str(name))}: expected one of {', '.join(embedded)}, a "
            "directory, a weights file, or a hub id such as openai/clip-vit-base-patch32"
        )
    return _download(str(name), kind, revision, cache_dir, local_files_only)


def _as_path(name: str | PathLike[str]) -> Path:
    # os.path, here and where this is asked about: unlike Path's methods it never raises, whatever
    # the name is; it may be a hub id, or nonsense.
    return Path(os.path.expanduser(name))


def _finished(directory: Path) -> Path:
    """The directory, after the last step of a save that was killed before it; see `saving`."""
    try:
        finish_save(directory)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: a save was cut short here, and the files that it left in {SAVED} cannot "
            f"be moved to their places: {error}"
        ) from error
    return directory


def _download(
    repository: str,
    kind: str,
    revision: str | None,
    cache_dir: str | PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    from huggingface_hub import constants, snapshot_download

    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    for patterns in HUB_FILES[kind]:
        try:
            directory = Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    cache_dir=cache,
                    local_files_only=local_files_only,
                    allow_patterns=patterns,
                )
            )
        except Exception as error:  # the hub client's errors have no base class of their own
            reason = " ".join(str(error).split()).rstrip(".")
            raise CheckpointError(
                f"{repository} is no directory here, and cannot be had from the hub. Offline there "
                f"are directories, and the embedded checkpoints: {', '.join(embedded_names())}. "
                f"The hub's client says {type(error).__name__}: {reason}"
            ) from error
        _check_hashes(directory, cache / f"models--{repository.replace('/', '--')}" / CHECKED)
        if kind != "model" or _weights_in(directory):
            break
    return directory


def _check_hashes(directory: Path, checked: Path) -> None:
    """Delete what came damaged from the hub, and raise CheckpointError: the client has no such
    check, and would trust it from now on. Whoever fetched a file, and however that ended, it is
    read for this once, and noted."""
    noted = set(checked.read_text().splitlines()) if checked.is_file() else set()
    for file in filter(Path.is_file, directory.glob("*")):
        blob = file.resolve()
        note = f"{blob.name} {blob.stat().st_mtime_ns}"
        if note in noted:
            continue
        if not _has_its_hash(blob):
            file.unlink()
            blob.unlink()
            raise CheckpointError(
                f"{file} came damaged from the hub, for its hash is not the one that it was "
                "announced with. It is deleted; load again to download it again"
            )
        with suppress(OSError), open(checked, "a") as notes:  # a cache may be read-only
            notes.write(f"{note}\n")


def _has_its_hash(blob: Path) -> bool:
    """False if the name is a hash, as in the hub's cache, and of something else.

    Large files are stored there under their sha256, small ones under git's sha1; a mirror of the
    hub may have the plain sha1, or a name that is none of these.
    """
    if len(blob.name) == 64:
        digests = [hashlib.sha256()]
    elif len(blob.name) == 40:
        digests = [hashlib.sha1(b"blob %d\0" % blob.stat().st_size), hashlib.sha1()]
    else:
        return True
    with open(blob, "rb") as file:
        while chunk := file.read(1 << 20):
            for digest in digests:
                digest.update(chunk)
    return blob.name in [digest.hexdigest() for digest in digests]


# ------------------------------------------------------------------------------------------------
# directory -> tensors


def _weights_in(directory: Path) -> Path | None:
    only = "" if _is_clips(directory) else "open_clip"
    names = (name for name in WEIGHTS if name.startswith(only))
    return next((directory / name for name in names if (directory / name).is_file()), None)


def _is_clips(directory: Path) -> bool:
    """False where config.json and what goes with it are timm's and describe one image model, while
    the whole CLIP lies beside it in open_clip's files, as in timm's repositories on the hub."""
    config, open_clip = (directory / name for name in CONFIGS.values())
    return not (open_clip.is_file() and config.is_file() and "architecture" in read_json(config))


def read_tensors(path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of a weights file or of a sharded index, mapped into memory and not yet read.

    Floating point numbers in another `dtype` than the one asked for are converted, a few tensors
    at a time, so that the file never lies in memory beside the model. No code in .bin and .pt
    files is ever run: see pickles.py.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path, dtype)
    try:
        tensors = _read_in_turn(path, dtype)
    except Exception as error:  # damage shows itself in many ways, all of them the file's
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
    if is_safe and header > 6_000_000:  # of many times that in memory; a CLIP's has some 200,000
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
            del mapped  # with the last of them go the pages of the file that have been read
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
        # os.path's never raises, whatever the name is.
        if Path(shard).name != shard or path.suffix not in SUFFIXES or not os.path.isfile(path):
            raise CheckpointError(
                f"{index}: names a shard {shown(shard)} that is not a weights file beside it"
            )
        more = read_tensors(path, dtype)
        if twice := sorted(tensors.keys() & more.keys()):
            raise CheckpointError(f"{path}: tensors of another shard again: {_listed(twice)}")
        tensors |= more
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise CheckpointError(f"{index}: {len(absent)} tensors are in no shard: {_listed(absent)}")
    return tensors


# ------------------------------------------------------------------------------------------------
# tensors -> model

Model = CLIP | VisionTower | TextTower


class Contents(NamedTuple):
    """What a weights file holds: the tensors of which model, under the names of which layout."""

    config: CLIPConfig | TowerConfig
    layout: str
    table: Layout
    tensors: dict[str, Tensor]


def read_config(directory: Path) -> CLIPConfig:
    """The config of a checkpoint of two towers, from its config file, or where OpenAI's layout has
    none from the shapes of the weights. Raises CheckpointError."""
    layouts = [layout for layout, name in CONFIGS.items() if (directory / name).is_file()]
    layout = "" if not layouts else layouts[0] if _is_clips(directory) else "open_clip"
    weights = _weights_in(directory)
    if layout or weights is None:
        config = _read_config(directory, layout or "transformers")
    else:
        config = _read_contents(directory, weights).config
    return _whole(config, directory)


def load_config(name: str | PathLike[str], *, revision: str | None = None) -> CLIPConfig:
    """The config of a checkpoint, by any of the names of `load`. Raises CheckpointError."""
    if not os.path.isfile(_as_path(name)):
        return read_config(resolve(name, "config", revision=revision))
    return _whole(_find(name, None)[0].config, name)


def _whole(config: CLIPConfig | TowerConfig, name: str | PathLike[str]) -> CLIPConfig:
    if isinstance(config, TowerConfig):
        raise CheckpointError(f"{name}: a {config.name} tower alone; expected a whole CLIP")
    return config


def _read_config(directory: Path, layout: str) -> CLIPConfig | TowerConfig:
    path = directory / CONFIGS[layout]
    settings = read_json(path)
    with blaming(path):
        if layout == "open_clip":
            return config_from_open_clip(settings)
        is_tower = settings.get("model_type") in [*TOWERS]
        return (TowerConfig if is_tower else CLIPConfig).from_dict(settings)


def _read_contents(directory: Path, weights: Path, dtype: torch.dtype | None = None) -> Contents:
    tensors = read_tensors(weights, dtype)
    is_open_clip = (directory / CONFIGS["open_clip"]).is_file()
    with blaming(weights):
        try:
            layout, table, tensors = recognize(tensors)
        except ValueError:
            if is_open_clip:
                _read_config(directory, "open_clip")  # which says by what field it is another model
            raise
    if layout == "openai or open_clip":
        layout = "open_clip" if is_open_clip else "openai"
        if layout == "openai":
            warnings.warn(
                f"{weights}: read as OpenAI's, with QuickGELU and heads of 64. If it is of "
                "open_clip, put its open_clip_config.json beside it",
                stacklevel=2,
            )
    if layout == "openai":
        with blaming(weights):
            config: CLIPConfig | TowerConfig = config_from_shapes(tensors)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in OPENAI_NUMBERS}
    else:
        config = _read_config(directory, layout)
    return Contents(config, layout, table, _without_position_ids(tensors, weights))


def _without_position_ids(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Drop the buffers 0..n-1 that transformers saved until 4.31, having checked that they are."""
    kept = dict(tensors)
    for name in ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"):
        ids = kept.pop(name, torch.empty(0)).flatten()
        if len(ids) > 100_000 or ids.tolist() != [*range(len(ids))]:
            raise CheckpointError(
                f"{path}: {name} is not 0, 1, 2, ..., so the positions of this checkpoint are "
                "in an order that no CLIP uses"
            )
    return kept


@contextmanager
def meta_device() -> Iterator[None]:
    """Models that are made in this block have shapes and no weights.

    Not even drawn ones: to draw a normal on its meta device, torch imports its whole compiler.
    """
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **kwargs)


def _skeleton(contents: Contents, path: Path) -> Model:
    """The model on the meta device: shapes without weights."""
    config, _, table, tensors = contents
    try:
        with meta_device():
            if isinstance(config, CLIPConfig):
                _check_depth("vision", config.vision, contents, path)
                _check_depth("text", config.text, contents, path)
                return CLIP(config)
            _check_depth(config.name, config.tower, contents, path)
            is_projected = layout_name(f"{config.name}.proj.weight", table) in tensors
            embed_dim = config.embed_dim if is_projected else None
            if isinstance(config.tower, VisionConfig):
                return VisionTower(config.tower, embed_dim)
            return TextTower(config.tower, embed_dim)
    except RuntimeError as error:  # more bytes than 64 bits can count
        path = path.parent / CONFIGS.get(contents.layout, path.name)
        raise CheckpointError(f"{path}: no model can be so large: {error}") from None


def _check_depth(
    tower: str, config: VisionConfig | TextConfig, contents: Contents, path: Path
) -> None:
    """Before a model is built: a wrong number of layers would fill the error with their names."""
    found = depth(tower, contents.table, contents.tensors)
    if found != config.layers:
        raise CheckpointError(
            f"{path}: the {tower} tower has {found} layers in the layout of {contents.layout}, "
            f"but its config says {config.layers}"
        )


def _parameters(model: Model) -> dict[str, Tensor]:
    """By their names in a CLIP, of which the model may be one tower."""
    prefix = {VisionTower: "vision.", TextTower: "text."}.get(type(model), "")
    return {prefix + name: parameter for name, parameter in model.state_dict().items()}


def _fit(contents: Contents, model: Model, path: Path) -> dict[str, Tensor]:
    """The tensors under the model's names; an error lists everything that does not fit, up to a
    thousand."""
    tensors, parameters = contents.tensors, _parameters(model)
    places = {ours: place(ours, contents.table) for ours in parameters}
    expected = {
        where.key: (where.stored_shape(parameters[ours].shape), ours)
        for ours, where in reversed(places.items())  # of q, k and v in one tensor, q is named
    }
    complaints = [
        f"missing: {key} {shape}, our {ours}"
        for key, (shape, ours) in reversed(expected.items())
        if key not in tensors
    ]
    complaints += [
        f"unexpected: {key:.200} {shown(tuple(tensor.shape))}"
        for key, tensor in tensors.items()
        if key not in expected
    ]
    complaints += [
        f"wrong shape: {key} {shown(tuple(tensors[key].shape))}, our {ours} {shape}"
        for key, (shape, ours) in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    complaints += [
        f"wrong type: {key} holds {tensors[key].dtype}, expected floating point numbers"
        for key in expected
        if key in tensors and not tensors[key].is_floating_point()
    ]
    if complaints:
        raise CheckpointError(
            f"{path}: {len(complaints)} tensors do not fit the model that its config describes; "
            f"the first, {complaints[0]}\n" + "\n".join(complaints[:1000])
        )
    return {ours: where.take(tensors[where.key]) for ours, where in places.items()}


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = [f"{name:.200}" for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" * (len(names) > most))


def check_device(device: str | torch.device) -> None:
    """Raises ValueError where tensors cannot be put on this device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by the kind of device
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from None


def load_model(name: str | PathLike[str], **options: Any) -> CLIP:
    """The model of a checkpoint alone, which needs no tokenizer or transform files.

    The options are those of `load`, but for `reference`. In the file's own dtype on a CPU the
    parameters are the mapped file, and cost no memory of their own until they are used or changed;
    a change never reaches the file. They keep the file's strides, as in transformers: the last bit
    of a product depends on them, and OpenAI's pytorch_model.bin has transposed projections.
    """
    model = _load(name, **options)[0]
    if not isinstance(model, CLIP):
        kind = type(model).__name__
        raise CheckpointError(f"{name}: one tower alone: load it with {kind}.from_pretrained")
    return model


def load_tower(name: str | PathLike[str], tower: str, **options: Any) -> Any:
    """The "vision" or the "text" tower of a checkpoint of two or of that one. See `load_model`."""
    model = _load(name, tower, **options)[0]
    if not isinstance(model, {"vision": VisionTower, "text": TextTower}[tower]):
        raise CheckpointError(f"{name}: has no {tower} tower, but a {type(model).__name__} alone")
    return model


def _load(
    name: str | PathLike[str],
    part: str = "",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Model, str]:
    """A model, or one tower of it where a part is named, and the layout that it was found in."""
    check_device(device)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; expected one of floating point, as torch.float32")
    contents, path = _find(name, dtype, **options)
    whole = _skeleton(contents, path)
    tensors = _fit(contents, whole, path)
    model = getattr(whole, part) if part and isinstance(whole, CLIP) else whole
    state = {
        name: tensors[full].to(device, dtype)
        for name, full in zip(model.state_dict(), _parameters(model), strict=True)
    }
    _warn_of_damage(state, path)
    model.load_state_dict(state, assign=True)
    return model.eval(), contents.layout


def _find(
    name: str | PathLike[str], dtype: torch.dtype | None, **options: Any
) -> tuple[Contents, Path]:
    directory, path = resolve(name, "model", **options), _as_path(name)
    weights = path if os.path.isfile(path) else _weights_in(directory)
    if weights is None:
        raise CheckpointError(f"{directory}: no weights; expected {' or '.join(WEIGHTS[::2])}")
    return _read_contents(directory, weights, dtype), weights


def _warn_of_damage(tensors: dict[str, Tensor], path: Path) -> None:
    """What is no number makes every logit none, many layers later and without a word."""
    odd = [
        name
        for name, tensor in tensors.items()
        if tensor.numel()
        and not tensor.is_meta  # no numbers to check
        and not all(extreme.isfinite() for extreme in tensor.aminmax())
    ]
    if odd:
        warnings.warn(
            f"{path}: NaN or infinity in {len(odd)} tensors: {_listed(odd)}", stacklevel=4
        )


class Loaded(NamedTuple):
    """All that stands between a photograph and its logits.

    Of a checkpoint of one tower, `model` is that tower, and None stands for what it has no use for:
    the types are those of a whole CLIP.
    """

    model: CLIP
    tokenizer: Tokenizer
    transform: ImageTransform


def load(
    name: str | PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    reference: str = "transformers",
    revision: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Loaded:
    """A checkpoint as (model, tokenizer, transform), ready to run.

    `name`: an embedded checkpoint ("cifar10"), a directory, a weights file (.safetensors, .bin,
    .pt) with the other files beside it, or a hub id ("openai/clip-vit-base-patch32"), in the layout
    of transformers, OpenAI or open_clip.
    `reference`: whose text cleaning and image arithmetic to match, "transformers" or "openai".
    Raises CheckpointError, which says which file, what was expected and what was found.

    >>> model, tokenizer, transform = load("cifar10")
    >>> model.encode_text(tokenizer(["a cat", "a dog"])).shape[0]
    2
    """
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    options["local_files_only"] = local_files_only
    model, layout = _load(name, device=device, dtype=dtype, **options)
    # Of one tower alone these files are often in another folder: there they may be missing.
    tokenizer = transform = None
    if isinstance(model, CLIP) or has_files("tokenizer", name, options):
        tokenizer = _tokenizer(name, model, reference, options)
    if isinstance(model, CLIP) or has_files("transform", name, options):
        transform = _transform(name, model, layout, reference, options)
    parts: Any = (model, tokenizer, transform)  # Loaded's types are those of a whole CLIP
    return Loaded(*parts)


def has_files(kind: str, name: str | PathLike[str], options: dict[str, Any]) -> bool:
    """Whether a checkpoint has a "tokenizer" or a "transform"; `options` are those of `resolve`."""
    directory = resolve(name, kind, **options)
    files = VOCABULARIES if kind == "tokenizer" else HUB_FILES[kind][0]
    return any((directory / file).is_file() for file in files)


def _tokenizer(
    name: str | PathLike[str], model: Model, reference: str, options: dict[str, Any]
) -> Tokenizer | None:
    if isinstance(model, VisionTower):
        return None
    tokenizer = Tokenizer.from_pretrained(name, reference=reference, **options)
    vocab_size = (model.config.text if isinstance(model, CLIP) else model.config).vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens and the model embeds only "
            f"{vocab_size}; they must come from the same checkpoint"
        )
    return tokenizer


def _transform(
    name: str | PathLike[str], model: Model, layout: str, reference: str, options: dict[str, Any]
) -> ImageTransform | None:
    if isinstance(model, TextTower):
        return None
    if layout == "openai" and isinstance(model, CLIP) and not has_files("transform", name, options):
        return ImageTransform(model.config.vision.side, reference=reference)
    return ImageTransform.from_pretrained(name, reference=reference, **options)


# ------------------------------------------------------------------------------------------------
# model -> directory


def save_model(
    directory: str | PathLike[str], model: CLIP, *, layout: str = "transformers"
) -> None:
    """Write a model's weights in their own dtype, and its config. See `save`.

    A tokenizer and a transform that are there stay: they are saved by their own `save_pretrained`.
    """
    _save(Path(directory), model, None, None, layout, whole=False)


def save(
    directory: str | PathLike[str],
    model: CLIP,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    *,
    layout: str = "transformers",
) -> None:
    """Write a whole checkpoint that `load` reads back bit for bit.

    `layout`: "transformers" (config.json, model.safetensors), "openai" (model.safetensors, which
    openai/CLIP's build_model takes) or "open_clip" (open_clip_config.json,
    open_clip_model.safetensors). A process that is killed at any moment leaves all files old or
    all new; files that are not the checkpoint's are left alone. Raises CheckpointError, where
    nothing can be written, the model is not what its config says, the layout cannot express it, or
    the directory has another checkpoint's file that `load` would take for one of this.
    """
    _save(Path(directory), model, tokenizer, transform, layout)


def _save(
    directory: Path,
    model: CLIP,
    tokenizer: Tokenizer | None,
    transform: ImageTransform | None,
    layout: str,
    *,
    whole: bool = True,
) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    others = [name for key, name in CONFIGS.items() if key != layout]
    others += WEIGHTS[: WEIGHTS.index(WRITTEN[layout])]
    others += VOCABULARIES if whole and tokenizer is None else ()
    others += HUB_FILES["transform"][0][:2] if whole and transform is None else ()
    if there := [name for name in others if (directory / name).is_file()]:
        raise CheckpointError(
            f"{directory}: has {_listed(there)}, which would be loaded instead. Save to another "
            "directory, or first delete what is of another checkpoint"
        )
    with blaming(directory):
        refuse_unsayable(model.config, layout)
        preprocessing = {}
        if transform and layout == "open_clip":
            preprocessing = preprocessing_to_open_clip(transform)
        elif layout == "open_clip" and not whole and (directory / CONFIGS[layout]).is_file():
            preprocessing = read_json(directory / CONFIGS[layout]).get("preprocess_cfg", {})
    _check_parameters(directory, model)
    try:
        with saving(directory) as folder:
            _write_model(folder, model, layout, preprocessing)
            if tokenizer:
                tokenizer.save_pretrained(folder)
                for stale in ("tokenizer.json", "added_tokens.json"):
                    (folder / stale).touch()  # goes, for transformers would read it first
            if transform:
                processor = directory / "processor_config.json"
                if processor.is_file():
                    shutil.copy(processor, folder)  # where it is brought up to date
                transform.save_pretrained(folder)
    except CheckpointError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory}: cannot save here: {reason}") from error


def _write_model(folder: Path, model: CLIP, layout: str, preprocessing: dict[str, Any]) -> None:
    tensors = pack({name: t.cpu() for name, t in model.state_dict().items()}, LAYOUTS[layout])
    if layout == "open_clip":
        settings = {"model_cfg": config_to_open_clip(model.config)}
        write_json(folder / CONFIGS[layout], settings | {"preprocess_cfg": preprocessing})
    elif layout == "openai":
        tensors |= openai_numbers(model.config)
    else:
        write_json(folder / CONFIGS[layout], model.config.to_dict())
    with replacing(folder / WRITTEN[layout]) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def _check_parameters(directory: Path, model: CLIP) -> None:
    with meta_device():
        expected = {name: t.shape for name, t in CLIP(model.config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if odd := sorted(dict(expected.items() ^ found.items())):
        raise CheckpointError(
            f"{directory}: not saved, for nothing could load it: {len(odd)} tensors are missing, "
            f"unexpected or not of the shape in model.config: {_listed(odd)}"
        )


class Mapped(NamedTuple):
    """A parameter's places in two files, and the name and form it has in between."""

    source: Place
    name: str
    destination: Place
    shape: tuple[int, ...]
    dtype: torch.dtype


class Conversion(NamedTuple):
    """What `convert` did."""

    layout: str  # of the source
    parameters: list[Mapped]
    tokenizer: bool  # whether it was there to be written too
    transform: bool


def convert(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    layout: str,
    *,
    tokenizer: str | PathLike[str] | None = None,
    revision: str | None = None,
) -> Conversion:
    """Write a checkpoint in another layout: each weight with the same bits, in its own dtype.

    The tokenizer and the transform come along where the source has files for them; `tokenizer`
    names a checkpoint to take the first from, for OpenAI's own files have none. Raises
    CheckpointError, as `save` does.
    """
    options = {"revision": revision}
    contents, path = _find(source, None, **options)
    model = _skeleton(contents, path)
    if not isinstance(model, CLIP):
        kind = type(model).__name__
        raise CheckpointError(
            f"{path}: one tower alone, and only a whole CLIP is converted. {kind}.from_pretrained "
            "loads it as it is"
        )
    parameters = _fit(contents, model, path)
    model.load_state_dict(parameters, assign=True)
    words = transform = None
    if tokenizer is not None:
        words = _tokenizer(tokenizer, model, "transformers", {})
    elif has_files("tokenizer", source, options):
        words = _tokenizer(source, model, "transformers", options)
    if contents.layout == "openai" or has_files("transform", source, options):
        transform = _transform(source, model, contents.layout, "transformers", options)
    _save(Path(destination), model, words, transform, layout)
    rows = [
        Mapped(
            place(name, contents.table), name, place(name, LAYOUTS[layout]), tuple(t.shape), t.dtype
        )
        for name, t in parameters.items()
    ]
    return Conversion(contents.layout, rows, words is not None, transform is not None)
