"""A user's program with types. test_package.py checks it with mypy and pyright."""

import torch
from torch import Tensor

import miniclip
from miniclip import CLIP, CLIPOutput, VisionTower


class MeanVision(VisionTower):
    def pool(self, x: Tensor) -> Tensor:
        return self.ln_post(x[:, 1:].mean(dim=1))


class Words(CLIP):
    vision_class = MeanVision

    def forward(self, pixels: Tensor, ids: Tensor, best: int = 1) -> CLIPOutput:
        return super().forward(pixels, ids)


def main() -> list[float]:
    model, tokenizer, transform = miniclip.load("shapes")
    pixels = transform([torch.zeros(3, 64, 64, dtype=torch.uint8)])
    ids = tokenizer(["a red circle", "a blue star"])
    output: CLIPOutput = model(pixels, ids=ids)
    image: Tensor = model.vision(pixels)
    text: Tensor = model.text(ids) @ image.T
    fork = Words.from_pretrained("shapes")
    logits: Tensor = fork(pixels, ids, best=2).logits_per_image
    probabilities: list[float] = (output.logits_per_image + logits).softmax(-1)[0].tolist()
    return probabilities + text.flatten().tolist()


def wrong(model: CLIP, fork: Words, pixels: Tensor) -> None:
    model(pixels)  # wrong: the ids are missing.
    model(pixels, ["a cat"])  # wrong: these are texts, not ids.
    model(pixels, pixels).logits  # wrong: the output has no such field.
    model.vision(pixels).logits_per_text  # wrong: a tensor has no such field.
    fork(pixels, pixels, best="two")  # wrong: `best` must be an int.
    model.encode_text("a cat")  # wrong: this is a text, not ids.


if __name__ == "__main__":
    print(main())
