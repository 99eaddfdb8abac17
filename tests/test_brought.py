"""Load users' checkpoints, for example training files, single towers, or files without config.

Each test repeats a public report about openai/CLIP, open_clip, transformers, diffusers or a
program that uses them. The expected values come from transformers, or are the saved weights.
"""

import argparse
import copy
import datetime
import json
import struct
import warnings
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from twin import TINY, randomize, tiny_clip, tokenizer_of, twins

from miniclip import (
    CLIP,
    CheckpointError,
    CLIPConfig,
    ImageTransform,
    TextConfig,
    TextTower,
    Tokenizer,
    VisionConfig,
    VisionTower,
    load,
    save,
)
from miniclip.files.models import open_model
from miniclip.files.names import LAYOUTS, pack
from miniclip.files.published import fields_of_timm
from miniclip.lens import decompose
from miniclip.surgery import add_tokens
from miniclip.training.data import open_data

# --------------------------------------------------------------------------------- squashed images


def open_clip_settings(**preprocessing):
    model = {"embed_dim": 36, "vision_cfg": {"image_size": 40}, "text_cfg": {}}
    return {"model_cfg": model, "preprocess_cfg": {"size": 40} | preprocessing}


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def photograph():
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_squash_gives_the_pixels_of_transformers_at_a_fixed_height_and_width(tmp_path, photograph):
    """apple/DFN5B-CLIP-ViT-H-14-378 has this resize_mode in open_clip_config.json."""
    write(tmp_path / "open_clip_config.json", open_clip_settings(resize_mode="squash"))
    transform = ImageTransform.from_pretrained(tmp_path)
    assert transform == ImageTransform(40, squash=True)
    processor = transformers.CLIPImageProcessorPil(
        size={"height": 40, "width": 40}, do_center_crop=False
    )
    theirs = processor(photograph, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(transform(photograph), theirs)
    assert not torch.equal(ImageTransform(40)(photograph), theirs)
    processor.save_pretrained(tmp_path / "theirs")
    assert ImageTransform.from_pretrained(tmp_path / "theirs") == transform
    transform.save_pretrained(tmp_path / "ours")
    again = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(photograph, return_tensors="pt")["pixel_values"][0], theirs)
    transform.save_pretrained(tmp_path)  # this folder has an open_clip_config.json too
    saved = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert saved["preprocess_cfg"]["resize_mode"] == "squash"
    cropped = replace(transform, crop_size=32)
    assert ImageTransform.from_dict(cropped.to_dict()) == cropped
    assert torch.equal(cropped(photograph), theirs[:, 4:36, 4:36])


@pytest.mark.parametrize("mode", ["longest", "crop"])
def test_the_error_for_an_unsupported_resize_mode_names_the_mode(tmp_path, mode):
    write(tmp_path / "open_clip_config.json", open_clip_settings(resize_mode=mode))
    with pytest.raises(CheckpointError, match=f"resize_mode is '{mode}'; expected 'shortest'"):
        ImageTransform.from_pretrained(tmp_path)


def test_a_warning_names_two_files_that_disagree_about_the_pixels(tmp_path):
    write(tmp_path / "open_clip_config.json", open_clip_settings(resize_mode="squash"))
    ImageTransform(40).save_pretrained(tmp_path / "beside")
    write(
        tmp_path / "preprocessor_config.json",
        json.loads((tmp_path / "beside/preprocessor_config.json").read_text()),
    )
    said = r"preprocessor_config.json and open_clip_config.json disagree: squash False and True"
    with pytest.warns(UserWarning, match=said) as warned:
        assert ImageTransform.from_pretrained(tmp_path) == ImageTransform(40)
    assert [warning.filename for warning in warned] == [__file__]
    write(tmp_path / "open_clip_config.json", open_clip_settings(resize_mode="longest"))
    with pytest.warns(UserWarning, match="disagree: .*resize_mode is 'longest'"):
        ImageTransform.from_pretrained(tmp_path)
    write(tmp_path / "open_clip_config.json", open_clip_settings())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageTransform.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------- MetaCLIP 2


@pytest.fixture
def metaclip(tmp_path):
    """A MetaClip2Model of transformers with random weights, and its directory."""
    config = transformers.MetaClip2Config(
        projection_dim=36,
        vision_config=dict(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=100,
            image_size=40, patch_size=8,
        ),
        text_config=dict(
            hidden_size=40, num_hidden_layers=2, num_attention_heads=2, intermediate_size=92,
            vocab_size=600, max_position_embeddings=20, bos_token_id=0, eos_token_id=2,
        ),
    )  # fmt: skip
    peer = transformers.MetaClip2Model(config).eval()
    randomize(peer)
    peer.save_pretrained(tmp_path / "metaclip")
    ImageTransform(40).save_pretrained(tmp_path / "metaclip")
    return peer, tmp_path / "metaclip"


# The end token is 2, which is not the largest id.
LITERAL = torch.tensor([[0, 5, 599, 2, 1, 1], [0, 7, 2, 300, 2, 1]])


