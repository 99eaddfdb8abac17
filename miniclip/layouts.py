"""Three ways to write the same CLIP down, and which of them a file is in.

    transformers   q, k and v are three matrices; config.json says the rest
    openai         q, k and v lie one under another, projections are transposed; no config: the
                   shapes say it all, as every model of OpenAI's has heads of 64 and QuickGELU
    open_clip      OpenAI's tensors, under one more prefix in some models, and open_clip_config.json

A layout is a table, from our name of a parameter, or of the module that holds its weight and bias,
to the place of the same numbers in a file. {} is the number of the block. A place that ends in .T
holds the transpose; [0], [1] and [2] are the upper, middle and lower third of a tensor's rows.
"""

import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from miniclip.config import (
    LEGACY_EOS,
    CLIPConfig,
    TextConfig,
    VisionConfig,
    beyond_transformers,
    per_layer,
    shown,
)

if TYPE_CHECKING:
    from miniclip.transform import ImageTransform

Layout = dict[str, str]


def _with_blocks(table: Layout, block: Layout, vision: str, text: str) -> Layout:
    return table | {
        f"{tower}.blocks.{{}}.{ours}": f"{blocks}.{{}}.{theirs}"
        for tower, blocks in (("vision", vision), ("text", text))
        for ours, theirs in block.items()
    }


