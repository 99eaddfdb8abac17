"""SigLIP (Zhai et al. 2023, arXiv 2303.15343) as a fork of CLIP.

The fork differs from CLIP in five ways. An attention layer pools the patches; there is no class
token. The last token's output becomes the text's embedding. Text attention is not causal. Logits
have a bias. The loss is a sigmoid for each pair, not a softmax over a batch. The fork loads
transformers' checkpoints `google/siglip-*`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import CLIP, CLIPConfig, TextConfig, TextTower, VisionConfig, VisionTower
from miniclip.files.checks import check_tower
from miniclip.model import MLP


@dataclass(frozen=True)
class SiglipVisionConfig(VisionConfig):
    act: str = "gelu_pytorch_tanh"
    ln_eps: float = 1e-6
    patch_size: int = 16


@dataclass(frozen=True)
class SiglipTextConfig(TextConfig):
    width: int = 768
    heads: int | tuple[int, ...] = 12
    mlp_width: int | tuple[int, ...] = 3072
    act: str = "gelu_pytorch_tanh"
    ln_eps: float = 1e-6
    vocab_size: int = 32000
    context_length: int = 64

    def __post_init__(self) -> None:
        check_tower(self)  # no check of the end token, because the last token is pooled


@dataclass(frozen=True)
class SiglipConfig(CLIPConfig):
    tower_classes: ClassVar = {"vision": SiglipVisionConfig, "text": SiglipTextConfig}

    @classmethod
    def from_fields(cls, values: dict[str, Any]) -> "SiglipConfig":
        width = values["vision"].get("width", SiglipVisionConfig.width)
        return super().from_fields({"embed_dim": width} | values)


class SiglipVision(VisionTower):
    def __init__(self, config: VisionConfig, embed_dim: int | None) -> None:
        nn.Module.__init__(self)
        self.config = config
        width, size = config.width, config.patch_size
        self.patch_embed = nn.Conv2d(config.channels, width, size, stride=size)
        self.pos_embed = nn.Parameter(torch.randn(config.patches, width) * width**-0.5)
        self.blocks = self.make_blocks(config, causal=False)
        self.ln_post = nn.LayerNorm(width, eps=config.ln_eps)
        self.probe = nn.Parameter(torch.randn(1, 1, width))
        heads = width // (config.head_width or width // config.heads)  # before pruning
        self.pool_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.pool_ln = nn.LayerNorm(width, eps=config.ln_eps)
        self.pool_mlp = MLP(width, config.mlp_width, config.act)
        self.proj = nn.Identity()

    def embed_tokens(self, pixels: Tensor) -> Tensor:
        return self.patch_embed(pixels).flatten(2).transpose(1, 2) + self.pos_embed  # (B, P, W)

    def pool(self, x: Tensor) -> Tensor:
        x = self.ln_post(x)  # (B, P, W)
        x = self.pool_attn(self.probe.expand(len(x), -1, -1), x, x)[0]  # (B, 1, W)
        return (x + self.pool_mlp(self.pool_ln(x)))[:, 0]  # (B, W)


class SiglipText(TextTower):
    def __init__(self, config: TextConfig, embed_dim: int | None) -> None:
        super().__init__(config, embed_dim)
        self.blocks = self.make_blocks(config, causal=False)
        self.proj = nn.Linear(config.width, embed_dim)

    def eos_positions(self, ids: Tensor) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)


class Siglip(CLIP):
    vision_class, text_class, config_class = SiglipVision, SiglipText, SiglipConfig
    model_type = "siglip"
    tensor_names = {
        "logit_bias": "logit_bias",
        "vision.probe": "vision_model.head.probe",
        "vision.pool_attn.in_proj_weight": "vision_model.head.attention.in_proj_weight",
        "vision.pool_attn.in_proj_bias": "vision_model.head.attention.in_proj_bias",
        "vision.pool_attn.out_proj": "vision_model.head.attention.out_proj",
        "vision.pool_ln": "vision_model.head.layernorm",
        "vision.pool_mlp.fc1": "vision_model.head.mlp.fc1",
        "vision.pool_mlp.fc2": "vision_model.head.mlp.fc2",
        "text.proj": "text_model.head",
    }

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.logit_scale = nn.Parameter(torch.full((1,), 2.3026))  # ln(10), as in the paper
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0))

    def score(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        return super().score(image_embeds, text_embeds) + self.logit_bias  # (C, B)


def sigmoid_loss(
    model: Siglip, image_embeds: Tensor, text_embeds: Tensor, is_true: Tensor
) -> Tensor:
    """Sum -log sigmoid over an image's pairs, and average over images (the paper's Algorithm 1)."""
    logits = model.score(image_embeds, text_embeds).T  # (B, B)
    signs = 2 * is_true.to(logits) - 1  # 1 for a true pair, -1 for a false one
    return -F.logsigmoid(signs * logits).sum(dim=1).mean()
