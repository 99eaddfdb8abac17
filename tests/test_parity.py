"""The instrument itself: it sees nothing where there is nothing, and names what was planted.

Faults are planted in weights, in configs and in code, in both towers, in copies of one model. Each
is looked for against transformers and against our own.
"""

import copy
import inspect
import json
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from twin import TINY, twins

import miniclip
from miniclip import (
    CLIPConfig,
    ImageTransform,
    TextConfig,
    Tokenizer,
    parity,
    tokenizer,
    transform,
)
from miniclip.cli import main
from miniclip.config import PRESETS
from miniclip.parity import TOLERANCE, Difference, assert_parity, compare, summarize

KINDS = ["resid_pre", "q", "k", "v", "pattern", "attn_out", "mlp_out", "resid_post"]


@pytest.fixture(scope="module")
def pair():
    return twins(TINY)


# --------------------------------------------------------------------------------- nothing to find


def sites(config):
    names = []
    for tower in ("vision", "text"):
        names.append(f"{tower}.embeddings")
        for i in range(getattr(config, tower).layers):
            names += [f"{tower}.blocks.{i}.{kind}" for kind in KINDS]
        names += [f"{tower}.pooled", f"{tower}.projected"]
    return [*names, "logits"]


def test_the_same_model_has_no_difference_at_any_site(pair):
    report = compare(*pair)
    assert [row.site for row in report.rows] == sites(TINY)
    assert report.first is None and report.cause is None
    assert str(report) == "within tolerance at all 47 sites"
    for row in report.rows:
        assert row.absolute == row.relative == 0 and row.within_tolerance, row
        assert row.float64 < (1e-6 if row.site.endswith("pattern") else 1e-12), row
        assert row.model_error == row.other_error
        assert 0 < row.model_error < 1e-3  # so that something was measured
    assert parity.nearer(report.rows) == {"model": 0, "other": 0, "equal": 47}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, pair):
    report = compare(*pair, dtype=dtype)
    assert report.first is None
    largest = max(row.model_error for row in report.rows)
    assert largest < 1e-6 if dtype == torch.float64 else 1e-2 < largest < 1


def test_half_precision_may_not_be_worse_than_the_other(pair):
    faulty = copy.deepcopy(pair[0])
    faulty.text.blocks[1].mlp.register_forward_hook(round_half_to_bfloat16)
    report = compare(faulty, pair[0], dtype=torch.float16)
    assert report.first == "text.blocks.1.mlp_out"
    assert report.cause == "rounding: in float64 the two agree"
    assert parity.nearer(report.rows)["other"] > parity.nearer(report.rows)["model"]


def round_half_to_bfloat16(module, args, out):
    return out.bfloat16().half() if out.dtype == torch.float16 else out


def test_the_twin_that_parity_makes_is_the_one_that_is_written_out_field_by_field(pair):
    ours, theirs = pair
    for other in (parity.transformers_twin(ours), theirs):
        assert all(row.absolute == 0 for row in compare(ours, other).rows)
    assert parity.transformers_twin(ours).config.vision_config.layer_norm_eps == 2e-5


def test_neither_model_is_changed(pair):
    ours, theirs = pair
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in pair]
    ours.train()
    compare(ours, theirs)
    assert ours.training
    ours.eval()
    assert theirs.config._attn_implementation == "sdpa"
    for model, weights in zip(pair, before):
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())


# ----------------------------------------------------------------------------- faults in the models

V, T = "vision.blocks.1", "text.blocks.1"
FAULTS = {}


def fault(site, cause):
    """Registers a function that breaks a CLIP, with what a report should say of it."""

    def register(function):
        FAULTS[function.__name__] = (function, site, cause)
        return function

    return register


def fault_in_weights(name, parameter, change, site, cause):
    def function(model):
        value = model.get_parameter(parameter)
        value.data = change(value.data)

    FAULTS[name] = (function, site, cause)


