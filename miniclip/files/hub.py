"""Find the directory of a checkpoint by its name: embedded, local or downloaded from the hub."""

import hashlib
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from miniclip.errors import CheckpointError, listed, shown
from miniclip.files.published import openai_id
from miniclip.files.reading import read_json
from miniclip.files.writing import finish_save

log = logging.getLogger("miniclip")  # the command prints this log; in Python it is off by default

PACKAGE = Path(__file__).resolve().parent.parent
# An installed package contains the weights. In a checkout they are beside the package.
EMBEDDED = next(
    (d for d in (PACKAGE / "weights", PACKAGE.parent / "weights") if d.is_dir()),
    PACKAGE / "weights",
)

CONFIGS = {"transformers": "config.json", "open_clip": "open_clip_config.json"}
ADAPTER = "adapter_config.json"  # of PEFT
OPENAI_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
VOCABULARIES = ("vocab.json", "tokenizer.json", OPENAI_VOCABULARY)
HUB_FILES = {
    "config": ([*CONFIGS.values()],),
    "model": (
        [*CONFIGS.values(), "model.safetensors", "model.safetensors.index.json"]
        + ["model-*.safetensors", ADAPTER],
        ["config.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"],
        ["open_clip_config.json", "open_clip_model.safetensors"],
        ["open_clip_config.json", "open_clip_pytorch_model.bin"],
    ),
    "tokenizer": (
        [*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
        + ["added_tokens.json", "open_clip_config.json"],
    ),
    "transform": (["preprocessor_config.json", "processor_config.json", "open_clip_config.json"],),
}
"""The files of each part of a checkpoint. A model has several lists: a list is downloaded only if
the lists before it gave no weights."""
CHECKED = ".miniclip-checked"  # in a repository's cache: a list of the verified files
SUFFIXES = (".safetensors", ".bin", ".pt")
WEIGHTS = tuple(
    f"{file}{index}"
    for file in ("model.safetensors", "pytorch_model.bin")
    for index in ("", ".index.json")
) + ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
ADDRESS = re.compile(
    r"(?:hf[-_]hub:|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)(?P<id>[^/?#]+/[^/?#]+)"
    r"(?:/tree/(?P<revision>[^/?#]+)(?:/(?P<folder>[^?#]+?))?)?/?(?:[?#].*)?"
)
"""A hub id with open_clip's prefix "hf-hub:", or the address of a repository's web page."""


def embedded_names() -> list[str]:
    """The checkpoints that come with the package."""
    return sorted(config.parent.name for config in EMBEDDED.glob("*/config.json"))


def resolve(
    name: str | PathLike[str],
    kind: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The directory of a checkpoint. From the hub, only the files of one `kind` are downloaded.

    `kind` is a key of HUB_FILES. `subfolder` is a folder inside the directory or the repository.
    A name such as "everyday" always gives the embedded checkpoint. For a directory with this name,
    write "./everyday". Raises CheckpointError.
    """
    address = None if os.path.exists(as_path(name)) else ADDRESS.fullmatch(str(name))
    if address:
        said = {part: text and unquote(text) for part, text in address.groupdict().items()}
        revision, subfolder = revision or said["revision"], subfolder or said["folder"]
    folder = subfolder or "."
    if os.path.isabs(folder) or ".." in Path(folder).parts:
        raise CheckpointError(f"subfolder is {shown(folder)}; expected a folder inside {name}")
    embedded = embedded_names()
    path = EMBEDDED / name if name in embedded else as_path(name)
    if str(name) and (os.path.isdir(path) or os.path.isfile(path)):
        directory = _inside(path if os.path.isdir(path) else path.parent, folder)
        if revision not in (None, "main", commit_of(directory)):
            raise CheckpointError(
                f"{name}: revision is {shown(revision)}, but only a repository of the hub has "
                "revisions; leave it out"
            )
        try:
            finish_save(directory)
        except OSError as error:
            raise CheckpointError(
                f"{directory}: a save was interrupted here, and its files cannot be moved into the "
                f"directory: {error}"
            ) from error
        return directory
    id = address["id"] if address else openai_id(str(name)) or str(name)
    if id in embedded:
        raise CheckpointError(
            f"no directory called {id!r}. A Path never means the embedded checkpoint; for that, "
            f"give the string {id!r}"
        )
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", id) or Path(id).suffix in SUFFIXES:
        raise CheckpointError(
            f"no checkpoint called {shown(str(name))}: expected one of {', '.join(embedded)}, a "
            "directory, a weights file, or a hub id such as openai/clip-vit-base-patch32"
            + "; remove the space around the name"
            * (str(name) != str(name).strip())
        )
    return _download(id, kind, revision, folder, cache_dir, local_files_only)


def _inside(directory: Path, folder: str) -> Path:
    """The path of a subfolder of `directory`. Raises CheckpointError if there is no such folder."""
    if not (directory / folder).is_dir():
        folders = listed(sorted(f.name for f in directory.iterdir() if f.is_dir()), most=10)
        raise CheckpointError(
            f"{directory}: has no folder {shown(folder)}; it has {folders or 'no folders'}"
        )
    return directory / folder


def as_path(name: str | PathLike[str]) -> Path:
    """Return a name as a path. Test it with os.path.isfile: Path.is_file may raise OSError."""
    return Path(os.path.expanduser(name))


def as_destination(directory: str | PathLike[str]) -> Path:
    """The path of a directory that will be written. Raises CheckpointError for the name of an
    embedded checkpoint, because `load` would read the embedded checkpoint."""
    if directory in embedded_names():
        raise CheckpointError(
            f"{directory}: not saved, because `load({directory!r})` gives the embedded checkpoint. "
            f"Save to './{directory}' or to another directory"
        )
    return as_path(directory)


def is_local(name: str | PathLike[str]) -> bool:
    """Whether a name is an embedded checkpoint, a directory or a file, and not a hub repository."""
    return name in embedded_names() or os.path.exists(as_path(name))


@cache
def _say_once(message: str) -> None:
    log.info(message)


def _download(
    repository: str,
    kind: str,
    revision: str | None,
    folder: str,
    cache_dir: str | PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    from huggingface_hub import constants, snapshot_download  # imported here because it is slow

    if not (local_files_only or constants.HF_HUB_OFFLINE):  # the hub may take minutes to answer
        _say_once(f"asking the Hugging Face hub for {repository}")
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    home = cache / f"models--{repository.replace('/', '--')}"
    before = {path for path in home.rglob("*") if path.is_file() and not path.is_symlink()}
    for patterns in HUB_FILES[kind]:
        paths = [os.path.normpath(f"{folder}/{name}") for name in patterns]
        options: Any = {"revision": revision, "local_files_only": local_files_only}
        try:
            snapshot = snapshot_download(
                repository, cache_dir=cache, allow_patterns=paths, **options
            )
        except Exception as error:  # the hub client's errors have no common base class
            said: BaseException = error
            if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__:
                said = error.__cause__  # show the network's error, not the client's advice
            reason = " ".join(str(said).split()).rstrip(".")
            raise CheckpointError(
                f"{repository} is not a directory here, and the hub's client cannot download it. "
                f"Offline, use a directory or an embedded checkpoint: {', '.join(embedded_names())}"
                f". The client says {type(said).__name__}: {reason}"
            ) from error
        revision = Path(snapshot).name  # the next request must get the same commit
        directory = _inside(Path(snapshot), folder)
        ask = partial(_hashes_at, repository, revision, local_files_only)
        _check_hashes(directory, home / CHECKED, before, ask)
        if kind != "model" or weights_in(directory):
            break
    return directory


def commit_of(path: Path) -> str | None:
    """The commit in a path of the hub's cache, or None for any other path."""
    found = re.search(r"(?:^|/)models--[^/]+/snapshots/([^/]+)", path.as_posix())
    return found[1] if found else None


def _hashes_at(repository: str, commit: str, local_files_only: bool) -> dict[str, str]:
    """The hash of each file at a commit. Empty if the hub is not asked, or does not answer."""
    from huggingface_hub import HfApi

    if not local_files_only:
        with suppress(Exception):  # without a network, a later load will check the files
            # Without a network, `list_repo_tree` would try again for minutes.
            info = HfApi().model_info(repository, revision=commit, files_metadata=True, timeout=10)
            return {
                file.rfilename: str(file.lfs.sha256 if file.lfs else file.blob_id)
                for file in info.siblings or []
            }
    return {}


def _check_hashes(
    directory: Path, checked: Path, before: set[Path], ask: Callable[[], dict[str, str]]
) -> None:
    """Verify each cached file against its hash once, because the hub's client does not.

    A cached file is a link to a file whose name is the hash. In a cache without links, `ask` gives
    the hash. The file `checked` is a list of the verified files. Raises CheckpointError if a hash
    differs. If a damaged file is not in `before`, this load downloaded it, so the file is deleted.
    """
    noted = set(checked.read_text().splitlines()) if checked.is_file() else set()
    hashes = None
    for file in filter(Path.is_file, directory.glob("*")):
        blob = file.resolve()
        note = f"{os.path.relpath(blob, checked.parent.resolve())} {blob.stat().st_mtime_ns}"
        if note in noted:
            continue
        expected = blob.name
        if not file.is_symlink():
            hashes = ask() if hashes is None else hashes
            _, _, inside = file.as_posix().rpartition("/snapshots/")
            expected = hashes.get(inside.partition("/")[2], "")
        if expected and not _has_its_hash(blob, expected):
            if blob in {path.resolve() for path in before}:
                raise CheckpointError(
                    f"{file} is not the file of the hub: its hash differs. Delete the file to "
                    "download it again. If you have edited it, load a copy of the folder"
                )
            advice = "The file is deleted; load again to download it again"
            try:
                for path in {file, blob}:
                    path.unlink()
            except OSError as error:
                advice = f"The file cannot be deleted: {error.strerror}"
            what = "was damaged in the download from the hub: its hash differs"
            raise CheckpointError(f"{file} {what}. {advice}")
        if expected:
            with suppress(OSError), open(checked, "a") as notes:  # a cache may be read-only
                notes.write(f"{note}\n")


def _has_its_hash(blob: Path, name: str = "") -> bool:
    """Whether `name` is the hash of a cached file's content. By default, `name` is the file's name.

    The hub's cache names large files by their sha256 and small files by git's sha1. A mirror of
    the hub may use the plain sha1. A name that is not a hash is accepted without a check.
    """
    name = name or blob.name
    git = hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    digests = {64: [hashlib.sha256()], 40: [git, hashlib.sha1()]}.get(len(name), [])
    with open(blob, "rb") as file:
        while digests and (chunk := file.read(1 << 20)):
            for digest in digests:
                digest.update(chunk)
    return not digests or name in [digest.hexdigest() for digest in digests]


def weights_in(directory: Path) -> Path | None:
    """The weights file of a directory, or the index of its shards, or None."""
    only = "" if is_clips(directory) else "open_clip"
    names = (name for name in WEIGHTS if name.startswith(only))
    return next((directory / name for name in names if (directory / name).is_file()), None)


def is_clips(directory: Path) -> bool:
    """Whether config.json describes the CLIP. False for a timm config beside open_clip's config."""
    config, open_clip = (directory / name for name in CONFIGS.values())
    return not (open_clip.is_file() and config.is_file() and "architecture" in read_json(config))


def has_files(kind: str, name: str | PathLike[str], **options: Any) -> bool:
    """Whether a checkpoint has a "tokenizer" or a "transform". `options` go to `resolve`."""
    directory = resolve(name, kind, **options)
    files = VOCABULARIES if kind == "tokenizer" else HUB_FILES[kind][0]
    return any((directory / file).is_file() for file in files)
