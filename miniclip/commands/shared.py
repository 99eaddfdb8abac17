"""Functions that several commands use: arguments, loading, checks, and output."""

import argparse
import csv
import ctypes
import io
import json
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from miniclip.errors import ImageError
from miniclip.files.hub import embedded_names
from miniclip.terminal import printable

if TYPE_CHECKING:
    from miniclip.checkpoint import Loaded

DEFAULT_MODEL = "openai/clip-vit-base-patch32"
COLUMNS = 80  # the largest width of a table
MODELS = (
    f"an embedded checkpoint ({', '.join(embedded_names())}), a folder, a weights file, one of "
    "OpenAI's names such as ViT-B/32, or a repository of the Hugging Face hub "
    f"(default: {DEFAULT_MODEL})"
)
REVISION = "branch, tag or commit of a hub repository (default: main)"
PICTURES = "miniclip demo --pictures pictures"  # writes the images that other examples use


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `load_model` reads."""
    group = parser.add_argument_group("which model")
    group.add_argument("--model", default=DEFAULT_MODEL, help=MODELS)
    group.add_argument(
        "--reference",
        choices=("transformers", "openai"),
        default="transformers",
        help="give the token ids and pixels of this library (default: %(default)s)",
    )
    add_revision(group)


TEMPLATES = (
    "a sentence with {} for the label, or a published set: imagenet (80 sentences), simple (7 of "
    "the 80), food101 and others of the paper; repeat the option to average several (default: "
    "'a photo of a {}.')"
)
LABELS = (
    "the labels, or one of these: a text file with one label per line ('cat | kitten' is "
    "one label with two names), a JSON list, a folder of class folders, a published set (imagenet, "
    "food101 and others of the paper), or - for lines of standard input"
)


def read_labels(names: list[str]) -> list[str]:
    """Return the labels from --labels, from standard input, or from a file, folder or set."""
    from miniclip.zeroshot.data import find_labels

    return open_stdin().read().splitlines() if names == ["-"] else find_labels(names)


def read_input(name: str) -> str | bytes:
    """Return the name of a file, or the bytes of standard input for "-"."""
    return open_stdin().buffer.read() if name == "-" else name


def open_stdin() -> TextIO:
    """Return standard input. Raise ValueError if it is closed."""
    if sys.stdin is None:
        raise ValueError("standard input is closed; expected data from a pipe or a file")
    return sys.stdin


def add_revision(parser: argparse._ActionsContainer) -> None:
    """Add --revision."""
    parser.add_argument("--revision", help=REVISION)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the columns of a metadata file."""
    for column, default in (("image", "file_name"), ("text", "text")):
        help = f"{column} column of a metadata file (default: {default})"
        parser.add_argument(f"--{column}-column", default=default, metavar="NAME", help=help)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")


def add_engine(parser: argparse.ArgumentParser, *others: str) -> None:
    """Add --engine, the engine that runs the vision tower."""
    parser.add_argument(
        "--engine",
        choices=("eager", "compile", "onnxruntime", "openvino", *others),
        default="eager",
        help="the engine of the vision tower; eager needs no preparation (default: %(default)s)",
    )


def load_model(args: argparse.Namespace, **options: Any) -> "Loaded":
    """Load the model that the arguments name, with its tokenizer and its transform."""
    from miniclip.checkpoint import load
    from miniclip.follow import check_towers

    asked = {"device": args.device, "reference": args.reference, "revision": args.revision}
    loaded = load(args.model, **asked | options)
    check_towers(loaded.model, args.model)
    if getattr(args, "engine", "eager") not in ("eager", "auto"):
        from miniclip.engines import use_engine

        use_engine(loaded.model, args.engine)
    return loaded


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensors.

    By default glibc returns large blocks to Linux, and Linux fills each page with zeros before its
    next use. For 64 images in B/32, this takes an eighth of the time. Memory use may grow by a
    quarter.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # the C library musl has no mallopt
        trim_threshold, mmap_max = -1, -4  # the options' numbers in malloc.h
        libc.mallopt(trim_threshold, -1)  # keep all freed memory
        libc.mallopt(mmap_max, 0)


def check_figure(path: str) -> None:
    """Raise ValueError if matplotlib is missing or cannot write this file."""
    from miniclip.figures.style import PICTURE_SUFFIXES

    check_writable(path, PICTURE_SUFFIXES)


def check_writable(name: str, suffixes: Iterable[str]) -> None:
    """Raise ValueError if a file cannot be written. Call this before work that may take hours."""
    path = Path(name)
    if path.suffix.lower() not in suffixes:
        known = ", ".join(suffixes)
        raise ValueError(f"{path}: cannot be written: expected a name that ends in {known}")
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None
    if not existed:
        path.unlink()


def complain(error: Exception) -> None:
    """Print the first line of an error's message on stderr."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's message is a page long
        text = "the device has too little memory; try a smaller --batch, or --dtype bfloat16"
    if not isinstance(error, ImageError):  # an ImageError may contain a file name with line breaks
        text = text.partition("\n")[0]
    note(f"miniclip: error: {text}")


def note(text: str) -> None:
    """Print one line on stderr."""
    print(printable(text), file=sys.stderr)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # A file name that is not Unicode has surrogates, which are written as JSON escapes.
    print(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def print_csv(rows: list[dict[str, Any]]) -> None:
    """Print rows as CSV, with the names of the columns first."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    print(text.getvalue().encode("utf-8", "backslashreplace").decode(), end="")


def print_wrapped(head: str, words: list[str]) -> None:
    """Print words, separated by commas and wrapped to the width of a table."""
    print(textwrap.fill(", ".join(words), COLUMNS, initial_indent=head, subsequent_indent="  "))
