"""Which tower reads an input, and where: the class token of an image, the end token of a text.

Wherever `model` is an argument, a CLIP or one of its towers will do. Of a CLIP, floats go to the
vision tower and ids to the text tower.
"""

import torch
from torch import Tensor, nn

from miniclip.follow import follow, patch_grid, patch_places, tower_for
from miniclip.model import CLIP, TextTower, VisionTower

Tower = VisionTower | TextTower


def pool(tower: Tower, stream: Tensor, x: Tensor) -> Tensor:
    """What a tower reads from a residual stream, (B, T, W) -> (B, W), if its input is x."""
    if isinstance(tower, TextTower):
        return tower.pool(stream, tower.eos_positions(x))
    return tower.pool(stream)


def read_positions(who: str, tower: Tower, x: Tensor) -> Tensor:
    """Where the token that is read stands in each row of the batch, (B,).

    Raises ValueError, with the name of the function `who`, for a fork that reads several tokens.
    """
    follow(who, tower, ("forward", "pool"))
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


def on_grid(model: CLIP | VisionTower, pixels: Tensor, tokens: Tensor) -> Tensor:
    """Numbers of an image's tokens as a map of its patches: (B, T) -> (B, rows, columns)."""
    tower = tower_for(model, pixels)
    return tokens[:, patch_places(tower, pixels)].unflatten(1, patch_grid(tower, pixels))
