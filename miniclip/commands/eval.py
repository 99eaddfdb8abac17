"""`miniclip eval`: measure a model as the paper measures CLIP."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from miniclip.commands.shared import (
    COLUMNS,
    LABELS,
    TEMPLATES,
    add_columns,
    add_device,
    add_engine,
    add_model,
    keep_freed_memory,
    load_model,
    note,
    print_json,
    read_labels,
)
from miniclip.terminal import cell, columns, counted, printable, shorten

if TYPE_CHECKING:
    from miniclip.checkpoint import Loaded
    from miniclip.evaluation.classification import Evaluation
    from miniclip.evaluation.features import Features
    from miniclip.evaluation.linear import Examples
    from miniclip.zeroshot.data import LabelledImages

DESCRIPTION = "Measure a model as the paper measures CLIP: zero-shot, retrieval, probe, few shots."
EXAMPLE = """miniclip eval shapes --model shapes
with data of your own:
  miniclip eval imagenet/val --template imagenet --plot confusions.png
  miniclip eval dataset_flickr30k.json --task retrieval --images flickr30k-images
  miniclip eval cifar10/test --task probe --train cifar10/train --model everyday"""
MOST_CLASSES = 50  # a table lists at most this number of classes

# Flags that only some tasks have: the tasks, the flag, its help text, and argparse's options.
FLAGS: tuple[tuple[tuple[str, ...], str, str, dict[str, Any]], ...] = (
    (("zeroshot", "fewshot"), "template", TEMPLATES, {"action": "append", "metavar": "TEXT"}),
    (
        ("zeroshot", "fewshot"),
        "labels",
        f"names of the classes, in the order of the sorted folders: {LABELS} (default: the names "
        "of the folders; for ImageNet's folders, OpenAI's names)",
        {"nargs": "+", "metavar": "LABEL"},
    ),
    (("retrieval",), "images", "folder with the images that a .json lists (default: the folder of "
     "the .json)", {"metavar": "DIR"}),
    (("retrieval",), "split", "split of Karpathy's .json (default: test)", {"metavar": "NAME"}),
    (("probe", "fewshot"), "train", "class folders with the images to learn from",
     {"metavar": "DIR"}),
    (("probe", "fewshot"), "features", "the probe's features: ln_post is before the projection, "
     "as in the paper; proj is after it (default: ln_post)", {"choices": ("ln_post", "proj")}),
    (("probe",), "val", "class folders for choosing the L2 strength (default: a fifth of --train)",
     {"metavar": "DIR"}),
    (("fewshot",), "shots", "learn from N examples of each class (default: 1 2 4 8 16)",
     {"type": int, "nargs": "+", "metavar": "N"}),
    (("fewshot",), "seeds", "draw examples N times (default: 3)", {"type": int, "metavar": "N"}),
)  # fmt: skip
METHODS = {"zeroshot": "zero-shot", "probe": "linear probe", "text": "text-initialised"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help="a folder with one folder of images for each class; or `shapes`, for questions about "
        "the drawn world; or, for retrieval, a folder with metadata.jsonl, .csv or .tsv "
        "(file_name, text), WebDataset .tar shards, or a .json of COCO or Karpathy",
    )
    parser.add_argument(
        "--task", choices=TASKS, default="zeroshot", help="what to measure (default: %(default)s)"
    )
    groups: dict[tuple[str, ...], Any] = {}
    for tasks, flag, meaning, options in FLAGS:
        if tasks not in groups:
            groups[tasks] = parser.add_argument_group(f"for --task {' and '.join(tasks)}")
        groups[tasks].add_argument(f"--{flag}", help=meaning, **options)
    add_columns(parser)
    parser.add_argument(
        "--cache", metavar="DIR", help="keep the images' features in this folder, as index files"
    )
    parser.add_argument(
        "--batch", type=int, default=64, metavar="N", help="images per batch (default: %(default)s)"
    )
    add_device(parser)
    add_engine(parser)
    parser.add_argument("--plot", metavar="PNG", help="draw the result")
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the result."""
    keep_freed_memory()
    for tasks, flag, *_ in FLAGS:
        if getattr(args, flag) is not None and args.task not in tasks:
            raise ValueError(f"--{flag} is for {' and '.join(tasks)}, not for {args.task}")
    if args.data == "shapes":
        ask_about_shapes(args)
    else:
        TASKS[args.task](args)
    if args.plot:
        note(f"picture: {args.plot}")
    return 0


