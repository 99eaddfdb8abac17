"""The names of a CLIP's tensors in each layout. `recognize` finds the layout of a file.

    transformers   q, k and v are three matrices. The config is config.json
    openai         q, k and v are stacked in one matrix, and projections are transposed. There is no
                   config: each model has QuickGELU and heads of width 64
    open_clip      as openai, with one more prefix in some models, and with open_clip_config.json
    timm           a vision tower, alone or in open_clip's file. It is read, but never written

A layout is a table. A key is miniclip's name of a parameter, or of a module with weight and bias.
{} stands for the number of the block. The value is the name of the tensor in the file. A tensor
with .T after its name is transposed. [0], [1] and [2] are thirds of the rows.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.errors import listed, warn

Layout = dict[str, str]

# The columns: miniclip, transformers (which writes "pre_layrnorm"), openai/CLIP, timm
_TOWERS = """
logit_scale           logit_scale                                       logit_scale
vision.class_embed    vision_model.embeddings.class_embedding           visual.class_embedding
vision.patch_embed    vision_model.embeddings.patch_embedding           visual.conv1
vision.pos_embed      vision_model.embeddings.position_embedding.weight visual.positional_embedding
vision.register_embed vision_model.embeddings.register_tokens           -
vision.ln_pre         vision_model.pre_layrnorm                         visual.ln_pre
vision.ln_post        vision_model.post_layernorm                       visual.ln_post
vision.proj           visual_projection                                 -
vision.proj.weight    -                                                 visual.proj.T
text.token_embed      text_model.embeddings.token_embedding             token_embedding
text.pos_embed        text_model.embeddings.position_embedding.weight   positional_embedding
text.ln_final         text_model.final_layer_norm                       ln_final
text.proj             text_projection                                   -
text.proj.weight      -                                                 text_projection.T
"""
_BLOCK = """
ln_1                layer_norm1         ln_1                    norm1
attn.q_proj         self_attn.q_proj    -                       -
attn.q_proj.weight  -                   attn.in_proj_weight[0]  attn.qkv.weight[0]
attn.q_proj.bias    -                   attn.in_proj_bias[0]    attn.qkv.bias[0]
attn.k_proj         self_attn.k_proj    -                       -
attn.k_proj.weight  -                   attn.in_proj_weight[1]  attn.qkv.weight[1]
attn.k_proj.bias    -                   attn.in_proj_bias[1]    attn.qkv.bias[1]
attn.v_proj         self_attn.v_proj    -                       -
attn.v_proj.weight  -                   attn.in_proj_weight[2]  attn.qkv.weight[2]
attn.v_proj.bias    -                   attn.in_proj_bias[2]    attn.qkv.bias[2]
attn.out_proj       self_attn.out_proj  attn.out_proj           attn.proj
ln_2                layer_norm2         ln_2                    norm2
mlp.fc1             mlp.fc1             mlp.c_fc                mlp.fc1
mlp.fc2             mlp.fc2             mlp.c_proj              mlp.fc2
"""


def _layout(column: int, vision: str, text: str) -> Layout:
    """Make a layout from a column of the tables. `vision` and `text` are prefixes of the blocks."""
    rows = [[*line.split(), "-"] for line in _TOWERS.strip().splitlines()]
    layout = {row[0]: row[column] for row in rows}
    for tower, blocks in (("vision", vision), ("text", text)):
        for row in map(str.split, _BLOCK.strip().splitlines()):
            layout[f"{tower}.blocks.{{}}.{row[0]}"] = f"{blocks}.{{}}.{row[column]}"
    return {ours: theirs for ours, theirs in layout.items() if not theirs.endswith("-")}


TRANSFORMERS = _layout(1, "vision_model.encoder.layers", "text_model.encoder.layers")
OPENAI = _layout(2, "visual.transformer.resblocks", "transformer.resblocks")
OPEN_CLIP_CUSTOM_TEXT = {  # open_clip's class CustomTextCLIP, for configs with `custom_text`
    ours: f"text.{theirs}" if ours.startswith("text.") else theirs
    for ours, theirs in OPENAI.items()
}
LAYOUTS = {"transformers": TRANSFORMERS, "openai": OPENAI, "open_clip": OPENAI}
TIMM = {ours: place for ours, place in OPEN_CLIP_CUSTOM_TEXT.items() if "vision." not in ours} | {
    "vision.class_embed": "visual.trunk.cls_token",
    "vision.patch_embed": "visual.trunk.patch_embed.proj",
    "vision.pos_embed": "visual.trunk.pos_embed",
    "vision.ln_pre": "visual.trunk.norm_pre",
    "vision.ln_post": "visual.trunk.norm",
    "vision.proj": "visual.trunk.head",
    **{n: place for n, place in _layout(3, "visual.trunk.blocks", "").items() if "vision." in n},
}


def layout_name(name: str, layout: Layout) -> str:
    """The place of a parameter in a layout. Raises ValueError if the layout has no place for it.

    >>> layout_name("vision.blocks.3.ln_1.bias", TRANSFORMERS)
    'vision_model.encoder.layers.3.layer_norm1.bias'
    >>> layout_name("text.blocks.0.attn.k_proj.weight", OPENAI)
    'transformer.resblocks.0.attn.in_proj_weight[1]'
    """
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    template = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", name)
    for ours in (template, name):
        module, _, kind = ours.rpartition(".")
        if ours in layout:
            return layout[ours].format(*numbers)
        if module in layout:
            return f"{layout[module]}.{kind}".format(*numbers)
    raise ValueError(
        f"the parameter {name} has no place in a file. The class must name the place in "
        f'`tensor_names`, such as {{"{template}": "{template}"}}'
    )


def depth(tower: str, layout: Layout, names: Iterable[str]) -> int:
    """The number of blocks of a tower, counted from the names in a file."""
    before, _ = layout[f"{tower}.blocks.{{}}.ln_1"].split("{}")
    numbers = (re.match(rf"{re.escape(before)}(\d+)\.", name) for name in names)
    return len({number[1] for number in numbers if number})


def names_of(tower: str, layout: Layout, names: Iterable[str]) -> set[str]:
    """The names in a file that belong to "vision", "text" or "logit_scale"."""
    places = [theirs for ours, theirs in layout.items() if ours.startswith(tower)]
    patterns = (re.escape(re.sub(r"\.T$|\[\d\]$", "", theirs)) for theirs in places)
    pattern = "|".join(patterns).replace(r"\{\}", r"\d+")
    belongs = re.compile(rf"(?:{pattern})(?:\.weight|\.bias)?").fullmatch
    return {name for name in names if belongs(name)}


class Place(NamedTuple):
    """A parameter's place in a file: the name of the tensor, and how the parameter is stored."""

    key: str
    form: str  # "" unchanged, "T" transposed, "0" to "2" a third of the rows

    def stored_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """From the shape of a parameter, return the shape of its tensor in the file."""
        shape = tuple(shape)
        if self.form == "T":
            return shape[::-1]
        return (3 * shape[0], *shape[1:]) if self.form else shape

    def take(self, tensor: Tensor) -> Tensor:
        """The parameter: a view of the file's tensor, or a copy if the tensor is transposed."""
        if self.form == "T":
            return tensor.T.contiguous()
        return tensor.chunk(3)[int(self.form)] if self.form else tensor


