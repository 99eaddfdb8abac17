"""Pictures in folders and in tars."""

import glob
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from functools import cache
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from miniclip.errors import ImageError
from miniclip.files.pictures import open_image, with_name
from miniclip.transform import ImageTransform


class Member(NamedTuple):
    """A picture inside a tar, uncompressed: its bytes can be read without the rest."""

    archive: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


@cache
def picture_suffixes() -> frozenset[str]:
    """The endings of the formats that Pillow reads."""
    return frozenset(s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def is_picture(name: str) -> bool:
    """Whether the name ends as one of `picture_suffixes`, in any case."""
    return os.path.splitext(name)[1].lower() in picture_suffixes()


def find_pictures(paths: Iterable[str | PathLike[str]]) -> tuple[list[str | Member], list[str]]:
    """The pictures that files, folders, patterns and tars stand for, and what is wrong with tars.

    A folder stands for the pictures and the tars in it and deeper, by their endings; a tar, such as
    WebDataset's shards, for the pictures in it; a pattern such as `2024/**/*.jpg` for the files it
    fits. A file that is named is a picture, whatever its ending. Each is listed once, in the order
    of the arguments, and sorted within. Raises ValueError where there is nothing.
    """
    found: dict[str | Member, None] = {}
    damage: list[str] = []
    for path in (os.fspath(path) for path in paths):
        known_damage = len(damage)
        pictures: list[str | Member] = []
        for name in _files(path):
            pictures += _members(name, damage) if name.endswith(".tar") else [name]
        if not pictures and len(damage) == known_damage:
            raise ValueError(f"{path}: no pictures; expected a picture, a folder or a .tar of them")
        found.update(dict.fromkeys(pictures))
    return list(found), damage


def _files(path: str) -> list[str]:
    if os.path.isdir(path):
        return sorted(_files_below(path), key=Path)
    if os.path.lexists(path):  # a link to nowhere is reported when it is read
        return [path]
    if not (matches := sorted(glob.glob(path, recursive=True))):
        raise ValueError(f"{path}: no such file or folder, and no pattern that fits any")
    return [name for match in matches for name in _files(match)]


def _files_below(root: str) -> Iterator[str]:
    """Pictures and tars, in linked folders too, each of which is gone into once."""
    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, followlinks=True):
        real = {os.path.realpath(os.path.join(folder, name)): name for name in sorted(folders)}
        new = [name for path, name in real.items() if path not in seen]  # the same in each run
        folders[:] = [name for name in new if not name.startswith(".")]
        seen |= real.keys()
        for path in (str(Path(folder, name)) for name in names if not name.startswith(".")):
            is_wanted = is_picture(path) or path.endswith(".tar")
            if is_wanted and (os.path.isfile(path) or not os.path.exists(path)):
                yield path


def _members(archive: str, damage: list[str]) -> list[Member]:
    """The pictures of a tar, up to where it is damaged. Of two of one name the later counts, as it
    does when a tar is unpacked."""
    members: dict[str, Member] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for file in tar:
                if file.isfile() and is_picture(file.name):
                    member = Member(archive, file.name, file.offset_data, file.size)
                    members[file.name] = member
    except (OSError, tarfile.TarError) as error:
        damage.append(f"{archive}: cannot be read as a tar to its end: {error}")
    return list(members.values())


def pixels_of(source: str | Member, transform: ImageTransform) -> Tensor:
    """A file, or a member of a tar, to (3, S, S). Raises ImageError, which names it."""
    if isinstance(source, str):
        return transform(source)
    try:
        return transform(open_member(source))
    except ImageError as error:
        raise ImageError(with_name(str(source), error)) from None


def open_member(member: Member) -> Image.Image:
    """A picture inside a tar, as `open_image` reads a file. Raises ImageError."""
    try:
        with open(member.archive, "rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
    except OSError as error:
        raise ImageError(f"{member}: cannot be read: {error.strerror}") from error
    try:
        return open_image(io.BytesIO(data))
    except ImageError as error:
        raise ImageError(f"{member}: {error}") from None


def open_picture(name: str) -> Image.Image:
    """A picture by its name in an index, which may go on inside a tar. Raises ImageError."""
    archive, inside, member = name.partition(".tar/")
    if not inside or os.path.exists(name):
        return open_image(name)
    damage: list[str] = []
    for found in _members(f"{archive}.tar", damage):
        if found.name == member:
            return open_member(found)
    raise ImageError(f"{name}: cannot be read: {', '.join(damage) or 'no such picture in the tar'}")
