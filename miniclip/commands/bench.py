"""`miniclip bench`: time miniclip and other libraries that do the same work."""

import argparse
from typing import Any

from miniclip.commands.shared import (
    add_device,
    keep_freed_memory,
    note,
    print_json,
    print_wrapped,
)

DESCRIPTION = "Time the same work in miniclip and in other libraries, side by side."
EXAMPLE = "miniclip bench --suite vision text --batch 8 --plot bench.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "--suite",
        nargs="+",
        metavar="NAME",
        help="what to time: vision, text, tokenizer, transform, load, startup, zeroshot, train, "
        "memory, embed, search (default: all)",
    )
    parser.add_argument(
        "--shape",
        default="B/32",
        help="the shape of the random weights, from miniclip.published: B/32, L/14-336, H/14, ... "
        "(default: %(default)s)",
    )
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="the dtype of the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also time the compiled encoders of miniclip and of transformers",
    )
    parser.add_argument(
        "--engine",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also time miniclip's towers in these engines: compile, onnxruntime, openvino, "
        "compile-bf16, openvino-bf16, onnxruntime-int8",
    )
    batch = "images or texts in a batch (default: 16, or 256 on a GPU)"
    parser.add_argument("--batch", type=int, metavar="N", help=batch)
    parser.add_argument(
        "--growth",
        action="store_true",
        help="measure how time and memory grow with the size of the inputs, and run no suite",
    )
    parser.add_argument("--plot", metavar="PNG", help="draw the result to this file")


def run(args: argparse.Namespace) -> int:
    """Time the suites and print a table."""
    import torch

    from miniclip.bench import SUITES, bench, environment, growth, growth_table, table

    rows: Any
    if args.growth:
        keep_freed_memory()  # otherwise Linux would fill memory with zeros during the timed work
        rows = growth(args.shape, args.device)
        text = growth_table(rows)
    else:
        rows = bench(
            args.suite or tuple(SUITES),
            shape=args.shape,
            device=args.device,
            dtype=getattr(torch, args.dtype),
            compile=args.compile,
            batch=args.batch,
            engines=args.engine,
        )
        text = table(rows)
    measured_with = environment(args.device)
    if args.json:
        print_json({"environment": measured_with, "rows": [row._asdict() for row in rows]})
    else:
        print(text, end="\n\n")
        print_wrapped("", [f"{name} {value}" for name, value in measured_with.items()])
    if args.plot:
        from miniclip.bench.drawing import draw_bench, draw_growth

        (draw_growth if args.growth else draw_bench)(rows, args.plot)
        note(f"picture: {args.plot}")
    return 0
