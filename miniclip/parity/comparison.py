"""Compare two CLIPs in the order in which data flows: token ids, pixels, the models' tensors."""

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.checkpoint import Loaded
from miniclip.files.models import check_device
from miniclip.files.modules import state_of, unwrapped
from miniclip.model import CLIP
from miniclip.parity.diagnosis import cause_in_model, differing_weights
from miniclip.parity.formulas import Side
from miniclip.parity.gradients import TABLES, compare_gradients
from miniclip.parity.pairs import alone, common_inputs
from miniclip.parity.pixels import compare_transforms
from miniclip.parity.report import (
    NAMES,
    Difference,
    Report,
    Stage,
    exact_difference,
    largest,
    largest_difference,
)
from miniclip.parity.sites import (
    OURS,
    blocks_of,
    config_of,
    is_theirs,
    sites_of,
    table_of,
    under_our_names,
)
from miniclip.parity.tokens import compare_tokenizers
from miniclip.parity.traces import Setting, Trace, tensors_of, trace
from miniclip.terminal import progress

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
"""The largest absolute difference that counts as a rounding error on a CPU. Except for logits, this
limit is multiplied by the tensor's largest number, if that number is above 1."""
ON_DEVICES = 1e-4  # tolerance for float32 on GPUs, which add numbers in another order than CPUs
IN_PATTERN = 1e-6  # tolerance for float64 patterns, because transformers has a float32 softmax
ROUNDED = 1e-6  # tolerance for float64 if `_are_rounded_once_more` returns True
HALF = 2.0
"""In half precision, the model's error at a site may be this many times the other model's error.

miniclip's error equals transformers' error at every site. For a fork that adds numbers in another
order, the median ratio of the two errors is 1.0. The ratio is above 1.1 at 29 % of sites, and above
2 at 2 of 2,244 sites, because a site's largest error depends on few numbers. Measured in float16
and bfloat16, 2 shapes and 6 seeds, for eager attention and an MLP that adds in reverse order."""


def compare(
    model: nn.Module | Loaded,
    other: nn.Module | Loaded,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    gradients: bool = False,
) -> Report:
    """Run two models of the same shape on the same random input, and compare them site by site.

    The sites of each tower are `embeddings`, then `resid_pre`, `q`, `k`, `v`, `pattern`,
    `attn_out`, `mlp_out` and `resid_post` of each block, then `pooled` and `projected`. `logits`
    and every other tensor of the output follow. A site that one model lacks is left out. The
    float64 runs override explicit casts to float32, such as the cast in a float32 softmax.
    Compiled models run uncompiled. Both models are restored afterwards.

    Args:
        model: a model, or a triple from `miniclip.load`. The modules have the names of miniclip,
            transformers, OpenAI or open_clip, or the names in the attribute `tensor_names`.
        other: the second model or triple. The report of two triples also has `tokens` and `pixels`.
        dtype: the precision of the comparison. Both models also run in float64.
        gradients: if all sites are within tolerance, also compare the contrastive loss's gradients
            in float64. The report then has a row `gradient.NAME` for each parameter.
    Raises:
        ValueError: the models have different depths, a tower has no blocks, or there is no gradient
            to compare.

    >>> from miniclip import load
    >>> report = compare(load("shapes"), load("shapes"))
    >>> report.first is None, report.rows[0].site, report.rows[-1].site
    (True, 'tokens', 'text_embeds')
    """
    check_device(device)
    ours, theirs = (m if isinstance(m, Loaded) else alone(m) for m in (model, other))
    models = unwrapped(ours.model), unwrapped(theirs.model)
    stages = []
    if ours.tokenizer and theirs.tokenizer:
        stages.append(compare_tokenizers(ours.tokenizer, theirs.tokenizer))
    if ours.transform and theirs.transform:
        stages.append(compare_transforms(ours.transform, theirs.transform))
    stages.append(compare_models(*models, dtype, torch.device(device), seed))
    if gradients and all(row.within_tolerance for stage, _ in stages for row in stage):
        stages.append(compare_gradients(*models, torch.device(device), seed))
    rows = [row for stage, _ in stages for row in stage]
    first = next((row.site for row in rows if not row.within_tolerance), None)
    cause = next((cause for _, cause in stages if cause is not None), None)
    return Report(rows, first, cause)


