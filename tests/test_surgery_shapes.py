"""Test surgery that changes shapes, and save and load the changed models."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import record_timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, CLIPModel
from twin import TINY, assert_close, assert_far, random_inputs, randomize, tiny_clip, twins

from miniclip import CLIP, CLIPConfig, ContextLengthError, TextConfig, VisionConfig
from miniclip.commands.main import main
from miniclip.files.configs import beyond_transformers
from miniclip.follow import patch_grid
from miniclip.lens.decompose import decompose
from miniclip.parity import transformers_twin
from miniclip.parts import parts
from miniclip.sites import hooks
from miniclip.surgery import (
    add_lora,
    add_registers,
    add_tokens,
    average,
    copied,
    extend_context,
    interpolate,
    keep_layers,
    merge_lora,
    prune_heads,
    prune_neurons,
    reconfigure,
    resize_channels,
    resize_image,
    resize_patch,
)

TOWERS = ["vision", "text"]
DTYPES = [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)]


@pytest.fixture(params=DTYPES, ids=["float64", "float32"])
def model(request):
    return tiny_clip(request.param)


def inputs_of(model, **counts):
    pixels, ids = random_inputs(model.config, **counts)
    return pixels.to(model.logit_scale.dtype), ids


@torch.no_grad()
def run(model, tower, **counts):
    """Return the tower's embeddings of random inputs."""
    pixels, ids = inputs_of(model, **counts)
    return model.encode_image(pixels) if tower == "vision" else model.encode_text(ids)


def assert_same_weights(one, other):
    weights, others = one.state_dict(), other.state_dict()
    assert weights.keys() == others.keys() and one.config == other.config
    assert all(torch.equal(weights[name], others[name]) for name in weights)


# -------------------------------------------------------------------- heads, neurons and layers


def zeroed_outputs(model, tower, heads):
    """Ablate heads by setting the columns of `out_proj.weight` for these heads to 0."""
    for layer, gone in heads.items():
        attn = getattr(model, tower).blocks[layer].attn
        for head in gone:
            columns = slice(head * attn.head_width, (head + 1) * attn.head_width)
            attn.out_proj.weight.data[:, columns] = 0
    return model


@pytest.mark.parametrize("tower", TOWERS)
def test_pruning_heads_has_the_same_effect_as_zeroing_their_output(model, tower):
    heads = {0: [1], 1: [0]}
    pruned = prune_heads(model, tower, heads)
    D = getattr(model, tower).blocks[0].attn.head_width
    width = getattr(TINY, tower).width
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, pruned)]
    assert counts[0] - counts[1] == 2 * (4 * width * D + 3 * D)
    for linear in (m for m in pruned.modules() if isinstance(m, nn.Linear)):
        assert linear.weight.shape == (linear.out_features, linear.in_features)
    expected = run(zeroed_outputs(CLIP_like(model), tower, heads), tower)
    assert_close(run(pruned, tower), expected)
    wrong = run(zeroed_outputs(CLIP_like(model), tower, {0: [0], 1: [1]}), tower)
    assert_far(run(pruned, tower), wrong)  # a control: the wrong heads give another result


def CLIP_like(model):
    """Copy a model in plain PyTorch, without miniclip.surgery, which these tests check."""
    copy = CLIP(model.config).to(model.logit_scale.dtype)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


@pytest.mark.parametrize("tower", TOWERS)
def test_pruning_neurons_has_the_same_effect_as_zeroing_their_activation(model, tower):
    gone = {0: [0, 5, 91], 1: range(40)}
    pruned = prune_neurons(model, tower, gone)

    def silence(act, name):
        act = act.clone()
        act[..., list(gone[int(name.split(".")[2])])] = 0
        return act

    with hooks(model, {f"{tower}.blocks.[01].mlp.act": silence}):
        expected = run(model, tower)
    assert_close(run(pruned, tower), expected)
    assert_far(expected, run(model, tower))
    assert getattr(pruned.config, tower).mlp_width[:2] == tuple(
        getattr(TINY, tower).mlp_width - n for n in (3, 40)
    )


class Gate(nn.Module):
    """Multiply each head by a number that depends on its position: (B, T, H, D) -> (B, T, H, D)"""

    def forward(self, z):
        return z * torch.arange(1, 1 + z.shape[2])[:, None]


