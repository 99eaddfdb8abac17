"""Loading and saving: transformers' layout, directories, files, shards, and damaged files."""

import json
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import HashStore
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPModel, CLIPVisionModelWithProjection
from twin import TINY, randomize, tokenizer_of, transformers_config, twins, write_shards

from miniclip import (
    CLIP,
    CheckpointError,
    CLIPConfig,
    TextConfig,
    TextTower,
    Tokenizer,
    VisionTower,
    load,
    save,
)
from miniclip.commands.main import main
from miniclip.convert import convert
from miniclip.files.hub import embedded_names, resolve
from miniclip.files.tensors import read_tensors
from miniclip.model import Block
from miniclip.transform import ImageTransform


@pytest.fixture(scope="module")
def model():
    return twins(TINY)[0]


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    vision, text = TINY.vision, TINY.text
    pixels = torch.randn(
        3, vision.channels, vision.image_size, vision.image_size, generator=generator
    )
    ids = torch.randint(0, text.vocab_size, (2, 9), generator=generator)
    ids[:, -1] = text.eos_token_id
    return pixels, ids


def rewrite(directory, change):
    """Change the dictionary of tensors in a saved checkpoint."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def assert_same_logits(model, peer, pixels, ids):
    ours = model(pixels, ids).logits_per_image
    theirs = peer(pixel_values=pixels, input_ids=ids).logits_per_image
    assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------- OpenAI's own file


@pytest.fixture(scope="module")
def official(data, tmp_path_factory):
    """A copy of openai/clip-vit-base-patch32 with random numbers in the tensors."""
    header = json.loads(
        (data / "headers/openai_clip-vit-base-patch32.reconstructed_header.json").read_text()
    )
    header.pop("__metadata__")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, entry in header.items():
        shape = entry["shape"]
        if entry["dtype"] == "I64":
            tensors[name] = torch.arange(shape[-1])[None]
        else:
            tensors[name] = torch.empty(shape).uniform_(-0.05, 0.05, generator=generator)
            if re.search(r"norm\d?\.weight|layrnorm\.weight", name):
                tensors[name] += 1
    tensors["logit_scale"] = torch.tensor(100.0).log()
    directory = tmp_path_factory.mktemp("official")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tower = {"layer_norm_eps": 1e-05, "hidden_act": "quick_gelu", "num_hidden_layers": 12}
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8} | tower
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12} | tower
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 512,
        "logit_scale_init_value": 2.6592,
        "text_config": text | {"eos_token_id": 2, "bos_token_id": 0, "projection_dim": 768},
        "text_config_dict": text | {"eos_token_id": 2, "projection_dim": 768},
        "vision_config": vision | {"image_size": 224, "patch_size": 32, "projection_dim": 768},
        "vision_config_dict": None,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.slow
def test_a_file_like_openai_clip_vit_base_patch32_gives_the_logits_of_transformers(official):
    assert (official / "model.safetensors").stat().st_size == 605_157_884
    assert len(load_file(official / "model.safetensors")) == 400
    model = CLIP.from_pretrained(official)
    peer = CLIPModel.from_pretrained(official, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 224, 224, generator=generator)
    ids = torch.randint(0, 49406, (3, 12), generator=generator)
    ids[:, 8:] = 49407
    assert model.config.text.eos_token_id == 2
    assert_same_logits(model, peer, pixels, ids)


# One process imports torch. Each load runs in a copy (os.fork) of this process.
PEAKS = """
import os, sys, torch
from miniclip import CLIP

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

