"""miniclip: CLIP in PyTorch, small enough to read and exact enough to trust.

The reference, in the order to read it: `miniclip.config`, `miniclip.model`, `miniclip.loss`,
`miniclip.tokenizer`, `miniclip.transform`, `miniclip.checkpoint`. The reference uses
`miniclip.files` and `miniclip.text`. All other modules are tools that use the reference.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time `_import` imports these names
    from miniclip.checkpoint import Loaded, load, save
    from miniclip.config import CLIPConfig, TextConfig, VisionConfig
    from miniclip.errors import CheckpointError, ContextLengthError, ImageError
    from miniclip.model import CLIP, CLIPOutput, TextTower, VisionTower
    from miniclip.sites import cache, hooks
    from miniclip.tokenizer import Tokenizer
    from miniclip.transform import ImageTransform
    from miniclip.zeroshot.classifier import ZeroShotClassifier

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


def _import(name: str) -> Any:
    """Import all public names when one of them is first used.

    Importing torch takes a second or two. `miniclip --help` does not need torch, so it is fast.
    """
    homes = ["errors", "config", "model", "tokenizer", "transform", "checkpoint"]
    homes += ["sites", "zeroshot.classifier"]
    for home in homes:
        module = import_module(f"miniclip.{home}")
        for public in vars(module).keys() & __all__:
            if (value := vars(module)[public]).__module__ == module.__name__:
                globals().setdefault(public, value)
    if name not in globals():
        raise AttributeError(f"module 'miniclip' has no attribute {name!r}")
    return globals()[name]


if not TYPE_CHECKING:  # with __getattr__, a type checker would accept any name
    __getattr__ = _import


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
