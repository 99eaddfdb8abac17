"""Tokens that are found in a text before it is split into words: transformers' added tokens."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping


class AddedTokens:
    """Added tokens, each with the time to look for it: True after cleaning, False before."""

    def __init__(self, added: Mapping[str, bool], clean: Callable[[str], str]) -> None:
        self.clean = clean
        self.cleaned = {clean(token): token for token, after in added.items() if after}
        self._split_raw = _any_of(token for token, after in added.items() if not after)
        self._split_cleaned = _any_of(self.cleaned)
        self.have_spaces = any(c.isspace() for token in added for c in token)

    def split(self, text: str) -> Iterator[tuple[str, str | None]]:
        """The text in pieces: (as found, token), and between tokens (cleaned text, None)."""
        for i, raw in enumerate(self._split_raw.split(text)):
            if i % 2:
                yield raw, raw
                continue
            for j, cleaned in enumerate(self._split_cleaned.split(self.clean(raw))):
                yield cleaned, self.cleaned[cleaned] if j % 2 else None


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that splits a text at tokens, the longest first, and keeps them (it is a group)."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
