"""How often a classifier is right, and what it confuses."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.errors import ImageError
from miniclip.files.ahead import read_ahead
from miniclip.terminal import progress
from miniclip.transform import ImageTransform
from miniclip.zeroshot.data import LabelledImages


class Evaluation(NamedTuple):
    """What a classifier made of labelled images. Accuracies are fractions; nan where of nothing."""

    labels: list[str]
    confusion: Tensor  # (C, C) int64, images of the row's class that were given the column's
    in_top5: Tensor  # (C,) int64, images of the class that had it among the five best labels
    skipped: list[str]  # for each file that could not be read, which and why; counted nowhere else

    @property
    def images(self) -> Tensor:
        """How many images of each class were classified, (C,)."""
        return self.confusion.sum(dim=1)

    @property
    def top1(self) -> float:
        """The share of images whose first label is the true one."""
        return self.confusion.diagonal().sum().item() / self.confusion.sum().item()

    @property
    def top5(self) -> float:
        """The share of images with the true label among the first five."""
        return self.in_top5.sum().item() / self.confusion.sum().item()

    @property
    def class_accuracy(self) -> Tensor:
        """Top-1 of each class, (C,)."""
        return self.confusion.diagonal().double() / self.images

    def mistakes(self) -> list[tuple[int, int, int]]:
        """(true class, predicted class, images) for every confusion, the most frequent first."""
        wrong = self.confusion - self.confusion.diagonal().diag()
        counts = [(i, j, int(wrong[i, j])) for i, j in wrong.nonzero().tolist()]
        return sorted(counts, key=lambda mistake: -mistake[2])


@torch.no_grad()
def evaluate(
    classifier: Callable[[Tensor], Tensor],
    transform: ImageTransform,
    images: LabelledImages,
    batch_size: int = 64,
) -> Evaluation:
    """Classify every image, and count.

    `classifier` takes pixels (B, 3, S, S) to logits (B, C), as a ZeroShotClassifier of the images'
    labels does. Threads decode the images ahead of it, so that it need not wait. A file that
    cannot be read is left out and listed in `skipped`. Raises ValueError if none can be.

    Of two equal logits either may count as the best: OpenAI's evaluation, too, takes what `topk`
    gives, and the two classes of ImageNet that are both called "missile" are always equal.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1 image")
    count = len(images.labels)
    confusion = torch.zeros(count, count, dtype=torch.int64)
    in_top5 = torch.zeros(count, dtype=torch.int64)
    skipped: list[str] = []

    def readable() -> Iterator[tuple[Tensor, int]]:
        results = read_ahead(transform, images.paths, ahead=2 * batch_size)
        results = progress(results, "image", total=len(images.paths))
        for pixels, true in zip(results, images.classes, strict=True):
            if isinstance(pixels, ImageError):
                skipped.append(str(pixels))
            else:
                yield pixels, true

    stream = readable()
    while batch := list(islice(stream, batch_size)):
        true = torch.tensor([true for _, true in batch])  # (B,)
        logits = classifier(torch.stack([pixels for pixels, _ in batch]))  # (B, C)
        best = logits.topk(min(5, count)).indices.cpu()  # (B, 5)
        confusion.index_put_((true, best[:, 0]), torch.ones_like(true), accumulate=True)
        in_top5 += true[(best == true[:, None]).any(dim=1)].bincount(minlength=count)
    if not confusion.any():
        raise ValueError(f"none of the {len(skipped)} files can be read; the first is {skipped[0]}")
    return Evaluation(images.labels, confusion, in_top5, skipped)
