"""Each entry of the diagnosis' tables computes the numbers of a model with its fault.

Parity names the fault. The tests use NumPy, torch or transformers to compute the numbers of each
fault. They do not run a faulty model. Instead, a test takes the tensors of a correct run, and
replaces one of them.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.activations import ACT2FN
from twin import TINY, twins

from miniclip import ImageTransform, Tokenizer
from miniclip.parity import compare, comparison, pixels
from miniclip.parity.diagnosis import cause_in_model, differing_weights
from miniclip.parity.faults import FAULTS, POOLS
from miniclip.parity.pixels import cause_in_pixels
from miniclip.parity.tokens import cause_in_tokens

# ------------------------------------------------------------------------------------ the formulas

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
D, EPS = X - X.mean(-1, keepdim=True), 0.1
LEAST, MOST = -torch.inf, torch.inf
QUICK = ACT2FN["quick_gelu"]
ONES, END = torch.ones(1, 1, 3, 3), torch.tensor([1])
E = X.exp()
HIDDEN = torch.eye(4, 6).bool()  # the same mask for all three heads
M = E.masked_fill(HIDDEN, 0)
IDS, ENDS = torch.tensor([[0, 7, 9, 7], [7, 0, 0, 0], [0, 0, 7, 1]]), torch.tensor([1, 0, 2])
W, B = torch.linspace(1, 2, 6).double(), torch.linspace(3, 4, 6).double()


def shares(x):
    return x / x.sum(2, True)


TABLES = {
    "act": ((X,), {
        **{name: ACT2FN[name](X) for name in (
            "quick_gelu", "gelu", "gelu_pytorch_tanh", "relu", "leaky_relu", "silu", "mish",
            "sigmoid", "tanh",
        )},
        "quick_gelu with 1.7": X / (1 + (-1.7 * X).exp()),
        "quick_gelu twice": QUICK(QUICK(X)),
        "gelu twice": ACT2FN["gelu"](ACT2FN["gelu"](X)),
        "relu squared": ACT2FN["relu2"](X),
        "leaky_relu with slope 0.1": X.where(X > 0, 0.1 * X),
        "leaky_relu with slope 0.2": X.where(X > 0, 0.2 * X),
        "elu": X.where(X > 0, E - 1),
        "selu": 1.0507009873554805 * X.where(X > 0, 1.6732632423543772 * (E - 1)),
        "hardswish": X * (X + 3).clamp(0, 6) / 6,
        "softplus": (1 + E).log(),
        "identity": X,
    }),
    "norm": ((X, EPS, W, B), {
        "LayerNorm with the unbiased variance":
            D / (D.square().sum(-1, True) / 5 + EPS).sqrt() * W + B,
        "LayerNorm with eps outside the root":
            D / ((D.square().sum(-1, True) / 6).sqrt() + EPS) * W + B,
        "LayerNorm with the unbiased variance and eps outside the root":
            D / ((D.square().sum(-1, True) / 5).sqrt() + EPS) * W + B,
        "RMSNorm instead of LayerNorm": X / (X.square().sum(-1, True) / 6 + EPS).sqrt() * W + B,
        "RMSNorm without bias instead of LayerNorm":
            X / (X.square().sum(-1, True) / 6 + EPS).sqrt() * W,
        "LayerNorm over all tokens together": W * (X - X.mean((1, 2), True))
            / (X.var((1, 2), correction=0, keepdim=True) + EPS).sqrt() + B,
    }),
    "mask": ((ONES, END), {
        "no causal mask": torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        "a causal mask": torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]]),
        "a causal mask that hides earlier tokens": torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0]]),
        "a causal mask that hides a token from itself":
            torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]]),
        "a causal mask that shows the next token": torch.tensor([[0, 0, 1], [0, 0, 0], [0, 0, 0]]),
        "a mask that also hides tokens after the end token":
            torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 1]]),
    }),
    "softmax": ((X[None], HIDDEN), {
        "a softmax over queries, not keys": (M / M.sum(1, True))[None],
        "a softmax over heads, not keys":
            torch.where(HIDDEN, 1 / 3, E / E.sum(0, True))[None],  # 1 / 3 if all heads are masked
        "a softmax with 1 added to its denominator": (M / (1 + M.sum(2, True)))[None],
        "a sigmoid in the place of the softmax": (M / (1 + M))[None],
        "a causal mask that comes after the softmax": (M / E.sum(2, True))[None],
        **{
            f"masked scores of {score}, not of -inf":
                shares(X.masked_fill(HIDDEN, score).exp())[None]
            for score in (0, -1, -10, -100)
        },
    }),
    "scale": ((16, 64), {
        "scores that are not scaled": 1,
        "scores divided by the head width, not by its root": 1 / 16,
        "scores multiplied by the root of the head width": 4,
        "scores divided by the root of the width, not of the head width": 1 / 8,
        "scores divided by the root of the number of heads": 1 / 2,
    }),
    "pool": ((X, IDS, ENDS), {
        "pooling at the first token": X[:, 0],
        "pooling at the second token": X[:, 1],
        "pooling at the last token": X[:, 3],
        "pooling by the mean of all tokens": (X[:, 0] + X[:, 1] + X[:, 2] + X[:, 3]) / 4,
        "pooling by the mean of the patches": (X[:, 1] + X[:, 2] + X[:, 3]) / 3,
        "pooling by the sum of all tokens": X[:, 0] + X[:, 1] + X[:, 2] + X[:, 3],
        "pooling by the maximum of all tokens": torch.from_numpy(X.numpy().max(1)),
        "pooling by the mean of a text up to its end token":
            torch.stack([(X[0, 0] + X[0, 1]) / 2, X[1, 0], (X[2, 0] + X[2, 1] + X[2, 2]) / 3]),
        "pooling at the largest id": torch.stack([X[0, 2], X[1, 0], X[2, 2]]),
        "pooling at the last end token": torch.stack([X[0, 3], X[1, 0], X[2, 2]]),
        "pooling at the token before the end token":
            torch.stack([X[0, 0], X[1, 3], X[2, 1]]),
        "pooling at the token after the end token":
            torch.stack([X[0, 2], X[1, 1], X[2, 3]]),
    }),
    "length": ((X[0],), {
        f"embeddings divided by {words}": divisor
        for words, divisor in {
            "the root of the sum of squares over the batch": (X[0] * X[0]).sum(0, True).sqrt(),
            "the root of the mean of squares": ((X[0] * X[0]).sum(1, True) / 6).sqrt(),
            "the sum of squares": (X[0] * X[0]).sum(1, True),
            "the sum of absolute values": X[0].abs().sum(1, True),
            "the largest absolute value": torch.from_numpy(X[0].abs().numpy().max(1)[:, None]),
            **{
                f"their length plus an eps of {eps}": (X[0] * X[0]).sum(1, True).sqrt() + float(eps)
                for eps in ("0.001", "0.0001", "1e-05", "1e-06", "1e-07", "1e-08")
            },
        }.items()
    }),
    "temperature": ((torch.tensor(5.0, dtype=torch.float64),), {
        "a logit scale that is not exponentiated": 5,
        "a logit scale that is exponentiated twice": math.exp(math.exp(5)),
        "a logit scale that divides the cosines": 1 / math.exp(5),
        "a logit scale that is exponentiated with base 2": 32,
        "a logit scale that is squared": math.exp(5) ** 2,
        "a logit scale that is clamped at 100": 100,
        "the logit scale at the start of training": 1 / 0.07,
        "no logit scale": 1,
    }),
    "pixels": ((X[None],), {
        "the colours in the order BGR": X[None, [2, 1, 0]],
        "rows and columns of pixels exchanged": torch.from_numpy(X.numpy().swapaxes(1, 2))[None],
        "pixels that are mirrored": X[None, :, :, [5, 4, 3, 2, 1, 0]],
        "pixels that are upside down": X[None, :, [3, 2, 1, 0]],
        "pixels that are multiplied by 255": X[None] * 255,
        "pixels that are divided by 255": X[None] / 255,
        "pixels that are rescaled from 0..1 to -1..1 once more": (X[None] - 0.5) / 0.5,
    }),
    "patches": ((X[None],), {  # three numbers for each of 4 x 6 patches
        "patches column by column, not row by row":
            torch.stack([X[:, row, column] for column in range(6) for row in range(4)])[None],
        "patches that are reshaped, not transposed": X.flatten().unflatten(0, (24, 3))[None],
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_each_entry_of_a_fault_table_computes_what_its_name_says(name):
    given, expected = TABLES[name]
    table = POOLS if name == "pool" else FAULTS[name]
    assert table.keys() == expected.keys()
    for entry, function in table.items():
        found, right = (
            torch.as_tensor(x, dtype=torch.float64) for x in (function(*given), expected[entry])
        )
        assert near(found, right), entry


def near(one, other):
    return ((one - other).abs() <= 1e-12 * other.abs().clamp(min=1)).all()


# -------------------------------------------------------------------------- faults in the model

V, T = "vision.blocks.0", "text.blocks.0"


@pytest.fixture(scope="module")
def side():
    """A model's tensors and weights, as `compare` passes them to the diagnosis."""
    sides = []
    right = twins(TINY)[0]
    wrong = twins(TINY, seed=1)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "cause_in_model", lambda site, *both: sides.append(both) or "")
        compare(wrong, right)
    return sides[0][1]