@torch.no_grad()
def test_metaclip_2_pools_a_text_at_its_first_token_with_id_2(metaclip, tmp_path):
    peer, directory = metaclip
    said = r"not CLIP's, so.*AutoTokenizer.from_pretrained\('.*metaclip'\)"
    with pytest.warns(UserWarning, match=said) as warned:
        model, tokenizer, transform = load(directory)
    assert len(warned) == 1 and tokenizer is None and transform == ImageTransform(40)
    pixels = torch.randn(3, 3, 40, 40)
    theirs = peer(input_ids=LITERAL, pixel_values=pixels).logits_per_image
    assert torch.equal(model(pixels, LITERAL).logits_per_image, theirs)
    assert model.config.text.literal_eos
    legacy = CLIP(replace(model.config, text=replace(model.config.text, literal_eos=False)))
    legacy.load_state_dict(model.state_dict())
    assert not torch.allclose(legacy(pixels, LITERAL).logits_per_image, theirs)

    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is transformers.MetaClip2Model
    assert torch.equal(again(input_ids=LITERAL, pixel_values=pixels).logits_per_image, theirs)
    assert CLIP.from_pretrained(tmp_path / "ours").config == model.config
    model.save_pretrained(tmp_path / "open_clip", layout="open_clip")
    assert CLIP.from_pretrained(tmp_path / "open_clip").config.text.literal_eos
    with pytest.raises(CheckpointError, match="cannot express a literal eos_token_id 2"):
        CLIP(replace(TINY, text=replace(
            TINY.text, width=64, heads=1, eos_token_id=2, literal_eos=True))
        ).save_pretrained(tmp_path / "openai", layout="openai")  # fmt: skip


@torch.no_grad()
def test_an_open_clip_worldwide_model_gives_the_text_embeddings_of_transformers(metaclip, tmp_path):
    """The model is a smaller copy of open_clip's ViT-H-14-worldwide-quickgelu."""
    peer, directory = metaclip
    CLIP.from_pretrained(directory).save_pretrained(tmp_path / "world", layout="open_clip")
    path = tmp_path / "world/open_clip_config.json"
    settings = json.loads(path.read_text())
    text = settings["model_cfg"]["text_cfg"]
    assert (text["pool_type"], text["eos_id"]) == ("eos", 2)
    text["hf_tokenizer_name"] = "facebook/xlm-v-base"
    settings["preprocess_cfg"] = {"size": 40}
    write(path, settings)
    with pytest.warns(UserWarning, match=r"from_pretrained\('facebook/xlm-v-base'\)"):
        loaded = load(tmp_path / "world")
    theirs = peer.get_text_features(LITERAL).pooler_output
    torch.testing.assert_close(loaded.model.encode_text(LITERAL), theirs, rtol=0, atol=1e-5)
    assert loaded.tokenizer is None


def test_a_tokenizer_whose_end_token_has_the_id_2_is_saved_and_loaded(tmp_path):
    plain = Tokenizer.train(["a photo of a cat"], 600)
    end = plain.tokens([2])[0]
    tokenizer = Tokenizer(plain.vocab, plain.merges, added=plain.added, eos_token=end)
    text = replace(TINY.text, eos_token_id=2, literal_eos=True)
    save(tmp_path, CLIP(replace(TINY, text=text)), tokenizer, ImageTransform(40))
    assert load(tmp_path).tokenizer.vocab == tokenizer.vocab


def test_a_tokenizer_with_the_eos_id_of_an_open_clip_config_is_loaded(tmp_path):
    tokenizer = Tokenizer.train(["a photo of a cat"], 600, context_length=20)
    text = replace(TINY.text, width=64, heads=1, eos_token_id=2)
    vision = replace(TINY.vision, width=64, heads=1)
    model = CLIP(replace(TINY, text=text, vision=vision))
    model.save_pretrained(tmp_path, "open_clip")
    ImageTransform(40).save_pretrained(tmp_path)
    merges = [[*pair] for pair in tokenizer.merges]
    write(tmp_path / "tokenizer.json", {"model": {"vocab": tokenizer.vocab, "merges": merges}})
    settings = json.loads((tmp_path / "open_clip_config.json").read_text())
    settings["model_cfg"]["text_cfg"] |= {"pool_type": "eos", "eos_id": tokenizer.eos_token_id}
    write(tmp_path / "open_clip_config.json", settings)
    assert load(tmp_path).tokenizer.vocab == tokenizer.vocab


# --------------------------------------------------------------------------------------- subfolders


def test_a_checkpoint_in_a_subfolder_of_a_directory_is_loaded(tmp_path):
    model = tiny_clip()
    save(tmp_path / "0_CLIPModel", model, tokenizer_of(TINY), ImageTransform(40))
    for read in (
        load,
        CLIP.from_pretrained,
        VisionTower.from_pretrained,
        CLIPConfig.from_pretrained,
    ):
        read(tmp_path, subfolder="0_CLIPModel")
    assert Tokenizer.from_pretrained(tmp_path, subfolder="0_CLIPModel").vocab_size > 2
    assert ImageTransform.from_pretrained(tmp_path, subfolder="0_CLIPModel").size == 40
    with pytest.raises(CheckpointError, match="has no folder 'text_encoder'; it has 0_CLIPModel"):
        TextTower.from_pretrained(tmp_path, subfolder="text_encoder")
    for outside in ("../x", "/etc"):
        with pytest.raises(CheckpointError, match="expected a folder inside"):
            load(tmp_path / "0_CLIPModel", subfolder=outside)


