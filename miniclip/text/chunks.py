"""A cache of the ids of chunks. A chunk is a piece of text between two spaces."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from string import ascii_lowercase

from miniclip.text.symbols import END_OF_WORD


class RememberedChunks(dict[str, Sequence[int]]):
    """The ids of chunks of text. A chunk is encoded when it is first looked up.

    A chunk of lower-case ASCII letters is one word. Its letters are merged without cleaning, unless
    one of the added tokens has only letters.
    """

    MOST_CHUNKS, MOST_CHARACTERS = 100_000, 64  # about 30 MB at most

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        merge: Callable[[list[int]], list[int]],
        vocab: Mapping[str, int],
        added: Iterable[str],
    ) -> None:
        super().__init__()
        self.encode, self.merge = encode, merge
        # If an added token has a space, texts are not split into chunks.
        self.whole = any(c.isspace() for token in added for c in token)
        has_letters = all({a, a + END_OF_WORD} <= vocab.keys() for a in ascii_lowercase)
        self.has_words = has_letters and not any(token.lower().isalpha() for token in added)
        if self.has_words:
            self.id_of = {a: vocab[a] for a in ascii_lowercase}.__getitem__
            self.last_id_of = {a: vocab[a + END_OF_WORD] for a in ascii_lowercase}

    def ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for chunk in [text] if self.whole else text.split(" "):
            ids += self[chunk]
        return ids

    def __missing__(self, chunk: str) -> Sequence[int]:
        if self.has_words and chunk.isascii() and chunk.isalpha() and chunk.islower():
            symbols = list(map(self.id_of, chunk))
            symbols[-1] = self.last_id_of[chunk[-1]]
            ids = self.merge(symbols)
        else:
            ids = self.encode(chunk)
        if len(chunk) <= self.MOST_CHARACTERS:
            if len(self) >= self.MOST_CHUNKS:
                self.clear()
            self[chunk] = tuple(ids)
        return ids
