"""Why two CLIPs differ at a site: CLIP once more, as formulas, with the usual faults planted.

Up to the first site that differs, two models have computed the same. So that site is computed again
from the tensors before it, by a formula that needs nothing but one model's weights and config, and
once more with each fault that is common in reimplementations. The fault that gives the other
model's numbers is the cause. No code of the models takes part: whether a wrong number comes from
their weights, their config or their code makes no difference. Texts and pictures are gone about in
the same way.
"""

import html
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from miniclip.config import LEGACY_EOS, CLIPConfig, TextConfig
from miniclip.transform import OPENAI_MEAN, OPENAI_STD

Named = Mapping[str, Tensor]
Options = dict[str, Any]


class Side(NamedTuple):
    """What a model computed in float64, and what it computed it with, under our names."""

    tensors: Named  # by site; the inputs are `pixels` and `ids`
    weights: Named
    config: CLIPConfig


def cause_in_model(site: str, model: Side, other: Side) -> str:
    """What, put into one model's formula for the site, gives the other's tensor there.

    The site is the first that differs. An empty text if nothing is known. Where only weights differ
    either may be right, and it is `model`, as the fork, of which something is said.
    """
    if ".blocks." in site:  # two rows of the batch show it as well, in less time
        model, other = (
            side._replace(tensors={name: tensor[:2] for name, tensor in side.tensors.items()})
            for side in (model, other)
        )
    ours, theirs = model.tensors[site], other.tensors[site]
    for name, tensor in (("model", ours), ("other", theirs)):
        if not tensor.isfinite().all():
            return f"{name} has numbers that are not finite"
    if "." not in site and site != "logits":  # the rest of the output, after logits that agree
        rest = {name: x for name, x in other.tensors.items() if name.endswith("_embeds")}
        relation = _relation(site, rest, theirs, ours)
        return f"model has {relation}" if relation else ""
    stream_enters = site.endswith((".resid_pre", ".pooled"))
    if stream_enters and (otherwise := _otherwise_run(site, model, other)):
        return otherwise
    followers = []  # of CLIP's formula, with their own weights and config
    related = ""
    for source, target, names in ((other, model, NAMES[::-1]), (model, other, NAMES)):
        parts, wrong = _parts(site, source), target.tensors[site]
        right = _compute(site, *parts)
        if right is None or not near(right, source.tensors[site]):
            continue
        followers.append(names[0])
        x, *_ = parts
        for fault, w, o in _faults(site, source, target, *parts):
            found = _compute(site, x, w, o)
            if near(found, wrong) and not near(found, right):
                return f"{names[1]} has {fault}"
        if not related and (relation := _relation(site, x, right, wrong)):
            related = f"{names[1]} has {relation}"
    if otherwise := _otherwise_run(site, model, other):
        return otherwise
    if len(followers) == 2 and (differing := differing_weights(site, model, other)):
        return differing
    if related:
        return related
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)} in model, {tuple(theirs.shape)} in other"
    if len(followers) == 1:
        name = NAMES[followers == ["model"]]
        place = _place(ours, theirs, model.tensors["ids"] if site == "text.embeddings" else None)
        return f"{name} does not compute CLIP's formula with its own weights{place}"
    return ""


NAMES = ("model", "other")


def near(one: Tensor | None, other: Tensor, tolerance: float = 1e-9) -> bool:
    """Whether two tensors are equal but for rounding, relative to the largest number above 1."""
    if one is None or one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= tolerance * max(1.0, other.abs().max().item()))


# ------------------------------------------------------------------------------------------------
# The formulas. x: the tensors before the site, w: weights, o: options, each under short names.


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
    """By a norm that has no place there, which is one of the faults."""
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
    return _linear(ACTIVATIONS[o["act"]](_linear(stream, w, "mlp.fc1")), w, "mlp.fc2")


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


def _compute(site: str, x: Named, w: Named, o: Options) -> Tensor | None:
    """None for a model that lacks what the formula asks for, and for shapes that do not fit."""
    kind = site.rpartition(".")[2]
    try:
        return FORMULAS[kind if kind in FORMULAS else site](x, w, o)
    except (IndexError, KeyError, RuntimeError):
        return None


