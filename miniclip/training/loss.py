"""The loss of CLIP: figure 3 of the paper (Radford et al. 2021, arXiv 2103.00020)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.model import CLIP


def contrastive_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Symmetric cross-entropy over the B x B matrix of an image batch and its captions.

    Embeddings are (B, E) and of length 1, row i of one belongs to row i of the other;
    `logit_scale` is a logarithm. With `labels` (B,), pairs of equal label count as positives of
    each other and share the target, instead of being pushed apart: where a batch is many times
    larger than the number of classes, most of its "negatives" are none (UniCL, Yang et al. 2022,
    arXiv 2204.03610).
    """
    logits = logit_scale.exp() * image_embeds @ text_embeds.T  # (B, B)
    if labels is None:
        labels = torch.arange(len(logits), device=logits.device)
    same = (labels[:, None] == labels[None, :]).to(logits.dtype)
    target = same / same.sum(dim=1)  # symmetric, so that it serves both directions
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def clamp_logit_scale(model: CLIP) -> None:
    """Keep logits at most 100 times a cosine (section 2.5 of the paper). Call after each step."""
    model.logit_scale.clamp_(max=math.log(100))
