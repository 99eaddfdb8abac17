"""What the three stages of a comparison share.

A stage returns rows, and the cause of the first that is out of tolerance. The stages are
`tokens.py`, `pixels.py` and `models.py`, in the order data flows.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from miniclip.parity.report import Difference

NAMES = ("model", "other")

Stage = tuple[list[Difference], str | None]
"""The cause is None if every row is within tolerance."""


def infinitely_far(site: str) -> Difference:
    """A row for two tensors that cannot be subtracted."""
    return Difference._make([site, *[math.inf] * 5, False])


def exact_difference(site: str, one: Tensor, other: Tensor) -> Difference:
    """A row for what must be equal, because no rounding is involved."""
    distance, size = largest_difference(one, other), max(other.abs().max().item(), 1e-30)
    return Difference(site, distance, distance / size, distance, distance, 0.0, distance == 0)


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Infinity for two shapes, and for NaN."""
    if one.shape != other.shape:
        return math.inf
    distance = (one.double() - other.double()).abs().max().item()
    return math.inf if math.isnan(distance) else distance


def run_both(
    run: Callable[[Any], Any], ours: Callable[..., Any], theirs: Callable[..., Any]
) -> tuple[list[Any], str]:
    """The results of both, or in words the error that one raises. Raise it if both raise one."""
    found: list[Any] = []
    errors: dict[str, ValueError] = {}
    for name, function in zip(NAMES, (ours, theirs)):
        try:
            found.append(run(function))
        except ValueError as error:
            errors[name] = error
    if len(errors) == 2:
        raise errors["model"]
    return found, "".join(f"{name} {raises(error)}" for name, error in errors.items())


def raises(error: Exception) -> str:
    """The error in words, its first line."""
    return f"raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"
