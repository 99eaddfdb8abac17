"""Configs: wrong values raise errors, and miniclip reads config.json as transformers does."""

import dataclasses
import json
import math
import re
from copy import deepcopy

import pytest
import transformers
from twin import TINY, transformers_config

from miniclip import CheckpointError, CLIPConfig, TextConfig, VisionConfig
from miniclip.config import LEGACY_EOS
from miniclip.errors import shown
from miniclip.files.open_clip import from_open_clip
from miniclip.files.reading import read_json
from miniclip.published import PUBLISHED

TOWER_FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "act": "hidden_act",
    "ln_eps": "layer_norm_eps",
}
VISION_FIELDS = {"image_size": "image_size", "patch_size": "patch_size", "channels": "num_channels"}
TEXT_FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}


def assert_same_meaning(ours: CLIPConfig, theirs: transformers.CLIPConfig) -> None:
    assert ours.embed_dim == theirs.projection_dim
    assert ours.logit_scale_init == theirs.logit_scale_init_value
    for name, peer in (TOWER_FIELDS | VISION_FIELDS).items():
        assert getattr(ours.vision, name) == getattr(theirs.vision_config, peer), name
    for name, peer in (TOWER_FIELDS | TEXT_FIELDS).items():
        assert getattr(ours.text, name) == getattr(theirs.text_config, peer), name


# All numbers differ, so that a test notices when two fields are swapped.
DISTINCT = CLIPConfig(
    vision=VisionConfig(96, 5, 6, 200, "gelu", 1e-6, 60, 12, 4),
    text=TextConfig(80, 3, 2, 300, "gelu_pytorch_tanh", 3e-5, 1000, 50, 7, 11),
    embed_dim=44,
    logit_scale_init=1.5,
)


# -------------------------------------------------------------------- the same as in transformers


def test_all_numbers_of_the_test_config_are_different():
    values = [v for tower in (DISTINCT.vision, DISTINCT.text) for v in vars(tower).values()]
    numbers = [v for v in values if v is not None and v is not False]
    numbers += [DISTINCT.embed_dim, DISTINCT.logit_scale_init]
    assert len(set(numbers)) == len(numbers)
    vision, text = {*TOWER_FIELDS, *VISION_FIELDS}, {*TOWER_FIELDS, *TEXT_FIELDS}
    beyond = {"head_width", "registers"}  # fields that transformers' CLIP does not have
    assert {f.name for f in dataclasses.fields(VisionConfig)} == vision | beyond
    beyond = {"head_width", "literal_eos"}  # transformers uses model_type instead of literal_eos
    assert {f.name for f in dataclasses.fields(TextConfig)} == text | beyond


