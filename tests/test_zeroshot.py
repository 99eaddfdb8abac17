"""Test zero-shot classification: its prompts, scores and accuracy."""

import hashlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from twin import TINY, random_inputs, twins

from miniclip import ImageTransform, Tokenizer, ZeroShotClassifier, evaluation, lens
from miniclip.checkpoint import Loaded
from miniclip.evaluation.classification import BINS, Evaluation
from miniclip.evaluation.features import picture_features
from miniclip.files.ahead import read_ahead
from miniclip.retrieval import embed_images, embed_query
from miniclip.retrieval.building import encode_parts
from miniclip.zeroshot.classifier import class_embeddings, embed_texts, find_templates
from miniclip.zeroshot.data import find_labels, folder_labels, labelled_images
from miniclip.zeroshot.prompts import (
    CLASS_SETS,
    IMAGENET_CLASSES,
    IMAGENET_WNIDS,
    TEMPLATE_SETS,
    published_labels,
)

IMAGENET_TEMPLATES, SIMPLE_TEMPLATES, CIFAR_TEMPLATES = (
    TEMPLATE_SETS[name] for name in ("imagenet", "simple", "cifar10")
)
LABELS = ["cat", "small dog", "cup"]
TEMPLATES = ["a {}.", "the {} again", "{}"]


@pytest.fixture(scope="module")
def model():
    return twins(TINY)[0]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [template.replace("{}", label) for template in TEMPLATES for label in LABELS]
    trained = Tokenizer.train(texts, TINY.text.vocab_size)
    spare = TINY.text.vocab_size - trained.vocab_size  # the end token must get TINY's id
    vocab = {t: i for t, i in trained.vocab.items() if not t.startswith("<|")}
    vocab |= {f"spare{i}": len(vocab) + i for i in range(spare)}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return Tokenizer(vocab, trained.merges, context_length=TINY.text.context_length)


def test_prompt_embeddings_are_normalised_averaged_and_normalised_again(model, tokenizer):
    found = class_embeddings(model, tokenizer, LABELS, TEMPLATES)
    for label, row in zip(LABELS, found, strict=True):
        total = torch.zeros(TINY.embed_dim)
        for template in TEMPLATES:
            embedding = model.encode_text(tokenizer(template.replace("{}", label)))[0].detach()
            total += embedding / embedding.norm()
        torch.testing.assert_close(row, total / total.norm())


def test_labels_that_fill_several_batches_get_the_same_embeddings(model, tokenizer):
    labels = [f"cat {i}" for i in range(100)]  # with three templates, 300 texts
    alone = [class_embeddings(model, tokenizer, label, TEMPLATES) for label in labels[::9]]
    together = class_embeddings(model, tokenizer, labels, TEMPLATES)
    torch.testing.assert_close(together[::9], torch.cat(alone))


def test_equal_texts_are_embedded_once_in_batches_sorted_by_length(model, tokenizer, monkeypatch):
    texts = [f"{i} {'cat ' * (i % 7)}" for i in range(100)]
    texts += texts[::-1]
    batches = []
    encode_text = model.encode_text

    def seen(ids, **options):
        batches.append(ids)
        return encode_text(ids, **options)

    monkeypatch.setattr(model, "encode_text", seen)
    found = embed_texts(model, tokenizer, texts)
    assert [len(ids) for ids in batches] == [32, 32, 32, 4]
    ends = [model.text.eos_positions(ids) for ids in batches]
    assert all(end.max() + 1 == ids.shape[1] for end, ids in zip(ends, batches, strict=True))
    lengths = torch.cat(ends)
    assert torch.cat([end.sort().values for end in ends]).equal(lengths.sort().values)
    one_by_one = [encode_text(tokenizer(text), normalize=True)[0] for text in texts]
    torch.testing.assert_close(found, torch.stack(one_by_one).detach(), atol=1e-6, rtol=0)
    assert not found.requires_grad  # a gradient graph for a million texts would fill memory


