"""The training loop: a model, pairs and a recipe in, a checkpoint out.

What is random in a step is drawn from (seed, step), so a run that was killed and is started again
with the same command gives the weights, bit for bit, that it would have given undisturbed.

    miniclip train DATA --out DIR
    torchrun --nproc-per-node N -m miniclip train DATA --out DIR
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from miniclip.checkpoint import load, save
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.errors import CheckpointError, ContextLengthError
from miniclip.files.hub import resolve
from miniclip.files.models import check_device
from miniclip.files.reading import read_json
from miniclip.files.writing import replacing, write_json
from miniclip.follow import ids_for
from miniclip.loss import clamp_logit_scale
from miniclip.model import CLIP, attentions, unit_norm
from miniclip.surgery.interventions import PatchDropout
from miniclip.tokenizer import Tokenizer
from miniclip.training.data import augment, batches, draw_seed, open_data
from miniclip.training.loss import (
    Loss,
    average_gradients,
    backward,
    batch_loss,
)
from miniclip.training.optim import make_optimizers, schedule, set_learning_rate
from miniclip.training.pairs import Source
from miniclip.transform import ImageTransform

LOG_EVERY = 50  # steps
SAVE_EVERY = 300  # seconds
STATE = "training.pt"


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run."""

    epochs: int = 30
    batch: int = 256  # pairs, over all processes
    lr: float = 1e-3  # of AdamW, at its peak
    muon_lr: float = 0.0  # above 0, Muon trains the matrices of the blocks
    weight_decay: float = 0.1  # of matrices
    warmup: float = 0.05  # share of the steps
    clip_gradient: float = 1.0  # the longest gradient
    patch_dropout: float = 0.0  # share of the patches (FLIP)
    full_epochs: int = 1  # at the end, without patch dropout: as the model will be used
    ema: float = 0.0  # above 0, the checkpoint is the weights' moving average, with this decay
    augment: bool = False  # mirror, zoom, move; a mirror makes captions of left and right false
    hard_negatives: bool = False  # NegCLIP, where the data has false captions
    chunk: int = 0  # rows in memory at once (GradCache); 0 for all
    checkpoint_blocks: bool = False  # compute blocks twice instead of remembering them
    precision: str = "float32"  # or bfloat16, by autocast
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if type(field.default) in (int, float)):
            # A batch of one: its caption cannot be told from those of other pictures.
            least = {"epochs": 1, "batch": 2}.get(name, 0)
            if not getattr(self, name) >= least:  # nor is nan
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if not self.clip_gradient > 0:
            raise ValueError(f"clip_gradient is {self.clip_gradient}; expected more than 0")
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout is {self.patch_dropout}; expected 0 or more, below 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; expected 0 or more, below 1")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision is {self.precision!r}; expected float32 or bfloat16")


def read_recipe(path: Path) -> Recipe:
    """A recipe.json, as every run writes one. Raises ValueError."""
    values = read_json(path)
    kinds = {field.name: type(field.default) for field in fields(Recipe)}
    for name, value in values.items():
        if name not in kinds:
            raise CheckpointError(f"{path}: unknown entry {name!r}")
        if type(value) not in (kinds[name], *(int,) * (kinds[name] is float)):
            raise CheckpointError(
                f"{path}: {name} is {value!r}, not of type {kinds[name].__name__}"
            )
    return Recipe(**values)


@contextmanager
def checkpoint_blocks(model: CLIP) -> Iterator[None]:
    """Remember only what passes between blocks, and compute the rest again going backwards."""
    blocks = (*model.vision.blocks, *model.text.blocks)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is below


