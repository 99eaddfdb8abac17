"""Jiang et al. 2025: test-time registers, extra tokens that get the outputs of some neurons.

github.com/nickjiang2378/test-time-registers
"""

from originals.common import CONFIG, import_from, main, openai_state, pixels

NEURONS = {1: [3, 7, 20], 4: [0, 47]}
CALLS = [{"count": 1, "scale": 1.0}, {"count": 2, "scale": -1.5}]


def record(checkout: str) -> dict:
    import_from(checkout, ".", "clip")
    import torch
    from clip.hook import HookManager
    from clip.transformer import LayerNorm, QuickGELU, VisionTransformer
    from clip_hook_manager import ClipHookManager
    from shared.hook_manager import HookMode

    vision, model = CONFIG.vision, torch.nn.Module()
    model.visual = VisionTransformer(
        image_size=vision.image_size, patch_size=vision.patch_size, width=vision.width,
        layers=vision.layers, heads=vision.heads, mlp_ratio=vision.mlp_width / vision.width,
        output_dim=CONFIG.embed_dim, act_layer=QuickGELU, norm_layer=LayerNorm,
        hook=HookManager().fork("visual"),
    )  # fmt: skip
    model.double().eval().visual.load_state_dict(openai_state("visual."))
    found = []
    for call in CALLS:
        manager = ClipHookManager(model)
        manager.reinit(mode=HookMode.INTERVENE)
        manager.intervene_register_neurons(call["count"], NEURONS, scale=call["scale"])
        manager.finalize()
        # Run one image at a time, because the hooks edit only the first image of a batch.
        found.append([model.visual(p[None], extra_tokens=call["count"])[0] for p in pixels()])
        manager.unregister_all_hooks()
    return {"embeds": found}


if __name__ == "__main__":
    main(record)