def test_a_classifier_with_one_template_gives_the_logits_of_the_model(model, tokenizer):
    pixels, _ = random_inputs(TINY, images=4)
    ids = tokenizer([f"a {label}." for label in LABELS])
    expected = model(pixels, ids).logits_per_image.detach()
    found = ZeroShotClassifier(model, tokenizer, LABELS, ["a {}."])(pixels)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_a_ranking_is_sorted_by_logit_and_its_probabilities_sum_to_one(model, tokenizer):
    pixels, _ = random_inputs(TINY, images=2)
    classifier = ZeroShotClassifier(model, tokenizer, LABELS)
    for scores, logits in zip(classifier.rank(pixels), classifier(pixels), strict=True):
        assert [s.logit for s in scores] == sorted(logits.tolist(), reverse=True)
        assert {s.label: s.logit for s in scores} == dict(zip(LABELS, logits.tolist(), strict=True))
        assert sum(s.probability for s in scores) == pytest.approx(1)


@pytest.mark.parametrize(
    "labels, templates, message",
    [
        ([], ["a {}"], "label is empty"),
        (["cat", " "], ["a {}"], "label is empty"),
        (["cat"], [], "no templates"),
        (["cat"], ["a photo"], "has no {}"),
    ],
)
def test_empty_labels_and_unusable_templates_are_an_error(
    model, tokenizer, labels, templates, message
):
    with pytest.raises(ValueError, match=message):
        class_embeddings(model, tokenizer, labels, templates)


def test_images_of_dtype_uint8_are_an_error(model, tokenizer):
    """The cast to the dtype of the weights must not hide that the bytes are not normalised."""
    with pytest.raises(ValueError, match="uint8"):
        ZeroShotClassifier(model, tokenizer, LABELS)(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))


def test_labels_may_be_one_string_or_any_iterable_of_strings(model, tokenizer):
    assert ZeroShotClassifier(model, tokenizer, "cat").labels == ["cat"]
    expected = class_embeddings(model, tokenizer, ["cat", "cup"], ["a {}."])
    for labels in (("cat", "cup"), iter(["cat", "cup"]), np.array(["cat", "cup"])):
        classifier = ZeroShotClassifier(model, tokenizer, labels, "a {}.")
        assert classifier.labels == ["cat", "cup"]
        assert torch.equal(classifier.weights, expected)
    assert torch.equal(embed_texts(model, tokenizer, "cat"), embed_texts(model, tokenizer, ["cat"]))
    assert find_templates("simple") == find_templates(["simple"])
    for wrong, reason in [(None, "a list of labels, found None"), (["cat", 3], "label 1")]:
        with pytest.raises(TypeError, match=reason):
            ZeroShotClassifier(model, tokenizer, wrong)


def test_class_weights_can_initialise_a_linear_probe(model, tokenizer):
    classifier = ZeroShotClassifier(model, tokenizer, LABELS)
    pixels = random_inputs(TINY)[0]
    probe = torch.nn.Linear(TINY.embed_dim, len(LABELS), bias=False)
    probe.weight = torch.nn.Parameter(classifier.weights)
    logits = probe(model.encode_image(pixels, normalize=True)) * model.logit_scale.exp()
    torch.testing.assert_close(logits, classifier(pixels))
    logits.logsumexp(1).sum().backward()
    assert probe.weight.grad.abs().sum() > 0


def test_the_gradient_of_a_class_equals_the_gradient_of_its_prompt(model, tokenizer):
    pixels = random_inputs(TINY)[0].requires_grad_()
    classifier = ZeroShotClassifier(model, tokenizer, LABELS)
    (found,) = torch.autograd.grad(classifier(pixels)[:, 1].sum(), pixels)
    texts = embed_texts(model, tokenizer, ["a photo of a small dog."])
    score = model.encode_image(pixels, normalize=True) @ texts.T * model.logit_scale.exp()
    (expected,) = torch.autograd.grad(score.sum(), pixels)
    torch.testing.assert_close(found, expected)
    assert found.abs().sum() > 0
    assert not torch.is_inference_mode_enabled() and classifier.rank(pixels)


