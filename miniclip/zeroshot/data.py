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
from miniclip.files.reading import MOST_BYTES, read_bytes
from miniclip.terminal import counted
from miniclip.zeroshot.prompts import CLASS_SETS, IMAGENET_CLASSES, IMAGENET_WNIDS


class LabelledImages(NamedTuple):
    """Files in class folders. A class is a position: two of ImageNet's may have the same label."""

    folders: list[str]  # names of the C class folders
    labels: list[str]  # what each is called in a prompt
    paths: list[Path]  # of the N files
    classes: list[int]  # of each file, 0 to C - 1


def find_labels(names: str | Iterable[str]) -> list[str]:
    """Labels as they are; or, of one name alone, the labels of what it names.

    That is a set of CLASS_SETS, a folder of class folders, a text file of one label a line, or a
    JSON file: a list, names by id, or ids by name. Raises ValueError for a file without labels.

    >>> find_labels(["cat", "dog"]), len(find_labels("imagenet"))
    (['cat', 'dog'], 1000)
    """
    names = as_list(names, "label")
    files = [name for name in names if Path(name).suffix.lower() in (".txt", ".json")]
    if len(names) > 1 and files:
        raise ValueError(f"{files[0]!r} stands between labels; expected a file of labels alone")
    if len(names) != 1:
        return names
    path, name = Path(names[0]), names[0]
    if name in CLASS_SETS:
        return list(CLASS_SETS[name])
    if os.path.isdir(name) and (folders := _folders_in(path)):
        return folder_labels(folders)
    return _labels_in(path) if files or os.path.isfile(name) else names


def _labels_in(path: Path) -> list[str]:
    try:
        text = read_bytes(path, MOST_BYTES).decode("utf-8-sig")
        found = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: expected labels, one a line or a JSON list: {reason}") from None
    if isinstance(found, dict):
        is_id_by_name = all(type(id) is int for id in found.values())
        found = sorted(found, key=found.__getitem__) if is_id_by_name else [*found.values()]
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise ValueError(f"{path}: expected a list of labels, or an object of ids and labels")
    if labels := [label.strip() for label in found if label.strip()]:
        return labels
    raise ValueError(f"{path}: has no labels; expected one a line or a JSON list")


def _folders_in(root: Path) -> list[str]:
    found = [path.name for path in root.iterdir() if path.is_dir() and not is_hidden(path.name)]
    if all(name.isdecimal() for name in found):
        return sorted(found, key=lambda name: (int(name), name))
    return sorted(found)


def class_folders(root: str | PathLike[str]) -> list[str]:
    """The names of the class folders in a folder, sorted: by number where all are numbers.

    Raises ValueError unless there is one.
    """
    try:
        found = _folders_in(Path(root))
    except OSError as error:
        raise ValueError(f"{root}: {error.strerror}; expected a folder of class folders") from None
    if not found:
        raise ValueError(f"{root}: no folders in it; expected one for each class, of images")
    return found


def labelled_images(
    root: str | PathLike[str], labels: str | Iterable[str] | None = None
) -> LabelledImages:
    """Find the files in `root/<class>/`, and deeper, and name the classes.

    The folders are sorted, by number where all their names are numbers. `labels`, in that order,
    say what they are called. Without them, folders named by ImageNet's WordNet ids (n01440764;
    all 1,000 or some, as in ImageNet-R) or by its positions (0 to 999, as in ImageNet-V2) have
    OpenAI's class names, and any other folder its own name: fire_truck is "fire truck".

    Raises ValueError where there is no class or no file, or another number of labels.
    """
    root, folders = Path(root), class_folders(root)
    labels = folder_labels(folders) if labels is None else as_list(labels, "label")
    if len(labels) != len(folders):
        given, expected = counted(len(labels), "label"), counted(len(folders), "class folder")
        raise ValueError(f"{given} for the {expected} of {root}")
    paths, classes = [], []
    for i, folder in enumerate(root / name for name in folders):
        files = sorted(path for path in folder.rglob("*") if is_visible_file(path, folder))
        paths += files
        classes += [i] * len(files)
    if not paths:
        raise ValueError(f"{root}: no files in its {counted(len(folders), 'class folder')}")
    return LabelledImages(folders, labels, paths, classes)


def check_classes(images: LabelledImages, root: str | PathLike[str], named: bool) -> None:
    """Raise ValueError if an accuracy on these images would mean nothing.

    So it is for one class, for a class without a file, and for class folders with folders of
    pictures in them, such as train/cat and train/dog, unless the user has `named` the classes.
    """
    root, folders = Path(root), images.folders
    if len(folders) == 1:
        raise ValueError(
            f"{root}: one folder, {folders[0]!r}; expected one for each class, two or more. "
            f"Perhaps the class folders are in {root / folders[0]}"
        )
    if empty := [folder for i, folder in enumerate(folders) if i not in {*images.classes}]:
        raise ValueError(
            f"{root}: no files in {len(empty)} of its {len(folders)} folders, {listed(empty)}; "
            "expected pictures in the folder of each class"
        )
    parents = sorted({path.parent for path in images.paths})
    above = [folder.relative_to(root).parts for folder in parents]
    if named or any(len(parts) == 1 for parts in above) or len(parents) == len(folders):
        return
    raise ValueError(
        f"{root}: pictures in folders of folders, {listed(map(str, parents), 2)}; expected them in "
        f"{root}/CLASS. Perhaps the class folders are in {parents[0].parent}; or say with --labels "
        f"what the {len(folders)} classes are called"
    )


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
