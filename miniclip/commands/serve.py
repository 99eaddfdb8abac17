"""`miniclip serve`: try models in the browser."""

import argparse
import json

from miniclip.commands.shared import DEFAULT_MODEL, MODELS, add_device
from miniclip.terminal import progress

DESCRIPTION = "Try models on a page in the browser. Only this machine can open it."
EXAMPLE = "miniclip serve --model everyday shapes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "--model",
        nargs="+",
        default=[DEFAULT_MODEL],
        metavar="NAME",
        help=f"one or more models, each {MODELS}",
    )
    parser.add_argument("--index", metavar="FILE", help="search this index from `miniclip embed`")
    parser.add_argument(
        "--port", type=int, metavar="N", help="use this port (default: a free port)"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Print the address of the page, and serve the page until Ctrl-C."""
    from miniclip.checkpoint import load
    from miniclip.follow import check_towers
    from miniclip.page.serve import (
        create_app,
        listen,
        open_index,
        serve_until_interrupted,
    )

    with listen(args.port) as socket:  # if the port is in use, fail before the slow loading
        models = {name: load(name, device=args.device) for name in progress(args.model, "model")}
        for name, loaded in models.items():
            check_towers(loaded.model, name)
        app = create_app(models, *(open_index(args.index, args.device) if args.index else ()))
        url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        print(json.dumps({"url": url}) if args.json else f"{url}  (Ctrl-C ends it)", flush=True)
        serve_until_interrupted(app, socket)
    return 0
