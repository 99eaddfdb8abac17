"""Score a model on images: zero-shot classification, and retrieval by captions."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from miniclip.checkpoint import Loaded
from miniclip.evaluation.captions import COLUMNS, captioned_images, rows_with_captions
from miniclip.evaluation.classification import Evaluation, evaluate
from miniclip.evaluation.features import Features, picture_features
from miniclip.evaluation.retrieval import recall, retrieval_ranks
from miniclip.model import CLIP
from miniclip.zeroshot.classifier import class_embeddings, embed_texts
from miniclip.zeroshot.data import LabelledImages, check_classes, labelled_images


def classify(
    loaded: Loaded, images: LabelledImages, features: Features, text_embeds: Tensor
) -> Evaluation:
    """Classify images: compare their features with the embeddings (C, E) of the labels."""
    image_embeds = features.vectors["proj"].to(text_embeds)
    logits = loaded.model.score(image_embeds, text_embeds).T.float()  # (N, C)
    classes = [images.classes[row] for row in features.rows]
    return evaluate(logits, classes, images.labels, features.skipped)


def caption_ranks(
    loaded: Loaded, captions: Sequence[Sequence[str]], features: Features
) -> dict[str, Tensor]:
    """Compute the ranks of N images and of their captions, as `retrieval_ranks` does.

    A caption that is too long for the model is cut. Raises ValueError for a fork whose `score` does
    not grow with the cosine.
    """
    texts = [text for several in captions for text in several]
    image_of = torch.tensor([i for i, several in enumerate(captions) for _ in several])
    text_embeds = embed_texts(loaded.model, loaded.tokenizer, texts, truncate=True)
    check_ranks_by_cosine(loaded.model, features.vectors["proj"][:64].to(text_embeds), text_embeds)
    ranks = retrieval_ranks(features.vectors["proj"], text_embeds.float().cpu(), image_of)
    return dict(zip(("image_to_text", "text_to_image"), ranks, strict=True))


def check_ranks_by_cosine(model: CLIP, image_embeds: Tensor, text_embeds: Tensor) -> None:
    """Raise ValueError for a fork whose `score` does not grow with the cosine of a pair."""
    if getattr(model.score, "__func__", None) is CLIP.score:
        return
    text_embeds = text_embeds[:64]
    order = (text_embeds.double() @ image_embeds.double().T).flatten().argsort()
    scores = model.score(image_embeds, text_embeds).detach().flatten()[order]
    rounding = 32 * torch.finfo(scores.dtype).eps * scores.abs().max()
    if (scores.diff() < -rounding).any():
        name = type(model).__name__
        raise ValueError(
            f"pairs are ranked by cosine here, but {name}.score ranks them in another order"
        )


def scorer(data: str, columns: tuple[str, str] = COLUMNS) -> Callable[[Loaded], dict[str, float]]:
    """Make the function with which `train` scores a checkpoint on held-out data.

    Args:
        data: a folder with a subfolder for each class, or any `data` that `captioned_images` reads.
        columns: see `captioned_images`.

    Returns:
        A function that returns a dict of a checkpoint's scores. With class folders, the scores are
        the zero-shot accuracy and the mean accuracy of the classes. With captions, the scores are
        the mean recall@1 of both directions, and the recall@1 of each direction. `train` uses the
        first of these scores to find the best checkpoint.

    Raises:
        ValueError: `data` has no images with captions, and `check_classes` refuses its folders.
    """
    root = Path(data).expanduser()
    if root.is_dir() and not any(root.glob("*.tar")) and not rows_with_captions(root, columns):
        images = labelled_images(root)
        check_classes(images, root, named=False)

        def zero_shot(loaded: Loaded) -> dict[str, float]:
            text_embeds = class_embeddings(loaded.model, loaded.tokenizer, images.labels)
            features = picture_features(loaded, [str(path) for path in images.paths])
            found = classify(loaded, images, features, text_embeds)
            return {"accuracy": found.accuracy, "mean_per_class": found.mean_per_class}

        return zero_shot
    captioned = captioned_images(root, columns=columns)

    def retrieval(loaded: Loaded) -> dict[str, float]:
        features = picture_features(loaded, captioned.pictures)
        captions = [captioned.captions[row] for row in features.rows]
        found = caption_ranks(loaded, captions, features)
        shares = {name: recall(ranks)["recall@1"] for name, ranks in found.items()}
        return {"recall@1": sum(shares.values()) / 2} | shares

    return retrieval
