"""`miniclip bench` computes correct ratios from known costs. It does not time a library whose
output is wrong. All libraries do the same work."""

import itertools
import json
import math
import shutil
import sys
import types
from dataclasses import replace
from datetime import date
from functools import partial

import on_a_gpu
import pytest
import torch
from PIL import Image
from torch import nn

from miniclip import CLIP, CLIPConfig, TextConfig, VisionConfig, bench, engines, load
from miniclip.bench import Row, libraries, material, measuring, models, pipeline, suites, table
from miniclip.bench.growth import memory_of, tower_multiply_adds
from miniclip.bench.libraries import Library
from miniclip.bench.material import Setting
from miniclip.bench.measuring import Case, alternate, distance, measure, timed
from miniclip.commands.main import main
from miniclip.parts import parts
from miniclip.published import PUBLISHED
from miniclip.terminal import counted

SHAPE = CLIPConfig(
    vision=VisionConfig(width=64, layers=2, heads=1, mlp_width=96, image_size=40, patch_size=8),
    text=TextConfig(
        width=64, layers=2, heads=1, mlp_width=96,
        vocab_size=5000, bos_token_id=4998, eos_token_id=4999,
    ),
    embed_dim=36,
)  # fmt: skip


CEILING = models.ceiling


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PUBLISHED, "tiny", SHAPE)
    monkeypatch.setattr(pipeline, "SEARCHED", 20_000)
    # The real `ceiling` is replaced, because it would take most of the tests' time.
    alone = dict([contender("matrix products alone", [1.0], None)])
    monkeypatch.setattr(models, "ceiling", lambda setting, tower, x: alone)


def contender(name, costs, output, log=None):
    """Return a name and a fake trial. Each call of the trial returns the next cost, in a cycle."""
    costs = itertools.cycle(costs)

    def trial():
        if log is not None:
            log.append(name)
        return next(costs), output

    return name, trial


def case(*contenders, **fields):
    return Case("suite", "work", 10, "texts", dict(contenders), lambda x: x, **fields)


def rows_of(*contenders, **fields):
    return {row.contender: row for row in measure(case(*contenders, **fields), seconds=0)}


def test_a_cost_is_a_median_and_ratios_compare_the_costs_of_the_same_round():
    # The first trial gives the output. The next three are warm-up, and the others are measured.
    ours = [9.0] * 4 + [1.0, 2.0, 4.0]
    theirs = [9.0] * 4 + [3.0, 4.0, 20.0]  # 3, 2 and 5 times the costs in `ours`
    rows = rows_of(contender("ours", ours, 0), contender("theirs", theirs, 0))
    assert rows["ours"].cost == (1.5, 2, 3) and rows["ours"].ratio == (1, 1, 1)
    assert rows["theirs"].cost == (3.5, 4, 12)
    assert rows["theirs"].ratio == (2.5, 3, 4)  # the ratio of the medians would be 2


def test_a_slow_moment_of_the_machine_changes_no_ratio():
    spell = [1.0] * 5 + [50.0, 30.0]
    rows = rows_of(contender("ours", spell, 0), contender("theirs", [3 * c for c in spell], 0))
    assert rows["theirs"].ratio == (3, 3, 3)


def test_libraries_run_alternately_until_the_time_is_over(monkeypatch):
    log = []
    pair = dict(contender(name, [1.0], 0, log) for name in "AB")
    assert alternate(pair, seconds=0) == [[1.0, 1.0]] * 3
    assert [sorted(log[i : i + 2]) for i in (0, 2, 4)] == [["A", "B"]] * 3
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: len(log))  # a trial takes 1 second
    assert len(alternate(pair, seconds=16)) == 8
    assert len(alternate(pair, seconds=1000)) == 40
    assert {"".join(log[i : i + 2]) for i in range(0, len(log), 2)} == {
        "AB",
        "BA",
    }  # both orders occur
    pair = dict([contender("A", [1.0, 2.0], 0), contender("B", [3.0, 4.0], 0)])
    assert alternate(pair, seconds=0) == [[1.0, 3.0], [2.0, 4.0], [1.0, 3.0]]


def test_only_the_work_is_timed(monkeypatch):
    clock = iter([10.0, 10.25])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    assert timed(lambda: "output")() == (0.25, "output")


def test_the_clock_waits_for_the_gpu_before_and_after_the_work(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: log.append("clock") or 0.0)
    timed(lambda: log.append("work"), "cuda:0")()
    assert log == ["wait", "clock", "work", "wait", "clock"]


def test_a_library_with_a_wrong_output_is_not_timed():
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


