"""The instrument: its arithmetic on costs that are known, what it refuses to time, and that what it
compares is the same work."""

import itertools
import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from miniclip import CLIPConfig, TextConfig, VisionConfig, bench
from miniclip.bench import Case, Contender, Row, Setting, alternate, distance, measure, table, timed
from miniclip.cli import main
from miniclip.presets import PRESETS

SHAPE = CLIPConfig(
    vision=VisionConfig(width=64, layers=2, heads=1, mlp_width=96, image_size=40, patch_size=8),
    text=TextConfig(width=64, layers=2, heads=1, mlp_width=96),
    embed_dim=36,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SHAPE)
    monkeypatch.setattr(bench, "SEARCHED", 20_000)


def contender(name, costs, output, log=None):
    """One whose trials cost what is written, over and over."""
    costs = itertools.cycle(costs)

    def trial():
        if log is not None:
            log.append(name)
        return next(costs), output

    return Contender(name, trial)


def case(*contenders, **fields):
    return Case("suite", "work", 10, "texts", list(contenders), lambda x: x, **fields)


def rows_of(*contenders, **fields):
    return {row.contender: row for row in measure(case(*contenders, **fields), seconds=0)}


def test_medians_and_ratios_are_those_of_the_rounds():
    # One trial is for its output and three warm up; the costs that follow are measured.
    ours = [9.0] * 4 + [1.0, 2.0, 4.0]
    theirs = [9.0] * 4 + [3.0, 4.0, 20.0]  # 3, 2 and 5 times as much
    rows = rows_of(contender("ours", ours, 0), contender("theirs", theirs, 0))
    assert rows["ours"].cost == (1.5, 2, 3) and rows["ours"].ratio == (1, 1, 1)
    assert rows["theirs"].cost == (3.5, 4, 12)
    assert rows["theirs"].ratio == (2.5, 3, 4)  # the ratio of the medians would be 2


def test_a_slow_spell_of_the_machine_changes_no_ratio():
    spell = [1.0] * 5 + [50.0, 30.0]
    rows = rows_of(contender("ours", spell, 0), contender("theirs", [3 * c for c in spell], 0))
    assert rows["theirs"].ratio == (3, 3, 3)


def test_rounds_alternate_and_end_with_the_time(monkeypatch):
    log = []
    pair = [contender(name, [1.0], 0, log) for name in "AB"]
    assert alternate(pair, seconds=0) == [[1.0, 1.0]] * 3
    assert [sorted(log[i : i + 2]) for i in (0, 2, 4)] == [["A", "B"]] * 3
    monkeypatch.setattr(bench.time, "perf_counter", lambda: len(log))  # a second for each trial
    assert len(alternate(pair, seconds=16)) == 8
    assert len(alternate(pair, seconds=1000)) == 40
    assert {"".join(log[i : i + 2]) for i in range(0, len(log), 2)} == {
        "AB",
        "BA",
    }  # no fixed order
    pair = [contender("A", [1.0, 2.0], 0), contender("B", [3.0, 4.0], 0)]
    assert alternate(pair, seconds=0) == [[1.0, 3.0], [2.0, 4.0], [1.0, 3.0]]


def test_time_is_that_of_the_work(monkeypatch):
    clock = iter([10.0, 10.25])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert timed(lambda: "output")() == (0.25, "output")


def test_a_gpu_is_waited_for_before_and_after(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: log.append("clock") or 0.0)
    timed(lambda: log.append("work"), "cuda:0")()
    assert log == ["wait", "clock", "work", "wait", "clock"]


