"""A world of coloured shapes: pictures, exact masks, and captions that are true or false by proof.

One to three shapes, none covering another, on a quiet background. Because every picture is drawn
from a `Scene`, whatever a caption says can be checked against it, and every object's pixels are
known. That allows three questions that photographs leave open:

- Does a model know a colour and a shape in a pair it was never shown? `HELD_OUT` pairs are in no
  training picture and in no training caption, though each of their words is.
- Does it read the order of words? For "a red circle to the left of a blue square" there is a
  caption with the same words that is false: "a blue square to the left of a red circle". To a
  model that reads a caption as a bag of words the two are one, and plain contrastive training
  makes such models (Yuksekgonul et al. 2022, arXiv 2210.01936). The remedy of the same paper is to
  show it the false caption too: every `Pair` brings one.
- Does an attention map look where the object is? The masks say where it is.

In the order of this file: what a scene is, how it is drawn, what may be said of it, the data set,
and the score. Everything is a pure function of numbers: scene 7 of seed 0 is always the same scene.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, combinations, pairwise, permutations, product
from random import Random
from statistics import fmean as mean
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from miniclip.model import CLIP
from miniclip.tokenizer import Tokenizer
from miniclip.training.data import Pair, caption_label, shuffled
from miniclip.transform import ImageTransform

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
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
RADII = {"small": 6, "plain": 9, "large": 13}  # of a circle around it, in pixels
TILTS = (-12, 0, 12)  # degrees
GRID = 4  # pixels; centres are at multiples of it, so that there are fewer pictures to learn from
BACKGROUNDS = ("plain", "gradient", "stripes", "noise")

HELD_OUT = frozenset(
    (colour, SHAPES[(3 * i + 1) % 8]) for i, colour in enumerate(COLOURS)
)  # one pair of each colour and of each shape: 8 of the 64
SEEN = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT)

CLEAR = 8
"""Pixels. A relation is spoken of where the centres are so far apart along it, and one pixel is
enough to make it true. Two objects are always so far apart along one axis at least."""


# -- what a scene is ------------------------------------------------------------------------------


class Object(NamedTuple):
    """A shape in a colour, of a size, turned, and where it stands."""

    colour: str
    shape: str
    size: str  # a key of RADII
    tilt: int  # degrees
    x: int  # centre: the corner that four pixels share, counted from the left and the top
    y: int


class Background(NamedTuple):
    """Two colours and how they are mixed."""

    kind: str
    first: tuple[int, ...]  # red, green, blue
    second: tuple[int, ...]
    angle: float  # of a gradient and of stripes, in radians
    grain: bytes  # of noise: 8 x 8 values


class Scene(NamedTuple):
    """What is in a picture: one object or several, none touching another."""

    objects: tuple[Object, ...]
    background: Background


def scene(index: int, *, seed: int = 0, held_out: bool = False, count: int | None = None) -> Scene:
    """The scene of this index, with `count` objects, or else one to three.

    No two objects of a scene have the same colour and shape. Their pairs are all of `SEEN`, or
    with `held_out` all of `HELD_OUT`.

    >>> scene(0, count=1) == scene(0, count=1)
    True
    """
    # Python promises that a string seeds the same numbers on every machine and in every version.
    random = Random(f"{seed} {index} {held_out} {count}")
    pairs = sorted(HELD_OUT) if held_out else SEEN
    chosen = random.sample(pairs, count or random.choice((1, 2, 2, 2, 3)))
    places = None
    while places is None:
        sizes = [random.choice(tuple(RADII)) for _ in chosen]
        places = place([RADII[size] for size in sizes], random)
    objects = tuple(
        Object(colour, shape, size, random.choice(TILTS), x, y)
        for (colour, shape), size, (x, y) in zip(chosen, sizes, places, strict=True)
    )
    return Scene(objects, background(random))


def place(radii: list[int], random: Random) -> list[tuple[int, int]] | None:
    """Centres (x, y) for circles that neither touch nor leave the picture; None if luck fails."""
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
    """Dark greys with a tint: no colour is in doubt, and every object is brighter than what is
    behind it, so that the outline of a circle can be seen by one rule, whatever its colour."""
    first, second = (
        tuple(grey + random.randint(-12, 12) for _ in "rgb")
        for grey in (random.randint(24, 76), random.randint(24, 76))
    )
    kind = random.choice(BACKGROUNDS)
    return Background(kind, first, second, random.uniform(0, math.tau), random.randbytes(64))


# -- how it is drawn ------------------------------------------------------------------------------


def draw(scene: Scene) -> tuple[Image.Image, np.ndarray]:
    """The picture, 64 x 64, and for each of the N objects its pixels, bool (N, 64, 64).

    A pixel is an object's where the object covers at least half of it; where it covers all of it,
    the pixel has exactly the object's colour.
    """
    pixels = paint(scene.background)  # (64, 64, 3) float32
    masks = np.zeros((len(scene.objects), IMAGE_SIZE, IMAGE_SIZE), bool)
    for object, mask in zip(scene.objects, masks, strict=True):
        radius = RADII[object.size]
        cover = sprite(object.shape, radius, object.tilt)  # (2 r, 2 r), 0 to 1
        rows = slice(object.y - radius, object.y + radius)
        columns = slice(object.x - radius, object.x + radius)
        patch = pixels[rows, columns]  # a view: this paints into the picture
        patch += cover[:, :, None] * (np.array(COLOURS[object.colour], np.float32) - patch)
        mask[rows, columns] = cover >= 0.5
    return Image.fromarray(np.rint(pixels).astype(np.uint8)), masks


Y, X = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.float32) / IMAGE_SIZE - 0.5


def paint(background: Background) -> np.ndarray:
    """(64, 64, 3) float32, from 0 to 255."""
    along = X * np.float32(math.cos(background.angle)) + Y * np.float32(math.sin(background.angle))
    if background.kind == "gradient":
        share = along + 0.5
    elif background.kind == "stripes":
        share = np.sin(along * 40) * 1.5 + 0.5  # eight or so, with soft edges
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
    """The share of each pixel that the shape covers, (2 radius, 2 radius) float32 from 0 to 1."""
    fine = 16  # drawn so many times larger, then averaged
    canvas = Image.new("L", (2 * radius * fine, 2 * radius * fine))
    turn = np.exp(1j * math.radians(tilt))
    for polygon, ink in zip(outline(shape), (255, 0)):
        points = (polygon * turn + (1 + 1j)) * (radius * fine) - (0.5 + 0.5j)  # pixel centres
        ImageDraw.Draw(canvas).polygon([(p.real, p.imag) for p in points], fill=ink)
    return np.asarray(canvas.reduce(fine), np.float32) / 255


def outline(shape: str) -> tuple[np.ndarray, ...]:
    """A polygon in the unit circle, and for a ring and a moon a second one that is cut out of it.

    A corner is a complex number, x + iy with y downwards: to turn a shape is to multiply.
    """
    round = np.exp(1j * np.linspace(0, math.tau, 96, endpoint=False))
    up = -1j
    if shape == "circle":
        return (0.9 * round,)
    if shape == "square":
        return (np.array([1 + 1j, 1 - 1j, -1 - 1j, -1 + 1j]) * 0.5**0.5,)
    if shape == "triangle":
        return (up * np.exp(1j * math.tau / 3 * np.arange(3)),)
    if shape == "star":
        return (up * np.exp(1j * math.tau / 10 * np.arange(10)) * np.tile([1, 0.42], 5),)
    if shape == "cross":
        long, thin = 0.94, 0.32
        arm = np.array([long - thin * 1j, long + thin * 1j, thin + thin * 1j])
        return (np.concatenate([arm * 1j**quarter for quarter in range(4)]),)
    if shape == "ring":
        return 0.95 * round, 0.5 * round
    if shape == "heart":
        t = np.linspace(0, math.tau, 96, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)
        return ((x + 1j * (y - 1.5)) / 18.5,)
    if shape == "moon":
        return 0.95 * round, 0.8 * round + (0.48 - 0.1j)
    raise ValueError(f"shape is {shape!r}; expected one of {SHAPES}")


# -- what may be said of it -----------------------------------------------------------------------

RELATIONS = {  # of two objects: the axis, and the sign of the second's place minus the first's
    "to the left of": ("x", 1),
    "to the right of": ("x", -1),
    "above": ("y", 1),
    "below": ("y", -1),
}
PLACES = {  # of one object: the same, the middle of the picture standing for the second
    "on the left": ("x", 1),
    "on the right": ("x", -1),
    "at the top": ("y", 1),
    "at the bottom": ("y", -1),
}
OPPOSITE = dict(zip(PLACES, ("on the right", "on the left", "at the bottom", "at the top")))


class Phrase(NamedTuple):
    """Words for one object. What is "" is left unsaid."""

    size: str
    colour: str
    shape: str


class Claim(NamedTuple):
    """What a caption says: there are these different objects, and the first stands so to the other.

    `relation` is a key of RELATIONS between two phrases, a key of PLACES after one, or "" with any
    number of them.
    """

    relation: str
    phrases: tuple[Phrase, ...]


def say(claim: Claim) -> str:
    """The claim in English.

    >>> red, blue = Phrase("", "red", "circle"), Phrase("small", "blue", "square")
    >>> say(Claim("to the left of", (red, blue)))
    'a red circle to the left of a small blue square'
    >>> say(Claim("", (Phrase("", "", "star"), red, Phrase("", "orange", ""))))
    'a star, a red circle and something orange'
    >>> say(Claim("at the top", (red,)))
    'a red circle at the top'
    """
    *most, last = map(say_phrase, claim.phrases)
    if not most:
        return f"{last} {claim.relation}".rstrip()
    return f"{', '.join(most)} {claim.relation or 'and'} {last}"


def say_phrase(phrase: Phrase) -> str:
    """The words for one object: "a large green star", "something red"."""
    words = " ".join(word for word in phrase if word)
    if not phrase.shape:
        return f"something {words}"
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def holds(claim: Claim, scene: Scene) -> bool:
    """Whether the claim is true: some choice of different objects fits its phrases and relation."""
    return any(
        all(map(fits, claim.phrases, chosen))
        and (not claim.relation or apart(claim.relation, *chosen) > 0)
        for chosen in permutations(scene.objects, len(claim.phrases))
    )


def fits(phrase: Phrase, object: Object) -> bool:
    """Whether all that the phrase says of an object is true of it."""
    return all(
        said in ("", true)
        for said, true in zip(phrase, (object.size, object.colour, object.shape), strict=True)
    )


def apart(relation: str, first: Object, second: Object | None = None) -> int:
    """How clearly the relation holds: pixels between the centres; negative where it is reversed."""
    axis, sign = (RELATIONS | PLACES)[relation]
    there = getattr(second, axis) if second else IMAGE_SIZE // 2
    return sign * (there - getattr(first, axis))


def singles(scene: Scene) -> list[Claim]:
    """Of one object: "a green star", "a large green star"."""
    return [Claim("", (phrase,)) for object in scene.objects for phrase in named(object)]


def located(scene: Scene) -> list[Claim]:
    """Of one object's place: "a green star at the top"."""
    return [
        Claim(place, (phrase,))
        for object in scene.objects
        for place in PLACES
        if apart(place, object) >= CLEAR
        for phrase in named(object)
    ]


