"""Compare the lens with transformers and with slow implementations, and check the sums of parts.

All parameters are random, so that a lost bias or LayerNorm is noticed. Most tests use float64.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import record_timm
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image, ImageColor
from torch import nn
from torch.ao.quantization import quantize_dynamic
from twin import TINY, random_inputs, tiny_clip, twins

import miniclip
from miniclip.lens.attention import attention_maps, relevance, rollout
from miniclip.lens.decompose import ablate_contributions, check_sum, decompose
from miniclip.lens.heat import (
    BLIND,
    HEAT_COLOURS,
    METHODS,
    head_map,
    heatmap,
    occlusion,
    overlay,
    seen,
    text_map,
    text_maps,
)
from miniclip.lens.reading import on_grid
from miniclip.lens.streams import forward_intermediates, logit_lens
from miniclip.sites import cache, hooks
from miniclip.surgery import prune_heads
from miniclip.world.localise import answers, localisation, localise, questions
from miniclip.world.scenes import COLOURS, scene
from miniclip.world.scoring import SCORE_SEED

FLOAT64 = 1e-10
TOWERS = ["vision", "text"]


@pytest.fixture
def double():
    model = tiny_clip(torch.float64)
    model.set_attention("eager")
    pixels, ids = random_inputs(TINY)
    return model, {"vision": pixels.double(), "text": ids}


def encode(model, tower, x):
    with torch.no_grad():
        return getattr(model, tower)(x)


def distance(one, other):
    assert one.shape == other.shape
    return (one - other).abs().max().item()


def total(parts, E=TINY.embed_dim):
    return sum(part.reshape(len(part), -1, E).sum(1) for part in parts.values())


def positions(model, tower, x):
    return model.text.eos_positions(x) if tower == "text" else torch.zeros(len(x)).long()


# --------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("tower", TOWERS)
def test_attention_maps_are_the_attentions_of_transformers(tower):
    ours, theirs = twins(TINY, attention="eager")
    x = random_inputs(TINY)[tower == "text"]
    with torch.no_grad():
        peer = getattr(theirs, f"{tower}_model")(x, output_attentions=True).attentions
    maps = attention_maps(ours, x)
    assert len(maps) == len(peer) and all(map(torch.equal, maps, peer))
    bare = attention_maps(getattr(ours, tower), x)
    assert all(map(torch.equal, maps, bare))


@pytest.mark.parametrize("tower", TOWERS)
def test_rollout_is_a_random_walk_over_the_tokens(double, tower):
    """At each step the walk stays with probability 1/2, or follows the heads' mean pattern."""
    model, inputs = double
    x = inputs[tower]
    maps = attention_maps(model, x)
    result = rollout(model, x)
    for b, start in enumerate(positions(model, tower, x).tolist()):
        share = {start: 1.0}
        for pattern in reversed(maps):
            after = {}
            for token, weight in share.items():
                after[token] = after.get(token, 0) + weight / 2
                for to, p in enumerate(pattern[b, :, token].mean(0).tolist()):
                    after[to] = after.get(to, 0) + weight * p / 2
            share = after
        expected = torch.tensor([share.get(t, 0) for t in range(result.shape[1])]).double()
        assert distance(result[b], expected) < 1e-7  # torch.tensor turns a list into float32
    assert distance(result.sum(1), torch.ones(len(x)).double()) < FLOAT64
    assert distance(result, rollout(getattr(model, tower), x)) == 0


def test_relevance_equals_its_formula(double):
    """Finite differences confirm one slope. Loops compute equations 5 and 6 of Chefer et al."""
    model, inputs = double
    pixels, ids = inputs["vision"], inputs["text"][:2]
    result = relevance(model, pixels, ids)
    names = [f"{t}.blocks.{i}.attn.pattern" for t in TOWERS for i in range(3 - (t == "text"))]
    with cache(model, *names, grad=True) as acts:
        logits = model(pixels, ids).logits_per_image
    slopes = {
        n: torch.autograd.grad(logits.diag().sum(), acts[n], retain_graph=True)[0] for n in names
    }

    name, place = "vision.blocks.1.attn.pattern", (1, 2, 5, 3)
    nudge = torch.zeros_like(slopes[name])
    nudge[place] = 1e-5
    with torch.no_grad():
        with hooks(model, {name: lambda x, _: x + nudge}):
            up = model(pixels, ids).logits_per_image[1, 1]
        with hooks(model, {name: lambda x, _: x - nudge}):
            down = model(pixels, ids).logits_per_image[1, 1]
    assert abs((up - down).item() / 2e-5 - slopes[name][place].item()) < 1e-5

    for tower, x, got in (("vision", pixels, result.image), ("text", ids, result.text)):
        for b, at in enumerate(positions(model, tower, x).tolist()):
            R = np.eye(got.shape[1])
            for n in names:
                if n.startswith(tower):
                    heads = zip(acts[n][b].detach().numpy(), slopes[n][b].numpy(), strict=True)
                    R = R + np.mean([np.maximum(a * g, 0) for a, g in heads], axis=0) @ R
            assert distance(got[b], torch.from_numpy(R[at])) < FLOAT64 * np.abs(R).max()


