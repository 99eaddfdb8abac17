"""From a name to a model, and back to a directory.

    name -> directory -> tensors in the file's own names -> tensors in ours -> model

A name is an embedded checkpoint, a directory, a weights file or a repository on the Hugging Face
hub. Nothing is guessed and nothing is repaired: every tensor in the file must have its place in
the model and every parameter its tensor, of the same shape, and no weight is changed on the way.
"""

import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from miniclip.config import (
    SAVED,
    CheckpointError,
    CLIPConfig,
    finish_save,
    read_json,
    replacing,
    write_json,
)
from miniclip.model import CLIP
from miniclip.tokenizer import Tokenizer
from miniclip.transform import ImageTransform

# ------------------------------------------------------------------------------------------------
# A layout is a table: our name for a parameter, or for the module that holds its weight and bias,
# and the layout's. {} is the number of the block.

_TRANSFORMERS_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
TRANSFORMERS = {
    "logit_scale": "logit_scale",
    "vision.class_embed": "vision_model.embeddings.class_embedding",
    "vision.patch_embed": "vision_model.embeddings.patch_embedding",
    "vision.pos_embed": "vision_model.embeddings.position_embedding.weight",
    "vision.register_embed": "vision_model.embeddings.register_tokens",  # no CLIP of theirs has any
    "vision.ln_pre": "vision_model.pre_layrnorm",  # sic: the spelling is in every checkpoint
    "vision.ln_post": "vision_model.post_layernorm",
    "vision.proj": "visual_projection",
    "text.token_embed": "text_model.embeddings.token_embedding",
    "text.pos_embed": "text_model.embeddings.position_embedding.weight",
    "text.ln_final": "text_model.final_layer_norm",
    "text.proj": "text_projection",
} | {
    f"{tower}.blocks.{{}}.{ours}": f"{tower}_model.encoder.layers.{{}}.{theirs}"
    for tower in ("vision", "text")
    for ours, theirs in _TRANSFORMERS_BLOCK.items()
}
LAYOUTS = {"transformers": TRANSFORMERS}


def layout_name(name: str, layout: dict[str, str]) -> str:
    """A parameter's name in another layout.

    >>> layout_name("vision.blocks.3.ln_1.bias", TRANSFORMERS)
    'vision_model.encoder.layers.3.layer_norm1.bias'
    """
    block = re.search(r"blocks\.(\d+)\.", name)
    template = re.sub(r"blocks\.\d+\.", "blocks.{}.", name)
    module, _, kind = template.rpartition(".")
    theirs = layout[template] if template in layout else f"{layout[module]}.{kind}"
    return theirs.format(block[1]) if block else theirs


# ------------------------------------------------------------------------------------------------
# name -> directory

PACKAGE = Path(__file__).resolve().parent
# The weights lie inside an installed package, and beside it in a checkout of the repository.
EMBEDDED = next(
    (d for d in (PACKAGE / "weights", PACKAGE.parent / "weights") if d.is_dir()),
    PACKAGE / "weights",
)

HUB_FILES = {
    "config": (["config.json"],),
    "model": (
        ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"],
        ["config.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"],
    ),
    "tokenizer": (
        ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
        + ["added_tokens.json", "tokenizer.json"],
    ),
    "transform": (["preprocessor_config.json", "processor_config.json"],),
}
SUFFIXES = (".safetensors", ".bin", ".pt")
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


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
            f"no checkpoint called {str(name)!r}: expected one of {', '.join(embedded)}, a "
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

    blobs = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    blobs = blobs / f"models--{repository.replace('/', '--')}" / "blobs"
    for patterns in HUB_FILES[kind]:
        known = {blob.name for blob in blobs.glob("*")}
        try:
            directory = Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    cache_dir=cache_dir,
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
        for file in directory.glob("*"):
            blob = file.resolve()
            if blob.name not in known and not _has_its_hash(blob):
                file.unlink()
                blob.unlink()  # the client has no such check, and would trust it from now on
                raise CheckpointError(
                    f"{repository}: {file.name} came damaged from the hub, for its hash is not the "
                    "one that it was announced with. It is deleted; load again to download it again"
                )
        if kind != "model" or _weights_in(directory):
            break
    return directory


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
    return next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a weights file or of a sharded index, mapped into memory and not yet read.

    Pickled code in .bin and .pt files is never run: torch.load reads them with weights_only.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        else:
            tensors = _read_pickle(path)
    except Exception as error:  # damage shows itself in many ways, all of them the file's
        reason = str(error).partition("\n")[0] or type(error).__name__
        reason = "".join(filter(str.isprintable, reason))  # it may quote the file
        if isinstance(error, pickle.UnpicklingError):  # torch's advice is to run the code
            reason = "it holds more than tensors, and pickled code is never run"
        size = f"{path.stat().st_size:,} bytes" if path.exists() else "no such file"
        raise CheckpointError(
            f"{path}: no weights file that can be read, or one cut short ({size}): {reason}"
        ) from error
    if not isinstance(tensors, dict) or not all(map(_is_named_tensor, tensors.items())):
        raise CheckpointError(f"{path}: expected a dictionary of tensors and nothing else")
    return tensors