def relations(scene: Scene) -> list[Claim]:
    """Of two objects' places: "a red circle to the left of a small blue square"."""
    return [
        Claim(relation, pair)
        for a, b, relation in clear_relations(scene)
        for pair in product(named(a), named(b))
    ]


def lists(scene: Scene) -> list[Claim]:
    """Of all objects: "a red circle, a blue square and a green star", in any order."""
    return [
        Claim("", tuple(Phrase("", object.colour, object.shape) for object in order))
        for order in permutations(scene.objects)
    ]


def vague(scene: Scene) -> list[Claim]:
    """Of a colour or a shape alone: "something red", "a star above a heart"."""
    alone = [Claim("", (part(object),)) for object in scene.objects for part in (coloured, shaped)]
    return alone + [
        Claim(relation, (part(a), part(b)))
        for a, b, relation in clear_relations(scene)
        for part in (coloured, shaped)
        if part(a) != part(b)
    ]


Kind = Callable[[Scene], list[Claim]]


def kinds(scene: Scene) -> tuple[Kind, ...]:
    """What may be said of a scene, each true, in words that name colour and shape.

    Relations come twice, because they are the hardest to learn.
    """
    several = (relations, relations, lists) if len(scene.objects) > 1 else ()
    return (singles, *((located,) if located(scene) else ()), *several)


