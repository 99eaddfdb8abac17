"""Pictures as Pillow images: from files, open files, bytes, arrays and tensors."""

import io
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from miniclip.errors import ImageError

Picture = Image.Image | str | PathLike[str] | bytes | BinaryIO | np.ndarray | Tensor


def open_image(
    file: str | PathLike[str] | bytes | BinaryIO, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """The first frame of an image file, turned upright (EXIF), in the file's mode.

    `file` is a path, the bytes of a file, or an open binary file. `formats` are the allowed formats
    by Pillow's names. Never warns. Raises ImageError with the path and the reason; an image above
    `MAX_PIXELS` pixels is refused as a decompression bomb.
    """
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    # os.fspath raises TypeError for a number, which Pillow would take for a file descriptor.
    name = "the image" if hasattr(file, "read") else f"{os.fspath(file)!s}:"
    try:
        with no_warnings, Image.open(file, formats=formats) as image:
            ImageOps.exif_transpose(image, in_place=True)  # reads the pixels first
    except Exception as error:  # Pillow's parsers raise many kinds of errors
        raise ImageError(f"{name} cannot be read: {reason_of(error)}") from error
    return image


def with_name(name: str, error: ImageError) -> str:
    """The error's message, with the image's name in front if it does not have it yet."""
    return str(error) if name in str(error) else f"{name}: {error}"


def as_image(picture: Picture) -> Image.Image:
    """A picture in any accepted form as a Pillow image. Raises ImageError or TypeError."""
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, str | PathLike | bytes) or hasattr(picture, "read"):
        file: Any = picture
        return open_image(file)
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
            "to 0..1 already and would be scaled twice: pass the bytes it was made from, or, if "
            "it is normalised too, pass it to the model itself"
        )
    if picture.ndim != 3 or tuple(channels) != (3,) or 0 in picture.shape:
        raise ImageError(
            f"expected the shape {shape}, found {tuple(picture.shape)}. Pass a batch as a list, "
            "and grey or transparent pixels as a PIL image"
        )
    if isinstance(picture, Tensor):
        picture = picture.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(picture)


def reason_of(error: Exception) -> str:
    """One line of what an error says."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged in its first bytes"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


class _NoWarnings:
    """`warnings.catch_warnings` is not thread-safe. This version counts entries and restores the
    filters at the last exit."""

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


def fill_in_threads(
    rows: np.ndarray, compute: Callable[[Any], np.ndarray], pictures: Sequence[Any]
) -> None:
    """Fill each row with what is computed for its picture, in as many threads as torch uses.

    Pillow works outside Python's lock. In a DataLoader's worker torch has one thread. Raises what
    `compute` raises, with the index of the picture.
    """
    first: dict[int, int] = {}  # two threads must not work on one PIL image
    for i, picture in enumerate(pictures):
        first.setdefault(id(picture), i)

    def fill(i: int) -> None:
        try:
            rows[i] = compute(pictures[i])
        except (ImageError, TypeError) as error:
            raise type(error)(f"image {i} of {len(pictures)}: {error}") from error

    with no_warnings, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        each = pool.map if len(first) > 1 else map  # a new thread costs a tenth of a picture
        for _ in each(fill, first.values()):
            pass  # raises what `fill` raised, and cancels the rest
    for i, picture in enumerate(pictures):
        if i != first[id(picture)]:
            rows[i] = rows[first[id(picture)]]
