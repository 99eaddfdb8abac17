"""`miniclip serve`: a page in the browser to try models on."""

import argparse
import json

from miniclip.commands.shared import DEFAULT_MODEL, MODELS, add_device
from miniclip.terminal import progress

DESCRIPTION = "A page in the browser to try models on, for this machine alone."
EXAMPLE = "miniclip serve --model everyday shapes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "--model",
        nargs="+",
        default=[DEFAULT_MODEL],
        metavar="NAME",
        help=f"one, or several to choose from: {MODELS}",
    )
    parser.add_argument("--index", metavar="FILE", help="pictures to search, from `miniclip embed`")
    parser.add_argument(
        "--port", type=int, metavar="N", help="this one and no other (default: a free one)"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Print the page's address and serve it until Ctrl-C."""
    from miniclip.checkpoint import load
    from miniclip.page.serve import (
        create_app,
        listen,
        open_index,
        serve_until_interrupted,
    )

    with listen(args.port) as socket:  # first, because a port that is taken should show at once
        models = {name: load(name, device=args.device) for name in progress(args.model, "model")}
        find = open_index(args.index, args.device) if args.index else None
        app = create_app(models, find)
        url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        print(json.dumps({"url": url}) if args.json else f"{url}  (Ctrl-C ends it)", flush=True)
        serve_until_interrupted(app, socket)
    return 0
