"""Make twins and forks.

Twins are a miniclip CLIP and a transformers CLIPModel with the same random weights. A fork is an
edited copy of one of miniclip's files.
"""

import copy
import functools
import json
import re
import sys
import types
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from miniclip import CLIP, CLIPConfig, TextConfig, Tokenizer, VisionConfig, model
from miniclip.parity import copy_weights, random_inputs, randomize

__all__ = [
    "TINY", "assert_close", "assert_far", "copy_weights", "exchanged", "fork", "fork_of",
    "random_inputs", "randomize", "tiny_clip", "tokenizer_of", "transformers_config", "twins",
    "write_shards",
]  # fmt: skip

# The towers have different sizes wherever CLIP allows it. So a test notices swapped sizes.
TINY = CLIPConfig(
    vision=VisionConfig(
        width=48, layers=3, heads=4, mlp_width=100, image_size=40, patch_size=8, ln_eps=2e-5
    ),
    text=TextConfig(
        width=40, layers=2, heads=2, mlp_width=92, vocab_size=600, context_length=20,
        bos_token_id=598, eos_token_id=599,
    ),
    embed_dim=36,
)  # fmt: skip


def tokenizer_of(config: CLIPConfig, *texts: str, context_length: int = 77) -> Tokenizer:
    """Train a tokenizer with as many tokens as the model, so that both have the same end token."""
    letters = "abcdefghij"
    more = [" ".join(letters[i:] + letters[:j] for i in range(9)) for j in range(9)]
    size = config.text.vocab_size
    return Tokenizer.train([*texts * 99, *more], size, context_length=context_length)


def twins(
    config: CLIPConfig,
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[CLIP, transformers.CLIPModel]:
    """Make (ours, theirs) in evaluation mode. The two models share no tensor."""
    pair = _remembered if config == TINY else _twins  # a copy is four times as fast as a new pair
    return copy.deepcopy(pair(config, attention, dtype, device, seed))


def _twins(
    config: CLIPConfig, attention: str, dtype: torch.dtype, device: str, seed: int
) -> tuple[CLIP, transformers.CLIPModel]:
    with torch.device("meta"):
        ours = CLIP(config)
        theirs = transformers.CLIPModel._from_config(
            transformers_config(config), attn_implementation=attention
        )
    randomize(ours.to_empty(device="cpu"), seed)
    ours.to(device, dtype).set_attention(attention)
    copy_weights(ours, theirs)
    return ours.eval(), theirs.eval()


_remembered = functools.cache(_twins)


def write_shards(directory: Path, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Write two shards and their index. `name` is the name that the unsharded file would have."""
    stem, suffix = name.rsplit(".", 1)
    shards = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    places = dict(zip(sorted(tensors), shards * len(tensors)))
    for shard in shards:
        part = {name: tensor for name, tensor in tensors.items() if places[name] == shard}
        (save_file if suffix == "safetensors" else torch.save)(part, directory / shard)
    (directory / f"{name}.index.json").write_text(json.dumps({"weight_map": places}))


def tiny_clip(dtype: torch.dtype = torch.float32, seed: int = 0) -> CLIP:
    """Make miniclip's model of `twins(TINY)`, for tests that do not need transformers."""
    return copy.deepcopy(_remembered(TINY, "sdpa", dtype, "cpu", seed)[0])


def transformers_config(config: CLIPConfig) -> transformers.CLIPConfig:
    """Build transformers' config field by field. Tests check `to_dict`, so it is not used here."""
    vision, text = config.vision, config.text
    return transformers.CLIPConfig(
        projection_dim=config.embed_dim,
        logit_scale_init_value=config.logit_scale_init,
        vision_config=dict(
            hidden_size=vision.width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            intermediate_size=vision.mlp_width,
            hidden_act=vision.act,
            layer_norm_eps=vision.ln_eps,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            num_channels=vision.channels,
            projection_dim=config.embed_dim,
        ),
        text_config=dict(
            hidden_size=text.width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            intermediate_size=text.mlp_width,
            hidden_act=text.act,
            layer_norm_eps=text.ln_eps,
            vocab_size=text.vocab_size,
            max_position_embeddings=text.context_length,
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            projection_dim=config.embed_dim,
        ),
    )


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Assert equality within rounding errors: 1e-10 in float64, 1e-5 in float32."""
    assert one.shape == other.shape and one.isfinite().all()
    tolerance = 1e-10 if one.dtype == torch.float64 else 1e-5
    assert (one - other).abs().max() < tolerance * max(1, other.abs().max())


def assert_far(one: torch.Tensor, other: torch.Tensor) -> None:
    """Assert that two tensors differ by far more than `assert_close` allows."""
    assert one.shape == other.shape and (one - other).abs().max() > 1e-3


def fork(module: types.ModuleType, *changes: str) -> types.ModuleType:
    """Copy one of our modules and replace snippets. `changes` is old, new, old, new, ..."""
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in source, old
        source = source.replace(old, new)
    copied = types.ModuleType(f"{module.__name__}_of_a_fork")
    sys.modules[copied.__name__] = copied  # dataclasses look for their module in `sys.modules`
    exec(compile(source, copied.__name__, "exec"), vars(copied))
    return copied


def fork_of(original: CLIP, *changes: str) -> CLIP:
    """Make a model with the original's weights and a fork's code."""
    copied = fork(model, *changes).CLIP(original.config)
    copied.load_state_dict(original.state_dict())
    return copied.eval()


def exchanged(cause: str) -> str:
    """Return a report's cause with the words "model" and "other" swapped."""
    return re.sub("model|other", lambda m: {"model": "other", "other": "model"}[m[0]], cause)