def test_pruning_is_an_error_if_a_replaced_module_mixes_neurons_or_heads():
    model = tiny_clip()
    for block in model.vision.blocks:
        block.mlp.act = nn.Sequential(block.mlp.act, nn.ReLU())
    prune_neurons(model, "vision", {0: range(20), 1: []})  # ReLU does not mix neurons
    act = model.vision.blocks[0].mlp.act
    for mixing in (nn.Softmax(-1), nn.LayerNorm(100)):
        act[1] = mixing
        with pytest.raises(ValueError, match="prune_neurons cannot follow VisionTower or a part"):
            prune_neurons(model, "vision", {0: range(60)})
    act[1] = nn.ReLU()
    prune_heads(model, "vision", {0: [0]})
    model.vision.blocks[0].attn.z = Gate()
    prune_heads(model, "vision", {0: [3]})
    with pytest.raises(ValueError, match="prune_heads cannot follow VisionTower or a part of it"):
        prune_heads(model, "vision", {0: [0]})


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("tower", TOWERS)
def test_a_layer_without_heads_and_neurons_adds_only_its_biases(model, tower, tmp_path):
    part = getattr(TINY, tower)
    pruned = prune_heads(model, tower, {1: range(part.heads)})
    pruned = prune_neurons(pruned, tower, {1: range(part.mlp_width)})
    block = getattr(pruned, tower).blocks[1]
    x = torch.randn(2, 5, part.width, dtype=model.logit_scale.dtype)
    assert_close(block(x), x + block.attn.out_proj.bias + block.mlp.fc2.bias)
    pruned.save_pretrained(tmp_path)
    assert_same_weights(pruned, CLIP.from_pretrained(tmp_path, dtype=model.logit_scale.dtype))


@pytest.mark.parametrize("tower", TOWERS)
def test_kept_layers_run_in_the_given_order(model, tower):
    part = getattr(model, tower)
    pixels, ids = inputs_of(model)
    with torch.no_grad():
        stream = part.embed_tokens(pixels if tower == "vision" else ids)
        for layer in (1, 0, 1):
            stream = part.blocks[layer](stream)
        if tower == "vision":
            expected = part.proj(part.ln_post(stream[:, 0]))
        else:
            rows = torch.arange(len(ids))
            expected = part.proj(part.ln_final(stream)[rows, part.eos_positions(ids)])
    kept = keep_layers(model, tower, [1, 0, 1])
    assert torch.equal(run(kept, tower), expected)
    assert getattr(kept.config, tower).layers == len(getattr(kept, tower).blocks) == 3
    assert_far(run(keep_layers(model, tower, [0, 1]), tower), expected)
    blocks = getattr(kept, tower).blocks
    blocks[0].ln_1.weight.data += 1  # a layer that is listed twice becomes two layers
    assert not torch.equal(blocks[0].ln_1.weight, blocks[2].ln_1.weight)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("tower", TOWERS)
def test_surgery_that_removes_and_adds_nothing_returns_an_equal_copy(model, tower):
    part = getattr(TINY, tower)
    for same in (
        prune_heads(model, tower, {}),
        prune_heads(model, tower, {0: []}),
        prune_neurons(model, tower, {}),
        keep_layers(model, tower, range(part.layers)),
        copied(resize_image(model, TINY.vision.image_size)),
        resize_patch(model, TINY.vision.patch_size),
        extend_context(model, TINY.text.context_length),
        add_tokens(model, 0),
        add_registers(model, 0),
    ):
        assert_same_weights(same, model)
        assert same is not model
        theirs = {p.data_ptr() for p in model.parameters()}
        assert not any(p.data_ptr() in theirs for p in same.parameters())


def test_a_resized_model_shares_unchanged_tensors_with_the_given_model(model):
    """A copy of B/16's unchanged tensors would take 582 MB."""
    new = resize_image(model, 64)
    theirs = {p.data_ptr() for p in model.parameters()}
    own = [n for n, p in new.named_parameters() if p.data_ptr() not in theirs]
    assert own == ["vision.pos_embed"]
    assert not any(p.data_ptr() in theirs for p in copied(new).parameters())
    with hooks(new, {"vision.blocks.0": lambda x, name: 0 * x}):  # the two models share no module
        assert not any(m._forward_hooks for m in model.modules())


def test_reconfigure_updates_the_config_of_a_changed_model(tmp_path):
    model = copied(tiny_clip())
    for block in model.text.blocks:
        block.mlp.act = nn.GELU()
    with pytest.raises(ValueError, match="act is GELU, expected QuickGELU"):
        model.save_pretrained(tmp_path)
    assert reconfigure(model, "text", act="gelu") is model
    model.save_pretrained(tmp_path)
    pixels, ids = random_inputs(TINY)
    with torch.no_grad():
        found = CLIP.from_pretrained(tmp_path)(pixels, ids).logits_per_image
        assert torch.equal(found, model(pixels, ids).logits_per_image)
    with pytest.raises(ValueError, match="tower is 'texts'; expected 'vision' or 'text'"):
        reconfigure(model, "texts", act="gelu")
    said = "VisionConfig has no field stride; .* patch_size.* the stride is the patch_size"
    with pytest.raises(ValueError, match=said):
        reconfigure(model, "vision", stride=4)
    with pytest.raises(ValueError, match="TextConfig has no field depth; .*vocab_size[^.]*$"):
        reconfigure(model, "text", depth=4)


@pytest.mark.parametrize("change", [{"stride": (4, 4)}, {"padding": (2, 2)}])
def test_patch_grid_raises_an_error_for_overlapping_or_padded_patches(change):
    model = copied(tiny_clip())
    for name, value in change.items():
        setattr(model.vision.patch_embed, name, value)
    with pytest.raises(ValueError, match="patch_embed is Conv2d.* expected .* size of a patch"):
        patch_grid(model.vision, torch.zeros(1, 3, 40, 40))
    model.vision.patch_embed = nn.Conv2d(3, 48, 8, stride=8, padding="valid")
    assert patch_grid(model.vision, torch.zeros(1, 3, 40, 48)) == (5, 6)