for tower, block in (("vision", V), ("text", T)):
    for linear, site in {
        "attn.q_proj": "q", "attn.k_proj": "k", "attn.v_proj": "v", "attn.out_proj": "attn_out",
        "mlp.fc1": "mlp_out", "mlp.fc2": "mlp_out",
    }.items():  # fmt: skip
        fault_in_weights(
            f"{tower}_no_bias_in_{linear}", f"{block}.{linear}.bias", torch.zeros_like,
            f"{block}.{site}", f"model has no bias in {linear}",
        )  # fmt: skip
        if site != "mlp_out":
            fault_in_weights(
                f"{tower}_{linear}_transposed", f"{block}.{linear}.weight", torch.t,
                f"{block}.{site}", f"model has {linear}.weight transposed",
            )  # fmt: skip
for tower, norm in (("vision", "ln_post"), ("text", "ln_final")):
    fault_in_weights(
        f"no_bias_in_{norm}", f"{tower}.{norm}.bias", torch.zeros_like,
        f"{tower}.pooled", f"model has no bias in {norm}",
    )  # fmt: skip
fault_in_weights(
    "no_class_token", "vision.class_embed", torch.zeros_like,
    "vision.embeddings", "model has no class token's embedding",
)  # fmt: skip
fault_in_weights(
    "positions_shifted", "text.pos_embed", lambda x: x.roll(1, 0),
    "text.embeddings", "model has positions that are off by one",
)  # fmt: skip
fault_in_weights(
    "no_position_of_the_class_token", "vision.pos_embed", lambda x: torch.cat([0 * x[:1], x[1:]]),
    "vision.embeddings", "model has no position for the first token",
)  # fmt: skip
fault_in_weights(
    "noise_in_a_weight", "text.blocks.0.mlp.fc2.weight", lambda x: x + 1e-3,
    "text.blocks.0.mlp_out",
    "different weights: mlp.fc2.weight (40 of 40 rows, by at most 1.0e-03)",
)  # fmt: skip


@fault("text.blocks.0.mlp_out", "model has the activation gelu for quick_gelu")
def gelu_for_quick_gelu(model):
    for block in model.text.blocks:
        block.mlp.act = nn.GELU()


@fault("vision.blocks.2.mlp_out", "model has the activation relu for quick_gelu")
def relu_in_one_layer(model):
    model.vision.blocks[2].mlp.act = nn.ReLU()


def set_eps(tower, eps):
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


@fault("vision.blocks.0.resid_pre", "model has a LayerNorm eps of 1e-06 for 2e-05")
def vision_eps(model):
    set_eps(model.vision, 1e-6)


@fault("text.blocks.0.q", "model has a LayerNorm eps of 1e-06 for 1e-05")
def text_eps(model):
    set_eps(model.text, 1e-6)


@fault("vision.pooled", "model has a LayerNorm eps of 1e-12 for 2e-05")
def eps_of_ln_post(model):
    model.vision.ln_post.eps = 1e-12


@fault("text.blocks.0.pattern", "model has no causal mask")
def no_causal_mask(model):
    for block in model.text.blocks:
        block.attn.causal = False


@fault("vision.blocks.0.pattern", "model has a causal mask")
def causal_mask_in_vision(model):
    for block in model.vision.blocks:
        block.attn.causal = True


@fault("vision.blocks.1.q", "model has ln_1 and ln_2 swapped")
def layer_norms_swapped(model):
    block = model.vision.blocks[1]
    block.ln_1, block.ln_2 = block.ln_2, block.ln_1


@fault("text.blocks.0.q", "model has attn.q_proj and attn.k_proj swapped")
def queries_and_keys_swapped(model):
    attention = model.text.blocks[0].attn
    attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj


@fault("text.blocks.0.q", "model has the weights of block 1")
def layers_swapped_in_text(model):
    model.text.blocks = nn.Sequential(*reversed(model.text.blocks))


@fault("vision.blocks.1.q", "model has the weights of block 2")
def layers_swapped_in_vision(model):
    blocks = list(model.vision.blocks)
    model.vision.blocks = nn.Sequential(blocks[0], blocks[2], blocks[1])


def round_to(dtype):
    def break_(model):
        model.to(dtype).float()

    return break_


