"""Pictures in class folders, and the captions that are made for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from miniclip.config import ImageError
from miniclip.transform import open_image

TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "a photo of a {}.",
    "a photo of the {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of a {}.",
    "a close-up photo of a {}.",
    "a picture of a small {}.",
    "a picture of a large {}.",
    "this is a photo of a {}.",
    "an image of a {}.",
)

# The words that people use for what is in the folders of CIFAR-10 (Krizhevsky 2009).
SYNONYMS = {
    "airplane": ("airplane", "plane", "aeroplane", "jet", "aircraft"),
    "automobile": ("automobile", "car", "sedan", "motor car"),
    "bird": ("bird", "songbird", "little bird"),
    "cat": ("cat", "kitten", "house cat", "tabby cat"),
    "deer": ("deer", "stag", "doe"),
    "dog": ("dog", "puppy", "hound"),
    "frog": ("frog", "toad", "tree frog"),
    "horse": ("horse", "pony", "stallion"),
    "ship": ("ship", "boat", "vessel"),
    "truck": ("truck", "lorry", "fire truck", "pickup truck"),
}


@dataclass
class ClassFolders:
    """Small pictures, all in memory, and the class of each."""

    pixels: Tensor  # (N, 3, S, S) uint8
    labels: Tensor  # (N,)
    classes: list[str]
    skipped: list[str] = field(default_factory=list)  # why each unreadable file was left out


def read_class_folders(root: Path, size: int) -> ClassFolders:
    """Every image in `root`/<class>/, as (size, size). Damaged files are skipped and named.

    Raises ValueError where there is no class or no image.
    """
    root = Path(root)
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    files = [(path, i) for i, folder in enumerate(folders) for path in sorted(folder.iterdir())]
    pixels, labels, skipped = [], [], []
    for path, label in tqdm(files, desc=f"reading {root.name}", delay=2, disable=None):
        try:
            image = open_image(path).convert("RGB")
        except ImageError as error:
            skipped.append(str(error))
            continue
        if image.size != (size, size):
            image = image.resize((size, size))
        pixels.append(np.asarray(image))
        labels.append(label)
    if not pixels:
        raise ValueError(f"{root}: no images; expected folders of them, one for each class")
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return ClassFolders(stacked, torch.tensor(labels), [f.name for f in folders], skipped)


def captions(classes: Sequence[str]) -> list[list[str]]:
    """For each class everything that may be said of it: every synonym in every template.

    >>> captions(["tea cup"])[0][3]
    'a photo of a tea cup.'
    """
    return [
        [
            template.replace("{}", word)
            for word in SYNONYMS.get(name, (name,))
            for template in TEMPLATES
        ]
        for name in classes
    ]


def augment(pixels: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Mirror half of the pictures, and shift each by up to `padding` pixels. (B, 3, S, S) uint8."""
    b, _, s, _ = pixels.shape
    mirrored = torch.rand(b, generator=generator) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    padded = F.pad(pixels, [padding] * 4, mode="reflect")
    top, left = torch.randint(0, 2 * padding + 1, (2, b, 1, 1), generator=generator)
    rows = top + torch.arange(s)[None, :, None]  # (B, S, 1)
    columns = left + torch.arange(s)[None, None, :]  # (B, 1, S)
    return padded[torch.arange(b)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
