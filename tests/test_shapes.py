"""Test the scenes of drawn shapes. Masks fit the pixels, and true captions fit the scene. The words
of a caption do not show whether the caption is true."""

import math
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import product
from random import Random
from typing import NamedTuple
from zlib import crc32

import numpy as np
import pytest
import torch
from twin import TINY

from miniclip import CLIP, ImageTransform
from miniclip.files.hub import resolve
from miniclip.tokenizer import Tokenizer
from miniclip.training import read_recipe, set_up
from miniclip.training.drawn import Shapes
from miniclip.world import scenes as world
from miniclip.world.captions import (
    clear_relations,
    kinds,
    located,
    negatives,
    relations,
    say,
    say_something,
    vague,
)
from miniclip.world.scenes import COLOURS, HELD_OUT, SEEN, SHAPES, draw, paint, scene
from miniclip.world.scoring import SCORE_SEED, score


@pytest.fixture(scope="module")
def scenes():
    return [scene(i) for i in range(150)] + [scene(i, held_out=True) for i in range(30)]


# -- scenes and images ----------------------------------------------------------------------------


def test_a_scene_depends_only_on_its_index_and_seed():
    assert scene(7, seed=3) == scene(7, seed=3)
    assert len({scene(i, seed=seed) for i in range(20) for seed in range(3)}) == 60
    pictures = [np.array(draw(scene(7))[0]) for _ in range(2)]
    assert np.array_equal(*pictures)


def test_scenes_are_the_same_on_every_machine():
    """The scenes must not change, because weights/shapes was trained on them."""
    (object,) = scene(0, count=1).objects
    assert object == ("green", "square", "large", -12, 44, 48)


def test_scenes_have_one_to_three_objects_and_show_every_kind_of_object_and_background():
    drawn = [scene(i) for i in range(600)]
    assert {len(s.objects) for s in drawn} == {1, 2, 3}
    assert {len(scene(i, count=2).objects) for i in range(20)} == {2}
    objects = [o for s in drawn for o in s.objects]
    assert {(o.colour, o.shape) for o in objects} == set(SEEN)
    assert {o.size for o in objects} == {"small", "plain", "large"}
    assert {s.background.kind for s in drawn} == set(world.BACKGROUNDS)


def test_masks_contain_exactly_the_pixels_of_the_objects(scenes):
    """A pixel belongs to a mask if the object covers at least half of the pixel."""
    for s in scenes:
        picture, masks = draw(s)
        assert picture.size == (64, 64) and picture.mode == "RGB"
        assert masks.shape == (len(s.objects), 64, 64) and masks.dtype == bool
        assert masks.sum(axis=0).max() == 1  # no object covers another
        pixels, behind = np.array(picture).astype(float), paint(s.background).astype(float)
        rest = np.full((64, 64), True)
        for object, mask in zip(s.objects, masks, strict=True):
            way = COLOURS[object.colour] - behind  # a pixel is `behind + cover * way`
            cover = ((pixels - behind) * way).sum(axis=2) / (way**2).sum(axis=2)
            near = dilated(mask)
            assert abs(pixels - behind - cover[:, :, None] * way)[near].max() < 1  # no third colour
            assert (mask == (cover >= 0.5))[near & (abs(cover - 0.5) > 0.02)].all()
            assert (cover[mask] > 0.99).mean() > 0.4
            rest &= ~dilated(near)
        assert abs(pixels - behind)[rest].max() <= 0.5  # rounding


def dilated(mask):
    padded = np.pad(mask, 1)
    return np.any([padded[y : y + 64, x : x + 64] for y in range(3) for x in range(3)], axis=0)


def test_masks_have_the_size_and_the_place_of_the_object(scenes):
    for s in scenes:
        for object, mask in zip(s.objects, draw(s)[1], strict=True):
            rows, columns = np.nonzero(mask)
            away = np.hypot(columns + 0.5 - object.x, rows + 0.5 - object.y)
            radius = world.RADII[object.size]
            assert radius - 2 < away.max() < radius + 1


def test_colours_are_far_from_each_other_and_from_every_background():
    ours = np.array(list(COLOURS.values()), float)
    apart = np.linalg.norm(ours[:, None] - ours[None], axis=2) + 1e9 * np.eye(len(ours))
    assert apart.min() > 75
    for i in range(100):
        behind = paint(scene(i).background).reshape(-1, 1, 3)
        assert np.linalg.norm(behind - ours, axis=2).min() > 40


