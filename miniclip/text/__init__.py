"""The parts of the tokenizer that are not needed to understand it.

- `symbols.py`: characters for bytes, and the special tokens
- `merge.py`: BPE in n log n, and learning its merges
- `chunks.py`: a cache of ids
- `unicode.py`: Unicode tables, the same on every Python
- `openai.py`: OpenAI's text cleaning
- `added.py`: transformers' added tokens
- `explain.py`: every stage of a text on its way to ids
"""