@contextmanager
def attention_written_out(model: CLIP) -> Iterator[None]:
    """In bfloat16 on a CPU, the fused attention's backward pass takes four times as long."""
    before = [attn.eager for attn in attentions(model)]
    model.set_attention("eager")
    try:
        yield
    finally:
        for attn, eager in zip(attentions(model), before, strict=True):
            attn.eager = eager


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """This process's device. Under torchrun, which says so by RANK and its like, the processes
    are joined for the time of the context."""
    if "RANK" not in os.environ:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(device)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def from_scratch(
    config: CLIPConfig, data: Source, seed: int = 0, kind: type[CLIP] = CLIP
) -> tuple[CLIP, Tokenizer]:
    """A random model of this class and shape, and a tokenizer learnt from the data's captions.

    `config.text.vocab_size` is the most that the vocabulary may have; the model's is what it has.
    """
    tokenizer = Tokenizer.train(data.captions(), config.text.vocab_size)
    tokenizer.context_length = config.text.context_length
    text = replace(
        config.text,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    return kind(replace(config, text=text)), tokenizer


# A CLIP that two cores can train, where neither a checkpoint nor a config says otherwise.
SMALL = CLIPConfig(
    VisionConfig(width=128, layers=4, heads=4, mlp_width=512, image_size=32, patch_size=4),
    TextConfig(
        width=64, layers=2, heads=2, mlp_width=256, vocab_size=1000, context_length=32,
        bos_token_id=0, eos_token_id=0,
    ),
    embed_dim=64,
)  # fmt: skip


class Setup(NamedTuple):
    """All that `train` needs to know."""

    model: CLIP
    tokenizer: Tokenizer
    transform: ImageTransform
    data: Source
    recipe: Recipe


def set_up(
    data: str,
    model: str | None = None,
    like: str | None = None,
    config: str | None = None,
    overrides: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Setup:
    """From names to what they stand for.

    `model`: the checkpoint to fine-tune; without one the weights are random, in the shape of the
    file `config` or of the checkpoint `like`, whose recipe, but for `overrides`, and scale of
    pixels are followed.
    """
    check_device(device)
    if model and config:
        raise ValueError(f"{model} has a shape, which {config} cannot change: give one of the two")
    if data == "shapes" and not (model or config or like):
        like = "shapes"  # the default shape is for smaller pictures
    directory = resolve(like, "config") if like else None
    recipe = Recipe()
    if like and directory:  # `like` may be a recipe itself, under any name
        recipe = read_recipe(Path(like) if like.endswith(".json") else directory / "recipe.json")
    recipe = replace(recipe, **overrides or {})
    if model:
        loaded = load(model, device=device)
        return Setup(*loaded, open_data(data, loaded.transform), recipe)
    shape = SMALL
    if config:
        shape = CLIPConfig.from_dict(read_json(Path(config)))
    elif directory:
        shape = CLIPConfig.from_pretrained(directory)
    transform = ImageTransform(shape.vision.side)
    if directory and not config and (directory / "preprocessor_config.json").is_file():
        transform = ImageTransform.from_pretrained(directory)
    source = open_data(data, transform)
    random, tokenizer = from_scratch(shape, source, recipe.seed)
    return Setup(random.to(device), tokenizer, transform, source, recipe)


def train(
    model: CLIP,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    data: Source,
    recipe: Recipe,
    out: str | os.PathLike[str],
    loss: Loss | None = None,
) -> CLIP:
    """Train `model` on `data` and write the checkpoint `out`, with recipe.json and metrics.jsonl.

    `loss` is a function of (model, image_embeds, text_embeds, is_true), as `training.Loss` says.
    The default is the paper's loss. With another one, the logit scale may pass 100.

    Saves every epoch and every five minutes; what a killed run had saved is continued. Returns the
    model in evaluation mode. Under torchrun each process calls it, and the first one writes.
    Raises ValueError where `out` holds something else, the data is too little, or the loss is no
    number any more.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    check_data(data, least=max(2, world))
    recipe = replace(recipe, batch=min(recipe.batch, len(data) - len(data) % world))
    if recipe.batch % world:
        raise ValueError(f"a batch of {recipe.batch} cannot be shared by {world} processes")
    steps_per_epoch = len(data) // recipe.batch
    steps = recipe.epochs * steps_per_epoch

    run = Run(Path(out), model, recipe, writes=rank == 0)
    dropout = PatchDropout(model.vision, 0.0) if recipe.patch_dropout else None
    if recipe.compile:
        model.vision.compile()
        model.text.compile()
    device = model.logit_scale.device
    cast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")

    def encode_image(pixels: Tensor) -> Tensor:
        return unit_norm(cast(model.encode_image)(pixels).to(model.logit_scale.dtype))

    def encode_text(ids: Tensor) -> Tensor:
        return unit_norm(cast(model.encode_text)(ids).to(model.logit_scale.dtype))

    model.train()
    stream = batches(data, recipe.batch, recipe.seed, run.step, rank, world)
    bar = tqdm(
        total=steps * recipe.batch,
        initial=run.step * recipe.batch,
        unit="pair",
        unit_scale=True,
        disable=None if rank == 0 else True,
    )
    checkpointed = checkpoint_blocks(model) if recipe.checkpoint_blocks else nullcontext()
    is_slow_fused = device.type == "cpu" and recipe.precision == "bfloat16"
    attention = attention_written_out(model) if is_slow_fused else nullcontext()
    dropping = closing(dropout) if dropout else nullcontext()
    with bar, checkpointed, attention, dropping, closing(stream):
        while run.step < steps:
            batch = next(stream)
            if recipe.hard_negatives and not all(batch.negatives):
                raise ValueError("hard_negatives: this data has no false captions to learn from")
            torch.manual_seed(draw_seed(recipe.seed, run.step, recipe.batch + rank))
            set_learning_rate(run.optimizers, schedule(run.step, steps, recipe.warmup))
            epoch = run.step // steps_per_epoch
            if dropout:
                dropout.share = recipe.patch_dropout * (epoch < recipe.epochs - recipe.full_epochs)
            captions = batch.captions + batch.negatives * recipe.hard_negatives
            value = backward(
                encode_image,
                encode_text,
                normalized(batch.pixels, transform, recipe.augment).to(device),
                tokenized(captions, tokenizer, run).to(device),
                partial(
                    batch_loss,
                    model.logit_scale,
                    batch.labels.to(device),
                    batch.also.to(device),
                    loss=loss and partial(loss, model),
                ),
                recipe.chunk,
            ).item()
            if not math.isfinite(value):  # stop before it is saved
                raise ValueError(f"the loss is {value} after {run.step} steps; try a smaller lr")
            average_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_gradient)
            for optimizer in run.optimizers:
                cast(optimizer.step)()
                optimizer.zero_grad()
            if loss is None:
                clamp_logit_scale(model)
            if run.average:
                run.average.update_parameters(model)

            run.note(value, epoch_ended=(run.step + 1) % steps_per_epoch == 0)
            for reason in data.skipped:
                run.report(reason)
            if run.is_time_to_save or run.step % steps_per_epoch == 0:
                run.save(tokenizer, transform)
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            bar.update(recipe.batch)
    skipped = of_all_processes(data.skipped)
    if skipped and rank == 0:
        run.report(f"{len(skipped)} pictures or shards were skipped, as named above")
    run.finish(tokenizer, transform)
    return model.eval()


def check_data(data: Source, least: int) -> None:
    """Raises ValueError where there are too few pictures, or only one thing is said of them."""
    if len(data) < least:
        reason = f"; {data.skipped[0]}" if data.skipped else ""
        raise ValueError(f"{len(data)} pictures to train on; expected at least {least}{reason}")
    captions = iter(data.captions())
    first = next(captions)
    if all(caption == first for caption in captions):
        raise ValueError(
            f"every caption is {first!r}: with nothing to tell apart there is nothing to learn"
        )


def of_all_processes(notes: list[str]) -> list[str]:
    """What any of them has noted, once each."""
    if not dist.is_initialized():
        return notes
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, notes)
    return sorted(set().union(*theirs))


def normalized(pixels: Tensor, transform: ImageTransform, augmented: bool) -> Tensor:
    """Bytes (B, 3, S, S) to what the vision tower reads, as the transform's last step does it."""
    pixels = augment(pixels) if augmented else pixels
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (transform.image_mean, transform.image_std)
    )
    return (pixels / 255 - mean) / std


def tokenized(captions: list[str], tokenizer: Tokenizer, run: "Run") -> Tensor:
    """Token ids (B, T) for the text tower. A caption that is too long is cut, and the first is
    reported."""
    text = run.model.text
    try:
        return ids_for(text, tokenizer, captions)
    except ContextLengthError as error:
        run.report(f"captions too long for the text tower are cut; the first: {error}", "cut")
        return ids_for(text, tokenizer, captions, truncate=True)


class Run:
    """The state of a run: its step, its optimizers, and what it has written to `out`."""

    def __init__(self, out: Path, model: CLIP, recipe: Recipe, writes: bool) -> None:
        self.out, self.model, self.writes = out, model, writes
        self.optimizers = make_optimizers(model, recipe.lr, recipe.muon_lr, recipe.weight_decay)
        self.average = None
        if recipe.ema:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
        config = model.config.to_dict() | {"class": type(model).__name__}
        self.settings = {"recipe": asdict(recipe), "config": config}
        self.step = 0
        self.losses: list[float] = []  # since the last row
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0  # of training, over all starts
        self.reported: set[str] = set()
        if (out / STATE).is_file():
            self._continue()
        elif any((out / name).exists() for name in ("config.json", "model.safetensors")):
            raise ValueError(f"{out}: already holds a checkpoint; choose another folder")
        self.saved_at = self.started = time.monotonic()
        if writes:
            try:
                out.mkdir(parents=True, exist_ok=True)
                write_json(out / "recipe.json", asdict(recipe))
                (out / "metrics.jsonl").write_text("".join(map(_line, self.rows)))
            except OSError as error:
                raise ValueError(f"{out}: cannot be written: {error.strerror}") from error

    def _continue(self) -> None:
        path = self.out / STATE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state["settings"]
            changed = [
                name
                for kind, values in self.settings.items()
                for name, value in values.items()
                if found[kind].get(name) != value
            ]
            if not changed:
                self.model.load_state_dict(state["model"])
                if self.average:
                    self.average.load_state_dict(state["average"])
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
                self.step, self.losses, self.rows = state["step"], state["losses"], state["rows"]
                self.seconds = state["seconds"]
        except Exception as error:  # damage shows itself in many ways
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path}: cannot be continued: {reason}") from error
        if changed:
            raise ValueError(
                f"{self.out}: holds an unfinished run with another {', '.join(changed)}; "
                "start that one again to continue it, or choose another folder"
            )
        if self.writes:
            self.report(f"{self.out}: continued at step {self.step}")

    @property
    def is_time_to_save(self) -> bool:
        """Whether the last save was SAVE_EVERY seconds ago."""
        return time.monotonic() - self.saved_at > SAVE_EVERY

    def note(self, loss: float, epoch_ended: bool) -> None:
        """Count a step; after some, write a row of metrics."""
        self.step += 1
        self.losses.append(loss)
        if self.step % LOG_EVERY and not epoch_ended:
            return
        seconds = self.seconds + time.monotonic() - self.started
        row = {
            "step": self.step,
            "loss": sum(self.losses) / len(self.losses),
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "logit_scale": self.model.logit_scale.exp().item(),
            "seconds": round(seconds, 1),
        }
        self.losses = []
        self.rows.append(row)
        if self.writes:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(_line(row))

    def report(self, note: str, about: str = "") -> None:
        """Print a note beside the progress bar, unless it, or one `about` the same, has been."""
        if (about or note) not in self.reported:
            self.reported.add(about or note)
            tqdm.write(note, file=sys.stderr)

    def save(self, tokenizer: Tokenizer, transform: ImageTransform) -> None:
        """Write all that is needed to go on from here, and then the checkpoint: a checkpoint alone
        would be taken for a finished run."""
        self.saved_at = time.monotonic()
        if not self.writes:
            return
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "average": self.average and self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "losses": self.losses,
            "rows": self.rows,
            "seconds": self.seconds + time.monotonic() - self.started,
        }
        with replacing(self.out / STATE) as temporary:
            torch.save(state, temporary)
        weights = self.average.module if self.average else self.model
        assert isinstance(weights, CLIP)  # a module, says AveragedModel
        save(self.out, weights, tokenizer, transform)

    def finish(self, tokenizer: Tokenizer, transform: ImageTransform) -> None:
        """A finished run leaves its checkpoint, which becomes the model, and no state."""
        if self.average:
            self.model.load_state_dict(self.average.module.state_dict())
        if self.writes:
            save(self.out, self.model, tokenizer, transform)  # it may have been killed before this
            (self.out / STATE).unlink(missing_ok=True)


def _line(row: dict[str, float]) -> str:
    return json.dumps(row) + "\n"
