"""Image -> pixels: the four steps from a photograph to the input of CLIP.

    to RGB -> resize the short side (bicubic) -> crop the centre -> scale and normalise

Two references are matched exactly: openai/CLIP (clip.py, `_transform`, on torchvision) and
transformers (`CLIPImageProcessorPil`). They differ in two ways:

- Order. transformers converts to RGB first, with white behind transparent pixels. OpenAI converts
  to RGB after the crop, so Pillow resizes a palette image by nearest neighbour, and transparent
  pixels keep the colour that is stored in them.
- Crop. If a side has m more pixels than the crop, the crop starts at m / 2. transformers rounds
  down (3 -> 1, 5 -> 2), OpenAI rounds half to even (3 -> 2, 5 -> 2). The crops differ if m % 4 is
  3. If the image is smaller than the crop (m is negative), the crops differ for every odd m.

Both resize with Pillow and antialiasing. torchvision's resize of tensors gives other pixels.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from os import PathLike
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miniclip.errors import ImageError
from miniclip.files.checks import MAX_PIXELS, check_transform
from miniclip.files.pictures import Picture, as_image, fill_in_threads, no_warnings, reason_of
from miniclip.files.pretrained import PretrainedTransform

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # mean R, G, B (0 to 1) of OpenAI's images
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, with white behind transparency (transformers, `convert_to_rgb`)."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size` pixels. Keep the aspect ratio; round the longer side down.

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
            "which is the limit; crop it first"
        )
    new_size = (size, new_long) if image.width == short else (new_long, size)
    return image.resize(new_size, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int, reference: str = "transformers") -> Image.Image:
    """Crop the centre to `size` x `size`, padded with 0. Below, a pixel's value is its row number:

    >>> center_crop(Image.linear_gradient("L").crop((0, 0, 4, 4)), 1, "openai").getpixel((0, 0))
    2
    """
    margins = (image.width - size, image.height - size)
    left, top = (margin // 2 for margin in margins)
    if reference == "openai":  # torchvision pads by half of the missing pixels, rounded down
        left, top = (round(m / 2) if m > 0 else -(-m // 2) for m in margins)
    return image.crop((left, top, left + size, top + size))


def scale_and_normalize(
    image: Image.Image, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """RGB bytes -> (byte / 255 - mean) / std, float32 of shape (3, H, W)."""
    pixels = np.empty((3, image.height, image.width), np.float32)
    for out, band, band_mean, band_std in zip(pixels, image.split(), mean, std):
        out[:] = np.asarray(band)
        out /= 255  # transformers multiplies by 1/255 in float64, with the same float32 result
        out -= band_mean
        out /= band_std
    return pixels


@dataclass(frozen=True)
class ImageTransform(PretrainedTransform):
    """The four steps in the order of one reference.

    >>> ImageTransform(224)(Image.new("RGB", (640, 480))).shape
    torch.Size([3, 224, 224])
    """

    size: int = 224  # the short side after resizing
    _: KW_ONLY
    crop_size: int = None  # type: ignore[assignment]  # default: `size`
    image_mean: tuple[float, ...] = OPENAI_MEAN
    image_std: tuple[float, ...] = OPENAI_STD
    squash: bool = False  # resize to size x size and ignore the ratio (open_clip: "squash")
    reference: str = "transformers"

    def __post_init__(self) -> None:
        if self.crop_size is None:
            object.__setattr__(self, "crop_size", self.size)
        check_transform(self)
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def __call__(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """One picture -> (3, S, S), a list of B pictures -> (B, 3, S, S), float32; S = crop_size.

        A picture is a path, bytes or an open file (rotated by its EXIF orientation), a PIL image
        (never rotated), a uint8 array (H, W, 3) or a uint8 tensor (3, H, W). A list is read by
        `torch.get_num_threads()` threads. Raises ImageError. For a list, the error names the index.
        """
        is_file = isinstance(pictures, str | bytes | bytearray | memoryview)
        if is_file or not isinstance(pictures, Sequence):
            with no_warnings:
                return torch.from_numpy(self._pixels(cast(Picture, pictures)))
        pixels = np.empty((len(pictures), 3, self.crop_size, self.crop_size), np.float32)
        fill_in_threads(pixels, self._pixels, pictures)
        return torch.from_numpy(pixels)

    def _pixels(self, picture: Any) -> np.ndarray:
        original = as_image(picture)
        try:
            original.load()  # decoding may correct a wrong size in the header
            image = to_rgb(original) if self.reference == "transformers" else original
            if self.squash:
                image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
            else:
                image = resize_short_side(image, self.size)
            image = center_crop(image, self.crop_size, self.reference)
            image = image.convert("RGB") if self.reference == "openai" else image
        except Exception as error:  # Pillow raises many types of errors, also for rare modes
            name = picture if isinstance(picture, str | PathLike) else f"{original.mode} image"
            size = "{} x {} pixels".format(*original.size)
            raise ImageError(f"{name} ({size}): {reason_of(error)}") from error
        return scale_and_normalize(image, self.image_mean, self.image_std)
