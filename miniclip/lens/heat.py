"""Where a text is seen in an image, by several methods, as a map and as a picture."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from PIL import Image, ImageOps
from torch import Tensor

from miniclip.checkpoint import Loaded
from miniclip.files.checks import as_list
from miniclip.files.pictures import Picture
from miniclip.follow import follow, ids_for, patch_grid
from miniclip.lens.attention import attention_maps, gradcam, relevance, rollout
from miniclip.lens.decompose import decompose
from miniclip.lens.reading import on_grid
from miniclip.model import CLIP
from miniclip.transform import ImageTransform


def last_attention(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """What the class token looks at in the last block, the mean of the heads; blind to the text."""
    follow("last_attention", model.vision, ("forward", "pool"))
    return on_grid(model, pixels, attention_maps(model, pixels)[-1][:, :, 0].mean(1))


def head_map(model: CLIP, pixels: Tensor, layer: int, head: int) -> Tensor:
    """What the class token looks at, by one head of one block; blind to any text.

    (B, rows, columns). Raises ValueError where there is no such block or head.

    >>> from miniclip import CLIP
    >>> head_map(CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64), layer=3, head=0).shape
    torch.Size([1, 8, 8])
    """
    follow("head_map", model.vision, ("forward", "pool"))
    maps = attention_maps(model, pixels)
    if not 0 <= layer < len(maps) or not 0 <= head < maps[layer].shape[1]:
        heads = [pattern.shape[1] for pattern in maps]
        raise ValueError(f"no head {head} in layer {layer}; the layers, from 0, have {heads} heads")
    return on_grid(model, pixels, maps[layer][:, head, 0])


def rollout_map(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """`rollout`; blind to the text."""
    return on_grid(model, pixels, rollout(model, pixels))


def relevance_map(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """`relevance` of the image's patches for the text."""
    return on_grid(model, pixels, relevance(model, pixels, ids).image)


