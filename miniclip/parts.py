"""The parts of a CLIP, with their parameters and multiply-adds."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from miniclip.config import LEGACY_EOS, CLIPConfig
from miniclip.files.models import meta_device
from miniclip.model import CLIP, TextTower, VisionTower


class Part(NamedTuple):
    """A part of a CLIP. The `attn` modules of all blocks, for example, are one part."""

    name: str
    weights: str  # the shapes of the weights
    parameters: int  # the number of parameters in all blocks together
    multiply_adds: int  # for one image, or for one text of `context_length` tokens


def parts(config: CLIPConfig, kind: type[CLIP] = CLIP) -> list[Part]:
    """List the parts in the order in which data flows. No weights are created or read.

    >>> parts(CLIPConfig())[0]
    Part(name='vision.patch_embed', weights='(768, 3, 32, 32)', parameters=2359296, \
multiply_adds=115605504)
    """
    # On the meta device, ids have no values, so no end token can be found. The legacy rule does not
    # look for one: it takes the position of the largest id.
    text = replace(config.text, eos_token_id=LEGACY_EOS, literal_eos=False)
    with meta_device():
        model = kind(replace(config, text=text))
        pixels = torch.empty(1, config.vision.channels, *config.vision.height_width)
        ids = torch.empty(1, config.text.context_length, dtype=torch.long)
    model.set_attention("eager")  # the counter does not see matrix products inside sdpa
    return [
        *_tower_parts("vision", model.vision, pixels),
        *_tower_parts("text", model.text, ids),
        Part("logit_scale", "()", 1, 0),
    ]


def _tower_parts(prefix: str, tower: VisionTower | TextTower, inputs: torch.Tensor) -> list[Part]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(inputs)
    flops = {
        name.partition(".")[2]: sum(by_operation.values())
        for name, by_operation in counter.get_flop_counts().items()
    }
    shapes = (tower.config.heads, tower.config.mlp_width)
    depth = 1 if any(isinstance(n, tuple) for n in shapes) else len(tower.blocks)  # blocks per Part
    rows = []
    for name, part in _in_order(tower, len(tower.blocks) // depth):
        weights = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        if not weights:
            continue  # a Site has no weights
        label = name.replace("blocks.0", f"blocks.0-{depth - 1}") if depth > 1 else name
        copies = depth if name.startswith("blocks.") else 1
        rows.append(
            Part(
                f"{prefix}.{label}",
                _shapes(weights),
                copies * sum(weight.numel() for weight in weights),
                copies * flops.get(name, 0) // 2,  # a multiply-add is two operations
            )
        )
    return rows


def _in_order(
    tower: VisionTower | TextTower, blocks: int
) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    embeddings = dict(tower.named_parameters(recurse=False))
    for name, child in tower.named_children():
        if name != "blocks":
            yield name, child
        else:
            for i, block in enumerate(list(tower.blocks)[:blocks]):
                for part, module in block.named_children():
                    yield f"blocks.{i}.{part}", module
        yield from embeddings.items()  # pos_embed, for example, comes after the first module
        embeddings = {}


def _shapes(weights: list[nn.Parameter]) -> str:
    """The shapes of all matrices. If there are none, the shape of the first vector."""
    shapes = [tuple(w.shape) for w in weights if w.ndim > 1] or [tuple(weights[0].shape)]
    counts = {shape: shapes.count(shape) for shape in shapes}
    return ", ".join(f"{n} x {shape}" if n > 1 else str(shape) for shape, n in counts.items())
