"""Image -> pixels: the four steps between a photograph and what CLIP was trained to see.

    to RGB -> resize the short side (bicubic) -> crop the centre -> scale and normalise

Two implementations say how: openai/CLIP (clip.py, `_transform`, on torchvision) and transformers
(`CLIPImageProcessorPil`, image_transforms.py). They disagree, and each can be had exactly:

- Order. OpenAI turns to RGB *after* the crop, so Pillow resizes whatever the file held: a palette
  or a bilevel image by nearest neighbour, and the colour hidden under transparent pixels comes to
  light. transformers turns to RGB first and lays transparent pixels on white.
- Crop. A margin of m pixels is cut in half. For an odd m OpenAI rounds half to even (3 -> 2,
  5 -> 2), transformers rounds down (3 -> 1, 5 -> 2): one pixel apart whenever m % 4 == 3.

An ordinary photograph with an even margin is the same in both. Pillow does the resampling for
either, and it always antialiases; torchvision's tensor resize gives other pixels.
"""

import math
import os
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from miniclip.config import CheckpointError, ImageError, blaming, read_json, shown, write_json
from miniclip.layouts import preprocessing_from_open_clip

REFERENCES = ("transformers", "openai")
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of R, G, B in 0..1 over OpenAI's training set
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_PIXELS = 178_956_970
"""The most pixels an image may have: Pillow's own limit on files (twice `MAX_IMAGE_PIXELS`; cameras
make 150 million), here also on the resized image, which a 1 x 100,000 strip would make enormous."""

Picture = Image.Image | str | PathLike[str] | np.ndarray | Tensor


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, transparency laid on white, as transformers does it (`convert_to_rgb`).

    >>> to_rgb(Image.new("LA", (1, 1), color=(0, 0))).getpixel((0, 0))
    (255, 255, 255)
    """
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size` pixels; the longer one follows, its fraction dropped.

    >>> resize_short_side(Image.new("RGB", (640, 480)), 224).size
    (298, 224)
    """
    short, long = sorted(image.size)
    if short == 0:
        raise ImageError("it has no pixels")
    new_long = int(size * long / short)
    if size * new_long > MAX_PIXELS:
        raise ImageError(
            f"resized to {size} x {new_long} it would have more than {MAX_PIXELS} pixels, "
            "the most allowed; crop it first"
        )
    new_size = (size, new_long) if image.width == short else (new_long, size)
    return image.resize(new_size, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int, reference: str = "transformers") -> Image.Image:
    """The middle `size` x `size` pixels; what lies outside the image is 0.

    >>> strip = Image.new("L", (4, 1))
    >>> strip.putdata([0, 1, 2, 3])
    >>> center_crop(strip, 1, "transformers").getpixel((0, 0))
    1
    >>> center_crop(strip, 1, "openai").getpixel((0, 0))
    2
    """
    left = _crop_offset(image.width - size, reference)
    top = _crop_offset(image.height - size, reference)
    return image.crop((left, top, left + size, top + size))


def _crop_offset(margin: int, reference: str) -> int:
    if reference == "transformers":
        return margin // 2
    # Python's round, which torchvision calls, goes to the even neighbour. Where the image is
    # smaller than the crop, torchvision pads it first, with the odd pixel on the right.
    return round(margin / 2) if margin > 0 else -(-margin // 2)


def scale_and_normalize(
    image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]
) -> np.ndarray:
    """RGB bytes to (byte / 255 - mean) / std, float32 of shape (3, H, W).

    transformers multiplies by 1/255 in float64 where torchvision divides by 255 in float32; for
    each of the 256 bytes both give the same float32.

    >>> scale_and_normalize(Image.new("RGB", (1, 1), "white"), OPENAI_MEAN, OPENAI_STD).ravel()
    array([1.9303361, 2.0748837, 2.145897 ], dtype=float32)
    """
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")  # (3, H, W)
    pixels /= np.float32(255)
    pixels -= np.array(mean, np.float32)[:, None, None]
    pixels /= np.array(std, np.float32)[:, None, None]
    return pixels


