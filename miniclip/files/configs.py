"""transformers' config.json <-> the fields of a CLIPConfig, as nested dictionaries.

OpenAI's files have no config, so the fields are read from the shapes of the weights. open_clip's
config is read in `open_clip.py`.

The fields are {"vision": {...}, "text": {...}, "embed_dim": ..., "logit_scale_init": ...}. If
a file leaves out a field, the config's dataclass gives the default, as in transformers.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from miniclip.errors import shown, wrong
from miniclip.files.checks import LEGACY_EOS
from miniclip.files.names import OPENAI, OPENAI_NUMBERS, Layout, depth, place
from miniclip.files.published import Fields, releases_of

# ------------------------------------------------------------------------------------------------
# transformers: config.json

# miniclip's name -> transformers' name
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
# Fields that transformers' CLIP does not have. The names are from other models in transformers.
_BEYOND = {"head_width": "head_dim", "registers": "num_register_tokens"}

METACLIP_2 = "metaclip_2"  # MetaCLIP 2 pools a text at eos_token_id, even if this id is 2
TOWER_TYPES = {
    f"{family}_{tower}_model": tower
    for family in ("clip", METACLIP_2)
    for tower in ("vision", "text")
}


def from_transformers(config: Any, model_types: tuple[str, ...] = ("clip",)) -> Fields:
    """Read a parsed config.json of a model with two towers. Raises ValueError.

    `model_types` are the accepted values of `model_type`: "clip" and a fork's own value. The value
    "metaclip_2" is always accepted. `projection_dim` is read only at the top level, because some
    official files have a wrong copy in the tower sections. `text_config_dict` and
    `vision_config_dict` replace the tower sections, as in transformers' configuration_clip.py.
    Unknown entries keep their names, because they may belong to a fork.
    """
    if not isinstance(config, dict):
        raise ValueError(f"expected a JSON object, found {type(config).__name__}")
    model_type = config.get("model_type", "clip")
    is_known = model_type in (*model_types, METACLIP_2)
    if not is_known or not any("vision_config" in key for key in config):
        found = "no sections" if is_known else f"model_type is {shown(model_type)}"
        classes = config.get("architectures")
        name = classes[0] if isinstance(classes, list) and classes else ""
        if not is_known and isinstance(name, str) and name and name.isprintable():
            found += f", of the class {name:.100}"
        raise ValueError(
            f"not the config of a CLIP with two towers: {found} (expected "
            f"{' or '.join(map(repr, model_types))}, with text_config and vision_config)"
        )
    fields = _renamed(config, _SHARED)
    for tower, names in _SECTIONS.items():
        replacement = config.get(f"{tower}_config_dict")
        section = config.get(f"{tower}_config", {}) if replacement is None else replacement
        if not isinstance(section, dict):
            found = type(section).__name__
            raise ValueError(f"{tower}_config must be a JSON object, found {found}")
        fields[tower] = _renamed(section, names | _BEYOND)
    fields["text"] |= _literal_eos(model_type)
    return fields


def tower_from_transformers(config: dict[str, Any]) -> Fields:
    """Read a parsed config.json with only one tower, as in Stable Diffusion and IP-Adapter."""
    tower = TOWER_TYPES[config["model_type"]]
    embed_dim: Any = config.get("projection_dim", 512)
    if type(embed_dim) is not int or not 0 < embed_dim < 2**31:
        raise wrong("projection_dim", embed_dim, "a positive whole number")
    fields = _renamed(config, _SECTIONS[tower] | _BEYOND)
    return {tower: fields | _literal_eos(config["model_type"]), "embed_dim": embed_dim}


def _literal_eos(model_type: str) -> Fields:
    return {"literal_eos": True} if model_type.startswith(METACLIP_2) else {}


def _renamed(section: dict[str, Any], names: Mapping[str, str]) -> Fields:
    """Rename entries to miniclip's names. Drop an entry with a name that only miniclip uses."""
    ours = {theirs: ours for ours, theirs in names.items()}
    return {
        ours.get(name, name): value
        for name, value in section.items()
        if name in ours or name not in names
    }


