"""Test forks: subclasses of CLIP in a user's file. Four of them are published models."""

import copy
import json
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from forks.clipseg import CLIPSeg, CLIPSegConfig
from forks.eva02 import Eva02Block, Eva02CLIP
from forks.owlvit import OwlConfig, OwlTextConfig, OwlVisionConfig, OwlViT
from forks.siglip import Siglip, SiglipConfig, SiglipTextConfig, SiglipVisionConfig, sigmoid_loss
from PIL import Image
from record_eva02 import EPS, GRID, HEADS, MLP_WIDTH, PATH, WIDTH, tokens, weights
from torch import nn
from twin import TINY, random_inputs

import miniclip
from miniclip import (
    CLIP,
    CheckpointError,
    CLIPConfig,
    ImageTransform,
    Loaded,
    TextTower,
    Tokenizer,
    VisionConfig,
    VisionTower,
    cache,
    hooks,
    lens,
    surgery,
)  # fmt: skip
from miniclip.follow import ids_for, patch_places
from miniclip.loss import contrastive_loss
from miniclip.model import MLP, Attention, Block
from miniclip.parity import compare, transformers_twin
from miniclip.retrieval.building import embed_images
from miniclip.retrieval.index import embed_query
from miniclip.training import Recipe, open_data, train
from miniclip.training.loop import recompute_blocks
from miniclip.training.run import Run
from miniclip.zeroshot.classifier import embed_texts


@torch.no_grad()
def redraw(model, seed=0):
    """Make all parameters random, so that each has an effect. LayerNorm weights stay near 1."""
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


DECODER = {
    "projection_dim": 20, "extract_layers": [0, 2, 3], "reduce_dim": 8, "conditional_layer": 1,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16,
}  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def assert_near(ours, theirs, float32=0.0):
    """Assert that no difference exceeds `limit * max(1, x)` for the largest value x of `theirs`.
    In float64 the limit is 1e-10. In float32 it is the argument `float32`."""
    assert ours.shape == theirs.shape
    limit = 1e-10 if ours.dtype == torch.float64 else float32
    assert (ours - theirs).abs().max() <= limit * max(1, theirs.abs().max())


@pytest.mark.sweep(2)
@DTYPES
@torch.no_grad()
def test_siglip_gives_the_outputs_of_transformers(dtype, tmp_path):
    config = their_config(transformers.SiglipConfig)
    theirs = saved(transformers.SiglipModel(config), tmp_path, dtype)
    ours = Siglip.from_pretrained(tmp_path, dtype=dtype)
    pixels, ids = inputs(dtype, texts=3)
    expected, found = theirs(pixel_values=pixels, input_ids=ids), ours(pixels, ids)
    assert_near(ours.vision(pixels), expected.vision_model_output.pooler_output)
    assert_near(ours.text(ids), expected.text_model_output.pooler_output)
    for name in found._fields:  # transformers' normalisation has other rounding errors
        assert_near(getattr(found, name), expected[name], 2e-7)


@pytest.mark.sweep(2)
@DTYPES
@torch.no_grad()
@pytest.mark.slow
def test_clipseg_gives_the_outputs_of_transformers(dtype, tmp_path):
    config = their_config(transformers.CLIPSegConfig, **DECODER)
    theirs = saved(transformers.CLIPSegForImageSegmentation(config), tmp_path, dtype)
    ours = CLIPSeg.from_pretrained(tmp_path, dtype=dtype)
    pixels, ids = inputs(dtype)
    assert_near(ours.segment(pixels, ids), theirs(pixel_values=pixels, input_ids=ids).logits)
    expected, found = theirs.clip(pixel_values=pixels, input_ids=ids), ours(pixels, ids)
    for name in found._fields:
        assert_near(getattr(found, name), expected[name], 2e-7)


@torch.no_grad()
def test_clipseg_gives_the_outputs_of_transformers_for_larger_images(tmp_path):
    config = their_config(transformers.CLIPSegConfig, **DECODER)
    theirs = saved(transformers.CLIPSegForImageSegmentation(config), tmp_path, torch.float32)
    larger = surgery.resize_image(CLIPSeg.from_pretrained(tmp_path), 48)
    assert type(larger) is CLIPSeg
    pixels, (_, ids) = torch.randn(2, 3, 48, 48), inputs()
    expected = theirs(pixel_values=pixels, input_ids=ids, interpolate_pos_encoding=True).logits
    assert_near(larger.segment(pixels, ids), expected, 1e-6)


@pytest.mark.sweep(2)
@DTYPES
@torch.no_grad()
def test_owlvit_gives_the_outputs_of_transformers(dtype, tmp_path):
    config = their_config(transformers.OwlViTConfig, projection_dim=24)
    theirs = saved(transformers.OwlViTForObjectDetection(config), tmp_path, dtype)
    ours = OwlViT.from_pretrained(tmp_path, dtype=dtype)
    pixels, ids = inputs(dtype, texts=6)
    found, expected = ours.detect(pixels, ids), theirs(pixel_values=pixels, input_ids=ids)
    # transformers' `forward` casts logits to float32, so the test calls `class_predictor` itself.
    texts, patches, _ = theirs.image_text_embedder(ids, pixels, None)
    logits, _ = theirs.class_predictor(patches.flatten(1, 2), texts.unflatten(0, (2, 3)))
    assert_near(found.logits, logits)
    assert_near(found.boxes, expected.pred_boxes)
    if dtype == torch.float32:
        assert torch.equal(logits, expected.logits)