def test_relevance_of_a_pair_does_not_depend_on_the_rest_of_the_batch(double):
    model, inputs = double
    pixels, ids = inputs["vision"], inputs["text"][:2]
    both = relevance(model, pixels, ids)
    alone = relevance(model, pixels[1:], ids[1:])
    assert torch.allclose(both.image[1:], alone.image, rtol=1e-9)
    assert torch.allclose(both.text[1:], alone.text, rtol=1e-9)
    swapped = relevance(model, pixels, ids.flip(0))
    assert distance(swapped.image, both.image) > 1e-2  # a different text gives a different map
    for method in ("relevance", "gradcam", "occlusion"):
        with pytest.raises(ValueError, match="2 images and 3 texts"):
            METHODS[method](model, pixels, inputs["text"])


def test_relevance_works_if_the_caller_has_disabled_gradients(double):
    model, inputs = double
    pixels, ids = inputs["vision"], inputs["text"][:2]
    expected = relevance(model, pixels, ids)
    model.requires_grad_(False)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = relevance(model, pixels * 1, ids)
        assert torch.equal(result.image, expected.image) and torch.equal(result.text, expected.text)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_relevance_can_start_at_the_last_block(double):
    model, inputs = double
    pixels, ids = inputs["vision"], inputs["text"][:2]
    last = relevance(model, pixels, ids, start=-1)
    name = "vision.blocks.2.attn.pattern"
    with cache(model, name, grad=True) as acts:
        logits = model(pixels, ids).logits_per_image
    (slope,) = torch.autograd.grad(logits.diag().sum(), acts[name])
    expected = (slope * acts[name]).clamp(min=0).mean(1)[:, 0].detach()
    expected[:, 0] += 1
    assert torch.allclose(last.image, expected, rtol=1e-9)
    none = relevance(model, pixels, ids, start=2).text  # the text tower has only blocks 0 and 1
    assert (
        none.tolist() == nn.functional.one_hot(positions(model, "text", ids), ids.shape[1]).tolist()
    )


def test_a_layer_without_heads_mixes_no_tokens(double):
    """If all heads of a layer are pruned, its projections have no rows. Its output is a bias."""
    model, inputs = double
    pixels, ids = inputs["vision"], inputs["text"][:2]
    attn = model.vision.blocks[1].attn
    for linear in (attn.q_proj, attn.k_proj, attn.v_proj):
        linear.weight, linear.bias = (nn.Parameter(p[:0]) for p in linear.parameters())
    attn.out_proj.weight = nn.Parameter(attn.out_proj.weight[:, :0])
    first, none, last = attention_maps(model, pixels)
    assert none.shape[1] == 0
    headless = prune_heads(model, "vision", {2: range(4)})
    assert METHODS["attention"](headless, pixels, ids).tolist() == torch.zeros(2, 5, 5).tolist()
    eye = torch.eye(26, dtype=torch.float64)
    expected = (last.mean(1) + eye) / 2 @ (first.mean(1) + eye) / 2
    assert distance(rollout(model, pixels), expected[:, 0]) < FLOAT64
    assert relevance(model, pixels, ids).image.isfinite().all()
    for by in ("layer", "head", "token"):
        parts = decompose(model, pixels, by)
        assert distance(total(parts), encode(model, "vision", pixels)) < FLOAT64
        assert parts["blocks.1.attn"].abs().sum() == 0


# ----------------------------------------------------------------------------------- decomposition