def zeroshot(args: argparse.Namespace) -> None:
    """Classify every image of DATA zero-shot."""
    from miniclip.evaluation.checkpoints import classify
    from miniclip.zeroshot.classifier import TEMPLATE, class_embeddings, find_templates

    templates = find_templates(args.template or [TEMPLATE])
    images = class_folders(args)
    loaded = load_once(args)
    text_embeds = class_embeddings(loaded.model, loaded.tokenizer, images.labels, templates)
    result = classify(loaded, images, features_of(args, loaded, images.paths), text_embeds)
    shown = shorten(" | ".join(args.template or templates), COLUMNS - 11)
    print_evaluation(args, images.folders, result, {"templates": templates}, {"templates": shown})


def retrieval(args: argparse.Namespace) -> None:
    """Find the image of each caption, and the captions of each image."""
    from miniclip.evaluation.captions import captioned_images
    from miniclip.evaluation.checkpoints import caption_ranks
    from miniclip.evaluation.retrieval import recall

    loaded, names = load_once(args), (args.image_column, args.text_column)
    data = captioned_images(args.data, args.images, args.split or "test", names)
    for reason in data.skipped:
        note(f"miniclip: skipped {reason}")
    features = features_of(args, loaded, data.pictures)
    captions = [data.captions[row] for row in features.rows]
    texts = [text for several in captions for text in several]
    longest = loaded.tokenizer.context_length - 2  # without the start and end tokens
    cut = sum(len(loaded.tokenizer.encode(text)) > longest for text in texts)
    ranks = caption_ranks(loaded, captions, features)
    found = {direction: recall(of) for direction, of in ranks.items()}
    if args.json:
        counts = {"images": len(captions), "texts": len(texts), "truncated": cut}
        skipped = {"skipped": data.skipped + features.skipped}
        print_json({"model": args.model} | found | counts | skipped)
    else:
        print(f"model      {args.model}")
        print(f"images     {len(captions):,}, with {len(texts):,} captions")
        if features.skipped:
            print(f"skipped    {len(features.skipped):,} unreadable images")
        if cut:
            print(f"truncated  {cut:,} captions, to {longest} tokens")
        print(f"\n{'':16}{'recall@1':>12}{'recall@5':>12}{'recall@10':>12}{'median rank':>14}")
        for direction, row in found.items():
            *shares, median = row.values()
            line = f"{direction.replace('_', ' '):16}" + "".join(f"{x:12.2%}" for x in shares)
            print(f"{line}{median:14,g}")
    if args.plot:
        from miniclip.figures.recall import draw_recall

        draw_recall(ranks, args.plot)


def probe(args: argparse.Namespace) -> None:
    """Learn a linear classifier from the features of --train, and classify DATA."""
    from miniclip.evaluation import linear
    from miniclip.evaluation.classification import evaluate

    kind = args.features or "ln_post"
    _, images, sets, skipped = examples_of_sets(args)
    test, *examples = (one[kind] for one in sets)
    fit = partial(linear.fit_probe, count=len(images.folders))
    classify, strength, accuracies = linear.probe(fit, *examples)
    result = evaluate(classify(test.features), test.classes.tolist(), images.labels, skipped)
    tried = [{"lambda": one, "accuracy": share} for one, share in accuracies.items()]
    about = {"features": kind, "lambda": strength, "validation": tried}
    shown = f"{strength:.3g}, with {max(accuracies.values()):.2%} on the validation split"
    print_evaluation(args, images.folders, result, about, {"features": kind, "lambda": shown})


