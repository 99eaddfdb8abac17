"""Wortsman et al. 2021, WiSE-FT: weights between the zero-shot and the fine-tuned model.

github.com/mlfoundations/wise-ft
"""

from originals.common import digests, import_from, main, openai_state, small_clip, without

ALPHAS = [0.3, 0.9]


def record(checkout: str) -> dict:
    import_from(checkout)
    parts = ("eval", "finetune", "modeling", "utils", "zeroshot")
    without("src.args", *(f"src.models.{part}" for part in parts))
    from src.wise_ft import _merge

    ends = openai_state(), openai_state(model=small_clip(seed=1))
    return {"merged": [digests(_merge(alpha, *ends, None, None)) for alpha in ALPHAS]}


if __name__ == "__main__":
    main(record)
