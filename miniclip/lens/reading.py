"""Which tower reads an input, and where: the class token of an image, the end token of a text.

Wherever `model` is an argument, a CLIP or one of its towers will do. Of a CLIP, floats go to the
vision tower and ids to the text tower.
"""

from typing import Any

import torch
from torch import Tensor, nn

from miniclip.model import CLIP, TextTower, VisionTower

Tower = VisionTower | TextTower


def tower_for(model: CLIP | Tower, x: Tensor) -> Tower:
    """The model itself, or of a CLIP the tower that reads x: ids or pixels."""
    name = "vision" if x.is_floating_point() else "text"
    tower: Any = model if hasattr(model, "blocks") else getattr(model, name)
    return tower


def read_positions(tower: Tower, x: Tensor) -> Tensor:
    """Where the token that is read stands in each row of the batch, (B,)."""
    if eos_positions := getattr(tower, "eos_positions", None):
        return eos_positions(x)
    return torch.zeros(len(x), dtype=torch.long, device=x.device)


def take(tokens: Tensor, positions: Tensor) -> Tensor:
    """One token of each row: (B, T, ...) -> (B, ...)."""
    return tokens[torch.arange(len(tokens), device=tokens.device), positions]


def last_norm(tower: Tower) -> tuple[str, nn.LayerNorm]:
    """The LayerNorm before the projection, and its name."""
    name = "ln_post" if hasattr(tower, "ln_post") else "ln_final"
    return name, getattr(tower, name)


def patch_grid(tower: Any, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of a VisionTower's patches. They are the last tokens of an image."""
    rows, columns = (n // s for n, s in zip(pixels.shape[-2:], tower.patch_embed.stride))
    return rows, columns


def on_grid(model: CLIP | VisionTower, pixels: Tensor, tokens: Tensor) -> Tensor:
    """Numbers of an image's tokens as a map of its patches: (B, T) -> (B, rows, columns)."""
    rows, columns = patch_grid(tower_for(model, pixels), pixels)
    return tokens[:, -rows * columns :].unflatten(1, (rows, columns))
