"""The tensors of .bin and .pt files, without the code that is in them.

torch.save writes a pickle and, of each tensor, the numbers; torch.jit.save, in whose form OpenAI
publishes its models, writes the modules about them too, and their code. A pickle can name any
function of Python to be called. Here only the few names are known that tensors, dictionaries and
modules are made of, and none of them does more than to note what it was given. torch.load knows
more names, among them some that take as much memory as a file of a few bytes asks for.
"""

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

LARGEST = 500_000
"""Bytes of a pickle, and of an archive's list of contents. bigG/14 with its optimizer has
356,000, and nothing of this size takes a second to read."""

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
"""The first two pickles of what torch.save wrote until 2020: two numbers."""


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


class PickledTensors:
    """The tensors of a file, each mapped into memory and not read: the part of safetensors'
    `safe_open` that is used here.

    Raises pickle.UnpicklingError for what is none of a module, a dictionary or a tensor, and
    whatever a damaged file makes zipfile, pickle and torch raise.
    """

    def __init__(self, path: Path) -> None:
        with _Bounded(io.FileIO(path)) as file:
            read = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            root, self.places = read(file)
        if isinstance(root, dict) and isinstance(root.get("state_dict"), dict):
            root = root["state_dict"]  # open_clip's training keeps the optimizer's beside it
        self.stored = dict(_tensors(root, "", set())) if isinstance(root, _Module) else root
        if not isinstance(root, dict | _Module) or not all(map(_is_named, self.stored.items())):
            raise pickle.UnpicklingError("expected a dictionary of tensors and nothing else")
        self.path = path
        self.remapped()

    def remapped(self) -> "PickledTensors":
        """Itself, and no page in memory that was read before, but for tensors still in use."""
        size = self.path.stat().st_size
        self.mapped = torch.UntypedStorage.from_file(str(self.path), False, size)
        return self

    def keys(self) -> list[str]:
        return [*self.stored]

    def get_slice(self, name: str) -> Stored:
        return self.stored[name]

    def get_tensor(self, name: str) -> Tensor:
        storage, offset, shape, stride = self.stored[name]
        if math.prod(shape) > storage.numel:  # a view may repeat one number 10^12 times
            raise pickle.UnpicklingError(f"{storage.numel:,} numbers for a tensor of shape {shape}")
        start = self.places[storage.key]
        numbers = self.mapped[start : start + storage.nbytes]
        if start % storage.dtype.itemsize:  # as in files before 2020; torch assumes it is 0
            numbers = numbers.clone()
        return torch.empty(0, dtype=storage.dtype).set_(numbers).as_strided(shape, stride, offset)


def _is_named(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Stored)


def _tensors(module: "_Module", prefix: str, seen: set[int]) -> Iterator[tuple[str, Stored]]:
    """Every parameter and buffer by its module path, as `state_dict` would name it.

    Of a module that is in two places, only those of the first: a tree has each but once.
    """
    seen.add(id(vars(module)))
    if len(prefix) > 1000:
        raise pickle.UnpicklingError(f"a module called {prefix[:40]}...")
    for name, value in vars(module).items():
        if isinstance(value, Stored):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module) and id(vars(value)) not in seen:
            yield from _tensors(value, f"{prefix}{name}.", seen)


# ------------------------------------------------------------------------------------------------
# file -> what its pickle says, and where the numbers of each storage begin


