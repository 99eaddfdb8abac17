"""Pictures of results, drawn with matplotlib, which the `demo` extra brings.

Nothing else imports this file before a picture is wanted, and so a missing matplotlib shows at
once, not after an hour's work. The colours are of Okabe and Ito's, or run from light to dark, so
that the colour-blind tell them apart, and a grey printer too.
"""

from collections.abc import Sequence
from os import PathLike

from torch import Tensor

from miniclip.demo import Exhibit, Heat
from miniclip.lens import Question
from miniclip.parity import Report
from miniclip.zeroshot import Evaluation, Score

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
except ImportError:
    raise ValueError("pictures need matplotlib: pip install 'miniclip[demo]'") from None

BLUE = "#0072b2"
ORANGE = "#d55e00"
MOST_NAMES = 40  # classes that can be named along a side of the matrix,
MOST_NUMBERS = 20  # and classes that leave room for a number in each cell


def draw_confusion(result: Evaluation, path: str | PathLike[str]) -> None:
    """What was taken for what, as a matrix, and the most frequent confusions by name."""
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(8, 5))
    total = result.confusion.sum().item()
    figure.suptitle(f"top-1 {result.top1:.1%} of {total:,} images", fontsize=14)
    if len(result.labels) <= MOST_NAMES:
        draw_cells(left, result)
    else:
        draw_dots(left, result)
    left.set_xlabel("predicted class")
    left.set_ylabel("true class")
    draw_mistakes(right, result)
    save(figure, path)


def draw_cells(axes: Axes, result: Evaluation) -> None:
    """A cell for each pair of classes: its share of the true class, in percent."""
    labels = [shorten(label) for label in result.labels]
    share = result.confusion.double() / result.images.clamp(min=1)[:, None]  # (C, C)
    # The square root of the share: a confusion of 4 % is a fifth as dark as 100 %, not a 25th.
    axes.imshow(share.numpy(), cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(length=0, labelsize=11 if len(labels) <= MOST_NUMBERS else 7)
    axes.spines[:].set_visible(False)
    axes.set_title("of each true class, in percent", loc="left", fontsize=11)
    if len(labels) <= MOST_NUMBERS:
        for i, j in (share >= 0.005).nonzero().tolist():
            color = "white" if share[i, j] > 0.3 else "black"
            axes.text(j, i, f"{share[i, j]:.0%}"[:-1], ha="center", va="center", color=color)


def draw_dots(axes: Axes, result: Evaluation) -> None:
    """With many classes, a dot for each confusion, its area the number of images."""
    mistakes = result.mistakes()
    count = len(result.labels)
    axes.plot([0, count - 1], [0, count - 1], color="0.8", linewidth=1, zorder=0)
    if mistakes:
        true, predicted, images = zip(*mistakes, strict=True)
        largest = images[0]
        area = [60 * n / largest for n in images]
        axes.scatter(predicted, true, s=area, color=BLUE, alpha=0.5, linewidths=0)
    axes.set_xlim(-1, count)
    axes.set_ylim(count, -1)  # the first class on top, as in a matrix
    axes.set_aspect("equal")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("confusions, by the positions of the classes", loc="left", fontsize=11)


def draw_mistakes(axes: Axes, result: Evaluation, most: int = 20) -> None:
    """Bars for the most frequent confusions."""
    mistakes = result.mistakes()[:most][::-1]
    names = [
        f"{shorten(result.labels[true])} → {shorten(result.labels[predicted])}"
        for true, predicted, _ in mistakes
    ]
    # By position: two pairs of ImageNet's classes may read the same.
    bars = axes.barh(range(len(mistakes)), [n for *_, n in mistakes], color=ORANGE)
    axes.set_yticks(range(len(mistakes)), names)
    axes.bar_label(bars, [f"{n:,}" for *_, n in mistakes], padding=3)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=10)
    axes.spines[:].set_visible(False)
    axes.margins(x=0.12)
    axes.set_ylim(len(mistakes) - most - 0.5, len(mistakes) - 0.5)
    axes.set_title("most frequent: true → predicted, images", loc="left", fontsize=11)


def shorten(label: str, width: int = 24) -> str:
    return label if len(label) <= width else label[: width - 1] + "…"


def save(figure: Figure, path: str | PathLike[str]) -> None:
    """Write a picture in the format that its name ends in. ValueError where that cannot be."""
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


