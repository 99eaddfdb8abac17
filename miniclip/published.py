"""Shapes of published models, by name. No weights."""

from miniclip.config import CLIPConfig, TextConfig, VisionConfig


def _config(vision: tuple[int, ...], text: tuple[int, ...], act: str = "quick_gelu") -> CLIPConfig:
    width, layers, heads, mlp_width, patch_size, image_size = vision
    text_width, text_layers, embed_dim = text
    return CLIPConfig(
        VisionConfig(width, layers, heads, mlp_width, act, 1e-5, image_size, patch_size),
        TextConfig(text_width, text_layers, text_width // 64, 4 * text_width, act),
        embed_dim,
    )


PUBLISHED = {
    # vision: width, layers, heads, MLP width, patch, image; text: width, layers; embedding
    "B/32": _config((768, 12, 12, 3072, 32, 224), (512, 12, 512)),
    "B/16": _config((768, 12, 12, 3072, 16, 224), (512, 12, 512)),
    "L/14": _config((1024, 24, 16, 4096, 14, 224), (768, 12, 768)),
    "L/14-336": _config((1024, 24, 16, 4096, 14, 336), (768, 12, 768)),
    "H/14": _config((1280, 32, 16, 5120, 14, 224), (1024, 24, 1024), "gelu"),
    "g/14": _config((1408, 40, 16, 6144, 14, 224), (1024, 24, 1024), "gelu"),
    "bigG/14": _config((1664, 48, 16, 8192, 14, 224), (1280, 32, 1280), "gelu"),
    "TinyCLIP-8M/16": _config((256, 10, 4, 1024, 16, 224), (256, 3, 512)),
    "TinyCLIP-39M/16": _config((512, 12, 8, 2048, 16, 224), (512, 6, 512)),
    "TinyCLIP-40M/32": _config((512, 12, 8, 2048, 32, 224), (512, 6, 512)),
    "TinyCLIP-61M/32": _config((640, 12, 10, 2560, 32, 224), (512, 9, 512)),
}
"""OpenAI's four (tables 19 and 20 of the paper), LAION's (github.com/mlfoundations/open_clip,
model_configs) and TinyCLIP's (Wu et al. 2023, arXiv 2309.12314). The end token is the tokenizer's,
49407; OpenAI's own files say 2 (LEGACY_EOS)."""
