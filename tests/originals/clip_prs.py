"""Gandelsman et al. 2023: the contribution of each head, token and MLP to the embedding.

github.com/yossigandelsman/clip_prs
"""

from originals.common import CONFIG, import_from, main, openai_state, pixels


def record(checkout: str) -> dict:
    import_from(checkout)
    from prs_hook import hook_prs_logger
    from torch import nn
    from utils.hook import HookManager
    from utils.transformer import LayerNorm, QuickGELU, VisionTransformer

    vision, hooks = CONFIG.vision, HookManager()
    model = nn.Module()
    model.visual = VisionTransformer(
        image_size=vision.image_size, patch_size=vision.patch_size, width=vision.width,
        layers=vision.layers, heads=vision.heads, mlp_ratio=vision.mlp_width / vision.width,
        output_dim=CONFIG.embed_dim, act_layer=QuickGELU, norm_layer=LayerNorm,
        hook=hooks.fork("visual"),
    )  # fmt: skip
    model.hook_manager = hooks
    model.double().eval().visual.load_state_dict(openai_state("visual."))
    logger = hook_prs_logger(model, "cpu")
    logger.reinit()
    embeds = model.visual(pixels(), attn_method="head")  # (B, E)
    heads, mlps = logger.finalize(embeds)  # (B, L, T, H, E) and (B, 1 + L, E)
    silenced = heads.sum(2)  # (B, L, H, E)
    # Replace a head's output by its mean over images, as compute_use_specific_heads.py does.
    silenced[:, 6, 1] = silenced[:, 6, 1].mean(0)
    return {
        "embed": embeds,
        "heads": heads.sum(2),
        "tokens": heads[:, 7],  # block 7 is the last block
        "mlps": mlps,
        "ablated": silenced.sum((1, 2)) + mlps.sum(1),
    }


if __name__ == "__main__":
    main(record)
