"""The training loss of CLIP: figure 3 of the paper (Radford et al. 2021, arXiv 2103.00020).

In a batch, CLIP learns to find the caption of each image and the image of each caption.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.model import CLIP


def cross_entropy(logits: Tensor, is_true: Tensor) -> Tensor:
    """The negative log-probability of the true entries, averaged in each row, then over rows."""
    target = is_true.to(logits.dtype)
    return F.cross_entropy(logits, target / target.sum(dim=1, keepdim=True))


def contrastive_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, is_true: Tensor | None = None
) -> Tensor:
    """The mean of two cross-entropies: find each image's caption, and find each caption's image.

    Embeddings are (B, E) and have length 1. Image i and caption i are a pair. `logit_scale` is a
    logarithm. `is_true` (B, B) is True at [i, i], and at [i, j] if caption j describes image i.
    Default: only at [i, i]. If an image has k true captions, each has the target 1 / k (UniCL, Yang
    et al. 2022, arXiv 2204.03610).
    """
    logits = logit_scale.exp() * image_embeds @ text_embeds.T  # (B, B)
    if is_true is None:
        is_true = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return (cross_entropy(logits, is_true) + cross_entropy(logits.T, is_true.T)) / 2


@torch.no_grad()
def clamp_logit_scale(model: CLIP) -> None:
    """Limit exp(logit_scale) to 100 (paper, section 2.5). Call it after each training step."""
    model.logit_scale.clamp_(max=math.log(100))
