"""Where two models are compared: which module of a CLIP, ours or transformers', gives which tensor.

A fork needs two towers with blocks. Every other site is left out if the fork has no such module.
"""

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from miniclip.config import CLIPConfig
from miniclip.files.configs import from_transformers
from miniclip.files.names import TRANSFORMERS, Place, place
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
        output = dict(zip(OUTPUTS.values(), output[:2]))
    elif is_dataclass(output) and not isinstance(output, dict):
        output = vars(output)
    named = dict(output) if isinstance(output, dict) else {}
    named = {site: named.pop(name, None) for site, name in OUTPUTS.items()} | {
        f"output_{name}": named[name] for name in named if name not in OUTPUTS.values()
    }
    yield from ((site, x) for site, x in named.items() if isinstance(x, Tensor) and x.numel())


def is_theirs(model: nn.Module) -> bool:
    """Whether modules have transformers' names."""
    return hasattr(model, "vision_model")


Read = Callable[[tuple, Any], Tensor]
"""(arguments, output) of a module -> the tensor at a site."""


def sites_of(model: "CLIP | CLIPModel") -> Iterator[tuple[str, nn.Module | None, Read]]:
    """Each site, its module, and how to read the tensor. ValueError for towers without blocks."""

    def argument(args: tuple, out: Any) -> Tensor:
        return args[0]

    def output(args: tuple, out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out  # their attention returns two

    def heads_joined(args: tuple, out: Tensor) -> Tensor:
        return out.flatten(2) if out.ndim > 3 else out  # (B, T, W), of ours (B, T, H, D)

    def pattern(args: tuple, out: Any) -> Tensor:
        return out[1] if isinstance(out, tuple) else out

    theirs = is_theirs(model)
    for tower, projection in (("vision", "visual_projection"), ("text", "text_projection")):
        root = getattr(model, f"{tower}_model" if theirs else tower, None)
        stack = getattr(root, "encoder", None) if theirs else root
        blocks = getattr(stack, "layers" if theirs else "blocks", None)
        if not blocks:
            raise ValueError(
                f"{type(model).__name__} has no blocks in its {tower} tower, so it has no sites; "
                "expected two towers with blocks, under our names or transformers'"
            )
        proj = getattr(model, projection, None) if theirs else getattr(root, "proj", None)
        # The first of the two places that runs counts: the text tower has no LayerNorm there.
        norms = ("pre_layrnorm", "pre_layernorm") if theirs else ("ln_pre",)  # OWL-ViT spells it
        ln_pre = next((getattr(root, name) for name in norms if hasattr(root, name)), None)
        yield f"{tower}.embeddings", ln_pre, argument
        yield f"{tower}.embeddings", blocks[0], argument
        for i, block in enumerate(blocks):
            attn = getattr(block, "self_attn" if theirs else "attn", None)
            site = f"{tower}.blocks.{i}"
            yield f"{site}.resid_pre", block, argument
            for name in ("q", "k", "v"):
                module = getattr(attn, f"{name}_proj" if theirs else name, None)
                yield f"{site}.{name}", module, heads_joined
            yield f"{site}.pattern", attn if theirs else getattr(attn, "pattern", None), pattern
            yield f"{site}.attn_out", attn, output
            yield f"{site}.mlp_out", getattr(block, "mlp", None), output
            yield f"{site}.resid_post", block, output
        yield f"{tower}.pooled", proj, argument
        yield f"{tower}.projected", proj, output
    for site in OUTPUTS:
        yield site, None, output


def depths(model: "CLIP | CLIPModel") -> tuple[int, int]:
    """The number of blocks in the vision tower and in the text tower."""
    sites = [site for site, *_ in sites_of(model) if site.endswith(".resid_post")]
    vision = sum(site.startswith("vision.") for site in sites)
    return vision, len(sites) - vision


def kind_of(model: Any) -> type[CLIP]:
    """The class of ours whose files a model could have been loaded from: CLIP or a fork."""
    return type(model) if isinstance(model, CLIP) else CLIP


def config_of(model: "CLIP | CLIPModel", kind: type[CLIP] = CLIP) -> CLIPConfig:
    """The config; transformers' as a model of class `kind` would have it."""
    if not is_theirs(model):
        return model.config
    types = tuple(dict.fromkeys(("clip", kind.model_type)))
    return kind.config_class.from_fields(from_transformers(model.config.to_dict(), types))


def weights_of(
    model: "CLIP | CLIPModel", config: CLIPConfig, dtype: torch.dtype, kind: type[CLIP] = CLIP
) -> dict[str, Tensor]:
    """The parameters under our names."""
    weights = {name.replace("_orig_mod.", ""): w for name, w in model.state_dict().items()}
    if is_theirs(model):
        with torch.device("meta"):
            names = kind(config).state_dict()
        places = {name: place(name, TRANSFORMERS | kind.tensor_names) for name in names}
        found = {}
        for name, (key, form) in places.items():
            # The CLIP inside a larger model of theirs has no prefix, such as "clip.".
            key = key if key in weights else key.partition(".")[2]
            if key in weights:
                found[name] = Place(key, form).take(weights[key])
        weights = found
    return {name: weight.cpu().to(dtype) for name, weight in weights.items()}
