"""miniclip: CLIP in PyTorch, small enough to read and exact enough to trust.

The reference, in the order to read it: `miniclip.config`, `miniclip.model`, `miniclip.tokenizer`,
`miniclip.transform`, `miniclip.checkpoint`. The other modules are tools that are built on it.
"""

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
