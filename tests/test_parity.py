"""The instrument itself: it sees nothing where there is nothing, and what was planted."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from twin import TINY, twins

from miniclip import parity
from miniclip.cli import main
from miniclip.parity import TOLERANCE, compare, summarize, transformers_twin


@pytest.fixture(scope="module")
def pair():
    return twins(TINY)


def test_the_same_model_has_no_difference_at_any_site(pair):
    rows = compare(*pair)
    blocks = [f"vision.blocks.{i}" for i in range(3)] + [f"text.blocks.{i}" for i in range(2)]
    ends = ["vision.embed", "vision.pooled", "vision.proj", "logits_per_image"]
    ends += ["text.embed", "text.pooled", "text.proj"]
    expected = {*ends, *blocks, *(f"{b}.{part}" for b in blocks for part in ("attn", "mlp"))}
    assert {row.site for row in rows} == expected and len(rows) == len(expected)
    assert all(row.within_tolerance for row in rows)
    assert all(row.float32 == 0 and row.float64 < 1e-12 for row in rows)
    assert all(0 < row.rounding < 1e-3 for row in rows)  # so that something was measured
    assert [row.site for row in rows][:2] == ["vision.embed", "vision.blocks.0.attn"]


def test_the_twin_that_parity_makes_is_the_one_that_is_written_out_field_by_field(pair):
    ours, theirs = pair
    for row in compare(ours, transformers_twin(ours)) + compare(ours, theirs):
        assert row.float32 == 0, row
    assert transformers_twin(ours).config.vision_config.layer_norm_eps == 2e-5


def test_neither_model_is_changed(pair):
    ours, theirs = pair
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in pair]
    ours.train()
    compare(ours, theirs)
    assert ours.training
    ours.eval()
    for model, weights in zip(pair, before):
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())


def missing_bias(model):
    model.vision.blocks[1].mlp.fc2.bias.data.zero_()


def another_activation(model):
    model.text.blocks[0].mlp.act = nn.GELU()


def no_mask(model):
    model.text.blocks[1].attn.causal = False


def another_eps(model):
    model.vision.ln_post.eps = 1e-6


def not_a_number(model):
    model.text.proj.weight.data[0, 0] = math.nan


FAULTS = {
    missing_bias: "vision.blocks.1.mlp",
    another_activation: "text.blocks.0.mlp",
    no_mask: "text.blocks.1.attn",
    another_eps: "vision.pooled",
    not_a_number: "text.proj",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_site_out_of_tolerance_is_that_of_the_fault(fault, pair):
    ours, theirs = pair
    faulty = copy.deepcopy(ours)
    fault(faulty)
    for other in (theirs, ours):  # and two of ours can be compared
        failed = [row.site for row in compare(faulty, other) if not row.within_tolerance]
        assert failed[0] == FAULTS[fault]
        assert failed[-1] == "logits_per_image"


def test_models_of_another_shape():
    ours, theirs = twins(TINY)
    ours.text.blocks = ours.text.blocks[:1]
    with pytest.raises(ValueError, match="differ in their number of blocks"):
        compare(ours, theirs)


def test_a_summary_keeps_the_largest():
    rows = [
        parity.Difference("vision.blocks.0.mlp", 1.0, 0.0, 3.0),
        parity.Difference("vision.blocks.1.mlp", 0.0, 2.0, 4.0),
        parity.Difference("logits_per_image", 0.0, math.inf, 0.0),
    ]
    rows += [parity.Difference(f"vision.blocks.{i}", 0.0, 0.0, 0.0) for i in range(2)]
    assert summarize(rows)[:2] == [("vision.blocks.0-1.mlp", 1.0, 2.0, 4.0), rows[2]]


def test_the_command_measures_a_checkpoint(capsys):
    assert main(["parity", "cifar10"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and max(map(len, out.splitlines())) <= 80
    assert "logits_per_image" in out and f"torch {torch.__version__}" in out
    assert main(["parity", "cifar10", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[-1]["site"] == "logits_per_image" and rows[-1]["float32"] == 0
    assert all(row["within_tolerance"] for row in rows)


def test_the_command_exits_with_1_out_of_tolerance(capsys, monkeypatch):
    monkeypatch.setitem(parity.OFFICIAL, "tiny", TINY)
    assert main(["parity", "--random", "tiny"]) == 0
    copied = parity.copy_weights

    def copy_wrongly(ours, theirs):
        copied(ours, theirs)
        theirs.vision_model.encoder.layers[2].layer_norm1.bias.data[3] += 1

    monkeypatch.setattr(parity, "copy_weights", copy_wrongly)
    capsys.readouterr()
    assert main(["parity", "--random", "tiny"]) == 1
    assert "first at vision.blocks.2.attn" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--random", "B/33"], "'B/33'; expected B/32, B/16"),
        (["cifar10", "--random", "B/32"], "not allowed with argument"),
        (["cifar11"], "no checkpoint called 'cifar11'"),
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


def test_tolerances_are_those_of_the_readme():
    assert TOLERANCE == {torch.float32: 2e-5, torch.float64: 1e-10}
