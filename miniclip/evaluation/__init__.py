r"""Measure a CLIP as its paper does: `miniclip eval`, and the functions behind it.

- `features.py`: pictures -> features, computed once and kept
- `classification.py`: accuracy, intervals, confusions, calibration
- `captions.py`: pictures with captions, in the formats of common data sets
- `retrieval.py`: ranks of pictures and captions, and recall
- `checkpoints.py`: the scores of a model on pictures, also for training
- `linear.py`: linear classifiers on features: the linear probe, and few shots

    miniclip eval photographs --model openai/clip-vit-base-patch32 --plot confusions.png
    miniclip eval dataset_flickr30k.json --task retrieval --images flickr30k-images
    miniclip eval cifar10/test --task probe --train cifar10/train --model everyday
    miniclip eval cifar10/test --task fewshot --train cifar10/train \
        --model everyday --plot shots.png

All tasks read `DATA` and take `--json`, `--plot` and `--cache DIR`, which keeps the features of the
pictures for the next task. Unreadable files are named and counted. `probe` and `fewshot` need
scikit-learn (`pip install -e '.[eval]'`).

- **zeroshot** (default): a folder for each class, labels from the folders' names (`fire_truck` is
  "fire truck") or from `--labels FILE`, one a line. Prints top-1 with its 95 % interval, top-5, the
  mean over the classes, the calibration error, each class and the most frequent confusions.
  `--labels food101 --template food101` uses the class names and templates that OpenAI published.
  The names of the paper's other data sets work too.
- **retrieval**: recall@1, 5 and 10 and the median rank, from pictures to captions and back. A
  picture counts as found by its best caption, as in CLIP_benchmark. The data is a folder with
  `metadata.jsonl` (`text` may be a list), WebDataset shards, or a .json of COCO or of Karpathy's
  Flickr30k.
- **probe**: logistic regression on the features before the projection, or after it (`--features
  proj`). A validation split chooses the L2 strength, as in the paper's appendix A.3.
- **fewshot**: the paper's figure 6. 1, 2, 4, 8 and 16 examples a class train a linear probe, and a
  classifier that starts from the zero-shot weights; mean and spread over three draws.

ImageNet's folders, named by WordNet ids (`n01440764`; all or some, as in ImageNet-R) or positions
(`0` to `999`, as in ImageNet-V2), get OpenAI's class names, which score higher than ImageNet's own.
With the 80 published templates this is the paper's measurement (two pairs of classes share a name,
"missile" and "sunglasses", here as there):

    miniclip eval imagenet/val --model openai/clip-vit-large-patch14-336 \
        --template imagenet --reference openai --device cuda

| model | top-1 on ImageNet, as published | here |
|--|--|--|
| `openai/clip-vit-base-patch32` | 63.2 % | not run yet |
| `openai/clip-vit-base-patch16` | 68.6 % | not run yet |
| `openai/clip-vit-large-patch14` | 75.3 % | not run yet |
| `openai/clip-vit-large-patch14-336` | 76.2 % | not run yet |
"""

from miniclip.evaluation.captions import CaptionedImages, captioned_images
from miniclip.evaluation.checkpoints import caption_ranks, classify, scorer
from miniclip.evaluation.classification import Evaluation, evaluate, summary, wilson_interval
from miniclip.evaluation.features import Features, picture_features
from miniclip.evaluation.linear import Examples, Method, few_shot, fit_from_text, fit_probe, probe
from miniclip.evaluation.retrieval import recall, retrieval_ranks

__all__ = [
    "Evaluation", "evaluate", "summary", "wilson_interval", "Features", "picture_features",
    "CaptionedImages", "captioned_images", "classify", "caption_ranks",
    "scorer", "recall", "retrieval_ranks", "Examples", "fit_probe", "fit_from_text", "probe",
    "Method", "few_shot",
]  # fmt: skip
