"""Measure how well a model knows the drawn world."""

from itertools import product
from random import Random
from statistics import fmean as mean
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.model import CLIP
from miniclip.tokenizer import Tokenizer
from miniclip.transform import ImageTransform
from miniclip.world.captions import RELATIONS, Phrase, negatives, relations, say, say_phrase
from miniclip.world.scenes import COLOURS, SHAPES, Scene, draw, scene

SCORE_SEED = 2021


class Scores(NamedTuple):
    """Shares of right answers, 0 to 1, on scenes that are in no training set."""

    seen: float  # one object: which of the 64 pairs of colour and shape? Chance is 1/64
    unseen: float  # like `seen`, but for the 8 pairs that training never shows
    relations: float  # two objects: true caption, or caption with swapped places? Chance is 1/2
    left_right: float  # like `relations`, but only "to the left of" and "to the right of"
    above_below: float  # like `relations`, but only "above" and "below"
    binding: float  # two objects: true caption, or caption with swapped colours? Chance is 1/2


@torch.inference_mode()
def score(
    model: CLIP, tokenizer: Tokenizer, transform: ImageTransform, scenes: int = 1000
) -> Scores:
    """Ask a model the questions of `Scores`. Each question uses at most `scenes` scenes."""
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
        """Return the share of images that are nearer to the true caption than to the false one."""
        on_axis = [RELATIONS[claim.relation][0] in axes for claim in chosen]
        rows = [i for i, is_on in enumerate(on_axis) if is_on and what in false[i]]
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
