"""The same input through miniclip and through transformers, compared tensor by tensor.

Both run in float32 and in float64. In float32 the unchanged model agrees to the last bit, and one
whose operations are in another order to rounding. In float64 a difference that is more than
rounding has nowhere left to hide.
"""

import copy
import math
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from miniclip.checkpoint import load_model, resolve
from miniclip.config import (
    LEGACY_EOS,
    CLIPConfig,
    TextConfig,
    VisionConfig,
    beyond_transformers,
)
from miniclip.layouts import TRANSFORMERS, layout_name
from miniclip.model import CLIP

if TYPE_CHECKING:
    from transformers import CLIPModel

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}

_L14 = {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096, "patch_size": 14}
_L14_TEXT = TextConfig(width=768, heads=12, mlp_width=3072)
OFFICIAL = {
    "B/32": CLIPConfig(),
    "B/16": CLIPConfig(VisionConfig(patch_size=16)),
    "L/14": CLIPConfig(VisionConfig(**_L14), _L14_TEXT, 768),
    "L/14-336": CLIPConfig(VisionConfig(**_L14, image_size=336), _L14_TEXT, 768),
}
"""The shapes of OpenAI's four vision transformers: tables 19 and 20 of the paper."""


class Difference(NamedTuple):
    """How far two models are apart at a site: the largest absolute difference of any number."""

    site: str
    float32: float
    float64: float
    rounding: float  # for scale: from the first model's float32 to its own float64

    @property
    def within_tolerance(self) -> bool:
        """Whether both differences are what rounding can explain."""
        return self.float32 <= TOLERANCE[torch.float32] and self.float64 <= TOLERANCE[torch.float64]


def compare(model: CLIP, other: "CLIP | CLIPModel", *, seed: int = 0) -> list[Difference]:
    """Run two models of one shape on the same random input; compare them in the order data flows.

    The sites are the residual stream before the first block, what every attention and MLP adds to
    it, the stream after each block, the vector that is read off at the end, its projection, and the
    logits. Four images and four texts are run, on copies: both models stay as they are.
    """
    from tqdm import tqdm

    inputs = random_inputs(model.config, images=4, texts=4, tokens=12, seed=seed)
    runs = [(m, dtype) for m in (model, other) for dtype in TOLERANCE]
    bar = tqdm(runs, unit="run", delay=2, disable=None, leave=False)
    ours32, ours64, theirs32, theirs64 = (_tensors(m, dtype, *inputs) for m, dtype in bar)
    if ours32.keys() != theirs32.keys():
        raise ValueError("the two models differ in their number of blocks")
    return [
        Difference(
            site,
            _distance(ours32[site], theirs32[site]),
            _distance(ours64[site], theirs64[site]),
            _distance(ours32[site], ours64[site]),
        )
        for site in ours32
    ]


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return math.inf
    distance = (one.double() - other.double()).abs().max().item()
    return math.inf if math.isnan(distance) else distance


@torch.no_grad()
def _tensors(
    model: "CLIP | CLIPModel", dtype: torch.dtype, pixels: Tensor, ids: Tensor
) -> dict[str, Tensor]:
    """The tensor at each site in one forward pass on a CPU, in the order of the sites."""
    model = copy.deepcopy(model).to("cpu", dtype).eval()
    seen: dict[str, Tensor] = {}
    for site, module, is_input in _sites(model):
        seen[site] = torch.empty(0)  # so that the order is that of the sites

        def keep(module, args, kwargs, out, site=site, is_input=is_input):
            x = [*args, *kwargs.values()][0] if is_input else out
            seen[site] = x[0] if isinstance(x, tuple) else x  # theirs returns the pattern as well

        module.register_forward_hook(keep, with_kwargs=True)
    output = model(pixel_values=pixels, input_ids=ids) if _is_theirs(model) else model(pixels, ids)
    return seen | {"logits_per_image": output.logits_per_image}


def _is_theirs(model: nn.Module) -> bool:
    return not isinstance(model, CLIP)


def _sites(model: "CLIP | CLIPModel") -> Iterator[tuple[str, nn.Module, bool]]:
    """Our name of a site, the module that it is at, and whether it is the module's input."""
    for tower, projection in (("vision", "visual_projection"), ("text", "text_projection")):
        if _is_theirs(model):
            blocks = getattr(model, f"{tower}_model").encoder.layers
            proj = getattr(model, projection)
        else:
            blocks, proj = getattr(model, tower).blocks, getattr(model, tower).proj
        yield f"{tower}.embed", blocks[0], True
        for i, block in enumerate(blocks):
            attn = block.self_attn if _is_theirs(model) else block.attn
            yield f"{tower}.blocks.{i}.attn", attn, False
            yield f"{tower}.blocks.{i}.mlp", block.mlp, False
            yield f"{tower}.blocks.{i}", block, False
        yield f"{tower}.pooled", proj, True
        yield f"{tower}.proj", proj, False


# ------------------------------------------------------------------------------------------------
# Two models with the same weights


