"""Change a model's image size, patch size, channels, context length, vocabulary or registers.

A position embedding is resized like an image with W channels. There is no single standard for this,
so each method is named after the code that it reproduces.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.follow import check_rebuilt, follow, own_method, some_input
from miniclip.model import CLIP, VisionTower
from miniclip.surgery.structure import reconfigure
from miniclip.surgery.weights import copied

Grid = tuple[int, int]  # rows, columns


def _antialiased(x: Tensor, grid: Grid) -> Tensor:
    # If a single call resizes to one column, torch 2.13 on a CPU gets only the first row right. So
    # another call resizes the rows first.
    if grid[1] == 1:
        x = F.interpolate(x, (grid[0], x.shape[3]), mode="bicubic", antialias=True)
    return F.interpolate(x, grid, mode="bicubic", antialias=True)


# Each function resizes a tensor (1, W, rows, columns) to a new grid.
RESAMPLE: dict[str, Callable[[Tensor, Grid], Tensor]] = {
    "transformers": lambda x, grid: F.interpolate(x, grid, mode="bicubic"),
    "timm": _antialiased,
    # How OpenAI made L/14 at 336 pixels: openai/CLIP, issue 214.
    "openai-bilinear": lambda x, grid: F.interpolate(x, grid, mode="bilinear"),
    # DINO adds 0.1 to the new size, so that it is not rounded down. This moves the sampled points.
    # SCLIP, ClearCLIP and NACLIP do the same.
    "dino": lambda x, grid: F.interpolate(
        x, scale_factor=[(n + 0.1) / old for n, old in zip(grid, x.shape[2:])], mode="bicubic"
    ),
}


def resize_image(model: CLIP, size: int | tuple[int, int], method: str = "transformers") -> CLIP:
    """A model for images of another size or shape.

    Start from the original model each time, because resampling twice blurs the position embedding.
    Both models share the weights that do not change. To train one model without changing the other,
    call `resize_image(copied(model), size)`. transformers needs square images. For square images,
    the new transform is `dataclasses.replace(transform, size=size, crop_size=size)`.

    Args:
        size: (height, width), or one number for both. A size below one patch raises ValueError.
        method: how to resample the position embedding. "transformers" (interpolate_pos_encoding),
            "timm" (also in open_clip), "openai-bilinear" or "dino".

    >>> from miniclip import CLIP
    >>> wide = resize_image(CLIP.from_pretrained("shapes"), (64, 96))
    >>> wide.encode_image(torch.zeros(1, 3, 64, 96)).shape[0]
    1
    """
    if method not in RESAMPLE:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(RESAMPLE)}")
    follow("resize_image", model.vision, ("embed_tokens",))
    new = reconfigure(copied(model, shares_weights=True), "vision", image_size=size)
    old_grid, grid = model.config.vision.grid, new.config.vision.grid
    if grid == old_grid:
        return new
    _assign(new.vision, "pos_embed", resampled(new.vision.pos_embed, old_grid, grid, method))
    return check_rebuilt("resize_image", new)


def resampled(pos_embed: Tensor, old: Grid, grid: Grid, method: str) -> Tensor:
    """Resample a position embedding (1 + P, W) to another grid, except the class token's row."""
    picture = _precise(pos_embed[1:]).T.unflatten(1, old)[None]  # (1, W, rows, columns)
    patches = RESAMPLE[method](picture, grid)[0].flatten(1).T  # (P, W)
    return torch.cat([pos_embed[:1], patches.to(pos_embed)])


def at_size(tower: VisionTower, size: Sequence[int], method: str) -> VisionTower:
    """A tower for images of another size. It shares all modules and hooks with the old tower."""
    if method not in RESAMPLE:
        raise ValueError(f"resize is {method!r}; expected one of {', '.join(RESAMPLE)}")
    follow("resize", tower, ("embed_tokens",))
    new = copy(tower)
    new._parameters, new._buffers = dict(tower._parameters), dict(tower._buffers)
    new.config = replace(tower.config, image_size=tuple(size))
    if new.config.grid != tower.config.grid:
        table = resampled(tower.pos_embed, tower.config.grid, new.config.grid, method)
        if "pos_embed" in new._buffers:
            new._buffers["pos_embed"] = table
        else:
            new.pos_embed = nn.Parameter(table, requires_grad=False)
    return new


# How to resize a patch. The kernels are multiplied by the pseudo-inverse of this linear map.
RESIZE = {
    "timm": partial(F.interpolate, mode="bicubic", antialias=True),
    "flexivit": partial(F.interpolate, mode="bilinear"),
}