@pytest.mark.parametrize(
    "kind, theirs, config, fields",
    [
        (CLIPSeg, transformers.CLIPSegForImageSegmentation, transformers.CLIPSegConfig, DECODER),
        (OwlViT, transformers.OwlViTForObjectDetection, transformers.OwlViTConfig,
         {"projection_dim": 24}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_transformers_loads_a_checkpoint_that_a_fork_has_saved(
    kind, theirs, config, fields, tmp_path
):
    original = saved(theirs(their_config(config, **fields)), tmp_path / "theirs", torch.float32)
    kind.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again = theirs.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    pixels, ids = inputs()
    expected, found = (each(pixel_values=pixels, input_ids=ids) for each in (original, again))
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize(
    "kind, theirs, config, fields",
    [
        (Siglip, transformers.SiglipModel, transformers.SiglipConfig, {}),
        (CLIPSeg, transformers.CLIPSegForImageSegmentation, transformers.CLIPSegConfig, DECODER),
        (
            OwlViT,
            transformers.OwlViTForObjectDetection,
            transformers.OwlViTConfig,
            {"projection_dim": 24},
        ),
    ],
)
@torch.no_grad()
def test_cache_returns_the_residual_stream_that_transformers_computes(
    kind, theirs, config, fields, tmp_path
):
    """The test compares the residual stream after each block, also in the decoder."""
    theirs = saved(theirs(their_config(config, **fields)), tmp_path, torch.float64)
    ours = kind.from_pretrained(tmp_path, dtype=torch.float64)
    pixels, ids = inputs(torch.float64)
    streams = []
    for module in theirs.modules():
        if type(module).__name__.endswith(("EncoderLayer", "DecoderLayer")):
            module.register_forward_hook(lambda m, args, out: streams.append(out))
    theirs(pixel_values=pixels, input_ids=ids)
    globs = ["vision.blocks.*", "text.blocks.*"] + ["decoder.blocks.*"] * (kind is CLIPSeg)
    with cache(ours, *globs) as acts:
        ours.segment(pixels, ids) if kind is CLIPSeg else ours(pixels, ids)
    assert len(acts) == len(streams)
    for stream in acts.values():
        distances = [(stream - x).abs().max() for x in streams if x.shape == stream.shape]
        assert min(distances) < 1e-10


@torch.no_grad()
def test_the_block_of_eva02_gives_the_output_of_timm():
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
# Forks that a user could write, with TINY's size


class MeanVision(VisionTower):
    def pool(self, x):
        return self.ln_post(x[:, 1:].mean(1))


class MeanCLIP(CLIP):
    """A fork without new parameters."""

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
    """GatedCLIP without `tensor_names`."""

    text_class = GatedText


def turned(x):
    """Apply rotary position embeddings to q or k, a tensor (B, H, T, D)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * 10 ** -torch.linspace(0, 1, half)  # (T, D / 2)
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class RopeAttention(Attention):
    """An attention that overrides only `qkv`."""

    def qkv(self, x):
        q, k, v = super().qkv(x)
        return turned(q), turned(k), v


class OpaqueAttention(Attention):
    """An attention that overrides `forward` and does not call the sites `pattern` and `z`."""

    def forward(self, x):
        q, k, v = self.qkv(x)
        z = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=self.causal)
        return self.out_proj(z.transpose(1, 2).flatten(2))


class PostNormBlock(Block):
    def forward(self, x):
        x = self.resid_mid(self.ln_1(x + self.attn(x)))
        return self.ln_2(x + self.mlp(x))


class NumberedBlock(Block):
    """Every second layer ignores its MLP."""

    def __init__(self, config, layer, causal):
        super().__init__(config, layer, causal)
        self.share = layer % 2

    def forward(self, x):
        x = self.resid_mid(x + self.attn(self.ln_1(x)))
        return x + self.share * self.mlp(self.ln_2(x))


class HiddenNumberBlock(Block):
    def __init__(self, config, layer, causal):
        super().__init__(config, layer, causal)
        self._share = layer % 2

    def forward(self, x):
        return x + self._share * self.mlp(self.ln_2(x))


class ClosedNumberBlock(Block):
    def __init__(self, config, layer, causal):
        super().__init__(config, layer, causal)
        self.weigh = lambda x: layer % 2 * x

    def forward(self, x):
        return x + self.weigh(self.mlp(self.ln_2(x)))


class BothWaysText(TextTower):
    def make_blocks(self, config, causal):
        return super().make_blocks(config, causal=False)


class TwoMoreTokens(VisionTower):
    """A tower with two extra tokens after the patches."""

    def __init__(self, config, embed_dim):
        super().__init__(config, embed_dim)
        self.more = nn.Parameter(torch.zeros(2, config.width))

    def embed_tokens(self, pixels):
        x = super().embed_tokens(pixels)
        return torch.cat([x, self.more.expand(len(x), -1, -1)], 1)


def clip_of(attention=Attention, block=Block, vision=VisionTower, text=TextTower, names=()):
    """Make a subclass of CLIP whose towers use the given classes."""
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


EACH = {
    "mean pooling": MeanCLIP,
    "gated MLP": GatedCLIP,
    "RoPE in qkv": clip_of(RopeAttention),
    "RoPE in forward": clip_of(OpaqueAttention),
    "post-norm": clip_of(block=PostNormBlock),
    "no causal mask": clip_of(text=BothWaysText),
    "two more tokens": clip_of(vision=TwoMoreTokens, names=["vision.more"]),
    "EVA-02": Eva02CLIP,
    "SigLIP": Siglip,
    "CLIPSeg": CLIPSeg,
    "OWL-ViT": OwlViT,
}
SMALL = SiglipConfig(
    SiglipVisionConfig(width=48, layers=3, heads=4, mlp_width=100, image_size=40, patch_size=8),
    SiglipTextConfig(
        width=40, layers=2, heads=2, mlp_width=92, vocab_size=600, context_length=20,
        bos_token_id=598, eos_token_id=599,
    ),
    embed_dim=48,
)  # fmt: skip
CONFIGS = {
    Siglip: SMALL,
    CLIPSeg: CLIPSegConfig(
        TINY.vision, TINY.text, 36, extract_layers=(0, 2), reduce_dim=8,
        decoder_num_attention_heads=2, decoder_intermediate_size=12,
    ),
    OwlViT: OwlConfig(
        OwlVisionConfig(**vars(TINY.vision)),
        OwlTextConfig(**vars(TINY.text)),
        embed_dim=TINY.text.width,
    ),
}  # fmt: skip


OFTEN = ("gated MLP", "SigLIP")  # a fork with a new parameter, and a fork without class token


@pytest.fixture(
    scope="module",
    params=[name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in EACH],
)
def model(request):
    kind = EACH[request.param]
    return redraw(kind(CONFIGS.get(kind, TINY))).double()


def some(config=TINY):
    pixels, ids = random_inputs(config)
    return pixels.double(), ids


def or_refuses(function, *args, **options):
    """Return `function`'s result, or None if `function` says that it cannot follow the model."""
    try:
        return function(*args, **options)
    except ValueError as error:
        assert re.search("follow|has its own|replays|elsewhere|cannot know|has not run", str(error))


# {fork: instruments that must work on it}. Other instruments must be right or raise an error.
FOLLOWED = {
    "mean pooling": {"logit_lens", "attention_maps", "intermediates", "prune_heads"},
    "gated MLP": {
        "decompose", "logit_lens", "dense_features", "attention_maps", "intermediates",
        "prune_heads",
    },
    "RoPE in qkv": {
        "decompose", "logit_lens", "dense_features", "attention_maps", "intermediates",
        "prune_heads", "prune_neurons",
    },
    "RoPE in forward": {"logit_lens", "intermediates", "prune_neurons"},
    "post-norm": {"logit_lens", "attention_maps", "intermediates", "prune_heads", "prune_neurons"},
    "no causal mask": {"decompose", "logit_lens", "dense_features", "prune_heads"},
    "two more tokens": {"decompose", "logit_lens", "dense_features", "intermediates"},
    "EVA-02": {"decompose", "logit_lens", "dense_features", "prune_heads"},
    "SigLIP": {"logit_lens", "attention_maps", "intermediates", "prune_heads"},
    "CLIPSeg": {
        "decompose", "logit_lens", "dense_features", "attention_maps", "intermediates",
        "prune_heads", "prune_neurons",
    },
    "OWL-ViT": {
        "decompose", "logit_lens", "dense_features", "attention_maps", "intermediates",
        "prune_heads", "prune_neurons",
    },
}  # fmt: skip


def saved_and_loaded(model, folder):
    """Save a fork, load it with its own class, and assert that both are equal bit for bit."""
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder, dtype=torch.float64)
    assert type(again) is type(model) and again.config == model.config
    for (name, weight), same in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(weight, same), name
    pixels, ids = some(model.config)
    aligned = copy.deepcopy(again)  # MKL may round memory-mapped weights differently on some CPUs
    assert torch.equal(aligned(pixels, ids).logits_per_text, model(pixels, ids).logits_per_text)
    return again


@torch.no_grad()
@pytest.mark.filterwarnings(
    "ignore:.* are left out. only .* belongs to the model"
)  # a warning comes before the error
def test_a_fork_is_loaded_bit_for_bit_and_only_by_its_own_class(model, tmp_path):
    saved_and_loaded(model, tmp_path)
    name = type(model).__name__
    with pytest.raises(CheckpointError, match=name):
        CLIP.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=name):
        miniclip.load(tmp_path)
    other = GatedCLIP if not isinstance(model, GatedCLIP) else MeanCLIP
    with pytest.raises(CheckpointError, match=name):
        other.from_pretrained(tmp_path)
    for layout in ("openai", "open_clip"):
        with pytest.raises(CheckpointError, match=name):
            model.save_pretrained(tmp_path / layout, layout)


def test_transformers_does_not_know_the_model_type_of_a_fork(tmp_path):
    MeanCLIP(TINY).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type `MeanCLIP`"):
        transformers.AutoModel.from_pretrained(tmp_path)


@pytest.mark.slow
def test_a_fork_without_new_parameters_loads_a_checkpoint_of_clip(tmp_path):
    plain = redraw(CLIP(TINY))
    plain.save_pretrained(tmp_path)
    fork = MeanCLIP.from_pretrained(tmp_path)
    assert type(fork) is MeanCLIP and torch.equal(fork.text.pos_embed, plain.text.pos_embed)
    pixels, ids = random_inputs(TINY)
    assert not torch.allclose(fork(pixels, ids).image_embeds, plain(pixels, ids).image_embeds)


def test_a_parameter_without_a_tensor_name_is_an_error_on_save_and_on_load(tmp_path):
    fork = redraw(HomelessCLIP(TINY))
    where = r"text\.blocks\.0\.mlp\.gate\.weight .*`tensor_names`.*blocks\.\{\}\.mlp\.gate"
    with pytest.raises(CheckpointError, match=where):
        fork.save_pretrained(tmp_path / "fork")
    CLIP(TINY).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=where):
        HomelessCLIP.from_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="missing: .*mlp.gate"):
        GatedCLIP.from_pretrained(tmp_path / "plain")


