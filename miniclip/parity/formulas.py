"""Formulas of CLIP that decide which of two models is right at a site.

A formula computes the tensor at a site from the tensors at earlier sites, the weights and the
config. It does not run the models' code. `faults.py` replaces steps of a formula by faulty steps.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.config import CLIPConfig, TextConfig
from miniclip.parity.report import largest

Named = Mapping[str, Tensor]
Steps = Mapping[str, Any]


class Side(NamedTuple):
    """The tensors of one model in float64, its weights under our names, and its config."""

    tensors: Named  # {site: tensor}; the inputs have the names `pixels` and `ids`
    weights: Named
    config: CLIPConfig


def is_near(one: Tensor | None, other: Tensor, tolerance: float = 1e-9) -> bool:
    """Return whether `one` and `other` differ by at most tolerance * max(1, largest |other|)."""
    if one is None or one.shape != other.shape:
        return False
    return largest(one - other) <= tolerance * max(1.0, largest(other))


def softmax(
    scores: Tensor, hidden: Tensor, score: float = torch.finfo(torch.float64).min
) -> Tensor:
    """Return the attention pattern. A row in which every key is hidden gets a uniform pattern."""
    return scores.masked_fill(hidden, score).softmax(-1)


def no_mask(ones: Tensor, end: Tensor) -> Tensor:
    return ones.bool().logical_not()


def causal_mask(ones: Tensor, end: Tensor) -> Tensor:
    return ones.triu(1).bool()


def token_at(stream: Tensor, ids: Tensor, end: Tensor) -> Tensor:
    """Return the residual stream at a text's end token, or at an image's first token."""
    return stream[torch.arange(len(stream)), end]


def end_of(ids: Tensor, text: TextConfig) -> Tensor:
    """Return the position of each text's end token."""
    return (ids if text.ends_at_largest else (ids == text.eos_token_id).int()).argmax(-1)


ACTIVATION_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def _norm(x: Tensor, w: Named, s: Steps, name: str) -> Tensor:
    for _ in range(s["norms"].get(name, 1)):
        x = s["norm"](x, s["eps"], w[f"{name}.weight"], w[f"{name}.bias"])
    return x