FAULTS["weights_in_float16"] = (
    round_to(torch.float16), "vision.embeddings", "model has weights rounded to float16"
)  # fmt: skip
FAULTS["weights_in_bfloat16"] = (
    round_to(torch.bfloat16), "vision.embeddings", "model has weights rounded to bfloat16"
)  # fmt: skip


@fault("vision.blocks.0.resid_pre", "model has no ln_pre")
def ln_pre_skipped(model):
    model.vision.ln_pre = nn.Identity()


@fault("text.pooled", "model has no ln_final")
def no_ln_final(model):
    model.text.ln_final = nn.Identity()


def replace_config(model, **fields):
    text = TextConfig(**{**vars(model.config.text), **fields})
    model.config = CLIPConfig(model.config.vision, text, model.config.embed_dim)
    model.text.config = text


@fault("text.pooled", "model has the end token 597")
def another_end_token(model):
    replace_config(model, eos_token_id=597)


@fault("vision.projected", "model has proj.weight flipped along axis 0")
def another_projection(model):
    model.vision.proj.weight.data = model.vision.proj.weight.flipud()


@fault("text.projected", "model has numbers that are not finite")
def not_a_number(model):
    model.text.proj.weight.data[0, 0] = math.nan


CODE = {
    "no_mask_in_the_fused_kernel": (
        "is_causal=self.causal", "is_causal=False",
        "text.blocks.0.attn_out", "model has no causal mask",
    ),
    "no_mask_where_it_is_written_out": (
        "if self.causal:", "if False:", "text.blocks.0.pattern", "model has no causal mask",
    ),
    "scores_not_scaled": (
        " * self.head_width**-0.5", "",
        "vision.blocks.0.pattern", "model has scores that are not scaled",
    ),
    "scores_scaled_by_the_head_width": (
        "self.head_width**-0.5", "(1 / self.head_width)",
        "vision.blocks.0.pattern", "model has scores scaled by 1 / head width, and not its root",
    ),
    "scale_of_the_fused_kernel": (
        "is_causal=self.causal)", "is_causal=self.causal, scale=1)",
        "vision.blocks.0.attn_out", "model has scores that are not scaled",
    ),
    "heads_interleaved": (
        "unflatten(-1, heads)).transpose(1, 2)",
        "unflatten(-1, heads[::-1]).transpose(-1, -2)).transpose(1, 2)",
        "vision.blocks.0.q", "model does not compute CLIP's formula",
    ),
    "queries_are_keys": (
        "self.q(self.q_proj(x)", "self.q(self.k_proj(x)",
        "vision.blocks.0.q", "model has attn.q_proj and attn.k_proj swapped",
    ),
    "a_weight_transposed": (
        "self.out_proj(z.flatten(2))",
        "F.linear(z.flatten(2), self.out_proj.weight.T, self.out_proj.bias)",
        "vision.blocks.0.attn_out", "model has attn.out_proj.weight transposed",
    ),
    "a_bias_not_used": (
        "self.fc2(self.act(self.fc1(x)))", "F.linear(self.act(self.fc1(x)), self.fc2.weight)",
        "vision.blocks.0.mlp_out", "model has no bias in mlp.fc2",
    ),
    "gelu_under_the_name_of_quick_gelu": (
        "x * torch.sigmoid(1.702 * x)", "F.gelu(x)",
        "vision.blocks.0.mlp_out", "model has the activation gelu for quick_gelu",
    ),
    "another_constant": (
        "1.702", "1.71", "vision.blocks.0.mlp_out", "model does not compute CLIP's formula",
    ),
    "one_norm_for_both": (
        "x + self.mlp(self.ln_2(x))", "x + self.mlp(self.ln_1(x))",
        "vision.blocks.0.mlp_out", "model has ln_1 before the MLP, for ln_2",
    ),
    "no_ln_1": (
        "self.attn(self.ln_1(x))", "self.attn(x)", "vision.blocks.0.q", "model has no ln_1",
    ),
    "no_residual": (
        "return x + self.mlp(self.ln_2(x))", "return self.mlp(self.ln_2(x))",
        "vision.blocks.0.resid_post", "model has no residual connection around the MLP",
    ),
    "no_residual_around_attention": (
        "self.resid_mid(x + self.attn(self.ln_1(x)))", "self.resid_mid(self.attn(self.ln_1(x)))",
        "vision.blocks.0.mlp_out", "model has no residual connection around attention",
    ),
    "mlp_beside_attention": (
        "x = self.resid_mid(x + self.attn(self.ln_1(x)))\n        return x +",
        "return x + self.attn(self.ln_1(x)) +",
        "vision.blocks.0.mlp_out", "model has the MLP beside attention, and not after it",
    ),
    "blocks_from_last_to_first": (
        "self.blocks(self.embed(pixels))", "self.blocks[::-1](self.embed(pixels))",
        "vision.blocks.0.resid_pre", "model has vision.blocks.2 in the place of vision.blocks.0",
    ),
    "eps_of_1e-6": (
        "eps=config.ln_eps", "eps=1e-6",
        "vision.blocks.0.resid_pre", "model has a LayerNorm eps of 1e-06 for 2e-05",
    ),
    "no_ln_pre": (
        "self.ln_pre(x)", "x", "vision.blocks.0.resid_pre", "model has no ln_pre",
    ),
    "no_position_of_the_class_token": (
        "x = x + self.pos_embed\n", "x[:, 1:] += self.pos_embed[1:]\n",
        "vision.embeddings", "model has no position for the first token",
    ),
    "class_token_last": (
        "torch.cat([self.class_embed.expand(x.shape[0], 1, -1), x], dim=1)",
        "torch.cat([x, self.class_embed.expand(x.shape[0], 1, -1)], dim=1)",
        "vision.embeddings", "model has the class token last",
    ),
    "patches_in_columns": (
        "x.flatten(2).transpose(1, 2)  # (B, P, W)", "x.mT.flatten(2).transpose(1, 2)",
        "vision.embeddings", "model has patches in the order of columns",
    ),
    "colours_in_the_order_bgr": (
        "self.patch_embed(pixels", "self.patch_embed(pixels.flip(1)",
        "vision.embeddings", "model has the colours in the order BGR",
    ),
    "pooling_by_mean": (
        "self.ln_post(x[:, 0])", "self.ln_post(x).mean(1)",
        "vision.pooled", "model has pooling at the mean of all tokens",
    ),
    "pooling_before_ln_post": (
        "self.ln_post(x[:, 0])", "x[:, 0]", "vision.pooled", "model has no ln_post",
    ),
    "read_at_the_last_token": (
        "return is_end.int().argmax(-1)", "return is_end.int().argmax(-1) * 0 - 1",
        "text.pooled", "model has texts read at their last token",
    ),
    "read_at_the_first_token": (
        "return is_end.int().argmax(-1)", "return is_end.int().argmin(-1)",
        "text.pooled", "model has texts read at their first token",
    ),
    "read_before_the_end_token": (
        "return is_end.int().argmax(-1)", "return is_end.int().argmax(-1) - 1",
        "text.pooled", "model has texts read before their end token",
    ),
    "end_token_that_no_text_has": (
        "ids == self.config.eos_token_id", "ids == 1",
        "text.pooled", "model raises ValueError: row 0 of ids has no end token",
    ),
    "no_ln_final": (
        "self.ln_final(self.blocks(x))", "self.blocks(x)", "text.pooled", "model has no ln_final",
    ),
    "logit_scale_not_exponentiated": (
        "self.logit_scale.exp()", "self.logit_scale",
        "logits", "model has a logit scale that is not exponentiated",
    ),
    "not_normalised": (
        "return x / x.pow(2).sum(-1, keepdim=True).pow(0.5)", "return x",
        "logits", "model has embeddings that are not normalised",
    ),
    "texts_not_normalised": (
        "self.encode_text(ids, normalize=True)", "self.encode_text(ids)",
        "logits", "model has text embeddings that are not normalised",
    ),
}  # fmt: skip


