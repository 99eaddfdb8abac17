r"""Contrastive training: `miniclip train`, and the functions behind it.

- `recipe.py`: the numbers of a run
- `pairs.py`: what training data is made of
- `shards.py`: pairs from tar shards
- `data.py`: pairs from folders and metadata files, and batches of them
- `loss.py`: the loss over several processes, with false captions, and in chunks of a batch
- `optim.py`: what is trained, by which optimizer (AdamW, Muon) and how fast
- `processes.py`: several processes: gradients, and shards of the weights
- `setup.py`: names -> all that a run starts from
- `run.py`: the state of a run: saved, continued, logged
- `loop.py`: the training loop

    miniclip train photographs --out runs/mine  # from random weights
    miniclip train photographs --model openai/clip-vit-base-patch32 --out runs/tuned --lr 1e-5
    miniclip train cifar10/train --model openai/clip-vit-base-patch32 \
        --freeze vision --val cifar10/test --out runs/lit
    torchrun --nproc-per-node 8 -m miniclip train shards --device cuda --out runs/large
    miniclip train photographs --recipe everyday --out runs/small  # shape and recipe of everyday
    miniclip train shapes --out runs/shapes  # a drawn world; no data needed

The data is one of these:

- a folder of class folders
- a folder of pictures with `metadata.jsonl`, `.csv` or `.tsv`, or such a file. `--image-column` and
  `--text-column` name its columns (`file_name` and `text`). A picture may have several captions, as
  a list or in several rows. Several pictures may list one caption, such as "a
  dog". It is then true of each of them
- a folder of pictures with a `.txt` beside each, as img2dataset writes them
- WebDataset shards (`train` extra): files, the output of a command (`'pipe:curl -s
  https://host/{000..099}.tar'`), or an address that fsspec opens
  (`hf://datasets/OWNER/NAME/{000..099}.tar`)

Training continues without a picture, a shard or a command that fails, and names it.

- `--val DATA`: measure held-out data after each epoch, or every `--val-every` steps: zero-shot
  accuracy on class folders, recall@1 on captions. `DIR/best` keeps the best checkpoint
- `--freeze vision`: freeze parts (LiT freezes the image tower): `vision`, `text`, or globs such as
  `vision.blocks.[0-5].*`
- `--lora 4`: train a low-rank change of the queries and values, and write the merged weights
- `--layer-decay 0.8`: let each layer learn 0.8 times as fast as the layer above it
- `--loss siglip`: classify each pair as true or false. The bias stays in the training state
- `--chunk 64`: hold 64 pairs in memory at once. The gradients equal the whole batch's (GradCache).
  Plain gradient accumulation would not: a contrastive loss compares all pairs of a batch
- `--ema 0.999`: write the moving average of the weights
- `--log tensorboard`: write the metrics for TensorBoard too (`train` extra)
- `--plot report.png`: draw the loss, the scores, the learning rate, throughput and peak memory
- `--fsdp`: under `torchrun`, shard the weights and the optimizers' state over the processes

The checkpoint is written every five minutes. A killed run continues with the same command and ends,
on a CPU, in the same bits. Under `torchrun` the processes share the batch of a single process.
After a crash `torchrun --max-restarts 3` starts them again, and they continue (on several machines
set `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`, because of a bug of PyTorch). Half-precision weights
become float32, because Adam's first step in float16 gives NaN. Initial weights follow OpenAI's
code; transformers exchanges two of its standard deviations.
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
    """Import a public name when it is first used, because `recipe` must not wait for torch."""
    for home in ("recipe", "pairs", "data", "loss", "processes", "setup", "loop"):
        if name in __all__ and hasattr(module := import_module(f"{__name__}.{home}"), name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:  # or type checkers accept any name
    __getattr__ = _import