def test_nan_in_the_output_of_miniclip_is_an_error():
    ours = contender("ours", [1.0], torch.full((2, 3), math.nan))
    with pytest.raises(RuntimeError, match="miniclip's own output has numbers that are not finite"):
        rows_of(ours, contender("theirs", [1.0], torch.ones(2, 3)))


def test_the_distance_of_two_outputs_is_the_distance_of_the_worst_row():
    one = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    other = one + torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert distance(one, other) == pytest.approx(1 / math.hypot(6, 9))
    assert distance([[1, 2]], [[1, 2]]) == 0 and distance([[1, 2]], [[1, 3]]) == math.inf


def test_a_tolerance_allows_only_the_rounding_error_of_its_dtype():
    expected = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
    assert expected == material.MAX_DISTANCE
    for difference, is_timed in ((0.9e-5, True), (1.1e-5, False)):
        theirs = contender("theirs", [1.0], torch.tensor([[1.0, difference]]))
        rows = rows_of(contender("ours", [1.0], torch.tensor([[1.0, 0.0]])), theirs, tolerance=1e-5)
        assert (rows["theirs"].cost is not None) == is_timed


def test_without_a_tolerance_outputs_must_be_equal():
    rows = rows_of(contender("ours", [1.0], [[1, 2]]), contender("theirs", [1.0], [[1, 3]]))
    assert rows["theirs"].cost is None
    assert case(contender("ours", [1.0], 0)).tolerance == 0


def test_the_table_is_at_most_80_columns_wide():
    title = ("vision", "256 images, L/14-336, bfloat16")
    longest = Row(
        *title, 256, "images", "transformers, compiled", 0.0, (99.9,) * 3, (11.11, 22.22, 33.33)
    )
    lines = table(
        [
            longest,
            longest._replace(unit="bytes", cost=(6.5e8,) * 3),
            longest._replace(difference=0.0123, cost=None, ratio=None),
            longest._replace(work="other", cost=(0.1, 0.2, 0.3)),
            longest._replace(work="other", cost=(1, 10, 30)),
        ]
    ).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 10
    assert lines[8] == lines[3].replace("99,900.0 ms       2.6/s", "   200.0 ms     1,280/s")
    assert lines[9] == lines[3].replace("99,900.0 ms       2.6/s", "10,000.0 ms      25.6/s")
    assert lines[2:4] == [
        "vision: 256 images, L/14-336, bfloat16",
        "  transformers, compiled   99,900.0 ms       2.6/s   22.22x (11.11 to 33.33)",
    ]
    assert "650 MB" in lines[4]
    assert lines[5].endswith("not timed: its output differs from miniclip's by 0.01")


# ------------------------------------------------------------------------------------------------
# What is compared


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PUBLISHED, "tiny", SHAPE)
        config = material.prepare(folder, "tiny")
    return Setting(folder, config, "tiny", "cpu", torch.float32, False, 3)


def cases(suite, setting, monkeypatch):
    """Return the cases of a suite. The suite `zeroshot` uses only 100 classes, to save time."""
    if suite == "zeroshot":
        monkeypatch.setattr(models, "IMAGENET_CLASSES", models.IMAGENET_CLASSES[:100])
    return bench.SUITES[suite](setting)


@pytest.mark.slow
def test_the_checkpoint_for_bench_has_a_matching_tokenizer_and_transform(setting):
    model, tokenizer, transform = load(setting.directory)
    end = tokenizer.eos_token_id
    assert model.config == setting.config and setting.config.vision == SHAPE.vision
    text = setting.config.text
    assert (text.bos_token_id, text.eos_token_id) == (tokenizer.bos_token_id, end)
    assert text.vocab_size == 5000 and 3000 < tokenizer.vocab_size == end + 1
    assert transform.size == transform.crop_size == 40
    assert model.logit_scale.item() == pytest.approx(math.log(100))  # as in OpenAI's models
    assert (model.text.blocks[0].ln_1.bias != 0).all()


@pytest.mark.slow
def test_the_artificial_photographs_have_the_file_size_of_real_photographs(setting):
    assert len({path.read_bytes() for path in setting.photographs}) == 16
    for path in setting.photographs:
        with Image.open(path) as image:
            assert image.size == (640, 480) and image.format == "JPEG"
        assert 75_000 < path.stat().st_size < 105_000