TRANSFORMERS = _with_blocks(
    {
        "logit_scale": "logit_scale",
        "vision.class_embed": "vision_model.embeddings.class_embedding",
        "vision.patch_embed": "vision_model.embeddings.patch_embedding",
        "vision.pos_embed": "vision_model.embeddings.position_embedding.weight",
        "vision.register_embed": "vision_model.embeddings.register_tokens",  # none of theirs has
        "vision.ln_pre": "vision_model.pre_layrnorm",  # sic: the spelling is in every checkpoint
        "vision.ln_post": "vision_model.post_layernorm",
        "vision.proj": "visual_projection",
        "text.token_embed": "text_model.embeddings.token_embedding",
        "text.pos_embed": "text_model.embeddings.position_embedding.weight",
        "text.ln_final": "text_model.final_layer_norm",
        "text.proj": "text_projection",
    },
    {
        "ln_1": "layer_norm1",
        "attn.q_proj": "self_attn.q_proj",
        "attn.k_proj": "self_attn.k_proj",
        "attn.v_proj": "self_attn.v_proj",
        "attn.out_proj": "self_attn.out_proj",
        "ln_2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    vision="vision_model.encoder.layers",
    text="text_model.encoder.layers",
)


def _openai(text: str) -> Layout:
    return _with_blocks(
        {
            "logit_scale": "logit_scale",
            "vision.class_embed": "visual.class_embedding",
            "vision.patch_embed": "visual.conv1",
            "vision.pos_embed": "visual.positional_embedding",
            "vision.ln_pre": "visual.ln_pre",
            "vision.ln_post": "visual.ln_post",
            "vision.proj.weight": "visual.proj.T",
            "text.token_embed": f"{text}token_embedding",
            "text.pos_embed": f"{text}positional_embedding",
            "text.ln_final": f"{text}ln_final",
            "text.proj.weight": f"{text}text_projection.T",
        },
        {
            "ln_1": "ln_1",
            "attn.q_proj.weight": "attn.in_proj_weight[0]",
            "attn.k_proj.weight": "attn.in_proj_weight[1]",
            "attn.v_proj.weight": "attn.in_proj_weight[2]",
            "attn.q_proj.bias": "attn.in_proj_bias[0]",
            "attn.k_proj.bias": "attn.in_proj_bias[1]",
            "attn.v_proj.bias": "attn.in_proj_bias[2]",
            "attn.out_proj": "attn.out_proj",
            "ln_2": "ln_2",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        },
        vision="visual.transformer.resblocks",
        text=f"{text}transformer.resblocks",
    )


OPENAI = _openai(text="")
OPEN_CLIP_CUSTOM_TEXT = _openai(text="text.")  # `custom_text` in its config, CustomTextCLIP in code
LAYOUTS = {"transformers": TRANSFORMERS, "openai": OPENAI, "open_clip": OPENAI}


def layout_name(name: str, layout: Layout) -> str:
    """The place of a parameter in another layout.

    >>> layout_name("vision.blocks.3.ln_1.bias", TRANSFORMERS)
    'vision_model.encoder.layers.3.layer_norm1.bias'
    >>> layout_name("text.blocks.0.attn.k_proj.weight", OPENAI)
    'transformer.resblocks.0.attn.in_proj_weight[1]'
    """
    block = re.search(r"blocks\.(\d+)\.", name)
    template = re.sub(r"blocks\.\d+\.", "blocks.{}.", name)
    module, _, kind = template.rpartition(".")
    theirs = layout[template] if template in layout else f"{layout[module]}.{kind}"
    return theirs.format(block[1]) if block else theirs


def depth(tower: str, layout: Layout, names: Iterable[str]) -> int:
    """How many blocks of a tower are among the names of a file."""
    before, _ = layout[f"{tower}.blocks.{{}}.ln_1"].split("{}")
    numbers = (re.match(rf"{re.escape(before)}(\d+)\.", name) for name in names)
    return len({number[1] for number in numbers if number})


class Place(NamedTuple):
    """The tensor of a file that has a parameter, and the form that it has it in."""

    key: str
    form: str  # "" as it is, "T" transposed, "0" to "2" a third of the rows

    def stored_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """The shape of the file's tensor, for a parameter of this shape."""
        shape = tuple(shape)
        if self.form == "T":
            return shape[::-1]
        return (3 * shape[0], *shape[1:]) if self.form else shape

    def take(self, tensor: Tensor) -> Tensor:
        """The parameter: a view of the file's tensor, or a copy of one that is transposed."""
        if self.form == "T":
            return tensor.T.contiguous()
        return tensor.chunk(3)[int(self.form)] if self.form else tensor


def place(name: str, layout: Layout) -> Place:
    """Where a layout has a parameter.

    >>> place("vision.proj.weight", OPENAI)
    Place(key='visual.proj', form='T')
    """
    key = layout_name(name, layout)
    form = "".join(re.findall(r"\.T$|\[\d\]$", key))
    return Place(key.removesuffix(form), form.strip(".[]"))


def pack(parameters: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Parameters under our names as the tensors of a layout, none sharing memory with another."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():  # q, k and v come in this order
        key, form = place(name, layout)
        parts.setdefault(key, []).append(parameter.T if form == "T" else parameter)
    return {
        key: (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).contiguous()
        for key, tensors in parts.items()
    }


# ------------------------------------------------------------------------------------------------
# Which layout is it?

OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""OpenAI's files hold these as tensors; their own code drops them, for the shapes say the same."""


def recognize(tensors: dict[str, Tensor]) -> tuple[str, Layout, dict[str, Tensor]]:
    """The name of the layout, its table, and the tensors under the names of that table.

    Raises ValueError where the tensors are those of no CLIP with vision transformer.
    """
    if all(name.startswith("module.") for name in tensors):  # saved by DistributedDataParallel
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    for key, found in _OTHERS.items():
        if any(name.startswith(key) for name in tensors):
            raise ValueError(f"has tensors {key}*: {found}, which miniclip does not have")
    if any(name.startswith("visual.") for name in tensors):
        tensors = {name: t for name, t in tensors.items() if not _is_causal_mask(name, t)}
        if any(name.startswith("text.") for name in tensors):
            return "open_clip", OPEN_CLIP_CUSTOM_TEXT, tensors
        is_openai = any(name in tensors for name in OPENAI_NUMBERS)
        return "openai" if is_openai else "openai or open_clip", OPENAI, tensors
    # Since 5.6 transformers writes a tower without the prefix of its name, if it has no projection;
    # other programs do if it has one, which never had the prefix.
    for prefix, key in (("text_model.", "token"), ("vision_model.", "patch")):
        if f"embeddings.{key}_embedding.weight" in tensors:
            names = {name: prefix * ("_projection." not in name) + name for name in tensors}
            tensors = {names[name]: tensor for name, tensor in tensors.items()}
    return "transformers", TRANSFORMERS, tensors


def _is_causal_mask(name: str, tensor: Tensor) -> bool:
    """open_clip's TorchScript archives have it as a buffer; here it is in the code."""
    if name not in ("attn_mask", "text.attn_mask") or tensor.ndim != 2 or tensor.numel() > 10**6:
        return False
    return torch.equal(tensor.float(), torch.full(tensor.shape, -torch.inf).triu(1))


_OTHERS = {
    "visual.layer1.": "a ResNet",
    "visual.attnpool.": "a ResNet",
    "visual.trunk.": "a vision tower of timm's",
    "visual.attn_pool.": "attentional pooling",
    "text.transformer.embeddings.": "a text tower of transformers'",
    "text_decoder.": "CoCa's text decoder",
    "logit_bias": "the bias of SigLIP's loss",
}


# ------------------------------------------------------------------------------------------------
# openai: the shapes are the config


def config_from_shapes(tensors: dict[str, Tensor]) -> CLIPConfig:
    """The config of a model in OpenAI's layout (openai/CLIP, model.py, build_model).

    Raises ValueError where a tensor that it is read from is missing or contradicts the three
    numbers that OpenAI's own files have beside the weights.
    """

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != ndim:
            raise ValueError(f"no tensor {name} of {ndim} dimensions, to read the config from")
        return tuple(tensors[name].shape)

    def tower(name: str, width: int) -> dict[str, Any]:
        if width % 64:
            raise ValueError(
                f"the {name} tower has width {width}; OpenAI's heads are 64 wide. If the file is "
                "of open_clip, its open_clip_config.json has to lie beside it"
            )
        first, _ = shape(layout_name(f"{name}.blocks.0.mlp.fc1.weight", OPENAI), 2)
        layers = depth(name, OPENAI, tensors)
        return {"width": width, "layers": layers, "heads": width // 64, "mlp_width": first}

    width, channels, patch_size, _ = shape("visual.conv1.weight", 4)
    positions, _ = shape("visual.positional_embedding", 2)
    vocab_size, text_width = shape("token_embedding.weight", 2)
    context_length, _ = shape("positional_embedding", 2)
    side = round(max(positions - 1, 0) ** 0.5) * patch_size
    config = CLIPConfig(
        VisionConfig(
            **tower("vision", width),
            image_size=side,
            patch_size=patch_size,
            channels=channels,
        ),
        TextConfig(
            **tower("text", text_width),
            vocab_size=vocab_size,
            context_length=context_length,
            bos_token_id=max(vocab_size - 2, 0),
            eos_token_id=LEGACY_EOS,  # OpenAI's code reads a text at its largest id
        ),
        embed_dim=shape("text_projection", 2)[1],
    )
    for name, said in zip(OPENAI_NUMBERS, (side, context_length, vocab_size), strict=True):
        found = tensors[name].flatten()[:2].tolist() if name in tensors else [said]
        if found != [said]:
            raise ValueError(f"{name} is {found}, and the shapes of the weights say {said}")
    return config


def openai_numbers(config: CLIPConfig) -> dict[str, Tensor]:
    """The three numbers, as OpenAI's own files have them."""
    vision, text = config.vision, config.text
    numbers = (vision.image_size, text.context_length, text.vocab_size)
    return {name: torch.tensor(n) for name, n in zip(OPENAI_NUMBERS, numbers, strict=True)}


# ------------------------------------------------------------------------------------------------
# open_clip: open_clip_config.json

# What its config may say beside the fields that are ours, and no number changes: what we have
# anyway, what only training heeds, and what tokenizes. 0, "", {}, null and false are always none.
_OPEN_CLIP_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pool_type": ("tok", "argmax", "eos"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "block_type": ("default",),
    "custom_text": (True,),  # seen from the tensors' names
}
_OPEN_CLIP_ANY = (
    *("patch_dropout", "output_tokens", "output_dict", "pad_id", "eos_id"),
    *("init_logit_scale", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"),
)


def config_from_open_clip(settings: dict[str, Any]) -> CLIPConfig:
    """Read open_clip_config.json, parsed (open_clip, model.py: CLIPVisionCfg and CLIPTextCfg).

    Raises ValueError, with the field, for whatever this architecture does not have.

    >>> config_from_open_clip({"model_cfg": {"embed_dim": 512, "vision_cfg": {"width": 640,
    ...     "head_width": 80}, "text_cfg": {}}}).vision.heads
    8
    """
    model = _section(settings, "model_cfg")
    vision, text = _section(model, "vision_cfg"), _section(model, "text_cfg")
    quick_gelu = model.get("quick_gelu")
    if not isinstance(quick_gelu, bool | None):
        raise ValueError(f"quick_gelu is {shown(quick_gelu)}; expected true or false")
    act = "quick_gelu" if quick_gelu else "gelu"
    embed_dim: Any = model.get("embed_dim")  # CLIPConfig checks it
    _refuse_others(model, {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}, "")
    return CLIPConfig(
        VisionConfig(**_open_clip_vision(vision), act=act, ln_eps=_eps(vision, "vision_cfg.")),
        TextConfig(**_open_clip_text(text), act=act, ln_eps=_eps(text, "text_cfg.")),
        embed_dim=embed_dim,
        **({"logit_scale_init": s} if (s := model.get("init_logit_scale")) else {}),
    )


def _open_clip_vision(settings: dict[str, Any]) -> dict[str, Any]:
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


def _open_clip_text(settings: dict[str, Any]) -> dict[str, Any]:
    known = {"width": 512, "layers": 12, "heads": 8, "context_length": 77, "vocab_size": 49408}
    _refuse_others(settings, {*known, "mlp_ratio", "norm_kwargs"}, "text_cfg.")
    values = {name: settings.get(name, default) for name, default in known.items()}
    mlp_ratio = settings.get("mlp_ratio", 4.0)
    _check_numbers(values | {"mlp_ratio": mlp_ratio}, "text_cfg.")
    # "argmax", its default, is the rule that a 2 stands for in config.json: the largest id.
    at_end = settings.get("pool_type") == "eos"
    if at_end and settings.get("eos_id", 2) == LEGACY_EOS:
        raise ValueError(
            "text_cfg.eos_id is 2: texts are read at their first token 2, and miniclip has no way "
            "to say so, for an eos_token_id of 2 means the largest id, as in OpenAI's own configs"
        )
    return values | {
        "mlp_width": int(values["width"] * mlp_ratio),
        "bos_token_id": max(values["vocab_size"] - 2, 0),
        "eos_token_id": settings["eos_id"] if at_end else LEGACY_EOS,
    }


def _check_numbers(values: dict[str, Any], section: str) -> None:
    """Those that are computed with: in Python much else can be multiplied."""
    for name in ("width", "head_width", "vocab_size", "mlp_ratio"):
        value = values.get(name, 1)
        kinds = (int, float) if name == "mlp_ratio" else (int,)
        if type(value) not in kinds or not 0 < value < 2**31:
            raise ValueError(f"{section}{name} is {shown(value)}, no number that fits there")


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
        # Details of a library's model, or of a pooler, where another field says that there is one.
        library = re.match(r"(timm|hf|attn_pooler)_", name)
        unused = library and not settings.get(f"{library[1]}_model_name")
        harmless = name in known or name in _OPEN_CLIP_ANY or unused
        if not harmless and value and value not in _OPEN_CLIP_NEUTRAL.get(name, ()):
            found = f"{section}{name:.100} is {shown(value)}"
            raise ValueError(f"{found}, which miniclip's CLIP does not have")


def config_to_open_clip(config: CLIPConfig) -> dict[str, Any]:
    """The model_cfg of open_clip_config.json. Raises ValueError for what it cannot say."""
    vision, text = config.vision, config.text
    refuse_unsayable(config, "open_clip")
    model: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "quick_gelu": vision.act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.layers,
            "width": vision.width,
            "head_width": vision.width // per_layer(vision, "heads")[0],
            "mlp_ratio": _ratio(vision),
            "patch_size": vision.patch_size,
            "norm_kwargs": {"eps": vision.ln_eps},
        },
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": _ratio(text),
            "norm_kwargs": {"eps": text.ln_eps},
        },
    }
    for tower in (model["vision_cfg"], model["text_cfg"]):
        if tower["norm_kwargs"] == {"eps": 1e-5}:
            del tower["norm_kwargs"]  # its default, and older versions do not know the field
    return model


