"""`miniclip train`: train a CLIP and write its checkpoint."""

import argparse
import json
import os
from dataclasses import fields
from pathlib import Path

from miniclip.commands.shared import add_columns, add_device, keep_freed_memory, note, print_json
from miniclip.training.recipe import Recipe

DESCRIPTION = "Train a CLIP on images and captions, from scratch or from a checkpoint."
EXAMPLE = """miniclip train shapes --out runs/shapes
with data of your own:
  miniclip train photographs --out runs/mine"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments, and a flag for each field of a recipe."""
    parser.add_argument(
        "data",
        help="one of: a folder with one folder of images for each class; a folder of images with a "
        ".txt beside each, or with metadata.jsonl, .csv or .tsv (file_name, text); a folder of "
        "WebDataset .tar shards; 'pipe:COMMAND'; an address such as "
        "hf://datasets/OWNER/NAME/{00..99}.tar; `shapes`, the drawn world",
    )
    add_columns(parser)
    parser.add_argument(
        "-o", "--out", required=True, metavar="DIR", help="the folder for the checkpoint"
    )
    parser.add_argument("--model", help="the checkpoint to fine-tune (default: random weights)")
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="use this checkpoint's recipe.json; without --model and --config, also use its shape",
    )
    parser.add_argument(
        "--config", metavar="JSON", help="a config.json with the shape of the random weights"
    )
    add_device(parser)
    parser.add_argument(
        "--val",
        metavar="DATA",
        help="held-out data: class folders for zero-shot accuracy, or images with captions for "
        "retrieval; DIR/best keeps the best checkpoint",
    )
    log = "also write TensorBoard's logs to DIR"
    parser.add_argument("--log", choices=("tensorboard",), default="", help=log)
    parser.add_argument("--plot", metavar="PNG", help="draw a report of the run")
    numbers = parser.add_argument_group(
        "recipe", "the settings of a run, which override the settings of --recipe"
    )
    for entry in fields(Recipe):
        kind, meaning = type(entry.default), f"{entry.metadata['help']} (default: {entry.default})"
        flag = f"--{entry.name.replace('_', '-')}"
        if kind is bool:
            numbers.add_argument(flag, action=argparse.BooleanOptionalAction, help=meaning)
        else:
            numbers.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=meaning)


def run(args: argparse.Namespace) -> int:
    """Train. Under torchrun only the first process prints."""
    from miniclip.training import process_group, set_up, train

    keep_freed_memory()
    asked = {entry.name: getattr(args, entry.name) for entry in fields(Recipe)}
    overrides = {name: value for name, value in asked.items() if value is not None}
    with process_group(args.device) as device:
        columns = (args.image_column, args.text_column)
        setup = set_up(args.data, args.model, args.recipe, args.config, overrides, device, columns)
        validate = None
        if args.val:
            from miniclip.evaluation.checkpoints import scorer

            validate = scorer(args.val, columns)
        train(*setup, args.out, validate=validate, log=args.log)
    if os.environ.get("RANK", "0") != "0":
        return 0
    lines = (Path(args.out) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if args.plot:
        from miniclip.figures.curves import draw_curves

        draw_curves(rows, args.plot)
        note(f"picture: {args.plot}")
    if args.json:
        print_json(rows)
    else:
        print(f"{args.out}: {rows[-1]['step']:,} steps, loss {rows[-1]['loss']:.3f}")
        for name in [name for name in rows[-1] if name.startswith("val_")][:1]:
            best = max((row for row in rows if name in row), key=lambda row: row[name])
            print(f"{args.out}/best: {name[4:]} {best[name]:.2%} at step {best['step']:,}")
    return 0