def _parts(site: str, side: Side) -> tuple[Named, Named, Options]:
    """What the formula of the site reads: tensors, weights and options, under short names."""
    if site == "logits":
        ends = {tower: f"{tower}.projected" for tower in ("vision", "text")}
        x = {tower: side.tensors[end] for tower, end in ends.items() if end in side.tensors}
        return x, _under("", side.weights), {
            "raw": (),
            "length": LENGTHS["the root of the sum of squares"],
            "temperature": torch.exp,
        }  # fmt: skip
    tower, *block = site.split(".")[:-1]
    config = getattr(side.config, tower)
    x = _under("", side.tensors) | _under(f"{tower}.", side.tensors)
    x |= _under(f"{'.'.join([tower, *block])}.", side.tensors)
    for i in range(config.layers):
        if (after := f"{tower}.blocks.{i}.resid_post") in side.tensors:
            x[f"after {i}"] = side.tensors[after]
    layer = int(block[1]) if block else config.layers
    # The first residual stream comes out of the tower's own parameters, and not out of a block's.
    own = not block or site.endswith("blocks.0.resid_pre")
    w = _under(f"{tower}." if own else f"{tower}.blocks.{layer}.", side.weights)
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
        "pool": _pool_at(_end_of(config)) if tower == "text" else POOLS["the first token"],
        "pool_first": False,
    }  # fmt: skip


def _under(prefix: str, named: Named) -> dict[str, Tensor]:
    """What is directly under a prefix, and not in the blocks below it, without the prefix."""
    names = (name for name in named if name.startswith(prefix))
    inner = {name.removeprefix(prefix): name for name in names}
    return {
        short: named[name].double() if named[name].is_floating_point() else named[name]
        for short, name in inner.items()
        if not short.startswith(("blocks.", "vision.", "text."))
    }


def _end_of(config: TextConfig) -> Callable[[Tensor], Tensor]:
    if config.eos_token_id == LEGACY_EOS:
        return lambda ids: ids.argmax(-1)
    return lambda ids: (ids == config.eos_token_id).int().argmax(-1)


# ------------------------------------------------------------------------------------------------
# The faults, in tables. Each is what another implementation has there, and its name.

Pool = Callable[[Tensor, Named], Tensor]  # the stream (B, T, W) and the inputs -> (B, W)


def _pool_at(position: Callable[[Tensor], Tensor]) -> Pool:
    return lambda stream, x: stream[torch.arange(len(stream)), position(x["ids"])]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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
ROUNDINGS = (torch.float16, torch.bfloat16)

Fault = tuple[str, Named, Options]


class Noted(dict):
    """A dictionary that notes which of its keys are read."""

    def __init__(self, named: Mapping[str, Any]) -> None:
        super().__init__(named)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def _faults(
    site: str, source: Side, target: Side, x: Named, w: Named, o: Options
) -> Iterator[Fault]:
    """Each fault with the weights and the options that have it, where the formula reads them."""
    weights, options = Noted(w), Noted(o)
    _compute(site, x, weights, options)
    for fault, changed in _faults_of_options(site, source, target, w, o):
        if not options.read.isdisjoint(changed):
            yield fault, w, o | changed
    no_bias = {n: torch.zeros_like(w[n]) for n in weights.read if re.fullmatch(r"ln_\w+\.bias", n)}
    if no_bias:
        rms_norm = {"norm": NORMS["RMSNorm for LayerNorm"]}
        yield "RMSNorm without bias for LayerNorm", {**w, **no_bias}, o | rms_norm
    config: Any = getattr(source.config, site.partition(".")[0], None)
    for fault, replaced in _faults_of_weights(w, weights.read, getattr(config, "grid", None)):
        yield fault, {**w, **replaced}, o
    if match := re.match(r"(\w+\.blocks)\.(\d+)\.", site):
        stack, layer = match.groups()
        for i in range(config.layers):
            if i != int(layer) and f"{stack}.{i}.ln_1.weight" in source.weights:
                yield f"the weights of block {i}", _under(f"{stack}.{i}.", source.weights), o


