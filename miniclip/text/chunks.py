"""A cache of ids, with an entry for each piece of text between two spaces."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from string import ascii_lowercase

from miniclip.text.symbols import END_OF_WORD


class RememberedChunks:
    """Compute a text's ids chunk by chunk, and remember the ids of each chunk.

    A chunk of lower-case ASCII letters is one word. It is merged directly, without cleaning, unless
    an added token has only letters.
    """

    MOST_CHUNKS, MOST_CHARACTERS = 100_000, 64  # about 30 MB at most

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        merge: Callable[[list[int]], list[int]],
        vocab: Mapping[str, int],
        added: Iterable[str],
    ) -> None:
        self.encode, self.merge, self.vocab = encode, merge, vocab
        self.whole = any(c.isspace() for token in added for c in token)  # a text is then one chunk
        has_letters = all({a, a + END_OF_WORD} <= vocab.keys() for a in ascii_lowercase)
        self.has_words = has_letters and not any(token.lower().isalpha() for token in added)
        self.known: dict[str, Sequence[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        known, ids = self.known, list[int]()
        for chunk in [text] if self.whole else text.split(" "):
            found = known.get(chunk)
            ids += self._computed(chunk) if found is None else found
        return ids

    def _computed(self, chunk: str) -> list[int]:
        if self.has_words and chunk.isascii() and chunk.isalpha() and chunk.islower():
            symbols = [self.vocab[letter] for letter in chunk]
            symbols[-1] = self.vocab[chunk[-1] + END_OF_WORD]
            ids = self.merge(symbols)
        else:
            ids = self.encode(chunk)
        if len(chunk) <= self.MOST_CHARACTERS:
            if len(self.known) >= self.MOST_CHUNKS:
                self.known.clear()
            self.known[chunk] = tuple(ids)
        return ids
