"""OpenAI's text cleaning (openai/CLIP, clip/simple_tokenizer.py)."""

import html
import re

from miniclip.text.unicode import LONG_RUN, nfc


def clean_openai(text: str) -> str:
    r"""Repair wrong encodings (ftfy), resolve html entities twice, clean whitespace, lower-case.

    >>> clean_openai(" Tom &amp;amp; Jerryâ€™s  ΟΔΟΣ ")
    "tom & jerry's οδος"
    """
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing to repair
        return text.lower()
    text = html.unescape(html.unescape(_repaired(text))).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


def _repaired(text: str) -> str:
    import ftfy  # here, because it is slow to import and most captions never need it

    if len(text) < 5000 or not LONG_RUN.search(ftfy.fix_text(text, normalization=None)):
        return ftfy.fix_text(text)
    before = ""  # repeat until nothing changes, as ftfy does; ftfy's own NFC takes quadratic time
    while text != before:
        before, text = text, nfc(ftfy.fix_text(text, normalization=None))
    return text