# ------------------------------------------------------------------------------- other images

SIZES = [(56, 56), (24, 24), (40, 72), (80, 24), (200, 8), (45, 51)]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_resize_image_gives_the_same_embedding_as_in_transformers(size):
    ours, theirs = twins(TINY, dtype=torch.float64)
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = theirs.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    resized = resize_image(ours, size)
    assert_close(resized.encode_image(pixels), expected)
    if size != (200, 8):  # at 200 x 8, the grid has only one column
        for other in ("timm", "openai-bilinear", "dino"):
            with pytest.raises(AssertionError):
                assert_close(resize_image(ours, size, other).encode_image(pixels), expected)


def kernel(t, a):
    t = abs(t)
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def resampling_matrix(old, new, method):
    """Return the matrix (new, old) that resamples a line of `old` samples to `new` samples."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    scale = old / (new + 0.1) if method == "dino" else old / new
    for i in range(new):
        centre = (i + 0.5) * scale - 0.5
        if method == "timm":  # as in Pillow, the kernel is wider if the size shrinks
            wide = max(scale, 1)
            weights = [kernel((j - centre) / wide, -0.5) for j in range(old)]
            matrix[i] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        elif method == "openai-bilinear":
            centre = max(centre, 0)
            low = min(math.floor(centre), old - 1)
            matrix[i, low] += 1 - (centre - low)
            matrix[i, min(low + 1, old - 1)] += centre - low
        else:  # beyond the ends, the first or last sample is repeated
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                matrix[i, min(max(j, 0), old - 1)] += kernel(j - centre, -0.75)
    return matrix


@pytest.mark.sweep(5)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["transformers", "timm", "openai-bilinear", "dino"])
def test_resize_image_follows_the_formula_of_each_method(size, method):
    model = tiny_clip(torch.float64)
    pos_embed = model.vision.pos_embed.detach()
    resized = resize_image(model, size, method)
    rows, columns = (n // 8 for n in size)
    down, across = (resampling_matrix(5, n, method) for n in (rows, columns))
    picture = pos_embed[1:].view(5, 5, -1)
    expected = torch.einsum("ri,cj,ijw->rcw", down, across, picture).flatten(0, 1)
    if (rows, columns) != (5, 5):
        assert_close(resized.vision.pos_embed[1:].detach(), expected)
    assert torch.equal(resized.vision.pos_embed[0], pos_embed[0])
    assert resized.config.vision.image_size == (size[0] if size[0] == size[1] else size)


def test_a_new_grid_with_the_same_number_of_patches_gets_a_new_position_embedding():
    config = replace(TINY, vision=replace(TINY.vision, image_size=32))
    model, _ = twins(config)
    wide = resize_image(model, (16, 64))  # 4 x 4 patches become 2 x 8
    assert wide.vision.pos_embed.shape == model.vision.pos_embed.shape
    assert_far(wide.vision.pos_embed, model.vision.pos_embed)
    constant = CLIP_like(model)
    constant.vision.pos_embed.data[1:] = 0.7
    assert (resize_image(constant, (16, 64)).vision.pos_embed[1:] - 0.7).abs().max() < 1e-6


def test_half_precision_weights_are_resampled_in_float32():
    model = tiny_clip()
    model = model.bfloat16()
    found = resize_image(model, 72).vision.pos_embed
    expected = resize_image(model.float(), 72).vision.pos_embed.bfloat16()
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@pytest.fixture(scope="module")
def recorded():
    """The values that record_timm.py recorded from timm and open_clip."""
    return json.loads(record_timm.PATH.read_text())


def assert_recorded(found, values, tolerance=1e-6):
    """Assert equality within float32's rounding error, because timm resamples in float32."""
    values = torch.tensor(values, dtype=torch.float64)
    assert found.shape == values.shape and (found.detach() - values).abs().max() < tolerance


def resized_table(old, new, method):
    config = VisionConfig(width=2, layers=1, heads=1, image_size=old, patch_size=1)
    model = CLIP(replace(TINY, vision=config)).double()
    model.vision.pos_embed.data = record_timm.waves(1 + old[0] * old[1], 2)
    return resize_image(model, new, method).vision.pos_embed


@pytest.mark.slow
def test_resize_image_gives_the_same_position_embedding_as_timm_and_open_clip(recorded):
    for (old, new), values in zip(record_timm.GRIDS, recorded["timm.pos_embed"], strict=True):
        assert_recorded(resized_table(old, new, "timm"), values)
        for other in ("transformers", "openai-bilinear", "dino"):
            with pytest.raises(AssertionError):
                assert_recorded(resized_table(old, new, other), values, tolerance=1e-3)
    square = [(old, new) for old, new in record_timm.GRIDS if old[0] == old[1]]
    for (old, new), values in zip(square, recorded["open_clip.pos_embed"], strict=True):
        if math.prod(old) == math.prod(new):
            continue  # open_clip keeps a table that has the right number of rows
        assert_recorded(resized_table(old, new, "timm"), values)


