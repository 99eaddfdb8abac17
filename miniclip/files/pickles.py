"""Read the tensors of .bin and .pt files. The code in these files never runs.

torch.save writes a pickle and the numbers of each tensor. torch.jit.save also writes the modules
and their code; OpenAI publishes its models in this form. A pickle is a program: it can call any
Python function, and a few bytes can make it run very long. Here `pickletools` splits a pickle
into instructions and runs nothing. Only the instructions that torch.save writes are followed. A
call is noted, but the function is not called. `torch.load(weights_only=True)` refuses some of the
objects that training saves. It also follows instructions that this module refuses. With these, a
file can take any amount of memory.
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
"""The largest size, in bytes, of a pickle and of an archive's list of contents. The pickle of
bigG/14 with its optimizer has 356,000 bytes. A pickle of 400,000 bytes is read within a second."""

_DTYPES: dict[str, torch.dtype] = {"BFloat16": torch.bfloat16, "Byte": torch.uint8}
_DTYPES |= {"Double": torch.double, "Float": torch.float, "Half": torch.half, "Bool": torch.bool}
_DTYPES |= {"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8}
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
"""The start of a file that torch.save wrote until 2020: two pickles, each of one number."""


class PickledTensors:
    """The memory-mapped tensors of a file, with the methods of safetensors' `safe_open`.

    Raises UnpicklingError unless the file has one state dict. A damaged file may also raise the
    errors of zipfile, pickle and torch.
    """

    def __init__(self, path: Path) -> None:
        with _Bounded(io.FileIO(path)) as file:
            read = _read_zip if file.read(4) == b"PK\3\4" else _read_legacy
            root, self.places = read(file)
        self.stored = find_state_dict(root)
        count = sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in self.stored.values())
        if count > 2 * path.stat().st_size:  # tied tensors are counted twice
            raise UnpicklingError(f"its tensors would have {count:,} bytes")
        self.path = path
        self.remapped()

    def remapped(self) -> "PickledTensors":
        """Map the file again. The old map's memory is freed with the last tensor that uses it."""
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
        # torch needs aligned numbers. In files before 2020, numbers may begin at any byte.
        return tensor.clone() if start % storage.dtype.itemsize else tensor


# ------------------------------------------------------------------------------------------------
# a file -> the object in its pickle, and the place of each storage's numbers


class _Bounded(io.BufferedReader):
    """An open file. `read` raises UnpicklingError if a header asks for more than LARGEST bytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LARGEST:
            raise UnpicklingError(f"a part has {size:,} bytes; expected at most {LARGEST:,}")
        return super().read(size)


def _read_zip(file: _Bounded) -> tuple[Any, dict[str, int]]:
    """Read an archive of torch.save (since 2020) or torch.jit.save."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1 or len(set(archive.namelist())) < len(archive.namelist()):
            raise UnpicklingError("expected a zip with one data.pkl and no repeated names")
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
            f"{name:.80} has {record.file_size:,} bytes; expected at most {LARGEST:,}, without "
            "compression"
        )
    return archive.read(record)


def _place(file: _Bounded, record: zipfile.ZipInfo, storage: Storage) -> int:
    """The byte at which a storage begins. Raises UnpicklingError if zip and pickle disagree."""
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
        raise UnpicklingError("its numbers are compressed or encrypted")
    file.seek(record.header_offset)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    name = file.read(name_length).decode("utf-8" if record.flag_bits & 0x800 else "cp437")
    if (signature, name) != (b"PK\3\4", record.orig_filename) or record.file_size != storage.nbytes:
        raise UnpicklingError(f"storage {storage.key:.40} does not have {storage.nbytes:,} bytes")
    return file.tell() + extra_length


def _read_legacy(file: _Bounded) -> tuple[Any, dict[str, int]]:
    """Read torch.save's old format: five pickles, then each storage's length and numbers."""
    file.seek(0)
    head = io.BytesIO(file.read(LARGEST))
    if head.read(len(_LEGACY)) != _LEGACY:
        raise UnpicklingError("torch.save did not write the file")
    _read_pickle(head)  # the byte order of the machine; torch.save always writes little-endian
    (root, storages), (keys, _) = _read_pickle(head), _read_pickle(head)
    place, places = head.tell(), {}
    for key in keys:
        storage = storages.get(key if isinstance(key, str) else "")
        file.seek(place)
        if storage is None or file.read(8) != struct.pack("<q", storage.numel):
            raise UnpicklingError("its list of storages does not fit the storages")
        places[storage.key] = place + 8
        place += 8 + storage.nbytes
    return root, places


