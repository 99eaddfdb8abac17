"""open_clip_config.json <-> the fields of a CLIPConfig and the settings of an ImageTransform."""

import re
from typing import Any

from miniclip.errors import shown, warn
from miniclip.files.checks import LEGACY_EOS
from miniclip.files.configs import refuse_inexpressible
from miniclip.files.published import Fields, vision_of_timm

# Fields that are accepted and ignored, because they do not change the output: what every CLIP has,
# what only training uses, and what only the tokenizer uses. 0, "", {}, null and false are always
# accepted.
_OPEN_CLIP_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pool_type": ("tok", "argmax", "eos"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "block_type": ("default",),
    "custom_text": (True,),  # seen from the tensors' names
    "timm_pool": ("token",),
    "timm_proj": ("linear",),
}
_OPEN_CLIP_ANY = (
    *("patch_dropout", "output_tokens", "output_dict", "pad_id", "eos_id"),
    *("init_logit_scale", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"),
    *("timm_model_pretrained", "timm_drop", "timm_drop_path"),
)


def from_open_clip(settings: dict[str, Any]) -> Fields:
    """Read a parsed open_clip_config.json (open_clip, model.py: CLIPVisionCfg and CLIPTextCfg).

    Raises ValueError, with the field, for anything that this architecture does not have.

    >>> from_open_clip({"model_cfg": {"embed_dim": 512, "vision_cfg": {"width": 640,
    ...     "head_width": 80}, "text_cfg": {}}})["vision"]["heads"]
    8
    """
    model = _section(settings, "model_cfg")
    vision, text = _section(model, "vision_cfg"), _section(model, "text_cfg")
    quick_gelu = model.get("quick_gelu")
    if not isinstance(quick_gelu, bool | None):
        raise ValueError(f"quick_gelu is {shown(quick_gelu)}; expected true or false")
    act = "quick_gelu" if quick_gelu else "gelu"
    _refuse_others(model, {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}, "")
    fields = {
        "vision": {"act": act, "ln_eps": _eps(vision, "vision_cfg.")} | _vision(vision),
        "text": _text(text) | {"act": act, "ln_eps": _eps(text, "text_cfg.")},
        "embed_dim": model.get("embed_dim"),  # CLIPConfig checks it
    }
    if scale := model.get("init_logit_scale"):
        fields["logit_scale_init"] = scale
    return fields


def _vision(settings: dict[str, Any]) -> Fields:
    if timm := vision_of_timm(settings.get("timm_model_name")):
        _refuse_others(settings, {"timm_model_name", "image_size"}, "vision_cfg.")
        size = settings.get("image_size", timm["image_size"])
        return timm | {"image_size": tuple(size) if isinstance(size, list) else size}
    known = {"width": 768, "layers": 12, "image_size": 224, "patch_size": 16}
    computed = {"head_width": 64, "mlp_ratio": 4.0}
    _refuse_others(settings, {*known, *computed, "norm_kwargs"}, "vision_cfg.")
    values = {name: settings.get(name, default) for name, default in (known | computed).items()}
    _check_numbers(values, "vision_cfg.")
    head_width, mlp_ratio = (values.pop(name) for name in computed)
    if isinstance(values["layers"], list):
        found = shown(values["layers"])
        raise ValueError(f"vision_cfg.layers is {found}: a ResNet, not a transformer")
    if isinstance(values["image_size"], list):
        values["image_size"] = tuple(values["image_size"])
    if values["width"] % head_width:
        raise ValueError(
            f"vision_cfg.head_width {head_width} does not divide the width {values['width']}"
        )
    heads, mlp_width = values["width"] // head_width, int(values["width"] * mlp_ratio)
    return values | {"heads": heads, "mlp_width": mlp_width}


def _text(settings: dict[str, Any]) -> Fields:
    known = {"width": 512, "layers": 12, "heads": 8, "context_length": 77, "vocab_size": 49408}
    _refuse_others(settings, {*known, "mlp_ratio", "norm_kwargs"}, "text_cfg.")
    values = {name: settings.get(name, default) for name, default in known.items()}
    mlp_ratio = settings.get("mlp_ratio", 4.0)
    _check_numbers(values | {"mlp_ratio": mlp_ratio}, "text_cfg.")
    # "argmax" is the default. It is what a 2 means in config.json: read at the largest id.
    at_end = settings.get("pool_type") == "eos"
    if at_end and settings.get("eos_id") is None:
        raise ValueError("text_cfg.pool_type is 'eos'; expected an eos_id, the id of the end token")
    return values | {
        "mlp_width": int(values["width"] * mlp_ratio),
        "bos_token_id": max(values["vocab_size"] - 2, 0),
        "eos_token_id": settings.get("eos_id") if at_end else LEGACY_EOS,
        "literal_eos": at_end,
        "tokenizer": settings.get("hf_tokenizer_name"),
    }


def _check_numbers(values: dict[str, Any], section: str) -> None:
    """Check the values that are computed with: Python can multiply much else than numbers."""
    for name in ("width", "head_width", "vocab_size", "mlp_ratio"):
        value = values.get(name, 1)
        kinds = (int, float) if name == "mlp_ratio" else (int,)
        if type(value) not in kinds or not 0 < value < 2**31:
            raise ValueError(f"{section}{name} is {shown(value)}; expected a number above 0")


def _eps(settings: dict[str, Any], section: str) -> float:
    norm = settings.get("norm_kwargs") or {}
    known = isinstance(norm, dict) and norm.keys() <= {"eps"}
    eps: Any = norm.get("eps", 1e-5) if known else None
    if type(eps) not in (int, float):
        raise ValueError(f"{section}norm_kwargs is {shown(norm)}; expected at most eps, a number")
    return eps


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    section = settings.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"expected a section {name}, found {type(section).__name__}")
    return section


