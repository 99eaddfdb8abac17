"""Record CLIP_benchmark's recall for small embeddings, in data/clip_benchmark.json.

    git clone https://github.com/LAION-AI/CLIP_benchmark
    git -C CLIP_benchmark checkout 48de38c
    pip install torch tqdm && python tests/record_clip_benchmark.py CLIP_benchmark

The script runs `clip_benchmark/metrics/zeroshot_retrieval.py` of the checkout, but with row
numbers in place of images and texts. A fake model returns the embeddings in these rows.
"""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

PATH = Path(__file__).parent / "data" / "clip_benchmark.json"
# (number of images, captions for each image). The last image has one caption more than the others.
SIZES = [(7, 1), (40, 5), (60, 3)]
LEVELS = [1, 5, 10]


def embeddings(images: int, captions: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return image embeddings (N, 8), caption embeddings (M, 8), and the image of each caption."""
    image_of = [i for i in range(images) for _ in range(captions)] + [images - 1]
    image_embeds = waves(images, 0.37)
    return image_embeds, image_embeds[image_of] + 1.1 * waves(len(image_of), 0.59), image_of


def waves(rows: int, pitch: float) -> Tensor:
    """Return a matrix (rows, 8) of deterministic numbers from -1 to 1."""
    return (torch.arange(rows * 8, dtype=torch.float64).pow(2) * pitch).sin().view(rows, 8).float()


def record(checkout: str) -> list[dict[str, float]]:
    file = Path(checkout) / "clip_benchmark" / "metrics" / "zeroshot_retrieval.py"
    spec = spec_from_file_location("zeroshot_retrieval", file)
    theirs = module_from_spec(spec)
    spec.loader.exec_module(theirs)
    found = []
    for size in SIZES:
        image_embeds, text_embeds, image_of = embeddings(*size)
        texts = [[j for j, i in enumerate(image_of) if i == image] for image in range(size[0])]
        model = SimpleNamespace(
            encode_image=lambda rows: image_embeds[rows], encode_text=lambda rows: text_embeds[rows]
        )
        batches = [(torch.arange(size[0]), texts)]
        levels = [k for k in LEVELS if k <= size[0]]
        found.append(
            theirs.evaluate(model, batches, torch.tensor, "cpu", amp=False, recall_k_list=levels)
        )
    return found


if __name__ == "__main__":
    PATH.write_text(json.dumps(record(sys.argv[1]), indent=1) + "\n")
    print(PATH.read_text())
