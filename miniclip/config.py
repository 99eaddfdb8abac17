"""The numbers that define a CLIP: the sizes of each tower, and the width of the shared space.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv 2103.00020, tables 19 and 20. The defaults describe ViT-B/32. transformers assumes the same
defaults when a config.json leaves a field out.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from miniclip.files.checks import LEGACY_EOS as LEGACY_EOS  # 2, the end id in OpenAI's configs
from miniclip.files.checks import check_clip, check_config
from miniclip.files.pretrained import PretrainedConfig


@dataclass(frozen=True)
class TowerConfig:
    """The sizes of a tower's transformer."""

    width: int  # of the residual stream
    layers: int
    heads: int | tuple[int, ...]  # one number for all layers, or one for each layer
    mlp_width: int | tuple[int, ...]  # one number for all layers, or one for each layer
    act: str = "quick_gelu"  # or "gelu", "gelu_pytorch_tanh"; must match the training
    ln_eps: float = 1e-5
    head_width: int | None = field(default=None, kw_only=True)  # None: width // heads

    def __post_init__(self) -> None:
        check_config(self)

    def per_layer(self, name: str) -> tuple[int, ...]:
        """Return the field "heads" or "mlp_width" as a tuple with one number for each layer."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * self.layers


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The vision tower. `image_size` and `patch_size` are in pixels."""

    width: int = 768
    layers: int = 12
    heads: int | tuple[int, ...] = 12
    mlp_width: int | tuple[int, ...] = 3072
    image_size: int | tuple[int, int] = 224  # the side of a square, or (height, width)
    patch_size: int = 32
    channels: int = 3
    registers: int = 0  # extra tokens between the class token and the patches

    @property
    def height_width(self) -> tuple[int, int]:
        """The height and the width of an image in pixels."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def side(self) -> int:
        """The side of a square image. Raises ValueError if images are not square."""
        if isinstance(self.image_size, tuple):
            raise ValueError(
                f"image_size is {self.image_size}; an ImageTransform makes square images only"
            )
        return self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """The numbers of rows and columns of patches. Border pixels without a patch are unused."""
        height, width = self.height_width
        return height // self.patch_size, width // self.patch_size

    @property
    def patches(self) -> int:
        """The number of patches in an image: 7 x 7 = 49 for 224 pixels and patches of 32."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    """The text tower. A text ends at its first `eos_token_id`, unless `ends_at_largest` is true."""

    width: int = 512
    layers: int = 12
    heads: int | tuple[int, ...] = 8
    mlp_width: int | tuple[int, ...] = 2048
    vocab_size: int = 49408
    context_length: int = 77
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    literal_eos: bool = field(default=False, kw_only=True)  # True: id 2 ends a text (MetaCLIP 2)

    @property
    def ends_at_largest(self) -> bool:
        """Whether a text ends at its largest id. True for OpenAI's configs (`eos_token_id` 2)."""
        return self.eos_token_id == LEGACY_EOS and not self.literal_eos


@dataclass(frozen=True)
class CLIPConfig(PretrainedConfig):
    """Two towers and the space they share.

    >>> CLIPConfig.from_dict(CLIPConfig(embed_dim=640).to_dict()).embed_dim
    640
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 512
    logit_scale_init: float = 2.6592  # ln(1 / 0.07), section 2.5 of the paper

    tower_classes: ClassVar = {"vision": VisionConfig, "text": TextConfig}  # for forks to override

    def __post_init__(self) -> None:
        check_clip(self)
