"""Training data from the drawn world of coloured shapes."""

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

    `data[index, draw]` is an image with a caption and a false caption. The number `draw` chooses
    both captions. The first half of the scenes is divided into three lessons. In lesson 0 a
    scene has one object, and the caption may say where the object is. In lesson 1 a scene has two
    objects, and the caption is about one of them. In lesson 2 the caption may state a relation of
    the two objects. Without the lessons, a model learns only colours for a long time. Do not mirror
    the images, because "to the left of" would become false.

    Args:
        count: the number of scenes.
        seed: decides the scenes. Raises ValueError for `SCORE_SEED`, which gives the test scenes.
    """

    OBJECTS = (1, 2, 2)  # the number of objects in a scene, in lessons 0, 1 and 2

    def __init__(self, count: int = 225_000, seed: int = 0) -> None:
        if seed == SCORE_SEED:
            raise ValueError(f"`score` tests models on scenes of seed {seed}: choose another seed")
        self.count, self.seed = count, seed
        self.lesson_length = count // 6
        self.skipped: list[str] = []  # always empty, because no scene is unreadable

    def __len__(self) -> int:
        return self.count

    def items(self, seed: int) -> Iterator[int]:
        """Yield all indices, lesson by lesson. The seed decides the order within each lesson."""
        starts = [lesson * self.lesson_length for lesson in range(4)]
        for first, end in pairwise((*starts, self.count)):
            yield from (first + i for i in shuffled(end - first, seed))

    def lesson(self, index: int) -> int:
        """Return the lesson of a scene, 0 to 2, or 3 if the scene comes after all lessons."""
        return min(index // self.lesson_length, 3) if self.lesson_length else 3

    def scene(self, index: int) -> Scene:
        """Return the scene with this index. The scene's lesson decides the number of objects."""
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
        """Yield captions of at most 10,000 scenes, to learn a vocabulary from."""
        for index in range(0, self.count, max(1, self.count // 5000)):
            yield say_something(self.scene(index), Random(index))[0]
