"""`miniclip demo`: what the two embedded checkpoints can do, offline, in seconds.

A scene is drawn and described by the checkpoint `shapes`; photographs that come with scikit-image
are classified by the checkpoint `cifar10`.
"""

from random import Random
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from miniclip.checkpoint import load
from miniclip.lens.heat import occlusion
from miniclip.world.captions import Claim, Phrase, holds, replacements, say, say_phrase
from miniclip.world.scenes import Scene, draw, scene
from miniclip.zeroshot.classifier import Score, ZeroShotClassifier

LABELS = ["airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PHOTOGRAPHS = ("chelsea", "rocket", "horse", "coffee")
SEED = 7  # of a world of scenes that no checkpoint was trained on


class Exhibit(NamedTuple):
    """A picture and what it was taken for."""

    name: str
    picture: Image.Image
    scores: list[Score]


class Heat(NamedTuple):
    """Where a phrase is seen in a picture, and where what it names is."""

    phrase: str
    lost: Tensor  # (S / patch, S / patch), of the cosine, when this patch is covered
    mask: Tensor  # (S, S) bool


def scene_exhibit(index: int = 0) -> tuple[Exhibit, list[Heat]]:
    """A scene of two objects, described by a true caption and by false ones, wrong in one word."""
    drawn = scene(index, seed=SEED, count=2)
    picture, masks = draw(drawn)
    phrases = [Phrase("", object.colour, object.shape) for object in drawn.objects]
    true = Claim("", tuple(phrases))
    random = Random(index)
    false = [random.choice(made) for made in negatives_by_word(true, drawn) for _ in range(2)]
    loaded = load("shapes")
    captions = [say(claim) for claim in (true, *false)]
    pixels = loaded.transform(picture)
    (scores,) = ZeroShotClassifier(*loaded[:2], captions, ["{}"]).rank(pixels[None])
    words = [say_phrase(phrase) for phrase in phrases]
    lost = occlusion(loaded.model, pixels.repeat(len(words), 1, 1, 1), loaded.tokenizer(words))
    heats = [Heat(*row) for row in zip(words, lost, torch.from_numpy(masks), strict=True)]
    return Exhibit("a drawn scene", picture, scores), heats


def negatives_by_word(claim: Claim, scene: Scene) -> list[list[Claim]]:
    """What the claim becomes with another colour, and with another shape, where that is false."""
    made = replacements(claim)
    return [[c for c in made[word] if not holds(c, scene)] for word in ("colour", "shape")]


def photographs() -> list[Image.Image]:
    """Those that lie inside scikit-image's package. Raises ValueError where it is missing."""
    try:
        import skimage.data
    except ImportError:
        raise ValueError("photographs come with: pip install 'miniclip[demo]'") from None
    return [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in PHOTOGRAPHS]


def photograph_exhibits() -> list[Exhibit]:
    """The photographs, classified.

    A cat is one of the ten things that the checkpoint `cifar10` knows, though not so close. Of a
    rocket, the silhouette of a horse, and a cup of coffee it has never seen the like, and it shows.
    """
    pictures = photographs()
    model, tokenizer, transform = load("cifar10")
    rankings = ZeroShotClassifier(model, tokenizer, LABELS).rank(transform(pictures))
    return [Exhibit(*row) for row in zip(PHOTOGRAPHS, pictures, rankings, strict=True)]
