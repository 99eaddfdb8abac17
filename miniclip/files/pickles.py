"""The tensors of .bin and .pt files. The code in these files never runs.

torch.save writes a pickle and the numbers of each tensor. torch.jit.save also writes the modules
and their code; OpenAI publishes its models in this form. A pickle is a program: it can call any
Python function, and a few bytes can make it repeat long work. Here `pickletools`, which runs
nothing, splits it into instructions. Only the instructions that torch.save writes are followed, and
each of them only notes its arguments. `torch.load(weights_only=True)` knows more instructions, some
of which take as much memory as a file asks for, and refuses what a training loop saves beside the
weights.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from miniclip.files.state_dicts import Made, Storage, StoredTensor, find_state_dict

LARGEST = 400_000
"""Bytes of a pickle, and of an archive's list of contents. bigG/14 with its optimizer has 356,000,
and a pickle of this size takes less than a second to read."""

_DTYPES: dict[str, torch.dtype] = {"BFloat16": torch.bfloat16, "Byte": torch.uint8}
_DTYPES |= {"Double": torch.double, "Float": torch.float, "Half": torch.half, "Bool": torch.bool}
_DTYPES |= {"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8}
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
"""The first two pickles of what torch.save wrote until 2020: two numbers."""


class PickledTensors:
    """The tensors of a file, each memory-mapped: the part of safetensors' `safe_open` that is used.

    Raises UnpicklingError unless the file has one state dict, and whatever zipfile, pickle
    and torch raise for a damaged file.
    """

    def __init__(self, path: Path) -> None:
        with _Bounded(io.FileIO(path)) as file:
            read = _read_zip if file.read(4) == b"PK\3\4" else _read_legacy
            root, self.places = read(file)
        self.stored = find_state_dict(root)
        count = sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in self.stored.values())
        if count > 2 * path.stat().st_size:  # tied tensors are there by two names
            raise UnpicklingError(f"its tensors would have {count:,} bytes")
        self.path = path
        self.remapped()

    def remapped(self) -> "PickledTensors":
        """Map the file again: pages that were read go with the last tensor that is on them."""
        size = self.path.stat().st_size
        self.mapped = torch.UntypedStorage.from_file(str(self.path), False, size)
        return self

    def keys(self) -> list[str]:
        return [*self.stored]

    def get_slice(self, name: str) -> StoredTensor:
        return self.stored[name]

    def get_tensor(self, name: str) -> Tensor:
        storage, offset, shape, stride = self.stored[name]
        start = self.places[storage.key]
        numbers = self.mapped[start : start + storage.nbytes]
        flat = torch.empty(0, dtype=storage.dtype).set_(numbers)
        tensor = flat.as_strided(shape, stride, offset)
        # In files before 2020 numbers lie anywhere, and torch assumes that they do not.
        return tensor.clone() if start % storage.dtype.itemsize else tensor


# ------------------------------------------------------------------------------------------------
# a file -> what its pickle says, and where the numbers of each storage begin


class _Bounded(io.BufferedReader):
    """A file that refuses to read much at once, whatever it says about the size of its parts."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LARGEST:
            raise UnpicklingError(f"a part has {size:,} bytes; no CLIP's has over {LARGEST:,}")
        return super().read(size)


