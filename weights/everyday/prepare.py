"""Make the training and validation data of `everyday` from Tiny ImageNet and CIFAR-10.

    python weights/everyday/prepare.py tiny-imagenet-200 cifar10 data
    miniclip train data/train --recipe everyday --out runs/everyday
    miniclip eval data/val --model everyday
    miniclip eval data/pairs --task retrieval --model everyday

`tiny-imagenet-200` is the folder of Stanford's CS231n (train/, val/). `cifar10` is a folder with
train/<class>/. Only the validation images are copied. data/train/metadata.jsonl has the paths of
the training images, each with all its true captions. data/pairs/metadata.jsonl has the first
validation image of each class, with one caption.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

CLASSES = Path(__file__).with_name("classes.txt")
TEMPLATES = (
    "{name}",
    "{a_name}",
    "the {name}",
    "a photo of {a_name}.",
    "a photo of the {name}.",
    "a picture of {a_name}.",
    "a low resolution photo of {a_name}.",
)


def read_classes() -> Iterator[tuple[str, list[str], list[str]]]:
    """For each class, yield its folder, its own names, and wider names that others share."""
    group: list[str] = []
    for line in CLASSES.read_text().splitlines():
        if line.endswith(":"):
            group = names(line[:-1])
        elif line.startswith("  "):
            folder, called = line.split(maxsplit=1)
            own, _, wider = called.partition(" > ")
            yield folder, names(own), [*names(wider), *group]


def names(line: str) -> list[str]:
    """Split a line at its commas. An empty line has no names."""
    return line.split(", ") if line else []


def captions(name: str) -> list[str]:
    """Put a name into every template. Classes that share a name share its captions."""
    plain = name.removeprefix("~")
    article = "" if name != plain else "an " if plain[0] in "aeiou" else "a "
    return [template.format(name=plain, a_name=article + plain) for template in TEMPLATES]


def true_captions(own: list[str], wider: list[str]) -> list[str]:
    """Return all captions of a class. About two thirds of them use its own names, repeated."""
    wider = [name for name in wider if name not in own]
    own = own * max(1, round(2 * len(wider) / len(own)))
    return [caption for name in own + wider for caption in captions(name)]


def main(tiny: Path, cifar: Path, out: Path) -> None:
    """Write `out`/train/metadata.jsonl, `out`/val/<label>/ and `out`/pairs/metadata.jsonl."""
    (out / "train").mkdir(parents=True)
    labels = {}
    with open(out / "train" / "metadata.jsonl", "w") as metadata:
        for folder, own, wider in read_classes():
            labels[folder] = own[0].removeprefix("~").replace(" ", "_")
            pictures = tiny / "train" / folder / "images"
            if not pictures.is_dir():
                pictures = cifar / "train" / folder
            text = true_captions(own, wider)
            for path in sorted(pictures.iterdir()):
                row = {"file_name": os.path.relpath(path, out / "train"), "text": text}
                metadata.write(json.dumps(row) + "\n")
    for line in (tiny / "val" / "val_annotations.txt").read_text().splitlines():
        name, folder = line.split("\t")[:2]
        (out / "val" / labels[folder]).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tiny / "val" / "images" / name, out / "val" / labels[folder] / name)
    (out / "pairs").mkdir()
    with open(out / "pairs" / "metadata.jsonl", "w") as metadata:
        for folder in sorted((out / "val").iterdir()):
            first = os.path.relpath(min(folder.iterdir()), out / "pairs")
            text = f"a photo of a {folder.name.replace('_', ' ')}."
            metadata.write(json.dumps({"file_name": first, "text": text}) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
