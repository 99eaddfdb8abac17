"""Test averaged weights, Muon, bfloat16, and captions that are true of several images."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from twin import TINY, random_inputs, twins

from miniclip import ImageTransform, load
from miniclip.loss import contrastive_loss
from miniclip.model import Attention, unit_norm
from miniclip.training import (
    Objective,
    Recipe,
    backward,
    batch_loss,
    batches,
    from_scratch,
    open_data,
    train,
)
from miniclip.training import loop as loop_module
from miniclip.training import loss as loss_module
from miniclip.training import run as run_module
from miniclip.training.optim import Muon, orthogonalized
from miniclip.training.setup import SMALL
from miniclip.zeroshot.classifier import ZeroShotClassifier

KINDS = {
    "red": ["a red picture", "a warm picture", "a picture"],
    "orange": ["an orange picture", "a warm picture", "a picture"],
    "blue": ["a blue picture", "a picture"],
    "green": ["a green picture"],
}


def with_several_captions(folder):
    """Write 16 images, each in a single colour, and all their true captions."""
    rows = []
    for i in range(16):
        kind = list(KINDS)[i % len(KINDS)]
        Image.new("RGB", (32, 32), kind).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": KINDS[kind]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture
def captioned(tmp_path):
    return with_several_captions(tmp_path)


def slow_loss(image, text, scale, captions, kinds):
    """Compute the mean negative log probability of all true pairs, one by one."""

    def mean(rows, columns, is_true):
        total = 0.0
        for i, row in enumerate(rows):
            scores = [math.exp(math.exp(scale) * float(row @ column)) for column in columns]
            true = [j for j in range(len(columns)) if is_true(i, j)]
            total -= sum(math.log(scores[j] / sum(scores)) for j in true) / len(true)
        return total / len(rows)

    of_images = mean(image, text, lambda i, j: captions[j] in KINDS[kinds[i]])
    of_texts = mean(text, image, lambda j, i: captions[j] in KINDS[kinds[i]])
    return (of_images + of_texts) / 2


def kinds_of(pixels):
    """Return the kind of each image, found from the colour of its pixels."""
    colours = {kind: Image.new("RGB", (1, 1), kind).getpixel((0, 0)) for kind in KINDS}
    shown = [tuple(picture[:, 0, 0].tolist()) for picture in pixels]
    return [next(kind for kind in KINDS if colours[kind] == colour) for colour in shown]


@pytest.mark.parametrize("step", range(3))
def test_in_the_loss_a_caption_is_true_of_every_image_that_has_it(captioned, step):
    data = open_data(captioned, ImageTransform(32))
    batch = next(batches(data, batch=12, seed=step, first=step))
    kinds = kinds_of(batch.pixels)
    assert all(text in KINDS[kind] for text, kind in zip(batch.captions, kinds, strict=True))
    generator = torch.Generator().manual_seed(step)
    image, text = unit_norm(torch.randn(2, 12, 5, generator=generator, dtype=torch.float64))
    scale = torch.tensor(2.0, dtype=torch.float64)
    found = batch_loss(scale, batch.labels, batch.also, image, text)
    expected = slow_loss(image, text, scale, batch.captions, kinds)
    assert found.item() == pytest.approx(expected, abs=1e-12)
    # A control: if only equal captions counted as true, the loss would be different.
    assert found != contrastive_loss(image, text, scale, batch.labels[:, None] == batch.labels)


@pytest.mark.parametrize("text", ["a picture", ["a picture"]])
def test_images_with_one_caption_each_add_no_further_true_captions(text, tmp_path):
    for i in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": text}) + "\n" for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("".join(rows))
    batch = next(batches(open_data(tmp_path, ImageTransform(32)), batch=2, seed=0))
    assert batch.also.shape == (2, 0)
    assert batch.captions == ["a picture"] * 2


@pytest.mark.parametrize("text", [["a picture", 3], {"a": "picture"}, 0, ["a picture", ["b"]]])
def test_a_caption_that_is_not_a_string_or_a_list_of_strings_is_an_error(text, tmp_path):
    row = {"file_name": "0.png", "text": text}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"row 1: expected text in file_name and text"):
        open_data(tmp_path, ImageTransform(32))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_captions_from_several_table_rows_are_all_true_of_their_image(kind, tmp_path):
    """For example, COCO has several rows for each image."""
    rows = [(f"{i}.png", f"view {j} of {i}") for j in range(3) for i in range(4)]
    rows.append(("./3.png", "view 0 of 0"))  # also a caption of the first image
    for i in range(4):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / f"{i}.png")
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    else:
        between = {"csv": ",", "tsv": "\t"}[kind]
        lines = [between.join(row) for row in [("file_name", "text"), *rows]]
    (tmp_path / f"metadata.{kind}").write_text("\n".join(lines))
    data = open_data(tmp_path, ImageTransform(32))
    batch = next(batches(data, batch=13, seed=0))
    assert sorted(batch.captions) == sorted(text for _, text in rows)  # each row occurs once
    of_image = torch.cat([batch.labels[:, None], batch.also], dim=1)
    is_true = (of_image[:, :, None] == batch.labels).any(1)
    shown = batch.pixels[:, 0, 0, 0].tolist()
    known = {(int(Path(name).stem), text) for name, text in rows}
    for i, pixel in enumerate(shown):
        assert is_true[i].tolist() == [(pixel, text) in known for text in batch.captions]


def test_the_error_for_half_of_a_surrogate_pair_names_the_row(tmp_path):
    rows = '{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": "a \\ud83d"}\n'
    (tmp_path / "metadata.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=r"metadata.jsonl, row 2: 'a \\ud83d' has half of a"):
        open_data(tmp_path, ImageTransform(32))


def test_empty_captions_are_skipped_and_a_message_gives_their_number(tmp_path):
    for i in range(5):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / f"{i}.png")
    texts = ["a picture", "", None, [], [" ", "another", "\n"]]
    rows = [json.dumps({"image": f"{i}.png", "caption": text}) for i, text in enumerate(texts)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    columns = ("image", "caption")
    data = open_data(tmp_path / "pairs.jsonl", ImageTransform(32), columns)
    assert sorted(next(batches(data, batch=2, seed=0)).captions) == ["a picture", "another"]
    assert data.skipped == [
        f"{tmp_path / 'pairs.jsonl'}: empty captions left out: 5, the first in row 2"
    ]


@pytest.mark.parametrize("between", [",", "\t", ";"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_columns_may_have_any_names_and_be_separated_by_commas_tabs_or_semicolons(
    between, suffix, tmp_path
):
    """open_clip's .csv files have tabs between columns, and many spreadsheets write semicolons."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    rows = [("filepath", "id", "title"), ("a.png", "7", '"a cat, black; asleep"')]
    text = "\n".join(between.join(row) for row in rows)
    (tmp_path / f"train.{suffix}").write_text(text)
    data = open_data(tmp_path / f"train.{suffix}", ImageTransform(32), ("filepath", "title"))
    assert list(data.captions()) == ["a cat, black; asleep"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("b.png,a dog, on grass", "rows cannot be read: row 2 has more columns .* in quotes"),
        ('b.png,"a dog" barks', "row 2 cannot be read: .* write each quote twice"),
        ('b.png,"a dog', "row 2 cannot be read: .* write each quote twice"),
    ],
)
def test_a_caption_that_breaks_the_quoting_rules_of_csv_is_an_error(row, reason, tmp_path):
    """Python's csv module would cut the caption, or join it with all rows below."""
    (tmp_path / "x.csv").write_text(f"file_name,text\na.png,a cat,\n{row}\nc.png,a cow\n")
    with pytest.raises(ValueError, match=f"x.csv.* {reason}"):
        open_data(tmp_path / "x.csv", ImageTransform(32))


