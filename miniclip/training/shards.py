"""Pairs from tar shards, which are files, outputs of commands or addresses."""

import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from subprocess import PIPE, Popen
from typing import Any

import fsspec

from miniclip.errors import ImageError
from miniclip.evaluation.captions import caption_of
from miniclip.files.pictures import is_picture, open_image, with_name
from miniclip.files.tars import members
from miniclip.training.pairs import Pair, caption_label, note_once, shuffled, to_bytes
from miniclip.transform import ImageTransform

PICTURES = ("jpg", "jpeg", "png", "webp")  # if a sample has several images, use the first ending


class Shards:
    """WebDataset tar shards. A sample is an image and a .txt with the same name.

    A shard is a file, the output of a command ("pipe:curl -s URL/{000..099}.tar" gives a hundred
    shards), or an address that fsspec opens ("hf://datasets/OWNER/NAME/0.tar").

    Every process reads all shards and decodes its own share of the images, so the batches do not
    depend on the number of processes. Shards are in random order, and a buffer shuffles samples.
    The first call of `len` reads all shards, to count the samples.
    """

    BUFFER = 1000  # samples

    def __init__(self, paths: Iterable[str], transform: ImageTransform) -> None:
        if find_spec("webdataset") is None:
            raise ValueError("tar shards need webdataset: pip install 'miniclip[train]'")
        from webdataset.shardlists import expand_urls

        several = (expand_urls(path) if is_address(path) else [path] for path in paths)
        self.paths = sorted(chain.from_iterable(several))
        self.skipped: list[str] = []
        self._to_bytes = to_bytes(transform)
        self._count: int | None = None

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(1 for _ in self._samples(self.paths))
        return self._count

    def items(self, seed: int) -> Iterator[dict[str, Any]]:
        """Yield all samples, in an order that the seed decides."""
        from webdataset.filters import shuffle

        order = [self.paths[i] for i in shuffled(len(self.paths), seed)]
        yield from shuffle(self.BUFFER, rng=random.Random(seed))(self._samples(order))

    def captions(self) -> Iterator[str]:
        """Return the caption of every sample."""
        return map(_caption, self._samples(self.paths))

    def _samples(self, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield complete, undecoded samples. Report a damaged shard and skip the rest of it."""
        from webdataset.tariterators import group_by_keys, tar_file_expander

        def note(error: Exception) -> bool:
            text = getattr(error, "strerror", None) or (error.args[0] if error.args else error)
            reason = str(text).partition(" @ ")[0]
            note_once(self.skipped, f"{path}: {reason}")
            return True

        def files() -> Iterator[dict[str, Any]]:
            if is_address(path):
                with open_shard(path) as stream:
                    yield from tar_file_expander([{"url": path, "stream": stream}], handler=note)
                return
            for file in members(path, self.skipped):
                if not re.match(r"__[^/]*__($|/)", file.name):  # such names are metadata
                    yield {"__url__": path, "fname": file.name, "data": file.read()}

        for path in paths:
            try:
                for sample in group_by_keys(files(), handler=note):
                    if _kind(sample) and _caption(sample).strip():
                        yield sample
                    else:
                        missing = "expected an image and a .txt with its caption in UTF-8"
                        note_once(self.skipped, f"{_place(sample)}: {missing}")
            except Exception as error:  # a file system, a network or a command can raise any error
                note(error)

    def __getitem__(self, item_and_draw: tuple[dict[str, Any], int]) -> Pair | None:
        sample, _ = item_and_draw
        kind = _kind(sample)
        try:
            pixels = self._to_bytes(open_image(io.BytesIO(sample[kind])))
        except ImageError as error:
            note_once(self.skipped, with_name(f"{_place(sample)}.{kind}", error))
            return None
        caption = _caption(sample)
        return Pair(pixels, caption, caption_label(caption))


def is_address(name: str | os.PathLike[str]) -> bool:
    """Return whether a name is a command or an address, not a path."""
    return str(name).startswith("pipe:") or "://" in str(name)


@contextmanager
def open_shard(path: str) -> Iterator[Any]:
    """Open a shard that has an address, or that is the output of a command."""
    if not path.startswith("pipe:"):
        with fsspec.open(path) as stream:
            yield stream
        return
    with Popen(path[5:], shell=True, stdout=PIPE) as process:
        assert process.stdout
        try:
            yield process.stdout
        except GeneratorExit:  # the caller needs no more data
            process.kill()
            raise
        while process.stdout.read(2**20):  # a command fails if its output is not read to the end
            pass
    if process.returncode:
        raise OSError(f"the command ended with exit status {process.returncode}")


def _caption(sample: dict[str, Any]) -> str:
    return caption_of(sample.get("txt", b""))


def _kind(sample: dict[str, Any]) -> str:
    """Return the ending of the sample's image, or "". An ending that contains a dot, such as
    seg.png in 0.seg.png, belongs to another kind of image."""
    kinds = (*PICTURES, *(kind for kind in sample if "." not in kind and is_picture(f"0.{kind}")))
    return next((kind for kind in kinds if kind in sample), "")


def _place(sample: dict[str, Any]) -> str:
    return f"{sample.get('__url__', '')}: {sample.get('__key__', '')}"