# ------------------------------------------------------------------------------- without any config


def write_zeros(path: Path, config: CLIPConfig, layout: str, keep=lambda name: True) -> Path:
    """Write a safetensors file with a model's shapes. Its zeros take no space on the disk."""
    with torch.device("meta"):
        tensors = pack(CLIP(config).state_dict(), LAYOUTS[layout])
    header, place = {}, 0
    for name, tensor in tensors.items():
        if keep(name):
            end = place + 2 * tensor.numel()
            header[name] = {"dtype": "F16", "shape": [*tensor.shape], "data_offsets": [place, end]}
            place = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
    return path


def published(width, layers, act, text, embed_dim=768, patch=14):
    mlp_width = {1408: 6144, 1664: 8192}.get(width, 4 * width)
    vision = VisionConfig(width, layers, 16, mlp_width, act, 1e-5, 224, patch)
    words, depth = text
    return CLIPConfig(
        vision, TextConfig(words, depth, words // 64, 4 * words, act), embed_dim=embed_dim
    )


L14 = published(1024, 24, "quick_gelu", (768, 12))
G14 = published(1408, 40, "gelu", (1024, 24), 1024)
BIGG = published(1664, 48, "gelu", (1280, 32), 1280)


def half(tower):
    return lambda name: name.startswith(("text", "transformer", "token", "positional", "ln_final"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_tower_without_a_config_gets_the_config_published_for_its_shapes(tmp_path, layout):
    path = write_zeros(tmp_path / "clip_g.safetensors", BIGG, layout, half("text"))
    with pytest.warns(UserWarning, match="of laion/CLIP-ViT-bigG.*20 text heads and gelu") as it:
        stored = open_model(path, None)
    assert len(it) == 1 and stored.towers == ["text"]
    found = {name: stored.fields["text"][name] for name in ("width", "layers", "heads", "act")}
    assert found == {"width": 1280, "layers": 32, "heads": 20, "act": "gelu"}
    assert stored.embed_dim("text") == 1280


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", [half("text"), lambda name: True], ids=["clip_l", "whole"])
def test_a_file_needs_a_config_if_its_shapes_were_published_with_different_activations(
    tmp_path, layout, keep
):
    path = write_zeros(tmp_path / "clip_l.safetensors", L14, layout, keep)
    said = r"laion/CLIP-ViT-L-14\S+ \(gelu\) and openai/clip-vit-large\S+ \(quick_gelu\).*config="
    with pytest.raises(CheckpointError, match=said):
        open_model(path, None)
    for name, act in (
        ("ViT-L/14", "quick_gelu"),
        ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "gelu"),
    ):
        stored = open_model(path, None, config=name)
        assert stored.fields["text"]["act"] == act and stored.fields["text"]["heads"] == 12
        assert ("vision" in stored.fields) == (keep("visual.proj"))


@pytest.mark.slow
def test_a_file_with_both_towers_and_unambiguous_shapes_needs_no_config(tmp_path):
    path = write_zeros(tmp_path / "x.safetensors", G14, "transformers")
    with pytest.warns(UserWarning, match="laion/CLIP-ViT-g-14.*16 vision heads and 16 text heads"):
        config = CLIPConfig.from_pretrained(path)
    assert config.vision == G14.vision
    assert config.text == replace(G14.text, eos_token_id=2)


def test_a_file_with_unpublished_shapes_needs_a_config(tmp_path):
    model = tiny_clip()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "tiny.json")
    with pytest.raises(CheckpointError, match=r"no published model has these shapes.*config="):
        CLIP.from_pretrained(tmp_path / "model.safetensors")
    for config in (TINY, tmp_path / "tiny.json", str(tmp_path / "tiny.json")):
        again = CLIP.from_pretrained(tmp_path / "model.safetensors", config=config)
        assert again.config == TINY
        assert all(map(torch.equal, again.parameters(), model.parameters()))
    with pytest.raises(CheckpointError, match="tensors do not fit|layers in the layout"):
        CLIP.from_pretrained(tmp_path / "model.safetensors", config="ViT-B/32")
    for config in (3, TINY.vision):
        with pytest.raises(ValueError, match="config is .*; expected a CLIPConfig, a path or a na"):
            CLIP.from_pretrained(tmp_path, config=config)
    tuned = replace(TINY, vision=replace(TINY.vision, act="gelu"))
    assert VisionTower.from_pretrained(tmp_path, config=tuned).config.act == "gelu"


# ----------------------------------------------------------------------------------- training files


class Unpicklable:
    """An object that opens a file when it is unpickled."""

    def __reduce__(self):
        return (open, ("/tmp/miniclip-proof", "w"))


def test_load_ignores_everything_in_a_training_file_except_the_weights(tmp_path):
    model = tiny_clip()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, 40, 40), torch.tensor([[5, 599]])).logits_per_text.sum().backward()
    optimizer.step()
    (tmp_path / "model.safetensors").unlink()
    marked = torch.nn.Parameter(tensors["logit_scale"])
    marked.weight_decay = 0.1  # torch pickles a parameter differently if it has attributes
    beside = {
        "args": argparse.Namespace(lr=1e-5, when=datetime.datetime.now(), path=Path("x")),
        "best": np.float64(0.5),
        "curve": np.arange(3.0),
        "random": np.random.default_rng(0).bit_generator.state,
        "rng": torch.get_rng_state(),
        "last": deque([1, 2], maxlen=3),
        "names": {"a", "b"},
        "optimizer": optimizer.state_dict(),
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "code": Unpicklable(),
    }
    for key in ("state_dict", "model_state_dict", "model", "module"):
        torch.save(beside | {key: tensors | {"logit_scale": marked}}, tmp_path / "epoch_3.pt")
        again = CLIP.from_pretrained(tmp_path / "epoch_3.pt").state_dict()
        with torch.no_grad():
            place = "vision_model.embeddings.class_embedding"
            assert torch.equal(again["vision.class_embed"], tensors[place])
            assert torch.equal(again["logit_scale"], marked)
    assert not Path("/tmp/miniclip-proof").exists()
    torch.save(tensors | {"epoch": 3, "args": beside["args"]}, tmp_path / "flat.pt")
    assert CLIP.from_pretrained(tmp_path / "flat.pt").config == TINY


