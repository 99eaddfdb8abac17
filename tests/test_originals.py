"""Compare miniclip with values from the authors' own code for the same weights (see originals/)."""

import json

import pytest
import torch
import torch.nn.functional as F
from originals import (
    big_vision,
    chefer,
    common,
    coop,
    longclip,
    model_soups,
    proxyclip,
    registers,
    tome,
    vit_prisma,
    wise_ft,
)
from test_published import greedy_soup

from miniclip import CLIP, CLIPConfig, VisionConfig, cache, hooks
from miniclip.lens import ablate_contributions, decompose, relevance
from miniclip.surgery import (
    PRESETS,
    average,
    dense_features,
    encode_prompts,
    extend_context,
    interpolate,
    move_to_registers,
    resize_patch,
)
from miniclip.surgery import proxyclip as by_features

RECORDED = json.loads(common.PATH.read_text())


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    return common.small_clip()


def values(repository, name):
    return torch.tensor(RECORDED[repository][name], dtype=torch.float64)


def assert_equal(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance * max(1, expected.abs().max())


def assert_other(found, expected):
    """Assert that two tensors differ so much that `assert_equal` would fail."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() > 1e-3 * expected.abs().max()


# ------------------------------------------------------------------------------------- clip_prs


def test_decompose_gives_the_same_contributions_as_clip_prs(model):
    pixels = common.pixels()
    by = {by: decompose(model, pixels, by, "clip_prs") for by in ("layer", "head", "token")}
    names = ["embed"] + [f"blocks.{i}.{part}" for i in range(8) for part in ("attn", "mlp")]
    for parts in by.values():
        assert [*parts] == names
        mlps = torch.stack([parts[n] for n in names if not n.endswith("attn")], 1)
        assert_equal(mlps, values("clip_prs", "mlps"))
    heads = values("clip_prs", "heads")  # (B, L, H, E)
    for i in range(8):
        assert_equal(by["head"][f"blocks.{i}.attn"], heads[:, i])
        assert_equal(by["token"][f"blocks.{i}.attn"].sum(2), heads[:, i])
        assert_equal(by["layer"][f"blocks.{i}.attn"], heads[:, i].sum(1))
    assert_equal(by["token"]["blocks.7.attn"].mT, values("clip_prs", "tokens").permute(0, 2, 3, 1))
    assert_equal(model.encode_image(pixels), values("clip_prs", "embed"))
    ours = decompose(model, pixels, "head")
    for i in range(8):  # the default convention gives other values, even with this bias
        folded = ours[f"blocks.{i}.attn"] + ours[f"blocks.{i}.attn.v_proj.bias"]
        assert_other(folded / model.encode_image(pixels).norm(dim=-1)[:, None, None], heads[:, i])


def test_ablate_contributions_gives_the_same_embeddings_as_clip_prs(model):
    for by in ("head", "token"):
        parts = decompose(model, common.pixels(), by, "clip_prs")
        expected = values("clip_prs", "ablated")
        assert_equal(ablate_contributions(parts, {6: [1]}), expected)
        assert_other(ablate_contributions(parts, {6: [0]}), expected)


# ----------------------------------------------------------------------------------- big_vision


def test_resize_patch_gives_the_same_weights_as_flexivit():
    recorded = RECORDED["big_vision"]["patch_embed"]
    for (old, new), expected in zip(big_vision.SIZES, recorded, strict=True):
        shape = VisionConfig(width=1, layers=1, heads=1, image_size=old, patch_size=old, channels=2)
        model = CLIP(CLIPConfig(shape, common.CONFIG.text, 5)).double()
        model.vision.patch_embed.weight.copy_(common.chirp(1, 2, old, old))
        expected = torch.tensor(expected, dtype=torch.float64)
        found = resize_patch(model, new, "flexivit").vision.patch_embed.weight
        assert_equal(found, expected, 1e-6)  # tensorflow resizes in float32
        assert_other(resize_patch(model, new).vision.patch_embed.weight, expected)
    with pytest.raises(ValueError, match="method is 'pi'; expected one of timm, flexivit"):
        resize_patch(model, 3, "pi")


# ----------------------------------------------------------------------------- test-time registers


def test_move_to_registers_gives_the_same_embeddings_as_the_authors_code(model):
    pixels, recorded = common.pixels(), values("registers", "embeds")  # (calls, B, E)
    found = []
    for call in registers.CALLS:
        with move_to_registers(model, registers.NEURONS, **call):
            found.append(model.encode_image(pixels))  # the authors' code took one image at a time
    assert_equal(torch.stack(found), recorded)
    assert_other(found[0], recorded[1])
    assert_other(model.encode_image(pixels), recorded[0])


# ------------------------------------------------------------------------------- dense features

# {preset: (the authors' repository, how the authors resize the position embedding)}
AUTHORS = {
    "sclip": ("sclip", "dino"),
    "naclip": ("naclip", "dino"),
    "clearclip": ("clearclip", "dino"),
    "gem": ("gem", "timm"),
    "clip-surgery": ("clip_surgery", "openai-bilinear"),
}


@pytest.mark.parametrize("preset", AUTHORS)
def test_each_preset_gives_the_same_dense_features_as_its_authors_code(model, preset):
    repository, resize = AUTHORS[preset]
    tolerance = 1e-6 if preset == "naclip" else 1e-12  # NACLIP's Gaussian window is in float32
    expected = values(repository, "patches")
    assert_equal(dense_features(model, common.pixels(), preset), expected, tolerance)
    larger = values(repository, "larger")
    found = dense_features(model, common.pixels(size=16), preset, resize)
    assert_equal(found, larger, tolerance)
    for other in PRESETS.keys() - {preset}:
        assert_other(dense_features(model, common.pixels(), other), expected)
    for other in {"transformers", "timm", "dino", "openai-bilinear"} - {resize}:
        assert_other(dense_features(model, common.pixels(size=16), preset, other), larger)


def test_maskclip_gives_the_same_dense_features_as_the_code_of_clearclip(model):
    found = dense_features(model, common.pixels(), "maskclip")
    assert_equal(found, values("clearclip", "maskclip"))


def test_proxyclip_gives_the_same_dense_features_as_its_authors_code(model):
    foreign, expected = proxyclip.features(), values("proxyclip", "patches")
    assert_equal(dense_features(model, common.pixels(), by_features(foreign)), expected)
    assert_other(dense_features(model, common.pixels(), by_features(foreign, beta=1.0)), expected)
    assert_other(dense_features(model, common.pixels(), by_features(foreign, gamma=1.0)), expected)


# -------------------------------------------------------------------------- weights, texts, prompts


def test_interpolate_gives_the_same_weights_as_wise_ft(model):
    tuned = common.small_clip(seed=1)
    for alpha, expected in zip(wise_ft.ALPHAS, values("wise_ft", "merged"), strict=True):
        found = common.openai_state(model=interpolate(model, tuned, alpha))
        assert_equal(common.digests(found), expected)
        assert_other(common.digests(common.openai_state(model=tuned)), expected)


@pytest.mark.slow
def test_uniform_and_greedy_soups_have_the_same_weights_as_in_the_authors_code():
    models = model_soups.ingredients()

    def score(model):
        projections = model.vision.proj.weight.T, model.text.proj.weight.T
        return model_soups.score(dict(zip(model_soups.SCORED, projections, strict=True)))

    for name, soup in (("uniform", average(models)), ("greedy", greedy_soup(models, score))):
        found = common.digests(common.openai_state(model=soup))
        assert_equal(found, values("model_soups", name))
        for other in (*models, average(models[1:])):
            assert_other(found, common.digests(common.openai_state(model=other)))


def test_learned_prompts_have_the_same_embeddings_as_in_coop(model):
    start, _, rest = model.text.token_embed(coop.IDS).split([1, 2, 4], dim=1)
    learned = common.chirp(2, 8)
    expected = dict(zip(coop.PLACES, values("coop", "embeds"), strict=True))
    for i, length in enumerate(coop.LENGTHS.values()):
        name, end = rest[i, :length], rest[i, length:]
        rows = {
            "end": [learned, name, end],
            "middle": [learned[:1], name, learned[1:], end],
            "front": [name, learned, end],
        }
        for place, row in rows.items():
            vectors = torch.cat([start[i], *row])[None]
            found = encode_prompts(model, vectors, coop.IDS[i : i + 1].argmax(1))
            assert_equal(found[0], expected[place][i])


def test_extend_context_gives_the_same_positions_and_embeddings_as_long_clip():
    long = extend_context(common.small_clip(longclip.CONFIG), 248)
    assert_equal(long.text.pos_embed[:, ::16], values("longclip", "positions"))
    assert_equal(long.encode_text(longclip.ids()), values("longclip", "embeds"))
    other = extend_context(common.small_clip(longclip.CONFIG), 248, method="linear")
    assert_other(other.text.pos_embed[:, ::16], values("longclip", "positions"))


def test_relevance_gives_the_same_scores_as_the_notebook_of_chefer(model):
    pixels = common.pixels()[:1].expand(2, -1, -1, -1)
    for i, start in enumerate(chefer.STARTS):
        found = relevance(model, pixels, common.ids(), start=start)
        assert_equal(found.image[:, 1:], values("chefer", "image")[i])
        assert_equal(found.text, values("chefer", "text")[i])
        assert_other(found.image[:, 1:], values("chefer", "image")[1 - i])


def merged_tokens(x, sizes, keys, count):
    """Pair each even token with the most similar odd token. Average the `count` closest pairs."""
    near = F.normalize(keys, dim=-1)[::2] @ F.normalize(keys, dim=-1)[1::2].T
    near[0] = -torch.inf  # the class token is never merged
    like, to = near.max(1)
    gone = like.argsort(descending=True)[:count].tolist()
    sums, sizes = x * sizes, sizes.clone()
    for token in gone:
        for each in (sums, sizes):
            each[2 * to[token] + 1] += each[2 * token]
    kept = [t for t in range(0, len(x), 2) if t // 2 not in gone] + [*range(1, len(x), 2)]
    return sums[kept] / sizes[kept], sizes[kept]


def test_token_merging_with_three_hooks_gives_the_same_embeddings_as_tome(model):
    state = {"sizes": torch.ones(2, 10, 1, dtype=torch.float64)}

    def merge(x, name):
        rows = zip(x, state["sizes"], state["keys"], strict=True)
        x, state["sizes"] = map(torch.stack, zip(*(merged_tokens(*r, tome.MERGED) for r in rows)))
        return x

    block = "vision.blocks.*"
    edits = {
        f"{block}.attn.k": lambda k, name: state.update(keys=k.mean(2)),
        f"{block}.attn.scores": lambda s, name: s + state["sizes"].log().mT[:, None],
        f"{block}.resid_mid": merge,
    }
    with hooks(model, edits):
        found = model.encode_image(common.pixels())
    assert state["sizes"].shape == (2, 2, 1)
    assert_equal(found, values("tome", "embeds"))
    assert_other(model.encode_image(common.pixels()), values("tome", "embeds"))


def test_sites_have_the_same_values_as_the_hook_points_of_vit_prisma(model):
    block = f"vision.blocks.{vit_prisma.BLOCK}"
    names = {theirs: f"{block}.{ours}".rstrip(".") for theirs, ours in vit_prisma.SITES.items()}
    with cache(model, *names.values(), f"{block}.ln_1.normalized") as acts:
        model.vision.blocks[vit_prisma.BLOCK](vit_prisma.stream())
    found = {theirs: acts[ours] for theirs, ours in names.items()}
    assert_equal(common.digests(found), values("vit_prisma", "sites"))
    assert_equal(acts[f"{block}.ln_1.normalized"][0], values("vit_prisma", "folded"))
    for name in found:  # a control: a change of one tensor changes exactly one digest
        changed = common.digests(
            found | {name: found[name] + 1e-6 * common.chirp(*found[name].shape)}
        )
        assert (changed != common.digests(found)).sum() == 1
