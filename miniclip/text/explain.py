"""Every step from a text to its ids, for printing."""

from collections.abc import Callable
from typing import Any, NamedTuple

from miniclip.text.openai import clean_openai


class Word(NamedTuple):
    """How one word became ids. An added token has no symbols and no merges."""

    text: str
    symbols: list[str]
    merges: list[list[str]]  # the symbols after each merge
    tokens: list[str]
    ids: list[int]


class Explanation(NamedTuple):
    """Every step from a text to its ids. `print` shows each step on a line."""

    text: str
    cleaned: str
    words: list[Word]
    ids: list[int]
    row: list[int]  # the start token, the ids and the end token: the text tower's input
    context_length: int

    def __str__(self) -> str:
        lines = [f"text     {self.text!r}", f"cleaned  {self.cleaned!r}", ""]
        for word in self.words:
            lines.append(f"word     {word.text!r}")
            if word.symbols:
                lines.append("bytes    " + " ".join(word.symbols))
            lines += ["merge    " + " ".join(symbols) for symbols in word.merges]
            lines += ["ids      " + " ".join(map(str, word.ids)), ""]
        length, most = len(self.row), self.context_length
        left = f"{most - length} more fit" if length <= most else f"{length - most} too many"
        lines += [
            "all ids  " + " ".join(map(str, self.row)),
            f"         from the start token {self.row[0]} to the end token {self.row[-1]}",
            f"length   {length} of {most} tokens, {left}",
        ]
        return "\n".join(lines)


def explained(
    tokenizer: Any, text: str, merge_steps: Callable[..., list[list[str]]]
) -> Explanation:
    """Explain a text. `merge_steps` returns the symbols of a word after each merge."""
    cleaned = clean_openai(text) if tokenizer.reference == "openai" else text
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges)}
    words = []
    for piece, token in (pieces := list(tokenizer._pieces(cleaned))):
        for word in tokenizer._split(piece) if token is None else ():
            first, *merges = steps = merge_steps(tokenizer._symbols(word), ranks)
            ids = [tokenizer.vocab[symbol] for symbol in steps[-1]]
            words.append(Word(word, first, merges, steps[-1], ids))
        if token is not None:
            words.append(Word(piece, [], [], [token], [tokenizer.vocab[token]]))
    ids, seen = tokenizer.encode(text), "".join(piece for piece, _ in pieces)
    row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return Explanation(text, seen, words, ids, row, tokenizer.context_length)
