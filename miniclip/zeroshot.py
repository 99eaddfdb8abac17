"""Labels and templates in, a classifier out: CLIP's zero-shot transfer.

Section 3.1 of the paper (arXiv 2103.00020): a label is put into one or more sentences, each is
embedded, and their mean is the weight vector of the class.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.model import CLIP, unit_norm
from miniclip.tokenizer import Tokenizer

TEMPLATE = "a photo of a {}."
"""What the paper uses where one sentence has to do for everything (section 3.1.4)."""


class Score(NamedTuple):
    """How well a label fits an image. The probabilities of an image's labels sum to 1."""

    label: str
    logit: float  # exp(logit_scale) * cosine
    probability: float  # says which of the labels, not whether any of them fits


class ZeroShotClassifier:
    """Scores images against labels. `classifier(pixels)` -> logits (B, C), one column a label.

    Each prompt's embedding is normalised, the mean over the templates is taken and normalised
    again, as in OpenAI's notebook. With one template the logits are the model's own
    `logits_per_image`, up to rounding.

    >>> import miniclip
    >>> model, tokenizer, transform = miniclip.load("cifar10")
    >>> classifier = ZeroShotClassifier(model, tokenizer, ["cat", "dog"], ["a {}.", "the {}."])
    >>> classifier(torch.zeros(3, 3, 32, 32)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        model: CLIP,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        templates: Sequence[str] = (TEMPLATE,),
    ) -> None:
        self.model = model
        self.labels = list(labels)
        self.weights = class_embeddings(model, tokenizer, labels, templates)  # (C, E)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        image_embeds = self.model.encode_image(pixels.to(self.weights.device), normalize=True)
        return self.model.logit_scale.exp() * image_embeds @ self.weights.T  # (B, C)

    def rank(self, pixels: Tensor) -> list[list[Score]]:
        """For each image every label with its score, best first."""
        rankings = []
        for logits in self(pixels).float():
            probabilities = logits.softmax(dim=0)
            order = logits.argsort(descending=True).tolist()
            rankings.append(
                [Score(self.labels[i], logits[i].item(), probabilities[i].item()) for i in order]
            )
        return rankings


@torch.inference_mode()
def class_embeddings(
    model: CLIP,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    templates: Sequence[str] = (TEMPLATE,),
) -> Tensor:
    """A unit vector for each label, (C, E). Raises ValueError where a prompt would say nothing."""
    if not labels or not all(label.strip() for label in labels):
        raise ValueError("a label is empty: expected at least one, each with a word in it")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} for the label to go into")
    if not templates:
        raise ValueError("no templates: expected at least one, such as 'a photo of a {}.'")
    device = model.logit_scale.device
    rows = []
    for label in labels:
        ids = tokenizer([template.replace("{}", label) for template in templates])
        prompts = model.encode_text(ids.to(device), normalize=True)  # (templates, E)
        rows.append(unit_norm(prompts.mean(dim=0)))
    return torch.stack(rows)