# -- captions, read by an independent parser ------------------------------------------------------

BELIEFS = {
    "to the left of": lambda a, b: a[0] < b[0],
    "to the right of": lambda a, b: a[0] > b[0],
    "above": lambda a, b: a[1] < b[1],
    "below": lambda a, b: a[1] > b[1],
}
PLACES = {
    "on the left": lambda a: a[0] < 32,
    "on the right": lambda a: a[0] > 32,
    "at the top": lambda a: a[1] < 32,
    "at the bottom": lambda a: a[1] > 32,
}


@cache
def things_in(s):
    """Return the words and the place of each object in a scene. The colours come from the image,
    the rest from the scene. Another test compares scenes with masks."""
    picture, masks = draw(s)
    pixels, things = np.array(picture), []
    for object, mask in zip(s.objects, masks, strict=True):
        colour = Counter(map(tuple, pixels[mask].tolist())).most_common(1)[0][0]
        name = next(name for name, value in COLOURS.items() if value == colour)
        words = {name, object.shape, object.size}
        things.append((words, (object.x, object.y)))
    return things


def is_true(caption, s):
    """Parse a caption, and return whether it is true of a scene."""
    things = things_in(s)
    if place := next((place for place in PLACES if caption.endswith(f" {place}")), None):
        caption = caption.removesuffix(f" {place}")
        things = [thing for thing in things if PLACES[place](thing[1])]
    relation = next((r for r in BELIEFS if f" {r} " in caption), None)
    parts = re.split(f" {relation} " if relation else ", | and ", caption)
    wanted = [set(part.split()) - {"a", "an", "something"} for part in parts]
    assert all(wanted)
    return any(believes(relation, wanted, chosen) for chosen in arrangements(things, len(wanted)))


def arrangements(things, count):
    if count == 0:
        return [[]]
    return [
        [thing, *rest]
        for i, thing in enumerate(things)
        for rest in arrangements(things[:i] + things[i + 1 :], count - 1)
    ]


def believes(relation, wanted, chosen):
    fit = all(words <= has for words, (has, _) in zip(wanted, chosen, strict=True))
    return fit and (relation is None or BELIEFS[relation](chosen[0][1], chosen[1][1]))


class Caption(NamedTuple):
    text: str
    negatives: list[str]  # false variants of `text`, each with one mistake


def captions(s):
    """Return each true caption of a scene once, with false variants of this caption."""
    claims = dict.fromkeys(claim for kind in (*kinds(s), vague) for claim in kind(s))
    return [
        Caption(say(claim), [say(false) for made in negatives(claim, s).values() for false in made])
        for claim in claims
    ]


@pytest.mark.slow
def test_true_captions_match_the_scene_and_false_captions_do_not(scenes):
    checked = Counter()
    for s in scenes:
        random = Random(str(s.objects))
        said = captions(s)
        assert len({c.text for c in said}) == len(said) > 2
        for caption in random.sample(said, 3):
            assert is_true(caption.text, s), caption
            assert caption.negatives, caption
            false = random.choice(caption.negatives)
            assert not is_true(false, s), (caption.text, false)
            checked[len(caption.text.split())] += 1
    assert len(checked) > 4  # there are captions of many lengths


@pytest.mark.slow
def test_say_something_returns_one_of_the_captions_of_a_scene(scenes):
    for i, s in enumerate(scenes):
        text, negative = say_something(s, Random(i))
        assert negative in dict(captions(s))[text]


# -- a model needs the image to answer ------------------------------------------------------------


def test_training_never_shows_or_names_held_out_pairs_of_colour_and_shape():
    assert len(HELD_OUT) + len(SEEN) == len(COLOURS) * len(SHAPES)
    assert 1 / 8 <= len(HELD_OUT) / 64 <= 1 / 6
    assert {c for c, _ in SEEN} == set(COLOURS) and {s for _, s in SEEN} == set(SHAPES)
    never = re.compile("|".join(f"{colour} {shape}" for colour, shape in HELD_OUT))
    for i in range(300):
        s = scene(i)
        assert not HELD_OUT & {(o.colour, o.shape) for o in s.objects}
        texts = [t for draw in range(5) for t in say_something(s, Random(draw))]
        assert not any(map(never.search, texts))
        assert HELD_OUT >= {(o.colour, o.shape) for o in scene(i, held_out=True).objects}


