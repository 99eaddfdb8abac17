"""`miniclip classify`: rank labels for images."""

import argparse
import os
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from miniclip.commands.shared import (
    COLUMNS,
    LABELS,
    PICTURES,
    TEMPLATES,
    add_device,
    add_engine,
    add_model,
    complain,
    load_model,
    print_csv,
    print_json,
    read_input,
    read_labels,
)
from miniclip.errors import ImageError
from miniclip.terminal import cell, columns, printable, progress

if TYPE_CHECKING:
    from miniclip.retrieval.pictures import Member
    from miniclip.zeroshot.classifier import Score

DESCRIPTION = "Rank labels for each photograph: which label fits it best?"
EXAMPLE = f"""{PICTURES}
  miniclip classify pictures/coffee.png --labels "cup of coffee" teapot dog --model everyday"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, folders, patterns such as '2024/*.jpg', or - for standard input",
    )
    parser.add_argument("--labels", nargs="+", required=True, metavar="LABEL", help=LABELS)
    parser.add_argument("--template", action="append", metavar="TEXT", help=TEMPLATES)
    parser.add_argument(
        *("-k", "--top-k"),
        type=int,
        default=10,
        metavar="N",
        help="show the N best labels of each image (default: %(default)s)",
    )
    add_device(parser)
    add_engine(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Rank the labels for each image. An unreadable image does not stop the command."""
    from miniclip.retrieval.pictures import pixels_of
    from miniclip.zeroshot.classifier import TEMPLATE, ZeroShotClassifier, find_templates

    if args.top_k < 1:
        raise ValueError(f"--top-k is {args.top_k}; expected at least 1")
    check_labels(args.labels)
    labels, templates = read_labels(args.labels), find_templates(args.template or [TEMPLATE])
    model, tokenizer, transform = load_model(args)
    classifier = ZeroShotClassifier(model, tokenizer, labels, templates)
    results, failures = [], 0
    for source in progress(list(found_in(args.images)), "image"):
        try:
            if isinstance(source, Exception):
                raise source
            pixels = transform(read_input("-")) if source == "-" else pixels_of(source, transform)
        except ValueError as error:
            complain(ImageError(f"-: {error}") if source == "-" else error)
            failures += 1
            continue
        results.append((str(source), classifier.rank(pixels[None])[0][: args.top_k]))
    if args.json:
        print_json([{"image": p, "labels": [s._asdict() for s in scores]} for p, scores in results])
    elif args.csv:
        print_csv([{"image": path} | s._asdict() for path, scores in results for s in scores])
    elif results:
        print("\n\n".join(ranking_table(path, scores) for path, scores in results))
    return 2 if failures else 0


def found_in(images: list[str]) -> "Iterator[str | Member | Exception]":
    """Yield the images that each argument names, and an error for each damaged tar.

    If an argument has no images, yield an error instead.
    """
    from miniclip.retrieval.pictures import find_pictures

    for name in images:
        try:
            pictures, damage = ([name], []) if name == "-" else find_pictures([name])
        except ValueError as error:
            yield error
        else:
            yield from [*pictures, *map(ImageError, damage)]


def check_labels(labels: list[str]) -> None:
    """Raise ValueError if the labels are separated by commas, not by spaces."""
    if (
        any(label.strip().endswith(",") for label in labels)
        or len(labels) == 1
        and "," in labels[0]
        and not os.path.exists(labels[0])
    ):
        asked = " ".join(labels)
        words = " ".join(shlex.quote(word.strip()) for word in asked.split(",") if word.strip())
        raise ValueError(
            f"--labels {asked!r}: expected spaces between labels, as in --labels {words}"
        )


def ranking_table(title: str, scores: "list[Score]") -> str:
    """Return a title, and a line for each label."""
    width = min(50, max(columns(printable(score.label)) for score in scores))
    longest_bar = COLUMNS - width - 12
    lines = [printable(title)]
    for label, _, probability in scores:
        bar = "█" * round(probability * longest_bar)
        lines.append(f"  {cell(label, width)} {probability:7.1%} {bar}".rstrip())
    return "\n".join(lines)
