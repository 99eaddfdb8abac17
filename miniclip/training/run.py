"""Save the state of a run, log its metrics, and continue it after it was killed."""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from miniclip.checkpoint import Loaded, save
from miniclip.errors import CheckpointError
from miniclip.files.writing import blaming_disk, replacing, write_json
from miniclip.model import CLIP
from miniclip.surgery.lora import merge_lora
from miniclip.surgery.weights import copied
from miniclip.tokenizer import Tokenizer
from miniclip.training.loss import Objective
from miniclip.training.optim import layers_above, make_optimizers, trainable
from miniclip.training.processes import of_first_process, reshard, shard, sharded_like, whole
from miniclip.training.recipe import Recipe
from miniclip.transform import ImageTransform

LOG_EVERY = 50  # steps
SAVE_EVERY = 300  # seconds
STATE = "training.pt"


class Run:
    """A run: the trained model, the optimizers, the step, the scores and the metrics.

    A `loss` with parameters is trained and saved too. Files are written only if `writes` is True.
    `inputs` describes the tokenizer and the transform. If these changed, the run is not continued.
    """

    def __init__(
        self, out: Path, model: CLIP, recipe: Recipe, loss: Any = None, writes: bool = True,
        log: str = "", inputs: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.out, self.model, self.recipe, self.writes = out, model, recipe, writes
        if any(p.itemsize < 4 for p in model.parameters()):
            model.float()  # float16 rounds small steps and squared gradients to 0
        self.trained = self.plain = trainable(model, recipe.freeze, recipe.lora, recipe.seed)
        self.average = None
        if recipe.ema:
            self.average = AveragedModel(self.plain, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
        if recipe.fsdp:
            self.trained = shard(copied(self.plain))
            if self.average:
                shard(self._weights())
            self.plain.cpu()  # unsharded weights might not fit on the device
        self.objective = Objective(self.trained, loss, recipe.precision)
        above, decay = layers_above(self.trained), recipe.layer_decay
        self.optimizers = make_optimizers(
            self.objective.named_parameters(),
            recipe.lr,
            recipe.muon_lr,
            recipe.weight_decay,
            {p: decay**layers for p, layers in above.items()},
        )
        config = model.config.to_dict() | {"class": type(model).__name__}
        self.settings = {"recipe": asdict(recipe), "config": config | (inputs or {})}
        self.step = 0
        self.losses: list[Any] = []  # losses after the newest row in `rows`; tensors or numbers
        self.loss = math.nan  # the newest loss that `read_losses` has read
        self.rows: list[dict[str, float]] = []
        self.best = -math.inf  # the highest value of the first score so far
        self.seconds = 0.0  # the training time before this process started
        self.reported: set[str] = set()
        if (out / STATE).is_file():
            self._continue()
        elif any((out / name).exists() for name in ("config.json", "model.safetensors")):
            raise ValueError(f"{out}: already holds a checkpoint; choose another folder")
        self.saved_at = self.started = time.monotonic()
        self.writer: Any = None
        if writes:
            try:
                out.mkdir(parents=True, exist_ok=True)
                write_json(out / "recipe.json", asdict(recipe))
                rows = (f"{json.dumps(row)}\n" for row in self.rows)
                (out / "metrics.jsonl").write_text("".join(rows))
            except OSError as error:
                raise ValueError(f"{out}: cannot be written: {error.strerror}") from error
            if log:
                self.writer = open_tensorboard(out, self.step)

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
                for module in filter(None, (self.objective, self.average)):
                    own, saved = module.state_dict(), state[type(module).__name__]
                    for name in own:
                        saved[name] = sharded_like(saved[name], own[name])
                    module.load_state_dict(saved)
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
                    for p, values in optimizer.state.items():
                        values |= {name: sharded_like(x, p) for name, x in values.items()}
                self.step, self.losses, self.rows = state["step"], state["losses"], state["rows"]
                self.seconds, self.best = state["seconds"], state["best"]
                if type(self.step) is not int or self.step < 0:
                    raise ValueError(f"step is {self.step!r}; expected a number of steps")
                sum(self.losses) + self.seconds + sum(row.get("loss", 0) for row in self.rows)
                json.dumps(self.rows)  # this line and the line above raise errors for damaged rows
        except Exception as error:  # a damaged file can raise any error
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path}: cannot be continued: {reason}") from error
        if changed:
            raise ValueError(
                f"{self.out}: holds an unfinished run with other values of {', '.join(changed)}; "
                "continue that run with its own command and data, or choose another folder"
            )
        if self.writes:
            self.report(f"{self.out}: continued at step {self.step}")

    @property
    def is_time_to_save(self) -> bool:
        """Whether more than SAVE_EVERY seconds have passed since the last save."""
        return self.agreed(time.monotonic() - self.saved_at > SAVE_EVERY)

    def agreed(self, wants_to_save: bool) -> bool:
        """Return whether to save. With sharded weights, the first process decides."""
        return bool(of_first_process(wants_to_save)) if self.recipe.fsdp else wants_to_save

    def validate(
        self,
        scores_of: Callable[[Loaded], dict[str, float]],
        tokenizer: Tokenizer,
        transform: ImageTransform,
    ) -> dict[str, float]:
        """Score the model on held-out data. Write `out`/best if the first of the scores is higher
        than in all earlier validations."""
        self.read_losses()
        began, weights = time.monotonic(), self._weights().eval()
        scores = scores_of(Loaded(weights, tokenizer, transform))
        reshard(weights.train())
        first = of_first_process(next(iter(scores.values())))
        if first > self.best:
            self.best = first
            self._write(self.out / "best", tokenizer, transform)
        self.started += time.monotonic() - began  # do not count this as training time
        return {f"val_{name}": score for name, score in scores.items()}

    def note_loss(self, loss: Tensor) -> None:
        """Keep a step's loss. On a GPU it is read later, because reading waits for the GPU."""
        self.losses.append(loss)
        if loss.is_cpu:
            self.read_losses()

    def read_losses(self) -> None:
        """Turn the losses into numbers. Raises ValueError if a loss is NaN or infinite."""
        self.losses = [float(loss) for loss in self.losses]
        for self.loss in self.losses:
            if not math.isfinite(self.loss):
                reason = f"the loss is {self.loss} after {self.step} steps"
                raise ValueError(f"{reason}; try a smaller lr")

    def log_step(self, epoch_ended: bool, scores: dict[str, float]) -> None:
        """Count a step. Write a row of metrics every LOG_EVERY steps, at the end of each epoch, and
        after each validation."""
        self.step += 1
        if self.step % LOG_EVERY and not epoch_ended and not scores:
            return
        self.read_losses()
        seconds = self.seconds + time.monotonic() - self.started
        last = self.rows[-1] if self.rows else {"step": 0, "seconds": 0.0}
        pairs = self.recipe.batch * (self.step - last["step"])
        row = {
            "step": self.step,
            "loss": sum(self.losses) / len(self.losses),
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "logit_scale": self.trained.logit_scale.exp().item(),
            "seconds": round(seconds, 3),
            "pairs_per_second": pairs / max(1e-3, seconds - last["seconds"]),
            "peak_gib": peak_memory(self.trained.logit_scale.device) / 2**30,
        } | scores
        self.losses = []
        self.rows.append(row)
        if self.writes:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(f"{json.dumps(row)}\n")
        if self.writer:
            for name, value in row.items():
                self.writer.add_scalar(name, value, self.step)

    def report(self, note: str, about: str = "") -> None:
        """Print a note once, above the progress bar. If several notes have the same `about`, print
        only the first."""
        if (about or note) not in self.reported:
            self.reported.add(about or note)
            tqdm.write(note, file=sys.stderr)

    def save(self, tokenizer: Tokenizer, transform: ImageTransform) -> None:
        """Write the state before the checkpoint, because a checkpoint without a state means that
        the run is finished."""
        self.read_losses()  # a loss of NaN raises an error before anything is saved
        self.saved_at = time.monotonic()
        if not (self.writes or self.recipe.fsdp):
            return
        state = {
            "settings": self.settings,
            "Objective": self.objective.state_dict(),
            "AveragedModel": self.average and self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "losses": self.losses,
            "rows": self.rows,
            "best": self.best,
            "seconds": self.seconds + time.monotonic() - self.started,
        }
        state = whole(state, "cpu")
        if self.writes:
            with blaming_disk(self.out), replacing(self.out / STATE) as path:
                with open(path, "wb") as file:  # with a path, torch.save hides the disk's error
                    torch.save(state, file)
        self._write(self.out, tokenizer, transform)

    def finish(self, tokenizer: Tokenizer, transform: ImageTransform) -> None:
        """Write the checkpoint, copy its weights to the model, and delete the saved state."""
        weights = self._write(self.out, tokenizer, transform)
        if weights is not self.model:
            self.model.load_state_dict(weights.state_dict())
        self.model.to(self.trained.logit_scale.device)
        if self.writes:
            (self.out / STATE).unlink(missing_ok=True)
        if self.writer:
            self.writer.close()

    def _weights(self) -> CLIP:
        """Return the moving average of the model if there is one, or else the trained model."""
        return cast(CLIP, self.average.module) if self.average else self.trained

    def _write(self, out: Path, tokenizer: Tokenizer, transform: ImageTransform) -> CLIP:
        """Write a checkpoint. All processes must call this, because weights may be sharded."""
        weights = self._weights()
        if self.recipe.fsdp:
            self.plain.load_state_dict(whole(weights.state_dict(), "cpu"))
            weights = self.plain
        if self.recipe.lora:
            weights = merge_lora(weights)
        if self.writes:
            save(out, weights, tokenizer, transform)
        return weights


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes, on the GPU or in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # on Windows
        return 0
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def open_tensorboard(out: Path, step: int) -> Any:
    """Open PyTorch's TensorBoard writer. It hides metrics that a killed run wrote after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard is not installed: pip install 'miniclip[train]'") from None
    return SummaryWriter(str(out), purge_step=step + 1)
