"""Folders of labelled images."""

import json
import os
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from miniclip.errors import listed
from miniclip.files.checks import as_list
from miniclip.files.pictures import is_hidden
from miniclip.files.reading import MOST_BYTES, read_bytes, refuse_unreadable
from miniclip.terminal import counted
from miniclip.zeroshot.prompts import CLASS_SETS, IMAGENET_CLASSES, IMAGENET_WNIDS


class LabelledImages(NamedTuple):
    """Files and their classes. A class is given by a number, because labels can repeat."""

    folders: list[str]  # the names of the C class folders
    labels: list[str]  # the label of each class, for prompts
    paths: list[Path]  # the paths of the N files
    classes: list[int]  # the class of each file, a number from 0 to C - 1


def find_labels(names: str | Iterable[str]) -> list[str]:
    """Return labels. `names` can be the labels, or the name of one data set, folder or file.

    A data set is a key of CLASS_SETS. A folder contains class folders. A text file has one label
    on each line. A JSON file has a list of labels, or {id: label}, or {label: id}. The ids decide
    the order. Raises ValueError for a file without labels.

    >>> find_labels(["cat", "dog"]), len(find_labels("imagenet"))
    (['cat', 'dog'], 1000)
    """
    names = as_list(names, "label")
    files = [name for name in names if Path(name).suffix.lower() in (".txt", ".json")]
    if len(names) > 1 and files:
        raise ValueError(f"{files[0]!r} is among labels; expected either labels or a single file")
    if len(names) != 1:
        return names
    path, name = Path(names[0]), names[0]
    if name in CLASS_SETS:
        return list(CLASS_SETS[name])
    if os.path.isdir(name) and (folders := _folders_in(path)):
        return folder_labels(folders)
    return _read_labels(path) if files or os.path.isfile(name) else names


def _read_labels(path: Path) -> list[str]:
    try:
        text = read_bytes(path, MOST_BYTES).decode("utf-8-sig")
        found = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: expected labels, as lines or as a JSON list: {reason}") from None
    if isinstance(found, dict):
        if all(type(id) is int for id in found.values()):
            found = sorted(found, key=found.__getitem__)
        else:  # the ids are the names of the class folders, so sort them like the folders
            found = [found[id] for id in _in_order(found)]
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise ValueError(f"{path}: expected a list of labels, or an object {{id: label}}")
    if labels := [label.strip() for label in found if label.strip()]:
        return labels
    raise ValueError(f"{path}: has no labels; expected labels, as lines or as a JSON list")


def _folders_in(root: Path) -> list[str]:
    names = [path.name for path in root.iterdir() if path.is_dir() and not is_hidden(path.name)]
    return _in_order(names)


def _in_order(names: Iterable[str]) -> list[str]:
    are_numbers = all(map(str.isdecimal, names))
    return sorted(names, key=lambda name: (int(name) if are_numbers else 0, name))


def class_folders(root: str | PathLike[str]) -> list[str]:
    """Return the sorted class folders. If all names are numbers, sort the folders by value.

    Raises ValueError if there is no folder.
    """
    try:
        found = _folders_in(Path(root))
    except OSError as error:
        raise ValueError(f"{root}: {error.strerror}; expected a folder of class folders") from None
    if not found:
        raise ValueError(f"{root}: has no folders; expected a folder of images for each class")
    return found


def visible_files(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, sorted, without hidden files.

    Raises ValueError if a folder cannot be read.
    """
    found: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse_unreadable):
        folders[:] = [name for name in folders if not is_hidden(name)]
        paths = (Path(root, name) for name in names if not is_hidden(name))
        found += filter(Path.is_file, paths)
    return sorted(found)


def labelled_images(
    root: str | PathLike[str], labels: str | Iterable[str] | None = None
) -> LabelledImages:
    """Find the files in `root/<class>/` and its subfolders, and name the classes.

    Args:
        root: the folder that contains the class folders.
        labels: the names of the classes, in the order of `class_folders`. By default, a folder's
            name is the label (fire_truck is "fire truck"). If all folders have WordNet ids of
            ImageNet as names (n01440764), or are called 0 to 999, the labels are OpenAI's names.

    Raises:
        ValueError: if there is no class or no file, if a folder cannot be read, or if the number of
            labels is wrong.
    """
    root, folders = Path(root), class_folders(root)
    labels = folder_labels(folders) if labels is None else as_list(labels, "label")
    if len(labels) != len(folders):
        given, expected = counted(len(labels), "label"), counted(len(folders), "class folder")
        raise ValueError(f"found {given} for the {expected} of {root}")
    found = [(path, i) for i, name in enumerate(folders) for path in visible_files(root / name)]
    if not found:
        raise ValueError(f"{root}: no files in its {counted(len(folders), 'class folder')}")
    paths, classes = map(list, zip(*found, strict=True))
    return LabelledImages(folders, labels, paths, classes)


def check_classes(images: LabelledImages, root: str | PathLike[str], named: bool) -> None:
    """Raise ValueError if training or an accuracy on these images would be meaningless.

    That is the case if there is a single class, if a class has no files, or if the class folders
    are in other folders, such as train/. If the user named the classes (`named`), skip the last
    check.
    """
    root, folders = Path(root), images.folders
    if len(folders) == 1:
        raise ValueError(
            f"{root}: has only the folder {folders[0]!r}; expected a folder for each class. "
            f"Perhaps the class folders are in {root / folders[0]}"
        )
    used = {*images.classes}
    if empty := [folder for i, folder in enumerate(folders) if i not in used]:
        raise ValueError(
            f"{root}: no files in {len(empty)} of its {len(folders)} folders, {listed(empty)}; "
            "expected images in the folder of each class"
        )
    parents = sorted({path.parent for path in images.paths})
    above = [folder.relative_to(root).parts for folder in parents]
    if named or any(len(parts) == 1 for parts in above) or len(parents) == len(folders):
        return
    raise ValueError(
        f"{root}: has images in {listed(map(str, parents), 2)}; expected images in {root}/CLASS. "
        f"Perhaps the class folders are in {parents[0].parent}. If not, move the images into "
        f"{root}/CLASS. For eval, you can instead name the {len(folders)} classes with --labels"
    )


def with_classes_of(images: LabelledImages, others: Iterable[LabelledImages]) -> LabelledImages:
    """Return `images` with more classes at the end: the classes that only `others` have."""
    for other in others:
        new = [i for i, folder in enumerate(other.folders) if folder not in images.folders]
        images = images._replace(
            folders=images.folders + [other.folders[i] for i in new],
            labels=images.labels + [other.labels[i] for i in new],
        )
    return images


def folder_labels(folders: Sequence[str]) -> list[str]:
    """Return a label for each class folder. `folders` must be sorted.

    >>> folder_labels(["n01440764", "n01443537"]), folder_labels(["fire_truck", "n01443537"])
    (['tench', 'goldfish'], ['fire truck', 'n01443537'])
    """
    names = dict(zip(IMAGENET_WNIDS, IMAGENET_CLASSES, strict=True))
    if names.keys() >= set(folders):
        return [names[folder] for folder in folders]
    if len(folders) == 1000 and all(f.isdecimal() and int(f) == i for i, f in enumerate(folders)):
        return list(IMAGENET_CLASSES)
    return [folder.replace("_", " ") for folder in folders]
