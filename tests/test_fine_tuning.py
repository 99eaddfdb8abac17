"""Fine-tuning: parts of a model, held-out data, logs, restarts, and broken data."""

import json
import math
import signal
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image
from test_recipe import BASE, SHAPE, TRANSFORM, Spots
from test_training import SIZE, assert_equal_models, captioned
from torch import nn

from miniclip import CLIP, ImageTransform, load
from miniclip.commands.main import main
from miniclip.engines import encode_with
from miniclip.evaluation import scorer
from miniclip.retrieval.building import only_writer
from miniclip.training import batches, from_scratch, open_data, train
from miniclip.training import run as run_module
from miniclip.training import shards as shards_module
from miniclip.training.loss import SigmoidLoss
from miniclip.training.optim import trainable

QUICK = replace(BASE, epochs=2)  # each epoch has three steps


def new_model():
    model, tokenizer = from_scratch(SHAPE, Spots(), seed=0)
    return model.eval(), tokenizer


def run(out, recipe, **options):
    model, tokenizer = new_model()
    return train(model, tokenizer, TRANSFORM, Spots(), recipe, out, **options)


def rows_of(out):
    return list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))


def crash_in(step, monkeypatch):
    """Make training crash before it logs this step. Return a function that removes the crash."""
    note = run_module.Run.log_step

    def crash(self, *args):
        if self.step == step:
            raise KeyboardInterrupt
        note(self, *args)

    monkeypatch.setattr(run_module.Run, "log_step", crash)
    return lambda: monkeypatch.setattr(run_module.Run, "log_step", note)


def test_lora_trains_a_low_rank_change_and_saves_merged_weights(tmp_path):
    before, _ = new_model()
    after = run(tmp_path, replace(QUICK, lora=2, lr=0.05))
    names = dict(before.named_parameters())
    for name, p in after.named_parameters():
        change = (p - names[name]).detach()
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            assert torch.linalg.matrix_rank(change, tol=1e-5) in (1, 2), name
        else:
            assert not change.any(), name
    assert_equal_models(CLIP.from_pretrained(tmp_path), after)


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        ("vision", {"text", "logit_scale"}),
        ("vision,logit_scale", {"text"}),
        ("text.*, vision.blocks.*", {"logit_scale", "vision"}),
    ],
)
def test_the_freeze_option_freezes_parameters_by_name_or_pattern(freeze, trained):
    model = trainable(new_model()[0], freeze)
    left = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.partition(".")[0] for name in left} == trained
    assert not any(".blocks." in name for name in left if name.startswith("vision"))


def test_the_freeze_option_freezes_a_part_only_during_the_run(tmp_path):
    model, tokenizer = new_model()
    model.text.pos_embed.requires_grad_(False)  # the user's choice stays
    for i, freeze in enumerate(("vision", "")):
        before = model.vision.proj.weight.clone()
        recipe = replace(QUICK, epochs=1, freeze=freeze)
        train(model, tokenizer, TRANSFORM, Spots(), recipe, tmp_path / str(i))
        assert torch.equal(before, model.vision.proj.weight) == (freeze == "vision")
        fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert fixed == ["text.pos_embed"]


@pytest.mark.parametrize("fixed", [{"freeze": "logit_scale"}, {"lora": 2}])
def test_a_frozen_logit_scale_is_not_clamped(fixed, tmp_path):
    model, tokenizer = new_model()
    model.logit_scale.data.fill_(5.0)  # above the limit, ln 100
    train(model, tokenizer, TRANSFORM, Spots(), replace(QUICK, epochs=1, **fixed), tmp_path)
    assert model.logit_scale.item() == 5.0


