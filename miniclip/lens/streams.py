"""The residual stream after each layer: the logit lens, and intermediate features."""

from collections.abc import Callable

import torch
from torch import Tensor

from miniclip.follow import follow, patch_grid, patch_places, tower_for
from miniclip.lens.decompose import check_sum, read_rows
from miniclip.lens.reading import Tower, last_norm, read_positions, take
from miniclip.model import CLIP, TextTower
from miniclip.sites import norm_scale


@torch.no_grad()
def logit_lens(model: CLIP | Tower, x: Tensor, ln: str = "recompute") -> Tensor:
    """The embedding that the tower would give if it ended after 0, 1, ... or all L blocks.

    Returns (B, 1 + L, E), with the tower's output last. nostalgebraist 2020, "interpreting GPT: the
    logit lens".

    Args:
        x: pixels or ids.
        ln: which stream gives the divisor of the last LayerNorm. "recompute": the stream after the
            same block, as if the tower ended there. "final": the stream after the last block.
            With "final", the difference of two entries is what the blocks between them add, as in
            `decompose`.
    Raises:
        ValueError: with "final", if the last entry is not the tower's output, for instance because
            a hook edits the last LayerNorm.

    >>> from miniclip import CLIP
    >>> logit_lens(CLIP.from_pretrained("shapes"), torch.ones(2, 3, 64, 64)).shape
    torch.Size([2, 5, 128])
    """
    if ln not in ("recompute", "final"):
        raise ValueError(f"ln is {ln!r}; expected 'recompute' or 'final'")
    tower = tower_for(model, x)
    follow("logit_lens", tower, ("forward",))
    if ln == "recompute":
        eos = (tower.eos_positions(x),) if isinstance(tower, TextTower) else ()
        return tower.proj(_after_each(tower, x, lambda stream: tower.pool(stream, *eos))[0])
    positions = read_positions("logit_lens", tower, x)
    streams, embedding = _after_each(tower, x, lambda stream: take(stream, positions))
    _, norm = last_norm(tower)
    centred = streams - streams.mean(-1, keepdim=True)
    found = tower.proj(centred / norm_scale(norm, streams[:, -1:]) * norm.weight + norm.bias)
    check_sum({"all": found[:, -1]}, embedding)
    return found


def _after_each(tower: Tower, x: Tensor, read: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Apply `read` to the stream before the first block and after each block: (B, 1 + L, W).
    Also return the tower's output, (B, E)."""
    rows, embedding = read_rows(tower, x, {"blocks.*": read}, read)
    return torch.stack(list(rows.values()), dim=1), embedding


def forward_intermediates(
    model: CLIP | Tower,
    x: Tensor,
    indices: int | list[int] | tuple[int, ...] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str | None = None,
    intermediates_only: bool = False,
) -> list | tuple[Tensor, list]:
    """The residual stream after chosen blocks, with gradients, like timm's `forward_intermediates`.

    For the text tower, diffusers' clip skip n is `indices=[-1 - n], norm=True`. In most user
    interfaces, this is clip skip n + 1. SDXL uses `indices=[-2]` without `norm`.

    Args:
        indices: a list of block numbers, or one number n for the last n blocks. None: all blocks.
        return_prefix_tokens: for images, pair each map with the tokens before the patches.
        norm: apply the last LayerNorm.
        stop_early: do not run the blocks after the last chosen block.
        output_fmt: "NCHW" (B, W, rows, columns), the default for images, or "NLC" (B, T, W).
        intermediates_only: return only the list of streams.
    Returns:
        A pair: the last LayerNorm's output, and the list of streams. The input of this LayerNorm is
        the stream after the last block or, with `stop_early`, after the last chosen block.

    >>> from miniclip import CLIP
    >>> vision, pixels = CLIP.from_pretrained("shapes").vision, torch.zeros(1, 3, 64, 64)
    >>> final, maps = forward_intermediates(vision, pixels, indices=[1, -1])
    >>> final.shape, [m.shape for m in maps] == [(1, 96, 8, 8)] * 2
    (torch.Size([1, 65, 96]), True)
    """
    tower = tower_for(model, x)
    follow("forward_intermediates", tower, ("forward",))
    is_image = hasattr(tower, "patch_embed")
    output_fmt = output_fmt or ("NCHW" if is_image else "NLC")
    if output_fmt not in (("NCHW", "NLC") if is_image else ("NLC",)):
        expected = "'NCHW' or 'NLC'" if is_image else "'NLC' (a text has no rows and columns)"
        raise ValueError(f"output_fmt is {output_fmt!r}; expected {expected}")
    if return_prefix_tokens and not is_image:
        raise ValueError("return_prefix_tokens is for images; a text has no prefix tokens")
    chosen = block_numbers(indices, len(tower.blocks))
    kept, tokens = [], tower.embed_tokens(x)
    _, last_ln = last_norm(tower)
    for i, block in enumerate(tower.blocks):
        tokens = block(tokens)
        if i in chosen:
            kept.append(last_ln(tokens) if norm else tokens)
        if stop_early and i == max(chosen):
            break
    if is_image:
        places = patch_places(tower, x)
        prefixes = [one[:, : places.start] for one in kept]
        kept = [one[:, places] for one in kept]  # (B, P, W)
        if output_fmt == "NCHW":
            kept = [one.transpose(1, 2).unflatten(2, patch_grid(tower, x)) for one in kept]
        if return_prefix_tokens:
            kept = list(zip(kept, prefixes))
    return kept if intermediates_only else (last_ln(tokens), kept)


def block_numbers(indices: int | list[int] | tuple[int, ...] | None, layers: int) -> set[int]:
    """Turn `indices` into a set of block numbers from 0 to `layers` - 1.

    >>> block_numbers(2, 12), block_numbers([0, -1], 12)
    ({10, 11}, {0, 11})
    """
    if indices is None or isinstance(indices, int):
        count = layers if indices is None else indices
        if 0 < count <= layers:
            return set(range(layers - count, layers))
    elif indices and all(-layers <= i < layers for i in indices):
        return {i % layers for i in indices}
    raise ValueError(
        f"indices is {indices!r}; expected a number of blocks from 1 to {layers}, or a list of "
        f"block numbers from {-layers} to {layers - 1}"
    )
