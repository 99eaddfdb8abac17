"""Arithmetic on whole sets of weights, and the parts of a tower that are trained or kept.

Models that were fine-tuned from the same weights lie in one basin: a mean of them is a model too.
Everything is added up in float64 and rounded once, to the precision of the first model's weights.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from miniclip.model import CLIP, TextTower, VisionTower


def interpolate(one: CLIP, other: CLIP, alpha: float) -> CLIP:
    """The model `alpha` of the way from one to the other: 0 is the first, 1 the second, exactly.

    WiSE-FT (Wortsman et al. 2021, arXiv 2109.01903) goes from the zero-shot to the fine-tuned
    model; an alpha outside of 0 to 1 extrapolates. Raises ValueError for models of two shapes.

    >>> from miniclip import CLIP
    >>> model = CLIP.from_pretrained("shapes")
    >>> torch.equal(interpolate(model, model, 0.5).vision.pos_embed, model.vision.pos_embed)
    True
    """
    return _combined([one, other], lambda a, b: torch.lerp(a, b, alpha))


def average(models: list[CLIP]) -> CLIP:
    """The model whose every weight is the mean of theirs.

    The uniform soup of Wortsman et al. 2022, arXiv 2203.05482. Raises ValueError for no models,
    and for models of more than one shape.

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
    """What fine-tuning added to every weight: the tuned model less the base it started from.

    Vectors are added, subtracted, negated (to forget a task) and scaled; `apply` adds one to a
    model. Ilharco et al. 2022, arXiv 2212.04089. The tensors are float64.

    >>> from miniclip import CLIP
    >>> model = CLIP.from_pretrained("shapes")
    >>> task = TaskVector.between(model, model)
    >>> (task + 0.5 * task - task).apply(model).config == model.config
    True
    """

    tensors: dict[str, Tensor]

    @classmethod
    def between(cls, base: CLIP, tuned: CLIP) -> "TaskVector":
        """The vector that leads from `base` to `tuned`. ValueError if their shapes differ."""
        _check_same_class([base, tuned])
        weights, others = _parameters(base), _parameters(tuned)
        _check_same_shapes(weights, others)
        return cls({name: others[name].double() - weights[name].double() for name in weights})

    def apply(self, model: CLIP, scale: float = 1.0) -> CLIP:
        """A new model: the one given, plus `scale` times this vector."""
        new = copied(model)
        weights = _parameters(new)
        _check_same_shapes(weights, self.tensors)
        for name, weight in weights.items():
            weight.copy_(weight.double() + scale * self.tensors[name].to(weight.device))
        return new

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
    """A tower's parameters from input to output: embedding, every block, the projection.

    The embedding's group holds what comes before the first block, the projection's the last
    LayerNorm as well. For freezing from below, or a learning rate that falls with depth.

    >>> from miniclip import CLIP
    >>> len(layer_groups(CLIP.from_pretrained("shapes").vision))  # 4 blocks
    6
    """
    groups: list[list[nn.Parameter]] = [[] for _ in range(len(tower.blocks) + 2)]
    for name, parameter in tower.named_parameters():
        part, _, rest = name.partition(".")
        is_output = part in OUTPUT
        if part not in ("blocks", *EMBEDDING, *OUTPUT):
            raise ValueError(
                f"{type(tower).__name__} has a parameter {name}: layer_groups cannot know whether "
                "it comes before the blocks or after them"
            )
        place = 1 + int(rest.partition(".")[0]) if part == "blocks" else -1 if is_output else 0
        groups[place].append(parameter)
    return groups


def freeze(tower: VisionTower | TextTower, groups: int) -> None:
    """Take the first so many of `layer_groups` out of training, and the others into it, in place.

    LiT (Zhai et al. 2021, arXiv 2111.07991) freezes the whole of a trained vision tower.

    >>> from miniclip import CLIP
    >>> tower = CLIP.from_pretrained("shapes").vision
    >>> freeze(tower, groups=1)
    >>> tower.pos_embed.requires_grad, tower.proj.weight.requires_grad
    (False, True)
    """
    parts = layer_groups(tower)
    if not 0 <= groups <= len(parts):
        raise ValueError(f"groups is {groups}; this tower has {len(parts)}: expected 0 to all")
    for i, part in enumerate(parts):
        for parameter in part:
            parameter.requires_grad_(i >= groups)


def copied(model: CLIP) -> CLIP:
    """A copy that shares no memory with the model, and has none of its forward hooks.

    Hooks belong to who registered them on the model; a copy of one could never be removed again.

    >>> from miniclip import CLIP
    >>> model = CLIP.from_pretrained("shapes")
    >>> copied(model).logit_scale.data_ptr() == model.logit_scale.data_ptr()
    False
    """
    return without_hooks(deepcopy(model))


Module = TypeVar("Module", bound=nn.Module)


def without_hooks(module: Module) -> Module:
    """The module, of whose parts none has a forward hook any more; they are cleared in place."""
    for part in module.modules():
        part._forward_hooks.clear()
    return module


def _combined(models: list[CLIP], combine: Callable[..., Tensor]) -> CLIP:
    _check_same_class(models)
    new = copied(models[0])
    sources = [_parameters(model) for model in models]
    for source in sources[1:]:
        _check_same_shapes(sources[0], source)
    for name, weight in _parameters(new).items():
        weight.copy_(combine(*(s[name].to(weight.device, torch.float64) for s in sources)))
    return new


def _check_same_class(models: list[CLIP]) -> None:
    if len({type(model) for model in models}) > 1:
        found = ", ".join(dict.fromkeys(type(model).__name__ for model in models))
        raise ValueError(f"expected models of one class, found {found}")


def _parameters(model: CLIP) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _check_same_shapes(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (one, other)]
    if odd := sorted(dict(shapes[0].items() ^ shapes[1].items())):
        raise ValueError(
            f"the two differ in the names or shapes of {len(odd)} tensors, {odd[0]} for one: "
            f"{shapes[0].get(odd[0], 'absent')} and {shapes[1].get(odd[0], 'absent')}. Expected "
            "models fine-tuned from the same weights"
        )
