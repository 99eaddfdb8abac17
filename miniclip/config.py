"""What a CLIP is: ten numbers for each tower, and the width of the space the two share.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv 2103.00020, tables 19 and 20. On disk this is transformers' config.json, because that is what
checkpoints come with; its names for our fields are the two tables below. Needs no torch.

A model that surgery has reshaped may be beyond what transformers' CLIP can be: see `to_dict`.
"""

import json
import os
import reprlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")

LEGACY_EOS = 2
"""The end token that OpenAI's own config files name. It is wrong: their tokenizer ends a text with
49407. transformers reads a 2 as "pool at the largest id of the row", and so do we."""


class CheckpointError(ValueError):
    """A checkpoint's files are missing, damaged, or not what they claim to be."""


class ContextLengthError(ValueError):
    """A text has more tokens than the text tower has positions."""


class ImageError(ValueError):
    """An image cannot be read, or is in a form that has no exact reading as pixels."""


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """An error about what a file says becomes a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_json(path: Path, most: int = 1_000_000) -> dict[str, Any]:
    """The object in a JSON file; a CheckpointError that names the file if there is none.

    Of more than `most` bytes nothing is read: a config has a few thousand, and parsed they take up
    to thirty times the memory.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")  # and to read a pipe might never end
        with open(path, "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise ValueError(f"it has more than {most:,} bytes, which no CLIP's has")
        value = json.loads(data.decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: expected a JSON file that can be read: {reason}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


def shown(value: object) -> str:
    """A value as a message quotes it: its repr, or the ends of one that is long.

    >>> shown([1] * 10**6)
    '[1, 1, 1, 1, 1, 1, ...]'
    """
    return _short.repr(value)[:200]  # what is nested is short on each level alone


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to. The file takes the place of `path` when it is whole, and never before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def saving(directory: Path) -> Iterator[Path]:
    """A folder to write files to. They take their places in `directory` all together, or none.

    An empty file there removes the one of its name. Killed at any moment, the process leaves files
    that are all old or all new: one rename makes the folder a complete save, and whoever comes to
    the directory next calls `finish_save`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for folder in directory.glob(".saving-*"):
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > 3600:  # its process was killed
                shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        yield folder
        for file in folder.iterdir():
            place = directory / file.name
            if place.is_dir():  # now, for nothing may fail once the save is complete
                raise IsADirectoryError(f"{place} is a directory")
            if place.exists():
                file.chmod(place.stat().st_mode)
        finish_save(directory)
        os.replace(folder, directory / SAVED)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    finish_save(directory)


SAVED = ".miniclip-saved"  # a complete save, whose files are still to be moved to their places


def finish_save(directory: Path) -> None:
    """Move the files of a complete save to their places, if a process was killed over it."""
    saved = directory / SAVED
    try:
        names = [] if saved.is_symlink() else os.listdir(saved)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        with suppress(FileNotFoundError):  # another process is at it too
            if (saved / name).stat().st_size:
                os.replace(saved / name, directory / name)
            else:
                (directory / name).unlink(missing_ok=True)
                (saved / name).unlink()
    with suppress(OSError):  # it may be gone, or already the next one
        saved.rmdir()


# The defaults below are ViT-B/32's. They are also what transformers assumes for a field that a
# config.json leaves out, so `from_dict` needs no defaults of its own.


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Sizes are in pixels; an image that is not square is (height, width)."""

    width: int = 768  # of the residual stream
    layers: int = 12
    heads: int | tuple[int, ...] = 12  # of every layer, or one number for each
    mlp_width: int | tuple[int, ...] = 3072  # the same
    act: str = "quick_gelu"  # OpenAI's weights; LAION's and most later ones use gelu
    ln_eps: float = 1e-5
    image_size: int | tuple[int, int] = 224
    patch_size: int = 32
    channels: int = 3
    head_width: int | None = None  # None is width // heads, as in every published CLIP
    registers: int = 0  # extra tokens between the class token and the patches

    def __post_init__(self) -> None:
        _check_positive_ints(self, "patch_size", "channels")
        _check_one_or_each(self, "image_size", 2, "one for the height and one for the width")
        _check_transformer(self)
        if type(self.registers) is not int or not 0 <= self.registers < 2**31:
            found = shown(self.registers)
            raise ValueError(f"VisionConfig: registers is {found}; expected 0 or more")
        if self.patch_size > min(self.height_width):
            raise ValueError(
                f"VisionConfig: patch_size {self.patch_size} is larger than "
                f"image_size {self.image_size}; an image needs at least one patch"
            )

    @property
    def height_width(self) -> tuple[int, int]:
        """The two sides of an image."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def side(self) -> int:
        """The side of a square image, which is what an ImageTransform makes. Else ValueError."""
        if isinstance(self.image_size, tuple):
            raise ValueError(
                f"VisionConfig: image_size is {self.image_size}; expected the side of a square, as "
                "an ImageTransform makes no other pixels"
            )
        return self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches: 7, 7 at 224 pixels, patch 32. A partial patch is dropped."""
        height, width = self.height_width
        return height // self.patch_size, width // self.patch_size

    @property
    def patches(self) -> int:
        """Patches in an image: 49 at 224 pixels and patch 32."""
        rows, columns = self.grid
        return rows * columns


@dataclass(frozen=True)
class TextConfig:
    """The text tower. `eos_token_id` is the token it is read at; 2 means the largest id."""

    width: int = 512  # of the residual stream
    layers: int = 12
    heads: int | tuple[int, ...] = 8
    mlp_width: int | tuple[int, ...] = 2048
    act: str = "quick_gelu"
    ln_eps: float = 1e-5
    vocab_size: int = 49408
    context_length: int = 77
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    head_width: int | None = None

    def __post_init__(self) -> None:
        _check_positive_ints(self, "vocab_size", "context_length")
        _check_transformer(self)
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"TextConfig: {name} is {shown(value)}; expected an id from 0 to "
                    f"{self.vocab_size - 1}, as vocab_size is {self.vocab_size}"
                )


@dataclass(frozen=True)
class CLIPConfig:
    """Two towers and the space they share.

    >>> CLIPConfig().vision.patches
    49
    >>> CLIPConfig.from_dict(CLIPConfig(embed_dim=640).to_dict()).embed_dim
    640
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 512
    logit_scale_init: float = 2.6592  # ln(1 / 0.07), section 2.5 of the paper

    def __post_init__(self) -> None:
        for name, kind in (("vision", VisionConfig), ("text", TextConfig)):
            if not isinstance(getattr(self, name), kind):
                found = type(getattr(self, name)).__name__
                raise ValueError(f"CLIPConfig: {name} must be a {kind.__name__}, not {found}")
        _check_positive_ints(self, "embed_dim")
        if not _is_finite(self.logit_scale_init):
            raise ValueError(
                f"CLIPConfig: logit_scale_init is {shown(self.logit_scale_init)}; "
                "expected a finite number (it is stored as a logarithm)"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "CLIPConfig":
        """Read transformers' config.json, parsed. Raises ValueError if it describes no CLIP.

        `projection_dim` counts at the top level only: the copies inside the tower sections are
        left at 512 in some official files. `text_config_dict` and `vision_config_dict`, where
        present, replace the tower sections (transformers, configuration_clip.py).
        """
        if not isinstance(config, dict):
            raise ValueError(f"expected a JSON object, found {type(config).__name__}")
        model_type = config.get("model_type", "clip")
        if model_type != "clip" or not any("vision_config" in key for key in config):
            found = f"model_type is {shown(model_type)}" if model_type != "clip" else "no sections"
            raise ValueError(
                f"not the config of a CLIP with two towers: {found} "
                "(expected 'clip', with the sections text_config and vision_config)"
            )
        shared = {ours: config[theirs] for ours, theirs in _SHARED.items() if theirs in config}
        return cls(
            vision=_tower_from_dict(VisionConfig, _VISION, config, "vision_config"),
            text=_tower_from_dict(TextConfig, _TEXT, config, "text_config"),
            **shared,
        )

    def to_dict(self) -> dict[str, Any]:
        """The same config as transformers writes it, for config.json.

        A tower that is `beyond_transformers` has entries more, and its number of heads is a list,
        one for each layer, where transformers takes a single number and stops at anything else.
        So miniclip reads the whole model back, and transformers refuses it: it would otherwise
        overlook the entries it does not know, and run another model.
        """
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            **{theirs: getattr(self, ours) for ours, theirs in _SHARED.items()},
            "text_config": {
                "model_type": "clip_text_model",
                "projection_dim": self.embed_dim,
                **_tower_to_dict(self.text, _TEXT),
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "projection_dim": self.embed_dim,
                **_tower_to_dict(self.vision, _VISION),
            },
        }


# our name -> transformers' name
_SHARED = {"embed_dim": "projection_dim", "logit_scale_init": "logit_scale_init_value"}
_TRANSFORMER = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "act": "hidden_act",
    "ln_eps": "layer_norm_eps",
}
_VISION = _TRANSFORMER | {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "channels": "num_channels",
}
_TEXT = _TRANSFORMER | {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}


# transformers' model_type of one tower alone
TOWERS = {"clip_vision_model": (VisionConfig, _VISION), "clip_text_model": (TextConfig, _TEXT)}

# Written only where transformers cannot say it, under the names that its other models have for it.
_BEYOND = {"head_width": "head_dim", "registers": "num_register_tokens"}


def beyond_transformers(config: VisionConfig | TextConfig) -> list[str]:
    """What transformers' CLIP has no place for in this tower: nothing, in a published model.

    >>> beyond_transformers(VisionConfig(image_size=(224, 336), registers=4))
    ['image_size (224, 336)', 'registers 4']
    """
    fields = ("heads", "mlp_width", "head_width", "image_size", "registers")
    values = {name: getattr(config, name, None) for name in fields}
    odd = {name: v for name, v in values.items() if isinstance(v, tuple) or (name in _BEYOND and v)}
    return [f"{name} {value}" for name, value in odd.items()]


def per_layer(config: VisionConfig | TextConfig, name: str) -> tuple[int, ...]:
    """`heads` or `mlp_width` layer by layer.

    >>> per_layer(VisionConfig(layers=3), "heads")
    (12, 12, 12)
    """
    value = getattr(config, name)
    return value if isinstance(value, tuple) else (value,) * config.layers


def _tower_to_dict(config: VisionConfig | TextConfig, names: dict[str, str]) -> dict[str, Any]:
    values = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    if beyond_transformers(config):
        more = {theirs: getattr(config, ours, None) for ours, theirs in _BEYOND.items()}
        values |= {theirs: value for theirs, value in more.items() if value}
        values["num_attention_heads"] = per_layer(config, "heads")  # the list it stops at
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


class TowerConfig(NamedTuple):
    """One tower alone, as Stable Diffusion has of texts and IP-Adapter of images."""

    name: str  # "vision" or "text"
    tower: VisionConfig | TextConfig
    embed_dim: int  # counts where there is a projection, which only the weights say

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "TowerConfig":
        """Read the config.json of a tower, parsed. Raises ValueError.

        >>> TowerConfig.from_dict({"model_type": "clip_text_model"}).tower.width
        512
        """
        kind, names = TOWERS[config["model_type"]]
        tower = _tower(kind, names, config)
        embed_dim = CLIPConfig(embed_dim=config.get("projection_dim", 512)).embed_dim  # checked
        return cls("vision" if kind is VisionConfig else "text", tower, embed_dim)


def _tower_from_dict(cls: type, names: dict[str, str], config: dict[str, Any], section: str) -> Any:
    replacement = config.get(f"{section}_dict")
    values = config.get(section, {}) if replacement is None else replacement
    if not isinstance(values, dict):
        raise ValueError(f"{section} must be a JSON object, found {type(values).__name__}")
    try:
        return _tower(cls, names, values)
    except ValueError as error:
        raise ValueError(f"in {section}: {error}") from None


def _tower(cls: type, names: dict[str, str], section: dict[str, Any]) -> Any:
    names = names | {ours: _BEYOND[ours] for ours in _BEYOND if hasattr(cls, ours)}
    values = {ours: section[theirs] for ours, theirs in names.items() if theirs in section}
    return cls(**{name: tuple(v) if type(v) is list else v for name, v in values.items()})


def _check_positive_ints(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(
                f"{type(config).__name__}: {name} is {shown(value)}; expected a positive whole "
                "number of at most 31 bits"
            )


def _check_one_or_each(config: object, name: str, count: int, each: str, least: int = 1) -> None:
    """A positive whole number, or `count` of them; as one number where they are all the same."""
    value = getattr(config, name)
    if not isinstance(value, tuple):
        return _check_positive_ints(config, name)
    if len(value) != count or not all(type(v) is int and least <= v < 2**31 for v in value):
        raise ValueError(
            f"{type(config).__name__}: {name} is {shown(value)}; expected one positive whole "
            f"number, or {count} of them, {each}"
        )
    if len(set(value)) == 1 and value[0]:
        object.__setattr__(config, name, value[0])


def _check_transformer(config: VisionConfig | TextConfig) -> None:
    _check_positive_ints(config, "width", "layers")
    if config.layers > 1000:  # the published have 2 to 48, and each is built before it is filled
        found = f"{type(config).__name__}: layers is {config.layers}"
        raise ValueError(f"{found}; expected at most 1,000")
    for name in ("heads", "mlp_width"):  # 0 in a layer that has lost them all
        _check_one_or_each(config, name, config.layers, "one for each layer", least=0)
    kind = type(config).__name__
    if config.head_width is not None:
        _check_positive_ints(config, "head_width")
        if config.heads == config.width / config.head_width:
            object.__setattr__(config, "head_width", None)
    elif isinstance(config.heads, tuple):
        raise ValueError(
            f"{kind}: heads is {shown(config.heads)}, which differ, so head_width must be given"
        )
    elif config.width % config.heads:
        raise ValueError(
            f"{kind}: width {config.width} does not divide into {config.heads} heads of equal width"
        )
    if config.act not in ACTIVATIONS:
        raise ValueError(
            f"{kind}: act is {shown(config.act)}; expected one of {', '.join(ACTIVATIONS)}. "
            "The activation is part of the weights: a near one gives near, wrong numbers"
        )
    if not _is_finite(config.ln_eps) or config.ln_eps <= 0:
        raise ValueError(f"{kind}: ln_eps is {shown(config.ln_eps)}; expected a number above 0")


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30


# ------------------------------------------------------------------------------------------------
# Shapes with a name


def _preset(vision: tuple[int, ...], text: tuple[int, ...], act: str = "quick_gelu") -> CLIPConfig:
    width, layers, heads, mlp_width, patch_size, image_size = vision
    text_width, text_layers, embed_dim = text
    return CLIPConfig(
        VisionConfig(width, layers, heads, mlp_width, act, 1e-5, image_size, patch_size),
        TextConfig(text_width, text_layers, text_width // 64, 4 * text_width, act),
        embed_dim,
    )


PRESETS = {
    # vision: width, layers, heads, MLP width, patch, image; text: width, layers; embedding
    "B/32": _preset((768, 12, 12, 3072, 32, 224), (512, 12, 512)),
    "B/16": _preset((768, 12, 12, 3072, 16, 224), (512, 12, 512)),
    "L/14": _preset((1024, 24, 16, 4096, 14, 224), (768, 12, 768)),
    "L/14-336": _preset((1024, 24, 16, 4096, 14, 336), (768, 12, 768)),
    "H/14": _preset((1280, 32, 16, 5120, 14, 224), (1024, 24, 1024), "gelu"),
    "g/14": _preset((1408, 40, 16, 6144, 14, 224), (1024, 24, 1024), "gelu"),
    "bigG/14": _preset((1664, 48, 16, 8192, 14, 224), (1280, 32, 1280), "gelu"),
    "TinyCLIP-8M/16": _preset((256, 10, 4, 1024, 16, 224), (256, 3, 512)),
    "TinyCLIP-39M/16": _preset((512, 12, 8, 2048, 16, 224), (512, 6, 512)),
    "TinyCLIP-40M/32": _preset((512, 12, 8, 2048, 32, 224), (512, 6, 512)),
    "TinyCLIP-61M/32": _preset((640, 12, 10, 2560, 32, 224), (512, 9, 512)),
}
"""Shapes that people use: OpenAI's four (tables 19 and 20 of the paper), those LAION trained with
open_clip (github.com/mlfoundations/open_clip, model_configs), and TinyCLIP's (Wu et al. 2023, arXiv
2309.12314). The end token is the tokenizer's, 49407; OpenAI's own files say 2 (LEGACY_EOS)."""