@pytest.mark.slow
@pytest.mark.parametrize("suite", sorted({*bench.SUITES} - {"startup", "memory"}))
def test_all_libraries_give_the_same_output_in_every_suite(suite, setting, monkeypatch):
    for case in cases(suite, setting, monkeypatch):
        outputs = {name: trial()[1] for name, trial in case.trials.items()}
        mine = case.form(outputs.pop("miniclip"))
        peers = {name: case.form(out) for name, out in outputs.items() if out is not None}
        assert "transformers" in peers or suite == "search" and "torch, matmul + topk" in peers
        for name, output in peers.items():
            assert distance(output, mine) <= case.tolerance, (case.work, name)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["vision", "text", "train"])
def test_a_library_with_a_changed_weight_is_not_timed(suite, setting, monkeypatch):
    mlp = "vision_model" if suite == "vision" else "text_model"
    bias = getattr(setting.libraries[1].model, mlp).encoder.layers[1].mlp.fc1.bias
    case = next(cases(suite, setting, monkeypatch))
    with torch.no_grad():
        bias += 0.1
    try:
        rows = {row.contender: row for row in measure(case, seconds=0)}
    finally:
        with torch.no_grad():
            bias -= 0.1
    assert rows["transformers"].difference > case.tolerance and rows["transformers"].cost is None
    assert rows["miniclip"].cost is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "suite, field, change",
    [
        (
            "tokenizer",
            "tokenize",
            lambda ids: torch.cat([ids[:, :1], ids[:, 1:2] ^ 1, ids[:, 2:]], 1),
        ),
        ("transform", "transform", lambda pixels: pixels.nextafter(torch.tensor(9.0))),
    ],
)
def test_a_library_with_changed_ids_or_pixels_is_not_timed(
    suite, field, change, setting, monkeypatch
):
    ours, theirs = setting.libraries[:2]
    right = getattr(theirs, field)
    faulty = theirs._replace(**{field: lambda given: change(right(given))})
    monkeypatch.setitem(vars(setting), "libraries", [ours, faulty])
    for case in bench.SUITES[suite](setting):
        rows = {row.contender: row for row in measure(case, seconds=0)}
        assert rows["transformers"].cost is None and rows["miniclip"].cost is not None


@pytest.mark.slow
def test_a_library_with_a_changed_gradient_is_not_timed(setting, monkeypatch):
    """The changed gradient has the opposite sign. Its norm and the loss stay the same."""
    ours, theirs = setting.libraries[:2]

    def climb(pixels):
        embeds = theirs.encode_image(pixels)
        return 2 * embeds.detach() - embeds

    libraries = [ours, theirs._replace(encode_image=climb)]
    monkeypatch.setitem(vars(setting), "libraries", libraries)
    case = next(bench.SUITES["train"](setting))
    rows = {row.contender: row for row in measure(case, seconds=0)}
    assert rows["transformers"].difference > 0.1 and rows["transformers"].cost is None


@pytest.mark.slow
def test_a_library_whose_search_finds_different_rows_is_not_timed(setting, monkeypatch):
    case = next(bench.SUITES["search"](setting))
    monkeypatch.setattr(pipeline.Index, "search", lambda index, query, k: [])
    rows = {row.contender: row for row in measure(case, seconds=0)}
    assert rows.pop("miniclip").cost is not None
    assert rows and all(row.cost is None for row in rows.values())


def test_captions_and_invented_words_are_all_different():
    assert len(set(material.captions(80_000))) == 80 * 998  # two of 1000 class names occur twice
    stream = material.invented_captions(50)
    words = " ".join([*next(stream), *next(stream)]).split()
    assert len(set(words)) == len(words) == 600


def test_bench_invents_the_words_before_the_clock_starts(setting, monkeypatch):
    events = []

    def invented(count):
        while True:
            events.append("invented")
            yield ["a cat"]

    def timed(run):
        return lambda: events.append("timed") or measuring.timed(run)()

    monkeypatch.setattr(pipeline, "invented_captions", invented)
    monkeypatch.setattr(pipeline, "timed", timed)
    *_, case = pipeline.tokenizer_suite(setting)
    case.trials["miniclip"]()
    assert events == ["invented", "timed"]


def test_matrix_products_are_measured_with_the_fastest_implementation(setting, monkeypatch):
    """PyTorch has up to three implementations of the product: its own, oneDNN's and MKL's."""
    costs = []

    def timed(way, device):
        way()
        costs.append((9.0, 1.0, 4.0)[len(costs)])
        return contender("", [costs[-1]], None)[1]

    monkeypatch.setattr(models, "timed", timed)
    vision = setting.libraries[0].model.vision
    (trial,) = CEILING(setting, vision, torch.zeros(1, 3, 40, 40)).values()
    assert trial() == (min(costs), None)


