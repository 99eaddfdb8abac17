"""What a CLIP is: ten numbers for each tower, and the width of the space the two share.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv 2103.00020, tables 19 and 20. On disk this is transformers' config.json, because that is what
checkpoints come with; its names for our fields are the two tables below. Needs no torch.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a CheckpointError that names the file if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: expected a JSON file that can be read: {reason}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


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


# The defaults below are ViT-B/32's. They are also what transformers assumes for a field that a
# config.json leaves out, so `from_dict` needs no defaults of its own.


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Sizes are in pixels and must be square."""

    width: int = 768  # of the residual stream
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    act: str = "quick_gelu"  # OpenAI's weights; LAION's and most later ones use gelu
    ln_eps: float = 1e-5
    image_size: int = 224
    patch_size: int = 32
    channels: int = 3

    def __post_init__(self) -> None:
        _check_positive_ints(self, "image_size", "patch_size", "channels")
        _check_transformer(self)
        if self.patch_size > self.image_size:
            raise ValueError(
                f"VisionConfig: patch_size {self.patch_size} is larger than "
                f"image_size {self.image_size}; an image needs at least one patch"
            )

    @property
    def patches(self) -> int:
        """Patches in an image: 49 at 224 pixels and patch 32. A partial patch is dropped."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """The text tower. `eos_token_id` is the token it is read at; 2 means the largest id."""

    width: int = 512  # of the residual stream
    layers: int = 12
    heads: int = 8
    mlp_width: int = 2048
    act: str = "quick_gelu"
    ln_eps: float = 1e-5
    vocab_size: int = 49408
    context_length: int = 77
    bos_token_id: int = 49406
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        _check_positive_ints(self, "vocab_size", "context_length")
        _check_transformer(self)
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"TextConfig: {name} is {value!r}; expected an id from 0 to "
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
                f"CLIPConfig: logit_scale_init is {self.logit_scale_init!r}; "
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
            raise ValueError(
                f"not the config of a CLIP with two towers: model_type is {model_type!r} "
                "(expected 'clip', with the sections text_config and vision_config)"
            )
        shared = {ours: config[theirs] for ours, theirs in _SHARED.items() if theirs in config}
        return cls(
            vision=_tower_from_dict(VisionConfig, _VISION, config, "vision_config"),
            text=_tower_from_dict(TextConfig, _TEXT, config, "text_config"),
            **shared,
        )

    def to_dict(self) -> dict[str, Any]:
        """The same config as transformers writes it, for config.json."""
        vision = {theirs: getattr(self.vision, ours) for ours, theirs in _VISION.items()}
        text = {theirs: getattr(self.text, ours) for ours, theirs in _TEXT.items()}
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            **{theirs: getattr(self, ours) for ours, theirs in _SHARED.items()},
            "text_config": {
                "model_type": "clip_text_model",
                "projection_dim": self.embed_dim,
                **text,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "projection_dim": self.embed_dim,
                **vision,
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


def _tower_from_dict(cls: type, names: dict[str, str], config: dict[str, Any], section: str) -> Any:
    replacement = config.get(f"{section}_dict")
    values = config.get(section, {}) if replacement is None else replacement
    if not isinstance(values, dict):
        raise ValueError(f"{section} must be a JSON object, found {type(values).__name__}")
    try:
        return cls(**{ours: values[theirs] for ours, theirs in names.items() if theirs in values})
    except ValueError as error:
        raise ValueError(f"in {section}: {error}") from None


def _check_positive_ints(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(
                f"{type(config).__name__}: {name} is {value!r}; expected a positive whole number"
                " of at most 31 bits"
            )


def _check_transformer(config: VisionConfig | TextConfig) -> None:
    _check_positive_ints(config, "width", "layers", "heads", "mlp_width")
    kind = type(config).__name__
    if config.width % config.heads:
        raise ValueError(
            f"{kind}: width {config.width} does not divide into {config.heads} heads of equal width"
        )
    if config.act not in ACTIVATIONS:
        raise ValueError(
            f"{kind}: act is {config.act!r}; expected one of {', '.join(ACTIVATIONS)}. "
            "The activation is part of the weights: a near one gives near, wrong numbers"
        )
    if not _is_finite(config.ln_eps) or config.ln_eps <= 0:
        raise ValueError(f"{kind}: ln_eps is {config.ln_eps!r}; expected a number above 0")


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30
