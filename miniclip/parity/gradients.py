"""Compare the gradients of two CLIPs' contrastive loss, parameter by parameter, in float64.

A fork with the right outputs may still have wrong gradients. A `detach` in the forward pass, or a
custom backward pass, changes gradients but no output.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.files.modules import named_modules
from miniclip.model import CLIP
from miniclip.parity.pairs import common_inputs
from miniclip.parity.report import Difference, Stage, largest
from miniclip.parity.sites import config_of, under_our_names
from miniclip.parity.traces import Setting, running
from miniclip.terminal import progress

# The tolerance of a gradient has two parts: `RELATIVE` times the gradient's largest number,
# and `NOISE` times the largest number in any gradient. A key bias needs `NOISE`, because its exact
# gradient is 0 and its computed gradient is only rounding error.
RELATIVE = 1e-8
NOISE = 1e-12
TABLES = ("text.token_embed.weight", "text.pos_embed")
"""Only the common rows are compared, because a fork may have a larger vocabulary or context."""


def compare_gradients(ours: Any, theirs: Any, device: torch.device, seed: int = 0) -> Stage:
    """Return a row `gradient.NAME` for each common parameter, and the cause if a gradient differs.

    Rows are in the order of the backward pass. The first row that differs is closest to the fault.
    A parameter that does not affect the loss has a gradient of 0. A frozen parameter has no row.
    Raises ValueError if there is no row.
    """
    kind = next((type(m) for m in (ours, theirs) if isinstance(m, CLIP)), CLIP)
    configs = config_of(ours, kind), config_of(theirs, kind)
    pixels, ids = common_inputs(*configs, seed, shorter=0, images=4, texts=4)
    setting = Setting(torch.float64, True, device, pixels, ids)
    one, other = (
        under_our_names(model, kind, _gradients(model, setting))
        for model in progress([ours, theirs], "backward pass")
    )
    names = [name for name in one if name in other]
    if not names:
        raise ValueError(
            "no parameter requires gradients in both models, so no gradient can be compared: set "
            "requires_grad for the parameters to compare"
        )
    most = max(largest(other[name]) for name in names)
    rows = []
    for name in sorted(
        names[::-1], key=lambda name: name.partition(".")[0]
    ):  # logit_scale is first
        size, distance = largest(other[name]), torch.inf
        mine, yours = one[name], other[name]
        if name in TABLES:
            common = min(len(mine), len(yours))
            mine, yours = mine[:common], yours[:common]
        if mine.shape == yours.shape:
            distance = largest(mine - yours)
        within = distance <= RELATIVE * size + NOISE * most
        numbers = (distance, distance / max(size, 1e-30), distance, distance, 0.0)
        rows.append(Difference(f"gradient.{name}", *numbers, within))
    if all(row.within_tolerance for row in rows):
        return rows, None
    return rows, (
        "the forward pass is the same, but the gradient differs: a tensor between this parameter "
        "and the loss is detached or frozen, or a module there has a custom backward pass"
    )


def _gradients(model: Any, setting: Setting) -> dict[str, Tensor]:
    """Return the gradient of the loss for each parameter. The keys are the model's own names."""
    with running(model, setting) as run, torch.enable_grad():
        weights = {
            f"{path}.{name}".lstrip("."): weight
            for path, module in named_modules(model)
            for name, weight in module._parameters.items()
            if weight is not None and weight.requires_grad
        }
        logits = run()["logits"]  # (4, 4)
        truth = torch.arange(len(logits), device=logits.device)
        loss = F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)
        made: tuple[Tensor | None, ...] = (None,) * len(weights)
        if loss.requires_grad:
            made = torch.autograd.grad(loss / 2, list(weights.values()), allow_unused=True)
        return {
            name: (torch.zeros_like(weight) if gradient is None else gradient.detach()).cpu()
            for (name, weight), gradient in zip(weights.items(), made, strict=True)
        }