def test_chunks_with_several_true_captions_give_the_gradients_of_one_pass():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (6,), generator=generator)
    also = torch.randint(3, (6, 2), generator=generator)
    gradients = []
    for chunk in (0, 2):
        model = twins(TINY)[0].double()
        pixels, ids = random_inputs(TINY, images=6, texts=6)
        loss = partial(batch_loss, model.logit_scale, labels, also)
        backward(Objective(model), pixels, ids, loss, chunk)
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------
# averaged weights

SHAPE = replace(
    SMALL,
    vision=replace(SMALL.vision, width=32, layers=2, heads=2, mlp_width=64, patch_size=8),
    text=replace(SMALL.text, width=32, layers=1, heads=2, mlp_width=64),
)
AVERAGED = Recipe(epochs=4, batch=8, lr=0.01, muon_lr=0.02, patch_dropout=0.5, ema=0.75)


@pytest.mark.slow
def test_a_run_learns_captions_that_are_true_of_several_images(captioned, tmp_path):
    data = open_data(captioned, ImageTransform(32))
    model, tokenizer = from_scratch(SHAPE, data)
    recipe = replace(AVERAGED, epochs=20, patch_dropout=0.0)
    train(model, tokenizer, ImageTransform(32), data, recipe, tmp_path / "run")
    saved, tokenizer, transform = load(tmp_path / "run")
    labels = ["a warm picture", "a blue picture", "a green picture"]
    classifier = ZeroShotClassifier(saved, tokenizer, labels, ["{}"])
    pixels = transform([Image.new("RGB", (32, 32), kind) for kind in KINDS])
    assert classifier(pixels).argmax(-1).tolist() == [0, 0, 1, 2]