class Seen:
    """A model's tensors and weights, and the steps that compute one tensor from another."""

    def __init__(self, side):
        self.t, self.w = side.tensors, {name: w.double() for name, w in side.weights.items()}
        self.ids = side.tensors["ids"]
        self.end = (self.ids == 599).int().argmax(1)
        self.rows = torch.arange(len(self.ids))

    def norm(self, x, name, eps=None):
        eps = eps if eps is not None else 2e-5 if name.startswith("vision") else 1e-5
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def heads(self, name, count=None):
        """Split a tensor into heads, (B, H, T, D)."""
        x = self.t[name]
        count = count or (4 if name.startswith("vision") else 2)
        return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)

    def scores(self, block, count=None):
        q, k = (self.heads(f"{block}.{name}", count) for name in "qk")
        return q @ k.transpose(2, 3) / q.shape[3] ** 0.5

    def future(self):
        return torch.ones(self.ids.shape[1], self.ids.shape[1]).triu(1).bool()

    def attended(self, block, pattern, count=None):
        z = (pattern @ self.heads(f"{block}.v", count)).transpose(1, 2).flatten(2)
        return F.linear(
            z, self.w[f"{block}.attn.out_proj.weight"], self.w[f"{block}.attn.out_proj.bias"]
        )

    def middle(self, block):
        return self.t[f"{block}.resid_pre"] + self.t[f"{block}.attn_out"]

    def fed(self, block, norm_2):
        w = {name.removeprefix(f"{block}.mlp."): w for name, w in self.w.items()}
        hidden = QUICK(F.linear(norm_2, w["fc1.weight"], w["fc1.bias"]))
        return F.linear(hidden, w["fc2.weight"], w["fc2.bias"])

    def images(self, pixels=lambda x: x, positions=lambda x: x):
        w = self.w["vision.patch_embed.weight"]
        patches = (
            F.conv2d(pixels(self.t["pixels"].double()), w, stride=8).flatten(2).transpose(1, 2)
        )
        first = self.w["vision.class_embed"].expand(len(patches), 1, -1)
        return torch.cat([first, patches], 1) + positions(self.w["vision.pos_embed"])

    def texts(self, positions):
        words = self.w["text.token_embed.weight"][self.ids]
        return words + positions(self.w["text.pos_embed"])[: self.ids.shape[1]]

    def logits(self, scale=None, images=lambda x: x / x.norm(dim=1, keepdim=True), texts=None):
        scale = self.w["logit_scale"].exp() if scale is None else scale  # about 100
        one, other = self.t["vision.projected"], self.t["text.projected"]
        return scale * images(one) @ (texts or images)(other).T

    def read(self):
        """The texts' last residual stream, after ln_final."""
        return self.norm(self.t["text.blocks.1.resid_post"], "text.ln_final")


