"""Tokens that are found in a text before it is split into words: transformers' added tokens."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping


class AddedTokens:
    """Find added tokens in a text. True: look after the text is cleaned. False: look before."""

    def __init__(self, added: Mapping[str, bool], clean: Callable[[str], str]) -> None:
        self.clean = clean
        self.cleaned = {clean(token): token for token, after in added.items() if after}
        self._split_raw = _Splitter(token for token, after in added.items() if not after)
        self._split_cleaned = _Splitter(self.cleaned)

    def split(self, text: str) -> Iterator[tuple[str, str | None]]:
        """Yield the pieces of a text: (as found, token), and between them (cleaned text, None)."""
        for i, raw in enumerate(self._split_raw(text)):
            if i % 2:
                yield raw, raw
                continue
            for j, cleaned in enumerate(self._split_cleaned(self.clean(raw))):
                yield cleaned, self.cleaned[cleaned] if j % 2 else None


class _Splitter:
    """Split a text at tokens, the longest first, and keep them, as `re.split` with a group does.

    `re` tries one token after another at each place. Here the tokens are a set, and a place costs
    one look for each length that a token with this first character has.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = set(tokens)
        self.lengths: dict[str, list[int]] = {}
        for first, length in sorted({(t[0], len(t)) for t in self.tokens if t}, reverse=True):
            self.lengths.setdefault(first, []).append(length)
        self.firsts = re.compile(
            f"[{re.escape(''.join(self.lengths))}]" if self.lengths else "(?!)"
        )

    def __call__(self, text: str) -> list[str]:
        parts, end = [], 0
        for start in (match.start() for match in self.firsts.finditer(text)):
            if start < end:
                continue
            for length in self.lengths[text[start]]:
                if (token := text[start : start + length]) in self.tokens:
                    parts += [text[end:start], token]
                    end = start + length
                    break
        return [*parts, text[end:]]
