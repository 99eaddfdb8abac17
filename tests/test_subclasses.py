"""A fork is a subclass in the user's own file. Four published models show that it can be exact."""

import copy
import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from forks.clipseg import CLIPSeg
from forks.eva02 import Eva02Block, Eva02CLIP
from forks.owlvit import OwlViT
from forks.siglip import Siglip, sigmoid_loss
from record_eva02 import EPS, GRID, HEADS, MLP_WIDTH, PATH, WIDTH, tokens, weights
from torch import nn
from twin import TINY, random_inputs

import miniclip
from miniclip import (
    CLIP,
    CheckpointError,
    TextTower,
    VisionConfig,
    VisionTower,
    cache,
    lens,
    surgery,
)
from miniclip.model import MLP, Attention, Block


@torch.no_grad()
def redraw(model, seed=0):
    """Every parameter at random, LayerNorm weights around 1, so that each one counts."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in model.modules() if isinstance(m, nn.LayerNorm)}
    for name, weight in model.named_parameters():
        is_table = weight.ndim < 2 or "embedding" in name or "pos_embed" in name
        std = 0.3 if is_table else weight[0].numel() ** -0.5
        mean = 1.0 if id(weight) in norms else 0.0
        weight.copy_(torch.randn(weight.shape, generator=generator) * std + mean)
    return model.eval()


def their_config(kind, **fields):
    size = {
        "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 40, "attn_implementation": "sdpa",
    }  # fmt: skip
    vision = size | {"image_size": 32, "patch_size": 8}
    text = size | {
        "vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 58, "eos_token_id": 59,
        "pad_token_id": 0,
    }  # fmt: skip
    return kind(vision_config=vision, text_config=text, **fields)


def saved(theirs, folder, dtype):
    redraw(theirs).to(dtype).save_pretrained(folder)
    return theirs


def inputs(dtype=torch.float32, images=2, texts=2):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, 32, 32, generator=generator, dtype=torch.float64)
    ids = torch.randint(3, 57, (texts, 12), generator=generator)
    ids[:, -1] = 59
    ids[0, 5] = 59
    return pixels.to(dtype), ids


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def assert_near(ours, theirs, float32=0.0):
    """Equal to 1e-10 in float64 and to `float32` times the largest number otherwise."""
    assert ours.shape == theirs.shape
    limit = 1e-10 if ours.dtype == torch.float64 else float32
    assert (ours - theirs).abs().max() <= limit * max(1, theirs.abs().max())


@DTYPES
@torch.no_grad()
def test_siglip_equals_transformers(dtype, tmp_path):
    config = their_config(transformers.SiglipConfig)
    theirs = saved(transformers.SiglipModel(config), tmp_path, dtype)
    ours = Siglip.from_pretrained(tmp_path, dtype=dtype)
    pixels, ids = inputs(dtype, texts=3)
    expected, found = theirs(pixel_values=pixels, input_ids=ids), ours(pixels, ids)
    for name in found._fields:
        assert_near(getattr(found, name), expected[name], 2e-6)


@DTYPES
@torch.no_grad()
def test_clipseg_equals_transformers(dtype, tmp_path):
    config = their_config(
        transformers.CLIPSegConfig, projection_dim=20, extract_layers=[0, 2, 3], reduce_dim=8,
        decoder_num_attention_heads=2, decoder_intermediate_size=16, conditional_layer=1,
    )  # fmt: skip
    theirs = saved(transformers.CLIPSegForImageSegmentation(config), tmp_path, dtype)
    ours = CLIPSeg.from_pretrained(tmp_path, dtype=dtype)
    pixels, ids = inputs(dtype)
    assert_near(ours.segment(pixels, ids), theirs(pixel_values=pixels, input_ids=ids).logits)
    expected, found = theirs.clip(pixel_values=pixels, input_ids=ids), ours(pixels, ids)
    for name in found._fields:
        assert_near(getattr(found, name), expected[name], 2e-6)


@torch.no_grad()
def test_clipseg_reads_larger_images_as_transformers_does(tmp_path):
    config = their_config(
        transformers.CLIPSegConfig, extract_layers=[1, 2], reduce_dim=8,
        decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    theirs = saved(transformers.CLIPSegForImageSegmentation(config), tmp_path, torch.float32)
    larger = surgery.resize_image(CLIPSeg.from_pretrained(tmp_path), 48)
    assert type(larger) is CLIPSeg
    pixels, (_, ids) = torch.randn(2, 3, 48, 48), inputs()
    expected = theirs(pixel_values=pixels, input_ids=ids, interpolate_pos_encoding=True).logits
    assert_near(larger.segment(pixels, ids), expected, 1e-6)


@DTYPES
@torch.no_grad()
def test_owlvit_equals_transformers(dtype, tmp_path):
    config = their_config(transformers.OwlViTConfig, projection_dim=24)
    theirs = saved(transformers.OwlViTForObjectDetection(config), tmp_path, dtype)
    ours = OwlViT.from_pretrained(tmp_path, dtype=dtype)
    pixels, ids = inputs(dtype, texts=6)
    found, expected = ours.detect(pixels, ids), theirs(pixel_values=pixels, input_ids=ids)
    # Their `forward` casts logits to float32, so the head is called by itself.
    texts, patches, _ = theirs.image_text_embedder(ids, pixels, None)
    logits, _ = theirs.class_predictor(patches.flatten(1, 2), texts.unflatten(0, (2, 3)))
    assert_near(found.logits, logits)
    assert_near(found.boxes, expected.pred_boxes)
    if dtype == torch.float32:
        assert torch.equal(logits, expected.logits)


@torch.no_grad()
def test_the_block_of_eva02_equals_timm():
    rows, columns = GRID
    config = VisionConfig(
        width=WIDTH, layers=1, heads=HEADS, mlp_width=MLP_WIDTH, patch_size=4,
        image_size=(4 * rows, 4 * columns), ln_eps=EPS,
    )  # fmt: skip
    block = Eva02Block(config, 0, causal=False).double()
    block.load_state_dict(weights({n: tuple(w.shape) for n, w in block.state_dict().items()}))
    recorded = json.loads(PATH.read_text())["block"]
    expected = torch.tensor([float(x) for x in recorded], dtype=torch.float64)
    assert_near(block(tokens()).flatten(), expected)
    single = block.float()(tokens().float()).flatten().double()
    assert (single - expected).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------
# Forks as a user would write them, of a model of tests/twin.py's size


class MeanVision(VisionTower):
    def pool(self, x):
        return self.ln_post(x[:, 1:].mean(1))


class MeanCLIP(CLIP):
    """No new parameter."""

    vision_class = MeanVision


class GatedMLP(MLP):
    def __init__(self, width, mlp_width, act):
        super().__init__(width, mlp_width, act)
        self.gate = nn.Linear(width, mlp_width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)) * self.gate(x))


class GatedBlock(Block):
    mlp_class = GatedMLP


class GatedText(TextTower):
    block_class = GatedBlock


class GatedCLIP(CLIP):
    text_class = GatedText
    tensor_names = {"text.blocks.{}.mlp.gate": "text_model.encoder.layers.{}.mlp.gate"}


class HomelessCLIP(CLIP):
    """The same, without an entry in a table."""

    text_class = GatedText


def turned(x):
    """Rotary positions along the row of tokens, of q or k, (B, H, T, D)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * 10 ** -torch.linspace(0, 1, half)  # (T, D / 2)
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class RopeAttention(Attention):
    """Changes `qkv` alone."""

    def qkv(self, x):
        q, k, v = super().qkv(x)
        return turned(q), turned(k), v