for case in sys.argv[1:]:
    if not os.fork():
        path, dtype = case.split(":")
        before = peak()
        model = CLIP.from_pretrained(path, dtype=getattr(torch, dtype))
        total = sum(parameter.sum() for parameter in model.parameters())
        print(case, peak() - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak from")
def test_loading_needs_only_the_memory_of_the_weights_in_the_requested_dtype(tmp_path):
    """One tensor is a third of the file. If it came last, the memory would exceed the limit."""
    vision = replace(TINY.vision, mlp_width=60_000)
    text = replace(TINY.text, mlp_width=60_000, vocab_size=400_000)
    with torch.device("meta"):
        model = CLIP(replace(TINY, vision=vision, text=text))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    model.save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    for form in ("shards", "zip", "legacy"):
        (tmp_path / form).mkdir()
        shutil.copy(tmp_path / "whole" / "config.json", tmp_path / form)
    write_shards(tmp_path / "shards", tensors, "model.safetensors")
    for form in ("zip", "legacy"):
        path = tmp_path / form / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    sizes = {f"{tmp_path / 'whole'}:float32": size, f"{tmp_path / 'whole'}:float16": size / 2}
    sizes |= {f"{tmp_path / form}:bfloat16": size / 2 for form in ("shards", "zip", "legacy")}
    command = [sys.executable, "-W", "ignore", "-c", PEAKS, *sizes]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peaks = dict(line.rsplit(" ", 1) for line in out.splitlines())
    assert peaks.keys() == sizes.keys()
    largest = tensors["text_model.embeddings.token_embedding.weight"].nbytes
    for case, least in sizes.items():
        most = least + 40e6 + largest * ("legacy" in case)  # unaligned tensors are copied
        assert 0.9 * least < int(peaks[case]) < most, (case, least, peaks[case])


# -------------------------------------------------------------------------------------- round trips


def test_transformers_loads_what_we_save(model, saved, inputs):
    assert_same_logits(model, CLIPModel.from_pretrained(saved, dtype=torch.float32).eval(), *inputs)


def test_we_load_what_transformers_saves(tmp_path, inputs):
    model, peer = twins(TINY)
    peer.save_pretrained(tmp_path)
    assert_same_logits(CLIP.from_pretrained(tmp_path), peer, *inputs)


def test_we_load_the_shards_that_transformers_saves(tmp_path, inputs):
    model, peer = twins(TINY)
    peer.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_same_logits(CLIP.from_pretrained(tmp_path), peer, *inputs)


def test_load_save_load_is_bit_exact(model, saved, tmp_path):
    again = CLIP.from_pretrained(saved)
    again.save_pretrained(tmp_path / "again")
    assert_same_weights(model, again)
    for name in ("model.safetensors", "config.json"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_loaded_model_can_be_saved_over_the_file_it_was_loaded_from(model, saved):
    loaded = CLIP.from_pretrained(saved)
    loaded.save_pretrained(saved)
    assert_same_weights(loaded, model)
    assert_same_weights(CLIP.from_pretrained(saved), model)


def test_changing_a_loaded_model_does_not_change_the_file(model, saved):
    loaded = CLIP.from_pretrained(saved)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert_same_weights(CLIP.from_pretrained(saved), model)


def test_a_single_file_is_loaded_with_the_config_beside_it(model, saved):
    assert_same_weights(CLIP.from_pretrained(saved / "model.safetensors"), model)


def as_pickle(directory, zipped):
    """Replace model.safetensors by pytorch_model.bin."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


ZIPPED = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@ZIPPED
def test_changing_weights_loaded_from_a_pickle_does_not_change_the_pickle(model, saved, zipped):
    as_pickle(saved, zipped)
    loaded = CLIP.from_pretrained(saved)
    assert_same_weights(loaded, model)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert_same_weights(CLIP.from_pretrained(saved), model)


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool),
)


@ZIPPED
def test_pickled_tensors_equal_the_tensors_that_torch_load_returns(tmp_path, zipped):
    """The tensors have all dtypes. Some are views of others, such as a transpose or a slice."""
    whole = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    tensors = {str(dtype): torch.tensor([[0, 1, 2], [3, 5, 117]]).to(dtype) for dtype in DTYPES}
    tensors |= {"t": whole.T, "part": whole[2:4, 3:7], "steps": whole[::2, ::3], "empty": whole[:0]}
    tensors |= {"whole": whole, "again": whole}
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    theirs, ours = torch.load(tmp_path / "x.bin"), read_tensors(tmp_path / "x.bin")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
        assert tensor.data_ptr() % tensor.element_size() == 0, name  # torch needs aligned memory


def test_a_tensor_in_a_pickle_may_have_two_names_but_not_three(tmp_path):
    """A view takes no space in a file, but a converted view has its own memory."""
    weight = torch.ones(10**5)
    torch.save({"one": weight, "two": weight}, tmp_path / "x.bin")
    assert len(read_tensors(tmp_path / "x.bin")) == 2
    torch.save({"one": weight, "two": weight, "three": weight}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="its tensors would have 1,200,000 bytes"):
        read_tensors(tmp_path / "x.bin")


@ZIPPED
def test_training_state_beside_the_tensors_is_ignored(tmp_path, zipped):
    """An optimizer's state has numbers as keys, and a scheduler's state has a Counter."""
    from collections import Counter

    linear = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(3)).sum().backward()
    optimizer.step()
    training = {"epoch": 3, "optimizer": optimizer.state_dict(), "milestones": Counter({4: 1})}
    training |= {"size": torch.Size([2, 3]), "device": torch.device("cpu"), "on": True, "lr": 0.5}
    training |= {"state_dict": linear.state_dict()}
    torch.save(training, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    read = read_tensors(tmp_path / "x.pt")
    assert read.keys() == {"weight", "bias"} and torch.equal(read["weight"], linear.weight)


@pytest.mark.slow
@pytest.mark.sweep(2)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_file_may_have_at_most_ten_thousand_tensors(tmp_path, suffix):
    write = save_file if suffix == "safetensors" else torch.save
    one = torch.zeros(0)  # all names share one tensor, so that the pickle stays below 400 kB
    tensors = {f"t{i}": one for i in range(10_000)}
    write(tensors, tmp_path / f"x.{suffix}")
    assert read_tensors(tmp_path / f"x.{suffix}").keys() == tensors.keys()
    write(tensors | {"more": one}, tmp_path / f"x.{suffix}")
    with pytest.raises(CheckpointError, match="expected .* tensors, found 10,001"):
        read_tensors(tmp_path / f"x.{suffix}")


def test_a_safetensors_header_may_have_at_most_six_million_bytes(tmp_path):
    header = b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    for length in (6_000_000, 6_000_001):
        data = length.to_bytes(8, "little") + header.ljust(length) + bytes(4)
        (tmp_path / f"{length}.safetensors").write_bytes(data)
    assert read_tensors(tmp_path / "6000000.safetensors") == {"x": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="at most 6,000,000 bytes, found 6,000,001"):
        read_tensors(tmp_path / "6000001.safetensors")


def test_loading_prefers_safetensors_to_pickles(model, saved):
    (saved / "pytorch_model.bin").write_bytes(b"not read")
    assert_same_weights(CLIP.from_pretrained(saved), model)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_read_as_one_checkpoint(model, saved, name):
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    write_shards(saved, tensors, name)
    assert_same_weights(CLIP.from_pretrained(saved), model)
    half = CLIP.from_pretrained(saved, dtype=torch.float16)
    assert_same_weights(half, twins(TINY)[0].half())


@pytest.mark.parametrize("read", [CLIP, VisionTower, TextTower])
def test_a_loaded_model_has_the_requested_device_and_dtype_and_is_in_eval_mode(saved, read):
    for model in (read.from_pretrained(saved), read.from_pretrained(saved, device="meta")):
        assert not any(module.training for module in model.modules())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    half = read.from_pretrained(saved, dtype=torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


def test_load_passes_each_option_to_the_model_or_to_the_tokenizer_and_transform(model, tmp_path):
    tokenizer = tokenizer_of(TINY)
    save(tmp_path, model, tokenizer, ImageTransform(TINY.vision.image_size))
    loaded = load(tmp_path, device="meta", dtype=torch.bfloat16, reference="openai")
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.model.logit_scale.device.type == "meta"
    assert loaded.model.logit_scale.dtype == torch.bfloat16
    assert loaded.tokenizer.reference == loaded.transform.reference == "openai"
    plain = load(tmp_path)
    assert plain.tokenizer.reference == plain.transform.reference == "transformers"
    assert plain.model.logit_scale.dtype == torch.float32


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_the_error_names_a_device_that_cannot_be_used(saved, device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used: .+"):
        CLIP.from_pretrained(saved, device=device)


@pytest.mark.parametrize("read", [load, CLIP.from_pretrained, TextTower.from_pretrained])
@pytest.mark.parametrize("option", [{"device": "nowhere"}, {"dtype": torch.int8}])
def test_loading_checks_the_device_and_the_dtype_before_it_looks_for_the_checkpoint(read, option):
    with pytest.raises(ValueError, match="device 'nowhere' cannot|dtype is torch.int8"):
        read("no such checkpoint", **option)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_loaded_weights_have_the_requested_dtype(model, saved, dtype):
    loaded = CLIP.from_pretrained(saved, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_same_weights(loaded, twins(TINY)[0].to(dtype))


def test_loading_checks_position_ids_and_drops_them(model, saved):
    name = "text_model.embeddings.position_ids"
    rewrite(saved, lambda tensors: tensors.update({name: torch.arange(20)[None]}))
    assert_same_weights(CLIP.from_pretrained(saved), model)
    rewrite(saved, lambda tensors: tensors.update({name: torch.arange(20).flip(0)[None]}))
    with pytest.raises(CheckpointError, match="position_ids is not 0, 1, 2"):
        CLIP.from_pretrained(saved)


@pytest.mark.parametrize(
    "name, ids, complaint",
    [
        ("text_model.embeddings.position_ids", torch.ones(20, dtype=torch.bool), "is not 0, 1, 2"),
        ("vision_model.embeddings.position_ids", torch.arange(26).to(torch.uint16), None),
        ("audio_model.embeddings.position_ids", torch.arange(26), "unexpected: audio_model"),
    ],
)
def test_position_ids_must_be_integers_and_belong_to_a_tower(model, saved, name, ids, complaint):
    rewrite(saved, lambda tensors: tensors.update({name: ids}))
    if complaint is None:
        return assert_same_weights(CLIP.from_pretrained(saved), model)
    with pytest.raises(CheckpointError, match=complaint):
        CLIP.from_pretrained(saved)


def test_save_writes_all_files_that_load_needs_and_changes_no_unrelated_file(model, tmp_path):
    tokenizer = tokenizer_of(TINY)
    transform = ImageTransform(TINY.vision.image_size)
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, model, tokenizer, transform)
    loaded = load(tmp_path)
    assert_same_weights(loaded.model, model)
    assert torch.equal(loaded.tokenizer(["a cat"]), tokenizer(["a cat"]))
    assert loaded.transform.size == transform.size
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


def test_a_new_file_has_default_permissions_and_a_replaced_file_keeps_its_permissions(model, saved):
    (saved / "new").touch()
    usual = (saved / "new").stat().st_mode
    assert {path.stat().st_mode for path in saved.iterdir()} == {usual}
    (saved / "model.safetensors").chmod(0o640)
    model.save_pretrained(saved)
    assert (saved / "model.safetensors").stat().st_mode & 0o777 == 0o640
    assert (saved / "config.json").stat().st_mode == usual


def test_an_interrupted_save_leaves_the_old_checkpoint(model, saved, monkeypatch):
    def power_cut(*args, **kwargs):
        raise KeyboardInterrupt

    changed = CLIP.from_pretrained(saved)
    torch.nn.init.zeros_(changed.vision.class_embed)
    monkeypatch.setattr("os.replace", power_cut)
    with pytest.raises(KeyboardInterrupt):
        changed.save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_weights(CLIP.from_pretrained(saved), model)


def put(path, value):
    """Return a function that sets the attribute `path` of a model to `value`."""
    part, _, name = path.rpartition(".")
    return lambda model: setattr(model.get_submodule(part), name, value)


def exchange_blocks(model):
    first, second, *rest = model.vision.blocks.named_children()
    model.vision.blocks = nn.Sequential(OrderedDict([second, first, *rest]))


class OtherLinear(nn.Linear):
    pass


def replace_linear(model):
    old = model.text.blocks[1].mlp.fc2
    model.text.blocks[1].mlp.fc2 = OtherLinear(old.in_features, old.out_features)


def drop(model):
    model.vision.blocks[0].mlp = nn.Sequential(model.vision.blocks[0].mlp, nn.Dropout())


UNDESCRIBED = [
    (put("vision.blocks.0", nn.Identity()), "vision.blocks.0 is Identity, expected Block"),
    (put("text.proj", nn.Identity()), "text.proj is Identity, expected Linear"),
    (put("text.blocks.1.attn.v_proj", nn.Linear(40, 20)), "v_proj.out_features is 20, expected 40"),
    (put("text.adapter", nn.Linear(2, 2)), "text.adapter is Linear, expected absent"),
    (put("text.blocks.0.mlp.act", nn.GELU()), "text.blocks.0.mlp.act is GELU, expected QuickGELU"),
    (put("vision.ln_post.eps", 1e-6), "vision.ln_post.eps is 1e-06, expected 2e-05"),
    (put("vision.blocks.2.attn.causal", True), "2.attn.causal is True, expected False"),
    (put("text.blocks.0.attn.head_width", 10), "text.blocks.0.attn.head_width is 10, expected 20"),
    (put("vision.patch_embed.padding", (1, 1)), "patch_embed.padding is (1, 1), expected (0, 0)"),
    (put("vision.blocks.0.attn.k", nn.Linear(12, 12)), "0.attn.k is Linear, expected Site"),
    (put("text.token_embed.max_norm", 1.0), "text.token_embed.max_norm is 1.0, expected None"),
    (put("text.blocks.0.mlp.fc1.bias", None), "fc1.bias is 'absent', expected 'a Parameter (92,)'"),
    (put("text.model_type", "mine"), "text.model_type is 'mine', expected 'clip'"),
    (put("text.config", TextConfig()), "text.config is TextConfig(width=512"),
    (lambda m: m.text.register_buffer("table", torch.ones(2), persistent=False), "text.table is"),
    (lambda m: m.text.register_buffer("table", torch.ones(2)), "text.table is 'a Tensor (2,)'"),
    (exchange_blocks, "vision.blocks.parts is ['1', '0', '2'], expected ['0', '1', '2']"),
    (replace_linear, "text.blocks.1.mlp.fc2 is OtherLinear, expected Linear"),
    (drop, "vision.blocks.0.mlp is Sequential, expected MLP"),
    (lambda m: nn.utils.parametrizations.weight_norm(m.text.proj), "proj is ParametrizedLinear"),
]  # fmt: skip


@pytest.mark.parametrize("change, words", UNDESCRIBED, ids=[words for _, words in UNDESCRIBED])
@pytest.mark.sweep(4)
def test_saving_raises_an_error_if_the_config_does_not_describe_the_model(saved, change, words):
    changed, before = CLIP.from_pretrained(saved), (saved / "model.safetensors").read_bytes()
    change(changed)
    with pytest.raises(CheckpointError, match="not saved: the config does not .*merge") as error:
        changed.save_pretrained(saved)
    assert words in str(error.value)
    assert (saved / "model.safetensors").read_bytes() == before


def test_hooks_and_requires_grad_and_the_kind_of_attention_are_not_saved(saved, tmp_path):
    """Hooks, the kind of attention, requires_grad and activation checkpointing are not saved."""
    model = CLIP.from_pretrained(saved).train().requires_grad_(False)
    model.set_attention("eager")
    model.vision.note = "mine"
    block = model.vision.blocks[0]
    block.register_forward_hook(lambda *args: 0 * args[-1])
    block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward)
    model.save_pretrained(tmp_path / "again")
    assert_same_weights(CLIP.from_pretrained(tmp_path / "again"), model)
    block.forward = torch.zeros_like
    with pytest.warns(UserWarning, match="vision.blocks.0.forward is patched, which a config"):
        model.save_pretrained(tmp_path / "again")


@pytest.fixture
def alone():
    """A process group of one process, which the wrappers of torch.distributed need."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrap_blocks(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    return model


def compile_tower(model):
    model.vision = torch.compile(model.vision)
    return model


def shard(model):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for part in (*model.text.blocks, model.vision):
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch.*")
@pytest.mark.parametrize("wrap", [
    torch.compile, compile_tower, DistributedDataParallel, wrap_blocks, shard,
    lambda model: AveragedModel(torch.compile(model)),
])  # fmt: skip
def test_a_wrapped_model_is_saved_without_its_wrapper(saved, tmp_path, wrap, alone):
    expected, folder = CLIP.from_pretrained(saved), tmp_path / "again"
    save(folder, wrap(CLIP.from_pretrained(saved)), None, None)
    assert_same_weights(CLIP.from_pretrained(folder), expected)
    assert (folder / "config.json").read_bytes() == (saved / "config.json").read_bytes()


def tied(model):
    model.text.blocks[0].mlp.fc1.weight = model.text.blocks[1].mlp.fc1.weight


def without_data(model):
    model.to("meta")


@pytest.mark.parametrize(
    "change, says", [(tied, "than one name.*fc1.weight"), (without_data, "cannot save here: .+")]
)
def test_saving_tied_weights_or_meta_weights_raises_a_checkpoint_error(saved, change, says):
    changed = CLIP.from_pretrained(saved)
    change(changed)
    with pytest.raises(CheckpointError, match=says):
        changed.save_pretrained(saved)


@pytest.mark.parametrize("place", ["file", "file/below", "folder"])
def test_saving_to_a_path_that_cannot_be_written_raises_a_checkpoint_error(model, tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"{place}: cannot save here: "):
        model.save_pretrained(tmp_path / place)
    assert not list(tmp_path.glob("*/.*"))


# ---------------------------------------------------------------------------------------- bad input


def test_the_error_lists_all_missing_and_unexpected_tensors_and_wrong_shapes(saved):
    def damage(tensors):
        del tensors["logit_scale"]
        tensors["visual_projection.weight"] = tensors["visual_projection.weight"].T.contiguous()
        tensors["extra.bias"] = torch.zeros(3)

    rewrite(saved, damage)
    with pytest.raises(CheckpointError) as caught:
        CLIP.from_pretrained(saved)
    message = str(caught.value)
    wide, high = TINY.vision.width, TINY.embed_dim
    assert "3 tensors do not fit" in message.splitlines()[0]
    assert "missing: logit_scale ()" in message
    assert "unexpected: extra.bias (3,)" in message
    assert (
        f"visual_projection.weight ({wide}, {high}), miniclip's vision.proj.weight ({high}, {wide})"
        in message
    )


def test_an_error_lists_at_most_a_thousand_tensors_and_counts_all_of_them(saved):
    more = {f"more{i}": torch.zeros(1) for i in range(1500)}
    rewrite(saved, lambda tensors: tensors.update(more))
    with pytest.raises(
        CheckpointError, match="1500 tensors do not fit the model .* unexpected: mo"
    ) as it:
        CLIP.from_pretrained(saved)
    assert str(it.value).count("\nunexpected: more") == 1000


def test_an_error_about_many_tensors_names_three_and_counts_the_rest(saved):
    names = [f"vision_model.encoder.layers.{i}.mlp.fc{j}.bias" for i in range(3) for j in (1, 2)]
    index = {"weight_map": dict.fromkeys(names, "a.safetensors")}
    save_file({"x": torch.zeros(1)}, saved / "a.safetensors")
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"6 tensors .*: {', '.join(names[:3])} and 3 more$"):
        CLIP.from_pretrained(saved)


def integer_weights(tensors):
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"].to(torch.int8)


def without_a_layer(tower):
    def change(tensors):
        for name in [name for name in tensors if re.match(rf"{tower}_model.*layers\.0\.", name)]:
            del tensors[name]

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (integer_weights, "torch.int8, expected floating"),
        (without_a_layer("vision"), "the vision tower has 2 layers .* but its config says 3"),
        (without_a_layer("text"), "the text tower has 1 layers .* but its config says 2"),
    ],
)
def test_integer_weights_and_missing_layers_are_an_error(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=message):
        CLIP.from_pretrained(saved)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 5000, -1])
