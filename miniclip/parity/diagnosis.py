"""Find out why two CLIPs differ at a site.

Two models are equal before the first site that differs. The numbers at this site are computed with
CLIP's formula, once without a fault, and once with each common fault of reimplementations. If the
numbers without a fault are one model's numbers, the cause is the fault that gives the other model's
numbers.
"""

import re
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from miniclip.parity.faults import ROUNDINGS, dtype_name, faults, names_read
from miniclip.parity.formulas import Named, Side, formula_of, is_near
from miniclip.parity.report import NAMES


def cause_in_model(site: str, model: Side, other: Side) -> str:
    """Say what changes one model's tensor into the other's tensor, at the first site that differs.

    Returns "" if no cause is known. If only the weights differ, the text describes `model` as the
    changed model.
    """
    if ".blocks." in site:  # two inputs of the batch are enough
        model, other = (
            side._replace(tensors={name: tensor[:2] for name, tensor in side.tensors.items()})
            for side in (model, other)
        )
    ours, theirs = model.tensors[site], other.tensors[site]
    for name, tensor in zip(NAMES, (ours, theirs)):
        if not tensor.isfinite().all():
            return f"{name} has numbers that are not finite"
    if "." not in site and site != "logits":  # an output other than the logits
        rest = {name: x for name, x in other.tensors.items() if name.endswith("_embeds")}
        relation = relation_of(site, rest, theirs, ours)
        return f"model has {relation}" if relation else ""
    stream_enters = site.endswith((".resid_pre", ".pooled"))
    if stream_enters and (otherwise := otherwise_run(site, model, other)):
        return otherwise
    followers = []  # names of the models that agree with CLIP's formula
    related = ""  # simple arithmetic that explains the difference, used if no fault explains it
    for source, target, names in ((other, model, NAMES[::-1]), (model, other, NAMES)):
        formula, wrong = formula_of(site, source), target.tensors[site]
        right = formula.compute()
        if right is None or not is_near(right, source.tensors[site]):
            continue
        followers.append(names[0])
        for fault, weights, steps in faults(formula, source, target):
            found = formula.compute(weights, steps)
            if is_near(found, wrong) and not is_near(found, right):
                return f"{names[1]} has {fault}"
        if not related and (relation := relation_of(site, formula.x, right, wrong)):
            related = f"{names[1]} has {relation}"
    if otherwise := otherwise_run(site, model, other):
        return otherwise
    if len(followers) == 2 and (differing := differing_weights(site, model, other)):
        return differing
    if related:
        return related
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)} in model, {tuple(theirs.shape)} in other"
    if len(followers) == 1:
        name = NAMES[followers == ["model"]]
        where = where_apart(
            ours, theirs, model.tensors["ids"] if site == "text.embeddings" else None
        )
        return f"{name} does not compute CLIP's formula with its own weights{where}"
    return ""


# -------------------------------------------------------------------------------- other weights


def differing_weights(site: str, model: Side, other: Side) -> str:
    """Say how the weights of the site's formula differ. Returns "" if they are equal."""
    formula, theirs = formula_of(site, model), formula_of(site, other).w
    read, _ = names_read(formula)
    head_width = formula.steps.get("head_width", 1)
    changes = {
        name: _change(w, theirs[name], head_width if name.startswith("attn.") else 1)
        for name, w in formula.w.items()
        if name in read and name in theirs and not torch.equal(w, theirs[name])
    }
    if len(changes) == 1 and (change := next(iter(changes.values())))[0] != "(":
        return f"model has {next(iter(changes))} {change}"
    listed = [f"{name} {change}" for name, change in changes.items()]
    return f"different weights: {', '.join(listed)}" if listed else ""


def _change(ours: Tensor, theirs: Tensor, head_width: int) -> str:
    """Say what turns `theirs` into `ours`. If this is unknown, say in brackets how they differ."""
    if ours.ndim == 0:
        return f"({ours:.9g} in model, {theirs:.9g} in other)"
    if ours.shape != theirs.shape:
        return f"({tuple(ours.shape)} in model, {tuple(theirs.shape)} in other)"
    for change, changed, like in _changes(ours, theirs, head_width):
        if torch.equal(changed, like):
            return change
    factor = ((ours * theirs).sum() / theirs.square().sum()).item()
    if is_near(theirs * factor, ours, 1e-6 * min(1.0, ours.abs().max().item())):
        return f"multiplied by {factor:.6g}"
    rows = (ours != theirs).reshape(len(ours), -1).any(1)
    distance = (ours - theirs).abs().max().item()
    return f"({rows.sum()} of {len(rows)} rows differ, by at most {distance:.1e})"


