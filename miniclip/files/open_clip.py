"""open_clip_config.json <-> the fields of a CLIPConfig and the settings of an ImageTransform."""

import re
from typing import Any

from miniclip.errors import shown, warn, wrong
from miniclip.files.checks import LEGACY_EOS, LONGEST_CONTEXT
from miniclip.files.configs import refuse_inexpressible
from miniclip.files.published import Fields, vision_of_timm

# Fields that do not change the output. _NEUTRAL: every CLIP has one of these values. _IGNORED: only
# training or the tokenizer uses the field. Any field may also be 0, "", {}, null or false.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pool_type": ("tok", "argmax", "eos"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "block_type": ("default",),
    "custom_text": (True,),  # `recognize` sees it in the tensor names
    "timm_pool": ("token",),
    "timm_proj": ("linear",),
}
_IGNORED = (
    *("patch_dropout", "output_tokens", "output_dict", "pad_id", "eos_id"),
    *("init_logit_scale", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"),
    *("timm_model_pretrained", "timm_drop", "timm_drop_path"),
)


def from_open_clip(settings: dict[str, Any]) -> Fields:
    """Read a parsed open_clip_config.json (open_clip, model.py: CLIPVisionCfg and CLIPTextCfg).

    Raises ValueError for a field that miniclip's CLIP cannot express. The message names the field.

    >>> from_open_clip({"model_cfg": {"embed_dim": 512, "vision_cfg": {"width": 640,
    ...     "head_width": 80}, "text_cfg": {}}})["vision"]["heads"]
    8
    """
    model = _section(settings, "model_cfg")
    quick_gelu = model.get("quick_gelu")
    if not isinstance(quick_gelu, bool | None):
        raise wrong("quick_gelu", quick_gelu, "true or false")
    act = {"act": "quick_gelu" if quick_gelu else "gelu"}
    _refuse_others(model, {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}, "")
    fields = {
        "vision": act | _vision(_section(model, "vision_cfg")),
        "text": act | _text(_section(model, "text_cfg")),
        "embed_dim": model.get("embed_dim"),  # CLIPConfig checks it
    }
    if scale := model.get("init_logit_scale"):
        fields["logit_scale_init"] = scale
    return fields


def _vision(settings: dict[str, Any]) -> Fields:
    if timm := vision_of_timm(settings.get("timm_model_name")):
        _refuse_others(settings, {"timm_model_name", "image_size"}, "vision_cfg.")
        values = timm | {"image_size": settings.get("image_size", timm["image_size"])}
    else:
        known = {"width": 768, "layers": 12, "image_size": 224, "patch_size": 16, "head_width": 64}
        values = _tower(settings, known, "vision_cfg.")
        if isinstance(values["layers"], list):
            found = shown(values["layers"])
            raise ValueError(f"vision_cfg.layers is {found}: a ResNet, not a transformer")
        width, head_width = values["width"], values.pop("head_width")
        if width % head_width:
            raise ValueError(
                f"vision_cfg.head_width {head_width} does not divide the width {width}"
            )
        values["heads"] = width // head_width
    if isinstance(values["image_size"], list):
        values["image_size"] = tuple(values["image_size"])
    return values


def _text(settings: dict[str, Any]) -> Fields:
    known = {"width": 512, "layers": 12, "heads": 8, "context_length": 77, "vocab_size": 49408}
    values = _tower(settings, known, "text_cfg.")
    # "argmax", the default, pools at the largest id, as eos_token_id 2 does in config.json.
    at_end, eos_id = settings.get("pool_type") == "eos", settings.get("eos_id")
    if at_end and eos_id is None:
        raise wrong("text_cfg.pool_type", "eos", "a field eos_id with the id of the end token")
    return values | {
        "bos_token_id": max(values["vocab_size"] - 2, 0),
        "eos_token_id": eos_id if at_end else LEGACY_EOS,
        "literal_eos": at_end and eos_id == LEGACY_EOS,
        "tokenizer": settings.get("hf_tokenizer_name"),
    }


def _tower(settings: dict[str, Any], known: Fields, section: str) -> Fields:
    """Read the fields whose defaults are in `known`. Add `mlp_width` and `ln_eps`."""
    known = known | {"mlp_ratio": 4.0}
    _refuse_others(settings, {*known, "norm_kwargs"}, section)
    values: Fields = {name: settings.get(name, default) for name, default in known.items()}
    # Check the numbers before later code uses them: Python also multiplies strings and lists.
    for name in ("width", "head_width", "vocab_size", "mlp_ratio"):
        value, kinds = values.get(name, 1), (int, float) if name == "mlp_ratio" else (int,)
        if type(value) not in kinds or not 0 < value < 2**31:
            raise wrong(f"{section}{name}", value, "a number above 0")
    norm = settings.get("norm_kwargs") or {}
    is_known = isinstance(norm, dict) and norm.keys() <= {"eps"}
    eps: Any = norm.get("eps", 1e-5) if is_known else None
    if type(eps) not in (int, float):
        raise wrong(f"{section}norm_kwargs", norm, "an object with the number eps and nothing else")
    return values | {"mlp_width": int(values["width"] * values.pop("mlp_ratio")), "ln_eps": eps}


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    section = settings.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"expected a section {name}, found {type(section).__name__}")
    return section


