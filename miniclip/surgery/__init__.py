"""Change what a model computes, what it weighs or what shape it has, and know what stayed exact.

One rule for all of it. A function that changes weights or shapes returns a new model, config and
all; the one given is left as it was, keeps its hooks, and shares no memory with the new one (only
`resize_image` shares what does not change). A context manager changes the model given for as long
as it is open. So operations compose, and nothing has to be undone. Two functions work in place:
`freeze`, as what is trained is no part of what a model is, and `reconfigure`, which tells a config
what you did yourself to a `copied` model. Compile a model after surgery, not before.

What a function leaves is a CLIP like any other: it is saved and loaded bit for bit. Where
transformers cannot express its shape, transformers refuses to load it (`CLIPConfig.to_dict`).

Here are: patches and images of another size, longer texts, tokens, registers (also at test time),
pruned heads, layers and neurons, patch dropout, LoRA, dense features, ProxyCLIP's foreign features,
spliced modules (adapters, sparse autoencoders), activations patched from another run, ablated
heads, soups, WiSE-FT, task vectors, learned prompt vectors (`encode_prompts`), freezing by layer.
"""

from miniclip.surgery.attention import PRESETS, Preset, dense_features, proxyclip
from miniclip.surgery.geometry import (
    add_registers,
    add_tokens,
    extend_context,
    resize_channels,
    resize_image,
    resize_patch,
)
from miniclip.surgery.interventions import (
    ablate_heads,
    move_to_registers,
    patch_dropout,
    patch_from,
    splice,
)
from miniclip.surgery.lora import add_lora, merge_lora, unmerge_lora
from miniclip.surgery.prompts import encode_prompts
from miniclip.surgery.structure import keep_layers, prune_heads, prune_neurons, reconfigure
from miniclip.surgery.weights import (
    TaskVector,
    average,
    copied,
    freeze,
    interpolate,
    layer_groups,
)

__all__ = [
    "PRESETS",
    "Preset",
    "dense_features",
    "proxyclip",
    "add_registers",
    "add_tokens",
    "extend_context",
    "resize_channels",
    "resize_image",
    "resize_patch",
    "ablate_heads",
    "move_to_registers",
    "patch_dropout",
    "patch_from",
    "splice",
    "add_lora",
    "merge_lora",
    "unmerge_lora",
    "encode_prompts",
    "keep_layers",
    "prune_heads",
    "prune_neurons",
    "reconfigure",
    "TaskVector",
    "average",
    "copied",
    "freeze",
    "interpolate",
    "layer_groups",
]
