"""What the activations mean: attention maps, decompositions, intermediate readings, heat maps.

In the order of this file: attention and what is made of it (rollout, relevance), the embedding as
an exact sum, the residual stream read before its time, one picture of where a text is seen, and how
often each such picture is right, on drawn scenes whose masks are known.

Wherever `model` stands, a CLIP or one of its towers will do; of a CLIP, floats are given to the
vision tower and ids to the text tower. A tower's output is read at one token, the class token of an
image or the end token of a text; it is here called the token that is read. Nothing in this file
changes a weight.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from miniclip.checkpoint import Loaded
from miniclip.files.pictures import Picture
from miniclip.model import CLIP, TextTower, VisionTower
from miniclip.sites import cache, hooks
from miniclip.transform import ImageTransform

Tower = VisionTower | TextTower


def tower_for(model: CLIP | Tower, x: Tensor) -> Tower:
    """The model itself, or of a CLIP the tower that reads x: ids or pixels."""
    name = "vision" if x.is_floating_point() else "text"
    tower: Any = model if hasattr(model, "blocks") else getattr(model, name)
    return tower


def read_positions(tower: Tower, x: Tensor) -> Tensor:
    """Where the token that is read stands in each row of the batch, (B,)."""
    if eos_positions := getattr(tower, "eos_positions", None):
        return eos_positions(x)
    return torch.zeros(len(x), dtype=torch.long, device=x.device)


def take(tokens: Tensor, positions: Tensor) -> Tensor:
    """One token of each row: (B, T, ...) -> (B, ...)."""
    return tokens[torch.arange(len(tokens), device=tokens.device), positions]


def last_norm(tower: Tower) -> tuple[str, nn.LayerNorm]:
    """The LayerNorm before the projection, and its name."""
    name = "ln_post" if hasattr(tower, "ln_post") else "ln_final"
    return name, getattr(tower, name)


def patch_grid(tower: Any, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of a VisionTower's patches. They are the last tokens of an image."""
    rows, columns = (n // s for n, s in zip(pixels.shape[-2:], tower.patch_embed.stride))
    return rows, columns


def on_grid(model: CLIP | VisionTower, pixels: Tensor, tokens: Tensor) -> Tensor:
    """Numbers of an image's tokens as a map of its patches: (B, T) -> (B, rows, columns)."""
    rows, columns = patch_grid(tower_for(model, pixels), pixels)
    return tokens[:, -rows * columns :].unflatten(1, (rows, columns))


# -- attention ------------------------------------------------------------------------------------


@torch.no_grad()
def attention_maps(model: CLIP | Tower, x: Tensor) -> list[Tensor]:
    """The attention pattern of every block, (B, H, T, T): head, looking token, token looked at.

    >>> from miniclip import CLIP
    >>> maps = attention_maps(CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64))
    >>> len(maps), maps[0].shape
    (4, torch.Size([1, 3, 65, 65]))
    """
    tower = tower_for(model, x)
    with cache(tower, "blocks.*.attn.pattern") as acts:
        tower(x)
    return list(acts.values())


@torch.no_grad()
def rollout(model: CLIP | Tower, x: Tensor) -> Tensor:
    """How the token that is read draws on each input token, if nothing but attention mixed them.

    (B, T), rows sum to 1. Abnar and Zuidema 2020, arXiv 2005.00928: the mean over the heads, half
    of it replaced by the identity for the residual connection, multiplied through the blocks.

    >>> from miniclip import CLIP
    >>> rollout(CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 65])
    """
    maps = attention_maps(model, x)
    paths = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=x.device)  # (T, T)
    for pattern in maps:
        if pattern.shape[1]:  # a layer that has lost all its heads mixes nothing
            paths = (pattern.mean(1) @ paths + paths) / 2  # (B, T, T)
    paths = paths.expand(len(x), -1, -1)
    return take(paths, read_positions(tower_for(model, x), x))


class Relevance(NamedTuple):
    """What each token adds to the logits of B pairs; the token that is read counts itself as 1."""

    image: Tensor  # (B, 1 + P)
    text: Tensor  # (B, T)


