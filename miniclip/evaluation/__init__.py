"""CLIP measured as its paper measures it: `miniclip eval`, and the functions behind it.

features.py        pictures -> features, computed once and kept
classification.py  how often logits are right: accuracy, intervals, confusions, calibration
captions.py        pictures with their captions, as data sets come
retrieval.py       ranks of pictures and captions, and recall
checkpoints.py     a model's scores on pictures, and what training measures held-out data by
linear.py          linear classifiers on features: the linear probe, and few shots
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
