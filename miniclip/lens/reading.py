"""Find the tower for an input, and the token whose output becomes the embedding.

This token is the class token of an image, or the end token of a text. `model` may be a CLIP or a
tower. A CLIP sends floats to its vision tower and ids to its text tower.
"""

import torch
from torch import Tensor, nn

from miniclip.follow import follow, patch_grid, patch_places, tower_for
from miniclip.model import CLIP, TextTower, VisionTower

Tower = VisionTower | TextTower


def read_positions(who: str, tower: Tower, x: Tensor) -> Tensor:
    """The position of the class or end token in each row of x, (B,).

    Raises ValueError for a fork with its own pooling. The error names the function `who`.
    """
    follow(who, tower, ("forward", "pool"))
    if eos_positions := getattr(tower, "eos_positions", None):
        return eos_positions(x)
    return torch.zeros(len(x), dtype=torch.long, device=x.device)


def take(tokens: Tensor, positions: Tensor) -> Tensor:
    """Take one token of each row: (B, T, ...) -> (B, ...)."""
    return tokens[torch.arange(len(tokens), device=tokens.device), positions]


def last_norm(tower: Tower) -> tuple[str, nn.LayerNorm]:
    """Return the name and the module of the LayerNorm before the projection."""
    name = "ln_post" if hasattr(tower, "ln_post") else "ln_final"
    return name, getattr(tower, name)


def on_grid(model: CLIP | VisionTower, pixels: Tensor, tokens: Tensor) -> Tensor:
    """Arrange the numbers of the patch tokens as a map: (B, T) -> (B, rows, columns)."""
    tower = tower_for(model, pixels)
    return tokens[:, patch_places(tower, pixels)].unflatten(1, patch_grid(tower, pixels))
