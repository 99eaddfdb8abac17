"""Atomic writes: a save either writes all of its files, or changes no file."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from miniclip.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PLACE = ".cache/huggingface"
"""Unfinished files are written here. huggingface_hub's `upload_folder` leaves this folder out."""
SAVED = f"{PLACE}/.miniclip.saved"
"""The folder of a complete save. Its files still have to be moved to the checkpoint's directory."""
PREFIX = ".miniclip-tmp-"  # a later save deletes such folders, so users must not use this name


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file. If this fails, an old file of the same name stays unchanged."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file's path. If no error occurs, this file replaces `path` at the end."""
    if path.exists() and not path.is_file():  # do not replace a pipe or a device such as /dev/null
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with _private_folder(path.parent) as folder:
        temporary = folder / path.name
        temporary.touch()
        mode = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def _private_folder(directory: Path) -> Iterator[Path]:
    """Yield a new folder inside `directory`, and remove it at the end.

    The folder is in PLACE. If PLACE is behind a link or on another disk, the folder is in
    `directory` itself. (A rename from another disk would fail.)

    A process locks its folder. A folder without a lock was left by a killed process, and is removed
    here. On a system without locks, such a folder stays.
    """
    places, held = (directory / ".cache", directory / PLACE), None
    while held is None:  # another process may remove the folder or its parents before we lock it
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
        if not any(map(os.path.islink, places)):
            try:
                for place in places:
                    with suppress(FileExistsError):
                        os.mkdir(place)
                os.rename(folder, places[1] / folder.name)
                folder = places[1] / folder.name
            except FileNotFoundError:  # another process removed PLACE
                shutil.rmtree(folder, ignore_errors=True)
                continue
            except OSError:  # PLACE is on another disk, or cannot be written
                pass
        with suppress(FileNotFoundError):
            try:
                held = lock(folder)
            except BlockingIOError:
                continue
            except OSError:  # a system without locks
                held = -1
            held = held if folder.exists() else None
    try:
        for left in {*folder.parent.glob(f"{PREFIX}*")} - {folder}:
            with suppress(OSError):
                descriptor = lock(left)
                shutil.rmtree(left, ignore_errors=True)
                os.close(descriptor)  # not earlier: the process that just made `left` may lock it
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held >= 0:
            os.close(held)
        with suppress(OSError):  # a folder that is not empty cannot be removed
            (directory / PLACE).rmdir()
            (directory / ".cache").rmdir()


def lock(folder: Path) -> int:
    """Lock a folder until the returned descriptor is closed.

    Raises BlockingIOError if another process has the lock, and OSError on a system without locks.
    """
    if fcntl is None:
        raise OSError("no locks")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def saving(directory: Path) -> Iterator[Path]:
    """Yield a folder to write files to. At the end, either all files move to `directory` or none.

    If a file in the folder is empty, the file with the same name in `directory` is deleted. To
    complete the save, the folder is renamed to SAVED. If it is not in PLACE, it gets the same name
    in `directory`. If the process is killed before the rename, the directory keeps its files. If it
    is killed later, the next reader calls `finish_save`. Raises CheckpointError.
    """
    folder, is_new = directory, not directory.exists()
    try:
        with blaming_disk(directory):
            directory.mkdir(parents=True, exist_ok=True)
            with _private_folder(directory) as folder:
                yield folder
                for file in folder.iterdir():
                    target = directory / file.name
                    if target.is_dir():  # check now, because `_commit` cannot be undone
                        raise IsADirectoryError(f"{target} is a directory")
                    if target.exists():
                        file.chmod(target.stat().st_mode)
                _commit(folder, directory)
                finish_save(directory)
    except CheckpointError as error:  # the error should name the user's directory
        raise CheckpointError(str(error).replace(str(folder), str(directory))) from error
    finally:
        if is_new:
            with suppress(OSError):
                directory.rmdir()  # succeeds only if the directory is empty


def _commit(folder: Path, directory: Path) -> None:
    while True:
        finish_save(directory)
        try:
            return os.replace(folder, folder.parent / Path(SAVED).name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process saved first
                raise


def complete_saves(directory: Path) -> list[Path]:
    """The folders of complete saves in a directory. A link to a folder is left out."""
    folders = (directory / SAVED, directory / Path(SAVED).name)
    return [saved for saved in folders if os.path.isdir(saved) and not saved.is_symlink()]


def finish_save(directory: Path) -> None:
    """If a save is complete, move its files into `directory`."""
    for saved in complete_saves(directory):
        _finish(saved, directory)


def _finish(saved: Path, directory: Path) -> None:
    try:
        names = os.listdir(saved)
    except FileNotFoundError:  # another process has finished
        return
    for name in names:
        with suppress(FileNotFoundError):  # another process may move the same files now
            if (saved / name).lstat().st_size:
                os.replace(saved / name, directory / name)
            else:
                (directory / name).unlink(missing_ok=True)
                (saved / name).unlink()
    with suppress(OSError):  # another process may have removed SAVED, or saved again
        saved.rmdir()


@contextmanager
def blaming_disk(directory: Path) -> Iterator[None]:
    """Turn an OSError or a RuntimeError into a CheckpointError that names the directory."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory}: cannot save here: {reason}") from error
