"""Draw accuracy against the number of examples, like figure 6 of the paper."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

from matplotlib.figure import Figure

from miniclip.figures.style import BLUE, ORANGE, save_figure


def draw_few_shot(
    rows: Sequence[dict[str, Any]], names: dict[str, str], path: str | PathLike[str]
) -> None:
    """Draw a line for each method. Zero-shot is dashed. Error bars are one standard deviation."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method, color in (("probe", BLUE), ("text", ORANGE)):
        shots, mean, std = zip(
            *((row["shots"], row["mean"], row["std"]) for row in rows if row["method"] == method),
            strict=True,
        )
        axes.errorbar(shots, mean, std, marker="o", capsize=3, color=color, label=names[method])
    (zeroshot,) = (row["mean"] for row in rows if row["method"] == "zeroshot")
    label = f"{names['zeroshot']}, {zeroshot:.1%}"
    axes.axhline(zeroshot, color="0.4", linestyle="--", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, map(str, shots))
    axes.set_xlabel("examples of each class")
    axes.set_title("accuracy", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)
