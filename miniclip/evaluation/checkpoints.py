"""A model's scores on pictures: how it classifies them, and what it finds by their captions."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from miniclip.checkpoint import Loaded
from miniclip.evaluation.captions import captioned_images
from miniclip.evaluation.classification import Evaluation, evaluate
from miniclip.evaluation.features import Features, picture_features
from miniclip.evaluation.retrieval import recall, retrieval_ranks
from miniclip.training.data import COLUMNS, METADATA, texts_beside
from miniclip.transform import ImageTransform
from miniclip.zeroshot.classifier import class_embeddings, embed_texts
from miniclip.zeroshot.data import LabelledImages, labelled_images


def classify(
    loaded: Loaded, images: LabelledImages, features: Features, text_embeds: Tensor
) -> Evaluation:
    """Classify pictures by their features and the embeddings of their labels (C, E)."""
    image_embeds = features.vectors["proj"].to(text_embeds)
    logits = loaded.model.score(image_embeds, text_embeds).T.float()  # (N, C)
    classes = [images.classes[row] for row in features.rows]
    return evaluate(logits, classes, images.labels, features.skipped)


def caption_ranks(
    loaded: Loaded, captions: Sequence[Sequence[str]], features: Features
) -> dict[str, Tensor]:
    """`retrieval_ranks` of N pictures, given the captions of each. Long captions are cut."""
    texts = [text for several in captions for text in several]
    image_of = torch.tensor([i for i, several in enumerate(captions) for _ in several])
    text_embeds = embed_texts(loaded.model, loaded.tokenizer, texts, truncate=True).float().cpu()
    ranks = retrieval_ranks(features.vectors["proj"], text_embeds, image_of)
    return dict(zip(("image_to_text", "text_to_image"), ranks, strict=True))


def scorer(
    data: str, transform: ImageTransform, columns: tuple[str, str] = COLUMNS
) -> Callable[[Loaded], dict[str, float]]:
    """What `train` measures held-out data by; the first score says which checkpoint is the best.

    Class folders are classified by their names: accuracy, and its mean over classes. Pictures with
    captions, as `captioned_images` finds them, are retrieved: recall@1, the mean of both
    directions, and of each. Raises ValueError if there is nothing to measure.
    """
    root = Path(data).expanduser()
    files = [*(root / name for name in METADATA), *root.glob("*.tar")]
    if root.is_dir() and not any(map(Path.is_file, files)) and not texts_beside(root, transform):
        images = labelled_images(root)

        def zero_shot(loaded: Loaded) -> dict[str, float]:
            text_embeds = class_embeddings(loaded.model, loaded.tokenizer, images.labels)
            features = picture_features(loaded, [str(path) for path in images.paths])
            found = classify(loaded, images, features, text_embeds)
            return {"accuracy": found.accuracy, "mean_per_class": found.mean_per_class}

        return zero_shot
    captioned = captioned_images(root, transform, columns=columns)

    def retrieval(loaded: Loaded) -> dict[str, float]:
        features = picture_features(loaded, captioned.pictures)
        captions = [captioned.captions[row] for row in features.rows]
        found = caption_ranks(loaded, captions, features)
        shares = {name: recall(ranks)["recall@1"] for name, ranks in found.items()}
        return {"recall@1": sum(shares.values()) / 2} | shares

    return retrieval
