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
        with archive.open(pickled) as file:
            root = _Unpickler(file, archive, pickled.removesuffix(".pkl")).load()
    return dict(_tensors(root, ""))


def _tensors(module: "_Module", prefix: str) -> Any:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")


class _Module:
    """What stands for a module of whatever class: its attributes. pickle fills its __dict__."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
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
        data = bytearray(self.archive.read(record))
        return torch.frombuffer(data, dtype=dtype) if numel else torch.empty(0, dtype=dtype)


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    return storage.as_strided(size, stride, offset)
