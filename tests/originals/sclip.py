"""Wang et al. 2023, SCLIP: github.com/wangf3014/SCLIP"""

from originals.common import import_from, main, openai_vision, pixels


def record(checkout: str) -> dict:
    import_from(checkout)
    import clip.model

    visual = openai_vision(clip.model)
    found = {size: visual(pixels(size=size), return_all=True, csa=True)[:, 1:] for size in (12, 16)}
    return {"patches": found[12], "larger": found[16]}


if __name__ == "__main__":
    main(record)
