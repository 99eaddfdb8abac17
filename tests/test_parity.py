"""The instrument itself: it sees nothing where there is nothing, and names what was planted.

Here the faults are planted in texts and pictures; test_diagnosis.py has those of the models.
"""

import copy
import inspect
import json
import math
import shutil

import pytest
import torch
from PIL import Image
from torch import nn
from twin import TINY, exchanged, fork, fork_of, twins

from miniclip import CLIP, ImageTransform, Tokenizer, parity, tokenizer, transform
from miniclip.cli import main
from miniclip.files.hub import EMBEDDED
from miniclip.parity import TOLERANCE, Difference, assert_parity, compare, summarize
from miniclip.presets import PRESETS

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
    return [*names, "logits", "logits_per_text", "image_embeds", "text_embeds"]


def test_the_same_model_has_no_difference_at_any_site(pair):
    report = compare(*pair)
    assert [row.site for row in report.rows] == sites(TINY)
    assert report.first is None and report.cause is None
    assert str(report) == "within tolerance at all 50 sites"
    for row in report.rows:
        assert row.absolute == row.relative == 0 and row.within_tolerance, row
        assert row.float64 < (1e-6 if row.site.endswith("pattern") else 1e-12), row
        assert row.model_error == row.other_error
        assert 0 < row.model_error < 1e-3  # so that something was measured
    assert parity.nearer(report.rows) == {"model": 0, "other": 0, "equal": 50}


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


def test_weights_that_are_not_there(pair):
    with torch.device("meta"):
        empty = CLIP(TINY)
    with pytest.raises(ValueError, match="other is on the meta device"):
        compare(pair[0], empty)


def test_a_fork_with_other_code_and_the_same_numbers_passes(pair):
    same = fork_of(pair[0], "x * torch.sigmoid_(1.702 * x)", "torch.sigmoid(1.702 * x) * x")
    assert_parity(same, pair[0])
    assert_parity(same, pair[1])


OPENAI_NORM = """class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, self.eps).to(x.dtype)


class QuickGELU"""


def test_a_fork_that_takes_its_norms_in_float32_passes(pair):
    """As openai/CLIP's does; asked about float64, parity says so."""
    same = fork_of(pair[0], "class QuickGELU", OPENAI_NORM, "nn.LayerNorm(", "LayerNorm(")
    report = compare(same, pair[0])
    assert report.first is None and max(row.float64 for row in report.rows) < 1e-13
    assert compare(same, pair[0], dtype=torch.float64).first == "vision.blocks.0.resid_pre"


def test_a_fork_that_takes_its_softmax_in_float32_passes(pair):
    """As transformers' eager attention does."""
    same = fork_of(
        pair[0],
        "if self.eager or ", "if True or ",
        "torch.promote_types(scores.dtype, torch.float32)", "torch.float32",
    )  # fmt: skip
    assert_parity(same, pair[0])
    assert compare(same, pair[0], dtype=torch.float64).first == "vision.blocks.0.attn_out"


def test_a_fork_that_computes_in_another_order_passes(pair):
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
def test_weights_that_are_a_rounding_apart_pass(pair):
    """As after an exponential and its logarithm; but not two roundings apart."""
    apart = copy.deepcopy(pair[0])
    weight = apart.text.blocks[1].mlp.fc1.weight
    weight[3] = weight[3].nextafter(torch.tensor(9.0))
    report = compare(apart, pair[0])
    assert report.first is None and max(row.float64 for row in report.rows) > 1e-9
    weight[3] *= 1.00001
    assert compare(apart, pair[0]).first == "text.blocks.1.mlp_out"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_copy_in_half_precision_passes_in_that_precision_only(dtype, pair):
    half = copy.deepcopy(pair[0]).to(dtype)
    assert compare(half, pair[0], dtype=dtype).first is None
    cause = f"model has weights rounded to {str(dtype).removeprefix('torch.')}"
    assert compare(half, pair[0]).cause == cause


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


def test_a_merge_that_is_missing(whole):
    """The last, which none of the texts needs."""
    right = whole[0].tokenizer
    fewer = Tokenizer(right.vocab, right.merges[:-1], context_length=right.context_length)
    word = "".join(right.merges[-1]).removesuffix("</w>")
    assert_tokens_differ(whole[0]._replace(tokenizer=fewer), whole, f"first at the word {word!r}")


def test_merges_that_have_changed_places(whole):
    right = whole[0].tokenizer
    merges = [*right.merges]
    merges[37], merges[129] = merges[129], merges[37]
    swapped = Tokenizer(right.vocab, merges, context_length=right.context_length)
    report = compare(whole[0]._replace(tokenizer=swapped), whole[0])
    one, two = (" ".join(right.merges[rank]) for rank in (129, 37))
    cause = f"merge 37 is {one!r} in model, {two!r} in other"
    assert (report.first, report.cause) == ("tokens", cause)


def assert_tokens_differ(faulty, whole, cause):
    report = compare(faulty, whole[1])
    assert (report.first, report.cause) == ("tokens", cause)
    assert [row.within_tolerance for row in report.rows] == [False] + [True] * 51
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


@pytest.mark.parametrize(
    "field, value",
    [
        ("resample", 2), ("rescale_factor", 1 / 256), ("do_center_crop", False),
        ("do_normalize", False), ("image_processor_type", "SiglipImageProcessor"),
    ],
)  # fmt: skip
def test_a_transform_that_is_refused_is_a_difference(field, value, tmp_path, capsys):
    settings = parity.load_pair("cifar10", "cifar10")[0].transform.to_dict() | {field: value}
    odd = tmp_path / "odd"
    shutil.copytree(EMBEDDED / "cifar10", odd)
    (odd / "preprocessor_config.json").write_text(json.dumps(settings))
    for name, *argv in (("model", odd, "cifar10"), ("other", "cifar10", odd)):
        one, against = map(str, argv)
        assert main(["parity", one, "--against", against, "--json"]) == 1
        report = json.loads(capsys.readouterr().out)
        assert report["first"] == "pixels"
        assert report["cause"].startswith(f"{name} raises CheckpointError: {odd}")
        assert f"{field} is {value!r}" in report["cause"]
        assert [row["within_tolerance"] for row in report["rows"]].count(False) == 1
    assert main(["parity", str(odd), "--against", str(odd)]) == 2  # nothing left to compare
    assert f"{field} is {value!r}" in capsys.readouterr().err


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
    assert err == "" and max(map(len, out.splitlines())) <= 80 and len(out.splitlines()) <= 39
    for word in ("tokens", "pixels", "logits", f"torch {torch.__version__}", "within tolerance"):
        assert word in out
    assert main(["parity", "cifar10", "--json", "--dtype", "float64"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["first"] is None and report["dtype"] == "float64"
    assert report["rows"][-1]["site"] == "text_embeds" and report["rows"][-1]["float64"] < 1e-10
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
