"""One checkpoint in several libraries, each used as its own documentation uses it."""

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
    """A CLIP that a library read from a directory. Ids are padded as the library pads them."""

    name: str
    model: Any  # a module of the library's own
    encode_image: Callable[[Tensor], Tensor]  # pixels (B, 3, S, S) -> (B, E)
    encode_text: Callable[[Tensor], Tensor]  # ids (B, T) -> (B, E)
    tokenize: Callable[[list[str]], Tensor]  # texts -> ids (B, T)
    transform: Callable[[list[Path]], Tensor]  # files -> pixels (B, 3, S, S)


def libraries(directory: Path, device: str, dtype: torch.dtype) -> list[Library]:
    """miniclip, transformers, and open_clip and openai/CLIP if they can be imported.

    The directory holds a checkpoint as `miniclip.save` writes it, and its vocabulary in OpenAI's
    form. Raises ValueError without transformers.
    """
    found = [use_miniclip(directory, device, dtype), use_transformers(directory, device, dtype)]
    for use in (use_open_clip, use_openai):
        try:
            found.append(use(directory, device, dtype))
        except ImportError:
            pass  # it is not installed, or torchvision is not
    return found


def use_miniclip(directory: Path, device: str, dtype: torch.dtype) -> Library:
    """miniclip's `load`."""
    model, tokenizer, transform = load(directory, device=device, dtype=dtype)
    return Library("miniclip", model, model.encode_image, model.encode_text, tokenizer, transform)


def use_transformers(directory: Path, device: str, dtype: torch.dtype) -> Library:
    """transformers' CLIPModel, CLIPTokenizer and CLIPImageProcessorPil."""
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
    """open_clip's. Raises ImportError if it is not installed."""
    import open_clip

    ours = CLIP.from_pretrained(directory)
    # It reads a text at its largest id, which is the end token in this vocabulary.
    text = replace(ours.config.text, eos_token_id=LEGACY_EOS, literal_eos=False)
    model = open_clip.CLIP(**to_open_clip(asdict(replace(ours.config, text=text))))
    tokenizer = open_clip.SimpleTokenizer(str(directory / OPENAI_VOCABULARY))
    preprocess = open_clip.image_transform(ours.config.vision.image_size, is_train=False)
    model = with_weights(model, ours).to(device, dtype)
    return in_openai_style("open_clip", model, tokenizer, preprocess, dtype)


def use_openai(directory: Path, device: str, dtype: torch.dtype) -> Library:
    """openai/CLIP's. Raises ImportError if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports pkg_resources, which is deprecated
        from clip import clip, model, simple_tokenizer

    ours = CLIP.from_pretrained(directory)
    vision, text = ours.config.vision, ours.config.text
    theirs = model.CLIP(
        ours.config.embed_dim,
        *(vision.image_size, vision.layers, vision.width, vision.patch_size),
        *(text.context_length, text.vocab_size, text.width, text.heads, text.layers),
    )
    # The vocabulary that clip.tokenize reads is a variable of its module.
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
    """A model whose methods and preprocessing have the names of openai/CLIP's."""
    return Library(
        name,
        model.eval(),
        lambda pixels: model.encode_image(pixels.to(dtype)),
        model.encode_text,
        tokenize,
        lambda paths: torch.stack([preprocess(Image.open(path)) for path in paths]),
    )


def with_weights(theirs: nn.Module, ours: CLIP) -> nn.Module:
    """Give a model of openai/CLIP or open_clip our weights. The two share their names."""
    theirs.load_state_dict(pack(ours.state_dict(), OPENAI), strict=True)
    return theirs
