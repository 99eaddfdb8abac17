"""Loading and saving: transformers' layout, directories, files, shards, and damage to them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
from twin import TINY, randomize, twins

from miniclip import CLIP, CheckpointError, Tokenizer, load, save
from miniclip.files.hub import embedded_names, resolve
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


# ------------------------------------------------------------------------------------- the real one


@pytest.fixture(scope="module")
def official(data, tmp_path_factory):
    """A file laid out like openai/clip-vit-base-patch32's, byte for byte but for the numbers."""
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
            tensors[name] = torch.randn(shape, generator=generator) * 0.03
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


def test_official_file_has_the_official_size(official):
    assert (official / "model.safetensors").stat().st_size == 605_157_884
    assert len(load_file(official / "model.safetensors")) == 400


def test_official_file_gives_the_logits_of_transformers(official):
    model = CLIP.from_pretrained(official)
    peer = CLIPModel.from_pretrained(official, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 224, 224, generator=generator)
    ids = torch.randint(0, 49406, (3, 12), generator=generator)
    ids[:, 8:] = 49407
    assert model.config.text.eos_token_id == 2
    assert_same_logits(model, peer, pixels, ids)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak from")
@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        ("float32", "safetensors"),
        ("float16", "safetensors"),
        ("bfloat16", "safetensors"),
        ("float16", "torch.save"),
        ("float16", "torch.save until 2020"),
    ],
)
def test_loading_takes_the_memory_of_the_file_in_the_dtype_asked_for(
    official, tmp_path, dtype, form
):
    directory = official
    if form != "safetensors":
        directory = tmp_path
        shutil.copy(official / "config.json", directory)
        tensors = load_file(official / "model.safetensors")
        new = form == "torch.save"
        path = directory / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=new)
    # Not by getrusage, whose peak a process inherits from the one that started it.
    script = f"""
import torch
def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
before = peak()
model = CLIP.from_pretrained({str(directory)!r}, dtype=torch.{dtype})
total = sum(parameter.sum() for parameter in model.parameters())
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    size = 605_157_884 if dtype == "float32" else 605_157_884 / 2
    assert 0.9 * size < int(out.stdout) < 1.15 * size


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


def test_a_checkpoint_can_be_saved_over_the_file_it_is_mapped_from(model, saved):
    loaded = CLIP.from_pretrained(saved)
    loaded.save_pretrained(saved)
    assert_same_weights(loaded, model)
    assert_same_weights(CLIP.from_pretrained(saved), model)


def test_changing_a_loaded_model_leaves_the_file_alone(model, saved):
    loaded = CLIP.from_pretrained(saved)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert_same_weights(CLIP.from_pretrained(saved), model)


def test_a_single_file_is_loaded_with_the_config_beside_it(model, saved):
    assert_same_weights(CLIP.from_pretrained(saved / "model.safetensors"), model)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pytorch_model_bin_is_read_without_running_pickles(model, saved, zipped):
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_same_weights(CLIP.from_pretrained(saved), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_the_one_asked_for(model, saved, dtype):
    loaded = CLIP.from_pretrained(saved, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_same_weights(loaded, twins(TINY)[0].to(dtype))


def test_position_ids_are_checked_and_dropped(model, saved):
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
def test_position_ids_of_other_types_and_of_no_tower(model, saved, name, ids, complaint):
    rewrite(saved, lambda tensors: tensors.update({name: ids}))
    if complaint is None:
        return assert_same_weights(CLIP.from_pretrained(saved), model)
    with pytest.raises(CheckpointError, match=complaint):
        CLIP.from_pretrained(saved)


def test_save_writes_everything_that_load_and_transformers_need(model, tmp_path):
    tokenizer = Tokenizer.train(["a photo of a cat", "a photo of a dog"], TINY.text.vocab_size)
    transform = ImageTransform(TINY.vision.image_size)
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, model, tokenizer, transform)
    loaded = load(tmp_path)
    assert_same_weights(loaded.model, model)
    assert torch.equal(loaded.tokenizer(["a cat"]), tokenizer(["a cat"]))
    assert loaded.transform.size == transform.size
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


def test_files_have_the_permissions_of_any_new_file_or_keep_their_own(model, saved):
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


def no_block(model):
    model.vision.blocks[0] = torch.nn.Identity()


def no_projection(model):
    model.text.proj = torch.nn.Identity()


def pruned_head(model):
    attention = model.text.blocks[1].attn
    attention.v_proj = torch.nn.Linear(TINY.text.width, attention.head_width)


def something_more(model):
    model.text.adapter = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("change", [no_block, no_projection, pruned_head, something_more])
def test_a_model_that_its_config_does_not_describe_is_not_saved(saved, change):
    changed, before = CLIP.from_pretrained(saved), (saved / "model.safetensors").read_bytes()
    change(changed)
    with pytest.raises(CheckpointError, match="nothing could load it: .* tensors are missing"):
        changed.save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() == before


def tied(model):
    model.text.blocks[0].mlp.fc1.weight = model.text.blocks[1].mlp.fc1.weight


def without_data(model):
    model.to("meta")


@pytest.mark.parametrize("change", [tied, without_data])
def test_tensors_that_cannot_be_written_are_a_checkpoint_error(saved, change):
    changed = CLIP.from_pretrained(saved)
    change(changed)
    with pytest.raises(CheckpointError, match="cannot save here: .+"):
        changed.save_pretrained(saved)


@pytest.mark.parametrize("place", ["file", "file/below", "folder"])
def test_where_nothing_can_be_written_is_a_checkpoint_error(model, tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"{place}: cannot save here: "):
        model.save_pretrained(tmp_path / place)
    assert not list(tmp_path.glob("*/.*"))


# ---------------------------------------------------------------------------------------- bad input


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(saved):
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
        f"visual_projection.weight ({wide}, {high}), our vision.proj.weight ({high}, {wide})"
        in message
    )


def integer_weights(tensors):
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"].to(torch.int8)


def without_last_layer(tensors):
    for name in [name for name in tensors if re.match(r"vision_model.*layers\.0\.", name)]:
        del tensors[name]


@pytest.mark.parametrize(
    "change, message",
    [(integer_weights, "torch.int8, expected floating"), (without_last_layer, "vision tower has")],
)
def test_tensors_that_are_no_weights_of_this_model(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=message):
        CLIP.from_pretrained(saved)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 5000, -1])
def test_a_truncated_file_is_an_error(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        CLIP.from_pretrained(saved)


def test_garbage_is_an_error(saved):
    (saved / "model.safetensors").write_bytes(b"not a tensor in sight" * 100)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        CLIP.from_pretrained(saved)


def test_pickled_code_is_refused_and_not_run(saved, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "proof"), "w"))

    (saved / "model.safetensors").unlink()
    torch.save({"logit_scale": Harmful()}, saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin: .* pickled code is never run"):
        CLIP.from_pretrained(saved)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "value",
    [
        {0: torch.zeros(3)},
        {"logit_scale": None},
        {"model": {"logit_scale": torch.zeros(())}},
        {"logit_scale": torch.zeros(3).to_sparse()},
        {"logit_scale": torch.zeros((), device="meta")},
        [torch.zeros(3)],
    ],
)
def test_a_pickle_of_something_else_is_an_error(saved, value):
    (saved / "model.safetensors").unlink()
    torch.save(value, saved / "pytorch_model.bin")
    found = "expected a dictionary of tensors and nothing else|it names torch._utils"
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
def test_a_config_that_describes_no_clip(saved, text, message):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        CLIP.from_pretrained(saved)


def test_a_config_of_another_size(saved):
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
def test_a_config_of_an_impossible_size(saved, changes):
    config = json.loads((saved / "config.json").read_text())
    for section in ("text_config", "vision_config"):
        changes = changes | {section: config[section] | changes.get(section, {})}
    rewrite_config(saved, **changes)
    with pytest.raises(CheckpointError, match="config.json: no model can be so large"):
        CLIP.from_pretrained(saved)


def test_missing_files_are_named(saved):
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
def test_a_shard_index_reaches_no_other_folder(saved, shard):
    shutil.move(saved / "model.safetensors", saved.parent / "secret.safetensors")
    index = {"weight_map": {"logit_scale": shard}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a weights file beside it"):
        CLIP.from_pretrained(saved)


def test_a_tensor_in_two_shards_is_an_error(saved):
    shutil.move(saved / "model.safetensors", saved / "a.safetensors")
    save_file({"logit_scale": torch.zeros(())}, saved / "b.safetensors")
    index = {"weight_map": {"logit_scale": "a.safetensors", "visual_projection": "b.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="b.safetensors: .* another shard again: logit_scale"):
        CLIP.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, "float16", None])
def test_a_dtype_that_is_none_for_weights(saved, dtype):
    with pytest.raises(ValueError, match="dtype is .*; expected one of floating point"):
        CLIP.from_pretrained(saved, dtype=dtype)


def test_a_tokenizer_with_more_tokens_than_the_model_is_an_error(model, tmp_path):
    texts = [" ".join("abcdefghij"[i:] + "abcdefghij"[:j] for i in range(9)) for j in range(9)]
    tokenizer = Tokenizer.train(texts, TINY.text.vocab_size + 1)
    assert tokenizer.vocab_size == 601
    save(tmp_path, model, tokenizer, ImageTransform(TINY.vision.image_size))
    with pytest.raises(CheckpointError, match="tokenizer has 601 tokens .* embeds only 600"):
        load(tmp_path)


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
            "~/no",
        ),
        *("~nobody-of-that-name/clip", "a" * 5000, "a" * 300 + "/b/c"),
    ],
    ids=lambda name: ascii(name[:20]),
)
@pytest.mark.parametrize("read", [CLIP, Tokenizer, ImageTransform])
def test_an_unknown_name_is_told_the_known_ones(name, read):
    with pytest.raises(CheckpointError, match="no checkpoint called .* cifar10"):
        read.from_pretrained(name)


def test_each_part_alone_has_every_kind_of_name(model, tmp_path, monkeypatch):
    tokenizer = Tokenizer.train(["a photo of a cat"], TINY.text.vocab_size)
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


def test_without_a_network_the_error_names_the_embedded_checkpoints(monkeypatch, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be had from the hub.* cifar10"):
        load("openai/clip-vit-base-patch32", local_files_only=True, cache_dir=tmp_path)


@pytest.mark.parametrize("name", embedded_names())
def test_embedded_checkpoints_give_the_logits_of_transformers(name):
    model, tokenizer, transform = load(name)
    peer = CLIPModel.from_pretrained(resolve(name, "model"), dtype=torch.float32).eval()
    size = model.config.vision.image_size
    pixels = transform([torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8) for _ in range(4)])
    assert pixels.shape == (4, 3, size, size)
    assert_same_logits(model, peer, pixels, tokenizer(["a cat", "a photo of a dog"]))
    randomize(model)  # and the weights are the model's own: changing them changes no file
    assert not torch.equal(CLIP.from_pretrained(name).vision.class_embed, model.vision.class_embed)
