"""Load a model, tokenizer and transform by name, and save all three to a directory."""

from os import PathLike
from typing import Any, NamedTuple

import torch

from miniclip.files.models import check_fits, open_model
from miniclip.files.modules import unwrapped
from miniclip.files.saving import one_version, saving_checkpoint
from miniclip.model import CLIP, TextTower, VisionTower
from miniclip.tokenizer import Tokenizer
from miniclip.transform import ImageTransform


class Loaded(NamedTuple):
    """What `load` returns. For a single tower, the tokenizer or the transform may be None."""

    model: CLIP
    tokenizer: Tokenizer
    transform: ImageTransform


@one_version
def load(
    name: str | PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    reference: str = "transformers",
    revision: str | None = None,
    subfolder: str | None = None,
    config: Any = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Loaded:
    """Load a checkpoint, and return its model, tokenizer and transform.

    Args:
        name: a checkpoint that comes with miniclip ("everyday"), a directory, a weights file
            (.safetensors, .bin, .pt), or a hub name such as "openai/clip-vit-base-patch32".
        dtype: the dtype of the weights. None keeps the dtype of the file.
        reference: the library whose token ids and pixels are matched, "transformers" or "openai".
        subfolder: a folder in the directory or the repository, such as "text_encoder".
        config: a CLIPConfig, a path, or a name ("ViT-L/14"). Replaces the checkpoint's config.
    Raises:
        CheckpointError: says which file is wrong, what was expected, and what was found.

    >>> model, tokenizer, transform = load("everyday")
    >>> model.encode_text(tokenizer(["a cat", "a dog"])).shape[0]
    2
    """
    options: Any = dict(subfolder=subfolder, cache_dir=cache_dir, local_files_only=local_files_only)
    stored = open_model(name, dtype, device, config=config, revision=revision, **options)
    options["revision"] = stored.commit or revision  # all files come from one commit
    classes: Any = {("vision",): VisionTower, ("text",): TextTower}
    model = classes.get(tuple(stored.towers), CLIP).from_stored(stored)
    tokenizer = transform = None
    if stored.has("tokenizer", name, **options):
        tokenizer = Tokenizer.from_pretrained(name, reference=reference, **options)
    if stored.has_openais_transform(name, **options):
        transform = ImageTransform(getattr(model, "vision", model).config.side, reference=reference)
    elif stored.has("transform", name, **options):
        transform = ImageTransform.from_pretrained(name, reference=reference, **options)
    check_fits(name, stored.fields, tokenizer, transform)
    return Loaded(model, tokenizer, transform)  # type: ignore[arg-type]


def save(
    directory: str | PathLike[str],
    model: CLIP,
    tokenizer: Tokenizer | None,
    transform: ImageTransform | None,
    *,
    layout: str = "transformers",
) -> None:
    """Write all files of a checkpoint, or none after an error. `load` reads back the same bits.

    `layout`: "transformers", "openai" (for openai/CLIP's build_model) or "open_clip". Raises
    CheckpointError if writing fails, or if `load` would read other files of the directory instead.
    """
    model = unwrapped(model)
    with saving_checkpoint(directory, layout, model, tokenizer, transform) as folder:
        model.save_pretrained(folder, layout)
