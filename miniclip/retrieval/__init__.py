"""Search pictures by words.

pictures.py  pictures in folders and tars
building.py  pictures -> an index, in parts, so that a killed run can be continued
index.py     a file of embeddings, and exact search in it
sheet.py     search results as one picture
"""

from miniclip.retrieval.building import build_index, embed_images, throughput
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
    "throughput",
]