@pytest.mark.slow
def test_the_number_of_multiply_adds_grows_with_the_length_of_a_text():
    texts = [replace(SHAPE.text, context_length=tokens) for tokens in (5, 10)]
    short, long = (tower_multiply_adds(replace(SHAPE, text=text), "text") for text in texts)
    assert 2 * short < long < 2.5 * short  # attention grows with the square of the length
    assert long == 10 * 64 * (4 * 64 + 2 * 96) * 2 + 2 * (2 * 10 * 10 * 64) + 64 * 36
    # Other projects count 4.4 billion multiply-adds for an image in ViT-B/32.
    assert tower_multiply_adds(CLIPConfig(), "vision") == pytest.approx(4.41e9, rel=0.01)


@pytest.mark.slow
def test_the_tokenizer_suite_does_not_compare_padding(setting):
    """Some libraries pad with 0, others with the end token."""
    end = setting.config.text.eos_token_id
    ids = torch.tensor([[7, 8, end, 0, 0], [7, end, end, end, end]])
    assert next(pipeline.tokenizer_suite(setting)).form(ids) == [[7, 8], [7]]


def test_the_timed_matrix_products_are_all_products_with_a_weight(setting, monkeypatch):
    """All products of the tower are counted, except for the two products inside attention."""
    counted = []
    monkeypatch.setattr(
        models, "ceiling", lambda setting, tower, x: counted.append((tower, x)) or {}
    )
    list(models.vision_suite(setting))
    (case,) = models.text_suite(setting)
    longest = int(case.work.split()[5])
    assert case.work.startswith("3 captions of at most") and longest < 20
    shapes = [(1, 26), (3, 26), (3, longest)]
    for (tower, x), (rows, tokens) in zip(counted, shapes, strict=True):
        short = replace(SHAPE, text=replace(SHAPE.text, context_length=longest))
        name = "vision" if tokens == 26 else "text"
        attention = 2 * (2 * tokens**2 * 64)
        found = sum(x.numel() * len(weight) for x, weight in models.products(tower, x))
        assert found == rows * (tower_multiply_adds(short, name) - attention)
        weights = {weight.data_ptr() for _, weight in models.products(tower, x)}
        assert weights <= {p.data_ptr() for p in tower.parameters()}
        assert len(weights) == 2 * 6 + 1 + (name == "vision")


def test_the_parameters_and_multiply_adds_of_each_part_follow_from_the_config():
    """A matrix (N, M) has N * M multiply-adds for each token."""
    vision, text = (
        VisionConfig(width=48, layers=3, heads=4, mlp_width=100, image_size=40, patch_size=8),
        TextConfig(
            width=40, layers=2, heads=2, mlp_width=92,
            vocab_size=600, context_length=20, bos_token_id=598, eos_token_id=599,
        ),
    )  # fmt: skip
    config = CLIPConfig(vision=vision, text=text, embed_dim=36)
    found = {part.name: part for part in parts(config)}
    expected = {"vision.patch_embed": 25 * 48 * 3 * 8 * 8}
    for tower, of, tokens in (("vision", vision, 26), ("text", text, 20)):
        blocks, width = f"{tower}.blocks.0-{of.layers - 1}", of.width
        attention = 4 * width * width * tokens + 2 * tokens * tokens * width
        expected[f"{blocks}.attn"] = of.layers * attention
        expected[f"{blocks}.mlp"] = of.layers * 2 * width * of.mlp_width * tokens
        expected[f"{tower}.proj"] = width * 36
    assert {name: part.multiply_adds for name, part in found.items() if part.multiply_adds} == (
        expected
    )
    with torch.device("meta"):
        model = CLIP(config)
    assert sum(part.parameters for part in found.values()) == sum(
        weight.numel() for weight in model.parameters()
    )
    assert list(found)[:5] == [
        *("vision.patch_embed", "vision.class_embed", "vision.pos_embed", "vision.ln_pre"),
        "vision.blocks.0-2.ln_1",
    ]
    assert found["vision.blocks.0-2.attn"].weights == "4 x (48, 48)"
    assert found["text.blocks.0-1.ln_1"].weights == "(40,)"
    assert found["text.blocks.0-1.ln_1"].parameters == 2 * 2 * 40


def test_counts_above_one_use_the_plural_and_mixed_captions_have_eight_words():
    assert counted(1, "image") == "1 image" and counted(1000, "text") == "1,000 texts"
    assert {len(text.split()) for text in material.mixed_captions(50)} == {8}
    assert len(material.MIXED_SCRIPTS) == 12


def fake_library(name, log):
    def encode(x):
        log.append((name, torch.is_inference_mode_enabled()))
        return x

    return Library(name, None, encode, encode, lambda texts: texts, lambda paths: paths)


