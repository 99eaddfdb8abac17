"""The tokenizer against transformers' and, for OpenAI's, against the published algorithm."""

import gzip
import html
import json
import random

import ftfy
import pytest
import regex
import torch
from transformers import CLIPTokenizer

from miniclip import CheckpointError, ContextLengthError, Tokenizer
from miniclip import tokenizer as module

PIECES = [
    *"a photo of A CAT, It's O'Neil's you'll THEY'RE 'S 'tis don’t ‘quoted’ `x` 2016 3.14".split(),
    *["$5", "#tag", "café", "cafe\u0301", "Ångström", "A\u030angstro\u0308m", "naïve", "ß", "Ĳ"],
    *["ﬁsh", "ﬀ", "ＡＢＣ", "　", "©", "™", "…", "—", "²½", "Ⅷ", "٣", "K", "Å", "ſ"],
    *["ΟΔΟΣ", "ΣΑΣ", "σς", "Σ", "İstanbul", "IĞDIR", "ı", "\u0130\u0307", "\ua7cb", "\U00010d50"],
    *["中文字", "日本語テキスト", "한국어", "ไทยแลนด์", "हिन्दी", "العربية", "עברית"],
    *["👩‍🚀", "👍🏽", "🏳️‍🌈", "😀😀", "\u00ad", "\ufffd", "\u0301", "\u200b", "\u200d", "\u00a0"],
    *["\x00", "\x07", "\x1b[31m", "\x1c", "\x1f", "\x85", "\u2028", "\ufeff"],
    *["&amp;", "&amp;amp;", "&lt;b&gt;", "&#39;", "&nbsp;", "&copy", "cafÃ©", "â€™", "ÃƒÂ©"],
    *["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<|EndOfText|>", "<|", "|>"],
    *["<|endoftext", " ", "  ", "\t", "\n", "\r\n", "'", "''", "_", "a_b", "!!!", "?!"],
]


def generate(count, seed=0):
    """Texts of every script and accident, half of them from pieces and half from characters."""
    rng = random.Random(seed)
    scripts = [(0x20, 0x7F), (0, 0x250), (0x300, 0x600), (0x900, 0xE80), (0x1E00, 0x2200)]
    scripts += [(0x3000, 0x9FFF), (0xF900, 0x10000), (0x10000, 0x20000), (0x80, 0xD800)]
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 7)):
            if rng.random() < 0.6:
                parts.append(rng.choice(PIECES))
            else:
                low, high = rng.choice(scripts)
                parts.append("".join(chr(rng.randrange(low, high)) for _ in range(3)))
        yield rng.choice(["", " "]).join(parts)


TEXTS = list(dict.fromkeys(generate(12_000)))  # twice, as there are two vocabularies


@pytest.fixture(scope="module", params=["real", "trained"])
def folder(request, tmp_path_factory):
    if request.param == "real":
        return request.getfixturevalue("data") / "vocab"
    folder = tmp_path_factory.mktemp("trained")
    Tokenizer.train(list(generate(1500, seed=1)), 3000).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def peer(folder):
    return CLIPTokenizer.from_pretrained(folder)


def differing(tokenizer, peer, texts=TEXTS):
    rows = peer(texts)["input_ids"]
    return [t for t, row in zip(texts, rows, strict=True) if tokenizer.encode(t) != row[1:-1]]


def test_ids_are_those_of_transformers(folder, peer):
    assert differing(Tokenizer.from_pretrained(folder), peer) == []


