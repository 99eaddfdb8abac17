"""Captions that are provably true of a scene, and captions that are false."""

from collections.abc import Callable
from itertools import combinations, permutations, product
from random import Random
from typing import NamedTuple

from miniclip.world.scenes import CLEAR, COLOURS, HELD_OUT, IMAGE_SIZE, SHAPES, Object, Scene

RELATIONS = {  # name: (axis, sign). True if sign * (second object - first object) > 0 on the axis
    "to the left of": ("x", 1),
    "to the right of": ("x", -1),
    "above": ("y", 1),
    "below": ("y", -1),
}

PLACES = {  # name: (axis, sign). True if sign * (middle of the image - object) > 0 on the axis
    "on the left": ("x", 1),
    "on the right": ("x", -1),
    "at the top": ("y", 1),
    "at the bottom": ("y", -1),
}

OPPOSITE = dict(zip(PLACES, ("on the right", "on the left", "at the bottom", "at the top")))


class Phrase(NamedTuple):
    """The words for one object. An empty word is left out of the caption."""

    size: str
    colour: str
    shape: str


class Claim(NamedTuple):
    """The meaning of a caption. The caption is true if each phrase fits a different object and the
    objects' relation holds.

    `relation` is a key of RELATIONS for two phrases, a key of PLACES for one phrase, or "".
    """

    relation: str
    phrases: tuple[Phrase, ...]


def say(claim: Claim) -> str:
    """Return the claim in English.

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
    """Return the words for one object: "a large green star", "something red"."""
    words = " ".join(word for word in phrase if word)
    if not phrase.shape:
        return f"something {words}"
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def holds(claim: Claim, scene: Scene) -> bool:
    """Return whether each phrase fits a different object and the objects' relation is true."""
    return any(
        all(map(fits, claim.phrases, chosen))
        and (not claim.relation or apart(claim.relation, *chosen) > 0)
        for chosen in permutations(scene.objects, len(claim.phrases))
    )


def fits(phrase: Phrase, object: Object) -> bool:
    """Return whether every word of the phrase is true of an object."""
    true = (object.size, object.colour, object.shape)
    return all(said in ("", word) for said, word in zip(phrase, true, strict=True))


def apart(relation: str, first: Object, second: Object | None = None) -> int:
    """Return a distance in pixels along the relation's axis, above 0 if the relation is true."""
    axis, sign = (RELATIONS | PLACES)[relation]
    there = getattr(second, axis) if second else IMAGE_SIZE // 2
    return sign * (there - getattr(first, axis))


def singles(scene: Scene) -> list[Claim]:
    """Claims about one object: "a green star", "a large green star"."""
    return [Claim("", (phrase,)) for object in scene.objects for phrase in named(object)]


def located(scene: Scene) -> list[Claim]:
    """Claims about the place of one object: "a green star at the top"."""
    return [
        Claim(place, (phrase,))
        for object in scene.objects
        for place in PLACES
        if apart(place, object) >= CLEAR
        for phrase in named(object)
    ]


def relations(scene: Scene) -> list[Claim]:
    """Claims about the places of two objects: "a red circle to the left of a small blue square"."""
    return [
        Claim(relation, pair)
        for a, b, relation in clear_relations(scene)
        for pair in product(named(a), named(b))
    ]


def lists(scene: Scene) -> list[Claim]:
    """Claims about all objects: "a red circle, a blue square and a green star", in any order."""
    return [
        Claim("", tuple(Phrase("", object.colour, object.shape) for object in order))
        for order in permutations(scene.objects)
    ]


def vague(scene: Scene) -> list[Claim]:
    """Claims about a colour or a shape alone: "something red", "a star above a heart"."""

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
    """Return the functions that describe a scene's objects by both colour and shape.

    For several objects, `relations` is in the result twice, because relations are the hardest to
    learn.
    """
    several = (relations, relations, lists) if len(scene.objects) > 1 else ()
    return (singles, *((located,) if located(scene) else ()), *several)


def clear_relations(scene: Scene) -> list[tuple[Object, Object, str]]:
    """Return each true (a, b, relation) with a and b at least CLEAR pixels apart along its axis."""
    return [
        (a, b, relation)
        for a, b in permutations(scene.objects, 2)
        for relation in RELATIONS
        if apart(relation, a, b) >= CLEAR
    ]


def named(object: Object) -> list[Phrase]:
    """Name an object by colour and shape, and also with its size unless the size is "plain"."""
    sizes = ("",) if object.size == "plain" else ("", object.size)
    return [Phrase(size, object.colour, object.shape) for size in sizes]


def negatives(claim: Claim, scene: Scene) -> dict[str, list[Claim]]:
    """Make false claims from a true claim, grouped by what was changed.

    Two objects exchange their "places" or "colours", so the false caption has the same words. If
    the claim is about the place of one object, the false claim has the opposite place. If these
    changes give no false claim, one word is replaced: a "size", "colour" or "shape". A false claim
    contains a held-out pair only if the true claim contains this pair too.
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
    """For each pair of phrases of a claim, exchange the two phrases, or only their colours."""
    made: dict[str, list[Claim]] = {"places": [], "colours": []}
    for i, j in combinations(range(len(claim.phrases)), 2):
        a, b = claim.phrases[i], claim.phrases[j]
        made["places"].append(changed(claim, {i: b, j: a}))
        recoloured = {i: a._replace(colour=b.colour), j: b._replace(colour=a.colour)}
        made["colours"].append(changed(claim, recoloured))
    return made


def changed(claim: Claim, phrases: dict[int, Phrase]) -> Claim:
    """Replace some phrases of a claim. `phrases` maps positions to new phrases."""
    old = enumerate(claim.phrases)
    return claim._replace(phrases=tuple(phrases.get(i, phrase) for i, phrase in old))


WORDS = {"size": ("small", "large"), "colour": tuple(COLOURS), "shape": SHAPES}


def replacements(claim: Claim) -> dict[str, list[Claim]]:
    """Replace one word of a claim at a time, by each word of the same kind."""
    made: dict[str, list[Claim]] = {what: [] for what in WORDS}
    for i, phrase in enumerate(claim.phrases):
        for what, words in WORDS.items():
            for word in words if getattr(phrase, what) else ():
                made[what].append(changed(claim, {i: phrase._replace(**{what: word})}))
    return made


def say_something(scene: Scene, random: Random, lesson: int = 3) -> tuple[str, str]:
    """Return a true and a false caption of a scene.

    In lessons 0 and 1, a caption names one object, with its place if the place is clear. In lesson
    2, a caption may state a relation of two objects. After the lessons, a caption may be any claim.
    One caption in five is then vague, so that a model also learns each word alone. A larger share
    of vague captions would teach little, because "something red" is true of one image in four.
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
