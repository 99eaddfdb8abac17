"""Zero-shot classification (section 3.1 of the paper).

- `classifier.py`: a classifier that is made of labels and templates
- `data.py`: folders of labelled images
- `prompts.py`: OpenAI's templates and class names for the paper's data sets
"""

from miniclip.zeroshot.classifier import (
    TEMPLATE,
    Score,
    ZeroShotClassifier,
    class_embeddings,
    embed_texts,
    find_templates,
)  # fmt: skip
from miniclip.zeroshot.data import LabelledImages, find_labels, folder_labels, labelled_images
from miniclip.zeroshot.prompts import CLASS_SETS, TEMPLATE_SETS

__all__ = [
    "TEMPLATE", "TEMPLATE_SETS", "CLASS_SETS", "Score", "ZeroShotClassifier", "class_embeddings",
    "embed_texts", "find_templates", "find_labels", "LabelledImages", "labelled_images",
    "folder_labels",
]  # fmt: skip
