"""miniclip: CLIP in PyTorch, small enough to read and exact enough to trust."""

from miniclip.config import (
    CheckpointError,
    CLIPConfig,
    ContextLengthError,
    ImageError,
    TextConfig,
    VisionConfig,
)
from miniclip.model import CLIP
