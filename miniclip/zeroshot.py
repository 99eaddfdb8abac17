"""Labels and templates in, a classifier out: CLIP's zero-shot transfer.

Section 3.1 of the paper (arXiv 2103.00020): a label is put into one or more sentences, each is
embedded, and their mean is the weight vector of the class. The second half of this file measures
how often that is right: folders of photographs in, accuracies and a confusion matrix out.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from miniclip.errors import ImageError
from miniclip.imagenet import (
    CIFAR_TEMPLATES,
    IMAGENET_CLASSES,
    IMAGENET_TEMPLATES,
    IMAGENET_WNIDS,
    SIMPLE_TEMPLATES,
)
from miniclip.model import CLIP, unit_norm
from miniclip.tokenizer import Tokenizer
from miniclip.transform import ImageTransform

TEMPLATE = "a photo of a {}."
"""What the paper uses where one sentence has to do for everything (section 3.1.4)."""

TEMPLATE_SETS = {
    "imagenet": IMAGENET_TEMPLATES,
    "simple": SIMPLE_TEMPLATES,
    "cifar": CIFAR_TEMPLATES,
}
"""Published templates by the names that `find_templates` knows; `imagenet.py` says what each is."""


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
        image_embeds = self.model.encode_image(pixels.to(self.weights), normalize=True)
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
    prompts = [t.replace("{}", label) for label in labels for t in templates]
    prompt_embeds = embed_texts(model, tokenizer, prompts)  # (labels * templates, E)
    return unit_norm(prompt_embeds.unflatten(0, (len(labels), -1)).mean(dim=1))


@torch.inference_mode()
def embed_texts(model: CLIP, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """A unit vector for each text, (B, E), whatever their number: in batches, with a progress bar.

    Texts of like length share a batch, so that little is computed for padding, and a text that
    occurs again is embedded once.
    """
    places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    ids = tokenizer(list(places))
    lengths = model.text.eos_positions(ids) + 1  # no text is read beyond its end token
    embeds = model.logit_scale.new_empty(len(ids), model.config.embed_dim)
    # Enough batches to sort texts into, each large enough to be worth the reading of the weights.
    at_once = min(256, max(32, len(ids) // 16))
    batches = lengths.argsort().split(at_once)
    for rows in tqdm(batches, "embedding texts", delay=2, disable=None, leave=False):
        batch = ids[rows, : lengths[rows].max()]
        embeds[rows] = model.encode_text(batch.to(embeds.device), normalize=True)
    return embeds[[places[text] for text in texts]]


def find_templates(names: Sequence[str]) -> list[str]:
    """Sentences with {} as they are, and the sentences of each set that is named.

    >>> find_templates(["simple", "my {}"])[-2:]
    ['a photo of the small {}.', 'my {}']
    """
    templates: list[str] = []
    for name in names:
        if name not in TEMPLATE_SETS and "{}" not in name:
            raise ValueError(
                f"template {name!r} has no {{}} for the label to go into, and is none of the sets "
                f"{', '.join(TEMPLATE_SETS)}"
            )
        templates.extend(TEMPLATE_SETS.get(name, (name,)))
    return templates


# ------------------------------------------------------------------------------------------------


class LabelledImages(NamedTuple):
    """Files in class folders. A class is a position: two of ImageNet's may have the same label."""

    folders: list[str]  # names of the C class folders
    labels: list[str]  # what each is called in a prompt
    paths: list[Path]  # of the N files
    classes: list[int]  # of each file, 0 to C - 1


def labelled_images(
    root: str | PathLike[str], labels: Sequence[str] | None = None
) -> LabelledImages:
    """Find the files in `root`/<class>/, and deeper, and name the classes.

    The folders are sorted, by number where all their names are numbers. `labels`, in that order,
    say what they are called. Without them, folders named by ImageNet's WordNet ids (n01440764;
    all 1,000 or some, as in ImageNet-R) or by its positions (0 to 999, as in ImageNet-V2) have
    OpenAI's class names, and any other folder its own name: fire_truck is "fire truck".

    Raises ValueError where there is no class or no file, or another number of labels.
    """
    root = Path(root)
    try:
        entries = list(root.iterdir())
    except OSError as error:
        raise ValueError(f"{root}: {error.strerror}; expected a folder of class folders") from None
    found = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
    if not found:
        raise ValueError(f"{root}: no folders in it; expected one for each class, of images")
    if all(folder.name.isdecimal() for folder in found):
        found.sort(key=lambda folder: (int(folder.name), folder.name))
    else:
        found.sort()
    folders = [folder.name for folder in found]
    if labels is not None and len(labels) != len(folders):
        raise ValueError(f"{len(labels)} labels for the {len(folders)} class folders of {root}")
    paths, classes = [], []
    for i, folder in enumerate(found):
        files = sorted(path for path in folder.rglob("*") if is_visible_file(path, folder))
        paths += files
        classes += [i] * len(files)
    if not paths:
        raise ValueError(f"{root}: no files in its {len(folders)} class folders")
    return LabelledImages(folders, list(labels or folder_labels(folders)), paths, classes)


