"""The gradient of the contrastive loss for each parameter of two CLIPs, compared in float64.

A fork whose numbers are right may still learn something else: a `detach` in its forward pass, or a
backward pass of its own, changes no output.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.model import CLIP
from miniclip.parity.pairs import random_inputs
from miniclip.parity.report import Difference, Stage
from miniclip.parity.sites import is_theirs, outputs_of, stored_in, under_our_names
from miniclip.parity.traces import Float64ForFloat32, prepared
from miniclip.terminal import progress

if TYPE_CHECKING:
    from transformers import CLIPModel

RELATIVE = 1e-8  # to the largest number of a parameter's gradient
NOISE = 1e-12  # to the largest of all: a key bias has no gradient, only rounding errors


def compare_gradients(
    ours: "CLIP | CLIPModel", theirs: "CLIP | CLIPModel", device: torch.device, seed: int = 0
) -> Stage:
    """A row `gradient.NAME` for each parameter that both have, in the order of the backward pass.

    So the first row that differs is the parameter nearest to the fault. A parameter that the loss
    does not reach has a gradient of 0; one that is frozen in either model has no row.
    """
    kind = next((type(m) for m in (ours, theirs) if isinstance(m, CLIP)), CLIP)
    config, _ = stored_in(ours, kind, torch.float64)
    tokens = config.text.context_length
    pixels, ids = random_inputs(config, images=4, texts=4, tokens=tokens, seed=seed)
    ids[:, 0] = config.text.bos_token_id
    found = [
        under_our_names(model, kind, _gradients(model, pixels, ids, device))
        for model in progress([ours, theirs], "backward pass")
    ]
    names = [name for name in found[0] if name in found[1]]
    towers = [[n for n in names if n.startswith(t)] for t in ("logit", "text", "vision")]
    largest = max((found[1][name].abs().max().item() for name in names), default=0.0)
    rows = []
    for name in (name for tower in towers for name in reversed(tower)):
        one, other = found[0][name], found[1][name]
        size = other.abs().max().item()
        distance = (one - other).abs().max().item() if one.shape == other.shape else torch.inf
        within = distance <= RELATIVE * size + NOISE * largest
        relative = distance / max(size, 1e-30)
        site = f"gradient.{name}"
        rows.append(Difference(site, distance, relative, distance, distance, 0.0, within))
    if all(row.within_tolerance for row in rows):
        return rows, None
    return rows, (
        "the forward pass is the same and the gradient is not: between this parameter and the loss "
        "something is detached, frozen, or has a backward pass of its own"
    )


def _gradients(
    model: "CLIP | CLIPModel", pixels: Tensor, ids: Tensor, device: torch.device
) -> dict:
    """The gradients of the loss by the model's own names, in float64."""
    if device.type == "mps":  # which has no float64
        device = torch.device("cpu")
    inputs = {"pixel_values": pixels.to(device, torch.float64), "input_ids": ids.to(device)}
    uncompiled = torch.compiler.set_stance("force_eager")
    with prepared(model, torch.float64, torch.float64, device), uncompiled:
        weights = {
            name.replace("_orig_mod.", ""): weight
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }
        with torch.enable_grad(), Float64ForFloat32():
            output = model(**inputs) if is_theirs(model) else model(*inputs.values())
            logits = dict(outputs_of(output))["logits"]  # (4, 4)
            truth = torch.arange(len(logits), device=logits.device)
            loss = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        made: tuple[Tensor | None, ...] = (None,) * len(weights)
        if loss.requires_grad:
            made = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        return {
            name: torch.zeros_like(weight).cpu() if gradient is None else gradient.detach().cpu()
            for (name, weight), gradient in zip(weights.items(), made, strict=True)
        }