def fewshot(args: argparse.Namespace) -> None:
    """Learn from a few examples of each class, and classify DATA."""
    from miniclip.evaluation import linear
    from miniclip.zeroshot.classifier import TEMPLATE, class_embeddings, find_templates

    templates = find_templates(args.template or [TEMPLATE])
    loaded, images, (tests, trains), _ = examples_of_sets(args)
    kind, shots = args.features or "ln_post", args.shots or [1, 2, 4, 8, 16]
    text_embeds = class_embeddings(loaded.model, loaded.tokenizer, images.labels, templates)

    def zeroshot(features: Any) -> Any:
        return loaded.model.score(features.to(text_embeds), text_embeds).T.detach().float().cpu()

    fit = partial(linear.fit_probe, count=len(images.folders))
    fit_text = partial(linear.fit_from_text, zeroshot=zeroshot)
    methods = {
        "probe": linear.Method(fit, trains[kind], tests[kind]),
        "text": linear.Method(fit_text, trains["proj"], tests["proj"]),
    }
    mean = linear.share_right(zeroshot, tests["proj"])
    rows: list[dict[str, Any]] = [{"shots": 0, "method": "zeroshot", "mean": mean, "std": 0.0}]
    rows += linear.few_shot(methods, shots, 3 if args.seeds is None else args.seeds)
    counts = trains[kind].classes.bincount(minlength=len(images.folders))
    short = [one for one, n in zip(images.folders, counts, strict=True) if n < max(shots)]
    if short:
        note(f"miniclip: classes with fewer than {max(shots)} examples: {', '.join(short)}")
    if args.json:
        print_json(rows)
    else:
        classes = counted(len(images.folders), "class folder")
        print(f"model      {args.model}")
        print(f"templates  {shorten(' | '.join(args.template or templates), COLUMNS - 11)}")
        print(f"images     {len(tests[kind].classes):,}, of {classes}\n")
        print(f"{'examples/class':<18}{'method':<20}{'accuracy':>10}   standard deviation")
        for row in rows:
            spread = f"± {row['std']:.2%}" if row["shots"] else ""
            name = METHODS[row["method"]]
            print(f"{row['shots']:<18}{name:<20}{row['mean']:>10.2%}   {spread}".rstrip())
    if args.plot:
        from miniclip.figures.few_shot import draw_few_shot

        draw_few_shot(rows, METHODS, args.plot)


def class_folders(args: argparse.Namespace, data: str | None = None) -> "LabelledImages":
    """Find the images and the class names in the folder `data`. The default folder is DATA."""
    from miniclip.zeroshot import data as found
    from miniclip.zeroshot.prompts import CLASS_SETS, published_labels

    root, labels = data or args.data, None
    if args.labels and len(args.labels) == 1 and args.labels[0] in CLASS_SETS:
        labels = published_labels(args.labels[0], found.class_folders(root))
    elif args.labels and data is None:
        labels = read_labels(args.labels)
    images = found.labelled_images(root, labels)
    found.check_classes(images, root, named=bool(args.labels))
    return images


class ByKind(dict[str, "Examples"]):
    """The examples of one set of images. The keys are "ln_post" and "proj"."""

    def __missing__(self, kind: str) -> "Examples":
        raise ValueError("this tower or engine does not give ln_post: use --features proj")


def examples_of_sets(
    args: argparse.Namespace,
) -> "tuple[Loaded, LabelledImages, list[ByKind], list[str]]":
    """Load the model, and the examples of DATA, --train and --val.

    Folders with the same name are one class. Returns the model, the images of DATA, the
    examples of each set, and a line for each unreadable image of DATA. In the returned
    images, `folders` and `labels` list the classes of all sets.
    """
    import torch

    from miniclip.evaluation.linear import Examples
    from miniclip.zeroshot.data import with_classes_of

    if args.train is None:
        raise ValueError(f"--task {args.task} needs folders to learn from: --train FOLDER")
    named = (None, args.train, *([args.val] if args.val else []))
    found = [class_folders(args, data) for data in named]
    images, loaded = with_classes_of(found[0], found), load_once(args)
    sets, skipped = [], []
    for one in found:
        features = features_of(args, loaded, one.paths)
        skipped.append(features.skipped)
        place = [images.folders.index(folder) for folder in one.folders]
        classes = torch.tensor([place[one.classes[row]] for row in features.rows])
        vectors = features.vectors.items()
        sets.append(ByKind({kind: Examples(rows, classes) for kind, rows in vectors}))
    test, *learnt = ({*one["proj"].classes.tolist()} for one in sets)
    if lacking := sorted(test.difference(*learnt)):
        folders = ", ".join(images.folders[i] for i in lacking)
        where = " and ".join(filter(None, named))
        note(
            f"miniclip: no examples of these classes are in {where}, so the probe never predicts "
            f"them: {folders}"
        )
    return loaded, images, sets, skipped[0]


def load_once(args: argparse.Namespace) -> "Loaded":
    """Load the model. Set `args.revision` to the model's commit, because a branch may move.

    Also sets `args.name`, the name under which --cache keeps the features.
    """
    from miniclip.retrieval.index import lasting_name

    args.name, args.revision = lasting_name(args.model, args.revision)
    return load_model(args)


def features_of(args: argparse.Namespace, loaded: "Loaded", pictures: Sequence[Any]) -> "Features":
    """Compute the features of images, and print a line for each unreadable image."""
    from miniclip.evaluation.features import picture_features
    from miniclip.files.tars import Member

    names = [one if isinstance(one, Member) else str(one) for one in pictures]
    name = args.name, args.revision
    features = picture_features(loaded, names, args.cache, name, args.batch)
    for reason in features.skipped:
        note(f"miniclip: skipped {reason}")
    return features


