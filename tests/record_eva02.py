"""Record the output of timm's EVA-02 block for a small input, in data/eva02.json.

    pip install -e . timm && python tests/record_eva02.py

timm needs torchvision. The tests run without torchvision, so they read the recorded numbers.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).parent / "data" / "eva02.json"
WIDTH, HEADS, MLP_WIDTH, GRID, EPS = 16, 2, 24, (2, 3), 1e-6

# timm's name -> the name in tests/forks/eva02.py
NAMES = {
    "norm1": "ln_1", "attn.q_proj": "attn.q_proj", "attn.k_proj": "attn.k_proj",
    "attn.v_proj": "attn.v_proj", "attn.proj": "attn.out_proj", "norm2": "ln_2",
    "mlp.fc1_g": "mlp.fc1", "mlp.fc1_x": "mlp.up", "mlp.norm": "mlp.norm", "mlp.fc2": "mlp.fc2",
}  # fmt: skip


def waves(*shape: int, start: float) -> Tensor:
    """Deterministic float64 numbers from -1 to 1."""
    count = torch.Size(shape).numel()
    return (start + 0.7 * torch.arange(count, dtype=torch.float64)).sin().view(shape)


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Make a different tensor for each name in `shapes`."""
    return {name: waves(*shapes[name], start=i) / 2 for i, name in enumerate(sorted(shapes))}


def tokens() -> Tensor:
    """The input (B, T, W): the class token and the patches of two images."""
    return waves(2, 1 + GRID[0] * GRID[1], WIDTH, start=0.3)


@torch.no_grad()
def record() -> dict[str, object]:
    import timm
    from timm.layers import LayerNorm, build_rotary_pos_embed
    from timm.layers.pos_embed_sincos import freq_bands
    from timm.models.eva import EvaBlock

    block = EvaBlock(
        WIDTH, HEADS, qkv_fused=False, mlp_ratio=MLP_WIDTH / WIDTH, swiglu_mlp=True,
        scale_mlp=True, norm_layer=lambda *args, **options: LayerNorm(*args, eps=EPS, **options),
    ).double().eval()  # fmt: skip
    ours = {}  # maps our names to timm's names
    for name in block.state_dict():
        module, _, kind = name.rpartition(".")
        ours[f"{NAMES[module]}.{kind}"] = name
    state = block.state_dict()
    drawn = weights({name: tuple(state[theirs].shape) for name, theirs in ours.items()})
    block.load_state_dict({ours[name]: weight for name, weight in drawn.items()})

    count = WIDTH // HEADS // 4
    bands = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    assert torch.allclose(bands.float(), freq_bands(count, step=1))  # timm's are float32
    table = build_rotary_pos_embed(
        [*GRID], bands, in_pixels=False, ref_feat_shape=[16, 16], dtype=torch.float64
    )
    out = block(tokens(), rope=torch.cat(table, -1))
    versions = {"timm": timm.__version__, "torch": torch.__version__}
    return {"versions": versions, "block": [f"{x:.15g}" for x in out.flatten().tolist()]}


if __name__ == "__main__":
    PATH.write_text(json.dumps(record()) + "\n")
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")
