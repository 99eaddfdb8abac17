"""`miniclip demo`: draw what the embedded checkpoints can do."""

import argparse
from pathlib import Path

from miniclip.commands.classify import ranking_table
from miniclip.commands.shared import check_figure, note, print_json

DESCRIPTION = "Classify photographs and describe a drawn scene, offline, and draw the result."
EXAMPLE = "miniclip demo -o demo.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        *("-o", "--out"),
        default="miniclip-demo.png",
        metavar="PNG",
        help="the drawing to write (default: %(default)s)",
    )
    parser.add_argument(
        "--pictures", metavar="DIR", help="also write the images to DIR, for use by other commands"
    )


def run(args: argparse.Namespace) -> int:
    """Classify photographs and describe a scene. Without the `demo` extra, skip the photographs."""
    from miniclip.exhibits import photograph_exhibits, scene_exhibit

    missing = None
    try:
        from miniclip.figures.demo import draw_demo

        photographs = photograph_exhibits()
    except ValueError as error:  # the `demo` extra is not installed; the scene does not need it
        photographs, missing = [], error
    else:
        check_figure(args.out)
    scene, heats = scene_exhibit()
    exhibits = [*photographs, scene]
    if args.pictures:
        Path(args.pictures).mkdir(parents=True, exist_ok=True)
        for name, picture, _ in exhibits:
            picture.save(Path(args.pictures) / f"{name.split()[-1]}.png")
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
        note(f"nothing was drawn: {missing}")
    else:
        draw_demo(scene, heats, photographs, args.out)
        note(f"picture: {args.out}")
    return 0
