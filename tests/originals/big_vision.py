"""Beyer et al. 2022, FlexiViT: resize the patch kernels to a new patch size.

github.com/google-research/big_vision, which needs jax, flax, tensorflow-cpu and ml_collections.
"""

from originals.common import chirp, import_from, main

SIZES = [(4, 7), (4, 3), (6, 8)]  # a patch's side in pixels, before and after the resize


def record(checkout: str) -> dict:
    import_from(checkout)
    import jax
    import numpy as np
    import torch
    from big_vision.models.proj.flexi.vit import resample_patchemb

    jax.config.update("jax_enable_x64", True)
    found = []
    for old, new in SIZES:
        kernels = chirp(1, 2, old, old).permute(2, 3, 1, 0).numpy()  # rows, columns, channels, W
        resized = torch.from_numpy(np.array(resample_patchemb(kernels, (new, new))))
        found.append(resized.permute(3, 2, 0, 1))
    return {"patch_embed": found}


if __name__ == "__main__":
    main(record)
