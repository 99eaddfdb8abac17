"""Captions that are true of a scene by proof, and false ones."""

from collections.abc import Callable
from itertools import combinations, permutations, product
from random import Random
from typing import NamedTuple

from miniclip.world.scenes import (
    CLEAR,
    COLOURS,
    HELD_OUT,
    IMAGE_SIZE,
    SHAPES,
    Object,
    Scene,
)

RELATIONS = {  # of two objects: the axis, and the sign of the second's place minus the first's
    "to the left of": ("x", 1),
    "to the right of": ("x", -1),
    "above": ("y", 1),
    "below": ("y", -1),
}

PLACES = {  # of one object: the same, the middle of the picture standing for the second
    "on the left": ("x", 1),
    "on the right": ("x", -1),
    "at the top": ("y", 1),
    "at the bottom": ("y", -1),
}

OPPOSITE = dict(zip(PLACES, ("on the right", "on the left", "at the bottom", "at the top")))


class Phrase(NamedTuple):
    """Words for one object. What is "" is left unsaid."""

    size: str
    colour: str
    shape: str


class Claim(NamedTuple):
    """What a caption says: there are these different objects, and the first stands so to the other.

    `relation` is a key of RELATIONS between two phrases, a key of PLACES after one, or "" with any
    number of them.
    """

    relation: str
    phrases: tuple[Phrase, ...]


def say(claim: Claim) -> str:
    """The claim in English.

    >>> red, blue = Phrase("", "red", "circle"), Phrase("small", "blue", "square")
    >>> say(Claim("to the left of", (red, blue)))
    'a red circle to the left of a small blue square'
    >>> say(Claim("", (Phrase("", "", "star"), red, Phrase("", "orange", ""))))
    'a star, a red circle and something orange'
    >>> say(Claim("at the top", (red,)))
    'a red circle at the top'
    """
    *most, last = map(say_phrase, claim.phrases)
    if not most:
        return f"{last} {claim.relation}".rstrip()
    return f"{', '.join(most)} {claim.relation or 'and'} {last}"


def say_phrase(phrase: Phrase) -> str:
    """The words for one object: "a large green star", "something red"."""
    words = " ".join(word for word in phrase if word)
    if not phrase.shape:
        return f"something {words}"
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def holds(claim: Claim, scene: Scene) -> bool:
    """Whether the claim is true: some choice of different objects fits its phrases and relation."""
    return any(
        all(map(fits, claim.phrases, chosen))
        and (not claim.relation or apart(claim.relation, *chosen) > 0)
        for chosen in permutations(scene.objects, len(claim.phrases))
    )


def fits(phrase: Phrase, object: Object) -> bool:
    """Whether all that the phrase says of an object is true of it."""
    return all(
        said in ("", true)
        for said, true in zip(phrase, (object.size, object.colour, object.shape), strict=True)
    )


def apart(relation: str, first: Object, second: Object | None = None) -> int:
    """How clearly the relation holds: pixels between the centres; negative where it is reversed."""
    axis, sign = (RELATIONS | PLACES)[relation]
    there = getattr(second, axis) if second else IMAGE_SIZE // 2
    return sign * (there - getattr(first, axis))


def singles(scene: Scene) -> list[Claim]:
    """Of one object: "a green star", "a large green star"."""
    return [Claim("", (phrase,)) for object in scene.objects for phrase in named(object)]


def located(scene: Scene) -> list[Claim]:
    """Of one object's place: "a green star at the top"."""
    return [
        Claim(place, (phrase,))
        for object in scene.objects
        for place in PLACES
        if apart(place, object) >= CLEAR
        for phrase in named(object)
    ]


def relations(scene: Scene) -> list[Claim]:
    """Of two objects' places: "a red circle to the left of a small blue square"."""
    return [
        Claim(relation, pair)
        for a, b, relation in clear_relations(scene)
        for pair in product(named(a), named(b))
    ]


def lists(scene: Scene) -> list[Claim]:
    """Of all objects: "a red circle, a blue square and a green star", in any order."""
    return [
        Claim("", tuple(Phrase("", object.colour, object.shape) for object in order))
        for order in permutations(scene.objects)
    ]


def vague(scene: Scene) -> list[Claim]:
    """Of a colour or a shape alone: "something red", "a star above a heart"."""

    def parts(object: Object) -> tuple[Phrase, Phrase]:
        return Phrase("", object.colour, ""), Phrase("", "", object.shape)

    alone = [Claim("", (part,)) for object in scene.objects for part in parts(object)]
    return alone + [
        Claim(relation, pair)
        for a, b, relation in clear_relations(scene)
        for pair in zip(parts(a), parts(b), strict=True)
        if pair[0] != pair[1]
    ]