@pytest.mark.sweep(4)
@pytest.mark.parametrize("by", ["layer", "head", "token"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_parts_sum_to_the_embedding(by, tower, attention):
    for dtype, relative in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        model = tiny_clip(dtype)
        model.set_attention(attention)
        x = random_inputs(TINY)[tower == "text"]
        x = x.to(dtype) if tower == "vision" else x
        expected = encode(model, tower, x)
        parts = decompose(model, x, by)
        assert (total(parts) - expected).norm() / expected.norm() < relative
        for lost in parts:  # if any part is left out, the sum is wrong
            rest = {name: part for name, part in parts.items() if name != lost}
            assert (total(rest) - expected).norm() / expected.norm() > 1e-4, lost


@pytest.mark.parametrize("tower", TOWERS)
def test_the_parts_with_the_clip_prs_convention_sum_to_the_normalized_embedding(double, tower):
    model, inputs = double
    expected = nn.functional.normalize(encode(model, tower, inputs[tower]), dim=-1)
    for by in ("layer", "head", "token"):
        parts = decompose(model, inputs[tower], by, "clip_prs")
        assert len(parts) == 1 + 2 * getattr(TINY, tower).layers
        assert distance(total(parts), expected) < 1e-12
    bare = prune_heads(model, tower, {1: range(getattr(TINY, tower).heads)})
    with pytest.raises(ValueError, match="the sum of the parts differs from the embedding"):
        decompose(bare, inputs[tower], "head", "clip_prs")  # the layer's bias belongs to no head
    with pytest.raises(ValueError, match="convention is 'prs'; expected 'miniclip' or 'clip_prs'"):
        decompose(model, inputs[tower], convention="prs")


def test_ablate_contributions_raises_an_error_for_heads_that_do_not_exist(double):
    model, inputs = double
    parts = decompose(model, inputs["vision"], "head")
    with pytest.raises(
        ValueError, match=r"blocks.0.attn: no heads \[4\]; expected numbers from 0 to 3"
    ):
        ablate_contributions(parts, {0: [4]})
    for wrong in ({3: [0]}, {-1: [0]}):
        with pytest.raises(ValueError, match="expected the number of a layer, and parts from"):
            ablate_contributions(parts, wrong)
    with pytest.raises(ValueError, match="no heads in 'blocks.0.attn'"):
        ablate_contributions(decompose(model, inputs["vision"]), {0: [0]})
    assert distance(ablate_contributions(parts, {}), total(parts)) < FLOAT64


@pytest.mark.parametrize("tower", TOWERS)
def test_the_parts_by_head_or_by_token_sum_to_the_parts_by_layer(double, tower):
    model, inputs = double
    by = {by: decompose(model, inputs[tower], by) for by in ("layer", "head", "token")}
    T = inputs[tower].shape[1] if tower == "text" else 26
    part = getattr(TINY, tower)
    for name, layer in by["layer"].items():
        head, token = by["head"][name], by["token"][name]
        if name.endswith("attn"):
            assert token.shape == (len(layer), part.heads, T, TINY.embed_dim)
            token = token.sum(2)
        if "attn" in name and not name.endswith("out_proj.bias"):
            assert head.shape == (len(layer), part.heads, TINY.embed_dim)
            head, token = head.sum(1), token.sum(1)
        assert distance(layer, head) < FLOAT64 and distance(layer, token) < FLOAT64


@pytest.mark.parametrize("tower", TOWERS)
def test_removing_a_part_from_the_residual_stream_subtracts_it_from_the_embedding(double, tower):
    """From the residual stream, subtract what a head or a bias wrote. Then apply the last LayerNorm
    with its old scale. This way is slow, and it shares no formula with `decompose`."""
    model, inputs = double
    half = getattr(model, tower)
    x = inputs[tower]
    parts = decompose(half, x, "head")
    norm = half.ln_post if tower == "vision" else half.ln_final
    rows, at = torch.arange(len(x)), positions(model, tower, x)
    last = f"blocks.{len(half.blocks) - 1}"
    with torch.no_grad(), cache(half, last, "blocks.1.attn.z", "blocks.0.mlp.act") as acts:
        half(x)
    stream = acts[last][rows, at]
    length = (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()

    def read(stream):
        return half.proj(
            (stream - stream.mean(-1, keepdim=True)) / length * norm.weight + norm.bias
        )

    attn, mlp = half.blocks[1].attn, half.blocks[0].mlp
    D = attn.head_width
    z = acts["blocks.1.attn.z"][rows, at]  # (B, H, D)
    with torch.no_grad():
        for h in range(z.shape[1]):
            columns = attn.out_proj.weight[:, h * D : (h + 1) * D]
            wrote = (z[:, h] - attn.v_proj.bias[h * D : (h + 1) * D]) @ columns.T
            lost = read(stream) - read(stream - wrote)
            assert distance(parts["blocks.1.attn"][:, h], lost) < FLOAT64
            lost = read(stream) - read(stream - z[:, h] @ columns.T)  # this includes the value bias
            whole = parts["blocks.1.attn"] + parts["blocks.1.attn.v_proj.bias"]
            assert distance(whole[:, h], lost) < FLOAT64
        wrote = acts["blocks.0.mlp.act"][rows, at] @ mlp.fc2.weight.T
        assert distance(parts["blocks.0.mlp"], read(stream) - read(stream - wrote)) < FLOAT64
        lost = read(stream) - read(stream - mlp.fc2.bias)
        assert distance(parts["blocks.0.mlp.fc2.bias"], lost) < FLOAT64


def test_a_head_that_writes_nothing_contributes_nothing(double):
    model, inputs = double
    attn = model.vision.blocks[1].attn
    with torch.no_grad():
        attn.out_proj.weight[:, 2 * attn.head_width : 3 * attn.head_width] = 0
    heads = decompose(model, inputs["vision"], "head")["blocks.1.attn"]
    assert heads[:, 2].abs().max() == 0 and heads[:, [0, 1, 3]].abs().min() > 0


def test_tokens_after_the_end_token_contribute_nothing(double):
    model, inputs = double
    ids = inputs["text"]
    tokens = decompose(model, ids, "token")["blocks.0.attn"].abs().sum((1, 3))  # (B, T)
    for row, end in zip(tokens, model.text.eos_positions(ids).tolist()):
        assert (row[: end + 1] > 0).all() and (row[end + 1 :] == 0).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize:UserWarning")
@pytest.mark.parametrize("by", ["layer", "token"])
def test_decomposing_a_quantised_tower_into_parts_is_an_error(by):
    """The tower also rounds its activations, so no sum of parts equals the embedding."""
    model = quantize_dynamic(tiny_clip(), {nn.Linear}, torch.qint8)
    pixels, ids = random_inputs(TINY)
    for x in (pixels, ids):
        with pytest.raises(ValueError, match="differs from the embedding by .*module that was"):
            decompose(model, x, by=by)


def test_the_parts_of_a_tower_without_projection_sum_to_its_output(double):
    _, x = double
    tower = miniclip.VisionTower(TINY.vision, None).double().eval()
    with torch.no_grad():
        expected = tower(x["vision"])
    assert distance(sum(decompose(tower, x["vision"]).values()), expected) < FLOAT64


def test_decompose_raises_an_error_if_an_edit_is_in_none_of_the_parts(double):
    model, inputs = double
    x = inputs["vision"]
    with hooks(model, {"vision.blocks.1": lambda out, name: out * 1.1}):
        with pytest.raises(ValueError, match="the sum of the parts differs from the embedding by"):
            decompose(model, x)
    # An edit of a part changes the part and the embedding in the same way.
    with hooks(model, {"vision.blocks.1.mlp": lambda out, name: out * 1.1}):
        assert distance(total(decompose(model, x, "token")), encode(model, "vision", x)) < FLOAT64
    with pytest.raises(ValueError, match="'layer', 'head', 'token'"):
        decompose(model, x, by="neuron")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decompose_finds_an_edit_that_is_in_none_of_the_parts_in_half_precision_too(dtype):
    model = tiny_clip().to(dtype)
    x = random_inputs(TINY)[0].to(dtype)
    for by in ("layer", "token"):
        decompose(model, x, by)
    with hooks(model, {"vision.blocks.1": lambda out, name: out.flip(-1)}):
        with pytest.raises(ValueError, match="the sum of the parts differs from the embedding by"):
            decompose(model, x)


def test_the_parts_sum_to_the_embedding_if_an_adapter_replaces_a_linear_layer(double):
    class Adapted(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear
            self.down = nn.Linear(linear.in_features, 2, bias=False).double()
            self.up = nn.Linear(2, linear.out_features, bias=False).double()

        @property
        def bias(self):
            return self.linear.bias

        def forward(self, x):
            return self.linear(x) + self.up(self.down(x))

    model, inputs = double
    x, attn = inputs["vision"], model.vision.blocks[1].attn
    before = encode(model, "vision", x)
    attn.v_proj, attn.out_proj = Adapted(attn.v_proj), Adapted(attn.out_proj)
    after = encode(model, "vision", x)
    assert distance(before, after) > 1e-3
    for by in ("layer", "token"):
        assert distance(total(decompose(model, x, by)), after) < FLOAT64


@pytest.mark.parametrize("dtype, count", [
    (torch.float64, 1000), (torch.float32, 1000), (torch.bfloat16, 16), (torch.float16, 16),
])  # fmt: skip
def test_check_sum_accepts_only_rounding_errors_in_the_sum_of_the_parts(dtype, count):
    """The limit grows with the sum of absolute values (here 4 + 2), because parts may cancel."""
    parts = {
        "one": torch.tensor([[4.0, 0]]).to(dtype),
        "other": torch.tensor([[-2.0, 1]]).to(dtype),
    }
    embedding, limit = torch.tensor([[2.0, 1]]).to(dtype), 6 * count * torch.finfo(dtype).eps
    check_sum(parts, embedding)
    check_sum(parts, embedding + 0.95 * limit)
    for wrong in (1.05 * limit, torch.nan):
        with pytest.raises(ValueError, match="the sum of the parts differs from the embedding by"):
            check_sum(parts, embedding + wrong)


def test_decompose_makes_no_tensor_larger_than_its_result():
    """Only the class token's parts are needed. All tokens' parts would take T times the memory."""
    model = tiny_clip()
    pixels, _ = random_inputs(TINY)
    largest = []
    result = decompose(model, pixels, "token")["blocks.0.attn"].numel()

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.numel())
            return out

    with Sizes():
        decompose(model, pixels, "token")
    assert max(largest) <= result  # (B, H, T, E)


# -------------------------------------------------------------------------------------- logit lens


@pytest.mark.parametrize("tower", TOWERS)
def test_the_logit_lens_after_all_blocks_is_the_embedding(double, tower):
    model, inputs = double
    x = inputs[tower]
    for ln in ("recompute", "final"):
        lens = logit_lens(model, x, ln)
        assert lens.shape == (len(x), 1 + getattr(TINY, tower).layers, TINY.embed_dim)
        assert distance(lens[:, -1], encode(model, tower, x)) < FLOAT64
    with pytest.raises(ValueError, match="'recompute' or 'final'"):
        logit_lens(model, x, ln="cached")
    name = "ln_post" if tower == "vision" else "ln_final"
    with hooks(model, {f"{tower}.{name}": lambda out, name: out.flip(-1)}):
        assert distance(logit_lens(model, x)[:, -1], encode(model, tower, x)) < FLOAT64
        with pytest.raises(ValueError, match="differs from the embedding .*a hook"):
            logit_lens(model, x, "final")


@pytest.mark.parametrize("tower", TOWERS)
def test_the_logit_lens_after_k_blocks_is_the_output_of_a_tower_of_k_blocks(double, tower):
    model, inputs = double
    x, half = inputs[tower], getattr(model, tower)
    recomputed, final = logit_lens(half, x), logit_lens(half, x, ln="final")
    parts = decompose(half, x)
    blocks, half.blocks = half.blocks, nn.Sequential()
    for k in range(len(blocks) + 1):
        half.blocks = blocks[:k]
        assert distance(recomputed[:, k], encode(model, tower, x)) < FLOAT64
    for k in range(len(blocks)):  # with ln="final", block k changes the lens by what it wrote
        wrote = sum(part for name, part in parts.items() if name.startswith(f"blocks.{k}."))
        assert distance(final[:, k + 1] - final[:, k], wrote) < FLOAT64
        assert distance(recomputed[:, k + 1] - recomputed[:, k], wrote) > 1e-2


# ----------------------------------------------------------------------------------- intermediates


@pytest.mark.parametrize("tower", TOWERS)
def test_intermediates_are_the_hidden_states_of_transformers(tower):
    ours, theirs = twins(TINY)
    x = random_inputs(TINY)[tower == "text"]
    peer = getattr(theirs, f"{tower}_model")
    with torch.no_grad():
        states = peer(x, output_hidden_states=True).hidden_states[1:]
        final, kept = forward_intermediates(ours, x, output_fmt="NLC")
    skip = 1 if tower == "vision" else 0
    assert len(kept) == len(states)
    assert all(torch.equal(one, state[:, skip:]) for one, state in zip(kept, states))
    norm = peer.post_layernorm if tower == "vision" else peer.final_layer_norm
    with torch.no_grad():
        assert torch.equal(final, norm(states[-1]))
        (normed,) = forward_intermediates(
            ours, x, 1, norm=True, output_fmt="NLC", intermediates_only=True
        )
        assert torch.equal(normed, norm(states[-1])[:, skip:])
        if tower == "text":  # text towers support only the format NLC
            assert torch.equal(forward_intermediates(ours, x, 1)[1][0], states[-1])


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_intermediates_equal_the_hidden_states_that_diffusers_takes_for_clip_skip(clip_skip):
    """diffusers takes hidden_states[-(clip_skip + 1)] and applies the text tower's last norm."""
    ours, theirs = twins(TINY)
    ids = random_inputs(TINY)[1]
    peer = theirs.text_model
    with torch.no_grad():
        states = peer(ids, output_hidden_states=True).hidden_states
        expected = peer.final_layer_norm(states[-(clip_skip + 1)])
        options = dict(indices=[-1 - clip_skip], norm=True, intermediates_only=True)
        (found,) = forward_intermediates(ours, ids, **options)
    assert torch.equal(found, expected)


def test_intermediates_are_feature_maps_and_prefix_tokens(double):
    model, inputs = double
    x = inputs["vision"]
    with torch.no_grad(), cache(model, "vision.blocks.*") as acts:
        model.encode_image(x)
    streams = [acts[f"vision.blocks.{i}"] for i in range(3)]
    pairs = forward_intermediates(
        model, x, [-3, -1], return_prefix_tokens=True, intermediates_only=True
    )
    for (spatial, prefix), stream in zip(pairs, (streams[0], streams[2]), strict=True):
        assert torch.equal(prefix, stream[:, :1])
        for row in range(5):
            for column in range(5):
                assert torch.equal(spatial[:, :, row, column], stream[:, 1 + 5 * row + column])


def test_intermediates_equal_the_intermediates_of_timm():
    """record_timm.py recorded the same calls of timm's own ViT, with the same weights."""
    recorded = json.loads(record_timm.PATH.read_text())
    tower, pixels = record_timm.small_tower(), record_timm.waves(1, 3, 12, 8)
    assert furthest(tower(pixels), recorded["timm.embedding"]) < 1e-9
    for call, expected in zip(record_timm.CALLS, recorded["timm.intermediates"], strict=True):
        assert furthest(forward_intermediates(tower, pixels, **call), expected) < 1e-9
        wrong = call | {"norm": "norm" not in call}
        assert furthest(forward_intermediates(tower, pixels, **wrong), expected) > 1e-3


def furthest(found, values):
    """Return the largest difference between two nested lists of the same shape."""
    if isinstance(values, float):
        return abs(found - values)
    found = record_timm.plain(found)
    assert isinstance(found, list) and len(found) == len(values)
    return max(map(furthest, found, values))


def test_stop_early_runs_no_block_after_the_last_requested_block(double):
    model, inputs = double
    ran = []
    with hooks(model, {"vision.blocks.*": lambda x, name: ran.append(name)}):
        options = dict(indices=[1], intermediates_only=True)
        (early,) = forward_intermediates(model, inputs["vision"], stop_early=True, **options)
        assert ran == ["vision.blocks.0", "vision.blocks.1"]
        (late,) = forward_intermediates(model, inputs["vision"], **options)
    assert len(ran) == 5 and torch.equal(early, late)
    early.sum().backward()
    assert model.vision.patch_embed.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "tower, options",
    [
        ("vision", dict(indices=4)),
        ("vision", dict(indices=0)),
        ("vision", dict(indices=[3])),
        ("vision", dict(indices=[-4])),
        ("vision", dict(indices=[])),
        ("vision", dict(output_fmt="NHWC")),
        ("text", dict(output_fmt="NCHW")),
        ("text", dict(output_fmt="NLC", return_prefix_tokens=True)),
    ],
)
def test_forward_intermediates_refuses_options_that_make_no_sense(double, tower, options):
    model, inputs = double
    with pytest.raises(ValueError, match="expected|for images"):
        forward_intermediates(model, inputs[tower], **options)


# ------------------------------------------------------------------------------------------ images


def test_maps_arrange_the_patches_row_by_row(double):
    model, inputs = double
    tokens = torch.arange(26.0).expand(2, 26)
    assert on_grid(model, inputs["vision"], tokens)[1].tolist() == [
        [1.0 + 5 * row + column for column in range(5)] for row in range(5)
    ]


def test_occlusion_equals_its_definition(double):
    model, inputs = double
    pixels, ids = inputs["vision"], inputs["text"][:2]
    result = occlusion(model, pixels, ids)
    row, column = 0, 3  # a patch at the upper edge is in two windows
    losses = []
    with torch.no_grad():
        for left in (2, 3):
            covered = pixels.clone()
            covered[:, :, 0:16, 8 * left : 8 * left + 16] = 0
            text = model.encode_text(ids, normalize=True)
            cosines = [
                (model.encode_image(p, normalize=True) * text).sum(1) for p in (pixels, covered)
            ]
            losses.append(cosines[0] - cosines[1])
    assert distance(result[:, row, column], sum(losses) / 2) < FLOAT64


@torch.no_grad()
def test_grad_cam_equals_its_definition(double):
    """Shift a channel on all 25 patches. Its weight is the logit's slope, divided by 25."""
    model, inputs = double
    pixels, ids = inputs["vision"], inputs["text"][:2]
    site = "vision.blocks.2.ln_1"

    def logits(channel, step):
        def shifted(x, name):
            return x + step * (torch.arange(26) > 0)[:, None] * (torch.arange(48) == channel)

        with hooks(model, {site: shifted}):
            return model(pixels, ids).logits_per_image.diagonal()

    weights = [(logits(c, 1e-4) - logits(c, -1e-4)) / 2e-4 / 25 for c in range(48)]
    with cache(model, site) as acts:
        model(pixels, ids)
    heat = torch.einsum("btw,wb->bt", acts[site][:, 1:], torch.stack(weights)).clamp(min=0)
    assert 0 < (heat == 0).sum() < heat.numel()
    assert distance(METHODS["gradcam"](model, pixels, ids), heat.view(2, 5, 5)) < 1e-7


@torch.no_grad()
def written_by_heads(model, pixels, ids):
    """Sum all heads' parts for each patch. Return the dot product of this sum and the text."""
    parts = decompose(model, pixels, by="token")
    heads = torch.stack([parts[f"blocks.{i}.attn"] for i in range(3)]).sum((0, 2))  # (B, T, E)
    texts = torch.nn.functional.normalize(model.encode_text(ids), dim=-1)
    return (heads[:, 1:] * texts[:, None]).sum(-1)


def seen_by_class_token(model, pixels):
    return attention_maps(model, pixels)[2][:, :, 0, 1:].mean(1)


DEFINITIONS = {  # each function returns (B, P); other tests check the other methods
    "attention": lambda model, pixels, ids: seen_by_class_token(model, pixels),
    "rollout": lambda model, pixels, ids: rollout(model, pixels)[:, 1:],
    "relevance": lambda model, pixels, ids: relevance(model, pixels, ids).image[:, 1:],
    "tokens": written_by_heads,
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_map_for_each_pair_of_image_and_text(double, method):
    model, inputs = double
    pixels, ids = inputs["vision"], inputs["text"][:2]
    maps = METHODS[method](model, pixels, ids)
    assert maps.shape == (2, 5, 5) and maps.isfinite().all() and not maps.requires_grad
    alone = METHODS[method](model, pixels[1:], ids[1:])
    assert torch.allclose(maps[1:], alone, rtol=1e-9)
    if method in DEFINITIONS:
        assert distance(maps, DEFINITIONS[method](model, pixels, ids).view(2, 5, 5)) < FLOAT64
    assert METHODS.keys() == DEFINITIONS.keys() | {"occlusion", "gradcam"}
    other = METHODS[method](model, pixels, ids.flip(0))
    assert torch.equal(maps, other) == (method in BLIND)


def test_the_map_of_a_head_is_the_attention_of_the_class_token():
    ours, theirs = twins(TINY, attention="eager")
    pixels, _ = random_inputs(TINY)
    with torch.no_grad():
        patterns = theirs.vision_model(pixels, output_attentions=True).attentions
    for layer, head in ((0, 3), (2, 1)):
        expected = patterns[layer][:, head, 0, 1:].view(2, 5, 5)
        assert torch.equal(head_map(ours, pixels, layer, head), expected)
    for layer, head in ((3, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(ValueError, match=rf"no head {head} in layer {layer}; .*\[4, 4, 4\]"):
            head_map(ours, pixels, layer, head)


@pytest.fixture(scope="module")
def shapes():
    return miniclip.load("shapes")


def test_text_maps_and_heatmap_use_the_given_method(shapes, monkeypatch):
    grey, asked = Image.new("RGB", (64, 64), "grey"), []

    def method(name):
        return lambda model, pixels, ids: (
            asked.append((name, len(ids))) or torch.rand(len(ids), 8, 8)
        )

    for name in METHODS:
        monkeypatch.setitem(METHODS, name, method(name))
    assert text_maps(grey, ["a star", "a ring"], shapes).shape == (2, 8, 8)
    assert text_map(grey, "a star", shapes).shape == (8, 8)
    heatmap(grey, "a star", shapes)
    assert asked == [("relevance", 2), ("relevance", 1), ("relevance", 1)]
    for name in METHODS:
        asked.clear()
        text_maps(grey, ["a star"], shapes, name)
        text_map(grey, "a star", shapes, name)
        heatmap(grey, "a star", shapes, name)
        assert asked == [(name, 1)] * 3
    with pytest.raises(
        ValueError, match="no method is called 'smoothgrad'; expected one of .*attention"
    ):
        text_map(grey, "a star", shapes, "smoothgrad")
    with pytest.raises(ValueError, match="a text is empty"):
        text_maps(grey, ["a star", " "], shapes)


def test_seen_shows_the_model_input_with_the_colours_of_the_image(shapes):
    """An image that needs no resize is drawn unchanged, even if the transform's mean changes."""
    generator = np.random.default_rng(0)
    other = replace(shapes.transform, image_mean=(0.1, 0.5, 0.9), image_std=(0.3, 0.2, 0.7))
    for scale, transform in ((1, shapes.transform), (2, shapes.transform), (1, other), (2, other)):
        pixels = generator.integers(256, size=(64 * scale, 64 * scale, 3), dtype=np.uint8)
        assert (np.asarray(seen(Image.fromarray(pixels), transform, scale)) == pixels).all()


def test_heat_has_the_colours_of_the_inferno_colormap():
    inferno = colormaps["inferno"]
    assert HEAT_COLOURS == tuple(to_hex(inferno(share)) for share in (0.0, 0.5, 1.0))


@pytest.mark.parametrize(
    "heat, warmest, colour, density",
    [
        (0.0, 1.0, HEAT_COLOURS[0], 90),
        (0.5, 1.0, HEAT_COLOURS[1], 153),
        (1.0, 1.0, HEAT_COLOURS[2], 217),
        (0.3, None, HEAT_COLOURS[2], 217),  # the warmest value
        (7.0, 1.0, HEAT_COLOURS[2], 217),
        (-1.0, 1.0, HEAT_COLOURS[0], 90),
        (-1.0, None, HEAT_COLOURS[0], 90),
    ],
)
def test_heat_covers_a_grey_image_and_warmer_heat_is_more_opaque(heat, warmest, colour, density):
    picture = Image.new("RGB", (16, 16), (40, 90, 200))
    found = np.asarray(overlay(picture, torch.full((2, 2), heat), warmest), float)
    grey = 0.299 * 40 + 0.587 * 90 + 0.114 * 200
    expected = (np.array(ImageColor.getrgb(colour)) * density + grey * (255 - density)) / 255
    assert abs(found - expected).max() < 3  # of 255


def test_a_heatmap_is_warmest_where_the_map_is_largest(shapes, monkeypatch):
    corner = torch.full((1, 8, 8), -1.0)
    corner[0, 1, 6] = 1
    monkeypatch.setitem(METHODS, "corner", lambda *_: corner)
    picture = heatmap(Image.new("RGB", (128, 128), "grey"), "a star", shapes, "corner")
    warmth = np.asarray(picture, float).sum(2)
    row, column = np.unravel_index(warmth.argmax(), warmth.shape)
    assert picture.size == (64, 64) and (row // 8, column // 8) == (1, 6)


# ------------------------------------------------------------------------- how often maps are right


def test_questions_ask_for_each_object_of_scenes_that_are_in_no_training_set():
    asked = questions(3)
    scenes = [scene(i, seed=SCORE_SEED, count=2) for i in range(3)]
    objects = [object for drawn in scenes for object in drawn.objects]
    for question, object in zip(asked, objects, strict=True):
        assert question.phrase.split()[1:] == [object.colour, object.shape]
        pixels = np.asarray(question.picture)[question.named.numpy()]
        assert np.abs(np.median(pixels, 0) - COLOURS[object.colour]).max() <= 1
        assert not (question.named & question.other).any()
    for one, two in zip(asked[::2], asked[1::2]):
        assert torch.equal(one.named, two.other) and torch.equal(one.other, two.named)
        assert one.picture is two.picture


def test_maps_with_known_answers_have_the_right_scores():
    named, other = torch.zeros(2, 1, 16, 16).bool()
    named[0, :8, :8] = True
    other[0, 8:, 8:] = True
    heat = named[:, ::8, ::8].float()  # (1, 2, 2): warm only in the named quarter
    right = localisation("right", heat, named, other)
    wrong = localisation("wrong", -heat + other[:, ::8, ::8], named, other)
    assert right.pointing == 1 and right.distracted == 0 and right.iou > 0.8
    assert wrong.pointing == 0 and wrong.distracted == 1 and wrong.iou == 0
    pixels = 0.5 * named.float()  # the whole object is warm
    pixels[0, :8, 4:12] = 1 + torch.rand(8, 8)  # the warmest square is half on the object
    assert math.isclose(localisation("half", pixels, named, other).iou, 1 / 3, rel_tol=1e-6)


@pytest.mark.slow
def test_the_score_of_random_weights_is_the_mean_of_five_draws(shapes, monkeypatch):
    """The scores are the mean and standard deviation of five single draws, which all differ."""
    monkeypatch.setattr("miniclip.world.localise.METHODS", {"attention": METHODS["attention"]})
    asked = questions(4)
    named, other = (torch.stack([getattr(q, name) for q in asked]) for name in ("named", "other"))
    ious = []
    for seed in range(5):
        torch.manual_seed(seed)
        untrained = shapes._replace(model=miniclip.CLIP(shapes.model.config).eval())
        maps = answers(untrained, asked, "attention", batch=3)
        assert torch.equal(maps[5:], answers(untrained, asked[5:], "attention"))
        ious.append(localisation("attention", maps, named, other).iou)
    found = localise(shapes, scenes=4)
    assert math.isclose(found["random"][0].iou, np.mean(ious))
    assert math.isclose(found["spread"][0].iou, np.std(ious, ddof=1)) and len(set(ious)) == 5


@pytest.mark.slow
def test_localise_scores_maps_with_the_model_in_evaluation_mode(monkeypatch):
    loaded, training = miniclip.load("shapes"), []

    def method(model, pixels, ids):
        training.append(model.training)
        return torch.rand(len(ids), 8, 8)

    monkeypatch.setattr("miniclip.world.localise.METHODS", {"any": method})
    loaded.model.train()
    localise(loaded, scenes=1)
    assert training == [False] * 6


@pytest.mark.slow
def test_methods_that_use_the_text_find_the_object_named_in_the_text(shapes, monkeypatch):
    """If a method uses the text, its maximum is on the named object more often than on the
    unnamed object, and its IoU is better than chance. A method that ignores the text hits the two
    objects equally often."""
    monkeypatch.setattr("miniclip.world.localise.RANDOM", 2)
    found = localise(shapes, scenes=6)
    assert list(found) == ["trained", "random", "spread", "limits"]
    trained = {row.method: row for row in found["trained"]}
    chance, ceiling = found["limits"]
    assert list(trained) == list(METHODS)
    for method in BLIND:
        assert trained[method].pointing == trained[method].distracted
    for method in METHODS.keys() - set(BLIND):
        assert trained[method].pointing > trained[method].distracted
        assert chance.iou < trained[method].iou < ceiling.iou
