"""Text to token ids: the byte-level BPE that CLIP reads, exactly as either reference does it.

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", arXiv
1508.07909, on bytes as in GPT-2. The truth is transformers' CLIPTokenizer, or OpenAI's
clip/simple_tokenizer.py; they differ in cleaning and splitting, and from there on agree.
A text goes through five small steps, in this order:

    clean             "Cats,  NAPPING"  ->  "cats, napping"
    split             "cats, napping"   ->  "cats"  ","  "napping"
    to_symbols        "cats"            ->  "c"  "a"  "t"  "s</w>"    one symbol for each byte
    merge             ...               ->  "cats</w>"                the learned pairs, best first
    the vocabulary    "cats</w>"        ->  3989

`Tokenizer.explain` shows every stage of a text, and `Tokenizer.train` is where merges come from.
"""

import gzip
import heapq
import html
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import regex
import torch
from torch import Tensor

from miniclip.config import (
    CheckpointError,
    ContextLengthError,
    blaming,
    read_json,
    replacing,
    shown,
    write_json,
)
from miniclip.layouts import context_of_open_clip

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
END_OF_WORD = "</w>"
REFERENCES = ("transformers", "openai")
OPENAI_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
VOCABULARIES = ("vocab.json", "tokenizer.json", OPENAI_VOCABULARY)
OPENAI_MERGES = 49152 - 256 - 2  # how many lines of that file CLIP uses: the file goes on
MOST_BYTES, MOST_LINES = 5_000_000, 300_000  # in a file; OpenAI's have up to 3.7 million, 262,145

CACHED_CHUNKS, CACHED_CHARACTERS = 100_000, 64  # at most some 30 MB

# -- clean ---------------------------------------------------------------------------------------

WHITESPACE = regex.compile(r"\s+")


def clean_transformers(text: str) -> str:
    r"""Compose characters (NFC), make each run of whitespace one space, lower-case each character.

    A capital sigma that ends a word is what lower-casing by character does not see.

    >>> clean_transformers("Cafe\u0301  ΟΔΟΣ")
    'café οδοσ'
    """
    if not text.isascii():
        parts = re.split(NEW_MARK, text)  # NFC reaches across none of these
        text = "".join(unicodedata.normalize("NFC", part) for part in parts)
        text = text.translate(_new_capitals())
    return WHITESPACE.sub(" ", text).lower()


def clean_openai(text: str) -> str:
    r"""Repair mojibake (ftfy), resolve html entities twice, strip, squeeze, lower-case.

    >>> clean_openai(" Tom &amp;amp; Jerryâ€™s  ΟΔΟΣ ")
    "tom & jerry's οδος"
    """
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing there to repair
        return " ".join(text.lower().split(" "))
    import ftfy  # here, because it is slow to import and most captions never need it

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return WHITESPACE.sub(" ", text).strip().lower()


# transformers' tokenizer stands on three Rust libraries, each with the Unicode of its own year, and
# Python's tables are those of its release. The tables below settle it, for any Python from 3.10.

# Marks newer than Unicode 9, which transformers' NFC neither reorders nor composes.
NEW_MARK = (
    r"([\u05C8-\u05C9\u07FD\u0897-\u08D3\u09FE\u0C3C\u0D3B-\u0D3C\u0EBA\u1715\u1ABF-\u1AF0"
    r"\u1DF6-\u1DFA\uA82C\U000105D2-\U000105DA\U00010D24-\U00010F85\U00011070\U0001133B"
    r"\U000113B8-\U000113D0\U0001145E\U00011839-\U00011930\U0001193D-\U00011A99"
    r"\U00011D42-\U0001612F\U00016D67-\U00016FF1\U0001D127-\U0001D128\U0001D250-\U0001D281"
    r"\U0001E08F-\U0001E6F5])"
)