def context_of_open_clip(settings: dict[str, Any]) -> int:
    """How many tokens of a text open_clip keeps (open_clip, factory.py, get_tokenizer).

    Raises ValueError, with the field, where it makes other ids of a text than CLIP's tokenizer.
    """
    text = _section(_section(settings, "model_cfg"), "text_cfg")
    name, kwargs = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise ValueError(f"text_cfg.tokenizer_kwargs is {shown(kwargs)}; expected an object")
    said = {f"tokenizer_kwargs.{field}": value for field, value in kwargs.items()}
    cleaning = ["lower", "whitespace"] if name else ["lower"]  # CLIP's of transformers' lowers too
    for field, value in (said | {"tokenizer_mode": text.get("tokenizer_mode")}).items():
        if value and not (field == "tokenizer_kwargs.clean" and value in cleaning):
            found = f"text_cfg.{field:.100} is {shown(value)}"
            raise ValueError(f"{found}, which gives a text other ids than CLIP's tokenizer does")
    if name and not str(name).startswith("openai/clip-"):
        warnings.warn(
            f"text_cfg.hf_tokenizer_name is {shown(name)}: miniclip has no tokenizer but CLIP's, "
            "and reads texts by the vocabulary beside the weights",
            stacklevel=2,
        )
    length: Any = text.get("context_length", 77)
    if type(length) is not int or length < 2:
        raise ValueError(f"text_cfg.context_length is {shown(length)}; expected a number from 2 on")
    return length