def test_every_returned_tensor_can_be_used_in_autograd(model, tokenizer, tmp_path):
    pixels, transform = random_inputs(TINY)[0], ImageTransform(TINY.vision.side)
    classifier = ZeroShotClassifier(model, tokenizer, LABELS)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), "red").save(tmp_path / name / "a.png")
    images = labelled_images(tmp_path)
    index = embed_images(Loaded(model, tokenizer, transform), list(map(str, images.paths)))
    counted = evaluate(classifier, transform, images)
    tensors = {
        "weights": classifier.weights,
        "logits": classifier(pixels),
        "texts": embed_texts(model, tokenizer, LABELS),
        "query": embed_query(Loaded(model, tokenizer, transform), "a cat", [str(images.paths[0])]),
        "index": index.embeddings,
        "confusion": counted.confusion,
        "in_top5": counted.in_top5,
        "logit_lens": lens.logit_lens(model, pixels),
        "attention": lens.attention_maps(model, pixels)[0],
        "rollout": lens.rollout(model, pixels),
        "decompose": lens.decompose(model, pixels)["embed"],
    }
    assert [name for name, tensor in tensors.items() if tensor.is_inference()] == []


# ------------------------------------------------------------------------------------------------
# The published lists. The checksums are from open_clip 3.3.0's lists and timm 1.0.31's wnids.


@pytest.mark.parametrize(
    "lines, count, unique, checksum",
    [
        (IMAGENET_CLASSES, 1000, 998, "571ae1c583b4be7da87519494c52bf405a46af05"),
        (IMAGENET_WNIDS, 1000, 1000, "385e0240499426c022b773be1ae4da780f057b89"),
        (IMAGENET_TEMPLATES, 80, 80, "4f976686fb651bb5803d4689dcd849f75efe0ef1"),
        (SIMPLE_TEMPLATES, 7, 7, "6ef3883987d224b7949da69fe0b615af152e1560"),
        (CIFAR_TEMPLATES, 18, 18, "9bbf912e1144ca4c7de308d478b5ced7ea3df9e6"),
    ],
)  # fmt: skip
def test_published_class_and_template_lists_have_the_checksums_of_the_originals(
    lines, count, unique, checksum
):
    assert (len(lines), len(set(lines))) == (count, unique)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40] == checksum


def test_published_class_and_template_lists_have_known_entries():
    classes = dict(enumerate(IMAGENET_CLASSES))
    assert [classes[i] for i in (0, 21, 134, 517, 999)] == [
        "tench", "kite (bird of prey)", "crane bird", "construction crane", "toilet paper",
    ]  # fmt: skip
    assert [i for i in classes if classes[i] == "missile"] == [657, 744]
    assert [i for i in classes if classes[i] == "sunglasses"] == [836, 837]
    assert list(IMAGENET_WNIDS) == sorted(IMAGENET_WNIDS)
    assert IMAGENET_WNIDS[281] == "n02123045" and classes[281] == "tabby cat"
    assert set(SIMPLE_TEMPLATES) < set(IMAGENET_TEMPLATES)
    assert all(t.count("{}") == 1 for t in (*IMAGENET_TEMPLATES, *CIFAR_TEMPLATES))


def test_templates_are_found_by_the_name_of_their_set():
    assert find_templates(["a {}", "imagenet"]) == ["a {}", *IMAGENET_TEMPLATES]
    with pytest.raises(
        ValueError, match="imagnet.*not one of the sets imagenet, simple, .*cifar10"
    ):
        find_templates(["imagnet"])


# The number of classes of each data set, from the paper's table 9. The table has 8 emotions, but
# prompts.md has 7. The checksums are from data/prompts.md in openai/CLIP at d05afc4.
PUBLISHED = {
    "birdsnap": 500, "cifar10": 10, "cifar100": 100, "clevrcounts": 8, "caltech101": 102,
    "country211": 211, "describabletextures": 47, "eurosat": 10, "fgvcaircraft": 100,
    "facialemotionrecognition2013": 7, "flowers102": 102, "food101": 101, "gtsrb": 43,
    "hatefulmemes": 2, "kitti": 4, "kinetics700": 700, "mnist": 10, "oxfordpets": 37,
    "pascalvoc2007": 20, "patchcamelyon": 2, "resisc45": 45, "sst2": 2, "stl10": 10,
    "sun397": 397, "stanfordcars": 196, "ucf101": 101,
}  # fmt: skip


