"""Read small text files of a checkpoint, with a limit on their size."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from miniclip.errors import CheckpointError

MOST_BYTES, MOST_LINES = 5_000_000, 300_000
"""Limits for a tokenizer's files. OpenAI's have up to 3.7 million bytes and 262,145 lines."""


def read_json(path: Path, most: int = 1_000_000) -> dict[str, Any]:
    """The object in a JSON file. Refuses files above `most` bytes: parsed JSON can take 30 times
    its size in memory. Raises CheckpointError."""
    try:
        value = json.loads(_read_bytes(path, most).decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: expected a JSON file that can be read: {reason}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_if_there(path: Path, most: int = 1_000_000) -> dict[str, Any]:
    """The object in a JSON file, or an empty one if there is no such file."""
    return read_json(path, most) if path.is_file() else {}


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, which may be gzipped. Raises CheckpointError."""
    try:
        data = _read_bytes(path, MOST_BYTES)
        if data.count(b"\n") > MOST_LINES:
            raise OSError(f"it has more than {MOST_LINES:,} lines, which no CLIP's has")
        text = data.decode()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CheckpointError(f"{path}: expected lines of UTF-8 text: {error}") from None
    return text.replace("\r\n", "\n").rstrip("\n").split("\n")


def _read_bytes(path: Path, most: int) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")  # reading a pipe might never end
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        data = file.read(most + 1)  # the limit counts unpacked bytes
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes, which no CLIP's has")
    return data
