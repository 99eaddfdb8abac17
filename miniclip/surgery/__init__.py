"""Change the computation, the weights or the shape of a model.

A function that changes weights or shapes returns a new model with a new config. The old model does
not change, and keeps its hooks. The two models share no memory, except after `resize_image`, which
shares the tensors that do not change. A context manager changes a model only while its `with` block
is open. So changes can be combined, and nothing has to be undone. Two functions work in place.
`freeze` chooses which parameters are trained. `reconfigure` updates the config after you have
changed the modules of a copy (see `copied`). Compile a model after surgery, not before.

The result is an ordinary CLIP. Saving and loading it keeps every bit. If transformers does not
support the result's shape, transformers cannot load the saved files (see `CLIPConfig.to_dict`).

There are functions for: other image and patch sizes, longer texts, new tokens, registers (also at
test time), pruned heads, layers and neurons, patch dropout, LoRA, dense features, ProxyCLIP,
spliced modules (adapters, sparse autoencoders), activation patching, ablated heads, soups, WiSE-FT,
task vectors, learned prompt vectors (`encode_prompts`), and freezing by layer.
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
