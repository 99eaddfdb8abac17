"""Compare the tokenizer with its two references, transformers and OpenAI, id for id.

Most tests train a small vocabulary. Some also need CLIP's vocabulary, from the test data.
"""

import gzip
import html
import json
import pickle
import random
import re
import shutil
import unicodedata
from functools import cache
from pathlib import Path

import ftfy
import numpy as np
import pytest
import regex
import torch
from tokenizers import Regex, normalizers
from transformers import CLIPTokenizer

from miniclip import tokenizer as module
from miniclip.config import TextConfig
from miniclip.errors import CheckpointError, ContextLengthError
from miniclip.files.checks import REFERENCES
from miniclip.files.hub import OPENAI_VOCABULARY, commit_of
from miniclip.text import unicode
from miniclip.text.chunks import RememberedChunks
from miniclip.text.merge import learn_merges
from miniclip.text.openai import clean_openai
from miniclip.text.symbols import BOS, EOS, byte_symbols
from miniclip.tokenizer import (
    Tokenizer,
    clean_transformers,
    merge_steps,
    split_transformers,
    to_symbols,
)

# ---- texts -------------------------------------------------------------------------------------

WORDS = """a photo of the cat's dog, riding two big RED horses and people in street; it's they've
I'LL don't we'd you're She'M 2024 3.14 100% state-of-the-art (really?) C++ #tag e-mail""".split()

SCRIPTS = {
    "latin": "éÉñÑßẞœŒøØåÅçÇÿŸŁłĐđǅǆſŉ",
    "greek": "ΣσςΑαΆάΒΟΔΌΣ",
    "turkish": "İIıi",
    "cyrillic": "ЖжЩщЁёЙй",
    "marks": "e\u0301a\u0308n\u0303o\u0323\u0302\u0345\u0338\u0327I\u0307",
    "cjk": "猫犬生活的真谛是寫真ひらがなカタカナ한국어각",
    "thai": "แมวนอนอยู่",
    "devanagari": "हिन्दी बिल्ली क़",
    "arabic": "قطة جميلة ﷺ٣٤",
    "emoji": "😂👍🏽👩‍👩‍👧‍👦🏳️‍🌈❤️🧙🏻‍♂️🇨🇭1️⃣",
    "control": "\x00\x01\x07\x0b\x0c\x1b\x1c\x1d\x1e\x1f\x7f\x80\x85\x9f\t\n\r",
    "spaces": " \u00a0\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000",
    "zero width": "\ufeff\u200b\u200c\u200d\u2060\u00ad\u180e\ufe0f\ufffd",
    "full width": "ＡＢＣ　ｃａｔ１２３～！",
    "ligatures": "ﬁﬂﬀﬆĳ",
    "numbers": "²½Ⅷ①٣๓〇৪",
    "apostrophes": "'’‘`´ʼ＇\u2032",
    "new": "\u1c89\ua7da\u0897\U00016d67\U00010d50\U0001e6c0\U00011930\U000105d2",
}
PHRASES = [
    *("&amp;", "&amp;amp;", "&lt;p&gt;", "&eacute;", "&#39;", "&#x1F600;", "&nbsp;", "&copy", "&"),
    *(
        "cafÃ©",
        "donâ€™t",
        "â€œquotedâ€\x9d",
        "ðŸ˜€",
        "Ã¼ber",
        "lâ€™HumanitÃ©",
        "\u2018it\u2019s\u2019",
    ),
    *("'S", "'LL", "'ſ", "it'ſ", "''s", "'re've", "?'s", "K\u212a", "\u2126", "\u1e9e", "\u0130'S"),
    *(BOS, EOS, BOS.upper(), EOS.upper(), "<|StartOfText|>", "<|ſtartoftext|>", "<|endoftext|>>"),
    *(
        "<<|endoftext|>",
        "<|ENDOFTEXT|>>",
        EOS + EOS,
        "a" + EOS + "b",
        "<|end\u200boftext|>",
        "</w>",
    ),
    *("<|startoftext", "ΟΔΟΣ", "Σ", "ΑΣ\u0301", "ΑΣ'Σ", "\x1b[31mred\x1b[0m", "a\r\nb", "a\u2028b"),
]


def random_text(rng: random.Random) -> str:
    """Join one to six random pieces, such as words, letters of one script, phrases or ASCII."""
    pieces = []
    for _ in range(rng.randint(1, 6)):
        kind = rng.randrange(10)
        if kind < 3:
            pieces.append(" ".join(rng.choices(WORDS, k=rng.randint(1, 4))))
        elif kind < 6:
            script = SCRIPTS[rng.choice(list(SCRIPTS))]
            pieces.append("".join(rng.choices(script, k=rng.randint(1, 8))))
        elif kind < 8:
            pieces.append(rng.choice(PHRASES))
        elif kind == 8:
            pieces.append("".join(chr(rng.randint(0x20, 0x7E)) for _ in range(rng.randint(1, 12))))
        else:
            ends = rng.choice([0x250, 0x3000, 0xD800, 0x20000])
            pieces.append("".join(chr(rng.randrange(ends)) for _ in range(rng.randint(1, 4))))
    text = rng.choice(["", " ", " ", "  "]).join(pieces)
    return "".join(c for c in text if not 0xD800 <= ord(c) < 0xE000)


@cache
def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["", " ", *PHRASES, *SCRIPTS.values(), *(random_text(rng) for _ in range(count))]


