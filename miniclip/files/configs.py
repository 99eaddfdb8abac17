"""Three kinds of config files <-> the fields of a CLIPConfig, as nested dictionaries.

    config.json              transformers' (model_type "clip", or one tower alone)
    open_clip_config.json    open_clip's model_cfg
    none                     OpenAI's files: the shapes of the weights are the config

The fields are {"vision": {...}, "text": {...}, "embed_dim": ..., "logit_scale_init": ...}. A field
that a file leaves out is left out here too, because the dataclasses have transformers' defaults.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from miniclip.errors import shown
from miniclip.files.names import OPENAI, OPENAI_NUMBERS, depth, layout_name

Fields = dict[str, Any]

LEGACY_EOS = 2
"""The end token in OpenAI's config files. It is wrong: their tokenizer ends a text with 49407.
transformers reads a 2 as "pool at the largest id of the row", and so does miniclip."""

# ------------------------------------------------------------------------------------------------
# transformers: config.json

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
_SECTIONS = {
    "vision": _TRANSFORMER
    | {"image_size": "image_size", "patch_size": "patch_size", "channels": "num_channels"},
    "text": _TRANSFORMER
    | {
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
    },
}
# Written only if transformers' CLIP has no such field, under the names of its other models.
_BEYOND = {"head_width": "head_dim", "registers": "num_register_tokens"}

TOWER_TYPES = {"clip_vision_model": "vision", "clip_text_model": "text"}


def from_transformers(config: Any, model_types: tuple[str, ...] = ("clip",)) -> Fields:
    """Read a parsed config.json of two towers. Raises ValueError.

    `projection_dim` counts at the top level only: some official files have a wrong copy inside the
    tower sections. `text_config_dict` and `vision_config_dict` replace the tower sections
    (transformers, configuration_clip.py). Entries that transformers' CLIP does not have keep their
    names: they may be the fields of a fork.
    """
    if not isinstance(config, dict):
        raise ValueError(f"expected a JSON object, found {type(config).__name__}")
    model_type = config.get("model_type", "clip")
    if model_type not in model_types or not any("vision_config" in key for key in config):
        found = "no sections"
        if model_type not in model_types:
            found = f"model_type is {shown(model_type)}"
            if (name := str(config.get("architectures", [""])[0:1])).isprintable() and len(
                name
            ) > 4:
                found += f", of the class {name[2:-2]:.100}"
        raise ValueError(
            f"not the config of a CLIP with two towers: {found} (expected "
            f"{' or '.join(map(repr, model_types))}, with the sections text_config and "
            "vision_config)"
        )
    fields = _renamed(config, _SHARED)
    for tower, names in _SECTIONS.items():
        replacement = config.get(f"{tower}_config_dict")
        section = config.get(f"{tower}_config", {}) if replacement is None else replacement
        if not isinstance(section, dict):
            found = type(section).__name__
            raise ValueError(f"{tower}_config must be a JSON object, found {found}")
        fields[tower] = _renamed(section, names | _BEYOND)
    return fields


def tower_from_transformers(config: dict[str, Any]) -> Fields:
    """Read a parsed config.json of one tower alone, as in Stable Diffusion and IP-Adapter."""
    tower = TOWER_TYPES[config["model_type"]]
    embed_dim: Any = config.get("projection_dim", 512)
    if type(embed_dim) is not int or not 0 < embed_dim < 2**31:
        found = shown(embed_dim)
        raise ValueError(f"projection_dim is {found}; expected a positive whole number")
    return {tower: _renamed(config, _SECTIONS[tower] | _BEYOND), "embed_dim": embed_dim}


def _renamed(section: dict[str, Any], names: Mapping[str, str]) -> Fields:
    """Entries under our names. An entry that has our name for another of theirs is dropped."""
    ours = {theirs: ours for ours, theirs in names.items()}
    return {
        ours.get(name, name): value
        for name, value in section.items()
        if name in ours or name not in names
    }


def to_transformers(
    fields: Fields, model_type: str = "clip", architecture: str = "CLIPModel"
) -> dict[str, Any]:
    """config.json of a model with these fields.

    A tower that is `beyond_transformers` has more entries, and its number of heads is a list with
    one number for each layer. transformers accepts only a single number there, and so refuses a
    model that it would otherwise run without the entries it does not know.
    """
    own = {name: value for name, value in fields.items() if name not in (*_SHARED, *_SECTIONS)}
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        **{theirs: fields[ours] for ours, theirs in _SHARED.items()},
        **own,
    }
    for tower in ("text", "vision"):
        config[f"{tower}_config"] = {
            "model_type": f"clip_{tower}_model",
            "projection_dim": fields["embed_dim"],
            **_tower_to_transformers(fields[tower], _SECTIONS[tower]),
        }
    return config


def _tower_to_transformers(tower: Fields, names: dict[str, str]) -> dict[str, Any]:
    values = {theirs: tower[ours] for ours, theirs in names.items()}
    if beyond_transformers(tower):
        more = {theirs: tower.get(ours) for ours, theirs in _BEYOND.items()}
        values |= {theirs: value for theirs, value in more.items() if value}
        values["num_attention_heads"] = _per_layer(tower, "heads")
    values |= {name: v for name, v in tower.items() if name not in (*names, *_BEYOND)}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _per_layer(tower: Fields, name: str) -> list[int]:
    value = tower[name]
    return [*value] if isinstance(value, tuple) else [value] * tower["layers"]


def beyond_transformers(tower: Mapping[str, Any]) -> list[str]:
    """The fields of a tower that transformers' CLIP cannot express. A published model has none.

    >>> beyond_transformers({"image_size": (224, 336), "registers": 4})
    ['image_size (224, 336)', 'registers 4']
    """
    names = ("heads", "mlp_width", "head_width", "image_size", "registers")
    values = {name: tower.get(name) for name in names}
    odd = {name: v for name, v in values.items() if isinstance(v, tuple) or (name in _BEYOND and v)}
    return [f"{name} {value}" for name, value in odd.items()]


# ------------------------------------------------------------------------------------------------
# openai: the shapes are the config


def from_shapes(tensors: dict[str, Tensor]) -> Fields:
    """Read the config of a model in OpenAI's layout (openai/CLIP, model.py, build_model).

    Raises ValueError if a tensor is missing, or if the shapes contradict the three numbers that
    OpenAI's files have beside the weights.
    """

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != ndim:
            raise ValueError(f"no tensor {name} of {ndim} dimensions, to read the config from")
        return tuple(tensors[name].shape)

    def tower(name: str, width: int) -> Fields:
        if width % 64:
            raise ValueError(
                f"the {name} tower has width {width}; OpenAI's heads are 64 wide. If open_clip "
                "wrote the file, put its open_clip_config.json beside it"
            )
        first, _ = shape(layout_name(f"{name}.blocks.0.mlp.fc1.weight", OPENAI), 2)
        layers = depth(name, OPENAI, tensors)
        return {"width": width, "layers": layers, "heads": width // 64, "mlp_width": first}

    width, channels, patch_size, _ = shape("visual.conv1.weight", 4)
    positions, _ = shape("visual.positional_embedding", 2)
    vocab_size, text_width = shape("token_embedding.weight", 2)
    context_length, _ = shape("positional_embedding", 2)
    side = round(max(positions - 1, 0) ** 0.5) * patch_size
    fields = {
        "vision": tower("vision", width)
        | {"image_size": side, "patch_size": patch_size, "channels": channels},
        "text": tower("text", text_width)
        | {
            "vocab_size": vocab_size,
            "context_length": context_length,
            "bos_token_id": max(vocab_size - 2, 0),
            "eos_token_id": LEGACY_EOS,  # OpenAI's code reads a text at its largest id
        },
        "embed_dim": shape("text_projection", 2)[1],
    }
    for name, expected in zip(OPENAI_NUMBERS, (side, context_length, vocab_size), strict=True):
        found = tensors[name].flatten()[:2].tolist() if name in tensors else [expected]
        if found != [expected]:
            raise ValueError(f"{name} is {found}, and the shapes of the weights say {expected}")
    return fields


def openai_numbers(fields: Fields) -> dict[str, Tensor]:
    """The three numbers, as OpenAI's own files have them."""
    vision, text = fields["vision"], fields["text"]
    numbers = (vision["image_size"], text["context_length"], text["vocab_size"])
    return {name: torch.tensor(n) for name, n in zip(OPENAI_NUMBERS, numbers, strict=True)}