@cache
def _new_capitals() -> dict[int, int]:
    """Lower case where Python's may differ: capital sigma, and the capitals of Unicode 14 to 17."""
    ranges = [  # first, last, step, distance to the lower case
        (0x03A3, 0x03A3, 1, 32),
        (0x1C89, 0x1C89, 1, 1),
        (0x2C2F, 0x2C2F, 1, 48),
        (0xA7C0, 0xA7C0, 1, 1),
        (0xA7CB, 0xA7CB, 1, 0x0264 - 0xA7CB),
        (0xA7CC, 0xA7DA, 2, 1),
        (0xA7DC, 0xA7DC, 1, 0x019B - 0xA7DC),
        (0x10570, 0x1057A, 1, 39),
        (0x1057C, 0x1058A, 1, 39),
        (0x1058C, 0x10592, 1, 39),
        (0x10594, 0x10595, 1, 39),
        (0x10D50, 0x10D65, 1, 32),
        (0x16EA0, 0x16EB8, 1, 27),
    ]
    return {c: c + far for first, last, by, far in ranges for c in range(first, last + 1, by)}


# -- split ---------------------------------------------------------------------------------------

# Merges never cross a word. What a word is, alternative by alternative:
WORD = r"""
    <\|startoftext\|> | <\|endoftext\|>    # the special tokens, spelt out in the text
    | 's | 't | 're | 've | 'm | 'll | 'd  # the English contractions
    | LETTER+                              # a run of letters, of any script
    | NUMBER                               # one digit or other number, always alone
    | [^\s LETTER NUMBER]+                 # a run of anything else, but for whitespace
"""

# Letters and numbers that are newer than Unicode 16. They are none to transformers (Oniguruma),
# and they are to the regex module, as far as it knows them.
TOO_NEW = (
    r"\u0558\u058B-\u058C\u088F\u0C5C\u0CDC\u208F\u209D-\u209F\uA7CE-\uA7CF\uA7D2\uA7D4\uA7DD"
    r"\uA7E2\uA7F1\uAB6C-\uAB6D\U000107BB-\U000107BF\U00010940-\U00010959\U00010EC5-\U00010EC7"
    r"\U00010ED9-\U00010EEE\U00011B0A\U00011DB0-\U00011DE9\U00011DF1\U0001246F"
    r"\U00012475-\U0001247F\U00012550-\U00012686\U00016EA0-\U00016ED3\U00016FF2-\U00016FF6"
    r"\U000187F8-\U000187FF\U00018CD6-\U00018CDA\U00018D09-\U00018DF2\U00018E00-\U000191D2"
    r"\U0001B123-\U0001B128\U0001B168\U0001D6A6\U0001DF1F-\U0001DF24\U0001DF2B-\U0001DFFF"
    r"\U0001E6C0-\U0001E6FF\U0002B73A-\U0002B73F\U0002B81E\U0002CEA2-\U0002CEAD"
    r"\U000323B0-\U000DFFFF"
)


def split_transformers(text: str) -> list[str]:
    """The words of a cleaned text.

    transformers cuts each of them once more, into GPT-2's words. Those are the same, but for a
    special token: what is still in the text after `Tokenizer` took those out is cut in three.

    >>> split_transformers("it's 2 cats!!")
    ['it', "'s", '2', 'cats', '!!']
    >>> split_transformers("<|endoftext|>>")
    ['<|', 'endoftext', '|>', '>']
    """
    words = _word_pattern("transformers").findall(text)
    if BOS not in words and EOS not in words:
        return words
    return [part for word in words for part in _gpt2_words(word)]


def split_openai(text: str) -> list[str]:
    """The words of a cleaned text. A special token is one, and has an id of its own.

    >>> split_openai("a<|endoftext|>>")
    ['a', '<|endoftext|>', '>']
    """
    return _word_pattern("openai").findall(text)


def _gpt2_words(word: str) -> list[str]:
    return ["<|", word[2:-2], "|>"] if word in (BOS, EOS) else [word]


@cache
def _word_pattern(reference: str) -> regex.Pattern[str]:
    """The pattern of WORD. OpenAI ignores case, which lets an old long s (ſ) pass for an s."""
    letter, number, flags = r"\p{L}", r"\p{N}", regex.VERBOSE | regex.IGNORECASE
    if reference == "transformers":
        letter, number = rf"[\p{{L}}--[{TOO_NEW}]]", rf"[\p{{N}}--[{TOO_NEW}]]"
        flags = regex.VERBOSE | regex.VERSION1  # VERSION1 is what reads the -- as "without"
    return regex.compile(WORD.replace("LETTER", letter).replace("NUMBER", number), flags)