def clear_relations(scene: Scene) -> list[tuple[Object, Object, str]]:
    """Every (a, b, relation) of two objects that is as clear as CLEAR asks."""
    return [
        (a, b, relation)
        for a, b in permutations(scene.objects, 2)
        for relation in RELATIONS
        if apart(relation, a, b) >= CLEAR
    ]


def named(object: Object) -> list[Phrase]:
    """By colour and shape, and with the size where there is a word: "plain" is left unsaid."""
    sizes = ("",) if object.size == "plain" else ("", object.size)
    return [Phrase(size, object.colour, object.shape) for size in sizes]


def coloured(object: Object) -> Phrase:
    """By colour alone."""
    return Phrase("", object.colour, "")


def shaped(object: Object) -> Phrase:
    """By shape alone."""
    return Phrase("", "", object.shape)


def negatives(claim: Claim, scene: Scene) -> dict[str, list[Claim]]:
    """Claims that are false of the scene and differ from a true one in one thing, by that thing.

    Two objects change "places", or their "colours": a false caption of the same words as the true
    one. One object's place becomes the opposite. Where there is nothing to swap or to move, one
    word becomes another: a "size", a "colour", a "shape".
    None names a held-out pair, unless `claim` does.
    """
    changed = swaps(claim) if len(claim.phrases) > 1 else moved(claim)
    known = {(p.colour, p.shape) for p in claim.phrases}

    def fair(claim: Claim) -> bool:
        unknown = {(p.colour, p.shape) for p in claim.phrases} & HELD_OUT - known
        return not unknown and not holds(claim, scene)

    false = {what: list(filter(fair, made)) for what, made in changed.items()}
    if not any(false.values()):
        false = {what: list(filter(fair, made)) for what, made in replacements(claim).items()}
    return {what: made for what, made in false.items() if made}