def test_saving_clip_is_an_error_if_the_user_has_replaced_a_module_class(tmp_path, monkeypatch):
    """A new process would load the files with miniclip's parts."""
    own = type("SquareMLP", (MLP,), {"forward": lambda mlp, x: mlp.fc2(mlp.fc1(x) ** 2)})
    monkeypatch.setattr(Block, "mlp_class", own)
    with pytest.raises(CheckpointError, match="CLIP is miniclip's class, but .* SquareMLP.*subcl"):
        CLIP(TINY).save_pretrained(tmp_path)


class BufferAttention(RopeAttention):
    """An attention that multiplies q by a buffer, which is not saved."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("speeds", torch.linspace(0, 1, self.head_width), persistent=False)

    def qkv(self, x):
        q, k, v = super().qkv(x)
        return q * self.speeds, k, v


def test_loading_a_fork_computes_a_buffer_that_is_not_in_the_file(tmp_path):
    saved_and_loaded(redraw(clip_of(BufferAttention)(TINY)).double(), tmp_path)


@dataclass(frozen=True)
class ScalesConfig(CLIPConfig):
    scales: tuple[int, ...] = (1, 2)


class ScalesCLIP(CLIP):
    config_class = ScalesConfig


def test_a_tuple_in_the_config_of_a_fork_is_loaded_as_a_tuple(tmp_path):
    config = ScalesConfig(TINY.vision, TINY.text, TINY.embed_dim, scales=(1, 3))
    saved_and_loaded(redraw(ScalesCLIP(config)).double(), tmp_path)


class NormVision(VisionTower):
    """A tower with a BatchNorm, which counts its batches in a buffer of whole numbers."""

    def __init__(self, config, embed_dim):
        super().__init__(config, embed_dim)
        self.norm = nn.BatchNorm1d(config.width)

    def pool(self, x):
        return self.norm(super().pool(x))


class NormCLIP(CLIP):
    vision_class = NormVision
    tensor_names = {"vision.norm": "vision_model.norm"}


@torch.no_grad()
def test_an_integer_buffer_is_saved_and_loaded(tmp_path):
    model = redraw(NormCLIP(TINY)).double()
    model.vision.norm.num_batches_tracked.fill_(7)
    again = saved_and_loaded(model, tmp_path)
    assert again.vision.norm.num_batches_tracked.dtype == torch.int64


class DoubledMLP(nn.Module):
    """A part whose child has the name that DistributedDataParallel gives to the wrapped model."""

    def __init__(self, *sizes):
        super().__init__()
        self.module = MLP(*sizes)

    def forward(self, x):
        return 2 * self.module(x)


class DoubledText(TextTower):
    block_class = type("DoubledBlock", (Block,), {"mlp_class": DoubledMLP})


class DoubledCLIP(CLIP):
    text_class = DoubledText
    tensor_names = {
        f"text.blocks.{{}}.mlp.module.{name}": f"text_model.encoder.layers.{{}}.mlp.module.{name}"
        for name in ("fc1", "fc2")
    }


@torch.no_grad()
def test_a_submodule_named_module_is_not_mistaken_for_a_wrapper(tmp_path):
    model = redraw(DoubledCLIP(TINY)).double()
    saved_and_loaded(model, tmp_path)
    torch.save(model.state_dict(), tmp_path / "ours.pt")
    again = DoubledCLIP.from_pretrained(tmp_path / "ours.pt", config=TINY, dtype=None)
    assert torch.equal(again.text.pos_embed, model.text.pos_embed)


def test_two_parameters_with_the_same_tensor_name_are_an_error_on_save(tmp_path):
    class GatesVision(VisionTower):
        def __init__(self, config, embed_dim):
            super().__init__(config, embed_dim)
            self.gates = nn.ParameterList(torch.randn(4) for _ in range(2))

    names = {"vision.gates.{}": "vision_model.gates"}
    kind = type("GatesCLIP", (CLIP,), {"vision_class": GatesVision, "tensor_names": names})
    with pytest.raises(CheckpointError, match="vision.gates.1 has the place vision_model.gates,"):
        kind(TINY).save_pretrained(tmp_path)


class AttributeVision(VisionTower):
    """A tower with tensors that are neither parameters nor buffers."""

    def __init__(self, config, embed_dim):
        super().__init__(config, embed_dim)
        self.gains = [torch.linspace(1, 2, config.width, dtype=torch.float64)]

    def pool(self, x):
        return super().pool(x) * self.gains[0]


class NumberVision(VisionTower):
    """A tower whose constructor reads numbers from a tensor, for example the drop-path rates."""

    def __init__(self, config, embed_dim):
        super().__init__(config, embed_dim)
        self.rates = torch.linspace(0.5, 1, config.layers).tolist()

    def pool(self, x):
        return super().pool(x) * self.rates[0]


@torch.no_grad()
@pytest.mark.parametrize("vision", [AttributeVision, NumberVision])
def test_a_constructor_can_read_a_tensor_or_store_it_as_an_attribute(vision, tmp_path):
    """The meta device has no values for these tensors, so the model is built on the CPU."""
    kind = type("TensorCLIP", (CLIP,), {"vision_class": vision})
    saved_and_loaded(redraw(kind(TINY).double()), tmp_path)


# ------------------------------------------------------------------------------------------------
# On a fork, an instrument gives right results, or an error says why it cannot follow the fork


@torch.no_grad()
def test_instruments_give_right_results_on_a_fork_or_raise_an_error(model):
    pixels, ids = some(model.config)
    vision, embeds = model.vision, model.encode_image(pixels)
    (B, E), done = embeds.shape, set()
    for by in ("layer", "head", "token"):
        if parts := or_refuses(lens.decompose, model, pixels, by):
            total = sum(part.reshape(B, -1, E).sum(1) for part in parts.values())
            assert_near(total, embeds)
            done.add("decompose")
    for ln in ("recompute", "final"):
        if (streams := or_refuses(lens.logit_lens, model, pixels, ln)) is not None:
            assert_near(streams[:, -1], embeds)
            done.add("logit_lens")
    stream = vision.blocks(vision.embed_tokens(pixels))
    P, T = vision.config.patches, stream.shape[1]
    first = 0 if T == P else 1
    patches = stream[:, first : first + P]
    if (dense := or_refuses(surgery.dense_features, model, pixels, "clip")) is not None:
        assert_near(dense, vision.proj(vision.ln_post(patches)))
        done.add("dense_features")
    found = or_refuses(lens.forward_intermediates, vision, pixels, [-1], output_fmt="NLC")
    if found:
        assert_near(found[1][0], patches)
        done.add("intermediates")
    if maps := or_refuses(lens.attention_maps, model, pixels):
        assert [m.shape[-1] for m in maps] == [T] * 3
        inside = vision.blocks[2].attn
        _, _, v = inside.qkv(vision.blocks[2].ln_1(vision.blocks[:2](vision.embed_tokens(pixels))))
        if not isinstance(vision.blocks[2], PostNormBlock):  # its ln_1 comes after the attention
            with cache(vision, "blocks.2.attn.z") as acts:
                vision(pixels)
            assert_near((maps[2] @ v).transpose(1, 2), acts["blocks.2.attn.z"])
        done.add("attention_maps")
    for name, site, fields in (
        ("prune_heads", "attn.z", {1: [0, 2]}),
        ("prune_neurons", "mlp.act", {1: [0, 2, 5]}),
    ):
        for tower in ("vision", "text"):
            x = pixels if tower == "vision" else ids
            gone = {k: [0] for k in fields} if tower == "text" else fields
            new = or_refuses(getattr(surgery, name), model, tower, gone)
            if new is not None:

                def zero(tensor, _, gone=gone[1], dim=2):
                    return tensor.index_fill(dim, torch.tensor(gone), 0)

                with hooks(getattr(model, tower), {f"blocks.1.{site}": zero}):
                    expected = getattr(model, tower)(x)
                assert_near(getattr(new, tower)(x), expected)
                done.add(name)
    name = next(name for name, kind in EACH.items() if type(model) is kind)
    assert FOLLOWED[name] <= done, FOLLOWED[name] - done


SURGERY = {
    "prune_heads": lambda m: surgery.prune_heads(m, "vision", {0: [1]}),
    "prune_neurons": lambda m: surgery.prune_neurons(m, "text", {0: [1]}),
    "keep_layers": lambda m: surgery.keep_layers(m, "vision", [0, 2]),
    "resize_image": lambda m: surgery.resize_image(m, 48),
    "resize_patch": lambda m: surgery.resize_patch(m, 10),
    "extend_context": lambda m: surgery.extend_context(m, 30, keep=5),
    "add_tokens": lambda m: surgery.add_tokens(m, 2),
    "add_registers": lambda m: surgery.add_registers(m, 2),
    "average": lambda m: surgery.average([m, redraw(type(m)(m.config), seed=1).double()]),
    "interpolate": lambda m: surgery.interpolate(m, m, 0.5),
    "task": lambda m: surgery.TaskVector.between(m, m).apply(m),
}


@pytest.mark.parametrize("name", SURGERY)
@torch.no_grad()
@pytest.mark.slow
def test_after_surgery_the_config_of_a_fork_describes_the_new_fork(name, model, tmp_path):
    new = or_refuses(SURGERY[name], model)
    if new is not None:
        assert type(new) is type(model)
        saved_and_loaded(new, tmp_path)


class NormedValues(Attention):
    def qkv(self, x):
        q, k, v = super().qkv(x)
        return q, k, F.normalize(v, dim=-1)


class AdaptedCLIP(CLIP):
    """A fork that doubles the image embedding in `encode_image`."""

    def encode_image(self, pixels, normalize=False):
        return super().encode_image(pixels, normalize) * 2


class StemVision(VisionTower):
    """A tower that blurs the pixels, so each patch also depends on its neighbours."""

    def embed_tokens(self, pixels):
        return super().embed_tokens(F.avg_pool2d(pixels, 3, 1, 1))


def test_the_error_names_the_method_that_an_instrument_cannot_follow():
    pixels, _ = some()
    with pytest.raises(ValueError, match="NormedValues.qkv changes the values"):
        lens.decompose(redraw(clip_of(NormedValues)(TINY)).double(), pixels)
    adapted = redraw(AdaptedCLIP(TINY)).double()
    for instrument in (lens.decompose, lens.logit_lens, surgery.dense_features):
        with pytest.raises(ValueError, match="AdaptedCLIP has its own encode_image"):
            instrument(adapted, pixels)
        instrument(adapted.vision, pixels)
    patched = redraw(CLIP(TINY)).double()
    patched.encode_image = lambda pixels, normalize=False: 2 * patched.vision(pixels)
    with pytest.raises(ValueError, match="CLIP has its own encode_image"):
        lens.decompose(patched, pixels)
    patched.encode_image.engine = "compile"  # `use_engine` sets this attribute too
    lens.decompose(patched, pixels)
    with pytest.raises(ValueError, match="does not make one token for each patch, row by row"):
        surgery.dense_features(redraw(clip_of(vision=StemVision)(TINY)).double(), pixels)
    with pytest.raises(ValueError, match="has a parameter more"):
        surgery.layer_groups(EACH["two more tokens"](TINY).vision)


class OwnForward(VisionTower):
    def forward(self, pixels):
        x = self.blocks(self.embed_tokens(pixels))
        return self.proj(self.ln_post(x[:, 1:].mean(1)))


@pytest.mark.parametrize("kind, method", [
    (clip_of(vision=OwnForward), "VisionTower.forward"),
    (MeanCLIP, "VisionTower.pool"),
    (clip_of(RopeAttention), "Attention.qkv"),
    (clip_of(OpaqueAttention), "Attention.forward"),
])  # fmt: skip
def test_adding_registers_is_an_error_if_a_fork_overrides_forward_pool_or_attention(kind, method):
    fork = kind(TINY)
    with pytest.raises(ValueError, match=f"add_registers cannot follow .*, .* {method}"):
        surgery.add_registers(fork, 2)
    with pytest.raises(ValueError, match=f"move_to_registers cannot follow .*, .* {method}"):
        with surgery.move_to_registers(fork, {0: [1]}):
            pass


class LargestEnds(TextTower):
    def eos_positions(self, ids):
        return ids.argmax(-1)


def test_adding_tokens_to_a_vocabulary_is_an_error_if_this_moves_the_end_token():
    with pytest.raises(ValueError, match="LargestEnds, which replaces TextTower.eos_positions"):
        fork = CLIP(TINY)
        fork.text = LargestEnds(TINY.text, TINY.embed_dim)
        surgery.add_tokens(fork, 1)
    assert surgery.add_tokens(Siglip(SMALL), 1).config.text.vocab_size == 601


class ScaledText(CLIP):
    def encode_text(self, ids, normalize=False):
        return 2 * super().encode_text(ids, normalize)


def test_encode_prompts_raises_an_error_if_a_fork_overrides_encode_text():
    fork, vectors, eos = ScaledText(TINY), torch.zeros(1, 5, 40), torch.tensor([4])
    with pytest.raises(ValueError, match="ScaledText has its own encode_text"):
        surgery.encode_prompts(fork, vectors, eos)
    surgery.encode_prompts(fork.text, vectors, eos)


@pytest.mark.parametrize("block, words", [
    (NumberedBlock, "share is 1, expected 0"),
    (HiddenNumberBlock, "_share is 1, expected 0"),
    (ClosedNumberBlock, "weigh is <function ClosedNumberBlock"),
])  # fmt: skip
def test_layers_that_depend_on_their_index_cannot_be_renumbered(block, words):
    model = redraw(clip_of(block=block)(TINY)).double()
    surgery.keep_layers(model, "vision", [0, 1])
    with pytest.raises(ValueError, match=f"cannot follow OwnCLIP: .*vision.blocks.0.{words}"):
        surgery.keep_layers(model, "vision", [1, 2])


def test_averaging_models_of_different_classes_is_an_error():
    for one, other in ((MeanCLIP, CLIP), (CLIP, MeanCLIP)):
        with pytest.raises(ValueError, match="the model is .*CLIP, expected .*CLIP"):
            surgery.average([one(TINY), other(TINY)])


@torch.no_grad()
def test_ablate_heads_works_on_a_fork_or_raises_an_error(model):
    pixels, _ = some(model.config)
    with surgery.ablate_heads(model, "vision", {0: [0]}):
        silent = or_refuses(model.encode_image, pixels)
    if isinstance(model.vision.blocks[0].attn, OpaqueAttention):
        assert silent is None
    else:
        assert (silent - model.encode_image(pixels)).abs().max() > 1e-3


def test_relevance_works_on_a_fork_or_raises_an_error(model):
    pixels, ids = some(model.config)
    pixels, ids = pixels[:2], ids[:2]
    found = or_refuses(lens.relevance, model, pixels, ids)
    own = type(model).__name__ in ("MeanCLIP", "Siglip")
    blocks = {type(block) for block in model.vision.blocks}
    is_other = own or PostNormBlock in blocks
    is_other |= isinstance(model.vision.blocks[0].attn, OpaqueAttention)
    assert (found is None) == is_other


def test_grad_cam_is_right_on_a_fork_or_raises_an_error(model):
    pixels, ids = some(model.config)
    heat = or_refuses(lens.gradcam, model, pixels[:1], ids[:1])
    assert (heat is None) == (type(model.vision.blocks[-1]).forward is not Block.forward)
    if heat is not None:  # compare with Grad-CAM's formula and the fork's own score
        last = f"vision.blocks.{len(model.vision.blocks) - 1}.ln_1"
        with cache(model, last, grad=True) as acts:
            score = model(pixels[:1], ids[:1]).logits_per_image[0, 0]
        x, slope = acts[last], torch.autograd.grad(score, acts[last])[0]
        places = patch_places(model.vision, pixels)
        weights = slope[0, places].mean(0)
        assert_near(heat[0], (x[0] @ weights).clamp(min=0))


def test_occlusion_is_right_on_every_fork(model):
    pixels, ids = some(model.config)
    heat = lens.occlusion(model, pixels[:1], ids[:1])
    covered = pixels[:1].clone()
    covered[..., :16, :16] = 0
    text = model.encode_text(ids[:1], normalize=True)
    lost = [(model.encode_image(x, normalize=True) * text).sum() for x in (pixels[:1], covered)]
    assert_near(heat[0, 0, 0], lost[0] - lost[1])


def test_patch_dropout_raises_an_error_if_a_fork_overrides_attention_or_embed_tokens(model):
    pixels, _ = some(model.config)
    parts = type(model.vision.blocks[0].attn), type(model.vision).embed_tokens
    is_plain = parts == (Attention, VisionTower.embed_tokens)
    refused = nullcontext() if is_plain else pytest.raises(ValueError, match="cannot follow")
    with refused, surgery.patch_dropout(model, 0.5):
        model.encode_image(pixels)


def test_a_fork_equals_its_copy_and_has_no_twin_in_transformers(model):
    assert compare(model, copy.deepcopy(model)).first is None
    with pytest.raises(ValueError, match=type(model).__name__):
        transformers_twin(model)


def test_compare_finds_where_a_fork_first_differs_from_clip():
    fork = redraw(MeanCLIP(TINY))
    plain = CLIP(TINY).eval()
    plain.load_state_dict(fork.state_dict())
    assert compare(fork, plain).first == "vision.pooled"


# ------------------------------------------------------------------------------------------------
# Training, retrieval and zero-shot classification with forks


WORDS = ["a red circle", "a blue star on the left", "green"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer.train([*WORDS, "b"], 520)
    tokenizer.context_length = 20
    return tokenizer


def fork_for(kind, tokenizer):
    """Make a fork for the tokenizer's vocabulary."""
    config = SMALL if kind is Siglip else TINY
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = replace(config.text, vocab_size=tokenizer.vocab_size, **ends)
    return redraw(kind(replace(config, text=text)))


