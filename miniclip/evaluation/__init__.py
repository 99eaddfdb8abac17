r"""Measure a CLIP as its paper does: `miniclip eval`, and the functions behind it.

- `features.py`: features of images, computed once and kept
- `classification.py`: accuracy with its confidence interval, confusions, calibration
- `captions.py`: images with captions, in the formats of common data sets
- `retrieval.py`: ranks of images and captions, and recall
- `checkpoints.py`: the scores of a model on images, also during training
- `linear.py`: linear classifiers on features: the linear probe, and few-shot learning

    miniclip eval photographs --model openai/clip-vit-base-patch32 --plot confusions.png
    miniclip eval dataset_flickr30k.json --task retrieval --images flickr30k-images
    miniclip eval cifar10/test --task probe --train cifar10/train --model everyday
    miniclip eval cifar10/test --task fewshot --train cifar10/train \
        --model everyday --plot shots.png

All tasks read `DATA`, and accept `--json` and `--plot`. `--cache DIR` keeps the features of the
images for the next task. Unreadable files are left out and counted. `probe` and `fewshot` need
scikit-learn (`pip install -e '.[eval]'`).

- **zeroshot** (default): the data has one folder for each class. The labels are the folders' names
  (`fire_truck` becomes "fire truck"), or the lines of the file in `--labels FILE`. Prints top-1
  and top-5 accuracy, the 95 % interval of top-1, the mean accuracy of the classes, the calibration
  error, the accuracy of each class, and the most frequent confusions. `--labels food101 --template
  food101` uses OpenAI's class names and templates. The paper's other data sets work the same way.
- **retrieval**: recall at 1, 5 and 10, and the median rank, for images as queries and for captions
  as queries. An image has the rank of its best caption, as in CLIP_benchmark. The data is a folder
  with `metadata.jsonl` (`text` may be a list), WebDataset shards, or a .json of COCO or of
  Karpathy's Flickr30k.
- **probe**: logistic regression on the features before the projection, or after the projection with
  `--features proj`. The L2 strength is chosen on a validation split (the paper's appendix A.3).
- **fewshot**: the paper's figure 6. A linear probe learns from 1 to 16 examples of each class. A
  second classifier learns from the same examples, but starts from the zero-shot weights. Prints the
  mean accuracy of three draws of examples.

If all folders are named by WordNet ids of ImageNet (`n01440764`), or `0` to `999` as in
ImageNet-V2, the classes get OpenAI's class names. With WordNet ids, the data may have only some
of ImageNet's classes. OpenAI's names give a higher accuracy than ImageNet's own names. Two of
OpenAI's names, "missile" and "sunglasses", belong to two classes each.
The paper's measurement uses the 80 published templates:

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
