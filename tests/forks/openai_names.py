"""A CLIP whose modules have OpenAI's names (openai/CLIP, model.py), for parity to look into."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

import miniclip
from miniclip.files.names import OPENAI, pack


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        fc, proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        names = ("c_fc", fc), ("gelu", miniclip.model.QuickGELU()), ("c_proj", proj)
        self.mlp = nn.Sequential(OrderedDict(names))
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:  # (T, B, W)
        mask = None if self.mask is None else self.mask.to(x.dtype)
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class Visual(nn.Module):
    def __init__(self, c: miniclip.VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(c.width))
        self.positional_embedding = nn.Parameter(torch.empty(c.patches + 1, c.width))
        self.ln_pre, self.ln_post = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.transformer = Transformer(c.width, c.layers, c.heads)
        self.proj = nn.Parameter(torch.empty(c.width, embed_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # (B, P, W)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding).transpose(0, 1)  # (T, B, W)
        return self.ln_post(self.transformer(x)[0]) @ self.proj


class CLIP(nn.Module):
    """`returns`: "openai" gives two tables of logits, "open_clip" embeddings and their scale."""

    def __init__(self, like: miniclip.CLIP, returns: str = "openai") -> None:
        super().__init__()
        c, self.returns = like.config, returns
        self.visual = Visual(c.vision, c.embed_dim)
        self.token_embedding = nn.Embedding(c.text.vocab_size, c.text.width)
        self.positional_embedding = nn.Parameter(torch.empty(c.text.context_length, c.text.width))
        self.transformer = Transformer(c.text.width, c.text.layers, c.text.heads)
        self.ln_final = nn.LayerNorm(c.text.width)
        self.text_projection = nn.Parameter(torch.empty(c.text.width, c.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))
        for block in self.transformer.resblocks:
            block.mask = torch.full((c.text.context_length,) * 2, -torch.inf).triu(1)
        self.load_state_dict(pack(like.state_dict(), OPENAI))

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.token_embedding(ids) + self.positional_embedding  # all positions, as OpenAI's does
        x = self.ln_final(self.transformer(x.transpose(0, 1)).transpose(0, 1))
        text = x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection
        image = self.visual(pixels)
        image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
        scale = self.logit_scale.exp()
        if self.returns == "open_clip":
            return image, text, scale
        return scale * image @ text.T, (scale * image @ text.T).T