def fork(module, old, new):
    """A copy of one of our files, one text in it replaced."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert old in source
    copied = types.ModuleType(f"{module.__name__}_of_a_fork")
    sys.modules[copied.__name__] = copied  # where dataclasses look for it
    exec(compile(source.replace(old, new), copied.__name__, "exec"), vars(copied))
    return copied


def fork_of(model, old, new):
    copied = fork(miniclip.model, old, new).CLIP(model.config)
    copied.load_state_dict(model.state_dict())
    return copied


def exchanged(cause):
    """The same cause, of models that have changed places."""
    return re.sub("model|other", lambda m: {"model": "other", "other": "model"}[m[0]], cause)


@pytest.mark.parametrize("name", CODE)
def test_a_fault_in_the_code_of_a_fork_is_named(name, pair):
    ours, theirs = pair
    *change, site, cause = CODE[name]
    faulty = fork_of(ours, *change)
    report = compare(faulty, theirs)
    assert report.first == site, report
    assert report.cause.startswith(cause), report


@pytest.mark.parametrize("name", ["no_ln_1", "another_constant", "not_normalised"])
def test_the_faulty_one_may_be_the_other(name, pair):
    *change, site, cause = CODE[name]
    report = compare(pair[0], fork_of(pair[0], *change))
    assert report.first == site and report.cause.startswith(exchanged(cause))


def test_a_fork_with_other_code_and_the_same_numbers_passes(pair):
    same = fork_of(pair[0], "x * torch.sigmoid(1.702 * x)", "torch.sigmoid(1.702 * x) * x")
    assert_parity(same, pair[0])
    assert_parity(same, pair[1])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_weights_or_parts_is_named(name, pair):
    ours, theirs = pair
    break_, site, cause = FAULTS[name]
    faulty = copy.deepcopy(ours)
    with torch.no_grad():
        break_(faulty)
    report = compare(faulty, theirs)
    assert (report.first, report.cause) == (site, cause)
    with pytest.raises(AssertionError, match=re.escape(f"first at {site}\nlikely cause: {cause}")):
        assert_parity(faulty, ours)


# ------------------------------------------------------------------- faults in texts and pictures


@pytest.fixture(scope="module")
def whole(pair):
    """Both libraries' tokenizers and transforms of a real checkpoint, and the small models."""
    ours, theirs = parity.load_pair("cifar10")
    return ours._replace(model=pair[0]), theirs._replace(model=pair[1])


