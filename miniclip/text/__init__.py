"""Parts of the tokenizer. To understand the method, `miniclip/tokenizer.py` is enough.

- `symbols.py`: characters for bytes, and the special tokens
- `merge.py`: applying BPE merges in n log n steps, and learning merges
- `chunks.py`: a cache of ids
- `unicode.py`: Unicode tables, the same on every version of Python
- `openai.py`: OpenAI's text cleaning
- `added.py`: transformers' added tokens
- `explain.py`: every step from a text to its ids
"""
