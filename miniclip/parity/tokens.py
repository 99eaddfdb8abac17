"""The first stage of a comparison: run two tokenizers on words and on texts that test each step."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miniclip.parity.report import NAMES, Stage, exact_difference, run_both
from miniclip.text.openai import clean_openai
from miniclip.tokenizer import Tokenizer

TEXTS = (
    "a photo of a cat",
    "A Photo of THE Cat",
    " two  dogs\tand a\nbird ",
    "it's 12.5% off, isn't it?!",
    "cafe\u0301, naïve ﬁsh",
    "salt &amp; pepper &lt;3",
    "it’s â€œquotedâ€\x9d",
    "猫の写真 🙂👍🏽",
    "before <|endoftext|> after",
    "",
    "a very long text " * 60,
)
"""Each text tests one step of cleaning or splitting. The last text is longer than any context."""

CLEANING: dict[str, Callable[[str], str]] = {
    "lower-casing": lambda text: "".join(c.lower() for c in text),
    "the merging of white space": lambda text: re.sub(r"\s+", " ", text),
    "the joining of letter and accent (NFC)": lambda text: unicodedata.normalize("NFC", text),
    "OpenAI's cleaning (ftfy, html)": clean_openai,
}
"""Steps that one of two tokenizers may lack."""


def cause_in_tokens(
    model: Callable[[Sequence[str]], Tensor],
    other: Callable[[Sequence[str]], Tensor],
    words: Sequence[str] = (),
) -> str:
    """Say why two tokenizers differ on TEXTS, or on the `words` of a vocabulary.

    Both tokenizers return ids (B, T) and truncate long texts.

    >>> from miniclip import Tokenizer
    >>> one = Tokenizer.from_pretrained("everyday", reference="transformers")
    >>> other = Tokenizer.from_pretrained("everyday", reference="openai")
    >>> cause_in_tokens(lambda t: one(t, truncate=True), lambda t: other(t, truncate=True))
    "model lacks OpenAI's cleaning (ftfy, html)"
    """
    ours, theirs = model(TEXTS).tolist(), other(TEXTS).tolist()
    if ours == theirs:
        pairs = zip(words, model(words).tolist(), other(words).tolist())
        return f"different ids for the word {next(w for w, *ids in pairs if ids[0] != ids[1])!r}"
    one, two = _without_padding(ours), _without_padding(theirs)
    lengths = (len(ours[0]), len(theirs[0]))
    short = min(lengths) - 1  # leave out the end token at the end of a truncated row
    if max(lengths) > min(lengths) and [r[:short] for r in one] == [r[:short] for r in two]:
        return f"rows of {lengths[0]} ids in model, {lengths[1]} in other"
    if one == two:
        return f"padding with {ours[0][-1]} in model, {theirs[0][-1]} in other"
    for fault, clean in CLEANING.items():
        texts = [clean(text) for text in TEXTS]
        for name, found, expected in zip(NAMES, (model, other), (two, one)):
            if _without_padding(found(texts).tolist()) == expected:
                return f"{name} lacks {fault}"
    for word, position in (("start", 0), ("end", -1)):
        for mine, yours in zip(one, two):
            if (a := mine[position]) != (b := yours[position]):
                return f"the {word} token is {a} in model, {b} in other"
    text = next(text for text, *rows in zip(TEXTS, one, two) if rows[0] != rows[1])
    return f"different ids for the text {text[:30]!r}"


def _without_padding(rows: list[list[int]]) -> list[list[int]]:
    """Cut each row after its end token. The second id of the empty text is the end token's id."""
    end = rows[TEXTS.index("")][1]
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def compare_tokenizers(ours: Tokenizer, theirs: Tokenizer) -> Stage:
    """Return one row for the ids of all texts and words, and the cause if the ids differ."""
    one, other = (partial(tokenizer, truncate=True) for tokenizer in (ours, theirs))
    words = _words(ours, theirs)

    def ids_of(tokenizer: Callable[[Sequence[str]], Tensor]) -> Tensor:
        return torch.cat([tokenizer(t).flatten() for t in (TEXTS, words) if t])

    found, raised = run_both(ids_of, one, other)
    if raised:
        return [exact_difference("tokens")], raised
    row = exact_difference("tokens", *found)
    if not row.within_tolerance:
        return [row], cause_in_tokens(one, other, words)
    # If two merges are in the wrong order, few words get other ids, and often no word of the
    # vocabulary does. So the merges are compared too.
    merges = [getattr(tokenizer, "merges", []) for tokenizer in (ours, theirs)]
    for rank, (mine, yours) in enumerate(zip(*merges)):
        if mine != yours:
            cause = f"merge {rank} is {' '.join(mine)!r} in model, {' '.join(yours)!r} in other"
            return [exact_difference("tokens")], cause
    return [row], None


def _words(*tokenizers: Any) -> list[str]:
    """Return the words of the vocabularies, and many characters.

    For each character c, add c, c + "a" and c + "~". Some tokens are only a part of a character.
    The added characters test such tokens. The words come only from miniclip's Tokenizer.
    transformers' tokenizer for the same checkpoint has the same words.
    """
    known = [tokenizer for tokenizer in tokenizers if isinstance(tokenizer, Tokenizer)]
    words = [t.decode([i]) for t in known for i in range(t.vocab_size)]
    places = (range(0x21, 0x800), range(0x800, 0xD800, 0x1000), range(0xE000, 0x110000, 0x1000))
    characters = [chr(place) for part in places for place in part] if known else []
    ends = [character + end for character in characters for end in ("", "a", "~")]
    text = (word for word in words if "\N{REPLACEMENT CHARACTER}" not in word)
    return [*dict.fromkeys([*text, *ends])]