# -- bytes to symbols ----------------------------------------------------------------------------


@cache
def byte_symbols() -> dict[int, str]:
    """A visible character for each of the 256 bytes, in the order of the vocabulary.

    A vocabulary is a text file, which a space or a control character would upset. Bytes that print
    in Latin-1 stand for themselves, the other 68 for the characters from U+0100 on. (GPT-2.)

    >>> byte_symbols()[ord("a")], byte_symbols()[ord(" ")], byte_symbols()[0]
    ('a', 'Ġ', 'Ā')
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }


def to_symbols(word: str) -> list[str]:
    """The UTF-8 bytes of a word as symbols, the last one marked as the end of the word.

    >>> to_symbols("né")
    ['n', 'Ã', '©</w>']
    """
    visible = byte_symbols()
    symbols = [visible[byte] for byte in word.encode()]
    symbols[-1] += END_OF_WORD
    return symbols


# -- merge ---------------------------------------------------------------------------------------

Pair = tuple[str, str]


def merge_steps(symbols: list[str], ranks: dict[Pair, int]) -> list[list[str]]:
    """BPE by its definition: join the pair learned first, wherever it occurs, until none is left.

    Returns the symbols after each step. Quadratic in the length of the word.

    >>> merge_steps(["c", "a", "t</w>"], {("a", "t</w>"): 0, ("c", "at</w>"): 1})
    [['c', 'a', 't</w>'], ['c', 'at</w>'], ['cat</w>']]
    """
    steps = [symbols]
    while True:
        known = [pair for pair in zip(symbols, symbols[1:]) if pair in ranks]
        if not known:
            return steps
        best = min(known, key=ranks.__getitem__)
        joined, i = [], 0
        while i < len(symbols):
            size = 2 if tuple(symbols[i : i + 2]) == best else 1
            joined.append("".join(symbols[i : i + size]))
            i += size
        symbols = joined
        steps.append(symbols)


def merge(symbols: list[str], ranks: dict[Pair, int]) -> list[str]:
    """The last of `merge_steps` in n log n: a heap of pairs over a linked list of symbols.

    >>> merge(["c", "a", "t</w>"], {("a", "t</w>"): 0, ("c", "at</w>"): 1})
    ['cat</w>']
    """
    symbols = list(symbols)
    end = len(symbols)
    after = list(range(1, end + 1))
    before = list(range(-1, end - 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        # The pair that was pushed is gone if either half has been merged since. A rank names a
        # pair, so the pair that is there now having this rank is all there is to check.
        if j == end or ranks.get((symbols[i], symbols[j])) != rank:
            continue
        symbols[i] += symbols[j]
        symbols[j] = ""  # merged away: a pair with it has no rank
        after[i] = after[j]
        if after[i] < end:
            before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < end:
                new = ranks.get((symbols[left], symbols[right]))
                if new is not None:
                    heapq.heappush(heap, (new, left))
    return [symbol for symbol in symbols if symbol]


# -- the tokenizer -------------------------------------------------------------------------------


class Word(NamedTuple):
    """How one word became ids. A special token has no symbols, and nothing to merge."""

    text: str
    symbols: list[str]
    merges: list[list[str]]  # the symbols after each merge; the last are the tokens
    tokens: list[str]
    ids: list[int]


class Explanation(NamedTuple):
    """Every stage of a text. Print it to read it."""

    text: str
    cleaned: str
    words: list[Word]
    ids: list[int]

    def __str__(self) -> str:
        lines = [f"text     {self.text!r}", f"cleaned  {self.cleaned!r}", ""]
        for word in self.words:
            lines.append(f"word     {word.text!r}")
            if word.symbols:
                lines.append("bytes    " + " ".join(word.symbols))
            lines += ["merge    " + " ".join(symbols) for symbols in word.merges]
            lines += ["ids      " + " ".join(map(str, word.ids)), ""]
        return "\n".join([*lines, "all ids  " + " ".join(map(str, self.ids))])


class Tokenizer:
    """Text to token ids and back.

    `vocab` maps tokens to ids, `merges` are the pairs in the order they were learned. `added` are
    the tokens to be found in a text before it is split into words; the value says whether to look
    after the cleaning ("normalized" in transformers' files) or before. OpenAI knows no such thing.

    >>> tokenizer = Tokenizer.train(["a cat", "a dog", "two cats"], vocab_size=520)
    >>> tokenizer(["a cat", "a hat"]).shape
    torch.Size([2, 6])
    >>> tokenizer.decode(tokenizer.encode("a  CAT"))
    'a cat'
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Iterable[Pair],
        *,
        added: Mapping[str, bool] = MappingProxyType({}),
        bos_token: str = BOS,
        eos_token: str = EOS,
        unk_token: str | None = None,
        pad_token: str | None = None,
        context_length: int = 77,
        reference: str = "transformers",
    ) -> None:
        check_reference(reference)
        if type(context_length) is not int or context_length < 2:
            raise ValueError(
                f"context_length is {shown(context_length)}; expected a number from 2 on, as even "
                "an empty text has a start and an end token"
            )
        self.reference = reference
        self.context_length = context_length
        self.vocab = dict(vocab)
        self.merges = list(merges)
        self.special_tokens = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "unk_token": unk_token or eos_token,
            "pad_token": pad_token or eos_token,
        }
        self.added = dict.fromkeys(self.special_tokens.values(), False) | dict(added)
        check_parts(self.vocab, self.merges, self.added)
        self.bos_token_id = self.vocab[bos_token]
        self.eos_token_id = self.vocab[eos_token]
        self.pad_token_id = 0 if reference == "openai" else self.vocab[pad_token or eos_token]
        self._tokens = sorted(self.vocab, key=self.vocab.__getitem__)
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._raw = [token for token, normalized in self.added.items() if not normalized]
        self._cleaned = {clean_transformers(t): t for t in self.added if t not in self._raw}
        for cleaned, token in self._cleaned.items():
            self._tokens[self.vocab[token]] = cleaned  # which is how transformers decodes it
        self._split_raw, self._split_cleaned = _any_of(self._raw), _any_of(self._cleaned)
        self._has_spaces = any(c.isspace() for token in self.added for c in token)
        self._split = split_openai if reference == "openai" else split_transformers
        self._chunk_ids: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        """How many ids there are, those of special and added tokens included."""
        return len(self.vocab)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without the start and the end token."""
        if not isinstance(text, str):
            raise TypeError(f"expected a text, found {type(text).__name__}")
        if self.reference == "openai":
            text = clean_openai(text)  # as a whole: ftfy looks at more than one word
        # A space ends every word, and no character acts on another across one. So what stands
        # between two spaces has the same ids wherever it stands, and is tokenized once.
        known = self._chunk_ids
        ids: list[int] = []
        for chunk in [text] if self._has_spaces else text.split(" "):
            found = known.get(chunk)
            ids += self._encode_chunk(chunk) if found is None else found
        return ids

    def _encode_chunk(self, chunk: str) -> list[int]:
        ids: list[int] = []
        for piece, token in self._pieces(chunk):
            for word in self._split(piece) if token is None else ():
                ids += [self.vocab[t] for t in merge(self._symbols(word), self._ranks)]
            if token is not None:
                ids.append(self.vocab[token])
        if len(chunk) <= CACHED_CHARACTERS:
            if len(self._chunk_ids) >= CACHED_CHUNKS:
                self._chunk_ids.clear()
            self._chunk_ids[chunk] = ids
        return ids

    def _pieces(self, text: str) -> Iterator[tuple[str, str | None]]:
        """The text in pieces that are added tokens and, between them, cleaned text (None)."""
        if self.reference == "openai":
            yield text, None
            return
        for i, raw in enumerate(self._split_raw.split(text)):
            if i % 2:
                yield raw, raw
                continue
            for j, cleaned in enumerate(self._split_cleaned.split(clean_transformers(raw))):
                yield cleaned, self._cleaned[cleaned] if j % 2 else None

    def _symbols(self, word: str) -> list[str]:
        if self.reference == "openai" and word in (BOS, EOS) and word in self.vocab:
            return [word]
        unknown = self.special_tokens["unk_token"]
        try:
            return [symbol if symbol in self.vocab else unknown for symbol in to_symbols(word)]
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has a lone surrogate, {error.object[error.start]!r}: half a character, "
                "for which there is no UTF-8. Repair it before, or leave it out"
            ) from None

    def __call__(
        self, texts: str | Sequence[str], *, truncate: bool = False, pad_to: int | None = None
    ) -> Tensor:
        """Texts -> ids (B, T) int64: in each row a start token, the text, an end token, padding.

        T is the longest row, or `pad_to`. A row of more than `context_length` tokens, or of more
        than `pad_to`, raises ContextLengthError; `truncate` cuts it, and keeps the end token.
        """
        if isinstance(texts, str):
            texts = [texts]
        if pad_to is not None and pad_to < 2:
            raise ValueError(f"pad_to is {pad_to}; even an empty text has a start and an end token")
        limit = self.context_length if pad_to is None else min(pad_to, self.context_length)
        rows = []
        for i, text in enumerate(texts):
            try:
                row = [self.bos_token_id, *self.encode(text), self.eos_token_id]
            except ValueError as error:
                raise ValueError(f"text {i}: {error}") from None
            except TypeError as error:
                raise TypeError(f"text {i}: {error}") from None
            if len(row) > limit:
                if not truncate:
                    raise ContextLengthError(
                        f"text {i} has {len(row)} tokens with the start and the end token, and at "
                        f"most {limit} fit. Shorten it (in Python, truncate=True does): "
                        f"{text[:40]!r}..."
                    )
                row[limit - 1 :] = [self.eos_token_id]
            rows.append(row)
        length = pad_to or max(map(len, rows), default=0)
        padding = [self.pad_token_id] * length
        ids = [row + padding[len(row) :] for row in rows]
        return torch.tensor(ids, dtype=torch.int64).view(len(rows), length)  # (B, T)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, as transformers decodes it: lower case, a space after every word,
        special tokens spelt out, U+FFFD for bytes that are no UTF-8.

        >>> tokenizer = Tokenizer.train(["low"], 514)
        >>> tokenizer.decode(tokenizer("It's LOW")[0])
        "<|startoftext|>it 's low <|endoftext|>"
        """
        byte = {symbol: byte for byte, symbol in byte_symbols().items()}
        data = bytearray()
        for id in map(int, ids):
            if not 0 <= id < self.vocab_size:
                raise ValueError(
                    f"no token has the id {id}; ids go from 0 to {self.vocab_size - 1}"
                )
            token = self._tokens[id]
            plain = all(symbol in byte for symbol in token)
            data += bytes(byte[symbol] for symbol in token) if plain else token.encode()
        return data.decode(errors="replace").replace(END_OF_WORD, " ").strip()

    def explain(self, text: str) -> Explanation:
        """Every stage of `encode`.

        >>> print(Tokenizer.train(["low lower lowest"], 516).explain("LOW"))
        text     'LOW'
        cleaned  'low'
        <BLANKLINE>
        word     'low'
        bytes    l o w</w>
        merge    lo w</w>
        ids      512 342
        <BLANKLINE>
        all ids  512 342
        """
        ids = self.encode(text)
        pieces = list(self._pieces(clean_openai(text) if self.reference == "openai" else text))
        words = []
        for piece, token in pieces:
            if token is not None:
                words.append(Word(piece, [], [], [token], [self.vocab[token]]))
                continue
            for word in self._split(piece):
                first, *merges = merge_steps(self._symbols(word), self._ranks)
                tokens = merges[-1] if merges else first
                words.append(Word(word, first, merges, tokens, [self.vocab[t] for t in tokens]))
        return Explanation(text, "".join(piece for piece, _ in pieces), words, ids)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        reference: str = "transformers",
        context_length: int = 77,
    ) -> "Tokenizer":
        """Learn merges from texts: the pair that occurs most becomes a token, again and again.

        The vocabulary is smaller than `vocab_size` where the texts run out of pairs. It depends on
        the words of the texts alone, not on their order.
        """
        check_reference(reference)
        least = len(vocabulary([]))
        if vocab_size < least:
            raise ValueError(
                f"vocab_size is {vocab_size}; expected at least {least}, for the bytes"
            )
        openai = reference == "openai"
        clean = clean_openai if openai else clean_transformers
        split = split_openai if openai else split_transformers
        counts = Counter(word for text in texts for word in split(clean(text)))
        counts -= Counter({BOS: counts[BOS], EOS: counts[EOS]})
        merges = learn_merges(counts, vocab_size - least)
        return cls(vocabulary(merges), merges, reference=reference, context_length=context_length)

    @classmethod
    def from_pretrained(
        cls, name: str | PathLike[str], *, reference: str = "transformers", **options: Any
    ) -> "Tokenizer":
        """The tokenizer of a checkpoint: an embedded name, a directory, a weights file or a hub id.

        `options` are the `revision`, `cache_dir` and `local_files_only` of `miniclip.load`. Raises
        CheckpointError.
        """
        from miniclip.checkpoint import resolve  # here, because it imports this file

        return cls.from_directory(resolve(name, "tokenizer", **options), reference=reference)

    @classmethod
    def from_directory(
        cls, directory: str | PathLike[str], *, reference: str = "transformers"
    ) -> "Tokenizer":
        """Read vocab.json and merges.txt, or tokenizer.json, or OpenAI's bpe_simple_vocab.

        Special and added tokens, and the context length, are read from where transformers reads
        them. Raises CheckpointError.
        """
        directory = Path(directory)
        open_clip_length = _read_open_clip(directory)  # first: if it has another kind of tokenizer
        source, vocab, merges = read_vocabulary(directory)
        special, added, context_length = read_special_tokens(directory)
        with blaming(source):
            check_parts(vocab, merges, [])
            if not any(token.endswith(END_OF_WORD) for token in vocab):
                raise ValueError(f"no token ends with {END_OF_WORD}, as CLIP's last of a word do")
            listed = {token: id for token, (_, id) in added.items() if id is not None}
            for token, id in sorted(listed.items(), key=lambda item: item[1]):
                if vocab.setdefault(token, len(vocab)) != id:
                    raise ValueError(
                        f"the added token {shown(token)} should have the id {id}, and has "
                        f"{vocab[token]}; the files must come from the same tokenizer"
                    )
            check_parts(vocab, [], [special["bos_token"], special["eos_token"]])
            check_all_made(vocab, merges, [*special.values(), *added])
        for token in added:  # what has no id by now gets the next one, as in transformers
            vocab.setdefault(token, len(vocab))
        return cls(
            vocab,
            merges,
            added={token: normalized for token, (normalized, _) in added.items()},
            context_length=open_clip_length or context_length,
            reference=reference,
            **special,
        )

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write vocab.json, merges.txt and two small files, for transformers to read as well.

        `reference` is the reader's choice and not written. Raises CheckpointError.
        """
        directory = Path(directory)
        added = {
            str(self.vocab[token]): {
                "content": token,
                "lstrip": False,
                "normalized": normalized,
                "rstrip": False,
                "single_word": False,
                "special": token in self.special_tokens.values(),
            }
            for token, normalized in self.added.items()
        }
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.context_length,
            **self.special_tokens,
            "added_tokens_decoder": added,
        }
        merges = ["#version: 0.2", *(f"{left} {right}" for left, right in self.merges), ""]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / "vocab.json", self.vocab)
            with replacing(directory / "merges.txt") as temporary:
                temporary.write_text("\n".join(merges), encoding="utf-8", newline="\n")
            write_json(directory / "special_tokens_map.json", self.special_tokens)
            write_json(directory / "tokenizer_config.json", config)
            # of a tokenizer that was here before: transformers would read them first
            (directory / "tokenizer.json").unlink(missing_ok=True)
            (directory / "added_tokens.json").unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot save here: {error}") from None


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern to split a text at tokens, the longest that fits. They stay: it is a group."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


# -- learning ------------------------------------------------------------------------------------


def vocabulary(merges: Iterable[Pair]) -> dict[str, int]:
    """OpenAI's layout: 256 bytes, 256 bytes that end a word, the merges, two special tokens."""
    symbols = list(byte_symbols().values())
    ends = [symbol + END_OF_WORD for symbol in symbols]
    merged = [left + right for left, right in merges]
    return {token: id for id, token in enumerate([*symbols, *ends, *merged, BOS, EOS])}


