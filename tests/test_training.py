"""Test training. The loss follows its formula, and a continued run equals an uninterrupted run."""

import csv
import errno
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partialmethod
from itertools import islice

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from twin import TINY, random_inputs, transformers_config, twins
from two_processes import gradients, step

from miniclip import CLIP, ImageTransform, TextConfig, VisionConfig, load
from miniclip.commands.main import main
from miniclip.errors import CheckpointError
from miniclip.evaluation import captioned_images
from miniclip.files.pictures import open_image
from miniclip.loss import contrastive_loss
from miniclip.model import unit_norm
from miniclip.training import (
    Recipe,
    batch_loss,
    batches,
    from_scratch,
    gather,
    open_data,
    read_recipe,
    train,
)
from miniclip.training import data as data_module
from miniclip.training import run as run_module
from miniclip.training import shards as shards_module
from miniclip.training.data import augment, class_captions
from miniclip.training.loop import PatchDropout, normalize_pixels, recompute_blocks
from miniclip.training.optim import Muon
from miniclip.training.pairs import caption_label
from miniclip.training.setup import SMALL, set_up
from miniclip.zeroshot.classifier import ZeroShotClassifier

# ------------------------------------------------------------------------------------------------
# the loss


@pytest.fixture
def embeddings():
    generator = torch.Generator().manual_seed(0)
    image, text, wrong = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64)
    return unit_norm(image), unit_norm(text), scale, unit_norm(wrong)


def slow_loss(image, text, scale, labels, wrong=()):
    """Compute the mean negative log probability of the true pairs, pair by pair."""

    def direction(rows, columns):
        total = 0.0
        for i, row in enumerate(rows):
            scores = [math.exp(math.exp(scale) * float(row @ c)) for c in columns]
            partners = [j for j in range(len(columns)) if labels[i] == labels[j]]
            total -= sum(math.log(scores[j] / sum(scores)) for j in partners) / len(partners)
        return total / len(rows)

    loss = (direction(image, text) + direction(text, image)) / 2
    for i, false in enumerate(wrong):
        true, false = (math.exp(math.exp(scale) * float(image[i] @ c)) for c in (text[i], false))
        loss -= math.log(true / (true + false)) / len(wrong)
    return loss


@pytest.mark.parametrize("labels", [None, [0, 1, 0, 2, 1, 0], [3] * 6])
@pytest.mark.parametrize("hard", [False, True])
def test_the_loss_equals_its_formula_computed_pair_by_pair(embeddings, labels, hard):
    image, text, scale, wrong = embeddings
    expected = slow_loss(image, text, scale, labels or list(range(6)), wrong if hard else ())
    given = torch.tensor(labels or range(6))
    texts = torch.cat([text, wrong]) if hard else text
    found = batch_loss(scale, given, given.new_empty(6, 0), image, texts)
    assert found.item() == pytest.approx(expected, abs=1e-12)
    if labels is None and not hard:
        assert contrastive_loss(image, text, scale) == found


def test_the_loss_without_labels_equals_the_loss_of_transformers():
    ours, peer = twins(TINY)
    pixels, ids = random_inputs(TINY, images=4, texts=4)
    out = ours(pixels, ids)
    found = contrastive_loss(out.image_embeds, out.text_embeds, ours.logit_scale)
    expected = peer(pixel_values=pixels, input_ids=ids, return_loss=True).loss
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------
# other ways to compute the same gradients

BATCH = 6
LABELS = torch.tensor([0, 1, 2, 0, 3, 4])


def batch_of(dtype):
    """Return pixels, ids and labels. The true captions' ids come before the false captions' ids."""
    pixels, ids = random_inputs(TINY, images=BATCH, texts=2 * BATCH)
    return pixels.to(dtype), ids, LABELS


def assert_same(found, expected, tolerance):
    for name, value in expected.items():
        worst = (found[name] - value).abs().max().item()
        assert worst <= tolerance * max(1.0, value.abs().max().item()), (name, worst)


def plain_step(model, chunk=0):
    return step(model, *batch_of(model.logit_scale.dtype), chunk)


@pytest.mark.sweep(4)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_two_passes_in_chunks_give_the_gradients_of_one_pass(dtype, tolerance, chunk):
    model, again = (twins(TINY, dtype=dtype)[0] for _ in range(2))
    expected = plain_step(model)
    found = plain_step(again, chunk)
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    assert_same(gradients(again), gradients(model), tolerance)


def test_two_passes_in_chunks_drop_the_same_patches():
    model = twins(TINY, dtype=torch.float64)[0].train()
    PatchDropout(model.vision, 0.5)
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,)).item()
    torch.manual_seed(5)
    found = plain_step(model, chunk=100)
    in_chunks = gradients(model)
    model.zero_grad()
    torch.manual_seed(seed)
    expected = plain_step(model)
    assert found.item() == expected.item()
    assert_same(in_chunks, gradients(model), 1e-12)