def test_the_data_sets_of_the_paper_have_the_published_classes_and_templates():
    counts = {name: len(classes) for name, classes in CLASS_SETS.items()}
    assert counts == PUBLISHED | {"imagenet": 1000}
    assert TEMPLATE_SETS.keys() == {*PUBLISHED, "imagenet", "simple"}
    for lists, checksum in (
        (CLASS_SETS, "fd80c953c34bd3b4e439ceb4ceb381c0446fce42"),
        (TEMPLATE_SETS, "cb887df372021c1b7d86eccd1e3953e3500a4459"),
    ):
        text = "\n".join(line for name in PUBLISHED for line in (name, *lists[name]))
        assert hashlib.sha256(text.encode()).hexdigest()[:40] == checksum
    assert all(t.count("{}") == 1 for templates in TEMPLATE_SETS.values() for t in templates)


@pytest.mark.parametrize(
    "folders, labels",
    [
        (["apple_pie", "Baby-Back-Ribs"], ["apple pie", "baby back ribs"]),
        ([str(i) for i in range(101)], CLASS_SETS["food101"]),
    ],
)
def test_published_class_names_are_matched_with_the_folders_of_a_data_set(folders, labels):
    assert published_labels("food101", folders) == labels
    with pytest.raises(ValueError, match="1 of 2 .* no class in food101, for example 'cat'"):
        published_labels("food101", ["apple pie", "cat"])


def test_a_class_of_several_names_is_embedded_as_the_mean_over_all_its_prompts(model, tokenizer):
    (found,) = class_embeddings(model, tokenizer, ["cat | small dog"], TEMPLATES)
    prompts = [t.replace("{}", name) for name in ("cat", "small dog") for t in TEMPLATES]
    expected = model.encode_text(tokenizer(prompts), normalize=True).detach().sum(0)
    torch.testing.assert_close(found, expected / expected.norm())
    with pytest.raises(ValueError, match="label is empty"):
        class_embeddings(model, tokenizer, ["cat | "])


# ------------------------------------------------------------------------------------------------
# Folders


def make_folders(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "a.png")
    return root


@pytest.mark.parametrize(
    "folders, labels",
    [
        (["fire_truck", "cat", "Zebra"], ["Zebra", "cat", "fire truck"]),
        (["10", "9", "1"], ["1", "9", "10"]),
        (["n02123045", "n01440764"], ["tench", "tabby cat"]),
        (["n02123045", "n00000000"], ["n00000000", "n02123045"]),  # n00000000 is not an ImageNet id
    ],
)
def test_the_folder_names_give_the_class_labels(tmp_path, folders, labels):
    images = labelled_images(make_folders(tmp_path, folders))
    assert images.labels == labels
    assert [path.parent.name for path in images.paths] == images.folders
    assert images.classes == list(range(len(folders)))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["{}", "{:03}"])
def test_imagenet_folders_named_0_to_999_are_sorted_as_numbers(tmp_path, form):
    for i in range(1000):
        (tmp_path / form.format(i)).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / form.format(744) / "a.png")
    images = labelled_images(tmp_path)
    assert images.labels == list(IMAGENET_CLASSES)
    assert images.classes == [744] and images.folders[2] == form.format(2)


def test_folders_named_by_imagenet_wnids_get_the_imagenet_class_names():
    assert folder_labels(IMAGENET_WNIDS) == list(IMAGENET_CLASSES)


def test_labels_can_replace_the_names_of_the_folders(tmp_path):
    make_folders(tmp_path, ["0", "1"])
    assert labelled_images(tmp_path, ["zero", "one"]).labels == ["zero", "one"]
    with pytest.raises(ValueError, match="3 labels for the 2 class folders"):
        labelled_images(tmp_path, ["zero", "one", "two"])


@pytest.mark.parametrize("ids", [["0", "1", "10", "2"], ["n02", "n01"]])
def test_labels_in_a_json_file_get_the_order_of_the_folders(tmp_path, ids):
    (tmp_path / "labels.json").write_text(json.dumps({id: f"label of {id}" for id in ids}))
    images = labelled_images(
        make_folders(tmp_path, ids), find_labels(str(tmp_path / "labels.json"))
    )
    assert images.labels == [f"label of {folder}" for folder in images.folders]


