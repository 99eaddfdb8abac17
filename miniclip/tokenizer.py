"""Text -> token ids: the byte-level BPE of CLIP.

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", arXiv
1508.07909. The symbols are bytes, as in GPT-2. Two references are matched exactly: transformers'
CLIPTokenizer and OpenAI's clip/simple_tokenizer.py. They clean and split texts differently.

    clean             "Cats,  NAPPING"  ->  "cats, napping"
    split             "cats, napping"   ->  "cats"  ","  "napping"
    to_symbols        "cats"            ->  "c"  "a"  "t"  "s</w>"    a symbol for each byte
    merge             ...               ->  "cats</w>"                learned pairs, in order
    the vocabulary    "cats</w>"        ->  3989
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import regex
import torch
from torch import Tensor

from miniclip.files import checks
from miniclip.files.pretrained import PretrainedTokenizer
from miniclip.text.added import AddedTokens
from miniclip.text.chunks import RememberedChunks
from miniclip.text.explain import Explanation, explained
from miniclip.text.merge import Merger, learn_merges
from miniclip.text.openai import clean_openai
from miniclip.text.symbols import BOS, END_OF_WORD, EOS, Pair, byte_symbols, vocabulary_of
from miniclip.text.unicode import compose, lower_new_capitals, utf8, word_pattern

WHITESPACE = regex.compile(r"\s+")


def clean_transformers(text: str) -> str:
    r"""Compose characters (NFC), replace each run of whitespace by a space, convert to lower case.

    >>> clean_transformers("Cafe\u0301  ΟΔΟΣ")
    'café οδοσ'
    """
    if not text.isascii():
        text = lower_new_capitals(compose(text))
    return WHITESPACE.sub(" ", text).lower()


# No merge joins two words. A word is one of:
WORD = r"""
    <\|startoftext\|> | <\|endoftext\|>    # a special token typed in the text
    | 's | 't | 're | 've | 'm | 'll | 'd  # the English contractions
    | LETTER+                              # a run of letters, of any script
    | NUMBER                               # one digit or other numeral
    | [^\s LETTER NUMBER]+                 # a run of anything else except whitespace
