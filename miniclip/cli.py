"""The `miniclip` command: parses, calls, prints.

Exit status 0 if all went well, 1 if a check failed, 2 on bad input, which is one line on stderr.
"""

import argparse
import ctypes
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniclip import __version__
from miniclip.errors import ImageError
from miniclip.training.recipe import Recipe

if TYPE_CHECKING:
    from miniclip.convert import Mapped
    from miniclip.parity import Report
    from miniclip.retrieval.building import Throughput
    from miniclip.zeroshot.classifier import Score
    from miniclip.zeroshot.evaluation import Evaluation

DEFAULT_MODEL = "openai/clip-vit-base-patch32"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the return value is the exit status."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # not every terminal has a bar, or every script
    args = build_parser().parse_args(argv)
    warnings.formatwarning = lambda message, *_: f"miniclip: warning: {message}\n"
    try:
        if getattr(args, "plot", None):
            check_figure(args.plot)
        status = args.run(args)
        if sys.stdout:
            sys.stdout.flush()  # here, where a disk that is full can still be an error of one line
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        sys.stdout = None
        return 0
    except (ValueError, OSError, RuntimeError) as error:  # our own, the file system's and torch's
        complain(error)
        return 2


def complain(error: Exception) -> None:
    """The first line of an error says it all; an exception in Python has the long lists."""
    text = str(error)
    if not isinstance(error, ImageError):  # which has no lines, but perhaps a name that has
        text = text.partition("\n")[0]
    print(f"miniclip: error: {printable(text)}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like all others."""

    def error(self, message: str) -> Any:
        """Raises SystemExit with status 2."""
        complain(ValueError(f"{message} (see {self.prog} --help)"))
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `args.run` is the function of the one that was given."""
    parser = Parser(prog="miniclip", description="CLIP: photographs and words in one space.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, description: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=description,
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON for a program to read")
        return sub

    def model_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--reference",
            choices=("transformers", "openai"),
            default="transformers",
            help="whose text cleaning and image arithmetic to match (default: %(default)s)",
        )
        sub.add_argument("--revision", help="branch, tag or commit of a hub repository")

    def recipe_options(sub: argparse.ArgumentParser) -> None:
        for entry in fields(Recipe):
            kind, meaning = type(entry.default), entry.metadata["help"]
            flag = f"--{entry.name.replace('_', '-')}"
            if kind is bool:
                sub.add_argument(flag, action=argparse.BooleanOptionalAction, help=meaning)
            else:
                sub.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=meaning)

    sub = command(
        "classify",
        classify,
        "Which of these labels does a photograph show?",
        'miniclip classify cat.jpg --labels cat dog "a cup of coffee" --model cifar10',
    )
    sub.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    sub.add_argument("--labels", nargs="+", required=True, metavar="LABEL")
    sub.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    sub.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="a sentence with {} for the label; give several to average them",
    )
    sub.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    model_options(sub)

    sub = command(
        "info",
        info,
        "A model's architecture, parameters and multiply-adds, from its config alone.",
        "miniclip info openai/clip-vit-base-patch32",
    )
    sub.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="default: %(default)s")
    sub.add_argument("--revision", help="branch, tag or commit of a hub repository")

    sub = command(
        "tokenize",
        tokenize,
        "What happens to a text on its way to token ids, stage by stage.",
        'miniclip tokenize "a photo of a cat" --model cifar10',
    )
    sub.add_argument("text")
    sub.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    model_options(sub)

    sub = command(
        "parity",
        parity,
        "How far the numbers are from transformers', or another model's, tensor by tensor.",
        "miniclip parity --random B/32\n"
        "  miniclip parity runs/fork --against cifar10 --plot depth.png",
    )
    which = sub.add_mutually_exclusive_group()
    which.add_argument("model", nargs="?", metavar="MODEL", help=f"default: {DEFAULT_MODEL}")
    which.add_argument(
        "--random",
        metavar="SHAPE",
        help="weights drawn at random, in a shape of miniclip.presets: B/32, L/14-336, H/14, ...",
    )
    sub.add_argument(
        "--against",
        default="transformers",
        metavar="OTHER",
        help="transformers, which loads the same files, or another checkpoint, that of the "
        "original (default: %(default)s)",
    )
    sub.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float64", "bfloat16", "float16"),
        help="what is compared beside float64 (default: %(default)s)",
    )
    sub.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    sub.add_argument("--plot", metavar="PNG", help="draw the differences against depth")
    sub.add_argument("--revision", help="branch, tag or commit of a hub repository")

    sub = command(
        "bench",
        bench,
        "The same work by miniclip and by its peers, side by side, timed.",
        "miniclip bench --suite vision text --batch 8 --plot bench.png",
    )
    sub.add_argument(
        "--suite",
        nargs="+",
        metavar="NAME",
        help="vision, text, tokenizer, transform, load, startup, zeroshot, train, memory, embed, "
        "search (default: all)",
    )
    sub.add_argument(
        "--shape",
        default="B/32",
        help="of the random weights, from miniclip.presets: B/32, L/14-336, H/14, ... "
        "(default: %(default)s)",
    )
    sub.add_argument("--device", default="cpu", help="cpu, cuda (default: %(default)s)")
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (default: %(default)s)",
    )
    sub.add_argument(
        "--compile", action="store_true", help="time compiled encoders too, ours and transformers'"
    )
    sub.add_argument(
        "--batch", type=int, metavar="N", help="images or texts (default: 16, on a GPU 256)"
    )
    sub.add_argument("--plot", metavar="PNG", help="draw the ratios")

    sub = command(
        "convert",
        convert,
        "Write a checkpoint in the layout of transformers, OpenAI or open_clip.",
        "miniclip convert ViT-B-32.pt clip-vit-base-patch32 --layout transformers",
    )
    sub.add_argument("source", help="a checkpoint in any of the three")
    sub.add_argument("destination", help="a directory")
    sub.add_argument("--layout", choices=("transformers", "openai", "open_clip"), required=True)
    sub.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="a checkpoint to take the tokenizer from, where there is none beside the weights, as "
        "of OpenAI's own files: openai/clip-vit-base-patch32",
    )
    sub.add_argument("--revision", help="branch, tag or commit of a hub repository")

    sub = command(
        "train",
        train,
        "Train a CLIP on pictures and captions, from scratch or from a checkpoint.",
        "miniclip train cifar10/train --recipe cifar10 --out runs/cifar10",
    )
    sub.add_argument(
        "data",
        help="a folder of class folders, of pictures with metadata.jsonl or metadata.csv "
        "(file_name, text), or of WebDataset .tar shards; or the drawn world `shapes`",
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="where the checkpoint goes")
    sub.add_argument("--model", help="the checkpoint to start from (default: random weights)")
    sub.add_argument(
        "--recipe",
        metavar="NAME",
        help="train as this checkpoint was trained: its recipe.json, and, from scratch, its shape",
    )
    sub.add_argument("--config", metavar="JSON", help="from scratch: the shape, as a config.json")
    sub.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    sub.add_argument("--plot", metavar="PNG", help="draw the curves")
    recipe_options(sub)

    sub = command(
        "eval",
        evaluation,
        "Zero-shot accuracy on photographs in class folders.",
        "miniclip eval --data imagenet/val --templates imagenet --plot confusions.png",
    )
    sub.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="a folder of class folders; or `shapes`, to be asked about the drawn world",
    )
    sub.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    sub.add_argument(
        "--templates",
        nargs="+",
        metavar="TEXT",
        help="sentences with {} for the label, averaged, or published sets of them: imagenet "
        "(80), simple (7 of the 80), cifar (18) (default: 'a photo of a {}.')",
    )
    sub.add_argument(
        "--labels",
        metavar="FILE",
        help="what the classes are called, one a line, in the order of the sorted folders "
        "(default: the folders' names, and OpenAI's for ImageNet's)",
    )
    sub.add_argument(
        "--batch", type=int, default=64, metavar="N", help="images at a time (default: %(default)s)"
    )
    sub.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    sub.add_argument("--plot", metavar="PNG", help="draw the confusions")
    model_options(sub)

    sub = command(
        "explain",
        explain,
        "Where in a photograph is a text seen? Draws it, or scores the methods that can.",
        'miniclip explain cat.jpg "a cat" "a dog" --all -o where.png --model cifar10\n'
        "  miniclip explain --score shapes --model shapes --plot methods.png",
    )
    sub.add_argument("image", nargs="?", metavar="IMAGE", help="an image file")
    sub.add_argument("texts", nargs="*", metavar="TEXT", help="what to look for, one or several")
    sub.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    which = sub.add_mutually_exclusive_group()
    which.add_argument(
        "--method",
        action="append",
        metavar="NAME",
        help="attention, rollout, relevance, tokens or occlusion; give several to see them side by "
        "side (default: relevance)",
    )
    which.add_argument("--all", action="store_true", help="every method, side by side")
    sub.add_argument(
        "-o", "--out", metavar="PNG", help="the picture (default: miniclip-explain.png)"
    )
    sub.add_argument(
        "--score",
        choices=("shapes",),
        help="instead of IMAGE and TEXT: how often does each method find the object that is "
        "named, in drawn scenes of two objects?",
    )
    sub.add_argument(
        "--scenes", type=int, metavar="N", help="how many scenes to score on (default: 200)"
    )
    sub.add_argument("--plot", metavar="PNG", help="with --score: draw the first scenes' maps")
    sub.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    model_options(sub)

    sub = command(
        "embed",
        embed,
        "Read pictures into an index that `miniclip search` searches.",
        "miniclip embed photographs --out index.safetensors\n"
        "  torchrun --nproc-per-node 8 -m miniclip embed shards --out index.safetensors",
    )
    sub.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="pictures, folders, WebDataset .tar shards, or patterns such as '2024/**/*.jpg'",
    )
    sub.add_argument(
        "--out",
        metavar="FILE",
        help="the index, a safetensors file; killed, the same command goes on where it was",
    )
    sub.add_argument(
        "--time",
        action="store_true",
        help="instead of --out: images/s of decoding alone, of the encoder alone, and of both",
    )
    sub.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    sub.add_argument(
        "--batch", type=int, default=64, metavar="N", help="images at a time (default: %(default)s)"
    )
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the model (default: %(default)s)",
    )
    sub.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    sub.add_argument(
        "--workers", type=int, metavar="N", help="threads that decode (default: one for each core)"
    )
    model_options(sub)

    sub = command(
        "search",
        search,
        "The pictures of an index nearest to a text, a picture, or a sum of several.",
        'miniclip search index.safetensors "a red bicycle" --sheet bicycles.png\n'
        "  miniclip search index.safetensors --image dog.jpg --minus grass",
    )
    sub.add_argument("index", metavar="INDEX", help="what `miniclip embed` wrote")
    sub.add_argument("texts", nargs="*", metavar="TEXT", help="several are added up")
    sub.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="add a picture to the query"
    )
    sub.add_argument(
        "--minus", action="append", default=[], metavar="TEXT", help="take a text from the query"
    )
    sub.add_argument(
        "--minus-image",
        action="append",
        default=[],
        metavar="FILE",
        help="take a picture from the query",
    )
    sub.add_argument("-k", type=int, default=12, metavar="N", help="pictures (default: 12)")
    sub.add_argument("--sheet", metavar="PNG", help="show the pictures with their scores")
    sub.add_argument("--model", help="where the model is now, if not where it was")
    sub.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")

    sub = command(
        "serve",
        serve,
        "A page in the browser to try models on, for this machine alone.",
        "miniclip serve --model cifar10 shapes",
    )
    sub.add_argument(
        "--model",
        nargs="+",
        default=[DEFAULT_MODEL],
        metavar="NAME",
        help=f"one, or several to choose from (default: {DEFAULT_MODEL})",
    )
    sub.add_argument("--index", metavar="FILE", help="pictures to search, from `miniclip embed`")
    sub.add_argument(
        "--port", type=int, metavar="N", help="this one and no other (default: a free one)"
    )
    sub.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")

    sub = command(
        "demo",
        demo,
        "Describe a drawn scene and photographs, offline, and draw the result.",
        "miniclip demo -o demo.png",
    )
    sub.add_argument("-o", "--out", default="miniclip-demo.png", metavar="PNG", help="the picture")
    return parser


# ------------------------------------------------------------------------------------------------


def classify(args: argparse.Namespace) -> int:
    """`miniclip classify`: photographs against labels."""
    from miniclip.checkpoint import load
    from miniclip.zeroshot.classifier import TEMPLATE, ZeroShotClassifier

    model, tokenizer, transform = load(
        args.model, device=args.device, reference=args.reference, revision=args.revision
    )
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


def ranking_table(title: str, scores: "list[Score]") -> str:
    """A title and a line for each label, 80 columns wide."""
    width = min(50, max(len(printable(score.label)) for score in scores))
    longest_bar = 80 - width - 12
    lines = [printable(title)]
    for label, _, probability in scores:
        bar = "█" * round(probability * longest_bar)
        lines.append(f"  {shorten(label, width):<{width}} {probability:7.1%} {bar}".rstrip())
    return "\n".join(lines)


def train(args: argparse.Namespace) -> int:
    """`miniclip train`: write a checkpoint, and the curves of its training."""
    from miniclip.training import process_group, set_up, train

    keep_freed_memory()
    asked = {entry.name: getattr(args, entry.name) for entry in fields(Recipe)}
    overrides = {name: value for name, value in asked.items() if value is not None}
    with process_group(args.device) as device:
        setup = set_up(args.data, args.model, args.recipe, args.config, overrides, device)
        train(*setup, args.out)
    if os.environ.get("RANK", "0") != "0":
        return 0  # of several processes, the first one speaks
    lines = (Path(args.out) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if args.plot:
        from miniclip.figures.curves import draw_curves

        draw_curves(rows, args.plot)
        print(f"picture: {args.plot}", file=sys.stderr)
    if args.json:
        print_json(rows)
    else:
        print(f"{args.out}: {rows[-1]['step']:,} steps, loss {rows[-1]['loss']:.3f}")
    return 0


def evaluation(args: argparse.Namespace) -> int:
    """`miniclip eval`: zero-shot accuracy on labelled images."""
    from miniclip.checkpoint import load
    from miniclip.zeroshot.classifier import TEMPLATE, ZeroShotClassifier, find_templates
    from miniclip.zeroshot.data import labelled_images
    from miniclip.zeroshot.evaluation import evaluate

    keep_freed_memory()
    if args.data == "shapes":
        return shapes_evaluation(args)
    templates = find_templates(args.templates or [TEMPLATE])
    images = labelled_images(args.data, read_lines(args.labels) if args.labels else None)
    model, tokenizer, transform = load(
        args.model, device=args.device, reference=args.reference, revision=args.revision
    )
    classifier = ZeroShotClassifier(model, tokenizer, images.labels, templates)
    result = evaluate(classifier, transform, images, args.batch)
    for reason in result.skipped:
        print(f"miniclip: skipped {printable(reason)}", file=sys.stderr)
    if args.json:
        print_json(
            {"model": args.model, "templates": templates} | evaluation_dict(images.folders, result)
        )
    else:
        print(f"model      {args.model}")
        print(f"templates  {shorten(' | '.join(args.templates or templates), 69)}")
        print(evaluation_table(result))
    if args.plot:
        from miniclip.figures.confusion import draw_confusion

        draw_confusion(result, args.plot)
        print(f"picture: {args.plot}", file=sys.stderr)
    return 0


def shapes_evaluation(args: argparse.Namespace) -> int:
    """`miniclip eval shapes`: questions about drawn scenes."""
    from miniclip.checkpoint import load
    from miniclip.world.scoring import score

    if args.templates or args.labels or args.plot:
        raise ValueError(
            "the drawn world asks in its own words: no --templates, --labels or --plot"
        )
    loaded = load(args.model, device=args.device, reference=args.reference, revision=args.revision)
    scores = score(*loaded)
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


def evaluation_dict(folders: list[str], result: "Evaluation") -> dict[str, Any]:
    """Everything that was counted. Classes go by their folders, whose names differ."""
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


def evaluation_table(result: "Evaluation", most: int = 50) -> str:
    """Accuracies, a line for each class (the best and the worst, where there are more than `most`),
    and the ten most frequent confusions; 80 columns wide."""
    images, accuracy = result.images.tolist(), result.class_accuracy.tolist()
    lines = [f"images     {sum(images):,}, in {len(images):,} folders"]
    if result.skipped:
        lines.append(f"skipped    {len(result.skipped):,}, which cannot be read")
    lines.append(f"top-1      {result.top1:.2%}")
    if len(images) > 5:
        lines.append(f"top-5      {result.top5:.2%}")

    width = min(30, max(5, *(len(printable(label)) for label in result.labels)))
    longest_bar = 80 - width - 18
    rows = []
    for i in sorted(range(len(images)), key=lambda i: -accuracy[i] if images[i] else 1):
        percent = f"{accuracy[i]:7.1%}" if images[i] else "      -"
        bar = "█" * round(accuracy[i] * longest_bar) if images[i] else ""
        label = shorten(result.labels[i], width)
        rows.append(f"{label:<{width}} {images[i]:8,} {percent} {bar}".rstrip())
    if len(rows) > most:
        hidden = f"... {len(rows) - most:,} classes between these (--json has all)"
        rows[most // 2 : -most // 2] = [hidden]
    lines += ["", f"{'class':<{width}} {'images':>8} {'top-1':>7}", *rows]

    mistakes = result.mistakes()[:10]
    if mistakes:
        lines += ["", f"{'most frequent confusions':<54}{'images':>8}{'of class':>10}"]
    for true, predicted, count in mistakes:
        pair = f"{shorten(result.labels[true], 25)} → {shorten(result.labels[predicted], 25)}"
        lines.append(f"{pair:<54}{count:8,}{count / images[true]:10.1%}")
    return "\n".join(lines)


def explain(args: argparse.Namespace) -> int:
    """`miniclip explain`: where texts are seen in an image."""
    from miniclip.checkpoint import load
    from miniclip.files.pictures import open_image
    from miniclip.lens.heat import METHODS, seen, text_maps

    if args.score:
        return explanation_score(args)
    if not args.texts or args.plot or args.scenes:
        raise ValueError(
            "expected an image and a text, and for these --out; or --score shapes, and for this "
            "--scenes and --plot"
        )
    out = args.out or (None if args.json else "miniclip-explain.png")
    if out:
        check_figure(out)
    image = open_image(args.image)
    loaded = load(args.model, device=args.device, reference=args.reference, revision=args.revision)
    methods = METHODS if args.all else args.method or ["relevance"]
    maps = {
        method: text_maps(image, args.texts, loaded, method)
        for method in progress(list(methods), "method")
    }
    if args.json:
        found = [
            {"image": args.image, "text": text, "method": method, "map": heat.tolist()}
            for method, heats in maps.items()
            for text, heat in zip(args.texts, heats, strict=True)
        ]
        print_json(found if len(found) > 1 else found[0])
    if out:
        from miniclip.figures.explanations import draw_text_maps

        scale = -(-512 // loaded.transform.crop_size)
        draw_text_maps(seen(image, loaded.transform, scale), args.texts, maps, out)
        print(f"picture: {out}", file=sys.stderr)
    return 0


def explanation_score(args: argparse.Namespace) -> int:
    """`miniclip explain --score`: how often each method is right, on drawn scenes."""
    from miniclip.checkpoint import load
    from miniclip.lens.heat import METHODS
    from miniclip.world.localise import answers, localise, questions

    scenes = 200 if args.scenes is None else args.scenes
    if args.image or args.out or args.all or args.method or scenes < 1:
        raise ValueError(
            "--score draws its own scenes, one or more, for every method: no IMAGE, TEXT, --method "
            "or --out"
        )
    loaded = load(args.model, device=args.device, reference=args.reference, revision=args.revision)
    found = localise(loaded, scenes)
    if args.json:
        rows = {weights: [row._asdict() for row in rows] for weights, rows in found.items()}
        print_json({"model": args.model, "scenes": scenes} | rows)
    else:
        print(f"model   {args.model}\nscenes  {scenes} of two objects, two questions each\n")
        print(explanation_table(found))
    if args.plot:
        from miniclip.figures.explanations import draw_explanations

        asked = questions(3)
        draw_explanations(
            asked, {method: answers(loaded, asked, method) for method in METHODS}, args.plot
        )
        print(f"picture: {args.plot}", file=sys.stderr)
    return 0


def explanation_table(found: dict[str, list[Any]]) -> str:
    """A line for each method, trained and random weights side by side; 80 columns wide."""
    from miniclip.world.localise import RANDOM

    def shares(row: Any) -> str:
        return "".join(f"{share:>10.1%}" for share in row[1:])

    lines = [
        f"{'':<17}{'trained weights':>30}{'random weights':>30}",
        f"{'method':<17}{'named':>10}{'other':>10}{'IoU':>10}{'named':>10}{'other':>10}{'IoU':>10}",
    ]
    pairs = zip(found["trained"], found["random"], strict=True)
    lines += [f"{a.method:<17}{shares(a)}{shares(b)}" for a, b in pairs]
    lines += ["", *(f"{row.method:<17}{shares(row)}" for row in found["limits"])]
    spread = max(share for row in found["spread"] for share in row[1:])
    lines += [
        "",
        f"random weights: the mean of {RANDOM} draws, of standard deviation {spread:.1%} at most.",
        "named, other: the warmest pixel is on the object that the text names, on the",
        "other. IoU: of the object with as many of the warmest pixels. attention and",
        "rollout do not read the text.",
    ]
    return "\n".join(lines)


def embed(args: argparse.Namespace) -> int:
    """`miniclip embed`: an index of the embeddings of pictures."""
    import torch

    from miniclip.checkpoint import load
    from miniclip.retrieval.building import build_index, throughput
    from miniclip.retrieval.index import describe, lasting_name
    from miniclip.retrieval.pictures import find_pictures
    from miniclip.training import process_group

    if bool(args.out) == args.time:
        raise ValueError("expected one of --out, the index to write, and --time")
    keep_freed_memory()
    pictures, damage = find_pictures(args.paths)
    with process_group(args.device) as device:
        loaded = load(
            args.model,
            device=device,
            dtype=getattr(torch, args.dtype),
            reference=args.reference,
            revision=args.revision,
        )
        if args.time:
            return embedding_speed(
                throughput(loaded, pictures, args.batch, args.workers), args.json
            )
        encoder = describe(loaded, *lasting_name(args.model, args.revision))
        index = build_index(args.out, loaded, pictures, encoder, damage, args.batch, args.workers)
    if os.environ.get("RANK", "0") != "0":
        return 0  # of several processes, the first one speaks
    if index.skipped:
        print(
            f"miniclip: skipped {len(index.skipped):,}, which the index lists; the first: "
            f"{printable(index.skipped[0])}",
            file=sys.stderr,
        )
    if args.json:
        print_json(
            {
                "index": args.out,
                "images": len(index),
                "width": index.embeddings.shape[1],
                "skipped": list(index.skipped),
            }
            | {
                name: getattr(encoder, name)
                for name in ("model", "revision", "fingerprint", "dtype")
            }
        )
    else:
        print(f"{args.out}: {len(index):,} images, by {encoder}")
    return 0


def embedding_speed(found: "Throughput", as_json: bool) -> int:
    """`miniclip embed --time`: print images per second, of each part and together."""
    if as_json:
        print_json(found._asdict())
        return 0
    print(f"{'decoding alone':<16}{found.decoding:10,.1f} images/s")
    print(f"{'encoder alone':<16}{found.encoding:10,.1f} images/s")
    share = found.together / min(found.decoding, found.encoding)
    print(f"{'together':<16}{found.together:10,.1f} images/s, {share:.0%} of the slower")
    return 0


def search(args: argparse.Namespace) -> int:
    """`miniclip search`: the pictures of an index that are most like a query."""
    from time import perf_counter

    from miniclip.retrieval.index import Index, embed_query
    from miniclip.retrieval.sheet import SHEETS, draw_sheet

    if args.sheet:
        check_writable(args.sheet, SHEETS)
    index = Index.load(args.index)
    loaded = index.load_encoder(args.model, args.device)
    query = embed_query(loaded, args.texts, args.image, args.minus, args.minus_image)
    start = perf_counter()
    hits = index.search(query, args.k)
    seconds = perf_counter() - start
    if args.json:
        print_json([hit._asdict() for hit in hits])
    else:
        for i, hit in enumerate(hits, 1):
            print(f"{i:>4} {hit.score:7.4f}  {printable(hit.path)}")
    if args.sheet:
        plus = " + ".join([*args.texts, *args.image])
        title = " - ".join([plus, *args.minus, *args.minus_image]).strip()
        for reason in draw_sheet(index, hits, title, args.sheet):
            print(f"miniclip: not on the sheet: {printable(reason)}", file=sys.stderr)
        print(f"picture: {args.sheet}", file=sys.stderr)
    print(f"{len(index):,} pictures searched in {seconds:.2f} s", file=sys.stderr)
    return 0


def serve(args: argparse.Namespace) -> int:
    """`miniclip serve`: the page to try it on."""
    from miniclip.checkpoint import load
    from miniclip.page.serve import create_app, listen, open_index, run

    with listen(args.port) as socket:  # first, because a port that is taken should show at once
        models = {name: load(name, device=args.device) for name in progress(args.model, "model")}
        find = open_index(args.index, args.device) if args.index else None
        app = create_app(models, find)
        url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        print(json.dumps({"url": url}) if args.json else f"{url}  (Ctrl-C ends it)", flush=True)
        run(app, socket)
    return 0


def demo(args: argparse.Namespace) -> int:
    """`miniclip demo`: draw what the embedded checkpoints can do."""
    from miniclip.figures.exhibits import photograph_exhibits, scene_exhibit

    missing = None
    try:
        from miniclip.figures.demo import draw_demo

        photographs = photograph_exhibits()
    except ValueError as error:  # the demo extra is not installed; a scene needs none of it
        photographs, missing = [], error
    else:
        check_figure(args.out)
    scene, heats = scene_exhibit()
    exhibits = [scene, *photographs]
    if args.json:
        print_json(
            [
                {"image": name, "labels": [score._asdict() for score in scores]}
                for name, _, scores in exhibits
            ]
        )
    else:
        for name, _, scores in exhibits:
            print(ranking_table(name, scores[:4]), end="\n\n")
    if missing:
        print(f"no picture was drawn: {missing}", file=sys.stderr)
    else:
        draw_demo(scene, heats, photographs, args.out)
        print(f"picture: {args.out}", file=sys.stderr)
    return 0


def info(args: argparse.Namespace) -> int:
    """`miniclip info`: the parts of a model, their parameters and multiply-adds."""
    from miniclip.config import CLIPConfig
    from miniclip.parts import parts

    config = CLIPConfig.from_pretrained(args.model, revision=args.revision)
    rows = parts(config)
    if args.json:
        print_json({"config": config.to_dict(), "parts": [row._asdict() for row in rows]})
        return 0
    print(f"{args.model}: {config.embed_dim}-dimensional embeddings\n")
    for tower in (config.vision, config.text):
        fields = vars(tower).items()
        print_wrapped(f"{type(tower).__name__}: ", [f"{name} {value}" for name, value in fields])
    print(f"\n{'part':<24}{'weights':<26}{'parameters':>13}{'multiply-adds':>17}")
    for row in rows:
        print(f"{row.name:<24}{row.weights:<26}{row.parameters:>13,}{row.multiply_adds:>17,}")
    for name in ("vision", "text", ""):
        chosen = [row for row in rows if row.name.startswith(name)]
        parameters = sum(row.parameters for row in chosen)
        multiply_adds = sum(row.multiply_adds for row in chosen)
        print(f"{name or 'both towers':<50}{parameters:>13,}{multiply_adds:>17,}")
    print("\nMultiply-adds are for one image, and for one text as long as the context.")
    return 0


def tokenize(args: argparse.Namespace) -> int:
    """`miniclip tokenize`: every stage from a text to its ids."""
    from miniclip.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(
        args.model, reference=args.reference, revision=args.revision
    )
    stages = tokenizer.explain(args.text)
    if args.json:
        print_json(stages._asdict() | {"words": [word._asdict() for word in stages.words]})
    else:
        print(stages)
    return 0


def parity(args: argparse.Namespace) -> int:
    """`miniclip parity`: two models compared site by site; 1 if they differ."""
    import torch

    from miniclip import parity

    if args.random and args.against != "transformers":
        raise ValueError("--random draws weights for miniclip and transformers: no --against")
    name = args.model or DEFAULT_MODEL
    pair = (
        parity.random_pair(args.random)
        if args.random
        else parity.load_pair(name, args.against, revision=args.revision)
    )
    report = parity.compare(*pair, dtype=getattr(torch, args.dtype), device=args.device)
    about = {
        "model": args.random or name,
        "other": args.against,
        "dtype": args.dtype,
        "environment": parity.measured_with(args.device),
    }
    if args.json:
        print_json(
            about | {"first": report.first, "cause": report.cause, "rows": rows_dict(report)}
        )
    else:
        print(parity_table(about, report))
    if args.plot:
        from miniclip.parity.drawing import draw_parity

        draw_parity(report, args.plot)
        print(f"picture: {args.plot}", file=sys.stderr)
    return int(report.first is not None)


def rows_dict(report: "Report") -> list[dict[str, Any]]:
    """JSON has no infinity, which is how far apart two tensors of different shape are, and no NaN,
    which is what that is relative to numbers that are not finite."""
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row._asdict().items()
        }
        for row in report.rows
    ]


def parity_table(about: dict[str, str], report: "Report") -> str:
    """A line for each kind of site; 80 columns wide."""
    import textwrap

    from miniclip.parity import nearer, summarize

    model, other = shorten(about["model"], 50), shorten(about["other"], 50)
    lines = [
        f"model  {model}\nother  {other}\n",
        f"{'':<29}{'largest difference':^20}{'in':>10}{'error in ' + about['dtype']:>21}",
        f"{'site':<29}{'absolute':>10}{'relative':>10}{'float64':>10}{'model':>10}{'other':>11}",
    ]
    for row in summarize(report.rows):
        numbers = "".join(f"{number:>10.1e}" for number in row[1:-2])
        lines.append(f"{row.site:<29}{numbers}{row.other_error:>11.1e}")
    counts = ", ".join(f"{name} at {count}" for name, count in nearer(report.rows).items())
    verdict = [textwrap.fill(line, 80) for line in str(report).splitlines()]
    return "\n".join([*lines, f"\nnearer to float64: {counts}", about["environment"], *verdict])


def bench(args: argparse.Namespace) -> int:
    """`miniclip bench`: miniclip and its peers, timed."""
    import torch

    from miniclip.bench import SUITES, bench, environment, table

    rows = bench(
        args.suite or tuple(SUITES),
        shape=args.shape,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        compile=args.compile,
        batch=args.batch,
    )
    measured_with = environment(args.device)
    if args.json:
        print_json({"environment": measured_with, "rows": [row._asdict() for row in rows]})
    else:
        print(table(rows), end="\n\n")
        print_wrapped("", [f"{name} {value}" for name, value in measured_with.items()])
    if args.plot:
        from miniclip.bench.drawing import draw_bench

        draw_bench(rows, args.plot)
        print(f"picture: {args.plot}", file=sys.stderr)
    return 0


def convert(args: argparse.Namespace) -> int:
    """`miniclip convert`: a checkpoint in another layout."""
    from miniclip.convert import convert

    done = convert(
        args.source,
        args.destination,
        args.layout,
        tokenizer=args.tokenizer,
        revision=args.revision,
    )
    if args.json:
        rows = [
            {
                "source": row.source._asdict(),
                "name": row.name,
                "destination": row.destination._asdict(),
                "shape": row.shape,
                "dtype": str(row.dtype).removeprefix("torch."),
            }
            for row in done.parameters
        ]
        print_json(done._asdict() | {"parameters": rows})
        return 0
    read = {row.source.key for row in done.parameters}
    written = {row.destination.key for row in done.parameters}
    print(f"{args.source} ({done.layout}): {len(read):,} tensors")
    print(f"{args.destination} ({args.layout}): {len(written):,} tensors\n")
    print(f"{len(done.parameters):>9,} parameters, with the same bits")
    for change, count in Counter(map(conversion, done.parameters)).items():
        print(f"{count:>9,} {change}")
    for name, there in (("tokenizer", done.tokenizer), ("transform", done.transform)):
        print(f"{name:>9} {'written' if there else 'not found beside the weights'}")
    if not done.tokenizer:
        print(
            "\n`miniclip.load` needs a tokenizer. Convert to a new directory with --tokenizer"
            "\nopenai/clip-vit-base-patch32, whose vocabulary most CLIPs have; or put its"
            f"\nvocab.json and merges.txt into {args.destination}"
        )
    return 0


def conversion(row: "Mapped") -> str:
    """What has been done to a parameter on its way from one file to the other."""
    before, after = row.source.form, row.destination.form
    if before == after:
        return "as they were"
    if "T" in (before, after):
        return "transposed"
    return "of q, k and v, taken apart" if before else "of q, k and v, put under one another"


# ------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the tensors to come.

    It would give large blocks back to Linux, which clears each page again for the next one: an
    eighth of the time that B/32 takes for 64 pictures. What is kept may be a quarter more.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        trim_threshold, mmap_max = -1, -4  # as malloc.h numbers them
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)


def progress(items: Sequence[Any], unit: str) -> Iterator[Any]:
    """The items, with a progress bar once they have taken two seconds and someone watches."""
    from tqdm import tqdm

    return tqdm(items, unit=unit, delay=2, disable=None, leave=False)


def read_lines(path: str) -> list[str]:
    """The lines of a text file. Raises ValueError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected lines of text: {error}") from None


def check_figure(path: str) -> None:
    """`check_writable`, for what matplotlib draws; raises ValueError too where that is missing."""
    from miniclip.figures.style import KINDS

    check_writable(path, KINDS)


def check_writable(name: str, suffixes: Iterable[str]) -> None:
    """Before the work, which may take hours: raises ValueError where a picture of that name could
    not be written after it."""
    path = Path(name)
    if path.suffix.lower() not in suffixes:
        known = ", ".join(suffixes)
        raise ValueError(f"{path}: cannot be written: expected a name that ends in {known}")
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None
    if not existed:
        path.unlink()


def printable(text: str) -> str:
    """The text with whatever could move the cursor, colour a terminal or be no Unicode escaped.

    >>> print(printable("café" + chr(10) + chr(27)))
    café\\n\\x1b
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_json(value: Any) -> None:
    """Print a value as JSON that people can read too."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # A file name that is no Unicode has surrogates, which are written as JSON writes them.
    print(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def print_wrapped(head: str, words: list[str]) -> None:
    """Print words with commas between, in lines of at most 80 columns."""
    import textwrap

    print(textwrap.fill(", ".join(words), 80, initial_indent=head, subsequent_indent="  "))


def shorten(text: str, width: int) -> str:
    """The text as `printable` has it, cut to `width` characters if it is longer."""
    text = printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"
