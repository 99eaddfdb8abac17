"""Folders of labelled images."""

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from miniclip.files.checks import as_list
from miniclip.files.pictures import is_hidden
from miniclip.zeroshot.prompts import IMAGENET_CLASSES, IMAGENET_WNIDS


class LabelledImages(NamedTuple):
    """Files in class folders. A class is a position: two of ImageNet's may have the same label."""

    folders: list[str]  # names of the C class folders
    labels: list[str]  # what each is called in a prompt
    paths: list[Path]  # of the N files
    classes: list[int]  # of each file, 0 to C - 1


def labelled_images(
    root: str | PathLike[str], labels: str | Iterable[str] | None = None
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
    found = [path for path in entries if path.is_dir() and not is_hidden(path.name)]
    if not found:
        raise ValueError(f"{root}: no folders in it; expected one for each class, of images")
    if all(folder.name.isdecimal() for folder in found):
        found.sort(key=lambda folder: (int(folder.name), folder.name))
    else:
        found.sort()
    folders = [folder.name for folder in found]
    labels = folder_labels(folders) if labels is None else as_list(labels, "label")
    if len(labels) != len(folders):
        raise ValueError(f"{len(labels)} labels for the {len(folders)} class folders of {root}")
    paths, classes = [], []
    for i, folder in enumerate(found):
        files = sorted(path for path in folder.rglob("*") if is_visible_file(path, folder))
        paths += files
        classes += [i] * len(files)
    if not paths:
        raise ValueError(f"{root}: no files in its {len(folders)} class folders")
    return LabelledImages(folders, labels, paths, classes)


def with_classes_of(images: LabelledImages, others: Iterable[LabelledImages]) -> LabelledImages:
    """These images, with the classes that only others have after their own."""
    for other in others:
        new = [i for i, folder in enumerate(other.folders) if folder not in images.folders]
        images = images._replace(
            folders=images.folders + [other.folders[i] for i in new],
            labels=images.labels + [other.labels[i] for i in new],
        )
    return images


def is_visible_file(path: Path, folder: Path) -> bool:
    """Not a folder, and nothing that a system hid there, such as .DS_Store."""
    hidden = any(map(is_hidden, path.relative_to(folder).parts))
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
