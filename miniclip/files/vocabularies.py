"""Read and write the vocabulary, the merges and the special tokens of a tokenizer.

Three forms are read: tokenizer.json, vocab.json and merges.txt, and OpenAI's bpe_simple_vocab.
"""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from miniclip.errors import CheckpointError, blaming, shown
from miniclip.files.checks import LONGEST_CONTEXT, check_tokens
from miniclip.files.hub import OPENAI_VOCABULARY, as_destination
from miniclip.files.open_clip import context_of_open_clip
from miniclip.files.reading import MOST_BYTES, read_json, read_json_if_there, read_lines
from miniclip.files.writing import replacing, saving, write_json
from miniclip.text.symbols import BOS, END_OF_WORD, EOS, Pair, byte_symbols, vocabulary_of

OPENAI_MERGES = 49152 - 256 - 2  # CLIP uses the first lines of OpenAI's file
STALE = ("tokenizer.json", "added_tokens.json")
"""Files of an older tokenizer. A save deletes them, because transformers would read them first."""
MOST_ADDED, LONGEST_ADDED = 20_000, 100
"""Limits for the number and the length of added tokens. Long tokens are slow to find."""


class Vocabulary(NamedTuple):
    """The contents of a tokenizer's files."""

    vocab: dict[str, int]
    merges: list[Pair]
    added: dict[str, bool]  # True: match in the cleaned text. False: match before cleaning.
    special: dict[str, str]  # bos_token, eos_token, unk_token, pad_token
    context_length: int


def read_vocabulary(directory: Path) -> Vocabulary:
    """Read a tokenizer from the files that transformers reads. Raises CheckpointError."""
    open_clip = directory / "open_clip_config.json"
    open_clip_length = None
    if open_clip.is_file():  # read this file first: it may name another kind of tokenizer
        with blaming(open_clip):
            open_clip_length = context_of_open_clip(read_json(open_clip))
    whole = read_json_if_there(directory / "tokenizer.json", MOST_BYTES)
    source, vocab, merges = _read_merges(directory, whole)
    special, added, context_length = read_special_tokens(directory, whole)
    with blaming(source):
        check_tokens(vocab, merges, [])
        if not any(token.endswith(END_OF_WORD) for token in vocab):
            raise ValueError(f"no token ends with {END_OF_WORD}, which marks the end of a word")
        given = {token: id for token, (_, id) in added.items() if id is not None}
        for token, id in sorted(given.items(), key=lambda item: item[1]):
            if (found := vocab.setdefault(token, len(vocab))) != id:
                raise ValueError(
                    f"the added token {shown(token)} should have the id {id}, but has {found}; "
                    "the files must come from the same tokenizer"
                )
        check_tokens(vocab, [], [special["bos_token"], special["eos_token"]])
        _check_all_made(vocab, merges, [*special.values(), *added])
    for token in added:  # a token without an id gets the next free id, as in transformers
        vocab.setdefault(token, len(vocab))
    is_normalized = {token: after_cleaning for token, (after_cleaning, _) in added.items()}
    return Vocabulary(vocab, merges, is_normalized, special, open_clip_length or context_length)


def write_vocabulary(directory: str | PathLike[str], vocabulary: Vocabulary) -> None:
    """Write vocab.json, merges.txt and two small files, as transformers does.

    Raises CheckpointError if open_clip_config.json in the directory has a longer context.
    """
    vocab, merges, added, special, context_length = vocabulary
    if settings := read_json_if_there(Path(directory) / "open_clip_config.json"):
        with blaming(directory):
            if (length := context_of_open_clip(settings)) > context_length:
                raise ValueError(
                    f"the tokenizer has a context length of {context_length}, but `load` would use "
                    f"{length}, the length in open_clip_config.json. First set "
                    f"tokenizer.context_length = {length}, or use the layout 'transformers'"
                )
    never = {"lstrip": False, "rstrip": False, "single_word": False}
    decoder = {
        str(vocab[token]): {"content": token, "normalized": normalized, **never}
        | {"special": token in special.values()}
        for token, normalized in added.items()
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **special}
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    with saving(as_destination(directory)) as folder:
        write_json(folder / "vocab.json", vocab)
        with replacing(folder / "merges.txt") as temporary:
            temporary.write_text("\n".join(lines), encoding="utf-8", newline="\n")
        write_json(folder / "special_tokens_map.json", special)
        write_json(folder / "tokenizer_config.json", config | {"added_tokens_decoder": decoder})
        for stale in STALE:
            (folder / stale).touch()  # empty, so that `saving` deletes the old file


def _check_all_made(vocab: Mapping[str, int], merges: list[Pair], special: Iterable[str]) -> None:
    """Raise ValueError for a token that no merge makes. The tokenizer could never output it.

    This can be checked only if the vocabulary contains all 256 bytes.
    """
    symbols = {symbol + end for symbol in byte_symbols().values() for end in ("", END_OF_WORD)}
    if not vocab.keys() >= symbols:
        return
    made = {left + right for left, right in merges}
    if unmade := vocab.keys() - symbols - made - set(special):
        first = min(unmade, key=vocab.__getitem__)
        raise ValueError(
            f"{len(unmade)} tokens of the vocabulary, such as {shown(first)}, come from no merge; "
            "vocabulary and merges must come from the same tokenizer"
        )