def gradcam_map(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """`gradcam` of the image's patches for the text."""
    return on_grid(model, pixels, gradcam(model, pixels, ids))


@torch.no_grad()
def token_map(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """What all heads, by `decompose`, write from each patch in the direction of the text."""
    texts = model.encode_text(ids, normalize=True)  # (B, E)
    parts = decompose(model, pixels, by="token")
    tokens = sum(part.sum(1) for part in parts.values() if part.ndim == 4)  # (B, T, E)
    return on_grid(model, pixels, torch.einsum("bte,be->bt", tokens, texts))


@torch.no_grad()
def occlusion(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """What the cosine loses where the image is covered.

    Windows of two by two patches are covered with grey, one after another, and what is lost is
    shared out among the patches that were covered (Zeiler and Fergus 2013, arXiv 1311.2901).
    Positive: the image is less like the text without this patch.
    """
    patch = model.vision.patch_embed.stride[0]
    rows, columns = patch_grid(model.vision, pixels)
    corners = [(i, j) for i in range(max(rows - 1, 1)) for j in range(max(columns - 1, 1))]
    texts = model.encode_text(ids, normalize=True)  # (B, E)
    heat, times = texts.new_zeros(len(texts), rows, columns), texts.new_zeros(rows, columns)
    # A picture with several texts in a row is covered and encoded once. On a GPU this waits, once.
    repeats = [1] * len(pixels)
    if not pixels.is_meta:
        repeats = torch.unique_consecutive(pixels, dim=0, return_counts=True)[1].tolist()
    first = 0
    for count in repeats:
        covered = pixels[first].repeat(1 + len(corners), 1, 1, 1)
        for one, (i, j) in zip(covered[1:], corners):
            one[:, i * patch : (i + 2) * patch, j * patch : (j + 2) * patch] = 0
        embeds = model.encode_image(covered, normalize=True)  # (1 + windows, E)
        same = slice(first, first + count)
        cosines = texts[same] @ embeds.T  # (count, 1 + windows)
        for n, (i, j) in enumerate(corners, 1):
            lost = cosines[:, 0] - cosines[:, n]
            heat[same, i : i + 2, j : j + 2] += lost[:, None, None]
        first += count
    for i, j in corners:
        times[i : i + 2, j : j + 2] += 1
    return heat / times


METHODS: dict[str, Callable[[CLIP, Tensor, Tensor], Tensor]] = {
    "attention": last_attention,
    "rollout": rollout_map,
    "relevance": relevance_map,
    "gradcam": gradcam_map,
    "tokens": token_map,
    "occlusion": occlusion,
}


BLIND = ("attention", "rollout")  # the methods whose map is the same for every text


def text_maps(
    image: Picture, texts: str | Iterable[str], loaded: Loaded, method: str = "relevance"
) -> Tensor:
    """Where each of C texts is seen in the image, patch by patch: (C, rows, columns).

    `method` is a key of METHODS. Raises ImageError, ContextLengthError, and ValueError for another
    method or a text without a word.

    >>> import miniclip
    >>> picture, texts = Image.new("RGB", (80, 64)), ["a red circle", "a blue star"]
    >>> text_maps(picture, texts, miniclip.load("shapes")).shape
    torch.Size([2, 8, 8])
    """
    if method not in METHODS:
        raise ValueError(f"no method is called {method!r}; expected one of {', '.join(METHODS)}")
    texts = as_list(texts)
    if not all(text.strip() for text in texts):
        raise ValueError("a text is empty: expected at least one word in it")
    model, tokenizer, transform = loaded
    device = model.logit_scale.device
    ids = ids_for(model.text, tokenizer, texts).to(device)  # (C, T)
    pixels = transform([image]).to(device).expand(len(ids), -1, -1, -1)
    return METHODS[method](model, pixels, ids).float().cpu()


@torch.no_grad()
def cosines(image: Picture, texts: str | Iterable[str], loaded: Loaded) -> Tensor:
    """How like the image each of C texts is: the cosines of their embeddings, (C,)."""
    model, tokenizer, transform = loaded
    device = model.logit_scale.device
    ids = ids_for(model.text, tokenizer, as_list(texts)).to(device)
    image_embeds = model.encode_image(transform([image]).to(device), normalize=True)  # (1, E)
    return (model.encode_text(ids, normalize=True) @ image_embeds[0]).float().cpu()


def text_map(image: Picture, text: str, loaded: Loaded, method: str = "relevance") -> Tensor:
    """The same for one text: (rows, columns)."""
    return text_maps(image, [text], loaded, method)[0]


def heatmap(image: Picture, text: str, loaded: Loaded, method: str = "relevance") -> Image.Image:
    """A picture of where the text is seen: the image as the model sees it, in grey, under colours.

    `method` is a key of METHODS; what speaks against the text is left dark, as what is neutral.
    Raises ImageError, and ValueError for another method.

    >>> import miniclip
    >>> heatmap(Image.new("RGB", (80, 64)), "a red circle", miniclip.load("shapes")).size
    (64, 64)
    """
    return overlay(seen(image, loaded.transform), text_map(image, text, loaded, method))


def seen(image: Picture, transform: ImageTransform, scale: int = 1) -> Image.Image:
    """The part of an image that the model sees, S x S pixels at `scale` 1, as a picture again.

    A larger scale is for people: the same crop with `scale` times as many pixels along a side.
    """
    larger = replace(transform, size=transform.size * scale, crop_size=transform.crop_size * scale)
    mean, std = torch.tensor(transform.image_mean), torch.tensor(transform.image_std)
    pixels = (larger(image).permute(1, 2, 0) * std + mean) * 255  # (scale * S, scale * S, 3)
    return Image.fromarray(pixels.round().to(torch.uint8).numpy())


# From no heat to the most. Three colours of matplotlib's "inferno": for the colour-blind, and grey
# printers, they run from dark to light.
HEAT_COLOURS = ("#000004", "#bc3754", "#fcffa4")


def overlay(picture: Image.Image, heat: Tensor, warmest: float | None = None) -> Image.Image:
    """Heat (rows, columns), its positive part, laid over the picture in grey: the more, the denser.

    The last of HEAT_COLOURS stands for `warmest`, which is the warmest of this heat unless given.
    """
    shown = heat.clamp(min=0)
    warmest = shown.max().item() if warmest is None else warmest
    levels = (shown / max(warmest, 1e-12) * 255).clamp(max=255).to(torch.uint8).numpy()
    smooth = Image.fromarray(levels).resize(picture.size, Image.Resampling.BILINEAR)
    colours = ImageOps.colorize(smooth, *HEAT_COLOURS[::2], mid=HEAT_COLOURS[1])
    density = smooth.point(lambda h: 90 + h // 2)  # of 255: where it is cold, the picture shows
    return Image.composite(colours, picture.convert("L").convert("RGB"), density)