def long_words() -> list[str]:
    rng = random.Random(1)
    return [
        "a" * 10_000,
        "".join(rng.choices("etaoinshrdlu", k=10_000)),
        "".join(rng.choices(SCRIPTS["cjk"] + SCRIPTS["arabic"], k=10_000)),
        "".join(rng.choices("!?.*'", k=10_000)),
    ]


# ---- the two references ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    Tokenizer.train(texts(1000, seed=7), 1500).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["trained", "real"])
def folder(request) -> Path:
    """A directory with vocab.json and merges.txt."""
    if request.param == "trained":
        return request.getfixturevalue("trained")
    return request.getfixturevalue("data") / "vocab"


@cache
def transformers_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


def transformers_ids(folder: Path, some: list[str]) -> list[list[int]]:
    return transformers_tokenizer(folder)(some, add_special_tokens=False)["input_ids"]


def different(ours: Tokenizer, folder: Path, some: list[str]) -> list[str]:
    """Return the texts for which `ours` and transformers give different ids."""
    expected = transformers_ids(folder, some)
    return [text for text, ids in zip(some, expected) if ours.encode(text) != ids]


class OpenAI:
    """OpenAI's clip/simple_tokenizer.py, rewritten for these tests without any of our code."""

    def __init__(self, folder: Path) -> None:
        self.ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")[1:]
        self.ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
        keep = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
        drop = [b for b in range(256) if b not in keep]
        self.letter = {b: chr(b) for b in keep} | {b: chr(256 + n) for n, b in enumerate(drop)}
        self.pattern = regex.compile(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )
        self.done = {BOS: [BOS], EOS: [EOS]}

    def bpe(self, word: str) -> list[str]:
        if word not in self.done:
            parts = [self.letter[b] for b in word.encode("utf-8")]
            parts[-1] += "</w>"
            while True:
                ranked = [self.ranks.get(pair, 1e9) for pair in zip(parts, parts[1:])]
                if not ranked or min(ranked) == 1e9:
                    break
                first, second = parts[(i := ranked.index(min(ranked)))], parts[i + 1]
                new = []
                for part in parts:
                    if new and new[-1] is not None and (new[-1], part) == (first, second):
                        new[-1:] = [first + second, None]  # None keeps the next part separate
                    else:
                        new.append(part)
                parts = [part for part in new if part is not None]
            self.done[word] = parts
        return self.done[word]

    def encode(self, text: str) -> list[int]:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = regex.sub(r"\s+", " ", text).strip().lower()
        return [self.ids[token] for word in self.pattern.findall(text) for token in self.bpe(word)]


# ---- ids ---------------------------------------------------------------------------------------


