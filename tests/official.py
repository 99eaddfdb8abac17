"""Copies of OpenAI's four checkpoints on the hub, with the same files but random weights.

`python tests/official.py` serves them for the tests marked `hub`. `--small` makes smaller models.
"""

import io
import json
import sys
import tempfile
import time
from dataclasses import replace
from functools import lru_cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from conftest import DATA
from hub_server import running_hub
from safetensors.torch import save
from torch import Tensor
from transformers import CLIPTokenizer
from twin import twins

from miniclip import CLIPConfig, Tokenizer
from miniclip.config import LEGACY_EOS
from miniclip.published import PUBLISHED

OFFICIAL = {
    "openai/clip-vit-base-patch32": "B/32",
    "openai/clip-vit-base-patch16": "B/16",
    "openai/clip-vit-large-patch14": "L/14",
    "openai/clip-vit-large-patch14-336": "L/14-336",
}

SHA256 = {
    "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f": "B/32 pytorch_model.bin",
    "ec89c7b09c749a60aae3c9cd910516f24b58214a7df060b48962d14c469cfbf0": "B/16 pytorch_model.bin",
    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb": "L/14 model.safetensors",
    "f1a17cdbe0f36fec524f5cafb1c261ea3bbbc13e346e0f74fc9eb0460dedd0d3": "L/14 pytorch_model.bin",
    "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801": "336 pytorch_model.bin",
}
"""The hashes of OpenAI's weights on the hub at the commits 3d74acf, 57c2164, 32bd642 and ce19dc9,
as other projects state them. Only L/14 has safetensors."""

# ------------------------------------------------------------------------------------------------
# Small files. The settings files of B/32 equal OpenAI's files at commit 3d74acf, byte for byte.
# Only config.json differs, because OpenAI edited its file by hand (see test_official.py).

