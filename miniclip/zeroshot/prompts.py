"""OpenAI's prompts: templates and class names of the paper's data sets.

The lists are exact copies from openai/CLIP (MIT licence, Copyright 2021 OpenAI): data/prompts.md
for 26 of the 27 data sets, notebooks/Prompt_Engineering_for_ImageNet.ipynb for ImageNet. open_clip
3.3.0 has the same lists for ImageNet. ImageNet's classes are sorted by their WordNet ids (such as
n01440764), which are copied from timm 1.0.31.
"""

import json
from pathlib import Path

_sets = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))
_sets.pop("source")

TEMPLATE_SETS: dict[str, list[str]] = {name: found["templates"] for name, found in _sets.items()}
"""The templates of each data set. "imagenet" has the 80 templates of the paper's section 3.1.4.
"simple" has seven of them, which OpenAI selected on ImageNet. The notebook says that this ensemble
"performs a bit better than the full 80 ensemble reported in the paper"."""

CLASS_SETS: dict[str, list[str]] = {n: s["classes"] for n, s in _sets.items() if "classes" in s}
"""The class names of each data set. " | " separates several names of one class."""

_lines = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()

IMAGENET_WNIDS = tuple(line.partition(" ")[0] for line in _lines)
"""The 1,000 WordNet ids, sorted. ImageNet's class folders usually have these names."""

IMAGENET_CLASSES = tuple(line.partition(" ")[2] for line in _lines)
"""OpenAI's names of the 1,000 classes, by position.

As in the paper's measurements, two classes are called "missile" (657 and 744), and two are called
"sunglasses" (836 and 837). So a position identifies a class, but a name does not.
"""
CLASS_SETS["imagenet"] = list(IMAGENET_CLASSES)


def published_labels(name: str, folders: list[str]) -> list[str]:
    """Return OpenAI's class names for the folders of a data set.

    Names are compared by letters and digits only, in lower case. If the folders of all C classes
    are called 0 to C - 1, folder k gets the name of class k. Raises ValueError if a folder's name
    fits no class.

    >>> published_labels("facialemotionrecognition2013", ["Smiling", "angry"])
    ['happy | smiling', 'angry']
    """
    classes = CLASS_SETS[name]
    if [int(f) for f in folders if f.isdecimal()] == [*range(len(classes))]:
        return list(classes)
    known = {plain(one): names for names in classes for one in names.split(" | ")}
    if name == "imagenet":
        known |= dict(zip(IMAGENET_WNIDS, classes, strict=True))
    if unknown := [folder for folder in folders if plain(folder) not in known]:
        raise ValueError(
            f"{len(unknown)} of {len(folders)} folders have no class in {name}, for example "
            f"{unknown[0]!r}; expected names such as {', '.join(classes[:3])}. For folders "
            "with other names, give a file of labels"
        )
    return [known[plain(folder)] for folder in folders]


def plain(text: str) -> str:
    """Keep the letters and digits of a text, in lower case."""
    return "".join(c for c in text.lower() if c.isalnum())
