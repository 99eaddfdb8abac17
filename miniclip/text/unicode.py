"""Treat Unicode as transformers' tokenizer does, on every version of Python.

transformers' tokenizer uses three Rust libraries. The libraries use different versions of Unicode,
and so do the versions of Python. The tables below correct the differences.
"""

import re
import unicodedata
from functools import cache
from itertools import groupby

import regex

# Combining marks added after Unicode 9. transformers' NFC neither reorders nor composes them.
NEW_MARK = (
    r"([\u05C8-\u05C9\u07FD\u0897-\u08D3\u09FE\u0C3C\u0D3B-\u0D3C\u0EBA\u1715\u1ABF-\u1AF0"
    r"\u1DF6-\u1DFA\uA82C\U000105D2-\U000105DA\U00010D24-\U00010F85\U00011070\U0001133B"
    r"\U000113B8-\U000113D0\U0001145E\U00011839-\U00011930\U0001193D-\U00011A99"
    r"\U00011D42-\U0001612F\U00016D67-\U00016FF1\U0001D127-\U0001D128\U0001D250-\U0001D281"
    r"\U0001E08F-\U0001E6F5])"
)


def utf8(word: str) -> bytes:
    """Encode a word in UTF-8. Raises ValueError for a lone surrogate, which is half a character."""
    try:
        return word.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate, {error.object[error.start]!r}: half a character, "
            "which UTF-8 cannot encode. Repair the text or leave the character out"
        ) from None


LONG_RUN = regex.compile(r"\p{M}{32}")


def nfc(text: str) -> str:
    r"""Compose characters (NFC). Python sorts the combining marks after a letter in quadratic time.
    Therefore this function first sorts long runs of marks itself, in n log n.

    >>> nfc("a" + 20 * "\u0301\u0316") == "á" + 20 * "\u0316" + 19 * "\u0301"
    True
    """
    if LONG_RUN.search(text):
        text = "".join(unicodedata.normalize("NFD", character) for character in text)
        runs = groupby(text, key=lambda character: unicodedata.combining(character) > 0)
        text = "".join(c for _, run in runs for c in sorted(run, key=unicodedata.combining))
    return unicodedata.normalize("NFC", text)


def compose(text: str) -> str:
    """Compose characters (NFC) with the tables of Unicode 9."""
    parts = re.split(NEW_MARK, text)  # NFC does not combine characters across these marks
    return "".join(map(nfc, parts))


def lower_new_capitals(text: str) -> str:
    """Convert the letters of `_new_capitals` to lower case. `str.lower` may be wrong for them."""
    return text.translate(_new_capitals())


@cache
def _new_capitals() -> dict[int, int]:
    """Map capitals to lower case. `str.lower` gives sigma a special form at the end of a word, and
    older versions of Python do not know the capitals that Unicode 14 to 17 added."""
    ranges = [  # first capital, last capital, step, distance to the lower-case letters
        (0x03A3, 0x03A3, 1, 32),
        (0x1C89, 0x1C89, 1, 1),
        (0x2C2F, 0x2C2F, 1, 48),
        (0xA7C0, 0xA7C0, 1, 1),
        (0xA7CB, 0xA7CB, 1, 0x0264 - 0xA7CB),
        (0xA7CC, 0xA7DA, 2, 1),
        (0xA7DC, 0xA7DC, 1, 0x019B - 0xA7DC),
        (0x10570, 0x1057A, 1, 39),
        (0x1057C, 0x1058A, 1, 39),
        (0x1058C, 0x10592, 1, 39),
        (0x10594, 0x10595, 1, 39),
        (0x10D50, 0x10D65, 1, 32),
        (0x16EA0, 0x16EB8, 1, 27),
    ]
    return {c: c + far for first, last, by, far in ranges for c in range(first, last + 1, by)}


# Letters and numbers that were added after Unicode 16. transformers (Oniguruma) does not know them,
# but the regex module knows some of them.
TOO_NEW = (
    r"\u0558\u058B-\u058C\u088F\u0C5C\u0CDC\u208F\u209D-\u209F\uA7CE-\uA7CF\uA7D2\uA7D4\uA7DD"
    r"\uA7E2\uA7F1\uAB6C-\uAB6D\U000107BB-\U000107BF\U00010940-\U00010959\U00010EC5-\U00010EC7"
    r"\U00010ED9-\U00010EEE\U00011B0A\U00011DB0-\U00011DE9\U00011DF1\U0001246F"
    r"\U00012475-\U0001247F\U00012550-\U00012686\U00016EA0-\U00016ED3\U00016FF2-\U00016FF6"
    r"\U000187F8-\U000187FF\U00018CD6-\U00018CDA\U00018D09-\U00018DF2\U00018E00-\U000191D2"
    r"\U0001B123-\U0001B128\U0001B168\U0001D6A6\U0001DF1F-\U0001DF24\U0001DF2B-\U0001DFFF"
    r"\U0001E6C0-\U0001E6FF\U0002B73A-\U0002B73F\U0002B81E\U0002CEA2-\U0002CEAD"
    r"\U000323B0-\U000DFFFF"
)


@cache
def word_pattern(word: str, reference: str) -> regex.Pattern[str]:
    """Compile the pattern of a word. Replace LETTER and NUMBER by a reference's character classes.

    OpenAI's pattern ignores case, so a long s (ſ) matches an s.
    """
    letter, number, flags = r"\p{L}", r"\p{N}", regex.VERBOSE | regex.IGNORECASE
    if reference == "transformers":
        letter, number = rf"[\p{{L}}--[{TOO_NEW}]]", rf"[\p{{N}}--[{TOO_NEW}]]"
        flags = regex.VERBOSE | regex.VERSION1  # in VERSION1, [A--B] is A without B
    return regex.compile(word.replace("LETTER", letter).replace("NUMBER", number), flags)
