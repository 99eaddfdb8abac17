"""Check whether a function that inspects or changes a model gives the right result on a fork.

Some of these functions replay a method: they do not call it, but compute CLIP's formula. For
example, `dense_features` runs the last block with another attention pattern. If a fork has its own
version of a replayed method, the function raises an error, because the result could be wrong.

A fork is a subclass in a file of your own. Do not copy miniclip's code:

```python
class MeanVision(miniclip.VisionTower):
    def pool(self, x):  # last tokens (B, T, W) -> the input of the projection (B, W)
        return self.ln_post(x[:, 1:].mean(dim=1))  # the patches, not the class token

class MeanCLIP(miniclip.CLIP):
    vision_class = MeanVision

fork = MeanCLIP.from_pretrained("everyday")  # a MeanCLIP with the trained weights, to fine-tune
miniclip.save("mean", fork, tokenizer, transform)
same = MeanCLIP.from_pretrained("mean")  # bit for bit; CLIP.from_pretrained raises an error
```

- **Parts are class attributes**: `Block.attention_class` and `mlp_class`,
  `VisionTower.block_class`, `CLIP.vision_class`, `text_class` and `config_class`. **Steps are
  methods**: `embed_tokens`, `pool`, `qkv`, `score`.
- **A new parameter** needs an entry in `CLIP.tensor_names`: its name in the model, and its name in
  files: `{"text.blocks.{}.mlp.gate": "text_model.encoder.layers.{}.mlp.gate"}`. Without this
  entry, saving raises an error that says what to write.
- **A file belongs to one class.** `model_type` in config.json is the name of the class, unless the
  class sets `model_type` itself. Other classes, and transformers' `AutoModel`, reject the file.
- **Another loss** is an argument: `training.train(..., loss=function)`.
- **Functions that inspect a model** give the right result on a fork, or raise an error with the
  reason. `decompose` needs the class token's output, so it raises an error for `MeanCLIP`. miniclip
  does not promise that a fork equals transformers.

`tests/forks/siglip.py` is a full example: SigLIP in one file. It loads Google's checkpoints, and
its outputs equal transformers' outputs up to rounding error. CLIPSeg, OWL-ViT and EVA-02's block
are in the same folder. Notebook 9 builds forks step by step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.config import TextConfig
from miniclip.files.modules import check_described, class_of, is_patched, unwrapped
from miniclip.model import CLIP, MLP, Attention, Block, QuickGELU, Site, TextTower, VisionTower
from miniclip.sites import Edit, hooks
from miniclip.tokenizer import Tokenizer

Methods = tuple[str, ...]


def own_method(
    tower: Any,
    of_tower: Methods,
    block: Methods = (),
    attention: Methods = (),
    mlp: Methods = (),
) -> tuple[str, str]:
    """Find the first of the given methods that a fork overrides.

    Returns the name of the method and the name of the fork's class, or two empty strings. Also
    finds methods of replaced modules, and methods that were set on an instance.
    """
    kind: type = TextTower if hasattr(tower, "eos_positions") else VisionTower
    parts = [(tower, kind, of_tower)]
    for one in map(unwrapped, tower.blocks):
        parts.append((one, Block, block))
        parts.append((getattr(one, "attn", one), Attention, attention))
        parts.append((getattr(one, "mlp", one), MLP, mlp))
    for part, kind, names in parts:
        part = unwrapped(part)
        for name in names:
            if is_patched(part, name) or getattr(type(part), name, None) is not getattr(kind, name):
                return f"{kind.__name__}.{name}", type(part).__name__
    return "", ""


def follow(who: str, tower: Any, of_tower: Methods = (), **methods: Any) -> None:
    """Raise ValueError if a tower overrides one of the given methods.

    The function with the name `who` repeats the steps of these methods in its own code.

    >>> from miniclip import VisionConfig
    >>> class Mean(VisionTower):
    ...     def pool(self, x):
    ...         return self.ln_post(x.mean(1))
    >>> follow("decompose", Mean(VisionConfig(), 512), ("pool",))
    Traceback (most recent call last):
    ValueError: decompose cannot follow Mean, which replaces VisionTower.pool
    """
    method, owner = own_method(tower, of_tower, **methods)
    if method:
        raise ValueError(f"{who} cannot follow {owner}, which replaces {method}")


def tower_for(model: Any, x: Tensor) -> Any:
    """The tower for the input x (ids or pixels). If the model is a tower, return the model.

    Raises ValueError for a fork with its own `encode_image` or `encode_text`, and for a model on
    which such a method was set. An engine's method is accepted: it gives the tower's output.
    """
    model = unwrapped(model)
    if hasattr(model, "blocks"):
        return model
    name, encode = ("vision", "encode_image") if x.is_floating_point() else ("text", "encode_text")
    is_own = getattr(type(model), encode, None) not in (CLIP.encode_image, CLIP.encode_text)
    if is_own or (is_patched(model, encode) and not hasattr(getattr(model, encode), "engine")):
        raise ValueError(
            f"{type(model).__name__} has its own {encode}, which may change the output of the "
            f"{name} tower; to inspect only the tower, give model.{name}"
        )
    return unwrapped(getattr(model, name))


def sees_padding(tower: Any) -> bool:
    """Whether tokens after the end token may change a text's embedding, as in a fork without a
    causal mask. CLIP's text tower is causal, and its output is read at the end token."""
    of_tower = ("forward", "embed_tokens", "add_positions", "pool", "eos_positions")
    own = ("forward",)
    method, _ = own_method(tower, of_tower, own, (*own, "qkv", "attend"), own)
    return bool(method) or not all(block.attn.causal for block in tower.blocks)


