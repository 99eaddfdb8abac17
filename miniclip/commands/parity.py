"""`miniclip parity`: two models compared site by site."""

import argparse
import math
import textwrap
from typing import TYPE_CHECKING, Any

from miniclip.commands.shared import (
    COLUMNS,
    DEFAULT_MODEL,
    MODELS,
    add_device,
    add_revision,
    note,
    print_json,
)
from miniclip.terminal import shorten

if TYPE_CHECKING:
    from miniclip.parity import Report

DESCRIPTION = "How far the numbers are from transformers', or another model's, tensor by tensor."
EXAMPLE = """miniclip parity everyday --plot depth.png
with a fork's checkpoint, and with a fork's code:
  miniclip parity runs/fork --against everyday
  miniclip parity fork.py:build --against everyday --grad"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"{MODELS}; or a Python file and the name in it of a model, or of a function that "
        "returns one (fork.py:build; default name: model)",
    )
    which.add_argument(
        "--random",
        metavar="SHAPE",
        help="weights drawn at random, in a shape of miniclip.published: B/32, L/14-336, H/14, ...",
    )
    parser.add_argument(
        "--against",
        default="transformers",
        metavar="OTHER",
        help="transformers, which loads the same files, or the original's checkpoint "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--names",
        metavar="JSON",
        help="if the modules of fork.py have names of their own: a table from our names to its "
        "names, as in miniclip/files/names.py",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float64", "bfloat16", "float16"),
        help="compared in addition to float64 (default: %(default)s)",
    )
    parser.add_argument(
        "--grad",
        action="store_true",
        help="compare each parameter's gradient of the contrastive loss too, in float64",
    )
    add_device(parser)
    parser.add_argument("--plot", metavar="PNG", help="draw the differences against depth")
    add_revision(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, and return 1 if the models differ."""
    import torch

    from miniclip import parity

    if args.random and (args.names or args.against != "transformers"):
        raise ValueError(
            "--random draws weights for miniclip and transformers: no --against and no --names"
        )
    name = args.model or DEFAULT_MODEL
    pair = (
        parity.random_pair(args.random)
        if args.random
        else parity.load_pair(name, args.against, args.names, revision=args.revision)
    )
    report = parity.compare(
        *pair,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        gradients=args.grad,
    )
    about = {
        "model": args.random or name,
        "other": args.against,
        "dtype": args.dtype,
        "environment": parity.measured_with(args.device),
    }
    if args.json:
        found = {"first": report.first, "cause": report.cause, "rows": rows_dict(report)}
        print_json(about | found)
    else:
        print(parity_table(about, report))
    if args.plot:
        from miniclip.parity.drawing import draw_parity

        draw_parity(report, args.plot)
        note(f"picture: {args.plot}")
    return int(report.first is not None)


def rows_dict(report: "Report") -> list[dict[str, Any]]:
    """The rows for JSON, which has neither infinity nor NaN: they become null.

    A difference is infinite if two tensors differ in shape. A relative difference is NaN if the
    numbers are not finite.
    """
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row._asdict().items()
        }
        for row in report.rows
    ]


def parity_table(about: dict[str, str], report: "Report") -> str:
    """A line for each kind of site."""
    from miniclip.parity import nearer, summarize

    model, other = shorten(about["model"], 50), shorten(about["other"], 50)
    lines = [
        f"model  {model}\nother  {other}\n",
        f"{'':<29}{'largest difference':^20}{'in':>10}{'error in ' + about['dtype']:>21}",
        f"{'site':<29}{'absolute':>10}{'relative':>10}{'float64':>10}{'model':>10}{'other':>11}",
    ]
    gradients = [row for row in report.rows if row.site.startswith("gradient.")]
    sites = report.rows[: len(report.rows) - len(gradients)]
    for row in summarize(sites):
        numbers = "".join(f"{number:>10.1e}" for number in row[1:-2])
        lines.append(f"{row.site:<29}{numbers}{row.other_error:>11.1e}")
    if gradients:
        worst = max(row.float64 for row in gradients)
        lines.append(f"\ngradients of {len(gradients)} parameters, in float64: {worst:.1e} at most")
    counts = ", ".join(f"{name} at {count}" for name, count in nearer(sites).items())
    verdict = [textwrap.fill(line, COLUMNS) for line in str(report).splitlines()]
    return "\n".join([*lines, f"\nnearer to float64: {counts}", about["environment"], *verdict])