# The number of random texts. Other tests compare every code point.
HOW_MANY = [1000, pytest.param(10_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", HOW_MANY)
def test_texts_have_the_ids_of_transformers(folder, count):
    assert different(Tokenizer.from_directory(folder), folder, texts(count)) == []


@pytest.mark.parametrize("count", HOW_MANY)
def test_texts_have_the_ids_of_openai(folder, count):
    ours, theirs = Tokenizer.from_directory(folder, reference="openai"), OpenAI(folder)
    assert [t for t in texts(count) if ours.encode(t) != theirs.encode(t)] == []


def test_words_of_10000_characters_have_the_ids_of_the_reference(trained):
    words = long_words()
    assert different(Tokenizer.from_directory(trained), trained, words) == []
    ours, theirs = Tokenizer.from_directory(trained, reference="openai"), OpenAI(trained)
    short = [word[:1000] for word in words]  # the reference takes quadratic time
    assert all(ours.encode(word) == theirs.encode(word) for word in short)


def test_the_tokenizer_reproduces_the_recorded_ids_of_other_projects(data):
    """transformers gives the recorded ids for all 80 records. OpenAI's code gives them for 78."""
    entries = json.loads((data / "golden" / "tokenizer_golden.json").read_text(encoding="utf-8"))
    assert len(entries) == 80
    wrong = {"transformers": [], "openai": []}
    for reference, field in (("transformers", "hf_fast_match"), ("openai", "openai_match")):
        ours = Tokenizer.from_directory(data / "vocab", reference=reference)
        for entry in entries:
            ids = ours.encode(entry["text"])
            if entry["kind"] == "hf" and entry["ids"][0] == ours.bos_token_id:
                ids = [ours.bos_token_id, *ids, ours.eos_token_id]
            assert (ids == entry["ids"]) == entry[field], entry["source"]
            wrong[reference] += [] if entry[field] else [entry["text"]]
    assert (len(wrong["transformers"]), len(wrong["openai"])) == (0, 2)


CONTEXTS = ["a{}b", "{0}{0}", "e\u0323{}\u0302", "a\u0345{}", "Σ{}"]


@pytest.mark.parametrize(
    "context", ["{}", *(pytest.param(c, marks=pytest.mark.slow) for c in CONTEXTS)], ids=ascii
)
def test_every_code_point_is_cleaned_as_transformers_cleans_it(context, trained):
    theirs = transformers_tokenizer(trained).backend_tokenizer.normalizer
    different = []
    for first in range(0, 0x110000, 0x800):
        if first != 0xD800:
            text = " ".join(context.format(chr(c)) for c in range(first, first + 0x800))
            if clean_transformers(text) != theirs.normalize_str(text):
                different.append(hex(first))
    assert different == []


@pytest.mark.parametrize(
    ("theirs", "ours"), [(r"\p{L}", "LETTER"), (r"\p{N}", "NUMBER"), (r"\s", r"\s")]
)
def test_every_code_point_has_the_same_character_class_as_in_transformers(theirs, ours):
    """The word pattern uses only three classes: letters, numbers and whitespace."""
    ours = unicode.word_pattern(ours, "transformers")
    theirs = normalizers.Replace(Regex(theirs), "")
    for first in range(0, 0x110000, 0x800):
        if first != 0xD800:
            text = "".join(map(chr, range(first, first + 0x800)))
            assert ours.sub("", text) == theirs.normalize_str(text), hex(first)


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
def test_every_code_point_has_the_ids_of_the_reference(reference, trained):
    """Each text has 64 neighbouring code points, so that letters or digits can form one token."""
    points = (range(first, first + 64) for first in range(0, 0x110000, 64))
    every = ["".join(map(chr, some)) for some in points if not 0xD800 <= some[0] < 0xE000]
    ours = Tokenizer.from_directory(trained, reference=reference)
    if reference == "transformers":
        assert different(ours, trained, every) == []
    else:
        theirs = OpenAI(trained)
        assert [text for text in every if ours.encode(text) != theirs.encode(text)] == []


# ---- planted mistakes: the comparison notices them ---------------------------------------------

PROBES = ["cafe\u0301", "ΟΔΟΣ ΑΣ", EOS.upper() + ">", "it's 20", "\U0001e6c0a"]


def no_nfc(monkeypatch):
    monkeypatch.setattr(unicodedata, "normalize", lambda form, text: text)


def lower_by_word(monkeypatch):
    monkeypatch.setattr(unicode, "_new_capitals", lambda: {})


def no_second_split(monkeypatch):
    monkeypatch.setattr(module, "BOS", None)
    monkeypatch.setattr(module, "EOS", None)


def numbers_together(monkeypatch):
    pattern = module.WORD.replace("| NUMBER ", "| NUMBER+")
    monkeypatch.setattr(module, "WORD", pattern)


def unicode_of_regex(monkeypatch):
    monkeypatch.setattr(unicode, "TOO_NEW", "a&&b")
    monkeypatch.setattr(module, "word_pattern", unicode.word_pattern.__wrapped__)


@pytest.mark.parametrize(
    ("mutate", "caught_by"),
    [
        (no_nfc, [PROBES[0]]),
        (lower_by_word, [PROBES[1]]),
        (no_second_split, [PROBES[2]]),
        (numbers_together, [PROBES[3]]),
        (unicode_of_regex, [PROBES[4]]),
    ],
)
def test_the_comparison_with_transformers_notices_a_planted_mistake(
    mutate, caught_by, trained, monkeypatch
):
    assert different(Tokenizer.from_directory(trained), trained, PROBES) == []
    mutate(monkeypatch)
    assert different(Tokenizer.from_directory(trained), trained, PROBES) == caught_by


# ---- fast code gives the same result as plain code ---------------------------------------------


def test_merging_with_a_heap_gives_the_same_ids_as_the_bpe_definition(trained):
    tokenizer = Tokenizer.from_directory(trained)
    merge, vocab = tokenizer._merge, tokenizer.vocab
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges)}
    words = [word for t in texts(1500, seed=3) for word in split_transformers(t)]
    for word in [*words, "abcab" * 40, "e" * 333]:
        symbols = to_symbols(word)
        expected = [vocab[symbol] for symbol in merge_steps(symbols, ranks)[-1]]
        ids = [vocab[symbol] for symbol in symbols]
        assert merge(ids) == merge.merge_long(ids) == expected, word
    assert merge([]) == merge.merge_long([]) == []


def test_ftfy_and_unescape_do_not_change_printable_ascii_without_ampersands():
    rng = random.Random(5)
    letters = [chr(c) for c in range(0x20, 0x7F) if chr(c) != "&"]
    samples = ["".join(rng.choices(letters, k=rng.randint(0, 40))) for _ in range(3000)]
    samples += [
        "  two  spaces ",
        EOS.upper(),
        "a" + BOS,
        "it''s",
        "#39;",
        "%E9 \\u00e9",
        "<b>?</b>",
    ]
    for text in samples:
        assert html.unescape(html.unescape(ftfy.fix_text(text))) == text
        assert unicodedata.normalize("NFC", text) == text
        expected = regex.sub(r"\s+", " ", text.strip()).lower()
        assert clean_openai(text).split() == expected.split()


class CountingMarks:
    """A fake `unicodedata` that counts how often Python's NFC swaps two marks to sort them."""

    def __init__(self):
        self.exchanges = 0

    def __getattr__(self, name):
        return getattr(unicodedata, name)

    def normalize(self, form, text):
        run = []
        for c in map(unicodedata.combining, "".join(unicodedata.normalize("NFD", c) for c in text)):
            run = [*run, c] if c and self.exchanges < 10**4 else []
            self.exchanges += sum(c < earlier for earlier in run)
        return unicodedata.normalize(form, text)


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("run", ["\u0301\u0316", "\u0344\u0316", "&#769;&#790;"])
def test_cleaning_many_combining_marks_does_not_take_quadratic_time(
    trained, monkeypatch, reference, run
):
    counting = CountingMarks()
    monkeypatch.setattr(unicode, "unicodedata", counting)
    monkeypatch.setattr(ftfy, "unicodedata", counting)
    text = "u" + run * 1300 + " ǖ" + run * 1300
    tokenizer = Tokenizer.from_directory(trained, reference=reference)
    ids, cleaned = tokenizer.encode(text), tokenizer._clean(text)
    assert counting.exchanges == 0
    if reference == "openai":
        assert cleaned == html.unescape(html.unescape(ftfy.fix_text(text))).lower()
        assert counting.exchanges > 10**4
    else:
        assert ids == CLIPTokenizer.from_pretrained(trained)(text).input_ids[1:-1]


