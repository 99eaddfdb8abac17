"""Where two models are compared: which module of a CLIP, ours or transformers', gives which tensor.

A fork needs two towers with blocks. Every other site is left out if the fork has no such module.
"""

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.config import CLIPConfig
from miniclip.files.configs import from_shapes, from_transformers
from miniclip.files.names import (
    OPEN_CLIP_CUSTOM_TEXT,
    OPENAI,
    TRANSFORMERS,
    Layout,
    Place,
    depth,
    layout_name,
    place,
    recognize,
)
from miniclip.model import CLIP

if TYPE_CHECKING:
    from transformers import CLIPModel

OUTPUTS = {
    "logits": "logits_per_image",
    "logits_per_text": "logits_per_text",
    "image_embeds": "image_embeds",
    "text_embeds": "text_embeds",
}
"""Sites, and what a CLIP's output calls them. A fork's own `boxes` are at `output_boxes`."""


def outputs_of(output: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a model returns, by site."""
    if hasattr(output, "_asdict"):
        output = output._asdict()
    elif isinstance(output, tuple):  # openai/CLIP's
        if len(output) > 2 and output[2].numel() == 1:  # open_clip's: embeddings and their scale
            image_embeds, text_embeds, scale = output[:3]
            logits = scale * image_embeds @ text_embeds.T  # (B, C)
            output = (logits, logits.T, image_embeds, text_embeds)
        output = dict(zip(OUTPUTS.values(), output))
    elif is_dataclass(output) and not isinstance(output, dict):
        output = vars(output)
    sites = {name: site for site, name in OUTPUTS.items()}
    named = dict(output) if isinstance(output, dict) else {}
    for name in dict.fromkeys([*sites, *named]):
        if isinstance(x := named.get(name), Tensor) and x.numel():
            yield sites.get(name, f"output_{name}"), x


def is_theirs(model: nn.Module) -> bool:
    """Whether modules have transformers' names."""
    return hasattr(model, "vision_model")


Read = Callable[[tuple, Any], Any]
"""(arguments, output) of a module -> the tensor at a site, or anything else if there is none."""


def argument(args: tuple, out: Any) -> Any:
    return args[0]


def output(args: tuple, out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out  # their attention returns two


def second_output(args: tuple, out: Any) -> Any:
    return out[1] if isinstance(out, tuple) else None


def heads_joined(args: tuple, out: Tensor) -> Tensor:
    return out.flatten(2) if out.ndim > 3 else out  # (B, T, W), of ours (B, T, H, D)


def table_of(model: nn.Module) -> Layout | None:
    """The names, as in checkpoints, of a model with OpenAI's or open_clip's modules.

    A model with other modules has a table of its own, from our names to its own, as its attribute
    `tensor_names`. None for a model with our modules or transformers'.
    """
    if is_theirs(model) or isinstance(model, CLIP) or hasattr(model, "vision"):
        return None
    if isinstance(own := getattr(model, "tensor_names", None), dict):
        return own
    try:
        _, table, _ = recognize(model.state_dict())
    except ValueError:
        return None
    return table if table in (OPENAI, OPEN_CLIP_CUSTOM_TEXT) else None


def _module(root: nn.Module, table: Layout, ours: str, parent: int = 0) -> Any:
    """The module that a table places one of ours at, or the `parent`-th that it is in."""
    path = layout_name(ours, table).split(".")
    return root.get_submodule(".".join(path[: len(path) - parent]))


def _blocks(model: nn.Module, table: Layout, tower: str) -> list[tuple[Any, Any, Any]]:
    """Each block with its attention and its MLP; None for what is no module of its own."""
    depths = depth(tower, table, model.state_dict())
    found = []
    for i in range(depths):
        path = f"{tower}.blocks.{i}"
        block, attn, mlp = (
            _module(model, table, f"{path}.{name}", parent=1)
            for name in ("ln_1", "attn.out_proj", "mlp.fc1")
        )
        inside = [None if part is block else part for part in (attn, mlp)]
        found.append((block, *inside))
    return found


def _sites_by_names(
    model: nn.Module, table: Layout
) -> Iterator[tuple[str, nn.Module | None, Read]]:
    yield "vision.embeddings", _module(model, table, "vision.ln_pre"), argument
    for tower in ("vision", "text"):
        for i, (block, attn, mlp) in enumerate(_blocks(model, table, tower)):
            site = f"{tower}.blocks.{i}"
            if tower == "text" and i == 0:
                yield "text.embeddings", block, argument
            yield f"{site}.resid_pre", block, argument
            for third, name in enumerate("qkv"):
                if hasattr(attn, "in_proj_weight"):
                    yield f"{site}.{name}", attn, partial(packed, attn, third)
                elif f"{tower}.blocks.{{}}.attn.{name}_proj" in table:
                    linear = _module(model, table, f"{site}.attn.{name}_proj")
                    yield f"{site}.{name}", linear, heads_joined
            yield f"{site}.attn_out", attn, output
            yield f"{site}.mlp_out", mlp, output
            yield f"{site}.resid_post", block, output
    yield "vision.pooled", _module(model, table, "vision.ln_post"), one_vector
    for site in OUTPUTS:
        yield site, None, output


def packed(attn: Any, third: int, args: tuple, out: Any) -> Any:
    """q, k or v of an nn.MultiheadAttention, which keeps them in one matrix."""
    weight, bias = attn.in_proj_weight.chunk(3)[third], attn.in_proj_bias.chunk(3)[third]
    return F.linear(args[third], weight, bias)


def one_vector(args: tuple, out: Any) -> Any:
    """The output if it is a vector for each picture; some versions normalise all tokens."""
    return out if isinstance(out, Tensor) and out.ndim == 2 else None


def sites_of(model: "CLIP | CLIPModel") -> Iterator[tuple[str, nn.Module | None, Read]]:
    """Each site, its module, and how to read the tensor. ValueError for towers without blocks."""
    if table := table_of(model):
        yield from _sites_by_names(model, table)
        return
    for tower, projection in (("vision", "visual_projection"), ("text", "text_projection")):
        root = _part(model, tower, f"{tower}_model")
        blocks = _part(root, "blocks") or _part(_part(root, "encoder"), "layers")
        if not blocks:
            raise ValueError(
                f"{type(model).__name__} has no blocks in its {tower} tower, so it has no sites; "
                "expected two towers with blocks, under our names, transformers', OpenAI's or "
                "open_clip's"
            )
        proj = _part(root, "proj") or _part(model, projection)
        # The first of the two modules that runs counts: the text tower has no LayerNorm there.
        yield (
            f"{tower}.embeddings",
            _part(root, "ln_pre", "pre_layrnorm", "pre_layernorm"),
            argument,
        )
        yield f"{tower}.embeddings", blocks[0], argument
        for i, block in enumerate(blocks):
            attn, site = _part(block, "attn", "self_attn"), f"{tower}.blocks.{i}"
            yield f"{site}.resid_pre", block, argument
            for name in ("q", "k", "v"):
                yield f"{site}.{name}", _part(attn, name, f"{name}_proj"), heads_joined
            pattern = _part(attn, "pattern")
            yield f"{site}.pattern", pattern or attn, output if pattern else second_output
            yield f"{site}.attn_out", attn, output
            yield f"{site}.mlp_out", _part(block, "mlp"), output
            yield f"{site}.resid_post", block, output
        yield f"{tower}.pooled", proj, argument
        yield f"{tower}.projected", proj, output
    for site in OUTPUTS:
        yield site, None, output


def _part(module: Any, *names: str) -> Any:
    """The first of these attributes that a module has."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def stored_in(
    model: "CLIP | CLIPModel", kind: type[CLIP], dtype: torch.dtype
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """The config, and the parameters under our names; transformers' as a model of class `kind`."""
    weights = {name.replace("_orig_mod.", ""): w for name, w in model.state_dict().items()}
    weights = under_our_names(model, kind, weights)
    return _config_of(model, kind), {name: w.cpu().to(dtype) for name, w in weights.items()}


def _tensors_of(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    own = isinstance(getattr(model, "tensor_names", None), dict)
    return tensors if own else recognize(tensors)[2]


def _config_of(model: "CLIP | CLIPModel", kind: type[CLIP]) -> CLIPConfig:
    if table := table_of(model):  # the shapes and the modules tell it
        fields = from_shapes(_tensors_of(model, model.state_dict()), table, ["vision", "text"])
        for tower in ("vision", "text"):
            _, attn, mlp = _blocks(model, table, tower)[0]
            heads = getattr(attn, "num_heads", fields[tower]["width"] // 64)
            has_gelu = mlp and any(isinstance(module, nn.GELU) for module in mlp.modules())
            fields[tower] |= {"heads": heads, "act": "gelu" if has_gelu else "quick_gelu"}
        return kind.config_class.from_fields(fields)
    if not is_theirs(model):
        return model.config
    types = tuple(dict.fromkeys(("clip", kind.model_type)))
    return kind.config_class.from_fields(from_transformers(model.config.to_dict(), types))


def under_our_names(
    model: "CLIP | CLIPModel", kind: type[CLIP], theirs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What belongs to the parameters of a model, by their names in `kind`."""
    table = table_of(model)
    if not (table or is_theirs(model)):
        return theirs
    if table:
        theirs = _tensors_of(model, theirs)
    ours, config = {}, _config_of(model, kind)
    with torch.device("meta"):
        names = kind(config).state_dict()
    for name in names:
        key, form = place(name, (table or TRANSFORMERS) | kind.tensor_names)
        # The CLIP inside a larger model of theirs has no prefix, such as "clip.".
        key = key if key in theirs else key.partition(".")[2]
        if key in theirs:
            ours[name] = Place(key, form).take(theirs[key])
    return ours
