"""Draw the recall of a retrieval at each rank."""

from os import PathLike

from matplotlib.figure import Figure
from torch import Tensor

from miniclip.figures.style import BLUE, ORANGE, save_figure

MOST = 100  # ranks


def draw_recall(ranks: dict[str, Tensor], path: str | PathLike[str]) -> None:
    """Draw recall@k for each direction: the share of queries with a right answer in the top k."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (direction, of), color in zip(ranks.items(), (BLUE, ORANGE), strict=True):
        counts = of[of <= MOST].bincount(minlength=MOST + 1)
        share = counts[1:].cumsum(0) / len(of)
        label = direction.replace("_", " ")
        axes.plot(range(1, MOST + 1), share.tolist(), color=color, label=label)
        for k in (1, 5, 10):
            at = (k, share[k - 1].item())
            axes.plot(*at, marker="o", color=color)
            axes.annotate(f"{at[1]:.1%}", at, (6, -12), textcoords="offset points", fontsize=9)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("k")
    axes.set_title("recall@k", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)
