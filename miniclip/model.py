"""CLIP: a vision transformer and a text transformer that end in the same space.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv 2103.00020. The numbers are those of transformers' CLIPModel, in float32 on a CPU to the last
bit; the names are those of the field. Read it downwards: an attention and an MLP, the block they
make, the two towers made of blocks, and CLIP.

A letter means one thing in every shape comment of this package:

    B batch   T tokens   W width of the residual stream   H heads   D width of a head, W = H * D
    P patches of an image   E width of the shared embedding   C captions, where B counts images

Surgery may leave a layer fewer heads than H = W / D, and an image R register tokens, of which the
published models have none.
"""

from collections.abc import Callable
from os import PathLike
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from miniclip.config import (
    LEGACY_EOS,
    CLIPConfig,
    ContextLengthError,
    TextConfig,
    VisionConfig,
    per_layer,
)


class Site(nn.Identity):
    """A tensor with a name: hook it to read or edit the tensor, replace it to splice a module in.

    Sites stand only where no module's output is the tensor already. `attn` returns what attention
    adds to the residual stream, `mlp.act` the neurons, a block the residual stream after it.
    """


HOOKS_ON_ALL_MODULES = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
)


def is_watched(site: nn.Module) -> bool:
    """Whether someone looks at the tensor, in any way in which PyTorch lets one look at a module.

    A hook is on the site or on all modules, its `forward` is patched, or a module is in its place.
    """
    before = (site._forward_pre_hooks, site._backward_pre_hooks)
    after = (site._forward_hooks, site._backward_hooks)
    is_patched = type(site) is not Site or "forward" in site.__dict__
    return is_patched or any((*before, *after, *HOOKS_ON_ALL_MODULES))


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, W) -> (B, T, W). Vaswani et al. 2017, section 3.2.

    Four plain Linears, so that each can be read, pruned or given an adapter on its own. With
    `causal`, a token sees itself and the tokens before it.
    """

    def __init__(self, width: int, heads: int, causal: bool, head_width: int | None = None) -> None:
        super().__init__()
        self.head_width = head_width or width // heads
        self.causal = causal
        self.eager = False
        inner = heads * self.head_width  # the width again, unless heads have been pruned
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)
        self.q = Site()
        self.k = Site()
        self.v = Site()
        self.scores = Site()
        self.pattern = Site()
        self.z = Site()

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, W) -> (B, T, W)"""
        # How many heads there are is read off the weights: a layer with heads pruned just works.
        heads = (-1, self.head_width)
        q = self.q(self.q_proj(x).unflatten(-1, heads)).transpose(1, 2)  # (B, H, T, D)
        k = self.k(self.k_proj(x).unflatten(-1, heads)).transpose(1, 2)  # (B, H, T, D)
        v = self.v(self.v_proj(x).unflatten(-1, heads)).transpose(1, 2)  # (B, H, T, D)
        if self.eager or is_watched(self.scores) or is_watched(self.pattern):
            z = self.attend(q, k, v)
        else:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        z = self.z(z.transpose(1, 2))  # (B, T, H, D)
        return self.out_proj(z.flatten(2))  # (B, T, W)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """F.scaled_dot_product_attention written out: a weighted mean of v. All (B, H, T, D)."""
        scores = q @ k.transpose(-2, -1) * self.head_width**-0.5  # (B, H, T, T)
        if self.causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        scores = self.scores(scores)
        # In half precision the softmax is taken in float32, as transformers does.
        dtype = torch.promote_types(scores.dtype, torch.float32)
        pattern = self.pattern(scores.softmax(-1, dtype=dtype).to(v.dtype))  # rows sum to 1
        return pattern @ v  # (B, H, T, D)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), an approximation of GELU. OpenAI's weights were trained with it."""

    def forward(self, x: Tensor) -> Tensor:
        """Each number alone, whatever the shape."""
        return x * torch.sigmoid_(1.702 * x)  # in place: fresh memory costs time


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
}


