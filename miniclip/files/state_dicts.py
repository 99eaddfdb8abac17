"""What a pickle holds, noted by a reader that runs no code -> the state dict of one model."""

import pickle
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch

from miniclip.errors import listed

MOST_TENSORS = 10_000  # bigG/14 has 974


class Storage(NamedTuple):
    """The numbers of one tensor or several, in a record of the file."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Stored(NamedTuple):
    """A tensor as a pickle describes it."""

    storage: Storage
    offset: int
    shape: list[int]
    stride: list[int]

    def get_shape(self) -> list[int]:
        return self.shape


class Made(dict[Any, Any]):
    """What stands for an object that code would make: its items, its attributes and its maker."""

    def __init__(self, maker: str = "") -> None:
        self.maker = maker
        self.attributes: Any = None


def find_state_dict(root: Any) -> dict[str, Stored]:
    """The state dict in a file, or in the dictionary that a training saves, by itself or deeper.

    A state dict has tensors under dotted names. Only if there is none, a dictionary of other
    tensors is taken.
    """
    found: dict[str, dict[str, Any]] = {}
    dotted: dict[str, dict[str, Any]] = {}
    todo, seen, modules = [("", root)], set[int](), set[int]()
    for path, value in todo:  # which grows
        if not isinstance(value, dict) or id(value) in seen or len(todo) > MOST_TENSORS:
            continue
        seen.add(id(value))
        attributes = value.attributes if isinstance(value, Made) else None
        tensors = dict(islice(_tensors(attributes, "", modules), MOST_TENSORS + 1)) or value
        names = [name for name, tensor in tensors.items() if isinstance(tensor, Stored)]
        if any(isinstance(name, str) and "." in name for name in names):
            dotted[path] = tensors
            continue
        if names:
            found[path] = tensors
        if path.count(".") < 4:
            inside = ((k, v) for k, v in value.items() if isinstance(k, str) and len(k) < 100)
            todo += [(f"{path}.{key}".lstrip("."), more) for key, more in inside]
    found = dotted or found
    if len(found) > 1:
        raise pickle.UnpicklingError(
            f"it has more than one state dict: {listed(map(repr, found))}. Choose: read the file "
            "with torch.load, and torch.save the one you want in a file of its own"
        )
    tensors = next(iter(found.values()), {})
    named = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Stored)}
    odd = [value.maker for value in tensors.values() if isinstance(value, Made)]
    odd = [maker for maker in odd if "_rebuild_" in maker]
    if not named and isinstance(root, dict):  # what is there instead?
        odd = [value.maker for value in (root, *root.values()) if isinstance(value, Made)]
    if len(named) > MOST_TENSORS:
        raise pickle.UnpicklingError(f"expected some hundreds of tensors, found {len(named):,}")
    if odd or None in named or not named:
        what = f"a value that {odd[0]:.80} makes" if odd else "none"
        raise pickle.UnpicklingError(
            "expected a dictionary of tensors and nothing else, as torch.save writes of "
            f"model.state_dict(), and found {what}; pickled code is never run"
        )
    return named


def _tensors(attributes: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Stored]]:
    """Every parameter and buffer of a module by its path, as `state_dict` would name it.

    Of a module that is in two places, only those of the first: a tree has each but once.
    """
    if not isinstance(attributes, dict) or id(attributes) in seen:
        return
    seen.add(id(attributes))
    if "_parameters" in attributes:  # torch.save wrote the module, and not TorchScript
        for kind in ("_parameters", "_buffers", "_modules"):
            yield from _tensors(attributes.get(kind), prefix, seen)
        return
    for name, value in attributes.items():
        if not isinstance(name, str) or len(prefix) + len(name) > 1000:
            raise pickle.UnpicklingError(f"a module in {prefix[:40]!r} has no name, or a long one")
        if isinstance(value, Stored):
            yield prefix + name, value
        elif isinstance(value, Made):
            yield from _tensors(value.attributes, f"{prefix}{name}.", seen)
