"""CLIPSeg (Lüddecke and Ecker 2022, arXiv 2112.10003) as a fork of CLIP.

The fork adds a small decoder, which reads the outputs of three blocks of the vision tower and
returns a mask for a text. The decoder's own blocks are narrow and post-norm. Before one of them,
the text's embedding scales and shifts every token (FiLM). The fork loads transformers' checkpoints
`CIDAS/clipseg-*`. It refuses checkpoints with the refined decoder, which has three convolutions.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from miniclip import CLIP, CLIPConfig, cache
from miniclip.files.names import TRANSFORMERS
from miniclip.model import Attention


@dataclass(frozen=True)
class CLIPSegConfig(CLIPConfig):
    extract_layers: tuple[int, ...] = (3, 6, 9)  # the decoder reads these blocks' outputs
    reduce_dim: int = 64  # the decoder's width
    decoder_num_attention_heads: int = 4
    decoder_intermediate_size: int = 2048
    conditional_layer: int = 0  # the index of the decoder's block that uses the text
    use_complex_transposed_convolution: bool = False

    @classmethod
    def from_fields(cls, values: dict[str, Any]) -> "CLIPSegConfig":
        layers = values.get("extract_layers", cls.extract_layers)
        return super().from_fields(values | {"extract_layers": tuple(layers)})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_complex_transposed_convolution:
            raise ValueError("use_complex_transposed_convolution must be false")


class DecoderMLP(nn.Module):
    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(width, mlp_width), nn.ReLU()
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DecoderBlock(nn.Module):
    """A post-norm block: each LayerNorm comes after the addition."""

    def __init__(self, config: CLIPSegConfig) -> None:
        super().__init__()
        width, eps = config.reduce_dim, config.vision.ln_eps
        self.attn = Attention(width, config.decoder_num_attention_heads, causal=False)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.mlp = DecoderMLP(width, config.decoder_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))


class Decoder(nn.Module):
    """Compute mask logits from residual streams (B, 1 + P, W) and text embeddings (B, E). The
    deepest block's stream comes first."""

    def __init__(self, config: CLIPSegConfig) -> None:
        super().__init__()
        self.conditional_layer = config.conditional_layer
        width, depth, size = config.reduce_dim, len(config.extract_layers), config.vision.patch_size
        self.reduces = nn.ModuleList(nn.Linear(config.vision.width, width) for _ in range(depth))
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(depth))
        self.film_mul = nn.Linear(config.embed_dim, width)
        self.film_add = nn.Linear(config.embed_dim, width)
        self.to_pixels = nn.ConvTranspose2d(width, 1, size, stride=size)

    def forward(self, streams: list[Tensor], text_embeds: Tensor, grid: tuple[int, int]) -> Tensor:
        x: Any = 0
        for i, (stream, reduce, block) in enumerate(zip(streams, self.reduces, self.blocks)):
            x = reduce(stream) + x  # (B, 1 + P, reduce_dim)
            if i == self.conditional_layer:
                mul, add = self.film_mul(text_embeds), self.film_add(text_embeds)
                x = mul[:, None] * x + add[:, None]
            x = block(x)
        patches = x[:, 1:].transpose(1, 2).unflatten(2, grid)  # (B, reduce_dim, rows, columns)
        return self.to_pixels(patches).squeeze(1)  # (B, height, width)


class CLIPSeg(CLIP):
    """`forward` is inherited from CLIP; `segment` returns the masks."""

    config_class = CLIPSegConfig
    model_type = "clipseg"
    tensor_names = {ours: f"clip.{theirs}" for ours, theirs in TRANSFORMERS.items()} | {
        "decoder.film_mul": "decoder.film_mul",
        "decoder.film_add": "decoder.film_add",
        "decoder.to_pixels": "decoder.transposed_convolution",
        "decoder.reduces.{}": "decoder.reduces.{}",
        "decoder.blocks.{}.attn.q_proj": "decoder.layers.{}.self_attn.q_proj",
        "decoder.blocks.{}.attn.k_proj": "decoder.layers.{}.self_attn.k_proj",
        "decoder.blocks.{}.attn.v_proj": "decoder.layers.{}.self_attn.v_proj",
        "decoder.blocks.{}.attn.out_proj": "decoder.layers.{}.self_attn.out_proj",
        "decoder.blocks.{}.ln_1": "decoder.layers.{}.layer_norm1",
        "decoder.blocks.{}.ln_2": "decoder.layers.{}.layer_norm2",
        "decoder.blocks.{}.mlp.fc1": "decoder.layers.{}.mlp.fc1",
        "decoder.blocks.{}.mlp.fc2": "decoder.layers.{}.mlp.fc2",
    }

    def __init__(self, config: CLIPSegConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config)

    def segment(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Return mask logits (B, height, width) for B images, with one text for each image."""
        layers = [f"vision.blocks.{i}" for i in reversed(self.config.extract_layers)]
        with cache(self, *layers) as acts:
            self.encode_image(pixels)
        streams = [acts[layer] for layer in layers]
        return self.decoder(streams, self.encode_text(ids), self.config.vision.grid)
