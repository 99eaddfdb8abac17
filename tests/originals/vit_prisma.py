"""The hook points of a ViT-Prisma block. Their names are the same as in TransformerLens.

github.com/soniajoseph/ViT-Prisma
"""

import torch
from originals.common import CONFIG, chirp, digests, import_from, main, small_clip
from torch import Tensor

BLOCK = 3
SITES = {  # {ViT-Prisma's hook: our site}, both without the name of the block
    "hook_resid_pre": "input",
    "ln1.hook_scale": "ln_1.scale",
    "ln1.hook_normalized": "ln_1",  # the hook includes weight and bias, unless they are folded
    "attn.hook_q": "attn.q",
    "attn.hook_k": "attn.k",
    "attn.hook_v": "attn.v",
    "attn.hook_attn_scores": "attn.scores",
    "attn.hook_pattern": "attn.pattern",
    "attn.hook_z": "attn.z",
    "hook_attn_out": "attn",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_in": "ln_2.input",
    "ln2.hook_scale": "ln_2.scale",
    "ln2.hook_normalized": "ln_2",
    "mlp.hook_pre": "mlp.fc1",
    "mlp.hook_post": "mlp.act",
    "hook_mlp_out": "mlp",
    "hook_resid_post": "",
}


def stream() -> Tensor:
    """The block's input, (2, 10, W)."""
    return 2 * chirp(2, 10, CONFIG.vision.width, start=0.2)


def record(checkout: str) -> dict:
    import_from(checkout, "src")
    from vit_prisma.configs.HookedViTConfig import HookedViTConfig
    from vit_prisma.models.layers.layer_norm import LayerNormPre
    from vit_prisma.models.layers.transformer_block import TransformerBlock

    vision, ours = CONFIG.vision, small_clip().vision.blocks[BLOCK]
    width = vision.width // vision.heads
    cfg = HookedViTConfig(
        n_layers=vision.layers, d_model=vision.width, d_head=width, d_mlp=vision.mlp_width,
        n_heads=vision.heads, activation_name="quick_gelu", eps=vision.ln_eps,
        use_hook_mlp_in=True, dtype=torch.float64,
    )  # fmt: skip
    block = TransformerBlock(cfg).double().eval()
    state = {"attn.b_O": ours.attn.out_proj.bias}
    state["attn.W_O"] = ours.attn.out_proj.weight.T.unflatten(0, (-1, width))
    for kind in "qkv":
        linear = getattr(ours.attn, f"{kind}_proj")
        state[f"attn.W_{kind.upper()}"] = linear.weight.unflatten(0, (-1, width)).mT
        state[f"attn.b_{kind.upper()}"] = linear.bias.unflatten(0, (-1, width))
    for name, module in (("ln1", ours.ln_1), ("ln2", ours.ln_2)):
        state |= {f"{name}.w": module.weight, f"{name}.b": module.bias}
    for name, linear in (("in", ours.mlp.fc1), ("out", ours.mlp.fc2)):
        state |= {f"mlp.W_{name}": linear.weight.T, f"mlp.b_{name}": linear.bias}
    block.load_state_dict(state, strict=False)
    seen: dict[str, Tensor] = {}
    for name in SITES:
        block.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out})
        )
    block(stream())
    return {"sites": digests(seen), "folded": LayerNormPre(cfg)(stream())[0]}


if __name__ == "__main__":
    main(record)