def learn_merges(counts: Mapping[str, int], limit: int) -> list[Pair]:
    """The first `limit` merges of words that occur so many times. Ties go to the pair that sorts
    first.

    >>> learn_merges({"cat": 2, "hat": 1, "cap": 1}, 3)
    [('a', 't</w>'), ('c', 'at</w>'), ('a', 'p</w>')]
    """
    words = [to_symbols(word) for word in counts]
    times = list(counts.values())
    total: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)  # the words a pair is or was in
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            total[pair] += times[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in total.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    made: set[str] = set()
    while heap and len(merges) < limit:
        count, best = heapq.heappop(heap)
        # Each new count is pushed, and only the latest is true. A token that another pair has
        # made already would be a second id for the same thing.
        if count == 0 or -count != total[best] or "".join(best) in made:
            continue
        merges.append(best)
        made.add("".join(best))
        changed = set()
        for i in where.pop(best):
            old, new = words[i], merge_steps(words[i], {best: 0})[-1]
            for pair in zip(old, old[1:]):
                total[pair] -= times[i]
                changed.add(pair)
            for pair in zip(new, new[1:]):
                total[pair] += times[i]
                where[pair].add(i)
                changed.add(pair)
            words[i] = new
        for pair in changed:
            heapq.heappush(heap, (-total[pair], pair))
    return merges


# -- files ---------------------------------------------------------------------------------------


def check_reference(reference: str) -> None:
    """Raises ValueError for a reference that there is not."""
    if reference not in REFERENCES:
        raise ValueError(
            f"reference is {reference!r}; expected {' or '.join(map(repr, REFERENCES))}"
        )


def check_parts(vocab: Mapping[str, int], merges: Iterable[Pair], added: Iterable[str]) -> None:
    """Raise ValueError unless ids are 0 to n-1 and every token that is spoken of has one."""
    ids = {id for id in vocab.values() if type(id) is int}
    if missing := set(range(len(vocab))) - ids:
        raise ValueError(
            f"expected the {len(vocab)} tokens to have the ids 0 to {len(vocab) - 1}, each once; "
            f"no token has {min(missing)}"
        )
    for token in added:
        if token not in vocab:
            raise ValueError(f"the special token {shown(token)} is not in the vocabulary")
    for rank, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in vocab:
                raise ValueError(
                    f"merge {rank} joins {shown(left)} and {shown(right)}, and {shown(token)} is "
                    "not in the vocabulary; vocabulary and merges must come from the same tokenizer"
                )


def check_all_made(vocab: Mapping[str, int], merges: list[Pair], special: Iterable[str]) -> None:
    """Raise ValueError where a merge is missing: a word of its tokens would fall apart.

    Only of a vocabulary that has all bytes, as one that was learned has, can this be told.
    """
    bytes_ = {symbol + end for symbol in byte_symbols().values() for end in ("", END_OF_WORD)}
    if not vocab.keys() >= bytes_:
        return
    made = {left + right for left, right in merges}
    if unmade := vocab.keys() - bytes_ - made - set(special):
        first = min(unmade, key=vocab.__getitem__)
        raise ValueError(
            f"no merge makes {len(unmade)} tokens of the vocabulary, the first {shown(first)}; "
            "vocabulary and merges must come from the same tokenizer"
        )


def read_vocabulary(directory: Path) -> tuple[Path, dict[str, int], list[Pair]]:
    """The vocabulary and the merges in a directory, and the file of the form they are there in."""
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    whole, simple = directory / "tokenizer.json", directory / OPENAI_VOCABULARY
    if vocab.is_file() and (merges.is_file() or not whole.is_file()):
        lines = [line for line in _read_lines(merges) if not line.startswith("#version")]
        return vocab, read_json(vocab, MOST_BYTES), _pairs(merges, lines)
    if whole.is_file():
        model = read_json(whole, MOST_BYTES).get("model")
        found = model if isinstance(model, dict) else {}
        if not isinstance(found.get("vocab"), dict) or not isinstance(found.get("merges"), list):
            raise CheckpointError(f"{whole}: expected a model with a vocab and merges (type BPE)")
        return whole, found["vocab"], _pairs(whole, found["merges"])
    if simple.is_file():
        pairs = _pairs(simple, _read_lines(simple)[1 : OPENAI_MERGES + 1])
        return simple, vocabulary(pairs), pairs
    raise CheckpointError(
        f"{directory}: no tokenizer here; expected vocab.json and merges.txt, or tokenizer.json, "
        f"or {OPENAI_VOCABULARY}. Most CLIPs use those of openai/clip-vit-base-patch32; "
        "CLIP.from_pretrained loads a model without"
    )


def read_special_tokens(
    directory: Path,
) -> tuple[dict[str, str], dict[str, tuple[bool, int | None]], int]:
    """The four named tokens, all tokens to be found in texts (normalized?, id), the context length.

    Over the years transformers has written these into four files. In the order it reads them: a
    later line wins, and `added_tokens_decoder` makes it skip all files but tokenizer_config.json.
    """
    config = _read_if_there(directory / "tokenizer_config.json")
    try:
        listed: dict[str, tuple[bool, int | None]] = {}
        complete = "added_tokens_decoder" in config
        for id, token in config.get("added_tokens_decoder", {}).items():
            listed |= _added_token(token, int(id))
        if not complete:
            config |= _read_if_there(directory / "special_tokens_map.json")
        defaults = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "sep_token": None}
        defaults |= {"pad_token": EOS, "cls_token": None, "mask_token": None}
        named = {key: config.get(key) or token for key, token in defaults.items()}
        named = {key: token for key, token in named.items() if token}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        extra = list(extra.values() if isinstance(extra, dict) else extra)
        if not complete:
            specials = {name for token in [*named.values(), *extra] for name in _added_token(token)}
            for token, id in _read_if_there(directory / "added_tokens.json").items():
                listed |= _added_token({"content": token, "special": token in specials}, id)
            for token in _read_if_there(directory / "tokenizer.json").get("added_tokens") or []:
                listed |= _added_token(token, token["id"])
        added: dict[str, tuple[bool, int | None]] = {}
        for token in [*named.values(), *extra]:
            added |= _added_token(token)
        content = {key: next(iter(_added_token(token))) for key, token in named.items()}
        special = {
            key: content[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: the special tokens in tokenizer_config.json, special_tokens_map.json, "
            "added_tokens.json or tokenizer.json are not as transformers writes them: "
            + shown(error)
        ) from None
    length: Any = config.get("model_max_length")
    sane = type(length) is int and 2 <= length <= 100_000  # "none" is written as 1e30
    return special, added | listed, length if sane else 77


def _added_token(token: Any, id: int | None = None) -> dict[str, tuple[bool, int | None]]:
    """{content: (normalized, id)}. transformers takes a bare string for a special token."""
    if isinstance(token, str):
        token = {"content": token}
    if not isinstance(token["content"], str) or not token["content"]:
        raise ValueError(f"expected the content of a token, found {shown(token['content'])}")
    # lstrip and rstrip take in the whitespace around a token, which has no ids anyway.
    if token.get("single_word"):
        content = shown(token["content"])
        raise ValueError(f"single_word of {content} is set, which no CLIP is known to do")
    if id is not None and type(id) is not int:
        content = shown(token["content"])
        raise ValueError(f"expected the id of {content} to be a number, found {shown(id)}")
    special = token.get("special", id is None)
    return {token["content"]: (bool(token.get("normalized", not special)), id)}


def _read_open_clip(directory: Path) -> int | None:
    path = directory / "open_clip_config.json"
    with blaming(path):
        return context_of_open_clip(read_json(path)) if path.is_file() else None


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path, MOST_BYTES) if path.is_file() else {}


def _read_lines(path: Path) -> list[str]:
    """Of a few bytes of gzip too, which can stand for any number."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise OSError(f"it has more than {MOST_BYTES:,} bytes, which no CLIP's has")
        if data.count(b"\n") > MOST_LINES:
            raise OSError(f"it has more than {MOST_LINES:,} lines, which no CLIP's has")
        text = data.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected lines of UTF-8 text: {error}") from None
    return text.replace("\r\n", "\n").rstrip("\n").split("\n")


def _pairs(path: Path, merges: Iterable[Any]) -> list[Pair]:
    """Merges are written "a b", or in newer tokenizer.json files ["a", "b"]."""
    pairs = []
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(type(t) is str and t for t in pair)
        ):
            found = shown(merge)
            raise CheckpointError(f"{path}: merge {rank}: expected two tokens, found {found}")
        pairs.append((pair[0], pair[1]))
    return pairs