def test_a_truncated_file_is_an_error(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        CLIP.from_pretrained(saved)


def test_a_weights_file_with_garbage_is_an_error(saved):
    (saved / "model.safetensors").write_bytes(b"not a tensor in sight" * 100)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        CLIP.from_pretrained(saved)


def test_pickled_code_is_an_error_and_does_not_run(saved, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "proof"), "w"))

    (saved / "model.safetensors").unlink()
    torch.save({"logit_scale": Harmful()}, saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin: .* code in a pickle never runs"):
        CLIP.from_pretrained(saved)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "value",
    [
        {0: torch.zeros(3)},
        {"logit_scale": None},
        {"model": {"logit_scale": None}},
        {"logit_scale": torch.zeros(3).to_sparse()},
        {"logit_scale": torch.zeros((), device="meta")},
        [torch.zeros(3)],
    ],
)
def test_a_pickle_that_is_not_a_dictionary_of_tensors_is_an_error(saved, value):
    (saved / "model.safetensors").unlink()
    torch.save(value, saved / "pytorch_model.bin")
    found = "expected a dictionary of tensors, as"
    with pytest.raises(CheckpointError, match=found):
        CLIP.from_pretrained(saved)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json: expected a JSON file"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "bert"}', "model_type is 'bert'"),
        ("{}", "not the config of a CLIP"),
        ("[" * 100_000, "config.json: expected a JSON file"),
    ],
)
def test_a_config_that_is_not_a_clip_config_is_an_error(saved, text, message):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        CLIP.from_pretrained(saved)


