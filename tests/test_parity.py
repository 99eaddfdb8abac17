"""`compare` finds no difference between equal models, and names planted faults.

This file plants faults in tokenizers and transforms. test_diagnosis.py plants faults in models.
"""

import copy
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from forks import openai_names, own_names
from PIL import Image
from torch import Tensor, nn
from twin import TINY, exchanged, fork, fork_of, twins

from miniclip import (
    CLIP,
    CLIPConfig,
    ImageTransform,
    TextConfig,
    Tokenizer,
    parity,
    surgery,
    tokenizer,
    transform,
)
from miniclip.commands.main import main
from miniclip.files.names import OPENAI
from miniclip.parity import Difference, assert_parity, compare, comparison, pairs, pixels, summarize
from miniclip.parity.tokens import compare_tokenizers
from miniclip.published import PUBLISHED

TORCH = f"torch {torch.__version__.partition('+')[0]}"
KINDS = ["resid_pre", "q", "k", "v", "pattern", "attn_out", "mlp_out", "resid_post"]


@pytest.fixture(scope="module")
def pair():
    return twins(TINY)


# ------------------------------------------------------------------------------------ equal models


def sites(config):
    names = []
    for tower in ("vision", "text"):
        names.append(f"{tower}.embeddings")
        for i in range(getattr(config, tower).layers):
            names += [f"{tower}.blocks.{i}.{kind}" for kind in KINDS]
        names += [f"{tower}.pooled", f"{tower}.projected"]
    return [*names, "logits", "logits_per_text", "image_embeds", "text_embeds"]


def test_miniclip_and_transformers_do_not_differ_at_any_site(pair):
    report = compare(*pair)
    assert [row.site for row in report.rows] == sites(TINY)
    assert report.first is None and report.cause is None
    assert str(report) == "within tolerance at all 50 sites"
    for row in report.rows:
        assert row.absolute == row.relative == 0 and row.within_tolerance, row
        assert row.float64 < (1e-6 if row.site.endswith("pattern") else 1e-12), row
        assert row.model_error == row.other_error
        assert 0 < row.model_error < 1e-3  # 0 would mean that no error was measured
    assert parity.nearer(report.rows) == {"model": 0, "other": 0, "equal": 50}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_miniclip_and_transformers_agree_in_half_precision_and_in_float64(dtype, pair):
    report = compare(*pair, dtype=dtype)
    assert report.first is None
    # README promises at most 1.1 times transformers' error. `compare` would allow 2 times.
    if dtype != torch.float64:
        assert all(row.model_error <= 1.1 * row.other_error for row in report.rows)
    largest = max(row.model_error for row in report.rows)
    assert largest < 1e-6 if dtype == torch.float64 else 1e-2 < largest < 1


def test_compare_reports_larger_errors_in_half_precision(pair):
    faulty = copy.deepcopy(pair[0])
    faulty.text.blocks[1].mlp.register_forward_hook(round_half_to_bfloat16)
    report = compare(faulty, pair[0], dtype=torch.float16)
    assert report.first == "text.blocks.1.mlp_out"
    assert report.cause == "rounding errors: the two models agree in float64"
    assert parity.nearer(report.rows)["other"] > parity.nearer(report.rows)["model"]


def round_half_to_bfloat16(module, args, out):
    return out.bfloat16().half() if out.dtype == torch.float16 else out


@pytest.mark.slow
def test_the_transformers_model_that_parity_builds_agrees_with_our_model(pair):
    ours, theirs = pair
    for other in (parity.transformers_twin(ours), theirs):
        assert all(row.absolute == 0 for row in compare(ours, other).rows)
    assert parity.transformers_twin(ours).config.vision_config.layer_norm_eps == 2e-5


def test_compare_changes_neither_model(pair):
    ours, theirs = pair
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in pair]
    ours.train()
    compare(ours, theirs, dtype=torch.bfloat16)
    assert ours.training and ours.logit_scale.dtype == torch.float32
    ours.eval()
    assert theirs.config._attn_implementation == "sdpa"
    for model, weights in zip(pair, before):
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())


def test_compare_turns_dropout_off(pair):
    """The model is in training mode before the comparison."""
    same = copy.deepcopy(pair[0]).train()
    same.text.blocks[0].mlp.register_forward_hook(
        lambda mlp, given, out: nn.functional.dropout(out, 0.5, mlp.training)
    )
    assert compare(same, pair[0]).first is None


def test_weights_on_the_meta_device_are_an_error(pair):
    with torch.device("meta"):
        empty = CLIP(TINY)
    with pytest.raises(ValueError, match="other is on the meta device"):
        compare(pair[0], empty)


def test_a_fork_with_different_code_that_computes_the_same_numbers_passes(pair):
    same = fork_of(pair[0], "x * torch.sigmoid_(1.702 * x)", "torch.sigmoid(1.702 * x) * x")
    assert_parity(same, pair[0])
    assert_parity(same, pair[1])


OPENAI_NORM = """class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, self.eps).to(x.dtype)


class QuickGELU"""


