"""Train a low-rank change to some weights, and freeze the rest.

LoRA (Hu et al. 2021, arXiv 2106.09685) replaces W with W + (alpha / rank) B A, where A is
(rank, in) and B is (out, rank). The sum is a parametrization of the Linear
(torch.nn.utils.parametrize), so `linear.weight` is always the sum. PEFT also works on these models:
`get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))`.
"""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from miniclip.model import CLIP
from miniclip.sites import find
from miniclip.surgery.weights import copied

ATTENTION_QV = ("*.blocks.*.attn.q_proj", "*.blocks.*.attn.v_proj")
"""The query and value projections of every layer of both towers, as in the paper."""


class LowRank(nn.Module):
    """weight -> weight + scale * B @ A. B starts at zero, so nothing changes at first."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.scale = alpha / rank
        self.A = nn.Parameter(weight.new_empty(rank, columns))
        self.B = nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)  # nn.Linear and the authors' code do the same

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in) -> (out, in)"""
        return weight + self.scale * (self.B @ self.A)


def add_lora(
    model: CLIP,
    sites: Collection[str] = ATTENTION_QV,
    *,
    rank: int = 4,
    alpha: float | None = None,
) -> CLIP:
    """A model with LoRA on every Linear that a glob matches. Nothing else is trained.

    Call `merge_lora` before you save or prune the model.

    Args:
        sites: globs of module names.
        alpha: alpha / rank is the scale of B A. By default alpha is `rank`, so the scale is 1.
    Raises:
        ValueError: for a glob without a match, and for a module that is not a plain Linear.

    >>> from miniclip import CLIP
    >>> model = add_lora(CLIP.from_pretrained("shapes"), ["text.blocks.*.attn.q_proj"], rank=2)
    >>> [n for n, p in model.named_parameters() if p.requires_grad][0]
    'text.blocks.0.attn.q_proj.parametrizations.weight.0.A'
    """
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank is {rank!r}; expected a positive whole number")
    new = copied(model).requires_grad_(False)
    for name, linear in dict(pair for glob in sites for pair in find(new, glob)).items():
        if type(linear) is not nn.Linear:
            raise ValueError(f"{name} is a {type(linear).__name__}; expected a plain Linear")
        low_rank = LowRank(linear.weight.detach(), rank, rank if alpha is None else alpha)
        parametrize.register_parametrization(linear, "weight", low_rank)
    return new


def merge_lora(model: CLIP) -> CLIP:
    """A model of plain Linears. Their weights include the low-rank changes.

    The new model can be saved, exported and pruned. It remembers W, A and B for `unmerge_lora`,
    but `save` does not write them. Raises ValueError for a model without LoRA.

    >>> from miniclip import CLIP
    >>> model = CLIP.from_pretrained("shapes")
    >>> merge_lora(add_lora(model)).state_dict().keys() == model.state_dict().keys()
    True
    """
    new = copied(model)
    for parent, name, adapted in _children(new, _is_adapted):
        plain = nn.Linear(adapted.in_features, adapted.out_features, device="meta")
        plain.weight = nn.Parameter(adapted.weight.detach().clone(), False)
        plain.bias = adapted.bias
        # `unmerged` is not a submodule, because state_dict and optimizers must see a plain Linear.
        object.__setattr__(plain, "unmerged", adapted)
        setattr(parent, name, plain.train(adapted.training))
    return new


def unmerge_lora(model: CLIP) -> CLIP:
    """The model as it was before `merge_lora`, bit for bit: weight, A and B are restored.

    Later changes to the values of the merged weights are lost. Raises ValueError for a model that
    does not come from `merge_lora`, and if a merged Linear was pruned.

    >>> from miniclip import CLIP
    >>> model = add_lora(CLIP.from_pretrained("shapes"))
    >>> unmerge_lora(merge_lora(model)).state_dict().keys() == model.state_dict().keys()
    True
    """
    new = copied(model)
    for parent, name, plain in _children(new, lambda module: hasattr(module, "unmerged")):
        found, merged = plain.weight.shape, plain.unmerged.weight.shape
        if found != merged:
            raise ValueError(
                f"the weight of a {name} has shape {tuple(found)}, but merge_lora made it "
                f"{tuple(merged)}; unmerge the model that you had before pruning"
            )
        setattr(parent, name, plain.unmerged.to(plain.weight))
    return new


def _is_adapted(module: Any) -> bool:
    is_parametrized = parametrize.is_parametrized(module, "weight")
    return is_parametrized and isinstance(module.parametrizations.weight[0], LowRank)


def _children(
    model: nn.Module, wanted: Callable[[nn.Module], bool]
) -> list[tuple[nn.Module, str, Any]]:
    """Each module for which `wanted` is true, as (parent, name, module). Raises ValueError if there
    is none."""
    parts = [(parent, *child) for parent in model.modules() for child in parent.named_children()]
    if not (found := [part for part in parts if wanted(part[2])]):
        raise ValueError("no Linear here has LoRA to merge or unmerge; see add_lora")
    return found