def test_nfc_composes_combining_marks_in_any_order_as_in_python():
    dice = random.Random(0)
    kinds = [[], []]
    for c in map(chr, range(0x30000)):
        if unicodedata.combining(c) or unicodedata.decomposition(c)[:1] not in ("", "<"):
            kinds[unicodedata.combining(c) > 0].append(c)
    for _ in range(100):
        text = "".join(dice.choice(kinds[dice.random() < 0.9]) for _ in range(300))
        text += "".join(dice.choices(kinds[1], k=40))
        assert unicode.nfc(text) == unicodedata.normalize("NFC", text)


class CountingSet(set):
    looks = 0

    def __contains__(self, token):
        self.looks += 1
        return super().__contains__(token)


def test_splitting_at_added_tokens_does_one_lookup_per_position_and_token_length(trained):
    vocabulary = Tokenizer.from_directory(trained)
    added = [f"{'a' * (i % 50)}_{i}" for i in range(9000)] + ["b" * 60]
    vocab = vocabulary.vocab | {t: vocabulary.vocab_size + i for i, t in enumerate(added)}
    tokenizer = Tokenizer(vocab, vocabulary.merges, added=dict.fromkeys(added, False))
    splitter = tokenizer._added._split_raw
    splitter.tokens = CountingSet(splitter.tokens)
    text = "a" * 1000 + "c" + "b" * 1000
    assert splitter(text) == re.split(f"({added[-1]})", text)
    assert splitter.tokens.looks < 54 * 1000 + 1000


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_text_in_chunks_has_the_ids_of_the_whole_text(trained, reference):
    chunks, whole = (Tokenizer.from_directory(trained, reference=reference) for _ in range(2))
    whole._chunks.whole = True
    for text in texts(800, seed=9):
        assert chunks.encode(text) == chunks.encode(text) == whole.encode(text), text


def test_the_cache_of_chunks_is_bounded(trained, monkeypatch):
    monkeypatch.setattr(RememberedChunks, "MOST_CHUNKS", 10)
    tokenizer = Tokenizer.from_directory(trained)
    for i in range(35):
        tokenizer.encode(f"word{i} " + "x" * 100)
    assert 0 < len(tokenizer._chunks) <= 10
    assert all(len(chunk) < 100 for chunk in tokenizer._chunks)


@pytest.mark.slow
def test_the_cache_holds_at_most_100000_chunks_of_up_to_64_characters(trained):
    """A cache of 100,000 chunks of 64 characters, with one id for each character, takes about
    30 MB. The test checks the number of chunks and their length, but not the memory."""
    tokenizer = Tokenizer.from_directory(trained)
    for length in (64, 65):
        tokenizer.encode("\N{CAT FACE}" * length)
        assert len(tokenizer._chunks) == 1
    tokenizer._chunks.update({str(i): [] for i in range(99_998)})
    tokenizer.encode("a")
    assert len(tokenizer._chunks) == 100_000
    tokenizer.encode("b")
    assert len(tokenizer._chunks) == 1


# ---- rows --------------------------------------------------------------------------------------


def test_rows_are_padded_to_the_longest_row_or_to_a_given_length(trained):
    tokenizer, some = Tokenizer.from_directory(trained), ["a cat", "", "a photo of two cats"]
    ids = tokenizer(some)
    theirs = transformers_tokenizer(trained)(some, padding=True, return_tensors="pt")["input_ids"]
    assert ids.dtype == torch.int64 and torch.equal(ids, theirs)
    wide = tokenizer(some, pad_to=77)
    assert wide.shape == (3, 77) and torch.equal(wide[:, : ids.shape[1]], ids)
    assert (wide[:, ids.shape[1] :] == tokenizer.eos_token_id).all()
    assert torch.equal(tokenizer("a cat"), tokenizer(["a cat"]))
    wider = tokenizer(some, pad_to=100)  # for a model with a longer context
    options = {"padding": "max_length", "max_length": 100, "return_tensors": "pt"}
    assert torch.equal(wider, transformers_tokenizer(trained)(some, **options)["input_ids"])
    assert tokenizer([]).shape == (0, 2) and tokenizer([], pad_to=7).shape == (0, 7)


def test_the_tokenizer_accepts_texts_in_any_iterable(trained):
    tokenizer, some = Tokenizer.from_directory(trained), ["a cat", "two cats"]
    expected = tokenizer(some)
    for texts in (tuple(some), iter(some), np.array(some), dict.fromkeys(some)):
        assert torch.equal(tokenizer(texts), expected)
    assert Tokenizer.train("a cat", 600).vocab == Tokenizer.train(["a cat"], 600).vocab


def test_the_openai_reference_pads_with_zeros(trained):
    ids = Tokenizer.from_directory(trained, reference="openai")(["a cat", ""])
    assert ids[1, 2:].tolist() == [0] * (ids.shape[1] - 2)


