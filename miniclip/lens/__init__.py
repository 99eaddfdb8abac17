"""What the activations of a model mean. Nothing here changes a weight.

attention.py  attention maps, rollout, gradient-weighted relevance, Grad-CAM
decompose.py  the embedding as an exact sum over layers, heads or tokens
streams.py    the residual stream after each layer: logit lens, intermediate features
heat.py       where a text is seen in an image, by several methods
reading.py    which tower reads an input, and at which token
"""

from miniclip.lens.attention import Relevance, attention_maps, gradcam, relevance, rollout
from miniclip.lens.decompose import ablate_contributions, check_sum, decompose
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
    "gradcam",
    "decompose",
    "check_sum",
    "ablate_contributions",
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
