"""Find and open images in folders and in tars."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path

from PIL import Image
from torch import Tensor

from miniclip.errors import ImageError
from miniclip.files.pictures import is_hidden, is_picture, open_image, with_name
from miniclip.files.reading import refuse_unreadable
from miniclip.files.tars import Member, members
from miniclip.transform import ImageTransform

Stamp = tuple[int, int]


def stamp(picture: str | Member) -> Stamp:
    """Return the size and the modification time (in ns) of an image file, or of an image's tar."""
    try:
        found = os.stat(picture.archive if isinstance(picture, Member) else picture)
    except OSError:  # the error is reported when the image is read
        return (0, 0)
    return (found.st_size, found.st_mtime_ns)


def find_pictures(
    paths: Iterable[str | PathLike[str]], exclude: Sequence[str] = ()
) -> tuple[list[str | Member], list[str]]:
    """Find the images in files, folders, patterns and tars.

    Hidden files, hidden folders and system folders are left out, unless a path names them.

    Args:
        paths: images with any ending, folders, tars such as WebDataset's shards, and patterns such
            as `2024/**/*.jpg`. A folder is searched with its subfolders and its tars.
        exclude: patterns of names or paths to leave out.

    Returns:
        The images in the order of `paths`, without repetition, and an error message for each
        damaged tar. The files of a folder are sorted.

    Raises:
        ValueError: a path has no images, a folder cannot be read, or all images are excluded.
    """
    found: dict[str | Member, None] = {}
    damage: list[str] = []
    for path in (os.fspath(path) for path in paths):
        known_damage = len(damage)
        pictures: list[str | Member] = []
        for name in _files(path, exclude):
            is_tar = name.endswith(".tar")
            pictures += _members(name, damage, exclude) if is_tar else [name]
        if not pictures and not exclude and len(damage) == known_damage:
            raise ValueError(f"{path}: no images; expected an image, or a folder or .tar of images")
        found.update(dict.fromkeys(pictures))
    if not found and not damage:
        raise ValueError(f"all images are excluded by {' '.join(exclude)}")
    return list(found), damage


def _is_wanted(path: str, exclude: Sequence[str], given: Sequence[str] = ()) -> bool:
    """Return whether to keep a path. Leave out a path if a pattern in `exclude` matches the path or
    one of its parts. Leave out a path with a hidden part, unless the part is in `given`."""
    parts = Path(path).parts
    if any(is_hidden(part) for part in parts if part not in given):
        return False
    names = [name.lower() for name in (path, *parts)]  # so *.rw2 also excludes a camera's .RW2
    patterns = [pattern.rstrip("/").lower() for pattern in exclude]
    return not any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _files(path: str, exclude: Sequence[str]) -> list[str]:
    given = Path(path).parts
    if os.path.lexists(path) and not _is_wanted(path, exclude, given):
        return []
    if os.path.isdir(path):
        return sorted(_files_below(path, exclude), key=Path)
    if os.path.lexists(path):  # also keep a broken link, so that reading it raises an error
        return [path]
    if not (matches := sorted(glob.glob(path, recursive=True))):
        raise ValueError(f"{path}: no such file or folder, and no file matches it as a pattern")
    wanted = [name for name in matches if _is_wanted(name, exclude, given)]
    return [name for match in wanted for name in _files(match, exclude)]


def _files_below(root: str, exclude: Sequence[str]) -> Iterator[str]:
    """Yield the images and tars below a folder, also in linked folders. Read each folder once."""
    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, onerror=refuse_unreadable, followlinks=True):
        below = Path(folder).relative_to(root)
        names, folders[:] = (
            [name for name in some if _is_wanted(str(below / name), exclude)]
            for some in (names, folders)
        )
        real = {os.path.realpath(os.path.join(folder, name)): name for name in sorted(folders)}
        folders[:] = [name for path, name in real.items() if path not in seen]
        seen |= real.keys()
        for path in (str(Path(folder, name)) for name in names):
            is_wanted = is_picture(path) or path.endswith(".tar")
            if is_wanted and (os.path.isfile(path) or not os.path.exists(path)):
                yield path


def _members(archive: str, damage: list[str], exclude: Sequence[str] = ()) -> list[Member]:
    """The images of a tar, up to the first damage. If a name occurs twice, keep only the last file,
    as unpacking the tar does."""
    found = members(archive, damage)
    named = {m.name: m for m in found if is_picture(m.name) and _is_wanted(m.name, exclude)}
    return list(named.values())


def pixels_of(source: str | Member, transform: ImageTransform) -> Tensor:
    """Read an image file, or an image in a tar, as pixels (3, S, S). Raises ImageError."""
    try:
        return transform(source if isinstance(source, str) else open_member(source))
    except ImageError as error:
        raise ImageError(with_name(str(source), error)) from None


def open_member(member: Member) -> Image.Image:
    """Open an image inside a tar, as `open_image` opens a file. Raises ImageError."""
    try:
        return open_image(member.read(), name=member.name)
    except OSError as error:
        raise ImageError(f"{member}: cannot be read: {error.strerror}") from error
    except ImageError as error:
        raise ImageError(f"{member}: {error}") from None


def open_picture(name: str) -> Image.Image:
    """Open an image by its name in an index. The image may be in a tar. Raises ImageError."""
    archive, inside, member = name.partition(".tar/")
    if not inside or os.path.exists(name):
        return open_image(name)
    damage: list[str] = []
    for found in _members(f"{archive}.tar", damage):
        if found.name == member:
            return open_member(found)
    raise ImageError(f"{name}: cannot be read: {', '.join(damage) or 'no such image in the tar'}")