def averaged_run(captioned, out):
    data = open_data(captioned, ImageTransform(32))
    model, tokenizer = from_scratch(SHAPE, data)
    return train(model, tokenizer, ImageTransform(32), data, AVERAGED, out)


@pytest.mark.slow
def test_the_checkpoint_is_the_moving_average_of_the_weights_after_each_step(
    captioned, tmp_path, monkeypatch
):
    after_each_step = []

    def clamp_and_note(model):
        clamp(model)
        after_each_step.append([p.detach().clone() for p in model.parameters()])

    clamp = loop_module.clamp_logit_scale
    monkeypatch.setattr(loop_module, "clamp_logit_scale", clamp_and_note)
    model = averaged_run(captioned, tmp_path / "run")
    assert len(after_each_step) == 8
    saved = load(tmp_path / "run")[0]
    for i, (returned, written) in enumerate(
        zip(model.parameters(), saved.parameters(), strict=True)
    ):
        # The average starts as the weights of step 1. After each later step, the new average is 3/4
        # of the old average plus 1/4 of the weights.
        shares = [0.75**7] + [0.25 * 0.75 ** (7 - step) for step in range(1, 8)]
        average = sum(share * p[i] for share, p in zip(shares, after_each_step, strict=True))
        torch.testing.assert_close(returned.data, average, rtol=0, atol=1e-6)
        assert torch.equal(returned, written)


@pytest.mark.slow
def test_a_continued_run_gives_the_same_moving_average_bit_for_bit(
    captioned, tmp_path, monkeypatch
):
    undisturbed = averaged_run(captioned, tmp_path / "undisturbed")
    monkeypatch.setattr(run_module, "SAVE_EVERY", 0)
    note = run_module.Run.log_step

    def stop_at_5(run, *args, **kwargs):
        if run.step == 5:
            raise KeyboardInterrupt
        note(run, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run_module.Run, "log_step", stop_at_5)
        averaged_run(captioned, tmp_path / "stopped")
    continued = averaged_run(captioned, tmp_path / "stopped")
    for found, expected in zip(continued.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_muon_orthogonalizes_stacked_matrices_like_single_matrices(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    matrices *= torch.tensor([1e-3, 1, 1e3])[:, None, None]
    alone = torch.cat([orthogonalized(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalized(matrices), alone, rtol=0, atol=1e-5)
    # The Newton-Schulz iteration gives singular values near 1 (0.7 to 1.2, says Muon's author).
    singular = torch.linalg.svdvals(orthogonalized(matrices))
    assert singular.min() > 0.5 and singular.max() < 1.3


def test_muon_updates_each_matrix_independently():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (6, 4), (4, 6), (5, 5), (6, 4)]
    together = [torch.randn(shape, generator=generator) for shape in shapes]
    alone = [p.clone() for p in together]
    optimizers = [Muon(together, lr=0.1), *(Muon([p], lr=0.1) for p in alone)]
    for _ in range(3):
        for p, twin in zip(together, alone, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            twin.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# bfloat16 on a CPU


def test_a_bfloat16_run_normalises_embeddings_in_float32(captioned, tmp_path, monkeypatch):
    lengths = []

    def note(image, text, *args):
        lengths.extend([*image.norm(dim=1).tolist(), *text.norm(dim=1).tolist()])
        return contrastive_loss(image, text, *args)

    monkeypatch.setattr(loss_module, "contrastive_loss", note)
    data = open_data(captioned, ImageTransform(32))
    model, tokenizer = from_scratch(SHAPE, data)
    recipe = Recipe(epochs=1, batch=16, precision="bfloat16")
    train(model, tokenizer, ImageTransform(32), data, recipe, tmp_path / "run")
    assert lengths == pytest.approx([1] * 32, abs=1e-6)  # in bfloat16 the error would be 1e-3


def test_a_bfloat16_run_uses_eager_attention_and_then_restores_the_old_setting(
    captioned, tmp_path, monkeypatch
):
    written_out = []

    def attend(self, q, k, v):
        written_out.append(q.dtype)
        return original(self, q, k, v)

    original = Attention.attend
    monkeypatch.setattr(Attention, "attend", attend)
    data = open_data(captioned, ImageTransform(32))
    model, tokenizer = from_scratch(SHAPE, data)
    model.vision.blocks[0].attn.eager = True
    recipe = Recipe(epochs=1, batch=16, precision="bfloat16")
    train(model, tokenizer, ImageTransform(32), data, recipe, tmp_path / "run")
    assert written_out == [torch.bfloat16] * (SHAPE.vision.layers + SHAPE.text.layers)
    eager = [layer for layer in model.modules() if isinstance(layer, Attention) and layer.eager]
    assert eager == [model.vision.blocks[0].attn]