class MLP(nn.Module):
    """Two Linears with an activation between, on each token alone: (B, T, W) -> (B, T, W)."""

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

    def __init__(self, config: VisionConfig | TextConfig, layer: int, causal: bool) -> None:
        super().__init__()
        heads, mlp_width = (per_layer(config, name)[layer] for name in ("heads", "mlp_width"))
        self.ln_1 = nn.LayerNorm(config.width, eps=config.ln_eps)
        self.attn = Attention(config.width, heads, causal, config.head_width)
        self.resid_mid = Site()
        self.ln_2 = nn.LayerNorm(config.width, eps=config.ln_eps)
        self.mlp = MLP(config.width, mlp_width, config.act)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, W) -> (B, T, W)"""
        x = self.resid_mid(x + self.attn(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))


class VisionTower(nn.Module):
    """Pixels (B, channels, height, width) -> embeddings (B, E).

    A ViT (Dosovitskiy et al. 2020, arXiv 2010.11929) with a LayerNorm of CLIP's own before the
    first block. The image is read at its class token; the patches' last outputs go unused.
    """

    register_embed: nn.Parameter | None

    def __init__(self, config: VisionConfig, embed_dim: int | None) -> None:
        super().__init__()
        self.config = config
        size, width = config.patch_size, config.width
        # No bias: ln_pre would take out its mean, and the position embedding can hold the rest.
        self.patch_embed = nn.Conv2d(config.channels, width, size, stride=size, bias=False)
        self.class_embed = nn.Parameter(torch.empty(width))
        self.pos_embed = nn.Parameter(torch.empty(1 + config.patches, width))
        self.ln_pre = nn.LayerNorm(width, eps=config.ln_eps)
        registers = nn.Parameter(torch.zeros(config.registers, width)) if config.registers else None
        self.register_parameter("register_embed", registers)
        self.blocks = nn.Sequential(*(Block(config, i, causal=False) for i in range(config.layers)))
        self.ln_post = nn.LayerNorm(width, eps=config.ln_eps)
        self.proj = projection(width, embed_dim)
        self.init_weights()

    def embed(self, pixels: Tensor) -> Tensor:
        """The residual stream before the first block, (B, 1 + R + P, W)."""
        c, (h, w) = self.config.channels, self.config.height_width
        if pixels.ndim != 4 or pixels.shape[1:] != (c, h, w):
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}; this vision tower reads (B, {c}, {h}, "
                f"{w}). The ImageTransform that belongs to it makes such pixels"
            )
        # Pixels come as float32; here, as in transformers, they take the precision of the weights.
        x = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))  # (B, W, rows, columns)
        x = x.flatten(2).transpose(1, 2)  # (B, P, W)
        x = torch.cat([self.class_embed.expand(x.shape[0], 1, -1), x], dim=1)  # (B, 1 + P, W)
        x = x + self.pos_embed
        if self.register_embed is not None:  # they stand nowhere in the image: no position
            registers = self.register_embed.expand(x.shape[0], -1, -1)  # (B, R, W)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)  # (B, 1 + R + P, W)
        return self.ln_pre(x)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, E)"""
        x = self.blocks(self.embed(pixels))  # (B, 1 + R + P, W)
        return self.proj(self.ln_post(x[:, 0]))  # (B, E)

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **options: Any) -> "VisionTower":
        """The vision tower of a checkpoint of two towers or of one; options as of `miniclip.load`.

        Without projection (`proj` passes on what it gets) where the checkpoint has none.
        """
        from miniclip.checkpoint import load_tower

        return load_tower(name, "vision", **options)

    @torch.no_grad()
    def init_weights(self) -> None:
        """OpenAI's init: openai/CLIP, model.py, VisionTransformer; the rest is PyTorch's default.

        The default of q, k and v is that of nn.MultiheadAttention, which draws them as one matrix.
        """
        std = self.config.width**-0.5
        for weight in (self.class_embed, self.pos_embed, *self.proj.parameters()):
            nn.init.normal_(weight, std=std)
        for block in self.blocks:
            assert isinstance(block, Block)
            attn = block.attn
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj):
                nn.init.uniform_(linear.weight, -(1.5**0.5) * std, 1.5**0.5 * std)
            zero_attention_biases(attn)


