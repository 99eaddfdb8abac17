"""The loss of a batch: over several processes, with false captions, and in chunks."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.loss import contrastive_loss
from miniclip.model import CLIP, unit_norm


class Objective(nn.Module):
    """The model and the loss as one module, so that DistributedDataParallel can wrap both."""

    def __init__(self, model: CLIP, loss: Any = None, precision: str = "float32") -> None:
        super().__init__()
        self.model, self.loss = model, loss  # a loss with parameters is trained too
        self.cast: Any = nullcontext()
        if precision == "bfloat16":
            self.cast = torch.autocast(model.logit_scale.device.type, torch.bfloat16)

    def forward(self, pixels: Tensor, ids: Tensor, end: Callable[[Tensor, Tensor], Any]) -> Any:
        """Return `end(image_embeds, text_embeds)`, with unit vectors in the weights' dtype."""
        with self.cast:
            embeds = self.model.encode_image(pixels), self.model.encode_text(ids)
        return end(*(unit_norm(x.to(self.model.logit_scale.dtype)) for x in embeds))


class _Gather(torch.autograd.Function):
    """Gather the rows of all processes, in the order of the ranks. In the backward pass, the
    gradient of a row is summed over all processes, and the row's own process gets the sum."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        # `all_reduce` changes its input. Autograd may still use `gradient`, so this is a copy.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor, batch: int | None = None) -> Tensor:
    """Gather the rows of all N processes, with gradient. A single process gets `x` back.

    Row i of process r becomes row i * N + r, so the order of the batch does not depend on N. Each
    process computes the same loss over the whole batch. So the sum of the processes' gradients is
    N times the loss's gradient. DistributedDataParallel divides this sum by N.

    Args:
        x: the rows of this process, (B, ...).
        batch: the number of rows over all processes; by default N B.

    Returns:
        The rows of all processes, (batch, ...), the same in each process.
    """
    if not dist.is_initialized() or (world := dist.get_world_size()) == 1:
        return x
    batch = batch or world * len(x)
    missing = -(-batch // world) - len(x)  # 1 if another process has one row more, else 0
    rows = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
    return _Gather.apply(rows).unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[:batch]


Loss = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""(model, image_embeds (B, E), text_embeds (B, E), is_true (B, B)) -> the loss of a batch.

Embeddings are unit vectors. `is_true[i, j]` says whether caption j is true of image i."""


