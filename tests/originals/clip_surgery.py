"""Li et al. 2023, CLIP Surgery: github.com/xmed-lab/CLIP_Surgery"""

from originals.common import import_from, main, openai_vision, pixels


def record(checkout: str) -> dict:
    import_from(checkout)
    import clip.clip_surgery_model

    visual = openai_vision(clip.clip_surgery_model)
    # The larger images must come second, because they overwrite the model's position embedding.
    return {"patches": visual(pixels())[:, 1:], "larger": visual(pixels(size=16))[:, 1:]}


if __name__ == "__main__":
    main(record)
