"""Record the outputs of timm and open_clip for small tables and a small model, in data/timm.json.

    pip install -e . timm open_clip_torch && python tests/record_timm.py

timm and open_clip need torchvision. The tests run without it, so they read the recorded numbers.
"""

import json
import platform
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from miniclip import VisionConfig, VisionTower

PATH = Path(__file__).parent / "data" / "timm.json"

# (rows, columns) of a grid before and after the resize. No grid has a single column: timm resizes
# with antialiasing, and then torch 2.13 computes wrong values for a single column on a CPU.
GRIDS = [((5, 5), (7, 7)), ((5, 5), (3, 3)), ((4, 4), (2, 8)), ((3, 4), (6, 2))]
PATCHES = [(4, 7), (4, 3), (6, 8)]  # a patch's side in pixels, before and after the resize
CHANNELS = [1, 2, 4, 6]  # numbers of input channels that replace the usual three
CONTEXTS = [(20, 33), (16, 31)]  # text lengths before and after the positions are stretched

VISION = VisionConfig(
    width=12, layers=3, heads=3, mlp_width=24, image_size=(12, 8), patch_size=4, act="quick_gelu"
)  # fmt: skip
EMBED_DIM = 5
CALLS = [
    {"indices": [0, -1]},
    {"indices": 2, "norm": True, "output_fmt": "NLC"},
    {"indices": [1], "stop_early": True, "return_prefix_tokens": True},
    {"indices": 1, "intermediates_only": True},
]


def waves(*shape: int, start: float = 0.0) -> Tensor:
    """Deterministic float64 numbers from -1 to 1."""
    count = torch.Size(shape).numel()
    return (start + 0.7 * torch.arange(count, dtype=torch.float64)).sin().view(shape)


def small_tower() -> VisionTower:
    """A vision tower of VISION's shape, in which no two weights are equal."""
    tower = VisionTower(VISION, EMBED_DIM).double().eval()
    for i, (name, parameter) in enumerate(tower.named_parameters()):
        scale = 0.5 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        mean = 1.0 if name.endswith("weight") and ".ln_" in f".{name}" else 0.0
        parameter.data.copy_(mean + scale * waves(*parameter.shape, start=i))
    return tower


def timm_tower(tower: VisionTower):
    """Load the tower's weights into timm's ViT, which reads OpenAI's names."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    theirs = timm.create_model(
        "vit_base_patch32_clip_quickgelu_224", img_size=VISION.image_size, num_classes=EMBED_DIM,
        patch_size=VISION.patch_size, embed_dim=VISION.width, depth=VISION.layers,
        num_heads=VISION.heads, mlp_ratio=VISION.mlp_width / VISION.width,
    )  # fmt: skip
    state = {
        "visual.class_embedding": tower.class_embed,
        "visual.positional_embedding": tower.pos_embed,
        "visual.conv1.weight": tower.patch_embed.weight,
        "visual.proj": tower.proj.weight.T,
    }
    modules = {"ln_pre": tower.ln_pre, "ln_post": tower.ln_post}
    for i, block in enumerate(tower.blocks):
        name, attn = f"transformer.resblocks.{i}", block.attn
        linears = (attn.q_proj, attn.k_proj, attn.v_proj)
        for kind in ("weight", "bias"):
            fused = torch.cat([getattr(linear, kind) for linear in linears])
            state[f"visual.{name}.attn.in_proj_{kind}"] = fused
        modules |= {
            f"{name}.ln_1": block.ln_1, f"{name}.attn.out_proj": attn.out_proj,
            f"{name}.ln_2": block.ln_2, f"{name}.mlp.c_fc": block.mlp.fc1,
            f"{name}.mlp.c_proj": block.mlp.fc2,
        }  # fmt: skip
    for name, module in modules.items():
        for kind, parameter in module.named_parameters():
            state[f"visual.{name}.{kind}"] = parameter
    theirs = theirs.double().eval()
    theirs.load_state_dict(checkpoint_filter_fn(state, theirs))
    return theirs


@torch.no_grad()
def record() -> dict[str, object]:
    import open_clip
    import timm
    from open_clip.model import resize_pos_embed, resize_text_pos_embed
    from timm.layers import resample_abs_pos_embed, resample_patch_embed
    from timm.models._manipulate import adapt_input_conv

    found: dict[str, list] = {"timm.pos_embed": [], "open_clip.pos_embed": []}
    for old, new in GRIDS:
        table = waves(1 + old[0] * old[1], 2)
        found["timm.pos_embed"].append(resample_abs_pos_embed(table[None], [*new], [*old])[0])
        state = {"visual.positional_embedding": table.float()}
        if old[0] == old[1]:  # open_clip needs a square grid
            resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=new)))
            found["open_clip.pos_embed"].append(state["visual.positional_embedding"])
    found["timm.patch_embed"] = [
        resample_patch_embed(waves(1, 2, old, old), [new, new]) for old, new in PATCHES
    ]
    found["timm.channels"] = [adapt_input_conv(n, waves(2, 3, 2, 2).float()) for n in CHANNELS]
    found["open_clip.text_pos_embed"] = []
    for old, new in CONTEXTS:
        state = {"positional_embedding": waves(old, 2)}
        resize_text_pos_embed(state, SimpleNamespace(positional_embedding=waves(new, 2)))
        found["open_clip.text_pos_embed"].append(state["positional_embedding"])

    theirs, pixels = timm_tower(small_tower()), waves(1, 3, *VISION.height_width)
    found["timm.embedding"] = theirs(pixels)
    found["timm.intermediates"] = [theirs.forward_intermediates(pixels, **call) for call in CALLS]
    theirs.set_input_size(img_size=(20, 16))
    found["timm.resized_embedding"] = theirs(waves(1, 3, 20, 16))
    modules = {"timm": timm, "open_clip": open_clip, "torch": torch}
    versions = {name: module.__version__ for name, module in modules.items()}
    return {"versions": versions | {"machine": platform.machine()}, **plain(found)}


def plain(value):
    """Turn tensors into nested lists of numbers with ten digits."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return float(f"{value:.10g}")


if __name__ == "__main__":
    PATH.write_text(json.dumps(record()) + "\n")
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")