def test_an_error_names_the_two_state_dicts_of_a_file(tmp_path):
    tiny_clip().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    said = "more than one state dict: 'model', 'ema.shadow'.*save one of them in a separate file"
    torch.save({"model": tensors, "ema": {"shadow": other}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=said):
        CLIP.from_pretrained(tmp_path / "x.pt")
    both = {f"{name}.{key}": t for name in ("model", "teacher") for key, t in tensors.items()}
    torch.save({"state_dict": both}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"more than one model.*model\.\*, teacher\.\*"):
        CLIP.from_pretrained(tmp_path / "x.pt")
    torch.save({"model": tensors, "state_dict": tensors}, tmp_path / "x.pt")
    assert CLIP.from_pretrained(tmp_path / "x.pt").config == TINY


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.",
    "_fsdp_wrapped_module._forward_module.", "clip_model.module.", "cond_stage_model.transformer.",
])  # fmt: skip
def test_load_removes_prefixes_that_module_wrappers_add_to_tensor_names(tmp_path, layout, prefix):
    vision = replace(TINY.vision, act="quick_gelu", width=64, heads=1, ln_eps=1e-5)
    text = replace(TINY.text, width=64, heads=1)
    model = CLIP(replace(TINY, vision=vision, text=text))
    model.save_pretrained(tmp_path, layout=layout)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    again = CLIP.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    inside = {  # FSDP and activation checkpointing wrap blocks; users also compile single blocks
        name.replace("layers.1.", "layers._fsdp_wrapped_module.1._checkpoint_wrapped_module.")
        .replace("resblocks.0.", "resblocks.0._orig_mod."): tensor
        for name, tensor in tensors.items()
    }  # fmt: skip
    save_file(inside, path)
    again = CLIP.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


@pytest.mark.filterwarnings("ignore:.*read as OpenAI's")
@pytest.mark.parametrize("prefix", ["", "extractor.model."])
@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_tower_is_loaded_with_any_prefix_in_the_tensor_names(tmp_path, layout, tower, prefix):
    """Users save `model.visual.state_dict()`, or a module that contains the tower."""
    vision = replace(TINY.vision, act="quick_gelu", width=64, heads=1, ln_eps=1e-5)
    text = replace(TINY.text, width=64, heads=1, eos_token_id=2)
    model = CLIP(replace(TINY, vision=vision, text=text))
    other = {"vision": "text.", "text": "vision."}[tower]
    state = {n: t for n, t in model.state_dict().items() if not n.startswith((other, "logit"))}
    tensors = pack(state, LAYOUTS[layout])
    bare = {"vision_model.", "text_model.", "visual."}
    names = {name: next((name[len(p):] for p in bare if name.startswith(p)), name)
             for name in tensors}  # fmt: skip
    torch.save({prefix + names[name]: t for name, t in tensors.items()}, tmp_path / "half.pt")
    kind = {"vision": VisionTower, "text": TextTower}[tower]
    read = kind.from_pretrained(tmp_path / "half.pt", config=model.config)
    ours = getattr(model, tower).state_dict()
    assert read.state_dict().keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in read.state_dict().items())
    assert type(load(tmp_path / "half.pt", config=model.config).model) is kind


# ---------------------------------------------------------------------- Long-CLIP, one tower, timm