def of_patches(order):
    """A function that reorders the patches' position embeddings. `order` gets a grid (5, 5, W)."""
    return lambda x: torch.cat([x[:1], order(x[1:].reshape(5, 5, -1)).reshape(25, -1)])


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def one_in(x, *places, by=0.1):
    """Return a copy of `x` with noise only at the index `places`."""
    x, noise = x.clone(), torch.Generator().manual_seed(1)
    x[places] += by * torch.randn(x[places].shape, generator=noise, dtype=x.dtype)
    return x


FOUND = {
    **{
        f"vision.blocks.0.resid_pre | a LayerNorm eps of {eps:g} instead of 2e-05":
            lambda s, eps=eps: s.norm(s.t["vision.embeddings"], "vision.ln_pre", eps)
        for eps in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12)
    },
    "vision.embeddings | rows and columns of pixels exchanged":
        lambda s: s.images(lambda x: x.transpose(2, 3)),
    "vision.embeddings | pixels that are upside down": lambda s: s.images(lambda x: x.flip(2)),
    "vision.embeddings | pixels that are divided by 255": lambda s: s.images(lambda x: x / 255),
    "vision.embeddings | pixels that are rescaled from 0..1 to -1..1 once more":
        lambda s: s.images(lambda x: (x - 0.5) / 0.5),
    "vision.embeddings | no position embedding": lambda s: s.images(positions=lambda x: 0 * x),
    "vision.embeddings | position embeddings that are added twice":
        lambda s: s.images(positions=lambda x: x + x),
    **{
        f"text.embeddings | positions that are shifted by {words} ":
            lambda s, n=n: s.texts(lambda x: torch.cat([x[-n:], x[:-n]]))
        for n, words in ((1, "one"), (2, "two"), (3, "three"))
    },
    **{
        f"text.embeddings | positions that are shifted by {words}":
            lambda s, n=n: s.texts(lambda x: torch.cat([x[n:], x[:n]]))
        for n, words in ((1, "one"), (2, "two"), (3, "three"))
    },
    "text.embeddings | positions in reverse order": lambda s: s.texts(lambda x: x.flip(0)),
    "vision.embeddings | patch positions that are shifted by one":
        lambda s: s.images(positions=of_patches(lambda x: x.flatten(0, 1).roll(1, 0))),
    "vision.embeddings | patch positions that are shifted by one ":
        lambda s: s.images(positions=of_patches(lambda x: x.flatten(0, 1).roll(-1, 0))),
    "vision.embeddings | positions that are upside down":
        lambda s: s.images(positions=of_patches(lambda x: x.flip(0))),
    "vision.embeddings | positions that are mirrored":
        lambda s: s.images(positions=of_patches(lambda x: x.flip(1))),
    "vision.embeddings | patch positions in reverse order":
        lambda s: s.images(positions=of_patches(lambda x: x.flip(0, 1))),
    f"{V}.pattern | a softmax with 1 added to its denominator":
        lambda s: s.scores(V).exp() / (1 + s.scores(V).exp().sum(3, keepdim=True)),
    f"{V}.pattern | scores multiplied by the root of the head width":
        lambda s: (12 * s.scores(V)).softmax(3),
    f"{V}.pattern | scores divided by the root of the width, not of the head width":
        lambda s: (s.scores(V) / 4**0.5).softmax(3),
    f"{V}.pattern | scores divided by the root of the number of heads":
        lambda s: (s.scores(V) * 12**0.5 / 4**0.5).softmax(3),
    f"{V}.pattern | heads that are split as (D, H), not (H, D)":
        lambda s: torch.stack([
            s.t[f"{V}.q"][..., h::4] @ s.t[f"{V}.k"][..., h::4].mT / 12**0.5 for h in range(4)
        ], 1).softmax(3),
    f"{T}.pattern | a causal mask that comes after the softmax":
        lambda s: s.scores(T).softmax(3) * ~s.future(),
    **{
        f"{T}.pattern | masked scores of {score}, not of -inf":
            lambda s, score=score: s.scores(T).masked_fill(s.future(), score).softmax(3)
        for score in (0, -1, -10)
    },
    f"{T}.pattern | a mask that also hides tokens after the end token":
        lambda s: s.scores(T).masked_fill(
            s.future() | (s.rows.new_tensor(range(17)) > s.end[:, None])[:, None, None], -math.inf
        ).softmax(3),
    f"{V}.attn_out | heads of width 24 instead of 12":
        lambda s: s.attended(V, s.scores(V, 2).softmax(3), 2),
    f"{V}.attn_out | heads of width 6 instead of 12":
        lambda s: s.attended(V, s.scores(V, 8).softmax(3), 8),
    f"{T}.mlp_out | no weight and bias in ln_2":
        lambda s: s.fed(T, F.layer_norm(s.middle(T), (40,), eps=1e-5)),
    f"{T}.mlp_out | 1 added to ln_2.weight":
        lambda s: s.fed(T, s.norm(s.middle(T), f"{T}.ln_2")
                        + F.layer_norm(s.middle(T), (40,), eps=1e-5)),
    f"{V}.resid_post | a residual connection from ln_2's output, not its input":
        lambda s: s.norm(s.middle(V), f"{V}.ln_2") + s.t[f"{V}.mlp_out"],
    f"{V}.resid_post | no MLP in the residual stream": lambda s: s.middle(V),
    f"{V}.resid_post | no attention in the residual stream":
        lambda s: s.t[f"{V}.resid_pre"] + s.t[f"{V}.mlp_out"],
    f"{V}.resid_post | no residual connection around the MLP": lambda s: +s.t[f"{V}.mlp_out"] + 0,
    f"{V}.resid_post | the sum 1 resid_pre + 0.5 attn_out + 2 mlp_out":
        lambda s: s.t[f"{V}.resid_pre"] + s.t[f"{V}.attn_out"] / 2 + 2 * s.t[f"{V}.mlp_out"],
    "text.pooled | pooling at the first token": lambda s: s.read()[:, 0],
    "text.pooled | pooling at the last token": lambda s: s.read()[:, 16],
    "text.pooled | pooling at the token before the end token":
        lambda s: s.read()[s.rows, s.end - 1],
    "text.pooled | pooling at the token after the end token":
        lambda s: s.read()[s.rows, (s.end + 1) % 17],
    "text.pooled | pooling by the mean of a text up to its end token":
        lambda s: torch.stack([s.read()[i, : s.end[i] + 1].mean(0) for i in range(8)]),
    "text.pooled | pooling at the second token": lambda s: s.read()[:, 1],
    "text.pooled | pooling by the sum of all tokens": lambda s: s.read().sum(1),
    "text.pooled | pooling by the maximum of all tokens, before the last LayerNorm":
        lambda s: s.norm(s.t["text.blocks.1.resid_post"].amax(1), "text.ln_final"),
    "logits | a logit scale that is not exponentiated": lambda s: s.logits(s.w["logit_scale"]),
    "logits | a logit scale that is exponentiated with base 2":
        lambda s: s.logits(2 ** s.w["logit_scale"]),
    "logits | the logit scale at the start of training": lambda s: s.logits(1 / 0.07),
    "logits | no logit scale": lambda s: s.logits(1),
    "logits | embeddings that are not normalised": lambda s: s.logits(images=lambda x: x),
    "logits | image embeddings that are not normalised":
        lambda s: s.logits(images=lambda x: x, texts=unit),
    "logits | text embeddings that are not normalised":
        lambda s: s.logits(images=unit, texts=lambda x: x),
    "logits | embeddings divided by the root of the mean of squares":
        lambda s: s.logits(images=lambda x: 6 * unit(x)),
    "logits | embeddings divided by the largest absolute value":
        lambda s: s.logits(images=lambda x: x / x.abs().max(1, keepdim=True)[0]),
    "logits | a softmax of logits": lambda s: s.logits().softmax(1),
    "logits | -10 added to logits": lambda s: s.logits() - 10,
    "logits | logits multiplied by 0.5": lambda s: s.logits() / 2,
    "text.projected | text.projected with batch rows in the wrong place: 0 to 1 and 4":
        lambda s: s.t["text.projected"][[4, 0, 2, 3, 1, 5, 6, 7]],
    f"{T}.q | the same vector added to each token, as a bias would be":
        lambda s: s.t[f"{T}.q"] + torch.arange(40.0).double(),
    "vision.embeddings | the same vector added to each patch, but not to the first token, "
    "as a bias would be":
        lambda s: s.images() + (torch.arange(26)[:, None] > 0) * torch.arange(48.0).double(),
    "text.projected | the same vector added to each row of text.projected, as a bias would be":
        lambda s: s.t["text.projected"] + torch.arange(36.0).double(),
    **{
        f"{V}.mlp_out | {V}.mlp_out rounded to {dtype}, in the float64 run too":
            lambda s, dtype=dtype: s.t[f"{V}.mlp_out"].to(getattr(torch, dtype)).double()
        for dtype in ("float8_e4m3fn", "bfloat16", "float16", "float32")
    },
}  # fmt: skip


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", FOUND)
def test_a_report_names_each_fault_of_a_model(name, side):
    site, cause = name.split(" | ")
    wrong = side._replace(tensors={**side.tensors, site: FOUND[name](Seen(side))})
    assert cause_in_model(site, wrong, side) == f"model has {cause.strip()}"
    assert cause_in_model(site, side, wrong) == f"other has {cause.strip()}"