def test_a_relation_is_used_only_if_the_objects_are_at_least_eight_pixels_apart():
    one = scene(0, count=1).objects[0]
    for distance, expected in ((7, set()), (8, {"to the left of", "to the right of"})):
        other = one._replace(x=one.x + distance)
        found = clear_relations(scene(0)._replace(objects=(one, other)))
        assert {relation for _, _, relation in found} == expected


def test_a_swapped_caption_has_the_same_words_as_the_true_caption():
    for i in range(100):
        s = scene(i, count=2)
        for claim in relations(s):
            for what, made in negatives(claim, s).items():
                assert what in ("places", "colours")
                for false in made:
                    assert words(false) == words(claim)


def words(claim):
    return sorted(say(claim).replace("an ", "a ").split())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["places", "colours"])
def test_no_word_at_any_position_shows_which_caption_is_swapped(what):
    """At each position in a caption, a word is equally frequent in true and in false captions. The
    counts may differ by at most 4.5 standard deviations."""
    true, false = Counter(), Counter()
    for i in range(1500):
        s = scene(i, count=2)
        claim = Random(i).choice(relations(s))
        if made := negatives(claim, s).get(what):
            true.update(enumerate(say(claim).split()))
            false.update(enumerate(say(made[0]).split()))
    assert sum(true.values()) > 5000
    for word in true | false:
        assert abs(true[word] - false[word]) <= 4.5 * (true[word] + false[word]) ** 0.5, word


def test_all_relations_are_equally_frequent():
    """Each object may be named first, so a relation and its opposite are equally frequent."""
    said = Counter(Random(i).choice(relations(scene(i, count=2))).relation for i in range(2000))
    assert all(abs(said[relation] - 500) < 100 for relation in BELIEFS)


# -- the dataset and the score --------------------------------------------------------------------


def test_the_dataset_is_reproducible_and_begins_with_easy_scenes():
    data = Shapes(36)
    order = list(data.items(0))
    assert len(data) == 36 and sorted(order) == list(range(36))
    assert order == list(data.items(0)) != list(data.items(1))
    counts = [len(data.scene(index).objects) for index in order]
    assert counts[:6] == [1] * 6 and counts[6:18] == [2] * 12 and {*counts[18:]} == {1, 2, 3}
    for index in order[:12]:  # lessons 0 and 1: a caption names an object's place if it is clear
        assert data[index, 0].caption.endswith(tuple(PLACES)) or not located(data.scene(index))
    assert any(" the " in data[index, 0].caption for index in order[12:18])
    for index in (35, 12):
        pair = data[index, 0]
        assert pair.pixels.shape == (3, 64, 64) and pair.pixels.dtype == torch.uint8
        picture, _ = draw(data.scene(index))
        assert np.array_equal(pair.pixels.permute(1, 2, 0).numpy(), np.array(picture))
        assert pair[1:] == data[index, 0][1:]
        assert len({data[index, i].caption for i in range(20)}) > 2, index
    assert all(data[i, 0].caption and data[i, 0].negative for i in range(36))
    with pytest.raises(ValueError, match="score"):
        Shapes(1, seed=SCORE_SEED)


@pytest.fixture(scope="module")
def new():
    """The model, tokenizer, transform and recipe before training on drawn shapes."""
    return set_up("shapes")


@pytest.mark.slow
def test_the_tokenizer_encodes_each_word_of_a_caption_as_one_token(new):
    words = {*COLOURS, *SHAPES, "small", "large", "something", "left", "above", "bottom"}
    assert [word for word in words if len(new.tokenizer.encode(word)) > 1] == []


@pytest.mark.slow
def test_a_new_run_has_the_shape_and_recipe_and_transform_of_the_embedded_checkpoint(new):
    assert new.transform == ImageTransform.from_pretrained("shapes") != ImageTransform(64)
    assert new.recipe == read_recipe(resolve("shapes", "recipe") / "recipe.json")
    theirs = CLIP.from_pretrained("shapes").config
    assert new.model.config.vision == theirs.vision
    assert new.model.config.text.context_length == theirs.text.context_length


