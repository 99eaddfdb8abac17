"""Everything about disks and hubs.

These files know configs, dictionaries and tensors, and never the classes of the reference. The
classes build themselves from these:

    hub.py           a name -> a directory (embedded, local, or downloaded)
    tensors.py       a weights file -> its tensors
    names.py         the names that three layouts give the tensors
    configs.py       transformers' config, or the shapes of OpenAI's weights <-> fields of a config
    open_clip.py     open_clip's config
    published.py     the published models: their numbers, names and activations
    models.py        fields and tensors under our names, for a class to build itself from
    modules.py       the names of a model's modules, and whether its config describes them
    pretrained.py    from_pretrained and save_pretrained of the classes
    checks.py        checks of the numbers of configs, tokenizers and transforms
    saving.py        a model, or a whole checkpoint -> a directory
    vocabularies.py  a tokenizer's files <-> vocabulary, merges and special tokens
    images.py        an image transform's files <-> settings
    pictures.py      files, arrays and tensors -> Pillow images
    pickles.py       the tensors of .bin and .pt files; their code is never run
    state_dicts.py   what such a file holds -> the state dict of one model
    tars.py          what lies in a tar, up to where it is damaged
    reading.py       JSON and lines of text, with limits
    writing.py       atomic writes
"""
