"""Embeddings for every patch, by the last-block attentions of open-vocabulary segmentation.

CLIP is trained at its class token alone. What its patches hold at the end is far from the texts
until the last block is made to attend otherwise; the published ways of doing so differ in which
similarity takes the place of queries and keys, and in what else of the block is left out.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miniclip.follow import follow, patch_places, tower_for
from miniclip.model import CLIP, Attention


def dense_features(model: CLIP, pixels: Tensor, preset: str = "clearclip") -> Tensor:
    """An embedding for each patch, row by row of the grid: pixels -> (B, P, E).

    `preset`: "clip" (the model as it is), "maskclip" (Zhou et al. 2021, arXiv 2112.01071),
    "sclip" (Wang et al. 2023, arXiv 2312.01597), "clip-surgery" (Li et al. 2023, arXiv
    2304.05653), "clearclip" (Lan et al. 2024, arXiv 2407.12442) or "naclip" (Hajimiri et al.
    2024, arXiv 2404.08181). Not normalised; the model is only read. See PRESETS. An attention of a
    fork's own must take a `pattern`, as `Attention.forward` does, or change `qkv` alone.

    >>> from miniclip import CLIP
    >>> model, pixels = CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64)
    >>> dense_features(model, pixels, "sclip").shape[:2]
    torch.Size([1, 64])
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}")
    pattern, residual, mlp, depth = PRESETS[preset]
    tower = tower_for(model, pixels)
    follow("dense_features", tower, ("forward", "pool"), block=("forward",), attention=("attend",))
    for attn in (block.attn for block in tower.blocks):
        if not isinstance(attn, Attention) or "pattern" not in signature(attn.forward).parameters:
            raise ValueError(
                f"dense_features replays Attention.forward, and {type(attn).__name__} has its own, "
                "without the argument `pattern`: dense_features cannot follow it"
            )
        if attn.causal:
            raise ValueError("dense_features cannot follow a causal vision tower")
    depth = min(depth, len(tower.blocks))
    x = tower.blocks[:-depth](tower.embed_tokens(pixels))  # (B, 1 + R + P, W)
    dense = x if residual else torch.zeros_like(x)
    block: Any  # a Block, or what someone has put in its place
    for block in list(tower.blocks)[-depth:]:
        dense = dense + block.attn(
            block.ln_1(x), pattern=lambda q, k, v: pattern(q, k, v, tower.config.grid)
        )
        if mlp:
            dense = dense + block.mlp(block.ln_2(dense))
        x = block(x)
    return tower.proj(tower.ln_post(dense[:, patch_places(tower, pixels)]))  # (B, P, E)


# (q, k, v, grid) -> weights over the tokens; all of q, k, v are (B, H, T, D)
Pattern = Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor]


def similar(x: Tensor, y: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """The softmax of scaled products, (B, H, T, D) twice -> (B, H, T, T)."""
    return (x @ y.transpose(-2, -1) * x.shape[-1] ** -0.5 + bias).softmax(-1)


def neighbours(grid: tuple[int, int], like: Tensor, std: float = 5.0) -> Tensor:
    """A Gaussian of the distance between patches, (T, T); 0 to and from any other token."""
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) for n in grid)
    places = torch.cartesian_prod(rows, columns)  # (P, 2)
    distance = (places[:, None] - places[None]).square().sum(-1)  # (P, P), squared
    bias = like.new_zeros(like.shape[-2], like.shape[-2])
    bias[-len(places) :, -len(places) :] = (-distance / (2 * std**2)).exp()
    return bias


class Preset(NamedTuple):
    """A way of reading patches: what they attend by, and what stays of the blocks."""

    pattern: Pattern
    residual: bool  # the stream that the block reads is kept
    mlp: bool  # and its MLP
    depth: int = 1  # blocks from the end; each reads the model's own stream


PRESETS = {
    "clip": Preset(lambda q, k, v, grid: similar(q, k), residual=True, mlp=True),
    # Each token attends to itself alone.
    "maskclip": Preset(lambda q, k, v, grid: torch.eye(q.shape[-2]).to(q), residual=True, mlp=True),
    "sclip": Preset(lambda q, k, v, grid: similar(q, q) + similar(k, k), residual=True, mlp=True),
    # Its second path only: the text features that it takes out afterwards are no matter of images.
    "clip-surgery": Preset(lambda q, k, v, grid: similar(v, v), residual=True, mlp=False, depth=6),
    "clearclip": Preset(lambda q, k, v, grid: similar(q, q), residual=False, mlp=False),
    "naclip": Preset(
        lambda q, k, v, grid: similar(k, k, neighbours(grid, k)), residual=False, mlp=False
    ),
}
