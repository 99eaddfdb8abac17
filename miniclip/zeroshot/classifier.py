"""Make a classifier for images from labels and templates."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.files.checks import as_list, check_unit_norm
from miniclip.follow import ids_for, sees_padding
from miniclip.model import CLIP, unit_norm
from miniclip.terminal import progress
from miniclip.tokenizer import Tokenizer
from miniclip.zeroshot.prompts import TEMPLATE_SETS

TEMPLATE = "a photo of a {}."
"""The paper's default template, for all data sets (section 3.1.4)."""


class Score(NamedTuple):
    """How well a label fits an image."""

    label: str
    logit: float  # exp(logit_scale) * cosine
    probability: float  # the softmax over all labels


class ZeroShotClassifier:
    """Score images against labels: `classifier(pixels)` returns logits (B, C).

    As in OpenAI's notebook, the embedding of each prompt is normalised, and the mean over the
    templates is normalised again. With one template, the logits equal `logits_per_image` except for
    rounding errors. Gradients flow to the pixels and the vision tower. A linear probe can start
    from `weights` (C, E), which is an ordinary tensor.

    Args:
        model: a CLIP.
        tokenizer: the model's tokenizer.
        labels: a name for each class. " | " separates several names of one class.
        templates: sentences with {} for the label.

    >>> import miniclip
    >>> model, tokenizer, transform = miniclip.load("everyday")
    >>> classifier = ZeroShotClassifier(model, tokenizer, ["cat", "dog"], ["a {}.", "the {}."])
    >>> classifier(torch.zeros(3, 3, 64, 64)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        model: CLIP,
        tokenizer: Tokenizer,
        labels: str | Iterable[str],
        templates: str | Iterable[str] = (TEMPLATE,),
    ) -> None:
        self.model = model
        self.labels = as_list(labels, "label")
        self.weights = class_embeddings(model, tokenizer, self.labels, templates)  # (C, E)

    def __call__(self, pixels: Tensor) -> Tensor:
        if pixels.is_floating_point():  # the model raises an error for integer pixels
            pixels = pixels.to(self.weights)
        image_embeds = self.model.encode_image(pixels, normalize=True)
        return self.model.score(image_embeds, self.weights).T  # (B, C)

    def rank(self, pixels: Tensor) -> list[list[Score]]:
        """Return the scores of all labels for each image, from best to worst."""
        with torch.no_grad():
            all_logits = self(pixels).float()  # (B, C)
        rankings = []
        for logits in all_logits:
            probabilities = logits.softmax(dim=0)
            columns = zip(self.labels, logits.tolist(), probabilities.tolist(), strict=True)
            scores = [Score(*column) for column in columns]
            rankings.append([scores[i] for i in logits.argsort(descending=True).tolist()])
        return rankings


@torch.no_grad()
def class_embeddings(
    model: CLIP,
    tokenizer: Tokenizer,
    labels: str | Iterable[str],
    templates: str | Iterable[str] = (TEMPLATE,),
) -> Tensor:
    """Return a unit vector for each label, (C, E). The arguments are as in `ZeroShotClassifier`.

    A label such as "happy | smiling" has several names. Its vector is the normalised mean over the
    prompts of all names. Raises ValueError for an empty label and for a template without {}.
    """
    labels, templates = as_list(labels, "label"), as_list(templates, "template")
    names = [label.split(" | ") for label in labels]
    if not names or not all(name.strip() for several in names for name in several):
        raise ValueError("a label is empty: expected at least one label, and a word in each label")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} for the label")
    if not templates:
        raise ValueError("no templates: expected at least one, such as 'a photo of a {}.'")
    prompts = [t.replace("{}", name) for several in names for name in several for t in templates]
    prompt_embeds = embed_texts(model, tokenizer, prompts)  # (names * templates, E)
    of_label = prompt_embeds.split([len(several) * len(templates) for several in names])
    return unit_norm(torch.stack([embeds.mean(dim=0) for embeds in of_label]))


@torch.no_grad()
def embed_texts(
    model: CLIP, tokenizer: Tokenizer, texts: str | Iterable[str], truncate: bool = False
) -> Tensor:
    """Embed texts in batches, with a progress bar. Returns a unit vector for each text, (B, E).

    Texts of similar length share a batch, which saves padding. Equal texts are embedded once.
    `truncate` cuts texts that are too long. Otherwise a long text raises ContextLengthError. Raises
    ValueError if an embedding is NaN or infinite.
    """
    texts = as_list(texts)
    places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    ids = ids_for(model.text, tokenizer, list(places), truncate=truncate)
    lengths = torch.full((len(ids),), ids.shape[1])
    if not sees_padding(model.text):
        lengths = model.text.eos_positions(ids) + 1  # the model reads no token after the end token
    embeds = model.logit_scale.new_empty(len(ids), model.config.embed_dim)
    # Small batches save padding, and large batches read the weights less often.
    batches = lengths.argsort().split(min(256, max(32, len(ids) // 16)))
    for rows in progress(batches, "batch of texts"):
        batch = ids[rows, : lengths[rows].max()]
        embeds[rows] = model.encode_text(batch.to(embeds.device), normalize=True)
    check_unit_norm(embeds, embeds.dtype)
    return embeds[[places[text] for text in texts]]


def find_templates(names: str | Iterable[str]) -> list[str]:
    """Return templates. A key of TEMPLATE_SETS stands for all templates of this set.

    >>> find_templates(["simple", "my {}"])[-2:]
    ['a photo of the small {}.', 'my {}']
    """
    templates: list[str] = []
    for name in as_list(names, "template"):
        if name not in TEMPLATE_SETS and "{}" not in name:
            raise ValueError(
                f"template {name!r} has no {{}} for the label, and it is not one of the sets "
                f"{', '.join(TEMPLATE_SETS)}"
            )
        templates.extend(TEMPLATE_SETS.get(name, (name,)))
    return templates
