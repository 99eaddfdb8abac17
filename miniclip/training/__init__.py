"""Contrastive training: pairs (data.py), the loss (loss.py), optimizers (optim.py), the loop
(loop.py), and a world to train on (shapes.py)."""

from miniclip.training.data import batches, open_data
from miniclip.training.loop import (
    Recipe,
    Setup,
    from_scratch,
    process_group,
    read_recipe,
    set_up,
    train,
)
from miniclip.training.loss import Loss, average_gradients, batch_loss, gather
from miniclip.training.pairs import Batch, Pair, Source

__all__ = [
    "Batch",
    "Pair",
    "Source",
    "batches",
    "open_data",
    "Recipe",
    "Setup",
    "from_scratch",
    "process_group",
    "read_recipe",
    "set_up",
    "train",
    "average_gradients",
    "batch_loss",
    "Loss",
    "gather",
]