def test_patches_are_resized_as_in_timm(recorded):
    for (old, new), values in zip(record_timm.PATCHES, recorded["timm.patch_embed"], strict=True):
        config = VisionConfig(
            width=1, layers=1, heads=1, image_size=old, patch_size=old, channels=2
        )
        model = CLIP(replace(TINY, vision=config)).double()
        model.vision.patch_embed.weight.data = record_timm.waves(1, 2, old, old)
        found = resize_patch(model, new).vision.patch_embed.weight
        assert_recorded(found, values, tolerance=1e-5)  # timm's pseudo-inverse is in float32
        with pytest.raises(AssertionError):
            assert_recorded(found.flip(2), values, tolerance=1e-3)


def test_resize_channels_computes_the_same_weights_as_timm(recorded):
    model = CLIP(replace(TINY, vision=replace(TINY.vision, width=12, heads=2, patch_size=2)))
    model.vision.patch_embed.weight.data[:2] = record_timm.waves(2, 3, 2, 2)
    for channels, values in zip(record_timm.CHANNELS, recorded["timm.channels"], strict=True):
        found = resize_channels(model, channels)
        assert found.config.vision.channels == channels
        expected = torch.tensor(values)
        assert (found.vision.patch_embed.weight[:2] - expected).abs().max() < 1e-6
        assert expected.shape[1] == channels
    assert resize_channels(model, 3).state_dict().keys() == model.state_dict().keys()


def test_a_model_with_one_channel_embeds_grey_images_like_the_original():
    model = tiny_clip().double()
    grey = random_inputs(TINY)[0].double()[:, :1]
    expected = model.encode_image(grey.expand(-1, 3, -1, -1))
    for channels in (1, 2, 4, 6):
        found = resize_channels(model, channels).encode_image(grey.expand(-1, channels, -1, -1))
        if channels in (1, 6):  # each colour occurs equally often
            torch.testing.assert_close(found, expected)
        assert found.shape == expected.shape
    with pytest.raises(ValueError, match="channels is 0"):
        resize_channels(model, 0)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_with_1_or_4_channels_is_saved_and_loaded(channels, tmp_path):
    model = resize_channels(tiny_clip(), channels)
    model.save_pretrained(tmp_path)
    again = CLIP.from_pretrained(tmp_path)
    pixels = torch.rand(2, channels, 40, 40)
    assert torch.equal(again.encode_image(pixels), model.encode_image(pixels))
    with torch.no_grad():
        theirs = CLIPModel.from_pretrained(tmp_path).vision_model(pixels)
        ours = model.vision.pool(model.vision.blocks(model.vision.embed_tokens(pixels)))
    torch.testing.assert_close(theirs.pooler_output, ours)


def test_extend_context_stretches_the_position_embedding_as_in_open_clip(recorded):
    values = recorded["open_clip.text_pos_embed"]
    for (old, new), values in zip(record_timm.CONTEXTS, values, strict=True):
        config = replace(TINY.text, width=2, heads=1, context_length=old)
        model = CLIP(replace(TINY, text=config)).double()
        model.text.pos_embed.data = record_timm.waves(old, 2)
        assert_recorded(extend_context(model, new, method="linear").text.pos_embed, values)
        with pytest.raises(AssertionError):
            assert_recorded(extend_context(model, new, keep=0).text.pos_embed, values, 1e-3)


def test_a_resized_model_gives_the_same_embedding_as_in_timm(recorded):
    tower = record_timm.small_tower()
    model = CLIP(CLIPConfig(record_timm.VISION, TINY.text, record_timm.EMBED_DIM)).double()
    model.vision = tower
    pixels = record_timm.waves(1, 3, 20, 16)
    resized = resize_image(model, (20, 16), "timm").encode_image(pixels)
    assert_recorded(resized, recorded["timm.resized_embedding"])
    other = resize_image(model, (20, 16), "transformers").encode_image(pixels)
    with pytest.raises(AssertionError):
        assert_recorded(other, recorded["timm.resized_embedding"], tolerance=1e-3)


def resize_matrix(old, new):
    """Return timm's resampling as a matrix (new * new, old * old)."""
    line = resampling_matrix(old, new, "timm").numpy()
    return np.kron(line, line)


@pytest.mark.parametrize("size", [4, 7, 12, 16])
def test_resize_patch_multiplies_the_weights_by_a_pseudo_inverse(size):
    model = tiny_clip(torch.float64)
    resized = resize_patch(model, size)
    matrix = resize_matrix(8, size)
    old = model.vision.patch_embed.weight.detach().numpy()
    expected = np.zeros((*old.shape[:2], size, size))
    inverse = np.linalg.pinv(matrix.T)
    for w in range(old.shape[0]):
        for c in range(old.shape[1]):
            expected[w, c] = (inverse @ old[w, c].reshape(-1)).reshape(size, size)
    assert_close(resized.vision.patch_embed.weight.detach(), torch.from_numpy(expected))
    assert resized.config.vision.image_size == 5 * size
    assert resized.config.vision.patches == TINY.vision.patches


