"""The tensors of .bin and .pt files, without the code that is in them.

torch.save writes a pickle and the numbers of each tensor. torch.jit.save also writes the modules
and their code; OpenAI publishes its models in this form. A pickle is a program: it can call any
Python function, and a few bytes can make it repeat a long work. This reader knows only the
instructions that torch.save uses, and each of them only notes its arguments: whatever is not a
tensor becomes a placeholder. torch.load knows more, and some of its instructions take as much
memory as a file asks for.
"""

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from miniclip.files.state_dicts import Made, Storage, Stored, find_state_dict

LARGEST = 400_000
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


class PickledTensors:
    """The tensors of a file, each mapped into memory and not read: the part of safetensors'
    `safe_open` that is used here.

    Raises pickle.UnpicklingError if there is not one state dict in the file, and whatever a damaged
    file makes zipfile, pickle and torch raise.
    """

    def __init__(self, path: Path) -> None:
        with _Bounded(io.FileIO(path)) as file:
            read = _read_zip if file.read(4) == b"PK\3\4" else _read_legacy
            root, self.places = read(file)
        self.stored = find_state_dict(root)
        numbers = [math.prod(t.shape) * t.storage.dtype.itemsize for t in self.stored.values()]
        if sum(numbers) > 2 * path.stat().st_size:  # one may be there by two names, as tied
            raise pickle.UnpicklingError(f"its tensors would have {sum(numbers):,} bytes")
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
        start = self.places[storage.key]
        numbers = self.mapped[start : start + storage.nbytes]
        flat = torch.empty(0, dtype=storage.dtype).set_(numbers)
        tensor = flat.as_strided(shape, stride, offset)
        # In files before 2020 numbers lie anywhere, and torch assumes that they do not.
        return tensor.clone() if start % storage.dtype.itemsize else tensor


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
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1 or len(set(archive.namelist())) < len(archive.namelist()):
            raise pickle.UnpicklingError("a zip without a single data.pkl, or with a name twice")
        folder = names[0].removesuffix("data.pkl")
        unpickler = _Unpickler(io.BytesIO(_contents(archive, names[0])))
        root = unpickler.load()
        order = f"{folder}byteorder"
        if order in archive.namelist() and _contents(archive, order) != b"little":
            raise pickle.UnpicklingError("its numbers are not in little-endian order")
        places = {
            storage.key: _place(file, archive.getinfo(f"{folder}data/{storage.key}"), storage)
            for storage in unpickler.storages.values()
        }
    return root, places


def _contents(archive: zipfile.ZipFile, name: str) -> bytes:
    record = archive.getinfo(name)
    if record.compress_type != zipfile.ZIP_STORED or record.file_size > LARGEST:
        raise pickle.UnpicklingError(
            f"{name:.80} has {record.file_size:,} bytes; expected at most {LARGEST:,}, uncompressed"
        )
    return archive.read(record)


def _place(file: _Bounded, record: zipfile.ZipInfo, storage: Storage) -> int:
    """Where the numbers of a storage begin, if they are as zip and pickle both say."""
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
        raise pickle.UnpicklingError("its numbers are compressed or encrypted")
    file.seek(record.header_offset)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    name = file.read(name_length).decode("utf-8" if record.flag_bits & 0x800 else "cp437")
    if (signature, name) != (b"PK\3\4", record.orig_filename) or record.file_size != storage.nbytes:
        raise pickle.UnpicklingError(
            f"storage {storage.key:.40} should have {storage.nbytes:,} bytes, and has not"
        )
    return file.tell() + extra_length


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
        storage = unpickler.storages.get(key if isinstance(key, str) else "")
        file.seek(place)
        if storage is None or file.read(8) != struct.pack("<q", storage.numel):
            raise pickle.UnpicklingError("its list of storages is not what follows")
        places[storage.key] = place + 8
        place += 8 + storage.nbytes
    return root, places


# ------------------------------------------------------------------------------------------------
# pickle -> what it describes
#
# Nothing below copies what it is given, and only texts are looked up, for much else can be made so
# that to look it up takes long.


class Maker(NamedTuple):
    """A function or a class that a pickle names, and that is never called."""

    name: str


def _tensor(
    storage: Storage,
    offset: int,
    shape: list[int],
    stride: list[int],
    requires_grad: bool,
    hooks: Any,
    metadata: Any = None,
) -> Any:
    if type(storage) is Made:
        return Made("torch._utils._rebuild_tensor_v2 of another dtype")
    if type(storage) is not Storage or len(shape) > 8 or len(stride) > 8 or metadata:
        raise pickle.UnpicklingError("a tensor that is not as torch.save writes them")
    if not all(type(n) is int and 0 <= n < 2**40 for n in (offset, *shape, *stride)):
        raise pickle.UnpicklingError("a tensor whose shape is no numbers, or negative or huge ones")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and max(math.prod(shape), last + 1) > storage.numel:  # 1 may seem 10^12
        raise pickle.UnpicklingError(f"{storage.numel:,} numbers for a tensor of shape {shape}")
    return Stored(storage, offset, shape, stride)


