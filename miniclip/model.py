"""CLIP: a vision transformer and a text transformer that end in the same space.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv 2103.00020. In float32 on a CPU, the outputs equal the outputs of transformers' CLIPModel bit
for bit. Read from top to bottom: attention, MLP, block, the two towers, CLIP. In every file, shape
comments use these letters:

    B batch   T tokens   W width of the residual stream   H heads   D head width, W = H * D
    P patches of an image   R register tokens   E embedding   C captions, compared with B images

A layer with pruned heads has fewer than W / D heads. To change CLIP, write a subclass. Set the
classes of its parts (`Block.mlp_class`, `CLIP.vision_class`, ...), or override methods such as
`pool`. Name new parameters in `tensor_names`, so that they can be saved.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.files.checks import check_has_eos, check_ids, check_pixels, check_token_vectors
from miniclip.files.pretrained import Pretrained


class Site(nn.Identity):
    """A named tensor. Read or edit it with a hook, or put another module in the Site's place.

    A Site is added only where no other module outputs the tensor. The neurons need no Site: they
    are the output of `mlp.act`. The residual stream after a block is the output of the block.
    """


def is_watched(site: nn.Module) -> bool:
    """Whether a hook or a replaced `forward` may see or change the tensor at a site."""
    hooks = (site._forward_hooks, site._forward_pre_hooks, site._backward_hooks)
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    of_all = (getattr(all_modules, f"_global_{kind}_hooks") for kind in kinds)
    is_replaced = type(site).forward is not nn.Identity.forward or "forward" in site.__dict__
    return is_replaced or any((*hooks, site._backward_pre_hooks, *of_all))


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, W) -> (B, T, W). Vaswani et al. 2017, section 3.2.

    It has four separate Linears, so that each can be read, pruned or adapted alone. If `causal`, a
    token attends only to itself and to the tokens before it.
    """

    def __init__(self, width: int, heads: int, causal: bool, head_width: int | None = None) -> None:
        super().__init__()
        self.head_width = head_width or width // heads
        self.causal, self.eager = causal, False
        inner = heads * self.head_width  # equals the width unless heads were pruned
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.zeros_(linear.bias)  # as in nn.MultiheadAttention
        self.q, self.k, self.v = Site(), Site(), Site()
        self.scores, self.pattern, self.z = Site(), Site(), Site()

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, W) -> queries, keys and values, each (B, H, T, D)"""
        split = (-1, self.head_width)  # (H, D); H is not stored, because pruning changes it
        q = self.q(self.q_proj(x).unflatten(-1, split)).transpose(1, 2)  # (B, H, T, D)
        k = self.k(self.k_proj(x).unflatten(-1, split)).transpose(1, 2)  # (B, H, T, D)
        v = self.v(self.v_proj(x).unflatten(-1, split)).transpose(1, 2)  # (B, H, T, D)
        return q, k, v

    def forward(self, x: Tensor, pattern: Callable[..., Tensor] | None = None) -> Tensor:
        """(B, T, W) -> (B, T, W). `pattern(q, k, v)`, if given, computes the attention pattern."""
        q, k, v = self.qkv(x)
        if pattern is not None:
            z = pattern(q, k, v) @ v  # (B, H, T, T) @ (B, H, T, D)
        elif self.eager or is_watched(self.scores) or is_watched(self.pattern):
            z = self.attend(q, k, v)
        else:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        z = self.z(z.transpose(1, 2))  # (B, T, H, D)
        return self.out_proj(z.flatten(2))  # (B, T, W)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The plain steps of F.scaled_dot_product_attention, with sites. q, k, v: (B, H, T, D)."""
        scores = self.scores(q @ k.transpose(-2, -1) * self.head_width**-0.5)  # (B, H, T, T)
        if self.causal:  # the mask comes after the site, so that no edit can undo it
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        # In half precision the softmax is computed in float32, as in transformers.
        dtype = torch.promote_types(scores.dtype, torch.float32)
        pattern = self.pattern(scores.softmax(-1, dtype=dtype).to(v.dtype))  # rows sum to 1
        return pattern @ v  # (B, H, T, D)


def attentions(model: nn.Module) -> list[Attention]:
    """Every Attention in a model, in order."""
    return [module for module in model.modules() if isinstance(module, Attention)]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), an approximation of GELU. OpenAI's weights were trained with it."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return x * torch.sigmoid_(1.702 * x)  # overwrites the product, to save memory


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
}


