"""Read or edit any tensor inside a model, by name, while a `with` block is open.

A site is a module, and its output is the tensor: `vision.blocks.3.attn.pattern` is the attention
pattern of the fourth block, and `vision.blocks.3` is the block's output. The idea is from
TransformerLens (HookPoint, Nanda and Bloom 2022). Sites use PyTorch's forward hooks, so `model` can
be any nn.Module. For a single tower, leave out `vision.` or `text.`.

A name may also end in `input`, `scale` or `normalized`. `vision.ln_pre.input` is the first argument
of `ln_pre`. `ln_1.scale` is the divisor of the LayerNorm, (B, T, 1). `ln_1.normalized` is the
LayerNorm's result before weight and bias. `scale` and `normalized` are in float32 or float64.
TransformerLens calls them hook_scale and hook_normalized. In TransformerLens, hook_normalized
includes weight and bias, unless `fold_ln` moves weight and bias to the next Linear.

Unused sites change no bit of the output and add no tensor operation. They cost only a few Python
calls for each layer, and nothing in a compiled graph.

In a name, `*` and `[0-3]` work as in file names, but do not match dots. Names do not include
the wrappers of `torch.compile`, DDP and PEFT. While the `with` block is open, compiled models run
uncompiled, because a compiled graph does not notice that a hook was added or removed.

```python
from miniclip import cache, hooks

with cache(model, "vision.blocks.*.attn.pattern") as acts:  # name -> a copy of the tensor
    model.encode_image(pixels)
with hooks(model, {"vision.blocks.3.mlp": lambda out, name: 0 * out}):  # the new output
    model.encode_image(pixels)
```
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.errors import listed
from miniclip.files.modules import named_modules

Edit = Callable[[Tensor, str], Tensor | None]
"""A function of a tensor and its site's name. It returns the new tensor, or None for no change."""


