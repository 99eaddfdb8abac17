"""Save a model or a whole checkpoint. Read a directory while another process saves to it."""

import fnmatch
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import wraps
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from miniclip.errors import CheckpointError, blaming, listed, wrong
from miniclip.files.configs import openai_numbers, refuse_inexpressible, to_transformers
from miniclip.files.hub import CONFIGS, HUB_FILES, VOCABULARIES, WEIGHTS, as_destination
from miniclip.files.models import PLAIN, Fork, check_fits
from miniclip.files.names import LAYOUTS, pack
from miniclip.files.open_clip import to_open_clip
from miniclip.files.published import Fields
from miniclip.files.reading import read_json_if_there
from miniclip.files.vocabularies import STALE
from miniclip.files.writing import (
    blaming_disk,
    complete_saves,
    finish_save,
    replacing,
    saving,
    write_json,
)

FILES = chain(*chain(*HUB_FILES.values()))
READ = re.compile("|".join(map(fnmatch.translate, FILES)))  # the names that `load` reads
F = TypeVar("F", bound=Callable[..., Any])
WRITTEN = dict.fromkeys(LAYOUTS, WEIGHTS[0]) | {"open_clip": "open_clip_model.safetensors"}


def write_model(
    directory: str | PathLike[str],
    fields: Fields,
    state: Mapping[str, Tensor],
    layout: str = "transformers",
    fork: Fork = PLAIN,
) -> None:
    """Write a model's config and weights: both files or none. The weights keep their dtype.

    If the directory has open_clip's image settings, they are kept. Raises CheckpointError if the
    files cannot be written, if the layout cannot express the model, or if `load` would read other
    files in the directory instead of the saved files.
    """
    directory = as_destination(directory)
    check_layout(layout)
    refuse_other_files(directory, layout)
    with blaming_disk(directory), blaming(directory):
        if layout != "transformers" and fork.model_type != "clip":
            reason = f"cannot store the class {fork.class_name}; use 'transformers'"
            raise ValueError(f"the layout {layout!r} {reason}")
        refuse_inexpressible(fields, layout)
        names: dict[Any, list[str]] = {}
        for name, tensor in state.items():
            if tensor.numel() and (place := tensor.data_ptr()):
                names.setdefault((tensor.device, place), []).append(name)
        if tied := [" = ".join(same) for same in names.values() if len(same) > 1]:
            raise ValueError(
                "cannot save here, because a parameter has more than one name: "
                f"{listed(tied)}. First give each name a copy: nn.Parameter(weight.clone())"
            )
        state = {name: tensor.cpu() for name, tensor in state.items()}
        tensors = pack(state, LAYOUTS[layout] | fork.tensor_names)
    config = directory / CONFIGS.get(layout, "")
    with saving(directory) as folder:
        if layout == "open_clip":
            settings = read_json_if_there(config) | {"model_cfg": to_open_clip(fields)}
            write_json(folder / config.name, {"model_cfg": {}, "preprocess_cfg": {}} | settings)
        elif layout == "openai":
            tensors |= openai_numbers(fields)
        else:
            class_name = "CLIPModel" if fork.model_type == "clip" else fork.class_name
            write_json(folder / config.name, to_transformers(fields, fork.model_type, class_name))
        with replacing(folder / WRITTEN[layout]) as temporary:
            try:
                save_file(tensors, temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(error) from error


@contextmanager
def saving_checkpoint(
    directory: str | PathLike[str], layout: str, model: Any, tokenizer: Any, transform: Any
) -> Iterator[Path]:
    """Yield a folder to save the model in. Then save the tokenizer and the transform there.

    At the end, either all files move to `directory` or none, as in `saving`. Raises CheckpointError
    if model, tokenizer and transform do not fit together, or if `load` would read other files in
    the directory instead of the saved files.
    """
    directory = as_destination(directory)
    check_layout(layout)
    check_fits(f"{directory}: not saved", asdict(model.config), tokenizer, transform)
    absent: tuple[str, ...] = () if tokenizer else VOCABULARIES
    absent += () if transform else tuple(HUB_FILES["transform"][0][:2])
    refuse_other_files(directory, layout, *absent)
    with saving(directory) as folder:
        kept = ["processor_config.json"] if transform else []
        kept += [CONFIGS["open_clip"]] if layout == "open_clip" else []
        for file in (directory / name for name in kept):
            if file.is_file():
                shutil.copy(file, folder)  # save_pretrained updates this copy
        yield folder
        if tokenizer:
            tokenizer.save_pretrained(folder)
            for stale in STALE:
                (folder / stale).touch()  # empty, so that `saving` deletes the old file
        if transform:
            transform.save_pretrained(folder)


def check_layout(layout: str) -> None:
    """Raise ValueError for an unknown layout."""
    if layout not in LAYOUTS:
        raise wrong("layout", layout, f"one of {', '.join(LAYOUTS)}")


def refuse_other_files(directory: Path, layout: str, *more: str) -> None:
    """Raise CheckpointError if `load` would read other files instead of the saved files."""
    others = [name for key, name in CONFIGS.items() if key != layout]
    others += [*WEIGHTS[: WEIGHTS.index(WRITTEN[layout])], *more]
    if there := [name for name in others if (directory / name).is_file()]:
        raise CheckpointError(
            f"{directory}: has {listed(there)}, which would be loaded instead of the saved files. "
            "Save to another directory, or first delete the files of the other checkpoint"
        )


def one_version(read: F) -> F:
    """Decorate the function `read`. If a save changes the files during a read, `read` is repeated.

    `read` takes the name of a checkpoint as its last positional argument, `name` or `directory`.
    """

    @wraps(read)
    def reading(*args: Any, **options: Any) -> Any:
        given = options.get("name", options.get("directory", args[-1] if args else ""))
        name = Path(os.path.expanduser(given))
        directory, file = (name.parent, name.name) if os.path.isfile(name) else (name, "")
        directory /= options.get("subfolder") or "."
        if not os.path.isdir(directory):
            return read(*args, **options)
        for _ in range(1000):
            with suppress(OSError):  # `read` calls `finish_save` again and reports its error
                finish_save(directory)
            before = _state(directory, file)
            is_whole = not complete_saves(directory)  # a save may have moved only some of its files
            result, error = None, None
            try:
                result = read(*args, **options)
            except (ValueError, OSError) as raised:
                error = raised
            if _state(directory, file) == before and (is_whole or error):
                if error:
                    raise error
                return result
        raise CheckpointError(f"{directory}: other processes saved here during each of 1,000 reads")

    return reading  # type: ignore[return-value]


def _state(directory: Path, weights: str) -> dict[str, tuple[int, int, int]]:
    """The inode, time and size of the file `weights` and of each other file that `load` reads. Each
    save changes at least one of these numbers."""
    state = {}
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name == weights or READ.match(entry.name):
                found = entry.stat()
                state[entry.name] = (found.st_ino, found.st_mtime_ns, found.st_size)
    return state
