"""Pictures with their captions, as data sets come."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from miniclip.errors import listed
from miniclip.files.reading import read_json
from miniclip.files.tars import Member, members
from miniclip.retrieval.pictures import find_pictures
from miniclip.training.data import COLUMNS, METADATA, captioned_pictures, texts_beside
from miniclip.transform import ImageTransform

MOST_JSON = 2**30  # bytes; COCO's captions of its training pictures have 2**27


class CaptionedImages(NamedTuple):
    """Pictures, each with at least one caption."""

    pictures: list[str | Member]
    captions: list[list[str]]  # of each picture
    skipped: list[str]  # what was left out, and why


def captioned_images(
    data: str | os.PathLike[str],
    transform: ImageTransform,
    images: str | os.PathLike[str] | None = None,
    split: str = "test",
    columns: tuple[str, str] = COLUMNS,
) -> CaptionedImages:
    """Find pictures and their captions; captions that say nothing are left out.

    Args:
        data: a folder with metadata.jsonl, .csv or .tsv, or such a file, whose `columns` are the
            picture's file and its text or texts; a folder with a .txt beside each; WebDataset .tar
            shards, or a folder of them, each line of whose .txt files is a caption; or a .json of
            COCO or of Karpathy and Fei-Fei (2015) for Flickr30k and COCO.
        transform: of the model that will read the pictures.
        images: the folder of the pictures that a .json names; without it, the .json's own.
        split: the part of a .json of Karpathy's that counts.

    Raises:
        ValueError: nothing with a caption was found, or a file is none of these.
    """
    root, skipped = Path(data).expanduser(), []
    pairs: Iterable[tuple[str | Member, Sequence[Any]]]
    tables = (path for path in (root, *(root / name for name in METADATA)) if path.is_file())
    table = next((path for path in tables if path.suffix != ".tar"), None)
    if root.suffix == ".json":
        pairs = list(_json_pairs(root, Path(images or root.parent), split))
    elif found := (
        captioned_pictures(table, transform, columns) if table else texts_beside(root, transform)
    ):
        pairs, skipped = [(str(path), texts) for path, texts, _ in found.entries], found.skipped
    else:
        members, skipped = find_pictures([root])
        pairs = list(_shard_pairs([one for one in members if isinstance(one, Member)]))
    captions: dict[str | Member, list[str]] = {}
    empty = 0
    for picture, texts in pairs:
        good = [text for text in texts if isinstance(text, str) and text.strip()]
        empty += len(texts) - len(good)
        captions.setdefault(picture, []).extend(good)
    if empty:
        skipped.append(f"{root}: empty captions left out: {empty:,}")
    if bare := [str(picture) for picture, texts in captions.items() if not texts]:
        skipped.append(f"{root}: images without a caption left out: {len(bare):,}, {listed(bare)}")
    captions = {picture: texts for picture, texts in captions.items() if texts}
    if not captions:
        raise ValueError(
            f"{root}: no picture with a caption; expected metadata.jsonl, .csv or .tsv, .tar "
            "shards with .txt files, or a .json of COCO or Karpathy"
        )
    return CaptionedImages([*captions], [*captions.values()], skipped)


def _json_pairs(path: Path, images: Path, split: str) -> Iterator[tuple[str, list[Any]]]:
    found = read_json(path, MOST_JSON)
    try:
        if "annotations" in found:  # COCO
            texts: dict[Any, list[Any]] = {image["id"]: [] for image in found["images"]}
            for annotation in found["annotations"]:
                texts[annotation["image_id"]].append(annotation["caption"])
            for image in found["images"]:
                yield str(images / image["file_name"]), texts[image["id"]]
            return
        splits = {image["split"] for image in found["images"]}
        if split not in splits:
            raise ValueError(f"{path}: no split {split!r}; there are {', '.join(sorted(splits))}")
        for image in found["images"]:
            if image["split"] == split:
                name = images / image.get("filepath", "") / image["filename"]
                yield str(name), [sentence["raw"] for sentence in image["sentences"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected COCO's `images` and `annotations`, or Karpathy's `images` with "
            f"`sentences`: {type(error).__name__}: {error}"
        ) from None


def _shard_pairs(pictures: Sequence[Member]) -> Iterator[tuple[Member, list[str]]]:
    """Each picture with the lines of the .txt file that shares its key."""
    texts: dict[tuple[str, str], list[str]] = {}
    for archive in dict.fromkeys(picture.archive for picture in pictures):
        for file in members(archive, []):  # `find_pictures` has reported the damage
            if file.name.endswith(".txt"):
                lines = file.read().decode("utf-8-sig", "replace").splitlines()
                texts[archive, _key(file.name)] = lines
    for member in pictures:
        yield member, texts.get((member.archive, _key(member.name)), [])


def _key(name: str) -> str:
    """What the files of a sample share: the name up to the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
