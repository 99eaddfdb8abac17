"""Six forks of a model for notebook 8, each with one fault. Solve the exercise before you read on.

Real copies of CLIP have had these faults.
"""

import copy as copies

import torch
from torch import Tensor, nn

from miniclip import CLIP, CLIPOutput


def copy(model: CLIP) -> CLIP:
    """A copy that shares no tensor with the model."""
    return copies.deepcopy(model)


def fork(model: CLIP, number: int) -> CLIP:
    """A copy with the fault of this number, 1 to 6."""
    fork = copy(model)
    with torch.no_grad():
        FAULTS[number - 1](fork)
    return fork


def another_activation(model: CLIP) -> None:
    model.vision.blocks[1].mlp.act = nn.GELU()


def another_epsilon(model: CLIP) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def a_bias_lost(model: CLIP) -> None:
    model.vision.blocks[0].attn.v_proj.bias.zero_()


def no_mask(model: CLIP) -> None:
    for block in model.text.blocks:
        block.attn.causal = False


def positions_shifted(model: CLIP) -> None:
    places = model.vision.pos_embed
    places[1:] = places[1:].roll(1, dims=0)


class WithoutExponential(CLIP):
    def forward(self, pixels: Tensor, ids: Tensor) -> CLIPOutput:
        output = super().forward(pixels, ids)
        ratio = self.logit_scale / self.logit_scale.exp()
        return output._replace(
            logits_per_image=output.logits_per_image * ratio,
            logits_per_text=output.logits_per_text * ratio,
        )


def scale_as_stored(model: CLIP) -> None:
    model.__class__ = WithoutExponential


FAULTS = (
    another_activation,
    another_epsilon,
    a_bias_lost,
    no_mask,
    positions_shifted,
    scale_as_stored,
)