def place(name: str, layout: Layout) -> Place:
    """The place of a parameter in a layout.

    >>> place("vision.proj.weight", OPENAI)
    Place(key='visual.proj', form='T')
    """
    key = layout_name(name, layout)
    form = "".join(re.findall(r"\.T$|\[\d\]$", key))
    return Place(key.removesuffix(form), form.strip(".[]"))


def pack(parameters: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Rename parameters to a layout's names, and stack or transpose them as in the layout."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():  # q, k and v come in this order
        key, form = place(name, layout)
        if key in parts and form not in ("1", "2"):
            raise ValueError(
                f"the parameter {name} has the place {key}, where another parameter already is. "
                "`tensor_names` must give each parameter a place of its own"
            )
        parts.setdefault(key, []).append(parameter.T if form == "T" else parameter)
    return {
        key: (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).contiguous()
        for key, tensors in parts.items()
    }


# ------------------------------------------------------------------------------------------------
# Which layout is it?

OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""OpenAI's files have these three numbers as tensors. OpenAI's code does not read them."""

# The prefixes of DistributedDataParallel, torch.compile, FSDP, activation checkpointing and
# DeepSpeed. A name may have several prefixes, at any place.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# The first weight of a tower, without the tower's prefix -> the prefix in the tables above.
_PREFIXES = {
    "embeddings.token_embedding": "text_model.",
    "embeddings.patch_embedding": "vision_model.",
    "conv1": "visual.",
    "patch_embed.proj": "visual.trunk.",
    "token_embedding": "",
    "patch_embed": "vision.",
    "token_embed": "text.",
}
_FIRST = re.compile(  # a larger model's prefix, the tower's prefix (both optional), first weight
    r"((?:.+?\.)??)(text_model\.|vision_model\.|visual\.trunk\.|visual\.|text\.|vision\.)?"
    rf"({'|'.join(map(re.escape, _PREFIXES))})\.weight"
)


def recognize(
    tensors: Mapping[str, Tensor], extra: Layout = {}
) -> tuple[str, Layout, dict[str, Tensor]]:
    """Find the layout's name and table, and rename the tensors as the table expects.

    `extra` names the tensors of a fork's own parameters. Raises ValueError if the tensors belong
    to several models, or to parts that miniclip does not have, such as a ResNet.
    """
    forks = names_of("", extra, tensors) | names_of("", {ours: ours for ours in extra}, tensors)
    tensors = _renamed(tensors, lambda name: name if name in forks else _WRAPPERS.sub("", name))
    for key, found in _OTHERS.items():
        if key not in extra.values() and any(f".{key}" in f".{name}" for name in tensors):
            raise ValueError(f"has tensors {key}*: {found}, which miniclip does not have")
    first = [match for match in map(_FIRST.fullmatch, tensors) if match]
    before = sorted({match[1] for match in first})
    if len(before) > 1:
        raise ValueError(
            f"has more than one model, under the names {listed(f'{b}*' for b in before)}. Save the "
            "tensors of one model in a separate file"
        )
    missing = {_PREFIXES[match[3]] for match in first if not match[2]}
    surroundings = "" if not before or _is_forks(before[0], extra) else before[0]
    if others := [name for name in tensors if not name.startswith(surroundings)]:
        warn(f"{listed(others)} are left out: only {surroundings}* belongs to the model")
        tensors = {name: t for name, t in tensors.items() if name.startswith(surroundings)}

    def without_surroundings(name: str) -> str:
        name = name.removeprefix(surroundings)
        # transformers 5.6 and later save a tower without its prefix. A projection never had this
        # prefix.
        own = name != "logit_scale" and "_projection." not in name
        return max(missing) + name if own and len(missing) == 1 else name

    tensors = _without_buffers(_renamed(tensors, without_surroundings))
    tensors = _one_position_embedding(tensors)
    if {"vision.patch_embed.weight", "text.token_embed.weight"} & tensors.keys():
        return "transformers", {ours: ours for ours in (*TRANSFORMERS, *extra)}, tensors
    if any(name.startswith("visual.trunk.") for name in tensors):
        return "open_clip", TIMM, _as_in_open_clip(tensors)
    if any(name.startswith("text.") for name in tensors):
        return "open_clip", OPEN_CLIP_CUSTOM_TEXT, tensors
    if any(name.startswith("visual.") or name == "token_embedding.weight" for name in tensors):
        return "openai", OPENAI, tensors
    return "transformers", TRANSFORMERS | extra, tensors


def _is_forks(prefix: str, extra: Layout) -> bool:
    """Whether a fork's own parameter has this prefix. If so, every tensor belongs to the fork."""
    return any(theirs.startswith(prefix) for theirs in extra.values())


def _renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise ValueError("has two tensors whose names differ only in their prefixes")
    return renamed


def _without_buffers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the buffers that libraries save in addition to the weights.

    Until version 4.31, transformers saved the positions 0 to n-1. Raises ValueError for other
    positions. A TorchScript archive of open_clip also has the causal mask. torch's AveragedModel
    also saves how many models it has averaged.
    """
    kept = dict(tensors)
    for name in ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"):
        ids = kept.pop(name, torch.empty(0)).flatten()
        if len(ids) > 100_000 or ids.tolist() != [*range(len(ids))]:
            raise ValueError(
                f"{name} is not 0, 1, 2, ..., so this checkpoint has its positions in an order "
                "that no CLIP uses"
            )
    for name in ("attn_mask", "text.attn_mask"):
        mask = kept.get(name)
        if mask is not None and mask.ndim == 2 and mask.numel() <= 10**6:
            if torch.equal(mask.float(), torch.full(mask.shape, -torch.inf).triu(1)):
                del kept[name]
    kept.pop("n_averaged", None)
    return kept


def _one_position_embedding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join Long-CLIP's position tables: rows 0 to 19 of the first, then the second from row 20.

    Long-CLIP's code adds the two tables, each multiplied by a mask (model_longclip.py).
    Long-CLIP's own files lack the `context_length` of OpenAI's files, so it is added.
    """
    long = [name for name in tensors if re.search(r"position(al)?_embedding_res\b", name)]
    for name in long:
        first, rest = tensors.get(name.replace("_res", "")), tensors.pop(name)
        if first is None or first.shape != rest.shape:
            raise ValueError(f"both tables of {name} must have the shape {tuple(rest.shape)}")
        tensors[name.replace("_res", "")] = torch.cat([first[:20], rest[20:]])
        if name == "positional_embedding_res":  # one of Long-CLIP's own files
            tensors.setdefault("context_length", torch.tensor(len(rest)))
    return tensors


def _as_in_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change timm's tensors to the shapes in CLIP. Drop leading dimensions of 1, and a zero bias.

    timm's projection has a bias, but CLIP's has none. open_clip may store the projection outside of
    `visual.trunk`.
    """
    trunk = "visual.trunk."
    tensors = _renamed(tensors, lambda n: n.replace("visual.head.proj.", f"{trunk}head."))
    for name in (f"{trunk}cls_token", f"{trunk}pos_embed"):
        while name in tensors and tensors[name].ndim > 1 and len(tensors[name]) == 1:
            tensors[name] = tensors[name][0]
    if f"{trunk}head.bias" in tensors and not tensors[f"{trunk}head.bias"].any():
        del tensors[f"{trunk}head.bias"]
    return tensors


_OTHERS = {
    "visual.layer1.": "a ResNet",
    "visual.attnpool.": "a ResNet",
    "visual.attn_pool.": "attentional pooling",
    "text.transformer.embeddings.": "a text tower from transformers",
    "text_decoder.": "CoCa's text decoder",
    "logit_bias": "the bias of SigLIP's loss",
}
