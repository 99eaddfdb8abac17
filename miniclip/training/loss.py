"""The loss over several processes, with false captions, and in chunks of a batch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from miniclip.loss import contrastive_loss
from miniclip.model import CLIP


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


Loss = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""(model, image_embeds (B, E), text_embeds (B, E), is_true (B, B)) -> the loss of a batch.

Embeddings have length 1, and `is_true` says which caption j is true of which image i."""


def batch_loss(
    logit_scale: Tensor,
    labels: Tensor,
    also: Tensor,
    image_embeds: Tensor,
    text_embeds: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The loss of a batch over all processes.

    Args:
        labels: (B,), equal for pairs that are true of each other.
        also: (B, K), the labels of K more captions that are true of each image: "a dog" is true of
            a Chihuahua, and "a Chihuahua" is false of another dog.
        image_embeds: (B, E), of length 1.
        text_embeds: (B, E) captions, or (2 B, E) with a false caption of each image after them,
            such as the true one with two words swapped (NegCLIP, Yuksekgonul et al. 2022, arXiv
            2210.01936). NegCLIP makes false captions B more columns of the matrix. Here each
            image chooses between its true and its false caption alone, by the logistic loss.
        loss: of (image_embeds, captions, is_true), in place of `contrastive_loss`.
    """
    image_embeds, labels = gather(image_embeds), gather(labels)
    captions, *negatives = (gather(part) for part in text_embeds.split(len(also)))
    of_image = torch.cat([labels[:, None], gather(also)], dim=1)  # (B, 1 + K)
    is_true = (of_image[:, :, None] == labels).any(dim=1)  # (B, B): of image i, caption j
    if loss is None:
        value = contrastive_loss(image_embeds, captions, logit_scale, is_true)
    else:
        value = loss(image_embeds, captions, is_true)
    for negative in negatives:
        scale = logit_scale.exp()
        wrong, right = (scale * (image_embeds * x).sum(dim=1) for x in (negative, captions))  # (B,)
        value = value + F.softplus(wrong - right).mean()
    return value


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