@torch.no_grad()
def test_resize_patch_keeps_the_embeddings_if_the_images_are_resized_too():
    model = tiny_clip(torch.float64)
    pixels = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8)  # (2, 3, 5, 5, 8, 8)
    large = F.interpolate(patches.reshape(-1, 1, 8, 8), (12, 12), mode="bicubic", antialias=True)
    large = large.view(2, 3, 5, 5, 12, 12).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 60, 60)
    resized = resize_patch(model, 12)
    assert_close(resized.encode_image(large), model.encode_image(pixels))
    plain = CLIP_like(resized)  # a control: resampling the kernel is not enough
    plain.vision.patch_embed.weight.copy_(
        F.interpolate(model.vision.patch_embed.weight, (12, 12), mode="bicubic") * (8 / 12) ** 2
    )
    assert_far(plain.encode_image(large), model.encode_image(pixels))


# -------------------------------------------------------------------------------- longer texts


def longclip(rows, keep, times):
    """Interpolate between rows, and extrapolate after the last row, as Long-CLIP does."""
    out = [rows[i] for i in range(keep)]
    for i in range(keep, len(rows)):
        low = min(i, len(rows) - 2)
        for part in range(times):
            out.append(rows[i] + part / times * (rows[low + 1] - rows[low]))
    return torch.stack(out)


def linear(rows, count):
    out = []
    for i in range(count):
        place = max((i + 0.5) * len(rows) / count - 0.5, 0)
        low = math.floor(place)
        high = min(low + 1, len(rows) - 1)
        out.append(rows[low] + (place - low) * (rows[high] - rows[low]))
    return torch.stack(out)


def test_extend_context_follows_the_published_formulas(model):
    rows = model.text.pos_embed.detach()
    stretched = extend_context(model, 8 + 12 * 4, keep=8)
    assert_close(stretched.text.pos_embed.detach(), longclip(rows, 8, 4))
    assert torch.equal(stretched.text.pos_embed[:8], rows[:8])
    straight = extend_context(model, 33, method="linear").text.pos_embed.detach()
    assert_close(straight, linear(rows, 33))
    for keep in (5, 18):  # at least 2 of the 20 rows must be stretched
        kept = extend_context(model, 33, method="linear", keep=keep).text.pos_embed.detach()
        assert_close(kept, torch.cat([rows[:keep], linear(rows[keep:], 33 - keep)]))
    assert_far(stretched.text.pos_embed[:33], straight)


def test_extend_context_turns_77_positions_into_the_248_positions_of_long_clip():
    config = replace(TINY, text=replace(TINY.text, context_length=77))
    model, _ = twins(config, dtype=torch.float64)
    expected = longclip(model.text.pos_embed.detach(), 20, 4)
    assert_close(extend_context(model, 248).text.pos_embed.detach(), expected)


@torch.no_grad()
def test_a_text_that_ends_at_an_unchanged_position_has_the_same_embedding(model):
    _, ids = random_inputs(TINY, texts=4, tokens=9)
    stretched = extend_context(model, 60, keep=9)
    assert torch.equal(stretched.encode_text(ids), model.encode_text(ids))
    moved = extend_context(model, 60, keep=4)
    assert_far(moved.encode_text(ids[:1]), model.encode_text(ids[:1]))
    _, long = random_inputs(stretched.config, texts=2, tokens=60)
    assert stretched.encode_text(long).isfinite().all()
    with pytest.raises(ContextLengthError):
        model.encode_text(long)


@torch.no_grad()
def test_new_tokens_get_the_given_embeddings_or_the_mean_embedding(model):
    rows = torch.randn(3, TINY.text.width, dtype=model.logit_scale.dtype)
    larger = add_tokens(model, rows)
    _, ids = random_inputs(TINY)
    assert torch.equal(larger.encode_text(ids), model.encode_text(ids))
    assert torch.equal(larger.text.token_embed(torch.tensor([600, 602])), rows[[0, 2]])
    assert larger.text.token_embed.num_embeddings == larger.config.text.vocab_size == 603
    mean = add_tokens(model, 2).text.token_embed.weight[600:]
    assert_close(mean, model.text.token_embed.weight.mean(0).expand(2, -1))
    ids[0, 0] = 601
    assert_far(larger.encode_text(ids)[:1], add_tokens(model, 2).encode_text(ids)[:1])


@torch.no_grad()
def test_new_tokens_do_not_change_the_legacy_end_token():
    config = replace(TINY, text=replace(TINY.text, eos_token_id=2, bos_token_id=0))
    model, _ = twins(config)
    _, ids = random_inputs(config)
    larger = add_tokens(model, model.text.token_embed.weight[5:6])  # id 600 gets a copy of row 5
    assert torch.equal(larger.encode_text(ids), model.encode_text(ids))
    marked = ids.clone()
    marked[:, 0], ids[:, 0] = 600, 5
    assert torch.equal(larger.encode_text(marked), model.encode_text(ids))