# ------------------------------------------------------------------------------------------------
# What a layout cannot express


def refuse_inexpressible(fields: Fields, layout: str) -> None:
    """Raise ValueError, with the fields, if a layout cannot express a model.

    The layout of transformers can express every model, with entries of our own in config.json.
    """
    vision, text = fields["vision"], fields["text"]
    odd = beyond_transformers(vision) + beyond_transformers(text)
    if not odd:  # from here on each field is one number
        largest = (LEGACY_EOS, text["vocab_size"] - 1)
        odd += [f"channels {vision['channels']}"] * (vision["channels"] != 3)
        odd += [f"eos_token_id {text['eos_token_id']}"] * (text["eos_token_id"] not in largest)
        odd += [f"two activations, {vision['act']} and {text['act']}"] * (
            vision["act"] != text["act"]
        )
        odd += [f"act {vision['act']}"] * (vision["act"] == "gelu_pytorch_tanh")
    if not odd and layout == "openai":
        odd += [f"act {vision['act']}"] * (vision["act"] != "quick_gelu")
        odd += [f"image_size {vision['image_size']}"] * (
            vision["image_size"] % vision["patch_size"] != 0
        )
        for tower in (vision, text):
            odd += [f"ln_eps {tower['ln_eps']}"] * (tower["ln_eps"] != 1e-5)
            odd += [f"{tower['heads']} heads in a width of {tower['width']}, where each has 64"] * (
                tower["heads"] * 64 != tower["width"]
            )
    if odd and layout != "transformers":
        found = ", ".join(dict.fromkeys(odd))  # the two towers may have the same
        raise ValueError(f"the layout {layout!r} cannot express {found}; 'transformers' can")
