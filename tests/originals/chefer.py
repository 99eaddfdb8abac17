"""Chefer et al. 2021: relevance, computed by the authors' notebook for CLIP.

github.com/hila-chefer/Transformer-MM-Explainability
"""

import json
from pathlib import Path

import torch
from originals.common import ids, import_from, main, openai_clip, pixels, without

STARTS = (0, -1)


def record(checkout: str) -> dict:
    import_from(checkout)
    without("torchvision.transforms")
    import CLIP.clip.model
    import numpy as np

    notebook = json.loads(Path(checkout, "CLIP_explainability.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    names = {"torch": torch, "np": np, "start_layer": -1, "start_layer_text": -1}
    exec(next(cell for cell in cells if cell.startswith("def interpret")), names)
    torch.Tensor.cuda = lambda self: self
    model, found = openai_clip(CLIP.clip.model), {"image": [], "text": []}
    for start in STARTS:
        with torch.enable_grad():
            # The notebook takes a single image and explains it once for each text.
            text, image = names["interpret"](pixels()[:1], ids(), model, "cpu", start, start)
        found["image"].append(image)
        found["text"].append(text[range(2), ids().argmax(1)])
    return found


if __name__ == "__main__":
    main(record)
