"""Pictures of results, drawn with matplotlib, which the `demo` extra brings.

Nothing else imports this file before a picture is wanted, and so a missing matplotlib shows at
once, not after an hour's work. The colours are of Okabe and Ito's, or run from light to dark, so
that the colour-blind tell them apart, and a grey printer too.
"""

import textwrap
import warnings
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike

from PIL import Image
from torch import Tensor

from miniclip.bench import Row
from miniclip.demo import Exhibit, Heat
from miniclip.lens import BLIND, HEAT_COLOURS, Question, overlay
from miniclip.parity import Report
from miniclip.zeroshot import Evaluation, Score

try:
    from matplotlib import font_manager, rcParams
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.text import Text
except ImportError:
    raise ValueError("pictures need matplotlib: pip install 'miniclip[demo]'") from None

KINDS = [f".{kind}" for kind in FigureCanvasBase.filetypes]  # that a picture's name may end in
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
    """The label, cut to `width` characters if it is longer."""
    return label if len(label) <= width else label[: width - 1] + "…"


def save(figure: Figure, path: str | PathLike[str]) -> None:
    """Write a picture in the format that its name ends in. ValueError where that cannot be."""
    texts = figure.findobj(Text)
    families = [*rcParams["font.family"], *fonts_beside("".join(t.get_text() for t in texts))]
    for text in texts:
        text.set_fontfamily(families)
    try:
        with (
            warnings.catch_warnings()
        ):  # of characters that no font here has, and are drawn as boxes
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure.savefig(path, dpi=120)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


def fonts_beside(text: str) -> dict[str, str]:
    """Installed fonts that have what matplotlib's own lacks of a text, the one that has most first:
    by family, the file.

    >>> list(fonts_beside("plain, or naïve, or по-русски"))
    []
    """
    has = font_manager.get_font(usual_font()).get_charmap().keys()
    lacking = set(map(ord, text)) - has - {ord("\n")}
    covers = []
    for font in font_manager.fontManager.ttflist if lacking else []:
        with suppress(RuntimeError):  # a font of bitmaps
            has = font_manager.get_font(font.fname).get_charmap().keys()
            if lacking & has and "Last Resort" not in font.name:  # which has boxes for everything
                covers.append((lacking & has, font))
    found = {}
    covers.sort(key=lambda row: (-len(row[0]), row[1].style != "normal", row[1].weight != 400))
    for covered, font in covers:
        if lacking & covered:
            found[font.name] = font.fname
            lacking -= covered
    return found


def usual_font() -> str:
    """The file of matplotlib's own font."""
    return font_manager.findfont(font_manager.FontProperties(family=rcParams["font.family"]))


def font_file(text: str) -> str:
    """The font for a text that may have one only."""
    return next(iter(fonts_beside(text).values()), usual_font())


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
        mark = "" if len(rows) > 2 else "o"  # of one step there is no line
        axes.plot(steps, [row[name] for row in rows], marker=mark, color=color, linewidth=1.5)
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
    halves = figure.subfigures(2, 1, squeeze=False, height_ratios=(4, 5)).flat
    top, *bottom = halves if photographs else [figure]
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
    """A picture under its name."""
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
    """Where the phrase is seen, over the picture in grey; the object's true outline in white."""
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


# What the numbers of a map say.
UNITS = {
    "attention": "{} of the attention",
    "rollout": "{} of the attention",
    "relevance": "{}",
    "tokens": "{} written towards the text",
    "occlusion": "{} of the cosine lost",
}
MOST_COLUMNS = 4  # of heat maps, beside the picture


