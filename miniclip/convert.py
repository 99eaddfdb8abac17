"""Write a checkpoint in another layout. Each weight keeps its bits and its dtype.

```python
from miniclip.convert import convert

miniclip.save("mine", model, tokenizer, transform)  # in transformers' layout, or layout="open_clip"
convert("mine", "theirs", "open_clip")  # every weight keeps its bits
tower = miniclip.VisionTower.from_pretrained("mine")  # or TextTower: a single tower
```

    miniclip convert mine --out theirs --layout open_clip

All three layouts are read and written. These files can be read:

- transformers: safetensors, shards or `.bin`, with both towers or one (as in Stable Diffusion)
- OpenAI: a state dict or a TorchScript archive. Its shapes give the config. Its code is not run
- open_clip: files with `open_clip_config.json`, or a vision tower with timm's `config.json`

OpenAI's own files have no vocabulary: add `--tokenizer openai/clip-vit-base-patch32`. Published
configs are in `miniclip.published.PUBLISHED`. To publish a checkpoint, use huggingface_hub:

    miniclip.save("mine", model, tokenizer, transform)
    HfApi().create_repo("me/mine", exist_ok=True)
    HfApi().upload_folder(repo_id="me/mine", folder_path="mine")

Compiled and exported graphs include the causal mask. Their outputs equal the model's up to rounding
error. `torch.export.save` can write a tower, but not a CLIP, because a CLIP returns a named tuple.
To export to ONNX, with any number of images and texts, install `onnx` and `onnxscript`:

```python
images, texts = torch.export.Dim("images"), torch.export.Dim("texts")
tokens = torch.export.Dim("tokens", min=2, max=model.config.text.context_length)
example = (pixels.repeat(2, 1, 1, 1), ids)
sizes = ({0: images}, {0: texts, 1: tokens})
torch.onnx.export(model, example, "clip.onnx", dynamo=True, dynamic_shapes=sizes, verbose=False)
```
"""

from os import PathLike
from typing import Any, NamedTuple

from miniclip.checkpoint import save
from miniclip.files.hub import has_files
from miniclip.files.models import Stored, check_fits, open_model
from miniclip.files.names import LAYOUTS, Place, place
from miniclip.files.saving import one_version
from miniclip.model import CLIP
from miniclip.tokenizer import Tokenizer
from miniclip.transform import ImageTransform


class Mapped(NamedTuple):
    """A parameter: its `Place` in both files, its name in miniclip, its shape and its dtype."""

    source: Place
    name: str
    destination: Place
    shape: tuple[int, ...]
    dtype: Any


class Conversion(NamedTuple):
    """What `convert` did."""

    layout: str  # of the source
    parameters: list[Mapped]
    tokenizer: bool  # whether a tokenizer was written
    transform: bool  # whether a transform was written


def convert(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    layout: str,
    *,
    tokenizer: str | PathLike[str] | None = None,
    revision: str | None = None,
) -> Conversion:
    """Write a checkpoint in another layout.

    If the source has a tokenizer or a transform, they are written too. OpenAI's files have no
    tokenizer, so `tokenizer` can name another checkpoint that has one. Raises CheckpointError.
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
    options: Any = {"revision": stored.commit or revision}  # read all files from one commit
    model = CLIP.from_stored(stored)
    words = transform = None
    if tokenizer is not None:
        words = Tokenizer.from_pretrained(tokenizer)
    elif has_files("tokenizer", source, **options) and stored.has("tokenizer", source, **options):
        words = Tokenizer.from_pretrained(source, **options)
    if stored.has_openais_transform(source, **options):
        transform = ImageTransform(model.config.vision.side)
    elif has_files("transform", source, **options):
        transform = ImageTransform.from_pretrained(source, **options)
    check_fits(tokenizer or source, stored.fields, words, None)
    check_fits(source, stored.fields, None, transform)
    return stored, model, words, transform
