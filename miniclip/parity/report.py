"""What a comparison found: how far apart two models are at each site, in the order data flows."""

import re
from collections import Counter
from typing import NamedTuple

import torch

from miniclip.peers import versions


class Difference(NamedTuple):
    """The largest difference of any number at a site.

    An error is the distance from the truth: what the second model computes in float64.
    """

    site: str
    absolute: float
    relative: float  # to the largest number there
    float64: float  # absolute, where both run in float64
    model_error: float  # how far the first model is from the truth
    other_error: float  # how far the second is
    within_tolerance: bool


class Report(NamedTuple):
    """Every site in the order data flows, the first out of tolerance, and its likely cause."""

    rows: list[Difference]
    first: str | None
    cause: str | None  # "" if nothing is known

    def __str__(self) -> str:
        if self.first is None:
            return f"within tolerance at all {len(self.rows)} sites"
        failed = sum(not row.within_tolerance for row in self.rows)
        verdict = f"out of tolerance at {failed} of {len(self.rows)} sites, first at {self.first}"
        return f"{verdict}\nlikely cause: {self.cause}" if self.cause else verdict


def summarize(rows: list[Difference]) -> list[Difference]:
    """One row for all blocks of a tower, with the largest of their differences."""
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
    """At how many sites each model is nearer to the truth. Tokens and pixels do not count."""
    errors = [row[4:6] for row in rows if row.site not in ("tokens", "pixels")]
    return {
        "model": sum(ours < theirs for ours, theirs in errors),
        "other": sum(ours > theirs for ours, theirs in errors),
        "equal": sum(ours == theirs for ours, theirs in errors),
    }


def measured_with(device: str | torch.device = "cpu") -> str:
    """The versions and the processor that numbers were measured with, in one line."""
    found = versions()
    named = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers"))
    if torch.device(device).type == "cuda":
        return f"{named}, {torch.cuda.get_device_name(device)}"
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{named}, CPU with {capability}, threads: {threads}"