def test_recomputed_blocks_give_the_same_gradients():
    model, again = (twins(TINY)[0].train() for _ in range(2))
    calls = []
    again.text.blocks[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    for each, way in ((model, nullcontext()), (again, recompute_blocks(again))):
        PatchDropout(each.vision, 0.5)
        torch.manual_seed(0)
        with way:
            plain_step(each)
    assert_same(gradients(again), gradients(model), 0.0)
    assert len(calls) == 2
    plain_step(again)
    assert len(calls) == 3  # without recompute_blocks, a block is computed once


def test_recomputing_a_block_restores_a_forward_method_set_by_the_user():
    model = twins(TINY)[0]
    block = model.vision.blocks[0]
    block.forward = own = lambda x: x + 1
    with recompute_blocks(model):
        assert block.forward is not own
    assert block.forward is own and "forward" not in vars(model.vision.blocks[1])


def test_gather_in_a_single_process_is_the_identity():
    x = torch.randn(3, 2)
    assert gather(x) is x


# ------------------------------------------------------------------------------------------------
# optimizers and their schedule


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24)])
def test_muon_equals_the_muon_of_torch_up_to_bfloat16_rounding(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    optimizers = [Muon([ours], **options), torch.optim.Muon([theirs], **options)]
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # torch's Muon computes in bfloat16, with two to three correct digits
    assert (ours - theirs).norm() < 0.03 * 5 * 0.02 * min(shape) ** 0.5
    assert (ours - theirs).abs().max() < 0.003


def test_muon_skips_a_matrix_without_a_gradient_as_adamw_does():
    used, unused = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    used.grad = torch.ones(3, 3)
    optimizer = Muon([used, unused], lr=0.1)
    optimizer.step()
    assert (used != 1).all() and (unused == 1).all() and unused not in optimizer.state


# ------------------------------------------------------------------------------------------------
# patch dropout and augmentation


def test_patch_dropout_keeps_the_class_token_and_some_patches_in_order():
    model = twins(TINY)[0]
    pixels, _ = random_inputs(TINY)
    whole = model.vision.embed_tokens(pixels)
    dropout = PatchDropout(model.vision, 0.6)
    assert torch.equal(model.vision.embed_tokens(pixels), whole)  # no patch is dropped in eval mode
    part = model.train().vision.embed_tokens(pixels)
    assert part.shape[1] == 1 + round(0.4 * TINY.vision.patches)
    for kept, full in zip(part, whole, strict=True):
        places = [(full == token).all(-1).nonzero().item() for token in kept]
        assert places[0] == 0 and places == sorted(set(places))
    dropout.close()
    assert torch.equal(model.vision.embed_tokens(pixels), whole)


def test_augmentation_only_mirrors_and_zooms_and_moves_images():
    torch.manual_seed(0)
    across = torch.arange(0, 256, 8, dtype=torch.uint8)  # (32,)
    ramps = torch.stack([across.expand(32, 32), across[:, None].expand(32, 32)])
    moved = augment(ramps[[0, 1, 0]].expand(200, 3, 32, 32))
    assert moved.shape == (200, 3, 32, 32) and moved.dtype == torch.uint8
    middle = moved[:, :, 16, 16].double()
    steps_x = (moved[:, :, 16, 18].double() - moved[:, :, 16, 14].double()) / 4
    steps_y = (moved[:, :, 18, 16].double() - moved[:, :, 14, 16].double()) / 4
    # Images are not rotated, and all channels of an image move together. `zoom` is 1 if the whole
    # image is visible, and 1/2 if half of it is visible.
    assert steps_x[:, 1].abs().max() == 0 and steps_y[:, 0].abs().max() == 0
    assert torch.equal(moved[:, 0], moved[:, 2])
    zoom = steps_x[:, 0].abs() / 8
    assert 0.47 < zoom.min() < 0.55 and 0.95 < zoom.max() < 1.03
    assert 70 < (steps_x[:, 0] > 0).sum() < 130 and steps_y[:, 1].min() > 0  # never upside down
    assert 30 < 128 - middle[:, :2].min() < 47 and 30 < middle[:, :2].max() - 128 < 47


# ------------------------------------------------------------------------------------------------
# pairs

SIZE = 16
SHAPE = replace(
    SMALL,
    vision=VisionConfig(
        width=32, layers=2, heads=2, mlp_width=64, image_size=SIZE, patch_size=4
    ),
    text=TextConfig(
        width=32, layers=1, heads=2, mlp_width=64, vocab_size=600, context_length=24,
        bos_token_id=0, eos_token_id=0,
    ),
    embed_dim=16,
)  # fmt: skip
QUICK = Recipe(epochs=3, batch=32, muon_lr=0.02, patch_dropout=0.25, augment=True)


def bars(kind, generator):
    """Draw vertical or horizontal stripes."""
    rows = generator.integers(0, 256, (1, SIZE, 3)).repeat(SIZE, axis=0)
    return Image.fromarray(
        (rows if kind == "upright" else rows.transpose(1, 0, 2)).astype(np.uint8)
    )


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """A folder with two classes of 80 images each, and one file that is not an image."""
    root = tmp_path_factory.mktemp("stripes")
    generator = np.random.default_rng(0)
    for kind in ("upright", "level"):
        (root / kind).mkdir()
        for i in range(80):
            bars(kind, generator).save(root / kind / f"{i:03}.png")
    (root / "level" / "broken.png").write_bytes(b"no image")
    return root


def captioned(root, kind, pictures=12, broken=3):
    """Write images. Their captions are in metadata.jsonl, in metadata.csv or in tar shards."""
    generator = np.random.default_rng(1)
    rows = []
    for i in range(pictures):
        name = "level" if i % 2 else "upright"
        data = io.BytesIO()
        bars(name, generator).save(data, "png")
        rows.append((f"{i:03}.png", f"{name} bars", data.getvalue()))
    if broken is not None:
        rows[broken] = (*rows[broken][:2], rows[broken][2][:60])
    if kind == "tar":
        for shard in range(2):
            with tarfile.open(root / f"{shard}.tar", "w") as tar:
                for name, text, data in rows[shard::2]:
                    for suffix, content in ((".png", data), (".txt", text.encode())):
                        member = tarfile.TarInfo(name.removesuffix(".png") + suffix)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        return
    for name, _, data in rows:
        (root / name).write_bytes(data)
    with open(root / f"metadata.{kind}", "w", newline="") as file:
        if kind == "jsonl":
            for name, text, _ in rows:
                print(json.dumps({"file_name": name, "text": text}), file=file)
        else:
            writer = csv.writer(file)
            writer.writerows([("file_name", "text"), *((name, text) for name, text, _ in rows)])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tar"])
def test_every_source_gives_its_pairs_and_skips_a_broken_image_with_a_message(kind, tmp_path):
    captioned(tmp_path, kind)
    data = open_data(tmp_path, ImageTransform(SIZE))
    assert len(data) == 12
    assert set(data.captions()) == {"upright bars", "level bars"}
    for batch in islice(batches(data, 4, seed=0), 6):
        assert batch.pixels.shape == (4, 3, SIZE, SIZE) and batch.pixels.dtype == torch.uint8
        for pixels, caption in zip(batch.pixels, batch.captions, strict=True):
            stands = (pixels == pixels[:, :1]).all().item()
            assert caption == ("upright bars" if stands else "level bars")
        same = [[a == b for b in batch.captions] for a in batch.captions]
        assert (batch.labels[:, None] == batch.labels).tolist() == same
    (skipped,) = data.skipped
    assert "003" in skipped


@pytest.mark.parametrize("kind", ["jsonl", "tar"])
def test_batches_do_not_depend_on_the_start_step_or_the_number_of_processes(kind, tmp_path):
    captioned(tmp_path, kind, broken=None)
    data = open_data(tmp_path, ImageTransform(SIZE))
    whole = list(islice(batches(data, 4, seed=3), 8))
    late = list(islice(batches(data, 4, seed=3, first=5), 3))
    for a, b in zip(whole[5:], late, strict=True):
        assert torch.equal(a.pixels, b.pixels) and a.captions == b.captions
    shares = [list(islice(batches(data, 4, seed=3, rank=r, world_size=2), 8)) for r in (0, 1)]
    for i, batch in enumerate(whole):
        for rank in (0, 1):
            assert torch.equal(batch.pixels[rank::2], shares[rank][i].pixels)
            assert batch.captions[rank::2] == shares[rank][i].captions
    other = next(batches(data, 4, seed=4))
    assert not torch.equal(other.pixels, whole[0].pixels)


def test_every_epoch_shows_every_image_once(stripes):
    data = open_data(stripes, ImageTransform(SIZE))
    epochs = [list(data.items(seed)) for seed in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(161))
    assert epochs[0] != epochs[1]


def test_broken_images_are_skipped_with_a_message(stripes):
    data = open_data(stripes, ImageTransform(SIZE))
    for _ in islice(batches(data, 32, seed=0), 12):
        pass
    (skipped,) = data.skipped
    assert "broken.png" in skipped


def test_every_caption_from_a_template_contains_the_class_name(tmp_path):
    plain = class_captions("tea cup")
    assert plain[0] == "tea cup" and plain[3] == "a photo of a tea cup."
    assert len(set(plain)) == 12 and all(text.count("tea cup") == 1 for text in plain)
    for name in ("tea cup", "dog"):
        (tmp_path / name).mkdir()
        bars("level", np.random.default_rng(0)).save(tmp_path / name / "a.png")
    found = open_data(tmp_path, ImageTransform(SIZE))
    assert set(found.captions()) == {*plain, *class_captions("dog")}
    dog, cup = ({found[row, draw].caption for draw in range(500)} for row in range(2))
    assert cup == set(plain) and dog == set(class_captions("dog"))


def test_training_reads_class_folders_as_eval_does(tmp_path):
    """Images are read with any suffix and in any subfolder. ImageNet ids become class names."""
    picture = bars("level", np.random.default_rng(0))
    for name in ("n01440764/deep/a.JPG", "n01440764/b.jpeg", "n01443537/c.PNG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name)
    (tmp_path / "n01443537" / ".DS_Store").touch()
    data = open_data(tmp_path, ImageTransform(SIZE))
    assert [label for _, _, label in data.entries] == [0, 0, 1]
    assert {"a photo of a tench.", "goldfish"} <= set(data.captions())
    assert {data[0, draw].caption for draw in range(200)} == set(class_captions("tench"))


def test_captions_with_the_same_tokens_have_one_label(tmp_path):
    """A caption of one image is then a true caption of the other image too."""
    assert caption_label("A  dog\n") == caption_label("a dog") != caption_label("a cat")
    for name in ("n03773504", "n04008634", "n01440764"):  # ImageNet has two classes "missile"
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
    data = open_data(tmp_path, ImageTransform(SIZE))
    assert len(set(data.captions())) == 24
    assert [label for _, _, label in data.entries] == [0, 1, 1]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])  # Excel writes a byte order mark first