class MixedTokens(TextTower):
    def embed_tokens(self, ids):
        x = super().embed_tokens(ids)
        return x + x.mean(1, keepdim=True)


class MixedQuery(Attention):
    def qkv(self, x):
        q, k, v = super().qkv(x)
        return q + q.roll(-1, 2), k, v


class MixedMLP(MLP):
    def forward(self, x):
        return super().forward(x + x.roll(-1, 1))


MIXED = [clip_of(text=MixedTokens), clip_of(MixedQuery)]
MIXED += [clip_of(block=type("MixedBlock", (Block,), {"mlp_class": MixedMLP}))]


@pytest.mark.parametrize("kind", [EACH["no causal mask"], Siglip, CLIP, GatedCLIP, *MIXED])
@torch.no_grad()
def test_the_embedding_of_a_text_does_not_depend_on_other_texts(kind, tokenizer):
    model = fork_for(kind, tokenizer)
    together = embed_texts(model, tokenizer, WORDS)
    alone = torch.cat([embed_texts(model, tokenizer, [word]) for word in WORDS])
    full = model.encode_text(tokenizer(WORDS, pad_to=20), normalize=True)
    transform = ImageTransform(40)
    queries = [embed_query(Loaded(model, tokenizer, transform), [word]) for word in WORDS]
    for found in (together, alone, torch.stack(queries)):
        assert (found - full).abs().max() < 1e-5