def test_hidden_files_and_folders_are_ignored(tmp_path):
    make_folders(tmp_path, ["cat", "cat/deeper", "cat/.cache", ".git"])
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "README").write_text("beside the folders")
    images = labelled_images(tmp_path)
    assert images.labels == ["cat"]
    assert [str(p.relative_to(tmp_path)) for p in images.paths] == ["cat/a.png", "cat/deeper/a.png"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: None, "No such file"),
        (lambda root: root.write_text("a file"), "Not a directory"),
        (lambda root: root.mkdir(), "has no folders"),
        (lambda root: (root / "cat").mkdir(parents=True), "no files in its 1 class folder"),
    ],
)
def test_a_data_folder_without_images_is_an_error(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        labelled_images(tmp_path / "data")


# ------------------------------------------------------------------------------------------------
# Evaluation of a classifier with known answers. An image's grey level chooses a row of `answers`.

GREY = ImageTransform(8, image_mean=(0, 0, 0), image_std=(1, 1, 1))


def planted(answers):
    def classifier(pixels):
        rows = (pixels.mean((1, 2, 3)) * 255 / 10).round().long()
        return torch.as_tensor(answers, dtype=torch.float32)[rows]

    return classifier


def evaluate(classifier, transform, images, batch_size=64):
    """Evaluate a classifier, which is a function from pixels to logits."""
    paths = list(map(str, images.paths))
    ((logits, rows, skipped),) = encode_parts(classifier, transform, [paths], batch_size)
    classes = [images.classes[i] for i in rows]
    return evaluation.evaluate(torch.cat(logits), classes, images.labels, skipped)


def save_grey(path, row):
    Image.new("L", (8, 8), 10 * row).save(path)


def save_planted(root, confusion):
    """Write `confusion[true][predicted]` images. Their grey level gives the predicted class."""
    for true, row in enumerate(confusion):
        (root / f"class_{true}").mkdir(parents=True)
        for predicted, count in enumerate(row):
            for n in range(count):
                save_grey(root / f"class_{true}" / f"{n}-{predicted}.png", predicted)
    return labelled_images(root)


CONFUSION = [[2, 1, 0], [0, 0, 3], [1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_the_confusion_matrix_counts_images_by_true_and_predicted_class(tmp_path, batch_size):
    images = save_planted(tmp_path, CONFUSION)
    result = evaluate(planted(torch.eye(4)), GREY, images, batch_size)
    assert result.confusion[:, :3].tolist() == CONFUSION and not result.confusion[:, 3].any()
    assert result.labels == ["class 0", "class 1", "class 2", "class 3"]
    assert result.images.tolist() == [3, 3, 2, 0]
    assert result.accuracy == 3 / 8 and result.top5 == 1 and result.skipped == []
    assert result.class_accuracy[:3].tolist() == [2 / 3, 0, 1 / 2]
    assert math.isnan(result.class_accuracy[3])
    assert result.mistakes() == [(1, 2, 3), (0, 1, 1), (2, 0, 1)]


def test_the_mean_accuracy_per_class_and_the_standard_error_follow_their_formulas(tmp_path):
    result = evaluate(planted(torch.eye(4)), GREY, save_planted(tmp_path, CONFUSION))
    assert result.mean_per_class == pytest.approx((2 / 3 + 0 + 1 / 2) / 3)  # class 3 has no images
    right = np.array([1, 1, 0, 0, 0, 0, 1, 0])
    assert result.standard_error == pytest.approx(right.std() / 8**0.5)


@pytest.mark.parametrize("right, images", [(3, 8), (0, 5), (5, 5)])
def test_the_ends_of_the_confidence_interval_solve_the_equation_of_wilson(right, images):
    for edge in evaluation.wilson_interval(right, images):
        error = abs(right / images - edge)
        assert error == pytest.approx(1.959964 * (edge * (1 - edge) / images) ** 0.5, abs=1e-9)


def test_the_calibration_error_compares_confidence_with_accuracy_in_fifteen_bins():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 3)) * 2
    logits[0] = [100, 0, 0]  # a confidence of 1 belongs to the last bin
    classes = rng.integers(0, 3, 400)
    found = evaluation.evaluate(torch.tensor(logits), classes.tolist(), ["a", "b", "c"])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, right = shares.max(1), shares.argmax(1) == classes
    error = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert found.calibration_error == pytest.approx(error)
    assert found.bins[:, 0].sum() == 400 and found.bins[14, 0] >= 1


def test_an_image_counts_in_top5_if_its_class_is_among_the_five_best(tmp_path):
    for true in range(7):
        (tmp_path / str(true)).mkdir()
    for row in range(7):  # `answers[row]` puts `row` classes above the right class
        save_grey(tmp_path / "2" / f"{row}.png", row)
    order = [[c for c in range(7) if c != 2] for _ in range(7)]
    answers = torch.zeros(7, 7)
    for row, classes in enumerate(order):
        classes.insert(row, 2)
        answers[row, classes] = torch.arange(7, 0, -1).float()
    result = evaluate(planted(answers), GREY, labelled_images(tmp_path))
    assert result.in_top5.tolist() == [0, 0, 5, 0, 0, 0, 0]
    assert result.top5 == 5 / 7 and result.accuracy == 1 / 7


def test_a_classifier_with_a_single_class_has_accuracy_1(tmp_path):
    result = evaluate(planted(torch.ones(1, 1)), GREY, save_planted(tmp_path, [[3]]))
    assert (result.accuracy, result.top5, result.mistakes()) == (1, 1, [])


def test_two_classes_with_the_same_label_are_counted_separately(tmp_path, model, tokenizer):
    images = save_planted(tmp_path, [[2, 0, 0], [0, 1, 0], [0, 0, 4]])
    images = images._replace(labels=["missile", "cat", "missile"])
    result = evaluate(planted(torch.eye(3)), GREY, images)
    assert result.labels == ["missile", "cat", "missile"]
    assert result.images.tolist() == [2, 1, 4] and result.accuracy == 1
    classifier = ZeroShotClassifier(model, tokenizer, images.labels)
    assert classifier.weights.shape[0] == 3
    assert torch.equal(classifier.weights[0], classifier.weights[2])


def test_an_evaluation_skips_and_lists_unreadable_files(tmp_path):
    images = save_planted(tmp_path, CONFUSION)
    for name, damage in {"1-9": b"", "text": b"no image", "0-9": None}.items():
        path = tmp_path / "class_1" / f"{name}.png"
        if damage is None:
            noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
            Image.fromarray(noise).save(path)
            damage = path.read_bytes()[:1000]
        path.write_bytes(damage)
    images = labelled_images(tmp_path)
    result = evaluate(planted(torch.eye(4)), GREY, images, batch_size=2)
    assert result.confusion[:, :3].tolist() == CONFUSION
    assert len(result.skipped) == 3
    for name, reason in zip(("0-9", "1-9", "text"), result.skipped, strict=True):
        assert str(tmp_path / "class_1" / f"{name}.png") in reason


def test_a_list_of_only_unreadable_files_is_an_error(tmp_path, model, tokenizer):
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(ValueError, match="none of the 1 files can be read.*a.txt"):
        picture_features(Loaded(model, tokenizer, GREY), [str(tmp_path / "a.txt")])


def test_a_batch_size_of_0_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="batch is 0"):
        evaluate(planted([[1]]), GREY, save_planted(tmp_path, [[1]]), batch_size=0)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "webp", "gif"]
)
def test_an_evaluation_reads_images_of_many_modes_and_formats(tmp_path, mode):
    (tmp_path / "cat").mkdir()
    suffix = {"CMYK": "tif", "webp": "webp", "gif": "gif"}.get(mode, "png")
    Image.new("RGB" if mode == suffix else mode, (9, 13)).save(tmp_path / "cat" / f"a.{suffix}")
    result = evaluate(lambda x: x.mean((2, 3)), GREY, labelled_images(tmp_path, ["cat"]))
    assert (result.images.tolist(), result.skipped) == ([1], [])


