"""`miniclip classify`: photographs against labels."""

import argparse
import shlex
from typing import TYPE_CHECKING

from miniclip.commands.shared import (
    COLUMNS,
    add_device,
    add_model,
    complain,
    load_model,
    print_json,
)
from miniclip.errors import ImageError
from miniclip.terminal import printable, progress, shorten

if TYPE_CHECKING:
    from miniclip.zeroshot.classifier import Score

DESCRIPTION = "Which of these labels does a photograph show?"
EXAMPLE = 'miniclip classify cat.jpg --labels cat dog "a cup of coffee" --model cifar10'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--labels", nargs="+", required=True, metavar="LABEL")
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="a sentence with {} for the label; give several to average them",
    )
    add_device(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Rank the labels for each image. An image that cannot be read does not stop the others."""
    from miniclip.zeroshot.classifier import TEMPLATE, ZeroShotClassifier

    check_labels(args.labels)
    model, tokenizer, transform = load_model(args)
    templates = args.template or [TEMPLATE]
    classifier = ZeroShotClassifier(model, tokenizer, args.labels, templates)
    results, status = [], 0
    for path in progress(args.images, "image"):
        try:
            pixels = transform(path)
        except ImageError as error:
            complain(error)
            status = 2
            continue
        results.append((path, classifier.rank(pixels[None])[0]))
    if args.json:
        print_json(
            [{"image": path, "labels": [s._asdict() for s in scores]} for path, scores in results]
        )
    elif results:
        print("\n\n".join(ranking_table(path, scores) for path, scores in results))
    return status


def check_labels(labels: list[str]) -> None:
    """Raise ValueError where commas seem to stand between labels: a shell passes them on."""
    if (
        any(label.strip().endswith(",") for label in labels)
        or len(labels) == 1
        and "," in labels[0]
    ):
        asked = " ".join(labels)
        words = " ".join(shlex.quote(word.strip()) for word in asked.split(",") if word.strip())
        raise ValueError(f"--labels {asked!r}: expected spaces between labels: --labels {words}")


def ranking_table(title: str, scores: "list[Score]") -> str:
    """A title, and a line for each label."""
    width = min(50, max(len(printable(score.label)) for score in scores))
    longest_bar = COLUMNS - width - 12
    lines = [printable(title)]
    for label, _, probability in scores:
        bar = "█" * round(probability * longest_bar)
        lines.append(f"  {shorten(label, width):<{width}} {probability:7.1%} {bar}".rstrip())
    return "\n".join(lines)
