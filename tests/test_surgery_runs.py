"""Test interventions, dense features and prompt vectors. None of them changes the model."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel
from twin import TINY, assert_close, assert_far, random_inputs, tiny_clip, twins

from miniclip import CLIP, ContextLengthError, VisionTower
from miniclip.sites import cache, hooks
from miniclip.surgery import (
    PRESETS,
    Preset,
    ablate_heads,
    add_registers,
    add_tokens,
    dense_features,
    encode_prompts,
    move_to_registers,
    patch_dropout,
    patch_from,
    proxyclip,
    prune_heads,
    resize_image,
    splice,
)

TOWERS = ["vision", "text"]


DTYPES = [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)]


@pytest.fixture(params=DTYPES, ids=["float64", "float32"])
def model(request):
    return tiny_clip(request.param)


def inputs(model, tower, count=3, seed=0):
    pixels, ids = random_inputs(model.config, images=count, texts=count, tokens=9, seed=seed)
    return pixels.to(model.logit_scale.dtype) if tower == "vision" else ids


@torch.no_grad()
def encode(model, tower, x):
    return model.encode_image(x) if tower == "vision" else model.encode_text(x)


def handles(model):
    return [len(module._forward_hooks) for module in model.modules()]


# --------------------------------------------------------------------------------- interventions


@pytest.mark.parametrize("tower", TOWERS)
def test_ablating_heads_has_the_same_effect_as_pruning_them(model, tower):
    x, heads = inputs(model, tower), {0: [0], 1: [1]}
    whole = encode(model, tower, x)
    with ablate_heads(model, tower, heads):
        ablated = encode(model, tower, x)
    assert_close(ablated, encode(prune_heads(model, tower, heads), tower, x))
    assert_far(ablated, encode(prune_heads(model, tower, {0: [1], 1: [1]}), tower, x))
    assert torch.equal(encode(model, tower, x), whole) and not any(handles(model))


@pytest.mark.parametrize("tower", TOWERS)
def test_mean_ablation_replaces_the_output_of_a_head_by_the_batch_mean(model, tower):
    x = inputs(model, tower)
    alike = x[:1].expand_as(x)
    whole = encode(model, tower, alike)
    heads = {0: [0, 1], 1: [1]}
    with ablate_heads(model, tower, heads, mode="mean"):
        assert_close(encode(model, tower, alike), whole)
        found = encode(model, tower, x)
        with cache(model, f"{tower}.blocks.1.attn.z") as acts:
            encode(model, tower, x)
    assert_far(found, encode(model, tower, x))
    assert acts[f"{tower}.blocks.1.attn.z"][:, :, 1].std(0).max() < 1e-6
    assert acts[f"{tower}.blocks.1.attn.z"][:, :, 0].std(0).max() > 1e-3


@pytest.mark.parametrize("tower", TOWERS)
def test_patching_the_last_block_gives_the_embedding_of_the_source_run(model, tower):
    one, other = inputs(model, tower), inputs(model, tower, seed=1)
    last = getattr(TINY, tower).layers - 1
    end = f"{tower}.blocks.{last}"
    if tower == "text":  # both texts have end tokens at the same positions
        other = other.where(one != 599, 599).where((one == 599) | (other != 599), 5)
    with cache(model, f"{tower}.blocks.*", f"{tower}.blocks.*.attn.z") as acts:
        expected = encode(model, tower, one)
    with hooks(model, patch_from({end: acts[end]})):
        assert torch.equal(encode(model, tower, other), expected)
    with hooks(model, patch_from(acts)):  # patching a run with its own tensors changes nothing
        assert torch.equal(encode(model, tower, one), expected)
    plain = encode(model, tower, other)
    assert_far(plain, expected)
    ends = (one == 599).int().argmax(1) if tower == "text" else torch.zeros(3, dtype=torch.long)
    others = [[t for t in range(9) if t != end] for end in ends]
    assert tower == "vision" or len(set(ends.tolist())) > 1
    with hooks(model, patch_from({end: acts[end]}, positions=others)):
        assert torch.equal(
            encode(model, tower, other), plain
        )  # the embedding does not depend on these tokens
    with hooks(model, patch_from({end: acts[end]}, positions=ends)):
        assert torch.equal(encode(model, tower, other), expected)


@pytest.mark.parametrize("tower", TOWERS)
def test_patching_chosen_heads_at_chosen_positions_changes_nothing_else(model, tower):
    one, other = inputs(model, tower), inputs(model, tower, seed=1)
    site = f"{tower}.blocks.0.attn.z"
    with cache(model, site) as source:
        encode(model, tower, one)
    with cache(model, site) as plain:
        encode(model, tower, other)
    patches = patch_from(source, positions=[[1, 4]], heads=[1])
    with hooks(model, patches), cache(model, site) as patched:
        encode(model, tower, other)
    for t in range(9):
        for head in range(2):
            origin = source if t in (1, 4) and head == 1 else plain
            assert torch.equal(patched[site][:, t, head], origin[site][:, t, head])
    with pytest.raises(ValueError, match="the cached tensor has shape"), hooks(model, patches):
        encode(model, tower, other[:2])
    with pytest.raises(ValueError, match="has no heads to choose from"):
        stream = {f"{tower}.blocks.0": torch.zeros(3, 9, getattr(TINY, tower).width)}
        if tower == "vision":
            stream = {f"{tower}.blocks.0": torch.zeros(3, 26, 48)}
        with hooks(model, patch_from(stream, heads=[0])):
            encode(model, tower, other)


@pytest.mark.parametrize(
    "part",
    ["attn.z", "attn.pattern", "attn.pattern.input", "attn.scores", "resid_mid", "ln_2.input"],
)
def test_patching_can_use_different_positions_for_each_text(part):
    model, site = tiny_clip(), f"text.blocks.1.{part}"
    one, other = inputs(model, "text"), inputs(model, "text", seed=1)
    acts = {}
    for name, ids in (("source", one), ("plain", other)):
        with cache(model, site) as acts[name]:
            encode(model, "text", ids)
    heads = [1] if "attn" in part else None
    single, pairs = [2, 0, 7], [[2, 5], [0, 1], [7, 3]]
    for positions in (single, torch.tensor(pairs), [[4, 6]], slice(3, 5)):
        with hooks(model, patch_from(acts["source"], positions=positions, heads=heads)):
            with cache(model, site) as patched:
                encode(model, "text", other)
        listed = [[3, 4]] if isinstance(positions, slice) else torch.as_tensor(positions).tolist()
        for row in range(3):
            tokens = listed[row % len(listed)]
            for token in range(9):
                for head in range(2):
                    place = (row, token, head) if part == "attn.z" else (row, head, token)
                    place = (row, token) if heads is None else place
                    is_patched = token in (tokens if isinstance(tokens, list) else [tokens])
                    is_patched &= heads is None or head == 1
                    expected = acts["source" if is_patched else "plain"][site][place]
                    assert torch.equal(patched[site][place], expected)


@pytest.mark.parametrize("site, options, words", [
    ("text.blocks.0", {"positions": [1, 4]}, "positions have shape (2,); expected (3,) or (3, k)"),
    ("text.blocks.0", {"positions": [[1], [4]]}, "positions have shape (2, 1); expected (3,)"),
    ("text.proj", {"positions": [1, 4, 0]}, "text.proj has no tokens to choose from"),
    ("text.blocks.0.attn.z", {"heads": [2]}, "no heads [2]; expected numbers from 0 to 1"),
])  # fmt: skip
def test_invalid_positions_or_heads_of_a_patch_are_an_error(site, options, words):
    model = tiny_clip()
    x = inputs(model, "text")
    with cache(model, site) as acts:
        encode(model, "text", x)
    with (
        pytest.raises(ValueError, match=re.escape(words)),
        hooks(model, patch_from(acts, **options)),
    ):
        encode(model, "text", x)


class Autoencoder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.decoder(self.encoder(x).relu())


@pytest.mark.parametrize("tower", TOWERS)
def test_splice_replaces_a_tensor_and_an_error_term_restores_it(model, tower):
    x, site = inputs(model, tower), f"{tower}.blocks.0.resid_mid"
    width = getattr(TINY, tower).width
    sae = Autoencoder(width).to(model.logit_scale.dtype)
    whole = encode(model, tower, x)
    with splice(model, site, nn.Identity()):
        assert torch.equal(encode(model, tower, x), whole)
    with splice(model, site, sae):
        spliced = encode(model, tower, x)
    with hooks(model, {site: lambda tensor, name: sae(tensor)}):
        assert torch.equal(encode(model, tower, x), spliced)
    assert_far(spliced, whole)
    with splice(model, site, sae, error_term=True):
        assert_close(encode(model, tower, x), whole)
        out = model.encode_image(x) if tower == "vision" else model.encode_text(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), [sae.encoder.weight])
    assert gradient.abs().max() > 1e-3  # the error term must not cancel the gradient
    with splice(model, site, sae, error_term=True), torch.no_grad():
        sae.decoder.weight.mul_(2)  # after a training step, the error term uses the new weights
        assert_close(encode(model, tower, x), whole)
        # The error term must not cancel a hook's change.
        with hooks(sae, {"encoder": lambda out, name: 0 * out}):
            gone = encode(model, tower, x)
    wrote = lambda r, name: r - sae(r) + sae.decoder.bias  # noqa: E731
    with hooks(model, {site: wrote}):
        assert_close(gone, encode(model, tower, x))
    assert_far(gone, whole)
    with pytest.raises(ValueError, match="returned shape"):
        with splice(model, site, nn.Linear(width, 3).to(model.logit_scale.dtype)):
            encode(model, tower, x)
    assert torch.equal(encode(model, tower, x), whole) and not any(handles(model))


def test_a_spliced_rotation_and_its_spliced_inverse_cancel(model):
    x = inputs(model, "vision")
    rotation = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64))[0].to(x.dtype)
    turn, back = nn.Linear(48, 48, bias=False), nn.Linear(48, 48, bias=False)
    turn.weight, back.weight = nn.Parameter(rotation), nn.Parameter(rotation.T.contiguous())
    whole = encode(model, "vision", x)
    with splice(model, "vision.blocks.1", turn):
        assert_far(encode(model, "vision", x), whole)
        with splice(model, "vision.blocks.1", back):
            assert_close(encode(model, "vision", x), whole)


@torch.no_grad()
def test_patch_dropout_keeps_some_patches_in_their_order(model):
    model = add_registers(model, torch.randn(2, TINY.vision.width))
    x = inputs(model, "vision")
    whole = encode(model, "vision", x)
    embedded = model.vision.embed_tokens(x)
    with patch_dropout(model, 0.6):
        assert torch.equal(encode(model, "vision", x), whole)  # no patch is dropped in eval mode
        model.train()
        with cache(model, "vision.ln_pre", "vision.blocks.2") as acts:
            found = model.encode_image(x)
    kept = []
    for image, tokens in zip(embedded, acts["vision.ln_pre"], strict=True):
        kept.append([(image == token).all(-1).nonzero().item() for token in tokens])
    assert all(places[:3] == [0, 1, 2] and len(places) == 3 + 10 for places in kept)
    assert all(places == sorted(set(places)) for places in kept) and kept[0] != kept[1]
    gathered = torch.stack([image[places] for image, places in zip(embedded, kept)])
    stream = model.vision.blocks(gathered)
    assert_close(found, model.vision.proj(model.vision.ln_post(stream[:, 0])))
    assert torch.equal(model.encode_image(x), whole) and not any(handles(model))


@pytest.mark.parametrize("share, kept", [(0.0, 25), (0.65, 9), (0.69, 8), (0.99, 1)])
def test_patch_dropout_rounds_the_number_of_kept_patches_but_keeps_at_least_one(share, kept):
    """The tower has 25 patches. 25 * (1 - share) is 25, 8.75, 7.75 or 0.25 before rounding."""
    model = tiny_clip()
    with patch_dropout(model.train(), share):
        assert model.vision.embed_tokens(inputs(model, "vision")).shape[1] == 1 + kept


@pytest.mark.parametrize("context, words", [
    (lambda m: ablate_heads(m, "vision", {0: [4]}), "no heads [4]; expected numbers from 0 to 3"),
    (lambda m: ablate_heads(m, "vision", {0: [-1]}), "no heads [-1]; expected numbers from 0 to"),
    (lambda m: ablate_heads(m, "vision", {3: [0]}), "no site is called 'vision.blocks.3.attn.z'"),
    (lambda m: ablate_heads(m, "vision", {0: [0]}, "noise"), "expected 'zero' or 'mean'"),
    (lambda m: move_to_registers(m, {0: [100]}), "no neurons [100]; expected numbers from 0 to 99"),
    (lambda m: move_to_registers(m, {3: [0]}), "no site is called 'vision.blocks.3.mlp.act'"),
    (lambda m: splice(m, "vision.blocks.9", nn.Identity()), "no site is called"),
    (lambda m: patch_dropout(m, 1.0), "share is 1.0; expected 0 or more, and less than 1"),
    (lambda m: patch_dropout(m, -0.1), "share is -0.1; expected 0 or more, and less than 1"),
])  # fmt: skip
def test_an_impossible_intervention_raises_an_error_and_leaves_no_hooks(context, words):
    model = tiny_clip()
    with pytest.raises(ValueError, match=re.escape(words)), context(model):
        model.encode_image(inputs(model, "vision"))
    assert not any(handles(model))


# -------------------------------------------------------------------------------- dense features


def stream_before_last(model, x, last=1):
    return model.vision.blocks[:-last](model.vision.embed_tokens(x))


def projected(model, x):
    tokens = x[:, 1:] if not model.config.vision.registers else x[:, -model.config.vision.patches :]
    return model.vision.proj(model.vision.ln_post(tokens))


def attention(block, x, weights_of):
    """Compute attention head by head. `weights_of(q, k, v)` returns the pattern (B, T, T)."""
    y, D, z = block.ln_1(x), block.attn.head_width, []
    q, k, v = block.attn.q_proj(y), block.attn.k_proj(y), block.attn.v_proj(y)
    for first in range(0, q.shape[-1], D):
        head = slice(first, first + D)
        z.append(weights_of(q[..., head], k[..., head], v[..., head]) @ v[..., head])
    return block.attn.out_proj(torch.cat(z, -1))


def softmax(a, b):
    return torch.exp(a @ b.mT / a.shape[-1] ** 0.5) / torch.exp(a @ b.mT / a.shape[-1] ** 0.5).sum(
        -1, keepdim=True
    )


def clip(model, x):
    return projected(model, model.vision.blocks(model.vision.embed_tokens(x)))


def maskclip(model, x):
    block, x = model.vision.blocks[-1], stream_before_last(model, x)
    x = x + block.attn.out_proj(block.attn.v_proj(block.ln_1(x)))
    return projected(model, x + block.mlp(block.ln_2(x)))


def sclip(model, x):
    block, x = model.vision.blocks[-1], stream_before_last(model, x)
    x = x + attention(block, x, lambda q, k, v: softmax(q, q) + softmax(k, k))
    return projected(model, x + block.mlp(block.ln_2(x)))


def clearclip(model, x):
    block, x = model.vision.blocks[-1], stream_before_last(model, x)
    return projected(model, attention(block, x, lambda q, k, v: softmax(q, q)))


def naclip(model, x):
    block, x = model.vision.blocks[-1], stream_before_last(model, x)
    rows, columns = model.config.vision.grid
    bias = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
    first = x.shape[1] - rows * columns
    for i in range(rows * columns):
        for j in range(rows * columns):
            d = (i // columns - j // columns) ** 2 + (i % columns - j % columns) ** 2
            bias[first + i, first + j] = math.exp(-d / (2 * 5.0**2))
    weights = lambda q, k, v: (k @ k.mT / k.shape[-1] ** 0.5 + bias).softmax(-1)  # noqa: E731
    return projected(model, attention(block, x, weights))


def gem(model, x):
    depth = min(6, len(model.vision.blocks))
    stream = new = stream_before_last(model, x, depth)
    for block in model.vision.blocks[-depth:]:
        lengths = block.ln_1(stream).square().sum(-1).sqrt().mean(1)  # (B,)
        t = (lengths / block.attn.head_width**0.5)[:, None, None]

        def like(one):
            unit = one / one.square().sum(-1, keepdim=True).sqrt()
            return torch.softmax(unit @ unit.mT * t, -1), unit

        def weights(q, k, v):
            steps = [like(one) for one in (q, k, v)]
            return sum(like(pattern @ unit)[0] for pattern, unit in steps) / 3

        new = new + attention(block, stream, weights)
        stream = block(stream)
    return projected(model, new)


def clip_surgery(model, x):
    depth = min(6, len(model.vision.blocks))
    original = stream_before_last(model, x, depth)
    new = original
    for block in model.vision.blocks[-depth:]:
        new = new + attention(block, original, lambda q, k, v: softmax(v, v))
        original = original + attention(block, original, lambda q, k, v: softmax(q, k))
        original = original + block.mlp(block.ln_2(original))
    return projected(model, new)


DERIVED = {
    "clip": clip,
    "maskclip": maskclip,
    "sclip": sclip,
    "clip-surgery": clip_surgery,
    "gem": gem,
    "clearclip": clearclip,
    "naclip": naclip,
}


@pytest.mark.sweep(5)
@pytest.mark.parametrize("shape", ["square", "wide, pruned, with registers", "deep"])
@pytest.mark.parametrize("preset", DERIVED)
@torch.no_grad()
def test_each_preset_gives_the_same_features_as_its_definition(model, preset, shape):
    if shape == "wide, pruned, with registers":
        model = add_registers(resize_image(prune_heads(model, "vision", {2: [1]}), (24, 56)), 2)
        model.vision.register_embed.data.normal_()
    if shape == "deep":
        config = TINY.vision.__class__(**{**vars(TINY.vision), "layers": 8})
        model = twins(TINY.__class__(config, TINY.text, 36), dtype=model.logit_scale.dtype)[0]
    x = inputs(model, "vision")
    found = dense_features(model, x, preset)
    assert found.shape == (3, model.config.vision.patches, 36)
    assert_close(found, DERIVED[preset](model, x))
    for other in DERIVED.keys() - {preset}:  # no two presets give equal features
        assert_far(found, DERIVED[other](model, x))


def test_every_preset_is_compared_with_a_definition():
    assert PRESETS.keys() == DERIVED.keys()


@torch.no_grad()
def test_dense_features_run_the_hooks_and_do_not_change_the_model(model):
    x = inputs(model, "vision")
    whole = encode(model, "vision", x)
    before = dense_features(model, x, "sclip")
    with ablate_heads(model, "vision", {2: [0]}):
        ablated = dense_features(model, x, "sclip")
    assert_close(ablated, dense_features(prune_heads(model, "vision", {2: [0]}), x, "sclip"))
    assert_far(ablated, before)
    assert torch.equal(encode(model, "vision", x), whole)
    assert_close(dense_features(model, x[:1], "sclip"), before[:1])
    assert torch.equal(dense_features(model, x), dense_features(model, x, "clearclip"))
    with pytest.raises(ValueError, match="preset is 'dino'; expected one of clip, maskclip"):
        dense_features(model, x, "dino")


@torch.no_grad()
def test_dense_features_accept_a_preset_that_the_user_wrote(model):
    x, block = inputs(model, "vision"), model.vision.blocks[-1]

    def first_patch(q, k, v, seen):
        assert torch.equal(seen.x, block.ln_1(stream_before_last(model, x)))
        assert seen.grid == (5, 5) and seen.places == slice(-25, None)
        assert q.shape == k.shape == v.shape == (3, 4, 26, 12)
        pattern = torch.zeros(3, 4, 26, 26).to(q)
        pattern[..., seen.places.start + 26] = 1
        return pattern

    found = dense_features(model, x, Preset(first_patch, residual=True))
    stream = stream_before_last(model, x)
    first = block.attn.out_proj(block.attn.v_proj(block.ln_1(stream)[:, 1:2]))
    assert_close(found, projected(model, stream + first))
    with pytest.raises(ValueError, match="own grid makes new tokens, so it needs residual=False"):
        dense_features(model, x, Preset(first_patch, residual=True, grid=(1, 1)))


@torch.no_grad()
def test_dense_features_run_only_the_blocks_that_they_need(model):
    runs = []
    for block in model.vision.blocks:
        block.ln_1.register_forward_hook(lambda module, *_: runs.append(module))
    dense_features(model, inputs(model, "vision"), "gem")
    one, two, three = (block.ln_1 for block in model.vision.blocks)
    assert runs == [one, one, two, two, three]  # GEM's path runs 3 blocks, CLIP's path 2


class Flip(nn.Module):
    def forward(self, x):
        return x + x.flip(-1)


@torch.no_grad()
def test_dense_features_run_a_spliced_module_or_name_its_site_in_an_error(model):
    x, last = inputs(model, "vision"), "vision.blocks.2"
    for site in ("resid_mid", "attn.z", "attn.v"):
        with splice(model, f"{last}.{site}", Flip()):
            found = dense_features(model, x, "clip")
            assert_close(found, clip(model, x))
        assert_far(found, clip(model, x))
    for site in (last, f"{last}.input", f"{last}.attn.scores", f"{last}.attn.pattern"):
        words = f"does not run {site.removesuffix('.input')}, so it cannot follow the hook"
        with splice(model, site, Flip()), pytest.raises(ValueError, match=words):
            dense_features(model, x, "clip")
    with splice(model, "vision.blocks.1", Flip()):  # sclip replays only the last block
        assert_close(dense_features(model, x, "sclip"), sclip(model, x))
    model.vision.blocks[2].attn.pattern = Flip()
    with pytest.raises(ValueError, match=f"does not run {last}.attn.pattern"):
        dense_features(model, x)


@torch.no_grad()
@pytest.mark.parametrize("method", ["dino", "transformers"])
def test_dense_features_at_another_size_copy_only_the_position_embedding(
    model, method, monkeypatch
):
    large = torch.randn(2, 3, 24, 56).to(model.logit_scale)
    expected = dense_features(resize_image(model, (24, 56), method), large, "sclip")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    monkeypatch.setattr("miniclip.surgery.geometry.copied", None)
    with ablate_heads(model, "vision", {2: [0]}):  # hooks also run on images of another size
        ablated = dense_features(model, large, "sclip", method)
    found = dense_features(model, large, "sclip", method)
    assert_close(found, expected)
    assert_far(ablated, expected)
    assert model.config.vision.image_size == 40
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with pytest.raises(ValueError, match="resize is 'area'; expected one of transformers, timm"):
        dense_features(model, large, "sclip", "area")


@torch.no_grad()
def test_dense_features_at_another_size_leave_a_position_embedding_buffer_unchanged(model):
    vision, large = model.vision, torch.randn(2, 3, 24, 56).to(model.logit_scale)
    expected = dense_features(model, large, "sclip", "dino")
    table = vision.pos_embed.detach()
    del vision.pos_embed
    vision.register_buffer("pos_embed", table, persistent=False)
    assert torch.equal(dense_features(model, large, "sclip", "dino"), expected)
    assert vision.pos_embed is table and "pos_embed" in vision._non_persistent_buffers_set


@torch.no_grad()
def test_proxyclip_uses_the_features_of_the_same_image_from_the_other_model(model):
    x, foreign = inputs(model, "vision"), torch.randn(3, 7, 4, 6).to(model.logit_scale)
    found = dense_features(model, x, proxyclip(foreign))
    assert found.shape == (3, 24, 36)
    for i in range(3):
        one = slice(i, i + 1)
        assert_close(found[one], dense_features(model, x[one], proxyclip(foreign[one])))
    registered = add_registers(model, torch.randn(2, 48))  # registers are not patches
    block, stream = registered.vision.blocks[-1], stream_before_last(registered, x)
    own = block.attn.v_proj(block.ln_1(stream))[:, -25:].mT.unflatten(2, (5, 5))
    read = F.interpolate(own, (4, 6), mode="bilinear").flatten(2).mT  # (B, 24, W)
    unit = F.normalize(foreign, dim=1).flatten(2)
    near = unit.mT @ unit
    near = torch.stack([one - 1.2 * one.mean() for one in near])
    weights = torch.where(near < 0, 0, (3 * near).exp())
    read = weights / weights.sum(-1, keepdim=True) @ read
    expected = projected(registered, block.attn.out_proj(read))
    assert_close(dense_features(registered, x, proxyclip(foreign)), expected)


@torch.no_grad()
def test_proxyclip_gives_no_nan_if_features_of_the_other_model_are_similar(model):
    """If no cosine reaches 1.2 times the mean, each patch attends only to itself."""
    x, foreign = inputs(model, "vision", 2), torch.rand(2, 7, 5, 5).to(model.logit_scale)
    found = dense_features(model, x, proxyclip(foreign + 9))
    to_itself = Preset(lambda q, k, v, seen: torch.eye(26).to(v))
    assert_close(found, dense_features(model, x, to_itself))
    for features, images in ((foreign[:1], x), (foreign, x[:1])):
        words = f"features of {len(features)} images, but dense_features got {len(images)} images"
        with pytest.raises(ValueError, match=words):
            dense_features(model, images, proxyclip(features))


class PatchesFirst(VisionTower):
    def embed_tokens(self, pixels):
        return super().embed_tokens(pixels).roll(-1, 1)


@torch.no_grad()
def test_naclip_finds_neighbouring_patches_in_a_fork_with_another_token_order(model):
    x = inputs(model, "vision")
    expected = dense_features(model, x, "naclip")

    class Fork(CLIP):
        vision_class = PatchesFirst

    fork = Fork(model.config).to(model.logit_scale)
    fork.load_state_dict(model.state_dict())
    assert_close(dense_features(fork, x, "naclip"), expected)


# ------------------------------------------------------------------------------- prompt vectors


@torch.no_grad()
def test_token_vectors_give_the_same_embedding_as_the_token_ids(model):
    ids = inputs(model, "text")
    vectors, eos = model.text.token_embed(ids), (ids == 599).int().argmax(-1)
    for normalize in (False, True):
        found = encode_prompts(model, vectors, eos, normalize=normalize)
        assert torch.equal(found, model.encode_text(ids, normalize))
    assert_far(encode_prompts(model, vectors, eos - 1), model.encode_text(ids))


@torch.no_grad()
def test_prompt_vectors_give_the_same_embedding_as_in_transformers():
    ours, theirs = twins(TINY, dtype=torch.float64)
    ids = inputs(ours, "text")
    vectors = torch.randn(3, 9, 40, dtype=torch.float64)
    x = theirs.text_model.embeddings(inputs_embeds=vectors)
    for layer in theirs.text_model.encoder.layers:
        x = layer(x, None, is_causal=True)
    eos = torch.tensor([8, 2, 5])
    x = theirs.text_model.final_layer_norm(x)[torch.arange(3), eos]
    expected = theirs.text_projection(x)
    found = encode_prompts(ours, vectors, eos)
    assert_close(found, expected)
    assert_far(found, ours.encode_text(ids))


def test_only_the_learned_context_vectors_get_a_gradient():
    """As in CoOp, the same four vectors come before the tokens of each class."""
    model = tiny_clip()
    model.requires_grad_(False)
    ids = inputs(model, "text")
    ids[:, 8] = 599  # the end token is the last token, after the vectors
    ids[:, :8] = ids[:, :8].clamp(max=590)
    context = nn.Parameter(torch.randn(4, 40))
    vectors = model.text.token_embed(ids)
    prompt = torch.cat([vectors[:, :1], context.expand(3, -1, -1), vectors[:, 5:]], dim=1)
    eos = model.text.eos_positions(ids)
    encode_prompts(model, prompt, eos, normalize=True)[:, 0].sum().backward()
    assert context.grad.abs().sum(1).min() > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("shape, error, words", [
    ((2, 40), ValueError, "token vectors have shape (2, 40); expected (B, T, 40)"),
    ((2, 5, 1), ValueError, "token vectors have shape (2, 5, 1); expected (B, T, 40)"),
    ((2, 21, 40), ContextLengthError, "the texts have 21 tokens; this text tower has 20 positions"),
])  # fmt: skip
def test_prompt_vectors_with_a_wrong_shape_are_an_error(shape, error, words):
    with pytest.raises(error, match=re.escape(words)):
        encode_prompts(tiny_clip(), torch.zeros(shape), torch.zeros(2, dtype=torch.long))


@torch.no_grad()
def test_textual_inversion_saves_a_learned_word(tmp_path):
    """A learned vector becomes a new token in miniclip and in transformers."""
    model = tiny_clip(torch.float64)
    word, ids = torch.randn(1, 40, dtype=torch.float64), inputs(model, "text")
    vectors, eos = model.text.token_embed(ids), (ids == 599).int().argmax(-1)
    vectors[:, 0] = word
    expected = encode_prompts(model, vectors, eos)
    ids[:, 0] = 600
    add_tokens(model, word).save_pretrained(tmp_path)
    assert torch.equal(
        CLIP.from_pretrained(tmp_path, dtype=torch.float64).encode_text(ids), expected
    )
    theirs = CLIPModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_close(theirs.get_text_features(ids).pooler_output, expected)
    assert F.cosine_similarity(expected, model.encode_text(inputs(model, "text"))).max() < 0.999
