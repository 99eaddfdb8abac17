"""Load one checkpoint in several libraries, as the documentation of each library shows."""

import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from miniclip.checkpoint import load
from miniclip.config import LEGACY_EOS
from miniclip.files.hub import OPENAI_VOCABULARY
from miniclip.files.names import OPENAI, pack
from miniclip.files.open_clip import to_open_clip
from miniclip.model import CLIP
from miniclip.peers import import_transformers


class Library(NamedTuple):
    """A CLIP that a library has loaded. The library decides how token ids are padded."""

    name: str
    model: Any  # the library's own module
    encode_image: Callable[[Tensor], Tensor]  # pixels (B, 3, S, S) -> (B, E)
    encode_text: Callable[[Tensor], Tensor]  # ids (B, T) -> (B, E)
    tokenize: Callable[[list[str]], Tensor]  # texts -> ids (B, T)
    transform: Callable[[list[Path]], Tensor]  # files -> pixels (B, 3, S, S)


def libraries(directory: Path, device: str, dtype: torch.dtype) -> list[Library]:
    """Load a checkpoint in miniclip, transformers and, if installed, open_clip and openai/CLIP.

    The directory has a checkpoint that `miniclip.save` wrote, and its vocabulary in OpenAI's file
    format. Raises ValueError if transformers is not installed.
    """
    found = [use_miniclip(directory, device, dtype), use_transformers(directory, device, dtype)]
    for use in (use_open_clip, use_openai):
        try:
            found.append(use(directory, device, dtype))
        except ImportError:
            pass  # the library or torchvision is not installed
    return found


def use_miniclip(directory: Path, device: str, dtype: torch.dtype) -> Library:
    """Load the checkpoint with miniclip."""
    model, tokenizer, transform = load(directory, device=device, dtype=dtype)
    return Library("miniclip", model, model.encode_image, model.encode_text, tokenizer, transform)


def use_transformers(directory: Path, device: str, dtype: torch.dtype) -> Library:
    """Load the checkpoint with transformers."""
    transformers = import_transformers()
    model = transformers.CLIPModel.from_pretrained(directory, dtype=dtype).to(device).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(directory)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(directory)

    def transform(paths: list[Path]) -> Tensor:
        return processor([Image.open(path) for path in paths], return_tensors="pt").pixel_values

    return Library(
        "transformers",
        model,
        lambda pixels: model.get_image_features(pixels).pooler_output,
        lambda ids: model.get_text_features(ids).pooler_output,
        lambda texts: tokenizer(texts, padding=True, return_tensors="pt").input_ids,
        transform,
    )


def use_open_clip(directory: Path, device: str, dtype: torch.dtype) -> Library:
    """Load the checkpoint with open_clip. Raises ImportError if it is not installed."""
    import open_clip

    ours = CLIP.from_pretrained(directory)
    # open_clip reads the embedding at the largest id, which is the end token of this vocabulary.
    text = replace(ours.config.text, eos_token_id=LEGACY_EOS, literal_eos=False)
    model = open_clip.CLIP(**to_open_clip(asdict(replace(ours.config, text=text))))
    tokenizer = open_clip.SimpleTokenizer(str(directory / OPENAI_VOCABULARY))
    preprocess = open_clip.image_transform(ours.config.vision.image_size, is_train=False)
    model = with_weights(model, ours).to(device, dtype)
    return in_openai_style("open_clip", model, tokenizer, preprocess, dtype)


def use_openai(directory: Path, device: str, dtype: torch.dtype) -> Library:
    """Load the checkpoint with openai/CLIP. Raises ImportError if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # openai/CLIP imports pkg_resources, which is deprecated
        from clip import clip, model, simple_tokenizer

    ours = CLIP.from_pretrained(directory)
    vision, text = ours.config.vision, ours.config.text
    theirs = model.CLIP(
        ours.config.embed_dim,
        *(vision.image_size, vision.layers, vision.width, vision.patch_size),
        *(text.context_length, text.vocab_size, text.width, text.heads, text.layers),
    )
    # clip.tokenize takes its vocabulary from this variable.
    clip._tokenizer = simple_tokenizer.SimpleTokenizer(str(directory / OPENAI_VOCABULARY))
    theirs = with_weights(theirs, ours).to(device, dtype)
    preprocess = clip._transform(vision.image_size)
    return in_openai_style("openai/CLIP", theirs, clip.tokenize, preprocess, dtype)


def in_openai_style(
    name: str,
    model: Any,
    tokenize: Callable[[list[str]], Tensor],
    preprocess: Callable[[Image.Image], Tensor],
    dtype: torch.dtype,
) -> Library:
    """Make a Library from a model that has the methods and the preprocessing of openai/CLIP."""
    return Library(
        name,
        model.eval(),
        lambda pixels: model.encode_image(pixels.to(dtype)),
        model.encode_text,
        tokenize,
        lambda paths: torch.stack([preprocess(Image.open(path)) for path in paths]),
    )


def with_weights(theirs: nn.Module, ours: CLIP) -> nn.Module:
    """Put our weights into a model of openai/CLIP or open_clip. Both use OpenAI's tensor names."""
    theirs.load_state_dict(pack(ours.state_dict(), OPENAI), strict=True)
    return theirs
