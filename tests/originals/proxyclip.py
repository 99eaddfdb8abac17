"""Lan et al. 2024, ProxyCLIP: github.com/mc-lan/ProxyCLIP"""

from originals.common import chirp, import_from, main, open_clip_vision, pixels


def features():
    """Another model's features of two images, (2, 6, 4, 5). CLIP's own grid is 3 by 3."""
    return chirp(2, 6, 4, 5) + 0.3


def record(checkout: str) -> dict:
    import_from(checkout)
    import open_clip.transformer
    import torch

    visual = open_clip_vision(open_clip.transformer)
    one_by_one = [
        visual(p[None], f[None], beta=1.2, gamma=3.0) for p, f in zip(pixels(), features())
    ]
    return {"patches": torch.cat(one_by_one)}


if __name__ == "__main__":
    main(record)