def test_a_config_and_weights_with_different_sizes_are_an_error(saved):
    rewrite_config(saved, projection_dim=TINY.embed_dim + 1)
    with pytest.raises(CheckpointError, match="2 tensors do not fit"):
        CLIP.from_pretrained(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_config": {"hidden_size": 2**31 - 1, "num_attention_heads": 1}},
        {"vision_config": {"image_size": 10**9, "patch_size": 1}},
    ],
)
def test_a_config_of_an_impossibly_large_model_is_an_error(saved, changes):
    config = json.loads((saved / "config.json").read_text())
    for section in ("text_config", "vision_config"):
        changes = changes | {section: config[section] | changes.get(section, {})}
    rewrite_config(saved, **changes)
    with pytest.raises(CheckpointError, match="config.json: no model can be so large"):
        CLIP.from_pretrained(saved)


def test_the_error_names_a_missing_file(saved):
    (saved / "config.json").rename(saved / "other.json")
    with pytest.raises(CheckpointError, match="config.json: .*No such file"):
        CLIP.from_pretrained(saved)
    (saved / "other.json").rename(saved / "config.json")
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights; expected model.safetensors or"):
        CLIP.from_pretrained(saved)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "absent.safetensors",
        "config.json",
        "model.safetensors.index.json",
    ],
)
def test_a_shard_index_may_name_only_weights_files_in_its_folder(saved, shard):
    shutil.move(saved / "model.safetensors", saved.parent / "secret.safetensors")
    index = {"weight_map": {"logit_scale": shard}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a weights file in the index's folder"):
        CLIP.from_pretrained(saved)


def test_a_tensor_in_two_shards_is_an_error(saved):
    shutil.move(saved / "model.safetensors", saved / "a.safetensors")
    save_file({"logit_scale": torch.zeros(())}, saved / "b.safetensors")
    index = {"weight_map": {"logit_scale": "a.safetensors", "visual_projection": "b.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="b.safetensors: another shard .* logit_scale"):
        CLIP.from_pretrained(saved)


def test_a_tensor_of_the_shard_index_that_is_in_no_shard_is_an_error(saved):
    write_shards(saved, load_file(saved / "model.safetensors"), "model.safetensors")
    (saved / "model.safetensors").unlink()
    path = saved / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json: 1 tensors are in no shard: more"):
        CLIP.from_pretrained(saved)


def test_a_warning_says_that_an_adapter_is_not_loaded(model, saved):
    (saved / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match="the adapter that adapter_config.json .* merge_and_unl"):
        assert_same_weights(CLIP.from_pretrained(saved), model)
    CLIP.from_pretrained(saved / "model.safetensors")  # the file alone, so no warning


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, "float16"])
def test_the_requested_dtype_must_be_a_floating_point_type(saved, dtype):
    with pytest.raises(ValueError, match="dtype is .*; expected a floating point type"):
        CLIP.from_pretrained(saved, dtype=dtype)


def test_a_tokenizer_with_more_tokens_than_the_model_is_an_error(model, tmp_path):
    texts = [" ".join("abcdefghij"[i:] + "abcdefghij"[:j] for i in range(9)) for j in range(9)]
    tokenizer = Tokenizer.train(texts, TINY.text.vocab_size + 1)
    assert tokenizer.vocab_size == 601
    with pytest.raises(CheckpointError, match="not saved: the tokenizer has 601 tokens"):
        save(tmp_path, model, tokenizer, None)
    assert not any(tmp_path.iterdir())
    save(tmp_path, model, None, ImageTransform(TINY.vision.image_size))
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer has 601 tokens, .* embeds only 600"):
        load(tmp_path)
    tokenizer = Tokenizer.train(texts, TINY.text.vocab_size)
    save(tmp_path, model, tokenizer, ImageTransform(TINY.vision.image_size))
    assert load(tmp_path).tokenizer.vocab_size == 600


def test_a_tokenizer_and_a_model_with_different_end_tokens_are_an_error(model, tmp_path):
    """Without the error, no text would have an end token that the model knows."""
    tokenizer = Tokenizer.train(["a photo of a cat"], TINY.text.vocab_size)
    says = f"ends a text with the id {tokenizer.eos_token_id}, but .* eos_token_id 599"
    with pytest.raises(CheckpointError, match=f"not saved: the tokenizer {says}"):
        save(tmp_path, model, tokenizer, None)
    save(tmp_path, model, None, ImageTransform(TINY.vision.image_size))
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: the tokenizer {says}"):
        load(tmp_path)
    text = replace(TINY.text, eos_token_id=2)  # a text ends at its largest id
    save(tmp_path, CLIP(replace(TINY, text=text)), tokenizer, ImageTransform(40))
    assert load(tmp_path).tokenizer.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("size, crop_size", [(13377, 13377), (32, 31), (64, 33), (1, 1)])
def test_a_transform_and_a_model_with_different_image_sizes_are_an_error(
    model, tmp_path, capsys, size, crop_size
):
    side = TINY.vision.image_size
    tokenizer = tokenizer_of(TINY)
    wrong = ImageTransform(size, crop_size=crop_size)
    says = f"the transform makes images of {crop_size} x {crop_size} pixels and the model reads "
    with pytest.raises(CheckpointError, match=f"not saved: {says}{side} x {side}"):
        save(tmp_path, model, tokenizer, wrong)
    save(tmp_path, model, tokenizer, ImageTransform(size, crop_size=side))  # only crop_size matters
    assert load(tmp_path).transform.size == size
    wrong.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: {says}{side} x {side}"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: {says}{side} x {side}"):
        convert(tmp_path, tmp_path / "converted", "open_clip")
    assert main(["classify", "absent.jpg", "--labels", "a", "b", "--model", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if says in line] == lines and len(lines) == 1
    CLIPModel.from_pretrained(tmp_path)  # transformers checks sizes only in the forward pass
    assert CLIP.from_pretrained(tmp_path).config == TINY
    assert ImageTransform.from_pretrained(tmp_path) == wrong


def test_a_square_transform_for_a_model_of_wide_images_is_an_error(tmp_path):
    """`load` also checks the transform if the checkpoint is only a vision tower."""
    config = replace(TINY, vision=replace(TINY.vision, image_size=(32, 64), patch_size=16))
    with pytest.raises(CheckpointError, match="32 x 32 pixels and the model reads 32 x 64"):
        save(tmp_path, CLIP(config), None, ImageTransform(32))
    save(tmp_path, CLIP(config), tokenizer_of(TINY), None)
    ImageTransform(32).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="32 x 32 pixels and the model reads 32 x 64"):
        load(tmp_path)
    half = CLIPVisionModelWithProjection(transformers_config(TINY).vision_config)
    half.save_pretrained(tmp_path / "half")
    ImageTransform(33).save_pretrained(tmp_path / "half")
    with pytest.raises(CheckpointError, match="33 x 33 pixels and the model reads 40 x 40"):
        load(tmp_path / "half")


