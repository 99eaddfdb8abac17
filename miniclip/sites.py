"""Read or edit any tensor inside a model, by name, for as long as a `with` block lasts.

A site is a module, and its output is the tensor: `vision.blocks.3.attn.pattern` is the attention
pattern of the fourth block, `vision.blocks.3` the residual stream after it. The idea is that of
TransformerLens' HookPoint (Nanda and Bloom 2022), on PyTorch's own forward hooks, so any nn.Module
will do for `model`; with a bare tower the names begin at `blocks`.

Sites that nobody uses change no bit and add no operation: they cost a few calls of Python for each
layer, and nothing in a graph.

In a name, `*` and `[0-3]` stand for what they stand for in file names, between two dots. The
wrappers of `torch.compile`, DDP and PEFT are no part of a name. Inside a block, models that
`torch.compile` has compiled run uncompiled: a compiled graph does not look for hooks that came
after it, nor notice that one is gone.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.errors import listed
from miniclip.files.modules import named_modules

Edit = Callable[[Tensor, str], Tensor | None]
"""(the tensor, the name of its site) -> the tensor to go on with, or None to change nothing."""


@contextmanager
def hooks(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Call a function on the tensor of every site that a pattern matches; what it returns goes on.

    Returns of None change nothing. Functions of one site run in the order they are given in, and
    the outer of two blocks comes first. A tensor that is edited in place is an error, because
    others may hold it: return a changed copy, of the same dtype and shape. Only a residual stream
    (`ln_pre`, `resid_mid`, a block) may get another number of tokens. Raises ValueError for a
    pattern without a match, and for a module that is shared, because its runs look the same.

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
    """A dictionary that fills, as the model runs, with a copy of the tensor of each matching site.

    The copies are of each module's last run, on `device` (default: where the tensor is). With
    `grad` the copy is what the model goes on with: torch.autograd.grad(score, acts[name]) is its
    gradient. Raises ValueError as `hooks` does, and for `grad` where gradients are off.

    >>> from miniclip import CLIP
    >>> import torch
    >>> model = CLIP.from_pretrained("shapes")
    >>> with cache(model, "vision.blocks.*.attn.pattern") as acts:
    ...     _ = model.encode_image(torch.zeros(2, 3, 64, 64))
    >>> acts["vision.blocks.0.attn.pattern"].sum(-1).allclose(torch.ones(()))
    True
    """
    if not globs:
        raise ValueError("no sites named; expected at least one, as 'vision.blocks.*.attn.pattern'")
    acts: dict[str, Tensor] = {}

    def keep(tensor: Tensor, name: str) -> Tensor | None:
        if not grad:
            acts[name] = tensor.detach().to(device, copy=True)
            return None
        if not torch.is_grad_enabled():
            raise ValueError(f"{name}: grad=True needs gradients, and torch.no_grad is in force")
        acts[name] = tensor.to(device, copy=True).requires_grad_()
        return acts[name].to(tensor.device)

    with _hooked(model, dict.fromkeys(globs, keep)):
        yield acts


@contextmanager
def _hooked(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    modules = [*named_modules(model)]
    found = [(*site, edit) for glob, edit in edits.items() for site in _matching(modules, glob)]
    # Nothing is compiled before the compiler is there, and importing it takes more than a second.
    is_loaded = "torch._dynamo" in sys.modules
    handles = []
    try:
        for name, module, edit in found:
            handles.append(module.register_forward_hook(partial(_call, edit, name)))
        with torch.compiler.set_stance("force_eager") if is_loaded else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def find(model: nn.Module, glob: str) -> list[tuple[str, nn.Module]]:
    """The sites whose names match, in the order of the model. ValueError if there are none."""
    return _matching([*named_modules(model)], glob)


def _matching(modules: list[tuple[str, nn.Module]], glob: str) -> list[tuple[str, nn.Module]]:
    found = [(name, module) for name, module in modules if name and matches(name, glob)]
    if not found:
        names = [name for name, _ in modules]
        near = ", ".join(get_close_matches(glob, names, cutoff=0)) or "no submodules"
        raise ValueError(
            f"no site is called {glob!r} in this {type(modules[0][1]).__name__}; the nearest are "
            f"{near}. A * stands for one part of a name, between two dots"
        )
    times = Counter(id(module) for _, module in modules)
    if shared := [name for name, module in found if times[id(module)] > 1]:
        raise ValueError(
            f"{listed(shared)}: a module with several names, whose runs cannot be told apart. "
            "Share its parameters, and not the module"
        )
    return found


def matches(name: str, glob: str) -> bool:
    """Whether a glob matches a name, in which a * stands for one part between two dots.

    >>> matches("vision.blocks.3.attn", "vision.blocks.*.attn")
    True
    >>> matches("vision.blocks.3.attn", "vision.blocks.*")
    False
    """
    if not fnmatchcase(name, glob):  # where a * may stand for dots too; one comparison is fast
        return False
    names, globs = name.split("."), glob.split(".")
    return len(names) == len(globs) and all(map(fnmatchcase, names, globs))


def _call(edit: Edit, name: str, module: nn.Module, args: tuple, tensor: Tensor) -> Tensor | None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: its output is no tensor, but a {type(tensor).__name__}")
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        raise ValueError(f"{name}: is hooked; compile or export the model outside of the block")
    return edit(tensor, name)


def _checked(edit: Edit, tensor: Tensor, name: str) -> Tensor | None:
    """Run a user's function and hold it to its promises."""
    # In inference mode tensors do not count their changes.
    before: Any = tensor.clone() if tensor.is_inference() else tensor._version
    edited = edit(tensor, name)
    if tensor.is_inference():
        changed = not torch.allclose(tensor, before, rtol=0, atol=0, equal_nan=True)
    else:
        changed = tensor._version != before
    if changed:
        raise ValueError(
            f"{name}: the hook changed the tensor in place; return a changed copy, as of x.clone()"
        )
    if edited is not None and _kind(edited, name) != _kind(tensor, name):
        raise ValueError(
            f"{name}: the hook returned {_kind(edited, name)}; expected {_kind(tensor, name)} or "
            "None"
        )
    return edited


def _kind(x: Any, name: str) -> str:
    """What a hook may not change, in words."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    shape: list[Any] = [*x.shape]
    last = name.rpartition(".")[2]
    if x.ndim == 3 and (last.isdigit() or last in ("ln_pre", "resid_mid")):
        shape[1] = "T"  # a residual stream may lose tokens, or get more
    dtype = "any dtype" if torch._C._is_any_autocast_enabled() else x.dtype
    return f"shape ({', '.join(map(str, shape))}), {dtype} on {x.device}"


KINDS = {  # TransformerLens' names of sites -> ours
    "ln1": "ln_1",
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "attn_scores": "attn.scores",  # before the mask; TransformerLens' site is after it
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
    """The name of a site, from TransformerLens' word for it and the number of the block.

    Raises ValueError for a word or a tower that there is not, and for the text tower's first
    residual stream, which is no module's output.

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
        if tower == "text":
            raise ValueError(
                "the text tower's first residual stream is no module's output: use "
                "'text.token_embed', to which the position embedding is added next"
            )
        return "vision.ln_pre"
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of resid_pre, {', '.join(KINDS)}")
    return f"{tower}.blocks.{layer}.{KINDS[kind]}".rstrip(".")