def _read_pickle(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)  # as torch.save writes since 2020; the older cannot map
    if zipped:
        with zipfile.ZipFile(path) as archive:
            size = sum(record.file_size for record in archive.infolist())
        if size > path.stat().st_size:  # torch compresses nothing, but would believe it
            raise ValueError(f"its records claim to hold {size:,} bytes")
    return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)


def _is_named_tensor(item: tuple[object, object]) -> bool:
    """A name that can be printed, and a tensor with a number in the file for each it seems to have.

    A view may repeat one number 10^12 times, and sparse ones leave most out.
    """
    name, tensor = item
    dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
    return (
        isinstance(name, str)
        and name.isprintable()
        and dense
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        name.isprintable() and isinstance(shard, str) for name, shard in places.items()
    ):
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        path = index.parent / shard
        if Path(shard).name != shard or path.suffix not in SUFFIXES or not path.is_file():
            raise CheckpointError(
                f"{index}: names a shard {shard!r} that is not a weights file beside it"
            )
        more = read_tensors(path)
        if twice := sorted(tensors.keys() & more.keys()):
            raise CheckpointError(f"{path}: tensors of another shard again: {_listed(twice)}")
        tensors |= more
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise CheckpointError(f"{index}: {len(absent)} tensors are in no shard: {_listed(absent)}")
    return tensors


# ------------------------------------------------------------------------------------------------
# tensors -> model


def _fit(tensors: dict[str, Tensor], model: CLIP, path: Path) -> dict[str, Tensor]:
    """The tensors under the model's names; an error lists everything that does not fit."""
    parameters = model.state_dict()
    theirs = {layout_name(ours, TRANSFORMERS): ours for ours in parameters}
    tensors = _without_position_ids(tensors, path)
    complaints = [
        f"missing: {name} {tuple(parameters[ours].shape)}, our {ours}"
        for name, ours in theirs.items()
        if name not in tensors
    ]
    complaints += [
        f"unexpected: {name} {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name not in theirs
    ]
    complaints += [
        f"wrong shape: {name} {tuple(tensors[name].shape)}, our {ours} "
        f"{tuple(parameters[ours].shape)}"
        for name, ours in theirs.items()
        if name in tensors and tensors[name].shape != parameters[ours].shape
    ]
    complaints += [
        f"wrong type: {name} holds {tensors[name].dtype}, expected floating point numbers"
        for name in theirs
        if name in tensors and not tensors[name].is_floating_point()
    ]
    if complaints:
        raise CheckpointError(
            f"{path}: {len(complaints)} tensors do not fit the model that config.json describes; "
            f"the first, {complaints[0]}\n" + "\n".join(complaints)
        )
    return {ours: tensors[name] for name, ours in theirs.items()}


