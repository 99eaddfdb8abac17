"""Choose the trained parameters, their optimizers (AdamW, Muon) and their learning rates."""

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.errors import listed
from miniclip.model import CLIP
from miniclip.surgery.lora import add_lora
from miniclip.training.processes import sharded_like, whole

BETAS, EPS = (0.9, 0.98), 1e-6  # the values for ViTs in table 18 of the paper


class Muon(torch.optim.Optimizer):
    """An optimizer that makes the momentum of a matrix orthogonal before each update.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". torch.optim.Muon
    computes in bfloat16, which is slow on many CPUs. This class computes in the gradient's dtype.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:  # a fork may have a matrix that its forward does not use
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                updates = []
                for p in params:
                    assert p.grad is not None
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p.grad)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(state["momentum"], group["momentum"]))
                scale = -group["lr"] * max(1.0, rows / columns) ** 0.5
                stacked = torch.stack(whole(updates))
                for p, update in zip(params, orthogonalized(stacked), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(sharded_like(update, p), alpha=scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Set the singular values of N matrices (N, R, C) to about 1, so U S V^T becomes about U V^T.

    Takes five steps of a Newton-Schulz iteration with Jordan's coefficients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def trainable(model: CLIP, freeze: str = "", lora: int = 0, seed: int = 0) -> CLIP:
    """Choose which parameters are trained. Return the model, or a copy if `lora` is above 0.

    `freeze` has names or globs of modules and parameters, separated by commas. If `lora` is above
    0, add LoRA of this rank to the query and value weights, and train only the LoRA matrices.
    Raises ValueError if a glob matches nothing, or if no parameter is left to train.

    >>> model = trainable(CLIP.from_pretrained("shapes"), "vision, text.*embed*")
    >>> [name for name, p in model.named_parameters() if p.requires_grad][:2]
    ['logit_scale', 'text.blocks.0.ln_1.weight']
    """
    if lora:
        torch.manual_seed(seed)  # so that every process draws the same LoRA matrices
        model = add_lora(model, rank=lora)
    named = dict(model.named_parameters())
    for glob in freeze.replace(",", " ").split():
        found = [n for n in named if fnmatchcase(n, glob) or fnmatchcase(n, f"{glob}.*")]
        if not found:
            raise ValueError(f"freeze: {glob!r} matches none of the parameters {listed([*named])}")
        for name in found:
            named[name].requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise ValueError("nothing is left to train: all parameters are frozen")
    return model


def layers_above(model: CLIP) -> dict[nn.Parameter, int]:
    """Count the layers above each parameter in its tower, as BEiT does (Bao et al. 2021).

    The last LayerNorm and the projection are the highest layer. The embeddings are the lowest.
    """
    above: dict[nn.Parameter, int] = {}
    for tower in (model.vision, model.text):
        depth, parts = len(tower.blocks), list(tower._modules)
        above |= dict.fromkeys(tower.parameters(), depth + 1)
        for i, block in enumerate(tower.blocks):
            above |= dict.fromkeys(block.parameters(), depth - i)
        for name in parts[parts.index("blocks") + 1 :]:
            above |= dict.fromkeys(tower.get_submodule(name).parameters(), 0)
    return above


def make_optimizers(
    named: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    muon_lr: float,
    weight_decay: float,
    shares: Mapping[nn.Parameter, float],
) -> list[torch.optim.Optimizer]:
    """Make AdamW. If `muon_lr` is above 0, also make Muon, for the matrices of the blocks.

    Weight decay does not apply to biases, LayerNorms, the class token and the logit scale.
    A parameter's learning rate is `lr` or `muon_lr`, times its value in `shares` (default: 1).
    """
    kinds: tuple[dict[Any, list[Tensor]], ...] = ({(0.0, 1.0): []}, {})
    for name, p in named:
        if p.requires_grad:
            is_hidden = bool(muon_lr) and p.ndim == 2 and ".blocks." in name
            about = weight_decay if p.ndim >= 2 else 0.0, shares.get(p, 1.0)
            kinds[is_hidden].setdefault(about, []).append(p)
    adam, muon = (
        [
            {"params": params, "weight_decay": decay, "lr": rate * share}
            for (decay, share), params in groups.items()
        ]
        for rate, groups in zip((lr, muon_lr), kinds, strict=True)
    )
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam, betas=BETAS, eps=EPS)]
    if muon:
        optimizers.append(Muon(muon, lr=muon_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Set each group's learning rate to `share` times the group's peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return a step's learning rate divided by the peak: linear warm-up, then cosine to zero."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
