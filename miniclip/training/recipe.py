"""The settings of a training run: each field, its default, its meaning and its limits.

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
    """The settings of a run. Raises ValueError if a setting is outside its limits."""

    epochs: int = described(30, "passes over the data")
    batch: int = described(256, "pairs in a batch, over all processes")
    lr: float = described(1e-3, "peak learning rate of AdamW")
    muon_lr: float = described(0.0, "peak rate of Muon for the blocks' matrices; 0 means AdamW")
    weight_decay: float = described(0.1, "weight decay of the matrices")
    layer_decay: float = described(1.0, "a layer's rate, divided by the rate of the layer above")
    warmup: float = described(0.05, "share of the steps during which the learning rate rises")
    clip_gradient: float = described(1.0, "largest gradient norm; a larger gradient is scaled down")
    patch_dropout: float = described(0.0, "share of an image's patches that is dropped (FLIP)")
    # In use, a model sees all patches, so the last epochs train it on all patches.
    full_epochs: int = described(1, "epochs without patch dropout at the end of the run")
    ema: float = described(0.0, "if above 0, write a moving average of the weights with this decay")
    loss: str = described("clip", "clip or siglip; the checkpoint leaves out siglip's bias")
    freeze: str = described("", "parts to freeze, separated by commas: vision (LiT), text or globs")
    lora: int = described(0, "if above 0, train only LoRA of this rank, and write merged weights")
    val_every: int = described(0, "steps between scores on --val; 0 means a score after each epoch")
    # In a mirrored image, "left" and "right" in the caption are wrong.
    augment: bool = described(False, "mirror, zoom into and shift the images at random")
    hard_negatives: bool = described(False, "also learn from the data's false captions (NegCLIP)")
    # Gradient accumulation would not work, because the loss compares all pairs of a batch.
    chunk: int = described(0, "pairs in memory at once, each embedded twice (GradCache); 0: all")
    checkpoint_blocks: bool = described(False, "to save memory, compute each block twice")
    precision: str = described("float32", "float32, or bfloat16 with autocast")
    compile: bool = described(False, "compile the towers with torch.compile")
    fsdp: bool = described(False, "under torchrun, shard the weights over the processes")
    seed: int = described(0, "seed of all random choices")

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self) if type(each.default) in (int, float)):
            least = {"epochs": 1, "batch": 2}.get(name, 0)  # the loss compares at least two pairs
            most = 1 if name == "warmup" else 2**63 - 1
            if not least <= getattr(self, name) <= most:  # refuses NaN and infinity too
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
    """Read the recipe.json of a run. Raises ValueError for an unknown or wrong entry."""
    values = read_json(path)
    kinds = {each.name: type(each.default) for each in fields(Recipe)}
    for name, value in values.items():
        if name not in kinds:
            raise CheckpointError(f"{path}: unknown entry {name!r}")
        if type(value) not in (kinds[name], *(int,) * (kinds[name] is float)):
            expected = kinds[name].__name__
            raise CheckpointError(f"{path}: {name} is {value!r}, not of type {expected}")
    return Recipe(**values)
