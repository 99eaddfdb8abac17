"""Suites of many images: files to embeddings, and a query against a million of them."""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miniclip.bench.libraries import Library
from miniclip.bench.material import Setting, plural
from miniclip.bench.measuring import Case, Contender, timed
from miniclip.bench.models import unit_rows
from miniclip.checkpoint import Loaded
from miniclip.files.ahead import read_ahead
from miniclip.model import unit_norm
from miniclip.retrieval.building import embed_parts
from miniclip.retrieval.index import BLOCK, Encoder, Index, Strings, embed
from miniclip.transform import ImageTransform


def embed_suite(setting: Setting) -> Iterator[Case]:
    """Four batches of files to unit vectors, and each half of the work alone.

    On a CPU both halves share the cores, so the whole takes at least their sum.
    """
    paths = setting.photographs * (setting.batch // 4) or setting.photographs
    batches = [paths[i : i + setting.batch] for i in range(0, len(paths), setting.batch)]
    ours, *peers = setting.libraries
    loaded = Loaded(ours.model, ours.tokenize, ours.transform)  # type: ignore[arg-type]
    pixels = ours.transform(batches[0]).to(setting.device)

    def together() -> Tensor:
        ((embeds, *_),) = embed_parts(loaded, [list(map(str, paths))], setting.batch, silent=True)
        return embeds

    @torch.inference_mode()
    def batch_by_batch(library: Library) -> Tensor:
        inputs = (library.transform(batch).to(setting.device) for batch in batches)
        return torch.cat([library.encode_image(x.to(setting.dtype)) for x in inputs])

    def decoding() -> None:
        deque(read_ahead(ours.transform, paths, 2 * setting.batch), maxlen=0)

    def encoding() -> None:
        for batch in batches:
            embed(ours.model, pixels[: len(batch)])

    contenders = [Contender("miniclip", setting.timed(together))]
    contenders += [
        Contender(peer.name, setting.timed(partial(batch_by_batch, peer))) for peer in peers
    ]
    contenders += [
        Contender("decoding alone", timed(decoding)),
        Contender("encoder alone", setting.timed(encoding)),
    ]
    work = f"{plural(len(paths), 'JPEG file')} of 640 x 480 pixels"
    yield setting.case("embed", work, len(paths), "images", contenders, unit_rows)


SEARCHED = 1_000_000  # rows of 512 numbers, 2 GB


def search_suite(setting: Setting) -> Iterator[Case]:
    """The rows of the twelve largest inner products of a query with a million unit vectors.

    The vectors are a memory-mapped file.
    """
    width, k = 512, 12
    draw = torch.Generator().manual_seed(0)
    path = str(setting.directory / "vectors")
    rows = torch.from_file(path, shared=True, size=SEARCHED * width).view(SEARCHED, width)
    for block in rows.split(BLOCK):
        block.copy_(unit_norm(torch.randn(block.shape, generator=draw)))
    query = unit_norm(torch.randn(width, generator=draw))
    made_by = Encoder("noise", None, "", "float32", ImageTransform())
    index = Index(rows, Strings.pack(map(str, range(SEARCHED))), made_by)
    runs: dict[str, Callable[[], Any]] = {
        "miniclip": lambda: [hit.row for hit in index.search(query, k)],
        "torch, matmul + topk": lambda: (rows @ query).topk(k).indices.tolist(),
    }
    try:
        from faiss import IndexFlatIP
    except ImportError:
        pass
    else:
        flat = IndexFlatIP(width)
        for block in rows.split(BLOCK):
            flat.add(block.numpy())
        runs["FAISS, IndexFlatIP"] = lambda: flat.search(query[None].numpy(), k)[1][0].tolist()
    contenders = [Contender(name, timed(run)) for name, run in runs.items()]
    work = f"the {k} nearest of {SEARCHED:,} x {width}, float32"
    yield Case("search", work, 1, "queries", contenders, lambda found: found)