def relevance(model: CLIP, pixels: Tensor, ids: Tensor, *, start: int = 0) -> Relevance:
    """Attention weighted by its gradient, for B pairs of an image and a text, in both towers.

    Chefer et al. 2021, "Generic Attention-model Explainability", arXiv 2103.15679, equations 5 and
    6: of each head's pattern times the gradient of the pair's logit the positive part, the mean
    over the heads, accumulated over the blocks from `start` on. The paper starts at 0; the authors'
    notebook for CLIP at -1, with the last block alone.

    >>> import miniclip
    >>> model, tokenizer, _ = miniclip.load("shapes")
    >>> relevance(model, torch.zeros(1, 3, 64, 64), tokenizer(["a red circle"])).image.shape
    torch.Size([1, 65])
    """
    if len(pixels) != len(ids):
        raise ValueError(
            f"{len(pixels)} images and {len(ids)} texts; expected pairs: repeat what is asked "
            "about several times, as by pixels.expand(len(ids), -1, -1, -1)"
        )
    # Also where the caller has switched gradients off; a tensor from there must be copied.
    with torch.inference_mode(False), torch.enable_grad():
        with cache(model, "*.blocks.*.attn.pattern", grad=True) as acts:
            logits = model(pixels.clone(), ids.clone()).logits_per_image.diagonal()  # (B,)
        slopes = torch.autograd.grad(logits.sum(), list(acts.values()))

    def accumulate(tower: str, x: Tensor) -> Tensor:
        weighted = [
            (slope * pattern).clamp(min=0).sum(1) / max(pattern.shape[1], 1)  # (B, T, T)
            for slope, (name, pattern) in zip(slopes, acts.items())
            if name.startswith(tower)
        ]
        paths = torch.eye(weighted[0].shape[-1], dtype=logits.dtype, device=x.device)  # (T, T)
        for one in weighted[start:]:
            paths = paths + one @ paths  # (B, T, T)
        return take(paths, read_positions(getattr(model, tower), x)).detach()

    return Relevance(accumulate("vision", pixels), accumulate("text", ids))


# -- the embedding as a sum -----------------------------------------------------------------------


def read_rows(tower: Tower, x: Tensor, sites: dict[str, Callable]) -> dict[str, Tensor]:
    """Run the blocks; of each matching site keep function(tensor, read positions), and no more.

    The residual stream before the first block, of which no module is the site, is "embed".
    """
    positions, rows = read_positions(tower, x), {}

    def keep(function: Callable) -> Callable:
        return lambda tensor, name: rows.update({name: function(tensor, positions)})

    with hooks(tower, {glob: keep(function) for glob, function in sites.items()}):
        stream = tower.embed(x)
        rows["embed"] = take(stream, positions)
        tower.blocks(stream)
    return rows


# What heads read (B, H, D) or, from each token, (B, H, T, D), times what they write, (E, H, D).
GRAINS = {"layer": "bhd,ehd->be", "head": "bhd,ehd->bhe", "token": "bhtd,ehd->bhte"}


