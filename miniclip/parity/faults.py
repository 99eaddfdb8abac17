"""Common faults of reimplementations. `diagnosis.py` tries them in a formula, one at a time."""

import re
from collections.abc import Iterator
from functools import partial
from itertools import combinations, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.parity.formulas import (
    ACTIVATION_FORMULAS,
    EMBEDDINGS,
    Formula,
    Named,
    Side,
    Steps,
    causal_mask,
    end_of,
    no_mask,
    softmax,
    token_at,
    under,
)


def _rescaled(
    x: Tensor, eps: float, weight: Tensor, bias: Any, correction: int = 0, outside: bool = False
) -> Tensor:
    variance = x.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - correction)
    return x / (variance.sqrt() + eps if outside else (variance + eps).sqrt()) * weight + bias


def _centred(x: Tensor, *numbers: Any, **options: Any) -> Tensor:
    return _rescaled(x - x.mean(-1, keepdim=True), *numbers, **options)


def _length_with_eps(eps: float, x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True) + eps


def _last_end(stream: Tensor, ids: Tensor, end: Tensor) -> Tensor:
    is_end = ids == ids.gather(1, end[:, None])
    return token_at(stream, ids, ids.shape[1] - 1 - is_end.flip(-1).int().argmax(-1))


def _mean_to_the_end(stream: Tensor, ids: Tensor, end: Tensor) -> Tensor:
    rows = zip(stream, end.tolist(), strict=True)
    return torch.stack([row[: last + 1].mean(0) for row, last in rows])


