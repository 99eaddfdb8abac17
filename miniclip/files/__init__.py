"""Everything about disks and hubs. These files know configs, dictionaries and tensors, and never
the classes of the reference, which build themselves from what they find here:

    hub.py           a name -> a directory (embedded, local, or downloaded)
    weights.py       a weights file -> tensors under our names, and back
    names.py         the names that three layouts give the tensors
    configs.py       three kinds of config files <-> fields of a CLIPConfig
    vocabularies.py  a tokenizer's files <-> vocabulary, merges and special tokens
    images.py        an image transform's files <-> settings
    pickles.py       the tensors of .bin and .pt files, without running their code
    reading.py       JSON and lines of text, with limits
    writing.py       atomic writes
"""
