"""The numbers of a training run: each field, its default, its meaning and its limits.

This file imports no torch, so that `miniclip --help` can describe the fields without waiting.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from miniclip.errors import CheckpointError
from miniclip.files.reading import read_json


def described(default: Any, meaning: str) -> Any:
    """A field of a dataclass whose meaning `miniclip train --help` shows."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run. Raises ValueError for a number outside its limits."""

    epochs: int = described(30, "passes over the data")
    batch: int = described(256, "pairs in a step, over all processes")
    lr: float = described(1e-3, "AdamW's learning rate at its peak")
    muon_lr: float = described(0.0, "above 0, Muon trains the matrices of the blocks, at this peak")
    weight_decay: float = described(0.1, "of matrices")
    layer_decay: float = described(1.0, "a layer's rate, as a share of the layer's above it")
    warmup: float = described(0.05, "share of the steps in which the learning rate rises")
    clip_gradient: float = described(1.0, "the longest gradient")
    patch_dropout: float = described(0.0, "share of an image's patches left out (FLIP)")
    # At the end the model trains as it will be used.
    full_epochs: int = described(1, "epochs at the end without patch dropout")
    ema: float = described(0.0, "above 0, write the weights' moving average, with this decay")
    loss: str = described("clip", "clip, or siglip, whose bias stays in the training state")
    freeze: str = described("", "parts left as they are: vision (LiT), text, or globs, by commas")
    lora: int = described(0, "above 0, train only changes of this rank, and write merged weights")
    val_every: int = described(0, "steps between two measurements of --val; 0 for one an epoch")
    # A mirror makes captions with "left" and "right" false.
    augment: bool = described(False, "mirror, zoom into and move the pictures")
    hard_negatives: bool = described(
        False, "learn from false captions too, where the data has them (NegCLIP)"
    )
    # For a loss over the whole batch, this is what accumulating gradients is for other losses.
    chunk: int = described(0, "pairs in memory at once, in two passes (GradCache); 0 for all")
    checkpoint_blocks: bool = described(False, "compute blocks twice instead of remembering them")
    precision: str = described("float32", "float32, or bfloat16 by autocast")
    compile: bool = described(False, "compile the towers")
    fsdp: bool = described(False, "under torchrun, shard the weights over the processes")
    seed: int = described(0, "decides all that is random")

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self) if type(each.default) in (int, float)):
            # A batch of one: its caption cannot be told from those of other pictures.
            least = {"epochs": 1, "batch": 2}.get(name, 0)
            most = 1 if name == "warmup" else 2**63 - 1
            if not least <= getattr(self, name) <= most:  # nor is nan, or infinity
                found = f"{name} is {getattr(self, name)}"
                raise ValueError(f"{found}; expected at least {least}, at most {most}")
        if not self.clip_gradient > 0:
            raise ValueError(f"clip_gradient is {self.clip_gradient}; expected more than 0")
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout is {self.patch_dropout}; expected 0 or more, below 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; expected 0 or more, below 1")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; expected above 0, at most 1")
        for name, *known in (("precision", "float32", "bfloat16"), ("loss", "clip", "siglip")):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {value!r}; expected {' or '.join(known)}")


def read_recipe(path: Path) -> Recipe:
    """A recipe.json, as every run writes one. Raises ValueError."""
    values = read_json(path)
    kinds = {each.name: type(each.default) for each in fields(Recipe)}
    for name, value in values.items():
        if name not in kinds:
            raise CheckpointError(f"{path}: unknown entry {name!r}")
        if type(value) not in (kinds[name], *(int,) * (kinds[name] is float)):
            raise CheckpointError(
                f"{path}: {name} is {value!r}, not of type {kinds[name].__name__}"
            )
    return Recipe(**values)
