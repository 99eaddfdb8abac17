"""The embedding as an exact sum over layers, heads or tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.follow import follow, own_method
from miniclip.lens.reading import Tower, last_norm, read_positions, take, tower_for
from miniclip.model import CLIP, MLP
from miniclip.sites import hooks


def read_rows(
    tower: Tower, x: Tensor, sites: dict[str, Callable], read: Callable
) -> tuple[dict[str, Tensor], Tensor]:
    """Run a tower and keep function(tensor) of each matching site. Returns them and the embedding.

    The residual stream before the first block is no module's output: "embed" is `read` of it.
    """
    rows: dict[str, Tensor] = {}

    def keep(function: Callable) -> Callable:
        return lambda tensor, name: rows.update({name: function(tensor)})

    with hooks(tower, {glob: keep(function) for glob, function in sites.items()}):
        before = tower.blocks[0].register_forward_pre_hook(
            lambda module, inputs: rows.update(embed=read(inputs[0]))
        )
        with before:
            return rows, tower(x)


# What heads read (B, H, D) or, from each token, (B, H, T, D), times what they write, (E, H, D).
GRAINS = {"layer": "bhd,ehd->be", "head": "bhd,ehd->bhe", "token": "bhtd,ehd->bhte"}


@torch.no_grad()
def decompose(model: CLIP | Tower, x: Tensor, by: str = "layer") -> dict[str, Tensor]:
    """The embedding as a sum of what each part of the tower wrote into the token that is read.

    Each part is a vector of the shared space: multiply it by a text's embedding to see what it is
    for. "embed" is the stream before the first block; "blocks.3.mlp" is (B, E), and "blocks.3.attn"
    (B, E), by="head" (B, H, E), by="token" (B, H, T, E), where T are the tokens looked at. Biases
    are parts of their own, under their own names. That of the values belongs to no token, because a
    head's pattern sums to 1, but to a head it does: by head and token, "blocks.3.attn.v_proj.bias"
    is (B, H, E), and the rest of what its heads write. The last LayerNorm divides by the
    length that the stream has, and so the sum is exact. Gandelsman et al. 2023, arXiv 2310.05916;
    here without the part of a head that cannot reach the embedding: memory is that of the result.
    An MLP of a fork's own is one part, its biases included.

    Raises ValueError if the sum is not the embedding, as when a hook edits the stream, and for a
    fork with its own pooling, block or attention pattern.

    >>> from miniclip import CLIP
    >>> model, pixels = CLIP.from_pretrained("shapes"), torch.ones(2, 3, 64, 64)
    >>> parts = decompose(model, pixels, by="head")
    >>> total = sum(part.reshape(2, -1, 128).sum(1) for part in parts.values())
    >>> torch.allclose(total, model.encode_image(pixels), atol=1e-5)
    True
    """
    if by not in GRAINS:
        raise ValueError(f"by is {by!r}; expected {', '.join(map(repr, GRAINS))}")
    tower = tower_for(model, x)
    positions = read_positions("decompose", tower, x)
    follow("decompose", tower, block=("forward",), attention=("forward", "attend"))

    def read_row(tokens: Tensor) -> Tensor:
        return take(tokens, positions)

    sites: dict[str, Callable[..., Tensor]] = {"blocks.*": read_row, "blocks.*.mlp": read_row}
    if by == "token":
        sites["blocks.*.attn.v"] = lambda v: v  # (B, T, H, D)
        sites["blocks.*.attn.pattern"] = lambda p: read_row(p.transpose(1, 2))
    else:
        sites["blocks.*.attn.z"] = read_row  # (B, H, D)
    changed = own_method(tower, (), attention=("qkv",))[1]
    if changed:  # a fork's: is the bias still a part of the values?
        sites["blocks.*.ln_1"] = lambda normed: normed
    rows, embedding = read_rows(tower, x, sites, read_row)
    for i, one in enumerate(tower.blocks if changed else ()):
        normed = rows[f"blocks.{i}.ln_1"]
        values = one.attn.qkv(normed)[2].transpose(1, 2).flatten(2)  # (B, T, W)
        if not torch.allclose(values, one.attn.v_proj(normed)):
            raise ValueError(f"{changed}.qkv changes the values: decompose cannot follow it")

    norm_name, norm = last_norm(tower)
    last = rows[f"blocks.{len(tower.blocks) - 1}"]  # (B, W)
    # From the stream to the embedding all is linear, once the length is known: the LayerNorm's
    # mean and weight and the projection are one matrix.
    readout = weight_of(tower.proj, last.shape[-1]) * norm.weight  # (E, W)
    readout = readout - readout.mean(1, keepdim=True)
    length = (last.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()  # (B, 1)

    def read(part: Tensor) -> Tensor:
        return part @ readout.T / length  # (B, W) or (W) -> (B, E)

    def read_heads(mixed: Tensor, per_head: Tensor, grain: str) -> Tensor:
        written = torch.einsum(GRAINS[grain], mixed, per_head)
        return written / length.view(-1, *[1] * (written.ndim - 1))

    parts = {"embed": read(rows["embed"])}
    block: Any  # a Block, or what someone has put in its place
    for i, block in enumerate(tower.blocks):
        name, attn = f"blocks.{i}", block.attn
        split = (-1, attn.head_width)
        bias = bias_of(attn.v_proj).unflatten(0, split)  # (H, D)
        out = weight_of(attn.out_proj, bias.numel())  # (W, H * D)
        per_head = (readout @ out).unflatten(1, split)  # (E, H, D)
        if by == "token":
            values = rows[f"{name}.attn.v"] - bias  # (B, T, H, D)
            mixed = torch.einsum("bht,bthd->bhtd", rows[f"{name}.attn.pattern"], values)
        else:
            mixed = rows[f"{name}.attn.z"] - bias  # (B, H, D)
        parts[f"{name}.attn"] = read_heads(mixed, per_head, by)
        coarse = "layer" if by == "layer" else "head"
        parts[f"{name}.attn.v_proj.bias"] = read_heads(bias[None], per_head, coarse)
        parts[f"{name}.attn.out_proj.bias"] = read(bias_of(attn.out_proj))
        if type(block.mlp).forward is MLP.forward:
            bias = bias_of(block.mlp.fc2)
            parts[f"{name}.mlp"] = read(rows[f"{name}.mlp"] - bias)
            parts[f"{name}.mlp.fc2.bias"] = read(bias)
        else:
            parts[f"{name}.mlp"] = read(rows[f"{name}.mlp"])
    parts[f"{norm_name}.bias"] = tower.proj(norm.bias).expand_as(parts["embed"])
    check_sum(parts, embedding)
    return parts


def bias_of(linear: Any) -> Tensor:
    """The bias of a Linear, zeros if a fork's has none."""
    return linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias


def weight_of(linear: nn.Module, width: int) -> Tensor:
    """The matrix that a module multiplies by, also where a LoRA stands in a Linear's place."""
    if type(linear) is nn.Linear:
        return linear.weight
    like = next(linear.parameters())
    one = torch.eye(width, dtype=like.dtype, device=like.device)
    return (linear(one) - linear(torch.zeros_like(one))).T


def check_sum(parts: dict[str, Tensor], embedding: Tensor) -> None:
    """Raises ValueError unless the parts (B, ..., E) add up to the embedding (B, E)."""
    if embedding.is_meta:
        return
    B, E = embedding.shape
    flat = [part.reshape(B, -1, E) for part in parts.values()]
    distance = (sum(part.sum(1) for part in flat) - embedding).abs().max()
    size = sum((part.abs().sum(1) for part in flat), torch.zeros_like(embedding)).max()
    if not distance <= 1000 * torch.finfo(embedding.dtype).eps * size:
        raise ValueError(
            f"the parts miss the embedding by {distance:.2g}: something in this tower is not what "
            "its weights say, as a hook that edits the stream or a module that was replaced"
        )
