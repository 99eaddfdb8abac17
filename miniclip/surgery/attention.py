"""Embeddings for every patch, with attention patterns for open-vocabulary segmentation.

CLIP's training uses only the class token. With CLIP's own attention pattern in the last block, the
embeddings of patches match texts badly. The published methods replace this pattern. They differ in
the new pattern, and in the parts of the block that they leave out.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.files.modules import unwrapped
from miniclip.follow import follow, patch_grid, patch_places, tower_for
from miniclip.model import CLIP, Attention, VisionTower
from miniclip.surgery.geometry import at_size


class Seen(NamedTuple):
    """What a pattern function may use in addition to queries, keys and values."""

    x: Tensor  # (B, T, W), the input of attention: the output of ln_1
    grid: tuple[int, int]  # rows and columns of patches
    places: slice  # the positions of the patches among the T tokens


# A function of q, k, v and `seen`. The queries, keys and values have the shape (B, H, T, D). It
# returns weights over the tokens, (B, H, T, T). If the Preset has its own grid of P patches, the
# weights are (B, H, P, T), or (B, 1, P, T) if all heads share them.
Pattern = Callable[[Tensor, Tensor, Tensor, Seen], Tensor]


class Preset(NamedTuple):
    """How to embed patches: the attention pattern, and which parts of the blocks are kept."""

    pattern: Pattern
    residual: bool = False  # whether the residual connection of attention is kept
    mlp: bool = False  # whether the MLP is kept
    depth: int = 1  # how many of the last blocks use `pattern`
    grid: tuple[int, int] | None = None  # rows and columns of the result. None: the tower's grid


def dense_features(
    model: CLIP, pixels: Tensor, preset: str | Preset = "clearclip", resize: str | None = None
) -> Tensor:
    """Return the embeddings of the patches, (B, P, E), row by row. They are not normalised.

    A fork may change the attention's `qkv`. If the fork changes the attention's `forward`, the new
    `forward` must accept `pattern`, as `Attention.forward` does.

    Args:
        preset: "clip" (the model unchanged), "maskclip" (Zhou et al. 2021, arXiv 2112.01071),
            "sclip" (Wang et al. 2023, arXiv 2312.01597), "clip-surgery" (Li et al. 2023, arXiv
            2304.05653), "gem" (Bousselham et al. 2023, arXiv 2312.00878), "clearclip" (Lan et al.
            2024, arXiv 2407.12442), "naclip" (Hajimiri et al. 2024, arXiv 2404.08181), or a
            Preset, for example from `proxyclip`.
        resize: a method of `resize_image`, if the images do not have the model's size. SCLIP,
            ClearCLIP, NACLIP and ProxyCLIP use the method "dino", and GEM uses "timm".
    Raises:
        ValueError: for an unknown preset, or a fork whose code this function cannot follow.

    >>> from miniclip import CLIP
    >>> model, pixels = CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64)
    >>> dense_features(model, pixels, "sclip").shape[:2]
    torch.Size([1, 64])
    >>> last_queries = Preset(lambda q, k, v, seen: similar(q, q), residual=True)
    >>> dense_features(model, torch.zeros(1, 3, 96, 64), last_queries, resize="dino").shape[:2]
    torch.Size([1, 96])
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if preset.grid and preset.residual:
        raise ValueError("a Preset with its own grid makes new tokens, so it needs residual=False")
    tower = tower_for(model, pixels)
    follow("dense_features", tower, ("forward", "pool"), block=("forward",), attention=("attend",))
    for attn in (block.attn for block in tower.blocks):
        if not isinstance(attn, Attention) or "pattern" not in signature(attn.forward).parameters:
            raise ValueError(
                "dense_features needs an Attention with the argument `pattern` in its forward; "
                f"it cannot follow {type(attn).__name__}"
            )
        if attn.causal:
            raise ValueError("dense_features cannot follow a causal vision tower")
    if resize:
        tower = at_size(tower, pixels.shape[-2:], resize)
    first = max(len(tower.blocks) - preset.depth, 0)
    check_unused(tower, first)
    grid, places = patch_grid(tower, pixels), patch_places(tower, pixels)
    x = tower.blocks[:first](tower.embed_tokens(pixels))  # (B, 1 + R + P, W)
    dense = x if preset.residual else torch.zeros_like(x[:, :1])
    block: Any  # a Block, or its replacement
    for i, block in enumerate(tower.blocks[first:], first):
        seen = Seen(block.ln_1(x), grid, places)
        dense = dense + block.attn(seen.x, pattern=lambda q, k, v: preset.pattern(q, k, v, seen))
        dense = block.resid_mid(dense)
        if preset.mlp:
            dense = dense + block.mlp(block.ln_2(dense))
        if i + 1 < len(tower.blocks):
            x = block(x)
    dense = dense if preset.grid else dense[:, places]
    return tower.proj(tower.ln_post(dense))  # (B, P, E)