@torch.no_grad()
def decompose(model: CLIP | Tower, x: Tensor, by: str = "layer") -> dict[str, Tensor]:
    """The embedding as a sum of what each part of the tower wrote into the token that is read.

    Each part is a vector of the shared space: multiply it by a text's embedding to see what it is
    for. "embed" is the stream before the first block; "blocks.3.mlp" is (B, E), and "blocks.3.attn"
    (B, E), by="head" (B, H, E), by="token" (B, H, T, E), where T are the tokens looked at. Biases
    are parts of their own, under their own names. That of the values belongs to no token, because a
    head's pattern sums to 1, but to a head it does: by head and token, "blocks.3.attn.v_proj.bias"
    is (B, H, E), and the rest of what its heads write. The last LayerNorm divides by the
    length that the stream has, and so the sum is exact. Gandelsman et al. 2023, arXiv 2310.05916;
    here without the part of a head that cannot reach the embedding: memory is that of the result.

    Raises ValueError where the sum is not the embedding, as when a hook edits the stream.

    >>> from miniclip import CLIP
    >>> model, pixels = CLIP.from_pretrained("shapes"), torch.ones(2, 3, 64, 64)
    >>> parts = decompose(model, pixels, by="head")
    >>> total = sum(part.reshape(2, -1, 128).sum(1) for part in parts.values())
    >>> torch.allclose(total, model.encode_image(pixels), atol=1e-5)
    True
    """
    if by not in GRAINS:
        raise ValueError(f"by is {by!r}; expected {', '.join(map(repr, GRAINS))}")
    tower = tower_for(model, x)
    sites: dict[str, Callable[..., Tensor]] = {"blocks.*": take, "blocks.*.mlp": take}
    if by == "token":
        sites["blocks.*.attn.v"] = lambda v, positions: v  # (B, T, H, D)
        sites["blocks.*.attn.pattern"] = lambda p, positions: take(p.transpose(1, 2), positions)
    else:
        sites["blocks.*.attn.z"] = take  # (B, H, D)
    rows = read_rows(tower, x, sites)

    norm_name, norm = last_norm(tower)
    last = rows[f"blocks.{len(tower.blocks) - 1}"]  # (B, W)
    # From the stream to the embedding all is linear, once the length is known: the LayerNorm's
    # mean and weight and the projection are one matrix.
    readout = weight_of(tower.proj, last.shape[-1]) * norm.weight  # (E, W)
    readout = readout - readout.mean(1, keepdim=True)
    length = (last.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()  # (B, 1)

    def read(part: Tensor) -> Tensor:
        return part @ readout.T / length  # (B, W) or (W) -> (B, E)

    def read_heads(mixed: Tensor, per_head: Tensor, grain: str) -> Tensor:
        written = torch.einsum(GRAINS[grain], mixed, per_head)
        return written / length.view(-1, *[1] * (written.ndim - 1))

    parts = {"embed": read(rows["embed"])}
    block: Any  # a Block, or what someone has put in its place
    for i, block in enumerate(tower.blocks):
        name, attn = f"blocks.{i}", block.attn
        heads = (-1, attn.head_width)
        bias = attn.v_proj.bias.unflatten(0, heads)  # (H, D)
        out = weight_of(attn.out_proj, bias.numel())  # (W, H * D)
        per_head = (readout @ out).unflatten(1, heads)  # (E, H, D)
        if by == "token":
            values = rows[f"{name}.attn.v"] - bias  # (B, T, H, D)
            mixed = torch.einsum("bht,bthd->bhtd", rows[f"{name}.attn.pattern"], values)
        else:
            mixed = rows[f"{name}.attn.z"] - bias  # (B, H, D)
        parts[f"{name}.attn"] = read_heads(mixed, per_head, by)
        coarse = "layer" if by == "layer" else "head"
        parts[f"{name}.attn.v_proj.bias"] = read_heads(bias[None], per_head, coarse)
        parts[f"{name}.attn.out_proj.bias"] = read(attn.out_proj.bias)
        parts[f"{name}.mlp"] = read(rows[f"{name}.mlp"] - block.mlp.fc2.bias)
        parts[f"{name}.mlp.fc2.bias"] = read(block.mlp.fc2.bias)
    parts[f"{norm_name}.bias"] = tower.proj(norm.bias).expand_as(parts["embed"])
    check_sum(parts, tower.proj(norm(last)))
    return parts


def weight_of(linear: nn.Module, width: int) -> Tensor:
    """The matrix that a module multiplies by, also where a LoRA stands in a Linear's place."""
    if type(linear) is nn.Linear:
        return linear.weight
    like = next(linear.parameters())
    one = torch.eye(width, dtype=like.dtype, device=like.device)
    return (linear(one) - linear(torch.zeros_like(one))).T


def check_sum(parts: dict[str, Tensor], embedding: Tensor) -> None:
    """Raises ValueError unless the parts (B, ..., E) add up to the embedding (B, E)."""
    B, E = embedding.shape
    flat = [part.reshape(B, -1, E) for part in parts.values()]
    distance = (sum(part.sum(1) for part in flat) - embedding).abs().max()
    size = sum((part.abs().sum(1) for part in flat), torch.zeros_like(embedding)).max()
    if not distance <= 1000 * torch.finfo(embedding.dtype).eps * size:
        raise ValueError(
            f"the parts miss the embedding by {distance:.2g}: something in this tower is not what "
            "its weights say, as a hook that edits the stream or a module that was replaced"
        )


# -- the stream before its time -------------------------------------------------------------------


@torch.no_grad()
def logit_lens(model: CLIP | Tower, x: Tensor, ln: str = "recompute") -> Tensor:
    """The embedding that the tower would give if it ended after 0, 1, ... or all L blocks.

    (B, 1 + L, E); the last is the tower's output. nostalgebraist 2020, "interpreting GPT: the logit
    lens". The last LayerNorm divides by the length of the stream: with ln="recompute" that of the
    stream where it is read, as if the tower ended there; with "final" that at the end, which makes
    the difference of two entries what the blocks between them added (`decompose`).

    >>> from miniclip import CLIP
    >>> logit_lens(CLIP.from_pretrained("shapes"), torch.ones(2, 3, 64, 64)).shape
    torch.Size([2, 5, 128])
    """
    if ln not in ("recompute", "final"):
        raise ValueError(f"ln is {ln!r}; expected 'recompute' or 'final'")
    tower = tower_for(model, x)
    rows = read_rows(tower, x, {"blocks.*": take})
    streams = torch.stack(list(rows.values()), dim=1)  # (B, 1 + L, W)
    _, norm = last_norm(tower)
    if ln == "recompute":
        return tower.proj(norm(streams))
    length = (streams[:, -1:].var(-1, correction=0, keepdim=True) + norm.eps).sqrt()  # (B, 1, 1)
    centred = streams - streams.mean(-1, keepdim=True)
    return tower.proj(centred / length * norm.weight + norm.bias)


def forward_intermediates(
    model: CLIP | Tower,
    x: Tensor,
    indices: int | list[int] | tuple[int, ...] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
) -> list | tuple[Tensor, list]:
    """The residual stream after chosen blocks: timm's method of this name, with its arguments.

    `indices`: the last so many blocks, or these, or all. Images: "NCHW" (B, W, rows, columns) or
    "NLC" (B, P, W), with `return_prefix_tokens` each a pair with the tokens before the patches;
    texts: "NLC" (B, T, W). `norm` applies the last LayerNorm to them. Returns (the last block's
    tokens, normalised, and the list), or the list alone. `stop_early` computes no block that is not
    needed. Gradients flow.

    >>> from miniclip import CLIP
    >>> vision, pixels = CLIP.from_pretrained("shapes").vision, torch.zeros(1, 3, 64, 64)
    >>> final, maps = forward_intermediates(vision, pixels, indices=[1, -1])
    >>> final.shape, [m.shape for m in maps] == [(1, 96, 8, 8)] * 2
    (torch.Size([1, 65, 96]), True)
    """
    tower = tower_for(model, x)
    is_image = hasattr(tower, "patch_embed")
    if output_fmt not in (("NCHW", "NLC") if is_image else ("NLC",)):
        expected = "'NCHW' or 'NLC'" if is_image else "'NLC', as texts have no rows and columns"
        raise ValueError(f"output_fmt is {output_fmt!r}; expected {expected}")
    if return_prefix_tokens and not is_image:
        raise ValueError("return_prefix_tokens is for images; a text has no tokens before its own")
    chosen = block_numbers(indices, len(tower.blocks))
    kept, tokens = [], tower.embed(x)
    _, last_ln = last_norm(tower)
    for i, block in enumerate(tower.blocks):
        tokens = block(tokens)
        if i in chosen:
            kept.append(last_ln(tokens) if norm else tokens)
        if stop_early and i == max(chosen):
            break
    if is_image:
        rows, columns = patch_grid(tower, x)
        prefixes = [one[:, : -rows * columns] for one in kept]
        kept = [one[:, -rows * columns :] for one in kept]  # (B, P, W)
        if output_fmt == "NCHW":
            kept = [one.transpose(1, 2).unflatten(2, (rows, columns)) for one in kept]
        if return_prefix_tokens:
            kept = list(zip(kept, prefixes))
    return kept if intermediates_only else (last_ln(tokens), kept)


def block_numbers(indices: int | list[int] | tuple[int, ...] | None, layers: int) -> set[int]:
    """The numbers from 0 of the blocks that `indices` of `forward_intermediates` names.

    >>> block_numbers(2, 12), block_numbers([0, -1], 12)
    ({10, 11}, {0, 11})
    """
    if indices is None or isinstance(indices, int):
        count = layers if indices is None else indices
        if 0 < count <= layers:
            return set(range(layers - count, layers))
    elif indices and all(-layers <= i < layers for i in indices):
        return {i % layers for i in indices}
    raise ValueError(
        f"indices is {indices!r}; expected a number of blocks from 1 to {layers}, or a list of "
        f"block numbers from {-layers} to {layers - 1}"
    )


# -- where a text is seen -------------------------------------------------------------------------
# Each method: B images and B texts -> a map of each image's patches, (B, rows, columns).


def last_attention(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """What the class token looks at in the last block, the mean of the heads; blind to the text."""
    return on_grid(model, pixels, attention_maps(model, pixels)[-1][:, :, 0].mean(1))


def head_map(model: CLIP, pixels: Tensor, layer: int, head: int) -> Tensor:
    """What the class token looks at, by one head of one block; blind to any text.

    (B, rows, columns). Raises ValueError where there is no such block or head.

    >>> from miniclip import CLIP
    >>> head_map(CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64), layer=3, head=0).shape
    torch.Size([1, 8, 8])
    """
    maps = attention_maps(model, pixels)
    if not 0 <= layer < len(maps) or not 0 <= head < maps[layer].shape[1]:
        heads = [pattern.shape[1] for pattern in maps]
        raise ValueError(f"no head {head} in layer {layer}; the layers, from 0, have {heads} heads")
    return on_grid(model, pixels, maps[layer][:, head, 0])


def rollout_map(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """`rollout`; blind to the text."""
    return on_grid(model, pixels, rollout(model, pixels))


def relevance_map(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """`relevance` of the image's patches for the text."""
    return on_grid(model, pixels, relevance(model, pixels, ids).image)


@torch.no_grad()
def token_map(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """What all heads, by `decompose`, write from each patch in the direction of the text."""
    texts = model.encode_text(ids, normalize=True)  # (B, E)
    parts = decompose(model, pixels, by="token")
    tokens = sum(part.sum(1) for part in parts.values() if part.ndim == 4)  # (B, T, E)
    return on_grid(model, pixels, torch.einsum("bte,be->bt", tokens, texts))


@torch.no_grad()
def occlusion(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """What the cosine loses where the image is covered.

    Windows of two by two patches are covered with grey, one after another, and what is lost is
    shared out among the patches that were covered (Zeiler and Fergus 2013, arXiv 1311.2901).
    Positive: the image is less like the text without this patch.
    """
    patch = model.vision.patch_embed.stride[0]
    rows, columns = patch_grid(model.vision, pixels)
    corners = [(i, j) for i in range(max(rows - 1, 1)) for j in range(max(columns - 1, 1))]
    texts = model.encode_text(ids, normalize=True)  # (B, E)
    heat, times = texts.new_zeros(len(texts), rows, columns), texts.new_zeros(rows, columns)
    # A picture with several texts in a row is covered and encoded once.
    pictures, which = torch.unique_consecutive(pixels, dim=0, return_inverse=True)
    for k, picture in enumerate(pictures):
        covered = picture.repeat(1 + len(corners), 1, 1, 1)
        for one, (i, j) in zip(covered[1:], corners):
            one[:, i * patch : (i + 2) * patch, j * patch : (j + 2) * patch] = 0
        embeds = model.encode_image(covered, normalize=True)  # (1 + windows, E)
        cosines = texts[which == k] @ embeds.T
        for n, (i, j) in enumerate(corners, 1):
            lost = cosines[:, 0] - cosines[:, n]
            heat[which == k, i : i + 2, j : j + 2] += lost[:, None, None]
    for i, j in corners:
        times[i : i + 2, j : j + 2] += 1
    return heat / times


METHODS: dict[str, Callable[[CLIP, Tensor, Tensor], Tensor]] = {
    "attention": last_attention,
    "rollout": rollout_map,
    "relevance": relevance_map,
    "tokens": token_map,
    "occlusion": occlusion,
}
BLIND = ("attention", "rollout")  # the methods whose map is the same for every text


def text_maps(
    image: Picture, texts: list[str], loaded: Loaded, method: str = "relevance"
) -> Tensor:
    """Where each of C texts is seen in the image, patch by patch: (C, rows, columns).

    `method` is a key of METHODS. Raises ImageError, ContextLengthError, and ValueError for another
    method or a text without a word.

    >>> import miniclip
    >>> picture, texts = Image.new("RGB", (80, 64)), ["a red circle", "a blue star"]
    >>> text_maps(picture, texts, miniclip.load("shapes")).shape
    torch.Size([2, 8, 8])
    """
    if method not in METHODS:
        raise ValueError(f"no method is called {method!r}; expected one of {', '.join(METHODS)}")
    if not all(text.strip() for text in texts):
        raise ValueError("a text is empty: expected at least one word in it")
    model, tokenizer, transform = loaded
    device = model.logit_scale.device
    ids = tokenizer(texts).to(device)  # (C, T)
    pixels = transform([image]).to(device).expand(len(ids), -1, -1, -1)
    return METHODS[method](model, pixels, ids).float().cpu()


def text_map(image: Picture, text: str, loaded: Loaded, method: str = "relevance") -> Tensor:
    """The same for one text: (rows, columns)."""
    return text_maps(image, [text], loaded, method)[0]


def heatmap(image: Picture, text: str, loaded: Loaded, method: str = "relevance") -> Image.Image:
    """A picture of where the text is seen: the image as the model sees it, in grey, under colours.

    `method` is a key of METHODS; what speaks against the text is left dark, as what is neutral.
    Raises ImageError, and ValueError for another method.

    >>> import miniclip
    >>> heatmap(Image.new("RGB", (80, 64)), "a red circle", miniclip.load("shapes")).size
    (64, 64)
    """
    return overlay(seen(image, loaded.transform), text_map(image, text, loaded, method))


def seen(image: Picture, transform: ImageTransform, scale: int = 1) -> Image.Image:
    """The part of an image that the model sees, S x S pixels at `scale` 1, as a picture again.

    A larger scale is for people: the same crop with `scale` times as many pixels along a side.
    """
    larger = replace(transform, size=transform.size * scale, crop_size=transform.crop_size * scale)
    mean, std = torch.tensor(transform.image_mean), torch.tensor(transform.image_std)
    pixels = (larger(image).permute(1, 2, 0) * std + mean) * 255  # (scale * S, scale * S, 3)
    return Image.fromarray(pixels.round().to(torch.uint8).numpy())


# From no heat to the most. Three colours of matplotlib's "inferno": for the colour-blind, and grey
# printers, they run from dark to light.
HEAT_COLOURS = ("#000004", "#bc3754", "#fcffa4")


def overlay(picture: Image.Image, heat: Tensor, warmest: float | None = None) -> Image.Image:
    """Heat (rows, columns), its positive part, laid over the picture in grey: the more, the denser.

    The last of HEAT_COLOURS stands for `warmest`, which is the warmest of this heat unless given.
    """
    shown = heat.clamp(min=0)
    warmest = shown.max().item() if warmest is None else warmest
    levels = (shown / max(warmest, 1e-12) * 255).clamp(max=255).to(torch.uint8).numpy()
    smooth = Image.fromarray(levels).resize(picture.size, Image.Resampling.BILINEAR)
    colours = ImageOps.colorize(smooth, *HEAT_COLOURS[::2], mid=HEAT_COLOURS[1])
    density = smooth.point(lambda h: 90 + h // 2)  # of 255: where it is cold, the picture shows
    return Image.composite(colours, picture.convert("L").convert("RGB"), density)


# -- how often it is right ------------------------------------------------------------------------


class Localisation(NamedTuple):
    """How well a method finds the named one of two objects. Shares, 0 to 1."""

    method: str
    pointing: float  # its warmest pixel is on the object (Zhang et al. 2016, arXiv 1608.00507)
    distracted: float  # its warmest pixel is on the other object
    iou: float  # of the object with as many of the warmest pixels; the mean


class Question(NamedTuple):
    """Where is the object of this colour and shape?"""

    picture: Image.Image
    phrase: str
    named: Tensor  # (S, S) bool, its pixels
    other: Tensor  # (S, S) bool, those of the second object


def questions(scenes: int) -> list[Question]:
    """Two for each scene of two objects; no training set has these scenes."""
    from miniclip.training.shapes import SCORE_SEED, Phrase, draw, say_phrase, scene

    asked = []
    for drawn in (scene(i, seed=SCORE_SEED, count=2) for i in range(scenes)):
        picture, masks = draw(drawn)
        first, second = torch.from_numpy(masks)
        for object, named, other in zip(drawn.objects, (first, second), (second, first)):
            phrase = say_phrase(Phrase("", object.colour, object.shape))
            asked.append(Question(picture, phrase, named, other))
    return asked


def answers(loaded: Loaded, asked: list[Question], method: str, batch: int = 50) -> Tensor:
    """A map for each question, (N, rows, columns)."""
    model, tokenizer, transform = loaded
    device = model.logit_scale.device
    maps = []
    for i in range(0, len(asked), batch):
        pixels = transform([question.picture for question in asked[i : i + batch]])
        ids = tokenizer([question.phrase for question in asked[i : i + batch]])
        maps.append(METHODS[method](model, pixels.to(device), ids.to(device)).cpu())
    return torch.cat(maps)


RANDOM = 5
"""Draws of random weights that a method is scored on: one may point anywhere, by chance."""


def localise(loaded: Loaded, scenes: int = 200) -> dict[str, list[Localisation]]:
    """Every method on drawn scenes of two objects, each asked for by its colour and shape.

    For the model as it is, "trained", and for RANDOM models of its shape with weights drawn anew:
    "random" is the mean of their scores, "spread" the standard deviation. Under "limits" are a
    random map, and the true mask averaged over each patch, which no map of patches can much
    surpass.
    """
    from tqdm import tqdm

    asked = questions(scenes)
    named, other = (torch.stack(masks) for masks in list(zip(*asked))[2:])  # (N, S, S)
    model = loaded.model.eval()
    untrained = [loaded._replace(model=untrained_like(model, seed)) for seed in range(RANDOM)]
    found: dict[str, list[Localisation]] = {"trained": [], "random": [], "spread": [], "limits": []}
    for method in METHODS:
        models = tqdm(
            [loaded, *untrained], method, unit="model", delay=2, disable=None, leave=False
        )
        maps = [answers(one, asked, method) for one in models]
        trained, *others = (localisation(method, heat, named, other) for heat in maps)
        found["trained"].append(trained)
        found["random"].append(summary(statistics.mean, others))
        found["spread"].append(summary(statistics.stdev, others))
    grid = (len(asked), *model.config.vision.grid)
    chance = torch.rand(grid, generator=torch.Generator().manual_seed(0))
    ceiling = F.interpolate(named[:, None].float(), grid[1:], mode="area")[:, 0]
    for name, heat in (("a random map", chance), ("the mask itself", ceiling)):
        found["limits"].append(localisation(name, heat, named, other))
    return found


def untrained_like(model: CLIP, seed: int) -> CLIP:
    """A model of the same shape, device and dtype with weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(model.config).to(model.logit_scale).eval()


def summary(function: Callable[[Sequence[float]], float], rows: list[Localisation]) -> Localisation:
    """A function of each share that several rows of one method have."""
    _, *shares = zip(*rows)
    return Localisation(rows[0].method, *map(function, shares))


def localisation(method: str, heat: Tensor, named: Tensor, other: Tensor) -> Localisation:
    """Compare maps (N, rows, columns) with masks (N, S, S) of the object and of the distractor."""
    size = named.shape[1:]
    heat = F.interpolate(heat[:, None].float(), size, mode="bilinear")[:, 0].flatten(1)
    named, other = named.flatten(1), other.flatten(1)  # (N, S * S)
    warmest = heat.argmax(1, keepdim=True)
    rank = heat.argsort(1, descending=True).argsort(1)  # 0 is the warmest pixel
    area = named.sum(1, keepdim=True)
    common = ((rank < area) & named).sum(1)
    iou = common / (2 * area[:, 0] - common)
    shares = (named.gather(1, warmest), other.gather(1, warmest), iou)
    return Localisation(method, *(share.float().mean().item() for share in shares))
