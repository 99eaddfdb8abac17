"""Memory-map the tensors of a weights file."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from miniclip.errors import CheckpointError, listed, shown
from miniclip.files.hub import SUFFIXES
from miniclip.files.pickles import PickledTensors
from miniclip.files.reading import read_json
from miniclip.files.state_dicts import MOST_TENSORS


def read_tensors(path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Memory-map the tensors of a weights file, or of all weights files that an index lists.

    Floating point tensors are converted to `dtype`, unless it is None. They are converted a few at
    a time, so the whole file is never in memory together with the model. Code in .bin and .pt files
    never runs: see pickles.py. Raises CheckpointError.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path, dtype)
    try:
        tensors = _read_in_turn(path, dtype)
    except Exception as error:  # damage raises many kinds of errors
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        reason = "".join(filter(str.isprintable, reason))  # the reason may quote bytes of the file
        size = f"{path.stat().st_size:,} bytes" if path.exists() else "no such file"
        raise CheckpointError(
            f"{path}: the weights file cannot be read, or is not complete ({size}): {reason}"
        ) from error
    if not all(map(str.isprintable, tensors)):
        raise CheckpointError(f"{path}: has tensors whose names cannot be printed")
    return tensors


def _read_in_turn(path: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    is_safe = path.suffix == ".safetensors"
    with open(path, "rb") as start:
        header = int.from_bytes(start.read(8), "little")
    if is_safe and header > 6_000_000:  # a CLIP's header has 200,000 bytes
        raise ValueError(f"expected a header of at most 6,000,000 bytes, found {header:,}")
    file: Any = safe_open(path, framework="pt") if is_safe else PickledTensors(path)
    if len(file.keys()) > MOST_TENSORS:
        raise ValueError(f"expected at most {MOST_TENSORS:,} tensors, found {len(file.keys()):,}")
    size = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}
    tensors: dict[str, Tensor] = {}
    read = 0
    for name in sorted(size, key=size.__getitem__, reverse=True):
        mapped = file.get_tensor(name)
        tensors[name] = mapped.to(dtype) if mapped.is_floating_point() else mapped
        read += mapped.nbytes if tensors[name] is not mapped else 0
        if read > 1 << 24:
            del mapped  # the old memory map is freed when no tensor uses it
            file = safe_open(path, framework="pt") if is_safe else file.remapped()
            read = 0
    return {name: tensors[name] for name in size}


def _read_shards(index: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        name.isprintable() and isinstance(shard, str) for name, shard in places.items()
    ):
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        path = index.parent / shard
        if Path(shard).name != shard or path.suffix not in SUFFIXES or not os.path.isfile(path):
            reason = f"the shard {shown(shard)} is not a weights file in the index's folder"
            raise CheckpointError(f"{index}: {reason}")
        more = read_tensors(path, dtype)
        if twice := sorted(tensors.keys() & more.keys()):
            raise CheckpointError(f"{path}: another shard has the same tensors: {listed(twice)}")
        tensors |= more
    if absent := sorted(places.keys() - tensors.keys()):
        raise CheckpointError(f"{index}: {len(absent)} tensors are in no shard: {listed(absent)}")
    return tensors
