"""The result of a comparison: how far apart two models are at each site."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miniclip.peers import versions

NAMES = ("model", "other")  # the names of the two models in a report


class Difference(NamedTuple):
    """The largest differences at a site."""

    site: str
    absolute: float
    relative: float  # the absolute difference, divided by the largest number at the site
    float64: float  # the absolute difference between the models' float64 runs
    model_error: float  # how far the first model is from the second model's float64 run
    other_error: float  # how far the second model is from its own float64 run
    within_tolerance: bool


Stage = tuple[list[Difference], str | None]
"""(rows, cause) of a stage: tokens, pixels, models or gradients. The cause is None if all rows are
within tolerance."""


class Report(NamedTuple):
    """The rows of all sites in order, the first site out of tolerance, and the cause."""

    rows: list[Difference]
    first: str | None
    cause: str | None  # the likely cause; "" if no cause is known

    def __str__(self) -> str:
        if self.first is None:
            return f"within tolerance at all {len(self.rows)} sites"
        failed = sum(not row.within_tolerance for row in self.rows)
        verdict = f"out of tolerance at {failed} of {len(self.rows)} sites, first at {self.first}"
        return f"{verdict}\nlikely cause: {self.cause}" if self.cause else verdict


def largest(x: Tensor) -> float:
    """Return the largest absolute number, or 0 for an empty tensor, as in a layer without heads."""
    return x.abs().max().item() if x.numel() else 0.0


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference, or infinity for different shapes and for NaN."""
    if one.shape != other.shape:
        return math.inf
    distance = largest(one.double() - other.double())
    return math.inf if math.isnan(distance) else distance


def exact_difference(
    site: str, one: Tensor | None = None, other: Tensor | None = None
) -> Difference:
    """Return a row for tensors that must be equal. A missing tensor gives infinity."""
    if one is None or other is None:
        return Difference._make([site, *[math.inf] * 5, False])
    distance, size = largest_difference(one, other), max(largest(other), 1e-30)
    return Difference(site, distance, distance / size, distance, distance, 0.0, distance == 0)


def raises(error: Exception) -> str:
    """Describe an error by its type and the first line of its message."""
    return f"raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def run_both(
    run: Callable[[Any], Any], ours: Callable[..., Any], theirs: Callable[..., Any]
) -> tuple[list[Any], str]:
    """Apply `run` to both functions. Return the results and an error message. The message is ""
    unless one function raises an error. If both do, raise the first error as a ValueError."""
    found: list[Any] = []
    errors: dict[str, Exception] = {}
    for name, function in zip(NAMES, (ours, theirs)):
        try:
            found.append(run(function))
        except Exception as error:  # a user's function can raise any error
            errors[name] = error
    if len(errors) == 2:
        first = errors["model"]
        raise first if isinstance(first, ValueError) else ValueError(f"model {raises(first)}")
    return found, "".join(f"{name} {raises(error)}" for name, error in errors.items())


def summarize(rows: list[Difference]) -> list[Difference]:
    """Merge the rows of a tower's blocks: one row for each site, with the largest numbers."""
    depth = Counter(row.site.partition(".")[0] for row in rows if row.site.endswith(".resid_post"))
    largest: dict[str, Difference] = {}
    for row in rows:
        last = depth[row.site.partition(".")[0]] - 1
        site = re.sub(r"blocks\.\d+", f"blocks.0-{last}", row.site)
        seen = largest.get(site, row)
        numbers = map(max, seen[1:-1], row[1:-1])
        within = seen.within_tolerance and row.within_tolerance
        largest[site] = Difference._make([site, *numbers, within])
    return list(largest.values())


def nearer(rows: list[Difference]) -> dict[str, int]:
    """Count the sites at which the first model, the second or neither has the smaller error."""
    errors = [row[4:6] for row in rows if row.site not in ("tokens", "pixels")]
    nearer = Counter("equal" if a == b else "model" if a < b else "other" for a, b in errors)
    return {name: nearer[name] for name in ("model", "other", "equal")}


def measured_with(device: str | torch.device = "cpu") -> str:
    """Return a line that names the libraries' versions and the processor of a measurement."""
    found = versions()
    named = ", ".join(
        f"{name} {found[name]}" for name in ("torch", "transformers") if name in found
    )
    if torch.device(device).type == "cuda":
        return f"{named}, {torch.cuda.get_device_name(device)}"
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{named}, CPU with {capability}, threads: {threads}"