def _refuse_others(settings: dict[str, Any], known: set[str], section: str) -> None:
    for name, value in settings.items():
        # Details of a library's model count only if `timm_model_name` or its like names one.
        library = re.match(r"(timm|hf|attn_pooler)_", name)
        unused = library and not settings.get(f"{library[1]}_model_name")
        harmless = name in known or name in _OPEN_CLIP_ANY or unused
        if not harmless and value and value not in _OPEN_CLIP_NEUTRAL.get(name, ()):
            found = f"{section}{name:.100} is {shown(value)}"
            raise ValueError(f"{found}, which miniclip's CLIP does not have")


def to_open_clip(fields: Fields) -> dict[str, Any]:
    """The model_cfg of open_clip_config.json. Raises ValueError for what it cannot express."""
    vision, text = fields["vision"], fields["text"]
    refuse_inexpressible(fields, "open_clip")
    model: dict[str, Any] = {
        "embed_dim": fields["embed_dim"],
        "quick_gelu": vision["act"] == "quick_gelu",
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["layers"],
            "width": vision["width"],
            "head_width": vision["head_width"] or vision["width"] // vision["heads"],
            "mlp_ratio": _ratio(vision),
            "patch_size": vision["patch_size"],
            "norm_kwargs": {"eps": vision["ln_eps"]},
        },
        "text_cfg": {
            "context_length": text["context_length"],
            "vocab_size": text["vocab_size"],
            "width": text["width"],
            "heads": text["heads"],
            "layers": text["layers"],
            "mlp_ratio": _ratio(text),
            "norm_kwargs": {"eps": text["ln_eps"]},
        },
    }
    if text["literal_eos"]:
        model["text_cfg"] |= {"pool_type": "eos", "eos_id": text["eos_token_id"]}
    for tower in (model["vision_cfg"], model["text_cfg"]):
        if tower["norm_kwargs"] == {"eps": 1e-5}:
            del tower["norm_kwargs"]  # the default; older versions do not know the field
    return model


