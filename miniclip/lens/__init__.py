"""What the activations mean: attention maps, decompositions, intermediate features, heat maps.

Nothing here changes a weight.
"""

from miniclip.lens.attention import Relevance, attention_maps, relevance, rollout
from miniclip.lens.decompose import check_sum, decompose
from miniclip.lens.heat import (
    BLIND,
    HEAT_COLOURS,
    METHODS,
    head_map,
    heatmap,
    occlusion,
    overlay,
    seen,
    text_map,
    text_maps,
)
from miniclip.lens.reading import on_grid
from miniclip.lens.streams import forward_intermediates, logit_lens

__all__ = [
    "attention_maps",
    "rollout",
    "Relevance",
    "relevance",
    "decompose",
    "check_sum",
    "logit_lens",
    "forward_intermediates",
    "on_grid",
    "occlusion",
    "METHODS",
    "BLIND",
    "text_maps",
    "text_map",
    "heatmap",
    "head_map",
    "overlay",
    "seen",
    "HEAT_COLOURS",
]
