"""Other images, longer texts, more tokens: what a position or a token is, redrawn.

A position embedding is a picture with W channels, and is resized as one. The field has no single
way of doing so; each method here is named after whose numbers it gives.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.follow import check_rebuilt, follow
from miniclip.model import CLIP, VisionTower
from miniclip.surgery.structure import reconfigure
from miniclip.surgery.weights import copied

Grid = tuple[int, int]  # rows, columns


def _antialiased(x: Tensor, grid: Grid) -> Tensor:
    if grid[1] == 1:  # in one call, torch 2.13 gets all rows but the first wrong on a CPU
        x = F.interpolate(x, (grid[0], x.shape[3]), mode="bicubic", antialias=True)
    return F.interpolate(x, grid, mode="bicubic", antialias=True)


# (1, W, rows, columns) at the old grid, and the new grid
RESAMPLE: dict[str, Callable[[Tensor, Grid], Tensor]] = {
    "transformers": lambda x, grid: F.interpolate(x, grid, mode="bicubic"),
    "timm": _antialiased,
    # How OpenAI made L/14 at 336 pixels: openai/CLIP, issue 214.
    "openai-bilinear": lambda x, grid: F.interpolate(x, grid, mode="bilinear"),
    # DINO asks for 0.1 of a patch more, so that the size does not round down, and by that samples
    # at other points. SCLIP, ClearCLIP and NACLIP do the same.
    "dino": lambda x, grid: F.interpolate(
        x, scale_factor=[(n + 0.1) / old for n, old in zip(grid, x.shape[2:])], mode="bicubic"
    ),
}


def resize_image(model: CLIP, size: int | tuple[int, int], method: str = "transformers") -> CLIP:
    """A model for images of another size, or another shape, as (height, width).

    `method` names whose resampling of the position embedding: "transformers"
    (interpolate_pos_encoding), "timm" (and open_clip), "openai-bilinear" or "dino". The class
    token's position stays. Resize the original each time: resampling twice blurs. transformers
    can express square images only; for those, of side S, the checkpoint's transform becomes
    `dataclasses.replace(transform, size=S, crop_size=S)`. The new model shares the weights that do
    not change: give `copied(model)` to train it and keep this one. ValueError for a size below one
    patch.

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
    """A position embedding (1 + P, W) for another grid; the class token's row stays."""
    picture = _precise(pos_embed[1:]).T.unflatten(1, old)[None]  # (1, W, rows, columns)
    patches = RESAMPLE[method](picture, grid)[0].flatten(1).T  # (P, W)
    return torch.cat([pos_embed[:1], patches.to(pos_embed)])


def at_size(tower: VisionTower, size: Sequence[int], method: str) -> VisionTower:
    """The same tower for images (height, width): all modules are shared, hooks included."""
    if method not in RESAMPLE:
        raise ValueError(f"resize is {method!r}; expected one of {', '.join(RESAMPLE)}")
    follow("resize", tower, ("embed_tokens",))
    new = copy(tower)
    new._parameters = dict(tower._parameters)
    new.config = replace(tower.config, image_size=tuple(size))
    if new.config.grid != tower.config.grid:
        table = resampled(tower.pos_embed, tower.config.grid, new.config.grid, method)
        new.pos_embed = nn.Parameter(table, requires_grad=False)
    return new


# How a patch is resized, whose pseudo-inverse multiplies the kernels.
RESIZE = {
    "timm": partial(F.interpolate, mode="bicubic", antialias=True),
    "flexivit": partial(F.interpolate, mode="bilinear"),
}