@torch.no_grad()
def test_loading_a_long_clip_file_merges_its_two_position_embeddings(tmp_path):
    """Long-CLIP's positions are positional_embedding * mask1 + positional_embedding_res * mask2."""
    vision = VisionConfig(64, 2, 1, 256, image_size=32, patch_size=16)
    config = CLIPConfig(vision, TextConfig(64, 2, 1, 256, context_length=248), 32)
    model = CLIP(config)
    randomize(model)
    tensors = pack(model.state_dict(), LAYOUTS["openai"])
    whole = tensors["positional_embedding"]
    first, rest = torch.randn(2, *whole.shape)
    mask = (torch.arange(248) < 20)[:, None].float()
    tensors |= {"positional_embedding": first, "positional_embedding_res": rest}
    torch.save(tensors, tmp_path / "longclip-B.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning, because Long-CLIP's files are known
        long = CLIP.from_pretrained(tmp_path / "longclip-B.pt")
    assert long.config.text.context_length == 248
    assert torch.equal(long.text.pos_embed, first * mask + rest * (1 - mask))
    long.save_pretrained(tmp_path / "saved")
    assert torch.equal(CLIP.from_pretrained(tmp_path / "saved").text.pos_embed, long.text.pos_embed)
    torch.save(tensors | {"positional_embedding_res": rest[:77]}, tmp_path / "longclip-B.pt")
    with pytest.raises(CheckpointError, match=r"embedding_res must have the shape \(77, 64\)"):
        CLIP.from_pretrained(tmp_path / "longclip-B.pt")


@torch.no_grad()
def test_the_vision_tower_of_a_transformers_image_classifier_is_loaded(tmp_path):
    ours, theirs = twins(TINY)
    config = theirs.config
    config.num_labels = 3
    peer = transformers.CLIPForImageClassification(config)
    peer.vision_model.load_state_dict(theirs.vision_model.state_dict())
    peer.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 40, 40)
    expected = theirs.vision_model(pixels).pooler_output
    with pytest.warns(UserWarning, match="classifier.bias, classifier.weight .*left out"):
        tower = VisionTower.from_pretrained(tmp_path)
    assert torch.equal(tower(pixels), expected)
    with pytest.raises(CheckpointError, match="load it with VisionTower.from_pretrained"):
        CLIP.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"  # next, the classifier is removed
    save_file({n: t for n, t in load_file(path).items() if "classifier" not in n}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(VisionTower.from_pretrained(tmp_path)(pixels), expected)
    with pytest.raises(CheckpointError, match="has no text tower, only a vision tower"):
        TextTower.from_pretrained(tmp_path)


TIMM = {  # timm, vision_transformer.py, _convert_openai_clip
    "conv1": "patch_embed.proj", "positional_embedding": "pos_embed",
    "transformer.resblocks.": "blocks.", "ln_pre": "norm_pre", "ln_post": "norm", "ln_": "norm",
    "in_proj_": "qkv.", "out_proj": "proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "class_embedding": "cls_token",
}  # fmt: skip


def timm_tensors(model: CLIP) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in pack(model.state_dict(), LAYOUTS["openai"]).items():
        if name.startswith("visual."):
            name = name.removeprefix("visual.")
            for theirs, timms in TIMM.items():
                name = name.replace(theirs, timms)
            if name == "proj":
                name, tensor = "head.weight", tensor.T.contiguous()
                tensors["head.bias"] = torch.zeros(len(tensor))
            dimensions = {"cls_token": (1, 1), "pos_embed": (1,)}.get(name, ())
            tensors[name] = tensor.view(*dimensions, *tensor.shape)
    return tensors


@pytest.fixture
def xsmall():
    """A CLIP in the shape of timm's vit_xsmall_patch16_clip_224, with a small text tower."""
    vision = VisionConfig(256, 10, 4, 1024, "gelu", 1e-5, 224, 16)
    model = CLIP(CLIPConfig(vision, TextConfig(64, 1, 1, 256, "gelu", vocab_size=600,
        context_length=20, bos_token_id=598, eos_token_id=2), 32))  # fmt: skip
    randomize(model)
    return model


def test_a_timm_vision_tower_is_loaded(tmp_path, xsmall):
    settings = {"architecture": "vit_xsmall_patch16_clip_224", "num_classes": 32}
    write(tmp_path / "config.json", settings | {"pretrained_cfg": {"tag": "tinyclip_yfcc15m"}})
    tensors = timm_tensors(xsmall)
    save_file(tensors, tmp_path / "model.safetensors")
    tower = VisionTower.from_pretrained(tmp_path)
    assert tower.config == xsmall.config.vision
    assert all(map(torch.equal, tower.parameters(), xsmall.vision.parameters()))
    save_file(tensors | {"head.bias": torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: visual.trunk.head.bias \(32,\)"):
        VisionTower.from_pretrained(tmp_path)
    for change, said in (
        ({"architecture": "vit_base_patch16_224"}, "architecture is 'vit_base_patch16_224'; exp"),
        ({"global_pool": "avg"}, "architecture is"),
        ({"pretrained_cfg": {"tag": "openai"}}, "trained with QuickGELU. Choose a config"),
    ):
        write(tmp_path / "config.json", settings | change)
        with pytest.raises(CheckpointError, match=said):
            VisionTower.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, act",  # timm, vision_transformer.py: "natively QuickGELU", or no such note
    [
        ("vit_base_patch32_clip_224.openai", "quick"),
        ("vit_base_patch32_clip_quickgelu_224.openai", "quick_gelu"),
        ("vit_base_patch16_clip_224.openai_ft_in1k", "gelu"),
        ("vit_base_patch32_clip_224.laion400m_e31", "quick"),
        ("vit_base_patch32_clip_224.laion400m_e32", "quick"),
        ("vit_base_patch16_clip_224.laion400m_e32", "gelu"),
        ("vit_base_patch16_clip_224.dfn2b", "gelu"),
        ("vit_large_patch14_clip_224.dfn2b", "quick"),
        ("vit_large_patch14_clip_224.dfn2b_s39b", "gelu"),
        ("vit_huge_patch14_clip_378.dfn5b", "quick"),
        ("vit_huge_patch14_clip_224.metaclip_altogether", "gelu"),
        ("vit_huge_patch14_clip_224.metaclip2_worldwide", "quick"),
        ("vit_huge_patch14_clip_378.metaclip2_worldwide", "gelu"),
        ("vit_gigantic_patch14_clip_224.metaclip_2pt5b", "quick"),
        ("vit_gigantic_patch14_clip_224.metaclip2_worldwide", "gelu"),
    ],
)
def test_timm_weights_whose_activation_contradicts_the_architecture_are_an_error(name, act):
    architecture, tag = name.split(".")
    for architecture in (architecture, name):  # timm may write the tag twice
        settings = {"architecture": architecture, "pretrained_cfg": {"tag": tag}}
        if act == "quick":
            with pytest.raises(ValueError, match="which has GELU, but .* trained with QuickGELU"):
                fields_of_timm(settings)
        else:
            assert fields_of_timm(settings)["vision"]["act"] == act


@pytest.mark.parametrize("outside", [False, True], ids=["head in the trunk", "head outside"])
def test_a_timm_vision_tower_in_an_open_clip_file_is_loaded(tmp_path, xsmall, outside):
    """The file is like open_clip's MobileCLIP2-L-14, but with a causal mask."""
    xsmall.save_pretrained(tmp_path, layout="open_clip")
    path, weights = tmp_path / "open_clip_config.json", tmp_path / "open_clip_model.safetensors"
    text = {n: t for n, t in load_file(weights).items() if not n.startswith("visual.")}
    tensors = {f"text.{name}" if name != "logit_scale" else name: t for name, t in text.items()}
    tensors |= {f"visual.trunk.{name}": tensor for name, tensor in timm_tensors(xsmall).items()}
    if outside:
        tensors["visual.head.proj.weight"] = tensors.pop("visual.trunk.head.weight")
        del tensors["visual.trunk.head.bias"]
    save_file(tensors, weights)
    settings = json.loads(path.read_text())
    settings["model_cfg"]["vision_cfg"] = vision = {
        "timm_model_name": "vit_xsmall_patch16_clip_224", "timm_model_pretrained": False,
        "timm_pool": "token", "timm_proj": None, "timm_drop": 0.0, "timm_drop_path": 0.1,
        "image_size": 224,
    }  # fmt: skip
    settings["model_cfg"]["custom_text"] = True
    settings["model_cfg"]["text_cfg"]["no_causal_mask"] = False
    write(path, settings)
    again = CLIP.from_pretrained(tmp_path)
    assert again.config == xsmall.config
    assert all(map(torch.equal, again.parameters(), xsmall.parameters()))
    for section, change, said in (
        ("text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask is True, which miniclip"),
        ("vision_cfg", {"timm_model_name": "vit_base_mci_224"}, "timm_model_name is 'vit_base_mci"),
        ("vision_cfg", {"timm_pool": "avg"}, "vision_cfg.timm_pool is 'avg', which"),
    ):
        changed = json.loads(json.dumps(settings))
        changed["model_cfg"][section] |= change
        write(path, changed)
        with pytest.raises(CheckpointError, match=said):
            CLIP.from_pretrained(tmp_path)
    assert vision["timm_pool"] == "token"


# --------------------------------------------------------------------------------- quantised models


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_saving_or_decomposing_a_quantised_model_is_an_error(tmp_path):
    model = tiny_clip()
    linear = {torch.nn.Linear}
    quantised = torch.ao.quantization.quantize_dynamic(model, linear, dtype=torch.qint8)
    pixels = torch.randn(2, 3, 40, 40)
    assert quantised.encode_image(pixels).shape == (2, 36)
    said = r"q_proj is torch.ao\S+.Linear, expected Linear.*Quantise only after the save"
    with pytest.raises(CheckpointError, match=said):
        quantised.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="quantised"):
        decompose(quantised, pixels)


# -------------------------------------- ten more issues, each repeated as its author described it

OPENAI_LIKE = replace(
    TINY,
    vision=replace(TINY.vision, act="quick_gelu", width=64, heads=1, ln_eps=1e-5),
    text=replace(TINY.text, act="quick_gelu", width=64, heads=1, ln_eps=1e-5, eos_token_id=2),
)


def randomized(config):
    model = CLIP(config).eval()
    randomize(model)
    return model


def assert_same(found, expected):
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


class ResidualAttentionBlock(torch.nn.Module):
    """A block as in openai/CLIP's model.py. The mask is an attribute, not a buffer."""

    def __init__(self, width):
        super().__init__()
        self.ln_1, self.attn_mask = torch.nn.LayerNorm(width), torch.full((9, 9), -torch.inf)


@pytest.mark.filterwarnings("ignore:.*read as OpenAI's")
def test_issue_205_of_openai_clip_a_pickled_module_is_loaded(tmp_path):
    model = randomized(OPENAI_LIKE)
    whole = torch.nn.Module()
    for name, tensor in pack(model.state_dict(), LAYOUTS["openai"]).items():
        *parents, last = name.split(".")
        module = whole
        for part in parents:
            if part not in module._modules:
                is_block = part.isdecimal()
                made = ResidualAttentionBlock(64) if is_block else torch.nn.Module()
                module.add_module(part, made)
            module = module._modules[part]
        module.register_parameter(last, torch.nn.Parameter(tensor))
    torch.save(whole, tmp_path / "whole.pt")
    torch.save({"epoch": 3, "model": whole}, tmp_path / "training.pt")
    for name in ("whole.pt", "training.pt"):
        assert_same(CLIP.from_pretrained(tmp_path / name, config=OPENAI_LIKE), model)


@pytest.mark.parametrize("tower", ["vision", "text", ""])
def test_issue_205_of_openai_clip_a_state_dict_or_a_module_of_miniclip_is_loaded(tmp_path, tower):
    model = tiny_clip()
    part = getattr(model, tower) if tower else model
    kind = {"vision": VisionTower, "text": TextTower, "": CLIP}[tower]
    torch.save(part.state_dict(), tmp_path / "state.pt")
    torch.save({"net": part}, tmp_path / "whole.pt")
    for name in ("state.pt", "whole.pt"):
        assert_same(kind.from_pretrained(tmp_path / name, config=TINY), part)
        with pytest.raises(CheckpointError, match="no published model.*pass config="):
            kind.from_pretrained(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*read as OpenAI's")
def test_issue_284_of_openai_clip_a_lightning_module_with_a_head_is_loaded(tmp_path):
    model = randomized(OPENAI_LIKE)
    state = {f"clipmodel.{n}": t for n, t in pack(model.state_dict(), LAYOUTS["openai"]).items()}
    head = torch.nn.Linear(36, 3).state_dict(prefix="ff_head.")
    saved = {"epoch": 1, "state_dict": state | head, "hyper_parameters": {"lr": 1e-8}}
    torch.save(saved, tmp_path / "last.ckpt")
    said = r"ff_head.weight, ff_head.bias are left out: only clipmodel.\* belongs to the model"
    with pytest.warns(UserWarning, match=said):
        assert_same(CLIP.from_pretrained(tmp_path / "last.ckpt", config=OPENAI_LIKE), model)
    saved["hyper_parameters"]["model"] = model  # as save_hyperparameters() does
    torch.save(saved, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="'state_dict', 'hyper_parameters.model'. Read"):
        CLIP.from_pretrained(tmp_path / "last.ckpt")


def test_issue_478_of_openai_clip_the_weights_of_another_architecture_are_an_error(tmp_path):
    torch.save({"encoder.blocks.0.norm1.weight": torch.ones(3)}, tmp_path / "parseq.pt")
    said = "not a CLIP's: encoder.blocks.0.norm1.weight. Expected names such as vision_mod"
    for config in (None, TINY):
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path / "parseq.pt", config=config)


@torch.no_grad()
def test_issue_24650_of_transformers_a_token_added_after_the_end_token_gives_a_warning(tmp_path):
    tokenizer = Tokenizer.train(["a photo of a cat"], 520)
    text = replace(TINY.text, vocab_size=520, bos_token_id=518, eos_token_id=2)
    model = randomized(replace(TINY, text=text))
    save(tmp_path, model, tokenizer, ImageTransform(40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path)
    theirs = transformers.CLIPModel.from_pretrained(tmp_path)
    words = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    words.add_tokens("<cat-toy>")
    theirs.text_model.resize_token_embeddings(521)
    theirs.config.text_config.vocab_size = 521
    for part in (theirs, words):
        part.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Set eos_token_id to 519 to pool every text at its end"):
        legacy, tokenizer, _ = load(tmp_path)
    ids = tokenizer(["a <cat-toy> cat"])
    assert 520 in ids
    assert torch.equal(legacy.encode_text(ids), theirs.get_text_features(ids).pooler_output)
    config = replace(legacy.config, text=replace(legacy.config.text, eos_token_id=519))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended = load(tmp_path, config=config).model
    theirs.text_model.eos_token_id = 519
    assert torch.equal(mended.encode_text(ids), theirs.get_text_features(ids).pooler_output)
    assert not torch.allclose(mended.encode_text(ids), legacy.encode_text(ids))
    row = legacy.text.token_embed.weight[520:]
    ours = add_tokens(model, row)  # add_tokens itself sets the end token
    aligned = copy.deepcopy(mended)  # MKL may round memory-mapped weights differently on some CPUs
    assert torch.equal(ours.encode_text(ids), aligned.encode_text(ids))


def test_issue_21638_of_transformers_images_one_or_three_pixels_wide_have_the_right_axes():
    processor = transformers.CLIPImageProcessorPil(size=32, crop_size=32)
    transform = ImageTransform(32)
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (9, 3), (3, 9), (1, 50), (3, 3)):
        pixels = rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
        expected = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(transform(Image.fromarray(pixels)), expected)
        assert torch.equal(transform(pixels), expected)  # axes: rows, columns, channels
        assert torch.equal(transform(torch.from_numpy(pixels).permute(2, 0, 1)), expected)


def test_issue_8435_of_diffusers_the_text_encoder_in_a_stable_diffusion_file_is_loaded(tmp_path):
    model = tiny_clip()
    inside = "cond_stage_model.transformer."
    text = {n: t for n, t in model.state_dict().items() if n.startswith("text.")}
    del text["text.proj.weight"]
    tensors = {inside + n: t for n, t in pack(text, LAYOUTS["transformers"]).items()}
    tensors[f"{inside}text_model.embeddings.position_ids"] = torch.arange(20)[None]
    tensors |= {"model.diffusion_model.out.0.weight": torch.ones(3), "betas": torch.ones(9)}
    save_file(tensors, tmp_path / "sd.safetensors")
    with pytest.warns(UserWarning, match=r"^betas, model.*left out: only cond.*transformer.\*"):
        tower = TextTower.from_pretrained(tmp_path / "sd.safetensors", config=TINY)
    assert_same(tower.blocks, model.text.blocks)
    assert isinstance(tower.proj, torch.nn.Identity)
    second = {f"conditioner.embedders.1.{n}": t.clone() for n, t in tensors.items()}
    save_file(tensors | second, tmp_path / "sdxl.safetensors")
    with pytest.raises(CheckpointError, match="more than one model, under the names cond_stage_mo"):
        TextTower.from_pretrained(tmp_path / "sdxl.safetensors", config=TINY)


def test_issue_2200_of_peft_every_adapter_of_an_output_projection_gets_a_gradient():
    peft = pytest.importorskip("peft", reason="peft cannot be imported", exc_type=ImportError)
    adapted = peft.get_peft_model(tiny_clip(), peft.LoraConfig(target_modules=["out_proj"], r=2))
    adapted(torch.ones(1, 3, 40, 40), torch.tensor([[5, 599]])).logits_per_image.sum().backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if "lora_B" in n}
    assert len(grads) == TINY.vision.layers + TINY.text.layers
    assert all(grad.abs().sum() > 0 for grad in grads.values())


