"""miniclip: CLIP in PyTorch, small enough to read and exact enough to trust.

The reference, in the order to read it: `miniclip.config`, `miniclip.model`, `miniclip.tokenizer`,
`miniclip.transform`, `miniclip.checkpoint`. The other modules are tools that are built on it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # else where they are first asked for, below
    from miniclip.checkpoint import Loaded, load, save
    from miniclip.config import (
        CheckpointError,
        CLIPConfig,
        ContextLengthError,
        ImageError,
        TextConfig,
        VisionConfig,
    )
    from miniclip.model import CLIP, CLIPOutput, TextTower, VisionTower
    from miniclip.sites import cache, hooks
    from miniclip.tokenizer import Tokenizer
    from miniclip.transform import ImageTransform
    from miniclip.zeroshot import ZeroShotClassifier

__all__ = [
    "load",
    "save",
    "Loaded",
    "CLIP",
    "CLIPOutput",
    "VisionTower",
    "TextTower",
    "CLIPConfig",
    "VisionConfig",
    "TextConfig",
    "Tokenizer",
    "ImageTransform",
    "ZeroShotClassifier",
    "cache",
    "hooks",
    "CheckpointError",
    "ContextLengthError",
    "ImageError",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A public name or a module of the reference, when it is first asked for. They bring torch, and
    its second or two is nothing that `miniclip --help`, or Ctrl-C, should have to wait for."""
    for home in ("config", "model", "tokenizer", "transform", "checkpoint", "sites", "zeroshot"):
        module = import_module(f"miniclip.{home}")
        if name == home:
            return module
        own = getattr(vars(module).get(name), "__module__", None) == module.__name__
        if own and name in __all__:
            return getattr(module, name)
    raise AttributeError(f"module 'miniclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