def test_a_fork_that_computes_norms_in_float32_passes(pair):
    """openai/CLIP computes norms in float32. Only a float64 comparison reports the difference."""
    same = fork_of(pair[0], "class QuickGELU", OPENAI_NORM, "nn.LayerNorm(", "LayerNorm(")
    report = compare(same, pair[0])
    assert report.first is None and max(row.float64 for row in report.rows) < 1e-13
    assert compare(same, pair[0], dtype=torch.float64).first == "vision.blocks.0.resid_pre"


def test_a_fork_that_computes_softmax_in_float32_passes(pair):
    """transformers' eager attention computes softmax in float32."""
    same = fork_of(
        pair[0],
        "if self.eager or ", "if True or ",
        "torch.promote_types(scores.dtype, torch.float32)", "torch.float32",
    )  # fmt: skip
    assert_parity(same, pair[0])
    assert compare(same, pair[0], dtype=torch.float64).first == "vision.blocks.0.attn_out"


def test_a_fork_that_computes_sums_in_a_different_order_passes(pair):
    eager = copy.deepcopy(pair[0])
    eager.set_attention("eager")
    fused = fork_of(
        pair[0],
        "self.fc2(self.act(self.fc1(x)))",
        "self.fc2(self.act(x.flip(-1) @ self.fc1.weight.flip(-1).T + self.fc1.bias))",
    )
    for same in (eager, fused):
        report = compare(same, pair[0])
        assert report.first is None and max(row.absolute for row in report.rows) > 0


@torch.no_grad()
def test_a_model_passes_if_its_weights_differ_by_one_rounding_error(pair):
    """A weight may differ by one rounding error, but not by two rounding errors."""
    apart = copy.deepcopy(pair[0])
    weight = apart.text.blocks[1].mlp.fc1.weight
    weight[3] = weight[3].nextafter(torch.tensor(9.0))
    report = compare(apart, pair[0])
    assert report.first is None and max(row.float64 for row in report.rows) > 1e-9
    weight[3] = weight[3].nextafter(torch.tensor(9.0))
    assert compare(apart, pair[0]).first == "text.blocks.1.mlp_out"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_copy_passes_only_if_compared_in_half_precision(dtype, pair):
    half = copy.deepcopy(pair[0]).to(dtype)
    assert compare(half, pair[0], dtype=dtype).first is None
    cause = f"model has weights rounded to {str(dtype).removeprefix('torch.')}"
    assert compare(half, pair[0]).cause == cause


# --------------------------------------------------------------------- faults in texts and images


@pytest.fixture(scope="module")
def whole(pair):
    """Return (ours, theirs): each is a small model with `everyday`'s tokenizer and transform."""
    ours, theirs = parity.load_pair("everyday")
    return ours._replace(model=pair[0]), theirs._replace(model=pair[1])


@pytest.mark.slow
def test_compare_reports_tokens_and_pixels_before_the_sites_of_the_model(whole):
    report = compare(*whole)
    assert [row.site for row in report.rows] == ["tokens", "pixels", *sites(TINY)]
    assert report.first is None and all(row.absolute == 0 for row in report.rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "old, new, cause",
    [
        (".lower()", "", "model lacks lower-casing"),
        ("compose(text)", "text", "model lacks the joining of letter and accent (NFC)"),
    ],
)
def test_compare_reports_a_missing_step_of_text_cleaning(old, new, cause, whole):
    faulty = fork(tokenizer, old, new).Tokenizer.from_pretrained("everyday")
    assert_tokens_differ(whole[0]._replace(tokenizer=faulty), whole, cause)


@pytest.mark.slow
def test_compare_reports_that_a_tokenizer_does_not_merge_white_space(whole):
    right = whole[0].tokenizer

    def faulty(texts, truncate):
        return right([text.replace("\n", "_") for text in texts], truncate=truncate)

    cause = "model lacks the merging of white space"
    assert_tokens_differ(whole[0]._replace(tokenizer=faulty), whole, cause)


@pytest.mark.slow
def test_compare_reports_a_missing_bpe_merge(whole):
    """The texts of `compare` never use the last merge, but `compare` notices that it is missing."""
    right = whole[0].tokenizer
    fewer = Tokenizer(right.vocab, right.merges[:-1], context_length=right.context_length)
    word = "".join(right.merges[-1]).removesuffix("</w>")
    cause = f"different ids for the word {word!r}"
    assert_tokens_differ(whole[0]._replace(tokenizer=fewer), whole, cause)


@pytest.mark.slow
def test_compare_reports_two_swapped_bpe_merges(whole):
    right = whole[0].tokenizer
    merges = [*right.merges]
    merges[100], merges[150] = merges[150], merges[100]
    swapped = Tokenizer(right.vocab, merges, context_length=right.context_length)
    report = compare(whole[0]._replace(tokenizer=swapped), whole[0])
    one, two = (" ".join(right.merges[rank]) for rank in (150, 100))
    cause = f"merge 100 is {one!r} in model, {two!r} in other"
    assert (report.first, report.cause) == ("tokens", cause)


def assert_tokens_differ(faulty, whole, cause):
    """Compare with our correct tokenizer, because it is faster than transformers' tokenizer."""
    report = compare(faulty, whole[0])
    assert (report.first, report.cause) == ("tokens", cause)
    assert [row.within_tolerance for row in report.rows] == [False] + [True] * 51
    report = compare(whole[0], faulty)
    assert (report.first, report.cause) == ("tokens", exchanged(cause))


