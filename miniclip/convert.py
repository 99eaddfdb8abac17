"""A checkpoint in another layout: each weight with the same bits, in its own dtype."""

from os import PathLike
from typing import Any, NamedTuple

from miniclip.checkpoint import save
from miniclip.files.hub import has_files
from miniclip.files.models import Stored, check_vocab_fits, open_model
from miniclip.files.names import LAYOUTS, Place, place
from miniclip.files.saving import one_version
from miniclip.model import CLIP
from miniclip.tokenizer import Tokenizer
from miniclip.transform import ImageTransform


class Mapped(NamedTuple):
    """A parameter's places in two files, and its name and form between them."""

    source: Place
    name: str
    destination: Place
    shape: tuple[int, ...]
    dtype: Any


class Conversion(NamedTuple):
    """What `convert` did."""

    layout: str  # of the source
    parameters: list[Mapped]
    tokenizer: bool  # whether there was one to write
    transform: bool


def convert(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    layout: str,
    *,
    tokenizer: str | PathLike[str] | None = None,
    revision: str | None = None,
) -> Conversion:
    """Write a checkpoint in another layout.

    The source's tokenizer and transform are written as well, if it has any. `tokenizer` names
    another checkpoint for the first, because OpenAI's own files have none. Raises CheckpointError.
    """
    stored, model, words, transform = _read(tokenizer, revision, source)
    save(destination, model, words, transform, layout=layout)
    rows = [
        Mapped(
            place(name, stored.table), name, place(name, LAYOUTS[layout]), tuple(t.shape), t.dtype
        )
        for name, t in model.state_dict().items()
    ]
    return Conversion(stored.layout, rows, words is not None, transform is not None)


@one_version
def _read(
    tokenizer: str | PathLike[str] | None, revision: str | None, source: str | PathLike[str]
) -> tuple[Stored, CLIP, Tokenizer | None, ImageTransform | None]:
    stored = open_model(source, None, revision=revision)
    options: Any = {"revision": stored.commit or revision}  # a branch may move meanwhile
    model = CLIP.from_stored(stored)
    words = transform = None
    if tokenizer is not None:
        words = Tokenizer.from_pretrained(tokenizer)
    elif has_files("tokenizer", source, **options) and stored.has("tokenizer", source, **options):
        words = Tokenizer.from_pretrained(source, **options)
    if words:
        check_vocab_fits(tokenizer or source, words, stored.fields["text"])
    if stored.has_openais_transform(source, **options):
        transform = ImageTransform(model.config.vision.side)
    elif has_files("transform", source, **options):
        transform = ImageTransform.from_pretrained(source, **options)
    return stored, model, words, transform
