"""`miniclip explain`: show where in an image a model sees what texts describe."""

import argparse
from typing import Any

from miniclip.commands.shared import (
    PICTURES,
    add_device,
    add_model,
    check_figure,
    load_model,
    note,
    print_json,
    read_input,
)
from miniclip.terminal import printable, progress

DESCRIPTION = (
    "Draw where the model sees what a text describes, or score the methods on drawn scenes."
)
EXAMPLE = f"""{PICTURES}
  miniclip explain pictures/coffee.png "a cup of coffee" --all -o where.png --model everyday
  miniclip explain --score shapes --model shapes -o methods.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="an image file")
    add("texts", nargs="*", metavar="TEXT", help="a text to look for")
    which = parser.add_mutually_exclusive_group()
    method = (
        "attention, rollout, relevance, gradcam, tokens or occlusion; repeat the option to see "
        "several methods side by side (default: relevance)"
    )
    which.add_argument("--method", action="append", metavar="NAME", help=method)
    which.add_argument("--all", action="store_true", help="show all methods side by side")
    out = "the drawing to write (default: miniclip-explain.png; --score draws only with -o)"
    add("-o", "--out", metavar="PNG", help=out)
    score = (
        "instead of IMAGE and TEXT: draw scenes of two objects, and measure how often each method "
        "finds the object that a text names"
    )
    add("--score", choices=("shapes",), help=score)
    scenes = "how many scenes --score draws (default: 200)"
    add("--scenes", type=int, metavar="N", help=scenes)
    add_device(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Draw a map for each text and method."""
    if args.score:
        return score_methods(args)
    if not args.texts or args.scenes:
        raise ValueError("expected an image and a text, or --score shapes (--scenes needs --score)")
    out = args.out or (None if args.json else "miniclip-explain.png")
    if out:
        check_figure(out)
    from miniclip.files.pictures import open_image
    from miniclip.lens.heat import METHODS, cosines, seen, text_maps

    image = open_image(read_input(args.image))
    loaded = load_model(args)
    methods = METHODS if args.all else args.method or ["relevance"]
    maps = {
        method: text_maps(image, args.texts, loaded, method)
        for method in progress(list(methods), "method")
    }
    similar = cosines(image, args.texts, loaded).tolist()
    if args.json:
        found = [
            {"image": args.image, "text": text, "cosine": cosine, "method": method}
            | {"map": heat.tolist()}
            for method, heats in maps.items()
            for text, cosine, heat in zip(args.texts, similar, heats, strict=True)
        ]
        print_json(found if len(found) > 1 else found[0])
    else:
        print("cosine  text")
        for text, cosine in zip(args.texts, similar, strict=True):
            print(f"{cosine:6.3f}  {printable(text)}")
    if out:
        from miniclip.figures.explanations import draw_text_maps

        scale = -(-512 // loaded.transform.crop_size)
        picture = seen(image, loaded.transform, scale)
        draw_text_maps(picture, args.texts, similar, maps, out)
        note(f"picture: {out}")
    return 0


def score_methods(args: argparse.Namespace) -> int:
    """Measure how often each method finds the named object in drawn scenes."""
    scenes = 200 if args.scenes is None else args.scenes
    if args.image or args.all or args.method or scenes < 1:
        raise ValueError(
            "--score draws its own scenes and runs every method: expected --scenes of at least 1, "
            "and no IMAGE, TEXT, --all or --method"
        )
    if args.out:
        check_figure(args.out)
    from miniclip.lens.heat import METHODS
    from miniclip.world.localise import answers, localise, questions

    loaded = load_model(args)
    found = localise(loaded, scenes)
    if args.json:
        rows = {weights: [row._asdict() for row in rows] for weights, rows in found.items()}
        print_json({"model": args.model, "scenes": scenes} | rows)
    else:
        print(f"model   {args.model}\nscenes  {scenes} of two objects, two questions each\n")
        print(method_table(found))
    if args.out:
        from miniclip.figures.explanations import draw_explanations

        asked = questions(3)
        maps = {method: answers(loaded, asked, method) for method in METHODS}
        draw_explanations(asked, maps, args.out)
        note(f"picture: {args.out}")
    return 0


def method_table(found: dict[str, list[Any]]) -> str:
    """Return a table with a line for each method, for trained and for random weights."""
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
        f"random weights: the mean of {RANDOM} models; standard deviation at most {spread:.1%}.",
        "named: how often the warmest pixel is on the object that the text names.",
        "other: how often the warmest pixel is on the other object.",
        "IoU: the overlap of the named object's N pixels with the N warmest pixels.",
        "The methods attention and rollout ignore the text.",
    ]
    return "\n".join(lines)