class MLP(nn.Module):
    """Two Linears and an activation, applied to each token alone: (B, T, W) -> (B, T, W)."""

    def __init__(self, width: int, mlp_width: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.act = ACTIVATIONS[act]()
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, W) -> (B, T, W)"""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer layer: attention, then MLP, each added to the residual stream."""

    attention_class: type[Attention] = Attention
    mlp_class: type[MLP] = MLP

    def __init__(self, config: VisionConfig | TextConfig, layer: int, causal: bool) -> None:
        super().__init__()
        heads, mlp_width = (config.per_layer(name)[layer] for name in ("heads", "mlp_width"))
        self.ln_1 = nn.LayerNorm(config.width, eps=config.ln_eps)
        self.attn = self.attention_class(config.width, heads, causal, config.head_width)
        self.resid_mid = Site()
        self.ln_2 = nn.LayerNorm(config.width, eps=config.ln_eps)
        self.mlp = self.mlp_class(config.width, mlp_width, config.act)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, W) -> (B, T, W)"""
        x = self.resid_mid(x + self.attn(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))


class Tower(Pretrained):
    """The base of both towers: embeddings, blocks, a LayerNorm, a projection."""

    block_class: type[Block] = Block

    def make_blocks(self, config: Any, causal: bool) -> nn.Sequential:
        """Make the blocks that the config describes."""
        return nn.Sequential(*(self.block_class(config, i, causal) for i in range(config.layers)))


def projection(width: int, embed_dim: int | None) -> nn.Module:
    """The map into the shared space. If a tower's checkpoint has no map, `embed_dim` is None."""
    return nn.Identity() if embed_dim is None else nn.Linear(width, embed_dim, bias=False)


class VisionTower(Tower):
    """Pixels (B, channels, height, width) -> embeddings (B, E).

    A ViT (Dosovitskiy et al. 2020, arXiv 2010.11929) with one more LayerNorm, before the first
    block. The class token's last output becomes the embedding; the patches' outputs are not used.
    """

    towers = ("vision",)
    config_class = VisionConfig
    register_embed: nn.Parameter | None

    def __init__(self, config: VisionConfig, embed_dim: int | None) -> None:
        super().__init__()
        self.config = config
        size, width = config.patch_size, config.width
        # No bias, because the position embedding already adds a vector to each patch.
        self.patch_embed = nn.Conv2d(config.channels, width, size, stride=size, bias=False)
        self.class_embed = nn.Parameter(torch.empty(width))
        self.pos_embed = nn.Parameter(torch.empty(1 + config.patches, width))
        self.ln_pre = nn.LayerNorm(width, eps=config.ln_eps)
        registers = nn.Parameter(torch.zeros(config.registers, width)) if config.registers else None
        self.register_parameter("register_embed", registers)
        self.blocks = self.make_blocks(config, causal=False)
        self.ln_post = nn.LayerNorm(width, eps=config.ln_eps)
        self.proj = projection(width, embed_dim)
        self.init_weights()

    def embed_tokens(self, pixels: Tensor) -> Tensor:
        """Pixels -> the residual stream before the first block, (B, 1 + R + P, W)."""
        check_pixels(pixels, self.config)
        # Convert pixels to the dtype of the weights, as transformers does.
        x = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))  # (B, W, rows, columns)
        x = x.flatten(2).transpose(1, 2)  # (B, P, W)
        x = torch.cat([self.class_embed.expand(x.shape[0], 1, -1), x], dim=1)  # (B, 1 + P, W)
        x = x + self.pos_embed
        if self.register_embed is not None:  # registers get no position embedding
            registers = self.register_embed.expand(x.shape[0], -1, -1)  # (B, R, W)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)  # (B, 1 + R + P, W)
        return self.ln_pre(x)

    def pool(self, x: Tensor) -> Tensor:
        """Apply the last LayerNorm to the class token: (B, T, W) -> (B, W)."""
        return self.ln_post(x[:, 0])  # (B, W)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, E)"""
        x = self.blocks(self.embed_tokens(pixels))  # (B, 1 + R + P, W)
        return self.proj(self.pool(x))  # (B, E)

    @torch.no_grad()
    def init_weights(self) -> None:
        """OpenAI's init (openai/CLIP, model.py). q, k, v: the Xavier init of one (3W, W) matrix."""
        std = self.config.width**-0.5
        for weight in (self.class_embed, self.pos_embed, *self.proj.parameters()):
            nn.init.normal_(weight, std=std)
        for attn in attentions(self):
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj):
                nn.init.uniform_(linear.weight, -(1.5**0.5) * std, 1.5**0.5 * std)


