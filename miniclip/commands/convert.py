"""`miniclip convert`: write a checkpoint in another layout."""

import argparse
from collections import Counter
from typing import TYPE_CHECKING

from miniclip.commands.shared import add_revision, print_json

if TYPE_CHECKING:
    from miniclip.convert import Mapped

DESCRIPTION = "Write a checkpoint in the layout of transformers, OpenAI or open_clip."
LAYOUTS = ("transformers", "openai", "open_clip")
EXAMPLE = "miniclip convert shapes --out copy --layout open_clip"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("source", help="a checkpoint in any of the three layouts")
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="a new directory")
    parser.add_argument("--layout", choices=LAYOUTS, required=True, help="the layout to write")
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="take the tokenizer from this checkpoint. OpenAI's own files have no tokenizer; for "
        "them, give openai/clip-vit-base-patch32",
    )
    add_revision(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, and print a summary."""
    from miniclip.convert import convert

    done = convert(
        args.source,
        args.out,
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
    print(f"{args.out} ({args.layout}): {len(written):,} tensors\n")
    print(f"{len(done.parameters):>9,} parameters, with the same bits")
    for change, count in Counter(map(name_change, done.parameters)).items():
        print(f"{count:>9,} {change}")
    for name, there in (("tokenizer", done.tokenizer), ("transform", done.transform)):
        print(f"{name:>9} {'written' if there else 'not found beside the weights'}")
    if not done.tokenizer:
        print(
            "\n`miniclip.load` needs a tokenizer. Most CLIPs use OpenAI's. Convert again, to a new"
            "\ndirectory, with --tokenizer openai/clip-vit-base-patch32, or copy vocab.json and"
            f"\nmerges.txt from openai/clip-vit-base-patch32 into {args.out}"
        )
    return 0


def name_change(row: "Mapped") -> str:
    """Say how a parameter changed between source and destination."""
    before, after = row.source.form, row.destination.form
    if before == after:
        return "unchanged"
    if "T" in (before, after):
        return "transposed"
    return "split into q, k and v" if before else "q, k and v joined into one"