# -------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        *(
            "cifar11",
            "no/such/folder",
            "weights.safetensors",
            "",
            "\0",
            "a\0/b",
            "./cifar11",
            "no/weights.pt",
            "~/no",
        ),
        *("~nobody-of-that-name/clip", "a" * 5000, "a" * 300 + "/b/c"),
    ],
    ids=lambda name: ascii(name[:20]),
)
@pytest.mark.parametrize("read", [CLIP, Tokenizer, ImageTransform])
def test_the_error_for_an_unknown_checkpoint_lists_the_known_names(name, read):
    with pytest.raises(CheckpointError, match="no checkpoint called .* everyday"):
        read.from_pretrained(name)


def test_a_path_object_is_never_the_name_of_an_embedded_checkpoint():
    with pytest.raises(CheckpointError, match="no directory called 'everyday'.* give the string"):
        load(Path("everyday"))


def test_model_tokenizer_and_transform_load_from_every_form_of_a_path(model, tmp_path, monkeypatch):
    tokenizer = tokenizer_of(TINY)
    save(tmp_path / "odd näme %s {}", model, tokenizer, ImageTransform(40))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = tmp_path / "odd näme %s {}"
    for name in (
        *(directory, str(directory), "odd näme %s {}", "./odd näme %s {}/", "~/odd näme %s {}"),
        *(directory / "model.safetensors", "~/odd näme %s {}/model.safetensors"),
    ):
        assert_same_weights(CLIP.from_pretrained(name), model)
        assert Tokenizer.from_pretrained(name, reference="openai").merges == tokenizer.merges
        assert ImageTransform.from_pretrained(name, revision="main").size == 40
    assert {type(part) for part in load(directory)} == {CLIP, Tokenizer, ImageTransform}


