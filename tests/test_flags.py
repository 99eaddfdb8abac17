"""Each command passes its flags to the code that uses them, and has the documented defaults."""

import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from twin import TINY, twins

import miniclip
from miniclip.commands.main import main
from miniclip.published import PUBLISHED

OFFICIAL = "openai/clip-vit-base-patch32"

# Command lines that load a model: one for each command, or for each use of a command.
LINES = {
    "classify": "classify PICTURE --labels cat --model MODEL",
    "info": "info MODEL",
    "tokenize": "tokenize cat --model MODEL",
    "parity": "parity MODEL",
    "parity, random": "parity --random tiny",
    "bench": "bench --shape tiny --suite vision",
    "convert": "convert MODEL --out OUT --layout openai",
    "train": "train CLASSES --out OUT --model MODEL --epochs 1",
    "train, from scratch": "train CLASSES --out OUT --epochs 1",
    "eval": "eval CLASSES --model MODEL",
    "eval, drawn world": "eval shapes --model MODEL",
    "explain": "explain PICTURE cat --model MODEL --json",
    "explain, score": "explain --score shapes --model MODEL --json",
    "embed": "embed PICTURE --out OUT --model MODEL",
    "search": "search INDEX cat --model MODEL",
    "search, same model": "search INDEX cat",
    "serve": "serve --model MODEL",
}
EVALUATING = ["eval", "eval, drawn world"]
EXPLAINING = ["explain", "explain, score"]
WITH_REFERENCE = ["classify", "tokenize", *EVALUATING, *EXPLAINING, "embed"]
WITH_REVISION = [*WITH_REFERENCE, "info", "parity", "convert"]
WITH_DEFAULT_MODEL = [*WITH_REFERENCE, "info", "parity", "serve"]
WITH_DEVICE = [name for name in LINES if name not in ("info", "tokenize", "convert")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with an image, class folders, and an index of the image."""
    folder = tmp_path_factory.mktemp("desk")
    pixels = np.random.default_rng(0).integers(0, 256, (36, 36, 3), dtype=np.uint8)
    for name in ("cat", "dog"):
        (folder / "classes" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.roll(pixels, i)).save(folder / "classes" / name / f"{i}.png")
    Image.fromarray(pixels).save(folder / "picture.png")
    line = ["embed", folder / "picture.png", "--out", folder / "index", "--model", "everyday"]
    assert main(list(map(str, line))) == 0
    return folder


@pytest.fixture
def run(desk, tmp_path, monkeypatch, capsys):
    """Return a function that runs `line`, or LINES[line] if it exists, in an empty folder."""
    monkeypatch.setitem(PUBLISHED, "tiny", TINY)
    monkeypatch.setattr("miniclip.page.serve.serve_until_interrupted", lambda app, listening: None)
    monkeypatch.chdir(tmp_path)

    def run(line, model="everyday"):
        words = {"MODEL": model, "OUT": "out", "INDEX": desk / "index"}
        words |= {"PICTURE": desk / "picture.png", "CLASSES": desk / "classes"}
        argv = [str(words.get(word, word)) for word in shlex.split(LINES.get(line, line))]
        try:
            status = main(argv)
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def output(run):
    """Return a function that runs a command line and returns its JSON."""

    def output(line, model="everyday"):
        status, out, err = run(f"{line} --json", model)
        assert status == 0, err
        return json.loads(out)

    return output


def assert_error(result, *words):
    status, _, err = result
    err = re.sub("miniclip: asking the Hugging Face hub for .*\n", "", err)  # printed only once
    assert status == 2 and err.startswith("miniclip: error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


# ------------------------------------------------------------------------------------------------
# Flags that choose a model and say how to load it


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that has no files. Its error names the requested repository and revision."""

    def asked(repository, *, revision, **options):
        raise ValueError(f"asked for {repository} at {revision}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)


@pytest.mark.parametrize("name", WITH_REVISION)
def test_each_command_passes_its_revision_flag_to_the_hub(run, no_hub, name):
    line = LINES[name]
    assert_error(run(f"{line} --revision second", "me/mine"), "asked for me/mine at second")
    assert_error(run(line, "me/mine"), "asked for me/mine at None")


@pytest.mark.parametrize("name", WITH_DEFAULT_MODEL)
def test_the_default_model_is_from_openai(run, no_hub, name):
    line = LINES[name].replace("--model", "").replace("MODEL", "")
    assert_error(run(line), f"asked for {OFFICIAL} at None")


@pytest.mark.slow
@pytest.mark.parametrize("part", [miniclip.Tokenizer, miniclip.ImageTransform])
@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_each_command_passes_its_reference_flag_to_tokenizer_and_transform(
    run, monkeypatch, name, part
):
    if name == "tokenize" and part is miniclip.ImageTransform:
        return

    def asked(name, *, reference="not said", **options):
        raise ValueError(f"reference {reference}")

    monkeypatch.setattr(part, "from_pretrained", asked)
    assert_error(run(f"{LINES[name]} --reference openai"), "reference openai")
    assert_error(run(name), "reference transformers")


@pytest.mark.parametrize("name", WITH_DEVICE)
def test_each_command_passes_its_device_flag_to_the_model(run, name):
    assert_error(run(f"{LINES[name]} --device toaster"), "device 'toaster' cannot be used")


@pytest.mark.slow
def test_an_index_stores_the_commit_of_the_loaded_model(run, output, monkeypatch, tmp_path):
    """The hub's client stores a model in a folder that has the commit's name."""

    def snapshot(repository, *, revision, **options):
        folder = tmp_path / "models--me--mine" / "snapshots" / f"commit-of-{revision}"
        if not folder.is_dir():
            miniclip.save(folder, *miniclip.load("everyday"))
        return str(folder)

    def asked(repository, *, revision, **options):
        raise ValueError(f"asked for {repository} at {revision}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    index = output("embed PICTURE --out out --model MODEL --revision second", "me/mine")
    assert (index["model"], index["revision"]) == ("me/mine", "commit-of-second")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    assert_error(run("search out cat"), "asked for me/mine at commit-of-second")


# ------------------------------------------------------------------------------------------------
# Flags for amounts, methods and outputs


def test_embeddings_have_the_requested_dtype(output):
    found = {
        dtype: output(f"embed PICTURE --out {dtype} --model everyday {flag}")["dtype"]
        for dtype, flag in [("float32", ""), ("bfloat16", "--dtype bfloat16")]
    }
    assert found == {"float32": "float32", "bfloat16": "bfloat16"}


@pytest.mark.slow
def test_parity_measures_errors_in_the_requested_dtype(output):
    errors = {
        dtype: max(
            row["model_error"] for row in output(f"parity --random tiny --dtype {dtype}")["rows"]
        )
        for dtype in ("float32", "bfloat16")
    }
    assert errors["float32"] < 1e-3 < errors["bfloat16"]
    assert output("parity --random tiny")["dtype"] == "float32"


@pytest.mark.slow
def test_parity_prints_the_measured_errors(run, output):
    (found,) = [r for r in output("parity --random tiny")["rows"] if r["site"] == "logits"]
    columns = ("absolute", "relative", "float64", "model_error", "other_error")
    lines = [line.split() for line in run("parity --random tiny")[1].splitlines()]
    assert ["logits", *(f"{found[column]:.1e}" for column in columns)] in lines


@pytest.mark.slow
def test_bench_measures_the_requested_cases(run, monkeypatch):
    """The test checks the list of cases, and measures none of them."""
    cases = []
    monkeypatch.setattr("miniclip.bench.suites.measure", lambda case, *_: cases.append(case) or [])
    assert run("bench --shape tiny --suite vision text")[0] == 0
    works = [case.work for case in cases]
    assert works[1].startswith("16 images, tiny, float32") and works[2].startswith("16 captions")
    assert not any("compiled" in name for case in cases for name in case.trials)
    cases.clear()
    monkeypatch.setattr("torch.compile", lambda encoder, **options: encoder)
    line = "bench --shape tiny --suite vision --batch 3 --dtype bfloat16 --compile"
    assert run(line)[0] == 0
    assert cases[1].work == "3 images, tiny, bfloat16"
    assert sum("compiled" in name for name in cases[1].trials) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eval", "embed"])
def test_batches_have_64_images_by_default(run, monkeypatch, tmp_path, name):
    for label in ("cat", "dog"):
        (tmp_path / "many" / label).mkdir(parents=True)
    for i in range(70):
        folder = tmp_path / "many" / ("cat", "dog")[i % 2]
        Image.new("RGB", (8, 8), (3 * i, 0, 0)).save(folder / f"{i}.png")
    sizes, encode_image = [], miniclip.CLIP.encode_image

    def seen(model, pixels, **options):
        sizes.append(len(pixels))
        return encode_image(model, pixels, **options)

    monkeypatch.setattr(miniclip.CLIP, "encode_image", seen)
    line = LINES[name].replace("CLASSES", "many").replace("PICTURE", "many")
    assert run(line)[0] == 0 and set(sizes) == {64, 6}
    sizes.clear()
    assert run(line.replace("OUT", "other") + " --batch 35")[0] == 0 and set(sizes) == {35}


def test_embed_passes_the_number_of_workers_to_the_image_reader(run):
    assert_error(run(f"{LINES['embed']} --workers 0"), "workers is 0")


def test_an_index_lists_damaged_files(run, output, tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar, but some text" * 100)
    (skipped,) = output("embed x.tar PICTURE --out out --model MODEL")["skipped"]
    assert "x.tar: the tar cannot be read" in skipped


RECIPE = {  # only hard_negatives, compile and fsdp have their default values
    "epochs": 2, "batch": 3, "lr": 2e-3, "muon_lr": 3e-3, "weight_decay": 0.2, "warmup": 0.5,
    "clip_gradient": 2.5, "patch_dropout": 0.25, "full_epochs": 0, "ema": 0.5, "augment": True,
    "hard_negatives": False, "chunk": 1, "checkpoint_blocks": True, "precision": "bfloat16",
    "compile": False, "seed": 5, "layer_decay": 0.5, "loss": "siglip", "freeze": "vision",
    "lora": 2, "val_every": 3, "fsdp": False,
}  # fmt: skip


@pytest.mark.slow
def test_train_has_a_flag_for_every_field_of_a_recipe(run, output, tmp_path):
    config = TINY.to_dict()
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "config.json").write_text(json.dumps(config | {"projection_dim": 20}))
    opposite = {k: not v for k, v in RECIPE.items() if isinstance(v, bool)} | {"full_epochs": 1}
    (tmp_path / "like" / "recipe.json").write_text(json.dumps(opposite))
    flags = []
    for name, value in RECIPE.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag} {value}")
    rows = output(f"train CLASSES --out out --recipe like --config tiny.json {' '.join(flags)}")
    assert json.loads((tmp_path / "out" / "recipe.json").read_text()) == RECIPE
    assert [row["step"] for row in rows] == [2, 4]  # six images, three in each step
    model = miniclip.CLIP.from_pretrained(tmp_path / "out")
    assert model.config.embed_dim == TINY.embed_dim
    assert RECIPE.keys() == vars(miniclip.training.Recipe()).keys()
    assert not RECIPE.items() & vars(miniclip.training.Recipe()).items() - {
        ("hard_negatives", False), ("compile", False), ("fsdp", False)
    }  # fmt: skip
    status, out, _ = run("train CLASSES --out two --recipe like --no-hard-negatives --no-compile "
                         "--no-fsdp --epochs 1 --batch 2")  # fmt: skip
    loss = json.loads((tmp_path / "two" / "metrics.jsonl").read_text())["loss"]
    assert status == 0 and out == f"two: 3 steps, loss {loss:.3f}\n"
    assert miniclip.CLIP.from_pretrained(tmp_path / "two").config.embed_dim == 20


@pytest.mark.slow
def test_training_starts_from_the_given_model(run, tmp_path):
    assert run("train CLASSES --out out --model everyday --lr 0 --epochs 1 --batch 2")[0] == 0
    before, after = (
        miniclip.CLIP.from_pretrained(name).state_dict() for name in ("everyday", tmp_path / "out")
    )
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
def test_convert_uses_the_given_layout_and_tokenizer(output, tmp_path):
    tokenizer = miniclip.Tokenizer.from_pretrained("everyday")
    shape = {"mlp_width": 256, "width": 64, "heads": 1, "ln_eps": 1e-5}  # for OpenAI's layout
    text = replace(
        TINY.text, **shape, vocab_size=tokenizer.vocab_size, context_length=77,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = replace(TINY, vision=replace(TINY.vision, **shape), text=text)
    twins(config)[0].save_pretrained(tmp_path / "alone", layout="openai")
    assert output("convert alone --out there --layout transformers")["tokenizer"] is False
    found = output("convert alone --out again --layout open_clip --tokenizer MODEL")
    assert (found["layout"], found["tokenizer"]) == ("openai", True)
    assert (tmp_path / "there" / "config.json").is_file()
    assert (tmp_path / "again" / "open_clip_config.json").is_file()
    ids = miniclip.Tokenizer.from_pretrained(tmp_path / "again").encode("a photo of a cat")
    assert ids == tokenizer.encode("a photo of a cat")


def test_classify_uses_all_given_templates_or_by_default_the_template_of_openai(output):
    line = "classify PICTURE --labels cat dog --model MODEL"
    usual = output(line)
    assert usual == output(f"{line} --template 'a photo of a {{}}.'")
    two = output(f"{line} --template 'a {{}}.' --template 'the {{}}'")
    model, tokenizer, transform = miniclip.load("everyday")
    with torch.no_grad():
        texts = model.encode_text(tokenizer(["a cat.", "the cat", "a dog.", "the dog"]), True)
        mean = texts.view(2, 2, -1).mean(1)
        image = model.encode_image(transform([usual[0]["image"]]), True)[0]
        logits = model.logit_scale.exp() * torch.cosine_similarity(mean, image)
    found = {row["label"]: row["logit"] for row in two[0]["labels"]}
    assert found == pytest.approx(dict(zip(["cat", "dog"], logits.tolist())), abs=1e-4)


def test_search_adds_and_subtracts_texts_and_images(output, desk, tmp_path):
    pictures = [desk / "classes" / "cat" / f"{i}.png" for i in range(2)]
    plus, minus = map(str, pictures)
    found = output(f"search INDEX cat 'a dog' --minus frog --image {plus} --minus-image {minus}")
    model, tokenizer, transform = miniclip.load("everyday")
    with torch.no_grad():
        texts = model.encode_text(tokenizer(["cat", "a dog", "frog"]), normalize=True)
        images = model.encode_image(transform([plus, minus, desk / "picture.png"]), normalize=True)
    query = texts[0] + texts[1] - texts[2] + images[0] - images[1]
    expected = torch.cosine_similarity(query, images[2], dim=0).item()
    assert [row["score"] for row in found] == [pytest.approx(expected, abs=1e-5)]


@pytest.mark.slow
def test_search_shows_twelve_images_by_default(output, desk, tmp_path):
    for i in range(14):
        Image.new("RGB", (8, 8), (9 * i, 255 - 9 * i, 0)).save(tmp_path / f"{i}.png")
    output("embed . --out index --model MODEL")
    assert len(output("search index cat")) == 12
    assert len(output("search index cat -k 3")) == 3


def test_the_title_of_a_search_result_sheet_is_the_query(run, monkeypatch, desk):
    titles = []
    monkeypatch.setattr(
        "miniclip.retrieval.sheet.draw_sheet",
        lambda index, hits, title, path: titles.append(title) or [],
    )
    picture = desk / "picture.png"
    line = f"search INDEX cat dog --image {picture} --minus a --minus-image {picture} --out s.png"
    run(line)
    run("search INDEX --minus a --out s.png")
    assert titles == [f"cat + dog + {picture} - a - {picture}", "- a"]


@pytest.mark.slow
def test_explain_writes_to_miniclip_explain_png_by_default(run, tmp_path):
    status, _, err = run("explain PICTURE cat --model MODEL")
    assert (status, err) == (0, "picture: miniclip-explain.png\n")
    with Image.open(tmp_path / "miniclip-explain.png") as picture:
        assert picture.width > 500


@pytest.mark.slow
def test_explain_scores_its_methods_on_200_scenes_by_default(output, monkeypatch):
    from miniclip.lens.heat import METHODS

    for method in list(METHODS):
        monkeypatch.delitem(METHODS, method)
    assert output("explain --score shapes --model MODEL", "shapes")["scenes"] == 200


def test_explain_uses_the_method_relevance_by_default(output):
    line = "explain PICTURE cat --model MODEL"
    assert output(line)["method"] == "relevance"
    assert output(f"{line} --method rollout")["method"] == "rollout"


def test_serve_offers_the_given_models_and_index(run, monkeypatch, desk):
    given = {}

    def create_app(models, find=None, searcher=""):
        given.update(models=models, find=find, searcher=searcher)

    monkeypatch.setattr("miniclip.page.serve.create_app", create_app)
    opened = []
    monkeypatch.setattr(
        "miniclip.page.serve.open_index", lambda *args: opened.append(args) or ("find", "everyday")
    )
    assert run("serve --model everyday shapes --port 0 --index INDEX --device cpu:0")[0] == 0
    assert list(given["models"]) == ["everyday", "shapes"]
    assert (given["find"], given["searcher"]) == ("find", "everyday")
    assert opened == [(str(desk / "index"), "cpu:0")]
    status, out, _ = run("serve --model everyday --port 0 --json")
    assert status == 0 and given["find"] is None
    assert json.loads(out)["url"].startswith("http://127.0.0.1:")
    status, out, _ = run("serve --model everyday --port 0")
    assert out.startswith("http://127.0.0.1:") and out.endswith("  (Ctrl-C ends it)\n")