def test_another_output_is_refused_before_anything_is_timed():
    log = []
    outputs = {"ours": 1.0, "same": 1.0 + 1e-7, "wrong": 1.1, "shape": 1.0, "nan": math.nan}
    tensors = {name: torch.full((2, 3), value) for name, value in outputs.items()}
    tensors["shape"] = torch.ones(3, 3)
    rows = rows_of(
        *(contender(name, [1.0], output, log) for name, output in tensors.items()),
        contender("for scale", [0.5], None, log),
        tolerance=1e-5,
    )
    assert [log.count(name) for name in ("wrong", "shape", "nan")] == [1, 1, 1]
    assert log[:6] == [*outputs, "for scale"] and log.count("same") == log.count("ours") == 7
    for name in ("wrong", "shape", "nan"):
        assert rows[name].cost is None and rows[name].ratio is None
    assert rows["wrong"].difference == pytest.approx(0.1) and rows["nan"].difference == math.inf
    assert 0 < rows["same"].difference < 1e-6
    assert rows["for scale"].difference is None and rows["for scale"].ratio == (0.5, 0.5, 0.5)


def test_numbers_of_our_own_that_are_not_finite():
    ours = contender("ours", [1.0], torch.full((2, 3), math.nan))
    with pytest.raises(RuntimeError, match="miniclip's own output has numbers that are not finite"):
        rows_of(ours, contender("theirs", [1.0], torch.ones(2, 3)))


def test_distance_is_that_of_the_worst_row():
    one = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    other = one + torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert distance(one, other) == pytest.approx(1 / math.hypot(6, 9))
    assert distance([[1, 2]], [[1, 2]]) == 0 and distance([[1, 2]], [[1, 3]]) == math.inf


def test_the_table_is_80_columns_wide():
    title = ("vision", "256 images, L/14-336, bfloat16")
    longest = Row(
        *title, 256, "images", "transformers, compiled", 0.0, (99.9,) * 3, (11.11, 22.22, 33.33)
    )
    lines = table(
        [
            longest,
            longest._replace(unit="bytes", cost=(6.5e8,) * 3),
            longest._replace(difference=0.0123, cost=None, ratio=None),
            longest._replace(work="other"),
        ]
    ).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 9
    assert lines[2:4] == [
        "vision: 256 images, L/14-336, bfloat16",
        "  transformers, compiled   99,900.0 ms       2.6/s   22.22x (11.11 to 33.33)",
    ]
    assert "650 MB" in lines[4]
    assert lines[5].endswith("not timed: its output is another, by 0.01")


# ------------------------------------------------------------------------------------------------
# What is compared


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SHAPE)
        config = bench.prepare(folder, "tiny")
    return Setting(folder, config, "tiny", "cpu", torch.float32, False, 3)


@pytest.mark.parametrize("suite", sorted({*bench.SUITES} - {"startup", "memory"}))
def test_every_suite_does_the_same_work_with_each_library(suite, setting):
    for case in bench.SUITES[suite](setting):
        outputs = {c.name: c.trial()[1] for c in case.contenders}
        mine = case.form(outputs.pop("miniclip"))
        peers = {name: case.form(out) for name, out in outputs.items() if out is not None}
        assert "transformers" in peers or suite == "search" and "torch, matmul + topk" in peers
        for name, output in peers.items():
            assert distance(output, mine) <= case.tolerance, (case.work, name)


@pytest.mark.parametrize("suite", ["vision", "text", "zeroshot", "train"])
def test_a_weight_of_the_peers_that_is_another_is_noticed(suite, setting):
    mlp = {"vision": "vision_model", "zeroshot": "text_model"}.get(suite, "text_model")
    bias = getattr(setting.libraries[1].model, mlp).encoder.layers[1].mlp.fc1.bias
    case = next(bench.SUITES[suite](setting))
    with torch.no_grad():
        bias += 0.1
    try:
        rows = {row.contender: row for row in measure(case, seconds=0)}
    finally:
        with torch.no_grad():
            bias -= 0.1
    assert rows["transformers"].difference > case.tolerance and rows["transformers"].cost is None
    assert rows["miniclip"].cost is not None


def test_a_gradient_of_the_peers_that_is_another_is_noticed(setting, monkeypatch):
    """One of the same length, of the same loss."""
    ours, theirs = setting.libraries[:2]

    def climb(pixels):
        embeds = theirs.encode_image(pixels)
        return 2 * embeds.detach() - embeds

    libraries = [ours, theirs._replace(encode_image=climb)]
    monkeypatch.setitem(vars(setting), "libraries", libraries)
    case = next(bench.SUITES["train"](setting))
    rows = {row.contender: row for row in measure(case, seconds=0)}
    assert rows["transformers"].difference > 0.1 and rows["transformers"].cost is None


