"""Interpret the activations of a model. Nothing here changes a weight.

- `attention.py`: attention maps, rollout, gradient-weighted relevance, Grad-CAM
- `decompose.py`: the embedding as an exact sum over layers, heads or tokens
- `streams.py`: the residual stream after each layer: logit lens, intermediate features
- `heat.py`: several methods to show where in an image a model sees what a text describes
- `reading.py`: which tower gets an input, and which token's output becomes the embedding

Diffusion models read the residual stream after a chosen block of the text tower. The block before
the last is clip skip 1 in diffusers, and clip skip 2 in most user interfaces. A prompt of more than
77 tokens goes through the tower in windows, each with a start and an end token:

```python
from miniclip.lens import forward_intermediates

prompt, window = "a photograph of a very old cat, " * 30, model.config.text.context_length - 2
words, end = tokenizer.encode(prompt), tokenizer.eos_token_id
rows = [[tokenizer.bos_token_id, *words[i : i + window]] for i in range(0, len(words), window)]
long_ids = torch.tensor([row + [end] * (window + 2 - len(row)) for row in rows])
options = dict(indices=[-2], norm=True, intermediates_only=True)  # SDXL: norm=False
(states,) = forward_intermediates(model.text, long_ids, **options)  # (windows, 77, W)
states = states.flatten(0, 1)[None]  # (1, windows * 77, W)
```

For one embedding of a long text, see `surgery.extend_context`.

    miniclip explain cat.jpg "a cat" "a dog" --all -o where.png --model everyday
    miniclip explain --score shapes --model shapes -o methods.png

The first command draws where the model sees what each text describes, with every method. The second
command scores the methods. Each image shows two objects. A method must find the object that the
text names:

                                    trained weights                random weights
    method                named     other       IoU     named     other       IoU
    attention             37.7%     37.7%     23.3%      4.8%      4.8%      3.3%
    rollout               43.0%     43.0%     29.3%      5.1%      5.1%      3.3%
    relevance             76.0%      0.2%     46.4%      2.0%      2.6%      1.5%
    gradcam               46.5%      0.5%     28.8%      2.4%      2.6%      2.6%
    tokens                79.3%      1.0%     47.8%      2.4%      2.0%      1.9%
    occlusion             62.5%      0.0%     38.1%     12.6%     13.3%      7.5%

    a random map           3.0%      2.5%      1.4%
    the mask itself       85.0%      0.0%     64.0%

(Shapes checkpoint, torch 2.13.0, CPU, 2026-11-29. `named`, `other`: how often the warmest pixel is
on the object that the text names, or on the other object. `IoU` (intersection over union): if the
object has N pixels, it is compared with the N warmest pixels of the map. Random weights: the
mean over five models. Attention and rollout do not read the text, so they find both objects equally
often. `the mask itself` is the object's mask, averaged over each patch. This is close to an
ideal map.)
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
    "attention_maps", "rollout", "Relevance", "relevance", "gradcam", "decompose", "check_sum",
    "ablate_contributions", "logit_lens", "forward_intermediates", "on_grid", "occlusion",
    "METHODS", "BLIND", "text_maps", "text_map", "heatmap", "head_map", "overlay", "seen",
    "HEAT_COLOURS",
]  # fmt: skip
