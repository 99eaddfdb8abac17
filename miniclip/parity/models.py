"""The third stage of a comparison: the same pixels and ids through two models."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from miniclip.config import CLIPConfig
from miniclip.model import CLIP
from miniclip.parity.diagnosis import cause_in_model
from miniclip.parity.formulas import Side
from miniclip.parity.random_weights import end_token, random_inputs
from miniclip.parity.report import Difference
from miniclip.parity.sites import config_of, depths, is_theirs, kind_of, sites_of, weights_of
from miniclip.parity.stages import NAMES, Stage, infinitely_far, largest_difference
from miniclip.parity.traces import Trace, lay_out_alike, trace
from miniclip.parity.weights import differing_weights
from miniclip.terminal import progress

if TYPE_CHECKING:
    from transformers import CLIPModel

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
"""What rounding explains on a CPU: absolute for logits. For other tensors, relative to the largest
number there, if that is above 1."""
ON_DEVICES = 1e-4  # the same for float32 on GPUs, which add in another order
IN_PATTERN = 1e-6  # for float64: transformers computes its softmax in float32 even there
MERGED = 1e-6  # in float64, if the two have other parameters: a merged weight is rounded once more
HALF = 2.0
"""In half precision: how many times the other's largest error at a site ours may be.

miniclip's own error equals transformers' at every site. A right fork that adds in another order has
an error of 1.0 times it in the median, of more than 1.1 at 29 % of sites, and of more than 2 at 2
of 2,244, because a maximum depends on few numbers. (Measured in float16 and bfloat16, 2 shapes, 6
seeds: eager attention against sdpa, and an MLP that adds its inputs in reverse.)"""


def compare_models(
    ours: "CLIP | CLIPModel",
    theirs: "CLIP | CLIPModel",
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Stage:
    """A row for each site, and each tensor of the output, that both models have."""
    for name, model in zip(NAMES, (ours, theirs), strict=True):
        if any(weight.is_meta for weight in model.parameters()):
            raise ValueError(f"{name} is on the meta device, where weights have no numbers")
    if depths(ours) != depths(theirs):
        raise ValueError(
            f"the two models differ in their number of blocks: {depths(ours)} and "
            f"{depths(theirs)} in the vision and the text tower; expected the same"
        )
    kind = kind_of(theirs if is_theirs(ours) else ours)  # a fork, if one of the two is one
    configs = (config_of(ours, kind), config_of(theirs, kind))
    pairs = zip((ours, theirs), configs, strict=True)
    weights = [weights_of(model, config, dtype, kind) for model, config in pairs]
    exact = TOLERANCE[torch.float64]
    if _are_an_ulp_apart(*weights):
        exact = TOLERANCE.get(dtype, math.inf)
    elif weights[0].keys() != weights[1].keys():
        exact = MERGED
    inputs = _inputs(*configs, seed)
    plan = [(model, exactly) for model in (ours, theirs) for exactly in (False, True)]
    bar = progress(plan, "run")
    runs = [trace(model, dtype, exactly, device, *inputs) for model, exactly in bar]
    for run, peer in ((runs[0], runs[2]), (runs[1], runs[3])):
        lay_out_alike(run, peer, *map(len, inputs))
        lay_out_alike(peer, run, *map(len, inputs))
    rows = []
    in_order = [site for model in (ours, theirs) for site, *_ in sites_of(model)]
    in_order += [site for run in runs for site in run.tensors if site.startswith("output_")]
    for site in dict.fromkeys(in_order):
        found = [run.tensors[site] for run in runs if site in run.tensors]
        if len(found) == len(runs):
            rows.append(_difference(site, found, dtype, exact, device))
        elif any(run.error for run in runs):
            rows.append(infinitely_far(site))
    named = {"pixels": inputs[0].to(dtype), "ids": inputs[1]}
    sides = [
        Side(named | run.tensors, w, config)
        for run, w, config in zip(runs[1::2], weights, configs, strict=True)
    ]
    failed = next((row for row in rows if not row.within_tolerance), None)
    if failed is None:
        return _compare_unread(rows, sides, exact)
    return rows, _cause(failed, runs, sides, dtype)


def _cause(failed: Difference, runs: "list[Trace]", sides: list[Side], dtype: torch.dtype) -> str:
    """Why the first site out of tolerance differs."""
    names = ("model", "model in float64", "other", "other in float64")
    if any(failed.site not in run.tensors for run in runs):
        return next(f"{name} {run.error}" for name, run in zip(names, runs) if run.error)
    truth = runs[-1].tensors[failed.site]
    if failed.float64 <= _limit(failed.site, TOLERANCE[torch.float64], truth):
        return "rounding: in float64 the two agree"
    for name, pair in zip(NAMES, (runs[:2], runs[2:]), strict=True):
        one, exactly = (run.tensors[failed.site] for run in pair)
        far = 0.01 * max(1.0, exactly.abs().max().item())
        if dtype in TOLERANCE and far < largest_difference(one, exactly) < math.inf:
            return f"{name} in float64 is far from itself: dropout in evaluation?"
    return cause_in_model(failed.site, *sides)


def _compare_unread(rows: list[Difference], sides: list[Side], exact: float) -> Stage:
    """Compare the rows of tables that no text reads: not every word fits into eight texts."""
    site = "text.embeddings"
    ours, theirs = (side.weights for side in sides)
    for name in ("text.token_embed.weight", "text.pos_embed"):
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None or one.shape[1:] != other.shape[1:]:
            continue
        length = min(len(one), len(other))  # a fork may have more words
        distance = largest_difference(one[:length], other[:length])
        if distance > exact:
            relative = distance / max(other.abs().max().item(), 1e-30)
            far = Difference(site, distance, relative, distance, distance, 0.0, False)
            rows = [far if row.site == site else row for row in rows]
            return rows, differing_weights(site, *sides)
    return rows, None


def _are_an_ulp_apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether weights differ by at most one rounding, as after an exponential and its logarithm."""
    if ours.keys() != theirs.keys() or any(ours[n].shape != theirs[n].shape for n in ours):
        return False
    pairs = [(ours[n], theirs[n]) for n in ours if not torch.equal(ours[n], theirs[n])]
    return bool(pairs) and all(
        ((one - other).abs() <= torch.finfo(one.dtype).eps * other.abs()).all()
        for one, other in pairs
    )


