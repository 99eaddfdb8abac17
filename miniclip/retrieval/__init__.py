"""Search pictures by words: a folder to an index, and searching it."""

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