def check_unused(tower: VisionTower, first: int) -> None:
    """Raise ValueError if dense_features would skip a hook or a module. It does not run the blocks
    from `first` as a whole, or their sites `scores` and `pattern`."""
    block: Any  # a Block, or a wrapper of it
    for i, block in enumerate([*tower.blocks][first:], first):
        block, attn = unwrapped(block), unwrapped(block).attn
        places = {"": block, ".attn.scores": attn.scores, ".attn.pattern": attn.pattern}
        for name, part in places.items():
            is_hooked = part._forward_hooks or part._forward_pre_hooks
            if is_hooked or (name and type(part).forward is not nn.Identity.forward):
                raise ValueError(
                    f"dense_features does not run vision.blocks.{i}{name}, so it cannot follow the "
                    "hook or the module there"
                )


def similar(x: Tensor, y: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """The softmax of the scaled products of x and y, (B, H, T, D) -> (B, H, T, T)."""
    return (x @ y.transpose(-2, -1) * x.shape[-1] ** -0.5 + bias).softmax(-1)


def neighbours(seen: Seen, std: float = 5.0) -> Tensor:
    """Return a bias (T, T): a Gaussian of the distance between patches, and 0 for other tokens."""
    x, places = seen.x, seen.places
    rows, columns = (torch.arange(n, device=x.device, dtype=x.dtype) for n in seen.grid)
    points = torch.cartesian_prod(rows, columns).view(-1, 2)  # (P, 2)
    distance = (points[:, None] - points[None]).square().sum(-1)  # (P, P), squared
    bias = x.new_zeros(x.shape[1], x.shape[1])
    bias[places, places] = (-distance / (2 * std**2)).exp()
    return bias


def self_self(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    """The mean of GEM's q-q, k-k and v-v patterns. For each pattern, the vectors are scaled to unit
    length. Each unit vector is replaced by a weighted mean of all unit vectors, in which similar
    vectors have larger weights. The pattern is the softmax of the scaled cosines of these means."""
    # For each image: the mean norm of its token vectors, divided by the square root of D.
    sharpness = seen.x.norm(dim=-1).mean(1).view(-1, 1, 1, 1) * q.shape[-1] ** -0.5

    def near(one: Tensor) -> Tensor:
        return (one @ one.transpose(-2, -1) * sharpness).softmax(-1)

    units = [F.normalize(one, dim=-1) for one in (q, k, v)]
    patterns = [near(F.normalize(near(unit) @ unit, dim=-1)) for unit in units]
    return torch.stack(patterns).mean(0)


def proxyclip(features: Tensor, beta: float = 1.2, gamma: float = 3.0) -> Preset:
    """A preset that takes its attention pattern and its grid from another model's features.

    Lan et al. 2024, arXiv 2408.04883. Each image has its own mean of the cosines. The
    authors' code takes one mean for the batch, but each of their batches is a single image.

    Args:
        features: the same images' features from a model such as DINO, (B, C, rows, columns).
        beta: cosines below `beta` times their mean are ignored, except the largest of each patch.
        gamma: the remaining cosines are multiplied by `gamma` before the softmax.

    >>> from miniclip import CLIP
    >>> model, pixels = CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64)
    >>> dense_features(model, pixels, proxyclip(torch.rand(1, 16, 5, 6))).shape[:2]
    torch.Size([1, 30])
    """
    unit = F.normalize(features.flatten(2), dim=1)  # (B, C, P)
    cosines = unit.transpose(1, 2) @ unit  # (B, P, P)
    scores = (cosines - beta * cosines.mean((1, 2), keepdim=True)) * gamma
    # If all cosines are similar, every score is negative. The largest is kept, to avoid NaN.
    is_ignored = (scores < 0) & (scores < scores.amax(-1, keepdim=True))
    weights = scores.masked_fill(is_ignored, -torch.inf).softmax(-1)
    grid: tuple[int, int] = tuple(features.shape[2:])  # type: ignore[assignment]

    def pattern(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
        if len(v) != len(weights):
            raise ValueError(
                f"proxyclip has the features of {len(weights)} images, but dense_features got "
                f"{len(v)} images; expected the same images"
            )
        # Resize CLIP's values to the other model's grid. Resizing is linear, so a matrix can do it.
        own = torch.eye(seen.grid[0] * seen.grid[1], dtype=v.dtype, device=v.device)
        resized = F.interpolate(own.view(-1, 1, *seen.grid), grid, mode="bilinear").flatten(1)
        found = v.new_zeros(*weights.shape[:2], v.shape[2])  # (B, P, T)
        found[..., seen.places] = weights.to(v) @ resized.T
        return found[:, None]  # the same for every head

    return Preset(pattern, grid=grid)


PRESETS = {
    "clip": Preset(lambda q, k, v, seen: similar(q, k), residual=True, mlp=True),
    # Each token attends only to itself. The authors used the exact GELU and eps 1e-6. This code
    # uses the checkpoint's GELU and eps.
    "maskclip": Preset(lambda q, k, v, seen: torch.eye(q.shape[-2]).to(q), residual=True, mlp=True),
    "sclip": Preset(lambda q, k, v, seen: similar(q, q) + similar(k, k), residual=True, mlp=True),
    # This is only the second path of CLIP Surgery. The authors also subtract redundant features.
    "clip-surgery": Preset(lambda q, k, v, seen: similar(v, v), residual=True, depth=6),
    "gem": Preset(self_self, residual=True, depth=6),
    "clearclip": Preset(lambda q, k, v, seen: similar(q, q)),
    "naclip": Preset(lambda q, k, v, seen: similar(k, k, neighbours(seen))),
}