# Each function takes the residual stream (B, T, W), the ids and the positions of the end tokens,
# and returns the pooled stream (B, W).
POOLS = {
    "pooling at the largest id": lambda x, ids, end: token_at(x, ids, ids.argmax(-1)),
    "pooling at the first token": lambda x, ids, end: x[:, 0],
    "pooling at the second token": lambda x, ids, end: x[:, 1],
    "pooling at the last token": lambda x, ids, end: x[:, -1],
    "pooling by the mean of all tokens": lambda x, ids, end: x.mean(1),
    "pooling by the mean of the patches": lambda x, ids, end: x[:, 1:].mean(1),
    "pooling by the sum of all tokens": lambda x, ids, end: x.sum(1),
    "pooling by the maximum of all tokens": lambda x, ids, end: x.amax(1),
    "pooling by the mean of a text up to its end token": _mean_to_the_end,
    "pooling at the last end token": _last_end,
    "pooling at the token before the end token": lambda x, ids, end: token_at(x, ids, end - 1),
    "pooling at the token after the end token": lambda x, ids, end: token_at(
        x, ids, (end + 1) % x.shape[1]
    ),
}
LEAST = torch.finfo(torch.float64).min
LAYER_NORMS = ("ln_pre", "ln_1", "ln_2", "ln_post", "ln_final")
BEFORE = {"ln_1": " before attention", "ln_2": " before the MLP"}
FAULTS: dict[str, dict[str, Any]] = {
    "raw": {
        "embeddings that are not normalised": EMBEDDINGS,
        "image embeddings that are not normalised": EMBEDDINGS[:1],
        "text embeddings that are not normalised": EMBEDDINGS[1:],
    },
    "length": {
        f"embeddings divided by {words}": function
        for words, function in {
            "the root of the sum of squares over the batch": lambda x: x.norm(dim=0, keepdim=True),
            "the root of the mean of squares": lambda x: x.pow(2).mean(-1, keepdim=True).sqrt(),
            "the sum of squares": lambda x: x.pow(2).sum(-1, keepdim=True),
            "the sum of absolute values": lambda x: x.abs().sum(-1, keepdim=True),
            "the largest absolute value": lambda x: x.abs().amax(-1, keepdim=True),
            **{
                f"their length plus an eps of {eps:g}": partial(_length_with_eps, eps)
                for eps in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
            },
        }.items()
    },
    "temperature": {
        "a logit scale that is not exponentiated": lambda scale: scale,
        "a logit scale that is exponentiated twice": lambda scale: scale.exp().exp(),
        "a logit scale that divides the cosines": lambda scale: (-scale).exp(),
        "a logit scale that is exponentiated with base 2": torch.exp2,
        "a logit scale that is squared": lambda scale: (2 * scale).exp(),
        "a logit scale that is clamped at 100": lambda scale: scale.exp().clamp(max=100),
        "the logit scale at the start of training": lambda scale: torch.full_like(scale, 1 / 0.07),
        "no logit scale": torch.ones_like,
    },
    "act": ACTIVATION_FORMULAS
    | {
        "quick_gelu with 1.7": lambda x: x * torch.sigmoid(1.7 * x),
        "quick_gelu twice": lambda x: ACTIVATION_FORMULAS["quick_gelu"](
            ACTIVATION_FORMULAS["quick_gelu"](x)
        ),
        "gelu twice": lambda x: F.gelu(F.gelu(x)),
        "relu squared": lambda x: F.relu(x) ** 2,
        "leaky_relu with slope 0.1": partial(F.leaky_relu, negative_slope=0.1),
        "leaky_relu with slope 0.2": partial(F.leaky_relu, negative_slope=0.2),
        "identity": lambda x: x,
    }
    | {
        name: getattr(F, name)
        for name in "relu leaky_relu silu elu selu mish hardswish softplus sigmoid tanh".split()
    },
    "eps": {f"{eps:g}": eps for eps in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 0.0)},
    "norm": {
        "LayerNorm with the unbiased variance": partial(_centred, correction=1),
        "LayerNorm with eps outside the root": partial(_centred, outside=True),
        "LayerNorm with the unbiased variance and eps outside the root": partial(
            _centred, correction=1, outside=True
        ),
        "LayerNorm over all tokens together": lambda x, eps, weight, bias: (
            F.layer_norm(x, x.shape[1:], eps=eps) * weight + bias
        ),
        "RMSNorm instead of LayerNorm": _rescaled,
        "RMSNorm without bias instead of LayerNorm": lambda x, eps, w, b: _rescaled(x, eps, w, 0.0),
    },
    "norms": {f"no {name}{BEFORE.get(name, '')}": {name: 0} for name in LAYER_NORMS}
    | {f"{name} twice": {name: 2} for name in LAYER_NORMS},
    "early": {f"{name} before the first block": name for name in LAYER_NORMS},
    # Each function takes a tensor of ones (B, H, T, T) and the end positions. It returns True for
    # hidden keys.
    "mask": {
        "no causal mask": no_mask,
        "a causal mask": causal_mask,
        "a causal mask that hides earlier tokens": lambda ones, end: ones.tril(-1).bool(),
        "a causal mask that hides a token from itself": lambda ones, end: ones.triu(0).bool(),
        "a causal mask that shows the next token": lambda ones, end: ones.triu(2).bool(),
        "a mask that also hides tokens after the end token": lambda ones, end: (
            ones.triu(1).bool() | (torch.arange(ones.shape[-1]) > end[:, None])[:, None, None]
        ),
    },
    "softmax": {  # the pattern, given the scores (B, H, T, T) and the hidden keys
        "a softmax over queries, not keys": lambda s, h: s.masked_fill(h, LEAST).softmax(-2),
        "a softmax over heads, not keys": lambda s, h: s.masked_fill(h, LEAST).softmax(1),
        "a softmax with 1 added to its denominator": lambda s, hidden: F.pad(
            s.masked_fill(hidden, LEAST), (0, 1)
        ).softmax(-1)[..., :-1],
        "a sigmoid in the place of the softmax": lambda s, hidden: s.sigmoid() * ~hidden,
        "a causal mask that comes after the softmax": lambda s, hidden: s.softmax(-1) * ~hidden,
        **{
            f"masked scores of {score}, not of -inf": partial(softmax, score=score)
            for score in (0, -1, -10, -100)
        },
    },
    "scale": {
        "scores that are not scaled": lambda head_width, width: 1.0,
        "scores divided by the head width, not by its root": lambda d, width: 1 / d,
        "scores multiplied by the root of the head width": lambda d, width: d**0.5,
        "scores divided by the root of the width, not of the head width": lambda d, w: w**-0.5,
        "scores divided by the root of the number of heads": lambda d, width: (width / d) ** -0.5,
    },
    "qk": {"q and k exchanged": ("k", "q")},
    "turned": {"a pattern that is transposed": lambda pattern: pattern.mT},
    "interleaved": {"heads that are split as (D, H), not (H, D)": True},
    "joined": {
        "heads that are joined as (D, H), not (H, D)": lambda z: z.permute(0, 2, 3, 1).flatten(2),
        "heads that are joined without being transposed": lambda z: z.reshape(
            len(z), z.shape[2], -1
        ),
    },
    "mlp_reads": {
        "ln_1 before the MLP, not ln_2": (("resid_pre", "attn_out"), "ln_1"),
        "the MLP parallel to attention, not after it": (("resid_pre",), "ln_2"),
        "the MLP parallel to attention, after the same ln_1": (("resid_pre",), "ln_1"),
        "no residual connection around attention": (("attn_out",), "ln_2"),
        "a residual connection from ln_1's output, not its input": (("ln_1", "attn_out"), "ln_2"),
    },
    "resid_post": {
        "a residual connection from ln_2's output, not its input": ("ln_2", "mlp_out"),
        "no residual connection around the MLP": ("mlp_out",),
        "no MLP in the residual stream": ("resid_pre", "attn_out"),
        "no attention in the residual stream": ("resid_pre", "mlp_out"),
    },
    "pixels": {
        "the colours in the order BGR": lambda x: x.flip(1),
        "rows and columns of pixels exchanged": lambda x: x.mT,
        "pixels that are mirrored": lambda x: x.flip(-1),
        "pixels that are upside down": lambda x: x.flip(-2),
        "pixels that are multiplied by 255": lambda x: x * 255,
        "pixels that are divided by 255": lambda x: x / 255,
        "pixels that are rescaled from 0..1 to -1..1 once more": lambda x: 2 * x - 1,
    },
    "patches": {  # (B, W, rows, columns) -> (B, P, W)
        "patches column by column, not row by row": lambda x: x.mT.flatten(2).mT,
        "patches that are reshaped, not transposed": lambda x: x.reshape(len(x), -1, x.shape[1]),
    },
    "class_last": {"the class token last": True},
    "token_scale": {
        "token embeddings multiplied by the root of the width": lambda width: width**0.5
    },
    "pool": {words: (pool, False) for words, pool in POOLS.items()}
    | {f"{words}, before the last LayerNorm": (pool, True) for words, pool in POOLS.items()},
}
"""For each step of a formula: a dictionary from a fault's description to the faulty step."""