class SigmoidLoss(nn.Module):
    """SigLIP's loss: classify each pair as true or false (Zhai et al. 2023, arXiv 2303.15343).

    The bias is trained with the model. A checkpoint does not need the bias, because a constant
    added to all logits changes neither their softmax nor their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(
        self, model: CLIP, image_embeds: Tensor, text_embeds: Tensor, is_true: Tensor
    ) -> Tensor:
        """Return the loss, summed over captions and averaged over images. Shapes: see `Loss`."""
        logits = model.logit_scale.exp() * image_embeds @ text_embeds.T + self.bias  # (B, B)
        signs = 2 * is_true.to(logits) - 1  # 1 for a true pair, -1 for a false one
        return -F.logsigmoid(signs * logits).sum(dim=1).mean()


def batch_loss(
    logit_scale: Tensor,
    labels: Tensor,
    also: Tensor,
    image_embeds: Tensor,
    text_embeds: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    batch: int | None = None,
) -> Tensor:
    """Compute the loss of a batch over all processes.

    A false caption may be the true caption with two words swapped (NegCLIP, Yuksekgonul et al.
    2022, arXiv 2210.01936). NegCLIP compares every image with every false caption. Here a logistic
    loss compares each image only with its own true caption and its own false caption.

    Args:
        logit_scale: the model's logit scale, a logarithm.
        labels: (B,). If two pairs have the same label, each caption is true of both images.
        also: (B, K), the labels of all captions of each image. So "a dog" can be true of a
            Chihuahua while "a Chihuahua" is false of another dog.
        image_embeds: unit vectors (B, E).
        text_embeds: unit vectors of the captions (B, E), or (2 B, E) with the false captions last.
        loss: a function of (image_embeds, text_embeds, is_true), instead of `contrastive_loss`.
        batch: the number of pairs over all processes; by default B times the number of processes.
    """
    captions, *negatives = (gather(part, batch) for part in text_embeds.split(len(also)))
    image_embeds, labels, also = (gather(x, batch) for x in (image_embeds, labels, also))
    of_image = torch.cat([labels[:, None], also], dim=1)  # (B, 1 + K)
    is_true = (of_image[:, :, None] == labels).any(dim=1)  # (B, B)
    if loss is None:
        value = contrastive_loss(image_embeds, captions, logit_scale, is_true)
    else:
        value = loss(image_embeds, captions, is_true)
    for negative in negatives:
        scale = logit_scale.exp()
        wrong, right = (scale * (image_embeds * x).sum(dim=1) for x in (negative, captions))  # (B,)
        value = value + F.softplus(wrong - right).mean()
    return value


def backward(
    objective: nn.Module,
    pixels: Tensor,
    ids: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    chunk: int = 0,
) -> Tensor:
    """Embed a batch, compute its loss, and backpropagate.

    With `chunk` there are two passes (GradCache, Gao et al. 2021, arXiv 2101.06983). The first pass
    embeds all chunks without a graph, and computes the embeddings' gradients. The second pass
    embeds each chunk with a graph, and backpropagates. The gradients are the same as in one pass.

    Args:
        objective: an `Objective`, or a wrapper of an `Objective`.
        pixels: (B, 3, S, S).
        ids: (B, T), or (2 B, T) with the false captions last.
        loss: a function of (image_embeds, text_embeds).
        chunk: the number of pairs in memory at once; 0 means all.

    Returns:
        The loss, without a graph.
    """
    if not chunk:
        value = objective(pixels, ids, loss)
        value.backward()
        return value.detach()

    def split(texts: Tensor) -> list[Tensor]:
        by_kind = texts.unflatten(0, (-1, len(pixels))).split(chunk, dim=1)
        return [part.flatten(0, 1) for part in by_kind]

    parts = [*zip(pixels.split(chunk), split(ids), strict=True)]
    seeds = torch.randint(2**62, (len(parts),)).tolist()  # so both passes drop the same patches
    images, texts = [], []
    for part, seed in zip(parts, seeds, strict=True):
        torch.manual_seed(seed)
        with torch.no_grad():
            image_embeds, text_embeds = objective(*part, lambda *embeds: embeds)
        images.append(image_embeds)
        texts.append(text_embeds.unflatten(0, (-1, len(image_embeds))))
    leaves = [x.requires_grad_() for x in (torch.cat(images), torch.cat(texts, 1).flatten(0, 1))]
    value = loss(*leaves)
    of_images, of_texts = torch.autograd.grad(value, leaves, retain_graph=True)
    gradients = [*zip(of_images.split(chunk), split(of_texts), strict=True)]
    for part, seed, gradient in zip(parts, seeds, gradients, strict=True):
        is_last = gradient is gradients[-1]
        end = partial(_chain, gradient, value if is_last else 0.0)
        torch.manual_seed(seed)
        # Gradients add up over the chunks. In the last chunk's backward pass,
        # DistributedDataParallel averages these sums over all processes.
        with getattr(objective, "no_sync", nullcontext)() if not is_last else nullcontext():
            objective(*part, end).backward()
    return value.detach()


def _chain(
    gradient: tuple[Tensor, Tensor], value: Any, image_embeds: Tensor, text_embeds: Tensor
) -> Tensor:
    """Return a sum to backpropagate in place of the loss. The gradients of this sum with respect to
    the embeddings are `gradient`. They train the towers. The gradients of `value` train the other
    parameters, such as the logit scale."""
    return value + (image_embeds * gradient[0]).sum() + (text_embeds * gradient[1]).sum()
