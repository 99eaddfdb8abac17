"""Arithmetic on the weights of whole models, and freezing parts of a tower.

The mean of models that were fine-tuned from the same weights is often a good model. Sums are
computed in float64 and rounded once, to the dtype of the first model's weights.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from miniclip.errors import listed
from miniclip.files.modules import check_described, differences, state_of
from miniclip.model import CLIP, TextTower, VisionTower
from miniclip.sites import Enter


def interpolate(one: CLIP, other: CLIP, alpha: float) -> CLIP:
    """Interpolate between the weights of two models.

    WiSE-FT (Wortsman et al. 2021, arXiv 2109.01903) interpolates between the zero-shot and the
    fine-tuned model. alpha = 0 gives exactly the first model, and alpha = 1 exactly the second. An
    alpha below 0 or above 1 extrapolates. Raises ValueError if the models differ in more than their
    weights, or if a model has unmerged LoRA.

    >>> from miniclip import CLIP
    >>> model = CLIP.from_pretrained("shapes")
    >>> torch.equal(interpolate(model, model, 0.5).vision.pos_embed, model.vision.pos_embed)
    True
    """
    return _combined([one, other], lambda a, b: torch.lerp(a, b, alpha))


def average(models: list[CLIP]) -> CLIP:
    """Average the models' weights (a uniform soup, Wortsman et al. 2022, arXiv 2203.05482).

    Raises ValueError for an empty list. The other errors are the same as in `interpolate`.

    >>> from miniclip import CLIP
    >>> model = CLIP.from_pretrained("shapes")
    >>> bool((average([model] * 3).logit_scale == model.logit_scale).all())
    True
    """
    if not models:
        raise ValueError("expected at least one model to average, found none")
    return _combined(models, lambda *tensors: sum(tensors) / len(tensors))


@dataclass(frozen=True)
class TaskVector:
    """How fine-tuning changed each weight, in float64 (Ilharco et al. 2022, arXiv 2212.04089).

    Task vectors can be added, subtracted, scaled and negated. To make a model forget the task,
    apply the negated vector.

    >>> from miniclip import CLIP
    >>> model = CLIP.from_pretrained("shapes")
    >>> task = TaskVector.between(model, model)
    >>> (task + 0.5 * task - task).apply(model).config == model.config
    True
    """

    tensors: dict[str, Tensor]

    @classmethod
    def between(cls, base: CLIP, tuned: CLIP) -> "TaskVector":
        """The weights of `tuned` minus the weights of `base`. Errors are as in `interpolate`."""
        weights, others = _weights(base, tuned)
        return cls({name: others[name].double() - weights[name].double() for name in weights})

    def apply(self, model: CLIP, scale: float = 1.0) -> CLIP:
        """Return a new model: the weights of `model` plus `scale` times this vector."""
        (weights,) = _weights(model)
        _check_same_shapes(weights, self.tensors)
        vector = self.tensors
        moved = {n: w.double() + scale * vector[n].to(w.device) for n, w in weights.items()}
        return _with_weights(model, moved)

    def __add__(self, other: "TaskVector") -> "TaskVector":
        _check_same_shapes(self.tensors, other.tensors)
        return TaskVector({name: v + other.tensors[name] for name, v in self.tensors.items()})

    def __mul__(self, scale: float) -> "TaskVector":
        return TaskVector({name: scale * vector for name, vector in self.tensors.items()})

    __rmul__ = __mul__

    def __neg__(self) -> "TaskVector":
        return -1 * self

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        return self + -other


EMBEDDING = ("patch_embed", "class_embed", "pos_embed", "register_embed", "ln_pre", "token_embed")
OUTPUT = ("ln_post", "ln_final", "proj")


def layer_groups(tower: VisionTower | TextTower) -> list[list[nn.Parameter]]:
    """Group a tower's parameters by depth, for `freeze` or for a learning rate per layer.

    The first group has all parameters before the first block. Then each block is a group. The last
    group has the last LayerNorm and the projection.

    >>> from miniclip import CLIP
    >>> len(layer_groups(CLIP.from_pretrained("shapes").vision))  # 4 blocks
    6
    """
    groups: list[list[nn.Parameter]] = [[] for _ in range(len(tower.blocks) + 2)]
    for name, parameter in tower.named_parameters():
        part, _, rest = name.partition(".")
        if part not in ("blocks", *EMBEDDING, *OUTPUT):
            raise ValueError(
                f"{type(tower).__name__} has a parameter {name}: layer_groups cannot know whether "
                "it comes before the blocks or after them"
            )
        place = -1 if part in OUTPUT else 0
        groups[1 + int(rest.partition(".")[0]) if part == "blocks" else place].append(parameter)
    return groups


def freeze(tower: VisionTower | TextTower, groups: int) -> None:
    """Freeze the first `groups` groups of `layer_groups`, and unfreeze the other groups, in place.

    LiT (Zhai et al. 2021, arXiv 2111.07991) freezes all groups of a trained vision tower.

    >>> from miniclip import CLIP
    >>> tower = CLIP.from_pretrained("shapes").vision
    >>> freeze(tower, groups=1)
    >>> tower.pos_embed.requires_grad, tower.proj.weight.requires_grad
    (False, True)
    """
    parts = layer_groups(tower)
    if not 0 <= groups <= len(parts):
        raise ValueError(f"groups is {groups}; expected 0 (no group) to {len(parts)} (all groups)")
    for i, part in enumerate(parts):
        for parameter in part:
            parameter.requires_grad_(i >= groups)


Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module, shares_weights: bool = False) -> Module:
    """Copy a model without its forward hooks. Their handles would not work on the copy.

    If `shares_weights`, the copy shares the model's tensors.

    >>> from miniclip import CLIP
    >>> model = CLIP.from_pretrained("shapes")
    >>> copied(model).logit_scale.data_ptr() == model.logit_scale.data_ptr()
    False
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())} if shares_weights else {}
    new = deepcopy(model, tensors)
    for part in new.modules():
        part._forward_hooks.clear()
        for key, hook in [*part._forward_pre_hooks.items()]:
            if isinstance(hook, Enter):  # keep pre-hooks that make weights (torch.nn.utils.prune)
                del part._forward_pre_hooks[key]
    return new


