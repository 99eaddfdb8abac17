"""Zhou et al. 2021, CoOp, with three positions of the class name: github.com/KaiyangZhou/CoOp"""

from types import SimpleNamespace

import torch
from originals.common import CONFIG, chirp, import_from, main, openai_clip, without

PLACES = ("end", "middle", "front")
# Each row: start token, two learned tokens, a class name of one or two tokens, full stop, end token
IDS = torch.tensor([[18, 0, 0, 3, 5, 19, 0], [18, 0, 0, 4, 7, 5, 19]])
LENGTHS = {"one": 1, "two": 2}


def record(checkout: str) -> dict:
    import_from(checkout)
    without("dassl.engine", "dassl.metrics", "dassl.utils", "dassl.optim", "torchvision.transforms")
    import clip.model
    from trainers import coop

    model = openai_clip(clip.model)
    rows = iter(len(PLACES) * [*IDS])
    coop.clip.tokenize = lambda prompt: next(rows)[None]  # CoOp's ids are too large for `model`
    coop._tokenizer = SimpleNamespace(encode=lambda name: [0] * LENGTHS[name])
    found = []
    for place in PLACES:
        options = SimpleNamespace(N_CTX=2, CTX_INIT="", CSC=False, CLASS_TOKEN_POSITION=place)
        size = SimpleNamespace(SIZE=[CONFIG.vision.image_size])
        cfg = SimpleNamespace(TRAINER=SimpleNamespace(COOP=options), INPUT=size)
        learner = coop.PromptLearner(cfg, [*LENGTHS], model)
        learner.ctx.data = chirp(2, CONFIG.text.width)
        found.append(coop.TextEncoder(model)(learner(), learner.tokenized_prompts))
    return {"embeds": found}


if __name__ == "__main__":
    main(record)