def to_transformers(
    fields: Fields, model_type: str = "clip", architecture: str = "CLIPModel"
) -> dict[str, Any]:
    """The contents of config.json for a model with these fields.

    `head_width` and `registers` become extra entries. transformers would ignore them and build a
    different model. So if transformers' CLIP cannot express a field of a tower, the tower's heads
    are written as a list, one number for each layer. Then transformers raises an error, because it
    accepts only one number.
    """
    family = "clip"
    if fields["text"].get("literal_eos") and model_type == "clip":
        family = model_type = METACLIP_2
        architecture = "MetaClip2Model"
    config: dict[str, Any] = {"architectures": [architecture], "model_type": model_type}
    config |= {theirs: fields[ours] for ours, theirs in _SHARED.items()}
    config |= {name: v for name, v in fields.items() if name not in (*_SHARED, *_SECTIONS)}
    for name, names in _SECTIONS.items():
        tower = fields[name]
        section = {"model_type": f"{family}_{name}_model", "projection_dim": fields["embed_dim"]}
        section |= {theirs: tower[ours] for ours, theirs in names.items()}
        if beyond_transformers(tower):
            section |= {theirs: tower[o] for o, theirs in _BEYOND.items() if tower.get(o)}
            heads = tower["heads"]
            section["num_attention_heads"] = (
                heads if isinstance(heads, tuple) else (heads,) * tower["layers"]
            )
        known = (*names, *_BEYOND, "literal_eos")
        section |= {entry: value for entry, value in tower.items() if entry not in known}
        config[f"{name}_config"] = {
            entry: list(v) if isinstance(v, tuple) else v for entry, v in section.items()
        }
    return config


def beyond_transformers(tower: Mapping[str, Any]) -> list[str]:
    """The fields of a tower that transformers' CLIP cannot express. No published model has them.

    >>> beyond_transformers({"image_size": (224, 336), "registers": 4})
    ['image_size (224, 336)', 'registers 4']
    """
    names = ("heads", "mlp_width", "head_width", "image_size", "registers")
    values = {name: tower.get(name) for name in names}
    odd = {name: v for name, v in values.items() if isinstance(v, tuple) or (name in _BEYOND and v)}
    return [f"{name} {value}" for name, value in odd.items()]


# ------------------------------------------------------------------------------------------------
# no config file: the shapes of the tensors give the config


def from_shapes(tensors: dict[str, Tensor], table: Layout, towers: Iterable[str]) -> Fields:
    """Read a config's fields, except heads, activation and epsilon, from the shapes of tensors.

    Raises ValueError if a tensor is missing, or if the shapes contradict the three numbers that
    OpenAI's files have in addition to the weights.
    """

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        key, form = place(name, table)
        if key not in tensors or tensors[key].ndim != ndim:
            raise ValueError(f"no tensor {key} of {ndim} dimensions; the config needs its shape")
        found = tuple(tensors[key].shape)
        return found[::-1] if form == "T" else found

    fields: Fields = {}
    for tower in towers:
        if tower == "vision":
            width, channels, patch_size, _ = shape("vision.patch_embed.weight", 4)
            positions, _ = shape("vision.pos_embed", 2)
            side = round(max(positions - 1, 0) ** 0.5) * patch_size
            sizes = {"image_size": side, "patch_size": patch_size, "channels": channels}
        else:
            vocab_size, width = shape("text.token_embed.weight", 2)
            sizes = {"vocab_size": vocab_size, "context_length": shape("text.pos_embed", 2)[0]}
            # OpenAI's code pools a text at the text's largest id.
            sizes |= {"bos_token_id": max(vocab_size - 2, 0), "eos_token_id": LEGACY_EOS}
        mlp_width, _ = shape(f"{tower}.blocks.0.mlp.fc1.weight", 2)
        layers = depth(tower, table, tensors)
        fields[tower] = {"width": width, "layers": layers, "mlp_width": mlp_width} | sizes
        if len(fields) > 1 or place(f"{tower}.proj.weight", table).key in tensors:
            fields["embed_dim"] = shape(f"{tower}.proj.weight", 2)[0]
    said = fields.get("vision", {}) | fields.get("text", {})
    for name, field in zip(OPENAI_NUMBERS, _NUMBERED, strict=True):
        found = tensors[name].flatten()[:2].tolist() if name in tensors else None
        if found and found != [said.get(field)]:
            raise ValueError(
                f"{name} is {found}, but the shapes of the weights say {said.get(field)}"
            )
    return fields


_NUMBERED = ("image_size", "context_length", "vocab_size")  # miniclip's fields for OPENAI_NUMBERS


