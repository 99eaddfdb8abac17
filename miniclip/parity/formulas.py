"""CLIP once more, as formulas: the referee between two models.

A formula computes the tensor at a site from the tensors before it, with nothing but weights and a
config. No code of the models takes part, so whether a wrong number comes from their weights, their
config or their code makes no difference.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.config import LEGACY_EOS, CLIPConfig, TextConfig
from miniclip.parity.variants import ACTIVATION_FORMULAS, LENGTHS, MASKS, POOLS, Named, pool_at

Options = dict[str, Any]


class Side(NamedTuple):
    """What a model computed in float64, its weights under our names, and its config."""

    tensors: Named  # by site; the inputs are `pixels` and `ids`
    weights: Named
    config: CLIPConfig


def is_near(one: Tensor | None, other: Tensor, tolerance: float = 1e-9) -> bool:
    """Whether two tensors are equal but for rounding, relative to the largest number above 1."""
    if one is None or one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= tolerance * max(1.0, other.abs().max().item()))


def _norm(x: Tensor, w: Named, name: str, o: Options) -> Tensor:
    if o["skipped"] == name:
        return x
    for _ in range(2 if o["twice"] == name else 1):
        x = o["norm"](x, o["eps"]) * w[f"{name}.weight"] + w[f"{name}.bias"]
    return x


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def _linear(x: Tensor, w: Named, name: str) -> Tensor:
    bias = w[f"{name}.bias"] if f"{name}.bias" in w else None
    return F.linear(x, w[f"{name}.weight"], bias)


def _vision_embeddings(x: Named, w: Named, o: Options) -> Tensor:
    pixels = o["pixels"](x["pixels"])
    patches = F.conv2d(pixels, w["patch_embed.weight"], stride=w["patch_embed.weight"].shape[-1])
    patches = o["patches"](patches)  # (B, P, W)
    tokens = [w["class_embed"].expand(len(patches), 1, -1), patches]
    stream = torch.cat(tokens[::-1] if o["class_last"] else tokens, 1) + w["pos_embed"]
    if "register_embed" in w:
        registers = w["register_embed"].expand(len(stream), -1, -1)
        stream = torch.cat([stream[:, :1], registers, stream[:, 1:]], 1)
    return _normed(stream, w, o)


def _text_embeddings(x: Named, w: Named, o: Options) -> Tensor:
    stream = w["token_embed.weight"][x["ids"]] * o["token_scale"]
    return _normed(stream + w["pos_embed"][: x["ids"].shape[1]], w, o)


def _normed(stream: Tensor, w: Named, o: Options) -> Tensor:
    """Apply a norm that does not belong here: one of the faults."""
    return _norm(stream, w, o["early"], o) if o["early"] else stream


def _resid_pre(x: Named, w: Named, o: Options) -> Tensor:
    if o["before"] in x:
        return x[o["before"]]
    return _norm(x["embeddings"], w, "ln_pre", o) if "ln_pre.weight" in w else x["embeddings"]


def _qkv(x: Named, w: Named, o: Options, name: str) -> Tensor:
    return _linear(_norm(x["resid_pre"], w, "ln_1", o), w, f"attn.{name}_proj")


def _split(x: Tensor, o: Options) -> Tensor:
    if o["interleaved"]:
        return x.unflatten(-1, (o["head_width"], -1)).permute(0, 3, 1, 2)  # (B, H, T, D)
    return x.unflatten(-1, (-1, o["head_width"])).transpose(1, 2)  # (B, H, T, D)


def _pattern(x: Named, w: Named, o: Options) -> Tensor:
    q, k = (_split(x[name], o) for name in o["qk"])
    scores = q @ k.transpose(-2, -1) * o["scale"]  # (B, H, T, T)
    hidden = o["mask"](torch.ones_like(scores), x)
    if o["mask_late"]:
        return o["softmax"](scores) * ~hidden
    return o["softmax"](scores.masked_fill(hidden, o["hidden"]))


def _attn_out(x: Named, w: Named, o: Options) -> Tensor:
    z = o["turned"](_pattern(x, w, o)) @ _split(x["v"], o)  # (B, H, T, D)
    return _linear(o["joined"](z), w, "attn.out_proj")


def _sum(x: Named, w: Named, o: Options, terms: Sequence[str]) -> Tensor:
    named = dict(x)
    if "ln_1" in terms:
        named["ln_1"] = _norm(x["resid_pre"], w, "ln_1", o)
    if "ln_2" in terms:
        named["ln_2"] = _norm(x["resid_pre"] + x["attn_out"], w, "ln_2", o)
    return reduce(torch.add, (named[term] for term in terms))


def _mlp_out(x: Named, w: Named, o: Options) -> Tensor:
    stream = _norm(_sum(x, w, o, o["resid_mid"]), w, o["mlp_norm"], o)
    return _linear(ACTIVATION_FORMULAS[o["act"]](_linear(stream, w, "mlp.fc1")), w, "mlp.fc2")


def _resid_post(x: Named, w: Named, o: Options) -> Tensor:
    return _sum(x, w, o, o["resid_post"])


def _pooled(x: Named, w: Named, o: Options) -> Tensor:
    norm = "ln_final" if "ln_final.weight" in w else "ln_post"
    if o["pool_first"]:
        return _norm(o["pool"](x[o["before"]], x), w, norm, o)
    return o["pool"](_norm(x[o["before"]], w, norm, o), x)


def _projected(x: Named, w: Named, o: Options) -> Tensor:
    return _linear(x["pooled"], w, "proj")


def _logits(x: Named, w: Named, o: Options) -> Tensor:
    images, texts = (
        x[tower] if tower in o["raw"] else x[tower] / o["length"](x[tower])
        for tower in ("vision", "text")
    )
    return images @ texts.T * o["temperature"](w["logit_scale"])


FORMULAS: dict[str, Callable[[Named, Named, Options], Tensor]] = {
    "vision.embeddings": _vision_embeddings,
    "text.embeddings": _text_embeddings,
    "resid_pre": _resid_pre,
    "q": lambda x, w, o: _qkv(x, w, o, "q"),
    "k": lambda x, w, o: _qkv(x, w, o, "k"),
    "v": lambda x, w, o: _qkv(x, w, o, "v"),
    "pattern": _pattern,
    "attn_out": _attn_out,
    "mlp_out": _mlp_out,
    "resid_post": _resid_post,
    "pooled": _pooled,
    "projected": _projected,
    "logits": _logits,
}


def compute(site: str, x: Named, w: Named, o: Options) -> Tensor | None:
    """The formula of a site. None if the model lacks a part of it, or if shapes do not fit."""
    kind = site.rpartition(".")[2]
    try:
        return FORMULAS[kind if kind in FORMULAS else site](x, w, o)
    except (IndexError, KeyError, RuntimeError):
        return None


def parts_of(site: str, side: Side) -> tuple[Named, Named, Options]:
    """What the formula of the site reads: tensors, weights and options, under short names."""
    if site == "logits":
        ends = {tower: f"{tower}.projected" for tower in ("vision", "text")}
        x = {tower: side.tensors[end] for tower, end in ends.items() if end in side.tensors}
        return x, under("", side.weights), {
            "raw": (),
            "length": LENGTHS["the root of the sum of squares"],
            "temperature": torch.exp,
        }  # fmt: skip
    tower, *block = site.split(".")[:-1]
    config = getattr(side.config, tower)
    x = under("", side.tensors) | under(f"{tower}.", side.tensors)
    x |= under(f"{'.'.join([tower, *block])}.", side.tensors)
    for i in range(config.layers):
        if (after := f"{tower}.blocks.{i}.resid_post") in side.tensors:
            x[f"after {i}"] = side.tensors[after]
    layer = int(block[1]) if block else config.layers
    # The first residual stream comes out of the tower's own parameters, and not out of a block's.
    own = not block or site.endswith("blocks.0.resid_pre")
    w = under(f"{tower}." if own else f"{tower}.blocks.{layer}.", side.weights)
    head_width = config.head_width or config.width // config.heads
    return x, w, {
        "eps": config.ln_eps,
        "norm": _layer_norm,
        "skipped": None,
        "twice": None,
        "early": None,
        "before": f"after {layer - 1}",
        "pixels": lambda pixels: pixels,
        "patches": lambda patches: patches.flatten(2).mT,
        "class_last": False,
        "token_scale": 1.0,
        "qk": ("q", "k"),
        "head_width": head_width,
        "interleaved": False,
        "scale": head_width**-0.5,
        "mask": MASKS["a causal mask" if tower == "text" else "no causal mask"],
        "mask_late": False,
        "hidden": torch.finfo(torch.float64).min,
        "softmax": lambda scores: scores.softmax(-1),
        "turned": lambda pattern: pattern,
        "joined": lambda z: z.transpose(1, 2).flatten(2),
        "resid_mid": ("resid_pre", "attn_out"),
        "resid_post": ("resid_pre", "attn_out", "mlp_out"),
        "mlp_norm": "ln_2",
        "act": config.act,
        "pool": pool_at(end_of(config)) if tower == "text" else POOLS["the first token"],
        "pool_first": False,
    }  # fmt: skip


def under(prefix: str, named: Named) -> dict[str, Tensor]:
    """What is directly under a prefix, and not in the blocks below it, without the prefix."""
    names = (name for name in named if name.startswith(prefix))
    inner = {name.removeprefix(prefix): name for name in names}
    return {
        short: named[name].double() if named[name].is_floating_point() else named[name]
        for short, name in inner.items()
        if not short.startswith(("blocks.", "vision.", "text."))
    }


def end_of(config: TextConfig) -> Callable[[Tensor], Tensor]:
    if config.eos_token_id == LEGACY_EOS:
        return lambda ids: ids.argmax(-1)
    return lambda ids: (ids == config.eos_token_id).int().argmax(-1)
