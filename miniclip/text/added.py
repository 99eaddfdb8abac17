"""Find transformers' added tokens in a text, before the text is split into words."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping


class AddedTokens:
    """Find added tokens. If the value of a token in `added` is True, find the token in the cleaned
    text. If the value is False, find the token in the raw text."""

    def __init__(self, added: Mapping[str, bool], clean: Callable[[str], str]) -> None:
        self.clean = clean
        self.cleaned = {clean(token): token for token, after in added.items() if after}
        self._split_raw = _Splitter(token for token, after in added.items() if not after)
        self._split_cleaned = _Splitter(self.cleaned)

    def split(self, text: str) -> Iterator[tuple[str, str | None]]:
        """Yield (piece, token) for each added token, and (cleaned text, None) for other text."""
        for i, raw in enumerate(self._split_raw(text)):
            if i % 2:
                yield raw, raw
                continue
            for j, cleaned in enumerate(self._split_cleaned(self.clean(raw))):
                yield cleaned, self.cleaned[cleaned] if j % 2 else None


class _Splitter:
    """Split a text at tokens and keep the tokens, as `re.split` does with a capturing group.

    At each position, find the longest token. `re` would try one token after another. This class
    looks up one piece of text for each possible length of a token. For example, if the tokens that
    start with "<" have 3 different lengths, a "<" in a text needs at most 3 look-ups.
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
