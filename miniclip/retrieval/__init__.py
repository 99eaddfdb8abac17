"""Search pictures by words: a folder of pictures into an index, and the index searched.

The vision tower reads every picture once and gives a unit vector. A query is a unit vector too, and
a search finds the largest inner products, which are cosines. An index is one safetensors file,
mapped into memory: `embeddings`, and the pictures' names beside them.

    miniclip embed photographs --out index.safetensors
    miniclip search index.safetensors "a red bicycle" --out bicycles.png

The search is exact and reads every row: two cores need a second for a million rows of 512 numbers.
For far more, give the same file to FAISS (pip install faiss-cpu). Its indices need less memory, are
faster, or run on another machine:

    import faiss
    from safetensors.numpy import load_file

    vectors = load_file("index.safetensors")["embeddings"]
    engine = faiss.IndexFlatIP(vectors.shape[1])  # or faiss.index_factory(512, "IVF4096,PQ64")
    engine.add(vectors)
    scores, rows = engine.search(query[None].numpy(), 12)
    print([index.paths[row] for row in rows[0]])

`index` is `Index.load("index.safetensors")`, and `query` comes from `embed_query`.
"""

from miniclip.retrieval.building import build_index, embed_images
from miniclip.retrieval.index import Encoder, Hit, Index, describe, embed_query
from miniclip.retrieval.pictures import find_pictures
from miniclip.retrieval.sheet import SHEETS, draw_sheet

__all__ = [
    "find_pictures",
    "Index",
    "Encoder",
    "Hit",
    "embed_query",
    "embed_images",
    "build_index",
    "describe",
    "draw_sheet",
    "SHEETS",
]
