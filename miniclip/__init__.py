"""miniclip: CLIP in PyTorch, small enough to read and exact enough to trust."""

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

__version__ = "0.1.0"
