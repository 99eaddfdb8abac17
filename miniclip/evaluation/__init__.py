r"""CLIP measured as its paper measures it: `miniclip eval`, and the functions behind it.

features.py        pictures -> features, computed once and kept
classification.py  how often logits are right: accuracy, intervals, confusions, calibration
captions.py        pictures with their captions, as data sets come
retrieval.py       ranks of pictures and captions, and recall
checkpoints.py     a model's scores on pictures, and what training measures held-out data by
linear.py          linear classifiers on features: the linear probe, and few shots

    miniclip eval photographs --model openai/clip-vit-base-patch32 --plot confusions.png

A folder for each class, labels from the folders' names (`fire_truck` is "fire truck") or, one a
line, from `--labels FILE`. It prints top-1 with its 95 % interval, top-5 when there are more than
five classes, the mean of the classes' accuracies, the calibration error, every class's accuracy and
the most frequent confusions; `--json` prints all of it, `--plot` draws it. Files that cannot be
read are named, counted and left out. `--cache DIR` keeps the features of the pictures in index
files, so that the next prompts, or the next task, cost seconds.

The class names and templates that OpenAI used for the paper's 27 data sets are included: `--labels
food101 --template food101` takes them, and finds each folder by its class's name.

Folders named by ImageNet's WordNet ids (`n01440764`, all thousand or some of them, as in
ImageNet-R) or by its positions (`0` to `999`, as in ImageNet-V2) get the class names OpenAI used,
which score markedly higher than ImageNet's own. With them and the 80 published templates this is
the paper's measurement:

    miniclip eval imagenet/val --model openai/clip-vit-large-patch14-336 \
        --template imagenet --reference openai --device cuda

| model | top-1 on ImageNet, as published | here |
|--|--|--|
| `openai/clip-vit-base-patch32` | 63.2 % | not run yet |
| `openai/clip-vit-base-patch16` | 68.6 % | not run yet |
| `openai/clip-vit-large-patch14` | 75.3 % | not run yet |
| `openai/clip-vit-large-patch14-336` | 76.2 % | not run yet |

Two names stand for two classes each ("missile" and "sunglasses"), in the paper's measurement as in
this one. Templates and names are OpenAI's (openai/CLIP, MIT licence), copied to the letter, and the
tests know their checksums.

    miniclip eval dataset_flickr30k.json --task retrieval --images flickr30k-images
    miniclip eval cifar10/test --task probe --train cifar10/train --model everyday
    miniclip eval cifar10/test --task fewshot --train cifar10/train \
        --model everyday --plot shots.png

All tasks read `DATA`, and take `--json`, `--plot` and `--cache`. The learning ones need
scikit-learn (`pip install -e '.[eval]'`).

- **retrieval**: recall@1, 5 and 10 and the median rank, from pictures to captions and back. A
  picture with several captions is found by its first one, as in CLIP_benchmark; of equal scores the
  one that is listed first comes first. The data is a folder with `metadata.jsonl` (`text` may be a
  list), WebDataset shards, or a .json of COCO or of Karpathy's Flickr30k.
- **probe**: logistic regression on the features before the projection, or after it (`--features
  proj`). The L2 strength is swept on a validation split as in the paper's appendix A.3.
- **fewshot**: figure 6 of the paper: 1, 2, 4, 8 and 16 examples a class, by a linear probe and by
  the zero-shot classifier whose weights the examples correct; mean and spread over three draws.
"""

from miniclip.evaluation.captions import CaptionedImages, captioned_images
from miniclip.evaluation.checkpoints import caption_ranks, classify, scorer
from miniclip.evaluation.classification import Evaluation, evaluate, summary, wilson_interval
from miniclip.evaluation.features import Features, encode_pictures, picture_features
from miniclip.evaluation.linear import Examples, Method, few_shot, fit_from_text, fit_probe, probe
from miniclip.evaluation.retrieval import recall, retrieval_ranks

__all__ = [
    "Evaluation",
    "evaluate",
    "summary",
    "wilson_interval",
    "Features",
    "encode_pictures",
    "picture_features",
    "CaptionedImages",
    "captioned_images",
    "classify",
    "caption_ranks",
    "scorer",
    "recall",
    "retrieval_ranks",
    "Examples",
    "fit_probe",
    "fit_from_text",
    "probe",
    "Method",
    "few_shot",
]
