"""Read images from files, open files, bytes, arrays and tensors, as Pillow images."""

import io
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import cache
from importlib import import_module
from os import PathLike
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from miniclip.errors import ImageError
from miniclip.files.reading import open_regular

Bytes = bytes | bytearray | memoryview  # the contents of an image file
Picture = Image.Image | str | PathLike[str] | Bytes | BinaryIO | np.ndarray | Tensor

# Formats that Pillow cannot read by itself: package -> (its module, the endings of the files).
RAW = (
    ".3fr .arw .cr2 .cr3 .crw .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .rw2 "
    ".rwl .sr2 .srf .srw .x3f"
).split()
PACKAGES = {
    "pillow-heif": ("pillow_heif.HeifImagePlugin", [".heic", ".heif", ".hif"]),
    "pillow-avif-plugin": ("pillow_avif", [".avif"]),
    "pillow-jxl-plugin": ("pillow_jxl", [".jxl"]),
    "rawpy": ("rawpy", RAW),
}
HEIC = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc")  # bytes 4 to 12 of a HEIC file
SYSTEM_FOLDERS = frozenset(  # folders that network drives, Windows, Linux and macOS make
    "@eadir @recycle @recently-snapshot #recycle #snapshot $recycle.bin lost+found __macosx".split()
) | {"system volume information"}


@cache
def missing_packages() -> dict[str, str]:
    """Import the installed packages of PACKAGES, so that Pillow can use their plugins.

    Returns a dictionary: a file ending that cannot be read -> the package that is missing.
    """
    missing: dict[str, str] = {}
    for package, (module, endings) in PACKAGES.items():
        try:
            import_module(module)
        except ImportError:
            missing |= dict.fromkeys(endings, package)
    return {ending: package for ending, package in missing.items() if ending not in _of_pillow()}


def _of_pillow() -> set[str]:
    return {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}


@cache
def picture_suffixes() -> frozenset[str]:
    """The file endings that Pillow reads, and the file endings in PACKAGES."""
    missing_packages()
    return frozenset(_of_pillow().union(*(endings for _, endings in PACKAGES.values())))


def is_picture(name: str) -> bool:
    """Whether a file name has one of `picture_suffixes`, in upper or lower case."""
    return os.path.splitext(name)[1].lower() in picture_suffixes()


def is_hidden(name: str) -> bool:
    """Whether a file or folder with this name is hidden, or belongs to the system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def open_image(
    file: str | PathLike[str] | Bytes | BinaryIO,
    formats: tuple[str, ...] | None = None,
    name: str = "",
) -> Image.Image:
    """Open the first frame of an image file, upright (EXIF), in the file's mode. Never warns.

    Args:
        file: a path, the bytes of a file, or an open binary file.
        formats: the formats that are allowed, by Pillow's names.
        name: the name of an open file. Its ending tells which package is missing.
    Raises:
        ImageError: the file cannot be read, or has more than `MAX_PIXELS` pixels.
    """
    source: Any = io.BytesIO(file) if isinstance(file, Bytes) else file
    is_open = hasattr(source, "read")
    # os.fspath raises TypeError for a number, which Pillow would use as a file descriptor.
    title = "the image" if is_open else f"{os.fspath(source)!s}:"
    suffix = os.path.splitext(name or title.rstrip(":"))[1].lower()
    missing = missing_packages()
    try:
        if not is_open:
            open_regular(source).close()  # refuse a pipe, because Pillow would wait for data
        if suffix in RAW:  # Pillow would read only the thumbnail
            import rawpy

            with rawpy.imread(source if is_open else os.fspath(source)) as raw:
                return Image.fromarray(raw.postprocess(use_camera_wb=True))
        with no_warnings, Image.open(source, formats=formats) as image:
            ImageOps.exif_transpose(image, in_place=True)  # this also reads the pixels
    except Exception as error:  # Pillow's parsers raise many kinds of errors
        reason = reason_of(error)
        if isinstance(error, UnidentifiedImageError | ImportError):
            with suppress(OSError, ValueError):
                with nullcontext(source) if is_open else open(source, "rb") as stream:
                    stream.seek(0)  # many HEIC files are called .jpg
                    suffix = ".heic" if stream.read(12)[4:] in HEIC else suffix
            if suffix in missing:
                reason = f"{suffix} needs another package: pip install {missing[suffix]}"
        raise ImageError(f"{title} cannot be read: {reason}") from error
    return image


def with_name(name: str, error: ImageError) -> str:
    """The message of an error. If the message lacks the image's name, the name is put first."""
    return str(error) if name in str(error) else f"{name}: {error}"


