"""The second stage of a comparison: run two image transforms on images that test each step.

The steps are the functions of `transform.py`. A fault replaces one or two steps.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miniclip.parity.formulas import is_near
from miniclip.parity.report import NAMES, Stage, exact_difference, run_both
from miniclip.transform import (
    OPENAI_MEAN,
    OPENAI_STD,
    ImageTransform,
    center_crop,
    resize_short_side,
    scale_and_normalize,
    to_rgb,
)

BICUBIC = Image.Resampling.BICUBIC


def pictures(size: int) -> list[Image.Image]:
    """Make images to test a transform that resizes to `size` pixels.

    The first eight images have a short side of `size`, so they are not resized. Their long side is
    0 to 7 pixels longer, to test how a crop rounds. The other images are resized, and three of them
    are not RGB.
    """
    random = np.random.default_rng(0)

    def noise(width: int, height: int, smooth: int = 1) -> Image.Image:
        small = random.integers(0, 256, (-(-height // smooth), -(-width // smooth), 3), np.uint8)
        return Image.fromarray(small.repeat(smooth, 0).repeat(smooth, 1)[:height, :width])

    margins = [noise(size + m, size) for m in (0, 1, 3, 5)]
    margins += [noise(size, size + m) for m in (1, 2, 3, 7)]
    resized = [noise(2 * size + 9, 3 * size + 4, 5), noise(size // 2 + 3, size // 2 + 1, 3)]
    red, green, blue = resized[0].split()
    transparent = Image.merge("RGBA", (red, green, blue, red.point(lambda v: 255 * (v > 127))))
    return [*margins, *resized, resized[0].convert("L"), resized[0].convert("P"), transparent]


class TransformSteps(NamedTuple):
    """An image transform in four steps. The default steps are transformers' steps."""

    size: int
    crop_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    to_rgb: Callable[[Image.Image], Image.Image] = to_rgb
    resize: Callable[[Image.Image, int], Image.Image] = resize_short_side
    crop: Callable[[Image.Image, int], Image.Image] = center_crop
    scale: Callable[..., np.ndarray] = scale_and_normalize

    def pixels_of(self, picture: Image.Image) -> Tensor:
        """Return the pixels (3, S, S) of an image."""
        image = self.crop(self.resize(self.to_rgb(picture), self.size), self.crop_size)
        return torch.from_numpy(self.scale(image.convert("RGB"), self.mean, self.std))


def on_black(picture: Image.Image) -> Image.Image:
    below = Image.new("RGBA", picture.size, "black")
    return Image.alpha_composite(below, picture.convert("RGBA")).convert("RGB")


def round_long_side(picture: Image.Image, size: int) -> Image.Image:
    width, height = (round(size * side / min(picture.size)) for side in picture.size)
    return picture.resize((width, height), BICUBIC)


def squash(picture: Image.Image, size: int) -> Image.Image:
    return picture.resize((size, size), BICUBIC)


def resample(how: Image.Resampling, picture: Image.Image, size: int) -> Image.Image:
    return picture.resize(resize_short_side(picture, size).size, how)


