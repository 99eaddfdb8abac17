"""The drawn world as training data."""

from collections.abc import Iterator
from itertools import pairwise
from random import Random

import numpy as np
import torch

from miniclip.training.pairs import Pair, caption_label, shuffled
from miniclip.world.captions import say_something
from miniclip.world.scenes import Scene, draw, scene
from miniclip.world.scoring import SCORE_SEED


class Shapes:
    """Scenes that are drawn when they are needed, in about half a millisecond each.

    `data[index, draw]` is a picture with a caption and a false caption, which the number `draw`
    chooses. Three lessons come first, each a sixth of the scenes: one object and its place, two
    objects and their places, and how two objects stand to each other. Without them a model learns
    colours, and nothing else for a long time. Do not mirror the pictures: "to the left of" would
    become false.

    Args:
        count: the number of scenes.
        seed: decides the scenes. `SCORE_SEED` is refused, because `score` asks about its scenes.
    """

    OBJECTS = (1, 2, 2)  # in each lesson

    def __init__(self, count: int = 225_000, seed: int = 0) -> None:
        if seed == SCORE_SEED:
            raise ValueError(f"seed {seed} draws the scenes that `score` asks about")
        self.count, self.seed = count, seed
        self.lesson_length = count // 6
        self.skipped: list[str] = []  # always empty

    def __len__(self) -> int:
        return self.count

    def items(self, seed: int) -> Iterator[int]:
        """All scenes. The lessons keep their order, and the seed decides the order in a lesson."""
        starts = [lesson * self.lesson_length for lesson in range(4)]
        for first, end in pairwise((*starts, self.count)):
            yield from (first + i for i in shuffled(end - first, seed))

    def lesson(self, index: int) -> int:
        """Return the lesson of a scene, 0 to 2; 3 after the lessons."""
        return min(index // self.lesson_length, 3) if self.lesson_length else 3

    def scene(self, index: int) -> Scene:
        """Return the scene of this index, with as many objects as its lesson has."""
        lesson = self.lesson(index)
        return scene(index, seed=self.seed, count=self.OBJECTS[lesson] if lesson < 3 else None)

    def __getitem__(self, index_and_draw: tuple[int, int]) -> Pair:
        index, choice = index_and_draw
        scene = self.scene(index)
        picture, _ = draw(scene)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        caption, negative = say_something(scene, Random(choice), self.lesson(index))
        return Pair(pixels, caption, caption_label(caption), negative)

    def captions(self) -> Iterator[str]:
        """Captions of some thousands of scenes, which have all the words."""
        for index in range(0, self.count, max(1, self.count // 5000)):
            yield say_something(self.scene(index), Random(index))[0]
