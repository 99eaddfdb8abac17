"""A cache: the ids of each piece of text between two spaces."""

from collections.abc import Callable


class RememberedChunks:
    """A text's ids, chunk by chunk, each chunk computed once while it is remembered."""

    MOST_CHUNKS, MOST_CHARACTERS = 100_000, 64  # at most some 30 MB

    def __init__(self, encode: Callable[[str], list[int]], whole: bool) -> None:
        self.encode = encode
        self.whole = whole  # a token may have a space in it, so that a text is one chunk
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        known, ids = self.known, []
        for chunk in [text] if self.whole else text.split(" "):
            found = known.get(chunk)
            ids += self._computed(chunk) if found is None else found
        return ids

    def _computed(self, chunk: str) -> list[int]:
        ids = self.encode(chunk)
        if len(chunk) <= self.MOST_CHARACTERS:
            if len(self.known) >= self.MOST_CHUNKS:
                self.known.clear()
            self.known[chunk] = ids
        return ids
