"""Features that are kept, retrieval, probes and few shots. `test_zeroshot.py` has accuracy."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from miniclip import CLIP
from miniclip.checkpoint import Loaded, load
from miniclip.evaluation.features import picture_features
from miniclip.retrieval import Index, embed_images


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load("cifar10")


@pytest.fixture
def pictures(tmp_path):
    """Five pictures of noise, the second of which cannot be read."""
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{i}.png") for i in range(5)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    (tmp_path / "1.png").write_bytes(b"no picture")
    return paths


# ------------------------------------------------------------------------------------------------
# Features


def test_features_are_what_the_tower_projects_and_where_it_projects_to(loaded, pictures):
    found = picture_features(loaded, pictures, batch_size=3)
    assert found.rows == [0, 2, 3, 4] and "1.png" in found.skipped[0]
    model, _, transform = loaded
    pixels = transform([pictures[i] for i in found.rows])
    with torch.no_grad():
        stream = model.vision.blocks(model.vision.embed_tokens(pixels))  # (B, T, W)
        before = model.vision.ln_post(stream[:, 0])
        after = model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(found.vectors["ln_post"], before, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.vectors["proj"], after, atol=1e-6, rtol=0)


def test_kept_features_are_not_computed_again(loaded, pictures, tmp_path, monkeypatch):
    cache, calls = tmp_path / "cache", []
    encode_image = CLIP.encode_image

    def counted(model, pixels, **options):
        calls.append(len(pixels))
        return encode_image(model, pixels, **options)

    monkeypatch.setattr(CLIP, "encode_image", counted)
    first = picture_features(loaded, pictures, cache)
    monkeypatch.chdir(tmp_path)
    second = picture_features(loaded, [os.path.basename(path) for path in pictures], cache)
    assert calls == [4] and (second.rows, second.skipped) == (first.rows, first.skipped)
    assert all(torch.equal(second.vectors[kind], first.vectors[kind]) for kind in first.vectors)
    picture_features(loaded, pictures[:4], cache)
    assert calls == [4, 3]  # other pictures
    picture_features(loaded._replace(model=CLIP(loaded.model.config)), pictures, cache)
    assert calls == [4, 3, 4]  # another model
    Image.new("RGB", (32, 32)).save(pictures[0])
    os.utime(pictures[0], (0, 0))
    third = picture_features(loaded, pictures, cache)
    assert calls == [4, 3, 4, 4]  # a picture that has changed
    assert not torch.equal(third.vectors["proj"][0], first.vectors["proj"][0])


def test_kept_embeddings_are_an_index_and_kept_features_are_none(loaded, pictures, tmp_path):
    picture_features(loaded, pictures, tmp_path / "cache", ("cifar10", None))
    (embeds,) = (tmp_path / "cache").glob("*.proj.safetensors")
    (features,) = (tmp_path / "cache").glob("*.ln_post.safetensors")
    index, expected = Index.load(embeds), embed_images(loaded, [pictures[i] for i in (0, 2, 3, 4)])
    assert [*index.paths] == [*expected.paths]
    torch.testing.assert_close(index.embeddings, expected.embeddings, atol=1e-6, rtol=0)
    assert index.load_encoder().model.model_type == "clip"
    with pytest.raises(ValueError, match="the index was made by"):
        Index.load(features).load_encoder()


def test_a_fork_that_projects_in_its_own_way_has_embeddings_only(loaded, pictures):
    model = CLIP(loaded.model.config)
    model.vision.forward = lambda pixels: pixels.mean((2, 3)) @ torch.ones(3, 64)
    found = picture_features(loaded._replace(model=model), pictures)
    assert {*found.vectors} == {"proj"}
