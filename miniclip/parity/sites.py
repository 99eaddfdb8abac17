"""The sites at which two models are compared, and the module that gives the tensor at each site.

A model may have the module names of miniclip, transformers, OpenAI or open_clip. `files/names.py`
has the tables of these names. A model with other names needs a table of its own. A site is left out
if one of the models has no module for it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.config import CLIPConfig
from miniclip.errors import listed
from miniclip.files.configs import from_shapes, from_transformers
from miniclip.files.modules import state_of
from miniclip.files.names import (
    OPEN_CLIP_CUSTOM_TEXT,
    OPENAI,
    TRANSFORMERS,
    Layout,
    Place,
    layout_name,
    place,
)
from miniclip.model import CLIP

OURS = {name: name for name in TRANSFORMERS}
OUTPUTS = {
    "logits": "logits_per_image",
    "logits_per_text": "logits_per_text",
    "image_embeds": "image_embeds",
    "text_embeds": "text_embeds",
}
"""{site: name in the model's output}. A name `x` outside this table has the site `output_x`."""


def is_theirs(model: Any) -> bool:
    """Return whether the model has transformers' class, which takes its inputs by keyword."""
    return hasattr(model, "vision_model")


def table_of(model: Any) -> Layout:
    """Return the table from our names to the model's names, as in `files/names.py`.

    A model's own table is its attribute `tensor_names`. Raises ValueError if the model lacks a
    tensor that is in its own table.
    """
    own = getattr(model, "tensor_names", None)
    is_named_so = hasattr(model, "vision") and "tensor_names" not in vars(model)
    if isinstance(own, dict) and not isinstance(model, CLIP) and not is_named_so:
        return _checked(own, model)
    if is_theirs(model):
        late = hasattr(model.vision_model, "pre_layernorm")  # older versions have "pre_layrnorm"
        return TRANSFORMERS | ({"vision.ln_pre": "vision_model.pre_layernorm"} if late else {})
    if hasattr(model, "visual") and not hasattr(model, "vision"):
        return OPEN_CLIP_CUSTOM_TEXT if hasattr(model, "text") else OPENAI
    return OURS


NEEDED = ("vision.patch_embed.weight", "text.token_embed.weight") + tuple(
    f"{tower}.{name}"
    for tower in ("vision", "text")
    for name in ("pos_embed", "blocks.{}.ln_1.weight", "blocks.{}.mlp.fc1.weight", "proj.weight")
)
"""A fork's own table must have these parameters, because their shapes give the config."""


def _checked(own: Layout, model: Any) -> Layout:
    """Return the table. Raises ValueError if a key is not one of our names, if the table lacks a
    name in NEEDED, or if the model lacks a tensor in the table."""
    state = state_of(model)
    modules = {name.rpartition(".")[0] for name in state}
    for ours, theirs in own.items():
        if {ours, ours.rpartition(".")[0]}.isdisjoint(TRANSFORMERS) or not isinstance(theirs, str):
            raise ValueError(
                f"tensor_names has {ours!r}: {theirs!r}; expected one of our names and the model's "
                f"name for it. Our names are {listed(TRANSFORMERS)}"
            )
        key = place(ours.replace("{}", "0"), own).key
        if key not in state and key not in modules:
            raise ValueError(
                f"tensor_names says that {ours} is {theirs!r}, but {type(model).__name__} has no "
                f"tensor or module {key!r}; the model has {listed(state)}"
            )
    places = own | dict.fromkeys(f"{name}.weight" for name in own)
    if lost := [name for name in NEEDED if name not in places]:
        raise ValueError(f"tensor_names lacks {listed(lost)}; their shapes give the config")
    return own


def _module_at(model: Any, table: Layout, name: str, up: int = 0) -> Any:
    """Return the module that we call `name`, or the module `up` levels above it. Return None if the
    model has no such module."""
    try:
        path = layout_name(name, table).split(".")
        return model.get_submodule(".".join(path[: len(path) - up]))
    except (AttributeError, ValueError):
        return None


def blocks_of(model: Any, table: Layout, tower: str) -> Iterator[Any]:
    """Yield the blocks of a tower. Yields nothing if the model or its table has no blocks."""
    for template in re.findall(r"^[^{]*{}[^.]*", table.get(f"{tower}.blocks.{{}}.ln_1", "")):
        for i in count():
            try:
                yield model.get_submodule(template.format(i))
            except AttributeError:
                return


Read = Callable[[tuple, Any], Any]
"""Return the tensor at a site from a module's arguments and output. A non-tensor is ignored."""


def argument(args: tuple, out: Any) -> Any:
    return args[0]


def output(args: tuple, out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out  # attention may return a pattern as well


def tensor_of(dimensions: int, args: tuple, out: Any) -> Any:
    """Return a module's last output if it has `dimensions` dimensions, otherwise None."""
    last = out[-1] if isinstance(out, tuple) else out
    return last if getattr(last, "ndim", 0) == dimensions else None


one_vector = partial(tensor_of, 2)  # None if a LayerNorm's output has all tokens
returned_pattern = partial(tensor_of, 4)  # None for nn.MultiheadAttention's mean over the heads


def heads_joined(args: tuple, out: Tensor) -> Tensor:
    return out.flatten(2) if out.ndim > 3 else out  # miniclip's (B, T, H, D) -> (B, T, W)


def third_of(holder: Any, third: int, args: tuple, out: Any) -> Any:
    """Return q, k or v of a module that computes all three with one matrix."""
    if not hasattr(holder, "in_proj_weight"):
        return out.chunk(3, -1)[third]
    weight, bias = (x.chunk(3)[third] for x in (holder.in_proj_weight, holder.in_proj_bias))
    return F.linear(args[third], weight, bias)


def sites_of(model: Any) -> Iterator[tuple[str, nn.Module | None, Read]]:
    """Yield (site, module, `Read` function). Raises ValueError if a tower has no blocks."""
    for site, module, read in _all_sites(model, table_of(model)):
        if isinstance(module, nn.Module):
            yield site, module, read
    for site in OUTPUTS:
        yield site, None, output


def _all_sites(model: Any, table: Layout) -> Iterator[tuple[str, Any, Read]]:
    at = partial(_module_at, model, table)
    for tower in ("vision", "text"):
        blocks = [*blocks_of(model, table, tower)]
        if not blocks:
            raise ValueError(
                f"{type(model).__name__} has no blocks in its {tower} tower, so it has no sites; "
                "expected the module names of miniclip, transformers, OpenAI or open_clip, or a "
                "table of names (tensor_names in Python, --names on the command line)"
            )
        # The embeddings are the input of ln_pre or, in a tower without ln_pre, of the first block.
        # `trace` uses the module that runs first.
        yield f"{tower}.embeddings", at(f"{tower}.ln_pre"), argument
        yield f"{tower}.embeddings", blocks[0], argument
        for i, block in enumerate(blocks):
            site = f"{tower}.blocks.{i}"
            attn, mlp = at(f"{site}.attn.out_proj", up=1), at(f"{site}.mlp.fc1", up=1)
            attn, mlp = (None if part is block else part for part in (attn, mlp))
            yield f"{site}.resid_pre", block, argument
            for third, name in enumerate("qkv"):
                linear = at(f"{site}.attn.{name}_proj")
                if table is OURS:
                    linear = getattr(attn, name, None)
                elif not linear and f"{tower}.blocks.{{}}.attn.{name}_proj.weight" in table:
                    holder = at(f"{site}.attn.{name}_proj.weight", up=1)
                    yield f"{site}.{name}", holder, partial(third_of, holder, third)
                yield f"{site}.{name}", linear, heads_joined
            pattern = getattr(attn, "pattern", None) if table is OURS else None
            yield f"{site}.pattern", pattern or attn, output if pattern else returned_pattern
            yield f"{site}.attn_out", attn, output
            yield f"{site}.mlp_out", mlp, output
            yield f"{site}.resid_post", block, output
        proj = at(f"{tower}.proj")
        yield f"{tower}.pooled", proj or at(f"{tower}.ln_post"), argument if proj else one_vector
        yield f"{tower}.projected", proj, output


def outputs_of(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a model returns, with their sites."""
    if hasattr(output, "_asdict"):
        output = output._asdict()
    elif isinstance(output, tuple):  # openai/CLIP returns a tuple
        if len(output) > 2 and output[2].numel() == 1:  # open_clip's third output is the scale
            image_embeds, text_embeds, scale, *bias = output[:4]
            logits = scale * image_embeds @ text_embeds.T + sum(bias)  # (B, C); SigLIP has a bias
            output = (logits, logits.T, image_embeds, text_embeds)
        output = dict(zip(OUTPUTS.values(), output))
    elif is_dataclass(output) and not isinstance(output, dict):
        output = vars(output)
    sites = {name: site for site, name in OUTPUTS.items()}
    named = dict(output) if isinstance(output, dict) else {}
    for name in dict.fromkeys([*sites, *named]):
        if isinstance(x := named.get(name), Tensor) and x.numel():
            yield sites.get(name, f"output_{name}"), x


def config_of(model: Any, kind: type[CLIP]) -> CLIPConfig:
    """Return a model's config. If the model has none, derive it from shapes and modules."""
    table = table_of(model)
    if table is OURS:
        return model.config
    if is_theirs(model):
        types = tuple(dict.fromkeys(("clip", kind.model_type)))
        return kind.config_class.from_fields(from_transformers(model.config.to_dict(), types))
    fields = from_shapes(state_of(model), table, ["vision", "text"])
    for tower in ("vision", "text"):
        parts = [part for block in blocks_of(model, table, tower) for part in block.modules()]
        heads = (getattr(part, "num_heads", None) for part in parts)
        has_gelu = any(isinstance(part, nn.GELU) for part in parts)
        norm = _module_at(model, table, f"{tower}.blocks.0.ln_1")
        fields[tower] |= {
            "ln_eps": getattr(norm, "eps", 1e-5),
            "heads": next(filter(None, heads), max(fields[tower]["width"] // 64, 1)),
            "act": "gelu" if has_gelu else "quick_gelu",
        }
    return kind.config_class.from_fields(fields)


def under_our_names(model: Any, kind: type[CLIP], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors `theirs` from the model's own names to the names in our class `kind`."""
    table = table_of(model)
    if table is OURS:
        return theirs
    config = config_of(model, kind)
    with torch.device("meta"):
        names = kind(config).state_dict()
    found = {}
    for name in names:
        try:
            key, form = place(name, table | kind.tensor_names)
        except ValueError:  # a fork's own table may leave out parameters
            continue
        # If a CLIP is part of a larger model, the table's names have a prefix, such as "clip.".
        key = key if key in theirs else key.partition(".")[2]
        if key in theirs:
            found[name] = Place(key, form).take(theirs[key])
    return found
