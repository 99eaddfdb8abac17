"""Draw the figure of `miniclip demo`."""

from collections.abc import Sequence
from os import PathLike

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import ImageOps

from miniclip.exhibits import UNKNOWN, Exhibit, Heat
from miniclip.figures.style import draw_bars, save_figure, show_picture
from miniclip.lens.heat import overlay


def draw_demo(
    scene: Exhibit, heats: Sequence[Heat], photographs: Sequence[Exhibit], path: str | PathLike[str]
) -> None:
    """Draw photographs with their labels, and below them a scene with captions and heat maps."""
    figure = Figure(figsize=(13, 9 if photographs else 4), layout="constrained")
    *above, below = figure.subfigures(2 if photographs else 1, 1, squeeze=False).flat
    if photographs:
        above[0].suptitle("Photographs: which of eight labels fits best?", x=0.01, ha="left")
        rows = above[0].subplots(2, len(photographs), height_ratios=(1, 1), squeeze=False)
        for top, bottom, photograph in zip(*rows, photographs, strict=True):
            square = ImageOps.fit(photograph.picture, (300, 300))  # the crop that the model sees
            note = " (never seen: a guess)" if photograph.name == UNKNOWN else ""
            show_picture(top, square, photograph.name + note)
            draw_bars(bottom, photograph.scores[:4], inside=True)
    below.suptitle(
        "A drawn scene: which caption fits best, and where is each object?", x=0.01, ha="left"
    )
    axes = below.subplots(1, 2 + len(heats), width_ratios=(2, 3, *(2 for _ in heats)))
    show_picture(axes[0], scene.picture, scene.name)
    draw_bars(axes[1], scene.scores, inside=True)
    for axis, heat in zip(axes[2:], heats, strict=True):
        draw_heat(axis, scene, heat)
    save_figure(figure, path)


def draw_heat(axes: Axes, scene: Exhibit, heat: Heat) -> None:
    """Draw a heat map over the grey image. A white line shows the object's true outline."""
    show_picture(axes, overlay(scene.picture, heat.lost), heat.phrase)
    axes.contour(heat.mask.numpy(), levels=[0.5], colors="white", linewidths=1.5)
