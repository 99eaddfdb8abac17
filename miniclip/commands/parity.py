"""`miniclip parity`: compare two models site by site."""

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

ENGINES = (
    *("compile", "onnxruntime", "openvino"),
    *("compile-bf16", "openvino-bf16", "onnxruntime-int8"),
)

DESCRIPTION = "Compare a model with transformers, or with another model, tensor by tensor."
EXAMPLE = """miniclip parity everyday --plot depth.png
with a fork's checkpoint, and with a fork's code:
  miniclip parity runs/fork --against everyday
  miniclip parity fork.py:build --against everyday --grad"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    code = "or fork.py:NAME, where NAME is a model in this file, or a function that returns a model"
    which.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODELS}; {code}")
    shapes = "use random weights of a published shape: B/32, L/14-336, H/14, ..."
    which.add_argument("--random", metavar="SHAPE", help=shapes)
    against = "compare with this checkpoint (default: the same weights, run by transformers)"
    add("--against", default="transformers", metavar="OTHER", help=against)
    names = "a table of the fork's own module names, in the form of miniclip/files/names.py"
    add("--names", metavar="JSON", help=names)
    dtypes = ("float32", "float64", "bfloat16", "float16")
    dtype = "compare in this dtype and in float64 (default: %(default)s)"
    add("--dtype", default="float32", choices=dtypes, help=dtype)
    grad = "also compare the gradients of the contrastive loss, in float64"
    add("--grad", action="store_true", help=grad)
    engine = f"compare an engine's embeddings and logits with the model's: {', '.join(ENGINES)}"
    add("--engine", choices=ENGINES, metavar="NAME", help=engine)
    add_device(parser)
    add("--plot", metavar="PNG", help="draw the differences against the depth in the model")
    add_revision(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, print the report, and return 1 if the models differ."""
    import torch

    from miniclip import parity

    if args.random and (args.names or args.against != "transformers"):
        raise ValueError(
            "--random compares miniclip with transformers: expected no --against and no --names"
        )
    if args.engine:
        return compare_engine(args)
    name = args.model or DEFAULT_MODEL
    pair = (
        parity.random_pair(args.random)
        if args.random
        else parity.load_pair(name, args.against, args.names, revision=args.revision)
    )
    dtype = getattr(torch, args.dtype)
    report = parity.compare(*pair, dtype=dtype, device=args.device, gradients=args.grad)
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


def compare_engine(args: argparse.Namespace) -> int:
    """Compare an engine with the model. Return 1 if a difference is above the tolerance."""
    from miniclip import CLIP, parity
    from miniclip.engines import differences

    other = args.against != "transformers" or args.dtype != "float32"
    if other or args.grad or args.plot or args.names:
        raise ValueError("with --engine, expected no --against, --dtype, --grad, --plot or --names")
    name = args.random or args.model or DEFAULT_MODEL
    options = {"device": args.device, "revision": args.revision}
    model = parity.random_pair(name)[0] if args.random else CLIP.from_pretrained(name, **options)
    rows = differences(model, args.engine, *parity.random_inputs(model.config))
    about = {"model": name, "engine": args.engine, "environment": parity.measured_with(args.device)}
    if args.json:
        print_json(about | {"rows": [row._asdict() for row in rows]})
    else:
        print(f"model   {shorten(name, 50)}\nengine  {args.engine}\n")
        print(f"{'':<20}{'largest difference':>20}{'tolerance':>12}")
        for row in rows:
            print(f"{row.what:<20}{row.difference:>20.1e}{row.tolerance:>12.1e}")
        print(f"\n{about['environment']}")
    return int(not all(row.difference <= row.tolerance for row in rows))


def rows_dict(report: "Report") -> list[dict[str, Any]]:
    """Return the rows for JSON. NaN and infinity become null, because JSON has neither."""

    def in_json(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{name: in_json(x) for name, x in row._asdict().items()} for row in report.rows]


def parity_table(about: dict[str, str], report: "Report") -> str:
    """Return a table with a line for each kind of site, and the verdict."""
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
        lines.append(
            f"\ngradients of {len(gradients)} parameters differ by at most {worst:.1e} in float64"
        )
    counts = ", ".join(f"{name} at {count}" for name, count in nearer(sites).items())
    verdict = [textwrap.fill(line, COLUMNS) for line in str(report).splitlines()]
    return "\n".join([*lines, f"\nnearer to float64: {counts}", about["environment"], *verdict])
