"""Make the examples that `miniclip demo` shows. They use the two embedded checkpoints.

The checkpoint `everyday` classifies photographs that come with scikit-image and matplotlib. The
checkpoint `shapes` describes a drawn scene.
"""

from importlib.util import find_spec
from pathlib import Path
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

LABELS = "cup of coffee,rocket,person in uniform,vehicle,dog,pizza,lighthouse,bridge".split(",")
UNKNOWN = "coins"  # the training data has no image of coins
SEED = 7  # no checkpoint was trained on these scenes


class Exhibit(NamedTuple):
    """An image and the scores of its labels."""

    name: str
    picture: Image.Image
    scores: list[Score]


class Heat(NamedTuple):
    """The heat map of a phrase in an image, and the mask of the named object."""

    phrase: str
    lost: Tensor  # (rows, columns), the decrease of the cosine when a patch is covered
    mask: Tensor  # (S, S) bool, the pixels of the object


def scene_exhibit(index: int = 0) -> tuple[Exhibit, list[Heat]]:
    """A scene of two objects, with one true and four false captions, and a heat map per object."""
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
    """Make false claims from `claim`: a list with wrong colours, and a list with wrong shapes."""
    made = replacements(claim)
    return [[c for c in made[word] if not holds(c, scene)] for word in ("colour", "shape")]


def photographs() -> dict[str, Image.Image]:
    """Photographs by name. The last photograph shows coins, which `everyday` was not trained on.

    Raises ValueError if scikit-image or matplotlib is missing.
    """
    matplotlib = find_spec("matplotlib")  # `import matplotlib` would make a settings folder
    place = Path(matplotlib.origin or "") if matplotlib else Path()
    grace_hopper = place.parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"
    try:
        from skimage import data

        portrait = Image.open(grace_hopper)
    except (ImportError, FileNotFoundError):
        raise ValueError("the photographs need an extra: pip install 'miniclip[demo]'") from None
    with portrait:
        found = {
            "coffee": Image.fromarray(data.coffee()),
            "rocket": Image.fromarray(data.rocket()),
            "grace_hopper": portrait.convert("RGB"),
            "motorcycle": Image.fromarray(data.stereo_motorcycle()[0]),
        }
    return found | {UNKNOWN: Image.fromarray(data.coins()).convert("RGB")}


def photograph_exhibits() -> list[Exhibit]:
    """Each photograph with its scores for LABELS, the best score first."""
    pictures = photographs()
    model, tokenizer, transform = load("everyday")
    pixels = transform(list(pictures.values()))
    rankings = ZeroShotClassifier(model, tokenizer, LABELS).rank(pixels)
    return [Exhibit(*row) for row in zip(pictures, pictures.values(), rankings, strict=True)]
