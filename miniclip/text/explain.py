"""Every stage of a text on its way to ids, to be printed."""

from typing import NamedTuple


class Word(NamedTuple):
    """How one word became ids. An added token has no symbols and no merges."""

    text: str
    symbols: list[str]
    merges: list[list[str]]  # the symbols after each merge
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