def test_a_text_of_77_tokens_fits_and_one_token_more_raises_an_error(trained):
    tokenizer = Tokenizer.from_directory(trained)
    assert tokenizer("! " * 75).shape == (1, 77)
    with pytest.raises(ContextLengthError, match=r"text 1 has 78 tokens.*77.*truncate=True"):
        tokenizer(["fits", "! " * 76])
    with pytest.raises(ContextLengthError, match=r"text 0 has 5 tokens.*at most 4 fit"):
        tokenizer("! ! !", pad_to=4)
    with pytest.raises(ContextLengthError, match=r"text 0 has 82 tokens.*at most 77 fit"):
        tokenizer("! " * 80, pad_to=100)
    wide = tokenizer("! " * 80, truncate=True, pad_to=100)
    assert torch.equal(wide[:, :77], tokenizer("! " * 80, truncate=True))
    assert wide.shape == (1, 100) and (wide[:, 76:] == tokenizer.eos_token_id).all()
    for options in ({}, {"pad_to": 10}, {"pad_to": 77}):
        length = options.get("pad_to", 77)
        ids = tokenizer("! " * 500, truncate=True, **options)
        assert ids.shape == (1, length) and ids[0, -1] == tokenizer.eos_token_id
        assert torch.equal(ids[0, :-1], tokenizer("! " * 75)[0, : length - 1])


def test_an_error_says_which_text_or_argument_is_wrong(trained):
    tokenizer = Tokenizer.from_directory(trained)
    with pytest.raises(ValueError, match=r"text 1: .*lone surrogate, '\\ud800'"):
        tokenizer(["fine", "half a \ud800 character"])
    with pytest.raises(TypeError, match="text 1: expected a text, found int"):
        tokenizer(["fine", 3])
    for none in (None, 3, b"a cat"):
        with pytest.raises(TypeError, match=f"expected a text or a list.*{type(none).__name__}"):
            tokenizer(none)
    with pytest.raises(ValueError, match="pad_to is 1"):
        tokenizer("a", pad_to=1)
    with pytest.raises(ValueError, match="reference is 'OpenAI'; expected 'transformers' or"):
        Tokenizer.from_directory(trained, reference="OpenAI")
    for length in (1, 77.0, True):
        with pytest.raises(ValueError, match=f"context_length is {length}; expected 2 or more"):
            Tokenizer.train(["a"], 514, context_length=length)
    with pytest.raises(ValueError, match="context_length is 100001; expected at most 100000"):
        Tokenizer.train(["a"], 514, context_length=100_001)  # a load reads it as 77
    assert tokenizer("", pad_to=2).shape == Tokenizer.train([], 514, context_length=2)("").shape


def test_the_openai_reference_replaces_a_lone_surrogate(trained):
    tokenizer = Tokenizer.from_directory(trained, reference="openai")
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")


# ---- ids to text, and the steps of encoding ----------------------------------------------------


def test_decode_gives_the_same_text_as_transformers(trained):
    ours, theirs = Tokenizer.from_directory(trained), transformers_tokenizer(trained)
    rng = random.Random(2)
    for text in texts(500, seed=4):
        ids = ours(text, truncate=True)[0]
        assert ours.decode(ids) == theirs.decode(ids)
    for _ in range(1000):
        ids = [rng.randrange(rng.choice([512, ours.vocab_size])) for _ in range(rng.randrange(9))]
        assert ours.decode(ids) == theirs.decode(ids), ids
        assert ours.tokens(torch.tensor(ids)) == theirs.convert_ids_to_tokens(ids), ids
    for id in (-1, ours.vocab_size):
        with pytest.raises(ValueError, match=rf"no tokens \[{id}\]; expected numbers from 0 to"):
            ours.decode([7, id])


@pytest.mark.parametrize("reference", REFERENCES)
def test_explain_gives_the_same_ids_as_encode(trained, reference):
    tokenizer = Tokenizer.from_directory(trained, reference=reference)
    for text in texts(500, seed=6):
        stages = tokenizer.explain(text)
        assert [id for word in stages.words for id in word.ids] == stages.ids
        assert stages.ids == tokenizer.encode(text)
        for word in stages.words:
            assert [tokenizer.vocab[token] for token in word.tokens] == word.ids
            assert all(len(a) > len(b) for a, b in zip(word.merges, word.merges[1:]))
        assert repr(stages.cleaned) in str(stages)


# ---- training ----------------------------------------------------------------------------------


def test_training_finds_the_most_frequent_pair_each_time():
    """Compare with code that counts all pairs again after every merge."""
    counts = {"low": 5, "lower": 2, "newest": 6, "widest": 3, "banana": 4, "aaaa": 2, "né": 3}
    words = {word: to_symbols(word) for word in counts}
    expected = []
    for _ in range(25):
        total, made = {}, {left + right for left, right in expected}
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                total[pair] = total.get(pair, 0) + counts[word]
        left = {pair: n for pair, n in total.items() if "".join(pair) not in made}
        if not left:
            break
        expected.append(min(left, key=lambda pair: (-left[pair], pair)))
        words = {word: merge_steps(p, {expected[-1]: 0})[-1] for word, p in words.items()}
    assert learn_merges({tuple(to_symbols(word)): n for word, n in counts.items()}, 25) == expected


