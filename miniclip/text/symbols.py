"""The characters that stand for bytes in a vocabulary file, and the special tokens."""

from functools import cache

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
END_OF_WORD = "</w>"
Pair = tuple[str, str]


@cache
def byte_symbols() -> dict[int, str]:
    """A visible character for each of the 256 bytes, in the order of the vocabulary (GPT-2).

    In a vocabulary file, a space or a control character would cause errors. A byte with a visible
    character in Latin-1 gets this character. The other 68 bytes get characters from U+0100 on.

    >>> byte_symbols()[ord("a")], byte_symbols()[ord(" ")], byte_symbols()[0]
    ('a', 'Ġ', 'Ā')
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }


def vocabulary_of(merges: list[Pair]) -> dict[str, int]:
    """Make OpenAI's vocabulary: 256 bytes, 256 bytes that end a word, merges, special tokens."""
    symbols = list(byte_symbols().values())
    ends = [symbol + END_OF_WORD for symbol in symbols]
    merged = [left + right for left, right in merges]
    return {token: id for id, token in enumerate([*symbols, *ends, *merged, BOS, EOS])}
