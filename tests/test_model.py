"""Compare the model with transformers' CLIPModel and with formulas.

The first tests check small modules. The next tests compare every module in float64, and compare
float32 results bit for bit. Then come unusual shapes, the official shapes, half precision, sites
and gradients. The last tests plant faults. README's table has the tolerances.
"""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers import CLIPModel
from twin import TINY, copy_weights, random_inputs, randomize, tiny_clip, transformers_config, twins

from miniclip import (
    CLIP,
    CLIPConfig,
    ContextLengthError,
    TextConfig,
    TextTower,
    VisionConfig,
    VisionTower,
    load,
)
from miniclip.files.models import meta_device
from miniclip.files.names import TRANSFORMERS, layout_name
from miniclip.files.published import RELEASES
from miniclip.model import MLP, Attention, Block, QuickGELU, Site, unit_norm
from miniclip.published import PUBLISHED

FLOAT64 = 1e-10
# The tolerances of float32 logits at logit scale 100. `REORDERED` is for a CPU that runs the
# operations in another order. `CUDA` is for a GPU with TF32 turned off.
REORDERED = 2e-5
CUDA = 1e-4

pytestmark = [
    # torch.compile and torch.export of torch 2.13 raise these warnings about their own code.
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch.*"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        assert not torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
    return request.param


@torch.no_grad()
def logits(model, pixels, ids):
    if isinstance(model, CLIPModel):
        return model(pixel_values=pixels, input_ids=ids).logits_per_image
    return model(pixels, ids).logits_per_image


def difference(ours, theirs):
    assert ours.shape == theirs.shape and ours.isfinite().all()
    return (ours.double() - theirs.double()).abs().max().item()


@torch.no_grad()
def watch(model, names, *inputs):
    """The outputs of the named modules in one forward pass, and the model's output."""
    seen, handles = {}, []
    for name in names:
        keep = lambda module, args, out, name=name: seen.__setitem__(name, out)  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(keep))
    output = model(*inputs)
    for handle in handles:
        handle.remove()
    return {n: o[0] if isinstance(o, tuple) else o for n, o in seen.items()}, output


# ------------------------------------------------------------------------------------- single parts