def _combined(models: list[CLIP], combine: Callable[..., Tensor]) -> CLIP:
    first, *others = _weights(*models)
    return _with_weights(models[0], {
        name: combine(*(s[name].to(weight.device, torch.float64) for s in (first, *others)))
        for name, weight in first.items()
    })  # fmt: skip


def _weights(*models: CLIP) -> list[dict[str, Tensor]]:
    """Return each model's floating-point tensors. Raises ValueError if the models differ in more
    than their weights, or if a model does not fit its config, for example because it has unmerged
    adapters or quantised modules."""
    for model in models:
        check_described(model)
    found = [
        {name: tensor for name, tensor in state_of(model).items() if tensor.is_floating_point()}
        for model in models
    ]
    for model, weights in zip(models[1:], found[1:]):
        _check_same_shapes(found[0], weights)
        odd = [*differences(model, models[0])]
        odd += ["parameters that are shared"] * (_ties(model) != _ties(models[0]))
        if odd:
            raise ValueError(f"the models differ in more than their weights: {listed(odd)}")
    return found


def _ties(model: CLIP) -> list[int]:
    """Number the parameter names. All names of a shared parameter have the same number."""
    ids = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    return [ids.index(one) for one in ids]


def _with_weights(model: CLIP, weights: dict[str, Tensor]) -> CLIP:
    new = copied(model)
    state = state_of(new)
    for name, weight in weights.items():
        state[name].copy_(weight)
    return new


def _check_same_shapes(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (one, other)]
    if odd := sorted(dict(shapes[0].items() ^ shapes[1].items())):
        raise ValueError(
            f"the weights differ in the names or shapes of {len(odd)} tensors, such as {odd[0]}: "
            f"{shapes[0].get(odd[0], 'absent')} and {shapes[1].get(odd[0], 'absent')}. Expected "
            "models fine-tuned from the same weights"
        )