class TextTower(nn.Module):
    """Token ids (B, T), T at most context_length -> embeddings (B, E).

    A GPT-2 (Radford et al. 2019), read at the end token. It needs no padding mask: attention is
    causal, so nothing that follows the end token can reach it, whatever the padding is.
    """

    def __init__(self, config: TextConfig, embed_dim: int | None) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = nn.Sequential(*(Block(config, i, causal=True) for i in range(config.layers)))
        self.ln_final = nn.LayerNorm(config.width, eps=config.ln_eps)
        self.proj = projection(config.width, embed_dim)
        self.init_weights()

    def embed(self, ids: Tensor) -> Tensor:
        """The residual stream before the first block, (B, T, W)."""
        if ids.ndim != 2:
            raise ValueError(f"ids have shape {tuple(ids.shape)}; expected (B, T), a row per text")
        return self.add_positions(self.token_embed(ids))

    def add_positions(self, x: Tensor) -> Tensor:
        """The same from the vectors of tokens, (B, T, W), that need not be in the vocabulary."""
        if x.ndim != 3 or x.shape[2] != self.config.width:
            raise ValueError(
                f"inputs_embeds have shape {tuple(x.shape)}; expected (B, T, {self.config.width})"
            )
        if x.shape[1] > len(self.pos_embed):
            raise ContextLengthError(
                f"texts of {x.shape[1]} tokens; this text tower has {len(self.pos_embed)} "
                "positions. Shorten the texts, or tokenize with truncate=True"
            )
        return x + self.pos_embed[: x.shape[1]]

    def forward(
        self,
        ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        eot: Tensor | None = None,
    ) -> Tensor:
        """(B, T) -> (B, E). For `inputs_embeds` and `eot` see `CLIP.encode_text`."""
        if ids is None and (inputs_embeds is None or eot is None):
            raise ValueError("expected ids, or both inputs_embeds and eot in their place")
        ids = cast(Tensor, ids)  # wherever it is read below
        x = self.embed(ids) if inputs_embeds is None else self.add_positions(inputs_embeds)
        x = self.ln_final(self.blocks(x))  # (B, T, W)
        end = self.end_positions(ids) if eot is None else eot  # (B,)
        return self.proj(x[torch.arange(x.shape[0], device=x.device), end])  # (B, E)

    def end_positions(self, ids: Tensor) -> Tensor:
        """Where each text ends: its first end token. (B, T) -> (B,)

        A text without one is an error; in a compiled or exported graph, which cannot raise, it is
        read at its first token, as transformers reads it everywhere.
        """
        if self.config.eos_token_id == LEGACY_EOS:
            return ids.argmax(-1)
        is_end = ids == self.config.eos_token_id
        has_end = is_end.any(-1)
        if not torch.compiler.is_compiling() and not has_end.all():
            raise ValueError(
                f"row {has_end.int().argmin()} of ids has no end token "
                f"({self.config.eos_token_id}), so there is no place to read the text at. The "
                "Tokenizer that belongs to the model adds one"
            )
        return is_end.int().argmax(-1)

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **options: Any) -> "TextTower":
        """The text tower of a checkpoint of two towers or of one; options as of `miniclip.load`.

        Without projection (`proj` passes on what it gets) where the checkpoint has none, as that of
        Stable Diffusion 1 and 2.
        """
        from miniclip.checkpoint import load_tower

        return load_tower(name, "text", **options)

    @torch.no_grad()
    def init_weights(self) -> None:
        """OpenAI's init: openai/CLIP, model.py, CLIP.initialize_parameters.

        Not transformers', which draws the weights of q, k and v as OpenAI draws those of the
        output, and the other way round.
        """
        std = self.config.width**-0.5
        residual_std = std * (2 * self.config.layers) ** -0.5  # 2 L terms sum to variance 1
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        for weight in self.proj.parameters():
            nn.init.normal_(weight, std=std)
        for block in self.blocks:
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj):
                nn.init.normal_(linear.weight, std=std)
            nn.init.normal_(attn.out_proj.weight, std=residual_std)
            nn.init.normal_(mlp.fc1.weight, std=(2 * self.config.width) ** -0.5)
            nn.init.normal_(mlp.fc2.weight, std=residual_std)
            zero_attention_biases(attn)


