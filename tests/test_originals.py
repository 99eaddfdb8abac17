"""Ours against values that the authors' own code gave for the same weights: see originals/."""

import json

import pytest
import torch
from originals import big_vision, common, proxyclip, registers

from miniclip import CLIP, CLIPConfig, VisionConfig
from miniclip.lens import ablate_contributions, decompose
from miniclip.surgery import PRESETS, dense_features, move_to_registers, resize_patch
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
    """A control: what `assert_equal` must not take for equal."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() > 1e-3 * expected.abs().max()


# ------------------------------------------------------------------------------------- clip_prs


def test_decompose_is_clip_prs(model):
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
    for i in range(8):  # another reading, even with the biases folded in
        folded = ours[f"blocks.{i}.attn"] + ours[f"blocks.{i}.attn.v_proj.bias"]
        assert_other(folded / model.encode_image(pixels).norm(dim=-1)[:, None, None], heads[:, i])


def test_ablated_contributions_are_those_of_clip_prs(model):
    for by in ("head", "token"):
        parts = decompose(model, common.pixels(), by, "clip_prs")
        expected = values("clip_prs", "ablated")
        assert_equal(ablate_contributions(parts, {6: [1]}), expected)
        assert_other(ablate_contributions(parts, {6: [0]}), expected)


# ----------------------------------------------------------------------------------- big_vision


def test_resize_patch_is_that_of_flexivit():
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


def test_neurons_move_to_registers_as_in_the_authors_code(model):
    pixels, recorded = common.pixels(), values("registers", "embeds")  # (calls, B, E)
    found = []
    for call in registers.CALLS:
        with move_to_registers(model, registers.NEURONS, **call):
            found.append(model.encode_image(pixels))  # each image of a batch as if alone
    assert_equal(torch.stack(found), recorded)
    assert_other(found[0], recorded[1])
    assert_other(model.encode_image(pixels), recorded[0])


# ------------------------------------------------------------------------------- dense features

# preset -> the repository, and how it resizes the position embedding
AUTHORS = {
    "sclip": ("sclip", "dino"),
    "naclip": ("naclip", "dino"),
    "clearclip": ("clearclip", "dino"),
    "gem": ("gem", "timm"),
    "clip-surgery": ("clip_surgery", "openai-bilinear"),
}


@pytest.mark.parametrize("preset", AUTHORS)
def test_each_preset_is_that_of_its_authors(model, preset):
    repository, resize = AUTHORS[preset]
    tolerance = 1e-6 if preset == "naclip" else 1e-12  # its window is float32
    expected = values(repository, "patches")
    assert_equal(dense_features(model, common.pixels(), preset), expected, tolerance)
    larger = values(repository, "larger")
    found = dense_features(model, common.pixels(size=16), preset, resize)
    assert_equal(found, larger, tolerance)
    for other in PRESETS.keys() - {preset}:
        assert_other(dense_features(model, common.pixels(), other), expected)
    for other in {"transformers", "timm", "dino", "openai-bilinear"} - {resize}:
        assert_other(dense_features(model, common.pixels(size=16), preset, other), larger)


def test_maskclip_is_that_of_clearclips_authors(model):
    found = dense_features(model, common.pixels(), "maskclip")
    assert_equal(found, values("clearclip", "maskclip"))


def test_patches_attend_by_foreign_features_as_in_proxyclip(model):
    foreign, expected = proxyclip.features(), values("proxyclip", "patches")
    assert_equal(dense_features(model, common.pixels(), by_features(foreign)), expected)
    assert_other(dense_features(model, common.pixels(), by_features(foreign, beta=1.0)), expected)
    assert_other(dense_features(model, common.pixels(), by_features(foreign, gamma=1.0)), expected)
