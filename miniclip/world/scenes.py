"""Scenes of coloured shapes, and their images with exact masks."""

import math
from functools import cache
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64

COLOURS = {
    "red": (226, 40, 40),
    "orange": (250, 140, 30),
    "yellow": (252, 222, 60),
    "green": (50, 180, 84),
    "blue": (50, 108, 246),
    "purple": (154, 64, 212),
    "pink": (255, 140, 196),
    "white": (252, 252, 250),
}

RADII = {"small": 6, "plain": 9, "large": 13}  # radius of the circle around a shape, in pixels
TILTS = (-12, 0, 12)  # degrees
GRID = 4  # pixels; the coordinates of all centres are multiples of GRID
BACKGROUNDS = ("plain", "gradient", "stripes", "noise")

Y, X = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.float32) / IMAGE_SIZE - 0.5

ANGLES = np.linspace(0, math.tau, 96, endpoint=False)
ROUND = np.exp(1j * ANGLES)
UP = -1j
LONG, THIN = 0.94, 0.32  # half the length and half the width of a cross's arms
ARM = np.array([LONG - THIN * 1j, LONG + THIN * 1j, THIN + THIN * 1j])
HEART = 16 * np.sin(ANGLES) ** 3 + 1j * (
    -13 * np.cos(ANGLES)
    + 5 * np.cos(2 * ANGLES)
    + 2 * np.cos(3 * ANGLES)
    + np.cos(4 * ANGLES)
    - 1.5
)
OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    "circle": (0.9 * ROUND,),
    "square": (np.array([1 + 1j, 1 - 1j, -1 - 1j, -1 + 1j]) * 0.5**0.5,),
    "triangle": (UP * np.exp(1j * math.tau / 3 * np.arange(3)),),
    "star": (UP * np.exp(1j * math.tau / 10 * np.arange(10)) * np.tile([1, 0.42], 5),),
    "cross": (np.concatenate([ARM * 1j**quarter for quarter in range(4)]),),
    "ring": (0.95 * ROUND, 0.5 * ROUND),
    "heart": (HEART / 18.5,),
    "moon": (0.95 * ROUND, 0.8 * ROUND + (0.48 - 0.1j)),
}
"""Polygons in the unit circle. The second polygon of a ring and of a moon is cut out.

A corner is a complex number, x + iy with y downwards, so a rotation is a product."""
SHAPES = tuple(OUTLINES)

HELD_OUT = frozenset(
    (colour, SHAPES[(3 * i + 1) % 8]) for i, colour in enumerate(COLOURS)
)  # 8 of the 64 pairs; each colour and each shape is in exactly one held-out pair

SEEN = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT)

CLEAR = 8
"""Captions name a relation only if the centres are at least this many pixels apart along its axis.
A relation can be true at a smaller distance. Any two objects are this far apart on one axis."""


class Object(NamedTuple):
    """A coloured shape with its size, tilt and place."""

    colour: str
    shape: str
    size: str  # a key of RADII
    tilt: int  # degrees
    x: int  # distance of the centre from the left edge, in pixels
    y: int  # distance of the centre from the top edge, in pixels


class Background(NamedTuple):
    """Two colours, and the way to mix them."""

    kind: str
    first: tuple[int, ...]  # red, green, blue
    second: tuple[int, ...]
    angle: float  # radians; for a gradient or stripes
    grain: bytes  # 8 x 8 values; for noise


class Scene(NamedTuple):
    """The content of an image: objects that do not touch, and a background."""

    objects: tuple[Object, ...]
    background: Background


def scene(index: int, *, seed: int = 0, held_out: bool = False, count: int | None = None) -> Scene:
    """Return a scene. No two objects of the scene have the same colour and shape.

    Args:
        index: the number of the scene.
        seed: each seed gives different scenes.
        held_out: take pairs of colour and shape from `HELD_OUT`, not from `SEEN`.
        count: the number of objects; by default one to three.

    >>> scene(0, count=1) == scene(0, count=1)
    True
    """
    # A string as a seed gives the same numbers in every version of Python, on every machine.
    random = Random(f"{seed} {index} {held_out} {count}")
    pairs = sorted(HELD_OUT) if held_out else SEEN
    chosen = random.sample(pairs, count or random.choice((1, 2, 2, 2, 3)))
    places = None
    while places is None:
        sizes = [random.choice(tuple(RADII)) for _ in chosen]
        places = scatter([RADII[size] for size in sizes], random)
    objects = tuple(
        Object(colour, shape, size, random.choice(TILTS), x, y)
        for (colour, shape), size, (x, y) in zip(chosen, sizes, places, strict=True)
    )
    return Scene(objects, background(random))


