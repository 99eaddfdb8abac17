"""A CLIP with other module names, and the table that maps miniclip's names to them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import miniclip
from miniclip.files.names import pack
from miniclip.model import ACTIVATIONS

TOWER = {
    "pos_embed": "places",
    "proj.weight": "out.T",
    **{
        f"blocks.{{}}.attn.{part}_proj.{kind}": f"layers.{{}}.mix.qkv.{kind}[{third}]"
        for third, part in enumerate("qkv")
        for kind in ("weight", "bias")
    },
    "blocks.{}.ln_1": "layers.{}.before_mix",
    "blocks.{}.attn.out_proj": "layers.{}.mix.out",
    "blocks.{}.ln_2": "layers.{}.before_think",
    "blocks.{}.mlp.fc1": "layers.{}.think.0",
    "blocks.{}.mlp.fc2": "layers.{}.think.2",
}
EYES = TOWER | {"patch_embed": "patches", "class_embed": "first", "ln_pre": "enter"}
NAMES = {
    **{f"vision.{ours}": f"eyes.{own}" for ours, own in (EYES | {"ln_post": "leave"}).items()},
    **{
        f"text.{ours}": f"ears.{own}"
        for ours, own in (TOWER | {"token_embed": "words", "ln_final": "leave"}).items()
    },
    "logit_scale": "heat",
}


class Mix(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.num_heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(*parts, is_causal=self.causal)  # (B, H, T, D)
        return self.out(z.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, c: miniclip.VisionConfig | miniclip.TextConfig, causal: bool) -> None:
        super().__init__()
        self.before_mix, self.before_think = (nn.LayerNorm(c.width, c.ln_eps) for _ in range(2))
        self.mix = Mix(c.width, c.heads, causal)
        first, last = nn.Linear(c.width, c.mlp_width), nn.Linear(c.mlp_width, c.width)
        self.think = nn.Sequential(first, ACTIVATIONS[c.act](), last)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.before_mix(x))
        return x + self.think(self.before_think(x))


class CLIP(nn.Module):
    def __init__(self, like: miniclip.CLIP) -> None:
        super().__init__()
        config = like.config
        self.eyes, self.ears = nn.Module(), nn.Module()
        for tower, c in (self.eyes, config.vision), (self.ears, config.text):
            tower.layers = nn.Sequential(*(Layer(c, tower is self.ears) for _ in range(c.layers)))
            tower.leave = nn.LayerNorm(c.width, c.ln_eps)
            tower.out = nn.Parameter(torch.empty(c.width, config.embed_dim))
            rows = c.patches + 1 if tower is self.eyes else c.context_length
            tower.places = nn.Parameter(torch.empty(rows, c.width))
        c = config.vision
        self.eyes.first = nn.Parameter(torch.empty(c.width))
        self.eyes.patches = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.eyes.enter = nn.LayerNorm(c.width, c.ln_eps)
        self.ears.words = nn.Embedding(config.text.vocab_size, config.text.width)
        self.heat = nn.Parameter(torch.empty(()))
        self.load_state_dict(pack(like.state_dict(), NAMES))

    def forward(self, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
        eyes, ears = self.eyes, self.ears
        x = eyes.patches(pixels).flatten(2).mT  # (B, P, W)
        x = torch.cat([eyes.first.expand(len(x), 1, -1), x], 1) + eyes.places
        image = eyes.leave(eyes.layers(eyes.enter(x))[:, 0]) @ eyes.out
        x = ears.layers(ears.words(ids) + ears.places[: ids.shape[1]])
        text = ears.leave(x[torch.arange(len(x)), ids.argmax(-1)]) @ ears.out
        logits = self.heat.exp() * F.normalize(image) @ F.normalize(text).T
        return {"logits_per_image": logits, "logits_per_text": logits.T}