def ids_for(tower: Any, tokenizer: Tokenizer, texts: Sequence[str], **options: Any) -> Tensor:
    """Token ids (B, T) of texts, where T is the length of the longest text. If the tower sees
    padding, T is the context length, so that the other texts do not change a text's padding."""
    if tokenizer is None:
        raise ValueError("expected a tokenizer, found none in the checkpoint of this model")
    if sees_padding(tower):
        options["pad_to"] = tower.config.context_length
    return tokenizer(texts, **options)


def patch_places(tower: Any, pixels: Tensor) -> slice:
    """The positions of the patches among the tokens of an image. In CLIP they are the last tokens.

    If a fork has its own `embed_tokens`, change three patches, one at a time, to find the tokens
    that differ. Raises ValueError unless there is one token for each patch, row by row.
    """
    rows, columns = patch_grid(tower, pixels)
    count = rows * columns
    if not own_method(tower, ("embed_tokens",))[0]:
        return slice(-count, None)
    size = tower.patch_embed.stride[0]
    probe = torch.zeros_like(pixels[:1]).repeat(4, 1, 1, 1)
    asked = [0, min(1, count - 1), count - 1]
    for image, patch in zip(probe[1:], asked, strict=True):
        i, j = (n * size for n in divmod(patch, columns))
        image[:, i : i + size, j : j + size] = 1
    with torch.no_grad():
        tokens = tower.embed_tokens(probe)  # (4, T, W)
    changed = [(one != tokens[0]).any(-1).nonzero().flatten().tolist() for one in tokens[1:]]
    first = changed[0][0] if changed[0] else 0
    if changed != [[first + patch] for patch in asked]:
        raise ValueError(
            f"{type(tower).__name__}.embed_tokens does not make one token for each patch, row by "
            "row, so its tokens cannot be shown as a map of patches"
        )
    return slice(first, first + count)


def patch_grid(tower: Any, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of a vision tower's patches. Raises ValueError unless a Conv2d cuts the
    image into patches without overlap and without padding, as in every published CLIP."""
    conv: Any = unwrapped(tower.patch_embed)
    is_conv = isinstance(conv, nn.Conv2d) and conv.stride == conv.kernel_size
    if not is_conv or conv.padding not in ((0, 0), "valid"):
        raise ValueError(
            f"{type(tower).__name__}.patch_embed is {conv}; expected a Conv2d whose stride is the "
            "size of a patch, without padding"
        )
    rows, columns = (n // s for n, s in zip(pixels.shape[-2:], conv.stride))
    return rows, columns


def check_towers(model: Any, name: Any) -> None:
    """Raise ValueError if the checkpoint `name` has only one tower."""
    if len(model.towers) < 2:
        only = f"{name}: has only a {model.towers[0]} tower"
        raise ValueError(f"{only}; expected a CLIP, with a vision and a text tower")


def check_rebuilt(who: str, model: Any) -> Any:
    """Return a model. Raise ValueError unless the model's class and config determine its modules.

    In some forks, blocks differ from layer to layer, or the position embedding is a buffer.
    Then saving and loading would give another model. CLIP itself does not need this check.
    """
    if model.model_type != "clip":
        try:
            check_described(model)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{who} cannot follow {type(model).__name__}: {error}") from None
    return model


CLIP_MODULES = {VisionTower, TextTower, Block, Attention, MLP, Site, QuickGELU, nn.GELU}
CLIP_MODULES |= {nn.Conv2d, nn.Embedding, nn.Identity, nn.LayerNorm, nn.Linear, nn.Sequential}
"""The classes of the modules in CLIP's towers."""


@torch.no_grad()
def check_equal(who: str, tower: Any, other: Any, edits: dict[str, Edit] = {}) -> None:
    """Raise ValueError if surgery on a fork's tower gave a wrong embedding.

    `tower` is the new tower, and `other` is the old tower. With hooks that make the `edits` in the
    old tower, both towers must give the same embedding. CLIP's own towers are not checked, because
    tests show that surgery on them is exact.
    """
    own = ("__init__", "forward")
    has_own = own_method(tower, (*own, "embed_tokens", "pool"), own, (*own, "qkv", "attend"), own)
    if not any(has_own) and {class_of(module) for module in tower.modules()} <= CLIP_MODULES:
        return
    towers = (tower, other)
    modes = [one.training for one in towers]
    try:
        x = some_input(tower)
        found = tower.eval()(x)
        with hooks(other.eval(), edits):
            expected = other(x)
        error, limit = (found - expected).abs().max(), 1e-3 * expected.abs().max()
        reason = "" if error <= limit else f"the new tower's embedding differs by {error:.2g}"
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
    finally:
        for one, mode in zip(towers, modes, strict=True):
            one.train(mode)
    if reason:
        name = type(tower).__name__
        raise ValueError(f"{who} cannot follow {name} or a part of it: {reason}")


def some_input(tower: Any) -> Tensor:
    """Make pixels or ids for a tower, such that all tokens differ."""
    config, like = tower.config, next(tower.parameters())
    if hasattr(tower, "patch_embed"):
        size = (1, config.channels, *config.height_width)
        return torch.linspace(-9, 9, torch.Size(size).numel()).sin().view(size).to(like)
    ids = torch.arange(config.context_length, device=like.device) % config.vocab_size
    ids[-1] = end_token(config)
    return ids[None]


def end_token(text: TextConfig) -> int:
    """The id of the end token. By the legacy rule, the end token is the largest id in a text."""
    return text.vocab_size - 1 if text.ends_at_largest else text.eos_token_id