def test_read_ahead_keeps_the_order_of_the_items_and_stops_at_its_limit():
    started = []
    overtaken, sixth, seventh, goes_on = (threading.Event() for _ in range(4))

    def transform(i):
        started.append(i)
        if i == 5:
            sixth.set()
            assert goes_on.wait(60)  # without a timeout, faulty code would wait forever
        if i == 6:
            seventh.set()
        if i == 1:  # item 2 finishes before item 1
            assert overtaken.wait(60)
        elif i == 2:
            overtaken.set()
        return torch.tensor(i)

    results = read_ahead(transform, range(30), ahead=5, threads=2)
    assert next(results) == 0
    assert sixth.wait(60)
    assert not seventh.wait(0.2)  # five items are ahead, so no thread may start another item
    goes_on.set()
    assert [int(result) for result in results] == list(range(1, 30))
    assert sorted(started) == list(range(30))


def test_read_ahead_leaves_the_remaining_items_unread_if_it_is_closed_early(monkeypatch):
    started, second, goes_on = [], threading.Event(), threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, **options):
            super().shutdown(**{**options, "wait": False})
            goes_on.set()  # only now can the thread take another item
            super().shutdown()

    def read(i):
        started.append(i)
        if i == 1:
            second.set()
            assert goes_on.wait(60)
        return i

    monkeypatch.setattr("miniclip.files.ahead.ThreadPoolExecutor", Pool)
    results = read_ahead(read, range(30), ahead=5, threads=1)
    assert next(results) == 0 and second.wait(60)
    results.close()
    assert started == [0, 1]


