"""Draw a classifier's confusions and the reliability of its probabilities."""

from os import PathLike

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from miniclip.evaluation.classification import BINS, Evaluation
from miniclip.figures.style import BLUE, ORANGE, save_figure
from miniclip.terminal import shorten

MOST_NAMES = 40  # with more classes than this, the matrix has no class names
MOST_NUMBERS = 20  # with more classes than this, the cells have no numbers


def draw_confusion(result: Evaluation, path: str | PathLike[str]) -> None:
    """Draw the confusion matrix, the most frequent confusions, and the reliability diagram."""
    figure = Figure(figsize=(14, 8.5), layout="constrained")
    axes = figure.subplot_mosaic(
        [["left", "right"], ["left", "below"]], width_ratios=(8, 5), height_ratios=(3, 2)
    )
    left, right = axes["left"], axes["right"]
    total = result.confusion.sum().item()
    figure.suptitle(f"top-1 {result.accuracy:.1%} of {total:,} images", fontsize=14)
    if len(result.labels) <= MOST_NAMES:
        draw_cells(left, result)
    else:
        draw_dots(left, result)
    left.set_xlabel("predicted class")
    left.set_ylabel("true class")
    draw_mistakes(right, result)
    draw_reliability(axes["below"], result)
    save_figure(figure, path)


def draw_cells(axes: Axes, result: Evaluation) -> None:
    """Draw the confusion matrix. A cell shows a share of the images of its row's true class."""
    labels = [shorten(label) for label in result.labels]
    share = result.confusion.double() / result.images.clamp(min=1)[:, None]  # (C, C)
    # Darkness is the square root of the share, so that small shares are visible.
    axes.imshow(share.numpy(), cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(length=0, labelsize=11 if len(labels) <= MOST_NUMBERS else 7)
    axes.spines[:].set_visible(False)
    axes.set_title("percentage of the images of each true class", loc="left", fontsize=11)
    if len(labels) <= MOST_NUMBERS:
        for i, j in (share >= 0.005).nonzero().tolist():
            color = "white" if share[i, j] > 0.3 else "black"
            axes.text(j, i, f"{share[i, j]:.0%}"[:-1], ha="center", va="center", color=color)


def draw_dots(axes: Axes, result: Evaluation) -> None:
    """Draw a dot for each confusion, with an area proportional to the number of images."""
    mistakes = result.mistakes()
    count = len(result.labels)
    axes.plot([0, count - 1], [0, count - 1], color="0.8", linewidth=1, zorder=0)
    if mistakes:
        true, predicted, images = zip(*mistakes, strict=True)
        largest = images[0]
        area = [60 * n / largest for n in images]
        axes.scatter(predicted, true, s=area, color=BLUE, alpha=0.5, linewidths=0)
    axes.set_xlim(-1, count)
    axes.set_ylim(count, -1)  # the first class is on top, as in a matrix
    axes.set_aspect("equal")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("confusions; each number stands for a class", loc="left", fontsize=11)


def draw_mistakes(axes: Axes, result: Evaluation, most: int = 14) -> None:
    """Draw a bar for each of the most frequent confusions."""
    mistakes = result.mistakes()[:most][::-1]
    names = [
        f"{shorten(result.labels[true])} → {shorten(result.labels[predicted])}"
        for true, predicted, _ in mistakes
    ]
    # Bars are placed by index, because two confusions of ImageNet may have the same name.
    bars = axes.barh(range(len(mistakes)), [n for *_, n in mistakes], color=ORANGE)
    axes.set_yticks(range(len(mistakes)), names)
    axes.bar_label(bars, [f"{n:,}" for *_, n in mistakes], padding=3)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=10)
    axes.spines[:].set_visible(False)
    axes.margins(x=0.12)
    axes.set_ylim(len(mistakes) - most - 0.5, len(mistakes) - 0.5)
    axes.set_title("most frequent confusions: true → predicted, images", loc="left", fontsize=11)


def draw_reliability(axes: Axes, result: Evaluation) -> None:
    """Draw accuracy against confidence. On the grey diagonal, accuracy equals confidence."""
    images, confidence, right = result.bins[result.bins[:, 0] > 0].T.numpy()
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1, zorder=0)
    axes.bar(confidence / images, images / images.sum(), width=0.6 / BINS, color="0.85", zorder=0)
    axes.plot(confidence / images, right / images, marker="o", color=BLUE)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("probability of the best label; grey bars: share of images")
    axes.set_ylabel("accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    error = f"expected calibration error {result.calibration_error:.1%}"
    axes.set_title(f"reliability: {error}", loc="left", fontsize=11)