# ------------------------------------------------------------------------------------ registers


@torch.no_grad()
def test_registers_stand_between_class_token_and_patches(model):
    rows = torch.randn(3, TINY.vision.width, dtype=model.logit_scale.dtype)
    more = add_registers(add_registers(model, rows[:1]), rows[1:])
    pixels, _ = inputs_of(model)
    stream, plain = more.vision.embed_tokens(pixels), model.vision.embed_tokens(pixels)
    assert torch.equal(stream[:, [0, *range(4, 29)]], plain)
    assert_close(stream[:, 1:4], model.vision.ln_pre(rows).expand(2, -1, -1))
    assert torch.equal(add_registers(model, 2).vision.register_embed, torch.zeros(2, 48).to(rows))
    found = more.encode_image(pixels)
    assert_close(add_registers(model, rows[[2, 0, 1]]).encode_image(pixels), found)  # in any order
    assert_far(found, model.encode_image(pixels))
    assert_close(more.encode_image(pixels[:1]), found[:1])  # each image of a batch gets registers

    def masked(scores, name):
        scores = scores.clone()
        scores[..., 1:4] = -torch.inf
        return scores

    with hooks(more, {"vision.blocks.*.attn.scores": masked}):
        assert_close(more.encode_image(pixels), model.encode_image(pixels))


# --------------------------------------------------- save and load, composition and transformers

EVERY_LAYER = {tower: range(getattr(TINY, tower).layers) for tower in TOWERS}
EXPRESSIBLE = {
    "layers": lambda m: keep_layers(keep_layers(m, "vision", [2, 0]), "text", [1, 0, 1]),
    "neurons": lambda m: prune_neurons(m, "text", {i: [i, 7] for i in EVERY_LAYER["text"]}),
    "a larger image": lambda m: resize_image(m, 72, "timm"),
    "a larger patch": lambda m: resize_patch(m, 12),
    "a longer text": lambda m: extend_context(m, 50, keep=5),
    "new tokens": lambda m: add_tokens(m, 3),
    "all of them": lambda m: add_tokens(
        extend_context(resize_image(resize_patch(keep_layers(m, "text", [1]), 6), 48), 30, keep=0),
        torch.ones(2, TINY.text.width),
    ),
}
BEYOND = {
    "heads": lambda m: prune_heads(m, "vision", {0: [1], 2: [0, 3]}),
    "heads of a text": lambda m: prune_heads(m, "text", {1: [1]}),
    "a head of each layer": lambda m: prune_heads(m, "text", {i: [0] for i in range(2)}),
    "a head of each image layer": lambda m: prune_heads(m, "vision", {i: [0] for i in range(3)}),
    "neurons of one layer": lambda m: prune_neurons(m, "vision", {1: range(10)}),
    "a wide image": lambda m: resize_image(m, (40, 72)),
    "a wide image of as many patches": lambda m: resize_image(m, (8, 200)),
    "registers": lambda m: add_registers(m, 4),
    "all of them": lambda m: keep_layers(
        prune_neurons(
            prune_heads(add_registers(resize_image(m, (32, 64)), 2), "vision", {1: [0, 1]}),
            "vision", {0: [4], 2: range(60)},
        ),
        "vision", [2, 1],
    ),
}  # fmt: skip


@pytest.mark.sweep(4)
@pytest.mark.parametrize("surgery", [*EXPRESSIBLE.values(), *BEYOND.values()])
def test_a_model_after_surgery_is_saved_and_loaded_bit_for_bit(surgery, tmp_path):
    model = tiny_clip()
    changed = surgery(model)
    assert_same_weights(model, tiny_clip())  # the given model is unchanged
    changed.save_pretrained(tmp_path)
    again = CLIP.from_pretrained(tmp_path)
    assert_same_weights(again, changed)
    for tower in TOWERS:
        assert torch.equal(run(again, tower), run(changed, tower))
    assert CLIP(changed.config).config.to_dict() == again.config.to_dict()


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", EXPRESSIBLE)
@torch.no_grad()
def test_models_that_transformers_can_express_have_the_same_logits_in_transformers(name, tmp_path):
    model = EXPRESSIBLE[name](tiny_clip(torch.float64))
    model.save_pretrained(tmp_path)
    theirs = CLIPModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    pixels, ids = inputs_of(model, tokens=12)
    expected = theirs(pixel_values=pixels, input_ids=ids).logits_per_image
    assert_close(model(pixels, ids).logits_per_image, expected)
    assert not beyond_transformers(vars(model.config.vision)) + beyond_transformers(
        vars(model.config.text)
    )


@pytest.mark.sweep(4)
@pytest.mark.parametrize("name", BEYOND)
def test_transformers_cannot_load_a_model_that_it_would_compute_wrongly(name, tmp_path):
    model = BEYOND[name](tiny_clip())
    model.save_pretrained(tmp_path)
    for theirs in (CLIPModel, AutoModel):
        with pytest.raises(
            Exception, match="(num_attention_heads|intermediate_size).* expected int, got list"
        ):
            theirs.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="transformers' CLIP cannot express"):
        transformers_twin(model)