def assert_parity(model: nn.Module | Loaded, other: nn.Module | Loaded, **options: Any) -> None:
    """For the tests of a fork: raise an AssertionError unless all sites are within tolerance.

    The error names the first site out of tolerance and the cause. See `compare` for the arguments.

    >>> from miniclip import CLIP
    >>> assert_parity(CLIP.from_pretrained("shapes"), CLIP.from_pretrained("shapes"))
    """
    report = compare(model, other, **options)
    if report.first is not None:
        row = next(row for row in report.rows if row.site == report.first)
        raise AssertionError(
            f"{report}\nlargest difference at this site: absolute {row.absolute:.1e}, "
            f"relative {row.relative:.1e}, in float64 {row.float64:.1e}"
        )


def compare_models(
    ours: Any, theirs: Any, dtype: torch.dtype, device: torch.device, seed: int
) -> Stage:
    """Return the report's rows, one for each common site, and the cause of the first difference."""
    models = (ours, theirs)
    for name, model in zip(NAMES, models, strict=True):
        if any(weight.is_meta for weight in model.parameters()):
            raise ValueError(f"{name} is on the meta device, where weights have no values")
    offered = [[site for site, *_ in sites_of(model)] for model in models]
    depths = [
        tuple(len([*blocks_of(m, table_of(m), tower)]) for tower in ("vision", "text"))
        for m in models
    ]
    if depths[0] != depths[1]:
        raise ValueError(
            f"the two models differ in their number of blocks, (vision, text): {depths[0]} and "
            f"{depths[1]}; expected the same"
        )
    kind = next((type(m) for m in models if isinstance(m, CLIP)), CLIP)  # CLIP or a fork's class
    configs = [config_of(model, kind) for model in models]
    stored = (under_our_names(model, kind, state_of(model)) for model in models)
    weights = [{name: w.cpu().to(dtype) for name, w in found.items()} for found in stored]
    exact = TOLERANCE[torch.float64]
    # A fork's own table of names may leave out a parameter that was not merged.
    is_complete = not any("tensor_names" in vars(model) for model in models)
    if _are_rounded_once_more(weights[0], weights[1], is_complete):
        exact = ROUNDED if dtype in TOLERANCE or _only_adds(*weights) else torch.inf
    # OpenAI's code adds all position embeddings, so its texts must be as long as the context.
    shorter = 3 if all(is_theirs(m) or table_of(m) is OURS for m in models) else 0
    pixels, ids = common_inputs(configs[0], configs[1], seed, shorter)
    settings = [Setting(dtype, exactly, device, pixels, ids) for exactly in (False, True)]
    runs = [trace(*plan) for plan in progress([*product(models, settings)], "run")]
    batch = {"vision": len(pixels), "text": len(ids)}
    peers = runs[2:] + runs[:2]
    tensors = [tensors_of(run, peer, batch) for run, peer in zip(runs, peers, strict=True)]
    # OpenAI's code projects with a parameter, not with a module, so no hook can see the projection.
    lost = {s for s in {*offered[0]} ^ {*offered[1]} if s.endswith((".pooled", ".projected"))}
    tensors = [{site: x for site, x in run.items() if site not in lost} for run in tensors]
    rows = []
    in_order = offered[0] + offered[1]
    in_order += [site for run in tensors for site in run if site.startswith("output_")]
    for site in dict.fromkeys(in_order):
        found = [run[site] for run in tensors if site in run]
        if len(found) == len(runs):
            rows.append(_difference(site, found, dtype, exact, device))
        elif any(run.error for run in runs):
            rows.append(exact_difference(site))
    inputs = {"pixels": pixels.to(dtype), "ids": ids}
    sides = [
        Side(inputs | run, w, c) for run, w, c in zip(tensors[1::2], weights, configs, strict=True)
    ]
    failed = next((row for row in rows if not row.within_tolerance), None)
    if failed is not None:
        return rows, _cause(failed, runs, tensors, sides, dtype)
    site = "text.embeddings"  # the eight texts do not use every row of the embedding tables
    far = _compare_tables(site, exact, *weights)
    rows = [far if far and row.site == site else row for row in rows]
    return rows, differing_weights(site, *sides) if far else None