def _read_merges(directory: Path, whole: dict[str, Any]) -> tuple[Path, dict[str, int], list[Pair]]:
    """Return the path of the vocabulary's file, the vocabulary, and the merges.

    `whole` is the contents of tokenizer.json. If it exists, transformers reads only this file.
    """
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    source, simple = directory / "tokenizer.json", directory / OPENAI_VOCABULARY
    if source.is_file():
        model = whole.get("model")
        found = model if isinstance(model, dict) else {}
        if not isinstance(found.get("vocab"), dict) or not isinstance(found.get("merges"), list):
            raise CheckpointError(f"{source}: expected a model with a vocab and merges (type BPE)")
        return source, found["vocab"], _pairs(source, found["merges"])
    if vocab.is_file():
        lines = [line for line in read_lines(merges) if not line.startswith("#version")]
        return vocab, read_json(vocab, MOST_BYTES), _pairs(merges, lines)
    if simple.is_file():
        pairs = _pairs(simple, read_lines(simple)[1 : OPENAI_MERGES + 1])
        return simple, vocabulary_of(pairs), pairs
    raise CheckpointError(
        f"{directory}: no tokenizer here; expected vocab.json and merges.txt, or tokenizer.json, "
        f"or {OPENAI_VOCABULARY}. Most CLIPs use the files of openai/clip-vit-base-patch32. "
        "CLIP.from_pretrained loads a model without a tokenizer"
    )


def _pairs(path: Path, merges: Iterable[Any]) -> list[Pair]:
    """Read merges as pairs. A merge is "a b" or, in a newer tokenizer.json, ["a", "b"]."""
    pairs = []
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(type(t) is str and t for t in pair)
        ):
            found = shown(merge)
            raise CheckpointError(f"{path}: merge {rank}: expected two tokens, found {found}")
        pairs.append((pair[0], pair[1]))
    return pairs


Added = dict[str, tuple[bool, int | None]]
"""For each added token: whether it is matched after cleaning the text, and its id or None."""


def read_special_tokens(
    directory: Path, whole: dict[str, Any]
) -> tuple[dict[str, str], Added, int]:
    """Read the bos, eos, unk and pad tokens, the added tokens, and the context length.

    Different versions of transformers wrote tokens to four different files. These are read in
    transformers' order, and a later entry replaces an earlier entry. If tokenizer_config.json has
    `added_tokens_decoder`, only this file is read. `whole` is the contents of tokenizer.json.
    Raises CheckpointError.
    """

    def read(name: str) -> dict[str, Any]:
        return read_json_if_there(directory / name, MOST_BYTES)

    config = read("tokenizer_config.json")
    try:
        _refuse_other_steps(directory / "tokenizer.json", config.get("tokenizer_class"), whole)
        found: Added = {}
        is_complete = "added_tokens_decoder" in config
        for id, token in config.get("added_tokens_decoder", {}).items():
            found |= _added_token(token, int(id))
        if not is_complete:
            config |= read("special_tokens_map.json")
        defaults = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "sep_token": None}
        defaults |= {"pad_token": EOS, "cls_token": None, "mask_token": None}
        named = {key: config.get(key) or token for key, token in defaults.items()}
        contents = {key: _added_token(token) for key, token in named.items() if token}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        added: Added = {}
        for one in contents.values():
            added |= one
        for token in extra.values() if isinstance(extra, dict) else extra:
            added |= _added_token(token)
        if not is_complete:
            for token, id in read("added_tokens.json").items():
                found |= _added_token({"content": token, "special": token in added}, id)
            for token in whole.get("added_tokens") or []:
                found |= _added_token(token, token["id"])
        if len(added | found) > MOST_ADDED:
            count = f"{len(added | found):,}"
            raise ValueError(f"expected at most {MOST_ADDED:,} added tokens, found {count}")
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: the special tokens in tokenizer_config.json, special_tokens_map.json, "
            "added_tokens.json or tokenizer.json are not as transformers writes them: "
            + shown(error)
        ) from None
    special = ("bos_token", "eos_token", "unk_token", "pad_token")
    length: Any = config.get("model_max_length")
    sane = type(length) is int and 2 <= length <= LONGEST_CONTEXT
    return (
        {key: next(iter(contents[key])) for key in special},
        added | found,
        length if sane else 77,
    )


def _refuse_other_steps(path: Path, name: Any, whole: dict[str, Any]) -> None:
    """Raise CheckpointError if a tokenizer.json cleans or splits texts differently from CLIP's.

    `name` is the class of the tokenizer. CLIPTokenizer does not use these steps of the file.
    """
    if not whole or name in (None, "CLIPTokenizer", "CLIPTokenizerFast"):
        return
    lists = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
    parts = [(whole.get(part) or {}).get(key, []) for part, key in lists.items()]
    steps = [step["type"] for part in parts for step in part]
    if steps != (expected := ["NFC", "Replace", "Lowercase", "Split", "ByteLevel"]):
        raise CheckpointError(
            f"{path}: the tokenizer {shown(name)} cleans and splits a text by {shown(steps)}; "
            f"expected CLIP's steps, {expected}. Make the ids with transformers.AutoTokenizer"
        )


def _added_token(token: Any, id: int | None = None) -> Added:
    """Read an added token from an entry of a file. By default, a token without an id is special."""
    if isinstance(token, str):
        token = {"content": token}
    content = token["content"]
    if not isinstance(content, str) or not content:
        raise ValueError(f"expected the content of a token, found {shown(content)}")
    if len(content) > LONGEST_ADDED:
        found = shown(content)
        raise ValueError(f"expected at most {LONGEST_ADDED} characters in a token, found {found}")
    # lstrip and rstrip are ignored, because they only remove whitespace, which gives no token ids.
    if token.get("single_word"):
        raise ValueError(f"single_word of {shown(content)} is set; no known CLIP has such tokens")
    if id is not None and type(id) is not int:
        raise ValueError(f"expected the id of {shown(content)} to be a number, found {shown(id)}")
    is_special = token.get("special", id is None)
    return {content: (bool(token.get("normalized", not is_special)), id)}