# ------------------------------------------------------------------------------------------------
# a pickle -> the object that it describes
#
# A pickle can make values that take long to copy or to hash. So nothing below copies a value, and
# only strings become keys of a dictionary. Tuples become lists, so that Python never hashes them.


class _Maker(str):
    """The name of a function or a class in a pickle. It is never called."""


def _tensor(
    storage: Any, offset: int, shape: list[int], stride: list[int], _: Any, __: Any, extra: Any = 0
) -> Any:
    if type(storage) is Made:
        return Made("torch._utils._rebuild_tensor_v2 of another dtype")
    if type(storage) is not Storage or len(shape) > 8 or len(stride) > 8 or extra:
        raise UnpicklingError("a tensor in a form that torch.save does not write")
    if not all(type(n) is int and 0 <= n < 2**40 for n in (offset, *shape, *stride)):
        raise UnpicklingError("a tensor with a shape of negative, huge or fractional numbers")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and max(math.prod(shape), last + 1) > storage.numel:  # strides may be 0
        raise UnpicklingError(f"a tensor {shape} in a storage of {storage.numel:,} numbers")
    return StoredTensor(storage, offset, shape, stride)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *others: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *others: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, arguments, state: (
        _made(function, arguments)  # a tensor with Python attributes
        if kind in ("torch.Tensor", "torch.nn.parameter.Parameter")
        else Made("torch._tensor._rebuild_from_type_v2")
    ),
}


def _made(function: Any, arguments: Any) -> Any:
    """The result of a call: a tensor, or a placeholder for any other object."""
    if type(function) is not _Maker:
        raise UnpicklingError(f"it calls a {type(function).__name__}, not a function")
    if function not in _CALLS:
        return Made(function)
    if not isinstance(arguments, list) or len(arguments) > 8:
        raise UnpicklingError("a tensor in a form that torch.save does not write")
    return _CALLS[function](*arguments)


def _storage(reference: Any) -> Any:
    if len(reference) > 6:
        raise UnpicklingError("a storage of more than six fields")
    kind, maker, key, _, numel, *view = reference
    if [type(part) for part in (kind, maker, key, numel)] != [str, _Maker, str, int]:
        raise UnpicklingError("a storage without a name, a type or a size")
    dtype = _DTYPES.get(maker.removeprefix("torch.").removesuffix("Storage"))
    if dtype is None:
        return Made(maker)
    if kind != "storage" or not 0 <= numel < 2**40 or view not in ([], [None]):
        raise UnpicklingError("a storage in a form that torch.save does not write")
    return Storage(key, dtype, numel)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
)


def _read_pickle(file: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """Read the next pickle of a file. Returns its object, and its storages by name."""
    stack: list[Any] = []
    outer: list[list[Any]] = []  # for each open MARK, the stack before it
    memo: list[Any] = []
    storages: dict[str, Storage] = {}
    steps: Iterable[Any] = pickletools.genops(file)
    for opcode, argument, _ in steps:
        name: str = opcode.name
        items: list[Any] = []
        if name in ("MARK", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_DICT"):
            if len(outer) > 100 or len(stack) > 10_000:
                raise UnpicklingError("its objects are too many or nested too deeply")
        elif name in ("APPENDS", "SETITEMS", "TUPLE"):
            items, stack = stack, outer.pop()
        if name in _VALUES:
            stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            if argument != len(memo):
                raise UnpicklingError("its objects are not numbered 0, 1, 2 and so on")
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
            elif type(stack[-1]) is not Made:  # a Made deque or set keeps no items
                raise UnpicklingError(f"it adds items to a {type(stack[-1]).__name__}")
        elif name in ("SETITEM", "SETITEMS"):
            items = items if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            if not isinstance(stack[-1], dict):
                raise UnpicklingError(f"it sets items of a {type(stack[-1]).__name__}")
            for key, value in zip(items[::2], items[1::2], strict=True):
                stack[-1][key if type(key) is str else None] = value  # optimizers use numeric keys
        elif name == "BINPERSID":
            stack[-1] = storage = _storage(stack[-1])
            if type(storage) is Storage and storages.setdefault(storage.key, storage) != storage:
                raise UnpicklingError(f"storage {storage.key:.40} has two different descriptions")
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