def _parameter(tensor: Any, requires_grad: bool, hooks: Any, state: Any = None) -> Any:
    return tensor


def _with_attributes(function: Any, kind: Any, arguments: list[Any], state: Any) -> Any:
    """A parameter that has Python attributes of its own."""
    is_plain = kind in (Maker("torch.Tensor"), Maker("torch.nn.parameter.Parameter"))
    return _call(function, arguments) if is_plain else Made("torch._tensor._rebuild_from_type_v2")


_CALLED: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
}


def _call(function: Any, arguments: Any) -> Any:
    """What a call makes: a tensor, or what stands for anything else."""
    if not isinstance(function, Maker):
        raise pickle.UnpicklingError(f"it calls a {type(function).__name__}")
    known = _CALLED.get(function.name)
    if known is None:
        return Made(function.name)
    if not isinstance(arguments, list) or len(arguments) > 8:
        raise pickle.UnpicklingError("a tensor that is not as torch.save writes them")
    return known(*arguments)


class _Unpickler(pickle._Unpickler):
    """pickle's in Python, for of the one in C no instruction can be replaced."""

    stack: list[Any]
    metastack: list[list[Any]]
    memo: dict[int, Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Maker:
        return Maker(f"{module}.{name}")

    def persistent_load(self, reference: Any) -> Any:
        if len(reference) > 6:
            raise pickle.UnpicklingError("a storage of more than six fields")
        kind, maker, key, _, numel, *view = reference
        if [type(part) for part in (kind, maker, key, numel)] != [str, Maker, str, int]:
            raise pickle.UnpicklingError("a storage without name, type or size")
        dtype = _STORAGES.get(maker.name.removeprefix("torch."))
        if dtype is None:
            return Made(maker.name)
        storage = Storage(key, dtype, numel)
        if kind != "storage" or not 0 <= numel < 2**40 or view not in ([], [None]):
            raise pickle.UnpicklingError("a storage that is not as torch.save writes them")
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"storage {key:.40} is said to be two things")
        return storage

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        self.stack.pop()
        if type(self.stack[-1]) is not Maker:
            raise pickle.UnpicklingError("it makes an object of no class")
        self.stack[-1] = Made(self.stack[-1].name)

    def check_depth(self) -> None:
        if len(self.metastack) > 100 or len(self.stack) > 10_000:
            raise pickle.UnpicklingError("it begins more than it ends")

    def load_mark(self) -> None:
        self.check_depth()
        super().load_mark()  # type: ignore[misc]  # which typeshed does not know

    def load_empty_list(self) -> None:
        self.check_depth()
        self.append([])

    def load_empty_dict(self) -> None:
        self.check_depth()
        self.append({})

    def load_tuple(self) -> None:
        """A list, which has no hash."""
        items = self.pop_mark()  # which makes `append` another
        self.append(items)

    def load_few(self, count: int) -> None:
        self.stack[-count:] = [self.stack[-count:]]

    def add_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target += items
        elif type(target) is not Made:  # of a deque or a set, nothing is kept
            raise pickle.UnpicklingError(f"it adds items to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise pickle.UnpicklingError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) is str else None] = value  # an optimizer's are numbers

    def memorize(self, place: int) -> None:
        if place != len(self.memo):
            raise pickle.UnpicklingError("it numbers what it remembers out of turn")
        self.memo[place] = self.stack[-1]

    def load_build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if type(built) is not Made:
            raise pickle.UnpicklingError(f"it changes a {type(built).__name__} after it was made")
        built.attributes = state

    def load_other(self) -> None:
        raise pickle.UnpicklingError("it has instructions that torch.save does not write")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **dict.fromkeys(range(256), load_other),
        **{
            code: pickle._Unpickler.dispatch[code]
            for code in (
                *(pickle.PROTO + pickle.STOP + pickle.GLOBAL + pickle.POP),
                *(pickle.BINPERSID + pickle.BINGET + pickle.LONG_BINGET),
                *(pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE + pickle.BINFLOAT),
                *(pickle.BININT + pickle.BININT1 + pickle.BININT2 + pickle.LONG1),
                *(pickle.BINUNICODE + pickle.EMPTY_TUPLE + pickle.BINBYTES + pickle.SHORT_BINBYTES),
            )
        },
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.MARK[0]: load_mark,
        pickle.EMPTY_LIST[0]: load_empty_list,
        pickle.EMPTY_DICT[0]: load_empty_dict,
        pickle.TUPLE[0]: load_tuple,
        pickle.TUPLE1[0]: lambda self: self.load_few(1),
        pickle.TUPLE2[0]: lambda self: self.load_few(2),
        pickle.TUPLE3[0]: lambda self: self.load_few(3),
        pickle.APPEND[0]: lambda self: self.add_items([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self.add_items(self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self.set_items([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self.set_items(self.pop_mark()),
        pickle.BINPUT[0]: lambda self: self.memorize(self.read(1)[0]),
        pickle.LONG_BINPUT[0]: lambda self: self.memorize(int.from_bytes(self.read(4), "little")),
    }
