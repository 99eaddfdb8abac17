"""Bolya et al. 2022, token merging in timm's ViT: github.com/facebookresearch/ToMe"""

from originals.common import CONFIG, import_from, main, openai_state, pixels

MERGED = 1  # each block merges this many tokens


def record(checkout: str) -> dict:
    import_from(checkout)
    import tome.patch
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    vision = CONFIG.vision
    model = VisionTransformer(
        img_size=vision.image_size, patch_size=vision.patch_size, embed_dim=vision.width,
        depth=vision.layers, num_heads=vision.heads, mlp_ratio=vision.mlp_width / vision.width,
        num_classes=CONFIG.embed_dim, pre_norm=True, act_layer=QuickGELU, norm_layer=None,
    ).double().eval()  # fmt: skip
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = vision.ln_eps
    state = openai_state("visual.")
    model.load_state_dict(checkpoint_filter_fn({f"visual.{k}": v for k, v in state.items()}, model))
    tome.patch.timm(model, prop_attn=True)
    model.r = MERGED
    return {"embeds": model(pixels())}


if __name__ == "__main__":
    main(record)