def swaps(claim: Claim) -> dict[str, list[Claim]]:
    """Every two phrases change places, or their colours alone."""
    made: dict[str, list[Claim]] = {"places": [], "colours": []}
    for i, j in combinations(range(len(claim.phrases)), 2):
        a, b = claim.phrases[i], claim.phrases[j]
        recoloured = a._replace(colour=b.colour), b._replace(colour=a.colour)
        for what, (first, second) in (("places", (b, a)), ("colours", recoloured)):
            swapped = list(claim.phrases)
            swapped[i], swapped[j] = first, second
            made[what].append(claim._replace(phrases=tuple(swapped)))
    return made


def moved(claim: Claim) -> dict[str, list[Claim]]:
    """To the other side of the picture."""
    opposite = OPPOSITE.get(claim.relation)
    return {"places": [claim._replace(relation=opposite)]} if opposite else {}


WORDS = {"size": ("small", "large"), "colour": tuple(COLOURS), "shape": SHAPES}


def replacements(claim: Claim) -> dict[str, list[Claim]]:
    """Every word that is said becomes every other word of its sort."""
    made: dict[str, list[Claim]] = {what: [] for what in WORDS}
    for i, phrase in enumerate(claim.phrases):
        for what, words in WORDS.items():
            for word in words if getattr(phrase, what) else ():
                changed = list(claim.phrases)
                changed[i] = phrase._replace(**{what: word})
                made[what].append(claim._replace(phrases=tuple(changed)))
    return made


class Caption(NamedTuple):
    """A true caption and the false ones that it is told from."""

    text: str  # true
    negatives: list[str]  # false, each in one thing


def captions(scene: Scene) -> list[Caption]:
    """Everything that may be said of a scene, each with the captions that it is told from."""
    true = dict.fromkeys(
        claim for kind in (*kinds(scene), vague) for claim in kind(scene)
    )  # each once
    return [
        Caption(say(claim), [say(false) for false in chain(*negatives(claim, scene).values())])
        for claim in true
    ]


def say_something(scene: Scene, random: Random, lesson: int = 3) -> tuple[str, str]:
    """A caption of the scene and a false one.

    In the first lessons, 0 and 1, objects are named with their places, in the next with what they
    stand beside as well. After these anything is said. One caption in five is then vague, so that
    each word is learnt by itself. The others name what they speak of, because that teaches more:
    "something red" is true of every third picture of a batch.
    """
    places: Kind = located if located(scene) else singles
    if lesson < 2:
        kind = places
    elif lesson == 2:
        kind = random.choice((places, relations, relations))
    else:
        kind = vague if random.random() < 0.2 else random.choice(kinds(scene))
    claim = random.choice(kind(scene))
    false = random.choice(random.choice(list(negatives(claim, scene).values())))
    return say(claim), say(false)


# -- the data set ---------------------------------------------------------------------------------


