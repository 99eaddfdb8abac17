r"""Contrastive training: `miniclip train`, and the functions behind it.

- `recipe.py`: the settings of a run
- `pairs.py`: the interface of training data: pairs of an image and a caption
- `shards.py`: pairs from tar shards
- `data.py`: pairs from folders and metadata files, and batches of pairs
- `loss.py`: the loss over several processes, with false captions, and in chunks of a batch
- `optim.py`: which parameters are trained, their optimizers (AdamW, Muon) and learning rates
- `processes.py`: train in several processes, and shard the weights
- `setup.py`: load or make the model, tokenizer, transform, data and recipe of a run
- `run.py`: save, continue and log a run
- `loop.py`: the training loop

    miniclip train photographs --out runs/mine  # from random weights
    miniclip train photographs --model openai/clip-vit-base-patch32 --out runs/tuned --lr 1e-5
    miniclip train cifar10/train --model openai/clip-vit-base-patch32 \
        --freeze vision --val cifar10/test --out runs/lit
    torchrun --nproc-per-node 8 -m miniclip train shards --device cuda --out runs/large
    miniclip train photographs --recipe everyday --out runs/small  # shape and recipe of everyday
    miniclip train shapes --out runs/shapes  # drawn scenes; needs no data

The data is one of these:

- a folder with one folder of images for each class
- a folder of images with `metadata.jsonl`, `.csv` or `.tsv`, or the path of this file.
  `--image-column` and `--text-column` name its columns (default: `file_name` and `text`). An image
  may have several captions, as a list or in several rows. Images may share a caption ("a dog")
- a folder of images with a `.txt` beside each image, as img2dataset writes them
- WebDataset shards (`train` extra): files, the output of a command (`'pipe:curl -s
  https://host/{000..099}.tar'`), or an address that fsspec opens
  (`hf://datasets/OWNER/NAME/{000..099}.tar`)

If an image, a shard or a command fails, training reports it and continues without it.

- `--val DATA`: score the model on held-out data after each epoch, or every `--val-every` steps.
  The score is accuracy for class folders and recall@1 for captions. The folder `best` has the best
  checkpoint
- `--freeze vision`: freeze the vision tower, as LiT does. You can also freeze `text`, or all
  parameters that match a glob such as `vision.blocks.[0-5].*`
- `--lora 4`: train only LoRA of rank 4 on query and value weights, and write the merged weights
- `--layer-decay 0.8`: give each layer 0.8 times the learning rate of the layer above it
- `--loss siglip`: classify each pair as true or false. The checkpoint does not have the loss's bias
- `--chunk 64`: hold 64 pairs in memory at once (GradCache). The gradients equal the whole batch's
  gradients. Gradient accumulation would not give these gradients, because a contrastive loss
  compares all pairs of a batch
- `--ema 0.999`: write the moving average of the weights
- `--log tensorboard`: also write the metrics for TensorBoard (`train` extra)
- `--plot report.png`: plot the loss, the scores, the learning rate, throughput and peak memory
- `--fsdp`: under `torchrun`, shard the weights and the optimizers' state over the processes

The run is saved after each epoch and every five minutes. If a run is killed, the same command
continues it. On a CPU the result equals an uninterrupted run's result, bit for bit. Under
`torchrun` the processes share one batch, and `torchrun --max-restarts 3` restarts them after a
crash. On several machines set `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`, to avoid a bug in PyTorch.
Half-precision weights become float32, because Adam's first step in float16 gives NaN. Initial
weights follow OpenAI's code. transformers swaps two of OpenAI's standard deviations.
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
    "Batch", "Pair", "TrainingData", "batches", "open_data", "Recipe", "read_recipe", "Setup",
    "from_scratch", "set_up", "process_group", "parallel", "train", "Loss", "Objective",
    "SigmoidLoss", "backward", "batch_loss", "gather",
]  # fmt: skip


def _import(name: str) -> Any:
    """Import a public name at its first use, so that importing `recipe` does not import torch."""
    for home in ("recipe", "pairs", "data", "loss", "processes", "setup", "loop"):
        if name in __all__ and hasattr(module := import_module(f"{__name__}.{home}"), name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:  # with a __getattr__, a type checker accepts any name
    __getattr__ = _import