@pytest.mark.slow
def test_compare_reports_that_two_tokenizers_have_different_references(whole):
    faulty = whole[0]._replace(tokenizer=Tokenizer.from_pretrained("everyday", reference="openai"))
    assert_tokens_differ(faulty, whole, "other lacks OpenAI's cleaning (ftfy, html)")


@pytest.mark.slow
def test_compare_reports_different_padding_tokens_or_end_tokens(whole):
    faulty = Tokenizer.from_pretrained("everyday")
    faulty.pad_token_id = 0
    end = faulty.eos_token_id
    report = compare(whole[0]._replace(tokenizer=faulty), whole[0])
    assert report.first == "tokens"
    assert report.cause == f"padding with 0 in model, {end} in other"
    faulty.pad_token_id = faulty.eos_token_id = 5
    report = compare(whole[0]._replace(tokenizer=faulty), whole[0])
    assert report.cause == f"the end token is 5 in model, {end} in other"


@pytest.mark.slow
def test_compare_reports_wrong_resampling_in_a_transform(whole):
    """test_diagnosis_tables.py tests the other faults of a transform."""
    faulty = fork(transform, "Resampling.BICUBIC)", "Resampling.BILINEAR)")
    one = whole[0]._replace(
        transform=faulty.ImageTransform(**settings_of(whole[0].transform)), tokenizer=None
    )
    cause = "model has bilinear resampling, not bicubic"
    for report, expected in (
        (compare(one, whole[1]), cause),
        (compare(whole[0], one), exchanged(cause)),
    ):
        assert (report.first, report.cause) == ("pixels", expected)
        assert report.rows[0].absolute > 0.01 and report.rows[0].other_error == 0


def settings_of(transform):
    names = ("size", "crop_size", "image_mean", "image_std")
    return {name: getattr(transform, name) for name in names}


@pytest.mark.slow
def test_compare_reports_that_two_transforms_have_different_references(whole):
    faulty = ImageTransform(**settings_of(whole[0].transform), reference="openai")
    report = compare(whole[0]._replace(transform=faulty), whole[1])
    assert (report.first, report.cause) == ("pixels", "model has OpenAI's crop and order of steps")
    report = compare(whole[0], whole[0]._replace(transform=faulty))
    assert report.cause == "reference is transformers in model, openai in other"


@pytest.mark.slow
def test_compare_reports_that_two_transforms_have_different_settings(whole):
    settings = settings_of(whole[0].transform)
    faulty = ImageTransform(**settings | {"image_mean": (0.5, 0.5, 0.5)})
    report = compare(whole[0]._replace(transform=faulty), whole[1])
    assert (report.first, report.cause) == ("pixels", "other has OpenAI's mean and std")
    report = compare(whole[0], whole[0]._replace(transform=faulty))
    assert report.cause.endswith("in model, (0.5, 0.5, 0.5) in other")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, pair):
    """A folder with the small model (`original`) and a copy with a faulty weight (`fork`)."""
    faulty = copy.deepcopy(pair[0])
    faulty.vision.blocks[2].ln_1.bias.data[3] += 1
    folder = tmp_path_factory.mktemp("folders")
    for name, model in (("original", pair[0]), ("fork", faulty)):
        model.save_pretrained(folder / name)
        ImageTransform(40).save_pretrained(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "field, value",
    [
        ("resample", 2), ("rescale_factor", 1 / 256), ("do_center_crop", False),
        ("do_normalize", False), ("image_processor_type", "SiglipImageProcessor"),
    ],
)  # fmt: skip
def test_compare_reports_that_only_one_transform_can_be_loaded(field, value, folders, tmp_path):
    odd, right = tmp_path / "odd", folders / "original"
    shutil.copytree(right, odd)
    settings = odd / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {field: value}))
    for name, *pair in (("model", odd, right), ("other", right, odd)):
        report = compare(*parity.load_pair(*pair))
        assert report.first == "pixels" and report.rows[0].absolute == math.inf
        assert report.cause.startswith(f"{name} raises CheckpointError: {odd}")
        assert f"{field} is {value!r}" in report.cause
        assert [row.within_tolerance for row in report.rows].count(False) == 1


def test_it_is_an_error_if_neither_transform_can_be_loaded(folders, tmp_path, capsys):
    odd = tmp_path / "odd"
    shutil.copytree(folders / "original", odd)
    (odd / "preprocessor_config.json").write_text('{"resample": 2}')
    assert main(["parity", str(odd), "--against", str(odd)]) == 2
    assert "resample is 2" in capsys.readouterr().err


def raise_key_error(picture):
    raise KeyError("mode")


