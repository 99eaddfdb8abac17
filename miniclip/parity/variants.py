"""Steps of a CLIP, each the right way and in the ways that other implementations have them.

A key is what a report says. The diagnosis plants these in the formulas.
"""

from collections.abc import Callable, Mapping
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

Named = Mapping[str, Tensor]


Pool = Callable[[Tensor, Named], Tensor]  # the stream (B, T, W) and the inputs -> (B, W)


def pool_at(position: Callable[[Tensor], Tensor]) -> Pool:
    return lambda stream, x: stream[torch.arange(len(stream)), position(x["ids"])]


ACTIVATION_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu of 1.7": lambda x: x * torch.sigmoid(1.7 * x),
    "quick_gelu twice": lambda x: reduce(lambda y, _: y * torch.sigmoid(1.702 * y), range(2), x),
    "gelu twice": lambda x: F.gelu(F.gelu(x)),
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x) ** 2,
    "leaky_relu": F.leaky_relu,
    "leaky_relu of 0.1": partial(F.leaky_relu, negative_slope=0.1),
    "leaky_relu of 0.2": partial(F.leaky_relu, negative_slope=0.2),
    "silu": F.silu,
    "elu": F.elu,
    "selu": F.selu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


NORMS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "LayerNorm with the unbiased variance": lambda x, eps: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + eps).sqrt()
    ),
    "LayerNorm with eps outside the root": lambda x, eps: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0).sqrt() + eps)
    ),
    "LayerNorm with the unbiased variance and eps outside the root": lambda x, eps: (
        (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + eps)
    ),
    "RMSNorm for LayerNorm": lambda x, eps: x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt(),
    "LayerNorm over all tokens together": lambda x, eps: F.layer_norm(x, x.shape[1:], eps=eps),
}


MASKS: dict[str, Callable[[Tensor, Named], Tensor]] = {  # from ones (B, H, T, T): what is hidden
    "no causal mask": lambda ones, x: ones.bool().logical_not(),
    "a causal mask": lambda ones, x: ones.triu(1).bool(),
    "a causal mask the wrong way round": lambda ones, x: ones.tril(-1).bool(),
    "a causal mask that hides a token from itself": lambda ones, x: ones.triu(0).bool(),
    "a causal mask that shows the next token": lambda ones, x: ones.triu(2).bool(),
}


SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "a softmax over queries, not keys": lambda scores: scores.softmax(-2),
    "a softmax over heads, not keys": lambda scores: scores.softmax(1),
    "a softmax with 1 added to its sum": lambda scores: F.pad(scores, (0, 1)).softmax(-1)[..., :-1],
    "a sigmoid in the place of the softmax": torch.sigmoid,
}


POOLS: dict[str, Pool] = {
    "the first token": lambda stream, x: stream[:, 0],
    "the second token": lambda stream, x: stream[:, 1],
    "the last token": lambda stream, x: stream[:, -1],
    "the mean of all tokens": lambda stream, x: stream.mean(1),
    "the mean of the patches": lambda stream, x: stream[:, 1:].mean(1),
    "the sum of all tokens": lambda stream, x: stream.sum(1),
    "the largest of all tokens": lambda stream, x: stream.amax(1),
}


def _length_with_eps(eps: float, x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True) + eps


LENGTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "the root of the sum of squares": lambda x: x.norm(dim=-1, keepdim=True),
    "the root of the sum over the batch": lambda x: x.norm(dim=0, keepdim=True),
    "the root of the mean of squares": lambda x: x.pow(2).mean(-1, keepdim=True).sqrt(),
    "the sum of squares": lambda x: x.pow(2).sum(-1, keepdim=True),
    "the sum of absolute values": lambda x: x.abs().sum(-1, keepdim=True),
    "the largest absolute value": lambda x: x.abs().amax(-1, keepdim=True),
    **{
        f"their length and an eps of {eps:g}": partial(_length_with_eps, eps)
        for eps in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
    },
}


TEMPERATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "a logit scale that is not exponentiated": lambda scale: scale,
    "a logit scale that is exponentiated twice": lambda scale: scale.exp().exp(),
    "a logit scale that divides": lambda scale: (-scale).exp(),
    "a logit scale that is a power of 2": torch.exp2,
    "a logit scale that is squared": lambda scale: (2 * scale).exp(),
    "a logit scale that is cut at 100": lambda scale: scale.exp().clamp(max=100),
    "the logit scale that training begins with": lambda scale: torch.full_like(scale, 1 / 0.07),
    "no logit scale": torch.ones_like,
}


PIXELS: dict[str, Callable[[Tensor], Tensor]] = {
    "the colours in the order BGR": lambda x: x.flip(1),
    "rows and columns of pixels exchanged": lambda x: x.mT,
    "pixels that are mirrored": lambda x: x.flip(-1),
    "pixels that are upside down": lambda x: x.flip(-2),
    "pixels that are multiplied by 255": lambda x: x * 255,
    "pixels that are divided by 255": lambda x: x / 255,
    "pixels that are brought from 0..1 to -1..1 once more": lambda x: 2 * x - 1,
}


PATCHES: dict[str, Callable[[Tensor], Tensor]] = {  # (B, W, rows, columns) -> (B, P, W)
    "patches in the order of columns": lambda x: x.mT.flatten(2).mT,
    "patches that are reshaped, not transposed": lambda x: x.reshape(len(x), -1, x.shape[1]),
}