def test_training_is_deterministic_and_orders_the_vocabulary_like_openai():
    some = texts(300, seed=11)
    first, second = Tokenizer.train(some, 900), Tokenizer.train(some[::-1], 900)
    assert first.vocab == second.vocab and first.merges == second.merges
    assert first.vocab_size == 900 and len(first.merges) == 900 - 514
    tokens = sorted(first.vocab, key=first.vocab.get)
    assert tokens[0] == "!" and tokens[256:512] == [token + "</w>" for token in tokens[:256]]
    assert tokens[512:] == [left + right for left, right in first.merges] + [BOS, EOS]
    assert (first.bos_token_id, first.eos_token_id, first.pad_token_id) == (898, 899, 899)
    assert Tokenizer.train(["a b"], 10_000).vocab_size == 514
    short = Tokenizer.train(["a b"], 514, context_length=5)
    assert (short.context_length, short.reference) == (5, "transformers")
    assert Tokenizer.train(["a b"], 514).context_length == 77
    with pytest.raises(ValueError, match="vocab_size is 513; expected at least 514"):
        Tokenizer.train(some, 513)


def test_training_cleans_and_splits_texts_like_the_chosen_reference():
    """OpenAI's reference decodes HTML entities, and learns no merge from a special token's text."""
    some = ["&amp;amp; " * 9, f"{EOS} " * 9]
    openai = Tokenizer.train(some, 600, reference="openai")
    assert openai.reference == "openai" and openai.merges == []
    assert ("a", "m") in Tokenizer.train(some, 600).merges


# ---- files -------------------------------------------------------------------------------------


@pytest.fixture()
def copy(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_saving_and_loading_does_not_change_a_tokenizer(trained, tmp_path):
    first = Tokenizer.from_directory(trained)
    # an earlier save by transformers may have left these two files
    for name in ("tokenizer.json", "added_tokens.json"):
        (tmp_path / name).write_text("{}")
    first.save_pretrained(tmp_path)
    second = Tokenizer.from_directory(tmp_path)
    for name in ("vocab", "merges", "added", "special_tokens", "context_length", "reference"):
        assert getattr(first, name) == getattr(second, name), name
    assert different(first, tmp_path, texts(1000)) == []
    assert transformers_tokenizer(tmp_path).model_max_length == 77
    files = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in tmp_path.iterdir()} == files


def test_an_interrupted_save_leaves_the_old_file(copy, monkeypatch):
    before = (copy / "merges.txt").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(CheckpointError, match="cannot save here: disk full"):
        Tokenizer.train(["something else"], 520).save_pretrained(copy)
    assert (copy / "merges.txt").read_bytes() == before and len(list(copy.iterdir())) == 4


def test_from_directory_reads_a_tokenizer_json_that_transformers_saved(trained, tmp_path):
    transformers_tokenizer(trained).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.merges == Tokenizer.from_directory(trained).merges
    assert different(tokenizer, tmp_path, texts(1000)) == []


def test_tokenizer_json_takes_precedence_over_vocab_json_and_merges_txt(trained, tmp_path):
    transformers_tokenizer(trained).save_pretrained(tmp_path)
    Tokenizer.train(["two birds"], 516).save_pretrained(tmp_path / "other")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tmp_path / "other" / name, tmp_path)
    assert different(Tokenizer.from_directory(tmp_path), tmp_path, texts(100)) == []


def test_a_tokenizer_json_that_splits_texts_differently_from_clip_is_an_error(trained, tmp_path):
    transformers_tokenizer(trained).save_pretrained(tmp_path)
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "TokenizersBackend"})
    assert Tokenizer.from_directory(tmp_path).vocab_size == 1500  # its steps are CLIP's steps
    whole = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    write(tmp_path / "tokenizer.json", whole | {"normalizer": None})
    with pytest.raises(CheckpointError, match="TokenizersBackend.* by .'Split', 'ByteLevel'"):
        Tokenizer.from_directory(tmp_path)


def packed(folder: Path, lines: list[str]) -> Path:
    data = gzip.compress("\n".join(lines).encode() + b"\n", compresslevel=1)
    (folder / OPENAI_VOCABULARY).write_bytes(data)
    return folder


