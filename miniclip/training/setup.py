"""Load or make the model, tokenizer, transform, data and recipe of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from miniclip.checkpoint import load
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.evaluation.captions import COLUMNS
from miniclip.files.hub import resolve
from miniclip.files.models import check_device
from miniclip.files.reading import read_json
from miniclip.follow import check_towers
from miniclip.model import CLIP
from miniclip.tokenizer import Tokenizer
from miniclip.training.data import open_data
from miniclip.training.pairs import TrainingData
from miniclip.training.recipe import Recipe, read_recipe
from miniclip.transform import ImageTransform


def from_scratch(
    config: CLIPConfig, data: TrainingData, seed: int = 0, kind: type[CLIP] = CLIP
) -> tuple[CLIP, Tokenizer]:
    """Make a model with random weights, and learn a tokenizer from the captions.

    Args:
        config: the model's shape. If the learnt vocabulary is smaller than
            `config.text.vocab_size`, the model's `vocab_size` is smaller too.
        data: the training data.
        seed: decides the weights.
        kind: the class of the model.
    """
    tokenizer = Tokenizer.train(data.captions(), config.text.vocab_size)
    tokenizer.context_length = config.text.context_length
    text = replace(
        config.text,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    return kind(replace(config, text=text)), tokenizer


# The default shape. Two CPU cores are enough to train a model of this shape.
SMALL = CLIPConfig(
    VisionConfig(width=128, layers=4, heads=4, mlp_width=512, image_size=32, patch_size=4),
    TextConfig(
        width=64, layers=2, heads=2, mlp_width=256, vocab_size=1000, context_length=32,
        bos_token_id=0, eos_token_id=0,
    ),
    embed_dim=64,
)  # fmt: skip


class Setup(NamedTuple):
    """The first five arguments of `train`."""

    model: CLIP
    tokenizer: Tokenizer
    transform: ImageTransform
    data: TrainingData
    recipe: Recipe


def set_up(
    data: str,
    model: str | None = None,
    like: str | None = None,
    config: str | None = None,
    overrides: dict[str, Any] | None = None,
    device: str = "cpu",
    columns: tuple[str, str] = COLUMNS,
) -> Setup:
    """Load or make everything that a run starts from.

    Args:
        data: see `open_data`.
        model: the checkpoint to fine-tune; by default the weights are random.
        like: a checkpoint, or the recipe.json in its folder. The run uses this recipe. If `model`
            and `config` are None, the run also uses the checkpoint's shape and transform.
        config: a config.json with the shape of a model with random weights.
        overrides: fields of the recipe to change.
        device: the device on which the model is trained.
        columns: see `open_data`.
    """
    check_device(device)
    if model and config:
        raise ValueError(f"{config} cannot change the shape of {model}; give only one of them")
    if data == "shapes" and not (model or config or like):
        like = "shapes"  # drawn scenes are 64 x 64 pixels; the default model's images are 32 x 32
    directory = resolve(like, "config") if like else None
    recipe = Recipe()
    if like and directory:  # `like` may be a recipe file
        recipe = read_recipe(Path(like) if like.endswith(".json") else directory / "recipe.json")
    recipe = replace(recipe, **overrides or {})
    if model:
        loaded = load(model, device=device)
        check_towers(loaded.model, model)
        return Setup(*loaded, open_data(data, loaded.transform, columns), recipe)
    shape = SMALL
    if config:
        fields = read_json(Path(config))
        if isinstance(text := fields.get("text_config"), dict):
            # transformers' default ids, 49406 and 49407, may not fit the vocabulary learnt below.
            fields["text_config"] = text | {"bos_token_id": 0, "eos_token_id": 0}
        shape = CLIPConfig.from_dict(fields)
    elif directory:
        shape = CLIPConfig.from_pretrained(directory)
    transform = ImageTransform(shape.vision.side)
    if directory and not config and (directory / "preprocessor_config.json").is_file():
        transform = ImageTransform.from_pretrained(directory)
    source = open_data(data, transform, columns)
    random, tokenizer = from_scratch(shape, source, recipe.seed)
    return Setup(random.to(device), tokenizer, transform, source, recipe)
