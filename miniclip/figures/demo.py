"""The picture of `miniclip demo`."""

from collections.abc import Sequence
from os import PathLike

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from miniclip.exhibits import Exhibit, Heat
from miniclip.figures.style import draw_bars, save_figure, show_picture
from miniclip.lens.heat import overlay


def draw_demo(
    scene: Exhibit, heats: Sequence[Heat], photographs: Sequence[Exhibit], path: str | PathLike[str]
) -> None:
    """A drawn scene with its captions and heat maps, above photographs with their labels."""
    figure = Figure(figsize=(13, 9 if photographs else 4), layout="constrained")
    halves = figure.subfigures(2, 1, squeeze=False, height_ratios=(4, 5)).flat
    top, *bottom = halves if photographs else [figure]
    axes = top.subplots(1, 2 + len(heats), width_ratios=(2, 3, *(2 for _ in heats)))
    show_picture(axes[0], scene.picture, scene.name)
    draw_bars(axes[1], scene.scores, inside=True)
    for axis, heat in zip(axes[2:], heats, strict=True):
        draw_heat(axis, scene, heat)
    if photographs:
        rows = bottom[0].subplots(2, len(photographs), height_ratios=(3, 2), squeeze=False)
        for above, below, photograph in zip(*rows, photographs, strict=True):
            show_picture(above, photograph.picture, photograph.name)
            draw_bars(below, photograph.scores[:5])
    save_figure(figure, path)


def draw_heat(axes: Axes, scene: Exhibit, heat: Heat) -> None:
    """Where the phrase is seen, over the picture in grey; the object's true outline in white."""
    show_picture(axes, overlay(scene.picture, heat.lost), heat.phrase)
    axes.contour(heat.mask.numpy(), levels=[0.5], colors="white", linewidths=1.5)
