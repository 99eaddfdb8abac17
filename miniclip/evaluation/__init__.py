"""CLIP measured as its paper measures it: `miniclip eval`, and the functions behind it.

features.py        pictures -> features, computed once and kept
classification.py  how often logits are right: accuracy, intervals, confusions, calibration
"""

from miniclip.evaluation.classification import Evaluation, evaluate, wilson_interval
from miniclip.evaluation.features import Features, encode_pictures, picture_features

__all__ = [
    "Evaluation",
    "evaluate",
    "wilson_interval",
    "Features",
    "encode_pictures",
    "picture_features",
]
