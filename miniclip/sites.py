"""Read or edit any tensor inside a model, by name, for as long as a `with` block lasts.

A site is a module, and its output is the tensor: `vision.blocks.3.attn.pattern` is the attention
pattern of the fourth block, `vision.blocks.3` the residual stream after it. The idea is that of
TransformerLens' HookPoint (Nanda and Bloom 2022), on PyTorch's own forward hooks, so any nn.Module
will do for `model`; with a bare tower the names begin at `blocks`.

Sites that nobody uses change no bit and add no operation: they cost a few calls of Python for each
layer, and nothing in a graph.

In a name, `*` and `[0-3]` stand for what they stand for in file names, between two dots. Inside a
block, models that `torch.compile` has compiled run uncompiled: a compiled graph does not look for
hooks that came after it, nor notice that one is gone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor, str], Tensor | None]
"""(the tensor, the name of its site) -> the tensor to go on with, or None to change nothing."""


@contextmanager
def hooks(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Call a function on the tensor of every site that a pattern matches; what it returns goes on.

    Returns of None change nothing. Functions of one site run in the order they are given in, and
    the outer of two blocks comes first. A tensor that is edited in place is an error, because
    others may hold it: return a changed copy. Raises ValueError for a pattern without a match.

    >>> from miniclip import CLIP
    >>> import torch
    >>> model, pixels = CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64)
    >>> with hooks(model, {"vision.blocks.*.mlp": lambda out, name: 0 * out}):
    ...     without_mlps = model.encode_image(pixels)
    >>> torch.equal(without_mlps, model.encode_image(pixels))
    False
    """
    found = [(*site, edit) for glob, edit in edits.items() for site in find(model, glob)]
    handles = []
    try:
        for name, module, edit in found:
            handles.append(module.register_forward_hook(partial(_call, edit, name)))
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def cache(
    model: nn.Module, *globs: str, grad: bool = False, device: str | torch.device | None = None
) -> Iterator[dict[str, Tensor]]:
    """A dictionary that fills, as the model runs, with a copy of the tensor of each matching site.

    The copies are of the last run, on `device` (default: where the tensor is). With `grad` the
    copy is what the model goes on with: torch.autograd.grad(score, acts[name]) is its gradient.
    Raises ValueError for a pattern without a match, and for `grad` where gradients are off.

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

    with hooks(model, dict.fromkeys(globs, keep)):
        yield acts


def find(model: nn.Module, glob: str) -> list[tuple[str, nn.Module]]:
    """The sites whose names match, in the order of the model. ValueError if there are none."""
    # torch.compile puts a model into a wrapper, whose name is no part of a site's.
    modules = {
        f"{name}.".replace("_orig_mod.", "").rstrip("."): module
        for name, module in model.named_modules()
    }
    found = [(name, module) for name, module in modules.items() if name and matches(name, glob)]
    if not found:
        near = ", ".join(get_close_matches(glob, modules, cutoff=0)) or "no submodules"
        raise ValueError(
            f"no site is called {glob!r} in this {type(model).__name__}; the nearest are {near}. "
            "A * stands for one part of a name, between two dots"
        )
    return found


def matches(name: str, glob: str) -> bool:
    """Whether a glob matches a name, in which a * stands for one part between two dots.

    >>> matches("vision.blocks.3.attn", "vision.blocks.*.attn")
    True
    >>> matches("vision.blocks.3.attn", "vision.blocks.*")
    False
    """
    names, globs = name.split("."), glob.split(".")
    return len(names) == len(globs) and all(map(fnmatchcase, names, globs))


def _call(edit: Edit, name: str, module: nn.Module, args: tuple, tensor: Tensor) -> Tensor | None:
    """A forward hook that runs the function and holds it to its promises."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: its output is no tensor, but a {type(tensor).__name__}")
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
    if edited is not None and not isinstance(edited, Tensor):
        raise ValueError(
            f"{name}: the hook returned a {type(edited).__name__}; expected a tensor or None"
        )
    return edited


KINDS = {  # TransformerLens' names of sites -> ours
    "ln1": "ln_1",
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "attn_scores": "attn.scores",
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
