"""The program that test_processes.py runs in two processes, by `torchrun two_processes.py FOLDER`.

A process reads its inputs from the folder and saves its results there.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from forks.siglip import Siglip, sigmoid_loss

from miniclip import CLIP, ImageTransform
from miniclip.commands.main import main
from miniclip.config import CLIPConfig
from miniclip.retrieval import building
from miniclip.training import (
    Objective,
    backward,
    batch_loss,
    batches,
    gather,
    open_data,
    parallel,
)
from miniclip.training import run as run_module
from miniclip.training.processes import shard, whole

RATES = {"equal": (0.1, 0.1), "unequal": (0.1, 0.003)}
ENGINES = ("ddp", "fsdp")
CASES = (
    *product(RATES, ("float64",), (0, 2), ENGINES),
    *product(("unequal",), ("float32",), (2,), ENGINES),
)
"""Each case: learning rates, dtype, pairs in a chunk, and PyTorch's engine."""

CLIP_AT = 0.5  # the gradient's norm is about 1, so it is clipped


def step(model, pixels, ids, labels, chunk=0, engine=None, batch=None):
    also = labels.new_empty(len(labels), 0)
    loss = partial(batch_loss, model.logit_scale, labels, also, batch=batch)
    return backward(engine or Objective(model), pixels, ids, loss, chunk)


def gradients(model):
    return whole({name: p.grad.clone() for name, p in model.named_parameters()})


def three_steps(inputs, rates, dtype, chunk=0, engine="", rank=0, world=1):
    """Take three steps on a process's share of the batch. Each tower has its own learning rate."""
    model = CLIP(CLIPConfig.from_dict(inputs["config"])).to(getattr(torch, dtype))
    model.load_state_dict(inputs["weights"])
    if engine == "fsdp":
        shard(model)
    captions, false = inputs["ids"].chunk(2)
    ids = torch.cat([captions[rank::world], false[rank::world]])
    pixels, labels = (inputs[name][rank::world] for name in ("pixels", "labels"))
    towers = zip((model.vision, model.text), RATES[rates], strict=True)
    optimizer = torch.optim.SGD([{"params": t.parameters(), "lr": lr} for t, lr in towers], lr=0.1)
    optimizer.add_param_group({"params": [model.logit_scale]})
    wrapped = Objective(model) if engine == "fsdp" else parallel(Objective(model), skips=False)
    batch = len(inputs["pixels"])
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = step(model, pixels.to(getattr(torch, dtype)), ids, labels, chunk, wrapped, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_AT)
        losses.append(loss.item())
        optimizer.step()
    return {"losses": losses, "grads": gradients(model), "weights": whole(model.state_dict())}


def loss_of_several_captions(folder, embeddings, rank=0, world=1):
    """Compute the loss of a whole batch in a process that reads only its share of the batch."""
    data = open_data(folder, ImageTransform(32))
    batch = next(batches(data, batch=8, seed=0, rank=rank, world_size=world))
    image, text = embeddings[:, rank::world]
    return batch_loss(torch.tensor(2.0), batch.labels, batch.also, image, text).item()


def gradients_of_siglip(folder, pixels, ids, rank=0, world=1):
    """Compute the gradients of SigLIP's loss in a process that has only its share of the pairs."""
    model = Siglip.from_pretrained(folder, dtype=torch.float64)
    labels = torch.arange(len(pixels))[rank::world]
    also, loss = labels.new_empty(len(labels), 0), partial(sigmoid_loss, model)
    end = partial(batch_loss, model.logit_scale, labels, also, loss=loss)
    engine = parallel(Objective(model), skips=True)
    backward(engine, pixels[rank::world], ids[rank::world], end)
    return gradients(model)


def crash_at(step, crash):
    """Make runs crash at a step, before that step is saved. Returns a function that undoes this."""

    def note_and_crash(run, *args):
        note(run, *args)
        if run.step == step:
            crash()

    note = run_module.Run.log_step
    run_module.Run.log_step = note_and_crash
    return lambda: setattr(run_module.Run, "log_step", note)


def stopped(line, at):
    """Run a command, and make it crash at step `at`."""
    restore = crash_at(at, lambda: 1 / 0)
    try:
        main(line)
    except ZeroDivisionError:
        return restore()
    raise AssertionError("the command did not crash")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    lines = json.loads((folder / "commands.json").read_text())
    rank = int(os.environ["RANK"])  # set by torchrun
    if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        crash_at(3, lambda: os._exit(1))
    # If the other process crashed, stop here: after a restart, the file `store` must be new.
    if status := main(lines["ddp"]):
        sys.exit(status)
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    status += main(lines["undisturbed"])
    building.PART = 8
    with open(folder / f"said {rank}", "w") as said, redirect_stdout(said):
        status += main(lines["embed"])
    status += main(lines["fsdp"]) + main(lines["fsdp, lora"])
    stopped(lines["fsdp, stopped"], at=3)
    status += main(lines["fsdp, stopped"])
    inputs = torch.load(folder / "inputs.pt")
    x, y = (torch.ones(n, requires_grad=True) for n in (1, 2))
    ((gather(x) + y) * torch.tensor([3.0, 5.0])).sum().backward()
    found = {
        "steps": {case: three_steps(inputs, *case, rank, 2) for case in CASES},
        "sum": (x.grad, y.grad),
        "several": loss_of_several_captions(folder / "several", inputs["embeddings"], rank, 2),
        "siglip": gradients_of_siglip(folder / "siglip", *inputs["pairs"], rank, 2),
    }
    torch.save(found, folder / f"found {rank}.pt")
    dist.destroy_process_group()
    sys.exit(status)