def print_evaluation(
    args: argparse.Namespace,
    folders: list[str],
    result: "Evaluation",
    about: dict[str, Any],
    shown: dict[str, str],
) -> None:
    """Print an evaluation, and draw it. `about` is added to JSON, and `shown` to the table."""
    from miniclip.evaluation.classification import summary

    if args.json:
        print_json({"model": args.model} | about | summary(result, folders))
    else:
        for key, value in ({"model": args.model} | shown).items():
            print(f"{key:<11}{value}")
        print(evaluation_table(folders, result))
    if args.plot:
        from miniclip.figures.confusion import draw_confusion

        draw_confusion(result, args.plot)


def ask_about_shapes(args: argparse.Namespace) -> None:
    """`miniclip eval shapes`: ask questions about drawn scenes."""
    from miniclip.world.scoring import score

    if args.template or args.labels or args.plot or args.task != "zeroshot":
        raise ValueError(
            "`eval shapes` asks fixed questions: expected no --task, --template, --labels or --plot"
        )
    scores = score(*load_model(args))
    if args.json:
        print_json({"model": args.model} | scores._asdict())
        return
    print(f"model  {args.model}, on scenes that no training set has\n")
    for question, share, chance in (
        ("colour-shape pairs seen in training: top-1 of 64", scores.seen, "1.6 %"),
        ("colour-shape pairs never seen in training: top-1 of 64", scores.unseen, "1.6 %"),
        ("true caption beats the caption with swapped places", scores.relations, "50 %"),
        ("    captions with left or right", scores.left_right, "50 %"),
        ("    captions with above or below", scores.above_below, "50 %"),
        ("true caption beats the caption with swapped colours", scores.binding, "50 %"),
    ):
        print(f"{question:<56}{share:>7.1%}  (chance {chance})")


def evaluation_table(folders: list[str], result: "Evaluation") -> str:
    """Return a table: accuracies, a line for each class, and the ten most frequent confusions.

    If there are more than MOST_CLASSES classes, only the best and the worst classes have a line.
    """
    from miniclip.evaluation.classification import summary

    found = summary(result, folders)
    images, accuracy = result.images.tolist(), result.class_accuracy.tolist()
    low, high = found["interval"]
    lines = [f"images     {sum(images):,}, in {counted(len(images), 'folder')}"]
    if result.skipped:
        lines.append(f"skipped    {len(result.skipped):,} unreadable files")
    if found["missing"]:
        head = f"empty      {counted(len(found['missing']), 'folder')}: "
        lines.append(head + shorten(", ".join(found["missing"]), COLUMNS - len(head)))
    lines.append(f"top-1      {result.accuracy:.2%}, 95 % interval {low:.2%} to {high:.2%}")
    if len(images) > 5:
        lines.append(f"top-5      {result.top5:.2%}")
    lines.append(f"per class  {result.mean_per_class:.2%}, the mean of the classes' top-1")
    lines.append(f"ECE        {result.calibration_error:.2%}, the expected calibration error")

    width = min(30, max(5, *(columns(printable(label)) for label in result.labels)))
    longest_bar = COLUMNS - width - 18
    rows = []
    for i in sorted(range(len(images)), key=lambda i: -accuracy[i] if images[i] else 1):
        percent = f"{accuracy[i]:7.1%}" if images[i] else "      -"
        bar = "█" * round(accuracy[i] * longest_bar) if images[i] else ""
        label = cell(result.labels[i], width)
        rows.append(f"{label} {images[i]:8,} {percent} {bar}".rstrip())
    if len(rows) > MOST_CLASSES:
        hidden = f"... {len(rows) - MOST_CLASSES:,} more classes (--json lists all)"
        rows[MOST_CLASSES // 2 : -MOST_CLASSES // 2] = [hidden]
    lines += ["", f"{'class':<{width}} {'images':>8} {'top-1':>7}", *rows]

    mistakes = result.mistakes()[:10]
    if mistakes:
        lines += ["", f"{'most frequent confusions':<54}{'images':>8}{'of class':>10}"]
    for true, predicted, count in mistakes:
        pair = f"{shorten(result.labels[true], 25)} → {shorten(result.labels[predicted], 25)}"
        lines.append(f"{cell(pair, 54)}{count:8,}{count / images[true]:10.1%}")
    return "\n".join(lines)


TASKS = {"zeroshot": zeroshot, "retrieval": retrieval, "probe": probe, "fewshot": fewshot}