@dataclass(frozen=True)
class ImageTransform:
    """The four steps in the order of one of the two references. Fields as in the checkpoint's file.

    >>> ImageTransform(224)(Image.new("RGB", (640, 480))).shape
    torch.Size([3, 224, 224])
    """

    size: int = 224  # of the short side after resizing
    _: KW_ONLY
    crop_size: int = None  # type: ignore[assignment]  # as size, unless given
    image_mean: tuple[float, ...] = OPENAI_MEAN
    image_std: tuple[float, ...] = OPENAI_STD
    reference: str = "transformers"

    def __post_init__(self) -> None:
        if self.crop_size is None:
            object.__setattr__(self, "crop_size", self.size)
        for name in ("size", "crop_size"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= math.isqrt(MAX_PIXELS):
                found = f"{name} is {shown(value)}"
                raise ValueError(f"{found}; expected a whole number of pixels above 0")
        for name, least in (("image_mean", 0), ("image_std", 1e-3)):
            values = getattr(self, name)
            three = isinstance(values, list | tuple) and len(values) == 3
            if not three or not all(type(v) in (int, float) and least <= v <= 1 for v in values):
                raise ValueError(
                    f"{name} is {shown(values)}; expected three numbers from {least} to 1, for R, "
                    "G and B: bytes are divided by 255 first"
                )
            object.__setattr__(self, name, tuple(values))
        if self.reference not in REFERENCES:
            raise ValueError(f"reference is {self.reference!r}; expected one of {REFERENCES}")

    def __call__(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """One picture to (3, S, S), a list of B pictures to (B, 3, S, S); float32.

        A picture is a path, opened by `open_image`; a PIL image, whose EXIF is left alone, as in
        both references; a uint8 array (H, W, 3); or a uint8 tensor (3, H, W). A list is shared
        among as many threads as torch uses (Pillow works outside Python's lock); an empty list is
        an empty batch. Raises ImageError, for a list with the index of the first that failed.
        """
        if isinstance(pictures, str) or not isinstance(pictures, Sequence):
            with _no_warnings:
                return torch.from_numpy(self._pixels(pictures))

        pixels = np.empty((len(pictures), 3, self.crop_size, self.crop_size), np.float32)
        # Two threads must not meet in one PIL image, so a picture listed twice is worked on once.
        first: dict[int, int] = {}
        for i, picture in enumerate(pictures):
            first.setdefault(id(picture), i)

        def fill(i: int) -> None:
            try:
                pixels[i] = self._pixels(pictures[i])
            except (ImageError, TypeError) as error:
                raise type(error)(f"image {i} of {len(pictures)}: {error}") from error

        # torch knows how many cores are ours: in a DataLoader's worker it says one.
        with _no_warnings, ThreadPoolExecutor(torch.get_num_threads()) as pool:
            each = pool.map if len(first) > 1 else map  # a new thread costs a tenth of a picture
            for _ in each(fill, first.values()):
                pass  # raises what `fill` raised, and calls off the rest
        for i, picture in enumerate(pictures):
            if i != first[id(picture)]:
                pixels[i] = pixels[first[id(picture)]]
        return torch.from_numpy(pixels)

    def _pixels(self, picture: Picture) -> np.ndarray:
        original = _as_image(picture)
        try:
            original.load()  # of a file just opened: what its header said may change
            image = to_rgb(original) if self.reference == "transformers" else original
            image = resize_short_side(image, self.size)
            image = center_crop(image, self.crop_size, self.reference)
            image = image.convert("RGB") if self.reference == "openai" else image
        except Exception as error:  # what Pillow raises for damage and for modes it cannot convert
            name = picture if isinstance(picture, str | PathLike) else f"{original.mode} image"
            width, height = original.size
            raise ImageError(f"{name} ({width} x {height} pixels): {_reason(error)}") from error
        return scale_and_normalize(image, self.image_mean, self.image_std)

    @classmethod
    def from_pretrained(
        cls, name: str | PathLike[str], *, reference: str = "transformers", **options: Any
    ) -> "ImageTransform":
        """The transform of a checkpoint: an embedded name, a directory, a weights file or a hub id.

        `options` are the `revision`, `cache_dir` and `local_files_only` of `miniclip.load`. Raises
        CheckpointError where the file is missing or damaged, or asks for a step that is none of
        the four.
        """
        from miniclip.checkpoint import resolve  # here, because it imports this file

        path, settings = _read_settings(resolve(name, "transform", **options))
        with blaming(path):
            if path.name.startswith("open_clip"):
                settings = preprocessing_from_open_clip(settings)
            return cls.from_dict(settings, reference=reference)

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write preprocessor_config.json, for ourselves and for transformers. `reference` is a
        choice of the reader and not stored."""
        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            processor = directory / "processor_config.json"
            if processor.is_file() and "image_processor" in (saved := read_json(processor)):
                # Both we and transformers would read this one first.
                write_json(processor, {**saved, "image_processor": self.to_dict()})
            write_json(directory / "preprocessor_config.json", self.to_dict())
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot save: {_reason(error)}") from error

    @classmethod
    def from_dict(
        cls, settings: dict[str, Any], *, reference: str = "transformers"
    ) -> "ImageTransform":
        """Read transformers' preprocessor_config.json, parsed, old form or new. A field left out or
        null has OpenAI's value. Raises ValueError for a setting that this transform cannot follow.

        >>> ImageTransform.from_dict({"size": {"shortest_edge": 336}, "crop_size": 224})
        ... # doctest: +ELLIPSIS
        ImageTransform(size=336, crop_size=224, ...)
        """
        settings = {field: value for field, value in settings.items() if value is not None}
        kind = settings.get("image_processor_type", settings.get("feature_extractor_type", "CLIP"))
        if not isinstance(kind, str) or not kind.startswith("CLIP"):
            raise ValueError(f"image_processor_type is {shown(kind)}; expected CLIPImageProcessor")
        for field, value in settings.items():
            expected = _FIXED.get(field, False)  # do_pad and the like are steps of other models
            if (field in _FIXED or field.startswith("do_")) and value != expected:
                found = f"{field:.100} is {shown(value)}"
                raise ValueError(f"{found}; a CLIP's transform has {expected!r}")
        return cls(
            size=_side(settings, "size", {"shortest_edge"}),
            crop_size=_side(settings, "crop_size", {"height", "width"}),
            image_mean=settings.get("image_mean", OPENAI_MEAN),
            image_std=settings.get("image_std", OPENAI_STD),
            reference=reference,
        )

    def to_dict(self) -> dict[str, Any]:
        """The same settings as transformers writes them, for preprocessor_config.json."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            **_FIXED,
            "size": {"shortest_edge": self.size},
            "crop_size": {"height": self.crop_size, "width": self.crop_size},
            "image_mean": [*self.image_mean],
            "image_std": [*self.image_std],
        }


# What every CLIP's file says, where it says it at all: the four steps, and how they are done.
_FIXED = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": int(Image.Resampling.BICUBIC),
    "do_center_crop": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}