class TextTower(Tower):
    """Token ids (B, T) -> embeddings (B, E). T is at most the context length.

    The architecture of GPT-2 (Radford et al. 2019). The end token's last output becomes the
    embedding. Attention is causal, so the end token sees no padding, and no padding mask is needed.
    """

    towers = ("text",)
    config_class = TextConfig

    def __init__(self, config: TextConfig, embed_dim: int | None) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = self.make_blocks(config, causal=True)
        self.ln_final = nn.LayerNorm(config.width, eps=config.ln_eps)
        self.proj = projection(config.width, embed_dim)
        self.init_weights()

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Ids -> the residual stream before the first block, (B, T, W)."""
        check_ids(ids, self.config.vocab_size)
        return self.add_positions(self.token_embed(ids))

    def add_positions(self, x: Tensor) -> Tensor:
        """Add the position embedding to any token vectors: (B, T, W) -> (B, T, W)."""
        check_token_vectors(x, self.pos_embed)
        return x + self.pos_embed[: x.shape[1]]

    def eos_positions(self, ids: Tensor) -> Tensor:
        """The position of each text's first end token: (B, T) -> (B,)

        On a CPU, a text without an end token raises ValueError. A compiled graph cannot raise, and
        on a GPU the check would be slow. Both give such a text the position -1 and a NaN embedding.
        """
        if self.config.ends_at_largest:
            return ids.argmax(-1)
        is_eos = ids == self.config.eos_token_id
        if ids.is_cpu and not torch.compiler.is_compiling():
            check_has_eos(is_eos, self.config.eos_token_id)
        return torch.where(is_eos.any(-1), is_eos.int().argmax(-1), -1)

    def pool(self, x: Tensor, eos: Tensor) -> Tensor:
        """Apply the last LayerNorm, and take the end token of each text: (B, T, W) -> (B, W)."""
        x = self.ln_final(x)  # (B, T, W)
        x = x[torch.arange(x.shape[0], device=x.device), eos]  # (B, W)
        return x.masked_fill((eos < 0)[:, None], torch.nan)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, E)"""
        x = self.blocks(self.embed_tokens(ids))  # (B, T, W)
        return self.proj(self.pool(x, self.eos_positions(ids)))  # (B, E)

    @torch.no_grad()
    def init_weights(self) -> None:
        """OpenAI's init (openai/CLIP, model.py, CLIP.initialize_parameters).

        transformers swaps two numbers: the std of q, k and v, and the std of out_proj.
        """
        std = self.config.width**-0.5
        residual_std = std * (2 * self.config.layers) ** -0.5  # a block adds to the stream twice
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        for weight in self.proj.parameters():
            nn.init.normal_(weight, std=std)
        for module in self.modules():
            if isinstance(module, Attention):
                for linear in (module.q_proj, module.k_proj, module.v_proj):
                    nn.init.normal_(linear.weight, std=std)
                nn.init.normal_(module.out_proj.weight, std=residual_std)
            elif isinstance(module, MLP):
                nn.init.normal_(module.fc1.weight, std=(2 * self.config.width) ** -0.5)
                nn.init.normal_(module.fc2.weight, std=residual_std)


def unit_norm(x: Tensor) -> Tensor:
    """Divide each row by its L2 norm, in the same three operations as transformers."""
    return x / x.pow(2).sum(-1, keepdim=True).pow(0.5)


class CLIPOutput(NamedTuple):
    """The logits of B images and C captions, and the embeddings that they come from."""

    logits_per_image: Tensor  # (B, C), exp(logit_scale) * cosine
    logits_per_text: Tensor  # (C, B), the transpose of logits_per_image
    image_embeds: Tensor  # (B, E), of length 1
    text_embeds: Tensor  # (C, E), of length 1


class CLIP(Pretrained):
    """Two towers and a logit scale. `CLIP(config)` is random. `load` gives trained weights."""

    towers = ("vision", "text")
    vision_class: type[VisionTower] = VisionTower
    text_class: type[TextTower] = TextTower
    config_class: type[CLIPConfig] = CLIPConfig

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = self.vision_class(config.vision, config.embed_dim)
        self.text = self.text_class(config.text, config.embed_dim)
        # The logarithm is stored, so a gradient step multiplies the scale by a positive factor.
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init)))

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        """Pixels from an ImageTransform -> embeddings (B, E), of length 1 if `normalize`."""
        return unit_norm(self.vision(pixels)) if normalize else self.vision(pixels)

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (B, T) from a Tokenizer -> embeddings (B, E), of length 1 if `normalize`."""
        return unit_norm(self.text(ids)) if normalize else self.text(ids)

    def score(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Unit vectors (B, E) and (C, E) -> logits (C, B), a row for each caption."""
        return text_embeds @ image_embeds.T * self.logit_scale.exp()

    def forward(self, pixels: Tensor, ids: Tensor) -> CLIPOutput:
        """Compare every image with every caption."""
        image_embeds = self.encode_image(pixels, normalize=True)  # (B, E)
        text_embeds = self.encode_text(ids, normalize=True)  # (C, E)
        logits_per_text = self.score(image_embeds, text_embeds)  # (C, B)
        return CLIPOutput(logits_per_text.T, logits_per_text, image_embeds, text_embeds)

    def set_attention(self, kind: str) -> None:
        """Choose fused attention ("sdpa", the default) or attention in plain steps ("eager").

        Both give the same result, up to rounding error. A layer whose `scores` or `pattern` has
        hooks always takes the plain steps. On a CPU, jvp and second derivatives need "eager".
        """
        if kind not in ("eager", "sdpa"):
            raise ValueError(f"attention kind is {kind!r}; expected 'eager' or 'sdpa'")
        for attn in attentions(self):
            attn.eager = kind == "eager"
