"""Loss and temperature over a training run."""

from collections.abc import Sequence
from os import PathLike

from matplotlib.figure import Figure

from miniclip.figures.style import BLUE, ORANGE, save_figure


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
    save_figure(figure, path)