def against_transformers(name: str | os.PathLike[str], **options: object) -> list[Difference]:
    """Compare a checkpoint's weights, loaded by us, with the same files loaded by transformers.

    `name` is an embedded name, a directory or a hub id; `options` are those of `miniclip.load`.
    """
    transformers = _transformers()
    if os.path.isfile(name):
        raise ValueError(f"{name} is a file; transformers loads directories: name the one it is in")
    directory = resolve(name, "model", **options)
    ours = load_model(directory)
    _check_expressible(ours.config)
    return compare(ours, transformers.CLIPModel.from_pretrained(directory, dtype=torch.float32))


def against_transformers_at_random(shape: str, *, seed: int = 0) -> list[Difference]:
    """Compare weights drawn at random, in one of the OFFICIAL shapes. Needs no checkpoint."""
    if shape not in OFFICIAL:
        raise ValueError(f"no official shape is called {shape!r}; expected {', '.join(OFFICIAL)}")
    _transformers()
    with torch.device("meta"):
        model = CLIP(OFFICIAL[shape])
    randomize(model.to_empty(device="cpu"), seed)
    return compare(model, transformers_twin(model), seed=seed)


def transformers_twin(model: CLIP) -> "CLIPModel":
    """A CLIPModel of transformers with a copy of our weights, if it can be one."""
    transformers = _transformers()
    _check_expressible(model.config)
    config = transformers.CLIPConfig.from_dict(model.config.to_dict())
    with torch.device("meta"):
        theirs = transformers.CLIPModel(config)
    copy_weights(model, theirs)
    return theirs.eval()


def _check_expressible(config: CLIPConfig) -> None:
    if odd := beyond_transformers(config.vision) + beyond_transformers(config.text):
        raise ValueError(f"transformers' CLIP cannot express {', '.join(odd)}: nothing to compare")


def copy_weights(ours: CLIP, theirs: "CLIPModel") -> None:
    """Give theirs a copy of our weights, in our precision and on our device."""
    weights = ours.state_dict().items()
    copies = {layout_name(name, TRANSFORMERS): weight.detach().clone() for name, weight in weights}
    theirs.load_state_dict(copies, strict=True, assign=True)
    for module in theirs.modules():  # a buffer that no checkpoint has, still on the meta device
        if isinstance(getattr(module, "position_ids", None), Tensor):
            count = module.position_ids.shape[-1]
            module.position_ids = torch.arange(count, device=ours.logit_scale.device)[None]


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Redraw every parameter, so that activations keep a size near 1 and each weight counts.

    Freshly initialised weights hide faults: a bias that is zero can be lost, a LayerNorm that is
    the identity can be swapped with another. The logit scale is ln 100, the largest that OpenAI's
    training allows, at which rounding shows most.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == "logit_scale":
            parameter.fill_(math.log(100))
            continue
        is_table = name.endswith(("token_embed.weight", "pos_embed", "register_embed"))
        std = 0.3 if parameter.ndim < 2 or is_table else parameter[0].numel() ** -0.5
        mean = 1.0 if re.search(r"ln_\w+\.weight$", name) else 0.0
        parameter.copy_(torch.empty(parameter.shape).normal_(mean, std, generator=generator))


def random_inputs(
    config: CLIPConfig, images: int = 2, texts: int = 3, tokens: int = 9, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Noise (images, channels, height, width), and ids (texts, tokens) whose end token moves from
    row to row and is followed by random ids, as no padding is fixed."""
    generator = torch.Generator().manual_seed(seed)
    vision, text = config.vision, config.text
    size = (images, vision.channels, *vision.height_width)
    ids = torch.randint(3, text.vocab_size - 2, (texts, tokens), generator=generator)
    end = text.eos_token_id if text.eos_token_id != LEGACY_EOS else text.vocab_size - 1
    rows = torch.arange(texts)
    ids[rows, tokens - 1 - rows % (tokens - 1)] = end
    return torch.randn(size, generator=generator), ids


# ------------------------------------------------------------------------------------------------


def summarize(rows: list[Difference]) -> list[Difference]:
    """One row for all blocks of a tower, with the largest of their differences."""
    depth = {
        tower: sum(re.fullmatch(rf"{tower}\.blocks\.\d+", row.site) is not None for row in rows)
        for tower in ("vision", "text")
    }
    largest: dict[str, Difference] = {}
    for row in rows:
        tower = row.site.partition(".")[0]
        site = re.sub(r"blocks\.\d+", f"blocks.0-{depth.get(tower, 0) - 1}", row.site)
        numbers = zip(largest.get(site, row)[1:], row[1:])
        largest[site] = Difference(site, *map(max, numbers))
    return list(largest.values())


def environment() -> str:
    """The versions and the processor that numbers were measured with."""
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    versions = f"torch {torch.__version__}, transformers {_transformers().__version__}"
    return f"{versions}, CPU with {capability}, threads: {threads}"


def _transformers():
    try:
        import transformers
    except ImportError:
        raise ValueError("nothing to compare with: pip install 'miniclip[test]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