def test_a_report_names_pooling_at_the_largest_token_id(side):
    """In OpenAI's vocabulary the end token has the largest id. Here its id is 300."""
    ids = side.tensors["ids"]
    ids = ids.masked_fill(ids == 300, 301).masked_fill(ids == 599, 300)
    config = replace(side.config, text=replace(side.config.text, eos_token_id=300))
    read, rows = Seen(side).read(), torch.arange(8)
    tensors = {**side.tensors, "ids": ids}
    right, wrong = (
        side._replace(config=config, tensors={**tensors, "text.pooled": read[rows, place]})
        for place in ((ids == 300).int().argmax(1), ids.argmax(1))
    )
    assert cause_in_model("text.pooled", wrong, right) == "model has pooling at the largest id"


def test_a_report_names_a_logit_scale_that_is_clamped_at_100(side):
    scale = torch.tensor(5.0, dtype=torch.float64)
    weights = {**side.weights, "logit_scale": scale}
    logits = Seen(side).logits(scale.exp())
    right = side._replace(weights=weights, tensors={**side.tensors, "logits": logits})
    cut = {**side.tensors, "logits": Seen(side).logits(100)}
    cause = "model has a logit scale that is clamped at 100"
    assert cause_in_model("logits", right._replace(tensors=cut), right) == cause


