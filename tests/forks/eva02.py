"""The block of EVA-02 (Fang et al. 2023, arXiv 2303.11331) in the vision tower of a CLIP.

It differs from CLIP's block in three ways. Rotary positions (Su et al. 2021, arXiv 2104.09864)
rotate queries and keys by angles that grow with a patch's row and column. Keys have no bias. The
MLP is gated (SwiGLU, Shazeer 2020, arXiv 2002.05202) and has a LayerNorm before its last matrix.
"""

import torch
from torch import Tensor, nn

from miniclip import CLIP, VisionConfig, VisionTower
from miniclip.model import MLP, Attention, Block

TRAINED_GRID = 16  # patches along each side in pretraining; other grids are scaled to this size


class Eva02Attention(Attention):
    """The sites `q` and `k` come before the rotation; `scores` and `pattern` come after it."""

    grid: tuple[int, int]  # Eva02Block sets it

    def __init__(self, width: int, heads: int, causal: bool, head_width: int | None = None) -> None:
        super().__init__(width, heads, causal, head_width)
        self.k_proj = nn.Linear(width, self.q_proj.out_features, bias=False)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().qkv(x)  # (B, H, T, D)
        return rotated(q, self.grid), rotated(k, self.grid), v


def rotated(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rotate each pair of numbers of each patch in x (B, H, T, D), but not the class token."""
    count = grid[0] * grid[1]
    angle = angles(grid, x.shape[-1], like=x).repeat_interleave(2, dim=1)  # (P, D)
    patches = x[:, :, -count:]
    quarter_turn = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    turned = (patches * angle.cos() + quarter_turn * angle.sin()).to(x.dtype)
    return torch.cat([x[:, :, :-count], turned], dim=2)


def angles(grid: tuple[int, int], head_width: int, like: Tensor) -> Tensor:
    """Angles (P, D / 2). The first half depends on the patch's row, the second on its column."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    speeds = 10000 ** -torch.linspace(0, 1, head_width // 4 + 1, dtype=dtype, device=like.device)
    places = (torch.arange(n, device=like.device) / n * TRAINED_GRID for n in grid)
    row_and_column = torch.cartesian_prod(*places)  # (P, 2)
    return (row_and_column[:, :, None] * speeds[:-1]).flatten(1)


class Eva02MLP(MLP):
    """Compute fc2(norm(silu(fc1 x) * up x))."""

    def __init__(self, width: int, mlp_width: int, act: str) -> None:
        super().__init__(width, mlp_width, act)
        self.act = nn.SiLU()
        self.up = nn.Linear(width, mlp_width)
        self.norm = nn.LayerNorm(mlp_width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.act(self.fc1(x)) * self.up(x)))


class Eva02Block(Block):
    attention_class, mlp_class = Eva02Attention, Eva02MLP

    def __init__(self, config: VisionConfig, layer: int, causal: bool) -> None:
        super().__init__(config, layer, causal)
        self.attn.grid = config.grid


class Eva02Vision(VisionTower):
    block_class = Eva02Block


class Eva02CLIP(CLIP):
    vision_class = Eva02Vision
    tensor_names = {
        "vision.blocks.{}.mlp.up": "vision_model.encoder.layers.{}.mlp.up",
        "vision.blocks.{}.mlp.norm": "vision_model.encoder.layers.{}.mlp.norm",
    }
