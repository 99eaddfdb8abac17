"""Train in two processes under torchrun, and compare the results with a single process."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from forks.siglip import Siglip, sigmoid_loss
from test_subclasses import SMALL, redraw
from test_training import QUICK, SHAPE, assert_equal_models, assert_same, batch_of, captioned
from test_training_truth import with_several_captions
from twin import TINY, random_inputs, twins
from two_processes import CASES, gradients, loss_of_several_captions, three_steps

from miniclip import CLIP
from miniclip.commands.main import main
from miniclip.model import unit_norm
from miniclip.retrieval import building

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the results of two processes, and with the models that they trained."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("data", "several", "like"):
        (folder / name).mkdir()
    (folder / "like" / "recipe.json").write_text(json.dumps(asdict(QUICK)))
    (folder / "like" / "config.json").write_text(json.dumps(SHAPE.to_dict()))
    captioned(folder / "data", "tar", pictures=25, broken=None)
    # the batch is larger than the data, so the processes get 13 and 12 of the 25 pairs
    lines = {"ddp": train(folder, "--out", folder / "two", "--batch", 1000)}
    lines["undisturbed"] = train(folder, "--out", folder / "undisturbed", "--batch", 1000)
    for name in ("fsdp", "fsdp, stopped"):
        options = ["--val", folder / "data", "--fsdp"]
        lines[name] = train(folder, "--out", folder / name, *SHARDED, *options)
    lines["fsdp, lora"] = train(folder, "--out", folder / "fsdp, lora", *LORA, "--fsdp")
    lines["embed"] = embed(folder, "index")
    (folder / "commands.json").write_text(json.dumps(lines))
    with_several_captions(folder / "several")
    redraw(Siglip(SMALL)).double().save_pretrained(folder / "siglip")
    pixels, ids, labels = batch_of(torch.float64)
    pairs = random_inputs(SMALL, images=4, texts=4)
    inputs = {
        "config": TINY.to_dict(),
        "weights": twins(TINY, dtype=torch.float64)[0].state_dict(),
        "pixels": pixels,
        "ids": ids,
        "labels": labels,
        "embeddings": unit_norm(torch.randn(2, 8, 5, dtype=torch.float64)),
        "pairs": (pairs[0].double(), pairs[1]),
    }
    torch.save(inputs, folder / "inputs.pt")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    script = Path(__file__).with_name("two_processes.py")
    done = subprocess.run(
        [*launcher, str(script), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert re.search("two: continued at step [23]", done.stderr)  # step 2 or 3 was saved last
    return folder


# With these options, a run also saves averaged weights, two optimizers and the bias of the loss.
SHARDED = ["--batch", 12, "--ema", 0.5, "--chunk", 4, "--loss", "siglip", "--layer-decay", 0.8]
SHARDED += ["--muon-lr", 0.01]
LORA = ["--batch", 12, "--lora", 2, "--freeze", "text", "--ema", 0.5]


def train(folder, *options):
    """Return a training command without patch dropout and augmentation, which are random."""
    line = ["train", folder / "data", "--recipe", folder / "like", "--patch-dropout", 0]
    line += ["--no-augment", "--muon-lr", 0, "--epochs", 4, *options]
    return [str(arg) for arg in line]


def embed(folder, out):
    """Return a command that writes an index of the images."""
    line = ["embed", folder / "data", "--model", "everyday", "--json", "--out", folder / out]
    return [str(arg) for arg in line]


@pytest.fixture(scope="module")
def inputs(folder):
    return torch.load(folder / "inputs.pt")


@pytest.fixture(scope="module")
def found(folder):
    """The results of the two processes."""
    return [torch.load(folder / f"found {rank}.pt") for rank in (0, 1)]


def test_two_processes_give_the_gradients_of_one_big_batch(inputs, found):
    for rates, dtype, chunk, engine in CASES:
        tolerance = 1e-12 if dtype == "float64" else 1e-6
        alone = three_steps(inputs, rates, dtype)
        for theirs in (each["steps"][rates, dtype, chunk, engine] for each in found):
            assert theirs["losses"] == pytest.approx(alone["losses"], rel=10 * tolerance)
            assert_same(theirs["grads"], alone["grads"], 10 * tolerance)
            assert_same(theirs["weights"], alone["weights"], tolerance)


def test_gather_sums_its_gradient_over_processes_and_changes_no_other_gradient(found):
    for each, own in zip(found, (3.0, 5.0), strict=True):
        x, y = each["sum"]
        assert x.tolist() == [2 * own] and y.tolist() == [3, 5]


def test_with_several_true_captions_two_processes_give_the_loss_of_one_process(
    folder, inputs, found
):
    alone = loss_of_several_captions(folder / "several", inputs["embeddings"])
    assert [each["several"] for each in found] == pytest.approx([alone] * 2, abs=1e-12)


def test_with_the_siglip_loss_two_processes_give_the_gradients_of_one_big_batch(
    folder, inputs, found
):
    order = [0, 2, 1, 3]  # the first process gets pairs 0 and 2
    pixels, ids = (x[order] for x in inputs["pairs"])
    model = Siglip.from_pretrained(folder / "siglip", dtype=torch.float64)
    images = model.encode_image(pixels, normalize=True)
    texts = model.encode_text(ids, normalize=True)
    sigmoid_loss(model, images, texts, torch.eye(4).bool()).backward()
    for each in found:
        assert_same(each["siglip"], gradients(model), 1e-10)


def test_torchrun_gives_the_same_weights_as_one_process(folder):
    assert main(train(folder, "--out", folder / "one", "--batch", 25)) == 0
    one, two = (CLIP.from_pretrained(folder / name).state_dict() for name in ("one", "two"))
    assert_same(two, one, 1e-4)


def test_a_run_that_torchrun_restarts_ends_with_the_same_bits(folder):
    one, two = (CLIP.from_pretrained(folder / name) for name in ("undisturbed", "two"))
    assert_equal_models(one, two)


def test_embed_under_torchrun_writes_the_same_index_as_one_process(folder, monkeypatch):
    monkeypatch.setattr(building, "PART", 8)  # 25 images make four parts, two in each process
    assert main(embed(folder, "index of one")) == 0
    assert (folder / "index").read_bytes() == (folder / "index of one").read_bytes()
    first, second = ((folder / f"said {rank}").read_text() for rank in (0, 1))
    assert json.loads(first)["images"] == 25 and second == ""


@pytest.mark.parametrize(("name", "options"), [("fsdp", SHARDED), ("fsdp, lora", LORA)])
def test_sharded_weights_train_like_unsharded_weights(name, options, folder):
    assert main(train(folder, "--out", folder / "alone" / name, *options)) == 0
    folders = (folder / "alone" / name, folder / name)
    one, two = (CLIP.from_pretrained(each).state_dict() for each in folders)
    assert_same(two, one, 1e-4)


@pytest.mark.parametrize("part", ["", "best"])
def test_a_sharded_run_that_is_continued_after_a_crash_ends_with_the_same_bits(part, folder):
    one, two = (CLIP.from_pretrained(folder / name / part) for name in ("fsdp", "fsdp, stopped"))
    assert_equal_models(one, two)
