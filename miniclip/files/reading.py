"""Open only regular files, and read small text files with a limit on their size."""

import errno
import gzip
import json
import os
import stat
import zlib
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from miniclip.errors import CheckpointError

NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # Windows has no such flag and does not need it
MOST_BYTES, MOST_LINES = 5_000_000, 300_000
"""Limits for each file of a tokenizer. OpenAI's files have at most 3.7 MB and 262,145 lines."""


def read_json(path: Path, most: int = 1_000_000) -> dict[str, Any]:
    """Read the object in a JSON file. Raises CheckpointError. The file must have at most `most`
    bytes, because parsed JSON can take 30 times its size in memory."""
    try:
        value = json.loads(read_bytes(path, most).decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path}: expected a JSON file, but it cannot be read: {reason}"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_if_there(path: Path, most: int = 1_000_000) -> dict[str, Any]:
    """Read the object in a JSON file, or return {} if there is no such file."""
    return read_json(path, most) if path.is_file() else {}


def read_lines(path: Path) -> list[str]:
    """Read the lines of a UTF-8 text file, which may be gzipped. Raises CheckpointError."""
    try:
        data = read_bytes(path, MOST_BYTES)
        if data.count(b"\n") > MOST_LINES:
            raise OSError(f"it has more than {MOST_LINES:,} lines, which is the limit")
        text = data.decode()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CheckpointError(f"{path}: expected lines of UTF-8 text: {error}") from None
    return text.replace("\r\n", "\n").rstrip("\n").split("\n")


def open_regular(path: str | PathLike[str]) -> BinaryIO:
    """Open a file for reading. Raises OSError for a pipe or a device, which might never end."""
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return file


def refuse_unreadable(error: OSError) -> None:
    """Raise ValueError for a folder that cannot be listed. By default, os.walk leaves it out."""
    reason = f"{error.filename}: the folder cannot be read: {error.strerror}"
    raise ValueError(f"{reason}; make it readable, or leave it out") from error


def read_bytes(path: Path, most: int) -> bytes:
    """Read the bytes of a file, unpacked if its name ends in .gz. Raises OSError or ValueError, and
    for a damaged .gz also EOFError or zlib.error."""
    with open_regular(path) as raw:
        with gzip.open(raw) if path.suffix == ".gz" else raw as file:
            data = file.read(most + 1)  # the limit counts unpacked bytes
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes, which is the limit")
    return data