class Noted(dict):
    """A dictionary that remembers which of its keys were read."""

    def __getitem__(self, key: str) -> Any:
        self.read = getattr(self, "read", set()) | {key}
        return super().__getitem__(key)


def names_read(formula: Formula) -> tuple[set[str], set[str]]:
    """Return the names of the weights and the names of the steps that a formula uses."""
    w, steps = Noted(formula.w), Noted(formula.steps)
    formula._replace(w=w, steps=steps).compute()
    return getattr(w, "read", set()), getattr(steps, "read", set())


def faults(formula: Formula, source: Side, target: Side) -> Iterator[tuple[str, Named, Steps]]:
    """Yield each possible fault of a formula as (description, changed weights, changed steps)."""
    read, steps_read = names_read(formula)
    tower = formula.site.partition(".")[0]
    config: Any = getattr(source.config, tower, None)
    planted = FAULTS | (_faults_of_configs(formula, config, target) if config else {})
    for step, table in planted.items():
        if step in steps_read:
            yield from ((fault, {}, {step: value}) for fault, value in table.items())
    for fault, weights in _faults_of_weights(formula.w, read, getattr(config, "grid", None)):
        yield fault, weights, {}
    if match := re.match(r"(\w+\.blocks)\.(\d+)\.", formula.site):
        for i in range(config.layers):
            if i != int(match[2]) and (weights := under(f"{match[1]}.{i}.", source.weights)):
                yield f"the weights of block {i}", weights, {}