Kind = Callable[[Scene], list[Claim]]


def kinds(scene: Scene) -> tuple[Kind, ...]:
    """What may be said of a scene, each true, in words that name colour and shape.

    Relations come twice, because they are the hardest to learn.
    """
    several = (relations, relations, lists) if len(scene.objects) > 1 else ()
    return (singles, *((located,) if located(scene) else ()), *several)


def clear_relations(scene: Scene) -> list[tuple[Object, Object, str]]:
    """Every (a, b, relation) of two objects that is as clear as CLEAR asks."""
    return [
        (a, b, relation)
        for a, b in permutations(scene.objects, 2)
        for relation in RELATIONS
        if apart(relation, a, b) >= CLEAR
    ]


def named(object: Object) -> list[Phrase]:
    """By colour and shape, and with the size where there is a word: "plain" is left unsaid."""
    sizes = ("",) if object.size == "plain" else ("", object.size)
    return [Phrase(size, object.colour, object.shape) for size in sizes]


def negatives(claim: Claim, scene: Scene) -> dict[str, list[Claim]]:
    """Claims that are false of the scene and differ from a true one in one thing, by that thing.

    Two objects change "places", or their "colours": a false caption of the same words as the true
    one. One object's place becomes the opposite. Where there is nothing to swap or to move, one
    word becomes another: a "size", a "colour", a "shape".
    None names a held-out pair, unless `claim` does.
    """
    opposite = OPPOSITE.get(claim.relation)
    made = swaps(claim) if len(claim.phrases) > 1 else {}
    if opposite:
        made = {"places": [claim._replace(relation=opposite)]}
    known = {(p.colour, p.shape) for p in claim.phrases}

    def fair(claim: Claim) -> bool:
        unknown = {(p.colour, p.shape) for p in claim.phrases} & HELD_OUT - known
        return not unknown and not holds(claim, scene)

    for claims in (made, replacements(claim)):
        false = {what: [c for c in some if fair(c)] for what, some in claims.items()}
        if any(false.values()):
            break
    return {what: some for what, some in false.items() if some}


def swaps(claim: Claim) -> dict[str, list[Claim]]:
    """Every two phrases change places, or their colours alone."""
    made: dict[str, list[Claim]] = {"places": [], "colours": []}
    for i, j in combinations(range(len(claim.phrases)), 2):
        a, b = claim.phrases[i], claim.phrases[j]
        made["places"].append(changed(claim, {i: b, j: a}))
        recoloured = {i: a._replace(colour=b.colour), j: b._replace(colour=a.colour)}
        made["colours"].append(changed(claim, recoloured))
    return made


def changed(claim: Claim, phrases: dict[int, Phrase]) -> Claim:
    """The claim with other phrases in some positions."""
    return claim._replace(
        phrases=tuple(phrases.get(i, phrase) for i, phrase in enumerate(claim.phrases))
    )


WORDS = {"size": ("small", "large"), "colour": tuple(COLOURS), "shape": SHAPES}


def replacements(claim: Claim) -> dict[str, list[Claim]]:
    """Every word that is said becomes every other word of its sort."""
    made: dict[str, list[Claim]] = {what: [] for what in WORDS}
    for i, phrase in enumerate(claim.phrases):
        for what, words in WORDS.items():
            for word in words if getattr(phrase, what) else ():
                made[what].append(changed(claim, {i: phrase._replace(**{what: word})}))
    return made


def say_something(scene: Scene, random: Random, lesson: int = 3) -> tuple[str, str]:
    """A caption of the scene and a false one.

    In the first lessons, 0 and 1, objects are named with their places, in the next with what they
    stand beside as well. After these anything is said. One caption in five is then vague, so that
    each word is learnt by itself. The others name what they speak of, because that teaches more:
    "something red" is true of every third picture of a batch.
    """
    places: Kind = located if located(scene) else singles
    if lesson < 2:
        kind = places
    elif lesson == 2:
        kind = random.choice((places, relations, relations))
    else:
        kind = vague if random.random() < 0.2 else random.choice(kinds(scene))
    claim = random.choice(kind(scene))
    false = random.choice(random.choice(list(negatives(claim, scene).values())))
    return say(claim), say(false)
