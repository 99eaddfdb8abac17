"""Remove heads, neurons or layers from a tower, or put its layers in another order.

If the number of heads or the MLP width differs between layers, the config stores a tuple with a
number for each layer. transformers' CLIP has no such config. If all layers have the same sizes and
no head was removed, the model loads in transformers and gives the same logits.
"""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.errors import listed
from miniclip.files.checks import numbers
from miniclip.follow import check_equal, check_rebuilt, follow
from miniclip.model import CLIP, Block
from miniclip.sites import Edit, find
from miniclip.surgery.weights import copied


def prune_heads(model: CLIP, tower: str, heads: Mapping[int, Collection[int]]) -> CLIP:
    """Remove heads from a tower (Michel et al. 2019, arXiv 1905.10650).

    The effect is the same as setting the heads' outputs `z` to zero. The bias of out_proj stays.
    transformers cannot load the result. `heads` is {layer: [head, ...]}. Raises ValueError for a
    layer or head that does not exist.

    >>> from miniclip import CLIP
    >>> model = CLIP.from_pretrained("shapes")
    >>> prune_heads(model, "vision", {0: [1], 2: [0, 2]}).config.vision.heads
    (2, 3, 1, 3)
    """
    counts = list(_config(model, tower).per_layer("heads"))
    follow("prune_heads", getattr(model, tower), attention=("forward", "attend"))
    new = copied(model)
    for layer, gone in heads.items():
        attn = _part(new, tower, layer, "attn")
        kept = _others(gone, counts[layer], f"{tower} layer {layer}", "heads")
        rows = (kept[:, None] * attn.head_width + torch.arange(attn.head_width)).flatten()
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj):
            _cut(linear, 0, rows)
        _cut(attn.out_proj, 1, rows)
        counts[layer] = len(kept)
    width = _block(new, tower, 0).attn.head_width
    reconfigure(new, tower, heads=tuple(counts), head_width=width)

    def silence(z: Tensor, name: str) -> Tensor:  # (B, T, H, D)
        is_kept = [i not in heads[int(name.split(".")[1])] for i in range(z.shape[2])]
        return z * torch.tensor(is_kept, device=z.device)[:, None]

    silenced: dict[str, Edit] = {f"blocks.{layer}.attn.z": silence for layer in heads}
    check_equal("prune_heads", getattr(new, tower), getattr(model, tower), silenced)
    return check_rebuilt("prune_heads", new)


def prune_neurons(model: CLIP, tower: str, neurons: Mapping[int, Collection[int]]) -> CLIP:
    """Remove neurons from the MLPs of a tower.

    The effect is the same as setting the neurons' activations to zero. The bias of fc2 stays.
    transformers can load the result if all layers keep the same MLP width. `neurons` is
    {layer: [neuron, ...]}. Raises ValueError if a layer or neuron does not exist.

    >>> from miniclip import CLIP
    >>> model = CLIP.from_pretrained("shapes")
    >>> thin = {layer: range(100) for layer in range(4)}
    >>> prune_neurons(model, "vision", thin).config.vision.mlp_width, model.config.vision.mlp_width
    (284, 384)
    """
    counts = list(_config(model, tower).per_layer("mlp_width"))
    follow("prune_neurons", getattr(model, tower), mlp=("forward",))
    new = copied(model)
    for layer, gone in neurons.items():
        mlp = _part(new, tower, layer, "mlp")
        kept = _others(gone, counts[layer], f"{tower} layer {layer}", "neurons")
        _cut(mlp.fc1, 0, kept)
        _cut(mlp.fc2, 1, kept)
        counts[layer] = len(kept)
    reconfigure(new, tower, mlp_width=tuple(counts))

    def silence(act: Tensor, name: str) -> Tensor:  # (B, T, mlp_width)
        gone = [*neurons[int(name.split(".")[1])]]
        return act.index_fill(-1, torch.tensor(gone, dtype=torch.long, device=act.device), 0)

    silenced: dict[str, Edit] = {f"blocks.{layer}.mlp.act": silence for layer in neurons}
    check_equal("prune_neurons", getattr(new, tower), getattr(model, tower), silenced)
    return check_rebuilt("prune_neurons", new)


