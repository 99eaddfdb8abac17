"""Plot the differences between two models against depth."""

from os import PathLike

from miniclip.figures.style import BLUE, ORANGE, Figure, save_figure
from miniclip.parity.report import Report

NOTHING = 1e-17  # a difference of 0 is drawn at this height, because its logarithm is infinite


def draw_parity(report: Report, path: str | PathLike[str]) -> None:
    """Save a plot on a logarithmic scale, with a panel for each tower."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    curves = {
        "absolute": ("difference", ORANGE, "-", 4),  # thick, so that the next curve cannot hide it
        "float64": ("difference in float64", BLUE, "-", 1.5),
        "model_error": ("error of model", "#009e73", "--", 1.5),
        "other_error": ("error of other", "#e69f00", ":", 1.5),
    }
    for axes, tower in zip(panels, ("vision", "text"), strict=True):
        # Patterns are left out, because transformers may compute them in float32 in a float64 run.
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
    panels[0].set_ylabel("largest difference or error")
    panels[0].set_yticks([NOTHING, *(10.0**n for n in range(-15, 4, 3))])
    panels[0].set_yticklabels(["0", *(f"$10^{{{n}}}$" for n in range(-15, 4, 3))])
    panels[1].legend(frameon=False, fontsize=9)
    figure.suptitle(str(report).replace("\n", "; "), fontsize=11)
    save_figure(figure, path)
