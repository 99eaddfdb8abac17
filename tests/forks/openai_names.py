"""A CLIP whose modules have OpenAI's names (openai/CLIP, model.py), for tests of parity."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

import miniclip
from miniclip.files.names import OPEN_CLIP_CUSTOM_TEXT, OPENAI, pack


class Block(nn.Module):
    def __init__(self, width: int, heads: int, act: str) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        fc, proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        names = ("c_fc", fc), ("gelu", miniclip.model.ACTIVATIONS[act]()), ("c_proj", proj)
        self.mlp = nn.Sequential(OrderedDict(names))
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:  # (T, B, W)
        mask = None if self.mask is None else self.mask.to(x.dtype)
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, c: miniclip.VisionConfig | miniclip.TextConfig) -> None:
        super().__init__()
        blocks = (Block(c.width, c.heads, c.act) for _ in range(c.layers))
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class Visual(nn.Module):
    def __init__(self, c: miniclip.VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(c.width))
        self.positional_embedding = nn.Parameter(torch.empty(c.patches + 1, c.width))
        self.ln_pre, self.ln_post = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.transformer = Transformer(c)
        self.proj = nn.Parameter(torch.empty(c.width, embed_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # (B, P, W)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding).transpose(0, 1)  # (T, B, W)
        return self.ln_post(self.transformer(x)[0]) @ self.proj


class CLIP(nn.Module):
    """If `kind` is "openai", `forward` returns two matrices of logits. Otherwise it returns the
    embeddings and the scale. Only the kind "custom_text" has a module for its text tower."""

    def __init__(self, like: miniclip.CLIP, kind: str = "openai") -> None:
        super().__init__()
        c, self.kind = like.config, kind
        if kind == "custom_text":
            self.text = nn.Module()
        text = self._text()
        self.visual = Visual(c.vision, c.embed_dim)
        text.token_embedding = nn.Embedding(c.text.vocab_size, c.text.width)
        text.positional_embedding = nn.Parameter(torch.empty(c.text.context_length, c.text.width))
        text.transformer = Transformer(c.text)
        text.ln_final = nn.LayerNorm(c.text.width)
        text.text_projection = nn.Parameter(torch.empty(c.text.width, c.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))
        for block in text.transformer.resblocks:
            block.mask = torch.full((c.text.context_length,) * 2, -torch.inf).triu(1)
        table = OPEN_CLIP_CUSTOM_TEXT if kind == "custom_text" else OPENAI
        self.load_state_dict(pack(like.state_dict(), table))

    def _text(self) -> nn.Module:
        return self.text if self.kind == "custom_text" else self

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        text = self._text()
        x = text.token_embedding(ids) + text.positional_embedding  # the ids have full length
        x = text.ln_final(text.transformer(x.transpose(0, 1)).transpose(0, 1))
        x = x[torch.arange(len(x)), ids.argmax(-1)] @ text.text_projection
        image, words = (x / x.norm(dim=-1, keepdim=True) for x in (self.visual(pixels), x))
        scale = self.logit_scale.exp()
        if self.kind != "openai":
            return image, words, scale
        return scale * image @ words.T, (scale * image @ words.T).T