class OpaqueAttention(Attention):
    """Writes `forward` anew, and shows no pattern and no z."""

    def forward(self, x):
        q, k, v = self.qkv(x)
        z = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=self.causal)
        return self.out_proj(z.transpose(1, 2).flatten(2))


class PostNormBlock(Block):
    def forward(self, x):
        x = self.resid_mid(self.ln_1(x + self.attn(x)))
        return self.ln_2(x + self.mlp(x))


class NumberedBlock(Block):
    """Every second layer has no MLP."""

    def __init__(self, config, layer, causal):
        super().__init__(config, layer, causal)
        self.share = layer % 2

    def forward(self, x):
        x = self.resid_mid(x + self.attn(self.ln_1(x)))
        return x + self.share * self.mlp(self.ln_2(x))


class BothWaysText(TextTower):
    def make_blocks(self, config, causal):
        return super().make_blocks(config, causal=False)


class TwoMoreTokens(VisionTower):
    """They come after the patches."""

    def __init__(self, config, embed_dim):
        super().__init__(config, embed_dim)
        self.more = nn.Parameter(torch.zeros(2, config.width))

    def embed(self, pixels):
        x = super().embed(pixels)
        return torch.cat([x, self.more.expand(len(x), -1, -1)], 1)


def clip_of(attention=Attention, block=Block, vision=VisionTower, text=TextTower, names=()):
    """A CLIP with other parts, in both towers, and its class."""
    parts = {"attention_class": attention}
    one = type("OwnBlock", (block,), parts) if attention is not Attention else block
    return type(
        "OwnCLIP", (CLIP,),
        {
            "vision_class": type("OwnVision", (vision,), {"block_class": one}),
            "text_class": type("OwnText", (text,), {"block_class": one}),
            "tensor_names": {name: name for name in names},
        },
    )  # fmt: skip


def model_of(kind, config=TINY, dtype=torch.float64):
    model = redraw(kind(config)).to(dtype)
    return model


def some(config=TINY, dtype=torch.float64):
    pixels, ids = random_inputs(config)
    return pixels.to(dtype), ids


EACH = {
    "mean": MeanCLIP, "gated": GatedCLIP, "rope": clip_of(RopeAttention),
    "opaque": clip_of(OpaqueAttention), "postnorm": clip_of(block=PostNormBlock),
    "bothways": clip_of(text=BothWaysText), "more": clip_of(vision=TwoMoreTokens, names=["vision.more"]),
    "eva02": Eva02CLIP,
}  # fmt: skip