@pytest.mark.parametrize("config", [CLIPConfig(), TINY, DISTINCT], ids=["B/32", "tiny", "distinct"])
def test_transformers_reads_a_config_written_by_miniclip(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.CLIPConfig
    assert_same_meaning(config, theirs)
    assert theirs.text_config.projection_dim == config.embed_dim
    assert theirs.vision_config.projection_dim == config.embed_dim


@pytest.mark.parametrize("config", [CLIPConfig(), TINY, DISTINCT], ids=["B/32", "tiny", "distinct"])
def test_miniclip_reads_a_config_written_by_transformers(config, tmp_path):
    theirs = transformers_config(config)
    assert_same_meaning(config, theirs)
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert CLIPConfig.from_dict(written) == config
    assert CLIPConfig.from_dict(theirs.to_dict()) == config


@pytest.mark.parametrize("config", [CLIPConfig(), TINY, DISTINCT], ids=["B/32", "tiny", "distinct"])
def test_from_dict_restores_the_config_from_the_output_of_to_dict(config):
    assert CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("section, field", [
    *(("vision_config", name) for name in (TOWER_FIELDS | VISION_FIELDS).values()),
    *(("text_config", name) for name in (TOWER_FIELDS | TEXT_FIELDS).values()),
    (None, "projection_dim"),
    (None, "logit_scale_init_value"),
])  # fmt: skip
def test_an_absent_field_has_the_default_of_transformers(section, field):
    config = CLIPConfig(logit_scale_init=1.5, embed_dim=44).to_dict()
    del (config[section] if section else config)[field]
    assert_same_meaning(CLIPConfig.from_dict(config), transformers.CLIPConfig.from_dict(config))


@pytest.mark.parametrize("config", [
    {"model_type": "clip", "text_config": {}, "vision_config": {}},
    {"text_config": {}, "vision_config": {}},
    {"model_type": "clip", "vision_config": {"patch_size": 16}},
    {"vision_config_dict": {"patch_size": 16}, "text_config_dict": None},
], ids=["empty sections", "no model_type", "no text section", "only the old section"])  # fmt: skip
def test_miniclip_reads_incomplete_configs_as_transformers_does(config):
    # a copy, because transformers changes the dictionary it is given
    copy = json.loads(json.dumps(config))
    assert_same_meaning(CLIPConfig.from_dict(config), transformers.CLIPConfig.from_dict(copy))


@pytest.mark.parametrize("tower, default", [("text", 512), ("vision", 768)])
def test_an_old_style_section_with_its_defaults_replaces_the_new_section(tower, default):
    config = CLIPConfig().to_dict()
    config[f"{tower}_config"] |= {"hidden_size": 96, "num_hidden_layers": 3}
    config[f"{tower}_config_dict"] = {"num_hidden_layers": 5}
    ours = CLIPConfig.from_dict(config)
    assert getattr(ours, tower).layers == 5
    assert getattr(ours, tower).width == default  # the width 96 in the new section is ignored
    assert_same_meaning(ours, transformers.CLIPConfig.from_dict(config))


def test_projection_dim_inside_a_tower_section_is_ignored():
    config = CLIPConfig(embed_dim=768).to_dict()
    config["text_config"]["projection_dim"] = config["vision_config"]["projection_dim"] = 512
    assert CLIPConfig.from_dict(config).embed_dim == 768


def test_fields_that_the_model_does_not_need_are_ignored():
    config = CLIPConfig().to_dict() | {"torch_dtype": "float16", "initializer_factor": 2.0}
    config["text_config"] |= {"pad_token_id": 1, "attention_dropout": 0.0, "id2label": {}}
    assert CLIPConfig.from_dict(config) == CLIPConfig()


def test_the_published_config_of_the_safety_checker_describes_a_clip_l14(data):
    config = json.loads((data / "configs/sd15_safety_checker_config.json").read_text())
    ours = CLIPConfig.from_dict(config)
    assert (ours.vision.width, ours.vision.layers, ours.vision.heads) == (1024, 24, 16)
    assert (ours.vision.patch_size, ours.vision.patches, ours.embed_dim) == (14, 256, 768)
    assert (ours.text.width, ours.text.layers, ours.text.heads) == (768, 12, 12)
    assert_same_meaning(ours, transformers.CLIPConfig.from_dict(deepcopy(config)))
    # text_config_dict replaces text_config, so the end token 2 in text_config is ignored.
    assert config["text_config"]["eos_token_id"] == LEGACY_EOS != ours.text.eos_token_id == 49407


@pytest.mark.parametrize("name", [
    "ipadapter_h14_image_encoder_config.json",
    "sd15_text_encoder_config.json",
    "sd21_text_encoder_config.json",
])  # fmt: skip
def test_a_published_config_of_one_tower_is_an_error_for_clip_config(data, name):
    config = json.loads((data / "configs" / name).read_text())
    with pytest.raises(ValueError, match=f"model_type is '{config['model_type']}'"):
        CLIPConfig.from_dict(config)


# --------------------------------------------------------------------------------------- validation

POSITIVE_INTS = [
    *((VisionConfig, n) for n in ("width", "layers", "heads", "mlp_width")),
    *((VisionConfig, n) for n in ("image_size", "patch_size", "channels")),
    *((TextConfig, n) for n in ("width", "layers", "heads", "mlp_width")),
    *((TextConfig, n) for n in ("vocab_size", "context_length")),
    (CLIPConfig, "embed_dim"),
]


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    "value", [0, -1, 2**31, 10**30, 1.5, 64.0, "64", None, True, [64], math.nan]
)
@pytest.mark.parametrize("cls, field", POSITIVE_INTS)
def test_sizes_must_be_positive_whole_numbers(cls, field, value):
    message = f"{cls.__name__}: {field} is {value!r}; expected a positive whole number"
    with pytest.raises(ValueError, match=re.escape(message)):
        cls(**{field: value})


