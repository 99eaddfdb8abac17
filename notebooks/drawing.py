"""The style of the notebooks' figures, and the drawings that need more than a few lines.

Importing this module sets matplotlib's style. Colour-blind readers can tell Okabe and Ito's colours
apart. Maps have the colours of cividis: dark is low, light is high.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle
from PIL import Image
from torch import Tensor

BLUE, ORANGE, GREEN, SKY = "#0072b2", "#d55e00", "#009e73", "#56b4e9"
YELLOW, PINK, GREY = "#e69f00", "#cc79a7", "#999999"
COLOURS = (BLUE, ORANGE, GREEN, YELLOW, PINK, SKY, GREY)

plt.rcParams.update(
    {
        "figure.dpi": 80,
        "figure.figsize": (7.5, 2.8),
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "image.cmap": "cividis",
        "legend.frameon": False,
    }
)


def pictures(
    shown: Sequence[Image.Image | np.ndarray],
    titles: Sequence[str],
    size: float = 1.6,
    rows: int = 1,
) -> list[Axes]:
    """Draw images in rows, each under its title."""
    columns = len(shown) // rows
    figure, grid = plt.subplots(
        rows, columns, figsize=(size * columns, (size + 0.3 / rows) * rows), squeeze=False
    )
    for axes, picture, title in zip(grid.flat, shown, titles, strict=True):
        axes.imshow(picture, interpolation="nearest" if max(np.shape(picture)) < 100 else None)
        axes.set_title(title)
        axes.set_axis_off()
    return list(grid.flat)


def maps(
    heats: Sequence[Tensor],
    titles: Sequence[str],
    picture: Image.Image,
    mask: np.ndarray | None = None,
    size: float = 1.6,
    title: str = "",
) -> None:
    """Draw an image, then each map (rows, columns) of it. A light colour is a high value. A white
    line is drawn around `mask` (S, S)."""
    width, height = picture.size
    shown = pictures([picture] * (1 + len(heats)), ["the picture", *titles], size)
    for axes, heat in zip(shown[1:], heats, strict=True):
        axes.images[0].remove()
        axes.imshow(heat.numpy(), extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        if mask is not None:
            axes.contour(mask, levels=[0.5], colors="white", linewidths=1.2)
    if title:
        shown[0].figure.suptitle(title, x=0, ha="left")


def matrix(axes: Axes, values: Tensor, numbers: str = "", **options: object) -> None:
    """Draw a matrix as colours, and as numbers in the given format."""
    axes.imshow(values.numpy(), **options)
    axes.set_xticks([])
    axes.set_yticks([])
    if numbers:
        middle = (values.max() + values.min()) / 2
        for (i, j), value in np.ndenumerate(values.numpy()):
            colour = "black" if value > middle else "white"
            axes.text(j, i, format(value, numbers), ha="center", va="center", color=colour)


def contrast(shown: Sequence[Image.Image], captions: Sequence[str], logits: Tensor) -> None:
    """Draw the left part of the CLIP paper's figure 1 (arXiv 2103.00020) with a model's logits. One
    encoder reads images, the other reads captions, and each pair has a logit (B, B)."""
    count = len(shown)
    _, axes = plt.subplots(figsize=(7.5, 5.2))
    axes.set_aspect("equal")
    axes.set_axis_off()
    encoder(axes, [(-2.2, 0), (-2.2, count), (-1.2, count - 1), (-1.2, 1)], "image encoder", 90)
    encoder(axes, [(0, -2.2), (count, -2.2), (count - 1, -1.2), (1, -1.2)], "text encoder", 0)
    low, high = logits.min().item(), logits.max().item()
    for i in range(count):
        axes.imshow(shown[i], extent=(-3.35, -2.4, i + 0.975, i + 0.025))
        axes.text(i + 0.5, -2.4, captions[i], rotation=35, fontsize=9)
        cell(axes, -1, i, f"$I_{i + 1}$", SKY)
        cell(axes, i, -1, f"$T_{i + 1}$", YELLOW)
        for j in range(count):
            value = logits[i, j].item()
            shade = plt.colormaps["cividis"]((value - low) / (high - low))
            ink = "black" if value > (low + high) / 2 else "white"
            cell(axes, j, i, f"{value:.1f}", shade, ink)
        axes.add_patch(Rectangle((i, i), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.5))
    axes.text(-3.35, -0.2, "picture i")
    axes.text(count + 0.2, -2.4, "caption j")
    axes.set_title("logit of each picture with each caption (orange: true pairs)")
    axes.set_xlim(-3.5, count + 2)
    axes.set_ylim(count + 0.1, -5)


def encoder(axes: Axes, corners: list[tuple[float, float]], name: str, turned: int) -> None:
    axes.add_patch(Polygon(corners, facecolor="0.92", edgecolor="0.5"))
    x, y = np.mean(corners, axis=0)
    axes.text(x, y, name, ha="center", va="center", fontsize=9, rotation=turned)


def cell(axes: Axes, x: float, y: float, text: str, colour: object, ink: str = "black") -> None:
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white"))
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=ink, fontsize=9)


def tokens(rows: Sequence[Sequence[str]], names: Sequence[str], title: str) -> None:
    """Draw each row's tokens as a line of boxes. A box is as wide as its token."""
    _, axes = plt.subplots(figsize=(7.5, 0.42 * len(rows) + 0.7))
    for y, row in enumerate(rows):
        x = 0.0
        for i, token in enumerate(row):
            ends = token.endswith("</w>")
            text = token.removesuffix("</w>")
            box = Rectangle((x, y + 0.1), len(text), 0.8, facecolor=COLOURS[(0, 5)[i % 2]])
            axes.add_patch(box)
            ink = "white" if i % 2 == 0 else "black"
            axes.text(x + len(text) / 2, y + 0.5, text, ha="center", va="center", color=ink)
            x += len(text) + 0.5 * ends
    axes.set(title=title, xlabel="characters of the text", ylabel="after")
    axes.set_xlim(0, max(len("".join(row).replace("</w>", " ")) for row in rows))
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], names)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def beside(picture: Image.Image | np.ndarray) -> tuple[Axes, Axes]:
    """Draw an image on the left, and leave room for a plot on the right."""
    _, (left, right) = plt.subplots(1, 2, width_ratios=(1, 2))
    left.imshow(picture)
    left.set_axis_off()
    return left, right
