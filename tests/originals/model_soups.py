"""Wortsman et al. 2022, uniform and greedy soups: github.com/mlfoundations/model-soups

Their main.py runs on four small models instead of 72. The function `score` replaces the accuracy.
"""

import os
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from originals.common import digests, import_from, main, openai_state, small_clip, without
from torch import Tensor

from miniclip import CLIP
from miniclip.surgery import interpolate

DISTANCES = (0.4, -0.3, 0.25, 0.9)
SCORED = ("visual.proj", "text_projection")


def ingredients() -> list[CLIP]:
    """Four models on the line through two small models in weight space."""
    ends = small_clip(), small_clip(seed=1)
    return [interpolate(*ends, distance) for distance in DISTANCES]


def score(state: dict[str, Tensor]) -> float:
    """Minus the squared distance from `state`'s projections to the first small model's."""
    return -sum((state[name] - base()[name]).square().sum().item() for name in SCORED)


base = cache(openai_state)


class DataSet:
    """A fake dataset class. It only has a name."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: object) -> None:
        pass


def record(checkout: str) -> dict:
    import_from(checkout)
    without("clip", "wget", "matplotlib", "matplotlib.pyplot", "datasets", "utils")
    sys.modules["clip"].load.return_value = (None, None)
    for name in ("2p", "", "V2", "Sketch", "R", "A"):
        setattr(sys.modules["datasets"], f"ImageNet{name}", DataSet(f"ImageNet{name}"))
    sys.modules["datasets"].ObjectNet = DataSet("ObjectNet")
    tried: list[dict[str, Tensor]] = []
    sys.modules["utils"].get_model_from_sd = lambda state, base: (tried.append(state), state)[1]
    sys.modules["utils"].test_model_on_dataset = lambda state, dataset: score(state)
    found, sys.argv = {}, ["main.py"]
    with TemporaryDirectory() as folder:
        for i, model in enumerate(ingredients()):
            torch.save(openai_state(model=model), os.path.join(folder, f"model_{i}.pt"))
        source, here = Path(checkout, "main.py").read_text(), os.getcwd()
        source = source.replace("NUM_MODELS = 72", f"NUM_MODELS = {len(DISTANCES)}")
        os.chdir(folder)
        for step in ("eval-individual-models", "uniform-soup", "greedy-soup"):
            sys.argv[1:] = [f"--{step}", "--model-location", folder]
            exec(source, {"__name__": "__main__"})
            found[step] = digests(tried[-1])
        os.chdir(here)
    return {"uniform": found["uniform-soup"], "greedy": found["greedy-soup"]}


if __name__ == "__main__":
    main(record)