def test_from_directory_reads_the_gzipped_vocabulary_of_openai(trained, tmp_path):
    lines = (trained / "merges.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    unpacked = Tokenizer.from_directory(packed(tmp_path, lines), reference="openai")
    assert unpacked.vocab == Tokenizer.from_directory(trained).vocab


@pytest.mark.slow
def test_from_directory_ignores_the_last_merges_of_the_gzipped_vocabulary_of_openai(tmp_path):
    symbols = byte_symbols().values()
    pairs = [f"{left} {right}" for left in symbols for right in symbols]  # 65,536
    tokenizer = Tokenizer.from_directory(packed(tmp_path, ["#version: 0.2", *pairs]))
    assert tokenizer.vocab_size == TextConfig().vocab_size == 49408
    assert tokenizer.merges == [tuple(pair.split()) for pair in pairs[: 49408 - 512 - 2]]


def test_a_pickled_tokenizer_gives_the_same_ids(trained):
    tokenizer = Tokenizer.from_directory(trained)
    tokenizer.encode("a cat")
    again = pickle.loads(pickle.dumps(tokenizer))
    assert all(again.encode(text) == tokenizer.encode(text) for text in texts(200))


def flags(content: str, normalized: bool, **more: object) -> dict[str, object]:
    rest = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": content, "normalized": normalized, **rest, **more}


LAYOUTS = {
    "no special tokens named": {},
    "normalized start token": {"special_tokens_map.json": {"bos_token": flags(BOS, True)}},
    "stable diffusion 1": {
        "special_tokens_map.json": {
            "bos_token": flags(BOS, True),
            "eos_token": flags(EOS, True),
            "unk_token": flags(EOS, True),
            "pad_token": EOS,
        }
    },
    "stable diffusion 2": {
        "tokenizer_config.json": {"model_max_length": 77, "pad_token": EOS},
        "special_tokens_map.json": {
            "bos_token": flags(BOS, True),
            "eos_token": flags(EOS, True),
            "unk_token": flags(EOS, True),
            "pad_token": "!",
        },
    },
    "textual inversion": {"added_tokens.json": {"<Cat-Toy>": 1500, "<é>": 1501}},
    "an added token that begins as another": {
        "added_tokens.json": {"<cat": 1500, "<cat>": 1501, "cat>": 1502}
    },
    "unknown token of its own": {"special_tokens_map.json": {"unk_token": "!"}},
    "added tokens with a space": {"added_tokens.json": {"new york": 1500, "cat": 1501}},
    "pad token of its own": {"special_tokens_map.json": {"pad_token": "[PAD]"}},
    "stripping and named in other ways": {
        "tokenizer_config.json": {
            "mask_token": flags("<mask>", True, lstrip=True, rstrip=True)
            | {"__type": "AddedToken"},
            "cls_token": "cls",
        }
    },
    "added_tokens_decoder": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "1499": flags(EOS, False, special=True),
                "1500": flags("<X>", True, special=False),
                "1501": flags("<X>y", False, special=True, rstrip=True),
            },
            "additional_special_tokens": ["<X>y"],
        },
        "special_tokens_map.json": {"pad_token": "!"},
    },
}


