"""The loss of CLIP: figure 3 of the paper (Radford et al. 2021, arXiv 2103.00020)."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from miniclip.model import CLIP


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None = None,
    negative_embeds: Tensor | None = None,
    also: Tensor | None = None,
) -> Tensor:
    """Symmetric cross-entropy over the B x B matrix of an image batch and its captions.

    Embeddings are (B, E) and of length 1, row i of one belongs to row i of the other;
    `logit_scale` is a logarithm. With `labels` (B,), pairs of equal label count as positives of
    each other and share the target, instead of being pushed apart: where a batch is many times
    larger than the number of classes, most of its "negatives" are none (UniCL, Yang et al. 2022,
    arXiv 2204.03610). `also` (B, K) holds the labels of K more captions that are true of each
    image: "a dog" is true of a Chihuahua too. This is not symmetric ("a Chihuahua" is false of
    another dog), so each direction of the loss shares out its own target.

    `negative_embeds` (B, E) are false captions, row i of image i, such as the true ones with two
    words swapped: the hard negatives of NegCLIP (Yuksekgonul et al. 2022, arXiv 2210.01936). There
    they are B more columns of the matrix, where an image's own false caption is one of 2 B; here
    each image chooses between the true and the false one alone, by the logistic loss.
    """
    logits = logit_scale.exp() * image_embeds @ text_embeds.T  # (B, B)
    if labels is None:
        labels = torch.arange(len(logits), device=logits.device)
    of_image = labels[:, None] if also is None else torch.cat([labels[:, None], also], dim=1)
    is_true = (of_image[:, :, None] == labels).any(dim=1).to(logits.dtype)  # of image i, caption j
    loss = (soft_cross_entropy(logits, is_true) + soft_cross_entropy(logits.T, is_true.T)) / 2
    if negative_embeds is None:
        return loss
    wrong = logit_scale.exp() * (image_embeds * negative_embeds).sum(dim=1)  # (B,)
    return loss + F.softplus(wrong - logits.diagonal()).mean()


def soft_cross_entropy(logits: Tensor, is_true: Tensor) -> Tensor:
    """Cross-entropy where each row's target is shared equally by all that is true, (B, B) both."""
    return F.cross_entropy(logits, is_true / is_true.sum(dim=1, keepdim=True))


@torch.no_grad()
def clamp_logit_scale(model: CLIP) -> None:
    """Keep logits at most 100 times a cosine (section 2.5 of the paper). Call after each step."""
    model.logit_scale.clamp_(max=math.log(100))


class _Gather(torch.autograd.Function):
    """All processes' rows, in the order of their ranks. Backwards, every process's gradient of a
    row flows home to the process it came from."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        # A copy, for autograd may have handed the same tensor to another operation.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """(B, ...) of each of N processes -> (N B, ...), with gradient; x itself where there is one.

    Every process then computes the same loss over the whole batch. A backward pass leaves N times
    the gradient of that loss, spread over the processes: `average_gradients` makes it the gradient.
    """
    return _Gather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def average_gradients(model: CLIP) -> None:
    """The mean over processes of every gradient, in place. Call after the backward pass."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def backward(
    encode_image: Callable[[Tensor], Tensor],
    encode_text: Callable[[Tensor], Tensor],
    pixels: Tensor,
    ids: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    chunk: int = 0,
) -> Tensor:
    """Embed a batch, apply `loss` to its (image, text) embeddings, and backpropagate.

    With a `chunk`, in two passes whose memory is that of `chunk` rows: all embeddings without a
    graph, the gradient of the loss with respect to them, then each chunk once more with a graph,
    from its embeddings back (GradCache, Gao et al. 2021, arXiv 2101.06983). The gradients are
    those of one pass, dropped patches included.
    """
    if not chunk:
        value = loss(encode_image(pixels), encode_text(ids))
        value.backward()
        return value.detach()

    parts = [(encode_image, part) for part in pixels.split(chunk)]
    image_chunks = len(parts)
    parts += [(encode_text, part) for part in ids.split(chunk)]
    seeds = torch.randint(2**62, (len(parts),)).tolist()  # the two passes draw the same patches
    embeds = []
    for (encode, part), seed in zip(parts, seeds, strict=True):
        torch.manual_seed(seed)
        with torch.no_grad():
            embeds.append(encode(part))
    leaves = [
        torch.cat(half).requires_grad_() for half in (embeds[:image_chunks], embeds[image_chunks:])
    ]
    value = loss(*leaves)
    value.backward()
    gradients = [
        part for leaf in leaves if leaf.grad is not None for part in leaf.grad.split(chunk)
    ]
    for (encode, part), seed, gradient in zip(parts, seeds, gradients, strict=True):
        torch.manual_seed(seed)
        encode(part).backward(gradient)
    return value.detach()
