"""The clock: who takes part, what a trial costs, and how outputs are compared.

A round is one trial of each contender, and a ratio is taken within a round, because a slow moment
of the machine slows them all. Nothing is timed before its output is found equal to miniclip's.
"""

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miniclip.model import unit_norm

SECONDS = 6.0  # for each case

Trial = Callable[[], tuple[float, Any]]
"""One who does the work once returns the cost, in seconds or bytes, and the output. An output of
None is not compared: it comes from less work, and is shown for scale."""


class Case(NamedTuple):
    """One piece of work. The first contender is miniclip; the others are compared with it."""

    suite: str
    work: str
    # Of units per trial. The name hides a method of tuples, which nobody needs here.
    count: int  # type: ignore[assignment]
    unit: str  # "images", "texts", ...; or "bytes", which are themselves the cost
    trials: dict[str, Trial]  # by contender
    form: Callable[[Any], Any]  # an output in the form that `distance` compares
    tolerance: float = 0.0
    loose: dict[str, float] = {}  # tolerances of contenders in reduced precision


class Row(NamedTuple):
    """What one contender took. Quartiles are (lower, median, upper)."""

    suite: str
    work: str
    count: int  # type: ignore[assignment]  # as in Case
    unit: str
    contender: str
    difference: float | None  # of its output from miniclip's; None if it has no output
    cost: tuple[float, float, float] | None  # seconds or bytes; None: not timed, because it differs
    ratio: tuple[float, float, float] | None  # of its cost to miniclip's in the same round


def measure(case: Case, seconds: float = SECONDS) -> list[Row]:
    """Compare all outputs, and then time those that are equal to miniclip's."""
    outputs = []
    for trial in case.trials.values():
        output = trial()[1]  # `form` at once: a CUDA graph reuses its memory
        outputs.append(None if output is None else case.form(output))
    differences = [None if out is None else distance(out, outputs[0]) for out in outputs]
    if differences[0] != 0:  # from itself
        raise RuntimeError(f"{case.suite}: miniclip's own output has numbers that are not finite")
    named = dict(zip(case.trials, differences, strict=True))
    equal = {
        name: case.trials[name]
        for name, far in named.items()
        if far is None or far <= case.loose.get(name, case.tolerance)
    }
    alternate(equal, 1, least=1, most=3)  # compilers, caches and clocks warm up
    costs = dict(zip(equal, zip(*alternate(equal, seconds), strict=True), strict=True))
    first = next(iter(costs.values()))
    rows = []
    for name, difference in named.items():
        cost = ratio = None
        if name in costs:
            cost = quartiles(costs[name])
            ratio = quartiles([a / b for a, b in zip(costs[name], first, strict=True)])
        rows.append(Row(*case[:4], name, difference, cost, ratio))
    return rows


def alternate(
    trials: dict[str, Trial], seconds: float, *, least: int = 3, most: int = 40
) -> list[list[float]]:
    """The costs of each round, in the given order.

    Trials of a round run in random order: a large product leaves the caches full, and the same
    contender must not always follow it.
    """
    draw = random.Random(0)
    start = time.perf_counter()
    rounds: list[list[float]] = []
    while len(rounds) < least or (len(rounds) < most and time.perf_counter() - start < seconds):
        costs = {name: trials[name]()[0] for name in draw.sample(list(trials), len(trials))}
        rounds.append([costs[name] for name in trials])
    return rounds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile.

    >>> quartiles([5.0, 1.0, 2.0, 4.0, 3.0])
    (2.0, 3.0, 4.0)
    """
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def distance(one: Any, other: Any) -> float:
    """The largest |one - other| / |other| of any row of two tensors (..., N).

    For other things than tensors: 0 if they are equal, or else infinity.

    >>> distance(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 5.0]])) < 0.2
    True
    """
    if not isinstance(one, Tensor):
        return 0.0 if one == other else math.inf
    if one.shape != other.shape:
        return math.inf
    one, other = one.double(), other.double()
    far = ((one - other).norm(dim=-1) / other.norm(dim=-1)).max().item()
    return math.inf if math.isnan(far) else far


def unit_rows(embeds: Tensor) -> Tensor:
    """Embeddings (B, E) in the form that is compared: unit vectors in float64 on the CPU."""
    return unit_norm(embeds.double().cpu())


def timed(run: Callable[[], Any], device: str = "cpu") -> Trial:
    """A trial that costs the seconds of `run`, including the work it starts on a GPU."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def trial() -> tuple[float, Any]:
        wait()
        start = time.perf_counter()
        output = run()
        wait()
        return time.perf_counter() - start, output

    return trial


def table(rows: Sequence[Row]) -> str:
    """A paragraph for each case, 80 columns wide."""
    lines = ["Medians over the rounds, and of each round's cost in miniclip's (quartiles)."]
    for (suite, work), group in itertools.groupby(rows, key=lambda row: row[:2]):
        lines += ["", f"{suite}: {work}"]
        for row in group:
            lines.append(f"  {row.contender:<24}{_numbers(row)}")
            if row.ratio and (row.difference or 0) > 1e-3:  # of unit vectors
                lines.append(f"{'':28}its output is off by {row.difference:.0e}")
    return "\n".join(lines)


def _numbers(row: Row) -> str:
    if row.cost is None or row.ratio is None:
        return f"not timed: its output is another, by {row.difference:.1g}"
    _, cost, _ = row.cost
    if row.unit == "bytes":
        amount = f"{cost / 1e6:>9,.0f} MB{'':13}"
    else:
        rate = row.count / cost
        amount = f"{cost * 1e3:>9,.1f} ms{rate:>10,.{int(rate < 100)}f}/s "
    lower, median, upper = row.ratio
    return f"{amount}{median:>7.2f}x ({lower:.2f} to {upper:.2f})"
