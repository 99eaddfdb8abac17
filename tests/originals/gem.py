"""Bousselham et al. 2023, GEM: github.com/WalBouss/GEM, which needs open_clip_torch 2.24."""

from originals.common import import_from, main, open_clip_vision, pixels


def record(checkout: str) -> dict:
    import_from(checkout)
    import open_clip.transformer
    import torch
    from gem.gem_wrapper import GEMWrapper

    model = torch.nn.Module()
    model.visual = open_clip_vision(open_clip.transformer)
    GEMWrapper(model, None)
    model.double()
    found = {size: model.visual(pixels(size=size))[0][:, 1:] for size in (12, 16)}
    return {"patches": found[12], "larger": found[16]}


if __name__ == "__main__":
    main(record)
