"""Contrastive training: the loss (loss.py), pictures and captions (data.py), the loop (loop.py)."""

from miniclip.training.data import ClassFolders, augment, captions, read_class_folders
from miniclip.training.loop import PatchDropout, Recipe, train, train_from_folders
from miniclip.training.loss import clamp_logit_scale, contrastive_loss