@pytest.mark.parametrize("device, mode", [("cpu", "default"), ("cuda:1", "max-autotune")])
def test_the_compiled_encoders_come_first_in_the_list(device, mode, monkeypatch, tmp_path):
    log, modes = [], []
    setting = Setting(tmp_path, SHAPE, "tiny", device, torch.float32, True, 3)
    three = [fake_library(name, log) for name in ("miniclip", "transformers", "open_clip")]
    monkeypatch.setitem(vars(setting), "libraries", three)
    monkeypatch.setattr(torch, "compile", lambda f, mode: modes.append(mode) or f)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    found = models.encoders(setting, "encode_image", [torch.ones(1, 2)] * 3)
    names = ["miniclip, compiled", "transformers, compiled", *(one.name for one in three)]
    assert list(found) == names and modes == [mode, mode]
    assert torch.equal(found["open_clip"]()[1], torch.ones(1, 2))
    waits = ["wait"] if device == "cuda:1" else []
    assert log == [*waits, ("open_clip", True), *waits]


def test_all_libraries_read_the_same_checkpoint_in_the_same_precision(monkeypatch, tmp_path):
    monkeypatch.setattr(material, "libraries", lambda *given: given)
    setting = Setting(tmp_path, SHAPE, "tiny", "cuda:1", torch.bfloat16, False, 3)
    assert setting.libraries == (tmp_path, "cuda:1", torch.bfloat16)
    case = setting.case("suite", "work", 3, "texts", {}, list)
    assert case == ("suite", "work, tiny, bfloat16", 3, "texts", {}, list, 5e-2, {})


@pytest.mark.slow
def test_the_libraries_compute_in_the_given_precision(setting):
    for library in libraries.libraries(setting.directory, "cpu", torch.bfloat16):
        weights = list(library.model.parameters())
        assert {weight.dtype for weight in weights} == {torch.bfloat16}, library.name
        assert not library.model.training
        ids = library.tokenize(["a", "a photo of a cat"])
        assert library.encode_text(ids).dtype == torch.bfloat16


class Peer(nn.Module):
    """A fake model in place of the models of open_clip and openai/CLIP."""

    def __init__(self, *sizes, **config):
        super().__init__()
        self.given, self.weight = sizes or config, nn.Parameter(torch.zeros(1))

    def load_state_dict(self, weights, strict):
        self.weights, self.strict = weights, strict

    def encode_image(self, pixels):
        return pixels

    encode_text = encode_image


@pytest.mark.slow
@pytest.mark.parametrize("name", ["open_clip", "openai/CLIP"])
def test_open_clip_and_openai_clip_get_the_weights_and_vocabulary_of_miniclip(
    name, setting, monkeypatch
):
    """Fake modules replace both libraries, because `miniclip[test]` installs neither."""
    tokenizer = types.SimpleNamespace(SimpleTokenizer=lambda path: lambda texts: (path, texts))
    clip = types.SimpleNamespace(
        tokenize=lambda texts: texts,
        _transform=lambda size: lambda image: image.load() and torch.full((3, 1), size),
    )
    model = types.SimpleNamespace(CLIP=Peer)
    fakes = {
        "clip": types.SimpleNamespace(clip=clip, model=model, simple_tokenizer=tokenizer),
        "open_clip": types.SimpleNamespace(
            CLIP=Peer,
            SimpleTokenizer=tokenizer.SimpleTokenizer,
            image_transform=lambda size, is_train: clip._transform(size if not is_train else 0),
        ),
    }
    for module, fake in fakes.items():
        monkeypatch.setitem(sys.modules, module, fake)
    found = {one.name: one for one in libraries.libraries(setting.directory, "cpu", torch.bfloat16)}
    assert list(found) == ["miniclip", "transformers", "open_clip", "openai/CLIP"]
    peer = found[name]
    ours = load(setting.directory).model
    assert peer.model.strict and len(peer.model.weights) < len(
        ours.state_dict()
    )  # the peer has one tensor for q, k and v
    assert torch.equal(peer.model.weights["visual.proj"], ours.vision.proj.weight.T)
    assert peer.model.weight.dtype == torch.bfloat16 and not peer.model.training
    assert peer.encode_image(torch.ones(1, 2)).dtype == torch.bfloat16
    assert torch.equal(peer.transform(setting.photographs[:2]), torch.full((2, 3, 1), 40))
    if name == "openai/CLIP":
        sizes = (36, 40, 2, 64, 8, 77, 5000, 64, 1, 2)
        assert peer.model.given == sizes and peer.tokenize is clip.tokenize
        path, _ = clip._tokenizer([])
    else:
        assert peer.model.given["embed_dim"] == 36
        assert peer.model.given["text_cfg"]["vocab_size"] == 5000
        path, _ = peer.tokenize([])
    assert path == str(setting.directory / "bpe_simple_vocab_16e6.txt.gz")