def slow_openai_ids(text, vocab, ranks):
    """The published algorithm, step by step: clip/simple_tokenizer.py described in one screen."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = regex.sub(r"\s+", " ", text).strip().lower()
    pattern = (
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
        r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    )
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    drawn = {byte: chr(byte) for byte in visible}
    drawn |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    ids = []
    for word in regex.findall(pattern, text, regex.IGNORECASE):
        if word in ("<|startoftext|>", "<|endoftext|>"):
            ids.append(vocab[word])
            continue
        parts = [drawn[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            best = min(pairs, key=lambda pair: ranks.get(pair, float("inf")))
            if best not in ranks:
                break
            joined, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == best else 1
                joined.append("".join(parts[i : i + step]))
                i += step
            parts = joined
        ids += [vocab[part] for part in parts]
    return ids


def test_ids_are_those_of_the_published_algorithm(folder):
    tokenizer = Tokenizer.from_pretrained(folder, reference="openai")
    vocab = json.loads((folder / "vocab.json").read_text())
    lines = (folder / "merges.txt").read_text().splitlines()[1:]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    wrong = [t for t in TEXTS if tokenizer.encode(t) != slow_openai_ids(t, vocab, ranks)]
    assert wrong == []


def test_every_character_is_that_of_transformers(folder, peer):
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c < 0x32000]
    texts = ["".join(f"a{c}b 1{c} " for c in characters[i : i + 8]) for i in range(0, 200_000, 8)]
    texts = random.Random(0).sample(texts, 4000) + texts[:200]
    assert differing(Tokenizer.from_pretrained(folder), peer, texts) == []


@pytest.mark.parametrize("change", ["nfc", "lower", "split"])
def test_a_faulty_tokenizer_is_caught(folder, peer, monkeypatch, change):
    if change == "nfc":
        monkeypatch.setattr(module.unicodedata, "normalize", lambda form, text: text)
    elif change == "lower":
        monkeypatch.setattr(module, "clean_transformers", module.clean_openai)
    else:
        monkeypatch.setattr(module, "split_transformers", module.split_openai)
    assert differing(Tokenizer.from_pretrained(folder), peer)


@pytest.mark.parametrize("reference", ["transformers", "openai"])
def test_golden_ids_of_other_projects(data, reference):
    golden = json.loads((data / "golden" / "tokenizer_golden.json").read_text())
    assert len(golden) == 80 and sum(not entry["openai_match"] for entry in golden) == 2
    tokenizer = Tokenizer.from_pretrained(data / "vocab", reference=reference)
    for entry in golden:
        ids = tokenizer.encode(entry["text"])
        if entry["kind"] == "hf":
            ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        follows = reference == "transformers" or entry["openai_match"]
        assert (ids == entry["ids"]) == follows, entry


@pytest.mark.parametrize("reference", ["transformers", "openai"])
def test_a_long_word_takes_no_quadratic_time(folder, peer, reference):
    tokenizer = Tokenizer.from_pretrained(folder, reference=reference)
    words = ["ab" * 5000, "z" * 10_000, "".join(random.Random(0).choices("etaoin", k=10_000))]
    for word in words:
        assert tokenizer.encode(word) == peer(word)["input_ids"][1:-1]


def test_plain_ascii_needs_no_cleaning():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices([chr(c) for c in range(32, 127) if chr(c) != "&"], k=20))
        cleaned = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        assert module.clean_openai(text).split() == cleaned.lower().split()


@pytest.fixture(scope="module")
def small():
    return Tokenizer.train(["low lower lowest", "new newer newest"], 540, context_length=12)


def test_rows_are_padded_to_the_longest(small):
    ids = small(["low", "", "new lower newest"])
    assert ids.dtype == torch.int64 and ids.shape[0] == 3
    assert (ids[:, 0] == small.bos_token_id).all()
    assert ids[1].tolist() == [small.bos_token_id] + [small.eos_token_id] * (ids.shape[1] - 1)
    assert small("low", pad_to=9).shape == (1, 9)
    assert small([]).shape[0] == 0


def test_padding_is_the_reference_s(small):
    openai = Tokenizer(small.vocab, small.merges, reference="openai")
    assert openai("low", pad_to=9)[0, -1] == 0
    assert small("low", pad_to=9)[0, -1] == small.eos_token_id


def test_a_text_too_long_is_named_and_truncation_keeps_the_end(small):
    with pytest.raises(ContextLengthError, match="text 1 has 14 tokens .* most 12"):
        small(["low", "0 1 2 3 4 5 6 7 8 9 0 1"])
    ids = small(["low", "0 1 2 3 4 5 6 7 8 9 0 1"], truncate=True)
    assert ids.shape == (2, 12) and ids[1, -1] == small.eos_token_id
    with pytest.raises(ContextLengthError, match="most 3"):
        small("new lower newest", pad_to=3)


def test_a_lone_surrogate_is_an_error(small):
    with pytest.raises(ValueError, match="text 0: .*surrogate"):
        small(["half \ud83d"])


def test_decoding_is_that_of_transformers(folder, peer):
    tokenizer = Tokenizer.from_pretrained(folder)
    for text in TEXTS[:2000]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == peer.decode(ids)


def test_training_is_decided_by_the_words(small):
    again = Tokenizer.train(["newest new newer", "lowest low lower"], 540)
    assert again.vocab == small.vocab and again.merges == small.merges


def test_every_form_of_the_files_gives_the_same_ids(folder, peer, tmp_path):
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "saved")
    peer.save_pretrained(tmp_path / "peer")
    (tmp_path / "simple").mkdir()
    lines = ["#version", *(" ".join(pair) for pair in tokenizer.merges)]
    with gzip.open(tmp_path / "simple" / "bpe_simple_vocab_16e6.txt.gz", "wt") as file:
        file.write("\n".join(lines))
    for form in ("saved", "peer", "simple"):
        assert differing(Tokenizer.from_pretrained(tmp_path / form), peer, TEXTS[:500]) == []
    assert CLIPTokenizer.from_pretrained(tmp_path / "saved")(TEXTS[:500]) == peer(TEXTS[:500])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("vocab.json", "{", "vocab.json"),
        ("vocab.json", "[]", "JSON object"),
        ("vocab.json", '{"a": 0, "b": 0}', "must belong together"),
        ("vocab.json", b"\xff\xfe", "vocab.json"),
        ("merges.txt", "#version\nl o w", "merges.txt"),
        ("merges.txt", "#version\nq zzz", "not in the vocabulary"),
        ("merges.txt", b"\xff\xfe", "merges.txt"),
        ("merges.txt", None, "merges.txt"),
    ],
)
def test_damaged_files_are_named(small, tmp_path, name, content, message):
    small.save_pretrained(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="expected vocab.json and merges.txt"):
        Tokenizer.from_pretrained(tmp_path)