def test_any_function_can_be_a_transform():
    """A cause is found even if only one of the two transforms has settings."""
    one = ImageTransform(24)
    for function, cause in (
        (lambda picture: one(transform.to_rgb(picture).resize((24, 24), 3)), "has a resize to a"),
        (raise_key_error, "raises KeyError: 'mode'"),
        (lambda picture: picture, "raises "),
    ):
        for name, pair in (("model", (function, one)), ("other", (one, function))):
            (row,), found = pixels.compare_transforms(*pair)
            assert not row.within_tolerance and found.startswith(f"{name} {cause}")
        assert pixels.cause_in_pixels(function, function, [], []) == ""
    with pytest.raises(ValueError, match="model raises KeyError: 'mode'"):
        pixels.compare_transforms(raise_key_error, raise_key_error)


def test_compare_reports_a_tokenizer_that_does_not_accept_truncate():
    known = Tokenizer.from_pretrained("shapes")
    (row,), cause = compare_tokenizers(lambda texts: known(texts, truncate=True), known)
    assert not row.within_tolerance and cause.startswith("model raises TypeError: ")


# -------------------------------------------------------------------------- shapes and tolerances


def test_compare_reports_different_shapes_and_raises_an_error_for_different_depths(pair):
    ours, theirs = copy.deepcopy(pair[0]), pair[1]
    ours.vision.proj = nn.Linear(48, 30, bias=False)
    report = compare(ours, theirs)
    assert report.first == "vision.projected" and report.rows[-1].absolute == math.inf
    words = "different weights: proj.weight ((30, 48) in model, (36, 48) in other)"
    assert report.cause == words
    ours.text.blocks = ours.text.blocks[:1]
    with pytest.raises(ValueError, match="differ in their number of blocks"):
        compare(ours, theirs)


def test_a_layer_without_heads_is_compared(pair):
    ours, last = surgery.prune_heads(pair[0], "vision", {2: range(4)}), "vision.blocks.2"
    report = compare(ours, copy.deepcopy(ours), gradients=True)
    assert report.first is None
    assert {f"gradient.{last}.attn.q_proj.bias", f"{last}.q"} <= {row.site for row in report.rows}
    assert compare(ours, pair[0]).first == f"{last}.q"


def test_compare_skips_a_site_that_one_model_lacks(pair):
    """A site is not compared if one model lacks it. Here, one model lacks the module `q`."""
    ours = copy.deepcopy(pair[0])
    del ours.vision.blocks[0].attn.q
    ours.vision.blocks[0].attn.q = lambda x: x
    rows = compare(ours, pair[1]).rows
    assert {row.site for row in rows} == set(sites(TINY)) - {"vision.blocks.0.q"}


def test_a_summary_of_several_layers_shows_their_largest_differences():
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


SITE, PATTERN = "vision.blocks.0.q", "vision.blocks.0.pattern"


@pytest.mark.parametrize(
    "site, dtype, device, size, limit",
    [
        ("logits", torch.float32, "cpu", 1, 2e-5),
        ("logits", torch.float32, "cpu", 100, 2e-5),
        (SITE, torch.float32, "cpu", 0.1, 2e-5),
        (SITE, torch.float32, "cpu", 30, 6e-4),
        ("logits", torch.float32, "cuda", 100, 1e-4),
        (SITE, torch.float32, "cuda", 30, 3e-3),
        ("logits", torch.float64, "cpu", 100, 1e-10),
        (SITE, torch.float64, "cuda", 30, 3e-9),
    ],
)
def test_the_tolerances_equal_the_documented_tolerances(site, dtype, device, size, limit):
    """README lists the tolerances. For logits, the limit is absolute. At other sites, the limit is
    multiplied by the largest number of the tensor, if that number is above 1."""
    assert row_of(site, size, 0.9 * limit, 0.0, dtype=dtype, device=device).within_tolerance
    assert not row_of(site, size, 1.1 * limit, 0.0, dtype=dtype, device=device).within_tolerance


def row_of(site, size, apart, apart_64, dtype=torch.float32, exact=1e-10, device="cpu"):
    right = torch.tensor([size, -size], dtype=torch.float64)
    far = torch.tensor([0.0, 1.0], dtype=torch.float64)
    tensors = [right + apart * far, right + apart_64 * far, right, right]
    return comparison._difference(site, tensors, dtype, exact, torch.device(device))


def test_the_tolerances_in_float64_equal_the_documented_tolerances():
    # A pattern may differ by 1e-6, because transformers' eager softmax is in float32.
    for apart, within in ((0.9e-6, True), (1.1e-6, False)):
        row = row_of(PATTERN, 0.5, apart, 0.0, dtype=torch.float64)
        assert row.within_tolerance == within
    for size, exact, apart, within in (
        (1, 1e-10, 0.9e-10, True), (1, 1e-10, 1.1e-10, False), (30, 1e-10, 2.9e-9, True),
        (30, 1e-10, 3.1e-9, False),
    ):  # fmt: skip
        for site in (SITE, PATTERN):
            assert row_of(site, size, 0.0, apart, exact=exact).within_tolerance == within
    # `exact` is 1e-6 if one model's weights were merged, or if they were rounded one more time
    # than the other model's weights. For logits too, this limit is multiplied by the tensor's
    # largest number.
    assert row_of("logits", 100, 0.0, 0.9e-4, exact=1e-6).within_tolerance
    assert not row_of("logits", 100, 0.0, 1.1e-4, exact=1e-6).within_tolerance