def test_texts_need_no_padding_while_blocks_are_recomputed(tokenizer):
    model = fork_for(CLIP, tokenizer)
    with recompute_blocks(model):
        assert ids_for(model.text, tokenizer, ["green"]).shape[1] < 20


@torch.no_grad()
def test_a_zero_shot_classifier_gives_the_logits_of_a_fork(tokenizer):
    model = fork_for(Siglip, tokenizer)
    classifier = miniclip.ZeroShotClassifier(model, tokenizer, WORDS, ["{}"])
    pixels = torch.rand(2, 3, 40, 40)
    expected = model(pixels, tokenizer(WORDS, pad_to=20)).logits_per_image
    assert (classifier(pixels) - expected).abs().max() < 1e-4


def test_an_index_raises_an_error_for_a_model_of_a_different_class(tokenizer, tmp_path):
    fork = fork_for(MeanCLIP, tokenizer)
    plain = CLIP(fork.config).eval()
    plain.load_state_dict(fork.state_dict())
    transform = ImageTransform(40)
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (50, 40), path.stem).save(path)
    index = embed_images(Loaded(fork, tokenizer, transform), [*map(str, paths)])
    with torch.no_grad():
        expected = fork.encode_image(transform(paths), normalize=True)
    assert (index.embeddings - expected).abs().max() < 1e-6
    index.check(Loaded(fork, tokenizer, transform))
    with pytest.raises(ValueError, match="the index was made by"):
        index.check(Loaded(plain, tokenizer, transform))