def test_a_row_that_only_the_peers_see_is_noticed(setting, monkeypatch):
    case = next(bench.SUITES["search"](setting))
    monkeypatch.setattr(bench.Index, "search", lambda index, query, k: [])
    rows = {row.contender: row for row in measure(case, seconds=0)}
    assert rows.pop("miniclip").cost is not None
    assert rows and all(row.cost is None for row in rows.values())


def test_captions_and_invented_words_are_all_different():
    assert len(set(bench.captions(80_000))) == 80 * 998  # two class names occur twice
    words = " ".join(next(bench.invented_captions(50))).split()
    assert len(set(words)) == len(words) == 300


def test_the_ceiling_scales_one_product_to_the_work(setting, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))  # a product takes 1 s
    assert bench.ceiling(setting, 2 * 2048**3).trial() == (2.0, None)


def test_multiply_adds_of_a_text_grow_with_its_tokens():
    short, long = (bench.tower_multiply_adds(SHAPE, "text", tokens) for tokens in (5, 10))
    assert 2 * short < long < 2.5 * short  # the projection once, attention squared
    # One image of B/32: 4.4 billion, as counted by others for ViT-B/32.
    assert bench.tower_multiply_adds(CLIPConfig(), "vision") == pytest.approx(4.41e9, rel=0.01)


# ------------------------------------------------------------------------------------------------
# The command


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", partial(measure, seconds=0))
    picture = tmp_path / "bench.png"
    argv = ["bench", "--shape", "tiny", "--batch", "2", "--suite", "vision", "transform"]
    assert main([*argv, "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80 and picture.stat().st_size > 10_000
    assert "vision: 2 images, tiny, float32" in out and f"torch {torch.__version__}" in out.replace(
        "\n ", ""
    )
    assert err == f"picture: {picture}\n"
    assert main(["bench", "--shape", "tiny", "--batch", "1", "--suite", "vision", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [row["contender"] for row in found["rows"]]
    assert names[:2] == ["miniclip", "transformers"] and names[-1] == "one matrix product"
    assert found["rows"][1]["difference"] == 0 and found["environment"]["torch"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--suite", "vison"], "no suite is called 'vison'; expected vision, text"),
        (["--shape", "B/33"], "'B/33'; expected B/32, B/16"),
        (["--batch", "0"], "batch is 0; expected at least 1"),
        (["--device", "cuda:99"], "cannot be used"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_input_is_one_line(argv, words, capsys):
    try:
        status = main(["bench", *argv])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("miniclip: error: ") and err.count("\n") == 1
    assert words in err


def test_a_process_that_fails_says_why(setting, monkeypatch):
    monkeypatch.setitem(bench.IMPORTS, "miniclip", "import nothing_of_this_name")
    with pytest.raises(RuntimeError, match="miniclip failed .* No module named"):
        bench.in_process(setting, "miniclip")


def test_a_process_of_its_own_gives_the_same_logits(setting):
    peak, logits = bench.in_process(setting, "miniclip")
    load_case = next(bench.SUITES["load"](setting))
    here = load_case.contenders[0].trial()[1]
    assert peak > 0 and distance(logits[None], here[None]) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(monkeypatch):
    monkeypatch.setattr(bench, "measure", partial(measure, seconds=0))
    rows = bench.bench(["vision", "text"], shape="tiny", device="cuda", batch=2)
    assert all(row.cost is not None for row in rows)


def test_without_transformers_the_error_says_what_to_install():
    source = (
        "import sys; sys.modules['transformers'] = None\n"
        "from miniclip.cli import main; sys.exit(main(['bench', '--suite', 'tokenizer']))"
    )
    run = [sys.executable, "-c", source]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and "pip install 'miniclip[test]'" in done.stderr