def draw_curves(rows: Sequence[dict[str, float]], path: str | PathLike[str]) -> None:
    """The metrics of a training run against its steps."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    curves = {
        "loss": ("loss", BLUE),
        "logit_scale": ("exp(logit scale)", ORANGE),
        "lr": ("learning rate", "#009e73"),
    }
    steps = [row["step"] for row in rows]
    for axes, (name, (title, color)) in zip(
        figure.subplots(1, 3, width_ratios=(2, 1, 1)), curves.items(), strict=True
    ):
        axes.plot(steps, [row[name] for row in rows], color=color, linewidth=1.5)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_demo(
    scene: Exhibit, heats: Sequence[Heat], photographs: Sequence[Exhibit], path: str | PathLike[str]
) -> None:
    """A drawn scene with its captions and heat maps, above photographs with their labels."""
    figure = Figure(figsize=(13, 9 if photographs else 4), layout="constrained")
    top, *bottom = figure.subfigures(2, 1, height_ratios=(4, 5)) if photographs else [figure]
    axes = top.subplots(1, 2 + len(heats), width_ratios=(2, 3, *(2 for _ in heats)))
    show_picture(axes[0], scene)
    draw_bars(axes[1], scene.scores, inside=True)
    for axis, heat in zip(axes[2:], heats, strict=True):
        draw_heat(axis, scene, heat)
    if photographs:
        rows = bottom[0].subplots(2, len(photographs), height_ratios=(3, 2), squeeze=False)
        for above, below, photograph in zip(*rows, photographs, strict=True):
            show_picture(above, photograph)
            draw_bars(below, photograph.scores[:5])
    save(figure, path)


def draw_explanations(
    asked: Sequence[Question], maps: dict[str, Tensor], path: str | PathLike[str]
) -> None:
    """A line for each question: the picture, and where each method sees what is asked for."""
    size = (2 * (1 + len(maps)), 2.2 * len(asked))
    figure = Figure(figsize=size, layout="constrained")
    for i, (row, question) in enumerate(
        zip(figure.subplots(len(asked), 1 + len(maps), squeeze=False), asked, strict=True)
    ):
        exhibit = Exhibit(question.phrase, question.picture, [])
        show_picture(row[0], exhibit)
        for axes, (method, heats) in zip(row[1:], maps.items(), strict=True):
            draw_heat(axes, exhibit, Heat(method, heats[i], question.named))
    save(figure, path)


def show_picture(axes: Axes, exhibit: Exhibit) -> None:
    axes.imshow(exhibit.picture)
    axes.set_title(exhibit.name, loc="left", fontsize=11)
    axes.set_axis_off()


def draw_bars(axes: Axes, scores: Sequence[Score], inside: bool = False) -> None:
    """A bar for each label, best on top; long labels stand above their bars."""
    best = scores[::-1]
    bars = axes.barh(range(len(best)), [s.probability for s in best], color=BLUE, height=0.5)
    bars[-1].set_color(ORANGE)
    axes.bar_label(bars, [f"{score.probability:.0%}" for score in best], padding=3)
    if inside:
        axes.set_yticks([])
        for i, score in enumerate(best):
            axes.text(0, i + 0.32, score.label, fontsize=10, va="bottom")
        axes.set_ylim(-0.5, len(best) - 0.1)
    else:
        axes.set_yticks(range(len(best)), [score.label for score in best])
    axes.set_xlim(0, 1.2)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def draw_heat(axes: Axes, scene: Exhibit, heat: Heat) -> None:
    """Where the phrase is seen, over the picture in grey; the object's true outline in black."""
    size = scene.picture.size[0]
    axes.imshow(scene.picture.convert("L"), cmap="gray", vmin=0, vmax=255, alpha=0.5)
    warmest = max(heat.lost.max().item(), 1e-6)
    shown = heat.lost.clamp(min=0).numpy() / warmest
    axes.imshow(
        shown,
        cmap="inferno",
        alpha=0.7,
        interpolation="bilinear",
        extent=(-0.5, size - 0.5, size - 0.5, -0.5),
        vmin=0,
        vmax=1,
    )
    axes.contour(heat.mask.numpy(), levels=[0.5], colors="white", linewidths=1.5)
    axes.set_title(heat.phrase, loc="left", fontsize=11)
    axes.set_axis_off()


NOTHING = 1e-17  # where a difference of 0 is drawn, as a logarithm has no place for it


def draw_parity(report: Report, path: str | PathLike[str]) -> None:
    """Differences against depth, a panel for each tower, on a logarithmic scale."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    curves = {
        "absolute": ("difference", ORANGE, "-", 4),  # broad, to be seen under the next
        "float64": ("difference in float64", BLUE, "-", 1.5),
        "model_error": ("error of model", "#009e73", "--", 1.5),
        "other_error": ("error of other", "#e69f00", ":", 1.5),
    }
    for axes, tower in zip(panels, ("vision", "text"), strict=True):
        # Patterns are left out: in float64, transformers' are rounded to float32.
        rows = [
            row
            for row in report.rows
            if row.site == "logits"
            or (
                row.site.startswith(tower)
                and (".pattern" not in row.site or row.site == report.first)
            )
        ]
        for name, (label, color, style, width) in curves.items():
            values = [min(max(getattr(row, name), NOTHING), 1e3) for row in rows]
            axes.plot(values, color=color, linestyle=style, linewidth=width, label=label)
        starts = [i for i, row in enumerate(rows) if row.site.endswith(".resid_pre")]
        axes.set_xticks([*starts, len(rows) - 1], [*range(len(starts)), "logits"], fontsize=8)
        for i, row in enumerate(rows):
            if row.site == report.first:
                axes.axvline(i, color="0.5", linewidth=1)
                axes.text(i, 1, f" {row.site}", va="bottom", transform=axes.get_xaxis_transform())
        axes.set_xlabel(f"block of the {tower} tower")
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("largest of any number")
    panels[0].set_yticks([NOTHING, *(10.0**n for n in range(-15, 4, 3))])
    panels[0].set_yticklabels(["0", *(f"$10^{{{n}}}$" for n in range(-15, 4, 3))])
    panels[1].legend(frameon=False, fontsize=9)
    figure.suptitle(str(report).replace("\n", "; "), fontsize=11)
    save(figure, path)
