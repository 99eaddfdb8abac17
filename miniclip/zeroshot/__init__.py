"""Zero-shot classification (section 3.1 of the paper).

classifier.py  labels in templates -> a classifier
data.py        folders of labelled images
evaluation.py  the accuracy of a classifier, and its confusions
imagenet.py    OpenAI's templates and its names of ImageNet's classes
"""

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