@pytest.mark.slow
def test_with_a_single_head_count_transformers_silently_ignores_registers(tmp_path):
    """transformers would ignore registers. A list of head counts makes it raise an error."""
    model = add_registers(tiny_clip(), 4)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["vision_config"]["num_attention_heads"] == [4, 4, 4]
    written["vision_config"]["num_attention_heads"] = 4
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = CLIPModel.from_pretrained(tmp_path).eval()
    pixels, _ = inputs_of(model)
    with torch.no_grad():
        assert_far(theirs.get_image_features(pixels).pooler_output, run(model, "vision"))
    assert CLIP.from_pretrained(tmp_path).config == model.config  # 4 means 4 heads in each layer


def test_a_default_config_has_only_entries_that_transformers_knows():
    written = CLIPConfig().to_dict()
    assert [*written["vision_config"]] == [
        "model_type", "projection_dim", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size", "hidden_act", "layer_norm_eps", "image_size", "patch_size",
        "num_channels",
    ]  # fmt: skip
    assert written["text_config"]["num_attention_heads"] == 8 and "head_dim" not in str(written)


@pytest.mark.slow
def test_surgery_operations_on_different_parts_commute():
    model = tiny_clip(torch.float64)
    changes = [
        lambda m: resize_image(m, (56, 40)),
        lambda m: prune_heads(m, "vision", {1: [0]}),
        lambda m: prune_neurons(m, "vision", {0: [3]}),
        lambda m: add_registers(m, 2),
        lambda m: extend_context(m, 30, keep=3),
    ]
    one = other = model
    for change in changes:
        one = change(one)
    for change in reversed(changes):
        other = change(other)
    assert_same_weights(one, other)
    twice = prune_heads(prune_heads(model, "vision", {1: [0]}), "vision", {1: [1]})
    assert_same_weights(twice, prune_heads(model, "vision", {1: [0, 2]}))  # head 2 became head 1


@pytest.mark.sweep(4)
@pytest.mark.parametrize("by", ["layer", "head", "token"])
@pytest.mark.parametrize("name", [*BEYOND, "LoRA"])
def test_a_model_after_surgery_is_decomposed_exactly(name, by):
    model = tiny_clip(torch.float64)
    model = add_lora(model) if name == "LoRA" else BEYOND[name](model)
    for parameter in model.parameters():
        if not parameter.any():  # registers and LoRA's B are zero at first
            parameter.data.normal_()
    for tower, x in zip(TOWERS, inputs_of(model)):
        whole = run(model, tower)
        terms = decompose(model, x, by=by).values()
        total = sum(part.flatten(1, -2).sum(1) if part.ndim > 2 else part for part in terms)
        assert (total - whole).abs().max() < 1e-12 * whole.abs().max()


@pytest.mark.sweep(4)
@pytest.mark.parametrize("name", BEYOND)
def test_the_table_of_parts_counts_every_parameter(name):
    model = BEYOND[name](tiny_clip())
    rows = parts(model.config)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())


def test_the_parity_command_names_the_feature_that_transformers_cannot_express(tmp_path, capsys):
    add_registers(tiny_clip(), 4).save_pretrained(tmp_path)
    assert main(["parity", str(tmp_path)]) == 2
    assert "transformers' CLIP cannot express registers 4" in capsys.readouterr().err


@pytest.mark.slow
def test_surgery_copies_no_hooks():
    model = tiny_clip()
    seen = []
    with hooks(model, {"vision.blocks.*.attn": lambda x, name: seen.append(name)}):
        changed = [change(model) for change in (*EXPRESSIBLE.values(), *BEYOND.values(), add_lora)]
        changed += [merge_lora(changed[-1]), average([model]), interpolate(model, model, 0.5)]
        for new in changed:
            assert not any(module._forward_hooks for module in new.modules())
            run(new, "vision")
        assert not seen
        run(model, "vision")
    assert len(seen) == 3 and not any(module._forward_hooks for module in model.modules())


def test_surgery_keeps_requires_grad_and_the_attention_setting():
    model = tiny_clip()
    model.set_attention("eager")
    model.vision.requires_grad_(False)
    for change in (*EXPRESSIBLE.values(), *BEYOND.values()):
        changed = change(model)
        assert not any(p.requires_grad for n, p in changed.vision.named_parameters()
                       if n != "register_embed")  # fmt: skip
        assert all(p.requires_grad for p in changed.text.parameters())
        assert all(b.attn.eager for b in changed.vision.blocks) and not changed.training


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch.*")
def test_surgically_changed_models_train_and_compile():
    model = BEYOND["all of them"](tiny_clip())
    pixels, ids = inputs_of(model)
    expected = model(pixels, ids).logits_per_image
    expected.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(pixels, ids).logits_per_image, expected)
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------- errors