def site_shapes(config, B, C, T):
    """{name: shape} of every named output in both towers."""
    shapes = {}
    for tower, batch, tokens, part in (
        ("vision", B, 1 + config.vision.patches, config.vision),
        ("text", C, T, config.text),
    ):
        stream = (batch, tokens, part.width)
        heads = (batch, tokens, part.heads, part.width // part.heads)
        square = (batch, part.heads, tokens, tokens)
        for i in range(part.layers):
            block = {
                "ln_1": stream,
                "attn.q_proj": stream,
                "attn.k_proj": stream,
                "attn.v_proj": stream,
                "attn.q": heads,
                "attn.k": heads,
                "attn.v": heads,
                "attn.scores": square,
                "attn.pattern": square,
                "attn.z": heads,
                "attn.out_proj": stream,
                "attn": stream,
                "resid_mid": stream,
                "ln_2": stream,
                "mlp.fc1": (batch, tokens, part.mlp_width),
                "mlp.act": (batch, tokens, part.mlp_width),
                "mlp.fc2": stream,
                "mlp": stream,
            }
            shapes |= {f"{tower}.blocks.{i}.{name}": shape for name, shape in block.items()}
            shapes[f"{tower}.blocks.{i}"] = stream
        shapes[f"{tower}.blocks"] = stream
        shapes[f"{tower}.proj"] = shapes[tower] = (batch, config.embed_dim)
    side = config.vision.image_size // config.vision.patch_size
    shapes["vision.patch_embed"] = (B, config.vision.width, side, side)
    shapes["vision.ln_pre"] = (B, 1 + config.vision.patches, config.vision.width)
    shapes["vision.ln_post"] = (B, config.vision.width)  # ln_post gets only the class token
    shapes["text.token_embed"] = shapes["text.ln_final"] = (C, T, config.text.width)
    return shapes


def test_every_site_has_its_documented_shape():
    model = tiny_clip()
    expected = site_shapes(TINY, B=2, C=3, T=9)
    names = [name for name, _ in model.named_modules() if name]
    assert set(names) == set(expected)
    seen, output = watch(model, names, *random_inputs(TINY, images=2, texts=3, tokens=9))
    assert {name: tuple(tensor.shape) for name, tensor in seen.items()} == expected
    assert [tuple(t.shape) for t in output] == [(2, 3), (3, 2), (2, 36), (3, 36)]


def test_quick_gelu_equals_its_formula():
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    values = [v / (1 + math.exp(-1.702 * v)) for v in x.tolist()]
    expected = torch.tensor(values, dtype=torch.float64)
    assert difference(QuickGELU()(x), expected) < 1e-14
    assert difference(F.gelu(x), expected) > 0.02  # QuickGELU is not GELU


def test_unit_norm_divides_each_vector_by_its_l2_norm():
    x = torch.randn(5, 7, dtype=torch.float64)
    rows = [[v / math.sqrt(math.fsum(w * w for w in row)) for v in row] for row in x.tolist()]
    assert difference(unit_norm(x), torch.tensor(rows, dtype=torch.float64)) < 1e-15


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_a_token_in_causal_attention_sees_itself_and_earlier_tokens(kind):
    attention = Attention(12, 3, causal=True).double()
    attention.eager = kind == "eager"
    x = torch.randn(1, 6, 12, dtype=torch.float64, requires_grad=True)
    for t in range(6):
        (gradient,) = torch.autograd.grad(attention(x)[0, t].square().sum(), x)
        assert (gradient[0].abs().sum(-1) > 0).tolist() == [s <= t for s in range(6)]


def test_a_token_in_attention_without_a_mask_sees_all_tokens():
    x = torch.randn(1, 6, 12, requires_grad=True)
    Attention(12, 3, causal=False)(x)[0, 0].square().sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_attention_equals_its_formula(causal):
    """The expected values come from loops over images, heads and tokens."""
    attention = Attention(12, 3, causal).double()
    randomize(attention)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (
        x @ linear.weight.T + linear.bias
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    z = torch.zeros_like(x)
    for b in range(2):
        for h in range(3):
            head = slice(4 * h, 4 * h + 4)
            for t in range(5):
                sources = range(t + 1) if causal else range(5)
                e = [math.exp(q[b, t, head] @ k[b, s, head] / math.sqrt(4)) for s in sources]
                z[b, t, head] = sum(w / sum(e) * v[b, s, head] for w, s in zip(e, sources))
    expected = z @ attention.out_proj.weight.T + attention.out_proj.bias
    for attention.eager in (False, True):
        assert difference(attention(x), expected) < 1e-13


def test_logits_are_scaled_cosines():
    model = tiny_clip(torch.float64)
    pixels, ids = random_inputs(TINY)
    with torch.no_grad():
        out = model(pixels, ids)
        image, text = model.encode_image(pixels), model.encode_text(ids)
    cosines = F.cosine_similarity(image[:, None], text[None], dim=-1)
    assert difference(out.logits_per_image, model.logit_scale.exp() * cosines) < 1e-12
    assert torch.equal(out.logits_per_image, out.logits_per_text.T)
    assert torch.equal(out.image_embeds, unit_norm(image))
    assert torch.equal(out.text_embeds, model.encode_text(ids, normalize=True))


def openai_init_stds(config):
    """Return {name: std} of the initial weights in openai/CLIP's model.py."""
    v, t = config.vision, config.text
    stds = {
        "vision.class_embed": v.width**-0.5,
        "vision.pos_embed": v.width**-0.5,
        "vision.proj.weight": v.width**-0.5,
        # PyTorch's default: kaiming_uniform(sqrt 5) has variance 1 / (3 fan_in)
        "vision.patch_embed.weight": (3 * v.channels * v.patch_size**2) ** -0.5,
        "text.token_embed.weight": 0.02,
        "text.pos_embed": 0.01,
        "text.proj.weight": t.width**-0.5,
    }
    # nn.MultiheadAttention: xavier_uniform of the (3 W, W) matrix has variance 2 / (4 W)
    attn = dict.fromkeys(("attn.q_proj", "attn.k_proj", "attn.v_proj"), (2 / (4 * v.width)) ** 0.5)
    narrow, wide = (3 * v.width) ** -0.5, (3 * v.mlp_width) ** -0.5  # PyTorch's default
    vision = attn | {"attn.out_proj": narrow, "mlp.fc1": narrow, "mlp.fc2": wide}
    proj_std = t.width**-0.5 * (2 * t.layers) ** -0.5
    attn = dict.fromkeys(("attn.q_proj", "attn.k_proj", "attn.v_proj"), t.width**-0.5)
    text = attn | {"attn.out_proj": proj_std, "mlp.fc1": (2 * t.width) ** -0.5, "mlp.fc2": proj_std}
    for tower, layers, block in (("vision", v.layers, vision), ("text", t.layers, text)):
        stds |= {f"{tower}.blocks.{i}.{n}.weight": block[n] for i in range(layers) for n in block}
    return stds


def test_weights_are_initialized_as_in_the_code_of_openai():
    config = CLIPConfig(
        vision=VisionConfig(width=192, layers=1, heads=4, mlp_width=400, patch_size=16),
        text=TextConfig(width=128, layers=3, heads=4, mlp_width=300, vocab_size=1000,
                        bos_token_id=1, eos_token_id=2),
        embed_dim=160,
        logit_scale_init=3.5,
    )  # fmt: skip
    torch.manual_seed(0)
    parameters = dict(CLIP(config).named_parameters())
    for name, std in openai_init_stds(config).items():
        values = parameters.pop(name)
        few = 5 * (2 * values.numel()) ** -0.5  # five standard errors of the measured std
        assert values.std().item() == pytest.approx(std, rel=few), name
        assert abs(values.mean().item()) < 5 * std * values.numel() ** -0.5, name
    assert parameters.pop("logit_scale").item() == 3.5
    assert CLIPConfig().logit_scale_init == pytest.approx(math.log(1 / 0.07), abs=1e-4)
    for name, values in parameters.items():
        if name.endswith("weight"):
            assert "ln_" in name and (values == 1).all(), name
        elif "mlp" in name:  # nn.Linear's default: uniform up to fan_in ** -0.5
            fan_in = config.vision.width if "vision" in name else config.text.width
            fan_in = fan_in if "fc1" in name else {"v": 400, "t": 300}[name[0]]
            assert 0.9 * fan_in**-0.5 < values.abs().max() <= fan_in**-0.5, name
        else:
            assert (values == 0).all(), name


# The numbers are from openai/CLIP's notebooks (B/32), keras-cv's presets (B/16) and keras-hub's
# presets (clip_published.py @71453d08). keras-hub also counts position ids, which are subtracted.
PARAMETERS = {
    "B/32": 151277313,
    "B/16": 149620737,
    "L/14": 427616513,
    "L/14-336": 427944193,
    "H/14": 986109441,
    "g/14": 1366678273,
    "bigG/14": 2539567105,
}
OFFICIAL = ("B/32", "B/16", "L/14", "L/14-336")


@pytest.mark.sweep(7)
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_equal_the_published_counts(name):
    with meta_device():
        model = CLIP(PUBLISHED[name])
        theirs = CLIPModel(transformers_config(PUBLISHED[name]))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert sum(t.numel() for t in model.state_dict().values()) == PARAMETERS[name]
    assert sum(p.numel() for p in theirs.parameters()) == PARAMETERS[name]


# Millions of parameters in the vision tower, and in the text tower without its token embedding. The
# published names state both numbers, as in "TinyCLIP-ViT-8M-16-Text-3M".
TINYCLIP = {
    "TinyCLIP-8M/16": (8, 3),
    "TinyCLIP-39M/16": (39, 19),
    "TinyCLIP-40M/32": (40, 19),
    "TinyCLIP-61M/32": (61, 29),
}


@pytest.mark.parametrize("name", TINYCLIP)
def test_tinyclip_towers_have_the_sizes_in_their_names_and_use_exact_gelu(name):
    with meta_device():
        model = CLIP(PUBLISHED[name])
    vision, text = (
        sum(parameter.numel() for parameter in tower.parameters())
        for tower in (model.vision, model.text)
    )
    text -= model.text.token_embed.weight.numel()
    assert (round(vision / 1e6), round(text / 1e6)) == TINYCLIP[name]
    assert model.config.vision.act == model.config.text.act == RELEASES[name][1] == "gelu"
    assert PARAMETERS.keys() | TINYCLIP.keys() == PUBLISHED.keys()


# ----------------------------------------------------------- module by module, in float64, to 1e-10


@pytest.fixture(scope="module")
def double():
    """(ours, theirs, pixels, ids) in float64. transformers uses sdpa attention, because its eager
    attention computes the softmax in float32, with rounding errors of 1e-7."""
    pixels, ids = random_inputs(TINY)
    return *twins(TINY, dtype=torch.float64), pixels.double(), ids


TOWERS = ["vision", "text"]


def modules(double, tower):
    ours, theirs, *_ = double
    return getattr(ours, tower), getattr(theirs, f"{tower}_model")


def residual_stream(tower, seed=3):
    part = getattr(TINY, tower)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 9, part.width, dtype=torch.float64, generator=generator)


@torch.no_grad()
def test_embedded_tokens_equal_those_of_transformers(double):
    ours, theirs, pixels, ids = double
    vision = theirs.vision_model
    expected = vision.pre_layrnorm(vision.embeddings(pixels))
    assert difference(ours.vision.embed_tokens(pixels), expected) < FLOAT64
    assert difference(ours.text.embed_tokens(ids), theirs.text_model.embeddings(ids)) < FLOAT64


@torch.no_grad()
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("tower", TOWERS)
def test_attention_gives_the_same_output_as_in_transformers(double, tower, kind):
    ours, theirs = modules(double, tower)
    x = residual_stream(tower)
    for block, layer in zip(ours.blocks, theirs.encoder.layers, strict=True):
        attention = copy.deepcopy(block.attn)
        attention.eager = kind == "eager"
        expected, _ = layer.self_attn(x, is_causal=tower == "text")
        assert difference(attention(x), expected) < FLOAT64


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
def test_mlp_and_layer_norms_give_the_same_output_as_in_transformers(double, tower):
    ours, theirs = modules(double, tower)
    x = residual_stream(tower)
    for block, layer in zip(ours.blocks, theirs.encoder.layers, strict=True):
        assert difference(block.mlp(x), layer.mlp(x)) < FLOAT64
        assert difference(block.ln_1(x), layer.layer_norm1(x)) < FLOAT64
        assert difference(block.ln_2(x), layer.layer_norm2(x)) < FLOAT64


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
def test_blocks_give_the_same_output_as_in_transformers(double, tower):
    ours, theirs = modules(double, tower)
    x = residual_stream(tower)
    for block, layer in zip(ours.blocks, theirs.encoder.layers, strict=True):
        assert difference(block(x), layer(x, None, is_causal=tower == "text")) < FLOAT64


@torch.no_grad()
def test_hidden_states_pooled_outputs_and_embeddings_equal_those_of_transformers(double):
    ours, theirs, pixels, ids = double
    for tower, x in (("vision", pixels), ("text", ids)):
        mine, peer = modules(double, tower)
        expected = peer(x, output_hidden_states=True)
        stream = mine.embed_tokens(x)
        assert len(expected.hidden_states) == 1 + len(mine.blocks)
        assert difference(stream, expected.hidden_states[0]) < FLOAT64
        for block, state in zip(mine.blocks, expected.hidden_states[1:], strict=True):
            stream = block(stream)
            assert difference(stream, state) < FLOAT64
        if tower == "vision":
            pooled = mine.ln_post(stream[:, 0])
        else:
            rows = torch.arange(len(ids))
            pooled = mine.ln_final(stream)[rows, mine.eos_positions(ids)]
        assert difference(pooled, expected.pooler_output) < FLOAT64
    image = theirs.get_image_features(pixels).pooler_output
    text = theirs.get_text_features(ids).pooler_output
    assert difference(ours.encode_image(pixels), image) < FLOAT64
    assert difference(ours.encode_text(ids), text) < FLOAT64


def test_logits_equal_those_of_transformers(double):
    ours, theirs, pixels, ids = double
    assert difference(logits(ours, pixels, ids), logits(theirs, pixels, ids)) < FLOAT64


@torch.no_grad()
def test_every_site_gives_the_same_tensor_as_in_transformers(double):
    """transformers' sdpa attention returns no scores or pattern, so the test computes them."""
    ours, theirs, pixels, ids = double
    seen, _ = watch(ours, site_shapes(TINY, B=2, C=3, T=9), pixels, ids)
    expected = transformers_sites(theirs, pixels, ids)
    assert expected.keys() == seen.keys()
    for name, tensor in expected.items():
        assert difference(seen[name], tensor) < FLOAT64, name


@torch.no_grad()
def transformers_sites(theirs, pixels, ids):
    """Return {miniclip's name: transformers' tensor}. Hooks collect the tensors."""
    inputs, outputs, handles = {}, {}, []
    for name, module in theirs.named_modules():
        if not name:
            continue

        def keep(module, args, kwargs, out, name=name):
            inputs[name] = args[0] if args else next(iter(kwargs.values()))
            outputs[name] = out[0] if isinstance(out, tuple) else out

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    theirs(pixel_values=pixels, input_ids=ids)
    for handle in handles:
        handle.remove()

    sites = {
        "vision": outputs["visual_projection"],
        "vision.proj": outputs["visual_projection"],
        "vision.patch_embed": outputs["vision_model.embeddings.patch_embedding"],
        "vision.ln_pre": outputs["vision_model.pre_layrnorm"],
        "vision.ln_post": outputs["vision_model.post_layernorm"],
        "text": outputs["text_projection"],
        "text.proj": outputs["text_projection"],
        "text.token_embed": outputs["text_model.embeddings.token_embedding"],
        "text.ln_final": outputs["text_model.final_layer_norm"],
    }
    for tower in TOWERS:
        part = getattr(TINY, tower)
        for i in range(part.layers):
            ours, peer = f"{tower}.blocks.{i}", f"{tower}_model.encoder.layers.{i}"
            sites[ours] = sites[f"{tower}.blocks"] = outputs[peer]
            sites[f"{ours}.resid_mid"] = inputs[f"{peer}.layer_norm2"]
            for mine, other in {
                "ln_1": "layer_norm1",
                "attn": "self_attn",
                "attn.q_proj": "self_attn.q_proj",
                "attn.k_proj": "self_attn.k_proj",
                "attn.v_proj": "self_attn.v_proj",
                "attn.out_proj": "self_attn.out_proj",
                "ln_2": "layer_norm2",
                "mlp": "mlp",
                "mlp.fc1": "mlp.fc1",
                "mlp.act": "mlp.activation_fn",
                "mlp.fc2": "mlp.fc2",
            }.items():
                sites[f"{ours}.{mine}"] = outputs[f"{peer}.{other}"]
            heads = (part.heads, part.width // part.heads)
            q, k, v = (
                outputs[f"{peer}.self_attn.{c}_proj"].unflatten(-1, heads) for c in ("q", "k", "v")
            )
            sites |= {f"{ours}.attn.q": q, f"{ours}.attn.k": k, f"{ours}.attn.v": v}
            sites[f"{ours}.attn.z"] = inputs[f"{peer}.self_attn.out_proj"].unflatten(-1, heads)
            scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(heads[1])
            exp = scores.exp()
            if tower == "text":
                t = torch.arange(scores.shape[-1])
                exp[:, :, t[:, None] < t[None]] = 0
            sites[f"{ours}.attn.scores"] = scores  # these have no causal mask yet
            sites[f"{ours}.attn.pattern"] = exp / exp.sum(-1, keepdim=True)
    return sites


@torch.no_grad()
def test_pattern_equals_the_attentions_of_transformers_up_to_float32_rounding():
    pixels, ids = random_inputs(TINY)
    ours, theirs = twins(TINY, attention="eager", dtype=torch.float64)
    for tower, x in (("vision", pixels.double()), ("text", ids)):
        names = [f"{tower}.blocks.{i}.attn.pattern" for i in range(getattr(TINY, tower).layers)]
        seen, _ = watch(ours, names, pixels.double(), ids)
        attentions = getattr(theirs, f"{tower}_model")(x, output_attentions=True).attentions
        for name, expected in zip(names, attentions, strict=True):
            assert difference(seen[name], expected) < 1e-6


# -------------------------------------------------------------------- float32 on a CPU, bit for bit


@torch.no_grad()
def assert_bit_equal(ours, theirs, pixels, ids):
    mine, peer = ours(pixels, ids), theirs(pixel_values=pixels, input_ids=ids)
    for name in mine._fields:
        assert torch.equal(getattr(mine, name), getattr(peer, name)), name
    assert torch.equal(ours.encode_image(pixels), theirs.get_image_features(pixels).pooler_output)
    assert torch.equal(ours.encode_text(ids), theirs.get_text_features(ids).pooler_output)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float32_outputs_are_bit_equal_to_those_of_transformers_at_every_batch_size(attention):
    ours, theirs = twins(TINY, attention=attention)
    for batch in range(1, 17):
        inputs = random_inputs(TINY, images=batch, texts=17 - batch, tokens=4 + batch, seed=batch)
        assert_bit_equal(ours, theirs, *inputs)


def unusual(vision=None, text=None, **shared):
    return CLIPConfig(
        VisionConfig(**{**vars(TINY.vision), **(vision or {})}),
        TextConfig(**{**vars(TINY.text), **(text or {})}),
        **{"embed_dim": TINY.embed_dim, **shared},
    )


UNUSUAL = {
    "head width 80, as H/14": unusual({"width": 160, "heads": 2}, {"width": 240, "heads": 3}),
    "head width 104, as bigG/14": unusual({"width": 208, "heads": 2}, {"width": 104, "heads": 1}),
    "gelu": unusual({"act": "gelu"}, {"act": "gelu"}),
    "gelu_pytorch_tanh": unusual({"act": "gelu_pytorch_tanh"}, {"act": "gelu_pytorch_tanh"}),
    "an activation for each tower": unusual({"act": "gelu"}, {"act": "quick_gelu"}),
    "context 248": unusual(text={"context_length": 248}),
    "MLP narrower than the stream": unusual({"mlp_width": 31}, {"mlp_width": 7}),
    "embedding wider than both": unusual(embed_dim=129),
    "one layer and many": unusual({"layers": 1}, {"layers": 7}),
    "grey images": unusual({"channels": 1}),
    "four channels": unusual({"channels": 4}),
    "a partial patch": unusual({"image_size": 45}),
    "one patch": unusual({"image_size": 15}),
    "end token below added ones": unusual(text={"eos_token_id": 300, "bos_token_id": 299}),
    "legacy end token": unusual(text={"eos_token_id": 2}),
    "eps 1e-6": unusual({"ln_eps": 1e-6}, {"ln_eps": 1e-3}),
}


@pytest.mark.sweep(8)
@pytest.mark.parametrize("name", UNUSUAL)
def test_models_of_unusual_shapes_give_the_same_output_as_in_transformers(name, device):
    config = UNUSUAL[name]
    tokens = config.text.context_length if "context" in name else 9
    pixels, ids = (x.to(device) for x in random_inputs(config, tokens=tokens))
    ours, theirs = twins(config, device=device)
    if device == "cpu":
        assert_bit_equal(ours, theirs, pixels, ids)
    assert difference(logits(ours, pixels, ids), logits(theirs, pixels, ids)) < CUDA
    ours, theirs, pixels = ours.double(), theirs.double(), pixels.double()
    assert difference(logits(ours, pixels, ids), logits(theirs, pixels, ids)) < FLOAT64


def test_the_custom_end_token_and_the_largest_id_have_different_positions():
    """A model finds the end token by its id, or takes the largest id. The test above can
    distinguish these two rules only if they give different positions."""
    config = UNUSUAL["end token below added ones"]
    _, ids = random_inputs(config)
    model, _ = twins(config)
    assert not torch.equal(model.text.eos_positions(ids), ids.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_models_of_official_width_give_the_same_output_as_in_transformers(
    name, device, two_threads
):
    """B/32 has its full depth. The other shapes have two layers in each tower."""
    config = PUBLISHED[name]
    if name != "B/32":
        towers = {"vision": config.vision, "text": config.text}
        config = replace(config, **{key: replace(t, layers=2) for key, t in towers.items()})
    ours, theirs = twins(config, device=device)
    inputs = random_inputs(config, images=1, texts=2, tokens=12)
    pixels, ids = (x.to(device) for x in inputs)
    if device == "cpu":
        assert_bit_equal(ours, theirs, pixels, ids)
    else:
        assert difference(logits(ours, pixels, ids), logits(theirs, pixels, ids)) < CUDA


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_close_to_those_of_transformers_on_every_device(attention, device):
    ours, theirs = twins(TINY, attention=attention, device=device)
    pixels, ids = (x.to(device) for x in random_inputs(TINY, images=8, texts=8, tokens=20))
    assert difference(logits(ours, pixels, ids), logits(theirs, pixels, ids)) < CUDA


@pytest.mark.sweep(3)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_accurate_as_in_transformers(dtype, attention, device):
    pixels, ids = (x.to(device) for x in random_inputs(TINY, images=16, texts=16, tokens=20))
    ours, theirs = twins(TINY, attention=attention, dtype=dtype, device=device)
    exact = logits(copy.deepcopy(ours).double(), pixels.to(dtype).double(), ids)
    error = (logits(ours, pixels, ids).double() - exact).abs()
    peer_error = (logits(theirs, pixels, ids).double() - exact).abs()
    assert logits(ours, pixels, ids).dtype == dtype
    assert 0 < error.mean() <= 1.1 * peer_error.mean()
    assert error.max() <= 1.1 * peer_error.max()


# ------------------------------------------------------------------------ what holds for the towers


@torch.no_grad()
def test_tokens_after_the_end_token_do_not_change_the_embedding():
    """Causal attention hides the later tokens, so the text tower needs no padding mask."""
    model = tiny_clip()
    _, ids = random_inputs(TINY, texts=1, tokens=20)
    ids[0, 11:] = TINY.text.eos_token_id
    expected = model.encode_text(ids)
    for fill in (0, 5, TINY.text.vocab_size - 1):
        padded = ids.clone()
        padded[0, 12:] = fill
        assert torch.equal(model.encode_text(padded), expected)
    assert difference(model.encode_text(ids[:, :12]), expected) < 1e-6
    for position in range(11):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % 590
        assert difference(model.encode_text(changed), expected) > 1e-3, position


EDITS = {
    "a soft cap": lambda scores: 2 * torch.tanh(scores / 2),
    "a constant": torch.ones_like,
    "a negative temperature": lambda scores: -3 * scores,
    "NaN at later tokens": lambda scores: scores.masked_fill(scores.isfinite().triu(1), torch.nan),
}


@torch.no_grad()
@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_of_the_scores_makes_later_tokens_visible(edit):
    model, (_, ids) = tiny_clip(), random_inputs(TINY, texts=1, tokens=20)
    ids[0, 11] = TINY.text.eos_token_id
    other = ids.clone()
    other[0, 12:] = 5
    plain = model.encode_text(ids)
    for block in model.text.blocks:
        block.attn.scores.register_forward_hook(lambda *args: EDITS[edit](args[-1]))
    edited = model.encode_text(ids)
    assert torch.equal(edited, model.encode_text(other)) and not torch.equal(ids, other)
    assert (difference(edited, plain) > 1e-3) == (edit != "NaN at later tokens")


def test_a_temperature_on_the_scores_has_the_same_gradient_as_on_q():
    """The causal mask is applied after the site `scores`. If it were applied before, some scores
    would be -inf, and the gradient of the temperature would be 0 * -inf, which is NaN."""
    model, (_, ids) = tiny_clip(torch.float64), random_inputs(TINY)
    attn, slopes = model.text.blocks[0].attn, []
    for site in (attn.scores, attn.q):
        temperature = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        handle = site.register_forward_hook(lambda *args: temperature * args[-1])
        slopes += torch.autograd.grad(model.encode_text(ids).square().sum(), temperature)
        handle.remove()
    assert slopes[0].abs() > 1e-3 and difference(slopes[0], slopes[1]) < FLOAT64


def test_the_text_tower_pools_at_the_first_end_token():
    model = tiny_clip().text
    end = TINY.text.eos_token_id
    assert model.eos_positions(torch.tensor([[1, end, 2, end], [end, 1, 1, 1]])).tolist() == [1, 0]


def test_ids_without_an_end_token_are_an_error():
    model = tiny_clip()
    ids = random_inputs(TINY)[1]
    ids[1] = 5
    with pytest.raises(ValueError, match=r"row 1 of ids has no end token \(599\)"):
        model.encode_text(ids)


@pytest.mark.slow
def test_ids_without_an_end_token_give_nan_in_a_compiled_graph():
    """A compiled graph cannot raise an error, so a text without an end token is encoded as NaN."""
    model = tiny_clip()
    ids = random_inputs(TINY)[1]
    expected = model.encode_text(ids)
    ids[1] = 5
    found = torch.compile(model.encode_text, backend="eager", fullgraph=True)(ids)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_a_forward_pass_never_waits_for_the_device():
    """A meta tensor has no values, so a check that reads a value raises an error."""
    pixels, ids = (x.to("meta") for x in random_inputs(TINY))
    out = tiny_clip().to("meta")(pixels, ids)
    assert out.logits_per_image.shape == (len(pixels), len(ids))


def test_too_many_tokens_are_an_error():
    model = tiny_clip()
    ids = torch.full((2, 21), TINY.text.eos_token_id)
    message = "21 tokens; this text tower has 20 positions.* truncate=True, pad_to=20$"
    with pytest.raises(ContextLengthError, match=message):
        model.encode_text(ids)
    model.encode_text(ids[:, :20])


@pytest.mark.parametrize("size", [(3, 40, 40), (1, 4, 40, 40), (1, 3, 40, 48), (1, 3, 80, 40)])
def test_pixels_of_a_wrong_shape_are_an_error(size):
    model = tiny_clip()
    with pytest.raises(ValueError, match=r"pixels have shape .*; .* reads \(B, 3, 40, 40\)"):
        model.encode_image(torch.zeros(size))


def test_ids_without_a_batch_dimension_are_an_error():
    model = tiny_clip()
    with pytest.raises(ValueError, match=r"ids have shape \(9,\); expected \(B, T\)"):
        model.encode_text(torch.zeros(9, dtype=torch.long))


@pytest.mark.parametrize(
    "pixels, error, words",
    [
        (
            Image.new("RGB", (40, 40)),
            TypeError,
            ["found Image", "transform([image])"],
        ),
        (np.zeros((1, 3, 40, 40), np.float32), TypeError, ["ndarray", "(B, 3, 40, 40)"]),
        ("cat.jpg", TypeError, ["found str", "transform([image])"]),
        (torch.zeros(1, 3, 40, 40, dtype=torch.uint8), ValueError, ["torch.uint8", "transform(["]),
        (torch.zeros(1, 3, 40, 40, dtype=torch.int64), ValueError, ["torch.int64"]),
        (
            torch.zeros(3, 40, 40),
            ValueError,
            ["(3, 40, 40)", "encode_image(pixels[None])"],
        ),
    ],
)
def test_the_error_for_wrong_pixels_shows_the_correct_call(pixels, error, words):
    with pytest.raises(error) as raised:
        tiny_clip().encode_image(pixels)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    "ids, error, words",
    [
        (["a cat"], TypeError, ["found list", "encode_text(tokenizer(texts))"]),
        ("a cat", TypeError, ["found str", "encode_text(tokenizer(texts))"]),
        (torch.ones(1, 4), ValueError, ["torch.float32", "int64 or int32"]),
        (torch.ones(1, 4, dtype=torch.uint8), ValueError, ["torch.uint8", "int64 or int32"]),
        (torch.tensor([[1, 600, 599]]), ValueError, ["from 1 to 600", "0 to 599", "Tokenizer"]),
        (torch.tensor([[-1, 599]]), ValueError, ["from -1 to 599"]),
    ],
)
def test_the_error_for_wrong_ids_shows_the_correct_call(ids, error, words):
    with pytest.raises(error) as raised:
        tiny_clip().encode_text(ids)
    assert all(word in str(raised.value) for word in words), raised.value


def test_int32_ids_are_accepted():
    model, ids = tiny_clip(), random_inputs(TINY)[1]
    assert torch.equal(model.encode_text(ids.int()), model.encode_text(ids))


def test_an_empty_batch_gives_empty_outputs():
    model, tokenizer, transform = load("everyday")
    out = model(transform([]), tokenizer([]))
    assert out.logits_per_image.shape == (0, 0)
    assert out.image_embeds.shape == out.text_embeds.shape == (0, model.config.embed_dim)
    assert model(transform([]), tokenizer(["a cat"])).logits_per_image.shape == (0, 1)


def test_the_model_checks_no_values_under_vmap():
    """Under vmap, code cannot read the values of a tensor, so a check would raise an error."""
    model, (pixels, ids) = tiny_clip(), random_inputs(TINY)
    model.set_attention("eager")  # the fused kernel warns that vmap is slow
    found = torch.vmap(model.encode_text)(ids[:, None])
    torch.testing.assert_close(found[:, 0], model.encode_text(ids))
    found = torch.vmap(model.encode_image)(pixels[:, None])
    torch.testing.assert_close(found[:, 0], model.encode_image(pixels))
    ids[0] = 5  # no end token
    assert torch.vmap(model.encode_text)(ids[:, None])[0].isnan().all()


def test_an_unknown_kind_of_attention_is_an_error():
    model = tiny_clip()
    with pytest.raises(ValueError, match="attention kind is 'flash'; expected 'eager' or 'sdpa'"):
        model.set_attention("flash")
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    for kind in ("eager", "sdpa"):
        model.set_attention(kind)
        assert [layer.eager for layer in layers] == [kind == "eager"] * 5


@pytest.mark.parametrize("kind", [CLIP, VisionTower, TextTower], ids=lambda kind: kind.__name__)
def test_from_pretrained_takes_the_options_of_load(kind):
    model = kind.from_pretrained("shapes", dtype=torch.float16)
    assert type(model) is kind and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_a_model_is_saved_in_the_given_layout(tmp_path):
    CLIP.from_pretrained("shapes").save_pretrained(tmp_path, layout="open_clip")
    saved = {path.name for path in tmp_path.iterdir()}
    assert "open_clip_config.json" in saved and "config.json" not in saved


# -------------------------------------------------------------------------------------------- sites


class Untouched(Attention):
    """Attention without sites."""

    def forward(self, x):
        B, T, W = x.shape
        heads = (B, T, W // self.head_width, self.head_width)
        q, k, v = (
            f(x).view(heads).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(z.transpose(1, 2).reshape(B, T, W))


def test_sites_without_hooks_change_no_bit_of_the_output():
    model = tiny_clip()
    bare = copy.deepcopy(model)
    for module in bare.modules():
        if isinstance(module, Attention):
            module.__class__ = Untouched
        elif isinstance(module, Block):
            module.forward = lambda x, b=module: (
                lambda mid: mid + b.mlp(b.ln_2(mid))
            )(x + b.attn(b.ln_1(x)))  # fmt: skip
    inputs = random_inputs(TINY)
    assert torch.equal(logits(model, *inputs), logits(bare, *inputs))


def test_sites_add_no_parameters_and_no_keys_to_the_state_dict():
    model = tiny_clip()
    sites = [name for name, module in model.named_modules() if type(module) is Site]
    assert len(sites) == 7 * (TINY.vision.layers + TINY.text.layers)
    assert not any(key.startswith(tuple(f"{s}." for s in sites)) for key in model.state_dict())
    assert not any(True for s in sites for _ in model.get_submodule(s).parameters())


SITES = [name for name in site_shapes(TINY, 1, 1, 1) if ".blocks." in name]
READS = [name for name in SITES if not name.endswith(("pattern", "scores"))]


@pytest.mark.parametrize("kind, names", [("eager", SITES), ("sdpa", READS)], ids=["eager", "sdpa"])
def test_reading_a_site_changes_no_bit_of_the_output(kind, names):
    model, _ = twins(TINY, attention=kind)
    inputs = random_inputs(TINY)
    expected = logits(model, *inputs)
    _, output = watch(model, names, *inputs)
    assert torch.equal(output.logits_per_image, expected)


@pytest.mark.parametrize("site", ["scores", "pattern"])
def test_reading_scores_or_pattern_changes_the_output_only_by_rounding_error(site):
    model = tiny_clip()
    inputs = random_inputs(TINY)
    name = f"vision.blocks.1.attn.{site}"
    seen, output = watch(model, [name], *inputs)
    assert difference(output.logits_per_image, logits(model, *inputs)) < REORDERED
    model.set_attention("eager")
    assert difference(seen[name], watch(model, [name], *inputs)[0][name]) < REORDERED


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_editing_any_site_changes_the_output_and_removing_the_edit_restores_it(kind):
    model, _ = twins(TINY, attention=kind)
    inputs = random_inputs(TINY)
    expected = logits(model, *inputs)
    generator = torch.Generator().manual_seed(1)
    for name in SITES:

        def edit(module, args, out):
            return out * (1 + torch.rand(out.shape, generator=generator))

        handle = model.get_submodule(name).register_forward_hook(edit)
        assert difference(logits(model, *inputs), expected) > 1e-3, name
        handle.remove()
        assert torch.equal(logits(model, *inputs), expected), name


LOOKS = ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"]
LOOKS += [f"module_{look}" for look in LOOKS]  # PyTorch's global hooks, which run on all modules


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", ["scores", "pattern"])
def test_attention_is_eager_while_scores_or_pattern_has_a_hook(name, look):
    attention, seen = Attention(12, 3, causal=False), []
    site, x = getattr(attention, name), torch.randn(1, 5, 12, requires_grad=True)
    register = getattr(module_hooks if "module" in look else site, f"register_{look}")
    handle = register(lambda module, *_: seen.append(module))
    attention(x).sum().backward()
    handle.remove()
    assert site in seen
    seen.clear()
    attention(x).sum().backward()
    assert not seen


def test_attention_is_eager_while_the_forward_of_a_site_is_patched(monkeypatch):
    attention, x = Attention(12, 3, causal=False), torch.randn(1, 5, 12)
    plain = attention(x)
    attention.pattern.forward = torch.zeros_like
    assert torch.equal(attention(x)[0, 0], attention.out_proj.bias)
    del attention.pattern.forward  # next, `forward` is patched in the class
    assert torch.equal(attention(x), plain)
    seen = []
    monkeypatch.setattr(Site, "forward", lambda self, x: seen.append(self) or x)
    attention(x)
    assert attention.scores in seen and attention.pattern in seen


def test_the_model_calls_a_module_that_replaces_a_site():
    model = tiny_clip()
    inputs = random_inputs(TINY)
    expected = logits(model, *inputs)
    attention = model.vision.blocks[0].attn
    attention.pattern = nn.Identity()
    assert difference(logits(model, *inputs), expected) < REORDERED
    attention.pattern = nn.Softmax(-1)
    assert difference(logits(model, *inputs), expected) > 1e-3
    attention.pattern = Site()
    assert torch.equal(logits(model, *inputs), expected)


@torch.no_grad()
def test_zeroing_a_head_equals_zeroing_its_columns_of_out_proj():
    model = tiny_clip(torch.float64)
    pixels, _ = random_inputs(TINY)
    pixels, attention = pixels.double(), model.vision.blocks[1].attn
    D = attention.head_width

    def zero_head_2(module, args, out):
        return out * torch.tensor([1.0, 1, 0, 1], dtype=out.dtype)[:, None]

    handle = attention.z.register_forward_hook(zero_head_2)
    edited = model.encode_image(pixels)
    handle.remove()
    attention.out_proj.weight[:, 2 * D : 3 * D] = 0
    assert difference(edited, model.encode_image(pixels)) < FLOAT64


# ---------------------------------------------------------------------------------------- gradients


def test_the_gradients_of_all_parameters_equal_those_of_transformers():
    ours, theirs = twins(TINY, dtype=torch.float64)
    pixels, ids = random_inputs(TINY, images=4, texts=4)
    target = torch.arange(4)
    F.cross_entropy(ours(pixels, ids).logits_per_image, target).backward()
    peer = theirs(pixel_values=pixels, input_ids=ids).logits_per_image
    F.cross_entropy(peer, target).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = gradients[layout_name(name, TRANSFORMERS)]
        assert difference(parameter.grad, expected) < FLOAT64, name
        if "k_proj.bias" not in name:  # softmax ignores this bias, so its gradient is 0
            assert parameter.grad.abs().max() > 1e-9, name


# ----------------------------------------------------------------------------------- planted faults


def gelu_for_quick_gelu(model):
    for module in model.modules():
        if isinstance(module, MLP):
            module.act = nn.GELU()


def tanh_gelu_in_one_layer(model):
    model.text.blocks[0].mlp.act = nn.GELU(approximate="tanh")


def another_eps(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def no_causal_mask(model):
    for block in model.text.blocks:
        block.attn.causal = False


def causal_images(model):
    for block in model.vision.blocks:
        block.attn.causal = True


def swapped_norms(model):
    block = model.text.blocks[0]
    block.ln_1, block.ln_2 = block.ln_2, block.ln_1


def wrong_end_token(model):
    model.text.eos_positions = lambda ids: torch.full((len(ids),), ids.shape[1] - 1)


def missing_ln_pre(model):
    model.vision.ln_pre = nn.Identity()


def norm_of_the_text_left_out(model):
    model.text.ln_final = nn.Identity()


def transposed_projection(model):
    weight = model.text.blocks[0].attn.out_proj.weight
    weight.data = weight.data.T.contiguous()


def missing_bias(model):
    model.vision.blocks[2].mlp.fc2.bias.data.zero_()


def missing_value_bias(model):
    model.vision.blocks[0].attn.v_proj.bias.data.zero_()


def swapped_queries_and_keys(model):
    attention = model.vision.blocks[0].attn
    attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj


def flipped_values(model):
    attention = model.text.blocks[1].attn
    attention.v_proj.weight.data = attention.v_proj.weight.data.flip(0)


def shifted_positions(model):
    model.text.pos_embed.data = model.text.pos_embed.data.roll(1, 0)


def read_at_a_patch(model):
    model.vision.ln_pre.register_forward_hook(lambda module, args, out: out.roll(1, 1))


def lower_logit_scale(model):
    model.logit_scale.data -= 1e-6


@pytest.mark.parametrize("fault", [
    gelu_for_quick_gelu, tanh_gelu_in_one_layer, another_eps,
    no_causal_mask, causal_images, swapped_norms, wrong_end_token, missing_ln_pre,
    norm_of_the_text_left_out, transposed_projection, missing_bias, missing_value_bias,
    swapped_queries_and_keys, flipped_values, shifted_positions, read_at_a_patch,
    lower_logit_scale,
])  # fmt: skip
def test_a_planted_fault_changes_the_output_by_more_than_the_float32_tolerance(fault, double):
    ours, theirs, pixels, ids = double
    faulty = copy.deepcopy(ours)
    expected = logits(theirs, pixels, ids)
    assert difference(logits(faulty, pixels, ids), expected) < FLOAT64
    fault(faulty)
    # above the float32 tolerance, so a float32 test would notice the fault too
    assert difference(logits(faulty, pixels, ids), expected) > REORDERED


def test_a_model_and_its_copy_in_transformers_share_no_memory():
    ours, theirs = twins(TINY)
    inputs = random_inputs(TINY)
    expected = logits(theirs, *inputs)
    randomize(ours, seed=1)
    assert torch.equal(logits(theirs, *inputs), expected)
    assert not torch.equal(logits(ours, *inputs), expected)
    copy_weights(ours, theirs)
    assert torch.equal(logits(ours, *inputs), logits(theirs, *inputs))