def open_image(
    file: str | PathLike[str] | BinaryIO, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Open an image file, by its path or as a binary file that is open: the first frame, whole, and
    turned upright (EXIF), in the file's mode. `formats` are those allowed, by Pillow's names.

    Never warns. Raises ImageError, with the path and the reason, for whatever is wrong with the
    file; from `MAX_PIXELS` pixels up it is refused as a decompression bomb. Below that Pillow would
    warn from half of it, which is a large camera's photograph.
    """
    # os.fspath: TypeError, where Pillow would take a number for a file
    name = "the image" if hasattr(file, "read") else f"{os.fspath(file)!s}:"
    try:
        with _no_warnings, Image.open(file, formats=formats) as image:
            ImageOps.exif_transpose(image, in_place=True)  # reads the pixels first
    except Exception as error:  # Pillow's parsers raise whatever they trip over
        raise ImageError(f"{name} cannot be read: {_reason(error)}") from error
    return image


def _as_image(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, str | PathLike):
        return open_image(picture)
    if isinstance(picture, np.ndarray):
        layout, channels, is_bytes = "(H, W, 3)", picture.shape[-1:], picture.dtype == np.uint8
    elif isinstance(picture, Tensor):
        layout, channels, is_bytes = "(3, H, W)", picture.shape[:1], picture.dtype == torch.uint8
    else:
        raise TypeError(
            "expected a PIL image, a path, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W), "
            f"or a list of them, found {type(picture).__name__}"
        )
    if not is_bytes:
        raise ImageError(
            f"expected bytes (uint8, 0 to 255), found {picture.dtype}. A float image may be scaled "
            "to 0..1 already and would be scaled twice: pass the bytes it was made from, or, if "
            "it is normalised too, pass it to the model itself"
        )
    if picture.ndim != 3 or tuple(channels) != (3,) or 0 in picture.shape:
        raise ImageError(
            f"expected the shape {layout}, found {tuple(picture.shape)}. Pass a batch as a list, "
            "and grey or transparent pixels as a PIL image"
        )
    if isinstance(picture, Tensor):
        picture = picture.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(picture)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged in its first bytes"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


class _NoWarnings:
    """`warnings.catch_warnings`, which threads that overlap would leave switched off for good: here
    the first one in silences, and the last one out restores."""

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


_no_warnings = _NoWarnings()


def _read_settings(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The image settings of a checkpoint and their file, looked for where transformers looks:
    CLIPProcessor saves them inside processor_config.json since 5.0, and that one goes first."""
    processor = directory / "processor_config.json"
    if processor.is_file():
        settings = read_json(processor).get("image_processor")
        if isinstance(settings, dict):
            return processor, settings
    path = directory / "preprocessor_config.json"
    if not path.is_file() and (directory / "open_clip_config.json").is_file():
        path = directory / "open_clip_config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no preprocessor_config.json, which says how images are resized and "
            "normalised. Most CLIPs want ImageTransform(image_size), which has OpenAI's values"
        )
    return path, read_json(path)


def _side(settings: dict[str, Any], field: str, keys: set[str]) -> Any:
    """The number of pixels in 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    value = settings.get(field, ImageTransform.size)
    sides = list(value.values()) if isinstance(value, dict) and value.keys() == keys else [value]
    if type(sides[0]) is not int or sides[0] != sides[-1]:
        form = " and ".join(f"'{key}'" for key in sorted(keys))
        raise ValueError(f"{field} is {shown(value)}; expected pixels, as one number or by {form}")
    return sides[0]
