"""Which weights of two models differ, and what was done to them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from miniclip.parity.faults import ROUNDINGS, Noted, dtype_name
from miniclip.parity.formulas import Side, compute, is_near, parts_of


def differing_weights(site: str, model: Side, other: Side) -> str:
    """The weights that the formula of the site reads and that differ, and how."""
    x, ours, options = parts_of(site, model)
    _, theirs, _ = parts_of(site, other)
    weights = Noted(ours)
    compute(site, x, weights, options)
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
    if is_near(theirs * factor, ours, 1e-6 * min(1.0, ours.abs().max().item())):
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
        yield f"rounded to {dtype_name(dtype)}", w.to(dtype).double()
    yield "of zeros", torch.zeros_like(w)


def _sorted(w: Tensor, axis: int, size: int) -> Tensor:
    """The slices of a weight along an axis, `size` together, in an order that is their own."""
    slices = w.movedim(axis, 0).reshape(w.shape[axis] // size, -1).contiguous()
    return slices[slices.sum(1).argsort()]