def preprocessing_from_open_clip(settings: dict[str, Any]) -> dict[str, Any]:
    """The preprocess_cfg of open_clip_config.json, parsed, in the terms of transformers'.

    Raises ValueError where it asks for another transform than OpenAI's.
    """
    preprocessing = settings.get("preprocess_cfg") or {}
    if not isinstance(preprocessing, dict):
        raise ValueError(f"preprocess_cfg is {shown(preprocessing)}; expected an object")
    said = {name: value for name, value in preprocessing.items() if value}
    fixed = {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}
    for name, value in said.items():
        if value != fixed.get(name, value):
            found = f"preprocess_cfg.{name} is {shown(value)}"
            raise ValueError(f"{found}; a CLIP's is {fixed[name]!r}")
    size = said.get(
        "size", _section(_section(settings, "model_cfg"), "vision_cfg").get("image_size")
    )
    if isinstance(size, list) and size and size == size[:1] * len(size):
        size = size[0]
    named = {"image_mean": said.get("mean"), "image_std": said.get("std")}
    return {"size": size, "crop_size": size} | named


def preprocessing_to_open_clip(transform: "ImageTransform") -> dict[str, Any]:
    """The preprocess_cfg of open_clip_config.json. Raises ValueError for what it cannot say."""
    if transform.size != transform.crop_size:
        raise ValueError(
            f"open_clip crops what it has resized to; this transform resizes to {transform.size} "
            f"and crops {transform.crop_size}"
        )
    return {
        "size": transform.crop_size,
        "mode": "RGB",
        "mean": [*transform.image_mean],
        "std": [*transform.image_std],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def _ratio(tower: VisionConfig | TextConfig) -> float:
    """A ratio that open_clip, which multiplies and cuts off, turns into this very MLP width."""
    mlp_width = per_layer(tower, "mlp_width")[0]
    ratio = mlp_width / tower.width
    return ratio if int(tower.width * ratio) == mlp_width else (ratio * (1 + 2**-50))


# ------------------------------------------------------------------------------------------------


def refuse_unsayable(config: CLIPConfig, layout: str) -> None:
    """Raises ValueError, with the fields, where a layout cannot express a model.

    transformers' can express each: what is beyond it, config.json says in entries of our own.
    """
    vision, text = config.vision, config.text
    odd = beyond_transformers(vision) + beyond_transformers(text)
    if not odd:  # from here on each field is one number
        largest = (LEGACY_EOS, text.vocab_size - 1)
        odd += [f"channels {vision.channels}"] * (vision.channels != 3)
        odd += [f"eos_token_id {text.eos_token_id}"] * (text.eos_token_id not in largest)
        odd += [f"two activations, {vision.act} and {text.act}"] * (vision.act != text.act)
        odd += [f"act {vision.act}"] * (vision.act == "gelu_pytorch_tanh")
    if not odd and layout == "openai":
        odd += [f"act {vision.act}"] * (vision.act != "quick_gelu")
        odd += [f"image_size {vision.image_size}"] * (vision.side % vision.patch_size != 0)
        for tower in (vision, text):
            odd += [f"ln_eps {tower.ln_eps}"] * (tower.ln_eps != 1e-5)
            odd += [f"{tower.heads} heads in a width of {tower.width}, where each has 64"] * (
                tower.heads * 64 != tower.width
            )
    if odd and layout != "transformers":
        found = ", ".join(dict.fromkeys(odd))  # the two towers may have the same
        raise ValueError(f"the layout {layout!r} cannot express {found}; 'transformers' can")
