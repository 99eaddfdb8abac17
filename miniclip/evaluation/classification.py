"""How often a classifier is right, what it confuses, and how well its confidence is calibrated."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BINS = 15
"""The number of equally wide bins for the calibration error (Guo et al. 2017, arXiv 1706.04599)."""


class Evaluation(NamedTuple):
    """How many labelled images a classifier got right and wrong."""

    labels: list[str]
    confusion: Tensor  # (C, C) int64, [i, j]: number of images of class i that got label j
    in_top5: Tensor  # (C,) int64, images of each class with the true label among the best 5 labels
    skipped: list[str]  # a line for each unreadable file; such files are not counted
    bins: Tensor  # (BINS, 3) float64, columns: images, sum of confidences, right answers

    @property
    def images(self) -> Tensor:
        """The number of images of each class, (C,)."""
        return self.confusion.sum(dim=1)

    @property
    def right(self) -> Tensor:
        """The number of correctly classified images of each class, (C,)."""
        return self.confusion.diagonal()

    @property
    def accuracy(self) -> float:
        """The share of images that got the true label."""
        return self.right.sum().item() / self.images.sum().item()

    @property
    def standard_error(self) -> float:
        """The standard error of the accuracy, if the images are independent."""
        return (self.accuracy * (1 - self.accuracy) / self.images.sum().item()) ** 0.5

    @property
    def top5(self) -> float:
        """The share of images whose true label is among the best five labels."""
        return self.in_top5.sum().item() / self.images.sum().item()

    @property
    def class_accuracy(self) -> Tensor:
        """The accuracy of each class, (C,). NaN for a class without images."""
        return self.right.double() / self.images

    @property
    def mean_per_class(self) -> float:
        """The mean accuracy of the classes that have images.

        The paper reports this mean for Oxford Pets, Caltech-101, Flowers102 and FGVC Aircraft.
        """
        return self.class_accuracy.nanmean().item()

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: each bin's |confidence - accuracy|, averaged over images."""
        images, confidence, right = self.bins.T
        return ((confidence - right).abs().sum() / images.sum()).item()

    def mistakes(self) -> list[tuple[int, int, int]]:
        """Return confusions as (true class, predicted class, images), the most frequent first."""
        wrong = self.confusion - self.right.diag()
        counts = [(i, j, int(wrong[i, j])) for i, j in wrong.nonzero().tolist()]
        return sorted(counts, key=lambda mistake: -mistake[2])


def evaluate(
    logits: Tensor, classes: Sequence[int], labels: Sequence[str], skipped: Sequence[str] = ()
) -> Evaluation:
    """Count the right and wrong answers of a classifier.

    If two logits are equal, `topk` decides which one is the best, as in OpenAI's evaluation.

    Args:
        logits: (N, C), for N images and C classes.
        classes: the true class of each image, 0 to C - 1.
        labels: the names of the C classes.
        skipped: a line for each unreadable file.

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
    which = (confidence * BINS).ceil().long() - 1  # a bin includes its upper edge
    bins = torch.zeros(BINS, 3, dtype=torch.float64).index_add(0, which, of_image)
    return Evaluation(list(labels), confusion, in_top5, list(skipped), bins)


def wilson_interval(right: float, images: float) -> tuple[float, float]:
    """Return the 95 % confidence interval of the accuracy `right / images` (Wilson 1927).

    >>> [round(edge, 3) for edge in wilson_interval(9, 10)]
    [0.596, 0.982]
    """
    z = 1.959964
    centre = (right + z**2 / 2) / (images + z**2)
    half = z / (images + z**2) * (right * (images - right) / images + z**2 / 4) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def summary(result: Evaluation, folders: Sequence[str]) -> dict[str, Any]:
    """Return a dict for JSON. It names classes by folder, because two classes may share a label."""
    counts = (result.images.tolist(), result.right.tolist(), result.in_top5.tolist())
    names = ("folder", "label", "images", "right", "in_top5")
    rows = zip(folders, result.labels, *counts, strict=True)
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
        "classes": [dict(zip(names, row, strict=True)) for row in rows],
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