def test_issue_956_of_captum_the_tokens_of_a_text_get_attributions():
    captum = pytest.importorskip("captum.attr", reason="captum cannot be imported")
    model = tiny_clip().double()
    pixels = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    ids = torch.tensor([[598, 5, 7, 599], [598, 9, 599, 599]])

    def score(ids, pixels):
        return model(pixels, ids).logits_per_image.diagonal()

    method = captum.LayerIntegratedGradients(score, model.text.token_embed)
    blank = ids.where(ids >= 598, 0)  # 0 replaces all tokens except the start and end tokens
    found, missed = method.attribute(
        ids, blank, additional_forward_args=(pixels,), n_steps=200, return_convergence_delta=True
    )
    assert found.shape == (2, 4, TINY.text.width) and found[:, 1].abs().max() > 0.1
    assert missed.abs().max() < 1e-3 and found[:, 0].abs().max() == 0
    with pytest.raises(ValueError, match="row 0 of ids has no end token"):
        method.attribute(ids, additional_forward_args=(pixels,))


@pytest.mark.parametrize("name", [" shapes", "openai/clip-vit-base-patch32 "])
def test_issue_11017_of_immich_an_error_reports_a_space_around_a_model_name(name):
    with pytest.raises(CheckpointError, match=f"called '{name}'.*remove the space around the name"):
        load(name, local_files_only=True)


