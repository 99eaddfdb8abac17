"""Hajimiri et al. 2024, NACLIP: github.com/sinahmr/NACLIP"""

from originals.common import import_from, main, openai_vision, pixels


def record(checkout: str) -> dict:
    import_from(checkout)
    import clip.model

    visual = openai_vision(clip.model)
    visual.set_params("reduced", "naclip", gaussian_std=5.0)
    found = {size: visual(pixels(size=size), return_all=True)[:, 1:] for size in (12, 16)}
    return {"patches": found[12], "larger": found[16]}


if __name__ == "__main__":
    main(record)
