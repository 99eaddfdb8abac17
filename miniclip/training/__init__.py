"""Contrastive training.

recipe.py     the numbers of a run
pairs.py      what training data is made of
shards.py     pairs from tar shards, wherever these are
data.py       pairs from folders and metadata files, and batches of them
loss.py       the loss over several processes, with false captions, and in chunks of a batch
optim.py      what is trained, by which optimizer, and how fast
processes.py  several processes that train together: gradients, shards of the weights
setup.py      names -> all that a run starts from
run.py        the state of a run: saved, continued, logged
loop.py       the training loop
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miniclip.training.data import batches, open_data
    from miniclip.training.loop import train
    from miniclip.training.loss import Loss, Objective, SigmoidLoss, backward, batch_loss, gather
    from miniclip.training.pairs import Batch, Pair, TrainingData
    from miniclip.training.processes import parallel, process_group
    from miniclip.training.recipe import Recipe, read_recipe
    from miniclip.training.setup import Setup, from_scratch, set_up

__all__ = [
    "Batch",
    "Pair",
    "TrainingData",
    "batches",
    "open_data",
    "Recipe",
    "read_recipe",
    "Setup",
    "from_scratch",
    "set_up",
    "process_group",
    "parallel",
    "train",
    "Loss",
    "Objective",
    "SigmoidLoss",
    "backward",
    "batch_loss",
    "gather",
]


def _import(name: str) -> Any:
    """Import a public name when it is first asked for: `recipe` must not have to wait for torch."""
    for home in ("recipe", "pairs", "data", "loss", "processes", "setup", "loop"):
        if name in __all__ and hasattr(module := import_module(f"{__name__}.{home}"), name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:  # which would take it to have any name
    __getattr__ = _import