def _refuse_others(settings: dict[str, Any], known: set[str], section: str) -> None:
    for name, value in settings.items():
        # open_clip uses `timm_*` only with `timm_model_name`, and `hf_*` only with `hf_model_name`.
        library = re.match(r"(timm|hf|attn_pooler)_", name)
        unused = library and not settings.get(f"{library[1]}_model_name")
        harmless = name in known or name in _IGNORED or unused
        if not harmless and value and value not in _NEUTRAL.get(name, ()):
            found = f"{section}{name:.100} is {shown(value)}"
            raise ValueError(f"{found}, which miniclip's CLIP does not have")


def to_open_clip(fields: Fields) -> dict[str, Any]:
    """The model_cfg of open_clip_config.json. Raises ValueError, see `refuse_inexpressible`."""
    vision, text = fields["vision"], fields["text"]
    refuse_inexpressible(fields, "open_clip")
    towers = {}
    for name, tower in (("vision_cfg", vision), ("text_cfg", text)):
        towers[name] = {"width": tower["width"], "layers": tower["layers"]}
        ratio = tower["mlp_width"] / tower["width"]
        if int(tower["width"] * ratio) != tower["mlp_width"]:
            ratio *= 1 + 2**-50  # open_clip rounds width * ratio down
        towers[name]["mlp_ratio"] = ratio
        if tower["ln_eps"] != 1e-5:  # 1e-5 is the default; old versions have no norm_kwargs
            towers[name]["norm_kwargs"] = {"eps": tower["ln_eps"]}
    head_width = vision["head_width"] or vision["width"] // vision["heads"]
    towers["vision_cfg"] |= {name: vision[name] for name in ("image_size", "patch_size")}
    towers["vision_cfg"] |= {"head_width": head_width}
    towers["text_cfg"] |= {name: text[name] for name in ("context_length", "vocab_size", "heads")}
    if text["literal_eos"]:
        towers["text_cfg"] |= {"pool_type": "eos", "eos_id": text["eos_token_id"]}
    quick_gelu = vision["act"] == "quick_gelu"
    return {"embed_dim": fields["embed_dim"], "quick_gelu": quick_gelu} | towers


def context_of_open_clip(settings: dict[str, Any]) -> int:
    """The context length of open_clip's tokenizer (open_clip, factory.py, get_tokenizer).

    Raises ValueError for a field that changes the ids of CLIP's tokenizer. Warns if a field names
    another vocabulary.
    """
    text = _section(_section(settings, "model_cfg"), "text_cfg")
    name, kwargs = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise wrong("text_cfg.tokenizer_kwargs", kwargs, "an object")
    said = {f"tokenizer_kwargs.{field}": value for field, value in kwargs.items()}
    cleaning = ["lower", "whitespace"] if name else ["lower"]  # transformers always lower-cases
    for field, value in (said | {"tokenizer_mode": text.get("tokenizer_mode")}).items():
        if value and not (field == "tokenizer_kwargs.clean" and value in cleaning):
            found = f"text_cfg.{field:.100} is {shown(value)}"
            raise ValueError(f"{found}; CLIP's tokenizer would give other ids")
    if name and not str(name).startswith("openai/clip-"):
        warn(
            f"text_cfg.hf_tokenizer_name is {shown(name)}, but miniclip has only CLIP's tokenizer, "
            "and uses the vocabulary beside the weights"
        )
    length: Any = text.get("context_length", 77)
    if type(length) is not int or not 2 <= length <= LONGEST_CONTEXT:
        numbers = f"a whole number from 2 to {LONGEST_CONTEXT}"
        raise wrong("text_cfg.context_length", length, numbers)
    return length


def preprocessing_from_open_clip(settings: dict[str, Any]) -> dict[str, Any]:
    """The preprocess_cfg of a parsed open_clip_config.json, as transformers' settings.

    Raises ValueError for a setting that an ImageTransform does not have.
    """
    preprocessing = settings.get("preprocess_cfg") or {}
    if not isinstance(preprocessing, dict):
        raise wrong("preprocess_cfg", preprocessing, "an object")
    said = {name: value for name, value in preprocessing.items() if value}
    fixed = {"mode": ("RGB",), "interpolation": ("bicubic",), "resize_mode": ("shortest", "squash")}
    for name, value in said.items():
        if value not in fixed.get(name, (value,)):
            found, known = f"preprocess_cfg.{name} is {shown(value)}", map(repr, fixed[name])
            raise ValueError(f"{found}; expected {' or '.join(known)}")
    model = _section(_section(settings, "model_cfg"), "vision_cfg")
    size = said.get("size", model.get("image_size"))
    if isinstance(size, list) and size and size == size[:1] * len(size):
        size = size[0]
    sides = {"size": size, "crop_size": size}
    if said.get("resize_mode") == "squash":
        sides = {"size": {"height": size, "width": size}, "do_center_crop": False}
    return sides | {"image_mean": said.get("mean"), "image_std": said.get("std")}


def preprocessing_to_open_clip(settings: dict[str, Any]) -> dict[str, Any]:
    """The preprocess_cfg of open_clip_config.json, from the fields of an ImageTransform.

    Raises ValueError if `size` and `crop_size` differ.
    """
    size, crop_size = settings["size"], settings["crop_size"]
    if size != crop_size:
        raise ValueError(
            f"open_clip resizes and crops to one size, but this transform resizes to {size} and "
            f"crops to {crop_size}"
        )
    return {
        "size": size,
        "mode": "RGB",
        "mean": [*settings["image_mean"]],
        "std": [*settings["image_std"]],
        "interpolation": "bicubic",
        "resize_mode": "squash" if settings["squash"] else "shortest",
    }