def _cause(
    failed: Difference, runs: list[Trace], tensors: list[dict[str, Tensor]], sides: list[Side],
    dtype: torch.dtype,
) -> str:  # fmt: skip
    """Say why the first site out of tolerance differs."""
    site, names = failed.site, ("model", "model in float64", "other", "other in float64")
    if any(site not in run for run in tensors):
        return next(f"{name} {run.error}" for name, run in zip(names, runs) if run.error)
    if failed.float64 <= _limit(site, TOLERANCE[torch.float64], tensors[-1][site]):
        return "rounding errors: the two models agree in float64"
    for name, one, exactly in zip(NAMES, tensors[::2], tensors[1::2], strict=True):
        far = 0.01 * max(1.0, largest(exactly[site]))
        if dtype in TOLERANCE and far < largest_difference(one[site], exactly[site]) < torch.inf:
            return f"{name} gives different numbers in two runs: is dropout active in evaluation?"
    return cause_in_model(site, *sides)


def _compare_tables(
    site: str, exact: float, ours: dict[str, Tensor], theirs: dict[str, Tensor]
) -> Difference | None:
    """Return a `Difference` if the token or position embeddings differ by more than `exact`."""
    for name in TABLES:
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None or one.shape[1:] != other.shape[1:]:
            continue
        rows = min(len(one), len(other))  # a fork may have a larger vocabulary
        difference = exact_difference(site, one[:rows], other[:rows])
        if difference.absolute > exact:
            return difference
    return None


def _are_rounded_once_more(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], is_complete: bool
) -> bool:
    """Return whether one model's weights were rounded one more time than the other model's weights.

    True if one model lacks a parameter. Such a parameter was merged into another parameter, and the
    merge rounds the result. Also True if some parameters differ, each by at most one rounding
    error, like x and log(exp(x)).
    """
    if is_complete and ours.keys() != theirs.keys():
        return True
    common = ours.keys() & theirs.keys()
    pairs = [(ours[n], theirs[n]) for n in common if not torch.equal(ours[n], theirs[n])]
    return bool(pairs) and all(
        one.shape == other.shape
        and ((one - other).abs() <= torch.finfo(one.dtype).eps * other.abs()).all()
        for one, other in pairs
    )


def _only_adds(*weights: dict[str, Tensor]) -> bool:
    """Return whether one model has all the other's parameters, unchanged, and perhaps more."""
    few, many = sorted(weights, key=len)
    return all(name in many and torch.equal(w, many[name]) for name, w in few.items())


def _difference(
    site: str, found: list[Tensor], dtype: torch.dtype, exact: float, device: torch.device
) -> Difference:
    """Return the report's row for a site. `found` has four tensors: ours, ours in float64,
    theirs, and theirs in float64. `exact` is the tolerance in float64."""
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
    relative = absolute / max(largest(theirs_64), 1e-30)
    return Difference(site, absolute, relative, float64, model_error, other_error, within)


def _limit(site: str, tolerance: float, truth: Tensor) -> float:
    """Return the largest difference that is within tolerance at a site."""
    if site.startswith("logits") and tolerance != ROUNDED:
        return tolerance
    return tolerance * max(1.0, largest(truth))
