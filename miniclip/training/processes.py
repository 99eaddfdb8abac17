"""Train in several processes, which torchrun starts."""

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
    """Yield the device of this process. Under torchrun, also join the process group.

    The end of the `with` block destroys the group. A group that existed before is kept.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(device)
        torch.cuda.set_device(device)
    # torchrun's store may still have the addresses of crashed processes (pytorch/pytorch#167288).
    # On a single machine, each restart uses new keys, so it does not find the old addresses.
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
    """Wrap a module to average its gradients over all processes. One process needs no wrapper.

    If `skips`, PyTorch searches in each step for the parameters that get no gradient.
    """
    if rank_and_world_size()[1] == 1:
        return objective
    return DistributedDataParallel(
        objective, find_unused_parameters=skips, gradient_as_bucket_view=True
    )


def shard(model: CLIP) -> CLIP:
    """Shard each block and each tower over all processes, in place, with FSDP2.

    The logit scale is not sharded, because all processes compute the same gradient for it.
    Raises ValueError without torchrun, or if a fork adds weights outside the towers.
    """
    if not dist.is_initialized():
        raise ValueError("fsdp shards the weights over several processes: start them with torchrun")
    mesh = init_device_mesh(model.logit_scale.device.type, (dist.get_world_size(),))
    for tower in (model.vision, model.text):
        for block in tower.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(tower, mesh=mesh)
    for name, p in model.named_parameters():
        if not isinstance(p, DTensor) and p is not model.logit_scale:
            raise ValueError(f"fsdp shards only the two towers, but {name} is outside of them")
    return model


def reshard(model: CLIP) -> None:
    """Shard a model's towers again, because a pass without gradients leaves them unsharded."""
    for tower in (model.vision, model.text):
        if isinstance(tower, FSDPModule):
            tower.reshard()


def whole(state: Any, device: str | None = None) -> Any:
    """Gather every sharded tensor in `state` on a device. All processes must call this."""
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor().to(device), state)


def sharded_like(tensor: Tensor, part: Tensor) -> Tensor:
    """Shard a tensor in the same way as `part`, if `part` is sharded and the shapes are equal."""
    if not isinstance(part, DTensor) or tensor.shape != part.shape:
        return tensor
    mesh = part.device_mesh
    copies = DTensor.from_local(tensor.to(part.device), mesh, [Replicate()], run_check=False)
    return copies.redistribute(mesh, part.placements)


def of_first_process(value: float) -> float:
    """Send the first process's value to all processes, and return it."""
    said = [value]
    if rank_and_world_size()[1] > 1:
        dist.broadcast_object_list(said)
    return said[0]


def of_all_processes(notes: list[str]) -> list[str]:
    """Return the notes of all processes, without repetitions."""
    if not dist.is_initialized():
        return notes
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, notes)
    return sorted(set().union(*theirs))
