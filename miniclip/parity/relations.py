"""What no single fault explains: blocks in another order, simple arithmetic, and places."""

import re

import torch
from torch import Tensor

from miniclip.parity.faults import dtype_name
from miniclip.parity.formulas import Side, is_near
from miniclip.parity.variants import Named


def otherwise_run(site: str, model: Side, other: Side) -> str:
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


def relation_of(site: str, x: Named, right: Tensor, wrong: Tensor) -> str:
    """What simple arithmetic makes of the right numbers at the site to get the wrong ones."""
    if is_near(right, wrong):
        return ""  # more than rounding, and less than these comparisons see
    for name in reversed([name for name in x if " " not in name]):  # a block's own come last
        if is_near(x[name].double(), wrong):
            return f"{name} unchanged as {site}"
    if is_near(right.mT, wrong):
        return f"{site} transposed"
    if right.shape != wrong.shape:
        return ""
    order = torch.cdist(wrong.flatten(1), right.flatten(1)).argmin(1)
    if is_near(right[order], wrong):
        moved = (order != torch.arange(len(order))).nonzero()[:, 0].tolist()
        return f"{site} of another row of the batch in row {_ranges(moved)}"
    factor = ((wrong * right).sum() / right.square().sum()).item()
    if is_near(right * factor, wrong):
        return f"{site} multiplied by {factor:.6g}"
    shift = (wrong - right).mean().item()
    if is_near(right + shift, wrong):
        return f"{shift:.6g} added to {site}"
    if is_near(right.softmax(-1), wrong):
        return f"a softmax of {site}"
    if right.ndim == 3:  # (B, T, W)
        vector = (wrong - right)[-1, -1]
        for first, words in ((0, "each token"), (1, "each patch, and not to the first token")):
            if is_near((right + vector)[:, first:], wrong[:, first:]):
                return f"the same vector added to {words}, as a bias would be"
    elif "logits" not in site and right.ndim == 2 and is_near(right + (wrong - right)[-1], wrong):
        return f"the same vector added to each row of {site}, as a bias would be"
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(wrong.to(dtype).double(), wrong):
            return f"{site} in {dtype_name(dtype)}, whatever the precision of the rest"
    if site.endswith("resid_post"):
        terms = ("resid_pre", "attn_out", "mlp_out")
        columns = torch.stack([x[term].flatten() for term in terms], 1)
        shares = torch.linalg.lstsq(columns, wrong.flatten()[:, None]).solution[:, 0]
        if is_near((columns @ shares).view_as(wrong), wrong):
            summed = zip(shares.tolist(), terms, strict=True)
            return "the sum " + " + ".join(f"{share:.4g} {term}" for share, term in summed)
    return ""


AXES = {
    2: ("row", "dimension"),
    3: ("row", "token", "dimension"),
    4: ("row", "head", "query", "key"),
}


def place_of(ours: Tensor, theirs: Tensor, ids: Tensor | None) -> str:
    """The places where two tensors differ, in words. Empty if they differ everywhere."""
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
