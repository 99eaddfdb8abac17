"""All suites, the function that runs them, and a description of the hardware and the versions."""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from miniclip.bench.material import MAX_DISTANCE, Setting, prepare
from miniclip.bench.measuring import Case, Row, measure
from miniclip.bench.models import text_suite, train_suite, vision_suite, zeroshot_suite
from miniclip.bench.pipeline import (
    embed_suite,
    load_suite,
    memory_suite,
    search_suite,
    startup_suite,
    tokenizer_suite,
    transform_suite,
)
from miniclip.engines import find_engine
from miniclip.files.models import check_device
from miniclip.peers import import_transformers, versions
from miniclip.published import published_shape
from miniclip.terminal import progress

SUITES: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "vision": vision_suite,
    "text": text_suite,
    "tokenizer": tokenizer_suite,
    "transform": transform_suite,
    "load": load_suite,
    "startup": startup_suite,
    "zeroshot": zeroshot_suite,
    "train": train_suite,
    "memory": memory_suite,
    "embed": embed_suite,
    "search": search_suite,
}


def bench(
    suites: Sequence[str] = tuple(SUITES),
    *,
    shape: str = "B/32",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    batch: int | None = None,
    engines: Sequence[str] = (),
) -> list[Row]:
    """Time the same work in miniclip and in every other library that is installed.

    Args:
        suites: names from SUITES.
        shape: a name from PUBLISHED. The weights are random.
        compile: also time compiled encoders.
        batch: the number of images or texts. By default 16, or 256 on a GPU.
        engines: names from miniclip.engines. These engines also run miniclip's towers.
    """
    for name in suites:
        if name not in SUITES:
            raise ValueError(f"no suite is called {name!r}; expected {', '.join(SUITES)}")
    shape = published_shape(shape)
    if dtype not in MAX_DISTANCE:
        names = ", ".join(str(known).removeprefix("torch.") for known in MAX_DISTANCE)
        raise ValueError(f"dtype is {dtype}; expected one of {names}")
    batch = batch if batch is not None else 256 if device.startswith("cuda") else 16
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    check_device(device)
    for name in engines:
        find_engine(name)
    import_transformers()  # fails early if transformers is not installed
    rows: list[Row] = []
    with TemporaryDirectory() as folder, exact_float32():
        config = prepare(Path(folder), shape)
        asked = (shape, device, dtype, compile, batch, tuple(engines))
        setting = Setting(Path(folder), config, *asked)
        bar = progress(suites, "suite")
        for name in bar:
            bar.set_description(name, refresh=False)
            for case in SUITES[name](setting):
                rows += measure(case)
    return rows


@contextmanager
def exact_float32() -> Iterator[None]:
    """Turn off TF32 in a `with` block. TF32 rounds float32, and cuDNN uses TF32 by default."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def environment(device: str) -> dict[str, str]:
    """The date, the hardware and the versions of the libraries."""
    hardware = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"
    hardware += f", {torch.get_num_threads()} threads"
    if device.startswith("cuda"):
        hardware = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; {hardware}"
    return {"date": str(date.today()), "hardware": hardware} | versions()


def processor() -> str:
    """The name of the CPU, from Linux if possible, otherwise from Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
