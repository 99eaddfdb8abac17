"""Atomic writes: one file, or all files of a checkpoint, are replaced together or not at all."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from miniclip.errors import CheckpointError

SAVED = ".miniclip-saved"
"""A folder with a complete save, whose files still have to be moved to their places."""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. On success the file takes the place of `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def saving(directory: Path) -> Iterator[Path]:
    """Yield a folder to write files to. They move to `directory` all together or not at all.

    An empty file in the folder means: delete the file with this name. If the process is killed,
    the directory has all old files or all new ones: one rename makes the folder a complete save,
    and the next reader of the directory calls `finish_save`.
    """
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    for folder in directory.glob(".saving-*"):
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > 3600:  # its process was killed
                shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        try:
            yield folder
        except CheckpointError as error:  # name the directory, not the folder
            raise CheckpointError(str(error).replace(str(folder), str(directory))) from error
        for file in folder.iterdir():
            target = directory / file.name
            if target.is_dir():  # checked here, because nothing may fail after the rename below
                raise IsADirectoryError(f"{target} is a directory")
            if target.exists():
                file.chmod(target.stat().st_mode)
        finish_save(directory)
        os.replace(folder, directory / SAVED)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                directory.rmdir()  # it is empty only if nothing is saved
    finish_save(directory)


def finish_save(directory: Path) -> None:
    """Move the files of a complete save to their places, if a process was killed before it did."""
    saved = directory / SAVED
    try:
        names = [] if saved.is_symlink() else os.listdir(saved)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        with suppress(FileNotFoundError):  # another process may do the same at the same time
            if (saved / name).stat().st_size:
                os.replace(saved / name, directory / name)
            else:
                (directory / name).unlink(missing_ok=True)
                (saved / name).unlink()
    with suppress(OSError):  # it may be gone, or already the next save
        saved.rmdir()


@contextmanager
def blaming_disk(directory: Path) -> Iterator[None]:
    """Turn what fails while writing into one CheckpointError that names the directory."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory}: cannot save here: {reason}") from error
