"""Ten photographs that come with scikit-image and matplotlib, classified by ten labels.

    python weights/everyday/photographs.py

The photographs were chosen for their subjects, before any result was seen.
"""

from pathlib import Path

import matplotlib
import skimage
from PIL import Image

import miniclip

SHOWN = {
    "coffee.png": "cup of coffee",
    "rocket.jpg": "rocket",
    "motorcycle_left.png": "motor vehicle",
    "grace_hopper.jpg": "person in uniform",
    "chelsea.png": "cat",
    "horse.png": "horse",
    "astronaut.png": "person in uniform",
    "clock_motion.png": "clock",
    "page.png": "book",
    "camera.png": "man with a camera",
}
FOLDERS = (
    Path(skimage.__file__).parent / "data",
    Path(matplotlib.get_data_path()) / "sample_data",
)


def main() -> None:
    """Print the best label of each photograph."""
    model, tokenizer, transform = miniclip.load("everyday")
    paths = [next(d / name for d in FOLDERS if (d / name).exists()) for name in SHOWN]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    labels = list(dict.fromkeys([*SHOWN.values(), "dog"]))
    ranked = miniclip.ZeroShotClassifier(model, tokenizer, labels).rank(transform(pictures))
    for (name, shown), (best, *_) in zip(SHOWN.items(), ranked, strict=True):
        verdict = "right" if best.label == shown else "wrong"
        print(f"{name:20} {shown:18} {best.label:18} {best.probability:4.0%}  {verdict}")


if __name__ == "__main__":
    main()