def crop_rounded_up(picture: Image.Image, size: int) -> Image.Image:
    left, top = (-((size - side) // 2) for side in picture.size)
    return picture.crop((left, top, left + size, top + size))


def divide_by(divisor: float, picture: Image.Image, *mean_and_std: Sequence[float]) -> np.ndarray:
    """Return (byte / divisor - mean) / std. `scale_and_normalize` divides by 255, so mean and std
    are rescaled."""
    mean, std = ([number * divisor / 255 for number in numbers] for numbers in mean_and_std)
    return scale_and_normalize(picture, mean, std)


openai_crop = partial(center_crop, reference="openai")

SETTINGS = ("size", "crop_size", "squash", "image_mean", "image_std", "reference")

FAULTS_OF_PIXELS: dict[str, dict[str, Any]] = {
    "a crop that rounds half to even, not down": {"crop": openai_crop},
    "a crop that rounds up, not down": {"crop": crop_rounded_up},
    "a crop from the upper left corner": {"crop": lambda p, size: p.crop((0, 0, size, size))},
    "OpenAI's crop and order of steps": {"crop": openai_crop, "to_rgb": lambda picture: picture},
    "conversion to RGB after the resize, not before": {"to_rgb": lambda picture: picture},
    "transparency that is dropped, not blended with white": {"to_rgb": lambda p: p.convert("RGB")},
    "transparency blended with black, not with white": {"to_rgb": on_black},
    "a long side that is rounded, not truncated": {"resize": round_long_side},
    "a resize to a square": {"resize": squash},
    "the colours in the order BGR": {
        "scale": lambda p, *s: scale_and_normalize(Image.merge("RGB", p.split()[::-1]), *s)
    },
    "bytes that are not divided by 255": {"scale": partial(divide_by, 1.0)},
    "bytes divided by 255 twice": {"scale": partial(divide_by, 255.0**2)},
    "bytes divided by 256": {"scale": partial(divide_by, 256.0)},
    "no mean and std": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    "OpenAI's mean and std": {"mean": OPENAI_MEAN, "std": OPENAI_STD},
    "a mean and std of 0.5": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "ImageNet's mean and std": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    **{
        f"{how.name.lower()} resampling, not bicubic": {"resize": partial(resample, how)}
        for how in Image.Resampling
        if how != BICUBIC
    },
}
"""Possible faults of other implementations: {fault: the transform's steps that it changes}."""


def cause_in_pixels(ours: Any, theirs: Any, one: list[Tensor], other: list[Tensor]) -> str:
    """Say why two transforms give different pixels.

    `ours` and `theirs` are ImageTransforms or any functions. `one` and `other` are the pixels that
    they give for `pictures(size)`. Returns "" if neither function has the settings of an
    ImageTransform.

    >>> from miniclip import ImageTransform
    >>> cause_in_pixels(ImageTransform(64), ImageTransform(64, crop_size=60), [], [])
    'crop_size is 64 in model, 60 in other'
    """
    known = [t for t in (ours, theirs) if all(hasattr(t, name) for name in SETTINGS)]
    if not known:
        return ""
    for name in SETTINGS:
        a, b = getattr(known[0], name), getattr(known[-1], name)
        if a != b:
            return f"{name} is {a} in model, {b} in other"
    right = known[0]
    resize = squash if right.squash else resize_short_side
    steps = TransformSteps(
        right.size, right.crop_size, right.image_mean, right.image_std, resize=resize
    )
    drawn = pictures(right.size)
    for fault, changed in FAULTS_OF_PIXELS.items():
        if steps._replace(**changed) == steps:  # the transform already has these steps
            continue
        faulty = [steps._replace(**changed).pixels_of(picture) for picture in drawn]
        for name, found in zip(NAMES, (one, other)):
            pairs = zip(faulty, found, strict=True)
            if all(is_near(a.double(), b.double(), 1e-5) for a, b in pairs):
                return f"{name} has {fault}"
    return ""


def compare_transforms(ours: ImageTransform, theirs: ImageTransform) -> Stage:
    """Return one row for the pixels of all images, and the cause if the pixels differ."""
    sizes = (getattr(transform, "size", None) for transform in (ours, theirs))
    drawn = pictures(next((s for s in sizes if isinstance(s, int)), ImageTransform.size))

    def pixels_of(transform: Callable[[Image.Image], Tensor]) -> list[Tensor]:
        return [torch.as_tensor(transform(picture)) for picture in drawn]

    found, raised = run_both(pixels_of, ours, theirs)
    if raised:
        return [exact_difference("pixels")], raised
    one, other = (torch.cat([pixels.flatten() for pixels in results]) for results in found)
    row = exact_difference("pixels", one, other)
    if row.within_tolerance:
        return [row], None
    return [row], cause_in_pixels(ours, theirs, *found)