def projection(width: int, embed_dim: int | None) -> nn.Module:
    """Into the shared space; a tower that is used for its own vectors alone may have none."""
    return nn.Identity() if embed_dim is None else nn.Linear(width, embed_dim, bias=False)


def zero_attention_biases(attn: Attention) -> None:
    """As OpenAI's nn.MultiheadAttention begins, and nn.Linear does not."""
    for linear in (attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj):
        nn.init.zeros_(linear.bias)


def unit_norm(x: Tensor) -> Tensor:
    """Each row divided by its length, in the three operations transformers takes it in."""
    return x / x.pow(2).sum(-1, keepdim=True).pow(0.5)


class CLIPOutput(NamedTuple):
    """Scores of B images against C captions, and the unit vectors they are products of."""

    logits_per_image: Tensor  # (B, C), exp(logit_scale) * cosine
    logits_per_text: Tensor  # (C, B), its transpose
    image_embeds: Tensor  # (B, E)
    text_embeds: Tensor  # (C, E)


class CLIP(nn.Module):
    """Two towers and a temperature. `CLIP(config)` has random weights; `load` has trained ones."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision, config.embed_dim)
        self.text = TextTower(config.text, config.embed_dim)
        # A logarithm, so that a gradient step scales the temperature and cannot change its sign.
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init)))

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        """Pixels from an ImageTransform -> embeddings (B, E), of length 1 if `normalize`."""
        x = self.vision(pixels)
        return unit_norm(x) if normalize else x

    def encode_text(
        self,
        ids: Tensor | None = None,
        normalize: bool = False,
        *,
        inputs_embeds: Tensor | None = None,
        eot: Tensor | None = None,
    ) -> Tensor:
        """Token ids from a Tokenizer (B, T) -> embeddings (B, E), of length 1 if `normalize`.

        For prompts that are learned vectors and not words (CoOp, Zhou et al. 2021, arXiv
        2109.01134): `inputs_embeds` (B, T, W) stands in for the token embeddings of the ids, and
        `eot` (B,), the position a text is read at, for that of its end token. Given both, no ids.
        """
        x = self.text(ids, inputs_embeds, eot)
        return unit_norm(x) if normalize else x

    def forward(self, pixels: Tensor, ids: Tensor) -> CLIPOutput:
        """Score every image against every caption."""
        image_embeds = self.encode_image(pixels, normalize=True)  # (B, E)
        text_embeds = self.encode_text(ids, normalize=True)  # (C, E)
        logits_per_text = text_embeds @ image_embeds.T * self.logit_scale.exp()  # (C, B)
        return CLIPOutput(logits_per_text.T, logits_per_text, image_embeds, text_embeds)

    def set_attention(self, kind: str) -> None:
        """Compute attention "eager", written out, or by the fused "sdpa", which is the default.

        With "sdpa", a layer whose `scores` or `pattern` is watched is written out all the same:
        the fused kernel never makes these tensors. The two differ by rounding. On a CPU the fused
        kernel has no forward-mode or second derivative; for these take "eager".
        """
        if kind not in ("eager", "sdpa"):
            raise ValueError(f"attention kind is {kind!r}; expected 'eager' or 'sdpa'")
        for module in self.modules():
            if isinstance(module, Attention):
                module.eager = kind == "eager"

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **options: Any) -> "CLIP":
        """The model of `miniclip.load`, without its tokenizer and transform; same options."""
        from miniclip.checkpoint import load_model

        return load_model(name, **options)

    def save_pretrained(self, directory: str | PathLike[str], layout: str = "transformers") -> None:
        """Write config.json and model.safetensors, for miniclip and for transformers to load."""
        from miniclip.checkpoint import save_model

        save_model(directory, self, layout=layout)
