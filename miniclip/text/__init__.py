"""Parts of the tokenizer. To understand the method, `miniclip/tokenizer.py` is enough.

- `symbols.py`: the characters that stand for bytes, and the special tokens
- `merge.py`: applying BPE merges in n log n steps, and learning merges
- `chunks.py`: a cache of ids
- `unicode.py`: Unicode tables that do not depend on the version of Python
- `openai.py`: OpenAI's text cleaning
- `added.py`: transformers' added tokens
- `explain.py`: every step from a text to its ids
"""
