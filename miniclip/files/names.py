"""The names that three layouts give the tensors of a CLIP, and which layout a file has.

    transformers   q, k and v are three matrices; config.json has the rest
    openai         q, k and v are stacked in one matrix and projections are transposed. There is no
                   config: each model has QuickGELU and heads of 64, and the shapes tell the rest
    open_clip      OpenAI's tensors, with one more prefix in some models, and open_clip_config.json

A layout is a table. A key is our name of a parameter, or of the module that has a weight and a
bias; {} is the number of the block. The value is the place of the same numbers in a file. A place
that ends in .T holds the transpose; [0], [1] and [2] are the upper, middle and lower third of a
tensor's rows.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

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
        "vision.register_embed": "vision_model.embeddings.register_tokens",  # miniclip's own
        "vision.ln_pre": "vision_model.pre_layrnorm",  # sic, in every checkpoint
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
    """The place of a parameter in another layout. Raises ValueError if the layout has none.

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
        f"the parameter {name} has no place in a file; a class with parameters of its own "
        f'names their places in `tensor_names`, such as {{"{template}": "{template}"}}'
    )


def depth(tower: str, layout: Layout, names: Iterable[str]) -> int:
    """How many blocks a tower has, by the names in a file."""
    before, _ = layout[f"{tower}.blocks.{{}}.ln_1"].split("{}")
    numbers = (re.match(rf"{re.escape(before)}(\d+)\.", name) for name in names)
    return len({number[1] for number in numbers if number})


class Place(NamedTuple):
    """The tensor of a file that holds a parameter, and in which form."""

    key: str
    form: str  # "" unchanged, "T" transposed, "0" to "2" a third of the rows

    def stored_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """The shape of the file's tensor, if this is the parameter's shape."""
        shape = tuple(shape)
        if self.form == "T":
            return shape[::-1]
        return (3 * shape[0], *shape[1:]) if self.form else shape

    def take(self, tensor: Tensor) -> Tensor:
        """The parameter: a view of the file's tensor, or a copy of a transposed one."""
        if self.form == "T":
            return tensor.T.contiguous()
        return tensor.chunk(3)[int(self.form)] if self.form else tensor


def place(name: str, layout: Layout) -> Place:
    """Where a layout keeps a parameter.

    >>> place("vision.proj.weight", OPENAI)
    Place(key='visual.proj', form='T')
    """
    key = layout_name(name, layout)
    form = "".join(re.findall(r"\.T$|\[\d\]$", key))
    return Place(key.removesuffix(form), form.strip(".[]"))


def pack(parameters: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Parameters under our names -> tensors under a layout's names. None share memory."""
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
"""OpenAI's files hold these three as tensors. Their code ignores them: the shapes say the same."""


def recognize(
    tensors: dict[str, Tensor], extra: Layout = {}
) -> tuple[str, Layout, dict[str, Tensor]]:
    """The name of the layout, its table, and the tensors under the names of that table.

    `extra` are the places of a fork's own parameters. Raises ValueError if the tensors are not a
    CLIP's with a vision transformer.
    """
    if all(name.startswith("module.") for name in tensors):  # saved by DistributedDataParallel
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    for key, found in _OTHERS.items():
        if key not in extra.values() and any(name.startswith(key) for name in tensors):
            raise ValueError(f"has tensors {key}*: {found}, which miniclip does not have")
    if any(name.startswith("visual.") for name in tensors):
        tensors = {name: t for name, t in tensors.items() if not _is_causal_mask(name, t)}
        if any(name.startswith("text.") for name in tensors):
            return "open_clip", OPEN_CLIP_CUSTOM_TEXT, tensors
        is_openai = any(name in tensors for name in OPENAI_NUMBERS)
        return "openai" if is_openai else "openai or open_clip", OPENAI, tensors
    # Since 5.6 transformers leaves out the prefix of a tower that is saved alone. Other programs
    # leave it out even if there is a projection, which never had the prefix.
    for prefix, key in (("text_model.", "token"), ("vision_model.", "patch")):
        if f"embeddings.{key}_embedding.weight" in tensors:
            names = {name: prefix * ("_projection." not in name) + name for name in tensors}
            tensors = {names[name]: tensor for name, tensor in tensors.items()}
    return "transformers", TRANSFORMERS | extra, tensors


def _is_causal_mask(name: str, tensor: Tensor) -> bool:
    """open_clip's TorchScript archives store the causal mask as a buffer."""
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
