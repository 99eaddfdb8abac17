"""Zero-shot classification: prompts, their mean, and the scores that come of it."""

import pytest
import torch
from twin import TINY, random_inputs, twins

from miniclip import Tokenizer, ZeroShotClassifier
from miniclip.zeroshot import class_embeddings

LABELS = ["cat", "small dog", "cup"]
TEMPLATES = ["a {}.", "the {} again", "{}"]


@pytest.fixture(scope="module")
def model():
    return twins(TINY)[0]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [template.replace("{}", label) for template in TEMPLATES for label in LABELS]
    trained = Tokenizer.train(texts, TINY.text.vocab_size)
    spare = TINY.text.vocab_size - trained.vocab_size  # so that the end token is the model's
    vocab = {t: i for t, i in trained.vocab.items() if not t.startswith("<|")}
    vocab |= {f"spare{i}": len(vocab) + i for i in range(spare)}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return Tokenizer(vocab, trained.merges, context_length=TINY.text.context_length)


def test_prompts_are_normalised_averaged_and_normalised_again(model, tokenizer):
    found = class_embeddings(model, tokenizer, LABELS, TEMPLATES)
    for label, row in zip(LABELS, found, strict=True):
        total = torch.zeros(TINY.embed_dim)
        for template in TEMPLATES:
            embedding = model.encode_text(tokenizer(template.replace("{}", label)))[0].detach()
            total += embedding / embedding.norm()
        torch.testing.assert_close(row, total / total.norm())


def test_one_template_gives_the_logits_of_the_model(model, tokenizer):
    pixels, _ = random_inputs(TINY, images=4)
    ids = tokenizer([f"a {label}." for label in LABELS])
    expected = model(pixels, ids).logits_per_image.detach()
    found = ZeroShotClassifier(model, tokenizer, LABELS, ["a {}."])(pixels)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_ranking_is_sorted_and_sums_to_one(model, tokenizer):
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
def test_prompts_that_would_say_nothing(model, tokenizer, labels, templates, message):
    with pytest.raises(ValueError, match=message):
        class_embeddings(model, tokenizer, labels, templates)
