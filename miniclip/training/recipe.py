"""The numbers of a training run: each field, its default, its meaning and its limits.

This file imports no torch, so that `miniclip --help` is fast.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from miniclip.errors import CheckpointError
from miniclip.files.reading import read_json


def described(default: Any, meaning: str) -> Any:
    """Define a field with the meaning that `miniclip train --help` shows."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run. Raises ValueError for a number outside its limits."""

    epochs: int = described(30, "passes over the data")
    batch: int = described(256, "pairs in a step, over all processes")
    lr: float = described(1e-3, "AdamW's learning rate at its peak")
    muon_lr: float = described(0.0, "above 0, Muon trains the matrices of the blocks, at this peak")
    weight_decay: float = described(0.1, "weight decay of the matrices")
    layer_decay: float = described(1.0, "a layer's rate, as a share of the rate of the layer above")
    warmup: float = described(0.05, "share of the steps in which the learning rate rises")
    clip_gradient: float = described(1.0, "largest norm of the gradient")
    patch_dropout: float = described(0.0, "share of an image's patches left out (FLIP)")
    # The last epochs train the model as it will be used.
    full_epochs: int = described(1, "epochs at the end without patch dropout")
    ema: float = described(0.0, "above 0, write the weights' moving average, with this decay")
    loss: str = described("clip", "clip, or siglip, whose bias stays in the training state")
    freeze: str = described("", "parts to freeze: vision (LiT), text, or globs, with commas")
    lora: int = described(0, "above 0, train only changes of this rank, and write merged weights")
    val_every: int = described(0, "steps between two measurements of --val; 0: once an epoch")
    # A mirror makes captions with "left" and "right" false.
    augment: bool = described(False, "mirror, zoom into and move the pictures")
    hard_negatives: bool = described(False, "learn from false captions, if there are any (NegCLIP)")
    # Other losses accumulate gradients. This loss needs the whole batch.
    chunk: int = described(0, "pairs in memory at once, in two passes (GradCache); 0: all")
    checkpoint_blocks: bool = described(False, "compute blocks twice to save memory")
    precision: str = described("float32", "float32, or bfloat16 by autocast")
    compile: bool = described(False, "compile the towers")
    fsdp: bool = described(False, "under torchrun, shard the weights over the processes")
    seed: int = described(0, "decides everything that is random")

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self) if type(each.default) in (int, float)):
            least = {"epochs": 1, "batch": 2}.get(name, 0)  # a batch of one has nothing to compare
            most = 1 if name == "warmup" else 2**63 - 1
            if not least <= getattr(self, name) <= most:  # false for NaN and infinity too
                found = f"{name} is {getattr(self, name)}"
                raise ValueError(f"{found}; expected at least {least}, at most {most}")
        for name, fits, expected in (
            ("clip_gradient", self.clip_gradient > 0, "more than 0"),
            ("patch_dropout", self.patch_dropout < 1, "0 or more, below 1"),
            ("ema", self.ema < 1, "0 or more, below 1"),
            ("layer_decay", 0 < self.layer_decay <= 1, "above 0, at most 1"),
            ("precision", self.precision in ("float32", "bfloat16"), "float32 or bfloat16"),
            ("loss", self.loss in ("clip", "siglip"), "clip or siglip"),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")


def read_recipe(path: Path) -> Recipe:
    """Read the recipe.json of a run. Raises ValueError."""
    values = read_json(path)
    kinds = {each.name: type(each.default) for each in fields(Recipe)}
    for name, value in values.items():
        if name not in kinds:
            raise CheckpointError(f"{path}: unknown entry {name!r}")
        if type(value) not in (kinds[name], *(int,) * (kinds[name] is float)):
            expected = kinds[name].__name__
            raise CheckpointError(f"{path}: {name} is {value!r}, not of type {expected}")
    return Recipe(**values)
