"""Draw the heat maps of texts."""

from collections.abc import Sequence
from os import PathLike

from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from miniclip.exhibits import Exhibit, Heat
from miniclip.figures.demo import draw_heat
from miniclip.figures.style import save_figure, show_picture, title_of
from miniclip.lens.heat import BLIND, HEAT_COLOURS, overlay
from miniclip.world.localise import Question


def draw_explanations(
    asked: Sequence[Question], maps: dict[str, Tensor], path: str | PathLike[str]
) -> None:
    """Draw a row for each question: the image, then the heat map of each method."""
    size = (2 * (1 + len(maps)), 2.2 * len(asked))
    figure = Figure(figsize=size, layout="constrained")
    for i, (row, question) in enumerate(
        zip(figure.subplots(len(asked), 1 + len(maps), squeeze=False), asked, strict=True)
    ):
        exhibit = Exhibit(question.phrase, question.picture, [])
        show_picture(row[0], question.picture, question.phrase)
        for axes, (method, heats) in zip(row[1:], maps.items(), strict=True):
            draw_heat(axes, exhibit, Heat(method, heats[i], question.named))
    save_figure(figure, path)


# What the numbers of a heat map mean.
UNITS = {
    "attention": "{} of the attention",
    "rollout": "{} of the attention",
    "relevance": "{}",
    "gradcam": "{}, a weighted sum of channels",
    "tokens": "{} added to the cosine",
    "occlusion": "{} subtracted from the cosine",
}

MOST_COLUMNS = 4  # heat maps in a row, beside the image


def draw_text_maps(
    picture: Image.Image,
    texts: Sequence[str],
    cosines: Sequence[float],
    maps: dict[str, Tensor],
    path: str | PathLike[str],
) -> None:
    """Draw an image and the heat maps of C texts.

    `cosines` has the cosine between the image and each text. `maps` has a tensor (C, rows, columns)
    for each method. If there is one method, the maps of all texts are side by side. If there are
    several methods, each text has its own row. All maps of a method have the same scale. The value
    of the warmest patch is below each map.
    """
    texts = [f"{text} (cosine {cosine:.2f})" for text, cosine in zip(texts, cosines, strict=True)]
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
        show_picture(row[0], picture, name)
        for axes, (title, method, heat) in zip(row[1:], line):
            shown = overlay(picture, heat, warmest=maps[method].max().item())
            show_picture(axes, shown, title, warmth(method, heat))
    colours = LinearSegmentedColormap.from_list("heat", HEAT_COLOURS)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), colours),
        ax=rows, location="bottom", ticks=[], shrink=2 / columns, aspect=30, pad=0.02,
    )  # fmt: skip
    bar.outline.set_visible(False)
    ends = "no evidence, or evidence against the text  →  the warmest patch of the method"
    bar.set_label(ends, fontsize=9)
    save_figure(figure, path)


def warmth(method: str, heat: Tensor) -> str:
    """Return a note with the value of the warmest patch of a map."""
    if heat.max() <= 0:
        return "nowhere"
    blind = "; the same for every text" if method in BLIND else ""
    return f"up to {UNITS[method].format(f'{heat.max():.2g}')}{blind}"