def _faults_of_configs(formula: Formula, config: Any, target: Side) -> dict[str, dict[str, Any]]:
    """Return the faults that depend on the tower's config, or on the model `target`."""
    tower = formula.site.partition(".")[0]
    peer = getattr(target.config, tower)
    head_width = formula.steps["head_width"]
    widths = {2 * head_width, head_width // 2}
    if formula.site.endswith(".pattern"):
        widths = {config.width // target.tensors[formula.site].shape[1]}
    pools = FAULTS["pool"]
    if tower == "text":

        def at_their_end(stream: Tensor, ids: Tensor, end: Tensor) -> Tensor:
            return token_at(stream, ids, end_of(ids, peer))

        pools = {f"the end token {peer.eos_token_id}": (at_their_end, False)} | pools
    return {
        "act": {f"the activation {a} instead of {config.act}": f for a, f in FAULTS["act"].items()},
        "eps": {
            f"a LayerNorm eps of {eps:g} instead of {config.ln_eps:g}": eps
            for eps in (peer.ln_eps, *FAULTS["eps"].values())
        },
        "head_width": {
            f"heads of width {w} instead of {head_width}": w for w in widths - {0, head_width}
        },
        "before": {
            f"the residual stream after block {i} as this site's input": f"after {i}"
            for i in range(config.layers)
        },
        "pool": pools,
    }


def _faults_of_weights(
    w: Named, read: set[str], grid: tuple[int, int] | None
) -> Iterator[tuple[str, Named]]:
    """Yield faults of the weights named in `read`. `grid` is (rows, columns) of patches."""
    modules = sorted(name.removesuffix(".bias") for name in read if name.endswith(".bias"))
    for count in range(1, len(modules) + 1):
        for some in combinations(modules, count):
            zeros = {f"{name}.bias": torch.zeros_like(w[f"{name}.bias"]) for name in some}
            yield f"no bias in {' and '.join(some)}", zeros
    for name in sorted(read):
        if w[name].ndim > 1 and not re.search("token_embed|pos_embed", name):
            yield f"{name} transposed", {name: w[name].mT.reshape(w[name].shape)}
        if re.fullmatch(r"ln_\w+\.weight", name):
            ones, bias = {name: torch.ones_like(w[name])}, name.replace("weight", "bias")
            yield f"no weight in {name[:-7]}", ones
            yield f"no weight and bias in {name[:-7]}", ones | {bias: torch.zeros_like(w[bias])}
            yield f"1 added to {name}", {name: w[name] + 1}
    for one, two in combinations(w, 2):
        if w[one].shape != w[two].shape or read.isdisjoint((one, two)):
            continue
        if one.endswith(".weight") and two.endswith(".weight"):
            a, b = one[:-7], two[:-7]
            named = product(((a, b), (b, a)), (".weight", ".bias"))
            yield (
                f"{a} and {b} swapped",
                {x + kind: w[y + kind] for (x, y), kind in named if y + kind in w},
            )
        yield f"{one} and {two} swapped", {one: w[two], two: w[one]}
    if "pos_embed" in read:
        for fault, positions in _wrong_positions(w["pos_embed"], grid):
            yield fault, {"pos_embed": positions}
    if "class_embed" in read:
        yield "no embedding of the class token", {"class_embed": torch.zeros_like(w["class_embed"])}
    for dtype in ROUNDINGS[:2]:
        rounded = {name: w[name].to(dtype).double() for name in read}
        yield f"weights rounded to {dtype_name(dtype)}", rounded


def _wrong_positions(
    positions: Tensor, grid: tuple[int, int] | None
) -> Iterator[tuple[str, Tensor]]:
    yield "no position embedding", torch.zeros_like(positions)
    yield "position embeddings that are added twice", 2 * positions
    for count, words in enumerate(("one", "two", "three"), 1):
        for shift in (-count, count):
            yield f"positions that are shifted by {words}", positions.roll(shift, 0)
    yield "positions in reverse order", positions.flip(0)
    yield "no position for the first token", torch.cat([0 * positions[:1], positions[1:]])
    if grid:
        first, patches = positions[:1], positions[1:].unflatten(0, grid)  # (rows, columns, W)
        for fault, moved in (
            ("patch positions that are shifted by one", positions[1:].roll(1, 0)),
            ("patch positions that are shifted by one", positions[1:].roll(-1, 0)),
            ("rows and columns of positions exchanged", patches.transpose(0, 1)),
            ("positions that are mirrored", patches.flip(1)),
            ("positions that are upside down", patches.flip(0)),
            ("patch positions in reverse order", patches.flip(0, 1)),
        ):
            yield fault, torch.cat([first, moved.reshape(positions[1:].shape)])


ROUNDINGS = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
