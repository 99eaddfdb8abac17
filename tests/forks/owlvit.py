"""OWL-ViT (Minderer et al. 2022, arXiv 2205.06230) as a fork of CLIP.

The fork adds two output heads, which read the patches of the vision tower. For each patch, the
class head returns a logit for each text, and the box head returns a box. The box head predicts the
difference from a default box. The fork loads transformers' checkpoints `google/owlvit-*`.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import CLIP, CLIPConfig, TextConfig, VisionConfig
from miniclip.files.names import TRANSFORMERS


@dataclass(frozen=True)
class OwlTextConfig(TextConfig):
    context_length: int = 16


@dataclass(frozen=True)
class OwlVisionConfig(VisionConfig):
    image_size: int | tuple[int, int] = 768


@dataclass(frozen=True)
class OwlConfig(CLIPConfig):
    tower_classes: ClassVar = {"vision": OwlVisionConfig, "text": OwlTextConfig}


class ClassHead(nn.Module):
    """Compute logits (B, P, Q) from patches (B, P, W) and text embeddings (B, Q, E)."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, embed_dim)
        self.shift, self.scale = nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, patches: Tensor, texts: Tensor) -> Tensor:
        x = self.proj(patches)  # (B, P, E)
        x = x / (torch.linalg.norm(x, dim=-1, keepdim=True) + 1e-6)
        texts = texts / (torch.linalg.norm(texts, dim=-1, keepdim=True) + 1e-6)
        cosines = torch.einsum("...pd,...qd->...pq", x, texts)
        return (cosines + self.shift(patches)) * (F.elu(self.scale(patches)) + 1)


class BoxHead(nn.Module):
    """Map patches (B, P, W) to boxes (B, P, 4): centre x, centre y, width, height, from 0 to 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(width, n) for n in (width, width, 4))

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(patches)))))
        return (x + first_boxes(*grid).to(x)).sigmoid()


def first_boxes(rows: int, columns: int) -> Tensor:
    """Logits (P, 4) of the default boxes. Each box is as large as its patch, and its centre is the
    patch's lower right corner."""
    row_and_column = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # (P, 2)
    size = torch.tensor([columns, rows])
    centre = (row_and_column.flip(1) + 1) / size  # (P, 2), x and y
    boxes = torch.cat([centre, (1 / size).expand_as(centre)], dim=1)
    return torch.log(boxes + 1e-4) - torch.log1p(-boxes + 1e-4)


class Detections(NamedTuple):
    logits: Tensor  # (B, P, Q)
    boxes: Tensor  # (B, P, 4)


class OwlViT(CLIP):
    """`forward` is inherited from CLIP; `detect` returns logits and boxes."""

    config_class = OwlConfig
    model_type = "owlvit"
    tensor_names = {ours: f"owlvit.{theirs}" for ours, theirs in TRANSFORMERS.items()} | {
        "vision.ln_pre": "owlvit.vision_model.pre_layernorm",  # CLIP's name is "pre_layrnorm"
        "ln_patches": "layer_norm",
        "class_head.proj": "class_head.dense0",
        "class_head.shift": "class_head.logit_shift",
        "class_head.scale": "class_head.logit_scale",
        "box_head.fc1": "box_head.dense0",
        "box_head.fc2": "box_head.dense1",
        "box_head.fc3": "box_head.dense2",
    }

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        width = config.vision.width
        self.ln_patches = nn.LayerNorm(width, eps=config.vision.ln_eps)
        self.class_head = ClassHead(width, config.text.width)  # E = text width, as in transformers
        self.box_head = BoxHead(width)

    def detect(self, pixels: Tensor, ids: Tensor) -> Detections:
        """Look for Q texts in each of B images. `ids` (B * Q, T) is sorted by image."""
        x = self.vision.blocks(self.vision.embed_tokens(pixels))  # (B, 1 + P, W)
        x = self.vision.ln_post(x)
        patches = self.ln_patches(x[:, 1:] * x[:, :1])  # (B, P, W)
        texts = self.encode_text(ids)
        texts = texts / torch.linalg.norm(texts, dim=-1, keepdim=True)
        logits = self.class_head(patches, texts.unflatten(0, (len(pixels), -1)))  # (B, P, Q)
        return Detections(logits, self.box_head(patches, self.config.vision.grid))