START, END = (
    {"content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    for token in ("<|startoftext|>", "<|endoftext|>")
)
SPECIAL_TOKENS = {"bos_token": START, "eos_token": END, "unk_token": END}
SPECIAL_TOKENS |= {"pad_token": END["content"]}
ADDED = {"__type": "AddedToken"}
TOKENIZER = {"unk_token": END | ADDED, "bos_token": START | ADDED, "eos_token": END | ADDED} | {
    "pad_token": END["content"], "add_prefix_space": False, "errors": "replace",
    "do_lower_case": True, "name_or_path": "./clip_ViT_B_32/", "model_max_length": 77,
}  # fmt: skip
PREPROCESSOR = {
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 224,
}  # fmt: skip
TOWER = {  # fields that transformers wrote for every tower in 2022
    "_name_or_path": "", "add_cross_attention": False, "architectures": None,
    "attention_dropout": 0.0, "bad_words_ids": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0,
    "do_sample": False, "dropout": 0.0, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "hidden_act": "quick_gelu", "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_factor": 1.0, "initializer_range": 0.02, "is_decoder": False,
    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "layer_norm_eps": 1e-05,
    "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0,
    "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "prefix": None, "problem_type": None,
    "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
    "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "task_specific_params": None, "temperature": 1.0, "tie_encoder_decoder": False,
    "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0,
    "torch_dtype": None, "torchscript": False, "transformers_version": "4.16.0.dev0",
    "use_bfloat16": False,
}  # fmt: skip


def config_json(name: str, config: CLIPConfig) -> str:
    """The text of config.json. The larger models repeat their sizes under `..._config_dict`."""
    sizes: dict[str, dict[str, Any]] = {
        key: {
            "hidden_size": tower.width, "intermediate_size": tower.mlp_width,
            "num_attention_heads": tower.heads, "num_hidden_layers": tower.layers,
            "projection_dim": config.embed_dim,
        }
        for key, tower in (("text", config.text), ("vision", config.vision))
    }  # fmt: skip
    image = {"image_size": config.vision.image_size, "patch_size": config.vision.patch_size}
    ids = {"bos_token_id": 0, "eos_token_id": LEGACY_EOS, "pad_token_id": 1}
    text = {"max_position_embeddings": 77, "model_type": "clip_text_model", "vocab_size": 49408}
    vision = dict.fromkeys(ids) | {"model_type": "clip_vision_model"} | image
    is_large = "large" in name
    settings = {
        "_name_or_path": name, "architectures": ["CLIPModel"], "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592, "model_type": "clip", "projection_dim": config.embed_dim,
        "text_config": TOWER | ids | text | sizes["text"],
        "text_config_dict": sizes["text"] if is_large else None, "transformers_version": None,
        "vision_config": TOWER | vision | sizes["vision"],
        "vision_config_dict": sizes["vision"] | image if is_large else None,
    }  # fmt: skip
    settings |= {"torch_dtype": "float32"} if is_large else {}
    return _indented(settings, sort_keys=True)


def _indented(settings: dict[str, Any], **options: Any) -> str:
    return json.dumps(settings, indent=2, **options) + "\n"


def vocabulary(name: str) -> dict[str, bytes]:
    """OpenAI's vocabulary from the test data, or else a vocabulary that is trained here."""
    if (DATA / "vocab").is_dir():
        files = {path.name: path.read_bytes() for path in (DATA / "vocab").iterdir()}
    else:
        files = dict(_train_vocabulary())
    if "large" in name:
        words = json.loads(files["vocab.json"])
        files["vocab.json"] = json.dumps(words, ensure_ascii=False).encode()
        files["merges.txt"] = b"#version: 0.2\n" + files["merges.txt"].partition(b"\n")[2]
    return files


@lru_cache
def _train_vocabulary() -> dict[str, bytes]:
    """Train a few words, then add pairs of bytes until the end token's id is 49407. The larger
    models' config does not state this id, because it is transformers' default."""
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.train(["a photo of a cat, the dog and a diagram"], 600).save_pretrained(folder)
        vocab, merges = (Path(folder) / name for name in ("vocab.json", "merges.txt"))
        *words, start, end = json.loads(vocab.read_text(encoding="utf-8"))
        known = {*words}
        pairs = (pair for pair in product(words[:256], repeat=2) if "".join(pair) not in known)
        more = [*islice(pairs, 49406 - len(words))]
        words += [*map("".join, more), start, end]
        vocab.write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
        with merges.open("a", encoding="utf-8") as file:
            file.writelines(f"{one} {other}\n" for one, other in more)
        CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
        names = ("vocab.json", "merges.txt", "tokenizer.json")
        return {name: (Path(folder) / name).read_bytes() for name in names}


# ------------------------------------------------------------------------------------------------
# Weights


def shrunk(config: CLIPConfig) -> CLIPConfig:
    """Make the towers narrow and shallow, but keep the image size and the vocabulary."""
    vision = replace(config.vision, width=60, layers=3, heads=5, mlp_width=100)
    text = replace(config.text, width=64, layers=2, heads=4, mlp_width=92)
    return replace(config, vision=vision, text=text, embed_dim=40)


def random_weights(config: CLIPConfig, seed: int) -> dict[str, Tensor]:
    """Every tensor of OpenAI's files. All parameters are random."""
    tensors = twins(config, seed=seed)[1].state_dict()
    lengths = {"text": config.text.context_length, "vision": 1 + config.vision.patches}
    positions = {
        f"{tower}_model.embeddings.position_ids": torch.arange(length)[None]
        for tower, length in lengths.items()
    }
    return positions | {key: tensors[key] for key in sorted(tensors)}


def as_converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors the memory layout of the hub's pytorch_model.bin. There, q, k and v share
    one storage, and the projections are transposed."""
    laid_out = dict(tensors)
    for key in tensors:
        if "q_proj" in key:
            keys = [key.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            laid_out |= zip(keys, torch.cat([tensors[key] for key in keys]).chunk(3))
        elif key.endswith("l_projection.weight") or key.startswith("text_projection"):
            laid_out[key] = tensors[key].T.contiguous().T
    return laid_out


def files(name: str, *, small: bool = True, seed: int = 0) -> dict[str, bytes]:
    """All files of a repository."""
    config = shrunk(PUBLISHED[OFFICIAL[name]]) if small else PUBLISHED[OFFICIAL[name]]
    side = config.vision.image_size
    texts = {
        "config.json": config_json(name, config),
        "preprocessor_config.json": _indented(PREPROCESSOR | {"crop_size": side, "size": side}),
        "special_tokens_map.json": json.dumps(SPECIAL_TOKENS),
        "tokenizer_config.json": json.dumps(TOKENIZER),
    }
    unused = (".gitattributes", "README.md", "flax_model.msgpack", "tf_model.h5")
    unused += ("pytorch_model.bin",) if name.endswith("large-patch14") else ()
    contents = dict.fromkeys(unused, b"Nothing reads this file.")
    contents |= vocabulary(name) | {path: text.encode() for path, text in texts.items()}
    weights = random_weights(config, seed)
    if "pytorch_model.bin" in unused:
        return contents | {"model.safetensors": save(weights, metadata={"format": "pt"})}
    archive = io.BytesIO()
    torch.save(as_converted(weights), archive)
    return contents | {"pytorch_model.bin": archive.getvalue()}


def main(arguments: list[str]) -> None:
    """Serve the repositories in `arguments`, or all four, until the user presses Ctrl-C."""
    names = [name for name in arguments if name in OFFICIAL] or OFFICIAL
    with running_hub() as hub:
        for seed, name in enumerate(names):
            hub.repositories[name] = {"main": files(name, small="--small" in arguments, seed=seed)}
        print(
            f"MINICLIP_HUB=1 HF_ENDPOINT={hub.url} HF_HOME=$(mktemp -d) pytest -m hub", flush=True
        )
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1:])