def scatter(radii: list[int], random: Random) -> list[tuple[int, int]] | None:
    """Choose centres (x, y) of circles that do not touch. Returns None if there is no room."""
    places: list[tuple[int, int]] = []
    for radius in radii:
        inside = [at for at in range(0, IMAGE_SIZE, GRID) if radius < at < IMAGE_SIZE - radius]
        for _ in range(20):
            x, y = random.choice(inside), random.choice(inside)
            if all(math.dist((x, y), p) > radius + r + 1 for p, r in zip(places, radii)):
                places.append((x, y))
                break
        else:
            return None
    return places


def background(random: Random) -> Background:
    """Choose a dark grey background. Every object is brighter than the background."""
    first, second = (
        tuple(grey + random.randint(-12, 12) for _ in "rgb")
        for grey in (random.randint(24, 76), random.randint(24, 76))
    )
    kind = random.choice(BACKGROUNDS)
    return Background(kind, first, second, random.uniform(0, math.tau), random.randbytes(64))


def draw(scene: Scene) -> tuple[Image.Image, np.ndarray]:
    """Draw a scene. Returns an image of 64 x 64 pixels and the objects' masks, bool (N, 64, 64).

    A pixel is in a mask if the object covers at least half of the pixel. A pixel that the object
    covers completely has exactly the object's colour.
    """
    pixels = paint(scene.background)  # (64, 64, 3) float32
    masks = np.zeros((len(scene.objects), IMAGE_SIZE, IMAGE_SIZE), bool)
    for object, mask in zip(scene.objects, masks, strict=True):
        radius = RADII[object.size]
        cover = sprite(object.shape, radius, object.tilt)  # (2 r, 2 r), 0 to 1
        rows = slice(object.y - radius, object.y + radius)
        columns = slice(object.x - radius, object.x + radius)
        patch = pixels[rows, columns]  # a view, so the next line paints the image
        patch += cover[:, :, None] * (np.array(COLOURS[object.colour], np.float32) - patch)
        mask[rows, columns] = cover >= 0.5
    return Image.fromarray(np.rint(pixels).astype(np.uint8)), masks


def paint(background: Background) -> np.ndarray:
    """Return the pixels of a background, (64, 64, 3) float32 from 0 to 255."""
    along = X * np.float32(math.cos(background.angle)) + Y * np.float32(math.sin(background.angle))
    if background.kind == "gradient":
        share = along + 0.5
    elif background.kind == "stripes":
        share = np.sin(along * 40) * 1.5 + 0.5  # about eight stripes with soft edges
    elif background.kind == "noise":
        grain = Image.frombytes("L", (8, 8), background.grain)
        share = np.asarray(grain.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)) / 255
    else:
        share = np.zeros_like(X)
    first, second = np.array(background.first), np.array(background.second)
    share = share.astype(np.float32).clip(0, 1)[:, :, None]
    return first + share * (second - first).astype(np.float32)


@cache  # 8 shapes x 3 radii x 3 tilts
def sprite(shape: str, radius: int, tilt: int) -> np.ndarray:
    """Return the share of each pixel that a shape covers, (2 radius, 2 radius) float32."""
    if shape not in OUTLINES:
        raise ValueError(f"shape is {shape!r}; expected one of {SHAPES}")
    fine = 16  # draw 16 times larger, then average
    canvas = Image.new("L", (2 * radius * fine, 2 * radius * fine))
    turn = np.exp(1j * math.radians(tilt))
    for polygon, ink in zip(OUTLINES[shape], (255, 0)):
        points = (polygon * turn + (1 + 1j)) * (radius * fine) - (0.5 + 0.5j)  # pixel centres
        ImageDraw.Draw(canvas).polygon([(p.real, p.imag) for p in points], fill=ink)
    return np.asarray(canvas.reduce(fine), np.float32) / 255
