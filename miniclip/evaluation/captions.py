"""Read images with their captions, in the formats of common data sets."""

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from miniclip.errors import listed, shown
from miniclip.files.pictures import is_picture
from miniclip.files.reading import read_json
from miniclip.files.tars import Member, members
from miniclip.retrieval.pictures import find_pictures
from miniclip.zeroshot.data import visible_files

MOST_JSON = 2**30  # bytes; the captions of COCO's training images need less than 2**27
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
COLUMNS = ("file_name", "text")

Row = tuple[str | Member, Sequence[str]]
"""An image and its captions."""


class CaptionedImages(NamedTuple):
    """Images, each with at least one caption."""

    pictures: list[str | Member]
    captions: list[list[str]]  # one list for each image
    skipped: list[str]  # lines that say what was left out, and why


def captioned_images(
    data: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    split: str = "test",
    columns: tuple[str, str] = COLUMNS,
) -> CaptionedImages:
    """Find images, and all captions of each image. Empty captions are left out and counted.

    Args:
        data: a folder with metadata.jsonl, .csv or .tsv, or the path of such a file; a folder of
            images with a .txt for each image; a WebDataset .tar, or a folder of .tar shards, with a
            caption on each line of a .txt; a .json of COCO, or of Karpathy and Fei-Fei (2015).
        images: the folder of the images that a .json names; by default the folder of the .json.
        split: the name of the split that is used, if `data` is Karpathy's .json.
        columns: names of columns in a metadata file, one for image files and one for captions.

    Raises:
        ValueError: no image has a caption, or `data` has an unknown format.
    """
    root = Path(data).expanduser()
    skipped: list[str] = []
    rows: Sequence[tuple[str | Member, Sequence[Any]]]
    if root.suffix == ".json":
        rows = list(_read_json(root, Path(images or root.parent), split))
    elif found := rows_with_captions(root, columns):
        rows, skipped = found
    else:
        shards, skipped = find_pictures([root])
        rows = list(_read_shards([one for one in shards if isinstance(one, Member)]))
    captions: dict[str | Member, list[str]] = {}
    empty = 0
    for picture, texts in rows:
        good = [text for text in texts if isinstance(text, str) and text.strip()]
        empty += len(texts) - len(good)
        captions.setdefault(picture, []).extend(good)
    if empty:
        skipped.append(f"{root}: empty captions left out: {empty:,}")
    if bare := [str(picture) for picture, texts in captions.items() if not texts]:
        skipped.append(f"{root}: images without a caption in UTF-8: {len(bare):,}, {listed(bare)}")
    captions = {picture: texts for picture, texts in captions.items() if texts}
    if not captions:
        raise ValueError(
            f"{root}: no image with a caption; expected metadata.jsonl, .csv or .tsv, .tar "
            "shards with .txt files, or a .json of COCO or Karpathy"
        )
    return CaptionedImages([*captions], [*captions.values()], skipped)


def rows_with_captions(
    root: Path, columns: tuple[str, str] = COLUMNS
) -> tuple[list[Row], list[str]] | None:
    """Read the captions of images from a metadata file, or from a folder of images.

    The folder has a metadata file, or a .txt for each image. Returns the rows, and lines that say
    what was left out. Returns None for any other `root`, such as a folder of .tar shards.
    """
    for table in (root, *(root / name for name in METADATA)):
        if table.is_file() and table.suffix in (".jsonl", ".csv", ".tsv"):
            return _read_table(table, columns)
    if root.is_dir() and not any(root.glob("*.tar")):
        return _read_texts(root)
    return None


def _read_texts(root: Path) -> tuple[list[Row], list[str]] | None:
    """Read images that have a .txt of the same name. Returns None if no image has a .txt."""
    files = visible_files(root)
    texts = {path: path.with_suffix(".txt") for path in files if is_picture(path.name)}
    if not {*texts.values()} & {*files}:
        return None
    rows: list[Row] = []
    caption = ""
    for path, text in texts.items():
        caption = caption_of(text.read_bytes()).strip() if text.is_file() else ""
        rows += [(str(path), (caption,))] * any(map(str.isalpha, caption))
    if not rows:
        raise ValueError(
            f"{root}: no .txt beside an image contains a word; expected captions in UTF-8, not "
            f"labels of object detection. The last .txt contains {shown(caption)}"
        )
    missing = len(texts) - len(rows)
    note = f"{root}: images without a .txt with a caption in UTF-8: {missing:,}"
    return rows, [note] * bool(missing)


