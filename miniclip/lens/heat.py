"""Several methods to compute and to draw where in an image a model sees what a text describes."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from PIL import Image, ImageOps
from torch import Tensor

from miniclip.checkpoint import Loaded
from miniclip.files.checks import as_list
from miniclip.files.pictures import Picture
from miniclip.follow import follow, ids_for, patch_grid
from miniclip.lens.attention import attention_maps, check_pairs, gradcam, relevance, rollout
from miniclip.lens.decompose import decompose
from miniclip.lens.reading import on_grid
from miniclip.model import CLIP
from miniclip.transform import ImageTransform


def last_attention(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """The class token's attention in the last block, averaged over heads. 0 if no head is left."""
    follow("last_attention", model.vision, ("forward", "pool"))
    pattern = attention_maps(model, pixels)[-1][:, :, 0]  # (B, H, T)
    return on_grid(model, pixels, pattern.sum(1) / max(pattern.shape[1], 1))


def head_map(model: CLIP, pixels: Tensor, layer: int, head: int) -> Tensor:
    """The class token's attention in one head of one block: (B, rows, columns).

    Raises ValueError if the block or the head does not exist.

    >>> from miniclip import CLIP
    >>> head_map(CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64), layer=3, head=0).shape
    torch.Size([1, 8, 8])
    """
    follow("head_map", model.vision, ("forward", "pool"))
    maps = attention_maps(model, pixels)
    if not 0 <= layer < len(maps) or not 0 <= head < maps[layer].shape[1]:
        heads = [pattern.shape[1] for pattern in maps]
        found = f"layers 0 to {len(maps) - 1} have these numbers of heads: {heads}"
        raise ValueError(f"no head {head} in layer {layer}; {found}")
    return on_grid(model, pixels, maps[layer][:, head, 0])


@torch.no_grad()
def token_map(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """How much each patch adds to the similarity with the text, in all heads (see `decompose`)."""
    texts = model.encode_text(ids, normalize=True)  # (B, E)
    parts = decompose(model, pixels, by="token")
    tokens = sum(part.sum(1) for part in parts.values() if part.ndim == 4)  # (B, T, E)
    return on_grid(model, pixels, torch.einsum("bte,be->bt", tokens, texts))


@torch.no_grad()
def occlusion(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """How much the cosine falls if a patch is covered (Zeiler and Fergus 2013, arXiv 1311.2901).

    A grey window of two by two patches moves over the image. The value of a patch is the
    mean decrease of the cosine over all windows that cover the patch.
    """
    check_pairs(pixels, ids)
    patch = model.vision.patch_embed.stride[0]
    rows, columns = patch_grid(model.vision, pixels)
    corners = [(i, j) for i in range(max(rows - 1, 1)) for j in range(max(columns - 1, 1))]
    texts = model.encode_text(ids, normalize=True)  # (B, E)
    heat, times = texts.new_zeros(len(texts), rows, columns), texts.new_zeros(rows, columns)
    for i, j in corners:
        times[i : i + 2, j : j + 2] += 1
    # If consecutive images are equal, encode them only once.
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
    return heat / times


# Each function takes the model, pixels and ids of B pairs, and returns maps (B, rows, columns).
METHODS: dict[str, Callable[[CLIP, Tensor, Tensor], Tensor]] = {
    "attention": last_attention,
    "rollout": lambda model, x, ids: on_grid(model, x, rollout(model, x)),
    "relevance": lambda model, x, ids: on_grid(model, x, relevance(model, x, ids).image),
    "gradcam": lambda model, x, ids: on_grid(model, x, gradcam(model, x, ids)),
    "tokens": token_map,
    "occlusion": occlusion,
}
BLIND = ("attention", "rollout")  # the methods whose map is the same for every text


def text_maps(
    image: Picture, texts: str | Iterable[str], loaded: Loaded, method: str = "relevance"
) -> Tensor:
    """For each of C texts, compute where in the image the model sees what the text describes.

    Returns (C, rows, columns), a number for each patch.

    Args:
        image: a Pillow image, a path, bytes or an array.
        loaded: a model with its tokenizer and transform, from `miniclip.load`.
        method: a key of METHODS.
    Raises:
        ImageError, ContextLengthError: for an image or a text that the model cannot read.
        ValueError: for an unknown method, or an empty text.

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
    """The cosines between an image's embedding and the embeddings of C texts: (C,)."""
    model, tokenizer, transform = loaded
    device = model.logit_scale.device
    ids = ids_for(model.text, tokenizer, as_list(texts)).to(device)
    image_embeds = model.encode_image(transform([image]).to(device), normalize=True)  # (1, E)
    return (model.encode_text(ids, normalize=True) @ image_embeds[0]).float().cpu()


def text_map(image: Picture, text: str, loaded: Loaded, method: str = "relevance") -> Tensor:
    """Compute the map of one text, as in `text_maps`: (rows, columns)."""
    return text_maps(image, [text], loaded, method)[0]


def heatmap(image: Picture, text: str, loaded: Loaded, method: str = "relevance") -> Image.Image:
    """Draw `text_map` in colours over a grey copy of the crop that the model sees.

    Negative numbers get the colour of 0. For the arguments and the errors see `text_maps`.

    >>> import miniclip
    >>> heatmap(Image.new("RGB", (80, 64)), "a red circle", miniclip.load("shapes")).size
    (64, 64)
    """
    return overlay(seen(image, loaded.transform), text_map(image, text, loaded, method))


def seen(image: Picture, transform: ImageTransform, scale: int = 1) -> Image.Image:
    """The crop of an image that the model sees, S x S pixels.

    For display, a larger `scale` gives the same crop with `scale` * S pixels along each side.
    """
    larger = replace(transform, size=transform.size * scale, crop_size=transform.crop_size * scale)
    mean, std = torch.tensor(transform.image_mean), torch.tensor(transform.image_std)
    pixels = (larger(image).permute(1, 2, 0) * std + mean) * 255  # (scale * S, scale * S, 3)
    return Image.fromarray(pixels.round().to(torch.uint8).numpy())


# The colours of the least, medium and most heat, from matplotlib's "inferno". They run from dark to
# light, for colour-blind readers and black-and-white prints.
HEAT_COLOURS = ("#000004", "#bc3754", "#fcffa4")


def overlay(picture: Image.Image, heat: Tensor, warmest: float | None = None) -> Image.Image:
    """Draw the positive heat (rows, columns) over a grey image. Larger values are more opaque.

    `warmest` is the heat that gets the last colour of HEAT_COLOURS. Default: the largest heat.
    """
    shown = heat.clamp(min=0)
    warmest = shown.max().item() if warmest is None else warmest
    levels = (shown / max(warmest, 1e-12) * 255).clamp(max=255).to(torch.uint8).numpy()
    smooth = Image.fromarray(levels).resize(picture.size, Image.Resampling.BILINEAR)
    colours = ImageOps.colorize(smooth, *HEAT_COLOURS[::2], mid=HEAT_COLOURS[1])
    density = smooth.point(lambda h: 90 + h // 2)  # the opacity is between 90 and 217, out of 255
    return Image.composite(colours, picture.convert("L").convert("RGB"), density)
