"""Measure how time and memory grow with the sizes of batch, image, text, labels and index.

    miniclip bench --growth --plot growth.png

In theory, the time is proportional to the model's multiply-adds, or to the number of labels or
rows. "growth" is the factor by which the time grew from one size to the next, divided by the
factor that theory predicts. It is below 1 if a fixed cost is a large part of the time.

                                              time        memory      growth

    images in a batch
                                   1       97.5 ms         25 MB
                                   4      296.8 ms         14 MB        0.76
                                  16      954.1 ms         77 MB        0.80
                                  64    4,207.9 ms        236 MB        1.10
                                 256   13,054.5 ms        956 MB        0.78

    pixels along a side
                                 224       94.1 ms         14 MB
                                 448      253.5 ms         15 MB        0.66
                                 672      525.3 ms         29 MB        0.88
                               1,024    1,413.3 ms        125 MB        1.04

    tokens of a text
                                  77       62.6 ms          5 MB
                                 256      135.7 ms         12 MB        0.62
                                 512      270.7 ms         21 MB        0.93
                               1,024      482.4 ms         76 MB        0.78
                               2,048    1,160.9 ms        119 MB        0.96

    labels embedded
                                  10       75.7 ms         12 MB
                                 100      496.3 ms         26 MB        0.66
                               1,000    4,411.6 ms         58 MB        0.89

    labels ranked
                                  10       97.6 ms         14 MB
                                 100       92.7 ms         15 MB        0.09
                               1,000       98.8 ms         14 MB        0.11
                              10,000      102.0 ms         14 MB        0.10
                             100,000    1,281.2 ms         35 MB        1.26

    rows searched
                               1,000        1.6 ms         11 MB
                              10,000       15.1 ms         85 MB        0.95
                             100,000       31.0 ms         85 MB        0.20
                           1,000,000      246.6 ms         85 MB        0.79
                          10,000,000    2,909.4 ms      6,929 MB        1.19

2026-11-29, Intel Xeon with AVX-512, 2 threads, torch 2.13.0. 10^7 rows were measured alone. Their
file has 20 GB, and Linux cannot keep all of it in 24 GB of memory. So the search reads a part from
the disk again. The memory in the table then includes pages of the file. The times vary: in another
run, 100,000 labels took a third of this time (growth 0.41). The command keeps freed memory for the
next tensors. Otherwise Linux clears memory for each new tensor, and an image takes 1.5 times as
long in a batch of 256 as in a batch of 64.

10^9 rows do not fit on this machine: float32 vectors of 512 numbers take 2 TB. An exact search
reads all of them. By calculation, FAISS's index `IVF1048576_HNSW32,PQ64` (product quantisation, 64
bytes a vector) takes 64 GB for the codes, 8 GB for the row numbers and 2 GB for the centroids. A
query that visits 64 of the 1,048,576 cells compares about 61,000 codes. FAISS's guide recommends
this index for 100M to 1B vectors. The recall depends on the data, and was not measured here.
In FAISS's logs (its wiki, bench_all_ivf_logs-deep1B), an index has the same number of cells, but
its codes take only 8 bytes. For 10^9 vectors of 96 numbers, queries that visit 64 cells find the
nearest vector among the first 100 results in 77 % of the cases, and as the first result in 23 %.
"""

import ctypes
import itertools
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from miniclip.bench.material import captions, prepare
from miniclip.checkpoint import Loaded, load
from miniclip.config import CLIPConfig
from miniclip.model import unit_norm
from miniclip.parity import random_inputs
from miniclip.parts import parts
from miniclip.published import published_shape
from miniclip.retrieval.index import BLOCK, Encoder, Index, Strings
from miniclip.surgery import extend_context, resize_image
from miniclip.terminal import progress
from miniclip.transform import ImageTransform
from miniclip.zeroshot.classifier import ZeroShotClassifier

ROUNDS = 3


class Step(NamedTuple):
    """A function that is timed, and the size of its work."""

    axis: str
    size: int
    theory: float  # as in Growth
    run: Callable[[], Any]


class Growth(NamedTuple):
    """The measured time and memory at one size."""

    axis: str  # what grows, such as "images in a batch"
    size: int
    seconds: float  # the median time of the rounds
    bytes: int | None  # the peak minus the memory in use before; None without Linux or CUDA
    theory: float  # number of multiply-adds, rows or labels; the time should grow with it


def growth(shape: str = "B/32", device: str = "cpu", sizes: int | None = None) -> list[Growth]:
    """Measure each of AXES at growing sizes, with random weights of a published shape.

    Args:
        shape: a name from PUBLISHED.
        sizes: how many sizes of each axis to time, from the smallest. None times all sizes.
    """
    rows: list[Growth] = []
    with TemporaryDirectory() as folder, torch.inference_mode():
        prepare(Path(folder), published_shape(shape))
        loaded = load(folder, device=device)
        for axis in progress(AXES, "step"):
            rows += measured(itertools.islice(axis(loaded, Path(folder)), sizes), device)
    return rows


