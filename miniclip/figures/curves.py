"""Draw a training run: loss, scores on held-out data, throughput and memory."""

from collections.abc import Sequence
from os import PathLike

from matplotlib.figure import Figure

from miniclip.figures.style import BLUE, ORANGE, save_figure

PANELS = {
    "loss": "loss",
    "logit_scale": "exp(logit scale)",
    "lr": "learning rate",
    "pairs_per_second": "pairs a second",
    "peak_gib": "peak memory, GiB",
}
COLORS = (BLUE, ORANGE, "#009e73")


def draw_curves(rows: Sequence[dict[str, float]], path: str | PathLike[str]) -> None:
    """Draw each metric of a run against the steps, and mark the best score on held-out data."""
    scores = [name for name in rows[-1] if name.startswith("val_")]
    panels = {title: [name] for name, title in PANELS.items() if name in rows[-1]}
    if scores:
        panels = {"loss": panels.pop("loss"), "held-out data": scores} | panels
    lines = -(-len(panels) // 3)
    figure = Figure(figsize=(12, 3.6 * lines), layout="constrained")
    for i, (title, names) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, 3, i)
        for name, color in zip(names, COLORS, strict=False):
            found = {row["step"]: row[name] for row in rows if name in row}
            mark = "" if len(found) > 2 else "o"  # a line of one or two points needs markers
            label = name.removeprefix("val_").replace("_", " ")
            (line,) = axes.plot([*found], [*found.values()], color=color, linewidth=1.5)
            line.set(marker=mark, label=label)
        if names is scores:
            best = max((row for row in rows if scores[0] in row), key=lambda row: row[scores[0]])
            axes.plot(best["step"], best[scores[0]], "o", color=BLUE)
            axes.annotate(
                f"{best[scores[0]]:.1%}", (best["step"], best[scores[0]]), (0, 6),
                textcoords="offset points", ha="center",
            )  # fmt: skip
            axes.legend(frameon=False, fontsize=8)
        if names[0] in ("pairs_per_second", "peak_gib"):
            axes.set_ylim(0, 1.1 * max(found.values()))
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