def _without_position_ids(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Drop the buffers 0..n-1 that transformers saved until 4.31, having checked that they are."""
    kept = dict(tensors)
    for name in ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"):
        ids = kept.pop(name).flatten().tolist() if name in kept else []
        if ids != [*range(len(ids))]:
            raise CheckpointError(
                f"{path}: {name} is not 0, 1, 2, ..., so the positions of this checkpoint are "
                "in an order that no CLIP uses"
            )
    return kept


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" * (len(names) > most))


def read_config(directory: Path) -> CLIPConfig:
    """The config.json of a directory. Raises CheckpointError."""
    path = directory / "config.json"
    try:
        return CLIPConfig.from_dict(read_json(path))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def check_device(device: str | torch.device) -> None:
    """Raises ValueError where tensors cannot be put on this device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by the kind of device
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from None


def load_model(
    name: str | PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> CLIP:
    """The model of a checkpoint alone, which needs no tokenizer or transform files.

    In the file's own dtype on a CPU the parameters are the mapped file, and cost no memory of
    their own until they are used or changed; a change never reaches the file.
    """
    check_device(device)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; expected one of floating point, as torch.float32")
    options = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    directory = resolve(name, "model", **options)
    path = _as_path(name)
    weights = path if os.path.isfile(path) else _weights_in(directory)
    config = read_config(directory)
    if weights is None:
        raise CheckpointError(f"{directory}: no weights; expected {' or '.join(WEIGHTS[:3])}")
    tensors = read_tensors(weights)
    _check_depth(config, tensors, weights)
    try:
        with torch.device("meta"):
            model = CLIP(config)
    except RuntimeError as error:  # more bytes than 64 bits can count
        path = directory / "config.json"
        raise CheckpointError(f"{path}: no model can be so large: {error}") from None
    tensors = _fit(tensors, model, weights)
    tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _check_depth(config: CLIPConfig, tensors: dict[str, Tensor], path: Path) -> None:
    """Before a model is built: a wrong number of layers would fill the error with their names."""
    for tower, expected in (("vision", config.vision.layers), ("text", config.text.layers)):
        blocks = {re.search(rf"{tower}_model\..*layers\.(\d+)\.", name) for name in tensors}
        found = len({block[1] for block in blocks if block})
        if found != expected:
            raise CheckpointError(
                f"{path}: the {tower} tower has {found} layers in transformers' layout, "
                f"but config.json says {expected}"
            )


class Loaded(NamedTuple):
    """All that stands between a photograph and its logits."""

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
    .pt) with the other files beside it, or a hub id ("openai/clip-vit-base-patch32").
    `reference`: whose text cleaning and image arithmetic to match, "transformers" or "openai".
    Raises CheckpointError, which says which file, what was expected and what was found.

    >>> model, tokenizer, transform = load("cifar10")
    >>> model.encode_text(tokenizer(["a cat", "a dog"])).shape[0]
    2
    """
    options = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    model = load_model(name, device=device, dtype=dtype, **options)
    tokenizer = Tokenizer.from_pretrained(name, reference=reference, **options)
    transform = ImageTransform.from_pretrained(name, reference=reference, **options)
    if tokenizer.vocab_size > model.config.text.vocab_size:
        raise CheckpointError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens and the model embeds only "
            f"{model.config.text.vocab_size}; they must come from the same checkpoint"
        )
    return Loaded(model, tokenizer, transform)


# ------------------------------------------------------------------------------------------------
# model -> directory


def save_model(
    directory: str | PathLike[str], model: CLIP, *, layout: str = "transformers"
) -> None:
    """Write config.json and model.safetensors in the weights' own dtype. See `save`.

    Raises CheckpointError, where nothing can be written, or the model is not what its config says.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    directory = Path(directory)
    with torch.device("meta"):
        expected = {name: t.shape for name, t in CLIP(model.config).state_dict().items()}
    tensors = model.state_dict()
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if odd := sorted(dict(expected.items() ^ found.items())):
        raise CheckpointError(
            f"{directory}: not saved, for nothing could load it: {len(odd)} tensors are missing, "
            f"unexpected or not of the shape in model.config: {_listed(odd)}"
        )
    try:
        tensors = {
            layout_name(name, LAYOUTS[layout]): tensor.cpu().contiguous()
            for name, tensor in tensors.items()
        }
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / "model.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
            write_json(directory / "config.json", model.config.to_dict())
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory}: cannot save here: {reason}") from error


def save(
    directory: str | PathLike[str],
    model: CLIP,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    *,
    layout: str = "transformers",
) -> None:
    """Write a whole checkpoint that `load` and transformers read back bit for bit.

    Each file is written beside the old one and takes its place when it is whole; files that are
    not the checkpoint's are left alone.
    """
    save_model(directory, model, layout=layout)
    tokenizer.save_pretrained(directory)
    transform.save_pretrained(directory)
