"""Suites of a start: from the files to the first logits, in this process and in new ones."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from miniclip.bench.first_logits import READY
from miniclip.bench.material import Setting
from miniclip.bench.measuring import Case, Contender, timed
from miniclip.bench.models import unit_rows


def load_suite(setting: Setting) -> Iterator[Case]:
    """From the files to the first logits, in this process."""
    contenders = []
    for name, ready in READY.items():
        run = partial(ready(), *first_inputs(setting))
        contenders.append(Contender(name, setting.timed(run)))
    yield setting.case("load", "files to logits", 1, "times", contenders, unit_rows)


def startup_suite(setting: Setting) -> Iterator[Case]:
    """The same in a new process, imports and all."""

    def run(library: str) -> Tensor:
        return in_process(setting, library)[1]

    contenders = [Contender(name, timed(partial(run, name))) for name in READY]
    work = "a new process, files to logits"
    yield setting.case("startup", work, 1, "times", contenders, unit_rows)


def memory_suite(setting: Setting) -> Iterator[Case]:
    """The most memory of the GPU, or of the process, which only Linux reports."""
    if not setting.device.startswith("cuda") and sys.platform != "linux":
        return
    contenders = [Contender(name, partial(in_process, setting, name)) for name in READY]
    size = (setting.directory / "model.safetensors").stat().st_size
    contenders.append(Contender("the weights file", lambda: (size, None)))
    work = "most at once, files to logits"
    yield setting.case("memory", work, 1, "bytes", contenders, unit_rows)


def first_inputs(setting: Setting) -> tuple[str, str, list[str], str, str]:
    """What `first_logits.py` reads: directory, photograph, texts, device and dtype."""
    texts = ["a photo of a cat", "a photo of two dogs"]
    photograph = str(setting.photographs[0])
    return str(setting.directory), photograph, texts, setting.device, setting.dtype_name


def in_process(setting: Setting, library: str) -> tuple[float, Tensor]:
    """The most bytes that a new process takes after its imports, and its first logits."""
    script = Path(__file__).with_name("first_logits.py")
    paths = [str(script.parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(script), library, json.dumps(first_inputs(setting))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"{library} failed in a process of its own: {reason}")
    logits, most = json.loads(done.stdout)
    return most, torch.tensor(logits)
