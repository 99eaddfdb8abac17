"""Change what a model computes, its weights or its shape, and know what stayed exact.

A function that changes weights or shapes returns a new model with its config. The old model stays
as it was and keeps its hooks. The two share no memory, except that `resize_image` shares what does
not change. A context manager changes a model while its block is open. So operations compose, and
nothing has to be undone. Two functions work in place: `freeze`, because training is not a part of a
model, and `reconfigure`, which updates the config after your own change to a `copied` model.
Compile a model after surgery, not before.

The result is a CLIP like any other, and is saved and loaded bit for bit. transformers refuses to
load a shape that it cannot express (`CLIPConfig.to_dict`).

The package has: other image and patch sizes, longer texts, new tokens, registers (also at test
time), pruned heads, layers and neurons, patch dropout, LoRA, dense features, ProxyCLIP's foreign
features, spliced modules (adapters, sparse autoencoders), activation patching, ablated heads,
soups, WiSE-FT, task vectors, learned prompt vectors (`encode_prompts`), freezing by layer.
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
    "PRESETS", "Preset", "dense_features", "proxyclip", "add_registers", "add_tokens",
    "extend_context", "resize_channels", "resize_image", "resize_patch", "ablate_heads",
    "move_to_registers", "patch_dropout", "patch_from", "splice", "add_lora", "merge_lora",
    "unmerge_lora", "encode_prompts", "keep_layers", "prune_heads", "prune_neurons", "reconfigure",
    "TaskVector", "average", "copied", "freeze", "interpolate", "layer_groups",
]  # fmt: skip
