"""Several processes that train together, started by torchrun."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from miniclip.files.models import check_device
from miniclip.model import CLIP


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Yield the device of this process. Under torchrun, which sets RANK, also join the processes.

    They stay joined until the end of the `with` block. A program may have joined them before.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(device)
        torch.cuda.set_device(device)
    # torchrun may keep its store through a restart, with the addresses of crashed processes
    # (pytorch/pytorch#167288). The number of the restart is the same on one machine only.
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_one_machine else "0"
    store, rank, world_size = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        store=dist.PrefixStore(attempt, store),
        rank=rank,
        world_size=world_size,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """Return the number of this process, from 0, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def parallel(objective: nn.Module, skips: bool) -> nn.Module:
    """Wrap a module, so that its gradients are means over all processes. Alone, return it.

    `skips`: a step may leave a parameter out. PyTorch then looks for such parameters in each step.
    """
    if rank_and_world_size()[1] == 1:
        return objective
    return DistributedDataParallel(
        objective, find_unused_parameters=skips, gradient_as_bucket_view=True
    )


def shard(model: CLIP) -> CLIP:
    """Shard each block and each tower over all processes, in place, with FSDP2.

    The logit scale stays whole: all processes compute the same loss, and so the same gradient of
    it. Raises ValueError without torchrun, or for a fork with other weights outside the towers.
    """
    if not dist.is_initialized():
        raise ValueError("fsdp shards the weights over several processes: start them by torchrun")
    mesh = init_device_mesh(model.logit_scale.device.type, (dist.get_world_size(),))
    for tower in (model.vision, model.text):
        for block in tower.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(tower, mesh=mesh)
    for name, p in model.named_parameters():
        if not isinstance(p, DTensor) and p is not model.logit_scale:
            raise ValueError(f"fsdp shards the two towers, and {name} is in neither")
    return model


def reshard(model: CLIP) -> None:
    """Shard a model again after a pass without gradients, which leaves its towers whole."""
    for tower in (model.vision, model.text):
        if isinstance(tower, FSDPModule):
            tower.reshard()


def whole(state: Any, device: str | None = None) -> Any:
    """Make all sharded tensors in a state whole, on a device. All processes call it together."""
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor().to(device), state)


def sharded_like(tensor: Tensor, part: Tensor) -> Tensor:
    """Shard a whole tensor as `part` is sharded, if it is."""
    if not isinstance(part, DTensor) or tensor.shape != part.shape:
        return tensor
    mesh = part.device_mesh
    copies = DTensor.from_local(tensor.to(part.device), mesh, [Replicate()], run_check=False)
    return copies.redistribute(mesh, part.placements)


def of_first_process(value: float) -> float:
    """Return the value of the first process, in all processes."""
    said = [value]
    if rank_and_world_size()[1] > 1:
        dist.broadcast_object_list(said)
    return said[0]


def of_all_processes(notes: list[str]) -> list[str]:
    """Return the notes of all processes, each once."""
    if not dist.is_initialized():
        return notes
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, notes)
    return sorted(set().union(*theirs))
