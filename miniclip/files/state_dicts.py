"""Find the state dict inside the object that a pickle describes."""

from collections.abc import Iterator
from itertools import islice
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch

from miniclip.errors import listed

MOST_TENSORS = 10_000  # bigG/14 has 974


class Storage(NamedTuple):
    """An array of numbers in the file. One or more tensors use it."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """A tensor as a pickle describes it."""

    storage: Storage
    offset: int
    shape: list[int]
    stride: list[int]

    def get_shape(self) -> list[int]:
        return self.shape


class Made(dict[Any, Any]):
    """Stands for an object that a function call would make. Has its items and attributes."""

    def __init__(self, maker: str = "") -> None:
        self.maker = maker
        self.attributes: Any = None


def find_state_dict(root: Any) -> dict[str, StoredTensor]:
    """Find the only state dict in a file. It is the root object or a dictionary inside the root.

    A state dict has tensors under dotted names. If no name in the file has a
    dot, any dictionary of tensors is a state dict. Raises UnpicklingError.
    """
    found: dict[str, dict[Any, Any]] = {}
    todo, seen, modules = [("", root)], set[int](), set[int]()
    for path, value in todo:  # the loop adds to `todo`
        if not isinstance(value, dict) or id(value) in seen or len(todo) > MOST_TENSORS:
            continue
        seen.add(id(value))
        attributes = value.attributes if isinstance(value, Made) else None
        tensors = dict(islice(_tensors(attributes, "", modules), MOST_TENSORS + 1)) or value
        if any(isinstance(tensor, StoredTensor) for tensor in tensors.values()):
            found[path] = tensors
        if path.count(".") < 4 and not (path in found and _is_dotted(tensors)):
            inside = ((k, v) for k, v in value.items() if isinstance(k, str) and len(k) < 100)
            todo += [(f"{path}.{key}".lstrip("."), more) for key, more in inside]
    found = {path: tensors for path, tensors in found.items() if _is_dotted(tensors)} or found
    if len(found) > 1:
        raise UnpicklingError(
            f"it has more than one state dict: {listed(map(repr, found))}. Read the file with "
            "torch.load, and save one of them in a separate file with torch.save"
        )
    tensors = next(iter(found.values()), {})
    named = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, StoredTensor)}
    if len(named) > MOST_TENSORS:
        raise UnpicklingError(f"expected at most {MOST_TENSORS:,} tensors, found {len(named):,}")
    odd = [v.maker for v in tensors.values() if isinstance(v, Made) and "_rebuild_" in v.maker]
    if not named and isinstance(root, dict):  # the error should name what was found
        odd = [value.maker for value in (root, *root.values()) if isinstance(value, Made)]
    if odd or None in named or not named:
        what = f"an object made by {odd[0]:.80}" if odd else "none"
        raise UnpicklingError(
            "expected a dictionary of tensors, as torch.save(model.state_dict(), path) writes it, "
            f"but found {what}; code in a pickle never runs"
        )
    return named


def _is_dotted(tensors: dict[Any, Any]) -> bool:
    named = (n for n, t in tensors.items() if isinstance(t, StoredTensor) and isinstance(n, str))
    return any("." in name for name in named)


def _tensors(attributes: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield each parameter and buffer of a module, with its first name in `state_dict`."""
    if not isinstance(attributes, dict) or id(attributes) in seen:
        return
    seen.add(id(attributes))
    if "_parameters" in attributes:  # saved by torch.save, not by TorchScript
        for kind in ("_parameters", "_buffers", "_modules"):
            yield from _tensors(attributes.get(kind), prefix, seen)
        return
    for name, value in attributes.items():
        if not isinstance(name, str) or len(prefix) + len(name) > 1000:
            raise UnpicklingError(f"a module in {prefix[:40]!r} has no name, or a very long name")
        if isinstance(value, StoredTensor):
            yield prefix + name, value
        elif isinstance(value, Made):
            yield from _tensors(value.attributes, f"{prefix}{name}.", seen)
