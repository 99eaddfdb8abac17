"""Measure how often a heat map is right, on drawn scenes with known masks."""

import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from miniclip.checkpoint import Loaded
from miniclip.lens.heat import METHODS
from miniclip.model import CLIP
from miniclip.terminal import progress
from miniclip.world.captions import Phrase, say_phrase
from miniclip.world.scenes import draw, scene
from miniclip.world.scoring import SCORE_SEED


class Localisation(NamedTuple):
    """A method's scores (0 to 1) on scenes of two objects. Each text names one of the objects."""

    method: str
    pointing: float  # how often the warmest pixel is on the named object (arXiv 1608.00507)
    distracted: float  # how often the warmest pixel is on the other object
    iou: float  # mean overlap (IoU) of the object's N pixels and the N warmest pixels


class Question(NamedTuple):
    """A question about the position of one object, which `phrase` names."""

    picture: Image.Image
    phrase: str
    named: Tensor  # (S, S) bool, the pixels of the object that `phrase` names
    other: Tensor  # (S, S) bool, the pixels of the other object


def questions(scenes: int) -> list[Question]:
    """Return two questions for each scene, one per object. Training never shows these scenes."""
    asked = []
    for drawn in (scene(i, seed=SCORE_SEED, count=2) for i in range(scenes)):
        picture, masks = draw(drawn)
        first, second = torch.from_numpy(masks)
        for object, named, other in zip(drawn.objects, (first, second), (second, first)):
            phrase = say_phrase(Phrase("", object.colour, object.shape))
            asked.append(Question(picture, phrase, named, other))
    return asked


def answers(loaded: Loaded, asked: list[Question], method: str, batch: int = 50) -> Tensor:
    """Return a heat map for each question, (N, rows, columns)."""
    model, tokenizer, transform = loaded
    device = model.logit_scale.device
    maps = []
    for i in range(0, len(asked), batch):
        pixels = transform([question.picture for question in asked[i : i + batch]])
        ids = tokenizer([question.phrase for question in asked[i : i + batch]])
        maps.append(METHODS[method](model, pixels.to(device), ids.to(device)).cpu())
    return torch.cat(maps)


RANDOM = 5
"""The number of models with random weights. A single model could be right by chance."""


def localise(loaded: Loaded, scenes: int = 200) -> dict[str, list[Localisation]]:
    """Score every method on questions about drawn scenes of two objects.

    Args:
        loaded: model, tokenizer and transform.
        scenes: the number of scenes; each gives two questions.

    Returns:
        "trained": the scores of the model. "random": the mean scores of several models with the
        same shape and random weights. "spread": the standard deviations of these models' scores.
        "limits": the scores of a random map, and of the true mask averaged over each patch. A map
        with one value for each patch cannot score much better than this mask.
    """
    asked = questions(scenes)
    named, other = (torch.stack(masks) for masks in list(zip(*asked))[2:])  # (N, S, S)
    model = loaded.model.eval()
    untrained = [loaded._replace(model=untrained_like(model, seed)) for seed in range(RANDOM)]
    found: dict[str, list[Localisation]] = {"trained": [], "random": [], "spread": [], "limits": []}
    for method in METHODS:
        models = progress([loaded, *untrained], "model", desc=method)
        maps = [answers(one, asked, method) for one in models]
        trained, *others = (localisation(method, heat, named, other) for heat in maps)
        found["trained"].append(trained)
        shares = list(zip(*others))[1:]
        found["random"].append(Localisation(method, *map(statistics.mean, shares)))
        found["spread"].append(Localisation(method, *map(statistics.stdev, shares)))
    grid = (len(asked), *model.config.vision.grid)
    chance = torch.rand(grid, generator=torch.Generator().manual_seed(0))
    ceiling = F.interpolate(named[:, None].float(), grid[1:], mode="area")[:, 0]
    for name, heat in (("a random map", chance), ("the mask itself", ceiling)):
        found["limits"].append(localisation(name, heat, named, other))
    return found


def untrained_like(model: CLIP, seed: int) -> CLIP:
    """Make a model of the same shape, device and dtype with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(model)(model.config).to(model.logit_scale).eval()


def localisation(method: str, heat: Tensor, named: Tensor, other: Tensor) -> Localisation:
    """Score heat maps (N, rows, columns). `named` and `other` are masks of objects, (N, S, S)."""
    size = named.shape[1:]
    heat = F.interpolate(heat[:, None].float(), size, mode="bilinear")[:, 0].flatten(1)
    named, other = named.flatten(1), other.flatten(1)  # (N, S * S)
    warmest = heat.argmax(1, keepdim=True)
    rank = heat.argsort(1, descending=True).argsort(1)  # the warmest pixel has rank 0
    area = named.sum(1, keepdim=True)
    common = ((rank < area) & named).sum(1)
    iou = common / (2 * area[:, 0] - common)
    shares = (named.gather(1, warmest), other.gather(1, warmest), iou)
    return Localisation(method, *(share.float().mean().item() for share in shares))