def pictures(folder, count=16):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        colour = torch.tensor([255, 0, 0] if i % 2 else [0, 0, 255])
        noise = torch.randint(0, 60, (40, 40, 3), generator=generator)
        Image.fromarray((colour * 3 // 4 + noise).to(torch.uint8).numpy()).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": "a red circle" if i % 2 else "b"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def losses(out):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows]


@pytest.mark.slow
@pytest.mark.sweep(2)
@pytest.mark.parametrize("chunk", [0, 3])
def test_siglip_trains_with_the_sigmoid_loss(chunk, tokenizer, tmp_path):
    transform = ImageTransform(40)
    data = open_data(pictures(tmp_path), transform)
    model = fork_for(Siglip, tokenizer)
    with torch.no_grad():
        model.logit_scale.fill_(5.0)  # CLIP's limit is ln 100 (4.6), and SigLIP has no limit
    recipe = Recipe(epochs=6, batch=8, lr=3e-4, chunk=chunk, warmup=0.0)
    trained = train(model, tokenizer, transform, data, recipe, tmp_path / "out", loss=sigmoid_loss)
    found = losses(tmp_path / "out")
    assert type(trained) is Siglip and found[-1] < 0.8 * found[0]
    assert trained.logit_scale > math.log(100) and trained.logit_bias != model_bias(tokenizer)
    again = Siglip.from_pretrained(tmp_path / "out")
    assert torch.equal(again.vision.probe, trained.vision.probe)


def model_bias(tokenizer):
    return fork_for(Siglip, tokenizer).logit_bias


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", [MeanCLIP, GatedCLIP, CLIP])
def test_train_uses_the_loss_of_the_paper_by_default(kind, tokenizer, tmp_path):
    """Training with the paper's loss as an argument gives the same weights as the default loss."""

    def same(model, image_embeds, text_embeds, is_true):
        return contrastive_loss(image_embeds, text_embeds, model.logit_scale, is_true)

    transform = ImageTransform(40)
    data = open_data(pictures(tmp_path), transform)
    recipe = Recipe(epochs=2, batch=8, lr=3e-4)
    found = []
    for i, loss in enumerate((None, same)):
        model = fork_for(kind, tokenizer)
        with torch.no_grad():
            model.logit_scale.fill_(1.0)
        train(model, tokenizer, transform, data, recipe, tmp_path / str(i), loss=loss)
        found.append(kind.from_pretrained(tmp_path / str(i)))
    for (name, one), other in zip(found[0].state_dict().items(), found[1].state_dict().values()):
        assert torch.equal(one, other), name


def test_a_fork_that_overrides_score_needs_a_loss_that_calls_score(tokenizer, tmp_path):
    """The recipe's losses would train neither the score nor its parameters."""
    transform = ImageTransform(40)
    data = open_data(pictures(tmp_path), transform)
    for loss in ("clip", "siglip"):
        recipe = Recipe(epochs=1, batch=8, loss=loss)
        model = fork_for(Siglip, tokenizer)
        with pytest.raises(ValueError, match="Siglip has its own score.* give `train` a loss"):
            train(model, tokenizer, transform, data, recipe, tmp_path / "out")


def test_a_model_of_a_different_class_cannot_continue_a_run(tokenizer, tmp_path):
    transform = ImageTransform(40)
    data = open_data(pictures(tmp_path), transform)

    recipe = Recipe(epochs=2, batch=8)
    run = Run(tmp_path / "out", fork_for(CLIP, tokenizer), recipe, writes=True)
    run.save(tokenizer, transform)
    with pytest.raises(ValueError, match="other values of class"):
        train(fork_for(MeanCLIP, tokenizer), tokenizer, transform, data, recipe, tmp_path / "out")
