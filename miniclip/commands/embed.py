"""`miniclip embed`: write an index of the embeddings of images."""

import argparse
import os
from functools import partial

from miniclip.commands.shared import (
    PICTURES,
    add_device,
    add_engine,
    add_model,
    keep_freed_memory,
    load_model,
    note,
    print_json,
)
from miniclip.terminal import counted

DESCRIPTION = "Embed images, and write an index that `miniclip search` can search."
EXAMPLE = f"""{PICTURES}
  miniclip embed pictures --out index.safetensors --model everyday
with eight GPUs:
  torchrun --nproc-per-node 8 -m miniclip embed shards --out index.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="image files, folders, WebDataset .tar shards, or patterns such as '2024/**/*.jpg'",
    )
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="FILE",
        help="the index, a safetensors file; run the same command again to continue after an "
        "interruption, or to update the index after images were added, changed or removed",
    )
    parser.add_argument(
        "--force", action="store_true", help="embed all files, even if another model made the index"
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out files and folders by name, such as 'raw' or '*.gif', or by path, such as "
        "'2019/*'",
    )
    parser.add_argument(
        "--batch", type=int, default=64, metavar="N", help="images per batch (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="the dtype of the model (default: %(default)s)",
    )
    add_device(parser)
    add_engine(parser, "auto")
    workers = "threads that decode images (default: as many as torch uses)"
    parser.add_argument("--workers", type=int, metavar="N", help=workers)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Build the index. Under torchrun only the first process prints the result."""
    import torch

    from miniclip.engines import use_fastest
    from miniclip.files.ahead import read_ahead
    from miniclip.retrieval.building import build_index
    from miniclip.retrieval.index import describe, lasting_name
    from miniclip.retrieval.pictures import find_pictures, pixels_of
    from miniclip.training import process_group

    keep_freed_memory()
    pictures, damage = find_pictures(args.paths, args.exclude)
    with process_group(args.device) as device:
        name, args.revision = lasting_name(args.model, args.revision)  # a commit, not a branch
        loaded = load_model(args, device=device, dtype=getattr(torch, args.dtype))
        encoder = describe(loaded, name, args.revision)
        if args.engine == "auto":
            seen = read_ahead(
                partial(pixels_of, transform=loaded.transform), pictures[: args.batch], args.batch
            )
            chosen = use_fastest(loaded.model, [x for x in seen if isinstance(x, torch.Tensor)])
            if os.environ.get("RANK", "0") == "0":
                note(f"miniclip: {chosen}")
        options = (args.batch, args.workers, args.force)
        try:
            index = build_index(args.out, loaded, pictures, encoder, damage, *options)
        except KeyboardInterrupt:
            note(f"miniclip: {args.out} is not complete; run the same command again to continue")
            raise
    if os.environ.get("RANK", "0") != "0":
        return 0
    kinds: dict[str, list[str]] = {}  # a key is a missing package, or "" for damaged files
    for reason in index.skipped:
        kinds.setdefault(reason.partition(": pip install ")[2], []).append(reason)
    for reasons in kinds.values():
        count = counted(len(reasons), "file")
        note(f"miniclip: skipped {count}; the index lists the reasons. The first: {reasons[0]}")
    if args.json:
        print_json(
            {
                "index": args.out,
                "images": len(index),
                "width": index.embeddings.shape[1],
                "skipped": list(index.skipped),
            }
            | {
                name: getattr(encoder, name)
                for name in ("model", "revision", "fingerprint", "dtype")
            }
        )
    else:
        print(f"{args.out}: {counted(len(index), 'image')}, by {encoder}")
    return 0