class Knowing:
    """A fake model. An embedding has one number for each scene. The number is 1 if the image shows
    this scene, or if the text is true of this scene. Otherwise it is 0."""

    logit_scale = torch.tensor(0.0)

    def __init__(self, scenes, believes=is_true):
        self.scenes, self.believes = scenes, believes
        self.places = {draw(s)[0].tobytes(): i for i, s in enumerate(scenes)}

    def eval(self):
        self.is_training = False

    def tokenize(self, texts):
        self.texts = texts
        return torch.arange(len(texts))

    def transform(self, pictures):
        return torch.tensor([self.places[picture.tobytes()] for picture in pictures])

    def encode_text(self, ids, normalize):
        return torch.tensor(
            [[float(self.believes(self.texts[i], s)) for s in self.scenes] for i in ids]
        )

    def encode_image(self, places, normalize):
        return torch.eye(len(self.scenes))[places]

    def score(self):
        return score(self, self.tokenize, self.transform, scenes=12)


def test_each_score_measures_one_kind_of_knowledge():
    """One model knows everything. The remaining models lack one kind of knowledge each. If a true
    and a false caption get equal cosines, the score is 0."""
    seed = 2021  # no training set uses this seed
    single = [scene(i, seed=seed, held_out=h, count=1) for h in (False, True) for i in range(12)]
    scenes = single + [scene(i, seed=seed, count=2) for i in range(12)]
    assert Knowing(scenes).score() == (1, 1, 1, 1, 1, 1)

    def no_new_pair(text, s):
        return is_true(text, s) and not HELD_OUT & {(o.colour, o.shape) for o in s.objects}

    def no_left(text, s):
        # this model believes every caption with "left of a" or "right of a"
        return " of a" in text or is_true(text, s)

    def no_colour(text, s):
        return len(s.objects) > 1 or is_true(text, s)

    assert Knowing(scenes, no_new_pair).score() == (1, scores_by_chance(scenes), 1, 1, 1, 1)
    seen, unseen, relations, left_right, above_below, binding = Knowing(scenes, no_left).score()
    assert (seen, unseen, left_right, above_below) == (1, 1, 0, 1) and 0 < relations < 1
    assert Knowing(scenes, no_colour).score() == (1, 1, 0, 0, 0, 0)


def scores_by_chance(scenes):
    """Return how often "red circle" is right. It is chosen if all 64 cosines are equal."""
    return sum(s.objects[0][:2] == ("red", "circle") for s in scenes[12:24]) / 12


# The areas of the shapes in a circle of radius 1. The areas of heart and moon were measured once.
STAR = 10 / 2 * 0.42 * math.sin(math.tau / 10)
CROSS = 4 * (0.94 - 0.32) * 2 * 0.32 + (2 * 0.32) ** 2
AREAS = {
    "circle": math.pi * 0.9**2,
    "square": 2,
    "triangle": 27**0.5 / 4,
    "star": STAR,
    "cross": CROSS,
    "ring": math.pi * (0.95**2 - 0.5**2),
    "heart": 1.649,
    "moon": 1.302,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_drawn_shape_has_the_expected_area(shape):
    for tilt in world.TILTS:
        area = world.sprite(shape, 13, tilt).sum() / 13**2
        assert area == pytest.approx(AREAS[shape], rel=0.03)


def test_scenes_and_captions_and_the_dataset_are_the_same_on_every_machine():
    """These checksums were recorded once. If the scenes changed, all scores would change."""
    which = product(range(40), (0, 5), (False, True), (None, 2))
    scenes = [scene(i, seed=seed, held_out=h, count=count) for i, seed, h, count in which]
    said = [say_something(s, Random(i), i // 2 % 4 if i % 2 else 3) for i, s in enumerate(scenes)]
    data = Shapes(60)
    world = [scenes, said, [captions(s) for s in scenes[:10]], list(data.items(3))]
    world += [[data.scene(i) for i in range(60)], [data[i, i][1:] for i in range(60)], COLOURS]
    assert [crc32(repr(part).encode()) for part in world] == [
        3256000819,
        1060013200,
        2135397439,
        481254052,
        2448789420,
        2939645875,
        279342419,
    ]


def test_a_model_that_knows_nothing_scores_at_chance_level():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(Shapes(100).captions(), 600)
    model = CLIP(small(tokenizer))
    scores = score(model, tokenizer, ImageTransform(64), scenes=40)
    assert scores.seen < 0.2 and scores.unseen < 0.2
    assert all(0.15 < share < 0.85 for share in (scores.relations, scores.binding))


def small(tokenizer):
    vision = replace(TINY.vision, image_size=64, patch_size=8)
    text = replace(
        TINY.text,
        vocab_size=tokenizer.vocab_size,
        context_length=20,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return replace(TINY, vision=vision, text=text)