def keep_layers(model: CLIP, tower: str, layers: Sequence[int]) -> CLIP:
    """Keep these layers of a tower, in this order (Sajjad et al. 2020, arXiv 2004.03844).

    A layer may appear twice. The last LayerNorm stays. Raises ValueError for a layer that does not
    exist, and for an empty list.

    >>> from miniclip import CLIP
    >>> keep_layers(CLIP.from_pretrained("shapes"), "vision", range(3)).config.vision.layers
    3
    """
    if not layers:
        raise ValueError(f"no layers are left in the {tower} tower; expected at least one")
    config = _config(model, tower)
    new = copied(model)
    blocks = [deepcopy(_block(new, tower, layer)) for layer in layers]
    getattr(new, tower).blocks = nn.Sequential(*blocks)
    shape = {
        name: tuple(config.per_layer(name)[layer] for layer in layers)
        for name in ("heads", "mlp_width")
    }
    width = blocks[0].attn.head_width
    reconfigure(new, tower, layers=len(layers), head_width=width, **shape)
    return check_rebuilt("keep_layers", new)


def reconfigure(model: CLIP, tower: str, **fields: Any) -> CLIP:
    """Change fields of a tower's config in place, to describe changed modules. Returns the model.

    Saving raises an error if the modules do not fit the config. Raises ValueError for an unknown
    field.

    >>> from miniclip import CLIP
    >>> model = copied(CLIP.from_pretrained("shapes"))
    >>> for block in model.text.blocks: block.mlp.act = nn.GELU()
    >>> reconfigure(model, "text", act="gelu").config.text.act
    'gelu'
    """
    config = _config(model, tower)
    if unknown := [name for name in fields if name not in vars(config)]:
        patches = "stride" in unknown
        raise ValueError(
            f"{type(config).__name__} has no field {listed(unknown)}; expected some of "
            + ", ".join(vars(config))
            + ". Patches do not overlap, so the stride is the patch_size" * patches
        )
    config = replace(config, **fields)
    model.config = replace(model.config, **{tower: config})
    getattr(model, tower).config = config
    return model


def _config(model: CLIP, tower: str) -> Any:
    if tower not in ("vision", "text"):
        raise ValueError(f"tower is {tower!r}; expected 'vision' or 'text'")
    return getattr(model, tower).config


def _block(model: CLIP, tower: str, layer: int) -> Block:
    blocks = getattr(model, tower).blocks
    if layer not in range(len(blocks)):
        raise ValueError(f"no layer {layer} in the {tower} tower: expected 0 to {len(blocks) - 1}")
    return blocks[layer]


def _part(model: CLIP, tower: str, layer: int, name: str) -> Any:
    """A block's attention or MLP. A part that several blocks share raises ValueError, because a cut
    in one block would change the others."""
    _block(model, tower, layer)
    return find(model, f"{tower}.blocks.{layer}.{name}")[0][1]


def _others(gone: Collection[int], count: int, where: str, kind: str) -> Tensor:
    gone = numbers(gone, count, where, kind)
    return torch.tensor([i for i in range(count) if i not in gone], dtype=torch.long)


def _cut(linear: nn.Linear, dim: int, kept: Tensor) -> None:
    """Remove all outputs (dim 0) or inputs (dim 1) of a Linear except `kept`, in place."""
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"expected a plain nn.Linear, found {type(linear).__name__}; merge adapters first"
        )
    kept = kept.to(linear.weight.device)
    for name, parameter in [*linear.named_parameters()]:
        if name == "bias" and dim == 1:
            continue
        rest = parameter.detach().index_select(dim, kept)
        setattr(linear, name, nn.Parameter(rest, parameter.requires_grad))
    linear.out_features, linear.in_features = linear.weight.shape
