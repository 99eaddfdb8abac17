"""The tensors of a TorchScript archive, the form OpenAI publishes its models in, without its code.

torch.jit.load would build the modules by running the archive's code, and torch.load refuses such a
file. But an archive is a zip, in which `data.pkl` says what each module's attributes are and one
file more has the numbers of each storage. A pickle can name any function of Python to be called:
here only the few names are known that tensors and empty modules are made of.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive with code in it, and not torch.save's zip of tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Every parameter and buffer by its module path, as `state_dict` would name it.

    Raises pickle.UnpicklingError for a name that is none of a module or a tensor, and whatever a
    damaged file makes zipfile, pickle and torch raise.
    """
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        if archive.getinfo(pickled).compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError("data.pkl is compressed, which torch never does")
        with archive.open(pickled) as file:
            root = _Unpickler(file, archive, pickled.removesuffix(".pkl")).load()
    return dict(_tensors(root, "", set()))


def _tensors(module: "_Module", prefix: str, seen: set[int]) -> Any:
    """Of a module that is in two places, only those of the first: a tree has each but once."""
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, _Stored):
            yield prefix + name, value.storage.as_strided(value.size, value.stride, value.offset)
        elif isinstance(value, _Module) and id(value) not in seen:
            yield from _tensors(value, f"{prefix}{name}.", seen)


class _Module:
    """What stands for a module of whatever class: its attributes."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _Stored:
    """A tensor as it is pickled. It becomes one when all has been read, so nothing alters it."""

    def __init__(
        self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a tensor after it was made")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Stored
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):  # a list of plain numbers
            return list
        raise pickle.UnpicklingError(f"it names {module}.{name}, and pickled code is never run")

    def persistent_load(self, reference: Any) -> Tensor:
        """A storage as a flat tensor, as large as the archive says it is in both places."""
        _, dtype, key, _, numel = reference
        record = self.archive.getinfo(f"{self.folder}/{key}")
        size = numel * dtype.itemsize
        if record.file_size != size or record.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"storage {key} should have {size} bytes, stored plainly")
        if key not in self.storages:
            data = bytearray(self.archive.read(record))
            empty = torch.empty(0, dtype=dtype)
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if numel else empty
        return self.storages[key]
