"""Check the package on a GPU, in one run of at most eight minutes.

    python tests/on_a_gpu.py -o gpu.json                # on cuda
    python tests/on_a_gpu.py -o gpu.json --device cpu   # a rehearsal with tiny shapes

It runs the tests marked `gpu` and one large matrix product. Then it tests parity with transformers
at the four official shapes, in three precisions. At the end it runs suites of `miniclip bench`,
first eager, then compiled. It writes its results as JSON after each part of the run, and prints a
table and the targets in Markdown. Parts that do not fit into eight minutes are left out and
counted. The exit status is 1 if parity, a test or a target fails, or if a part is left out.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from twin import TINY

from miniclip.bench import Row, bench, environment, suites, table
from miniclip.bench.growth import tower_multiply_adds
from miniclip.bench.measuring import measure, quartiles, timed
from miniclip.parity import compare
from miniclip.parity.pairs import random_pair
from miniclip.published import PUBLISHED

MINUTES = 8
OFFICIAL = ("B/32", "B/16", "L/14", "L/14-336")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_GPU = {"shapes": OFFICIAL, "timed": ("B/32", "L/14"), "batches": (1, 256), "seconds": 3.0}
ON_CPU = {"shapes": ("tiny",), "timed": ("tiny",), "batches": (1, 2), "seconds": 0.0}


def gpu_tests(device: str) -> Iterator[tuple[str, Any]]:
    """Run the tests marked `gpu`, and keep the last line that pytest prints."""
    if device != "cpu":
        argv = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(Path(__file__).parent)]
        done = subprocess.run(argv, capture_output=True, text=True)
        last = (done.stdout.strip().splitlines() or [done.stderr])[-1]
        yield "pytest -m gpu", {"passed": done.returncode == 0, "said": last}


def parity(shape: str, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Any]]:
    """Yield the difference between the logits, and the first site that is out of tolerance."""
    report = compare(*random_pair(shape), dtype=dtype, device=device)
    logits = next(row for row in report.rows if row.site == "logits")
    name = str(dtype).removeprefix("torch.")
    yield f"parity {shape} {name}", {"first": report.first, "logits": logits._asdict()}


def timing(**options: Any) -> Iterator[tuple[str, Any]]:
    """Yield the rows of one call of `bench`."""
    name = " ".join(str(value).removeprefix("torch.") for value in options.values())
    yield f"bench {name}", bench(**options)


LARGE = "256 images, L/14, bfloat16"


def large_product(device: str, size: int) -> Iterator[tuple[str, Any]]:
    """Time a large matrix product, and estimate how long the work in LARGE takes at that speed."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    trial = timed(lambda: a @ b, device)
    scale = 256 * tower_multiply_adds(PUBLISHED["L/14"], "vision") / size**3
    cost = quartiles([scale * trial()[0] for _ in range(12)][2:])  # two trials are warm-up
    yield (
        "product",
        [Row("vision", LARGE, 256, "images", "one large product", None, cost, (1, 1, 1))],
    )


def parts(device: str, plan: dict[str, Any]) -> Iterator[Callable[[], Iterator[tuple[str, Any]]]]:
    """Yield all parts of the run. The quickest parts come first."""
    yield partial(gpu_tests, device)
    yield partial(large_product, device, 64 if device == "cpu" else 8192)
    for shape in plan["shapes"]:
        for dtype in DTYPES:
            yield partial(parity, shape, dtype, device)
    one, many = plan["batches"]
    for compiled in (False, True):
        for shape in plan["timed"]:
            for dtype in DTYPES[: 1 if compiled and device == "cpu" else 2]:
                same: dict[str, Any] = {"shape": shape, "device": device, "dtype": dtype}
                same["compile"] = compiled
                yield partial(timing, suites=("vision", "text"), **same, batch=many)
                yield partial(timing, suites=("text",), **same, batch=one)
                if not compiled:
                    yield partial(timing, suites=("train", "memory"), **same, batch=many)


def targets(rows: list[Row]) -> Iterator[tuple[str, float, float]]:
    """Yield each target's name, the ratio to reach, and the measured ratio."""
    medians = {(row.suite, row.work, row.contender): row.cost[1] for row in rows if row.cost}

    def times(work: str, peer: str, ours: str) -> list[float]:
        """Divide the peer's time by ours, for each piece of work that both libraries did."""
        return [
            medians[(suite, text, peer)] / cost
            for (suite, text, contender), cost in medians.items()
            if contender == ours and work in f"{suite}: {text}" and (suite, text, peer) in medians
        ]

    compiled = "miniclip, compiled"
    for name, least, found in (
        ("speed-up over eager transformers: one image, compiled", 3.0,
         times("vision: 1 image", "transformers", compiled)),
        ("speed-up over eager transformers: 256 images, L/14, bfloat16", 1.3,
         times(LARGE, "transformers", compiled)),
        ("share of the speed of one large matrix product: 256 images, L/14", 0.55,
         times(LARGE, "one large product", compiled)),
        ("speed-up over open_clip: a training step", 1.2,
         times("train:", "open_clip", "miniclip")),
    ):  # fmt: skip
        yield name, least, min(found, default=float("nan"))


def main(argv: list[str] | None = None) -> int:
    """Run all parts that the time allows, and report their results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("-o", "--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args(argv)
    plan = ON_CPU if args.device == "cpu" else ON_GPU
    PUBLISHED["tiny"] = TINY
    suites.measure = partial(measure, seconds=plan["seconds"])  # type: ignore[assignment]
    began, found, left_out = time.monotonic(), {"environment": environment(args.device)}, 0
    rows: list[Row] = []
    failed = False
    for part in parts(args.device, plan):
        if time.monotonic() - began > 60 * (MINUTES - 1):  # start no part in the last minute
            left_out += 1
            continue
        try:
            results = list(part())
        except Exception as error:  # the run continues with the next part
            results = [(str(part), {"error": f"{type(error).__name__}: {error}"})]
        for name, result in results:
            print(f"{time.monotonic() - began:6.0f} s  {name}", file=sys.stderr)
            if isinstance(result, list):
                rows += result
                result = [row._asdict() for row in result]
            elif "error" in result or result.get("first") or result.get("passed") is False:
                failed = True
                print(f"          {result}", file=sys.stderr)
            found[name] = result
        args.out.write_text(json.dumps(found, indent=1))
    print(f"```\n{table(rows)}\n```\n\n| target | at least | found |\n|--|--|--|")
    for name, least, reached in targets(rows):
        failed |= not reached >= least
        print(f"| {name} | {least} | {reached:.2f} |")
    if left_out:
        print(f"\n{left_out} parts were left out: {MINUTES} minutes were over")
    return int(failed or left_out > 0)


if __name__ == "__main__":
    sys.exit(main())