def test_the_confusion_matrix_and_the_accuracy_equal_those_of_transformers(tmp_path, tokenizer):
    ours, theirs = twins(TINY)
    labels = [*LABELS, "the cup", "dog again"]
    rng = np.random.default_rng(0)
    for label in labels:
        (tmp_path / label.replace(" ", "_")).mkdir()
        for i in range(12):
            # Draw large blots, because all noise gets nearly the same embedding.
            blots = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
            image = Image.fromarray(blots).resize((50, 44), Image.Resampling.NEAREST)
            image.save(tmp_path / label.replace(" ", "_") / f"{i}.png")
    images = labelled_images(tmp_path)
    transform = ImageTransform(TINY.vision.image_size)
    classifier = ZeroShotClassifier(ours, tokenizer, images.labels, TEMPLATES)
    found = evaluate(classifier, transform, images, batch_size=7)

    expected = torch.zeros(len(labels), len(labels), dtype=torch.int64)
    prompts = [t.replace("{}", label) for label in images.labels for t in TEMPLATES]
    with torch.no_grad():
        output = theirs(tokenizer(prompts), transform(images.paths))  # gives unit vectors
    sums = [sum(output.text_embeds[3 * i : 3 * i + 3]) for i in range(len(labels))]
    for path, image_embeds in zip(images.paths, output.image_embeds, strict=True):
        scores = [torch.cosine_similarity(x, image_embeds, dim=0).item() for x in sums]
        expected[images.folders.index(path.parent.name), int(np.argmax(scores))] += 1
    assert torch.equal(found.confusion, expected)
    assert (expected.sum(dim=0) > 0).sum() > 1  # more than one class is predicted
    assert found.accuracy == expected.diagonal().sum().item() / 60


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 60])
def test_draw_confusion_writes_a_picture_of_the_confusion_matrix(tmp_path, count):
    from miniclip.figures.confusion import draw_confusion

    confusion = 5 * torch.eye(count, dtype=torch.int64)
    confusion[0, -1] += 7
    confusion[-1] = 0  # a class without images
    confusion[0, 0] += 1
    bins = torch.ones(BINS, 3)
    result = Evaluation(["missile"] * count, confusion, confusion.diagonal(), [], bins)
    draw_confusion(result, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 1000 and len(picture.getcolors(1 << 20)) > 10
    with pytest.raises(ValueError, match="cannot be written"):
        draw_confusion(result, tmp_path / "absent" / "picture.png")
