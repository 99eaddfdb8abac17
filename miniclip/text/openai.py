"""OpenAI's text cleaning (openai/CLIP, clip/simple_tokenizer.py)."""

import html
import re

from miniclip.text.unicode import LONG_RUN, nfc


def clean_openai(text: str) -> str:
    r"""Repair encodings (ftfy), resolve html entities twice, clean spaces, convert to lower case.

    >>> clean_openai(" Tom &amp;amp; Jerryâ€™s  ΟΔΟΣ ")
    "tom & jerry's οδος"
    """
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing to repair
        return text.lower()
    text = html.unescape(html.unescape(_repaired(text))).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


def _repaired(text: str) -> str:
    import ftfy  # imported only when needed, because the import is slow

    if len(text) < 5000 or not LONG_RUN.search(ftfy.fix_text(text, normalization=None)):
        return ftfy.fix_text(text)
    before = ""
    while text != before:  # ftfy has this loop too, but with a slower NFC
        before, text = text, nfc(ftfy.fix_text(text, normalization=None))
    return text