@pytest.mark.parametrize("cls, field", [(TextConfig, "bos_token_id"), (TextConfig, "eos_token_id")])
@pytest.mark.parametrize("value", [-1, 49408, 2.0, None, True, [49407]])
def test_special_tokens_must_be_in_the_vocabulary(cls, field, value):
    message = f"{field} is {value!r}; expected an id from 0 to 49407, because vocab_size is 49408"
    with pytest.raises(ValueError, match=re.escape(message)):
        cls(**{field: value})


@pytest.mark.parametrize("make, message", [
    (lambda: VisionConfig(width=100), "width 100 does not divide into 12 heads of equal width"),
    (lambda: TextConfig(heads=7), "width 512 does not divide into 7 heads of equal width"),
    (lambda: VisionConfig(image_size=31), "patch_size 32 is larger than image_size 31"),
    (lambda: VisionConfig(act="relu"), "VisionConfig: act is 'relu'; expected one of quick_gelu"),
    (lambda: TextConfig(act=None), "TextConfig: act is None; expected one of quick_gelu"),
    (lambda: TextConfig(act=["gelu"]), "TextConfig: act is ['gelu']; expected one of"),
    (lambda: CLIPConfig(vision=TextConfig()), "vision must be a VisionConfig, not TextConfig"),
    (lambda: CLIPConfig(text={}), "text must be a TextConfig, not dict"),
])  # fmt: skip
def test_the_error_names_inconsistent_or_invalid_values(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("make, message", [
    (lambda: VisionConfig(layers=1001), "VisionConfig: layers is 1001; expected at most 1,000"),
    (lambda: TextConfig(layers=1001), "TextConfig: layers is 1001; expected at most 1,000"),
    (lambda: VisionConfig(registers=-1), "VisionConfig: registers is -1; expected a whole"),
    (lambda: VisionConfig(registers=True), "registers is True; expected a whole number, 0 or more"),
    (lambda: VisionConfig(image_size=(64, 7), patch_size=8), "patch_size 8 is larger than"),
    (lambda: VisionConfig(image_size=(64, 64, 64)), "one for the height and one for the width"),
    (lambda: VisionConfig(image_size=(0, 64)), "image_size is (0, 64); expected one positive"),
    (lambda: VisionConfig(layers=2, heads=(1, 2, 3), head_width=8), "or 2 of them, one for each"),
    (lambda: VisionConfig(layers=2, heads=(-1, 2), head_width=8), "heads is (-1, 2); expected one"),
    (lambda: TextConfig(layers=2, heads=(4, 8)), "different numbers of heads need a head_width"),
    (lambda: TextConfig(head_width=0), "head_width is 0; expected a positive whole number"),
])  # fmt: skip
def test_the_error_names_numbers_beyond_their_limits(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_numbers_at_their_limits_are_accepted():
    assert VisionConfig(layers=1000).layers == 1000
    assert VisionConfig(image_size=32).patches == 1
    assert CLIPConfig(embed_dim=2**31 - 1).embed_dim == 2**31 - 1
    assert TextConfig(vocab_size=9, bos_token_id=0, eos_token_id=8).eos_token_id == 8
    lost = VisionConfig(layers=2, heads=(0, 3), mlp_width=(0, 5), head_width=8)
    assert (lost.heads, lost.mlp_width) == ((0, 3), (0, 5))


def test_a_number_that_all_layers_share_is_stored_once():
    """A tower of transformers has one number of heads and one MLP width. It cannot read a list."""
    each = VisionConfig(layers=2, heads=(12, 12), mlp_width=(9, 9), image_size=(64, 64))
    assert each == VisionConfig(layers=2, heads=12, mlp_width=9, image_size=64)
    assert TextConfig(head_width=64) == TextConfig() != TextConfig(head_width=32)


@pytest.mark.parametrize("change", [
    {"vision": VisionConfig(registers=4)},
    {"vision": VisionConfig(image_size=(224, 336))},
    {"vision": VisionConfig(head_width=32)},
    {"text": TextConfig(head_width=32)},
    {"text": TextConfig(layers=2, heads=(3, 5), head_width=64)},
    {"text": TextConfig(layers=2, mlp_width=(3, 5))},
], ids=["registers", "oblong", "vision heads", "text heads", "lost heads", "lost MLP"])  # fmt: skip
def test_transformers_raises_an_error_for_a_config_that_it_cannot_express(change):
    config = CLIPConfig(**change)
    written = json.loads(json.dumps(config.to_dict()))
    assert CLIPConfig.from_dict(written) == config
    with pytest.raises(Exception):
        transformers.CLIPModel(transformers.CLIPConfig.from_dict(written))


def test_config_fields_that_clip_does_not_have_are_named_as_in_other_models_of_transformers():
    vision = VisionConfig(registers=3, head_width=16)
    written = CLIPConfig(vision=vision).to_dict()["vision_config"]
    theirs = transformers.Dinov2WithRegistersConfig(num_register_tokens=3).to_dict()
    theirs |= transformers.LlamaConfig(head_dim=16).to_dict()
    for name in ("num_register_tokens", "head_dim"):
        assert written[name] == theirs[name]


BAD_NUMBERS = [math.nan, math.inf, -math.inf, "1e-5", None, True, 10**400]


@pytest.mark.parametrize("cls", [VisionConfig, TextConfig])
@pytest.mark.parametrize("value", [0, 0.0, -1e-5, *BAD_NUMBERS], ids=lambda v: str(v)[:9])
def test_ln_eps_must_be_above_zero(cls, value):
    with pytest.raises(ValueError, match="ln_eps is .*; expected a number above 0"):
        cls(ln_eps=value)


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=lambda v: str(v)[:9])
def test_logit_scale_init_must_be_finite(value):
    with pytest.raises(ValueError, match="logit_scale_init is .*; expected a finite number"):
        CLIPConfig(logit_scale_init=value)


@pytest.mark.parametrize("config, message", [
    ([], "expected a JSON object, found list"),
    (None, "expected a JSON object, found NoneType"),
    ({}, "not the config of a CLIP with two towers: no sections (expected 'clip', with"),
    ({"model_type": "siglip", "vision_config": {}}, "model_type is 'siglip' (expected 'clip'"),
    ({"model_type": ["clip"], "vision_config": {}}, "model_type is ['clip'] (expected 'clip'"),
    *(({"model_type": "x", "architectures": odd}, "model_type is 'x' (expected 'clip'")
      for odd in (5, {}, [], [5], "x", ["\n"], None)),
    ({"vision_config": []}, "vision_config must be a JSON object, found list"),
    ({"vision_config": {}, "text_config": 3}, "text_config must be a JSON object, found int"),
    ({"vision_config": {"patch_size": [14, 14]}}, "in vision_config: VisionConfig: patch_size is "),
    ({"vision_config": {"hidden_act": "silu"}}, "in vision_config: VisionConfig: act is 'silu'"),
    ({"vision_config": {}, "text_config": {"eos_token_id": [2]}}, "in text_config: TextConfig: "),
    ({"vision_config": {}, "projection_dim": None}, "CLIPConfig: embed_dim is None"),
])  # fmt: skip
def test_a_config_that_does_not_describe_a_clip_model_is_an_error(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CLIPConfig.from_dict(config)


def test_configs_are_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CLIPConfig().embed_dim = 3
    assert len({CLIPConfig(), CLIPConfig(), TINY}) == 2


@pytest.mark.parametrize("size, patch, patches", [(224, 32, 49), (336, 14, 576), (225, 32, 49)])
def test_a_partial_patch_is_dropped(size, patch, patches):
    assert VisionConfig(image_size=size, patch_size=patch).patches == patches


@pytest.mark.parametrize("size", [(64, 33), (66, 39)])
def test_the_size_of_an_image_that_is_not_square_is_height_then_width(size):
    config = VisionConfig(image_size=size, patch_size=8)
    assert (config.height_width, config.grid, config.patches) == (size, (8, 4), 32)
    with pytest.raises(ValueError, match=re.escape(f"image_size is {size}; an ImageTransform")):
        config.side


# ---------------------------------------------------------------------------------------- the files


def test_a_config_file_of_more_than_a_million_bytes_is_an_error(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}'.ljust(10**6))
    assert read_json(path) == {"a": 1}
    path.write_text('{"a": 1}'.ljust(10**6 + 1))
    with pytest.raises(CheckpointError, match="config.json: .* it has more than 1,000,000 bytes"):
        read_json(path)


def test_a_message_quotes_only_the_start_and_end_of_a_long_value():
    text = shown("a" * 500 + "b" * 500)
    assert len(text) == 100 and text.startswith("'aaa") and text.endswith("bbb'")
    assert shown(10**9) == "1000000000" and shown("short") == "'short'"
    assert len(shown([["x" * 90] * 6] * 6)) == 200


# ----------------------------------------------------------------------------------------- presets


def open_clips(embed_dim, vision, text, quick_gelu=True):
    """`vision` is (image size, layers, width, patch size), and `text` is (width, heads, layers)."""
    return {
        "embed_dim": embed_dim,
        "quick_gelu": quick_gelu,
        "vision_cfg": dict(zip(("image_size", "layers", "width", "patch_size"), vision))
        | dict(zip(("head_width", "mlp_ratio"), vision[4:])),
        "text_cfg": {"context_length": 77, "vocab_size": 49408}
        | dict(zip(("width", "heads", "layers"), text)),
    }


# The configs of github.com/mlfoundations/open_clip and of microsoft/Cream (TinyCLIP). If a
# vision tower has a fifth number, it is the head_width. A sixth number is the mlp_ratio.
AS_PUBLISHED = {
    "B/32": open_clips(512, (224, 12, 768, 32), (512, 8, 12)),
    "B/16": open_clips(512, (224, 12, 768, 16), (512, 8, 12)),
    "L/14": open_clips(768, (224, 24, 1024, 14), (768, 12, 12)),
    "L/14-336": open_clips(768, (336, 24, 1024, 14), (768, 12, 12)),
    "H/14": open_clips(1024, (224, 32, 1280, 14, 80), (1024, 16, 24), False),
    "g/14": open_clips(1024, (224, 40, 1408, 14, 88, 4.3637), (1024, 16, 24), False),
    "bigG/14": open_clips(1280, (224, 48, 1664, 14, 104, 4.9231), (1280, 20, 32), False),
    "TinyCLIP-8M/16": open_clips(512, (224, 10, 256, 16), (256, 4, 3), False),
    "TinyCLIP-39M/16": open_clips(512, (224, 12, 512, 16), (512, 8, 6), False),
    "TinyCLIP-40M/32": open_clips(512, (224, 12, 512, 32), (512, 8, 6), False),
    "TinyCLIP-61M/32": open_clips(512, (224, 12, 640, 32), (512, 8, 9), False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_shapes_of_the_published_configs(name):
    published = CLIPConfig.from_fields(from_open_clip({"model_cfg": AS_PUBLISHED[name]}))
    text = dataclasses.replace(published.text, eos_token_id=49407)  # open_clip states no end token
    assert PUBLISHED[name] == dataclasses.replace(published, text=text)