def is_visible_file(path: Path, folder: Path) -> bool:
    """Not a folder, and nothing that a desktop or an editor hid there, such as .DS_Store."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.is_file()


def folder_labels(folders: Sequence[str]) -> list[str]:
    """What sorted class folders are called.

    >>> folder_labels(["n01440764", "n01443537"]), folder_labels(["fire_truck", "n01443537"])
    (['tench', 'goldfish'], ['fire truck', 'n01443537'])
    """
    names = dict(zip(IMAGENET_WNIDS, IMAGENET_CLASSES, strict=True))
    if names.keys() >= set(folders):
        return [names[folder] for folder in folders]
    if len(folders) == 1000 and all(f.isdecimal() and int(f) == i for i, f in enumerate(folders)):
        return list(IMAGENET_CLASSES)
    return [folder.replace("_", " ") for folder in folders]


class Evaluation(NamedTuple):
    """What a classifier made of labelled images. Accuracies are fractions; nan where of nothing."""

    labels: list[str]
    confusion: Tensor  # (C, C) int64, images of the row's class that were given the column's
    in_top5: Tensor  # (C,) int64, images of the class that had it among the five best labels
    skipped: list[str]  # for each file that could not be read, which and why; counted nowhere else

    @property
    def images(self) -> Tensor:
        """How many images of each class were classified, (C,)."""
        return self.confusion.sum(dim=1)

    @property
    def top1(self) -> float:
        """The share of images whose first label is the true one."""
        return self.confusion.diagonal().sum().item() / self.confusion.sum().item()

    @property
    def top5(self) -> float:
        """The share of images with the true label among the first five."""
        return self.in_top5.sum().item() / self.confusion.sum().item()

    @property
    def class_accuracy(self) -> Tensor:
        """Top-1 of each class, (C,)."""
        return self.confusion.diagonal().double() / self.images

    def mistakes(self) -> list[tuple[int, int, int]]:
        """(true class, predicted class, images) for every confusion, the most frequent first."""
        wrong = self.confusion - self.confusion.diagonal().diag()
        counts = [(i, j, int(wrong[i, j])) for i, j in wrong.nonzero().tolist()]
        return sorted(counts, key=lambda mistake: -mistake[2])


@torch.inference_mode()
def evaluate(
    classifier: Callable[[Tensor], Tensor],
    transform: ImageTransform,
    images: LabelledImages,
    batch_size: int = 64,
) -> Evaluation:
    """Classify every image, and count.

    `classifier` takes pixels (B, 3, S, S) to logits (B, C), as a ZeroShotClassifier of the images'
    labels does. Threads decode the images ahead of it, so that it need not wait. A file that
    cannot be read is left out and listed in `skipped`. Raises ValueError if none can be.

    Of two equal logits either may count as the best: OpenAI's evaluation, too, takes what `topk`
    gives, and the two classes of ImageNet that are both called "missile" are always equal.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1 image")
    count = len(images.labels)
    confusion = torch.zeros(count, count, dtype=torch.int64)
    in_top5 = torch.zeros(count, dtype=torch.int64)
    skipped: list[str] = []

    def readable() -> Iterator[tuple[Tensor, int]]:
        results = read_ahead(transform, images.paths, ahead=2 * batch_size)
        results = tqdm(
            results, total=len(images.paths), unit="image", delay=2, disable=None, leave=False
        )
        for pixels, true in zip(results, images.classes, strict=True):
            if isinstance(pixels, ImageError):
                skipped.append(str(pixels))
            else:
                yield pixels, true

    stream = readable()
    while batch := list(islice(stream, batch_size)):
        true = torch.tensor([true for _, true in batch])  # (B,)
        logits = classifier(torch.stack([pixels for pixels, _ in batch]))  # (B, C)
        best = logits.topk(min(5, count)).indices.cpu()  # (B, 5)
        confusion.index_put_((true, best[:, 0]), torch.ones_like(true), accumulate=True)
        in_top5 += true[(best == true[:, None]).any(dim=1)].bincount(minlength=count)
    if not confusion.any():
        raise ValueError(f"none of the {len(skipped)} files can be read; the first is {skipped[0]}")
    return Evaluation(images.labels, confusion, in_top5, skipped)


def read_ahead(
    transform: Callable[[Any], Tensor], paths: Iterable[Any], ahead: int, threads: int | None = None
) -> Iterator[Tensor | ImageError]:
    """The pixels of each file, or why there are none, in order. Threads (as many as torch uses;
    Pillow works outside Python's lock) are up to `ahead` files further on than the reader."""

    def read(path: Any) -> Tensor | ImageError:
        try:
            return transform(path)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(threads or torch.get_num_threads()) as pool:
        waiting: deque[Future[Tensor | ImageError]] = deque()
        for path in paths:
            waiting.append(pool.submit(read, path))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
