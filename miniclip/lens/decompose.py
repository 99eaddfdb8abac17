"""The embedding as an exact sum over layers, heads or tokens."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.files.checks import numbers
from miniclip.follow import follow, own_method
from miniclip.lens.reading import Tower, last_norm, read_positions, take, tower_for
from miniclip.model import CLIP, MLP
from miniclip.sites import hooks, norm_scale


def read_rows(
    tower: Tower, x: Tensor, sites: dict[str, Callable], read: Callable
) -> tuple[dict[str, Tensor], Tensor]:
    """Run a tower. Call functions with the tensors at sites. Return the results and the embedding.

    `sites` is {glob: function}. The results are {site: result}. Also call `read` with the input of
    block 0, and store its result under the key "embed".
    """
    rows: dict[str, Tensor] = {}

    def keep(function: Callable) -> Callable:
        return lambda tensor, name: rows.update({name: function(tensor)})

    edits = {glob: keep(function) for glob, function in sites.items()}
    edits["blocks.0.input"] = lambda stream, name: rows.update(embed=read(stream))
    with hooks(tower, edits):
        return rows, tower(x)


# The einsum multiplies each head's z by the matrix that maps it to the embedding. The matrices are
# (E, H, D). z is (B, H, D), or (B, H, T, D) for "token".
GRAINS = {"layer": "bhd,ehd->be", "head": "bhd,ehd->bhe", "token": "bhtd,ehd->bhte"}


@torch.no_grad()
def decompose(
    model: CLIP | Tower, x: Tensor, by: str = "layer", convention: str = "miniclip"
) -> dict[str, Tensor]:
    """The embedding as a sum of what each part of the tower adds to the class or end token.

    Each part is a vector in the space of embeddings. Its product with a text's embedding is the
    part's share of the similarity. The sum is exact, because the last LayerNorm is linear if its
    divisor is fixed. Gandelsman et al. 2023, arXiv 2310.05916.

    Args:
        x: pixels or ids.
        by: how to split attention: by "layer" (B, E), "head" (B, H, E), or "token" (B, H, T, E),
            where T are the tokens that a head attends to.
        convention: "miniclip": `embedding - part` is the embedding without this part, and each bias
            is a part. "clip_prs" (the authors' code): attention and MLP include their biases, all
            parts share the LayerNorm's mean and bias equally, and the parts' sum has length 1.
    Returns:
        "embed" (the residual stream before the first block), "blocks.3.attn", "blocks.3.mlp", and
        so on. With "miniclip", biases are parts too. The sum of all parts is the embedding. With
        "clip_prs", it is the embedding divided by its length. A pattern's rows sum to 1, so the
        bias of a head's values adds the same vector for every pattern. Therefore this bias is not
        split by token: "blocks.3.attn.v_proj.bias" is (B, H, E) if `by` is "head" or "token". A
        fork's own MLP is one part, including its biases.
    Raises:
        ValueError: if the sum is not the embedding (for instance because a hook edits the stream),
            or for a fork with its own pooling, block or attention pattern.

    >>> from miniclip import CLIP
    >>> model, pixels = CLIP.from_pretrained("shapes"), torch.ones(2, 3, 64, 64)
    >>> parts = decompose(model, pixels, by="head")
    >>> total = sum(part.reshape(2, -1, 128).sum(1) for part in parts.values())
    >>> torch.allclose(total, model.encode_image(pixels), atol=1e-5)
    True
    """
    if by not in GRAINS:
        raise ValueError(f"`by` is {by!r}; expected {', '.join(map(repr, GRAINS))}")
    if convention not in ("miniclip", "clip_prs"):
        raise ValueError(f"convention is {convention!r}; expected 'miniclip' or 'clip_prs'")
    apart = convention == "miniclip"  # each bias is a separate part
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
    if changed:  # a fork's value vectors may differ from v_proj's output
        sites["blocks.*.ln_1"] = lambda normed: normed
    rows, embedding = read_rows(tower, x, sites, read_row)
    for i, one in enumerate(tower.blocks if changed else ()):
        normed = rows[f"blocks.{i}.ln_1"]
        values = one.attn.qkv(normed)[2].transpose(1, 2).flatten(2)  # (B, T, W)
        if not torch.allclose(values, one.attn.v_proj(normed)):
            raise ValueError(f"{changed}.qkv changes the values, so decompose cannot follow it")

    norm_name, norm = last_norm(tower)
    last = rows[f"blocks.{len(tower.blocks) - 1}"]  # (B, W)
    length = 1 if apart else embedding.norm(dim=-1, keepdim=True)  # (B, 1)
    # For a fixed scale, the map from the residual stream to the embedding is linear, except for the
    # bias. With "miniclip", the matrix `readout` also subtracts the mean of the stream.
    scale = norm_scale(norm, last) * length
    proj, _ = affine_of(tower.proj, last.shape[-1], last)
    readout = proj * norm.weight  # (E, W)
    if apart:
        readout = readout - readout.mean(1, keepdim=True)

    def read(part: Tensor) -> Tensor:
        return part @ readout.T / scale  # (B, W) or (W) -> (B, E)

    def read_heads(mixed: Tensor, per_head: Tensor, grain: str) -> Tensor:
        written = torch.einsum(GRAINS[grain], mixed, per_head)
        return written / scale.view(-1, *[1] * (written.ndim - 1))

    parts = {"embed": read(rows["embed"])}
    block: Any  # a Block, or its replacement
    for i, block in enumerate(tower.blocks):
        name, attn = f"blocks.{i}", block.attn
        split = (-1, attn.head_width)
        bias = affine_of(attn.v_proj, last.shape[-1], last)[1].unflatten(0, split)  # (H, D)
        out, out_bias = affine_of(attn.out_proj, bias.numel(), last)  # (W, H * D), (W)
        per_head = (readout @ out).unflatten(1, split)  # (E, H, D)
        taken: Any = bias if apart else 0
        if by == "token":
            values = rows[f"{name}.attn.v"] - taken  # (B, T, H, D)
            mixed = torch.einsum("bht,bthd->bhtd", rows[f"{name}.attn.pattern"], values)
        else:
            mixed = rows[f"{name}.attn.z"] - taken  # (B, H, D)
        part, out_bias = read_heads(mixed, per_head, by), read(out_bias)
        if apart:
            parts[f"{name}.attn"] = part
            coarse = "layer" if by == "layer" else "head"
            parts[f"{name}.attn.v_proj.bias"] = read_heads(bias[None], per_head, coarse)
            parts[f"{name}.attn.out_proj.bias"] = out_bias
        else:
            parts[f"{name}.attn"] = part + share(out_bias, part)
        parts[f"{name}.mlp"] = read(rows[f"{name}.mlp"])
        if apart and type(block.mlp).forward is MLP.forward:
            fc2 = block.mlp.fc2
            parts[f"{name}.mlp.fc2.bias"] = read(affine_of(fc2, fc2.in_features, last)[1])
            parts[f"{name}.mlp"] = parts[f"{name}.mlp"] - parts[f"{name}.mlp.fc2.bias"]
    rest = (proj @ norm.bias).expand_as(embedding) / length
    if apart:
        parts[f"{norm_name}.bias"] = rest
    else:
        rest = (rest - read(last.mean(-1, keepdim=True).expand_as(last))) / len(parts)
        parts = {name: part + share(rest, part) for name, part in parts.items()}
    check_sum(parts, embedding / length)
    return parts


def share(total: Tensor, part: Tensor) -> Tensor:
    """Divide a vector (B, E) equally among the vectors of a part (B, ..., E)."""
    count = part.shape[1:-1].numel()
    return total.view(len(part), *[1] * (part.ndim - 2), -1) / count


def ablate_contributions(
    parts: Mapping[str, Tensor], heads: Mapping[int, Collection[int]]
) -> Tensor:
    """The embeddings (B, E), with some heads' contributions replaced by their mean over the batch.

    This is the mean ablation of Gandelsman et al. 2023 (arXiv 2310.05916), as in their code.
    The model does not run again, so later layers still use the original output of these heads.
    `surgery.ablate_heads` with mode="mean" acts on every token, and also changes later layers.

    Args:
        parts: from `decompose` of a whole data set, with `by` "head" or "token".
        heads: the heads to replace, {layer: [head, ...]}.

    >>> from miniclip import CLIP
    >>> parts = decompose(CLIP.from_pretrained("shapes"), torch.rand(4, 3, 64, 64), by="head")
    >>> ablate_contributions(parts, {3: [0, 2]}).shape
    torch.Size([4, 128])
    """
    ablated = dict(parts)
    for layer, chosen in heads.items():
        part = parts.get(name := f"blocks.{layer}.attn")
        if part is None or part.ndim < 3:
            raise ValueError(
                f"no heads in {name!r}; expected the number of a layer, and parts from `decompose` "
                "with by='head' or by='token'"
            )
        chosen = numbers(chosen, part.shape[1], name, "heads")
        ablated[name] = part.clone()
        ablated[name][:, chosen] = part[:, chosen].mean(0)
    return torch.cat([p.reshape(len(p), -1, p.shape[-1]) for p in ablated.values()], 1).sum(1)


def affine_of(module: Any, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix (out, width) and the bias (out) of an affine module: a Linear, a LoRA, a quantised
    Linear, or the Identity of a tower without a projection."""
    if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
        weight = module.weight
        return weight, weight.new_zeros(len(weight)) if module.bias is None else module.bias
    one = torch.eye(width, dtype=like.dtype, device=like.device)
    bias = module(torch.zeros_like(one))  # each row is the bias
    return (module(one) - bias).T, bias[0]


def check_sum(parts: dict[str, Tensor], embedding: Tensor) -> None:
    """Raise ValueError unless the parts (B, ..., E) add up to the embedding (B, E)."""
    if embedding.is_meta:
        return
    B, E = embedding.shape
    flat = [part.reshape(B, -1, E) for part in parts.values()]
    distance = (sum(part.sum(1) for part in flat) - embedding).abs().max()
    size = sum((part.abs().sum(1) for part in flat), torch.zeros_like(embedding)).max()
    # In half precision, 1000 rounding errors would be as large as the embedding itself.
    eps = torch.finfo(embedding.dtype).eps
    if not distance <= (1000 if eps < 1e-6 else 16) * eps * size:
        raise ValueError(
            f"the sum of the parts differs from the embedding by {distance:.2g}: something changes "
            "what this tower computes, such as a hook that edits the residual stream, or a module "
            "that was replaced or quantised"
        )