def resize_patch(model: CLIP, size: int, method: str = "timm") -> CLIP:
    """A model for patches of another size. The grid stays the same, so the image size changes too.

    The kernels of the patch embedding are multiplied by the pseudo-inverse of the matrix that
    resizes a patch. So if `size` is larger, the new model embeds a resized patch exactly as the old
    model embeds the original patch. `resize_image` restores the old image size.

    Args:
        method: how to resize a patch. "flexivit" is bilinear, not antialiased (big_vision, Beyer et
            al. 2022, arXiv 2212.08013). "timm" is bicubic and antialiased (resample_patch_embed).
            The two methods give kernels that differ by a quarter or more.

    >>> from miniclip import CLIP
    >>> model = resize_patch(CLIP.from_pretrained("shapes"), 16)  # from 8
    >>> model.config.vision.image_size, model.config.vision.patches
    (128, 64)
    """
    if method not in RESIZE:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(RESIZE)}")
    follow("resize_patch", model.vision, ("embed_tokens",))
    rows, columns = model.config.vision.grid
    old, image = model.config.vision.patch_size, (rows * size, columns * size)
    new = copied(model)
    if size == old:
        return new
    reconfigure(new, "vision", patch_size=size, image_size=image)
    weight = new.vision.patch_embed.weight  # (W, channels, old, old)
    pixels = torch.eye(old * old, dtype=torch.float64, device=weight.device)
    resize = RESIZE[method](pixels.view(-1, 1, old, old), (size, size)).flatten(1)
    # `resize` is a matrix (old * old, size * size): a row for each pixel of the old patch
    kernels = weight.double().flatten(2) @ torch.linalg.pinv(resize).T
    _assign(new.vision.patch_embed, "weight", kernels.unflatten(2, (size, size)).to(weight))
    new.vision.patch_embed.kernel_size = new.vision.patch_embed.stride = (size, size)
    return check_rebuilt("resize_patch", new)


def resize_channels(model: CLIP, channels: int) -> CLIP:
    """A model for images with another number of channels, for example RGB and depth.

    The rule is timm's (adapt_input_conv). A single channel gets the sum of the kernels. Several
    channels get the old kernels in turn (R, G, B, R, ...), multiplied by old channels / new
    channels. The checkpoint's transform still gives RGB, so make the additional channels yourself.

    >>> from miniclip import CLIP
    >>> four = resize_channels(CLIP.from_pretrained("shapes"), 4)
    >>> four.encode_image(torch.zeros(1, 4, 64, 64)).shape
    torch.Size([1, 128])
    """
    follow("resize_channels", model.vision, ("embed_tokens",))
    new, old = copied(model), model.config.vision.channels
    if channels == old:
        return new
    reconfigure(new, "vision", channels=channels)
    weight = _precise(new.vision.patch_embed.weight)  # (W, channels, size, size)
    if channels == 1:
        kernels = weight.sum(1, keepdim=True)
    else:
        kernels = weight[:, torch.arange(channels) % old] * (old / channels)
    _assign(new.vision.patch_embed, "weight", kernels.to(new.vision.patch_embed.weight))
    new.vision.patch_embed.in_channels = channels
    return check_rebuilt("resize_channels", new)


def extend_context(
    model: CLIP, length: int, *, keep: int | None = None, method: str = "longclip"
) -> CLIP:
    """A model for longer texts. Its position embedding is stretched.

    A text that ends within the first `keep` positions keeps its embedding. Also set the Tokenizer's
    `context_length`. Raises ValueError if `length` is below the old context length, or if `keep`
    leaves fewer than two positions to stretch.

    Args:
        keep: how many of the first positions do not change. Default: 20 for "longclip", because
            only these positions are trained well; 0 for "linear".
        method: "longclip" interpolates linearly, and extrapolates at the end (Zhang et al. 2024,
            arXiv 2403.15378). "linear" is PyTorch's linear interpolation, as in open_clip.

    >>> from miniclip import CLIP
    >>> extend_context(CLIP.from_pretrained("shapes"), 248, keep=10).config.text.context_length
    248
    """
    if method not in ("longclip", "linear"):
        raise ValueError(f"method is {method!r}; expected longclip or linear")
    follow("extend_context", model.text, ("embed_tokens", "add_positions"))
    keep = (20 if method == "longclip" else 0) if keep is None else keep
    new, old = copied(model), model.config.text.context_length
    if length == old:
        return new
    if length < old or not 0 <= keep <= old - 2:
        raise ValueError(
            f"cannot stretch {old} positions to {length} with keep={keep}: expected a length of at "
            f"least {old}, and a `keep` from 0 to {old - 2}, because stretching needs two rows"
        )
    reconfigure(new, "text", context_length=length)
    pos_embed = new.text.pos_embed
    rows, count = _precise(pos_embed[keep:]), length - keep  # (T, W)
    if method == "longclip":
        places = torch.arange(count, device=rows.device, dtype=rows.dtype) * len(rows) / count
        below = places.long().clamp(max=len(rows) - 2)  # beyond the last row, extrapolate
        stretched = torch.lerp(rows[below], rows[below + 1], (places - below)[:, None])
    else:
        stretched = F.interpolate(rows.T[None], count, mode="linear")[0].T
    _assign(new.text, "pos_embed", torch.cat([pos_embed[:keep], stretched.to(pos_embed)]))
    return check_rebuilt("extend_context", new)