def test_in_half_precision_one_model_may_have_twice_the_error_of_the_other():
    right = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for times, within in ((1.9, True), (2.1, False)):
        tensors = [right + times * 0.01, right, right - 0.01, right]
        row = comparison._difference(SITE, tensors, torch.bfloat16, 1e-10, torch.device("cpu"))
        assert row.within_tolerance == within
        assert row.absolute == pytest.approx((times + 1) * 0.01)
        assert row.relative == pytest.approx((times + 1) * 0.005)
        errors = (pytest.approx(times * 0.01), pytest.approx(0.01))
        assert (row.model_error, row.other_error) == errors


def test_non_finite_numbers_have_an_infinite_difference():
    assert row_of(SITE, 1, math.nan, 0.0)[1:4] == (math.inf, math.inf, 0.0)
    assert not row_of(SITE, 1, math.nan, 0.0).within_tolerance


@torch.no_grad()
def test_the_tolerance_for_merged_weights_is_one_millionth(pair):
    """Merging adds a rounding error. Here, an extra parameter marks a model as merged."""
    for by, within in ((2e-7, True), (2e-5, False)):
        merged = copy.deepcopy(pair[0])
        merged.text.blocks[1].mlp.fc2.bias[3] += by
        merged.register_parameter("merged", nn.Parameter(torch.zeros(1)))
        assert (compare(merged, pair[0]).first is None) == within


@torch.no_grad()
def test_an_added_parameter_does_not_hide_a_small_fault_in_half_precision(pair):
    """A merge changes parameters that both models have. If none differ, float64 runs must agree."""
    fork = copy.deepcopy(pair[0])
    fork.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    assert compare(fork, pair[0], dtype=torch.bfloat16).first is None
    fork.vision.ln_post.register_forward_hook(lambda norm, args, out: out * 1.0005)
    assert compare(fork, pair[0], dtype=torch.bfloat16).first == "vision.pooled"


def test_inputs_have_the_end_tokens_of_both_models_at_many_positions(pair):
    seen = []
    other = copy.deepcopy(pair[0])
    handle = pair[0].register_forward_pre_hook(lambda model, given: seen.append(given))
    text = vars(TINY.text) | {"eos_token_id": 500}
    other.config = CLIPConfig(TINY.vision, TextConfig(**text), TINY.embed_dim)
    other.text.config = other.config.text
    try:
        for seed in (0, 0, 1):
            compare(pair[0], other, seed=seed)
    finally:
        handle.remove()
    (pixels, ids), *_, (again, _), (_, _), (seeded, other_ids), _ = (
        seen[i] for i in (0, 3, 4, 5, 8, 9)
    )
    assert pixels.shape == (2, 3, 40, 40) and ids.shape == (8, 17)  # the context length is 20
    assert (ids[:, 0] == 598).all() and ids[1, -1] == 0
    ends = {599: [1, 3, 5, 7, 9, 11, 10, 9], 500: [2, 4, 6, 8, 10, 12, 14, 1]}
    for end, places in ends.items():
        assert (ids == end).int().argmax(1).tolist() == places
    assert torch.equal(pixels, again)
    assert not torch.equal(pixels, seeded) and not torch.equal(ids, other_ids)


def test_nearer_counts_the_sites_where_each_model_has_the_smaller_error():
    def row(site, ours, theirs):
        return Difference(site, 0.0, 0.0, 0.0, ours, theirs, True)

    rows = [row("tokens", 1.0, 0.0), row("pixels", 1.0, 0.0), row("a", 1.0, 2.0)]
    rows += [row("b", 2.0, 1.0), row("c", 3.0, 1.0), row("d", 1.0, 1.0)]
    assert parity.nearer(rows) == {"model": 1, "other": 2, "equal": 1}


def test_random_weights_have_the_right_mean_and_std():
    model = CLIP(TINY)
    parity.randomize(model, seed=3)
    weights = dict(model.named_parameters())
    assert weights["logit_scale"].item() == pytest.approx(math.log(100))
    for name, std, mean in (
        ("vision.blocks.0.mlp.fc1.weight", 48**-0.5, 0), ("vision.ln_pre.weight", 0.3, 1),
        ("vision.patch_embed.weight", 192**-0.5, 0), ("text.pos_embed", 0.3, 0),
        ("text.token_embed.weight", 0.3, 0), ("vision.blocks.0.mlp.fc1.bias", 0.3, 0),
    ):  # fmt: skip
        assert weights[name].std().item() == pytest.approx(std, rel=0.3), name
        assert weights[name].mean().item() == pytest.approx(mean, abs=0.15), name
    again = CLIP(TINY)
    parity.randomize(again, seed=3)
    assert torch.equal(again.text.pos_embed, model.text.pos_embed)
    parity.randomize(again, seed=4)
    assert not torch.equal(again.text.pos_embed, model.text.pos_embed)