def test_a_report_names_a_fault_only_if_it_explains_the_numbers_exactly(side):
    """A fault explains the numbers exactly if the error of its numbers is below 1e-9."""
    wrong = Seen(side).logits(1)
    for by, cause in ((0.5e-9, "model has no logit scale"), (2e-9, "model does not compute")):
        tensors = {**side.tensors, "logits": wrong + by * torch.eye(2, 8, dtype=torch.float64)}
        found = cause_in_model("logits", side._replace(tensors=tensors), side)
        assert found.startswith(cause)


@pytest.mark.parametrize(
    "site, places, where",
    [
        (f"{V}.q", (1, slice(2, 4)), "row 1, token 2 to 3"),
        (f"{V}.q", (0, slice(None), 7), "row 0, dimension 7"),
        (f"{V}.pattern", (slice(None), 2, slice(None), slice(0, 9, 2)),
         "head 2, key 0 and 2 and 4 and others"),
        (f"{T}.pattern", (1, 1, 3), "row 1, head 1, query 3"),
        ("text.projected", (slice(3, 7), slice(0, 2)), "row 3 to 6, dimension 0 to 1"),
    ],
)  # fmt: skip
def test_a_report_says_where_two_tensors_differ(site, places, where, side):
    tensors = {**side.tensors, site: one_in(side.tensors[site], *places)}
    formula = "model does not compute CLIP's formula with its own weights"
    cause = f"{formula}: the models differ only at {where}"
    assert cause_in_model(site, side._replace(tensors=tensors), side) == cause


