"""A small model, its inputs, and a `main` that stores values, for all scripts in this folder.

The other scripts in this folder run the authors' own code on this model and record the outputs:

    pip install -e . einops open_clip_torch timm jaxtyping fancy_einsum
    git clone https://github.com/yossigandelsman/clip_prs
    cd tests && python -m originals.clip_prs ../clip_prs

The values are stored in data/originals.json. test_originals.py compares miniclip with them.
"""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from miniclip import CLIP, CLIPConfig, TextConfig, VisionConfig
from miniclip.files.names import OPENAI, pack

PATH = Path(__file__).parent.parent / "data" / "originals.json"

# The towers have eight blocks, because some methods change the last six or seven blocks. The images
# are square, because most of the authors' code needs square images.
CONFIG = CLIPConfig(
    VisionConfig(width=12, layers=8, heads=3, mlp_width=48, image_size=12, patch_size=4),
    TextConfig(
        width=8, layers=2, heads=2, mlp_width=32, vocab_size=20, context_length=7,
        bos_token_id=18, eos_token_id=19,
    ),
    embed_dim=5,
)  # fmt: skip


def chirp(*shape: int, start: float = 0.0) -> Tensor:
    """Deterministic float64 numbers from -1 to 1. A matrix of these numbers has full rank."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (start + 0.7 * n + 0.013 * n.square()).sin().view(shape)


def small_clip(config: CLIPConfig = CONFIG, seed: int = 0) -> CLIP:
    """A float64 model in which no two weights are equal."""
    model = CLIP(config).double().eval()
    for i, (name, parameter) in enumerate(model.named_parameters(), seed):
        scale = 0.5 if parameter.ndim < 2 else 2 * parameter[0].numel() ** -0.5
        mean = 1.0 if name.endswith("weight") and ".ln_" in name else 0.0
        parameter.data.copy_(mean + scale * chirp(*parameter.shape, start=i**2))
    return model


def pixels(images: int = 2, size: int = 12) -> Tensor:
    """(B, 3, size, size), float64."""
    return 2 * chirp(images, 3, size, size, start=0.3)


def ids() -> Tensor:
    """Token ids (2, 7). Each row has an end token."""
    return torch.tensor([[18, 3, 7, 19, 0, 0, 0], [18, 1, 2, 11, 4, 19, 0]])


def openai_state(prefix: str = "", model: CLIP | None = None) -> dict[str, Tensor]:
    """Select the weights whose OpenAI names start with `prefix`, and remove the prefix."""
    model = model or small_clip()
    state = pack({name: p.detach() for name, p in model.named_parameters()}, OPENAI)
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def import_from(checkout: str, *folders: str) -> None:
    """Let a script import a repository's modules."""
    sys.path[:0] = [str(Path(checkout, folder)) for folder in folders or (".",)]


def digests(state: dict[str, Tensor]) -> Tensor:
    """A checksum of each tensor: a weighted sum of its elements. Tensors are sorted by name."""
    return torch.stack([(state[n] * chirp(*state[n].shape)).sum() for n in sorted(state)])


def without(*modules: str) -> None:
    """Replace modules by mocks. The authors' code imports them, but does not need them here."""
    sys.modules.update({name: MagicMock() for name in modules})


def openai_clip(module: types.ModuleType) -> nn.Module:
    """The model from a copy of OpenAI's model.py, with our weights."""
    # OpenAI's LayerNorm computes in float32, and the rounding would hide a small difference.
    module.LayerNorm.forward = nn.LayerNorm.forward
    v, t = CONFIG.vision, CONFIG.text
    name = "VisionTransformer" if hasattr(module, "VisionTransformer") else "VisualTransformer"
    vit = getattr(module, name)
    # OpenAI's CLIP passes width // 64 heads to its vision tower. Pass our number of heads instead.
    setattr(module, name, lambda **sizes: vit(**sizes | {"heads": v.heads}))
    model = module.CLIP(
        CONFIG.embed_dim, v.image_size, v.layers, v.width, v.patch_size,
        t.context_length, t.vocab_size, t.width, t.heads, t.layers,
    )  # fmt: skip
    model.double().eval().load_state_dict(openai_state())
    return model


def openai_vision(module: types.ModuleType) -> nn.Module:
    """The vision tower from a copy of OpenAI's model.py, with our weights."""
    # OpenAI's LayerNorm computes in float32, and the rounding would hide a small difference.
    module.LayerNorm.forward = nn.LayerNorm.forward
    v = CONFIG.vision
    visual = module.VisionTransformer(
        v.image_size, v.patch_size, v.width, v.layers, v.heads, CONFIG.embed_dim
    )
    return loaded(visual)


def open_clip_vision(module: types.ModuleType) -> nn.Module:
    """The vision tower from a copy of open_clip's transformer.py, with our weights."""
    v = CONFIG.vision
    visual = module.VisionTransformer(
        image_size=v.image_size, patch_size=v.patch_size, width=v.width, layers=v.layers,
        heads=v.heads, mlp_ratio=v.mlp_width / v.width, output_dim=CONFIG.embed_dim,
        act_layer=module.QuickGELU,
    )  # fmt: skip
    return loaded(visual)


def loaded(visual: nn.Module) -> nn.Module:
    """Load our weights into a vision tower, in float64."""
    visual.double().eval().load_state_dict(openai_state("visual."))
    return visual


def plain(value):
    """Turn tensors into nested lists of numbers with thirteen digits."""
    if isinstance(value, Tensor):
        return plain(value.detach().tolist())
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return float(f"{value:.13g}")


def main(record: Callable[[str], dict[str, Tensor]]) -> None:
    """Call `record` with the checkout from the command line, and write the returned values."""
    name = Path(sys.modules["__main__"].__file__).stem
    with torch.no_grad():
        found = plain(record(sys.argv[1]))
    recorded = json.loads(PATH.read_text()) if PATH.exists() else {}
    recorded[name] = found
    rows = [f'"{key}": {json.dumps(value)}' for key, value in sorted(recorded.items())]
    PATH.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print(f"{name}: {len(json.dumps(found)):,} bytes")
