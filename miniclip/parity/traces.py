"""Run one model on one input and keep the tensor at every site."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miniclip.parity.report import raises
from miniclip.parity.sites import Read, is_theirs, outputs_of, sites_of
from miniclip.sites import uncompiled


class Setting(NamedTuple):
    """How to run a model. Cast weights and pixels to `dtype`, and then to float64 if `exact`."""

    dtype: torch.dtype
    exact: bool
    device: torch.device
    pixels: Tensor
    ids: Tensor


class Trace(NamedTuple):
    """The tensors of a run, copied to the CPU, and the run's error."""

    calls: dict[str, list[Tensor]]  # site -> one tensor for each call of the site's module
    error: str  # the model's error in words, or ""


@torch.no_grad()
def trace(model: Any, setting: Setting) -> Trace:
    """Run a model with `running`, and keep the tensor at every site."""
    calls: dict[str, list[Tensor]] = {}
    watched: dict[str, nn.Module] = {}

    def keep(
        site: str, read: Read, module: nn.Module, args: tuple, named: dict[str, Any], out: Any
    ) -> None:
        tensor = read((*args, *named.values()), out)
        if isinstance(tensor, Tensor) and watched.setdefault(site, module) is module:
            calls.setdefault(site, []).append(tensor.cpu())

    def forward(patterns: bool) -> str:
        """Run once and return the error in words. Patterns have a separate run, because a hook on
        a pattern changes how a model computes attention."""
        handles = [
            module.register_forward_hook(partial(keep, site, read), with_kwargs=True)
            for site, module, read in sites_of(model)
            if module and site.endswith(".pattern") == patterns
        ]
        try:
            for site, tensor in run().items():
                calls.setdefault(site, [tensor.cpu()])
        except Exception as error:  # a fork can raise any error
            return raises(error)
        finally:
            for handle in handles:
                handle.remove()
        return ""

    with running(model, setting) as run:
        errors = [forward(patterns=False)]
        if hasattr(model, "set_attn_implementation"):  # transformers' class
            model.set_attn_implementation("eager")
        errors.append(forward(patterns=True))
    return Trace(calls, next(filter(None, errors), ""))


@contextmanager
def running(model: Any, setting: Setting) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Yield a function that runs the model once and returns its outputs by site.

    In the `with` block the model is uncompiled and in evaluation mode. Afterwards the model
    is restored. The model is not copied, because a copy's functions might still call the original's
    modules.
    """
    dtype, exact, device, pixels, ids = setting
    if exact and device.type == "mps":  # MPS has no float64
        device = torch.device("cpu")
    precision = torch.float64 if exact else dtype
    pixels, ids = pixels.to(device, dtype).to(precision), ids.to(device)

    def run() -> dict[str, Tensor]:
        by_name = {"pixel_values": pixels, "input_ids": ids}
        output = model(**by_name) if is_theirs(model) else model(pixels, ids)
        found = dict(outputs_of(output))
        if "logits" not in found:
            raise ValueError(f"the output is a {type(output).__name__} without logits_per_image")
        return found

    tensors = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    # `before` saves the attributes and buffers of all modules, and the attributes of transformers'
    # configs. They include `training`, transformers' choice of attention, and tensors that a
    # forward pass may replace, such as a mask or a pruned weight.
    stored = [found for m in model.modules() for found in (vars(m), m._buffers)]
    if is_theirs(model):
        stored += [vars(m.config) for m in model.modules() if hasattr(m, "config")]
    before = [(found, dict(found)) for found in stored]
    try:
        model.eval()
        for tensor, data in tensors:
            moved = data.to(device, dtype).to(precision) if data.is_floating_point() else data
            # Always copy, because a forward pass may change a tensor, such as a counter, in place.
            tensor.data = moved.to(device, copy=moved is data)
        with uncompiled(), Float64ForFloat32() if exact else nullcontext():
            yield run
    finally:
        for tensor, data in tensors:
            tensor.data = data
        for found, contents in before:
            found.clear()
            found.update(contents)


class Float64ForFloat32(TorchFunctionMode):
    """In a `with` block, replace explicit float32 by float64, for example in a float32 softmax.

    The default dtype becomes float64 too. A float32 tensor in a function's arguments, such as a
    mask that is not a buffer, becomes float64.
    """

    def __enter__(self) -> "Float64ForFloat32":
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.set_default_dtype(self.default)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `function` with float64, not float32. Do not cast a tensor that `function` edits in
        place, because the cast would be a copy."""
        in_place = re.search(r"[^_]_$|^__(set|setitem)__$", getattr(function, "__name__", ""))
        values = [*args[:1], *map(_doubled, args[1:])] if in_place else map(_doubled, args)
        named = {n: v if n == "out" else _doubled(v) for n, v in (kwargs or {}).items()}
        return (Tensor.double if function is Tensor.float else function)(*values, **named)


def _doubled(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return type(value)(map(_doubled, value))
    is_float = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.double() if is_float else torch.float64 if value is torch.float32 else value


def tensors_of(run: Trace, peer: Trace, batch: dict[str, int]) -> dict[str, Tensor]:
    """Return one tensor for each site. If possible, it has the shape of the tensor in `peer`.

    A fork may compute a batch in pieces, or put the token axis before the batch axis. `batch` has
    each tower's batch size. If a site has several tensors that are not joined, return the first
    under the site's name, and the last under the name "{site} again".
    """
    tensors = {}
    for site, (first, *more) in run.calls.items():
        shape = peer.calls[site][0].shape if site in peer.calls else first.shape
        rows = batch["text" if site.startswith("text.") else "vision"]
        alike = None if first.shape == shape else _join([first, *more], shape, rows)
        tensors[site] = first if alike is None else alike
        if more and alike is None:
            tensors[f"{site} again"] = more[-1]
    return tensors


def _join(calls: list[Tensor], shape: torch.Size, rows: int) -> Tensor | None:
    """Join the tensors of all calls into one tensor of this shape, or return None."""
    for axis in range(len(shape)):
        try:
            joined = torch.cat(calls, axis)
        except (IndexError, RuntimeError):
            continue
        if joined.ndim == 2 and len(shape) == 3 and joined.numel() == math.prod(shape):
            joined = joined.reshape(shape)  # batch and tokens were one axis
        if joined.ndim == len(shape) == 3 and shape[0] == rows != joined.shape[0]:
            joined = joined.transpose(0, 1)  # now the batch axis comes first, as in the formulas
        if joined.shape == shape:
            return joined
    return None
