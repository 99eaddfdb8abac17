"""Search images by text: embed a folder of images as an index, then search the index.

    miniclip embed photographs --out index.safetensors --model everyday   # folders, tars, patterns
    miniclip search index.safetensors "a red bicycle" --out bicycles.png
    miniclip search index.safetensors --image dog.jpg --minus "grass"

`embed` reads each image once. If `embed` is killed, run the same command to continue. If the index
is complete, the same command embeds new and changed images, drops missing images, and keeps all
other embeddings bit for bit. An index from another model is replaced only with `--force`. Hidden
files, hidden folders, system folders and matches of `--exclude PATTERN` are left out. HEIC needs
`pillow-heif`, and camera RAW needs `rawpy`. If a package is missing, a message names the package
and counts the skipped files.
`torchrun --nproc-per-node 8 -m miniclip embed ...` divides the work among processes.

The index is one memory-mapped safetensors file. It holds unit vectors, names, a list of unreadable
files, and a fingerprint of the model. A search with any other model raises an error.

```python
from miniclip.retrieval import Index, embed_query

index = Index.load("index.safetensors")
query = embed_query(index.load_encoder(), ["a red bicycle"], minus=["a road"])
print(index.search(query, k=3))
```

The search is exact and reads every row. Two cores need 0.25 s for a million rows of 512 numbers.
For many more rows, FAISS (`pip install faiss-cpu`) can search the same file:

    import faiss
    from safetensors.numpy import load_file

    vectors = load_file("index.safetensors")["embeddings"]
    engine = faiss.IndexFlatIP(vectors.shape[1])  # or faiss.index_factory(512, "IVF4096,PQ64")
    engine.add(vectors)
    scores, rows = engine.search(query[None].numpy(), 12)
    print([index.paths[row] for row in rows[0]])

`index` and `query` come from the example above.
"""

from miniclip.retrieval.building import build_index, embed_images
from miniclip.retrieval.index import Encoder, Hit, Index, describe, embed_query
from miniclip.retrieval.pictures import find_pictures
from miniclip.retrieval.sheet import SHEETS, draw_sheet

__all__ = [
    "find_pictures", "Index", "Encoder", "Hit", "embed_query", "embed_images", "build_index",
    "describe", "draw_sheet", "SHEETS",
]  # fmt: skip