def _linear(x: Tensor, w: Named, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"] if f"{name}.bias" in w else None)


def _vision_embeddings(x: Named, w: Named, s: Steps) -> Tensor:
    kernel = w["patch_embed.weight"]
    patches = s["patches"](F.conv2d(s["pixels"](x["pixels"]), kernel, stride=kernel.shape[-1]))
    tokens = [w["class_embed"].expand(len(patches), 1, -1), patches]  # (B, 1, W), (B, P, W)
    stream = torch.cat(tokens[::-1] if s["class_last"] else tokens, 1) + w["pos_embed"]
    if "register_embed" in w:
        registers = w["register_embed"].expand(len(stream), -1, -1)
        stream = torch.cat([stream[:, :1], registers, stream[:, 1:]], 1)
    return _norm(stream, w, s, s["early"]) if s["early"] else stream


def _text_embeddings(x: Named, w: Named, s: Steps) -> Tensor:
    words = w["token_embed.weight"][x["ids"]]
    stream = words * s["token_scale"](words.shape[-1]) + w["pos_embed"][: words.shape[1]]
    return _norm(stream, w, s, s["early"]) if s["early"] else stream


def _resid_pre(x: Named, w: Named, s: Steps) -> Tensor:
    if s["before"] in x:
        return x[s["before"]]
    return _norm(x["embeddings"], w, s, "ln_pre") if "ln_pre.weight" in w else x["embeddings"]


def _project(name: str, x: Named, w: Named, s: Steps) -> Tensor:
    return _linear(_norm(x["resid_pre"], w, s, "ln_1"), w, f"attn.{name}_proj")


def _split(x: Tensor, s: Steps) -> Tensor:
    """(B, T, W) -> (B, H, T, D)"""
    if s["interleaved"]:
        return x.unflatten(-1, (s["head_width"], -1)).permute(0, 3, 1, 2)
    return x.unflatten(-1, (-1, s["head_width"])).transpose(1, 2)


def _pattern(x: Named, w: Named, s: Steps) -> Tensor:
    q, k = (_split(x[name], s) for name in s["qk"])
    scores = q @ k.mT * s["scale"](s["head_width"], x["q"].shape[-1])  # (B, H, T, T)
    return s["softmax"](scores, s["mask"](torch.ones_like(scores), s["end"]))


def _attn_out(x: Named, w: Named, s: Steps) -> Tensor:
    z = s["turned"](_pattern(x, w, s)) @ _split(x["v"], s)  # (B, H, T, D)
    return _linear(s["joined"](z), w, "attn.out_proj")


def _sum(x: Named, w: Named, s: Steps, terms: Sequence[str]) -> Tensor:
    """Add up tensors at earlier sites. If a term names a LayerNorm, add the LayerNorm's output."""
    streams = {"ln_1": ("resid_pre",), "ln_2": ("resid_pre", "attn_out")}
    normed = {t: _norm(_sum(x, w, s, streams[t]), w, s, t) for t in terms if t in streams}
    return torch.stack([normed[t] if t in normed else x[t] for t in terms]).sum(0)


def _mlp_out(x: Named, w: Named, s: Steps) -> Tensor:
    terms, norm = s["mlp_reads"]
    stream = _norm(_sum(x, w, s, terms), w, s, norm)
    return _linear(s["act"](_linear(stream, w, "mlp.fc1")), w, "mlp.fc2")


def _pooled(x: Named, w: Named, s: Steps) -> Tensor:
    norm = "ln_final" if "ln_final.weight" in w else "ln_post"
    pool, pool_first = s["pool"]
    stream = x[s["before"]]
    if pool_first:
        return _norm(pool(stream, x["ids"], s["end"]), w, s, norm)
    return pool(_norm(stream, w, s, norm), x["ids"], s["end"])


EMBEDDINGS = ("vision.projected", "text.projected")


def _logits(x: Named, w: Named, s: Steps) -> Tensor:
    images, texts = (
        x[name] if name in s["raw"] else x[name] / s["length"](x[name]) for name in EMBEDDINGS
    )
    return images @ texts.T * s["temperature"](w["logit_scale"])


FORMULAS: dict[str, Callable[[Named, Named, Steps], Tensor]] = {
    "vision.embeddings": _vision_embeddings,
    "text.embeddings": _text_embeddings,
    "resid_pre": _resid_pre,
    "q": partial(_project, "q"),
    "k": partial(_project, "k"),
    "v": partial(_project, "v"),
    "pattern": _pattern,
    "attn_out": _attn_out,
    "mlp_out": _mlp_out,
    "resid_post": lambda x, w, s: _sum(x, w, s, s["resid_post"]),
    "pooled": _pooled,
    "projected": lambda x, w, s: _linear(x["pooled"], w, "proj"),
    "logits": _logits,
}


class Formula(NamedTuple):
    """The formula of a site, and the tensors, weights and steps that it uses."""

    site: str
    x: Named  # {short name of a site or of an input: tensor}
    w: Named  # the weights of the site's block or tower; the logits use the model's own weights
    steps: Steps  # the steps of the computation; a fault replaces one of them

    def compute(self, weights: Named = {}, steps: Steps = {}) -> Tensor | None:
        """Return the tensor at the site, with some weights and steps replaced.

        Return None if the model lacks a tensor or a weight, or if shapes do not fit.
        """
        kind = self.site.rpartition(".")[2]
        compute = FORMULAS[kind if kind in FORMULAS else self.site]
        w = {**self.w, **weights} if weights else self.w
        try:
            return compute(self.x, w, {**self.steps, **steps} if steps else self.steps)
        except (IndexError, KeyError, RuntimeError):
            return None


def formula_of(site: str, side: Side) -> Formula:
    """Return the formula of a site. It uses one model's tensors and weights, and CLIP's steps."""
    if site == "logits":
        x = {name: side.tensors[name] for name in EMBEDDINGS if name in side.tensors}
        length = partial(torch.linalg.vector_norm, dim=-1, keepdim=True)
        steps = {"raw": (), "length": length, "temperature": torch.exp}
        return Formula(site, x, under("", side.weights), steps)
    tower, *block = site.split(".")[:-1]
    config: Any = getattr(side.config, tower)
    x = under("", side.tensors) | under(f"{tower}.", side.tensors)
    x |= under(f"{'.'.join([tower, *block])}.", side.tensors)
    for i in range(config.layers):
        if (after := f"{tower}.blocks.{i}.resid_post") in side.tensors:
            x[f"after {i}"] = side.tensors[after]
    layer = int(block[1]) if block else config.layers
    # The first residual stream is computed from parameters of the tower, not of a block.
    own = not block or site.endswith("blocks.0.resid_pre")
    w = under(f"{tower}." if own else f"{tower}.blocks.{layer}.", side.weights)
    is_text = tower == "text"
    first = torch.zeros(len(x["pixels"]), dtype=torch.long)
    return Formula(site, x, w, {
        "end": end_of(x["ids"], config) if is_text else first,
        "eps": config.ln_eps,
        "norm": lambda x, eps, w, bias: F.layer_norm(x, x.shape[-1:], w, bias, eps),
        "norms": {},  # {name of a LayerNorm: how many times it is applied, if not once}
        "early": "",  # a LayerNorm that is wrongly applied to the embeddings
        "before": f"after {layer - 1}",
        "pixels": lambda pixels: pixels,
        "patches": lambda patches: patches.flatten(2).mT,
        "class_last": False,
        "token_scale": lambda width: 1.0,
        "qk": ("q", "k"),
        "head_width": config.head_width or config.width // config.heads,
        "interleaved": False,
        "scale": lambda head_width, width: head_width**-0.5,
        "mask": causal_mask if is_text else no_mask,
        "softmax": softmax,
        "turned": lambda pattern: pattern,
        "joined": lambda z: z.transpose(1, 2).flatten(2),
        "mlp_reads": (("resid_pre", "attn_out"), "ln_2"),
        "resid_post": ("resid_pre", "attn_out", "mlp_out"),
        "act": ACTIVATION_FORMULAS[config.act],
        "pool": (token_at, False),
    })  # fmt: skip


def under(prefix: str, named: Named) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, in float64. Remove the prefix from the
    names. For a model, leave out the towers' tensors. For a tower, leave out the blocks' tensors.
    """
    found = {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}
    return {
        name: x.double() if x.is_floating_point() else x
        for name, x in found.items()
        if not name.startswith(("blocks.", "vision.", "text."))
    }