def test_texts_and_pictures_come_first(whole):
    report = compare(*whole)
    assert [row.site for row in report.rows] == ["tokens", "pixels", *sites(TINY)]
    assert report.first is None and all(row.absolute == 0 for row in report.rows)


def without(old, new=""):
    """Takes a step out of the tokenizer's cleaning."""
    source = inspect.getsource(tokenizer.clean_transformers)
    assert old in source
    scope = dict(vars(tokenizer))
    exec(source.replace(old, new), scope)
    return scope["clean_transformers"]


@pytest.mark.parametrize(
    "old, new, cause",
    [
        (".lower()", "", "model lacks lower-casing"),
        ('unicodedata.normalize("NFC", part)', "part", "model lacks composing of accents (NFC)"),
    ],
)
def test_a_step_of_cleaning_left_out(old, new, cause, whole):
    faulty = fork(tokenizer, old, new).Tokenizer.from_pretrained("cifar10")
    assert_tokens_differ(whole[0]._replace(tokenizer=faulty), whole, cause)


def test_white_space_that_is_no_space(whole):
    right = whole[0].tokenizer

    def faulty(texts, truncate):
        return right([text.replace("\n", "_") for text in texts], truncate=truncate)

    cause = "model lacks squeezing of white space"
    assert_tokens_differ(whole[0]._replace(tokenizer=faulty), whole, cause)


def assert_tokens_differ(faulty, whole, cause):
    report = compare(faulty, whole[1])
    assert (report.first, report.cause) == ("tokens", cause)
    assert [row.within_tolerance for row in report.rows] == [False] + [True] * 48
    report = compare(whole[0], faulty)
    assert (report.first, report.cause) == ("tokens", exchanged(cause))


