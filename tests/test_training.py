"""Contrastive training: the loss against its formula, and a run that learns."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from twin import TINY, random_inputs, twins

from miniclip import load
from miniclip.model import unit_norm
from miniclip.training import (
    PatchDropout,
    Recipe,
    augment,
    clamp_logit_scale,
    contrastive_loss,
    read_class_folders,
    train_from_folders,
)
from miniclip.training.loop import learning_rate, parameter_groups
from miniclip.zeroshot import ZeroShotClassifier


@pytest.fixture
def embeddings():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    return unit_norm(image), unit_norm(text), torch.tensor(2.0, dtype=torch.float64)


def slow_loss(image, text, scale, labels):
    """Mean negative log probability of the pairs that belong together, pair by pair."""
    logits = [[math.exp(scale) * float(a @ b) for b in text] for a in image]
    total = 0.0
    for table in (logits, list(zip(*logits, strict=True))):
        for i, row in enumerate(table):
            partners = [j for j in range(len(row)) if labels[i] == labels[j]]
            norm = math.log(sum(math.exp(score) for score in row))
            total += sum(norm - row[j] for j in partners) / len(partners) / len(table) / 2
    return total


@pytest.mark.parametrize("labels", [None, [0, 1, 0, 2, 1, 0], [3] * 6])
def test_loss_is_the_formula_of_the_paper(embeddings, labels):
    expected = slow_loss(*embeddings, labels or list(range(6)))
    found = contrastive_loss(*embeddings, None if labels is None else torch.tensor(labels))
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_loss_without_labels_is_that_of_transformers():
    ours, peer = twins(TINY)
    pixels, ids = random_inputs(TINY, images=4, texts=4)
    out = ours(pixels, ids)
    found = contrastive_loss(out.image_embeds, out.text_embeds, ours.logit_scale)
    expected = peer(pixel_values=pixels, input_ids=ids, return_loss=True).loss
    torch.testing.assert_close(found, expected)


def test_logit_scale_is_clamped_at_100():
    model = twins(TINY)[0]
    model.logit_scale.data.fill_(7.0)
    clamp_logit_scale(model)
    assert model.logit_scale.exp().item() == pytest.approx(100)


def test_only_matrices_decay():
    model = twins(TINY)[0]
    decayed, spared = parameter_groups(model, 0.1)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    names = {id(p): name for name, p in model.named_parameters()}
    spared_names = {names[id(p)].rpartition(".")[2] for p in spared["params"]}
    assert spared_names == {"bias", "weight", "class_embed", "logit_scale"}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 100, 0.1) for step in range(100)]
    assert max(rates) == 1 and rates[9] == 1 and rates[0] == 0.1
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-3


def test_patch_dropout_keeps_the_class_token_and_some_patches_in_order():
    model = twins(TINY)[0]
    pixels, _ = random_inputs(TINY)
    whole = model.vision.embed(pixels)
    PatchDropout(model.vision, 0.6)
    assert torch.equal(model.vision.embed(pixels), whole)  # not while evaluating
    part = model.train().vision.embed(pixels)
    assert part.shape[1] == 1 + round(0.4 * TINY.vision.patches)
    for kept, full in zip(part, whole, strict=True):
        places = [(full == token).all(-1).nonzero().item() for token in kept]
        assert places[0] == 0 and places == sorted(set(places))


def test_augmentation_moves_and_mirrors_and_invents_nothing():
    generator = torch.Generator().manual_seed(0)
    ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(50, 3, 8, 8)
    moved = augment(ramp, generator, padding=2)
    assert moved.shape == ramp.shape and moved.dtype == torch.uint8
    assert len({tuple(picture.flatten().tolist()) for picture in moved}) > 20
    rises = (moved[:, 0, 4, 4].int() - moved[:, 0, 4, 3].int()).tolist()
    assert set(rises) == {1, -1}


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Two classes, stripes that stand and stripes that lie, and one file that is no image."""
    root = tmp_path_factory.mktemp("stripes")
    generator = np.random.default_rng(0)
    for name in ("upright", "level"):
        (root / name).mkdir()
        for i in range(80):
            bars = generator.integers(0, 256, (1, 16, 3)).repeat(16, axis=0)
            bars = bars if name == "upright" else bars.transpose(1, 0, 2)
            Image.fromarray(bars.astype(np.uint8)).save(root / name / f"{i:03}.png")
    (root / "level" / "broken.png").write_bytes(b"no image")
    return root


def test_broken_images_are_skipped_and_named(stripes):
    data = read_class_folders(stripes, 16)
    assert data.classes == ["level", "upright"] and len(data.labels) == 160
    assert len(data.skipped) == 1 and "broken.png" in data.skipped[0]


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        read_class_folders(tmp_path, 16)
    with pytest.raises(ValueError, match="no images"):
        read_class_folders(tmp_path / "absent", 16)


def test_a_short_run_learns_and_its_checkpoint_loads(stripes, tmp_path):
    recipe = Recipe(epochs=10, batch=32)
    trained = train_from_folders(stripes, tmp_path, recipe, image_size=16)
    model, tokenizer, transform = load(tmp_path)
    assert torch.equal(model.vision.pos_embed, trained.vision.pos_embed)
    data = read_class_folders(stripes, 16)
    classifier = ZeroShotClassifier(model, tokenizer, data.classes)
    found = classifier(transform(list(data.pixels))).argmax(1)
    assert (found == data.labels).float().mean() > 0.9


def test_a_run_is_decided_by_its_seed(stripes, tmp_path):
    runs = [
        train_from_folders(stripes, tmp_path / str(i), Recipe(epochs=1, seed=seed), 16)
        for i, seed in enumerate((0, 0, 1))
    ]
    first, again, other = (run.vision.pos_embed for run in runs)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_batch_larger_than_the_data_is_the_data(stripes, tmp_path):
    train_from_folders(stripes, tmp_path, Recipe(epochs=1, batch=10_000), image_size=16)
    assert (tmp_path / "model.safetensors").is_file()