def test_two_runs_cannot_write_to_the_same_folder(tmp_path):
    with only_writer(tmp_path / "out"):
        with pytest.raises(ValueError, match="another process is writing here"):
            run(tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_freezing_an_absent_part_or_everything_is_an_error():
    with pytest.raises(ValueError, match="freeze: 'visual' matches none of the parameters logit"):
        trainable(new_model()[0], "text, visual")
    with pytest.raises(ValueError, match="nothing is left to train"):
        trainable(new_model()[0], "*")


def test_training_a_vision_tower_on_an_inference_engine_is_an_error(tmp_path):
    model, tokenizer = new_model()
    encode_with(model, "onnxruntime", model.vision)
    with pytest.raises(ValueError, match="engine onnxruntime, .* `del model.encode_image`"):
        train(model, tokenizer, TRANSFORM, Spots(), QUICK, tmp_path)
    del model.encode_image
    train(model, tokenizer, TRANSFORM, Spots(), replace(QUICK, epochs=1), tmp_path)


def test_weights_cannot_be_sharded_in_a_single_process(tmp_path):
    with pytest.raises(ValueError, match="several processes: start them with torchrun"):
        run(tmp_path, replace(QUICK, fsdp=True))


def test_the_siglip_loss_equals_the_loss_of_transformers():
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**sizes, "vocab_size": 20, "max_position_embeddings": 4},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
    )
    peer = SiglipModel(config).eval()
    peer.logit_scale.data.fill_(1.3)
    peer.logit_bias.data.fill_(-2.5)
    inputs = {"input_ids": torch.arange(12).view(3, 4), "pixel_values": torch.randn(3, 3, 8, 8)}
    found = peer(**inputs, return_loss=True)
    ours, model = SigmoidLoss(), nn.Module()
    assert ours.bias.item() == -10  # the initial value in SigLIP's paper
    ours.bias.data.fill_(-2.5)
    model.logit_scale = peer.logit_scale
    value = ours(model, found.image_embeds, found.text_embeds, torch.eye(3).bool())
    torch.testing.assert_close(value, found.loss)


@pytest.mark.slow
def test_float16_weights_are_trained_as_float32(tmp_path):
    """In float16, small squared gradients and Adam's eps become 0, so the first step is 0 / 0."""
    naive = new_model()[0].half()
    optimizer = torch.optim.AdamW(naive.parameters())
    pixels = torch.rand(4, 3, 12, 12).half()
    naive.encode_image(pixels).sum().backward()
    optimizer.step()
    assert any(p.isnan().any() for p in naive.vision.parameters())

    models = []
    for kind in (torch.float16, torch.float32):
        model, tokenizer = new_model()
        model = model.half().to(kind)
        train(model, tokenizer, TRANSFORM, Spots(), QUICK, tmp_path / str(kind))
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
        models.append(model)
    assert_equal_models(*models)
    assert_equal_models(CLIP.from_pretrained(tmp_path / "torch.float16", dtype=None), models[0])


OPTIONS = {
    "a part": {"lora": 2, "freeze": "text", "loss": "siglip", "layer_decay": 0.5, "ema": 0.5},
    "all": {"loss": "siglip", "layer_decay": 0.5, "muon_lr": 0.02, "chunk": 3},
}


def by_weight(loaded):
    """Return a score that depends only on the weights of one layer."""
    return {"score": loaded.model.vision.blocks[0].attn.q_proj.weight.double().sum().sin().item()}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_continued_run_ends_with_the_same_bits_for_each_option(name, tmp_path, monkeypatch):
    recipe = replace(QUICK, val_every=2, **OPTIONS[name])
    expected = run(tmp_path / "whole", recipe, validate=by_weight)
    restore = crash_in(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "crashed", recipe, validate=by_weight)
    restore()
    assert_equal_models(run(tmp_path / "crashed", recipe, validate=by_weight), expected)
    for part in ("", "best"):
        one, two = (CLIP.from_pretrained(tmp_path / out / part) for out in ("whole", "crashed"))
        assert_equal_models(one, two)
    columns = ("step", "loss", "lr", "val_score")
    found, rows = (
        [[row.get(name) for name in columns] for row in rows_of(tmp_path / out)]
        for out in ("crashed", "whole")
    )
    assert found == rows and [row[0] for row in rows] == [2, 3, 4, 6]