def measured(steps: Iterator[Step], device: str) -> Iterator[Growth]:
    """Run each step once to warm up and to measure its memory. Then time it in ROUNDS rounds."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for axis, size, theory, run in steps:
        most = memory_of(run, device)
        seconds = []
        for _ in range(ROUNDS):
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds.append(time.perf_counter() - start)
        yield Growth(axis, size, statistics.median(seconds), most, theory)


def memory_of(run: Callable[[], Any], device: str) -> int | None:
    """Return the peak memory of `run` in bytes, beyond the memory in use before it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        run()
        return None
    # Return freed memory to the system: if `run` reused it, the result would be too small.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # the C library musl has no malloc_trim
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    run()
    return max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    """The current (VmRSS) or the largest (VmHWM) memory of this process in bytes, on Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


@cache
def tower_multiply_adds(config: CLIPConfig, tower: str) -> int:
    """The multiply-adds of a tower for one image, or for one text of the full context length."""
    return sum(part.multiply_adds for part in parts(config) if part.name.startswith(tower))


def images(loaded: Loaded, folder: Path) -> Iterator[Step]:
    """Encode batches of a growing number of images."""
    config = loaded.model.config
    work = tower_multiply_adds(config, "vision")
    for n in (1, 4, 16, 64, 256):
        pixels = random_inputs(config, images=n)[0].to(loaded.model.logit_scale.device)
        yield Step("images in a batch", n, n * work, lambda: loaded.model.encode_image(pixels))


def sides(loaded: Loaded, folder: Path) -> Iterator[Step]:
    """Encode one image of a growing size."""
    vision = loaded.model.config.vision
    for side in (vision.side, 2 * vision.side, 3 * vision.side, 32 * vision.side // 7):
        larger = resize_image(loaded.model, side // vision.patch_size * vision.patch_size)
        pixels = random_inputs(larger.config, images=1)[0].to(larger.logit_scale.device)
        work = tower_multiply_adds(larger.config, "vision")
        side = larger.config.vision.side
        yield Step("pixels along a side", side, work, lambda: larger.encode_image(pixels))


def contexts(loaded: Loaded, folder: Path) -> Iterator[Step]:
    """Encode one text of a growing length."""
    text = loaded.model.config.text
    for length in (text.context_length, 256, 512, 1024, 2048):
        longer = extend_context(loaded.model, length)
        ids = torch.full((1, length), text.eos_token_id, device=longer.logit_scale.device)
        work = tower_multiply_adds(longer.config, "text")
        yield Step("tokens of a text", length, work, lambda: longer.encode_text(ids))


def embedded_labels(loaded: Loaded, folder: Path) -> Iterator[Step]:
    """Make a classifier from a growing number of labels."""
    for n in (10, 100, 1_000):
        names = captions(n)
        yield Step("labels embedded", n, n, lambda: ZeroShotClassifier(*loaded[:2], names, ["{}"]))


def ranked_labels(loaded: Loaded, folder: Path) -> Iterator[Step]:
    """Rank a growing number of labels for one image."""
    classifier = ZeroShotClassifier(*loaded[:2], ["a label"])
    pixels = random_inputs(loaded.model.config, images=1)[0].to(classifier.weights.device)
    row = classifier.weights
    for n in (10, 100, 1_000, 10_000, 100_000):
        classifier.labels, classifier.weights = ["a label"] * n, row.repeat(n, 1)
        yield Step("labels ranked", n, n, lambda: classifier.rank(pixels))


def collection(loaded: Loaded, folder: Path) -> Iterator[Step]:
    """Search a growing number of rows in a memory-mapped file."""
    width = loaded.model.config.embed_dim
    draw = torch.Generator().manual_seed(0)
    query, *block = unit_norm(torch.randn(1 + BLOCK, width, generator=draw)).split([1, BLOCK])
    noise = Encoder("noise", None, "", "float32", ImageTransform())
    for n in (1_000, 10_000, 100_000, 1_000_000, 10_000_000):
        if shutil.disk_usage(folder).free < 6 * n * width:  # the file takes 4 * n * width bytes
            return
        path = folder / "rows"
        rows = torch.from_file(str(path), shared=True, size=n * width).view(n, width)
        for part in rows.split(BLOCK):
            part.copy_(block[0][: len(part)])
        names = Strings(torch.full((n,), ord("a"), dtype=torch.uint8), torch.arange(1, n + 1))
        index = Index(rows, names, noise)
        yield Step("rows searched", n, n, lambda: index.search(query[0]))
        path.unlink()


AXES = (images, sides, contexts, embedded_labels, ranked_labels, collection)


def growth_table(rows: Sequence[Growth]) -> str:
    """Return a paragraph for each axis, at most 80 columns wide."""
    lines = [f"{'':32}{'time':>14}{'memory':>14}{'growth':>12}"]
    for axis, group in itertools.groupby(rows, key=lambda row: row.axis):
        lines += ["", axis]
        before = None
        for row in group:
            memory = "" if row.bytes is None else f"{row.bytes / 1e6:,.0f} MB"
            cost = row.seconds / row.theory
            grown = f"{cost / before:.2f}" if before else ""
            lines.append(
                f"{row.size:>32,}{f'{row.seconds * 1e3:,.1f} ms':>14}{memory:>14}{grown:>12}"
            )
            before = cost
    return "\n".join(lines)
