"""`miniclip info`: show the parts of a model, their parameters and multiply-adds."""

import argparse

from miniclip.commands.shared import DEFAULT_MODEL, MODELS, add_revision, print_json, print_wrapped

DESCRIPTION = "Show a model's architecture, parameters and multiply-adds, from its config alone."
EXAMPLE = "miniclip info everyday"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=MODELS)
    add_revision(parser)


def run(args: argparse.Namespace) -> int:
    """Print the config, and a line for each part."""
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
    print("\nMultiply-adds are for one image, and for one text of context_length tokens.")
    return 0