def _changes(ours: Tensor, w: Tensor, head_width: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (description, found, expected) for each possible change of `w`. If the tensors `found`
    and `expected` are equal, this change turns `w` into `ours`."""
    for axis in range(w.ndim):
        yield f"flipped along axis {axis}", w.flip(axis), ours
        for shift in (1, -1):
            yield f"rolled along axis {axis}", w.roll(shift, axis), ours
    if w.ndim == 4:
        yield "turned by 180 degrees", w.flip(-1, -2), ours
        colours_last = w.permute(0, 2, 3, 1).reshape(w.shape)
        yield "with channels last", colours_last, ours
    for dtype in ROUNDINGS:
        yield f"rounded to {dtype_name(dtype)}", w.to(dtype).double(), ours
    yield "of zeros", torch.zeros_like(w), ours
    for axis in range(w.ndim):
        for size in (head_width, 1):
            if w.shape[axis] % size == 0:
                words = f"{'with heads ' * (size > 1)}in another order along axis {axis}"
                yield words, _sorted(w, axis, size), _sorted(ours, axis, size)


def _sorted(w: Tensor, axis: int, size: int) -> Tensor:
    """Cut a weight along an axis into groups of `size` slices. Sort the groups by their sums."""
    slices = w.movedim(axis, 0).reshape(w.shape[axis] // size, -1).contiguous()
    return slices[slices.sum(1).argsort()]


# -------------------------------------------------------------- blocks in another order, arithmetic


def otherwise_run(site: str, model: Side, other: Side) -> str:
    """Say which part (such as a block or MLP) a model skips, runs twice or runs out of order."""
    for kinds in ("resid_post|projected", "attn_out|mlp_out"):
        pattern = re.compile(rf"({site.partition('.')[0]}|logits)\..*({kinds})( again)?")
        ours, theirs = (list(filter(pattern.fullmatch, side.tensors)) for side in (model, other))
        for name, run, peer in (("model", ours, theirs), ("other", theirs, ours)):
            if extra := [part for part in run if part.endswith(" again") and part not in peer]:
                return f"{name} runs {_part_at(extra[0])} twice"
            if missing := [part for part in peer if part not in run and "again" not in part]:
                return f"{name} does not run {_part_at(missing[0])}"
        for one, two in zip(ours, theirs):
            if one != two:
                return f"model has {_part_at(one)} in the place of {_part_at(two)}"
    return ""


def _part_at(site: str) -> str:
    return site.removesuffix(" again").removesuffix(".resid_post")


def relation_of(site: str, x: Named, right: Tensor, wrong: Tensor) -> str:
    """Say which simple arithmetic turns the right numbers at the site into the wrong numbers."""
    if is_near(right, wrong):
        return ""  # the difference is too small for these comparisons
    found = _relations(site, x, right, wrong)
    return next((words for words, tensor in found if is_near(tensor, wrong)), "")


def _relations(site: str, x: Named, right: Tensor, wrong: Tensor) -> Iterator[tuple[str, Tensor]]:
    for name in reversed([name for name in x if " " not in name]):  # try the block's tensors first
        yield f"{name} in the place of {site}", x[name].double()
    yield f"{site} transposed", right.mT
    if right.shape != wrong.shape:
        return
    order = torch.cdist(wrong.flatten(1), right.flatten(1)).argmin(1)
    moved = (order != torch.arange(len(order))).nonzero()[:, 0].tolist()
    yield f"{site} with batch rows in the wrong place: {_ranges(moved)}", right[order]
    factor = ((wrong * right).sum() / right.square().sum()).item()
    yield f"{site} multiplied by {factor:.6g}", right * factor
    apart = wrong - right
    yield f"{apart.mean():.6g} added to {site}", right + apart.mean()
    yield f"a softmax of {site}", right.softmax(-1)
    if right.ndim == 3:  # (B, T, W)
        vector = apart[-1, -1]
        yield "the same vector added to each token, as a bias would be", right + vector
        patches = torch.cat([wrong[:, :1], right[:, 1:] + vector], 1)
        words = "the same vector added to each patch, but not to the first token"
        yield f"{words}, as a bias would be", patches
    elif "logits" not in site and right.ndim == 2:
        words = f"the same vector added to each row of {site}"
        yield f"{words}, as a bias would be", right + apart[-1]
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(wrong.to(dtype).double(), wrong):
            yield f"{site} rounded to {dtype_name(dtype)}, in the float64 run too", wrong
    if site.endswith("resid_post"):
        terms = ("resid_pre", "attn_out", "mlp_out")
        columns = torch.stack([x[term].flatten() for term in terms], 1)
        shares = torch.linalg.lstsq(columns, wrong.flatten()[:, None]).solution[:, 0]
        summed = " + ".join(f"{share:.4g} {term}" for share, term in zip(shares.tolist(), terms))
        yield f"the sum {summed}", (columns @ shares).view_as(wrong)


AXES = {
    2: ("row", "dimension"),
    3: ("row", "token", "dimension"),
    4: ("row", "head", "query", "key"),
}


def where_apart(ours: Tensor, theirs: Tensor, ids: Tensor | None) -> str:
    """Say where two tensors differ. Returns "" if they differ everywhere."""
    far = (ours - theirs).abs() > 1e-9 * max(1.0, theirs.abs().max().item())
    found = []
    if ids is not None and not (differs := far.any(-1)).all():
        found.append(f"id {ids[differs].min()} to {ids[differs].max()}")
    for axis, name in enumerate(AXES.get(far.ndim, ())):
        differs = far.movedim(axis, 0).flatten(1).any(1)
        if not differs.all():
            found.append(f"{name} {_ranges(differs.nonzero()[:, 0].tolist())}")
    return f": the models differ only at {', '.join(found)}" if found else ""


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers as at most three ranges, in words.

    >>> _ranges([0, 1, 2, 5])
    '0 to 2 and 5'
    """
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])  # constant within a range
    ranges = [[number for _, number in run] for _, run in runs]
    words = [f"{r[0]} to {r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges]
    return " and ".join(words[:3] + ["others"] * (len(words) > 3))
