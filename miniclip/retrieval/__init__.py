"""Search pictures by words: a folder of pictures into an index, and the index searched.

The vision tower reads every picture once and gives a unit vector. A query is a unit vector too, and
a search finds the largest inner products, which are cosines. An index is one safetensors file,
mapped into memory: `embeddings`, and the pictures' names beside them.

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

    miniclip embed photographs --out index.safetensors --model everyday   # folders, tars, patterns
    miniclip search index.safetensors "a red bicycle" --out bicycles.png
    miniclip search index.safetensors --image dog.jpg --minus "grass"

Killed and started again, `embed` goes on where it was. In a folder that is indexed already, the
same command embeds new and changed pictures, drops those that are gone, and keeps the rest bit for
bit. An index that another model made is replaced only with `--force`. Hidden and system folders are
left out, and `--exclude PATTERN` leaves out more. HEIC and camera RAW are read if `pillow-heif` or
`rawpy` is installed; otherwise such files are counted, and the package is named. `torchrun
--nproc-per-node 8 -m miniclip embed ...` shares the work out.

The index is one safetensors file: unit vectors, names, what could not be read, and a fingerprint of
the weights, so that a search by another model is an error.

```python
from miniclip.retrieval import Index, embed_query

index = Index.load("index.safetensors")
query = embed_query(index.load_encoder(), ["a red bicycle"], minus=["a road"])
print(index.search(query, k=3))
```
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
