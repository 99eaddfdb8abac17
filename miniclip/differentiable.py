"""The image transform on tensors, with gradients. Use it to attack, learn or augment images.

The pixels differ a little from the exact transform's pixels, because Pillow resizes in two passes
and rounds to bytes after each pass. This code does not round.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from miniclip.errors import ImageError
from miniclip.files.checks import can_look_at
from miniclip.transform import ImageTransform, center_crop, resize_short_side


class TensorImage:
    """RGB floats (B, 3, H, W), with the methods `resize` and `crop` of a Pillow image."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        self.height, self.width = pixels.shape[-2:]
        self.size = (self.width, self.height)

    def resize(self, size: tuple[int, int], resample: int | None = None) -> "TensorImage":
        """Resize like Pillow's antialiased bicubic filter, first along the rows and then along the
        columns. After each pass, values are clamped to the range from 0 to 1."""
        pixels = self.pixels
        for sides in ((self.height, size[0]), (size[1], size[0])):
            pixels = F.interpolate(pixels, sides, mode="bicubic", antialias=True).clamp(0, 1)
        return TensorImage(pixels)

    def crop(self, box: tuple[int, int, int, int]) -> "TensorImage":
        """Cut out the box (left, top, right, bottom). Pixels outside of the image are 0."""
        left, top, right, bottom = box
        sides = (-left, right - self.width, -top, bottom - self.height)
        return TensorImage(F.pad(self.pixels, sides))


def transform_tensor(transform: ImageTransform, images: Tensor) -> Tensor:
    """Compute almost the same pixels as `transform`, with gradients.

    Args:
        images: (B, 3, H, W) or (3, H, W), RGB floats from 0 to 1, on any device.
    Returns:
        (B, 3, S, S) or (3, S, S) pixels for the vision tower, in the images' dtype.
    Raises:
        ImageError: the dtype, shape or range is not as described above.

    Before normalisation, pixels differ from the exact transform's pixels by at most 1.2/255, and by
    0.32/255 on average (measured on photographs and noise, shrunk and enlarged). Without a resize,
    the pixels are equal. To measure final results, round to bytes and use the exact transform.

    >>> import torch
    >>> image = torch.rand(3, 48, 64, requires_grad=True)
    >>> transform_tensor(ImageTransform(32), image).sum().backward()
    >>> image.grad.shape
    torch.Size([3, 48, 64])
    """
    if not images.is_floating_point() or images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise ImageError(
            "expected floats from 0 to 1 of the shape (B, 3, H, W) or (3, H, W), found "
            f"{images.dtype} {tuple(images.shape)}"
        )
    if can_look_at(images) and images.numel():
        least, most = (x.item() for x in images.detach().aminmax())
        if not -0.5 <= least <= most <= 1.5:  # a gradient step may go slightly out of the range
            raise ImageError(
                f"expected floats from 0 to 1, found {least:.3g} to {most:.3g}: divide bytes by "
                "255, and do not normalise, because this function normalises"
            )
    image: Any = TensorImage(images if images.ndim == 4 else images[None])
    if transform.squash:
        image = image.resize((transform.size, transform.size))
    else:
        image = resize_short_side(image, transform.size)
    image = center_crop(image, transform.crop_size, transform.reference)
    mean = images.new_tensor(transform.image_mean)[:, None, None]
    std = images.new_tensor(transform.image_std)[:, None, None]
    pixels = (image.pixels - mean) / std
    return pixels if images.ndim == 4 else pixels[0]