def test_issue_352_of_clip_retrieval_a_text_file_beside_an_image_is_its_caption(tmp_path):
    """img2dataset writes a text file beside each image. The numbered folders are not classes."""
    for i in range(4):
        folder = tmp_path / f"0000{i // 2}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (40 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.json").write_text("{}")
        if i:
            (folder / f"{i}.txt").write_text(f"picture {i}\n", "utf-8-sig")
    data = open_data(tmp_path, ImageTransform(8))
    assert sorted(data.captions()) == ["picture 1", "picture 2", "picture 3"]
    for i in range(3):
        pair = data[i, 0]
        assert pair.caption == f"picture {round(pair.pixels[0].max().item() / 40)}"
    assert data.skipped == [f"{tmp_path}: images without a .txt with a caption in UTF-8: 1"]
    for path in tmp_path.rglob("*.txt"):
        text = path.read_text("utf-8-sig")
        path.write_text("0 0.48 0.63 0.69 0.71\n")  # YOLO's labels for detection
    with pytest.raises(ValueError, match="contains a word; expected captions.*0 0.48"):
        open_data(tmp_path, ImageTransform(8))
    path.write_text(text)
    assert sorted(open_data(tmp_path, ImageTransform(8)).captions()) == [text.strip()]
    for path in tmp_path.rglob("*.txt"):
        path.rename(path.with_name("readme.txt"))
    assert len(open_data(tmp_path, ImageTransform(8)).entries) == 10  # the folders are classes now