def _difference(
    site: str, found: list[Tensor], dtype: torch.dtype, exact: float, device: torch.device
) -> Difference:
    """The row of a site. `found` are tensors of ours, ours in float64, theirs, theirs in float64;
    `exact` is the tolerance in float64."""
    ours, ours_64, theirs, theirs_64 = found
    absolute, float64 = largest_difference(ours, theirs), largest_difference(ours_64, theirs_64)
    model_error, other_error = (largest_difference(x, theirs_64) for x in (ours, theirs))
    if dtype == torch.float64 and site.endswith(".pattern"):
        within = absolute <= IN_PATTERN
    elif dtype in TOLERANCE:
        on_device = dtype == torch.float32 and device.type != "cpu"
        within = absolute <= _limit(site, ON_DEVICES if on_device else TOLERANCE[dtype], theirs_64)
    else:
        within = model_error <= HALF * other_error
    within &= float64 <= _limit(site, exact, theirs_64)
    relative = absolute / max(theirs_64.abs().max().item(), 1e-30)
    return Difference(site, absolute, relative, float64, model_error, other_error, within)


def _limit(site: str, tolerance: float, truth: Tensor) -> float:
    """The largest difference at a site that is within tolerance."""
    if site.startswith("logits") and tolerance != MERGED:
        return tolerance
    return tolerance * max(1.0, truth.abs().max().item())


def _inputs(ours: CLIPConfig, theirs: CLIPConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Two images, and eight texts with an end token of each model, at places all over the text.

    Texts are three positions shorter than the context, so that it shows if a model counts positions
    from the end.
    """
    tokens = max(2, min(ours.text.context_length, theirs.text.context_length) - 3)
    pixels, ids = random_inputs(ours, images=2, texts=8, tokens=tokens, seed=seed)
    ids %= min(ours.text.vocab_size, theirs.text.vocab_size)  # a fork may have more words
    ids[:, 0] = ours.text.bos_token_id
    ids[1, -1] = 0  # openai/CLIP pads with 0
    ends = [end_token(text) for text in (ours.text, theirs.text)]
    rows, place = torch.arange(8), torch.arange(8) * (tokens - 2) // 7
    for i, end in enumerate(dict.fromkeys(ends)):
        ids[rows, 1 + (place + i) % (tokens - 1)] = end
    return pixels, ids