@pytest.mark.parametrize("changed", ["tokenizer", "transform"])
def test_continuing_a_run_with_another_tokenizer_or_transform_is_an_error(
    changed, tmp_path, monkeypatch
):
    """A tokenizer that is learnt again from changed captions gives tokens other ids."""
    model, tokenizer = new_model()
    transform = TRANSFORM
    monkeypatch.setattr(run_module, "SAVE_EVERY", 0)
    restore = crash_in(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, transform, Spots(), QUICK, tmp_path)
    restore()
    if changed == "tokenizer":
        tokenizer.vocab["a"], tokenizer.vocab["b"] = tokenizer.vocab["b"], tokenizer.vocab["a"]
    else:
        transform = replace(TRANSFORM, squash=True)
    with pytest.raises(ValueError, match=f"other values of {changed}; .*command and data, or"):
        train(model, tokenizer, transform, Spots(), QUICK, tmp_path)


@pytest.mark.slow
def test_a_run_saves_its_best_checkpoint_in_a_separate_folder(tmp_path):
    scores, seen = iter([0.2, 0.5, 0.5, 0.3]), []

    def validate(loaded):
        assert not loaded.model.training and loaded.transform == TRANSFORM
        seen.append({name: p.clone() for name, p in loaded.model.state_dict().items()})
        return {"accuracy": next(scores), "other": -1.0}

    recipe = replace(QUICK, epochs=2, val_every=2, ema=0.5)
    with pytest.raises(StopIteration):  # no score is left for the fifth validation
        run(tmp_path, replace(recipe, epochs=3), validate=validate)
    rows = [row for row in rows_of(tmp_path) if "val_accuracy" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [row["val_accuracy"] for row in rows] == [0.2, 0.5, 0.5, 0.3]
    best, tokenizer, transform = load(tmp_path / "best")
    assert all(torch.equal(p, seen[1][name]) for name, p in best.state_dict().items())
    assert transform == TRANSFORM and tokenizer(["a red spot"]).shape[0] == 1


def test_scoring_held_out_data_after_each_epoch_does_not_change_training(tmp_path):
    recipe = replace(QUICK, patch_dropout=0.5, full_epochs=0)  # dropout continues after validation
    expected = run(tmp_path / "without", recipe)
    found = run(tmp_path / "with", recipe, validate=by_weight)
    assert_equal_models(found, expected)
    assert [row["step"] for row in rows_of(tmp_path / "with") if "val_score" in row] == [3, 6]


COLORS = ("red", "green", "blue", "white", "black", "yellow")


@pytest.mark.parametrize("kind", ["folders", "captions", "beside"])
@pytest.mark.sweep(3)
def test_held_out_data_is_scored_by_classification_or_by_retrieval(kind, tmp_path):
    loaded = load("everyday")
    pictures = [Image.new("RGB", (32, 32), color) for color in COLORS]
    texts = ["a photo of a cat.", "a photo of a ship."]
    for i, picture in enumerate(pictures):
        name = ("cat/", "ship/")[i % 2] if kind == "folders" else ""
        (tmp_path / name).mkdir(exist_ok=True)
        picture.save(tmp_path / f"{name}{i}.png")
    if kind != "folders":
        texts = [f"a {color} {thing}" for color, thing in zip(COLORS, "dog cat car".split() * 2)]
        rows = [json.dumps({"image": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
        if kind == "captions":
            (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
        for i, text in enumerate(texts if kind == "beside" else []):
            (tmp_path / f"{i}.txt").write_text(text)
    score = scorer(str(tmp_path), ("image", "text"))(loaded)
    with torch.no_grad():
        pixels, ids = loaded.transform(pictures), loaded.tokenizer(texts)
        logits = loaded.model(pixels, ids).logits_per_image.double()
    if kind == "folders":
        right = logits.argmax(1) == torch.arange(6) % 2
        assert score == {"accuracy": right.double().mean(), "mean_per_class": pytest.approx(
            (right[::2].double().mean() + right[1::2].double().mean()).item() / 2
        )}  # fmt: skip
    else:
        of_images, of_texts = (
            (x.argmax(1) == torch.arange(6)).double().mean().item() for x in (logits, logits.T)
        )
        assert score == {
            "recall@1": (of_images + of_texts) / 2,
            "image_to_text": of_images,
            "text_to_image": of_texts,
        }


def test_open_data_raises_an_error_for_the_name_shapes_if_a_folder_has_this_name(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    open_data("shapes", TRANSFORM)
    for name in ("circle", "square"):
        (tmp_path / "shapes" / name).mkdir(parents=True)
        (tmp_path / "shapes" / name / "a.png").touch()
    with pytest.raises(ValueError, match="the drawn world, but .*: write ./shapes"):
        open_data("shapes", TRANSFORM)
    assert len(open_data("./shapes", TRANSFORM)) == 2


def test_data_one_level_above_the_class_folders_is_an_error(tmp_path):
    """With a folder one level too high, "train" would be a class, in training and in scoring."""
    for name in ("all/train/cat", "all/train/dog", "all/test/cat", "all/test/dog", "one/cat"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    for read in (scorer, lambda root: open_data(root, TRANSFORM)):
        with pytest.raises(ValueError, match="has images in .*If not, move the images into"):
            read(str(tmp_path / "all"))
        with pytest.raises(ValueError, match="has only the folder 'cat'"):
            read(str(tmp_path / "one"))


@pytest.mark.slow
def test_fine_tuning_on_16_images_per_class_beats_zero_shot_on_held_out_images(tmp_path, capsys):
    """A user's commands train the model `shapes` on handwritten digits, which are new to it."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    names = "zero one two three four five six seven eight nine".split()
    for part, chosen in (("train", slice(16)), ("test", slice(16, 36))):
        for digit, name in enumerate(names):
            (tmp_path / part / name).mkdir(parents=True)
            for i, pixels in enumerate(digits.images[digits.target == digit][chosen]):
                picture = Image.fromarray((pixels * 15).astype("uint8"))
                picture.save(tmp_path / part / name / f"{i}.png")
    train, test, tuned = (str(tmp_path / name) for name in ("train", "test", "tuned"))

    def accuracy_interval(model):
        assert main(["eval", test, "--model", model, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["interval"]

    line = ["train", train, "--model", "shapes", "--out", tuned, "--lr", "5e-4", "--json"]
    assert main([*line, "--epochs", "6", "--batch", "32"]) == 0
    assert capsys.readouterr().out
    low, high = accuracy_interval("shapes")
    assert low < 0.1 < high < accuracy_interval(tuned)[0]


@pytest.mark.slow
def test_tensorboard_has_each_step_once_even_after_a_crash(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(run_module, "LOG_EVERY", 1)
    restore = crash_in(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, QUICK, log="tensorboard")
    restore()
    run(tmp_path, QUICK, log="tensorboard", validate=None)
    events = EventAccumulator(str(tmp_path)).Reload()
    rows = rows_of(tmp_path)
    assert events.Tags()["scalars"] == [*rows[0]]
    for name in ("loss", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name])) for row in rows]


def test_the_log_option_is_an_error_if_its_library_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install 'miniclip\\[train\\]'"):
        run(tmp_path, QUICK, log="tensorboard")


@pytest.mark.slow
def test_each_row_of_metrics_has_throughput_and_peak_memory(tmp_path, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(run_module.time, "monotonic", lambda: next(ticks) / 2)
    monkeypatch.setattr(run_module, "SAVE_EVERY", math.inf)
    run(tmp_path, QUICK)
    first, second = rows_of(tmp_path)
    for row, before in ((first, 0), (second, first["seconds"])):
        assert row["pairs_per_second"] == pytest.approx(12 / (row["seconds"] - before))
        assert 0.05 < row["peak_gib"] < 64


@pytest.mark.slow
def test_a_row_of_metrics_counts_the_seconds_of_training_without_validation(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock[0])

    def validate(loaded):
        clock[0] += 1000
        return {"score": 1.0}

    run(tmp_path, QUICK, validate=validate)
    assert clock[0] > 0 and not any(row["seconds"] for row in rows_of(tmp_path))


# ------------------------------------------------------------------------------------------------
# Data from shell commands and URLs, and broken data


@pytest.fixture
def shards(tmp_path):
    captioned(tmp_path, "tar", broken=None)  # 0.tar and 1.tar, with six images each
    return tmp_path


def captions_of(name, steps=6, batch=4):
    data = open_data(name, ImageTransform(SIZE))
    found = [b.captions for b in islice(batches(data, batch, seed=0), steps)]
    return data, found


def test_shards_may_come_from_shell_commands_and_urls(shards, monkeypatch):
    import fsspec
    from huggingface_hub import HfFileSystem

    _, expected = captions_of(shards / "0.tar", batch=2)
    fsspec.filesystem("memory").pipe("/shards/0.tar", (shards / "0.tar").read_bytes())
    for name in (f"pipe:cat {shards}/0.tar", "memory://shards/0.tar"):
        data, found = captions_of(name, batch=2)
        assert len(data) == 6 and found == expected and data.skipped == []
    assert len(open_data(f"pipe:cat {shards}/{{0..1}}.tar", ImageTransform(SIZE))) == 12
    assert fsspec.get_filesystem_class("hf") is HfFileSystem  # for hf:// addresses


def test_a_message_names_a_shard_command_that_fails_and_the_run_continues(shards):
    half = f"pipe:head -c 4000 {shards}/0.tar; exit 3"
    name = f"{half}::pipe:cat {shards}/1.tar::pipe:cat {shards}/absent.tar 2> /dev/null"
    data, found = captions_of(f"{name}::{shards}/gone.tar::memory://gone.tar", batch=4)
    assert 6 < len(data) < 12 and all(len(captions) == 4 for captions in found)
    assert any("head" in reason and "exit status 3" in reason for reason in data.skipped)
    absent = open_data("file:///absent.tar", ImageTransform(SIZE))
    assert len(absent) == 0
    assert absent.skipped == ["file:///absent.tar: No such file or directory"]
    for name in ("absent.tar", "gone.tar", "memory://gone.tar"):
        assert any(reason.partition(": ")[0].endswith(name) or name in reason
                   for reason in data.skipped), name  # fmt: skip


def test_a_shard_command_is_killed_when_its_output_is_no_longer_read(shards, monkeypatch):
    started = []

    class Noted(shards_module.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(shards_module, "Popen", Noted)
    data = open_data(f"pipe:cat {shards}/0.tar; exec sleep 20", ImageTransform(SIZE))
    samples = data._samples(data.paths)
    next(samples)
    samples.close()
    assert started[0].returncode == -signal.SIGKILL


def test_a_shard_that_vanishes_does_not_change_the_start_of_the_next_epoch(shards):
    data = open_data(shards, ImageTransform(SIZE))
    len(data)
    (shards / "1.tar").write_bytes(b"")
    found = list(islice(batches(data, 4, seed=0), 4))
    assert [len(batch.captions) for batch in found] == [4] * 4
    assert any("1.tar" in reason for reason in data.skipped)
    # Step 3 is the first step of the second epoch. Its batch is the same as in the run above.
    late = list(islice(batches(data, 4, seed=0, first=3), 1))
    assert torch.equal(late[0].pixels, found[3].pixels)


def test_a_data_item_that_crashes_is_replaced_and_a_message_names_it():
    class Crashing(Spots):
        def __init__(self):
            self.skipped = []

        def __getitem__(self, item_and_draw):
            if item_and_draw[0] == 3:
                raise RuntimeError("out of luck")
            return super().__getitem__(item_and_draw)

    data = Crashing()
    assert [len(b.captions) for b in islice(batches(data, 6, seed=0), 4)] == [6] * 4
    assert data.skipped == ["item 3: RuntimeError: out of luck"]