# ------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_parity_command_compares_a_checkpoint_with_transformers(capsys):
    assert main(["parity", "everyday"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and max(map(len, out.splitlines())) <= 80 and len(out.splitlines()) <= 39
    for word in ("tokens", "pixels", "logits", TORCH, "within tolerance"):
        assert word in out
    assert main(["parity", "everyday", "--json", "--dtype", "float64"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["first"] is None and report["dtype"] == "float64"
    assert report["rows"][-1]["site"] == "text_embeds" and report["rows"][-1]["float64"] < 1e-10
    assert all(row["within_tolerance"] for row in report["rows"])


@pytest.mark.slow
def test_the_parity_command_compares_a_fork_with_the_original(capsys, folders, tmp_path):
    fork_, original = str(folders / "fork"), str(folders / "original")
    picture = tmp_path / "depth.png"
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


@pytest.mark.slow
def test_the_parity_command_compares_random_models(capsys, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "tiny", TINY)
    assert main(["parity", "--random", "tiny", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "error in bfloat16" in out and "tokens" not in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.fixture
def asked(monkeypatch):
    """Replace the functions that the command calls, and record the arguments of each call."""
    seen = {}

    def record(name, answer):
        def function(*given, **named):
            seen[name] = (given, named)
            return answer

        monkeypatch.setattr(parity, name, function)

    record("load_pair", ("one", "other"))
    record("random_pair", ("one", "other"))
    record("compare", parity.Report([], "logits", "a reason"))
    record("measured_with", "the environment")
    return seen


def test_the_parity_command_uses_each_of_its_arguments(asked, capsys):
    argv = ["--against", "shapes", "--revision", "v2", "--dtype", "float16", "--device", "mps"]
    argv += ["--names", "names.json"]
    assert main(["parity", "everyday", *argv]) == 1
    assert asked["load_pair"] == (("everyday", "shapes", "names.json"), {"revision": "v2"})
    given = {"dtype": torch.float16, "device": "mps", "gradients": False}
    assert asked["compare"] == (("one", "other"), given) and asked["measured_with"][0] == ("mps",)
    out = capsys.readouterr().out
    for words in ("everyday", "shapes", "error in float16", "the environment", "cause: a reason"):
        assert words in out
    assert main(["parity", "--random", "B/16", "--json"]) == 1
    assert asked["random_pair"] == (("B/16",), {})
    assert asked["compare"][1] == given | {"dtype": torch.float32, "device": "cpu"}
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["other"]) == ("B/16", "transformers")
    assert (found["first"], found["cause"]) == ("logits", "a reason")
    main(["parity", "--grad"])
    assert asked["compare"][1]["gradients"] is True
    assert asked["load_pair"][0] == ("openai/clip-vit-base-patch32", "transformers", None)


def test_load_pair_loads_each_model_tokenizer_and_transform_by_name_and_revision(monkeypatch):
    asked = []
    model = CLIP.from_pretrained("everyday")

    def has_files(part, name, **options):
        return asked.append((part, name, options)) or True

    monkeypatch.setattr(pairs, "has_files", has_files)
    for kind, loaded in ((CLIP, model), (Tokenizer, None), (ImageTransform, None)):

        def from_pretrained(name, loaded=loaded, **options):
            return asked.append((name, options)) or loaded

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    parity.load_pair("one", "other", revision="v2")
    options = {"revision": "v2"}
    for name in ("one", "other"):
        assert [given for given in asked if given == (name, options)] == [(name, options)] * 3
        assert ("tokenizer", name, options) in asked and ("transform", name, options) in asked
    parity.load_pair("one", "everyday", revision="v2")  # only "one" can have a revision
    assert ("everyday", {"revision": None}) in asked and ("everyday", options) not in asked


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, words",
    [
        (["--random", "B/33"], "'B/33'; expected B/32, B/16"),
        (["everyday", "--random", "B/32"], "not allowed with argument"),
        (["--random", "B/32", "--against", "everyday"], "no --against"),
        (["cifar11"], "no checkpoint called 'cifar11'"),
        (["everyday", "--against", "cifar11"], "no checkpoint called 'cifar11'"),
        (["everyday", "--against", "shapes"], "differ in their number of blocks"),
        (["everyday", "--device", "tpu"], "device 'tpu' cannot be used"),
        ([__file__], "transformers loads directories"),
    ],
)
def test_bad_input_to_the_parity_command_gives_a_one_line_error(argv, words, capsys):
    try:
        status = main(["parity", *argv])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("miniclip: error: ") and err.count("\n") == 1
    assert words in err


# ---------------------------------------------------------------------------------------- gradients


class Straight(torch.autograd.Function):
    """The identity function, with a wrong backward pass that halves the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


@pytest.mark.parametrize("against", ["miniclip", "transformers"])
def test_models_with_equal_weights_have_equal_gradients(pair, against):
    ours, theirs = pair
    report = compare(ours, copy.deepcopy(ours) if against == "miniclip" else theirs, gradients=True)
    assert report.first is None, report
    rows = [row for row in report.rows if row.site.startswith("gradient.")]
    assert {row.site for row in rows} == {f"gradient.{n}" for n, _ in ours.named_parameters()}
    assert max(row.float64 for row in rows) < 1e-10


def test_compare_checks_gradients_even_if_vocabulary_and_context_length_differ(pair):
    longer = surgery.add_tokens(pair[0], 7)
    longer.text.pos_embed = nn.Parameter(torch.cat([longer.text.pos_embed, torch.zeros(5, 40)]))
    surgery.reconfigure(longer, "text", context_length=25)
    for models in ((longer, pair[0]), (pair[0], longer)):
        assert compare(*models, gradients=True).first is None


def test_it_is_an_error_if_no_parameter_has_a_gradient_in_both_models(pair):
    frozen = copy.deepcopy(pair[0]).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no gradient can be compared: set requires_grad"):
        compare(frozen, pair[0], gradients=True)


@pytest.mark.slow
def test_compare_finds_the_site_of_a_detach_or_a_changed_backward_pass(pair):
    """Neither fault changes the forward pass, so only `gradients=True` finds the faults."""
    ours, theirs = pair
    for change, block in ((Tensor.detach, 1), (Straight.apply, 0)):
        fork = copy.deepcopy(ours)
        mlp = fork.vision.blocks[block].mlp
        mlp.register_forward_hook(lambda module, args, out, change=change: change(out))
        assert compare(fork, theirs).first is None
        report = compare(fork, theirs, gradients=True)
        assert report.first == f"gradient.vision.blocks.{block}.mlp.fc2.bias", change
        assert "detached" in report.cause


def test_the_parity_command_prints_the_difference_of_the_gradients(capsys):
    assert main(["parity", "shapes", "--against", "shapes", "--grad"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"gradients of \d+ parameters differ by at most 0.0e\+00 in float64", out)


# ------------------------------------------------------------------------ modules with other names


@pytest.fixture(scope="module")
def as_openai():
    """A model that OpenAI's code can express, with heads of width 64 and MLPs of width 4 * 64."""
    shape = {"width": 64, "heads": 1, "mlp_width": 256, "ln_eps": 1e-5, "act": "quick_gelu"}
    words = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    text = replace(TINY.text, **shape, **words, context_length=77)
    return twins(replace(TINY, vision=replace(TINY.vision, **shape), text=text))[0]


class WithEyes(openai_names.CLIP):
    """OpenAI's class with one module renamed."""

    visual = property(lambda self: self.eyes)


def with_eyes(like):
    fork = openai_names.CLIP(like)
    fork.eyes = fork._modules.pop("visual")
    fork.__class__ = WithEyes
    fork.tensor_names = {ours: name.replace("visual.", "eyes.") for ours, name in OPENAI.items()}
    return fork


def own_names_of(like):
    fork = own_names.CLIP(like)
    fork.tensor_names = own_names.NAMES
    return fork


# {kind of fork: (a function that makes the fork, the name of the fork's first vision MLP)}
KINDS_OF_FORK = {
    "miniclip": (copy.deepcopy, "vision.blocks.0.mlp"),
    "transformers": (parity.transformers_twin, "vision_model.encoder.layers.0.mlp"),
    "openai": (openai_names.CLIP, "visual.transformer.resblocks.0.mlp"),
    "open_clip": (
        lambda like: openai_names.CLIP(like, "open_clip"), "visual.transformer.resblocks.0.mlp",
    ),
    "custom_text": (
        lambda like: openai_names.CLIP(like, "custom_text"), "visual.transformer.resblocks.0.mlp",
    ),
    "one name changed": (with_eyes, "eyes.transformer.resblocks.0.mlp"),
    "own names": (own_names_of, "eyes.layers.0.think"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_OF_FORK)
@pytest.mark.sweep(4)
def test_forks_with_different_module_names_are_compared_site_by_site(as_openai, kind):
    make, mlp = KINDS_OF_FORK[kind]
    fork = make(as_openai)
    report = compare(fork, as_openai, gradients=True)
    assert report.first is None, report
    seen = {row.site for row in report.rows}
    for site in ("embeddings", "resid_pre", "q", "k", "v", "attn_out", "mlp_out", "resid_post"):
        for tower in ("vision", "text"):
            assert any(name.startswith(tower) and name.endswith(site) for name in seen), site
    assert {"vision.pooled", "logits"} <= seen
    assert {f"gradient.{name}" for name, _ in as_openai.named_parameters()} <= seen

    mlp = fork.get_submodule(mlp)
    handle = mlp.register_forward_hook(lambda module, args, out: out.detach())
    report = compare(fork, as_openai, gradients=True)
    assert report.first == "gradient.vision.blocks.0.mlp.fc2.bias", report
    handle.remove()
    (act,) = (name for name, part in mlp.named_children() if not hasattr(part, "weight"))
    mlp.register_module(act, nn.GELU())
    report = compare(fork, as_openai)
    assert report.first == "vision.blocks.0.mlp_out" and "activation gelu" in report.cause, report


class WithBias(openai_names.CLIP):
    """open_clip's class for SigLIP, which returns the bias of the logits too."""

    def forward(self, pixels, ids):
        return *super().forward(pixels, ids), self.logit_bias


def test_compare_checks_the_logit_bias_of_open_clip(as_openai):
    one, other = WithBias(as_openai, "custom_text"), WithBias(as_openai, "custom_text")
    one.logit_bias = other.logit_bias = nn.Parameter(torch.tensor(0.5))
    assert compare(one, other).first is None
    other.logit_bias = nn.Parameter(torch.tensor(-10.0))
    assert compare(one, other).first == "logits"


def test_compare_reports_a_fault_in_the_keys_of_a_fused_qkv_projection(as_openai):
    for kind, matrix in (
        ("openai", "visual.transformer.resblocks.1.attn.in_proj_bias"),
        ("own names", "eyes.layers.1.mix.qkv.bias"),
    ):
        fork = KINDS_OF_FORK[kind][0](as_openai)
        fork.get_parameter(matrix).data[64:128] += 1e-3
        report = compare(fork, as_openai)
        assert report.first == "vision.blocks.1.k", report
        assert report.cause.startswith("different weights: attn.k_proj.bias (64 of 64 rows")


def test_a_model_with_unknown_module_names_needs_a_correct_table_of_names(as_openai):
    fork = own_names.CLIP(as_openai)
    with pytest.raises(ValueError, match=r"has no blocks in its vision tower.*--names"):
        compare(fork, as_openai)
    for names, words in (
        ({"vision.blocks.{}.ln_1": "eyes.layer.{}.before_mix"}, "'eyes.layer.0.before_mix'"),
        ({"vision.ln_0": "eyes.enter"}, "'vision.ln_0': 'eyes.enter'; expected one of our names"),
        ({"text.blocks.{}.ln_1": 3}, "'text.blocks.{}.ln_1': 3; expected one of our names"),
    ):
        fork.tensor_names = own_names.NAMES | names
        with pytest.raises(ValueError, match=re.escape(words)):
            compare(fork, as_openai)
    fork.tensor_names = {n: own for n, own in own_names.NAMES.items() if n != "text.proj.weight"}
    with pytest.raises(ValueError, match=r"lacks text\.proj\.weight; their shapes give the config"):
        compare(fork, as_openai)


def test_an_incomplete_table_of_names_does_not_loosen_a_tolerance(as_openai):
    """If `compare` treated the fork as a merged model, it would allow a difference of 1e-6."""
    fork = own_names.CLIP(as_openai)
    fork.tensor_names = {n: own for n, own in own_names.NAMES.items() if n != "vision.ln_post"}
    assert compare(fork, as_openai).first is None
    fork.get_parameter("eyes.layers.1.think.2.bias").data[3] += 2e-7
    assert compare(fork, as_openai).first == "vision.blocks.1.mlp_out"


@pytest.fixture
def fork_files(tmp_path, monkeypatch, pair):
    """A user's folder. It has a fork's code, the fork's table of names, and the original model."""
    monkeypatch.chdir(tmp_path)
    pair[0].save_pretrained("original")
    shutil.copy(own_names.__file__, "my_clip.py")
    build = "import miniclip, my_clip\n\n\ndef build():\n    return my_clip.CLIP(original)\n"
    original = "\n\noriginal = miniclip.CLIP.from_pretrained('original')\nnumber = 3\n"
    (tmp_path / "fork.py").write_text(build + original)
    (tmp_path / "names.json").write_text(json.dumps(own_names.NAMES))
    return tmp_path


def test_the_parity_command_reads_a_fork_and_a_table_of_names(fork_files, capsys, pair):
    line = ["parity", "fork.py:build", "--against", "original", "--names", "names.json", "--grad"]
    assert main(line) == 0
    count = len([*pair[0].parameters()])
    assert f"gradients of {count} parameters differ by at most " in capsys.readouterr().out
    code = fork_files / "my_clip.py"
    code.write_text(code.read_text().replace("before_think(x))\n", "before_think(x)).detach()\n"))
    assert main(line) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "first at gradient.text.blocks.1.mlp.fc2.bias" in out


def test_each_fork_imports_the_modules_of_its_own_folder(tmp_path):
    for folder, width in (("v1", 2), ("v2", 3)):
        (tmp_path / folder / "parts").mkdir(parents=True)
        (tmp_path / folder / "parts" / "sizes.py").write_text(f"width = {width}\n")
        (tmp_path / folder / "layers.py").write_text("from parts.sizes import width\n")
        code = "import layers\nfrom torch import nn\n\nmodel = nn.Linear(1, layers.width)\n"
        (tmp_path / folder / "fork.py").write_text(code)
    made = parity.load_pair(tmp_path / "v1" / "fork.py", tmp_path / "v2" / "fork.py")
    assert [loaded.model.out_features for loaded in made] == [2, 3]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["fork.py:build", "--against", "original"], "has no blocks in its vision tower"),
        (["fork.py:build"], "give a directory, or another model to compare with (--against)"),
        (["fork.py", "--against", "original"], "fork.py: model raises AttributeError"),
        (["fork.py:number", "--against", "original"], "fork.py: number raises TypeError"),
        (["absent.py", "--against", "original"], "absent.py: model raises FileNotFoundError"),
        (["fork.py:build", "--against", "original", "--names", "absent.json"], "absent.json"),
        (["original", "--against", "original", "--names", "names.json"], "has our module names"),
        (["--random", "B/32", "--names", "names.json"], "no --against and no --names"),
    ],
)
def test_an_error_in_the_files_of_a_fork_gives_a_one_line_error(argv, words, fork_files, capsys):
    assert main(["parity", *argv]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("miniclip: error: ") and err.count("\n") == 1
