"""Draw images of the world of `shapes`, in folders that `miniclip eval` reads.

    python weights/shapes/pictures.py drawn
    miniclip eval drawn/test --model shapes
    miniclip eval drawn/pairs --task retrieval --model shapes
    miniclip eval drawn/test --task probe --train drawn/train --model shapes
    miniclip eval drawn/test --task fewshot --train drawn/train --model shapes

train/ and test/ have scenes of one object, in a folder for each colour and shape. pairs/ has scenes
of two objects with their captions. No checkpoint was trained on any of these scenes.
"""

import json
import sys
from pathlib import Path

from miniclip.world.captions import Claim, Phrase, say
from miniclip.world.scenes import draw, scene

SEEDS = {"train": 101, "test": 102, "pairs": 103}  # of worlds that no checkpoint was trained on
COUNTS = {"train": 6400, "test": 2000, "pairs": 1000}


def main(out: Path) -> None:
    """Write `out`/train, `out`/test and `out`/pairs."""
    for part in ("train", "test"):
        for index in range(COUNTS[part]):
            one = scene(index, seed=SEEDS[part], count=1)
            folder = out / part / f"{one.objects[0].colour}_{one.objects[0].shape}"
            folder.mkdir(parents=True, exist_ok=True)
            draw(one)[0].save(folder / f"{index}.png")
    (out / "pairs").mkdir()
    with open(out / "pairs" / "metadata.jsonl", "w") as metadata:
        for index in range(COUNTS["pairs"]):
            both = scene(index, seed=SEEDS["pairs"], count=2)
            draw(both)[0].save(out / "pairs" / f"{index}.png")
            phrases = [Phrase("", one.colour, one.shape) for one in both.objects]
            row = {"file_name": f"{index}.png", "text": say(Claim("", tuple(phrases)))}
            metadata.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