def as_image(picture: Picture) -> Image.Image:
    """Convert an image in any accepted form to a Pillow image. Raises ImageError or TypeError."""
    if isinstance(picture, str | PathLike | Bytes) or hasattr(picture, "read"):
        file: Any = picture
        picture = open_image(file, name=str(getattr(file, "name", "")))
    if isinstance(picture, Image.Image):
        _check_floats(picture)
        return picture
    if isinstance(picture, np.ndarray):
        shape, channels, is_bytes = "(H, W, 3)", picture.shape[-1:], picture.dtype == np.uint8
    elif isinstance(picture, Tensor):
        shape, channels, is_bytes = "(3, H, W)", picture.shape[:1], picture.dtype == torch.uint8
    else:
        raise TypeError(
            "expected a PIL image, a path, bytes or an open file, a uint8 array (H, W, 3) or a "
            f"uint8 tensor (3, H, W), or a list of them, found {type(picture).__name__}"
        )
    if not is_bytes:
        raise ImageError(
            f"expected bytes (uint8, 0 to 255), found {picture.dtype}. A float image may be scaled "
            "to 0..1 already, and would be scaled twice. Pass the original bytes. Pass normalised "
            "pixels directly to the model. For gradients, see miniclip.differentiable"
        )
    if picture.ndim != 3 or tuple(channels) != (3,) or 0 in picture.shape:
        raise ImageError(
            f"expected the shape {shape}, found {tuple(picture.shape)}. Pass a batch as a list, "
            "and grey or transparent pixels as a PIL image"
        )
    if isinstance(picture, Tensor):
        picture = picture.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(picture)


def _check_floats(image: Image.Image) -> None:
    """Raise ImageError for floats of at most 1, and for NaN. Pillow would turn both black."""
    if image.mode != "F":
        return
    most = np.abs(np.asarray(image)).max(initial=0)
    if not np.isfinite(most) or 0 < most <= 1:
        name = getattr(image, "filename", "") or "the image"
        raise ImageError(
            f"{name}: has floats, and the largest is {most:.3g}: expected 0 to 255. If the floats "
            "go from 0 to 1, multiply them by 255 first"
        )


def reason_of(error: Exception) -> str:
    """The message of an error in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow reads, or damaged in its first bytes"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


class _NoWarnings:
    """Silence warnings. `warnings.catch_warnings` is not thread-safe. This class counts the open
    `with` blocks, and restores the filters when the last block ends."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.caught = warnings.catch_warnings()
                self.caught.__enter__()
                warnings.simplefilter("ignore")
            self.inside += 1

    def __exit__(self, *exception: Any) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.caught.__exit__(*exception)


no_warnings = _NoWarnings()


def _may_share_a_file(picture: Any) -> bool:
    """Whether an image is in a file that other file objects may read too, such as a tar."""
    if isinstance(picture, Image.Image):  # `fp` is the file, until the pixels are read
        picture = getattr(picture, "fp", None)
    own = isinstance(getattr(picture, "raw", picture), io.FileIO | io.BytesIO)
    return hasattr(picture, "read") and not own


def fill_in_threads(
    rows: np.ndarray, compute: Callable[[Any], np.ndarray], pictures: Sequence[Any]
) -> None:
    """Fill each `rows[i]` with `compute(pictures[i])`, in as many threads as torch uses.

    Pillow releases the GIL while it works. In a worker of a DataLoader, torch uses one thread. An
    ImageError or a TypeError of `compute` is raised again with the index of the image.
    """
    pictures = list(pictures)  # a lazy sequence makes a new picture at each access
    one_at_a_time = threading.Lock()
    first: dict[int, int] = {}  # two threads must not work on the same Pillow image
    for i, picture in enumerate(pictures):
        first.setdefault(id(picture), i)

    def fill(i: int) -> None:
        try:
            with one_at_a_time if _may_share_a_file(pictures[i]) else nullcontext():
                rows[i] = compute(pictures[i])
        except (ImageError, TypeError) as error:
            raise type(error)(f"image {i} of {len(pictures)}: {error}") from error

    with no_warnings, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        each = pool.map if len(first) > 1 else map  # a new thread costs a tenth of an image's time
        for _ in each(fill, first.values()):
            pass  # an error of `fill` is raised here, and cancels the waiting calls
    for i, picture in enumerate(pictures):
        if i != first[id(picture)]:
            rows[i] = rows[first[id(picture)]]
