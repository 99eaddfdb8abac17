"""Several processes that train together, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from miniclip.files.models import check_device


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Give this process's device. Under torchrun, which sets RANK, join the processes inside the
    `with` block."""
    if "RANK" not in os.environ:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(device)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """The number of this process, from 0, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def parallel(objective: nn.Module, skips: bool) -> nn.Module:
    """A module whose gradients are the means over all processes; itself where there is one.

    `skips`: a step may leave a parameter out. PyTorch then looks for it in each step.
    """
    if rank_and_world_size()[1] == 1:
        return objective
    return DistributedDataParallel(
        objective, find_unused_parameters=skips, gradient_as_bucket_view=True
    )


def of_all_processes(notes: list[str]) -> list[str]:
    """The notes of all processes, each note once."""
    if not dist.is_initialized():
        return notes
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, notes)
    return sorted(set().union(*theirs))
