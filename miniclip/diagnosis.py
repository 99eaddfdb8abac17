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
from functools import reduce
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

    The site is the first that differs. An empty text if nothing is known.
    """
    ours, theirs = model.tensors[site], other.tensors[site]
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)} in model, {tuple(theirs.shape)} in other"
    for name, tensor in (("model", ours), ("other", theirs)):
        if not tensor.isfinite().all():
            return f"{name} has numbers that are not finite"
    # transformers takes the softmax of a pattern in float32, whatever the model's precision.
    tolerance = 1e-6 if site.endswith(".pattern") else 1e-9
    followers = []  # of CLIP's formula, with their own weights and config
    for source, target, names in ((other, model, NAMES[::-1]), (model, other, NAMES)):
        x, weights, options = _parts(site, source)
        right = _compute(site, x, weights, options)
        if right is None or not near(right, source.tensors[site], tolerance):
            continue
        followers.append(names[0])
        for fault, w, o in _faults(site, source, target, weights, options):
            found = _compute(site, x, w, o)
            if near(found, target.tensors[site], tolerance) and not near(found, right, tolerance):
                return f"{names[1]} has {fault}"
    if moved := _block_moved(site, model, other):
        return moved
    if followers == list(NAMES[::-1]):
        return _differing_weights(site, model, other)
    if followers:
        wrong = "model" if followers == ["other"] else "other"
        return f"{wrong} does not compute CLIP's formula with its own weights"
    return ""


NAMES = ("model", "other")


def near(one: Tensor | None, other: Tensor, tolerance: float) -> bool:
    """Whether two tensors are equal but for rounding, relative to the largest number above 1."""
    if one is None or one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= tolerance * max(1.0, other.abs().max().item()))


# ------------------------------------------------------------------------------------------------
# The formulas. x: the tensors before the site, w: weights, o: options, each under short names.


def _norm(x: Tensor, w: Named, name: str, o: Options) -> Tensor:
    if o["skipped"] == name:
        return x
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], o["eps"])


def _linear(x: Tensor, w: Named, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _vision_embeddings(x: Named, w: Named, o: Options) -> Tensor:
    pixels = o["pixels"](x["pixels"])
    patches = F.conv2d(pixels, w["patch_embed.weight"], stride=w["patch_embed.weight"].shape[-1])
    patches = o["patches"](patches).flatten(2).transpose(1, 2)  # (B, P, W)
    tokens = [w["class_embed"].expand(len(patches), 1, -1), patches]
    stream = torch.cat(tokens[::-1] if o["class_last"] else tokens, 1) + w["pos_embed"]
    if "register_embed" in w:
        registers = w["register_embed"].expand(len(stream), -1, -1)
        stream = torch.cat([stream[:, :1], registers, stream[:, 1:]], 1)
    return stream


def _text_embeddings(x: Named, w: Named, o: Options) -> Tensor:
    return w["token_embed.weight"][x["ids"]] + w["pos_embed"][: x["ids"].shape[1]]


def _resid_pre(x: Named, w: Named, o: Options) -> Tensor:
    if "before" in x:
        return x["before"]
    return _norm(x["embeddings"], w, "ln_pre", o) if "ln_pre.weight" in w else x["embeddings"]


def _qkv(x: Named, w: Named, o: Options, name: str) -> Tensor:
    return _linear(_norm(x["resid_pre"], w, "ln_1", o), w, f"attn.{name}_proj")


def _split(x: Tensor, o: Options) -> Tensor:
    if o["interleaved"]:
        return x.unflatten(-1, (o["head_width"], -1)).permute(0, 3, 1, 2)  # (B, H, T, D)
    return x.unflatten(-1, (-1, o["head_width"])).transpose(1, 2)  # (B, H, T, D)


def _pattern(x: Named, w: Named, o: Options) -> Tensor:
    scores = _split(x["q"], o) @ _split(x["k"], o).transpose(-2, -1) * o["scale"]
    hidden = {
        "causal": torch.ones(scores.shape[-2:]).triu(1),
        "reversed": torch.ones(scores.shape[-2:]).tril(-1),
        "none": torch.zeros(scores.shape[-2:]),
    }[o["mask"]]
    return scores.masked_fill(hidden.bool(), -torch.inf).softmax(-1)


def _attn_out(x: Named, w: Named, o: Options) -> Tensor:
    z = _pattern(x, w, o) @ _split(x["v"], o)  # (B, H, T, D)
    return _linear(z.transpose(1, 2).flatten(2), w, "attn.out_proj")


def _sum(x: Named, terms: Sequence[str]) -> Tensor:
    return reduce(torch.add, (x[term] for term in terms))


def _mlp_out(x: Named, w: Named, o: Options) -> Tensor:
    stream = _sum(x, o["resid_mid"])
    neurons = ACTIVATIONS[o["act"]](_linear(_norm(stream, w, "ln_2", o), w, "mlp.fc1"))
    return _linear(neurons, w, "mlp.fc2")


def _resid_post(x: Named, w: Named, o: Options) -> Tensor:
    return _sum(x, o["resid_post"])


def _vision_pooled(x: Named, w: Named, o: Options) -> Tensor:
    return o["pool"](_norm(x["before"], w, "ln_post", o))


def _text_pooled(x: Named, w: Named, o: Options) -> Tensor:
    stream = _norm(x["before"], w, "ln_final", o)
    return stream[torch.arange(len(stream)), o["position"](x["ids"])]


def _projected(x: Named, w: Named, o: Options) -> Tensor:
    return _linear(x["pooled"], w, "proj")


def _logits(x: Named, w: Named, o: Options) -> Tensor:
    images, texts = (
        x[tower] if tower in o["raw"] else F.normalize(x[tower], dim=-1)
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
    "vision.pooled": _vision_pooled,
    "text.pooled": _text_pooled,
    "projected": _projected,
    "logits": _logits,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
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
        towers = {tower: side.tensors[f"{tower}.projected"] for tower in ("vision", "text")}
        return towers, _under("", side.weights), {"raw": (), "temperature": torch.exp}
    tower, *block = site.split(".")[:-1]
    config = getattr(side.config, tower)
    x = _under("", side.tensors) | _under(f"{tower}.", side.tensors)
    x |= _under(f"{'.'.join([tower, *block])}.", side.tensors)
    layer = int(block[1]) if block else config.layers
    if layer:
        x["before"] = side.tensors[f"{tower}.blocks.{layer - 1}.resid_post"]
    # The first residual stream comes out of the tower's own parameters, and not out of a block's.
    own = not block or site.endswith("blocks.0.resid_pre")
    w = _under(f"{tower}." if own else f"{tower}.blocks.{layer}.", side.weights)
    head_width = config.head_width or config.width // config.heads
    return x, w, {
        "eps": config.ln_eps,
        "act": config.act,
        "mask": "causal" if tower == "text" else "none",
        "head_width": head_width,
        "scale": head_width**-0.5,
        "skipped": None,
        "interleaved": False,
        "resid_mid": ("resid_pre", "attn_out"),
        "resid_post": ("resid_pre", "attn_out", "mlp_out"),
        "class_last": False,
        "pixels": lambda pixels: pixels,
        "patches": lambda patches: patches,
        "pool": lambda x: x[:, 0],
        "position": _end_of(config) if tower == "text" else None,
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
# The faults


Fault = tuple[str, Named, Options]


def _faults(site: str, source: Side, target: Side, w: Named, o: Options) -> Iterator[Fault]:
    """Each fault with the weights and the options that have it. One that has no part in the site's
    formula changes nothing there, and so is never taken for the cause."""
    for fault, changed in _faults_of_options(site, source, target, o):
        yield fault, w, o | changed
    for fault, weights in _faults_of_weights(w):
        yield fault, {**w, **weights}, o
    if match := re.match(r"(\w+\.blocks)\.(\d+)\.", site):
        stack, layer = match.groups()
        for i in range(getattr(source.config, stack.partition(".")[0]).layers):
            if i != int(layer):
                yield f"the weights of block {i}", _under(f"{stack}.{i}.", source.weights), o


def _faults_of_options(
    site: str, source: Side, target: Side, o: Options
) -> Iterator[tuple[str, Options]]:
    if site == "logits":
        yield "a logit scale that is not exponentiated", {"temperature": lambda scale: scale}
        yield "no logit scale", {"temperature": torch.ones_like}
        yield "embeddings that are not normalised", {"raw": ("vision", "text")}
        yield "image embeddings that are not normalised", {"raw": ("vision",)}
        yield "text embeddings that are not normalised", {"raw": ("text",)}
        return
    tower = site.partition(".")[0]
    config, peer = getattr(source.config, tower), getattr(target.config, tower)
    for act in ACTIVATIONS:
        yield f"the activation {act} for {o['act']}", {"act": act}
    for eps in (peer.ln_eps, 1e-6, 1e-5, 1e-12, 1e-3, 0.0):
        yield f"a LayerNorm eps of {eps:g} for {o['eps']:g}", {"eps": eps}
    yield "no causal mask", {"mask": "none"}
    yield "a causal mask", {"mask": "causal"}
    yield "a causal mask the wrong way round", {"mask": "reversed"}
    for scale, words in (
        (1.0, "scores that are not scaled"),
        (1 / o["head_width"], "scores scaled by 1 / head width, and not its root"),
        (config.width**-0.5, "scores scaled by the root of the width, and not of a head's"),
    ):
        yield words, {"scale": scale}
    yield "heads that are split the wrong way round", {"interleaved": True}
    for width in {o["head_width"] * 2, o["head_width"] // 2} - {0}:
        yield (
            f"heads of width {width} for {o['head_width']}",
            {
                "head_width": width,
                "scale": width**-0.5,
            },
        )
    for name in ("ln_pre", "ln_1", "ln_2", "ln_post", "ln_final"):
        yield f"no {name}", {"skipped": name}
    yield "the MLP beside attention, and not after it", {"resid_mid": ("resid_pre",)}
    yield "no residual connection around attention", {"resid_mid": ("attn_out",)}
    yield "no residual connection around the MLP", {"resid_post": ("mlp_out",)}
    yield "no MLP in the residual stream", {"resid_post": ("resid_pre", "attn_out")}
    yield "no attention in the residual stream", {"resid_post": ("resid_pre", "mlp_out")}
    yield "the class token last", {"class_last": True}
    yield "the colours in the order BGR", {"pixels": lambda x: x.flip(1)}
    yield "rows and columns of pixels exchanged", {"pixels": lambda x: x.mT}
    yield "patches in the order of columns", {"patches": lambda x: x.mT}
    yield "pooling at the mean of all tokens", {"pool": lambda x: x.mean(1)}
    yield "pooling at the mean of the patches", {"pool": lambda x: x[:, 1:].mean(1)}
    yield "pooling at the last token", {"pool": lambda x: x[:, -1]}
    if tower == "text":
        yield from _wrong_positions(o["position"], peer)


def _wrong_positions(
    end: Callable[[Tensor], Tensor], peer: TextConfig
) -> Iterator[tuple[str, Options]]:
    for words, position in (
        (f"the end token {peer.eos_token_id}", _end_of(peer)),
        ("texts read at their largest id", lambda ids: ids.argmax(-1)),
        ("texts read at their first token", lambda ids: torch.zeros_like(ids[:, 0])),
        ("texts read at their last token", lambda ids: torch.full_like(ids[:, 0], -1)),
        ("texts read before their end token", lambda ids: end(ids) - 1),
        ("texts read after their end token", lambda ids: (end(ids) + 1) % ids.shape[1]),
    ):
        yield words, {"position": position}


def _faults_of_weights(w: Named) -> Iterator[tuple[str, Named]]:
    for name in w:
        if name.endswith(".bias"):
            yield f"no bias in {name.removesuffix('.bias')}", {name: torch.zeros_like(w[name])}
    for name in w:
        if w[name].ndim == 2 and w[name].shape[0] == w[name].shape[1] and "embed" not in name:
            yield f"{name} transposed", {name: w[name].T}
    for one, two in combinations([name for name in w if name.endswith(".weight")], 2):
        if w[one].shape == w[two].shape:
            one, two = one.removesuffix(".weight"), two.removesuffix(".weight")
            pairs = ((one, two), (two, one))
            swapped = {
                f"{a}.{kind}": w[f"{b}.{kind}"]
                for a, b in pairs
                for kind in ("weight", "bias")
                if f"{b}.{kind}" in w
            }
            yield f"{one} and {two} swapped", swapped
    if "pos_embed" in w:
        positions = w["pos_embed"]
        yield "no position embedding", {"pos_embed": torch.zeros_like(positions)}
        yield "positions that are off by one", {"pos_embed": positions.roll(-1, 0)}
        yield "positions that are off by one", {"pos_embed": positions.roll(1, 0)}
        first = positions.clone()
        first[0] = 0
        yield "no position for the first token", {"pos_embed": first}
    if "class_embed" in w:
        yield "no class token's embedding", {"class_embed": torch.zeros_like(w["class_embed"])}
    for dtype in (torch.float16, torch.bfloat16):
        rounded = {name: tensor.to(dtype).double() for name, tensor in w.items()}
        yield f"weights rounded to {str(dtype).removeprefix('torch.')}", rounded


def _block_moved(site: str, model: Side, other: Side) -> str:
    """Whether another block of one model reads what this block of the other reads."""
    stack, _, kind = site.rpartition(".")
    if kind == "resid_pre":
        for place, tensor in model.tensors.items():
            if place.endswith(".resid_pre") and near(tensor, other.tensors[site], 1e-9):
                return f"model has {place.removesuffix('.resid_pre')} in the place of {stack}"
    return ""


def _differing_weights(site: str, model: Side, other: Side) -> str:
    ours, theirs = (_parts(site, side)[1] for side in (model, other))
    names = [n for n in ours if n not in theirs or not near(ours[n], theirs[n], tolerance=0)]
    return f"other weights: {', '.join(names[:3])}" if names else ""


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
    model: Callable[[Sequence[str]], Tensor], other: Callable[[Sequence[str]], Tensor]
) -> str:
    """What sets two tokenizers apart on TEXTS. They give ids (B, T) and cut what is too long.

    >>> from miniclip import Tokenizer
    >>> one = Tokenizer.from_pretrained("cifar10", reference="transformers")
    >>> other = Tokenizer.from_pretrained("cifar10", reference="openai")
    >>> cause_in_tokens(lambda t: one(t, truncate=True), lambda t: other(t, truncate=True))
    "model lacks OpenAI's cleaning (ftfy, html)"
    """
    ours, theirs = model(TEXTS).tolist(), other(TEXTS).tolist()
    if _without_padding(ours) == _without_padding(theirs):
        if len(ours[0]) != len(theirs[0]):
            return f"rows of {len(ours[0])} ids in model, {len(theirs[0])} in other"
        return f"padding with {ours[0][-1]} in model, {theirs[0][-1]} in other"
    for fault, clean in CLEANING.items():
        texts = [clean(text) for text in TEXTS]
        for name, found, expected in (("model", model, theirs), ("other", other, ours)):
            if _without_padding(found(texts).tolist()) == _without_padding(expected):
                return f"{name} lacks {fault}"
    for word, position in (("start", 0), ("end", -1)):
        one, two = ([row[position] for row in _without_padding(rows)] for rows in (ours, theirs))
        if one != two:
            return f"the {word} token is {one[0]} in model, {two[0]} in other"
    text = next(t for t, *rows in zip(TEXTS, ours, theirs) if rows[0] != rows[1])
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
