"""The loss over several processes, with false captions, and in chunks of a batch."""

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
    """All that a run trains, and a batch's way to its loss: what DistributedDataParallel wraps."""

    def __init__(self, model: CLIP, loss: Any = None, precision: str = "float32") -> None:
        super().__init__()
        self.model, self.loss = model, loss  # a loss that is a module is trained too
        self.cast: Any = nullcontext()
        if precision == "bfloat16":
            self.cast = torch.autocast(model.logit_scale.device.type, torch.bfloat16)

    def forward(self, pixels: Tensor, ids: Tensor, end: Callable[[Tensor, Tensor], Any]) -> Any:
        """`end` of the pictures' and the texts' unit embeddings, in the dtype of the weights."""
        with self.cast:
            embeds = self.model.encode_image(pixels), self.model.encode_text(ids)
        return end(*(unit_norm(x.to(self.model.logit_scale.dtype)) for x in embeds))


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


def gather(x: Tensor, batch: int | None = None) -> Tensor:
    """The rows of all processes, (batch, ...), with gradient; x itself where there is one process.

    Row i of process r of N is row i N + r, so a batch is the same for any number of processes.
    Without a `batch` all have as many rows as this process. Every process then computes the same
    loss over the whole batch. A backward pass leaves N times the gradient of that loss, spread over
    the processes, and the mean of their gradients, which DistributedDataParallel takes, is right.
    """
    if not dist.is_initialized() or (world := dist.get_world_size()) == 1:
        return x
    batch = batch or world * len(x)
    missing = -(-batch // world) - len(x)  # the last processes may have one row less
    rows = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
    return _Gather.apply(rows).unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[:batch]


Loss = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""(model, image_embeds (B, E), text_embeds (B, E), is_true (B, B)) -> the loss of a batch.

Embeddings have length 1, and `is_true` says which caption j is true of which image i."""


class SigmoidLoss(nn.Module):
    """SigLIP's loss (Zhai et al. 2023, arXiv 2303.15343): of each pair by itself, is it true?

    Its bias is trained with the model. It belongs to the run and not to the checkpoint: softmax and
    ranking do not see it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(
        self, model: CLIP, image_embeds: Tensor, text_embeds: Tensor, is_true: Tensor
    ) -> Tensor:
        """A `Loss`: the mean over images of the sum over captions."""
        logits = model.logit_scale.exp() * image_embeds @ text_embeds.T + self.bias  # (B, B)
        signs = 2 * is_true.to(logits) - 1  # 1 for a true pair, -1 for another
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
        batch: pairs over all processes, if not B of each.
    """
    captions, *negatives = (gather(part, batch) for part in text_embeds.split(len(also)))
    image_embeds, labels, also = (gather(x, batch) for x in (image_embeds, labels, also))
    of_image = torch.cat([labels[:, None], also], dim=1)  # (B, 1 + K)
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


def backward(
    objective: nn.Module,
    pixels: Tensor,
    ids: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    chunk: int = 0,
) -> Tensor:
    """Embed a batch, apply `loss` to its (image, text) embeddings, and backpropagate.

    Args:
        objective: an `Objective`, or what wraps it.
        pixels: (B, 3, S, S).
        ids: (B, T), or (2 B, T) with a false caption of each image after the true ones.
        chunk: pairs in memory at once, in two passes: all embeddings without a graph, the gradient
            of the loss with respect to them, then each chunk once more with a graph, from its
            embeddings back (GradCache, Gao et al. 2021, arXiv 2101.06983). The gradients are those
            of one pass, dropped patches included.
    """
    if not chunk:
        value = objective(pixels, ids, loss)
        value.backward()
        return value.detach()

    def split(texts: Tensor) -> list[Tensor]:
        """The texts of each chunk, the true ones first."""
        by_kind = texts.unflatten(0, (-1, len(pixels))).split(chunk, dim=1)
        return [part.flatten(0, 1) for part in by_kind]

    parts = [*zip(pixels.split(chunk), split(ids), strict=True)]
    seeds = torch.randint(2**62, (len(parts),)).tolist()  # the two passes draw the same patches
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
        # Gradients add up here until the last chunk, which sends them to the other processes.
        with getattr(objective, "no_sync", nullcontext)() if not is_last else nullcontext():
            objective(*part, end).backward()
    return value.detach()


def _chain(
    gradient: tuple[Tensor, Tensor], value: Any, image_embeds: Tensor, text_embeds: Tensor
) -> Tensor:
    """What has the loss's gradient: with respect to a chunk's embeddings by the chain rule, and,
    with the last chunk, with respect to all else that the loss depends on."""
    return value + (image_embeds * gradient[0]).sum() + (text_embeds * gradient[1]).sum()
