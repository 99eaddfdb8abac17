"""`miniclip tokenize`: show how a text becomes token ids."""

import argparse

from miniclip.commands.shared import add_model, print_json

DESCRIPTION = "Show how a text becomes token ids, stage by stage."
EXAMPLE = 'miniclip tokenize "a photo of a cat" --model everyday'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("text", metavar="TEXT", help="any text, in quotes")
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Print the stages."""
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
