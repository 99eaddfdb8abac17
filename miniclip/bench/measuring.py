"""Time several contenders at the same work, and compare their outputs.

A contender is a library, an engine, or a part of the work. A round is one trial of each contender.
Ratios are computed within a round, because a slow moment of the machine slows the whole round.
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
"""A function that does the work once and returns its cost, in seconds or bytes, and its output. The
output is None, and is not compared, if the trial does only a part of the work."""


class Case(NamedTuple):
    """Work that several contenders do. The first contender is miniclip."""

    suite: str
    work: str
    # The number of units in a trial. The field hides the method `tuple.count`, which is not used.
    count: int  # type: ignore[assignment]
    unit: str  # "images", "texts", ...; "bytes" if the cost is memory
    trials: dict[str, Trial]  # the keys are the names of the contenders
    form: Callable[[Any], Any]  # converts an output before `distance` compares it
    tolerance: float = 0.0
    loose: dict[str, float] = {}  # larger tolerances, for engines in bfloat16 or int8


class Row(NamedTuple):
    """The result of one contender. Tuples are (lower quartile, median, upper quartile)."""

    suite: str
    work: str
    count: int  # type: ignore[assignment]  # as in Case
    unit: str
    contender: str
    difference: float | None  # from miniclip's output; None if there is no output
    cost: tuple[float, float, float] | None  # seconds or bytes; None if not timed
    ratio: tuple[float, float, float] | None  # its cost divided by miniclip's cost


def measure(case: Case, seconds: float = SECONDS) -> list[Row]:
    """Compare all outputs with miniclip's output, then time the contenders that agree with it."""
    outputs = []
    for trial in case.trials.values():
        output = trial()[1]  # `form` converts it now, because a CUDA graph overwrites it later
        outputs.append(None if output is None else case.form(output))
    differences = [None if out is None else distance(out, outputs[0]) for out in outputs]
    if differences[0] != 0:  # an output with NaN or infinity differs from itself
        raise RuntimeError(f"{case.suite}: miniclip's own output has numbers that are not finite")
    named = dict(zip(case.trials, differences, strict=True))
    equal = {
        name: case.trials[name]
        for name, far in named.items()
        if far is None or far <= case.loose.get(name, case.tolerance)
    }
    alternate(equal, 1, least=1, most=3)  # warm up, to compile and to fill caches
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
    """Return the costs of each round, in the order of `trials`.

    Each round has its own random order, because a trial leaves data in the caches. This data
    changes the cost of the next trial.
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
    """The largest relative difference between corresponding rows of two tensors (..., N).

    A difference is divided by the norm of the row of `other`. Values of other types have the
    distance 0 if they are equal, and infinity if not.

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
    """Convert embeddings (B, E) to unit vectors in float64 on the CPU."""
    return unit_norm(embeds.double().cpu())


def timed(run: Callable[[], Any], device: str = "cpu") -> Trial:
    """Make a trial whose cost is the time of `run` in seconds, including the time on a GPU."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def trial() -> tuple[float, Any]:
        wait()
        start = time.perf_counter()
        output = run()
        wait()
        return time.perf_counter() - start, output

    return trial


def table(rows: Sequence[Row]) -> str:
    """Return a paragraph for each case, at most 80 columns wide."""
    lines = ["Median cost, median rate, and median ratio to miniclip's cost (with quartiles)."]
    for (suite, work), group in itertools.groupby(rows, key=lambda row: row[:2]):
        lines += ["", f"{suite}: {work}"]
        for row in group:
            lines.append(f"  {row.contender:<24}{_numbers(row)}")
            if row.ratio and (row.difference or 0) > 1e-3:  # more than rounding in float32
                lines.append(f"{'':28}its output differs from miniclip's by {row.difference:.0e}")
    return "\n".join(lines)


def _numbers(row: Row) -> str:
    if row.cost is None or row.ratio is None:
        return f"not timed: its output differs from miniclip's by {row.difference:.1g}"
    _, cost, _ = row.cost
    if row.unit == "bytes":
        amount = f"{cost / 1e6:>9,.0f} MB{'':13}"
    else:
        rate = row.count / cost
        amount = f"{cost * 1e3:>9,.1f} ms{rate:>10,.{int(rate < 100)}f}/s "
    lower, median, upper = row.ratio
    return f"{amount}{median:>7.2f}x ({lower:.2f} to {upper:.2f})"