@pytest.mark.parametrize("read", [load, CLIP, Tokenizer, ImageTransform, CLIPConfig])
def test_a_revision_is_an_error_if_the_checkpoint_is_not_from_the_hub(read, tmp_path):
    commit = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    shutil.copytree(resolve("shapes", "model"), commit)
    read = getattr(read, "from_pretrained", read)
    for name in ("shapes", commit, commit / "model.safetensors"):
        with pytest.raises(CheckpointError, match="revision is 'v2', but only .* leave it out"):
            read(name, revision="v2")
    read("shapes", revision="main")
    read(commit, revision="c0ffee")


def test_loading_prefers_an_embedded_checkpoint_to_a_directory_of_the_same_name(saved, monkeypatch):
    saved.rename(saved.parent / "everyday")
    monkeypatch.chdir(saved.parent)
    assert CLIP.from_pretrained("./everyday").config == TINY
    assert CLIP.from_pretrained("everyday").config != TINY


def test_the_error_names_an_unknown_layout(model, tmp_path):
    with pytest.raises(
        ValueError, match="layout is 'hf'; expected one of transformers, openai, op"
    ):
        model.save_pretrained(tmp_path, layout="hf")


def test_without_a_network_the_error_names_the_embedded_checkpoints(monkeypatch, tmp_path):
    with pytest.raises(CheckpointError, match="the hub's client cannot download it.* everyday"):
        load("openai/clip-vit-base-patch32", local_files_only=True, cache_dir=tmp_path)


@pytest.mark.parametrize("name", embedded_names())
def test_embedded_checkpoints_give_the_logits_of_transformers(name):
    model, tokenizer, transform = load(name)
    peer = CLIPModel.from_pretrained(resolve(name, "model"), dtype=torch.float32).eval()
    size = model.config.vision.image_size
    pixels = transform([torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8) for _ in range(4)])
    assert pixels.shape == (4, 3, size, size)
    assert_same_logits(model, peer, pixels, tokenizer(["a cat", "a photo of a dog"]))
    randomize(model)  # a change of the loaded weights must not change the file
    assert not torch.equal(CLIP.from_pretrained(name).vision.class_embed, model.vision.class_embed)