def caption_of(data: bytes) -> str:
    """Decode the bytes of a .txt. Return "" if they are not UTF-8, because a guess may be wrong."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return ""


def _read_table(table: Path, columns: tuple[str, str]) -> tuple[list[Row], list[str]]:
    """Read a table with a row for each image, in the format `imagefolder` of Hugging Face."""
    rows: list[Row] = []
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # equal lists share a tuple, to save memory
    empty: list[int] = []  # the row of each empty caption
    for number, values in _values_of(table):
        if missing := [column for column in columns if column not in values]:
            raise ValueError(
                f"{table}, row {number}: no column {missing[0]!r} in {listed(map(str, values), 9)}"
                "; choose the columns with --image-column and --text-column"
            )
        name, text = (values[column] for column in columns)
        texts = text if isinstance(text, list) and text else [text]
        captions = tuple(text for text in texts if text not in (None, []) and str(text).strip())
        empty += [number] * (len(texts) - len(captions))
        if not isinstance(name, str) or not all(isinstance(each, str) for each in captions):
            raise ValueError(f"{table}, row {number}: expected text in {' and '.join(columns)}")
        if broken := [each for each in captions if re.search(r"[\ud800-\udfff]", each)]:
            reason = "has half of a surrogate pair, which no text may have"
            raise ValueError(f"{table}, row {number}: {shown(broken[0])} {reason}")
        if captions:
            rows.append((str(table.parent / name), shared.setdefault(captions, captions)))
    if not rows:
        raise ValueError(f"{table}: no rows with a caption; expected a row for each image")
    first = f"the first in row {empty[0]}" if empty else ""
    return rows, [f"{table}: empty captions left out: {len(empty):,}, {first}"] * bool(empty)


def _values_of(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:  # Excel writes a BOM
            if table.suffix != ".jsonl":
                delimiter = max(",\t;", key=file.readline().count)  # the most frequent in line 1
                file.seek(0)
                rows = csv.DictReader(file, delimiter=delimiter, strict=True)
                for number, values in enumerate(rows, 1):
                    if any(values.pop(None, ())):
                        reason = f"more columns than line 1; put texts with {delimiter!r} in quotes"
                        raise ValueError(f"row {number} has {reason}")
                    yield number, values
                return
            for number, line in enumerate(file, 1):
                value = json.loads(line) if line.strip() else None
                if isinstance(value, dict):
                    yield number, value
                elif value is not None:
                    raise ValueError(f"row {number} is not a JSON object")
    except csv.Error as error:
        reason = f"{error}; in a quoted text, write each quote twice"
        raise ValueError(f"{table}: row {number + 1} cannot be read: {reason}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{table}: its rows cannot be read: {error}") from None


def _read_json(path: Path, images: Path, split: str) -> Iterator[tuple[str, list[Any]]]:
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


def _read_shards(pictures: Sequence[Member]) -> Iterator[tuple[Member, list[str]]]:
    """Yield each image with the lines of its .txt. Both have the same name up to the first dot."""

    def key(name: str) -> str:
        folder, slash, file = name.rpartition("/")
        return folder + slash + file.partition(".")[0]

    texts: dict[tuple[str, str], list[str]] = {}
    for archive in dict.fromkeys(picture.archive for picture in pictures):
        for file in members(archive, []):  # damage is ignored here; `find_pictures` reports it
            if file.name.endswith(".txt"):
                lines = caption_of(file.read()).splitlines()
                texts[archive, key(file.name)] = lines
    for member in pictures:
        yield member, texts.get((member.archive, key(member.name)), [])
