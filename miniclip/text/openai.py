"""OpenAI's text cleaning (openai/CLIP, clip/simple_tokenizer.py)."""

import html
import re


def clean_openai(text: str) -> str:
    r"""Repair mojibake (ftfy), resolve html entities twice, strip, squeeze whitespace, lower-case.

    >>> clean_openai(" Tom &amp;amp; Jerryâ€™s  ΟΔΟΣ ")
    "tom & jerry's οδος"
    """
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing to repair
        return text.lower()
    import ftfy  # here, because it is slow to import and most captions never need it

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip().lower()
