"""`miniclip demo`: scikit-image's photographs, classified offline by the embedded checkpoint."""

import numpy as np

from miniclip.zeroshot import Score

LABELS = ["airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ORANGE = "#d55e00"  # of Okabe and Ito's colours, which the colour-blind tell apart
PHOTOGRAPHS = ("chelsea", "rocket", "horse", "coffee")


def photographs() -> dict[str, np.ndarray]:
    """Photographs that lie inside scikit-image's package, as uint8 arrays (H, W, 3).

    The first is one of the ten things that the checkpoint `cifar10` knows. Of a rocket, the
    silhouette of a horse, and a cup of coffee it has never seen the like, and it shows.
    """
    try:
        import skimage.data
    except ImportError:
        raise ValueError("the demo needs photographs: pip install 'miniclip[demo]'") from None
    pictures = {}
    for name in PHOTOGRAPHS:
        picture = getattr(skimage.data, name)()
        if picture.dtype == bool:
            picture = picture.astype(np.uint8) * 255
        if picture.ndim == 2:
            picture = np.stack([picture] * 3, axis=-1)
        pictures[name] = picture
    return pictures


def draw(pictures: dict[str, np.ndarray], rankings: list[list[Score]], path: str) -> None:
    """Each picture above the bars of its five best labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(pictures), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(pictures), height_ratios=(3, 2), squeeze=False)
    for top, bottom, picture, scores in zip(*axes, pictures.values(), rankings, strict=True):
        top.imshow(picture)
        top.set_axis_off()
        best = scores[:5][::-1]
        bars = bottom.barh([score.label for score in best], [s.probability for s in best])
        bars[-1].set_color(ORANGE)
        bottom.bar_label(bars, [f"{score.probability:.0%}" for score in best], padding=3)
        bottom.set_xlim(0, 1.2)
        bottom.set_xticks([])
        bottom.spines[:].set_visible(False)
        bottom.tick_params(length=0)
    figure.savefig(path, dpi=120)