def test_the_other_reference(whole):
    faulty = whole[0]._replace(tokenizer=Tokenizer.from_pretrained("cifar10", reference="openai"))
    assert_tokens_differ(faulty, whole, "other lacks OpenAI's cleaning (ftfy, html)")


def test_padding_and_the_end_token(whole):
    faulty = Tokenizer.from_pretrained("cifar10")
    faulty.pad_token_id = 0
    end = faulty.eos_token_id
    report = compare(whole[0]._replace(tokenizer=faulty), whole[1])
    assert report.first == "tokens"
    assert report.cause == f"padding with 0 in model, {end} in other"
    faulty.pad_token_id = faulty.eos_token_id = 5
    report = compare(whole[0]._replace(tokenizer=faulty), whole[1])
    assert report.cause == f"the end token is 5 in model, {end} in other"


PIXELS = {
    "crop_rounds_half_to_even": (
        "return margin // 2", "return round(margin / 2)",
        "model has a crop that rounds half to even, not down",
    ),
    "crop_rounds_up": (
        "return margin // 2", "return -(-margin // 2)",
        "model has a crop that rounds up, not down",
    ),
    "bilinear": (
        "Resampling.BICUBIC)", "Resampling.BILINEAR)",
        "model has bilinear resampling, not bicubic",
    ),
    "long_side_rounded": (
        "int(size * long / short)", "round(size * long / short)",
        "model has a long side that is rounded, not cut",
    ),
    "transparency_dropped": (
        "image = Image.alpha_composite(Image.new(\"RGBA\", image.size, \"white\"), image)", "pass",
        "model has transparency that is dropped, not laid on white",
    ),
    "not_divided": (
        "pixels /= np.float32(255)", "pass", "model has bytes that are not divided by 255",
    ),
    "bgr": (
        ".transpose(2, 0, 1)", ".transpose(2, 0, 1)[::-1]",
        "model has the colours in the order BGR",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PIXELS)
def test_a_fault_in_the_transform_is_named(name, whole):
    old, new, cause = PIXELS[name]
    faulty = fork(transform, old, new).ImageTransform(**settings_of(whole[0].transform))
    report = compare(whole[0]._replace(transform=faulty), whole[1])
    assert (report.first, report.cause) == ("pixels", cause)
    report = compare(whole[0], whole[0]._replace(transform=faulty))
    assert (report.first, report.cause) == ("pixels", exchanged(cause))


def settings_of(transform):
    names = ("size", "crop_size", "image_mean", "image_std")
    return {name: getattr(transform, name) for name in names}


def test_the_other_reference_for_pictures(whole):
    faulty = ImageTransform(**settings_of(whole[0].transform), reference="openai")
    report = compare(whole[0]._replace(transform=faulty), whole[1])
    assert (report.first, report.cause) == ("pixels", "model has OpenAI's order and crop")
    report = compare(whole[0], whole[0]._replace(transform=faulty))
    assert report.cause == "reference is transformers in model, openai in other"


def test_settings_of_a_transform(whole):
    settings = settings_of(whole[0].transform)
    faulty = ImageTransform(**settings | {"image_mean": (0.5, 0.5, 0.5)})
    report = compare(whole[0]._replace(transform=faulty), whole[1])
    assert (report.first, report.cause) == ("pixels", "other has OpenAI's mean and std")
    report = compare(whole[0], whole[0]._replace(transform=faulty))
    assert report.cause.endswith("in model, (0.5, 0.5, 0.5) in other")


# ---------------------------------------------------------------------------- shapes, and the rest


def test_models_of_another_shape(pair):
    ours, theirs = copy.deepcopy(pair[0]), pair[1]
    ours.vision.proj = nn.Linear(48, 30, bias=False)
    report = compare(ours, theirs)
    assert report.first == "vision.projected" and report.rows[-1].absolute == math.inf
    words = "different weights: proj.weight ((30, 48) in model, (36, 48) in other)"
    assert report.cause == words
    ours.text.blocks = ours.text.blocks[:1]
    with pytest.raises(ValueError, match="differ in their number of blocks"):
        compare(ours, theirs)


def test_parts_that_are_no_longer_there_are_left_out(pair):
    """A fork may compute attention as it likes; what it adds to the stream is compared."""
    ours = copy.deepcopy(pair[0])
    del ours.vision.blocks[0].attn.q
    ours.vision.blocks[0].attn.q = lambda x: x
    rows = compare(ours, pair[1]).rows
    assert {row.site for row in rows} == set(sites(TINY)) - {"vision.blocks.0.q"}


def test_a_summary_keeps_the_largest():
    def row(site, *numbers, within=True):
        return Difference(site, *numbers, 0.0, 0.0, within)

    rows = [
        row("vision.blocks.0.mlp_out", 1.0, 0.0, 3.0, within=False),
        row("vision.blocks.0.resid_post", 0.0, 0.0, 0.0),
        row("vision.blocks.1.mlp_out", 0.0, 2.0, 4.0),
        row("vision.blocks.1.resid_post", 0.0, 0.0, 0.0),
        row("logits", 0.0, math.inf, 0.0),
    ]
    first, _, last = summarize(rows)
    assert first == ("vision.blocks.0-1.mlp_out", 1.0, 2.0, 4.0, 0.0, 0.0, False)
    assert last == rows[-1]


def test_tolerances_are_those_of_the_readme():
    assert TOLERANCE == {torch.float32: 2e-5, torch.float64: 1e-10}


# ------------------------------------------------------------------------------------- the command


def test_the_command_measures_a_checkpoint(capsys):
    assert main(["parity", "cifar10"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and max(map(len, out.splitlines())) <= 80 and len(out.splitlines()) <= 36
    for word in ("tokens", "pixels", "logits", f"torch {torch.__version__}", "within tolerance"):
        assert word in out
    assert main(["parity", "cifar10", "--json", "--dtype", "float64"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["first"] is None and report["dtype"] == "float64"
    assert report["rows"][-1]["site"] == "logits" and report["rows"][-1]["float64"] < 1e-10
    assert all(row["within_tolerance"] for row in report["rows"])


@pytest.fixture
def fork_directory(tmp_path, pair):
    faulty = copy.deepcopy(pair[0])
    pair[0].save_pretrained(tmp_path / "original")
    faulty.vision.blocks[2].ln_1.bias.data[3] += 1
    faulty.save_pretrained(tmp_path / "fork")
    return tmp_path


def test_the_command_compares_a_fork_with_the_original(capsys, fork_directory):
    fork_, original = str(fork_directory / "fork"), str(fork_directory / "original")
    picture = fork_directory / "depth.png"
    assert main(["parity", fork_]) == 0  # both libraries load the same files
    capsys.readouterr()
    assert main(["parity", fork_, "--against", original, "--plot", str(picture)]) == 1
    out, err = capsys.readouterr()
    assert "first at vision.blocks.2.q" in out and "weights: ln_1.bias (1 of 48 rows" in out
    assert err == f"picture: {picture}\n"
    with Image.open(picture) as drawn:
        assert drawn.width > 1000
    assert main(["parity", fork_, "--against", original, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["first"] == "vision.blocks.2.q" and report["other"] == original


def test_the_command_draws_weights(capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    assert main(["parity", "--random", "tiny", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "error in bfloat16" in out and "tokens" not in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--random", "B/33"], "'B/33'; expected B/32, B/16"),
        (["cifar10", "--random", "B/32"], "not allowed with argument"),
        (["--random", "B/32", "--against", "cifar10"], "no --against"),
        (["cifar11"], "no checkpoint called 'cifar11'"),
        (["cifar10", "--against", "cifar11"], "no checkpoint called 'cifar11'"),
        (["cifar10", "--against", "shapes"], "differ in their number of blocks"),
        (["cifar10", "--device", "tpu"], "device 'tpu' cannot be used"),
        ([__file__], "transformers loads directories"),
    ],
)
def test_bad_input_is_one_line(argv, words, capsys):
    try:
        status = main(["parity", *argv])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("miniclip: error: ") and err.count("\n") == 1
    assert words in err
