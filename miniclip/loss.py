"""What CLIP is trained to do: figure 3 of the paper (Radford et al. 2021, arXiv 2103.00020).

Of a batch of images and captions, find which caption belongs to which image, and the other way.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.model import CLIP


def cross_entropy(logits: Tensor, is_true: Tensor) -> Tensor:
    """The mean over rows of minus the log-probability, which all true entries share equally."""
    target = is_true.to(logits.dtype)
    return F.cross_entropy(logits, target / target.sum(dim=1, keepdim=True))


def contrastive_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, is_true: Tensor | None = None
) -> Tensor:
    """The mean of two cross-entropies: over the captions for each image, and over the images.

    Embeddings are (B, E), of length 1; row i of both is a pair. `logit_scale` is a logarithm.
    `is_true` (B, B) says which caption j is true of which image i: the diagonal, unless given. In a
    row, all that is true shares the target (UniCL, Yang et al. 2022, arXiv 2204.03610).
    """
    logits = logit_scale.exp() * image_embeds @ text_embeds.T  # (B, B)
    if is_true is None:
        is_true = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return (cross_entropy(logits, is_true) + cross_entropy(logits.T, is_true.T)) / 2


@torch.no_grad()
def clamp_logit_scale(model: CLIP) -> None:
    """Keep a logit at most 100 times a cosine (section 2.5). Call it after each training step."""
    model.logit_scale.clamp_(max=math.log(100))