def _faults_of_options(
    site: str, source: Side, target: Side, w: Named, o: Options
) -> Iterator[tuple[str, Options]]:
    if site == "logits":
        yield from ((fault, {"temperature": f}) for fault, f in TEMPERATURES.items())
        yield "embeddings that are not normalised", {"raw": ("vision", "text")}
        yield "image embeddings that are not normalised", {"raw": ("vision",)}
        yield "text embeddings that are not normalised", {"raw": ("text",)}
        for fault, length in LENGTHS.items():
            yield f"embeddings divided by {fault}", {"length": length}
        return
    tower = site.partition(".")[0]
    config, peer = getattr(source.config, tower), getattr(target.config, tower)
    for act in ACTIVATIONS:
        yield f"the activation {act} for {o['act']}", {"act": act}
    for eps in (peer.ln_eps, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 0.0):
        yield f"a LayerNorm eps of {eps:g} for {o['eps']:g}", {"eps": eps}
    yield from ((fault, {"norm": norm}) for fault, norm in NORMS.items())
    yield from ((fault, {"mask": mask}) for fault, mask in MASKS.items())
    yield from ((fault, {"softmax": softmax}) for fault, softmax in SOFTMAXES.items())
    yield "a causal mask that comes after the softmax", {"mask_late": True}
    for score in (0.0, -1.0, -10.0, -100.0):
        yield f"a score of {score:g} where the mask hides, not of -inf", {"hidden": score}
    for scale, words in (
        (1.0, "scores that are not scaled"),
        (1 / o["head_width"], "scores scaled by 1 / head width, and not its root"),
        (o["head_width"] ** 0.5, "scores multiplied by the root of the head width"),
        (config.width**-0.5, "scores scaled by the root of the width, and not of a head's"),
        ((config.width / o["head_width"]) ** -0.5, "scores scaled by the root of the heads"),
    ):
        yield words, {"scale": scale}
    yield "q and k exchanged", {"qk": ("k", "q")}
    yield "a pattern that is transposed", {"turned": lambda pattern: pattern.mT}
    yield "heads that are split the wrong way round", {"interleaved": True}
    yield (
        "heads that are joined the wrong way round",
        {"joined": lambda z: z.permute(0, 2, 3, 1).flatten(2)},
    )
    yield (
        "heads that are joined without being transposed",
        {"joined": lambda z: z.reshape(len(z), z.shape[2], -1)},
    )
    widths = {2 * o["head_width"], o["head_width"] // 2}
    if site.endswith(".pattern"):
        widths = {config.width // target.tensors[site].shape[1]}
    for width in widths - {0, o["head_width"]}:
        heads = {"head_width": width, "scale": width**-0.5}
        yield f"heads of width {width} for {o['head_width']}", heads
    norms = [name.removesuffix(".weight") for name in w if re.match(r"ln_\w+\.weight", name)]
    for name in norms:
        place = {"ln_1": " before attention", "ln_2": " before the MLP"}.get(name, "")
        yield f"no {name}{place}", {"skipped": name}
        yield f"{name} twice", {"twice": name}
        yield f"{name} before the first block", {"early": name}
    yield "ln_1 before the MLP, for ln_2", {"mlp_norm": "ln_1"}
    yield "the MLP beside attention, and not after it", {"resid_mid": ("resid_pre",)}
    yield (
        "the MLP beside attention, after the same ln_1",
        {"resid_mid": ("resid_pre",), "mlp_norm": "ln_1"},
    )
    yield "no residual connection around attention", {"resid_mid": ("attn_out",)}
    yield "the residual stream after ln_1, not before it", {"resid_mid": ("ln_1", "attn_out")}
    yield "the residual stream after ln_2, not before it", {"resid_post": ("ln_2", "mlp_out")}
    yield "no residual connection around the MLP", {"resid_post": ("mlp_out",)}
    yield "no MLP in the residual stream", {"resid_post": ("resid_pre", "attn_out")}
    yield "no attention in the residual stream", {"resid_post": ("resid_pre", "mlp_out")}
    yield "the class token last", {"class_last": True}
    yield from ((fault, {"pixels": change}) for fault, change in PIXELS.items())
    yield from ((fault, {"patches": order}) for fault, order in PATCHES.items())
    yield "token embeddings multiplied by the root of the width", {"token_scale": config.width**0.5}
    for i in range(config.layers):
        yield f"the residual stream after block {i} there", {"before": f"after {i}"}
    pools = {}
    if tower == "text":
        end = _end_of(config)
        yield "a mask of what follows the end token", {"mask": partial(_padding_mask, end)}
        pools = _pools_of_texts(end, peer)
    pools |= {f"pooling at {place}": pool for place, pool in POOLS.items()}
    for fault, pool in pools.items():
        yield fault, {"pool": pool}
        yield f"{fault}, before the last LayerNorm", {"pool": pool, "pool_first": True}


def _padding_mask(end: Callable[[Tensor], Tensor], ones: Tensor, x: Named) -> Tensor:
    after = torch.arange(ones.shape[-1]) > end(x["ids"])[:, None]  # (B, T)
    return ones.triu(1).bool() | after[:, None, None]


def _pools_of_texts(end: Callable[[Tensor], Tensor], peer: TextConfig) -> dict[str, Pool]:
    def last_end(ids: Tensor) -> Tensor:
        is_end = ids == ids.gather(1, end(ids)[:, None])
        return ids.shape[1] - 1 - is_end.flip(-1).int().argmax(-1)

    def mean_to_the_end(stream: Tensor, x: Named) -> Tensor:
        rows = zip(stream, end(x["ids"]).tolist(), strict=True)
        return torch.stack([row[: last + 1].mean(0) for row, last in rows])

    positions: dict[str, Callable[[Tensor], Tensor]] = {
        f"the end token {peer.eos_token_id}": _end_of(peer),
        "texts read at their largest id": lambda ids: ids.argmax(-1),
        "texts read at their first token": lambda ids: torch.zeros_like(ids[:, 0]),
        "texts read at their last token": lambda ids: torch.full_like(ids[:, 0], -1),
        "texts read at their last end token": last_end,
        "texts read before their end token": lambda ids: end(ids) - 1,
        "texts read after their end token": lambda ids: (end(ids) + 1) % ids.shape[1],
    }
    pools = {fault: _pool_at(position) for fault, position in positions.items()}
    return pools | {"pooling at the mean of a text up to its end token": mean_to_the_end}


def _faults_of_weights(
    w: Named, read: set[str], grid: tuple[int, int] | None
) -> Iterator[tuple[str, Named]]:
    """`read`: the weights that the formula reads; `grid`: rows and columns of patches."""
    modules = sorted(name.removesuffix(".bias") for name in read if name.endswith(".bias"))
    for count in range(1, len(modules) + 1):
        for some in combinations(modules, count):
            zeros = {f"{name}.bias": torch.zeros_like(w[f"{name}.bias"]) for name in some}
            yield f"no bias in {' and '.join(some)}", zeros
    for name in sorted(read):
        if w[name].ndim > 1 and not re.search("token_embed|pos_embed", name):
            yield f"{name} transposed", {name: w[name].mT.reshape(w[name].shape)}
        if re.fullmatch(r"ln_\w+\.weight", name):
            bias = name.replace("weight", "bias")
            yield f"no weight in {name[:-7]}", {name: torch.ones_like(w[name])}
            yield (
                f"no weight and bias in {name[:-7]}",
                {name: torch.ones_like(w[name]), bias: torch.zeros_like(w[bias])},
            )
            yield f"1 added to {name}", {name: w[name] + 1}
    for one, two in combinations([name for name in w if name.endswith(".weight")], 2):
        if w[one].shape == w[two].shape and not read.isdisjoint((one, two)):
            one, two = one.removesuffix(".weight"), two.removesuffix(".weight")
            pairs = ((one, two), (two, one))
            swapped = {
                f"{a}.{kind}": w[f"{b}.{kind}"]
                for a, b in pairs
                for kind in ("weight", "bias")
                if f"{b}.{kind}" in w
            }
            yield f"{one} and {two} swapped", swapped
    for one, two in combinations(w, 2):
        if w[one].shape == w[two].shape and not read.isdisjoint((one, two)):
            yield f"{one} and {two} swapped", {one: w[two], two: w[one]}
    if "pos_embed" in read:
        for fault, positions in _wrong_positions(w["pos_embed"], grid):
            yield fault, {"pos_embed": positions}
    if "class_embed" in read:
        yield "no class token's embedding", {"class_embed": torch.zeros_like(w["class_embed"])}
    for dtype in ROUNDINGS:
        rounded = {name: w[name].to(dtype).double() for name in read}
        yield f"weights rounded to {_name(dtype)}", rounded


def _wrong_positions(
    positions: Tensor, grid: tuple[int, int] | None
) -> Iterator[tuple[str, Tensor]]:
    yield "no position embedding", torch.zeros_like(positions)
    yield "position embeddings that are added twice", 2 * positions
    for count, words in ((1, "one"), (2, "two"), (3, "three")):
        for shift in (-count, count):
            yield f"positions that are off by {words}", positions.roll(shift, 0)
    yield "positions from last to first", positions.flip(0)
    yield "no position for the first token", torch.cat([0 * positions[:1], positions[1:]])
    if grid:
        first, patches = positions[:1], positions[1:].unflatten(0, grid)  # (rows, columns, W)
        for fault, moved in (
            ("positions of patches that are off by one", patches.flatten(0, 1).roll(1, 0)),
            ("positions of patches that are off by one", patches.flatten(0, 1).roll(-1, 0)),
            ("rows and columns of positions exchanged", patches.transpose(0, 1)),
            ("positions that are mirrored", patches.flip(1)),
            ("positions that are upside down", patches.flip(0)),
            ("positions of patches from last to first", patches.flip(0, 1)),
        ):
            yield fault, torch.cat([first, moved.reshape(-1, moved.shape[-1])])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------
# What no single fault explains


def _otherwise_run(site: str, model: Side, other: Side) -> str:
    """Whether a model runs a part more or less often than the other, or in another order."""
    for kinds in ("resid_post|projected", "attn_out|mlp_out"):
        pattern = re.compile(rf"({site.partition('.')[0]}|logits)\..*({kinds})( again)?")
        ours, theirs = (list(filter(pattern.fullmatch, side.tensors)) for side in (model, other))
        for name, run, peer in (("model", ours, theirs), ("other", theirs, ours)):
            if extra := [place for place in run if place.endswith(" again") and place not in peer]:
                return f"{name} runs {_part(extra[0])} twice"
            if missing := [place for place in peer if place not in run and "again" not in place]:
                return f"{name} does not run {_part(missing[0])}"
        for one, two in zip(ours, theirs):
            if one != two:
                return f"model has {_part(one)} in the place of {_part(two)}"
    return ""


def _part(place: str) -> str:
    return place.removesuffix(" again").removesuffix(".resid_post")


def _relation(site: str, x: Named, right: Tensor, wrong: Tensor) -> str:
    """What simple arithmetic makes of the right numbers at the site to get the wrong ones."""
    if near(right, wrong):
        return ""  # more than rounding, and less than these comparisons see
    for name in reversed([name for name in x if " " not in name]):  # a block's own come last
        if near(x[name].double(), wrong):
            return f"{name} unchanged as {site}"
    if near(right.mT, wrong):
        return f"{site} transposed"
    if right.shape != wrong.shape:
        return ""
    order = torch.cdist(wrong.flatten(1), right.flatten(1)).argmin(1)
    if near(right[order], wrong):
        moved = (order != torch.arange(len(order))).nonzero()[:, 0].tolist()
        return f"{site} of another row of the batch in row {_ranges(moved)}"
    factor = ((wrong * right).sum() / right.square().sum()).item()
    if near(right * factor, wrong):
        return f"{site} multiplied by {factor:.6g}"
    shift = (wrong - right).mean().item()
    if near(right + shift, wrong):
        return f"{shift:.6g} added to {site}"
    if near(right.softmax(-1), wrong):
        return f"a softmax of {site}"
    if right.ndim == 3:  # (B, T, W)
        vector = (wrong - right)[-1, -1]
        for first, words in ((0, "each token"), (1, "each patch, and not to the first token")):
            if near((right + vector)[:, first:], wrong[:, first:]):
                return f"the same vector added to {words}, as a bias would be"
    elif "logits" not in site and right.ndim == 2 and near(right + (wrong - right)[-1], wrong):
        return f"the same vector added to each row of {site}, as a bias would be"
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(wrong.to(dtype).double(), wrong):
            return f"{site} in {_name(dtype)}, whatever the precision of the rest"
    if site.endswith("resid_post"):
        terms = ("resid_pre", "attn_out", "mlp_out")
        columns = torch.stack([x[term].flatten() for term in terms], 1)
        shares = torch.linalg.lstsq(columns, wrong.flatten()[:, None]).solution[:, 0]
        if near((columns @ shares).view_as(wrong), wrong):
            summed = zip(shares.tolist(), terms, strict=True)
            return "the sum " + " + ".join(f"{share:.4g} {term}" for share, term in summed)
    return ""


AXES = {
    2: ("row", "dimension"),
    3: ("row", "token", "dimension"),
    4: ("row", "head", "query", "key"),
}


def _place(ours: Tensor, theirs: Tensor, ids: Tensor | None) -> str:
    """Where two tensors differ, if not everywhere."""
    far = (ours - theirs).abs() > 1e-9 * max(1.0, theirs.abs().max().item())
    places = []
    if ids is not None and not (differs := far.any(-1)).all():
        places.append(f"id {ids[differs].min()} to {ids[differs].max()}")
    for axis, name in enumerate(AXES.get(far.ndim, ())):
        differs = far.movedim(axis, 0).flatten(1).any(1)
        if not differs.all():
            places.append(f"{name} {_ranges(differs.nonzero()[:, 0].tolist())}")
    return f": only at {', '.join(places)}" if places else ""


def _ranges(numbers: list[int]) -> str:
    """At most three ranges of ascending numbers.

    >>> _ranges([0, 1, 2, 5])
    '0 to 2 and 5'
    """
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    words = [f"{a} to {b}" if a < b else f"{a}" for a, b in ends]
    return " and ".join(words[:3] + ["others"] * (len(words) > 3))


def differing_weights(site: str, model: Side, other: Side) -> str:
    """The weights that the formula of the site reads and that differ, and how."""
    x, ours, options = _parts(site, model)
    _, theirs, _ = _parts(site, other)
    weights = Noted(ours)
    _compute(site, x, weights, options)
    head = options.get("head_width", 1)
    changes = {
        name: _change(ours[name], theirs[name], head if name.startswith("attn.") else 1)
        for name in ours
        if name in weights.read and name in theirs and not torch.equal(ours[name], theirs[name])
    }
    if len(changes) == 1 and (change := next(iter(changes.values())))[0] != "(":
        return f"model has {next(iter(changes))} {change}"
    listed = [f"{name} {change}" for name, change in changes.items()]
    return f"different weights: {', '.join(listed)}" if listed else ""


def _change(ours: Tensor, theirs: Tensor, head: int) -> str:
    """What has been done to a weight of theirs to get ours; in brackets how far they are apart."""
    if ours.ndim == 0:
        return f"({ours:.9g} in model, {theirs:.9g} in other)"
    if ours.shape != theirs.shape:
        return f"({tuple(ours.shape)} in model, {tuple(theirs.shape)} in other)"
    for change, changed in _changes(theirs):
        if torch.equal(changed, ours):
            return change
    for axis in range(ours.ndim):
        for size in (head, 1):
            words = "with heads in another order" if size > 1 else "in another order"
            if ours.shape[axis] % size == 0 and torch.equal(
                _sorted(ours, axis, size), _sorted(theirs, axis, size)
            ):
                return f"{words} along axis {axis}"
    factor = ((ours * theirs).sum() / theirs.square().sum()).item()
    if near(theirs * factor, ours, 1e-6 * min(1.0, ours.abs().max().item())):
        return f"multiplied by {factor:.6g}"
    odd = ours != theirs
    rows = odd.flatten(1).any(1) if odd.ndim > 1 else odd
    distance = (ours - theirs).abs().max().item()
    return f"({rows.sum()} of {len(rows)} rows, by at most {distance:.1e})"


def _changes(w: Tensor) -> Iterator[tuple[str, Tensor]]:
    for axis in range(w.ndim):
        yield f"flipped along axis {axis}", w.flip(axis)
        for shift in (1, -1):
            yield f"rolled along axis {axis}", w.roll(shift, axis)
    if w.ndim == 4:
        yield "turned by 180 degrees", w.flip(-1, -2)
        yield "with the colours in the last place", w.permute(0, 2, 3, 1).reshape(w.shape)
    for dtype in (*ROUNDINGS, torch.float8_e4m3fn, torch.float8_e5m2):
        yield f"rounded to {_name(dtype)}", w.to(dtype).double()
    yield "of zeros", torch.zeros_like(w)


def _sorted(w: Tensor, axis: int, size: int) -> Tensor:
    """The slices of a weight along an axis, `size` together, in an order that is their own."""
    slices = w.movedim(axis, 0).reshape(w.shape[axis] // size, -1).contiguous()
    return slices[slices.sum(1).argsort()]


# ------------------------------------------------------------------------------------------------
# Texts: what one tokenizer does to a text first, that the other may not do

TEXTS = (
    "a photo of a cat",
    "A Photo of THE Cat",
    " two  dogs\tand a\nbird ",
    "it's 12.5% off, isn't it?!",
    "cafe\u0301, naïve ﬁsh",
    "salt &amp; pepper &lt;3",
    "it’s â€œquotedâ€\x9d",
    "猫の写真 🙂👍🏽",
    "before <|endoftext|> after",
    "",
    "a very long text " * 60,
)
"""Each is for a step of cleaning or splitting; the last is longer than any context."""


def _clean_as_openai(text: str) -> str:
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


CLEANING: dict[str, Callable[[str], str]] = {
    "lower-casing": lambda text: "".join(c.lower() for c in text),
    "squeezing of white space": lambda text: re.sub(r"\s+", " ", text),
    "composing of accents (NFC)": lambda text: unicodedata.normalize("NFC", text),
    "OpenAI's cleaning (ftfy, html)": _clean_as_openai,
}


def cause_in_tokens(
    model: Callable[[Sequence[str]], Tensor],
    other: Callable[[Sequence[str]], Tensor],
    words: Sequence[str] = (),
) -> str:
    """What sets two tokenizers apart on TEXTS, or on `words` of a vocabulary.

    They give ids (B, T) and cut what is too long.

    >>> from miniclip import Tokenizer
    >>> one = Tokenizer.from_pretrained("cifar10", reference="transformers")
    >>> other = Tokenizer.from_pretrained("cifar10", reference="openai")
    >>> cause_in_tokens(lambda t: one(t, truncate=True), lambda t: other(t, truncate=True))
    "model lacks OpenAI's cleaning (ftfy, html)"
    """
    ours, theirs = model(TEXTS).tolist(), other(TEXTS).tolist()
    if ours == theirs:
        pairs = zip(words, model(words).tolist(), other(words).tolist())
        return f"first at the word {next(word for word, *rows in pairs if rows[0] != rows[1])!r}"
    if _without_padding(ours) == _without_padding(theirs):
        if len(ours[0]) != len(theirs[0]):
            return f"rows of {len(ours[0])} ids in model, {len(theirs[0])} in other"
        return f"padding with {ours[0][-1]} in model, {theirs[0][-1]} in other"
    if len(ours[0]) != len(theirs[0]):
        short = min(len(ours[0]), len(theirs[0]))
        cut = ([row[: short - 1] for row in _without_padding(rows)] for rows in (ours, theirs))
        if next(cut) == next(cut):
            return f"rows of {len(ours[0])} ids in model, {len(theirs[0])} in other"
    for fault, clean in CLEANING.items():
        texts = [clean(text) for text in TEXTS]
        for name, found, expected in (("model", model, theirs), ("other", other, ours)):
            if _without_padding(found(texts).tolist()) == _without_padding(expected):
                return f"{name} lacks {fault}"
    for word, position in (("start", 0), ("end", -1)):
        one, two = ([row[position] for row in _without_padding(rows)] for rows in (ours, theirs))
        for a, b in zip(one, two):
            if a != b:
                return f"the {word} token is {a} in model, {b} in other"
    rows = zip(TEXTS, _without_padding(ours), _without_padding(theirs))
    text = next(text for text, one, two in rows if one != two)
    return f"first at the text {text[:30]!r}"


def _without_padding(rows: list[list[int]]) -> list[list[int]]:
    """Rows up to the end token, which the empty text has in second place."""
    end = rows[TEXTS.index("")][1]
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


# ------------------------------------------------------------------------------------------------
# Pictures: an image transform as one formula, with its usual faults


def pictures(size: int) -> list[Image.Image]:
    """Pictures for a transform to `size` pixels. The first eight are not resized, and their margins
    of 1 to 7 pixels show how a crop rounds; the others are resized, or in another mode."""
    random = np.random.default_rng(0)

    def noise(width: int, height: int, smooth: int = 1) -> Image.Image:
        small = random.integers(0, 256, (-(-height // smooth), -(-width // smooth), 3), np.uint8)
        return Image.fromarray(small.repeat(smooth, 0).repeat(smooth, 1)[:height, :width])

    margins = [noise(size + m, size) for m in (0, 1, 3, 5)]
    margins += [noise(size, size + m) for m in (1, 2, 3, 7)]
    resized = [noise(2 * size + 9, 3 * size + 4, 5), noise(size // 2 + 3, size // 2 + 1, 3)]
    red, green, blue = resized[0].split()
    transparent = Image.merge("RGBA", (red, green, blue, red.point(lambda v: 255 * (v > 127))))
    return [*margins, *resized, resized[0].convert("L"), resized[0].convert("P"), transparent]


class Steps(NamedTuple):
    """An image transform: transformers', until something in it is replaced."""

    size: int
    crop_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling = Image.Resampling.BICUBIC
    offset: Callable[[int], int] = lambda margin: margin // 2
    rgb_last: bool = False
    background: str | None = "white"
    long_side: Callable[[float], int] = int
    square: bool = False
    bgr: bool = False
    divisor: float = 255.0


def pixels_of(picture: Image.Image, s: Steps) -> np.ndarray:
    """The pixels (3, S, S) of a picture."""
    if not s.rgb_last:
        picture = _to_rgb(picture, s.background)
    long = s.long_side(s.size * max(picture.size) / min(picture.size))
    size = (s.size, long) if picture.width <= picture.height else (long, s.size)
    picture = picture.resize((s.size, s.size) if s.square else size, s.resample)
    left, top = (s.offset(side - s.crop_size) for side in picture.size)
    picture = picture.crop((left, top, left + s.crop_size, top + s.crop_size))
    array = np.asarray(picture.convert("RGB")).transpose(2, 0, 1) / s.divisor
    array = array[::-1] if s.bgr else array
    return (array - np.array(s.mean)[:, None, None]) / np.array(s.std)[:, None, None]


def _to_rgb(picture: Image.Image, background: str | None) -> Image.Image:
    if background and "A" in picture.getbands():
        below = Image.new("RGBA", picture.size, background)
        picture = Image.alpha_composite(below, picture.convert("RGBA"))
    return picture.convert("RGB")


def _half_to_even(margin: int) -> int:
    return round(margin / 2)


FAULTS_OF_PIXELS: dict[str, dict[str, Any]] = {
    "a crop that rounds half to even, not down": {"offset": _half_to_even},
    "a crop that rounds up, not down": {"offset": lambda margin: -(-margin // 2)},
    "a crop from the upper left corner": {"offset": lambda margin: 0},
    "OpenAI's order and crop": {"offset": _half_to_even, "rgb_last": True},
    "RGB after the resize, not before": {"rgb_last": True},
    "transparency that is dropped, not laid on white": {"background": None},
    "transparency laid on black, not on white": {"background": "black"},
    "a long side that is rounded, not cut": {"long_side": round},
    "a resize to a square": {"square": True},
    "the colours in the order BGR": {"bgr": True},
    "bytes that are not divided by 255": {"divisor": 1.0},
    "bytes divided by 255 twice": {"divisor": 255.0**2},
    "bytes divided by 256": {"divisor": 256.0},
    "no mean and std": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    "OpenAI's mean and std": {"mean": OPENAI_MEAN, "std": OPENAI_STD},
    "a mean and std of 0.5": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "ImageNet's mean and std": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    **{
        f"{resample.name.lower()} resampling, not bicubic": {"resample": resample}
        for resample in Image.Resampling
        if resample != Image.Resampling.BICUBIC
    },
}


def cause_in_pixels(ours: Any, theirs: Any, one: list[Tensor], other: list[Tensor]) -> str:
    """What sets two transforms apart that made `one` and `other` of `pictures(ours.size)`.

    They are ImageTransforms; for `theirs`, any function will do.

    >>> from miniclip import ImageTransform
    >>> cause_in_pixels(ImageTransform(64), ImageTransform(64, crop_size=60), [], [])
    'crop_size is 64 in model, 60 in other'
    """
    for name in ("size", "crop_size", "image_mean", "image_std", "reference"):
        a, b = getattr(ours, name), getattr(theirs, name, getattr(ours, name))
        if a != b:
            return f"{name} is {a} in model, {b} in other"
    steps = Steps(ours.size, ours.crop_size, ours.image_mean, ours.image_std)
    drawn = pictures(ours.size)
    for fault, changed in FAULTS_OF_PIXELS.items():
        if steps._replace(**changed) == steps:  # no fault here
            continue
        faulty = [pixels_of(picture, steps._replace(**changed)) for picture in drawn]
        for name, found in (("model", one), ("other", other)):
            pairs = zip(faulty, found, strict=True)
            if all(near(torch.from_numpy(a), b.double(), 1e-5) for a, b in pairs):
                return f"{name} has {fault}"
    return ""
