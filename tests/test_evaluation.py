"""Cached features, retrieval, probes and few shots. `test_zeroshot.py` tests accuracy."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from record_clip_benchmark import SIZES, embeddings

from miniclip import CLIP
from miniclip.checkpoint import Loaded, load
from miniclip.commands.eval import examples_of_sets
from miniclip.commands.main import build_parser, main
from miniclip.evaluation import linear, retrieval
from miniclip.evaluation.captions import captioned_images
from miniclip.evaluation.checkpoints import caption_ranks
from miniclip.evaluation.features import picture_features
from miniclip.evaluation.linear import Examples
from miniclip.evaluation.retrieval import recall, retrieval_ranks
from miniclip.model import unit_norm
from miniclip.retrieval import Index, embed_images


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load("everyday")


@pytest.fixture
def pictures(tmp_path):
    """Five images of noise. The second image cannot be read."""
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{i}.png") for i in range(5)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    (tmp_path / "1.png").write_bytes(b"no picture")
    return paths


# ------------------------------------------------------------------------------------------------
# Features


def test_features_are_the_input_and_the_output_of_the_projection(loaded, pictures):
    found = picture_features(loaded, pictures, batch=3)
    assert found.rows == [0, 2, 3, 4] and "1.png" in found.skipped[0]
    model, _, transform = loaded
    pixels = transform([pictures[i] for i in found.rows])
    with torch.no_grad():
        stream = model.vision.blocks(model.vision.embed_tokens(pixels))  # (B, T, W)
        before = model.vision.ln_post(stream[:, 0])
        after = model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(found.vectors["ln_post"], before, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.vectors["proj"], after, atol=1e-6, rtol=0)


def test_cached_features_are_not_computed_again(loaded, pictures, tmp_path, monkeypatch):
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
    assert calls == [4, 3]  # other images
    picture_features(loaded._replace(model=CLIP(loaded.model.config)), pictures, cache)
    assert calls == [4, 3, 4]  # another model
    Image.new("RGB", (32, 32)).save(pictures[0])
    os.utime(pictures[0], (0, 0))
    third = picture_features(loaded, pictures, cache)
    assert calls == [4, 3, 4, 4]  # 4 again, because one image has changed
    assert not torch.equal(third.vectors["proj"][0], first.vectors["proj"][0])


def test_cached_embeddings_work_as_an_index_and_cached_features_do_not(loaded, pictures, tmp_path):
    picture_features(loaded, pictures, tmp_path / "cache", ("everyday", None))
    (embeds,) = (tmp_path / "cache").glob("*.proj.safetensors")
    (features,) = (tmp_path / "cache").glob("*.ln_post.safetensors")
    index, expected = Index.load(embeds), embed_images(loaded, [pictures[i] for i in (0, 2, 3, 4)])
    assert [*index.paths] == [*expected.paths]
    torch.testing.assert_close(index.embeddings, expected.embeddings, atol=1e-6, rtol=0)
    assert index.load_encoder().model.model_type == "clip"
    with pytest.raises(ValueError, match="the index was made by"):
        Index.load(features).load_encoder()


def test_a_tower_that_overrides_forward_gives_only_proj_features(loaded, pictures):
    model = CLIP(loaded.model.config)
    model.vision.forward = lambda pixels: pixels.mean((2, 3)) @ torch.ones(3, 128)
    found = picture_features(loaded._replace(model=model), pictures)
    assert {*found.vectors} == {"proj"}


# ------------------------------------------------------------------------------------------------
# Retrieval


def slow_ranks(image_embeds, text_embeds, image_of):
    """Compute the ranks by sorting each list of scores."""
    images, texts = image_embeds.double().numpy(), text_embeds.double().numpy()
    of_images, of_texts = [], []
    for i, image in enumerate(images):
        scores = (texts * image).sum(1)
        order = sorted(range(len(texts)), key=lambda j: (-scores[j], j))
        of_images.append(1 + min(order.index(j) for j in range(len(texts)) if image_of[j] == i))
    for j, text in enumerate(texts):
        scores = (images * text).sum(1)
        order = sorted(range(len(images)), key=lambda i: (-scores[i], i))
        of_texts.append(1 + order.index(image_of[j]))
    return of_images, of_texts


@pytest.mark.parametrize("block, pairs", [((512, 4096), 65_536), ((5, 7), 3), ((1, 1), 1)])
def test_ranks_are_positions_in_the_sorted_list_of_scores(block, pairs, monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK", block)
    monkeypatch.setattr(retrieval, "PAIRS", pairs)
    torch.manual_seed(0)
    images = unit_norm(torch.randn(17, 6))
    image_of = torch.cat([torch.randint(0, 17, (30,)), torch.arange(17)])
    texts = unit_norm(images[image_of] + 0.7 * torch.randn(47, 6))
    images[3], images[11] = images[5], images[5]  # the same image three times
    texts[20:24] = texts[2]  # now five captions are equal
    texts[30] = texts[31] + 2e-8 * torch.randn(6)  # float32 scores cannot distinguish these two
    found = retrieval_ranks(images, texts, image_of)
    expected = slow_ranks(images, texts, image_of)
    assert (found[0].tolist(), found[1].tolist()) == expected
    assert max(expected[0]) > 2 and max(expected[1]) > 2


def test_ranks_are_exact_even_if_torch_rounds_products_to_bfloat16():
    torch.manual_seed(0)
    images = unit_norm(torch.randn(300, 64))
    texts, image_of = unit_norm(images + 0.5 * torch.randn(300, 64)), torch.arange(300)
    expected = retrieval_ranks(images, texts, image_of)
    with torch.autocast("cpu"):  # torch.set_float32_matmul_precision needs a CPU with AMX
        found = retrieval_ranks(images, texts, image_of)
    assert all(map(torch.equal, found, expected))


class WithBias(CLIP):
    def score(self, image_embeds, text_embeds):
        return super().score(image_embeds, text_embeds) - 10


class WithMetric(CLIP):
    def score(self, image_embeds, text_embeds):
        return super().score(image_embeds.flip(-1), text_embeds)


@pytest.mark.slow
def test_a_score_that_grows_with_the_cosine_gives_the_same_ranks(loaded, pictures):
    features, captions = picture_features(loaded, pictures), [[c] for c in ("a", "b", "c", "d")]
    expected = caption_ranks(loaded, captions, features)
    for kind in (WithBias, WithMetric):
        fork = kind.from_pretrained("everyday")
        if kind is WithBias:
            found = caption_ranks(loaded._replace(model=fork), captions, features)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        else:
            with pytest.raises(ValueError, match="WithMetric.score ranks them in another"):
                caption_ranks(loaded._replace(model=fork), captions, features)


def test_the_rank_of_an_image_is_the_rank_of_its_best_caption():
    images, image_of = torch.eye(2), torch.tensor([0, 0, 0, 1])
    texts = unit_norm(torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [1.0, 0.25]]))
    found = retrieval_ranks(images, texts, image_of)
    assert found[0].tolist() == [1, 2]  # image 1 ranks a caption of image 0 first
    assert found[1].tolist() == [1, 1, 1, 2]
    with pytest.raises(ValueError, match="1 of 3 images have no caption"):
        retrieval_ranks(torch.eye(3)[:, :2], texts, image_of)


def test_the_first_of_two_equal_scores_has_the_better_rank():
    same = torch.ones(4, 1)
    found = retrieval_ranks(same, same[[0, 0, 0, 0, 0]], torch.tensor([3, 1, 2, 0, 1]))
    assert found[0].tolist() == [4, 2, 3, 1]  # rank of each image's first caption
    assert found[1].tolist() == [4, 2, 3, 1, 2]


def test_recall_equals_the_recall_of_clip_benchmark():
    recorded = json.loads((Path(__file__).parent / "data" / "clip_benchmark.json").read_text())
    for size, theirs in zip(SIZES, recorded, strict=True):
        image_embeds, text_embeds, image_of = embeddings(*size)
        ranks = retrieval_ranks(
            unit_norm(image_embeds), unit_norm(text_embeds), torch.tensor(image_of)
        )
        ours = dict(zip(("text", "image"), map(recall, ranks), strict=True))
        for name, expected in theirs.items():
            what, _, k = name.partition("_retrieval_")
            assert ours[what][k] == pytest.approx(expected, abs=1e-6)


def save_shard(folder, captions):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, text in captions.items():
            for file, data in ((name, Path(folder, name).read_bytes()), (f"{name[0]}.txt", text)):
                data = data if isinstance(data, bytes) else data.encode()
                info = tarfile.TarInfo(file)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder / "0.tar"


def save_rows(folder, captions):
    rows = [{"file_name": name, "text": text.split("\n")} for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def save_coco(folder, captions):
    images = [{"id": 7 * i, "file_name": name} for i, name in enumerate(captions)]
    pairs = [(7 * i, line) for i, text in enumerate(captions.values()) for line in text.split("\n")]
    annotations = [{"image_id": i, "caption": line} for i, line in reversed(pairs)]
    value = {"images": images, "annotations": annotations[::-1]}
    (folder / "captions.json").write_text(json.dumps(value))
    return folder / "captions.json"


def save_karpathy(folder, captions):
    images = [{"filename": "other.png", "split": "train", "sentences": [{"raw": "a cat"}]}]
    for name, text in captions.items():
        sentences = [{"raw": line} for line in text.split("\n")]
        place = {"filepath": "", "filename": name, "split": "test"}
        images.append(place | {"sentences": sentences})
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    return folder / "dataset.json"


SAVE = [save_shard, save_rows, save_coco, save_karpathy]
CAPTIONS = {"0.png": "a cat\nthe cat", "1.png": "a dog", "2.png": "a ship\n ", "3.png": " "}


@pytest.mark.parametrize("save", SAVE)
def test_captions_are_read_from_each_format(save, pictures, tmp_path):
    found = captioned_images(save(tmp_path, CAPTIONS))
    names = [os.path.basename(str(picture)) for picture in found.pictures]
    assert names == ["0.png", "1.png", "2.png"]
    assert found.captions == [["a cat", "the cat"], ["a dog"], ["a ship"]]
    assert any("empty captions left out: 2" in reason for reason in found.skipped)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "a JSON object"),
        ('{"images": [{"id": 3}], "annotations": []}', "expected COCO's"),
        ('{"images": [{"split": "train"}]}', "no split 'test'; there are train"),
        ('{"images": [], "annotations": []}', "no image with a caption"),
    ],
)
def test_a_caption_file_with_wrong_content_is_an_error(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        captioned_images(tmp_path / "x.json")


def test_eval_reports_recall_and_median_rank_for_retrieval(loaded, pictures, tmp_path, capsys):
    data = str(save_karpathy(tmp_path, CAPTIONS | {"4.png": "a bird " * 90}))
    plot = str(tmp_path / "recall.png")
    line = ["eval", data, "--task", "retrieval", "--model", "everyday", "--plot", plot]
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, tokenizer, transform = loaded
    texts, image_of = ["a cat", "the cat", "a ship", "a bird " * 90], torch.tensor([0, 0, 1, 2])
    with torch.no_grad():  # 1.png cannot be read, and 3.png has no caption
        images = model.encode_image(transform([pictures[i] for i in (0, 2, 4)]), normalize=True)
        embeds = model.encode_text(tokenizer(texts, truncate=True), normalize=True)
    ranks = slow_ranks(images, embeds, image_of)
    for direction, of in zip(("image_to_text", "text_to_image"), ranks, strict=True):
        shares = {f"recall@{k}": np.mean([rank <= k for rank in of]) for k in (1, 5, 10)}
        assert found[direction] == pytest.approx(shares | {"median_rank": np.median(of)})
    assert (found["images"], found["texts"], found["truncated"]) == (3, 4, 1)
    assert "3.png" in "".join(found["skipped"]) and "1.png" in found["skipped"][-1]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert f"text to image {ranks[1].count(1) / 4:14.2%}" in out
    assert max(map(len, out.splitlines())) <= 80


def test_eval_counts_repeated_and_unreadable_images_correctly(loaded, pictures, tmp_path, capsys):
    """An image has several captions, an image occurs twice, and a class has no readable image."""
    model, tokenizer, transform = loaded
    (tmp_path / "5.png").write_bytes(Path(pictures[0]).read_bytes())
    rows = {"3.png": "a ship", "0.png": "a cat\na dog", "5.png": "a dog\na ship", "2.png": "a cat"}
    data = str(save_rows(tmp_path, rows))
    assert main(["eval", data, "--task", "retrieval", "--model", "everyday", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    texts = "\n".join(rows.values()).split("\n")
    with torch.no_grad():
        images = model.encode_image(transform([pictures[i] for i in (3, 0, 0, 2)]), normalize=True)
        embeds = model.encode_text(tokenizer(texts), normalize=True)
    ranks = slow_ranks(images, embeds, torch.tensor([0, 1, 1, 2, 2, 3]))
    for direction, of in zip(("image_to_text", "text_to_image"), ranks, strict=True):
        assert found[direction]["recall@1"] == pytest.approx(np.mean([rank == 1 for rank in of]))
        assert found[direction]["median_rank"] == np.median(of)

    classes = {"cat": (0, 5), "dog": (2, 3), "ship": (1,)}
    for name, chosen in classes.items():
        (tmp_path / "folders" / name).mkdir(parents=True)
        for i in chosen:
            os.rename(tmp_path / f"{i}.png", tmp_path / "folders" / name / f"{i}.png")
    assert main(["eval", str(tmp_path / "folders"), "--model", "everyday", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    prompts = tokenizer([f"a photo of a {name}." for name in classes])
    with torch.no_grad():
        best = (images @ model.encode_text(prompts, normalize=True).T).argmax(1).tolist()
    right = [best[1] == 0, best[2] == 0, best[3] == 1, best[0] == 1]
    assert found["accuracy"] == np.mean(right)
    assert found["mean_per_class"] == np.mean([np.mean(right[:2]), np.mean(right[2:])])
    assert (found["images"], found["missing"]) == (4, ["ship"]) and "1.png" in found["skipped"][0]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--task", "retrieval", "--labels", "x"], "--labels is for zeroshot and fewshot, not for"),
        (["--split", "val"], "--split is for retrieval, not for zeroshot"),
        (["--task", "guess"], "invalid choice"),
        (["--task", "retrieval"], "no image with a caption"),
    ],
)
def test_wrong_options_of_eval_are_an_error(options, words, pictures, tmp_path, capsys):
    try:
        status = main(["eval", str(tmp_path), "--model", "everyday", *options])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("miniclip: error: ") and words in error


# ------------------------------------------------------------------------------------------------
# Linear probes and few shots


@pytest.fixture(scope="module")
def blobs():
    """Return a train and a test set. Each has three classes of 40 points, in five dimensions."""
    torch.manual_seed(0)
    classes = torch.arange(3).repeat(40)
    centres = torch.randn(3, 5)
    return [Examples(centres[classes] + torch.randn(120, 5), classes) for _ in range(2)]


@pytest.mark.slow
def test_the_probe_equals_the_logistic_regression_of_scikit_learn(blobs):
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, test = blobs
    assert linear.MOST_STEPS == 1000  # CLIP's paper, appendix A.3
    theirs = linear_model.LogisticRegression(C=1 / 0.3, max_iter=1000)
    theirs.fit(train.features.numpy(), train.classes.numpy())
    ours = linear.fit_probe(train, 0.3, count=4)(test.features)
    expected = theirs.predict_log_proba(test.features.numpy())
    np.testing.assert_allclose(ours[:, :3].numpy(), expected, atol=1e-6)
    assert ours[:, 3].isneginf().all()  # class 3 has no examples
    with pytest.raises(ValueError, match="all examples have the same class"):
        linear.fit_probe(train.of(train.classes == 1), 0.3, count=4)


def test_fit_from_text_minimises_the_documented_loss(blobs):
    pytest.importorskip("scipy")
    train, test = blobs
    weights = torch.randn(3, 5)
    found = linear.fit_from_text(train, 2.0, lambda x: x @ weights.T)
    change = (found(torch.eye(5)) - weights.T.double()).T.requires_grad_()  # V of fit_from_text
    logits = train.features.double() @ (weights.double() + change).T
    loss = torch.nn.functional.cross_entropy(logits, train.classes, reduction="sum")
    (gradient,) = torch.autograd.grad(loss + change.square().sum(), change)
    assert gradient.abs().max() < 1e-2 < change.abs().max()
    strong = linear.fit_from_text(train, 1e9, lambda x: x @ weights.T)(test.features)
    torch.testing.assert_close(strong, (test.features @ weights.T).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("peak", [-48, -31, 0, 5, 33, 48])
def test_sweep_finds_the_best_strength_among_eight_values_per_power_of_ten(peak):
    tried = []

    def accuracy(strength):
        tried.append(strength)
        return -abs(round(8 * np.log10(strength)) - peak)

    best, found = linear.sweep(accuracy)
    assert best == pytest.approx(10 ** (peak / 8)) and [*found] == sorted(set(tried))
    assert tried[:7] == pytest.approx([10.0**e for e in range(-6, 7, 2)]) and len(tried) <= 15
    assert linear.sweep(lambda strength: 1.0)[0] == 1e6  # equal scores: the largest strength wins


def test_the_probe_validates_on_a_fifth_of_each_class_and_then_fits_all_examples(blobs):
    train, _ = blobs
    sizes = []

    def fit(examples, strength):
        sizes.append(examples.classes.bincount().tolist())
        return lambda features: torch.zeros(len(features), 3)

    linear.probe(fit, train)
    assert {*map(tuple, sizes[:-1])} == {(32, 32, 32)}
    assert sizes[-1] == [40, 40, 40]


def test_few_shot_learning_uses_the_given_number_of_examples_of_each_class(blobs):
    train, test = blobs
    test = test.of(torch.arange(5))  # five examples, with the classes 0, 1, 2, 0 and 1
    draws, sizes = {}, set()

    def fit(examples, strength):
        draw = draws.setdefault(examples.features.sum().item(), len(draws))
        guess = 2 * (draw % 2)  # class 0 is right for two of the five, class 2 for one

        def classify(features):
            learnt = tuple(examples.classes.bincount().tolist())
            sizes.add((learnt, len(features)))
            return torch.eye(3)[torch.full((len(features),), guess)]

        return classify

    rows = linear.few_shot({"one": linear.Method(fit, train, test)}, [1, 4], seeds=2)
    assert [(row["shots"], row["method"]) for row in rows] == [(1, "one"), (4, "one")]
    one, four = (1, 1, 1), (4, 4, 4)  # how many examples each class has
    assert sizes == {(one, 3), (one, 5), (four, 12), (four, 5)}
    assert len(draws) == 4  # two draws of each size
    mean, std = np.mean([0.4, 0.2]), np.std([0.4, 0.2], ddof=1)
    for row in rows:
        assert (row["mean"], row["std"]) == pytest.approx((mean, std))
    with pytest.raises(ValueError, match="no class has more than 40 examples"):
        linear.few_shot({"one": linear.Method(fit, train, test)}, [40])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["probe", "fewshot"])
def test_eval_trains_and_scores_probes_and_few_shot_classifiers(task, tmp_path, capsys):
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for name, color in (("cat", (200, 40, 40)), ("dog", (40, 40, 200))):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 40, (32, 32, 3))
                pixels = (noise + np.array(color)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "test" / "bird").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "test" / "bird" / "0.png")
    line = ["eval", str(tmp_path / "test"), "--task", task, "--train", str(tmp_path / "train")]
    line += ["--model", "everyday", "--plot", str(tmp_path / "plot.png")]
    line += ["--shots", "1", "2", "--seeds", "2"] if task == "fewshot" else []
    assert main([*line, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "predicts them: bird" in err and Path(tmp_path / "plot.png").stat().st_size > 10_000
    if task == "probe":
        assert found["accuracy"] == pytest.approx(6 / 7)
        assert found["mean_per_class"] == pytest.approx(2 / 3)
        assert found["features"] == "ln_post" and len(found["validation"]) >= 11
    else:
        assert [row["shots"] for row in found] == [0, 1, 1, 2, 2]
        assert [row["method"] for row in found] == ["zeroshot", *2 * ["probe", "text"]]
        assert found[1]["mean"] == pytest.approx(6 / 7)
    assert main(line) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_probe_also_learns_the_classes_of_its_validation_split(tmp_path, capsys):
    for folder in ("test/cat", "test/dog", "test/cow", "train/cat", "train/emu", "val/dog"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    (tmp_path / "val" / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "cat" / "0.png")
    test, train, val = (str(tmp_path / name) for name in ("test", "train", "val"))
    line = ["eval", test, "--task", "probe", "--train", train, "--val", val, "--model", "everyday"]
    examples_of_sets(build_parser().parse_args(line))
    assert (
        f"in {train} and {val}, so the probe never predicts them: cow\n" in capsys.readouterr().err
    )


def test_a_probe_without_training_images_is_an_error(tmp_path, capsys):
    assert main(["eval", str(tmp_path), "--task", "probe", "--model", "everyday"]) == 2
    assert "--task probe needs folders to learn from: --train FOLDER" in capsys.readouterr().err
