"""The command line: its output, its JSON, its exit status and its one-line errors."""

import argparse
import csv
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import warnings
from functools import partial
from importlib.metadata import version
from io import BytesIO, StringIO, TextIOWrapper

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModelWithProjection
from twin import TINY, transformers_config

import miniclip
from miniclip import load
from miniclip.commands.main import build_parser, main
from miniclip.exhibits import UNKNOWN
from miniclip.exhibits import photographs as sample_photographs
from miniclip.files.hub import embedded_names
from miniclip.follow import ids_for
from miniclip.lens.heat import BLIND, METHODS, text_map
from miniclip.terminal import columns, progress
from miniclip.world import scoring
from miniclip.world.localise import questions
from miniclip.world.scenes import COLOURS
from miniclip.zeroshot.classifier import Score
from miniclip.zeroshot.prompts import CLASS_SETS

LABELS = ["cat", "dog", "ship", "truck", "frog"]


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    return str(tmp_path / "noise.png")


@pytest.fixture
def run(capsys):
    def run(*argv):
        try:
            status = main(argv)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def assert_one_line_error(result, *words):
    status, out, err = result
    assert status == 2
    assert err.startswith("miniclip: error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_classify_sorts_the_labels_of_every_image(run, picture):
    command = ["classify", picture, picture, "--model", "everyday", "--labels", *LABELS]
    status, out, err = run(*command)
    assert status == 0 and err == ""
    assert out.count(picture) == 2
    assert max(len(line) for line in out.splitlines() if picture not in line) <= 80
    status, out, err = run(*command, "--json")
    first, second = json.loads(out)
    assert first == second and first["image"] == picture
    assert sorted(row["label"] for row in first["labels"]) == sorted(LABELS)
    probabilities = [row["probability"] for row in first["labels"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)


def test_classify_gives_the_logits_of_the_model(run, picture):
    model, tokenizer, transform = load("everyday")
    template = "a blurry photo of the {}."
    ids = tokenizer([template.replace("{}", label) for label in LABELS])
    logits = model(transform([picture]), ids).logits_per_image[0].tolist()
    _, out, _ = run(
        "classify", picture, "--model", "everyday", "--template", template, "--json",
        "--labels", *LABELS,
    )  # fmt: skip
    found = {row["label"]: row["logit"] for row in json.loads(out)[0]["labels"]}
    assert found == pytest.approx(dict(zip(LABELS, logits, strict=True)), abs=1e-4)


@pytest.mark.parametrize(
    "labels, says",
    [
        (["cat,dog"], "--labels cat dog"),
        (["cat, a cup of tea"], "--labels cat 'a cup of tea'"),
        (["cat,", "dog,", "ship"], "--labels cat dog ship"),
    ],
)
def test_labels_with_commas_between_them_are_an_error(run, picture, labels, says):
    command = ["classify", picture, "--model", "everyday", "--labels"]
    assert_one_line_error(run(*command, *labels), "expected spaces between", says)
    assert run(*command, "Paris, France", "Rome, Italy")[0] == 0


def test_demo_gives_the_true_labels_in_the_first_figure_of_readme(run, monkeypatch):
    """In README's first figure, each image except UNKNOWN gets its true label."""
    monkeypatch.setattr("miniclip.figures.demo.draw_demo", lambda *_: None)
    found = json.loads(run("demo", "--json")[1])
    best = {row["image"]: row["labels"][0]["label"] for row in found}
    assert best.pop(UNKNOWN) and best.pop("a drawn scene") == "a pink square and a white cross"
    assert best == {
        "coffee": "cup of coffee",
        "rocket": "rocket",
        "grace_hopper": "person in uniform",
        "motorcycle": "vehicle",
    }


@pytest.mark.slow
def test_demo_draws_an_image_and_prints_a_ranking(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("demo")
    assert status == 0 and err == "picture: miniclip-demo.png\n"
    with Image.open(tmp_path / "miniclip-demo.png") as picture:
        assert picture.width > 800
    found = json.loads(run("demo", "--json", "--out", "other.png")[1])
    assert [row["image"] for row in found] == [*sample_photographs(), "a drawn scene"]
    assert (tmp_path / "other.png").exists()
    for table, row in zip(out.split("\n\n"), found):
        title, *lines = table.splitlines()
        assert title == row["image"] and len(lines) == 4
        for line, score in zip(lines, row["labels"]):
            assert line.startswith(f"  {score['label']}") and f"{score['probability']:.1%}" in line
    # the true caption of the scene scores best, and each false caption has one wrong word
    true, *false = (row["label"].split() for row in found[-1]["labels"])
    changed = [[b for a, b in zip(true, one, strict=True) if a != b] for one in false]
    assert sorted(word in COLOURS for (word,) in changed) == [False, False, True, True]


def forget_matplotlib(monkeypatch):
    """Pretend that matplotlib is not installed, and that nothing has imported it yet."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("miniclip.figures")]:
        monkeypatch.delitem(sys.modules, name)


def test_without_matplotlib_demo_describes_the_scene_and_draws_nothing(run, tmp_path, monkeypatch):
    forget_matplotlib(monkeypatch)
    status, out, err = run("demo", "--out", str(tmp_path / "demo.png"))
    assert status == 0 and "a drawn scene" in out and "chelsea" not in out
    assert "miniclip[demo]" in err and not (tmp_path / "demo.png").exists()


@pytest.mark.slow
def test_explain_draws_a_heat_map_for_a_text(run, picture, tmp_path):
    command = ["explain", picture, "a red circle", "--model", "shapes"]
    status, out, err = run(*command, "-o", str(tmp_path / "where.png"))
    assert (status, err) == (0, f"picture: {tmp_path / 'where.png'}\n")
    (line,) = out.splitlines()[1:]
    with Image.open(tmp_path / "where.png") as drawn:
        assert drawn.width > 600 and drawn.convert("RGB").getextrema()[0] == (0, 255)
    status, out, err = run(*command, "--json", "--method", "rollout")
    assert status == 0 and err == ""
    found = json.loads(out)
    assert found["text"] == "a red circle" and found["method"] == "rollout"
    model, tokenizer, transform = load("shapes")
    cosine = model(transform([picture]), tokenizer(["a red circle"])).logits_per_image.item()
    cosine /= model.logit_scale.exp().item()
    assert found["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert line == f"{cosine:6.3f}  a red circle"
    heat = found["map"]
    assert [len(row) for row in heat] == [8] * 8 and 0 < sum(map(sum, heat)) < 1


@pytest.mark.slow
@pytest.mark.parametrize("text", ["кот и пёс", "the \U0001d49c", "日本語の猫", "🐈 \U000f0000"])
def test_explain_draws_texts_in_any_writing_system_without_a_warning(run, picture, tmp_path, text):
    from matplotlib import font_manager

    from miniclip.figures.style import fonts_beside

    out = str(tmp_path / "where.png")
    command = ["explain", picture, text, "--model", "shapes", "--method", "rollout", "-o", out]
    status, table, err = run(*command)
    assert (status, err) == (0, f"picture: {out}\n") and len(table.splitlines()) == 2
    for file in fonts_beside(text).values():
        assert font_manager.get_font(file).get_charmap().keys() & set(map(ord, text))
    if "\U0001d49c" in text:  # a font of matplotlib has this character
        assert fonts_beside(text)


@pytest.mark.slow
def test_explain_with_all_runs_every_method_for_every_text(run, tmp_path):
    picture, out_path = str(tmp_path / "scene.png"), str(tmp_path / "where.png")
    questions(1)[0].picture.save(picture)
    texts = [question.phrase for question in questions(1)]
    command = ["explain", picture, *texts, "--model", "shapes", "--json"]
    status, out, err = run(*command, "--all", "--out", out_path)
    assert status == 0 and err == f"picture: {out_path}\n"
    found = {(row["method"], row["text"]): torch.tensor(row["map"]) for row in json.loads(out)}
    assert list(found) == [(method, text) for method in METHODS for text in texts]
    loaded = load("shapes")
    for (method, text), heat in found.items():
        alone = text_map(picture, text, loaded, method)
        assert torch.allclose(heat, alone, rtol=1e-3, atol=1e-5)
    for method in METHODS:
        same = torch.equal(found[method, texts[0]], found[method, texts[1]])
        assert same == (method in BLIND)
    _, out, _ = run(*command, "--method", "tokens", "--method", "rollout")
    assert [row["method"] for row in json.loads(out)] == ["tokens", "tokens", "rollout", "rollout"]


@pytest.mark.slow
def test_explain_scores_the_methods(run, tmp_path, monkeypatch):
    for slow in ("occlusion", "relevance", "gradcam"):
        monkeypatch.delitem(METHODS, slow)
    command = ["explain", "--score", "shapes", "--model", "shapes", "--scenes", "3"]
    status, out, err = run(*command, "-o", str(tmp_path / "methods.png"))
    assert status == 0 and err == f"picture: {tmp_path / 'methods.png'}\n"
    assert max(map(len, out.splitlines())) <= 80
    with Image.open(tmp_path / "methods.png") as drawn:
        assert drawn.width > 500
    scores = json.loads(run(*command, "--json")[1])
    assert scores["model"] == "shapes" and scores["scenes"] == 3
    assert [row["method"] for row in scores["trained"]] == list(METHODS)

    def shares(*rows):
        shown = [f"{row[k]:.1%}" for row in rows for k in ("pointing", "distracted", "iou")]
        return [rows[0]["method"].split()[-1], *shown]

    lines = [line.split() for line in out.splitlines()]
    rows = [shares(*pair) for pair in zip(scores["trained"], scores["random"], strict=True)]
    table = lines.index("method named other IoU named other IoU".split()) + 1
    assert lines[table : table + len(rows)] == rows
    limits = [line[-4:] for line in lines[table + len(rows) + 1 :][:2]]
    assert limits == [shares(row) for row in scores["limits"]]
    widest = max(v for row in scores["spread"] for v in row.values() if isinstance(v, float))
    assert f"the mean of 5 models; standard deviation at most {widest:.1%}" in out
    assert "scenes  3 of two objects" in out


@pytest.mark.parametrize(
    "options, words",
    [
        ([], ["an image and a text"]),
        (["missing.png", "a cat"], ["missing.png"]),
        (["a.png", "a cat", "--scenes", "3"], ["--score"]),
        (["a.png", "--score", "shapes"], ["no IMAGE"]),
        (["--score", "shapes", "--scenes", "0"], ["at least 1"]),
        (["--score", "shapes", "--all"], ["runs every method"]),
        (["a.png", "a cat", "--all", "--method", "tokens"], ["--method"]),
    ],
)
def test_wrong_options_of_explain_are_an_error(run, options, words):
    assert_one_line_error(run("explain", *options, "--model", "shapes"), *words)


def test_the_explain_command_says_which_argument_is_invalid(run, picture, tmp_path):
    command = ["explain", picture, "a cat", "--model", "shapes", "-o", str(tmp_path / "a.png")]
    assert_one_line_error(run(*command, "--method", "smoothgrad"), "smoothgrad", "rollout")
    assert_one_line_error(run(*command[:3], "word " * 500, *command[3:]), "tokens")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    command[1] = str(tmp_path / "bad.png")
    assert_one_line_error(run(*command), "bad.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("name", ["file/where.png", "where", "where.txt", "folder.png"])
def test_explain_reports_first_that_its_picture_cannot_be_written(run, tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    lost = str(tmp_path / name)
    result = run("explain", "missing.png", "a cat", "--model", "nonsense", "--out", lost)
    assert_one_line_error(result, lost, "cannot be written")


def test_without_matplotlib_explain_can_write_json_but_not_a_picture(run, picture, monkeypatch):
    forget_matplotlib(monkeypatch)
    command = ["explain", picture, "a cat", "--model", "shapes"]
    assert_one_line_error(run(*command), "miniclip[demo]")
    assert run(*command, "--json")[0] == 0


@pytest.mark.slow
def test_eval_shows_the_scores_of_a_model_on_the_drawn_world(run, monkeypatch):
    few = partial(scoring.score, scenes=60)  # instead of 1000
    monkeypatch.setattr(scoring, "score", few)
    command = ["eval", "shapes", "--model", "shapes"]
    scores = json.loads(run(*command, "--json")[1])
    assert scores["seen"] >= 0.95 and scores["unseen"] >= 0.8 and scores["relations"] >= 0.8
    status, out, err = run(*command)
    assert (status, err) == (0, "") and out.startswith("model  shapes")
    shown = [line.split() for line in out.splitlines() if "(chance" in line]
    names = ("seen", "unseen", "relations", "left_right", "above_below", "binding")
    assert [line[-4] for line in shown] == [f"{scores[name]:.1%}" for name in names]
    chance = [f"{1 / 64:.1%}"[:-1]] * 2 + ["50"] * 4  # 8 colours times 8 shapes
    assert [line[-2] for line in shown] == chance
    for option in (["--template", "{}"], ["--labels", "a"], ["--plot", "a.png"]):
        assert_one_line_error(run(*command, *option), "--template, --labels or --plot")


def test_good_images_are_classified_despite_a_bad_one(run, picture, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    status, out, err = run(
        "classify", str(tmp_path / "bad.png"), picture, "--model", "everyday", "--labels", "cat"
    )
    assert_one_line_error((status, out, err), "bad.png")
    assert picture in out


def damaged(tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    if kind == "text":
        path.write_text("this is not an image")
    elif kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        Image.new("RGB", (300, 300), "red").save(path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "bomb":
        Image.new("1", (20_000, 20_000)).save(path)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["absent", "text", "folder", "truncated", "bomb"])
def test_the_error_of_classify_names_an_image_that_cannot_be_read(run, tmp_path, kind):
    path = damaged(tmp_path, kind)
    result = run("classify", path, "--model", "everyday", "--labels", "cat", "dog")
    assert_one_line_error(result, path)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--labels", "cat", ""], ["label is empty"]),
        (["--labels", "cat", "  "], ["label is empty"]),
        (["--labels", "word " * 500], ["tokens"]),
        (["--labels", "cat", "--template", "a photo"], ["{}"]),
        (["--labels", "cat", "--model", "cifar11"], ["cifar11", "everyday"]),
        (["--labels", "cat", "--device", "toaster"], ["toaster"]),
        (["--labels"], ["--labels"]),
        ([], ["--labels"]),
    ],
)
def test_wrong_options_of_classify_are_an_error(run, picture, options, words):
    model = [] if "--model" in options else ["--model", "everyday"]
    assert_one_line_error(run("classify", picture, *model, *options), *words)


@pytest.mark.parametrize("device", ["mps", "gpu", "cuda:99", "vulkan"])
def test_the_error_for_an_absent_device_is_one_short_sentence(run, picture, device):
    command = ["classify", picture, "--labels", "cat", "--model", "everyday", "--device", device]
    result = run(*command)
    assert_one_line_error(result, f"device '{device}' cannot be used: this PyTorch", "finds cpu")
    assert len(result[2]) < 150


def test_the_error_for_too_little_memory_is_one_short_sentence(run, monkeypatch):
    def fill(*_, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. " * 20)

    monkeypatch.setattr(miniclip.Tokenizer, "from_pretrained", fill)
    result = run("tokenize", "a cat")
    assert_one_line_error(result, "too little memory", "--batch")
    assert len(result[2]) < 150


@pytest.mark.parametrize("command", [["classify", "x.png", "--labels", "cat"], ["info"]])
def test_without_a_network_the_error_names_the_embedded_checkpoints(
    run, command, monkeypatch, tmp_path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_one_line_error(run(*command), "openai/clip-vit-base-patch32", "everyday")


@pytest.fixture
def photographs(tmp_path):
    """Seven class folders, eight images in total. One folder has no image; two have a text file."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photographs"
    for i, name in enumerate(["cat", "dog", "fire_truck", "frog", "horse", "ship", "none"]):
        (root / name).mkdir(parents=True)
        for n in range((2, 1, 2, 1, 1, 1, 0)[i]):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{n}.png")
    for name in ("cat", "none"):
        (root / name / "notes.txt").write_text("not an image")
    return root


def test_eval_counts_the_right_answers_of_the_classifier(run, photographs):
    command = [
        "eval",
        str(photographs),
        "--model",
        "everyday",
        *("--template", "a {}"),
        *("--template", "{}"),
    ]
    status, out, err = run(*command, "--json")
    assert status == 0
    assert err.startswith("miniclip: skipped ") and "notes.txt" in err and err.count("\n") == 2
    found = json.loads(out)
    assert found["images"] == 8 and len(found["skipped"]) == 2
    assert found["templates"] == ["a {}", "{}"]

    model, tokenizer, transform = load("everyday")
    labels = ["cat", "dog", "fire truck", "frog", "horse", "none", "ship"]
    classifier = miniclip.ZeroShotClassifier(model, tokenizer, labels, ["a {}", "{}"])
    right = in_top5 = 0
    for row in found["classes"]:
        assert row["label"] == row["folder"].replace("_", " ")
        paths = sorted((photographs / row["folder"]).glob("*.png"))
        best = classifier(transform(paths)).topk(5).indices.tolist()
        guesses = [[labels[i] for i in guess] for guess in best]
        assert row["images"] == len(paths)
        assert row["right"] == sum(guess[0] == row["label"] for guess in guesses)
        right += row["right"]
        in_top5 += sum(row["label"] in guess for guess in guesses)
    assert found["accuracy"] == right / 8 and found["top5"] == in_top5 / 8
    assert sum(row["images"] for row in found["confusions"]) == 8 - right


EVAL_TABLE = f"""\
model      everyday
templates  simple | {{}}
images     12, in 7 folders
skipped    2 unreadable files
empty      1 folder: frog
top-1      58.33%, 95 % interval 31.95% to 80.67%
top-5      91.67%
per class  59.72%, the mean of the classes' top-1
ECE        ERROR, the expected calibration error

class        images   top-1
horse             1  100.0% {52 * "█"}
zebra             1  100.0% {52 * "█"}
cat               4   75.0% {39 * "█"}
fire truck        2   50.0% {26 * "█"}
dog               3   33.3% {17 * "█"}
ship              1    0.0%
frog              0       -

most frequent confusions                                images  of class
dog → cat                                                    2     66.7%
cat → dog                                                    1     25.0%
fire truck → ship                                            1     50.0%
ship → frog                                                  1    100.0%
"""


def test_eval_prints_a_table_of_its_accuracies_and_confusions(run, tmp_path, monkeypatch):
    """There are seven classes. An image's brightness tells the classifier which label to give."""
    answers = {  # class -> the best label of each of its images
        "cat": ["cat", "cat", "cat", "dog"],
        "dog": ["cat", "cat", "dog"],
        "fire_truck": ["ship", "fire_truck"],
        "frog": [],
        "horse": ["horse"],
        "ship": ["frog"],
        "zebra": ["zebra"],
    }
    for i, (folder, best) in enumerate(answers.items()):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for n, label in enumerate(best):
            level = 10 * list(answers).index(label)
            Image.new("RGB", (9, 9), (level, 0, 0)).save(tmp_path / "data" / folder / f"{n}.png")
    for name in ("cat", "frog"):
        (tmp_path / "data" / name / "notes.txt").write_text("not an image")
    transform = load("everyday").transform
    mean, std = transform.image_mean[0], transform.image_std[0]
    count = 0

    def told(self, pixels, **options):
        red = pixels[:, 0].mean((1, 2)) * std + mean
        best = (red * 255 / 10).round().long().clamp(max=count - 1)
        # a label's logit is minus its index, and the best label gets 10 more
        return 10 * torch.nn.functional.one_hot(best, 64).float() - torch.arange(64)

    def axes(model, tokenizer, labels, templates):
        nonlocal count
        count = len(labels)
        return torch.eye(count, 64)

    monkeypatch.setattr(miniclip.CLIP, "encode_image", told)
    monkeypatch.setattr("miniclip.zeroshot.classifier.class_embeddings", axes)
    command = ["eval", str(tmp_path / "data"), "--model", "everyday"]
    status, out, err = run(*command, "--template", "simple", "--template", "{}")
    assert status == 0 and err.startswith("miniclip: skipped ") and "notes.txt" in err
    found = json.loads(run(*command, "--json")[1])
    assert out == EVAL_TABLE.replace("ERROR", f"{found['calibration_error']:.2%}")
    assert found["model"] == "everyday" and found["templates"] == ["a photo of a {}."]
    assert found["accuracy"] == 7 / 12 and found["top5"] == 11 / 12
    assert found["mean_per_class"] == pytest.approx((1 + 1 + 3 / 4 + 1 / 2 + 1 / 3 + 0) / 6)
    assert found["missing"] == ["frog"]
    assert sum(one["images"] for one in found["reliability"]) == 12
    assert found["confusions"][0] == {"true": "dog", "predicted": "cat", "images": 2}
    for name in ("cat", "dog"):  # with five classes, top-5 would always be right
        (tmp_path / "data" / name).rename(tmp_path / name)
    out = run(*command)[1]
    assert "top-1 " in out and "top-5" not in out


@pytest.mark.slow
def test_eval_draws_confusions(run, photographs, tmp_path):
    picture = str(tmp_path / "confusions.png")
    command = ["eval", str(photographs), "--model", "everyday"]
    status, out, err = run(*command, "--plot", picture)
    assert status == 0 and err.endswith(f"picture: {picture}\n")
    assert max(map(len, out.splitlines())) <= 80
    with Image.open(picture) as drawn:
        assert drawn.width > 1000


RANKING = f"""\
PICTURE
  cat{50 * " "}75.3% {14 * "█"}
  {9 * "long "}long…   20.0% {4 * "█"}
  a\\x1bb{48 * " "}4.7% █

PICTURE
  cat  100.0% {65 * "█"}
"""


def test_classify_prints_a_bar_for_each_label(run, picture, monkeypatch):
    long = "long " * 20 + "dog"
    scores = [Score("cat", 3, 0.753), Score(long, 2, 0.2), Score("a\x1bb", 1, 0.047)]
    rankings = [scores, [Score("cat", 3, 1.0)]]
    monkeypatch.setattr(miniclip.ZeroShotClassifier, "rank", lambda *_: [rankings.pop(0)])
    command = ["classify", picture, picture, "--model", "everyday", "--labels", "cat"]
    assert run(*command) == (0, RANKING.replace("PICTURE", picture), "")


def test_the_columns_of_a_table_are_aligned_in_every_writing_system(run, picture):
    labels = ["cat", "猫", "고양이", "word " * 12 + "猫"]
    command = ["classify", picture, "--model", "everyday", "--labels", *labels]
    lines = run(*command)[1].splitlines()[1:]
    assert len({columns(line[: line.index("%")]) for line in lines}) == 1
    assert max(map(columns, lines)) <= 80 and any("…" in line for line in lines)


@pytest.mark.slow
def test_classify_reads_labels_from_every_kind_of_file(run, picture, tmp_path, monkeypatch):
    (tmp_path / "labels.txt").write_text("\ufeffcat\r\n\r\na cup, of tea \r\n")
    (tmp_path / "list.json").write_text('["cat", "a cup, of tea"]')
    (tmp_path / "id2label.json").write_text('{"0": "cat", "1": "a cup, of tea"}')
    (tmp_path / "class_to_idx.json").write_text('{"a cup, of tea": 1, "cat": 0}')
    for name in ("cat", "a cup, of tea"):
        (tmp_path / "folder" / name).mkdir(parents=True)
    command = ["classify", picture, "--model", "everyday", "--json", "--labels"]
    expected = run(*command, "cat", "a cup, of tea")[1]
    for name in ("labels.txt", "list.json", "id2label.json", "class_to_idx.json"):
        assert run(*command, str(tmp_path / name)) == (0, expected, ""), name
    in_order = run(*command, "a cup, of tea", "cat")
    assert run(*command, str(tmp_path / "folder")) == in_order
    monkeypatch.setattr("sys.stdin", StringIO("cat\na cup, of tea\n"))
    assert run(*command, "-")[1] == expected
    rows = json.loads(run(*command, "food101", "--top-k", "3")[1])[0]["labels"]
    assert len(rows) == 3 and {row["label"] for row in rows} < {*CLASS_SETS["food101"]}
    (tmp_path / "bad.json").write_text("[1, 2]")
    (tmp_path / "empty.txt").write_text("\n")
    for name, says in (("bad", "a list of labels"), ("no", "No such"), ("empty", "no labels")):
        file = tmp_path / f"{name}.{'txt' if name == 'empty' else 'json'}"
        assert_one_line_error(run(*command, str(file)), str(file), says)
    assert_one_line_error(run(*command, "cat", "labels.txt"), "'labels.txt' is among labels")
    assert_one_line_error(run(*command, "cat", "-k", "0"), "--top-k is 0")


@pytest.mark.parametrize("asked", [["-", "--labels", "cat"], ["a.png", "--labels", "-"]])
def test_a_closed_standard_input_is_an_error(run, monkeypatch, asked):
    monkeypatch.setattr("sys.stdin", None)
    result = run("classify", *asked, "--model", "everyday")
    assert_one_line_error(result, "standard input is closed")


def test_a_checkpoint_with_one_tower_is_an_error(run, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tower = CLIPVisionModelWithProjection(transformers_config(TINY).vision_config)
    tower.save_pretrained("half")
    miniclip.ImageTransform(40).save_pretrained("half")
    assert run("embed", picture, "--out", "index", "--model", "everyday")[0] == 0
    for command in (
        ["classify", picture, "--labels", "cat"],
        ["train", "shapes", "--out", "run"],
        ["search", "index", "a cat"],
        ["serve", "--port", "0"],
    ):
        result = run(*command, "--model", "half")
        assert_one_line_error(result, "half: has only a vision tower; expected a CLIP")


def test_texts_without_a_tokenizer_are_an_error():
    model = load("everyday").model
    with pytest.raises(ValueError, match="expected a tokenizer, found none"):
        ids_for(model.text, None, ["a cat"])


@pytest.mark.slow
def test_eval_with_missing_or_wrong_class_folders_is_an_error(run, picture, tmp_path):
    """For example, a folder one level too high, a single class, or a class without images."""
    for name in ("data/train/cat", "data/train/dog", "data/test/cat", "data/test/dog"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(picture, tmp_path / name)
    data = tmp_path / "data"
    command = ["eval", "--model", "everyday", "--json"]
    assert_one_line_error(run(*command, str(data)), "has images in", f"in {data / 'test'}. If not")
    assert run(*command, str(data), "--labels", "new", "old")[0] == 0  # classes: train, test
    assert run(*command, str(data / "train"))[0] == 0
    (data / "train" / "frog").mkdir()
    result = run(*command, str(data / "train"))
    assert_one_line_error(result, "no files in 1 of its 3 folders, frog", "of each class")
    shutil.rmtree(data / "train")
    assert_one_line_error(run(*command, str(data)), "only the folder 'test'", str(data / "test"))


def test_classify_reads_images_from_folders_and_patterns_and_standard_input(
    run, picture, tmp_path, monkeypatch
):
    for name in ("a/1.png", "a/b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), "red").save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").touch()
    command = ["--labels", "cat", "dog", "--model", "everyday"]
    monkeypatch.chdir(tmp_path)
    with open(picture, "rb") as file:
        monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(file.read())))
    status, out, err = run("classify", "a", "*/?.png", "absent", "-", *command, "--csv")
    assert_one_line_error((status, out, err), "absent: no such file")
    rows = list(csv.DictReader(StringIO(out)))
    images = ["a/1.png", "a/b/2.png", "a/1.png", "-"]
    assert [row["image"] for row in rows] == [image for image in images for _ in range(2)]
    (named,) = json.loads(run("classify", picture, *command, "--json")[1])
    assert [(r["label"], float(r["logit"]), float(r["probability"])) for r in rows[-2:]] == [
        tuple(row.values()) for row in named["labels"]
    ]
    assert_one_line_error(run("classify", "a", *command, "--csv", "--json"), "not allowed with")


def test_a_search_without_a_query_asks_for_one(run):
    assert_one_line_error(run("search", "any.safetensors"), "no query", "TEXT", "--image")


def test_eval_reads_labels_from_a_file(run, photographs, tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\nlorry\nfrog\nhorse\nnothing\nboat\n")
    command = ["eval", str(photographs), "--model", "everyday", "--json"]
    _, out, _ = run(*command, "--labels", str(tmp_path / "labels.txt"))
    found = {row["folder"]: row["label"] for row in json.loads(out)["classes"]}
    assert found["ship"] == "boat" and found["none"] == "nothing"


@pytest.mark.parametrize(
    "options, words",
    [
        (["absent"], ["absent", "No such file"]),
        (["DATA/cat"], ["no folders"]),
        (["DATA", "--template", "imagenett"], ["imagenett", "imagenet", "simple"]),
        (["DATA", "--template", "word " * 500 + "{}"], ["tokens"]),
        (["DATA", "--labels", "absent.txt"], ["absent.txt", "No such file"]),
        (["DATA", "--labels", "DATA/cat/notes.txt"], ["1 label ", "7 class folders"]),
        (["DATA", "--batch", "0"], ["batch is 0"]),
        (["DATA", "--batch", "x"], ["--batch"]),
        ([], ["DATA"]),
    ],
)
def test_wrong_options_of_eval_are_an_error(run, photographs, options, words):
    options = [option.replace("DATA", str(photographs)) for option in options]
    assert_one_line_error(run("eval", *options, "--model", "everyday"), *words)


def test_info_counts_the_parameters_of_the_model(run):
    status, out, err = run("info", "everyday")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    model = load("everyday").model
    counts = {
        "vision": sum(p.numel() for p in model.vision.parameters()),
        "text": sum(p.numel() for p in model.text.parameters()),
        "both towers": sum(p.numel() for p in model.parameters()),
    }
    found = json.loads(run("info", "everyday", "--json")[1])
    assert sum(part["parameters"] for part in found["parts"]) == counts["both towers"]
    operations = {
        tower: sum(p["multiply_adds"] for p in found["parts"] if p["name"].startswith(tower))
        for tower in ("vision", "text")
    }
    operations["both towers"] = operations["vision"] + operations["text"]
    for name, count in counts.items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"{name}  ")]
        assert line.split()[-2:] == [f"{count:,}", f"{operations[name]:,}"]
    assert out.startswith("everyday: 128-dimensional embeddings\n")
    assert "VisionConfig: width 192, layers 9, heads 3" in out


def test_info_reads_no_weights(run, tmp_path):
    _, out, _ = run("info", "everyday", "--json")
    (tmp_path / "config.json").write_text(json.dumps(json.loads(out)["config"]))
    assert run("info", str(tmp_path))[0] == 0


def test_tokenize_shows_the_ids_of_the_tokenizer(run):
    tokenizer = load("everyday").tokenizer
    status, out, err = run("tokenize", "A photo of  a Cat!", "--model", "everyday", "--json")
    assert status == 0
    assert json.loads(out)["ids"] == tokenizer.encode("a photo of a cat!")
    status, out, err = run("tokenize", "A photo of  a Cat!", "--model", "everyday")
    assert status == 0 and str(tokenizer.encode("cat")[0]) in out
    row = tokenizer("A photo of  a Cat!")[0].tolist()
    assert f"all ids  {' '.join(map(str, row))}\n" in out
    assert f"from the start token {row[0]} to the end token {row[-1]}\n" in out
    assert out.endswith(f"length   {len(row)} of 77 tokens, {77 - len(row)} more fit\n")
    out = run("tokenize", "cat " * 80, "--model", "everyday")[1]
    assert out.endswith("length   82 of 77 tokens, 5 too many\n")


@pytest.mark.parametrize("argv", [["dance"], ["classify"], ["info", "--frob"]])
def test_unknown_commands_and_options_are_errors(run, argv):
    assert_one_line_error(run(*argv), "--help")


COMMANDS = "bench classify convert demo embed eval explain info parity search serve tokenize train"


@pytest.mark.parametrize("name", COMMANDS.split())
def test_help_shows_an_example(run, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(name, "--help")
    assert status == 0 and f"\n  miniclip {name} " in out.partition("example, which runs")[2]
    assert max(map(len, out.splitlines())) <= 92  # examples may be wider than 80 columns


def test_the_command_without_arguments_shows_its_help(run):
    assert run() == (0, run("--help")[1], "")


@pytest.mark.parametrize("name", COMMANDS.split())
def test_help_describes_each_argument_and_names_its_default(name):
    (commands,) = (a for a in build_parser()._actions if getattr(a, "choices", None))
    for action in commands.choices[name]._actions:
        assert action.help, action
        if action.default not in (None, False, "", [], argparse.SUPPRESS):
            assert "(default: " in action.help, action
        if action.dest == "model" and name not in ("search", "train"):
            assert "an embedded checkpoint (" + ", ".join(embedded_names()) in action.help


# These commands run instead of the examples that take minutes.
SMALL_RUNS = """
miniclip explain pictures/coffee.png "a cup of coffee" --all -o where.png --model everyday
miniclip eval noise --model everyday --plot confusions.png
miniclip train noise --out run --epochs 1 --batch 2 --model everyday --plot run.png
miniclip parity shapes --plot depth.png
"""
RUN_ALL = """
import shlex, sys
from miniclip.commands.main import main

for line in sys.stdin:
    status = main(shlex.split(line)[1:])
    assert status == 0, (line, status)
"""


@pytest.mark.slow
def test_the_examples_of_the_help_run_offline_and_without_a_warning(tmp_path):
    """The examples run in an empty folder, with `-W error`. Other tests run bench and serve."""
    (commands,) = (a for a in build_parser()._actions if getattr(a, "choices", None))
    lines = [
        line.strip()
        for parser in commands.choices.values()
        for line in parser.epilog.partition("with ")[0].splitlines()[1:]
    ]
    assert {line.split()[1] for line in lines} == {*COMMANDS.split()}
    slow = "bench", "eval", "explain", "parity", "serve", "train"
    lines = [line for line in dict.fromkeys(lines) if line.split()[1] not in slow]
    for label in ("cat", "dog"):
        (tmp_path / "noise" / label).mkdir(parents=True)
        for i in range(2):
            Image.effect_noise((64, 64), 50).save(tmp_path / "noise" / label / f"{i}.png")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN_ALL],
        input="\n".join([*lines, *SMALL_RUNS.strip().splitlines()]),
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0 and "warning" not in done.stderr.lower(), done.stderr
    for name in ("drinks.png", "pictures/scene.png", "where.png", "confusions.png", "depth.png"):
        assert (tmp_path / name).is_file(), name


def test_the_version_option_shows_the_version_of_the_package(run):
    assert run("--version") == (0, f"miniclip {version('miniclip')}\n", "")


# ------------------------------------------------------------------------------------------------
# What appears on a terminal, and when


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", ["file/where.png", "where", "where.xyz", "folder.png"])
@pytest.mark.parametrize(
    "command",
    [
        ["demo", "--out"],
        ["search", "absent.safetensors", "a cat", "--out"],
        ["bench", "--suite", "nonsense", "--plot"],
        ["parity", "nonsense", "--plot"],
        ["eval", "nonsense", "--plot"],
        ["train", "nonsense", "--out", "run", "--plot"],
    ],
)
def test_a_command_reports_before_the_work_that_its_picture_cannot_be_written(
    run, tmp_path, command, name
):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    result = run(*command, str(tmp_path / name))
    assert_one_line_error(result, name, "cannot be written")
    assert result[1] == "" and {path.name for path in tmp_path.iterdir()} == {"folder.png", "file"}


@pytest.mark.slow
def test_commands_create_the_folder_of_their_output_file(run, picture, tmp_path):
    for command in (
        ["search", str(tmp_path / "a" / "i.idx"), "a cat"],
        ["explain", picture, "a cat", "--model", "shapes", "--method", "rollout"],
        ["embed", picture, "--model", "shapes"],
    ):
        if command[0] == "search":
            run("embed", picture, "--out", command[1], "--model", "shapes")
        out = tmp_path / command[0] / "new" / "where.png"
        assert run(*command, "--out", str(out))[0] == 0 and out.is_file()


STRANGE = "a\nb\x1b[31m\udcff.png"


@pytest.mark.parametrize(("is_terminal", "seconds"), [(True, 2), (False, 30)])
def test_for_progress_a_terminal_gets_a_bar_and_a_log_file_gets_lines(
    is_terminal, seconds, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr("tqdm.tqdm.monitor", None)  # as in a new process
    threads = threading.active_count()
    bar = progress(total=1)
    assert is_terminal or threading.active_count() == threads
    assert (bar.delay, bar.leave) == (seconds, not is_terminal)
    if not is_terminal:
        assert (bar.mininterval, bar.maxinterval, bar.miniters) == (30, math.inf, 1)


@pytest.mark.slow
def test_control_characters_in_file_names_and_labels_are_escaped(
    run, picture, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with open(picture, "rb") as file:
        data = file.read()
    for name in (STRANGE, "bad" + STRANGE):
        with open(name, "wb") as file:
            file.write(data if name == STRANGE else b"")
    escaped = r"a\nb\x1b[31m\udcff.png"
    classify = ["classify", STRANGE, "bad" + STRANGE, "--model", "everyday", "--labels", "a\x1bb"]
    status, out, err = run(*classify)
    assert_one_line_error((status, out, err), "bad" + escaped, "cannot be read")
    assert out.splitlines()[0] == escaped and r"a\x1bb" in out
    assert json.loads(run(*classify, "--json")[1])[0]["image"] == STRANGE

    status, out, err = run("embed", ".", "--out", "i.safetensors", "--model", "everyday")
    assert status == 0 and "bad" + escaped in err and err.count("\n") == 1
    status, out, err = run("search", "i.safetensors", "a cat", "--out", "s.png")
    assert status == 0 and f"  {escaped}\n" in out and out.count("\n") == 2


def test_explaining_an_empty_text_is_an_error(run, picture):
    for text in ("", " \t"):
        result = run("explain", picture, text, "--model", "shapes", "--json")
        assert_one_line_error(result, "a text is empty")


def test_the_error_for_a_long_text_says_what_to_do(run, picture):
    result = run("explain", picture, "word " * 500, "--model", "shapes", "--json")
    assert_one_line_error(result, "Shorten the text, or use truncate=True")


INTERRUPTED = """
import os, signal, sys
class Interrupt:  # Ctrl-C while torch is being imported
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.meta_path.insert(0, Interrupt())
sys.argv = ["miniclip", "tokenize", "a cat", "--model", "everyday"]
"""


@pytest.mark.parametrize(
    "start",
    [
        "from miniclip.commands.main import main; sys.exit(main())",  # the installed command
        "import runpy; runpy.run_module('miniclip', run_name='__main__', alter_sys=True)",
    ],
)
def test_control_c_while_torch_is_imported_ends_without_an_error(start):
    command = [sys.executable, "-c", INTERRUPTED + start]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_reused_without_new_page_faults():
    script = """
import resource, torch
from miniclip.commands.shared import keep_freed_memory
def faults_of_five_tensors():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(16, 2**20)  # 64 MB, above what glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
by_default = faults_of_five_tensors()
keep_freed_memory()
print(by_default, [faults_of_five_tensors() for _ in range(4)][-1])  # the heap has to grow first
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    by_default, kept = map(int, done.stdout.split())
    assert kept < 0.3 * by_default


def test_help_needs_no_torch():
    script = "import sys; sys.modules['torch'] = None; sys.argv = ['miniclip', '-h']; "
    script += "from miniclip.commands.main import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "classify" in done.stdout, done.stderr


def test_a_closed_pipe_ends_a_command_without_an_error(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    assert main(["tokenize", "a cat", "--model", "everyday"]) == 0


def test_only_the_first_line_of_an_error_is_printed(run, monkeypatch):
    def long(*_, **options):
        raise ValueError("what is wrong\nand a list")

    monkeypatch.setattr(miniclip.Tokenizer, "from_pretrained", long)
    assert run("tokenize", "a cat") == (2, "", "miniclip: error: what is wrong\n")


def test_a_warning_is_one_line(run, monkeypatch):
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)
    run("tokenize", "a cat", "--model", "everyday")
    line = warnings.formatwarning("odd weights", UserWarning, "checkpoint.py", 1)
    assert line == "miniclip: warning: odd weights\n"


def test_a_label_file_that_is_a_named_pipe_is_an_error(tmp_path, capsys):
    os.mkfifo(tmp_path / "labels.txt")
    assert main(["eval", str(tmp_path), "--labels", str(tmp_path / "labels.txt")]) == 2
    assert "not a regular file" in capsys.readouterr().err