@pytest.mark.slow
def test_memory_and_start_time_are_measured_in_new_processes(setting, monkeypatch):
    asked = []
    monkeypatch.setattr(
        pipeline, "in_process", lambda *given: asked.append(given) or (7e6, torch.ones(1, 2))
    )
    (memory,), (startup,) = pipeline.memory_suite(setting), pipeline.startup_suite(setting)
    costs = {name: trial()[0] for name, trial in memory.trials.items()}
    size = (setting.directory / "model.safetensors").stat().st_size
    assert costs == {"miniclip": 7e6, "transformers": 7e6, "the weights file": size}
    assert memory.unit == "bytes" and memory.form(torch.ones(1, 2)).shape == (1, 2)
    assert [trial()[1].tolist() for trial in startup.trials.values()] == [[[1, 1]]] * 2
    assert [library for _, library in asked] == ["miniclip", "transformers"] * 2
    monkeypatch.setattr(sys, "platform", "darwin")
    assert list(pipeline.memory_suite(setting)) == []


@pytest.mark.slow
def test_the_embed_suite_embeds_four_batches_of_files(setting):
    (case,) = pipeline.embed_suite(replace(setting, batch=8))
    assert (case.count, case.unit) == (32, "images")


# ------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def prepared(monkeypatch):
    """Replace every suite with a function that only records the setting. Return the records."""
    seen = []
    monkeypatch.setattr(suites, "prepare", lambda folder, shape: PUBLISHED[shape])

    def record(name):
        def suite(setting):
            backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
            seen.append((name, setting, [backend.allow_tf32 for backend in backends]))
            return iter(())

        return suite

    for name in bench.SUITES:
        monkeypatch.setitem(bench.SUITES, name, record(name))
    return seen


def test_the_command_passes_each_argument_to_the_suites(prepared, capsys):
    argv = ["--suite", "train", "text", "--shape", "tiny", "--dtype", "bfloat16", "--batch", "5"]
    assert main(["bench", *argv, "--compile"]) == 0
    assert [name for name, *_ in prepared] == ["train", "text"]
    setting = prepared[0][1]
    assert (setting.config, setting.shape, setting.device) == (SHAPE, "tiny", "cpu")
    assert (setting.dtype, setting.compile, setting.batch) == (torch.bfloat16, True, 5)


def test_without_arguments_every_suite_runs(prepared, capsys):
    assert main(["bench"]) == 0
    assert [name for name, *_ in prepared] == list(bench.SUITES) and len(prepared) == 11
    setting = prepared[0][1]
    assert (setting.config, setting.dtype) == (PUBLISHED["B/32"], torch.float32)
    assert not setting.compile and setting.batch == 16


def test_tf32_is_off_during_bench_and_then_restored(prepared, monkeypatch):
    monkeypatch.setattr(suites, "check_device", lambda device: None)
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = True
        bench.bench(["vision"], shape="tiny", device="cuda:1")
        after = [backend.allow_tf32 for backend in backends]
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed
    ((_, setting, during),) = prepared
    assert (setting.device, setting.batch) == ("cuda:1", 256)
    assert during == [False, False] and after == [True, True]


def test_a_dtype_without_a_tolerance_is_an_error():
    with pytest.raises(ValueError, match="float64; expected one of float32, bfloat16, float16"):
        bench.bench(["vision"], dtype=torch.float64)