CHANGES = {
    **{f"flipped along axis {axis}": lambda w, axis=axis: w.flip(axis) for axis in (0, 1)},
    **{
        f"rolled along axis {axis}{' ' * (shift > 0)}":
            lambda w, axis=axis, shift=shift: w.roll(shift, axis)
        for axis in (0, 1)
        for shift in (-1, 1)
    },
    "rounded to float16": lambda w: w.half().float(),
    "rounded to bfloat16": lambda w: w.bfloat16().float(),
    "rounded to float8_e4m3fn": lambda w: w.to(torch.float8_e4m3fn).float(),
    "rounded to float8_e5m2": lambda w: w.to(torch.float8_e5m2).float(),
    "of zeros": lambda w: 0 * w,
    "in another order along axis 0": lambda w: w[torch.arange(36) * 5 % 36],
    "in another order along axis 1": lambda w: w[:, torch.arange(40) * 7 % 40],
    "multiplied by 1.01": lambda w: 1.01 * w,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_report_says_how_a_weight_was_changed(change, side):
    weight = CHANGES[change](side.weights["text.proj.weight"])
    model = side._replace(weights={**side.weights, "text.proj.weight": weight})
    words = f"model has proj.weight {change.strip()}"
    assert differing_weights("text.projected", model, side) == words


# -------------------------------------------------------------------------------- texts and images


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained("everyday")


@pytest.mark.parametrize(
    "old, new, text",
    [
        ("cat", "dog", "a photo of a cat"),
        ("!", "?", "it's 12.5% off, isn't it?!"),
        ("'t", "t", "it's 12.5% off, isn't it?!"),
        ("ï", "i", "cafe\u0301, naïve ﬁsh"),
        ("ﬁ", "fi", "cafe\u0301, naïve ﬁsh"),
        ("&lt;", "<", "salt &amp; pepper &lt;3"),
        ("’", "'", "it’s â€œquotedâ€\x9d"),
        ("â€œ", "“", "it’s â€œquotedâ€\x9d"),
        ("真", "?", "猫の写真 🙂👍🏽"),
        ("🏽", "", "猫の写真 🙂👍🏽"),
        ("<|endoftext|>", "<|end|>", "before <|endoftext|> after"),
        ("long text a very", "long text very", "a very long text a very long t"),
    ],
)  # fmt: skip
def test_a_report_names_the_first_text_with_different_ids(old, new, text, tokenizer):
    def wrong(texts):
        return tokenizer([t.replace(old, new) for t in texts], truncate=True)

    def right(texts):
        return tokenizer(texts, truncate=True)

    assert cause_in_tokens(wrong, right) == f"different ids for the text {text!r}"


def without_its_last(ids):
    return ids[:, :-1]


def with_another_start(ids):
    return ids.masked_fill(ids == 1635, 7)


def cut_without_an_end(ids):
    return torch.cat([ids[:, :-1], ids[:, -1:].where(ids[:, -2:-1] == 1636, 5)], 1)


@pytest.mark.parametrize(
    "change, cause",
    [
        (without_its_last, "rows of 76 ids in model, 77 in other"),
        (with_another_start, "the start token is 7 in model, 1635 in other"),
        (cut_without_an_end, "the end token is 5 in model, 1636 in other"),
    ],
)
def test_a_report_says_if_the_length_or_the_start_or_end_token_differs(change, cause, tokenizer):
    def right(texts):
        return tokenizer(texts, truncate=True)

    assert cause_in_tokens(lambda texts: change(right(texts)), right) == cause


RIGHT = ImageTransform(24, crop_size=20, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.25))
MEAN, STD = (np.array(x)[:, None, None] for x in (RIGHT.image_mean, RIGHT.image_std))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def scaled(mean, std, divisor=255.0, order=(0, 1, 2)):
    """Return a function that computes pixels again with this divisor, mean, std and order."""

    def change(pixels):
        colours = (pixels * STD + MEAN) * 255 / divisor
        mean_, std_ = (np.array(x).reshape(-1, 1, 1) for x in (mean, std))
        return (colours[list(order)] - mean_) / std_

    return change


