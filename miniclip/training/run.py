"""The state of a run: what it saves, how it continues after it was killed, what it logs."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from miniclip.checkpoint import save
from miniclip.errors import CheckpointError
from miniclip.files.writing import replacing, write_json
from miniclip.model import CLIP
from miniclip.tokenizer import Tokenizer
from miniclip.training.optim import make_optimizers
from miniclip.training.recipe import Recipe
from miniclip.transform import ImageTransform

LOG_EVERY = 50  # steps
SAVE_EVERY = 300  # seconds
STATE = "training.pt"


class Run:
    """The state of a run: its step, its optimizers, and what it has logged."""

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

    def log_step(self, loss: float, epoch_ended: bool) -> None:
        """Count a step. Every LOG_EVERY steps, and after an epoch, write a row of metrics."""
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
        """Print a note above the progress bar: once, or the first of those `about` one thing."""
        if (about or note) not in self.reported:
            self.reported.add(about or note)
            tqdm.write(note, file=sys.stderr)

    def save(self, tokenizer: Tokenizer, transform: ImageTransform) -> None:
        """Write the state to continue from, then the checkpoint. In the other order, a run that is
        killed in between would look finished."""
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
        """Write the checkpoint, remove the state, and give the model the averaged weights."""
        if self.average:
            self.model.load_state_dict(self.average.module.state_dict())
        if self.writes:
            save(self.out, self.model, tokenizer, transform)  # it may have been killed before this
            (self.out / STATE).unlink(missing_ok=True)


def _line(row: dict[str, float]) -> str:
    return json.dumps(row) + "\n"