@pytest.mark.slow
def test_the_command_prints_a_table_or_json_and_draws_it(capsys, tmp_path, monkeypatch, setting):
    def copied(folder, shape):
        shutil.copytree(setting.directory, folder, dirs_exist_ok=True)
        return setting.config

    monkeypatch.setattr(suites, "prepare", copied)
    monkeypatch.setattr(suites, "measure", partial(measure, seconds=0))
    picture = tmp_path / "bench.png"
    argv = ["bench", "--shape", "tiny", "--batch", "2", "--suite", "vision"]
    assert main([*argv, "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80 and picture.stat().st_size > 10_000
    assert "vision: 2 images, tiny, float32" in out
    assert f"torch {torch.__version__.partition('+')[0]}" in out.replace("\n ", "")
    assert err == f"picture: {picture}\n"
    assert main(["bench", "--shape", "tiny", "--batch", "1", "--suite", "vision", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [row["contender"] for row in found["rows"]]
    assert names[:2] == ["miniclip", "transformers"] and names[-1] == "matrix products alone"
    assert found["rows"][1]["difference"] == 0
    assert found["environment"].keys() >= {"Python", "torch", "transformers", "pillow"}
    assert found["environment"]["date"] == str(date.today())
    assert found["environment"]["hardware"].endswith(f", {torch.get_num_threads()} threads")


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
def test_bad_input_gives_a_one_line_error(argv, words, capsys):
    try:
        status = main(["bench", *argv])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("miniclip: error: ") and err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("stderr, reason", [("a\nb: c\n", "b: c"), ("", "it printed no error")])
def test_the_error_says_why_a_new_process_failed(stderr, reason, monkeypatch, tmp_path):
    setting = Setting(tmp_path, SHAPE, "tiny", "cpu", torch.float32, False, 3)
    done = types.SimpleNamespace(returncode=1, stderr=stderr)
    monkeypatch.setattr(pipeline.subprocess, "run", lambda *args, **named: done)
    monkeypatch.setattr(pipeline, "first_inputs", lambda setting: ())
    with pytest.raises(RuntimeError, match=f"miniclip failed in a new process: {reason}$"):
        pipeline.in_process(setting, "miniclip")


@pytest.mark.slow
def test_a_new_process_gives_the_same_logits(setting):
    """The new process uses the dtype of the setting, here bfloat16."""
    exact, half = setting, replace(setting, dtype=torch.bfloat16)
    here, rounded = (
        next(bench.SUITES["load"](one)).trials["miniclip"]()[1] for one in (exact, half)
    )
    peak, logits = pipeline.in_process(half, "miniclip")
    assert 1e6 < peak < 1e9 or sys.platform != "linux"
    assert distance(logits, rounded) < material.MAX_DISTANCE[torch.bfloat16]
    assert distance(logits, here) > 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_library_is_timed_on_a_gpu(monkeypatch):
    monkeypatch.setattr(suites, "measure", partial(measure, seconds=0))
    rows = bench.bench(["vision", "text"], shape="tiny", device="cuda", batch=2)
    assert all(row.cost is not None for row in rows)


@pytest.mark.slow
def test_the_script_for_a_gpu_also_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PUBLISHED, "tiny", SHAPE)
    monkeypatch.setattr(suites, "measure", measure)
    monkeypatch.setitem(suites.SUITES, "memory", lambda setting: iter(()))  # needs new processes
    monkeypatch.setattr(torch, "compile", lambda encoder, mode: encoder)
    # A tiny model reaches none of the script's speed targets, so the exit status is 1.
    assert on_a_gpu.main(["--device", "cpu", "-o", str(tmp_path / "gpu.json")]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "'error'" not in capsys.readouterr().err
    kinds = [name.partition(" ")[0] for name in found]
    assert kinds == ["environment", "product", *["parity"] * 3, *["bench"] * 8]
    assert all(found[name]["first"] is None for name in found if name.startswith("parity"))
    compiled = [row for rows in list(found.values())[-2:] for row in rows]
    assert {row["contender"] for row in compiled} >= {"miniclip, compiled", "transformers"}


def test_the_cost_of_the_large_matrix_product_is_scaled_to_256_images(monkeypatch):
    costs = itertools.count(1.0)
    monkeypatch.setattr(on_a_gpu, "timed", lambda run, device: lambda: (next(costs), run()))
    ((_, (row,)),) = on_a_gpu.large_product("cpu", 8)
    work = 256 * tower_multiply_adds(PUBLISHED["L/14"], "vision")
    assert row.cost[1] == pytest.approx(work / 8**3 * 7.5)  # 7.5 is the median of the costs 3 to 12
    assert row.work in "vision: 256 images, L/14, bfloat16"


def test_the_gpu_script_compares_its_speed_targets_with_ratios_of_medians():
    def row(suite, work, contender, seconds):
        return Row(suite, work, 1, "images", contender, 0.0, (0.0, seconds, 9.0), None)

    large, peer, ours = "256 images, L/14, bfloat16", "transformers", "miniclip, compiled"
    rows = [
        row("vision", "1 image, B/32, float32", ours, 1.0),
        row("vision", "1 image, B/32, float32", peer, 5.0),
        row("vision", "1 image, L/14, float32", ours, 1.0),
        row("vision", "1 image, L/14, float32", peer, 4.0),  # `targets` keeps the smaller ratio
        row("vision", large, ours, 2.0),
        row("vision", large, peer, 3.0),
        row("vision", large, "one large product", 1.5),
        row("train", "the loss", "miniclip", 2.0),
    ]
    assert [found for *_, found in on_a_gpu.targets(rows)][:3] == [4.0, 1.5, 0.75]
    assert math.isnan([*on_a_gpu.targets(rows)][3][2])


# For each axis: two sizes, and the factor by which the work grows. None: not an integer.
GROWN = {
    "images in a batch": ((1, 4), 4),
    "pixels along a side": ((40, 80), None),
    "tokens of a text": ((77, 256), None),
    "labels embedded": ((10, 100), 10),
    "labels ranked": ((10, 100), 10),
    "rows searched": ((1_000, 10_000), 10),
}


@pytest.fixture(scope="module")
def grown():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PUBLISHED, "tiny", SHAPE)
        return bench.growth("tiny", sizes=2)


def test_growth_measures_every_axis_at_two_sizes(grown):
    for (axis, (sizes, factor)), (small, large) in zip(
        GROWN.items(), zip(grown[::2], grown[1::2], strict=True), strict=True
    ):
        assert (small.axis, large.axis) == (axis, axis)
        assert (small.size, large.size) == sizes
        assert small.seconds > 0 and (large.bytes is None or large.bytes >= 0)
        assert large.theory / small.theory == factor or factor is None and large.theory > 4


@pytest.mark.parametrize("tower, tokens", [("vision", 26), ("vision", 101), ("text", 256)])
def test_the_theoretical_growth_includes_attention(grown, tower, tokens):
    """For T tokens and width W, attention adds 2 T^2 W multiply-adds to each block."""
    axis = "pixels along a side" if tower == "vision" else "tokens of a text"
    config = getattr(SHAPE, tower)
    width, blocks = config.width, config.layers
    weights = blocks * (4 * width**2 + 2 * width * config.mlp_width)
    embedding = 3 * 8 * 8 * width * (tokens - 1) if tower == "vision" else 0
    work = tokens * weights + blocks * 2 * tokens**2 * width + embedding + width * SHAPE.embed_dim
    assert work in [row.theory for row in grown if row.axis == axis]


def test_the_growth_table_compares_each_size_with_the_previous_size():
    rows = [bench.Growth("rows", 10**i, s, None, 10.0**i) for i, s in enumerate((1, 5, 100))]
    cells = [line.split()[-1] for line in bench.growth_table(rows).splitlines()[3:]]
    assert cells == ["ms", "0.50", "2.00"]


def test_growth_measures_the_memory_that_the_work_takes():
    took = memory_of(lambda: torch.ones(64, 2**20), "cpu")
    assert took is None or 0.9 < took / 2**28 < 1.2


@pytest.mark.slow
def test_the_growth_option_prints_a_table_or_json_and_draws_it(
    grown, tmp_path, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr("miniclip.commands.bench.keep_freed_memory", lambda: asked.append("memory"))
    monkeypatch.setattr(bench, "growth", lambda *args: asked.append(args) or grown)
    picture = tmp_path / "growth.png"
    argv = ["bench", "--growth", "--shape", "tiny", "--plot", str(picture)]
    assert main(argv) == 0
    assert asked == ["memory", ("tiny", "cpu")]
    table = capsys.readouterr().out
    assert all(axis in table for axis in GROWN) and max(map(len, table.splitlines())) <= 80
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 1000
    assert main([*argv[:-2], "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["axis"] == "images in a batch"


def test_without_transformers_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["bench", "--suite", "tokenizer"]) == 2
    assert "pip install 'miniclip[test]'" in capsys.readouterr().err


@pytest.mark.slow
def test_only_an_engine_with_a_precision_in_its_name_has_a_larger_tolerance(setting, monkeypatch):
    """If the outputs differ, the table says by how much."""
    off = engines.Engine(lambda tower: lambda x: 1.01 * tower(x) + 0.001, (), 5e-2)
    exact = engines.Engine(lambda tower: lambda x: tower(x).clone())
    monkeypatch.setitem(engines.ENGINES, "copy-bf16", off)
    monkeypatch.setitem(engines.ENGINES, "copy", exact)
    asked = replace(setting, engines=("copy", "copy-bf16"))
    rows = {row.contender: row for row in measure(next(models.vision_suite(asked)), seconds=0)}
    assert rows["copy"].difference == 0 and rows["copy"].cost is not None
    assert 1e-5 < rows["copy-bf16"].difference < 5e-2 and rows["copy-bf16"].cost is not None
    far = rows["copy-bf16"]._replace(difference=0.009)
    assert table([far]).endswith("its output differs from miniclip's by 9e-03")
    assert table([rows["copy"]]).count("\n") == 3
