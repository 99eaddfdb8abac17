"""The faults that are common in reimplementations, one after the other, to plant in a formula."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from miniclip.config import TextConfig
from miniclip.parity.formulas import Options, Side, compute, end_of, under
from miniclip.parity.variants import (
    ACTIVATION_FORMULAS,
    LENGTHS,
    MASKS,
    NORMS,
    PATCHES,
    PIXELS,
    POOLS,
    SOFTMAXES,
    TEMPERATURES,
    Named,
    Pool,
    pool_at,
)

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


def faults(
    site: str, source: Side, target: Side, x: Named, w: Named, o: Options
) -> Iterator[Fault]:
    """Each fault that the site's formula can have, with the weights and options that plant it."""
    weights, options = Noted(w), Noted(o)
    compute(site, x, weights, options)
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
                yield f"the weights of block {i}", under(f"{stack}.{i}.", source.weights), o


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
    for act in ACTIVATION_FORMULAS:
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
        end = end_of(config)
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
        f"the end token {peer.eos_token_id}": end_of(peer),
        "texts read at their largest id": lambda ids: ids.argmax(-1),
        "texts read at their first token": lambda ids: torch.zeros_like(ids[:, 0]),
        "texts read at their last token": lambda ids: torch.full_like(ids[:, 0], -1),
        "texts read at their last end token": last_end,
        "texts read before their end token": lambda ids: end(ids) - 1,
        "texts read after their end token": lambda ids: (end(ids) + 1) % ids.shape[1],
    }
    pools = {fault: pool_at(position) for fault, position in positions.items()}
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
        yield f"weights rounded to {dtype_name(dtype)}", rounded


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


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