@pytest.mark.sweep(4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_special_tokens_have_the_same_ids_as_in_transformers(layout, copy):
    (copy / "tokenizer_config.json").unlink()
    (copy / "special_tokens_map.json").unlink()
    for name, value in LAYOUTS[layout].items():
        write(copy / name, value)
    ours, theirs = Tokenizer.from_directory(copy), transformers_tokenizer(copy)
    for name, token in ours.special_tokens.items():
        assert token == getattr(theirs, name), name
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.vocab_size == len(theirs)
    some = [
        "a <cat-toy> <CAT-TOY>x",
        "<Cat-Toy>",
        "a <cat> <cat cat> <<cat>>",
        "<e\u0301> <É>",
        "in New York cat's",
        "hi !! [PAD]",
        "a <MASK> cls",
    ]
    some += ["a<x>b <X>y <x>y", "new  york", *PHRASES, *texts(300)]
    assert different(ours, copy, some) == []
    assert all(ours.decode(ids) == theirs.decode(ids) for ids in map(ours.encode, some))
    ours.save_pretrained(copy)
    transformers_tokenizer.cache_clear()
    assert (
        different(ours, copy, some) == different(Tokenizer.from_directory(copy), copy, some) == []
    )


@pytest.mark.parametrize(
    ("length", "read"),
    [
        *((2, 2), (248, 248), (100_000, 100_000)),
        *((1, 77), (100_001, 77), (int(1e30), 77), (None, 77), (0, 77), ("77", 77), (True, 77)),
    ],
)
def test_a_model_max_length_outside_2_to_100000_gives_the_context_length_77(copy, length, read):
    write(copy / "tokenizer_config.json", {"model_max_length": length})
    assert Tokenizer.from_directory(copy).context_length == read


def test_the_context_length_in_an_open_clip_config_overrides_model_max_length(copy):
    text = {"context_length": 64, "vocab_size": 1500}
    write(copy / "open_clip_config.json", {"model_cfg": {"text_cfg": text}})
    assert Tokenizer.from_directory(copy).context_length == 64


def test_a_symbol_outside_the_vocabulary_gets_the_id_of_the_unknown_token(copy):
    vocab = json.loads((copy / "vocab.json").read_text(encoding="utf-8"))
    used = {
        token
        for line in (copy / "merges.txt").read_text().split("\n")[1:]
        for token in line.split()
    }
    tokens = [t for t in sorted(vocab, key=vocab.get) if t in used or len(t) > 5 or t in "#%"]
    (copy / "tokenizer_config.json").unlink()
    write(copy / "vocab.json", {token: id for id, token in enumerate([*tokens[:-2], BOS, EOS])})
    merges = (copy / "merges.txt").read_text(encoding="utf-8").split("\n")
    keep = [m for m in merges if not m or m[0] == "#" or m.replace(" ", "") in tokens[:-2]]
    (copy / "merges.txt").write_text("\n".join(keep), encoding="utf-8")
    assert different(Tokenizer.from_directory(copy), copy, texts(300)) == []


def damage(name: str, content: object):
    def apply(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            write(folder / name, content)

    return apply


def damage_vocab(change):
    def apply(folder: Path) -> None:
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        change(vocab)
        write(folder / "vocab.json", vocab)

    return apply


def damage_merges(change):
    def apply(folder: Path) -> None:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        (folder / "merges.txt").write_text("\n".join(change(lines)), encoding="utf-8")

    return apply


def no_ends_of_words(folder: Path) -> None:
    write(folder / "vocab.json", {BOS: 0, EOS: 1})
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (damage_merges(lambda lines: lines[:-1]), "1 tokens .*, come from no merge"),
        (damage_merges(lambda lines: [*lines, "! !"]), "'!!' is not in the vocabulary"),
        (damage_merges(lambda lines: [*lines, *[""] * 300_000]), "merges.txt: .* 300,000 lines"),
        (damage("merges.txt", b"#" * 5_000_001), "merges.txt: .* more than 5,000,000 bytes"),
        (damage("vocab.json", b" " * 5_000_001), "vocab.json: .* 5,000,000 bytes"),
        (no_ends_of_words, "no token ends with </w>"),
        (damage("vocab.json", None), "no tokenizer here; expected vocab.json and merges.txt, or"),
        (damage("merges.txt", None), "merges.txt: expected lines of UTF-8 text"),
        (damage("vocab.json", b"{"), "vocab.json: expected a JSON file"),
        (damage("vocab.json", b"\xff\xfe"), "vocab.json: expected a JSON file"),
        (damage("vocab.json", []), "vocab.json: expected a JSON object, found list"),
        (
            damage("vocab.json", {"a": [1]}),
            "vocab.json: expected the 1 tokens to have the ids 0 to",
        ),
        (damage("merges.txt", b"\xff\n"), "merges.txt: expected lines of UTF-8 text"),
        (damage("merges.txt", b"#version\na b c\n"), "merge 0: expected two tokens, found 'a b c'"),
        (damage("merges.txt", b"#version\na \n"), "merge 0: expected two tokens"),
        (damage("merges.txt", b"#version\na qq\n"), "'qq' is not in the vocabulary"),
        (damage_vocab(lambda v: v.update(x=7)), "each once; no token has"),
        (damage_vocab(lambda v: v.update({"!": 1})), "each once; no token has the id 0"),
        (damage_vocab(lambda v: v.update({"!": 0.0})), "each once; no token has the id 0"),
        (
            damage_vocab(lambda v: v.update(xx=v.pop(EOS))),
            "'<.endoftext.>' is not in the vocabulary",
        ),
        (damage("special_tokens_map.json", b"["), "special_tokens_map.json: expected a JSON file"),
        (damage("tokenizer_config.json", {"bos_token": "<b>"}), "'<b>' is not in the vocabulary"),
        (damage("tokenizer_config.json", {"bos_token": 5}), "not as transformers writes them"),
        (damage("tokenizer_config.json", {"added_tokens_decoder": [1]}), "not as transformers"),
        (
            damage("tokenizer_config.json", {"added_tokens_decoder": {"x": "a"}}),
            "not as transformers",
        ),
        (
            damage("tokenizer_config.json", {"added_tokens_decoder": {"7": flags("<x>", True)}}),
            "the added token '<x>' should have the id 7, but has 1500",
        ),
        (
            damage(
                "tokenizer_config.json",
                {"added_tokens_decoder": {"1500": {"content": "<x>", "single_word": True}}},
            ),
            "single_word of '<x>' is set",
        ),
        (damage("tokenizer_config.json", {"bos_token": "x" * 101}), "at most 100 characters in a"),
        (
            damage("tokenizer_config.json", {"extra_special_tokens": [*map(str, range(20_000))]}),
            "at most 20,000 added tokens, found 20,002",
        ),
    ],
)
def test_an_error_names_the_damaged_file(apply, message, copy):
    (copy / "special_tokens_map.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    apply(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_directory(copy)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": 3},
        {"model": {"vocab": {}, "merges": [1]}},
        {"model": {"vocab": [], "merges": []}},
    ],
)
def test_an_error_names_a_damaged_tokenizer_json(content, tmp_path):
    write(tmp_path / "tokenizer.json", content)
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"#\na b\n")[:-9], gzip.compress(b"\xff")],
    ids=["no gzip", "cut short", "not UTF-8"],
)
def test_an_error_names_a_damaged_openai_vocabulary(content, tmp_path):
    (tmp_path / OPENAI_VOCABULARY).write_bytes(content)
    with pytest.raises(CheckpointError, match=OPENAI_VOCABULARY):
        Tokenizer.from_directory(tmp_path)


def test_from_pretrained_reads_a_directory(trained):
    tokenizer = Tokenizer.from_pretrained(trained, reference="openai")
    assert (tokenizer.reference, tokenizer.vocab_size) == ("openai", 1500)
    assert Tokenizer.from_directory(directory=trained).vocab == tokenizer.vocab


def test_from_pretrained_takes_the_options_of_load(trained, tmp_path):
    """Only these options lead to the repository, so the load fails if one of them is ignored."""
    repository, commit = tmp_path / "models--a--b", "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v2").write_text(commit)
    shutil.copytree(trained, repository / "snapshots" / commit)
    options = dict(revision="v2", cache_dir=tmp_path, local_files_only=True)
    assert Tokenizer.from_pretrained("a/b", **options).vocab_size == 1500


@pytest.mark.parametrize(
    "path, commit",
    [("models--a--b/snapshots/c0ffee/model.bin", "c0ffee"), ("snapshots/mine/model.bin", None)],
)
def test_only_a_path_in_the_hub_cache_contains_a_commit(path, commit):
    """A user's own folder may be called snapshots."""
    assert commit_of(Path(path)) == commit
    assert commit_of(Path("/data/snapshots") / path / "snapshots" / "1") == commit
