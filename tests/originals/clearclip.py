"""Lan et al. 2024, ClearCLIP, with code for MaskCLIP too: github.com/mc-lan/ClearCLIP"""

from originals.common import import_from, main, open_clip_vision, pixels


def record(checkout: str) -> dict:
    import_from(checkout)
    import open_clip.transformer

    visual, large = open_clip_vision(open_clip.transformer), pixels(size=16)
    return {
        "patches": visual(pixels(), "ClearCLIP", ignore_residual=True),
        "larger": visual(large, "ClearCLIP", ignore_residual=True),
        "maskclip": visual(pixels(), "MaskCLIP", ignore_residual=False),
    }


if __name__ == "__main__":
    main(record)