def add_tokens(model: CLIP, tokens: int | Tensor) -> CLIP:
    """A model with more tokens in its vocabulary. The new ids follow the old ones.

    A model with the legacy end token 2 pools a text at the text's largest id. New ids would be
    larger than the end token's id. So `eos_token_id` is set to the end token's real id, the largest
    old id.

    Args:
        tokens: the vectors of the new tokens, (count, W), or the number of new tokens. With a
            number, each new vector is the mean of the old vectors.

    >>> from miniclip import CLIP
    >>> model = CLIP.from_pretrained("shapes")
    >>> add_tokens(model, 2).config.text.vocab_size - model.config.text.vocab_size
    2
    """
    follow("add_tokens", model.text, ("embed_tokens",))
    new, old = copied(model), model.config.text.vocab_size
    table = new.text.token_embed.weight
    rows = _rows(tokens, table, _precise(table).mean(0))
    fields = {"eos_token_id": old - 1} if model.config.text.ends_at_largest else {}
    reconfigure(new, "text", vocab_size=old + len(rows), **fields)
    ids = some_input(model.text)  # (1, T)
    with_new_id = ids.index_fill(1, torch.tensor([0], device=ids.device), old)
    owner = own_method(model.text, ("eos_positions",))[1]
    if owner and (new.text.eos_positions(with_new_id) != model.text.eos_positions(ids)).any():
        raise ValueError(
            f"add_tokens cannot follow {owner}, which replaces TextTower.eos_positions: a new id "
            "changes the position of the end token"
        )
    _assign(new.text.token_embed, "weight", torch.cat([table, rows]))
    new.text.token_embed.num_embeddings = old + len(rows)
    return check_rebuilt("add_tokens", new)


def add_registers(model: CLIP, registers: int | Tensor) -> CLIP:
    """A model with more register tokens (Darcet et al. 2023, arXiv 2309.16588).

    Registers come after the class token, without position embedding. Their outputs are not used.
    Attention can store global information in registers instead of in patches. transformers has no
    registers.

    Args:
        registers: vectors (count, W), or an integer: how many zero vectors to add.

    >>> from miniclip import CLIP
    >>> add_registers(CLIP.from_pretrained("shapes"), 4).config.vision.registers
    4
    """
    own = ("forward", "embed_tokens", "pool")
    follow("add_registers", model.vision, own, attention=("forward", "qkv"))
    new = copied(model)
    old = new.vision.register_embed
    table = new.vision.pos_embed
    rows = _rows(registers, table, table.new_zeros(()))
    rows = rows if old is None else torch.cat([old, rows])
    if len(rows):
        reconfigure(new, "vision", registers=len(rows))
        _assign(new.vision, "register_embed", rows)
    return check_rebuilt("add_registers", new)


def _precise(x: Tensor) -> Tensor:
    """Detach, and convert to at least float32, because half precision is too coarse to resample."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _rows(given: int | Tensor, like: Tensor, default: Tensor) -> Tensor:
    """Return new rows (count, W) for a table: the given vectors, or copies of `default`."""
    width = like.shape[1]
    if not isinstance(given, Tensor):
        if type(given) is not int or given < 0:
            raise ValueError(f"expected a number of new tokens, 0 or more, found {given!r}")
        return default.to(like).expand(given, width)
    if given.ndim != 2 or given.shape[1] != width:
        raise ValueError(f"vectors have shape {tuple(given.shape)}; expected (count, {width})")
    return given.detach().to(like)


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter and keep its `requires_grad`. A new parameter requires gradients."""
    old = getattr(module, name)
    trained = True if old is None else old.requires_grad
    setattr(module, name, nn.Parameter(value.detach().clone(), trained))
