"""The names of a model's modules, and a check that the config describes the modules."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from miniclip.errors import listed, shown
from miniclip.files.models import without_weights

WRAPPERS = {  # class of a wrapper -> the attribute that holds the wrapped module
    "OptimizedModule": "_orig_mod",  # torch.compile
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "PeftModel": "base_model",
    "BaseTuner": "model",  # PEFT's, inside PeftModel
}


_LIBRARIES = ("miniclip", "torch")


def unwrapped(module: Any) -> Any:
    """The module inside the wrappers of torch.compile, DDP, activation checkpointing and PEFT."""
    for kind in type(module).__mro__:
        if kind.__name__ in WRAPPERS:
            return unwrapped(getattr(module, WRAPPERS[kind.__name__]))
    return module


def class_of(module: nn.Module) -> Any:
    """The class of a module, or its original class if FSDP2 replaced it by a subclass."""
    return next(c for c in type(module).__mro__ if "torch.distributed.fsdp" not in c.__module__)


def named_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Like nn.Module.named_modules, but without wrappers, and with all names of a shared module."""
    module = unwrapped(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from named_modules(child, f"{prefix}.{name}".lstrip("."))


def is_patched(module: nn.Module, name: str) -> bool:
    """Whether the method `name` was replaced on this one module, not in its class."""
    patch: Any = vars(module).get(name)
    if getattr(patch, "func", None) is checkpoint:
        patch = patch.args[0]  # the method that activation checkpointing wraps
    return patch is not None and getattr(patch, "__func__", patch) is not getattr(
        class_of(module), name, None
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without wrappers in its names. With FSDP2, all processes must call this."""
    state: dict[str, Any] = {}
    for name, module in named_modules(model):
        module._save_to_state_dict(state, f"{name}.".lstrip("."), False)
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


def keeps_tensors(model: nn.Module) -> bool:
    """Whether a model has tensors that are not parameters: buffers, or tensors in attributes."""
    own = (v for m in model.modules() for name, v in vars(m).items() if name not in OWN)
    return any(isinstance(v, Tensor) for v in (*model.buffers(), *tree_leaves([*own])))


def check_described(model: Any) -> None:
    """Raise ValueError if a model has other modules than its class builds from its config.

    Weights and hooks are not compared. Warns if a method of a module was patched.
    """
    kind = class_of(model)
    expected = without_weights(lambda: kind(model.config))
    if keeps_tensors(expected):
        with torch.random.fork_rng(devices=[]):  # meta tensors have no values to compare
            expected = kind(model.config).to(next(model.parameters()).dtype)
    classes = {class_of(module) for _, module in named_modules(expected)}
    own = {one.__name__ for one in classes if one.__module__.split(".")[0] not in _LIBRARIES}
    if own and kind.__module__.split(".")[0] in _LIBRARIES:
        raise ValueError(
            f"{kind.__name__} is miniclip's class, but it builds {listed(sorted(own))}, and the "
            "files cannot record this. Do not set an attribute of a class of miniclip, such as "
            "Block.mlp_class. Write a subclass, and set the attribute there"
        )
    odd = [*differences(model, expected)]
    patched = [one for one in odd if one.endswith("is patched")]
    if patched:
        warnings.warn(f"{listed(patched)}, which a config cannot describe", stacklevel=3)
    if odd := [one for one in odd if one not in patched]:
        raise ValueError(
            f"the config does not describe the model: {listed(odd)}. If there are "
            "adapters, merge them (surgery.merge_lora, or PEFT's merge_and_unload). Quantise only "
            "after the save. For any other change, correct the config or write a subclass"
        )


def differences(model: nn.Module, expected: nn.Module) -> Iterator[str]:
    """Yield the differences between the modules of two models, one sentence for each."""
    ours, theirs = dict(named_modules(model)), dict(named_modules(expected))
    for name in theirs | ours:
        kinds = [class_of(m[name]).__name__ if name in m else "absent" for m in (ours, theirs)]
        if kinds[0] == kinds[1] and class_of(ours[name]) is not class_of(theirs[name]):
            # The two classes have the same name, like nn.Linear and torch's quantised Linear.
            kinds[0] = f"{class_of(ours[name]).__module__}.{kinds[0]}"
        if "absent" in kinds or class_of(ours[name]) is not class_of(theirs[name]):
            yield f"{name or 'the model'} is {kinds[0]}, expected {kinds[1]}"
            continue
        found, wanted = _settings(ours[name]), _settings(theirs[name])
        for key in wanted | found:
            place = f"{name}.{key}".lstrip(".")
            # An attribute that the class does not define has no effect, so it is not a difference.
            default = found.get(key) if key in vars(ours[name]) else "absent"
            default = getattr(theirs[name], key, default)
            values = found.get(key, "absent"), wanted.get(key, default)
            if key not in wanted and callable(getattr(theirs[name], key, None)):
                if is_patched(ours[name], key):
                    yield f"{place} is patched"
            elif _text(values[0]) != _text(values[1]):
                yield f"{place} is {shown(values[0])}, expected {shown(values[1])}"


OWN = {*vars(nn.Module()), "eager"}  # not compared: attributes of nn.Module, and `Attention.eager`


def _settings(module: nn.Module) -> dict[str, Any]:
    """The settings of a module: its submodules' names, its attributes, and its tensors' shapes."""
    settings: dict[str, Any] = {"parts": [*module._modules]} | module._buffers
    for name, value in vars(module).items():
        if name not in OWN and (name[0] != "_" or isinstance(value, int | float | str)):
            settings[name] = value
    stored: dict[str, Any] = {}
    module._save_to_state_dict(stored, "", False)
    for name, tensor in stored.items():
        kind = type(getattr(module, name, None)).__name__.replace("DTensor", "Parameter")
        settings[name] = f"a {kind} {tuple(getattr(tensor, 'shape', ()))}"
    return settings


def _text(value: Any) -> str:
    """Write a setting as text. Equal settings give the same text."""
    if isinstance(value, Tensor):
        value = value.tolist()
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    return re.sub(" at 0x[0-9a-f]+", "", f"{value!r} {cells}")
