"""What CLIP is trained to do: figure 3 of the paper (Radford et al. 2021, arXiv 2103.00020).

For each image of a batch find its caption, and for each caption its image.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.model import CLIP


def cross_entropy(logits: Tensor, is_true: Tensor) -> Tensor:
    """Minus the log-probability of the true entries: their mean in a row, then over rows."""
    target = is_true.to(logits.dtype)
    return F.cross_entropy(logits, target / target.sum(dim=1, keepdim=True))


def contrastive_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, is_true: Tensor | None = None
) -> Tensor:
    """The mean of two cross-entropies: the captions of each image, and the images of each caption.

    Embeddings are (B, E) and have length 1. Image i and caption i are a pair. `logit_scale` is a
    logarithm. If `is_true` (B, B) is given, caption j is true of image i where is_true[i, j], which
    holds for each pair. k true captions of an image get a target of 1 / k each (UniCL, Yang et al.
    2022, arXiv 2204.03610).
    """
    logits = logit_scale.exp() * image_embeds @ text_embeds.T  # (B, B)
    if is_true is None:
        is_true = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return (cross_entropy(logits, is_true) + cross_entropy(logits.T, is_true.T)) / 2


@torch.no_grad()
def clamp_logit_scale(model: CLIP) -> None:
    """Keep exp(logit_scale) at most 100 (section 2.5). Call it after each training step."""
    model.logit_scale.clamp_(max=math.log(100))