def _read_zip(file: _Bounded) -> tuple[Any, dict[str, int]]:
    """torch.save's archive, since 2020, or torch.jit.save's."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1 or len(set(archive.namelist())) < len(archive.namelist()):
            raise UnpicklingError("a zip without a single data.pkl, or with a name twice")
        folder = names[0].removesuffix("data.pkl")
        root, storages = _read_pickle(io.BytesIO(_contents(archive, names[0])))
        order = f"{folder}byteorder"
        if order in archive.namelist() and _contents(archive, order) != b"little":
            raise UnpicklingError("its numbers are not in little-endian order")
        return root, {
            storage.key: _place(file, archive.getinfo(f"{folder}data/{storage.key}"), storage)
            for storage in storages.values()
        }


def _contents(archive: zipfile.ZipFile, name: str) -> bytes:
    record = archive.getinfo(name)
    if record.compress_type != zipfile.ZIP_STORED or record.file_size > LARGEST:
        raise UnpicklingError(
            f"{name:.80} has {record.file_size:,} bytes; expected at most {LARGEST:,}, uncompressed"
        )
    return archive.read(record)


def _place(file: _Bounded, record: zipfile.ZipInfo, storage: Storage) -> int:
    """Where the numbers of a storage begin, if zip and pickle agree about them."""
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
        raise UnpicklingError("its numbers are compressed or encrypted")
    file.seek(record.header_offset)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    name = file.read(name_length).decode("utf-8" if record.flag_bits & 0x800 else "cp437")
    if (signature, name) != (b"PK\3\4", record.orig_filename) or record.file_size != storage.nbytes:
        raise UnpicklingError(f"storage {storage.key:.40} has not {storage.nbytes:,} bytes")
    return file.tell() + extra_length


def _read_legacy(file: _Bounded) -> tuple[Any, dict[str, int]]:
    """What torch.save wrote until 2020: five pickles, and each storage after its length."""
    file.seek(0)
    head = io.BytesIO(file.read(LARGEST))
    if head.read(len(_LEGACY)) != _LEGACY:
        raise UnpicklingError("torch.save did not write it")
    _read_pickle(head)  # the machine that wrote it; its numbers are little-endian all the same
    (root, storages), (keys, _) = _read_pickle(head), _read_pickle(head)
    place, places = head.tell(), {}
    for key in keys:
        storage = storages.get(key if isinstance(key, str) else "")
        file.seek(place)
        if storage is None or file.read(8) != struct.pack("<q", storage.numel):
            raise UnpicklingError("its list of storages does not fit what follows")
        places[storage.key] = place + 8
        place += 8 + storage.nbytes
    return root, places


# ------------------------------------------------------------------------------------------------
# a pickle -> what it describes
#
# Nothing below copies a value, and only texts become keys of a dictionary: a pickle can make values
# that take long to copy or to hash. Tuples are lists here, because lists have no hash.


class _Maker(str):
    """The name of a function or a class in a pickle. It is never called."""


def _tensor(
    storage: Any, offset: int, shape: list[int], stride: list[int], _: Any, __: Any, extra: Any = 0
) -> Any:
    if type(storage) is Made:
        return Made("torch._utils._rebuild_tensor_v2 of another dtype")
    if type(storage) is not Storage or len(shape) > 8 or len(stride) > 8 or extra:
        raise UnpicklingError("a tensor that is not as torch.save writes them")
    if not all(type(n) is int and 0 <= n < 2**40 for n in (offset, *shape, *stride)):
        raise UnpicklingError("a tensor whose shape has odd, negative or huge numbers")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and max(math.prod(shape), last + 1) > storage.numel:  # a stride may be 0
        raise UnpicklingError(f"{storage.numel:,} numbers for a tensor of shape {shape}")
    return StoredTensor(storage, offset, shape, stride)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *others: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *others: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, arguments, state: (
        _made(function, arguments)  # a parameter with Python attributes
        if kind in ("torch.Tensor", "torch.nn.parameter.Parameter")
        else Made("torch._tensor._rebuild_from_type_v2")
    ),
}


def _made(function: Any, arguments: Any) -> Any:
    """What a call makes: a tensor, or what stands for anything else."""
    if type(function) is not _Maker:
        raise UnpicklingError(f"it calls a {type(function).__name__}")
    if function not in _CALLS:
        return Made(function)
    if not isinstance(arguments, list) or len(arguments) > 8:
        raise UnpicklingError("a tensor that is not as torch.save writes them")
    return _CALLS[function](*arguments)


def _storage(reference: Any) -> Any:
    if len(reference) > 6:
        raise UnpicklingError("a storage of more than six fields")
    kind, maker, key, _, numel, *view = reference
    if [type(part) for part in (kind, maker, key, numel)] != [str, _Maker, str, int]:
        raise UnpicklingError("a storage without name, type or size")
    dtype = _DTYPES.get(maker.removeprefix("torch.").removesuffix("Storage"))
    if dtype is None:
        return Made(maker)
    if kind != "storage" or not 0 <= numel < 2**40 or view not in ([], [None]):
        raise UnpicklingError("a storage that is not as torch.save writes them")
    return Storage(key, dtype, numel)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
)


def _read_pickle(file: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """What the next pickle of a file describes, and its storages by name."""
    stack: list[Any] = []
    outer: list[list[Any]] = []  # a stack for each mark that is open
    memo: list[Any] = []
    storages: dict[str, Storage] = {}
    steps: Iterable[Any] = pickletools.genops(file)
    for opcode, argument, _ in steps:
        name: str = opcode.name
        items: list[Any] = []
        if name in ("MARK", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_DICT"):
            if len(outer) > 100 or len(stack) > 10_000:
                raise UnpicklingError("it begins more than it ends")
        elif name in ("APPENDS", "SETITEMS", "TUPLE"):
            items, stack = stack, outer.pop()
        if name in _VALUES:
            stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            if argument != len(memo):
                raise UnpicklingError("it numbers what it remembers out of turn")
            memo.append(stack[-1])
        elif name == "GLOBAL":
            stack.append(_Maker(argument.replace(" ", ".")))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            outer.append(stack)
            stack = []
        elif name in ("EMPTY_LIST", "EMPTY_TUPLE", "TUPLE"):
            stack.append(items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [stack[-count:]]
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("APPEND", "APPENDS"):
            items = items if name == "APPENDS" else [stack.pop()]
            if type(stack[-1]) is list:
                stack[-1] += items
            elif type(stack[-1]) is not Made:  # the items of a deque or a set are not kept
                raise UnpicklingError(f"it adds items to a {type(stack[-1]).__name__}")
        elif name in ("SETITEM", "SETITEMS"):
            items = items if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            if not isinstance(stack[-1], dict):
                raise UnpicklingError(f"it sets items of a {type(stack[-1]).__name__}")
            for key, value in zip(items[::2], items[1::2], strict=True):
                stack[-1][key if type(key) is str else None] = value  # an optimizer's are numbers
        elif name == "BINPERSID":
            stack[-1] = storage = _storage(stack[-1])
            if type(storage) is Storage and storages.setdefault(storage.key, storage) != storage:
                raise UnpicklingError(f"storage {storage.key:.40} is said to be two things")
        elif name == "REDUCE":
            arguments = stack.pop()
            stack[-1] = _made(stack[-1], arguments)
        elif name == "NEWOBJ":
            stack.pop()
            if type(stack[-1]) is not _Maker:
                raise UnpicklingError("it makes an object without a class")
            stack[-1] = Made(stack[-1])
        elif name == "BUILD":
            state = stack.pop()
            if type(stack[-1]) is not Made:
                raise UnpicklingError(f"it changes a {type(stack[-1]).__name__}")
            stack[-1].attributes = state
        elif name == "POP":
            stack.pop()
        elif name not in ("PROTO", "STOP"):
            raise UnpicklingError("it has instructions that torch.save does not write")
    return stack[-1], storages
