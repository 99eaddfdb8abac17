"""Engines return the tower's outputs, notice a changed model, and work in miniclip's commands."""

import copy
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch import nn
from twin import TINY, assert_far, random_inputs, twins

import miniclip
from miniclip import engines, surgery
from miniclip.commands.main import main
from miniclip.engines import ENGINES, Engine, engine_of, on_engine, use_engine, use_fastest
from miniclip.errors import ContextLengthError
from miniclip.evaluation.features import picture_features

# The compilers and exporters of torch 2.13 raise these warnings about their own code.
EXPORTER = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def copied(tower, error=0.0):
    """An engine that needs no package: a copy of the tower. `error` is added to its output."""
    frozen = copy.deepcopy(tower)
    return lambda x: frozen(x) + error * torch.arange(TINY.embed_dim)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setitem(ENGINES, "copy", Engine(copied))
    monkeypatch.setitem(ENGINES, "wrong", Engine(lambda tower: copied(tower, 1e-2)))


@pytest.fixture
def model():
    return twins(TINY)[0]


PIXELS, IDS = random_inputs(TINY)


# --------------------------------------------------------------------------------- the same numbers


@EXPORTER
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ENGINES if name != "eager"])
def test_an_engine_gives_the_outputs_of_the_tower_for_every_input_size(name, model, capfd, caplog):
    if missing := ENGINES[name].missing:
        pytest.skip(f"needs {', '.join(missing)}")
    if name.startswith("compile") and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("needs a C++ compiler")
    for tower in (model.vision, model.text):
        del tower.blocks[1:]  # compilers take seconds for each block
    unmasked = copy.deepcopy(model)
    unmasked.text.blocks[0].attn.causal = False
    bound = ENGINES[name].tolerance
    vision, text = on_engine(model.vision, name), on_engine(model.text, name)
    sizes = [(3, 3, 9), (5, 2, 20), (1, 1, 2)]
    if name.startswith("compile"):  # the second size compiles again, which takes seconds
        sizes = sizes[: 2 if name == "compile" else 1]
    for images, texts, tokens in sizes:
        pixels, ids = random_inputs(TINY, images, texts, tokens, seed=4)
        with torch.inference_mode():
            found = vision(pixels.double()), text(ids.int())
        for one, tower, x in zip(found, (model.vision, model.text), (pixels, ids), strict=True):
            assert one.dtype == torch.float32 and not one.requires_grad
            one, other = (t / t.norm(dim=-1, keepdim=True) for t in (one, tower(x).detach()))
            assert (one - other).abs().max() <= bound
        if bound < 1e-3 and tokens > 2:
            assert_far(found[1], unmasked.text(ids))
    assert capfd.readouterr().err == ""
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]