class _Bounded(io.BufferedReader):
    """A file of which only so much is read at once, whatever it says of the size of its parts."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LARGEST:
            raise pickle.UnpicklingError(
                f"a part that describes tensors has {size:,} bytes; no CLIP's has over {LARGEST:,}"
            )
        return super().read(size)


def _read_zip(file: _Bounded) -> tuple[Any, dict[str, int]]:
    """torch.save's archive, since 2020, or torch.jit.save's."""
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = name.removesuffix(".pkl")
        unpickler = _Unpickler(io.BytesIO(_plain(archive, name, LARGEST)))
        root = unpickler.load()
        order = f"{folder.removesuffix('data')}byteorder"
        if order in archive.NameToInfo and _plain(archive, order, 6) != b"little":
            raise pickle.UnpicklingError("its numbers are not in little-endian order")
        places = {}
        for storage in unpickler.storages.values():
            record = archive.getinfo(f"{folder}/{storage.key}")
            if (record.file_size, record.compress_type) != (storage.nbytes, zipfile.ZIP_STORED):
                raise pickle.UnpicklingError(
                    f"storage {storage.key:.40} should have {storage.nbytes:,} bytes, as they are"
                )
            file.seek(record.header_offset)
            lengths = struct.unpack("<26xHH", file.read(30))  # of its name, and of what follows it
            places[storage.key] = file.tell() + sum(lengths)
    return root, places


def _plain(archive: zipfile.ZipFile, name: str, largest: int) -> bytes:
    record = archive.getinfo(name)
    if record.compress_type != zipfile.ZIP_STORED or record.file_size > largest:
        raise pickle.UnpicklingError(
            f"{name} has {record.file_size:,} bytes; expected at most {largest:,}, not compressed"
        )
    return archive.read(record)


def _read_legacy(file: _Bounded) -> tuple[Any, dict[str, int]]:
    """What torch.save wrote until 2020: five pickles, and each storage after its length."""
    file.seek(0)
    head = io.BytesIO(file.read(LARGEST))
    if head.read(len(_LEGACY)) != _LEGACY:
        raise pickle.UnpicklingError("it is none of torch.save's")
    _Unpickler(head).load()  # which machine wrote it: its numbers are little-endian all the same
    unpickler = _Unpickler(head)
    root, keys = unpickler.load(), _Unpickler(head).load()
    place, places = head.tell(), {}
    for key in keys:
        storage = unpickler.storages[key]
        file.seek(place)
        if file.read(8) != struct.pack("<q", storage.numel):
            raise pickle.UnpicklingError(f"storage {key:.40} should have {storage.numel} numbers")
        places[key] = place + 8
        place += 8 + storage.nbytes
    return root, places


# ------------------------------------------------------------------------------------------------
# pickle -> what it describes
#
# A pickle can say in a few bytes to do again what it has said in many. So nothing below copies what
# it is given, and nothing takes longer than a tensor's few numbers account for.


class _Module:
    """What stands for a module of whatever class: its attributes."""


class _Dict(dict[Any, Any]):
    """A state dict. What is said of it beside its items is the versions of its modules."""


def _ordered_dict() -> _Dict:
    return _Dict()


def _tensor(
    storage: Storage,
    offset: int,
    shape: list[int],
    stride: list[int],
    requires_grad: bool,
    hooks: Any,
    metadata: Any = None,
) -> Stored:
    if len(shape) > 8 or len(stride) > 8:
        raise pickle.UnpicklingError("a tensor of more than 8 dimensions")
    if not all(type(n) is int and 0 <= n < 2**40 for n in (offset, *shape, *stride)):
        raise pickle.UnpicklingError("a tensor whose shape is no numbers, or negative or huge ones")
    return Stored(storage, offset, shape, stride)


def _parameter(tensor: Stored, requires_grad: bool, hooks: Any) -> Stored:
    return tensor


def _plain_list(values: list[Any]) -> list[Any]:
    return values


_NAMES: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered_dict,
    **{f"torch.jit._pickle.build_{of}list": _plain_list for of in ("", "int", "double", "bool")},
    **{f"torch.{storage}": dtype for storage, dtype in _STORAGES.items()},
}


class _Unpickler(pickle._Unpickler):
    """The one in Python: the one in C makes as much room as the largest number of its memo says."""

    stack: list[Any]
    metastack: list[list[Any]]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _Module
        if f"{module}.{name}" not in _NAMES:
            full = f"{module}.{name}"
            raise pickle.UnpicklingError(f"it names {full:.80}, and pickled code is never run")
        return _NAMES[f"{module}.{name}"]

    def persistent_load(self, reference: Any) -> Storage:
        if len(reference) > 6:
            raise pickle.UnpicklingError("a storage of more than six fields")
        kind, dtype, key, _, numel, *view = reference
        storage = Storage(key, dtype, numel)
        sane = type(key) is str and type(numel) is int and 0 <= numel < 2**40
        if kind != "storage" or not sane or any(view):
            raise pickle.UnpicklingError("a storage without name or size")
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"storage {key:.40} is said to be two things")
        return storage

    def load_mark(self) -> None:
        if len(self.metastack) > 100:
            raise pickle.UnpicklingError("lists in lists in lists")
        super().load_mark()  # type: ignore[misc]  # which typeshed does not know

    def load_tuple(self) -> None:
        """A list. To look up tuples of tuples in a dictionary takes 2^depth steps."""
        items = self.pop_mark()  # which makes `append` another
        self.append(items)

    def load_few(self, count: int) -> None:
        self.stack[-count:] = [self.stack[-count:]]

    def load_long1(self) -> None:
        """Longer ones all look alike to a dictionary, if they are made for it."""
        size = self.read(1)[0]
        if size > 8:
            raise pickle.UnpicklingError("a number of more than 64 bits")
        self.append(int.from_bytes(self.read(size), "little", signed=True))

    def load_build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, _Module):
            built.__dict__ = state
        elif not isinstance(built, _Dict):
            raise pickle.UnpicklingError(f"it changes a {type(built).__name__} after it was made")

    def load_other(self) -> None:
        raise pickle.UnpicklingError("it has instructions that torch.save does not write")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        **dict.fromkeys([*pickle.INT, *pickle.LONG, *range(pickle.LONG4[0], 256)], load_other),
        pickle.MARK[0]: load_mark,
        pickle.TUPLE[0]: load_tuple,
        pickle.TUPLE1[0]: lambda self: self.load_few(1),
        pickle.TUPLE2[0]: lambda self: self.load_few(2),
        pickle.TUPLE3[0]: lambda self: self.load_few(3),
        pickle.LONG1[0]: load_long1,
        pickle.BUILD[0]: load_build,
    }