@contextmanager
def hooks(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """For each site that a glob matches, replace the tensor by the result of a function.

    A result of None changes nothing. Functions of one site run in the order in which they are
    given. An outer `with` block's functions run first. Editing a tensor in place raises an error,
    because other code may use the tensor too. Return a changed copy of the same dtype and shape.
    The number of tokens may change only in a residual stream (at `ln_pre`, `resid_mid`, a block).
    Raises ValueError for a glob without a match, and for a module with several names.

    >>> from miniclip import CLIP
    >>> import torch
    >>> model, pixels = CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64)
    >>> with hooks(model, {"vision.blocks.*.mlp": lambda out, name: 0 * out}):
    ...     without_mlps = model.encode_image(pixels)
    >>> torch.equal(without_mlps, model.encode_image(pixels))
    False
    """
    with _hooked(model, {glob: partial(_checked, edit) for glob, edit in edits.items()}):
        yield


@contextmanager
def cache(
    model: nn.Module, *globs: str, grad: bool = False, device: str | torch.device | None = None
) -> Iterator[dict[str, Tensor]]:
    """Copy the tensor of each matching site into a dictionary, {name: tensor}, as the model runs.

    A second run replaces the first run's copies. By default a copy is on the tensor's device. With
    `grad` the model continues with the copy, so torch.autograd.grad(score, acts[name]) gives a
    gradient. Raises ValueError as `hooks` does, and if `grad` is True while gradients are off.

    >>> from miniclip import CLIP
    >>> import torch
    >>> model = CLIP.from_pretrained("shapes")
    >>> with cache(model, "vision.blocks.*.attn.pattern") as acts:
    ...     _ = model.encode_image(torch.zeros(2, 3, 64, 64))
    >>> acts["vision.blocks.0.attn.pattern"].sum(-1).allclose(torch.ones(()))
    True
    """
    if not globs:
        raise ValueError("no site is given; expected one, such as 'vision.blocks.*.attn.pattern'")
    acts: dict[str, Tensor] = {}

    def keep(tensor: Tensor, name: str) -> Tensor | None:
        if not grad:
            acts[name] = tensor.detach().to(device, copy=True)
            return None
        if not torch.is_grad_enabled():
            raise ValueError(f"{name}: grad=True needs gradients, but torch.no_grad is on")
        acts[name] = tensor.to(device, copy=True).requires_grad_()
        return acts[name].to(tensor.device)

    with _hooked(model, dict.fromkeys(globs, keep)):
        yield acts


@contextmanager
def _hooked(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    modules = [*named_modules(model)]
    found = [(*site, edit) for glob, edit in edits.items() for site in _matching(modules, glob)]
    handles: list[Any] = []
    try:
        for name, module, part, edit in found:
            call = partial(_call, edit, name)
            if part == "input":
                handles.append(module.register_forward_pre_hook(Enter(call), with_kwargs=True))
            elif part:
                steps = _Steps.of(module)
                handles += [getattr(steps, part).register_forward_hook(call), steps]
            else:
                handles.append(module.register_forward_hook(call))
        with uncompiled():
            yield
    finally:
        for handle in handles:
            handle.remove()


_stances: list[Any] = []  # one torch.compiler.set_stance for each open `with uncompiled()`
_lock = Lock()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled models uncompiled in a `with` block, because a compiled graph ignores new hooks.

    Such `with` blocks may overlap and end in any order. The last exit restores torch's setting.
    """
    # Until the compiler is imported, no model is compiled. The compiler is not imported here,
    # because an import takes over a second.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _lock:
        _stances.append(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _lock:
            # Another `with` block may have set this stance. The last exit restores the setting.
            _stances.pop().__exit__(None, None, None)


def norm_scale(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Return the divisor of a LayerNorm, (..., 1): the standard deviation of the input `x`."""
    return (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()


class _Steps:
    """The sites `scale` and `normalized` of a LayerNorm. `self` is the LayerNorm's first hook.

    If no function changes a step, the output is the same, bit for bit.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.scale, self.normalized = nn.Identity(), nn.Identity()
        self.handle = norm.register_forward_hook(self, with_kwargs=True, prepend=True)

    @classmethod
    def of(cls, norm: Any) -> "_Steps":
        """Return the LayerNorm's `_Steps` from an outer `with` block. If there is none, add one."""
        return next((h for h in norm._forward_hooks.values() if type(h) is cls), None) or cls(norm)

    def __call__(self, norm: Any, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        x = [*args, *kwargs.values()][0]
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # torch's layer_norm does the same
        scale = norm_scale(norm, x)
        edited_scale = self.scale(scale)
        quotient = (x - x.mean(-1, keepdim=True)) / edited_scale
        edited = self.normalized(quotient)
        if edited_scale is scale and edited is quotient:
            return None
        edited = edited if norm.weight is None else edited * norm.weight
        return (edited if norm.bias is None else edited + norm.bias).to(out.dtype)

    def remove(self) -> None:
        """Remove the LayerNorm's hook, unless another `with` block still hooks a step."""
        if not (self.scale._forward_hooks or self.normalized._forward_hooks):
            self.handle.remove()


class Enter:
    """A pre-hook that edits a module's first argument, positional or keyword."""

    def __init__(self, call: Callable) -> None:
        self.call = call

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        first = 0 if args else next(iter(kwargs))
        given: Any = [*args] if args else {**kwargs}
        edited = self.call(module, args, given[first])
        if edited is None:
            return None
        given[first] = edited
        return ((*given,), kwargs) if args else (args, given)


def find(model: nn.Module, glob: str) -> list[tuple[str, nn.Module]]:
    """The modules whose names match, in the model's order. Raises ValueError if none matches."""
    return [(name, module) for name, module, _ in _matching([*named_modules(model)], glob, ())]


PARTS = ("input", "scale", "normalized")  # the tensors of a module, in addition to its output


def _matching(
    modules: list[tuple[str, nn.Module]], glob: str, parts: tuple[str, ...] = PARTS
) -> list[tuple[str, nn.Module, str]]:
    """Return (name, module, part) for each tensor that a glob matches. Part "" is the output."""
    part = glob.rpartition(".")[2]
    if part not in parts or any(matches(name, glob) for name, _ in modules):
        part = ""  # a submodule may have the name of a part
    has_part = _is_plain_norm if part in ("scale", "normalized") else bool
    named = [(f"{n}.{part}".rstrip("."), m, part) for n, m in modules if n and has_part(m)]
    found = [place for place in named if matches(place[0], glob)]
    if not found:
        names = [name for name, *_ in named]
        near = ", ".join(get_close_matches(glob, names, cutoff=0)) or "no submodules"
        raise ValueError(
            f"no site is called {glob!r} in this {type(modules[0][1]).__name__}; the nearest are "
            f"{near}. A * stands for one part of a name, between two dots"
        )
    times = Counter(id(module) for _, module in modules)
    if shared := [name for name, module, _ in found if times[id(module)] > 1]:
        raise ValueError(
            f"{listed(shared)}: a module with several names. Its runs cannot be distinguished, "
            "so share its parameters, not the module"
        )
    return found


def _is_plain_norm(module: Any) -> bool:
    """Whether a module is PyTorch's own LayerNorm, over the last dimension only."""
    is_norm = type(module).forward is nn.LayerNorm.forward and "forward" not in vars(module)
    return is_norm and len(module.normalized_shape) == 1


def matches(name: str, glob: str) -> bool:
    """Whether a glob matches a name. A * stands for one part of a name, between two dots.

    >>> matches("vision.blocks.3.attn", "vision.blocks.*.attn")
    True
    >>> matches("vision.blocks.3.attn", "vision.blocks.*")
    False
    """
    if not fnmatchcase(name, glob):  # a fast first test, in which a * also matches dots
        return False
    names, globs = name.split("."), glob.split(".")
    return len(names) == len(globs) and all(map(fnmatchcase, names, globs))


def _call(edit: Edit, name: str, module: nn.Module, args: tuple, tensor: Tensor) -> Tensor | None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        raise ValueError(f"{name}: is hooked; compile or export the model outside the `with`")
    return edit(tensor, name)


def _checked(edit: Edit, tensor: Tensor, name: str) -> Tensor | None:
    """Run a user's function, and check that it follows the rules of `hooks`."""
    # Tensors made in inference mode have no version counter, so their values are compared.
    before: Any = tensor.clone() if tensor.is_inference() else tensor._version
    edited = edit(tensor, name)
    if tensor.is_inference():
        changed = not torch.allclose(tensor, before, rtol=0, atol=0, equal_nan=True)
    else:
        changed = tensor._version != before
    if changed:
        raise ValueError(
            f"{name}: the hook changed the tensor in place; change x.clone() and return it"
        )
    if edited is not None and _kind(edited, name) != _kind(tensor, name):
        raise ValueError(
            f"{name}: the hook returned {_kind(edited, name)}; expected {_kind(tensor, name)} or "
            "None"
        )
    return edited


def _kind(x: Any, name: str) -> str:
    """Describe what a hook must not change: shape, dtype and device."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    shape: list[Any] = [*x.shape]
    last = name.removesuffix(".input").rpartition(".")[2]
    if x.ndim == 3 and (last.isdigit() or last in ("ln_pre", "resid_mid")):
        shape[1] = "T"  # the number of tokens may change in a residual stream
    dtype = "any dtype" if torch._C._is_any_autocast_enabled() else x.dtype
    return f"shape ({', '.join(map(str, shape))}), {dtype} on {x.device}"


KINDS = {  # TransformerLens' names of sites -> miniclip's
    "ln1": "ln_1",
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "attn_scores": "attn.scores",  # TransformerLens' scores are after the mask, ours before it
    "pattern": "attn.pattern",
    "z": "attn.z",
    "attn_out": "attn",
    "resid_mid": "resid_mid",
    "ln2": "ln_2",
    "mlp_pre": "mlp.fc1",
    "mlp_post": "mlp.act",
    "mlp_out": "mlp",
    "resid_post": "",
}


def site(kind: str, *, tower: str, layer: int) -> str:
    """Return our name of a site, from its TransformerLens name and the number of the block.

    Raises ValueError for an unknown name or tower.

    >>> site("resid_mid", tower="vision", layer=3), site("resid_pre", tower="text", layer=3)
    ('vision.blocks.3.resid_mid', 'text.blocks.2')
    """
    if tower not in ("vision", "text"):
        raise ValueError(f"tower is {tower!r}; expected 'vision' or 'text'")
    if type(layer) is not int or layer < 0:
        raise ValueError(f"layer is {layer!r}; expected the number of a block, from 0")
    if kind == "resid_pre" and layer:
        kind, layer = "resid_post", layer - 1
    elif kind == "resid_pre":
        return "vision.ln_pre" if tower == "vision" else "text.blocks.0.input"
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of resid_pre, {', '.join(KINDS)}")
    return f"{tower}.blocks.{layer}.{KINDS[kind]}".rstrip(".")