def resampled(name):
    return lambda picture: taken(picture, resample=Image.Resampling[name])


def taken(
    picture, background=(255, 255, 255), resample=Image.Resampling.BICUBIC, long=math.floor,
    offset=math.floor, square=False, rgb_last=False,
):  # fmt: skip
    """Make an image's pixels by transformers' steps. Each option changes one step."""
    if background and picture.mode == "RGBA":
        below = Image.new("RGB", picture.size, background)
        below.paste(picture, mask=picture.getchannel("A"))
        picture = below
    picture = picture if rgb_last else picture.convert("RGB")
    width, height = picture.size
    short = min(width, height)
    size = (24, 24) if square else tuple(
        24 if side == short else long(24 * side / short) for side in (width, height)
    )  # fmt: skip
    resized = picture.resize(size, resample).convert("RGB")
    left, top = (offset((side - 20) / 2) for side in resized.size)
    box = resized.crop((left, top, left + 20, top + 20))
    return (np.asarray(box).transpose(2, 0, 1) / 255 - MEAN) / STD


FAULTS_OF_PIXELS = {
    "a crop that rounds half to even, not down": lambda p: taken(p, offset=round),
    "a crop that rounds up, not down": lambda p: taken(p, offset=math.ceil),
    "a crop from the upper left corner": lambda p: taken(p, offset=lambda margin: 0),
    "OpenAI's crop and order of steps":
        lambda p: taken(p, offset=round, rgb_last=True, background=None),
    "conversion to RGB after the resize, not before":
        lambda p: taken(p, rgb_last=True, background=None),
    "transparency that is dropped, not blended with white": lambda p: taken(p, background=None),
    "transparency blended with black, not with white": lambda p: taken(p, background=(0, 0, 0)),
    "a long side that is rounded, not truncated": lambda p: taken(p, long=round),
    "a resize to a square": lambda p: taken(p, square=True),
    **{  # Pillow 13 has seven filters
        f"{name.lower()} resampling, not bicubic": resampled(name)
        for name in sorted(Image.Resampling.__members__.keys() - {"BICUBIC"})
    },
    "the colours in the order BGR":
        lambda p: scaled(RIGHT.image_mean, RIGHT.image_std, order=(2, 1, 0))(taken(p)),
    "bytes that are not divided by 255":
        lambda p: scaled(RIGHT.image_mean, RIGHT.image_std, 1)(taken(p)),
    "bytes divided by 255 twice":
        lambda p: scaled(RIGHT.image_mean, RIGHT.image_std, 255**2)(taken(p)),
    "bytes divided by 256": lambda p: scaled(RIGHT.image_mean, RIGHT.image_std, 256)(taken(p)),
    "no mean and std": lambda p: scaled((0, 0, 0), (1, 1, 1))(taken(p)),
    "OpenAI's mean and std": lambda p: scaled(*OPENAI)(taken(p)),
    "a mean and std of 0.5": lambda p: scaled((0.5,) * 3, (0.5,) * 3)(taken(p)),
    "ImageNet's mean and std": lambda p: scaled(*IMAGENET)(taken(p)),
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn():
    """The test images, and their pixels after our transform."""
    pictures = pixels.pictures(24)
    return pictures, [RIGHT(picture) for picture in pictures]


def test_every_fault_of_an_image_transform_has_a_test():
    assert FAULTS_OF_PIXELS.keys() == pixels.FAULTS_OF_PIXELS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("cause", FAULTS_OF_PIXELS)
def test_a_report_names_each_fault_of_an_image_transform(cause, drawn):
    pictures, right = drawn
    wrong = [torch.from_numpy(FAULTS_OF_PIXELS[cause](picture)).float() for picture in pictures]
    assert cause_in_pixels(RIGHT, None, wrong, right) == f"model has {cause}"
    assert cause_in_pixels(RIGHT, None, right, wrong) == f"other has {cause}"


@pytest.mark.parametrize(
    "field, value",
    [
        ("size", 25), ("crop_size", 19), ("image_mean", (0.4, 0.5, 0.5)),
        ("image_std", (0.2, 0.3, 0.3)), ("reference", "openai"),
    ],
)  # fmt: skip
def test_a_report_names_a_setting_that_differs_between_two_transforms(field, value):
    fields = ("size", "crop_size", "image_mean", "image_std", "reference")
    other = ImageTransform(**{name: getattr(RIGHT, name) for name in fields} | {field: value})
    words = f"{field} is {getattr(RIGHT, field)} in model, {value} in other"
    assert cause_in_pixels(RIGHT, other, [], []) == words
