"""What was measured: a table, and what it was measured with."""

import itertools
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from miniclip.bench.measuring import Row
from miniclip.peers import versions


def environment(device: str) -> dict[str, str]:
    """The hardware and the versions that numbers were measured with."""
    hardware = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"
    hardware += f", {torch.get_num_threads()} threads"
    if device.startswith("cuda"):
        hardware = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; {hardware}"
    return {"date": str(date.today()), "hardware": hardware} | versions()


def processor() -> str:
    """The name of the CPU, from Linux or else from Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(rows: Sequence[Row]) -> str:
    """A paragraph for each case, 80 columns wide."""
    lines = ["Medians over the rounds, and of each round's cost in miniclip's (quartiles)."]
    for (suite, work), group in itertools.groupby(rows, key=lambda row: row[:2]):
        lines += ["", f"{suite}: {work}"]
        lines += [f"  {row.contender:<24}{_numbers(row)}" for row in group]
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
