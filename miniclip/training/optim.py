"""Optimizers and the learning rate: AdamW as in the paper's table 18, and Muon."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

BETAS, EPS = (0.9, 0.98), 1e-6  # the paper's for ViTs


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are applied (Jordan et al. 2024,
    "Muon: An optimizer for hidden layers in neural networks").

    torch.optim.Muon does the same and insists on bfloat16, which is very slow on a CPU without
    instructions for it. This one works in the precision of the gradient.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the gradients are there
        """Update every parameter, all matrices, from its gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
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
                for p, update in zip(params, orthogonalized(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix's U S V^T: all singular values become roughly 1. (N, R, C) both.

    Five steps of a Newton-Schulz iteration, whose coefficients are Jordan's.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def make_optimizers(
    model: nn.Module, lr: float, muon_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or, with a `muon_lr` above 0, Muon for the matrices of the blocks.

    Matrices decay and nothing else does: not biases, norms, the class token or the logit scale.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if muon_lr and p.ndim == 2 and ".blocks." in name]
    taken = set(map(id, hidden))
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS)
    ]
    if hidden:
        optimizers.append(Muon(hidden, lr=muon_lr, weight_decay=weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """The share of each group's peak that `schedule` gives."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then half a cosine down to zero; in 0..1."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
