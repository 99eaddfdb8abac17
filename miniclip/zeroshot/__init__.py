"""Zero-shot classification (section 3.1 of the paper): labels to a classifier, and its score."""

from miniclip.zeroshot.classifier import (
    TEMPLATE,
    TEMPLATE_SETS,
    Score,
    ZeroShotClassifier,
    class_embeddings,
    embed_texts,
    find_templates,
)
from miniclip.zeroshot.data import LabelledImages, folder_labels, labelled_images
from miniclip.zeroshot.evaluation import Evaluation, evaluate

__all__ = [
    "TEMPLATE",
    "TEMPLATE_SETS",
    "Score",
    "ZeroShotClassifier",
    "class_embeddings",
    "embed_texts",
    "find_templates",
    "LabelledImages",
    "labelled_images",
    "folder_labels",
    "Evaluation",
    "evaluate",
]