def context_of_open_clip(settings: dict[str, Any]) -> int:
    """The context length of open_clip's tokenizer (open_clip, factory.py, get_tokenizer).

    Raises ValueError, with the field, if its ids differ from those of CLIP's tokenizer.
    """
    text = _section(_section(settings, "model_cfg"), "text_cfg")
    name, kwargs = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise ValueError(f"text_cfg.tokenizer_kwargs is {shown(kwargs)}; expected an object")
    said = {f"tokenizer_kwargs.{field}": value for field, value in kwargs.items()}
    cleaning = ["lower", "whitespace"] if name else ["lower"]  # transformers' always lowers
    for field, value in (said | {"tokenizer_mode": text.get("tokenizer_mode")}).items():
        if value and not (field == "tokenizer_kwargs.clean" and value in cleaning):
            found = f"text_cfg.{field:.100} is {shown(value)}"
            raise ValueError(f"{found}; CLIP's tokenizer would give other ids")
    if name and not str(name).startswith("openai/clip-"):
        warn(
            f"text_cfg.hf_tokenizer_name is {shown(name)}: miniclip has CLIP's tokenizer only, "
            "and uses the vocabulary beside the weights"
        )
    length: Any = text.get("context_length", 77)
    if type(length) is not int or length < 2:
        raise ValueError(f"text_cfg.context_length is {shown(length)}; expected a number from 2 on")
    return length


def preprocessing_from_open_clip(settings: dict[str, Any]) -> dict[str, Any]:
    """The preprocess_cfg of a parsed open_clip_config.json, in transformers' terms.

    Raises ValueError for a setting that an ImageTransform cannot follow.
    """
    preprocessing = settings.get("preprocess_cfg") or {}
    if not isinstance(preprocessing, dict):
        raise ValueError(f"preprocess_cfg is {shown(preprocessing)}; expected an object")
    said = {name: value for name, value in preprocessing.items() if value}
    fixed = {"mode": ("RGB",), "interpolation": ("bicubic",), "resize_mode": ("shortest", "squash")}
    for name, value in said.items():
        if value not in fixed.get(name, (value,)):
            found = f"preprocess_cfg.{name} is {shown(value)}"
            expected = " or ".join(map(repr, fixed[name]))
            raise ValueError(f"{found}; a CLIP's is {expected}")
    size = said.get(
        "size", _section(_section(settings, "model_cfg"), "vision_cfg").get("image_size")
    )
    if isinstance(size, list) and size and size == size[:1] * len(size):
        size = size[0]
    sides = {"size": size, "crop_size": size}
    if said.get("resize_mode") == "squash":
        sides = {"size": {"height": size, "width": size}, "do_center_crop": False}
    return sides | {"image_mean": said.get("mean"), "image_std": said.get("std")}


def preprocessing_to_open_clip(settings: dict[str, Any]) -> dict[str, Any]:
    """The preprocess_cfg of open_clip_config.json, from the fields of an ImageTransform.

    Raises ValueError for what it cannot express.
    """
    size, crop_size = settings["size"], settings["crop_size"]
    if size != crop_size:
        raise ValueError(
            f"open_clip resizes and crops to one size; this transform resizes to {size} and crops "
            f"{crop_size}"
        )
    return {
        "size": size,
        "mode": "RGB",
        "mean": [*settings["image_mean"]],
        "std": [*settings["image_std"]],
        "interpolation": "bicubic",
        "resize_mode": "squash" if settings["squash"] else "shortest",
    }


def _ratio(tower: Fields) -> float:
    """The ratio that gives this MLP width, after open_clip multiplies and drops the fraction."""
    ratio = tower["mlp_width"] / tower["width"]
    exact = int(tower["width"] * ratio) == tower["mlp_width"]
    return ratio if exact else ratio * (1 + 2**-50)