DELETED_IN_A_THREAD = """
import gc, signal, threading
from miniclip import load
from miniclip.engines import on_engine

model, tokenizer, _ = load("shapes")
engines = [on_engine(model.text, "openvino")]
engines[0](tokenizer(["a cat"]))
thread = threading.Thread(target=lambda: (engines.clear(), gc.collect()))
thread.start()
thread.join()
try:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.slow
def test_control_c_still_works_after_another_thread_deleted_an_engine():
    if missing := ENGINES["openvino"].missing:
        pytest.skip(f"needs {', '.join(missing)}")
    command = [sys.executable, "-c", DELETED_IN_A_THREAD]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "stopped\n"), run.stderr


def test_only_float32_engines_have_a_tolerance_of_2e_5():
    bounds = {name: ENGINES[name].tolerance for name in engines.FLOAT32}
    assert {*bounds.values()} == {2e-5}
    assert all(e.tolerance > 1e-2 for name, e in ENGINES.items() if "-" in name)


def test_the_error_for_a_missing_engine_says_what_to_install(monkeypatch, model):
    monkeypatch.setitem(ENGINES, "copy", Engine(copied, ("os", "no_such_package")))
    with pytest.raises(ValueError, match="copy is not installed: pip install no_such_package$"):
        on_engine(model.vision, "copy")
    with pytest.raises(ValueError, match="no engine is called 'onnx'; expected eager, compile, "):
        on_engine(model.vision, "onnx")


def test_an_engine_with_wrong_outputs_raises_an_error_at_its_first_batch(model):
    encode = on_engine(model.vision, "wrong")
    with pytest.raises(ValueError, match=r"wrong differs from .*, expected at most 2e-05"):
        encode(PIXELS)
    nan = Engine(lambda tower: lambda x: torch.full((len(x), 36), torch.nan))
    ENGINES["wrong"] = nan
    with pytest.raises(ValueError, match="differs from the tower by nan"):
        on_engine(model.vision, "wrong")(PIXELS)


def test_an_engine_in_half_precision_has_a_larger_tolerance(model):
    vision = model.vision.bfloat16()
    ENGINES["copy"] = Engine(lambda tower: copied(tower, 2e-3))
    assert on_engine(vision, "copy")(PIXELS).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="expected at most 6e-02"):
        on_engine(vision, "wrong")(PIXELS)
    with pytest.raises(ValueError, match="found torch.bfloat16: load the model in float32, or use"):
        engines.write_onnx(vision, None)


def test_an_engine_accepts_an_empty_batch_and_checks_the_next_batch(model):
    encode = on_engine(model.vision, "wrong")
    assert encode(PIXELS[:0]).shape == (0, 36)
    with pytest.raises(ValueError, match="wrong differs from"):
        encode(PIXELS)


def test_a_tower_made_in_inference_mode_cannot_be_put_on_an_engine(model):
    with torch.inference_mode():
        made = copy.deepcopy(model.vision)
    with pytest.raises(ValueError, match=r"was made in inference mode.*outside torch.inference_m"):
        on_engine(made, "copy")


def test_an_engine_checks_its_inputs_as_the_tower_does(model):
    vision, text = on_engine(model.vision, "copy"), on_engine(model.text, "copy")
    with pytest.raises(ValueError, match="For one image, add the batch"):
        vision(PIXELS[0])
    with pytest.raises(ValueError, match="has no end token"):
        text(torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="this text tower knows 0 to 599"):
        text(torch.full((1, 4), 600))
    with pytest.raises(ContextLengthError, match="texts of 21 tokens; expected at most 20"):
        text(torch.full((1, 21), 599))
    with pytest.raises(ValueError, match="an engine has no gradients"):
        vision(PIXELS.clone().requires_grad_())


# ----------------------------------------------------------------------------------- the snapshot


def set_weight(tower):
    tower.blocks[1].mlp.fc1.weight = nn.Parameter(tower.blocks[1].mlp.fc1.weight.detach().clone())


def edit_weight(tower):
    with torch.no_grad():
        tower.blocks[1].mlp.fc1.weight[3, 4] += 1


def move_data(tower):
    fc1 = tower.blocks[1].mlp.fc1
    fc1.weight.data = fc1.weight.data.clone()


CHANGES = {
    "edit": edit_weight,
    "replaced parameter": set_weight,
    "other memory": move_data,
    "load_state_dict": lambda tower: tower.load_state_dict(tower.state_dict()),
    "bfloat16": lambda tower: tower.bfloat16(),
    "replaced module": lambda tower: setattr(tower.blocks[1].mlp, "act", nn.GELU()),
    "a block less": lambda tower: tower.blocks.pop(2),
    "setting": lambda tower: setattr(tower.blocks[1].attn, "causal", True),
    "epsilon": lambda tower: setattr(tower.ln_post, "eps", 1e-3),
    "patched forward": lambda tower: setattr(tower.ln_post, "forward", lambda x: x),
    "patched method": lambda tower: setattr(tower, "pool", lambda x: x[:, 1]),
    "training mode": lambda tower: tower.train(),
    "plain tensor": lambda tower: tower.offset.add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_an_engine_raises_an_error_after_a_change_of_its_tower(change, model):
    model.vision.offset = torch.zeros(2)  # a tensor that is neither a parameter nor a buffer
    encode = on_engine(model.vision, "copy")
    assert torch.equal(encode(PIXELS), model.vision(PIXELS))
    change(model.vision)
    with pytest.raises(ValueError, match="has changed since the tower was put on the engine copy"):
        encode(PIXELS)


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda *args: None),
    "forward_pre": lambda m: m.register_forward_pre_hook(lambda *args: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *args: None),
    "backward_pre": lambda m: m.register_full_backward_pre_hook(lambda *args: None),
    "global": lambda m: nn.modules.module.register_module_forward_hook(lambda *args: None),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS.keys())
def test_an_engine_raises_an_error_if_its_tower_has_a_hook(register, model):
    encode = on_engine(model.vision, "copy")
    handle = register(model.vision.blocks[0].attn.q)
    try:
        with pytest.raises(ValueError, match="has a hook, which an engine cannot call"):
            encode(PIXELS)
        with pytest.raises(ValueError, match="has a hook"):
            on_engine(model.vision, "copy")
    finally:
        handle.remove()
    assert torch.equal(encode(PIXELS), model.vision(PIXELS))


def test_a_model_gives_the_same_logits_with_and_without_an_engine(model):
    expected = model(PIXELS, IDS)
    use_engine(model, "copy")
    assert engine_of(model) == "copy"
    assert torch.equal(model(PIXELS, IDS).logits_per_image, expected.logits_per_image)
    for other in (copy.deepcopy(model), surgery.prune_neurons(model, "vision", {0: [1]}), model):
        if other is model:
            model.vision = copy.deepcopy(model.vision)
        with pytest.raises(ValueError, match="replaced or copied .*: call use_engine again"):
            other.encode_image(PIXELS)
        use_engine(other, "eager")
        assert torch.equal(other.encode_image(PIXELS), other.vision(PIXELS))


def test_use_engine_raises_an_error_for_a_fork_that_overrides_encode_image():
    class Louder(miniclip.CLIP):
        def encode_image(self, pixels, normalize=False):
            return 2 * super().encode_image(pixels, normalize)

    with pytest.raises(ValueError, match="Louder has its own encode_image"):
        use_engine(Louder(TINY), "copy")


def raise_own_error(tower):
    raise Exception("not implemented")  # like ONNX Runtime's errors, this is not a RuntimeError


def test_use_fastest_selects_the_fastest_engine_with_correct_outputs(monkeypatch, model):
    monkeypatch.setattr(engines, "FLOAT32", ("eager", "wrong", "copy"))
    times = iter(itertools.accumulate(itertools.cycle([0.0, 3.0, 0.0, 1.5])))
    monkeypatch.setattr(engines.time, "perf_counter", lambda: next(times))
    about = use_fastest(model, [*PIXELS])
    assert about.startswith("engine copy, 2.00 times as fast as eager; left out: the engine wrong")
    assert engine_of(model) == "copy"
    ENGINES["wrong"] = Engine(raise_own_error)
    assert "left out: not implemented" in use_fastest(model, [*PIXELS])
    assert "no image could be read" in use_fastest(model, [])


# ----------------------------------------------------------------------------------- the commands


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ENGINES, "onnxruntime", Engine(lambda tower: copy.deepcopy(tower)))
    for label in ("cat", "dog"):
        os.makedirs(f"pictures/{label}")
        Image.new("RGB", (70, 64), "red").save(f"pictures/{label}/{label}.png")


@pytest.mark.parametrize(
    "line",
    [
        "classify pictures/cat/cat.png --labels cat dog",
        "eval pictures",
        "embed pictures --out index.safetensors",
    ],
)
def test_classify_eval_and_embed_use_the_given_engine(line, pictures, monkeypatch):
    used = []
    monkeypatch.setattr(
        "miniclip.engines.use_engine", lambda m, name: used.append(name) or use_engine(m, name)
    )
    assert main([*line.split(), "--model", "shapes", "--engine", "onnxruntime"]) == 0
    assert used == ["onnxruntime"]


def test_features_of_two_engines_are_cached_in_different_files(pictures):
    files = ["pictures/cat/cat.png"]
    kinds = {}
    for name in ("eager", "onnxruntime"):
        loaded = miniclip.load("shapes")
        if name != "eager":
            use_engine(loaded.model, name)
        kinds[name] = {*picture_features(loaded, files, cache="kept").vectors}
    assert kinds == {"eager": {"proj", "ln_post"}, "onnxruntime": {"proj"}}
    assert len(os.listdir("kept")) == 3


def test_embed_continues_an_index_only_with_the_engine_that_began_it(
    pictures, monkeypatch, tmp_path
):
    """An index must not mix two engines, because their rounding errors differ."""
    building = importlib.import_module("miniclip.retrieval.building")
    seen = []
    monkeypatch.setattr(building, "sha256", lambda key: seen.append(key) or FakeDigest())
    for engine in ("eager", "onnxruntime"):
        main(f"embed pictures --out {engine} --model shapes --engine {engine}".split())
    assert len({*seen}) == 2


class FakeDigest:
    def hexdigest(self):
        return "0" * 64


@pytest.mark.parametrize(("name", "status"), [("onnxruntime", 0), ("openvino", 1)])
def test_parity_fails_only_if_an_engine_exceeds_its_tolerances(
    name, status, pictures, monkeypatch, capsys
):
    def off(tower):
        frozen = copy.deepcopy(tower)
        return lambda x: frozen(x) * torch.linspace(1, 1.001, 128)

    monkeypatch.setitem(ENGINES, "openvino", Engine(off))
    assert main(["parity", "shapes", "--engine", name, "--json"]) == status
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["what"] for row in rows] == ["image_embeds", "text_embeds", "logits"]
    assert all((row["difference"] > row["tolerance"]) == bool(status) for row in rows[:2])
    assert main(["parity", "shapes", "--engine", name]) == status
    assert "logits" in capsys.readouterr().out
    assert main(["parity", "shapes", "--engine", name, "--grad"]) == 2
    assert main(["parity", "shapes", "--engine", name, "--dtype", "bfloat16"]) == 2