"""


def split_transformers(text: str) -> list[str]:
    """The words of a cleaned text. A special token in the text is cut into three words.

    >>> split_transformers("it's 2 cats!!")
    ['it', "'s", '2', 'cats', '!!']
    >>> split_transformers("<|endoftext|>>")
    ['<|', 'endoftext', '|>', '>']
    """
    words = word_pattern(WORD, "transformers").findall(text)
    if BOS not in words and EOS not in words:
        return words
    cut = {token: ["<|", token[2:-2], "|>"] for token in (BOS, EOS)}  # as in GPT-2's pattern
    return [part for word in words for part in cut.get(word, [word])]


def split_openai(text: str) -> list[str]:
    """The words of a cleaned text. A special token is one word.

    >>> split_openai("a<|endoftext|>>")
    ['a', '<|endoftext|>', '>']
    """
    return word_pattern(WORD, "openai").findall(text)


def to_symbols(word: str) -> list[str]:
    """The UTF-8 bytes of a word as symbols. The last symbol is marked as the end of the word.

    >>> to_symbols("né")
    ['n', 'Ã', '©</w>']
    """
    visible = byte_symbols()
    symbols = [visible[byte] for byte in utf8(word)]
    symbols[-1] += END_OF_WORD
    return symbols


def merge_steps(symbols: list[str], ranks: Mapping[Pair, int]) -> list[list[str]]:
    """The definition of BPE: join the pair that was learned first, wherever it occurs, and repeat.

    Returns the symbols after each step. `text/merge.py` does the same faster.

    >>> merge_steps(["c", "a", "t</w>"], {("a", "t</w>"): 0, ("c", "at</w>"): 1})
    [['c', 'a', 't</w>'], ['c', 'at</w>'], ['cat</w>']]
    """
    steps = [symbols]
    while known := [pair for pair in zip(symbols, symbols[1:]) if pair in ranks]:
        best = min(known, key=ranks.__getitem__)
        joined, i = [], 0
        while i < len(symbols):
            size = 2 if tuple(symbols[i : i + 2]) == best else 1
            joined.append("".join(symbols[i : i + size]))
            i += size
        symbols = joined
        steps.append(symbols)
    return steps


class Tokenizer(PretrainedTokenizer):
    """Text -> token ids, and back.

    `vocab` maps tokens to ids; `merges` are pairs in the order they were learned. `added` maps
    tokens to True or False. Before a text is split into words, a token is found in the cleaned
    text (True) or in the raw text (False). OpenAI's tokenizer does not look for added tokens.

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
        checks.check_reference(reference)
        checks.check_context_length(context_length)
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
        checks.check_tokens(self.vocab, self.merges, self.added)
        self.bos_token_id = self.vocab[bos_token]
        self.eos_token_id = self.vocab[eos_token]
        self.pad_token_id = 0 if reference == "openai" else self.vocab[pad_token or eos_token]
        self._tokens = sorted(self.vocab, key=self.vocab.__getitem__)
        self._merge = Merger(self.vocab, self.merges)
        self._added = AddedTokens(self.added, clean_transformers)
        for cleaned, token in self._added.cleaned.items():
            self._tokens[self.vocab[token]] = cleaned  # transformers decodes ids to cleaned tokens
        self._clean = clean_openai if reference == "openai" else clean_transformers
        self._split = split_openai if reference == "openai" else split_transformers
        # Cleaning, splitting and merging never look across a space, so a chunk between two spaces
        # always has the same ids. If an added token has a space, each text is one chunk.
        self._chunks = RememberedChunks(self._encode_chunk, self._merge, self.vocab, self.added)

    @property
    def vocab_size(self) -> int:
        """The number of ids, including special and added tokens."""
        return len(self.vocab)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without the start and the end token."""
        if not isinstance(text, str):
            raise TypeError(f"expected a text, found {type(text).__name__}")
        # ftfy looks at several words at once, so for OpenAI the whole text is cleaned first.
        return self._chunks.ids(clean_openai(text) if self.reference == "openai" else text)

    def _encode_chunk(self, chunk: str) -> list[int]:
        ids: list[int] = []
        for piece, token in self._pieces(chunk):
            for word in self._split(piece) if token is None else ():
                ids += self._merge([self.vocab[symbol] for symbol in self._symbols(word)])
            if token is not None:
                ids.append(self.vocab[token])
        return ids

    def _pieces(self, text: str) -> Iterable[tuple[str, str | None]]:
        """Return (piece, token) for each added token, and (cleaned text, None) for other text."""
        return [(text, None)] if self.reference == "openai" else self._added.split(text)

    def _symbols(self, word: str) -> list[str]:
        if self.reference == "openai" and word in (BOS, EOS) and word in self.vocab:
            return [word]
        unknown = self.special_tokens["unk_token"]
        return [symbol if symbol in self.vocab else unknown for symbol in to_symbols(word)]

    def __call__(
        self, texts: str | Iterable[str], *, truncate: bool = False, pad_to: int | None = None
    ) -> Tensor:
        """Texts -> ids (B, T) int64. A row has a start token, the text, an end token and padding.

        T is `pad_to` if given, or else the longest row's length. A row with more tokens than
        `context_length` or `pad_to` raises ContextLengthError. With `truncate`, the text is cut.
        """
        limit = checks.check_pad_to(pad_to, self.context_length)
        rows = []
        for i, text in enumerate(checks.as_list(texts)):
            try:
                row = [self.bos_token_id, *self.encode(text), self.eos_token_id]
            except ValueError as error:
                raise ValueError(f"text {i}: {error}") from None
            if len(row) > limit and not truncate:
                raise checks.too_long(i, text, len(row), limit)
            rows.append(row[: limit - 1] + [self.eos_token_id] if len(row) > limit else row)
        length = pad_to or max(map(len, rows), default=2)
        ids = np.full((len(rows), length), self.pad_token_id, np.int64)  # (B, T)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        return torch.tensor(ids)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The token of each id, such as `cat</w>`, to label a table or a figure."""
        known = checks.numbers(map(int, ids), self.vocab_size, "ids", "tokens")
        return [self._tokens[id] for id in known]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids as transformers does: words in lower case with spaces between them, special
        tokens as text, and U+FFFD for bytes that are not UTF-8."""
        byte = {symbol: byte for byte, symbol in byte_symbols().items()}
        data = bytearray()
        for token in self.tokens(ids):
            is_bytes = all(symbol in byte for symbol in token)
            data += bytes(byte[symbol] for symbol in token) if is_bytes else token.encode()
        return data.decode(errors="replace").replace(END_OF_WORD, " ").strip()

    def explain(self, text: str) -> Explanation:
        """The results of each stage of `encode`, ready to print."""
        return explained(self, text, merge_steps)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, **options: Any) -> "Tokenizer":
        """Learn merges from texts: make the most frequent pair a token, and repeat.

        The vocabulary is smaller than `vocab_size` if no pair is left to join. The result depends
        only on how often each word occurs. `options` are arguments of Tokenizer.
        """
        empty = cls(vocabulary_of([]), [], **options)
        checks.check_vocab_size(vocab_size, empty.vocab_size)
        texts = [texts] if isinstance(texts, str) else texts
        counts = Counter(word for text in texts for word in empty._split(empty._clean(text)))
        symbols = {tuple(to_symbols(w)): n for w, n in counts.items() if w not in (BOS, EOS)}
        merges = learn_merges(symbols, vocab_size - empty.vocab_size)
        return cls(vocabulary_of(merges), merges, **options)
