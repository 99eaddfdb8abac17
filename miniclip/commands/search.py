"""`miniclip search`: search an index for the images nearest to a query."""

import argparse
from time import perf_counter

from miniclip.commands.shared import (
    PICTURES,
    add_device,
    check_writable,
    note,
    print_csv,
    print_json,
)
from miniclip.terminal import counted, printable

DESCRIPTION = "Search an index for the images nearest to a text, an image, or a sum of both."
EXAMPLE = f"""{PICTURES}
  miniclip embed pictures --out index.safetensors --model everyday
  miniclip search index.safetensors "a drink" --out drinks.png
  miniclip search index.safetensors --image pictures/coffee.png --minus "a vehicle\""""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("index", metavar="INDEX", help="an index from `miniclip embed`")
    texts = "a text to search for; the embeddings of several texts are added"
    parser.add_argument("texts", nargs="*", metavar="TEXT", help=texts)
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="add an image")
    parser.add_argument(
        "--minus", action="append", default=[], metavar="TEXT", help="subtract a text"
    )
    parser.add_argument(
        "--minus-image",
        action="append",
        default=[],
        metavar="FILE",
        help="subtract an image",
    )
    parser.add_argument(
        *("-k", "--top-k"),
        type=int,
        default=12,
        metavar="N",
        help="find the N nearest images (default: %(default)s)",
    )
    parser.add_argument("-o", "--out", metavar="PNG", help="draw the images with their scores")
    parser.add_argument("--model", help="the folder of the index's model, if this folder has moved")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Search, and print a line for each image found."""
    from miniclip.retrieval.index import Index, embed_query
    from miniclip.retrieval.sheet import SHEETS, draw_sheet

    if args.out:
        check_writable(args.out, SHEETS)
    if not (args.texts or args.image or args.minus or args.minus_image):
        raise ValueError("no query; expected a TEXT or --image FILE")
    index = Index.load(args.index)
    loaded = index.load_encoder(args.model, args.device)
    query = embed_query(loaded, args.texts, args.image, args.minus, args.minus_image)
    start = perf_counter()
    hits = index.search(query, args.top_k)
    seconds = perf_counter() - start
    if args.json:
        print_json([hit._asdict() for hit in hits])
    elif args.csv:
        print_csv([hit._asdict() for hit in hits])
    else:
        for i, hit in enumerate(hits, 1):
            print(f"{i:>4} {hit.score:7.4f}  {printable(hit.path)}")
    if args.out:
        plus = " + ".join([*args.texts, *args.image])
        title = " - ".join([plus, *args.minus, *args.minus_image]).strip()
        for reason in draw_sheet(index, hits, title, args.out):
            note(f"miniclip: not in the picture: {reason}")
        note(f"picture: {args.out}")
    note(f"{counted(len(index), 'image')} searched in {seconds:.2f} s")
    return 0
