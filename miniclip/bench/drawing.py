"""The figures of `miniclip bench`: the costs of several libraries, and how time grows with size."""

import itertools
from collections.abc import Sequence
from os import PathLike

from miniclip.bench.growth import Growth
from miniclip.bench.measuring import Row
from miniclip.figures.style import BLUE, ORANGE, Figure, save_figure


def draw_bench(rows: Sequence[Row], path: str | PathLike[str]) -> None:
    """Draw the ratio of each contender's cost to miniclip's cost.

    A bar ends at the median, and a line joins the quartiles. The scale is logarithmic, so the
    ratios 0.5 and 2 are equally far from 1.
    """
    timed = [row for row in rows if row.ratio is not None]
    titles = dict.fromkeys(f"{row.suite}: {row.work}" for row in timed)
    lines: list[Row | str] = []  # the titles and the bars, from top to bottom
    for title in titles:
        lines += [title, *(row for row in timed if f"{row.suite}: {row.work}" == title)]
    figure = Figure(figsize=(9, 0.8 + 0.26 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="0.6", linewidth=1, zorder=0)
    for y, line in enumerate(lines):
        if isinstance(line, str):
            heading = axes.text(0, y, line, transform=axes.get_yaxis_transform(), va="center")
            heading.set(weight="bold", backgroundcolor="white")
            continue
        assert line.ratio is not None  # `timed` has only rows with a ratio
        lower, median, upper = line.ratio
        color = ORANGE if line.contender.startswith("miniclip") else BLUE
        # A bar is grey if the contender does only a part of the work.
        color = "0.7" if line.difference is None else color
        axes.barh(y, median - 1, left=1, color=color, height=0.6)
        axes.errorbar(
            median, y, xerr=[[median - lower], [upper - median]], color="black", linewidth=1
        )
        axes.annotate(
            f"{median:.2f}", (max(upper, 1), y), (5, 0), textcoords="offset points", va="center"
        )
    names = [line.contender if isinstance(line, Row) else "" for line in lines]
    axes.set_yticks(range(len(lines)), names)
    axes.set_ylim(len(lines) - 0.5, -0.7)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.1)
    axes.set_xlabel("cost divided by miniclip's cost (logarithmic)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    save_figure(figure, path)


def draw_growth(rows: Sequence[Growth], path: str | PathLike[str]) -> None:
    """Draw measured and theoretical time against the size, in one panel for each `Growth.axis`."""
    axes = {axis: list(group) for axis, group in itertools.groupby(rows, lambda row: row.axis)}
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for panel, (axis, group) in zip(figure.subplots(2, 3).flat, axes.items(), strict=True):
        sizes = [row.size for row in group]
        theory = [group[-1].seconds * row.theory / group[-1].theory for row in group]
        panel.plot(sizes, theory, "--", color=BLUE, label="theory, scaled to fit the largest size")
        panel.plot(sizes, [row.seconds for row in group], "o-", color=ORANGE, label="measured")
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds")
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.suptitle("How time grows with size")
    save_figure(figure, path)
