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
    """`count` scenes, each drawn when it is asked for, in about half a millisecond.

    `data[index, draw]` is the scene's picture with a caption and a false caption that the number
    `draw` chooses. Three lessons come first, each a sixth of all: scenes of one object and where it
    is, of two and where each is, of two and how they stand to each other (`say_something`). With
    everything from the start a model learns colours and then, for very long, nothing else. Pictures
    are never to be mirrored: "to the left of" would become false.
    """

    OBJECTS = (1, 2, 2)  # in the scenes of each lesson

    def __init__(self, count: int = 225_000, seed: int = 0) -> None:
        if seed == SCORE_SEED:
            raise ValueError(f"seed {seed} draws the scenes that `score` asks about")
        self.count, self.seed = count, seed
        self.lesson_length = count // 6
        self.skipped: list[str] = []  # no picture is ever unreadable

    def __len__(self) -> int:
        return self.count

    def items(self, seed: int) -> Iterator[int]:
        """All scenes, lesson after lesson, each in an order that the seed decides."""
        starts = [lesson * self.lesson_length for lesson in range(4)]
        for first, end in pairwise((*starts, self.count)):
            yield from (first + i for i in shuffled(end - first, seed))

    def lesson(self, index: int) -> int:
        """0 to 2, and 3 for all the rest."""
        return min(index // self.lesson_length, 3) if self.lesson_length else 3

    def scene(self, index: int) -> Scene:
        """The scene of this index, of as many objects as its lesson allows."""
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
        """A caption of some thousands of scenes: every word, for a tokenizer to learn from."""
        for index in range(0, self.count, max(1, self.count // 5000)):
            yield say_something(self.scene(index), Random(index))[0]