def openai_numbers(fields: Fields) -> dict[str, Tensor]:
    """The three tensors OPENAI_NUMBERS that OpenAI's files have in addition to the weights."""
    said = fields["vision"] | fields["text"]
    numbers = [torch.tensor(said[field]) for field in _NUMBERED]
    return dict(zip(OPENAI_NUMBERS, numbers, strict=True))


def without_config(
    tensors: dict[str, Tensor], table: Layout, towers: Iterable[str]
) -> tuple[Fields, str]:
    """The fields of a model without a config file, and a warning for the user (may be empty).

    The shapes give neither the number of heads nor the activation. OpenAI's own files have heads of
    width 64 and QuickGELU. For other files, a published model with the same shapes gives the number
    of heads and the activation. Without such a model, a file in OpenAI's layout is read like
    OpenAI's own files, and a file in another layout raises ValueError. ValueError is also raised if
    several published models have the same shapes and different activations.
    """
    fields = from_shapes(tensors, table, towers)
    is_openai = any(name in tensors for name in OPENAI_NUMBERS)
    releases = {} if is_openai else releases_of(fields)
    by_act = {known[tower]["act"]: name for name, known in releases.items() for tower in towers}
    if len(by_act) > 1:
        found = " and ".join(f"{name} ({act})" for act, name in sorted(by_act.items()))
        raise ValueError(
            "no config file beside it, and published models of these shapes differ in their "
            f"activation: {found}. Choose one of them, such as config={max(by_act.values())!r}"
        )
    if not (releases or is_openai or table is OPENAI):
        raise ValueError(
            "no config file beside it, and no published model has these shapes. Put config.json "
            "beside the weights, or pass config= (an official name, a path or a CLIPConfig)"
        )
    name, known = next(iter(releases.items()), ("", {}))
    for tower in towers:
        width = fields[tower]["width"]
        if not known and width % 64:
            raise ValueError(
                f"the {tower} tower has width {width}, not a multiple of 64 (the width of "
                "OpenAI's heads). If open_clip wrote the file, put open_clip_config.json beside it"
            )
        numbers = known.get(tower, {"heads": width // 64, "act": "quick_gelu"})
        fields[tower] |= {field: numbers[field] for field in ("heads", "act")}
    if known:
        heads = " and ".join(f"{fields[tower]['heads']} {tower} heads" for tower in towers)
        return fields, (
            f"no config file beside it. Its shapes are the shapes of {name}, so it is read with "
            f"{heads} and {next(iter(by_act))}. If it is another model, pass config="
        )
    return fields, "" if is_openai else (
        "read as OpenAI's, with QuickGELU and heads of width 64. If open_clip wrote the file, put "
        "open_clip_config.json beside it, or pass config="
    )


# ------------------------------------------------------------------------------------------------
# models that a layout cannot express


def refuse_inexpressible(fields: Fields, layout: str) -> None:
    """Raise ValueError if a layout cannot express a model. The message names the fields.

    transformers' layout can express every model, because its config.json may have extra entries.
    """
    if layout == "transformers":
        return
    vision, text = towers = fields["vision"], fields["text"]
    odd = [*beyond_transformers(vision), *beyond_transformers(text)]
    if not odd:  # heads, MLP width and image size are single numbers here
        acts, end, is_openai = [t["act"] for t in towers], text["eos_token_id"], layout == "openai"
        reasons = {
            f"channels {vision['channels']}": vision["channels"] != 3,
            f"eos_token_id {end}": end not in (LEGACY_EOS, text["vocab_size"] - 1),
            "a literal eos_token_id 2": is_openai and text.get("literal_eos", False),
            f"two activations, {' and '.join(acts)}": acts[0] != acts[1],
            f"act {acts[0]}": acts[0] == "gelu_pytorch_tanh",
        }
        if is_openai and not any(reasons.values()):
            image, patch = vision["image_size"], vision["patch_size"]
            reasons = {f"act {acts[0]}": acts[0] != "quick_gelu"}
            reasons |= {f"image_size {image}": image % patch != 0}
            for tower in towers:
                width, heads, eps = tower["width"], tower["heads"], tower["ln_eps"]
                reasons[f"ln_eps {eps}"] = eps != 1e-5
                reasons[f"{heads} heads in a width of {width} (each head must have width 64)"] = (
                    heads * 64 != width
                )
        odd = [reason for reason, holds in reasons.items() if holds]
    if odd:
        found = ", ".join(dict.fromkeys(odd))  # a reason that applies to both towers is named once
        raise ValueError(f"the layout {layout!r} cannot express {found}; 'transformers' can")
