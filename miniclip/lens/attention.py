"""Attention maps, rollout, gradient-weighted relevance, and Grad-CAM."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from miniclip.follow import follow, patch_places, tower_for
from miniclip.lens.reading import Tower, read_positions, take
from miniclip.model import CLIP
from miniclip.sites import cache


@torch.no_grad()
def attention_maps(model: CLIP | Tower, x: Tensor) -> list[Tensor]:
    """The attention pattern of every block, (B, H, T, T): head, query token, key token.

    Raises ValueError if a fork's attention does not use the site `pattern`.

    >>> from miniclip import CLIP
    >>> maps = attention_maps(CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64))
    >>> len(maps), maps[0].shape
    (4, torch.Size([1, 3, 65, 65]))
    """
    tower = tower_for(model, x)
    with cache(tower, "blocks.*.attn.pattern") as acts:
        tower(x)
    check_patterns(acts, tower.blocks)
    return list(acts.values())


def check_patterns(acts: dict[str, Tensor], *blocks: nn.Sequential) -> None:
    """Raise ValueError unless every block has run its site `attn.pattern`."""
    if len(acts) != sum(map(len, blocks)):
        silent = [type(b.attn).__name__ for some in blocks for b in some]
        raise ValueError(
            f"only {len(acts)} of {len(silent)} blocks use the site attn.pattern; the other blocks "
            f"compute the pattern elsewhere. Attention classes: {', '.join(dict.fromkeys(silent))}"
        )


@torch.no_grad()
def rollout(model: CLIP | Tower, x: Tensor) -> Tensor:
    """Estimate from the patterns how much of each token reaches the class or end token.

    A block's matrix is the mean of two matrices: its heads' mean pattern, and the identity for
    the residual connection. The matrices of all blocks are multiplied (Abnar and Zuidema 2020,
    arXiv 2005.00928). Returns (B, T). Each row sums to 1.

    >>> from miniclip import CLIP
    >>> rollout(CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 65])
    """
    tower = tower_for(model, x)
    follow("rollout", tower, block=("forward",))
    maps = attention_maps(tower, x)
    paths = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=x.device)  # (T, T)
    for pattern in maps:
        if pattern.shape[1]:  # a layer without heads does not mix tokens
            paths = (pattern.mean(1) @ paths + paths) / 2  # (B, T, T)
    return take(paths.expand(len(x), -1, -1), read_positions("rollout", tower, x))


class Relevance(NamedTuple):
    """The relevance of tokens, for B pairs. It is initially 1 for class and end tokens, else 0."""

    image: Tensor  # (B, 1 + R + P)
    text: Tensor  # (B, T)


def relevance(model: CLIP, pixels: Tensor, ids: Tensor, *, start: int = 0) -> Relevance:
    """Attention weighted by its gradient, for B pairs of an image and a text, in both towers.

    Each head's pattern is multiplied by the gradient of the pair's logit. Negative products become
    0. The products are averaged over the heads and accumulated over the blocks (Chefer et al. 2021,
    "Generic Attention-model Explainability", arXiv 2103.15679, equations 5 and 6).

    Args:
        start: the first block that is used. The paper starts at 0. The authors' notebook for CLIP
            starts at -1, the last block.

    >>> import miniclip
    >>> model, tokenizer, _ = miniclip.load("shapes")
    >>> relevance(model, torch.zeros(1, 3, 64, 64), tokenizer(["a red circle"])).image.shape
    torch.Size([1, 65])
    """
    check_pairs(pixels, ids)
    for tower in (model.vision, model.text):
        follow("relevance", tower, ("forward", "pool"), block=("forward",))
    acts, slopes = pair_gradients(model, pixels, ids, "*.blocks.*.attn.pattern")
    check_patterns(acts, model.vision.blocks, model.text.blocks)

    def accumulate(tower: str, x: Tensor) -> Tensor:
        weighted = [
            (slope * pattern).clamp(min=0).sum(1) / max(pattern.shape[1], 1)  # (B, T, T)
            for slope, (name, pattern) in zip(slopes, acts.items())
            if name.startswith(tower)
        ]
        T, like = weighted[0].shape[-1], weighted[0]
        paths = torch.eye(T, dtype=like.dtype, device=like.device)  # (T, T)
        for one in weighted[start:]:
            paths = paths + one @ paths  # (B, T, T)
        paths = paths.expand(len(x), T, T)
        return take(paths, read_positions("relevance", getattr(model, tower), x)).detach()

    return Relevance(accumulate("vision", pixels), accumulate("text", ids))


def check_pairs(pixels: Tensor, ids: Tensor) -> None:
    """Raise ValueError unless there are as many images as texts."""
    if len(pixels) != len(ids):
        raise ValueError(
            f"{len(pixels)} images and {len(ids)} texts; expected pairs. For several texts of one "
            "image, repeat the image: pixels.expand(len(ids), -1, -1, -1)"
        )


def pair_gradients(
    model: CLIP, pixels: Tensor, ids: Tensor, *sites: str
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """The tensors at sites, and the gradients of B pairs' logits with respect to these tensors."""
    # The caller may have turned gradients off. The inputs are copied, because autograd cannot use
    # tensors from inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        with cache(model, *sites, grad=True) as acts:
            logits = model(pixels.clone(), ids.clone()).logits_per_image.diagonal()  # (B,)
        return acts, torch.autograd.grad(logits.sum(), list(acts.values())) if acts else ()


def gradcam(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """Grad-CAM of B pairs, at the input of attention in the last block: (B, T).

    A channel's weight is its mean gradient over the patches. For each token, the weighted channels
    are added. Negative sums become 0 (Selvaraju et al. 2017, arXiv 1610.02391, as in
    pytorch-grad-cam for ViTs).

    >>> import miniclip
    >>> model, tokenizer, _ = miniclip.load("shapes")
    >>> gradcam(model, torch.zeros(1, 3, 64, 64), tokenizer(["a red circle"])).shape
    torch.Size([1, 65])
    """
    check_pairs(pixels, ids)
    follow("gradcam", model.vision, block=("forward",))
    site = f"vision.blocks.{len(model.vision.blocks) - 1}.ln_1"
    acts, (slope,) = pair_gradients(model, pixels, ids, site)  # (B, T, W)
    weights = slope[:, patch_places(model.vision, pixels)].mean(1, keepdim=True)  # (B, 1, W)
    return (weights * acts[site]).sum(-1).clamp(min=0).detach()
