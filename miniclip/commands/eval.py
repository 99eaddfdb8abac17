"""`miniclip eval`: zero-shot accuracy on labelled images."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniclip.commands.shared import (
    COLUMNS,
    add_device,
    add_model,
    keep_freed_memory,
    load_model,
    note,
    print_json,
)
from miniclip.terminal import printable, shorten

if TYPE_CHECKING:
    from miniclip.zeroshot.evaluation import Evaluation

DESCRIPTION = "Zero-shot accuracy on photographs in class folders."
EXAMPLE = """miniclip eval --data shapes --model shapes
  miniclip eval --data imagenet/val --templates imagenet --plot confusions.png"""
MOST_CLASSES = 50  # in the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="a folder of class folders; or `shapes`, for questions about the drawn world",
    )
    parser.add_argument(
        "--templates",
        nargs="+",
        metavar="TEXT",
        help="sentences with {} for the label, averaged, or published sets of them: imagenet "
        "(80), simple (7 of the 80), cifar (18) (default: 'a photo of a {}.')",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="what the classes are called, one a line, in the order of the sorted folders "
        "(default: the folders' names, and OpenAI's for ImageNet's)",
    )
    parser.add_argument(
        "--batch", type=int, default=64, metavar="N", help="images at a time (default: %(default)s)"
    )
    add_device(parser)
    parser.add_argument("--plot", metavar="PNG", help="draw the confusions")
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Classify every image and print what was right and what was confused."""
    keep_freed_memory()
    if args.data == "shapes":
        return ask_about_shapes(args)
    from miniclip.zeroshot.classifier import TEMPLATE, ZeroShotClassifier, find_templates
    from miniclip.zeroshot.data import labelled_images
    from miniclip.zeroshot.evaluation import evaluate

    templates = find_templates(args.templates or [TEMPLATE])
    images = labelled_images(args.data, read_lines(args.labels) if args.labels else None)
    model, tokenizer, transform = load_model(args)
    classifier = ZeroShotClassifier(model, tokenizer, images.labels, templates)
    result = evaluate(classifier, transform, images, args.batch)
    for reason in result.skipped:
        note(f"miniclip: skipped {reason}")
    if args.json:
        print_json(
            {"model": args.model, "templates": templates} | evaluation_dict(images.folders, result)
        )
    else:
        print(f"model      {args.model}")
        print(f"templates  {shorten(' | '.join(args.templates or templates), COLUMNS - 11)}")
        print(evaluation_table(result))
    if args.plot:
        from miniclip.figures.confusion import draw_confusion

        draw_confusion(result, args.plot)
        note(f"picture: {args.plot}")
    return 0


def ask_about_shapes(args: argparse.Namespace) -> int:
    """`miniclip eval --data shapes`: questions about drawn scenes."""
    from miniclip.world.scoring import score

    if args.templates or args.labels or args.plot:
        raise ValueError(
            "the drawn world asks in its own words: no --templates, --labels or --plot"
        )
    scores = score(*load_model(args))
    if args.json:
        print_json({"model": args.model} | scores._asdict())
        return 0
    print(f"model  {args.model}, on scenes that no training set has\n")
    for question, share, chance in (
        ("which colour and shape, of 64: pairs seen in training", scores.seen, "1.6 %"),
        ("the same: pairs never seen in training", scores.unseen, "1.6 %"),
        ("the caption, or the objects' places swapped", scores.relations, "50 %"),
        ("    of left and right", scores.left_right, "50 %"),
        ("    of above and below", scores.above_below, "50 %"),
        ("the caption, or the objects' colours swapped", scores.binding, "50 %"),
    ):
        print(f"{question:<56}{share:>7.1%}  (chance {chance})")
    return 0


def read_lines(path: str) -> list[str]:
    """Read the lines of a text file. Raises ValueError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected lines of text: {error}") from None


def evaluation_dict(folders: list[str], result: "Evaluation") -> dict[str, Any]:
    """Everything that was counted. A class is named by its folder: two labels may be equal."""
    counts = zip(
        folders,
        result.labels,
        result.images.tolist(),
        result.confusion.diagonal().tolist(),
        result.in_top5.tolist(),
        strict=True,
    )
    return {
        "top1": result.top1,
        "top5": result.top5,
        "images": sum(result.images.tolist()),
        "skipped": result.skipped,
        "classes": [
            {"folder": folder, "label": label, "images": images, "right": right, "in_top5": in_top5}
            for folder, label, images, right, in_top5 in counts
        ],
        "confusions": [
            {"true": folders[true], "predicted": folders[predicted], "images": images}
            for true, predicted, images in result.mistakes()
        ],
    }


def evaluation_table(result: "Evaluation") -> str:
    """Accuracies, a line for each class, and the ten most frequent confusions.

    If there are more than MOST_CLASSES classes, only the best and the worst have a line.
    """
    images, accuracy = result.images.tolist(), result.class_accuracy.tolist()
    lines = [f"images     {sum(images):,}, in {len(images):,} folders"]
    if result.skipped:
        lines.append(f"skipped    {len(result.skipped):,}, which cannot be read")
    lines.append(f"top-1      {result.top1:.2%}")
    if len(images) > 5:
        lines.append(f"top-5      {result.top5:.2%}")

    width = min(30, max(5, *(len(printable(label)) for label in result.labels)))
    longest_bar = COLUMNS - width - 18
    rows = []
    for i in sorted(range(len(images)), key=lambda i: -accuracy[i] if images[i] else 1):
        percent = f"{accuracy[i]:7.1%}" if images[i] else "      -"
        bar = "█" * round(accuracy[i] * longest_bar) if images[i] else ""
        label = shorten(result.labels[i], width)
        rows.append(f"{label:<{width}} {images[i]:8,} {percent} {bar}".rstrip())
    if len(rows) > MOST_CLASSES:
        hidden = f"... {len(rows) - MOST_CLASSES:,} classes between these (--json has all)"
        rows[MOST_CLASSES // 2 : -MOST_CLASSES // 2] = [hidden]
    lines += ["", f"{'class':<{width}} {'images':>8} {'top-1':>7}", *rows]

    mistakes = result.mistakes()[:10]
    if mistakes:
        lines += ["", f"{'most frequent confusions':<54}{'images':>8}{'of class':>10}"]
    for true, predicted, count in mistakes:
        pair = f"{shorten(result.labels[true], 25)} → {shorten(result.labels[predicted], 25)}"
        lines.append(f"{pair:<54}{count:8,}{count / images[true]:10.1%}")
    return "\n".join(lines)