def draw_text_maps(
    picture: Image.Image, texts: Sequence[str], maps: dict[str, Tensor], path: str | PathLike[str]
) -> None:
    """A picture beside where each of C texts is seen in it.

    `maps` has (C, rows, columns) for each method. Of one method the texts stand side by side, of
    several the methods, with a line for each text. Every map is as bright as the others at its
    warmest patch; under it stands how much that is.
    """
    if len(maps) == 1:
        ((method, heats),) = maps.items()
        panels = [(text, method, heat) for text, heat in zip(texts, heats, strict=True)]
        lines = [panels[i : i + MOST_COLUMNS] for i in range(0, len(panels), MOST_COLUMNS)]
        names = [f"by {method}"] * len(lines)
    else:
        names = list(texts)
        lines = [
            [(name, name, heats[i]) for name, heats in maps.items()] for i in range(len(texts))
        ]
    columns = 1 + max(map(len, lines))
    title_lines = max(len(title_of(name)) for name in (*names, *texts, *maps))
    height = (3.3 + 0.2 * title_lines) * len(lines) + 0.5
    figure = Figure(figsize=(2.9 * columns, height), layout="constrained")
    rows = figure.subplots(len(lines), columns, squeeze=False)
    for axes in rows.flat:
        axes.set_axis_off()
    for row, name, line in zip(rows, names, lines, strict=True):
        show_panel(row[0], picture, name)
        for axes, (title, method, heat) in zip(row[1:], line):
            show_panel(axes, overlay(picture, heat), title, warmth(method, heat))
    colours = LinearSegmentedColormap.from_list("heat", HEAT_COLOURS)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), colours),
        ax=rows, location="bottom", ticks=[], shrink=2 / columns, aspect=30, pad=0.02,
    )  # fmt: skip
    bar.outline.set_visible(False)
    bar.set_label("nothing, or against the text  →  a map's warmest patch", fontsize=9)
    save(figure, path)


def warmth(method: str, heat: Tensor) -> str:
    """How much the warmest patch of a map is."""
    if heat.max() <= 0:
        return "nowhere"
    blind = "; whatever the text" if method in BLIND else ""
    return f"up to {UNITS[method].format(f'{heat.max():.2g}')}{blind}"


def title_of(text: str) -> list[str]:
    """The text in at most three lines."""
    return textwrap.wrap(text, 28, max_lines=3, placeholder=" …")


def show_panel(axes: Axes, picture: Image.Image, title: str, below: str = "") -> None:
    """A picture with a title above and a note below, both wrapped."""
    axes.imshow(picture)
    # As text, for a $ would begin a formula.
    axes.set_title("\n".join(title_of(title)), loc="left", fontsize=11, parse_math=False)
    lines = textwrap.wrap(below, 36)
    axes.text(0, -0.03, "\n".join(lines), transform=axes.transAxes, fontsize=9, va="top")


def draw_bench(rows: Sequence[Row], path: str | PathLike[str]) -> None:
    """How many times as long as miniclip each contender took: medians, and quartiles as whiskers.

    The scale is logarithmic, so that half as long and twice as long are equally far from 1.
    """
    timed = [row for row in rows if row.ratio is not None]
    titles = dict.fromkeys(f"{row.suite}: {row.work}" for row in timed)
    lines: list[Row | str] = []  # from the top: each case's title, then its contenders
    for title in titles:
        lines += [title, *(row for row in timed if f"{row.suite}: {row.work}" == title)]
    figure = Figure(figsize=(9, 0.8 + 0.26 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="0.6", linewidth=1, zorder=0)
    for y, line in enumerate(lines):
        if isinstance(line, str):
            heading = axes.text(0, y, line, transform=axes.get_yaxis_transform(), va="center")
            heading.set(weight="bold", backgroundcolor="white")
            continue
        assert line.ratio is not None  # the others are not among the timed
        lower, median, upper = line.ratio
        color = ORANGE if line.contender.startswith("miniclip") else BLUE
        color = "0.7" if line.difference is None else color  # shown for scale, and no peer
        axes.barh(y, median - 1, left=1, color=color, height=0.6)
        axes.errorbar(
            median, y, xerr=[[median - lower], [upper - median]], color="black", linewidth=1
        )
        axes.annotate(
            f"{median:.2f}", (max(upper, 1), y), (5, 0), textcoords="offset points", va="center"
        )
    names = [line.contender if isinstance(line, Row) else "" for line in lines]
    axes.set_yticks(range(len(lines)), names)
    axes.set_ylim(len(lines) - 0.5, -0.7)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.1)
    axes.set_xlabel("cost, as a multiple of miniclip's (logarithmic)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    save(figure, path)