class Shapes:
    """`count` scenes, each drawn when it is asked for, in about half a millisecond.

    `data[index, draw]` is the scene's picture with a caption and a false caption that the number
    `draw` chooses. Three lessons come first, each a sixth of all: scenes of one object and where it
    is, of two and where each is, of two and how they stand to each other (`say_something`). With
    everything from the start a model learns colours and then, for very long, nothing else. Pictures
    are never to be mirrored: "to the left of" would become false.
    """

    OBJECTS = (1, 2, 2)  # in the scenes of each lesson

    def __init__(self, count: int = 225_000, seed: int = 0) -> None:
        if seed == SCORE_SEED:
            raise ValueError(f"seed {seed} draws the scenes that `score` asks about")
        self.count, self.seed = count, seed
        self.lesson_length = count // 6
        self.skipped: list[str] = []  # no picture is ever unreadable

    def __len__(self) -> int:
        return self.count

    def items(self, seed: int) -> Iterator[int]:
        """All scenes, lesson after lesson, each in an order that the seed decides."""
        starts = [lesson * self.lesson_length for lesson in range(4)]
        for first, end in pairwise((*starts, self.count)):
            yield from (first + i for i in shuffled(end - first, seed))

    def lesson(self, index: int) -> int:
        """0 to 2, and 3 for all the rest."""
        return min(index // self.lesson_length, 3) if self.lesson_length else 3

    def scene(self, index: int) -> Scene:
        """The scene of this index, of as many objects as its lesson allows."""
        lesson = self.lesson(index)
        return scene(index, seed=self.seed, count=self.OBJECTS[lesson] if lesson < 3 else None)

    def __getitem__(self, index_and_draw: tuple[int, int]) -> Pair:
        index, choice = index_and_draw
        scene = self.scene(index)
        picture, _ = draw(scene)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        caption, negative = say_something(scene, Random(choice), self.lesson(index))
        return Pair(pixels, caption, caption_label(caption), negative)

    def captions(self) -> Iterator[str]:
        """A caption of some thousands of scenes: every word, for a tokenizer to learn from."""
        for index in range(0, self.count, max(1, self.count // 5000)):
            yield say_something(self.scene(index), Random(index))[0]


# -- the score ------------------------------------------------------------------------------------

SCORE_SEED = 2021


class Scores(NamedTuple):
    """Shares of right answers, 0 to 1, on scenes that no training set has."""

    seen: float  # one object: which of all 64 colours and shapes? Chance is 1/64
    unseen: float  # the same, the object's pair being one of the 8 that training never shows
    relations: float  # two objects: is the caption nearer than with their places swapped? 1/2
    left_right: float  # the part of them that says "to the left of" or "to the right of"
    above_below: float  # and that which says "above" or "below"
    binding: float  # two objects: is the caption nearer than with their colours swapped? 1/2


@torch.inference_mode()
def score(
    model: CLIP, tokenizer: Tokenizer, transform: ImageTransform, scenes: int = 1000
) -> Scores:
    """Ask the three questions about so many scenes each."""
    model.eval()

    def embed_texts(texts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(texts).to(model.logit_scale.device), normalize=True)

    def embed_scenes(scenes: list[Scene]) -> Tensor:
        batches = (scenes[i : i + 250] for i in range(0, len(scenes), 250))
        pixels = (transform([draw(scene)[0] for scene in batch]) for batch in batches)
        device = model.logit_scale.device
        return torch.cat([model.encode_image(x.to(device), normalize=True) for x in pixels])

    pairs = list(product(COLOURS, SHAPES))
    labels = embed_texts([say_phrase(Phrase("", *pair)) for pair in pairs])  # (64, E)

    def naming(held_out: bool) -> float:
        asked = [scene(i, seed=SCORE_SEED, held_out=held_out, count=1) for i in range(scenes)]
        best = (embed_scenes(asked) @ labels.T).argmax(dim=1).tolist()
        return mean(pairs[k] == s.objects[0][:2] for k, s in zip(best, asked, strict=True))

    asked = [scene(i, seed=SCORE_SEED, count=2) for i in range(scenes)]
    chosen = [Random(i).choice(relations(s)) for i, s in enumerate(asked)]
    images = embed_scenes(asked)  # (scenes, E)
    similarity = (images * embed_texts([say(claim) for claim in chosen])).sum(dim=1)
    false = [negatives(claim, s) for claim, s in zip(chosen, asked, strict=True)]

    def preferring(what: str, axes: str = "xy") -> float:
        """How often the true caption is nearer, among those that have a false one of this sort."""
        rows = [
            i
            for i, claim in enumerate(chosen)
            if what in false[i] and RELATIONS[claim.relation][0] in axes
        ]
        texts = embed_texts([say(false[i][what][0]) for i in rows])
        return mean((similarity[rows] > (images[rows] * texts).sum(dim=1)).tolist())

    return Scores(
        seen=naming(held_out=False),
        unseen=naming(held_out=True),
        relations=preferring("places"),
        left_right=preferring("places", "x"),
        above_below=preferring("places", "y"),
        binding=preferring("colours"),
    )