REFUSED = {
    "no head 4": (
        lambda m: prune_heads(m, "vision", {0: [4]}),
        "vision layer 0: no heads [4]; expected",
    ),
    "no layer 3": (lambda m: prune_heads(m, "vision", {3: [0]}), "no layer 3 in the vision tower"),
    "no layer -1": (lambda m: keep_layers(m, "text", [-1]), "no layer -1 in the text tower"),
    "no heads of layer -1": (
        lambda m: prune_heads(m, "text", {-1: [0]}),
        "no layer -1 in the text",
    ),
    "no head -1": (
        lambda m: prune_heads(m, "vision", {0: [-1]}),
        "layer 0: no heads [-1]; expected",
    ),
    "no neuron": (
        lambda m: prune_neurons(m, "text", {0: [92]}),
        "text layer 0: no neurons [92]; exp",
    ),
    "no neuron -1": (
        lambda m: prune_neurons(m, "text", {0: [-1]}),
        "layer 0: no neurons [-1]; exp",
    ),
    "no layers": (lambda m: keep_layers(m, "text", []), "no layers are left in the text tower"),
    "no tower": (lambda m: prune_heads(m, "image", {}), "tower is 'image'; expected 'vision'"),
    "too small": (lambda m: resize_image(m, 7), "patch_size 8 is larger than image_size 7"),
    "half a pixel": (lambda m: resize_image(m, 7.5), "image_size is 7.5; expected a positive"),
    "three sides": (lambda m: resize_image(m, (8, 8, 8)), "expected one positive whole number, or"),
    "no method": (lambda m: resize_image(m, 48, "bicubic"), "expected one of transformers, timm"),
    "patch 0": (lambda m: resize_patch(m, 0), "patch_size is 0; expected a positive whole"),
    "shorter": (lambda m: extend_context(m, 10, keep=0), "cannot stretch 20 positions to 10"),
    "too much kept": (lambda m: extend_context(m, 40), "`keep` from 0 to 18"),
    "one too many kept": (lambda m: extend_context(m, 40, keep=19), "keep=19: expected"),
    "-1 kept": (lambda m: extend_context(m, 40, keep=-1), "keep=-1: expected"),
    "no rule": (lambda m: extend_context(m, 40, method="cubic"), "expected longclip or linear"),
    "-1 tokens": (lambda m: add_tokens(m, -1), "a number of new tokens, 0 or more, found -1"),
    "True tokens": (lambda m: add_tokens(m, True), "a number of new tokens, 0 or more, found True"),
    "thin tokens": (lambda m: add_tokens(m, torch.ones(2, 39)), "expected (count, 40)"),
    "flat registers": (lambda m: add_registers(m, torch.ones(48)), "expected (count, 48)"),
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", REFUSED)
def test_impossible_surgery_is_an_error(name):
    model = tiny_clip()
    operation, words = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        operation(model)
    assert_same_weights(model, tiny_clip())


@pytest.mark.parametrize("part", ["", ".attn", ".mlp"])
def test_pruning_a_part_that_two_blocks_share_is_an_error(part):
    model = tiny_clip()
    model.set_submodule(f"text.blocks.1{part}", model.get_submodule(f"text.blocks.0{part}"))
    prunings = {".attn": prune_heads, ".mlp": prune_neurons}
    for where, prune in prunings.items():
        expected = f"text.blocks.0{where}: a module with several names.*share its parameters"
        if part in ("", where):
            with pytest.raises(ValueError, match=expected):
                prune(model, "text", {0: [1]})
        else:
            prune(model, "text", {0: [1]})


@pytest.mark.parametrize("make, words", [
    (lambda: VisionConfig(heads=(12,) * 11), "12 of them, one for each layer"),
    (lambda: VisionConfig(heads=(12,) * 11 + (6,)), "different numbers of heads need a head_width"),
    (lambda: VisionConfig(heads=(12.0,) * 12), "expected one positive whole number, or 12"),
    (lambda: TextConfig(mlp_width=(2048,) * 11 + (-1,)), "expected one positive whole number, or"),
    (lambda: TextConfig(head_width=0), "head_width is 0; expected a positive whole number"),
    (lambda: VisionConfig(image_size=(224, 0)), "one for the height and one for the width"),
    (lambda: VisionConfig(image_size=(224, 31)), "patch_size 32 is larger than image_size"),
    (lambda: VisionConfig(registers=-1), "registers is -1; expected a whole number, 0 or more"),
])  # fmt: skip
def test_impossible_configs_are_an_error(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_equivalent_configs_are_equal():
    assert VisionConfig(heads=(12,) * 12, head_width=64, image_size=(224, 224)) == VisionConfig()
    assert TextConfig(mlp_width=(2048,) * 12) == TextConfig()
    assert hash(VisionConfig(image_size=(224, 224))) == hash(VisionConfig())
    assert VisionConfig(image_size=(224, 320)).grid == (7, 10)


def test_randomize_also_fills_registers_with_random_numbers():
    model = CLIP(add_registers(tiny_clip(), 2).config)
    randomize(model)
    assert model.vision.register_embed.std() > 0.1