def resize_patch(model: CLIP, size: int, method: str = "timm") -> CLIP:
    """A model for patches of another size, and images larger or smaller by as much.

    The grid stays, and with it all but the patch embedding, whose kernels are multiplied by the
    pseudo-inverse of the matrix that resizes a patch: a larger model sees in a resized patch
    exactly what this one sees in the patch. `resize_image` then gives the old image size back.

    `method` names whose matrix: "flexivit" (bilinear, not antialiased: big_vision, the code of
    Beyer et al. 2022, arXiv 2212.08013) or "timm" (resample_patch_embed: bicubic, antialiased).
    Their kernels differ by a quarter or more.

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
    # resize is (old * old, size * size): what becomes of each pixel
    kernels = weight.double().flatten(2) @ torch.linalg.pinv(resize).T
    _assign(new.vision.patch_embed, "weight", kernels.unflatten(2, (size, size)).to(weight))
    new.vision.patch_embed.kernel_size = new.vision.patch_embed.stride = (size, size)
    return check_rebuilt("resize_patch", new)


def resize_channels(model: CLIP, channels: int) -> CLIP:
    """A model for images of so many channels, such as 4 with depth or near infrared.

    timm's rule (adapt_input_conv): for one channel the kernels are summed, which reads a grey image
    as before; for more they are repeated in order and scaled, so that the sum keeps its size. The
    checkpoint's transform stays RGB: the other channels are the caller's to make.

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
    """A model that reads longer texts, its position embedding stretched between its own rows.

    "longclip": the first `keep` positions (20) stay, which are all that short captions have
    trained, and the rest is stretched linearly from its first row, past its last: Zhang et al.
    2024, arXiv 2403.15378. "linear": PyTorch's linear interpolation, of the whole table unless
    `keep` is given, as open_clip does. A text that ends in the rows kept keeps its embedding.
    The Tokenizer has a `context_length` of its own, to be set as well.
    Raises ValueError for a context that is shorter, or of which there is too little to stretch.

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
            f"cannot stretch {old} positions to {length}, keeping {keep}: expected a length of at "
            f"least {old}, and to keep 0 to {old - 2}, so that two rows are left to stretch"
        )
    reconfigure(new, "text", context_length=length)
    pos_embed = new.text.pos_embed
    rows, count = _precise(pos_embed[keep:]), length - keep  # (T, W)
    if method == "longclip":
        places = torch.arange(count, device=rows.device, dtype=rows.dtype) * len(rows) / count
        below = places.long().clamp(max=len(rows) - 2)  # past the last row, on along its slope
        stretched = torch.lerp(rows[below], rows[below + 1], (places - below)[:, None])
    else:
        stretched = F.interpolate(rows.T[None], count, mode="linear")[0].T
    _assign(new.text, "pos_embed", torch.cat([pos_embed[:keep], stretched.to(pos_embed)]))
    return check_rebuilt("extend_context", new)


def add_tokens(model: CLIP, tokens: int | Tensor) -> CLIP:
    """A model whose vocabulary has so many more tokens, or these: vectors (count, W).

    The new ids follow the old ones; without vectors, each new token begins as the mean of all.
    A model with the legacy end token 2 reads a text at its largest id, which is the last of the
    old vocabulary; the config then names that one, as a new id would be larger.

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
    _assign(new.text.token_embed, "weight", torch.cat([table, rows]))
    new.text.token_embed.num_embeddings = old + len(rows)
    return check_rebuilt("add_tokens", new)


def add_registers(model: CLIP, registers: int | Tensor) -> CLIP:
    """A model with so many register tokens more, or these: vectors (count, W); zeros by default.

    They stand after the class token, have no position and are read by nobody at the end: places
    for what attention otherwise writes over patches. Darcet et al. 2023, arXiv 2309.16588.
    transformers cannot express the result.

    >>> from miniclip import CLIP
    >>> add_registers(CLIP.from_pretrained("shapes"), 4).config.vision.registers
    4
    """
    follow("add_registers", model.vision, ("embed_tokens", "pool"), attention=("forward", "qkv"))
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
    """Detached, and in float32 at least, which resampling in half precision would need."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _rows(given: int | Tensor, like: Tensor, default: Tensor) -> Tensor:
    """(count, W) new rows for a table, in its dtype: those given, or so many of the default."""
    width = like.shape[1]
    if not isinstance(given, Tensor):
        if type(given) is not int or given < 0:
            raise ValueError(f"expected a number of new tokens, 0 or more, found {given!r}")
        return default.to(like).expand(given, width)
    if given.ndim != 2 or given.shape[1] != width:
        raise ValueError(f"vectors have shape {tuple(given.shape)}; expected (count, {width})")
    return given.detach().to(like)


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter in the place of another, trained or not as that one was."""
    old = getattr(module, name)
    trained = True if old is None else old.requires_grad
    setattr(module, name, nn.Parameter(value.detach().clone(), trained))