def test_metadata_may_list_files_in_subfolders_and_captions_in_any_writing_system(start, tmp_path):
    (tmp_path / "deep").mkdir()
    bars("level", np.random.default_rng(0)).save(tmp_path / "deep" / "é.png")
    rows = 'file_name,text\r\ndeep/é.png,"Käse, quergestreift"\r\nabsent.png,猫\r\n'
    (tmp_path / "metadata.csv").write_bytes(start + rows.encode())
    data = open_data(tmp_path, ImageTransform(SIZE))
    assert list(data.captions()) == ["Käse, quergestreift", "猫"]
    assert next(batches(data, 2, seed=0)).captions == ["Käse, quergestreift"] * 2
    assert "absent.png" in data.skipped[0]
    (tmp_path / "metadata.csv").write_bytes(rows.encode("latin-1", "replace"))
    with pytest.raises(ValueError, match="metadata.csv: its rows cannot be read.*utf-8"):
        open_data(tmp_path, ImageTransform(SIZE))


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def as_bytes(picture, kind="png", **options):
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def test_reading_shards_turns_images_upright_and_reports_each_skipped_item_once(tmp_path):
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned, so horizontal bars become vertical
    members = {
        "a.JPG": as_bytes(bars("level", generator), "jpeg", exif=exif, quality=100),
        "a.txt": b"\xef\xbb\xbfupright",
        "half.png": as_bytes(bars("level", generator))[:70],
        "half.txt": b"half",
        "no.png": b"no image",
        "no.txt": b"none",
        "mute.png": as_bytes(bars("level", generator)),
        "empty.png": as_bytes(bars("level", generator)),
        "empty.txt": b" ",
        "blind.txt": b"a caption alone",
    }
    tar_of(tmp_path / "0.tar", members)
    (tmp_path / "1.tar").write_bytes(b"no shard")
    (tmp_path / "2.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    data = open_data(tmp_path, ImageTransform(SIZE))
    assert len(data) == 3 and list(data.captions()) == ["upright", "half", "none"]
    for batch in islice(batches(data, 3, seed=0), 3):
        assert batch.captions == ["upright"] * 3
        columns = batch.pixels.float().std(dim=2).mean()  # along a vertical bar
        assert columns < batch.pixels.float().std(dim=3).mean() / 5
    named = ["half.png", "no.png", "mute", "empty", "blind", "1.tar", "2.tar"]
    assert len(data.skipped) == len(named)
    for name in named:
        assert sum(name in reason for reason in data.skipped) == 1, (name, data.skipped)


def test_each_seed_shuffles_shards_and_their_samples_in_another_order(tmp_path, monkeypatch):
    for shard in "abcd":
        members = {f"{i}.png": b"" for i in range(6)}
        members |= {f"{i}.txt": f"{shard}{i}".encode() for i in range(6)}
        tar_of(tmp_path / f"{shard}.tar", dict(sorted(members.items())))

    def order(data, seed):
        return [sample["txt"].decode() for sample in data.items(seed)]

    for name in (tmp_path, tmp_path / "a.tar"):
        data = open_data(name, ImageTransform(SIZE))
        orders = [order(data, seed) for seed in range(4)]
        assert orders[0] == order(data, 0) and len(set(map(tuple, orders))) == 4
        assert all(sorted(found) == sorted(data.captions()) for found in orders)
    monkeypatch.setattr(shards_module.Shards, "BUFFER", 1)
    data = open_data(tmp_path, ImageTransform(SIZE))
    assert len({order(data, seed)[0][0] for seed in range(8)}) > 1


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_caption_that_is_not_utf8_is_skipped_with_a_message(kind, tmp_path):
    """Decoding it with U+FFFD would give another caption."""
    texts = ["a café table".encode("cp1252"), "a café table".encode()]
    members = {f"{i}.txt": text for i, text in enumerate(texts)}
    members |= {f"{i}.png": as_bytes(Image.new("RGB", (8, 8))) for i in range(2)}
    members, name = dict(sorted(members.items())), tmp_path
    if kind == "tar":
        name = tmp_path / "x.tar"
        tar_of(name, members)
    for file, content in members.items() if kind == "folder" else ():
        (tmp_path / file).write_bytes(content)
    data = open_data(name, ImageTransform(SIZE))
    assert list(data.captions()) == ["a café table"] and "UTF-8" in data.skipped[0]
    found = captioned_images(name)
    assert found.captions == [["a café table"]] and "UTF-8: 1" in found.skipped[0]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_with_captions_may_have_any_file_extension_that_pillow_reads(kind, tmp_path):
    members = {}
    for i, ending in enumerate(("bmp", "gif", "jpg", "tif")):
        format = {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending)
        picture = as_bytes(Image.new("RGB", (8, 8), "red"), format)
        members |= {f"{i}.{ending}": picture, f"{i}.txt": f"caption {i}".encode()}
    if kind == "tar":
        members["2.seg.png"] = members["2.JPEG"] = b""  # not the image of sample 2
        tar_of(tmp_path / "x.tar", dict(sorted(members.items())))
    for file, content in members.items() if kind == "folder" else ():
        (tmp_path / file).write_bytes(content)
    data = open_data(tmp_path, ImageTransform(SIZE))
    assert sorted(data.captions()) == [f"caption {i}" for i in range(4)]
    assert all(data[item, 0].pixels[0].min() > 250 for item in data.items(0))


def test_opening_shards_is_an_error_if_webdataset_is_not_installed(tmp_path, monkeypatch):
    tar_of(tmp_path / "0.tar", {})
    monkeypatch.setattr(shards_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'miniclip\\[train\\]'"):
        open_data(tmp_path, ImageTransform(SIZE))


def test_broken_images_are_replaced_by_the_same_images_from_any_start_step(tmp_path):
    captioned(tmp_path, "jsonl", broken=None)
    for i in range(11):
        (tmp_path / f"{i:03}.png").write_bytes(b"")
    data = open_data(tmp_path, ImageTransform(SIZE))
    whole = list(islice(batches(data, 2, seed=0), 9))
    assert all(batch.captions == ["level bars"] * 2 for batch in whole)
    for first in range(1, 9):
        late = next(batches(data, 2, seed=0, first=first))
        assert torch.equal(late.pixels, whole[first].pixels)


def test_data_that_cannot_be_trained_on_is_an_error(tmp_path):
    transform = ImageTransform(SIZE)
    with pytest.raises(ValueError, match="expected a folder of training data"):
        open_data(tmp_path / "absent", transform)
    with pytest.raises(ValueError, match="has no folders"):
        open_data(tmp_path, transform)
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "one.png").touch()
    with pytest.raises(ValueError, match="has only the folder 'cats'"):
        open_data(tmp_path, transform)
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match="no rows"):
        open_data(tmp_path, transform)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,\n")
    with pytest.raises(ValueError, match="no rows with a caption"):
        open_data(tmp_path, transform)
    (tmp_path / "metadata.csv").write_text("filepath,title\na.png,a cat\n")
    says = "row 1: no column 'file_name' in filepath, title; .* --image-column"
    with pytest.raises(ValueError, match=says):
        open_data(tmp_path, transform)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n{"file')
    with pytest.raises(ValueError, match="its rows cannot be read"):
        open_data(tmp_path, transform)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    with pytest.raises(ValueError, match="none of 1 images can be read; the first error: .*a.png"):
        next(batches(open_data(tmp_path, transform), 1, seed=0))
    with pytest.raises(ValueError, match="expected at least 2 images, for one batch; found 1"):
        next(batches(open_data(tmp_path, transform), 2, seed=0))
    with pytest.raises(ValueError, match="1 image to train on; expected at least 2"):
        run(tmp_path, tmp_path / "out")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' * 3)
    with pytest.raises(ValueError, match="every caption is 'a'"):
        run(tmp_path, tmp_path / "out")


# ------------------------------------------------------------------------------------------------
# runs


def run(data, out, recipe=QUICK, transform=None):
    transform = transform or ImageTransform(SIZE)
    source = open_data(data, transform)
    model, tokenizer = from_scratch(SHAPE, source, recipe.seed)
    return train(model, tokenizer, transform, source, recipe, out)


def assert_equal_models(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.fixture(scope="module")
def undisturbed(stripes, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    return run(stripes, out), out


@pytest.mark.slow
def test_a_run_learns_and_transformers_gives_the_same_logits_with_its_weights(stripes, tmp_path):
    trained = run(stripes, tmp_path, replace(QUICK, epochs=12))
    model, tokenizer, transform = load(tmp_path)
    assert_equal_models(model, trained)
    kinds = ["level", "upright"]
    generator = np.random.default_rng(7)
    pixels = transform([bars(kinds[i % 2], generator) for i in range(40)])
    classifier = ZeroShotClassifier(model, tokenizer, kinds)
    right = classifier(pixels).argmax(1) == torch.arange(40) % 2
    assert right.float().mean() > 0.9
    ids = tokenizer(kinds)
    theirs = transformers.CLIPModel.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(pixel_values=pixels, input_ids=ids).logits_per_image
        assert torch.equal(model(pixels, ids).logits_per_image, expected)


def test_a_run_writes_its_recipe_and_losses(undisturbed):
    _, out = undisturbed
    assert read_recipe(out / "recipe.json") == QUICK
    rows = list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert not (out / "training.pt").exists()


def test_the_seed_and_the_data_determine_a_new_model(stripes):
    source = open_data(stripes, ImageTransform(SIZE))
    (model, tokenizer), (again, _), (other, _) = (
        from_scratch(SHAPE, source, seed) for seed in (0, 0, 1)
    )
    assert_equal_models(model, again)
    assert not torch.equal(model.vision.pos_embed, other.vision.pos_embed)
    text = model.config.text
    assert tokenizer([""])[0, :2].tolist() == [text.bos_token_id, text.eos_token_id]
    assert text.vocab_size == len(tokenizer.vocab)
    assert tokenizer.context_length == text.context_length == 24


def test_a_new_model_copies_the_shape_and_recipe_and_transform_of_a_checkpoint(
    stripes, like, tmp_path
):
    """A new model has the checkpoint's shape, recipe, mean and std, unless the user sets them."""
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    for name in ("recipe.json", "config.json"):
        (tmp_path / name).write_bytes((like / name).read_bytes())
    ImageTransform(SIZE, **settings).save_pretrained(tmp_path)
    found = set_up(str(stripes), like=str(tmp_path), overrides={"seed": 5, "epochs": 9})
    assert found.recipe == replace(QUICK, seed=5, epochs=9)
    assert found.model.config.vision == SHAPE.vision and found.model.config.embed_dim == 16
    assert found.transform == ImageTransform(SIZE, **settings)
    assert_equal_models(found.model, from_scratch(SHAPE, found.data, 5)[0])

    shape = replace(SHAPE, embed_dim=24)
    (tmp_path / "shape.json").write_text(json.dumps(shape.to_dict()))
    found = set_up(str(stripes), like=str(tmp_path), config=str(tmp_path / "shape.json"))
    assert found.model.config.embed_dim == 24 and found.recipe == QUICK
    assert found.transform == ImageTransform(SIZE)  # the transform follows `config`, not `like`

    found = set_up(str(stripes))
    assert found.recipe == Recipe() and found.model.config.vision == SMALL.vision
    found = set_up(str(stripes), like=str(tmp_path / "recipe.json"))
    assert found.recipe == QUICK


def test_the_defaults_of_a_recipe_do_not_change():
    """If a default changed, an old training command would give another model."""
    assert asdict(Recipe()) == {
        "epochs": 30, "batch": 256, "lr": 1e-3, "muon_lr": 0.0, "weight_decay": 0.1,
        "warmup": 0.05, "clip_gradient": 1.0, "patch_dropout": 0.0, "full_epochs": 1, "ema": 0.0,
        "augment": False, "hard_negatives": False, "chunk": 0, "checkpoint_blocks": False,
        "precision": "float32", "compile": False, "seed": 0, "layer_decay": 1.0, "loss": "clip",
        "freeze": "", "lora": 0, "val_every": 0, "fsdp": False,
    }  # fmt: skip


def test_every_source_gives_the_pixels_that_the_transform_returns(tmp_path):
    """After normalising, training pixels equal the pixels that `transform` returns."""
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    transform = ImageTransform(SIZE, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    picture.save(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": "a picture"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    tar_of(tmp_path / "a.tar", {"a.png": as_bytes(picture), "a.txt": b"a picture"})
    for name in (tmp_path, tmp_path / "a.tar"):
        data = open_data(name, transform)
        pixels = normalize_pixels(data[next(data.items(0)), 0].pixels[None], transform, False)
        torch.testing.assert_close(pixels[0], transform(picture))


@pytest.mark.parametrize("memory", [3 * SIZE**2, 3 * SIZE**2 - 1])
def test_images_are_decoded_once_if_all_fit_in_memory(memory, tmp_path, monkeypatch):
    captioned(tmp_path, "jsonl", pictures=1, broken=None)
    monkeypatch.setattr(data_module, "MEMORY", memory)
    opened = []
    monkeypatch.setattr(
        data_module, "open_image", lambda path: opened.append(path) or open_image(path)
    )
    data = open_data(tmp_path, ImageTransform(SIZE))
    assert all(torch.equal(data[0, i].pixels, data[0, 0].pixels) for i in range(3))
    assert len(opened) == (1 if memory == 3 * SIZE**2 else 6)


@pytest.mark.slow
@pytest.mark.sweep(3)
@pytest.mark.parametrize(("at", "save_every"), [(7, 0), (7, 300), (10, 300)])
def test_a_run_that_is_stopped_and_started_again_gives_the_same_bits(
    stripes, undisturbed, tmp_path, monkeypatch, at, save_every
):
    note = run_module.Run.log_step

    def stop(self, *args, **kwargs):
        if self.step == at:
            raise KeyboardInterrupt
        note(self, *args, **kwargs)

    monkeypatch.setattr(run_module, "SAVE_EVERY", save_every)
    monkeypatch.setattr(run_module.Run, "log_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(stripes, tmp_path)
    monkeypatch.setattr(run_module.Run, "log_step", note)
    assert_equal_models(run(stripes, tmp_path), undisturbed[0])
    found, expected = ((d / "metrics.jsonl").read_text() for d in (tmp_path, undisturbed[1]))
    for a, b in zip(found.splitlines(), expected.splitlines(), strict=True):
        assert json.loads(a)["loss"] == json.loads(b)["loss"]


def test_control_c_saves_the_run_and_says_how_to_continue(stripes, tmp_path, monkeypatch, capfd):
    note = run_module.Run.log_step

    def interrupt(self, *args, **kwargs):
        note(self, *args, **kwargs)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)  # in this thread, which is the main thread

    monkeypatch.setattr(run_module.Run, "log_step", interrupt)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell may have disabled Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            run(stripes, tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert state["step"] == 2
    said = capfd.readouterr().err
    assert "the run is saved after this step; press Ctrl-C again to stop at once" in said
    assert f"{tmp_path}: saved at step 2; the same command continues from there" in said


def test_a_run_prints_a_line_of_progress_after_the_first_step(
    stripes, tmp_path, monkeypatch, capsys
):
    """The line in a log file gives the pairs per second, the remaining time and the loss."""
    note = run_module.Run.log_step

    def stop(self, *args, **kwargs):
        if self.step == 1:
            raise KeyboardInterrupt
        note(self, *args, **kwargs)

    monkeypatch.setattr(run_module.Run, "log_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(stripes, tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if "left" in line]
    form = r"miniclip: [\d.]+ of [\d.]+ pairs, +[\d.k]+pair/s, [\d:]+ left, loss=[\d.]+"
    assert len(lines) == 1 and re.fullmatch(form, lines[0]), lines


def test_a_new_config_gets_its_vocabulary_size_and_token_ids_from_the_tokenizer(stripes, tmp_path):
    """A transformers config may have a small vocabulary and no ids of special tokens."""
    config = SHAPE.to_dict()
    config["text_config"] = {
        name: value for name, value in config["text_config"].items() if "token_id" not in name
    } | {"vocab_size": 700}
    (tmp_path / "config.json").write_text(json.dumps(config))
    setup = set_up(str(stripes), config=str(tmp_path / "config.json"))
    text, tokenizer = setup.model.config.text, setup.tokenizer
    assert text.vocab_size == tokenizer.vocab_size <= 700
    assert (text.bos_token_id, text.eos_token_id) == (
        tokenizer.bos_token_id, tokenizer.eos_token_id
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.sweep(2)
@pytest.mark.parametrize("at_epoch", [1, 3])
def test_a_run_that_is_killed_while_it_saves_can_be_continued(
    stripes, undisturbed, tmp_path, monkeypatch, at_epoch
):
    saves = []

    def killed(*args):
        saves.append(args)
        if len(saves) == at_epoch:
            raise KeyboardInterrupt
        save(*args)

    save = run_module.save
    monkeypatch.setattr(run_module, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(stripes, tmp_path)
    monkeypatch.setattr(run_module, "save", save)
    run(stripes, tmp_path)
    assert_equal_models(loaded(tmp_path), undisturbed[0])
    assert not (tmp_path / "training.pt").exists()


def test_an_error_in_training_leaves_no_hook_on_the_model(stripes, tmp_path, monkeypatch):
    source = open_data(stripes, ImageTransform(SIZE))
    model, tokenizer = from_scratch(SHAPE, source)
    monkeypatch.setattr(run_module.Run, "log_step", lambda *args, **kwargs: 1 / 0)
    recipe = replace(QUICK, checkpoint_blocks=True)
    with pytest.raises(ZeroDivisionError):
        train(model, tokenizer, ImageTransform(SIZE), source, recipe, tmp_path)
    assert not model.vision.ln_pre._forward_hooks
    assert "forward" not in vars(model.vision.blocks[0])


def test_a_nan_loss_ends_the_run_before_nan_weights_are_saved(stripes, tmp_path):
    with pytest.raises(ValueError, match="the loss is nan after [0-9]+ steps"):
        run(stripes, tmp_path, replace(QUICK, lr=1e18, muon_lr=0.0))
    if (tmp_path / "model.safetensors").exists():
        assert all(p.isfinite().all() for p in loaded(tmp_path).parameters())


def test_losses_stay_on_the_gpu_until_the_run_saves_or_logs(stripes, tmp_path):
    """To read a loss, the CPU must wait for the GPU. Here, reading a meta tensor is an error."""
    model, _ = from_scratch(SHAPE, open_data(stripes, ImageTransform(SIZE)))
    state = run_module.Run(tmp_path, model, QUICK)
    state.note_loss(torch.empty((), device="meta"))
    for read in (
        lambda: state.save(None, None),
        lambda: state.log_step(True, {}),
        state.read_losses,
    ):
        with pytest.raises(RuntimeError, match="meta"):
            read()


def test_a_finished_run_is_not_overwritten(stripes, undisturbed):
    before = (undisturbed[1] / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        run(stripes, undisturbed[1])
    assert (undisturbed[1] / "model.safetensors").read_bytes() == before


def test_continuing_a_run_with_another_recipe_is_an_error(stripes, tmp_path):
    torch.save({"settings": {"recipe": asdict(QUICK), "config": {}}}, tmp_path / "training.pt")
    with pytest.raises(ValueError, match="unfinished run with other values of epochs, seed"):
        run(stripes, tmp_path, replace(QUICK, epochs=1, seed=2))


def test_continuing_from_a_state_with_wrong_values_is_an_error(stripes, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "save", killed)
        run(stripes, tmp_path)
    state = torch.load(tmp_path / "training.pt")
    lies = [{"step": -1}, {"step": "x"}, {"step": True}, {"rows": {1}}, {"seconds": "x"}]
    for lie in [*lies, {"losses": None}, {"rows": 5}]:
        torch.save(state | lie, tmp_path / "training.pt")
        with pytest.raises(CheckpointError, match="training.pt: cannot be continued: .*Error"):
            run(stripes, tmp_path)
    torch.save(state | {"step": 10**9}, tmp_path / "training.pt")
    with pytest.raises(ValueError, match="already ran 1,000,000,000 steps, but"):
        run(stripes, tmp_path)


def test_if_the_disk_is_full_the_error_says_so_and_no_file_remains(stripes, tmp_path, monkeypatch):
    def full(state, file):
        file.write(b"a" * 100)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="cannot save here: .*No space left"):
        run(stripes, tmp_path)
    assert not (tmp_path / "training.pt").exists() and not [*tmp_path.glob(".*")]


@pytest.mark.parametrize("state", [b"damaged", b"", [], {}, {"settings": {}}, {"settings": 0}])
def test_continuing_from_a_damaged_state_file_is_an_error(state, stripes, tmp_path):
    if isinstance(state, bytes):
        (tmp_path / "training.pt").write_bytes(state)
    else:
        torch.save(state, tmp_path / "training.pt")
    with pytest.raises(CheckpointError, match="training.pt: cannot be continued: .*Error"):
        run(stripes, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from torch.compile itself
def test_compiling_changes_the_loss_by_less_than_one_part_in_10000(stripes, tmp_path, monkeypatch):
    """The compiled graphs run without inductor, which would compile C++ for a minute."""
    in_graphs = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", in_graphs)
    plain = replace(QUICK, epochs=1, patch_dropout=0.0)
    losses = []
    for i, recipe in enumerate((plain, replace(plain, compile=True))):
        run(stripes, tmp_path / str(i), recipe)
        losses.append(json.loads((tmp_path / str(i) / "metrics.jsonl").read_text())["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_batch_larger_than_the_data_becomes_as_large_as_the_data(stripes, tmp_path):
    run(stripes, tmp_path, replace(QUICK, epochs=1, batch=10_000))
    assert read_recipe(tmp_path / "recipe.json").batch == 161


def test_a_caption_of_500_words_is_cut_with_a_message(tmp_path, capsys):
    captioned(tmp_path, "jsonl")
    with open(tmp_path / "metadata.jsonl", "a") as file:
        for words in (250, 300):
            row = {"file_name": "000.png", "text": "upright bars " * words}
            print(json.dumps(row), file=file)
    run(tmp_path, tmp_path / "out", replace(QUICK, epochs=3, batch=7))
    said = capsys.readouterr().err
    assert said.count("captions too long for the text tower are cut") == 1
    assert said.count("003.png") == 1  # the message names the broken image
    assert "skipped images or shards: 1;" in said


def test_hard_negatives_need_data_with_false_captions(stripes, tmp_path):
    with pytest.raises(ValueError, match="no false captions"):
        run(stripes, tmp_path, replace(QUICK, hard_negatives=True))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 0, "at least 1"),
        ("batch", 1, "at least 2"),
        ("lr", math.nan, "at least 0"),
        ("clip_gradient", 0.0, "more than 0"),
        ("patch_dropout", 1.0, "0 or more, below 1"),
        ("ema", 1.0, "0 or more, below 1"),
        ("layer_decay", 0.0, "above 0, at most 1"),
        ("layer_decay", 1.5, "above 0, at most 1"),
        ("precision", "float16", "float32 or bfloat16"),
        ("loss", "sigmoid", "clip or siglip"),
        *((name, -1, "at least 0") for name in ("muon_lr", "weight_decay", "warmup", "seed")),
        *((name, -1, "at least 0") for name in ("patch_dropout", "ema", "full_epochs", "chunk")),
        *((name, -1, "at least 0") for name in ("lora", "val_every")),
    ],
)
def test_a_recipe_value_out_of_range_is_an_error(name, value, expected):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected {expected}"):
        Recipe(**{name: value})


def test_a_recipe_may_have_an_integer_in_place_of_a_float(tmp_path):
    (tmp_path / "recipe.json").write_text('{"lr": 1, "augment": true}')
    assert read_recipe(tmp_path / "recipe.json") == Recipe(lr=1, augment=True)
    (tmp_path / "recipe.json").write_text('{"augment": 1}')
    with pytest.raises(CheckpointError, match="augment is 1, not of type bool"):
        read_recipe(tmp_path / "recipe.json")


# ------------------------------------------------------------------------------------------------
# the command


KILLED = """
import os, signal
from two_processes import crash_at, main
crash_at(8, lambda: os.kill(os.getpid(), signal.SIGKILL))
main()
"""


@pytest.fixture(scope="module")
def like(tmp_path_factory):
    """A folder for --recipe, with a recipe and the config of a model."""
    folder = tmp_path_factory.mktemp("like")
    (folder / "recipe.json").write_text(json.dumps(asdict(QUICK)))
    (folder / "config.json").write_text(json.dumps(SHAPE.to_dict()))
    return folder


def loaded(folder):
    return CLIP.from_pretrained(folder)


@pytest.mark.slow
def test_the_same_command_continues_a_killed_run(stripes, like, undisturbed, tmp_path, capsys):
    line = ["train", stripes, "--recipe", like, "--out", tmp_path / "killed"]
    line = list(map(str, line))
    tests = os.path.dirname(__file__)  # where Python finds `two_processes`
    done = subprocess.run([sys.executable, "-c", KILLED, *line], cwd=tests, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert main(line) == 0
    said = capsys.readouterr().err
    assert "continued at step 5" in said and "broken.png" in said
    assert_equal_models(loaded(tmp_path / "killed"), undisturbed[0])


def test_fine_tuning_starts_from_the_checkpoint(stripes, undisturbed, tmp_path):
    line = [
        "train",
        stripes,
        "--model",
        undisturbed[1],
        "--epochs",
        1,
        "--lr",
        0,
        "--out",
        tmp_path,
    ]
    assert main(list(map(str, line))) == 0
    assert_equal_models(loaded(tmp_path), undisturbed[0])


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["absent"], "expected a folder of training data"),
        (["."], "has no folders"),
        ([".", "--model", "absent"], "no checkpoint called 'absent'"),
        ([".", "--recipe", "absent"], "no checkpoint called 'absent'"),
        ([".", "--config", "absent"], "absent: expected a JSON file"),
        ([".", "--model", "everyday", "--config", "x"], "give only one of them"),
        ([".", "--recipe", "odd.json"], "odd.json: unknown entry 'speed'"),
        ([".", "--recipe", "typed.json"], "typed.json: epochs is '3', not of type int"),
        ([".", "--epochs", "0"], "epochs is 0"),
        ([".", "--device", "warp"], "device"),
    ],
)
def test_bad_input_gives_a_one_line_error(args, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.json").write_text('{"speed": 1}')
    (tmp_path / "typed.json").write_text('{"epochs": "3"}')
    assert main(["train", *args, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("miniclip: error: ") and err.count("\n") == 1
    assert reason in err


def test_a_folder_that_cannot_be_written_is_an_error(stripes, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        run(stripes, tmp_path / "file" / "out")


@pytest.mark.slow
def test_the_train_command_draws_training_curves(stripes, like, tmp_path, capsys):
    line = ["train", stripes, "--recipe", like, "--epochs", 2, "--out", tmp_path / "out"]
    line += ["--plot", tmp_path / "curves.png", "--json"]
    assert main(list(map(str, line))) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == [5, 10]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000


def test_initial_weights_have_the_standard_deviations_that_openai_uses():
    torch.manual_seed(0)
    shape = replace(SHAPE, text=replace(SHAPE.text, width=128, layers=3, vocab_size=2000))
    text = CLIP(shape).text
    attn = text.blocks[0].attn
    assert text.token_embed.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert attn.q_proj.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert attn.out_proj.weight.std().item() == pytest.approx(128**-0.5 * 6**-0.5, rel=0.05)
    # transformers swaps the standard deviations of q_proj and out_proj
    theirs = transformers.CLIPModel(transformers_config(shape)).text_model.encoder.layers[0]
    swapped = theirs.self_attn.q_proj.weight.std().item()
    assert swapped == pytest.approx(128**-0.5 * 6**-0.5, rel=0.05)
