"""How often a classifier is right, what it confuses, and how far its probabilities are true."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BINS = 15
"""Of equal width, for the calibration error, as in Guo et al. 2017 (arXiv 1706.04599)."""


class Evaluation(NamedTuple):
    """What a classifier made of labelled images. Accuracies are shares; nan where of nothing."""

    labels: list[str]
    confusion: Tensor  # (C, C) int64, images of the row's class that were given the column's
    in_top5: Tensor  # (C,) int64, images of the class that had it among the five best labels
    skipped: list[str]  # for each file that could not be read, which and why; counted nowhere else
    bins: Tensor  # (BINS, 3) float64: images of a confidence, its sum, and how many were right

    @property
    def images(self) -> Tensor:
        """How many images of each class were classified, (C,)."""
        return self.confusion.sum(dim=1)

    @property
    def right(self) -> Tensor:
        """How many images of each class have it as their first label, (C,)."""
        return self.confusion.diagonal()

    @property
    def accuracy(self) -> float:
        """The share of images whose first label is the true one."""
        return self.right.sum().item() / self.images.sum().item()

    @property
    def standard_error(self) -> float:
        """Of the accuracy, as the mean of independent images."""
        return (self.accuracy * (1 - self.accuracy) / self.images.sum().item()) ** 0.5

    @property
    def top5(self) -> float:
        """The share of images with the true label among the first five."""
        return self.in_top5.sum().item() / self.images.sum().item()

    @property
    def class_accuracy(self) -> Tensor:
        """The accuracy of each class, (C,)."""
        return self.right.double() / self.images

    @property
    def mean_per_class(self) -> float:
        """The mean of the classes' accuracies, each class counted alike; classes with images only.

        The paper's metric for Oxford Pets, Caltech-101, Flowers102 and FGVC Aircraft.
        """
        return self.class_accuracy.nanmean().item()

    @property
    def calibration_error(self) -> float:
        """The mean distance between confidence and accuracy, over the images' bins (ECE)."""
        images, confidence, right = self.bins.T
        return ((confidence - right).abs().sum() / images.sum()).item()

    def mistakes(self) -> list[tuple[int, int, int]]:
        """(true class, predicted class, images) for every confusion, the most frequent first."""
        wrong = self.confusion - self.right.diag()
        counts = [(i, j, int(wrong[i, j])) for i, j in wrong.nonzero().tolist()]
        return sorted(counts, key=lambda mistake: -mistake[2])


def evaluate(
    logits: Tensor, classes: Sequence[int], labels: Sequence[str], skipped: Sequence[str] = ()
) -> Evaluation:
    """Count what logits (N, C) say of N images whose true classes are known.

    Of two equal logits either may count as the best: OpenAI's evaluation, too, takes what `topk`
    gives, and the two classes of ImageNet that are both called "missile" are always equal.

    >>> result = evaluate(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), [0, 1], ["cat", "dog"])
    >>> result.accuracy, result.mistakes()
    (0.5, [(1, 0, 1)])
    """
    logits, true, count = logits.detach().cpu(), torch.tensor(classes), len(labels)
    best = logits.topk(min(5, count)).indices  # (N, 5)
    confusion = torch.zeros(count, count, dtype=torch.int64)
    confusion.index_put_((true, best[:, 0]), torch.ones_like(true), accumulate=True)
    in_top5 = true[(best == true[:, None]).any(dim=1)].bincount(minlength=count)
    confidence = (logits.amax(dim=1) - logits.logsumexp(dim=1)).double().exp().clamp(max=1)  # (N,)
    of_image = torch.stack([torch.ones_like(confidence), confidence, best[:, 0] == true], dim=1)
    which = (confidence * BINS).ceil().long() - 1  # a bin has its upper edge, not its lower one
    bins = torch.zeros(BINS, 3, dtype=torch.float64).index_add(0, which, of_image)
    return Evaluation(list(labels), confusion, in_top5, list(skipped), bins)


def wilson_interval(right: float, images: float) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson (1927): it stays within 0 and 1, for few images too.

    >>> [round(edge, 3) for edge in wilson_interval(9, 10)]
    [0.596, 0.982]
    """
    z = 1.959964
    centre = (right + z**2 / 2) / (images + z**2)
    half = z / (images + z**2) * (right * (images - right) / images + z**2 / 4) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def summary(result: Evaluation, folders: Sequence[str]) -> dict[str, Any]:
    """Everything that was counted. A class is named by its folder: two labels may be equal."""
    classes = []
    for folder, *counts in zip(
        folders,
        result.labels,
        result.images.tolist(),
        result.right.tolist(),
        result.in_top5.tolist(),
        strict=True,
    ):
        names = ("label", "images", "right", "in_top5")
        classes.append({"folder": folder} | dict(zip(names, counts, strict=True)))
    return {
        "accuracy": result.accuracy,
        "standard_error": result.standard_error,
        "interval": wilson_interval(result.right.sum().item(), result.images.sum().item()),
        "mean_per_class": result.mean_per_class,
        "top5": result.top5,
        "calibration_error": result.calibration_error,
        "images": result.images.sum().item(),
        "skipped": result.skipped,
        "missing": [folder for folder, n in zip(folders, result.images, strict=True) if not n],
        "classes": classes,
        "confusions": [
            {"true": folders[true], "predicted": folders[predicted], "images": images}
            for true, predicted, images in result.mistakes()
        ],
        "reliability": [
            {"images": int(n), "confidence": confidence / n, "accuracy": right / n}
            for n, confidence, right in result.bins.tolist()
            if n
        ],
    }
