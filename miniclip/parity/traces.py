"""One model on one input, with its tensor at every site, in the model's precision or in float64."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miniclip.parity.sites import Read, is_theirs, outputs_of, sites_of
from miniclip.parity.stages import raises


class Trace(NamedTuple):
    """What was seen of one run of a model, on a CPU."""

    tensors: dict[str, Tensor]  # by site, in the order of the calls
    calls: dict[str, list[Tensor]]  # by site, of every call of its module
    error: str  # what the model raised, if it did


@torch.no_grad()
def trace(
    model: Any,  # CLIP | CLIPModel
    dtype: torch.dtype,
    exact: bool,
    device: torch.device,
    pixels: Tensor,
    ids: Tensor,
) -> Trace:
    """Run a model with its weights rounded to `dtype`; an `exact` run computes in float64."""
    if exact and device.type == "mps":  # which has no float64
        device = torch.device("cpu")
    precision = torch.float64 if exact else dtype
    run = Trace({}, {}, "")
    seen_by: dict[str, nn.Module] = {}

    def forward(patterns: bool) -> str:
        """Run once, and return the error. Patterns have their own run: a watched pattern makes a
        model compute attention in another way."""
        handles = []
        for site, module, read in sites_of(model):
            if site.endswith(".pattern") == patterns and isinstance(module, nn.Module):

                def keep(
                    module: nn.Module,
                    args: tuple,
                    named: dict[str, Any],
                    out: Any,
                    site: str = site,
                    read: Read = read,
                ) -> None:
                    tensor = read((*args, *named.values()), out)
                    if not isinstance(tensor, Tensor):
                        return  # an attention that does not return its pattern
                    tensor = tensor.cpu()
                    if seen_by.setdefault(site, module) is module:
                        run.calls.setdefault(site, []).append(tensor)
                    run.tensors[f"{site} again" if site in run.tensors else site] = tensor

                handles.append(module.register_forward_hook(keep, with_kwargs=True))
        try:
            output = model(**inputs) if is_theirs(model) else model(*inputs.values())
            for site, tensor in outputs_of(output):
                run.tensors.setdefault(site, tensor.cpu())
            if "logits" not in run.tensors:
                raise ValueError(f"it returns a {type(output).__name__} without logits_per_image")
        except Exception as error:  # a fork may raise anything
            return raises(error)
        finally:
            for handle in handles:
                handle.remove()
        return ""

    pixels = pixels.to(device, dtype).to(precision)
    inputs = {"pixel_values": pixels, "input_ids": ids.to(device)}
    uncompiled = torch.compiler.set_stance("force_eager")  # hooks do not reach compiled graphs
    with _prepared(model, dtype, precision, device), uncompiled:
        with Float64ForFloat32() if exact else nullcontext():
            errors = [forward(patterns=False)]
            if hasattr(model, "set_attn_implementation"):  # transformers' own
                model.set_attn_implementation("eager")
            errors.append(forward(patterns=True))
    return run._replace(error=next(filter(None, errors), ""))


@contextmanager
def _prepared(
    model: nn.Module, dtype: torch.dtype, precision: torch.dtype, device: torch.device
) -> Iterator[None]:
    """A block in which the model is in evaluation mode, on the device, and rounded to `dtype`.

    Not a copy: a fork's functions may hold references to the original's modules.
    """
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.data for tensor in tensors]
    # `training`, and what a forward stores: a mask, or a weight that a pruning hook makes.
    kept = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    theirs: list[Any] = [m for m in model.modules() if is_theirs(model) and hasattr(m, "config")]
    theirs = [m for m in theirs if hasattr(m.config, "_attn_implementation")]
    attention = [module.config._attn_implementation for module in theirs]
    try:
        model.eval()
        for tensor, data in zip(tensors, before, strict=True):
            is_float = data.is_floating_point()
            moved = data.to(device, dtype).to(precision) if is_float else data.to(device)
            # A forward may change a tensor in place, such as a counter.
            tensor.data = moved.clone() if moved is data else moved
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data
        for module, attributes, buffers in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, kind in zip(theirs, attention, strict=True):
            module.config._attn_implementation = kind


class Float64ForFloat32(TorchFunctionMode):
    """A block in which code that asks for float32 gets float64, such as a float32 softmax.

    So does code that asks for no dtype, and a float32 tensor that meets a float64 one, such as a
    mask that is not a buffer.
    """

    def __enter__(self) -> "Float64ForFloat32":
        """Change the default dtype."""
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Change it back."""
        super().__exit__(*exception)
        torch.set_default_dtype(self.default)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `function` with float64 for float32."""
        if function is Tensor.float:
            function = Tensor.double
        values = [torch.float64 if value is torch.float32 else value for value in args]
        named = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        tensors = [value for value in (*values, *named.values()) if isinstance(value, Tensor)]
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            # A function may change the first in place.
            values[1:] = map(_doubled, values[1:])
            named = {name: v if name == "out" else _doubled(v) for name, v in named.items()}
        try:
            return function(*values, **named)
        except RuntimeError:
            if re.search(r"[^_]_$|^__setitem__$", getattr(function, "__name__", "")):
                raise  # a tensor that is changed in place must stay the same object
            return function(*map(_doubled, values), **named)


def _doubled(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.double() if is_float else value


def lay_out_alike(one: Trace, other: Trace, images: int, texts: int) -> None:
    """Bring the tensors of one run to the shapes of the other, if only the order of axes differs.

    A fork may take a batch in pieces, or have its tokens before its batch.
    """
    for site, calls in one.calls.items():
        if site not in other.tensors or calls[0].shape == (shape := other.tensors[site].shape):
            continue
        for axis in range(len(shape)):
            try:
                joined = torch.cat(calls, axis)
            except (IndexError, RuntimeError):
                continue
            if joined.ndim == 2 and len(shape) == 3 and joined.numel() == math.prod(shape):
                joined = joined.reshape(shape)  # the tokens of a whole batch in one row
            # The batch comes first, as in the formulas.
            batch = texts if site.startswith("text.") else images
            turned = joined.ndim == len(shape) == 3 and shape[0] == batch
            for tensor in (joined, joined.transpose(0, 1)) if turned else (joined,):
                if tensor.shape == shape != one.tensors[site].shape:
                    one.tensors[site] = tensor
                    one.tensors.pop(f"{site} again", None)
