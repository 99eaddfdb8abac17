"""huggingface_hub's client downloads from a local hub that fails in many ways.

Each test ends with the right model or with one CheckpointError. If a damaged file stays in the
cache, no later run trusts it.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_server import Fault, commit, running_hub
from huggingface_hub import HfApi, file_download, snapshot_download
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
from twin import TINY, tokenizer_of, twins, write_shards

import miniclip
from miniclip import (
    CLIP,
    CheckpointError,
    CLIPConfig,
    ImageTransform,
    TextTower,
    Tokenizer,
    VisionTower,
)
from miniclip.commands.main import main
from miniclip.config import LEGACY_EOS
from miniclip.convert import convert
from miniclip.files import hub as hub_files
from miniclip.files.hub import HUB_FILES, _has_its_hash, _hashes_at
from miniclip.files.writing import SAVED, saving
from miniclip.retrieval.index import Index, fingerprint

NAME = "made-up/clip"
WEIGHTS = "GET /stored/.*model.*safetensors"


@pytest.fixture(scope="module")
def model():
    return twins(TINY)[0]


@pytest.fixture(scope="module")
def other():
    return twins(TINY, seed=1)[0]


@pytest.fixture(scope="module")
def server():
    with running_hub() as hub:
        yield hub


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    tokenizer = tokenizer_of(TINY, "a photo of a cat")
    miniclip.save(directory, model, tokenizer, ImageTransform(TINY.vision.image_size))
    return contents(directory)


@pytest.fixture
def hub(server, files, tmp_path, monkeypatch):
    """The hub, with one repository that has the model on its branch `main`."""
    server.repositories = {NAME: {"main": dict(files)}}
    server.faults, server.requests = [], []
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client retries at once
    return server


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def asked(hub, part):
    return [request for request in hub.requests if part in request]


def other_files(other, tmp_path):
    other.save_pretrained(tmp_path / "other")
    return contents(tmp_path / "other")


# --------------------------------------------------------------------------------- what should work


def test_load_downloads_the_model_the_tokenizer_and_the_transform(hub, model):
    loaded = miniclip.load(NAME)
    assert_same_weights(loaded.model, model)
    assert loaded.tokenizer(["a photo of a cat"]).shape == (1, 7)
    assert loaded.transform.size == TINY.vision.image_size


@pytest.mark.slow
def test_a_download_in_a_new_process_shows_a_progress_bar(hub, tmp_path):
    script = f"import miniclip; print(miniclip.load({NAME!r}).model.config)"
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    mine = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=others | mine, capture_output=True, text=True)
    assert run.stdout == f"{TINY}\n", run.stderr
    assert "Fetching 2 files: 100%" in run.stderr


def test_a_second_load_requests_no_file(hub, model):
    miniclip.load(NAME)
    assert len(asked(hub, "/stored/")) == 1
    hub.requests.clear()
    assert_same_weights(miniclip.load(NAME).model, model)
    assert hub.requests == [f"GET /api/models/{NAME}/revision/main"]  # only the commit is requested


def test_with_local_files_only_no_request_is_made(hub, model):
    with pytest.raises(CheckpointError, match="LocalEntryNotFoundError.*disabled"):
        CLIP.from_pretrained(NAME, local_files_only=True)
    assert not hub.requests
    CLIP.from_pretrained(NAME)
    hub.requests.clear()
    assert_same_weights(CLIP.from_pretrained(NAME, local_files_only=True), model)
    with pytest.raises(CheckpointError, match="incomplete: 4 file"):
        Tokenizer.from_pretrained(NAME, local_files_only=True)
    assert not hub.requests


def test_downloaded_files_are_loaded_while_the_hub_is_down(hub, model):
    CLIP.from_pretrained(NAME)
    hub.faults = [Fault("", status=503)]
    assert_same_weights(CLIP.from_pretrained(NAME), model)


def test_a_revision_is_a_branch_or_a_commit(hub, model, other, tmp_path):
    pinned = commit(hub.repositories[NAME]["main"])
    hub.repositories[NAME]["tuned"] = hub.repositories[NAME]["main"] | other_files(other, tmp_path)
    assert_same_weights(CLIP.from_pretrained(NAME), model)
    assert_same_weights(CLIP.from_pretrained(NAME, revision="tuned"), other)
    assert_same_weights(CLIP.from_pretrained(NAME, revision=pinned), model)
    hub.repositories[NAME]["old"] = hub.repositories[NAME]["main"]
    hub.repositories[NAME]["main"] = hub.repositories[NAME]["tuned"]
    assert_same_weights(CLIP.from_pretrained(NAME), other)  # the branch has a new commit
    hub.requests.clear()
    assert_same_weights(CLIP.from_pretrained(NAME, revision=pinned), model)  # the old commit
    assert not hub.requests
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    assert_same_weights(CLIP.from_pretrained(NAME, revision=pinned), model)


READERS = {
    "load": miniclip.load,
    "CLIP.from_pretrained": CLIP.from_pretrained,
    "config": CLIPConfig.from_pretrained,
    "vision": VisionTower.from_pretrained,
    "text": TextTower.from_pretrained,
    "tokenizer": Tokenizer.from_pretrained,
    "transform": ImageTransform.from_pretrained,
}


@pytest.mark.slow
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_load_and_each_from_pretrained_pass_each_option_to_huggingface_hub(
    hub, monkeypatch, tmp_path, read
):
    options = {"revision": "tuned", "cache_dir": tmp_path / "mine", "local_files_only": False}
    hub.repositories[NAME]["tuned"] = hub.repositories[NAME]["main"]
    asked_with = []

    def recorded(repository, *, allow_patterns, **options):
        asked_with.append(options)
        return snapshot_download(repository, allow_patterns=allow_patterns, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", recorded)
    read(NAME, **options)
    read(NAME, **options | {"local_files_only": True})
    count = len(asked_with) // 2
    assert [one["local_files_only"] for one in asked_with] == [False] * count + [True] * count
    assert {one["cache_dir"] for one in asked_with} == {tmp_path / "mine"}
    # The first answer names the commit, and the other requests ask for this commit.
    for first, *others in (asked_with[:count], asked_with[count:]):
        assert first["revision"] == "tuned"
        assert all(len(other["revision"]) == 40 for other in others)
    assert count == (3 if read is miniclip.load else 1)


@pytest.mark.slow
def test_a_config_and_a_conversion_come_from_the_requested_revision(hub, other, tmp_path):
    files = hub.repositories[NAME]["main"] | other_files(other, tmp_path)
    config = json.loads(files["config.json"])
    config["logit_scale_init_value"] = 1.5
    hub.repositories[NAME]["tuned"] = files | {"config.json": json.dumps(config).encode()}
    assert CLIPConfig.from_pretrained(NAME).logit_scale_init == TINY.logit_scale_init
    assert CLIPConfig.from_pretrained(NAME, revision="tuned").logit_scale_init == 1.5
    done = convert(NAME, tmp_path / "there", "transformers", revision="tuned")
    assert done.tokenizer and done.transform
    assert_same_weights(CLIP.from_pretrained(tmp_path / "there"), other)


# Functions that write each form of weights that the hub may have.


def as_shards(directory, name, model):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    write_shards(directory, tensors, name)


def as_one_pickle(directory, name, model):
    torch.save(load_file(directory / "model.safetensors"), directory / name)
    (directory / "model.safetensors").unlink()


def as_open_clips(directory, name, model):
    for path in directory.glob("*"):
        path.unlink()
    model.save_pretrained(directory, layout="open_clip")
    tensors = load_file(directory / "open_clip_model.safetensors")
    if name.endswith(".bin"):
        (directory / "open_clip_model.safetensors").unlink()
        torch.save(tensors, directory / name)


@pytest.mark.slow
@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (as_shards, "model.safetensors"),
        (as_shards, "pytorch_model.bin"),
        (as_one_pickle, "pytorch_model.bin"),
        (as_open_clips, "open_clip_model.safetensors"),
        (as_open_clips, "open_clip_pytorch_model.bin"),
    ],
)
def test_weights_in_every_layout_and_file_format_are_downloaded(hub, tmp_path, write, name):
    model = twins(replace(TINY, text=replace(TINY.text, eos_token_id=LEGACY_EOS)))[0]
    model.save_pretrained(tmp_path / "files")
    write(tmp_path / "files", name, model)
    hub.repositories[NAME]["main"] = contents(tmp_path / "files")
    loaded = CLIP.from_pretrained(NAME)
    assert_same_weights(loaded, model)
    assert CLIPConfig.from_pretrained(NAME) == loaded.config
    assert_same_weights(CLIP.from_pretrained(NAME, local_files_only=True), model)


SETTINGS = {
    "tokenizer_config.json": {"model_max_length": 9, "pad_token": "a</w>"},
    "special_tokens_map.json": {"pad_token": "a</w>"},
    "added_tokens.json": {"cat of": 521},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_file_of_a_tokenizer_is_downloaded(hub, tmp_path, name):
    """Any one of these files can change the token ids, even without the others."""
    tokenizer = Tokenizer.train(["a photo of a cat"], TINY.text.vocab_size)
    tokenizer.save_pretrained(tmp_path / "files")
    files = {name: contents(tmp_path / "files")[name] for name in ("vocab.json", "merges.txt")}
    hub.repositories[NAME]["main"] = files | {name: json.dumps(SETTINGS[name]).encode()}
    (tmp_path / "files" / "tokenizer_config.json").unlink()
    (tmp_path / "files" / "special_tokens_map.json").unlink()
    (tmp_path / "files" / name).write_text(json.dumps(SETTINGS[name]))
    here, there = Tokenizer.from_pretrained(tmp_path / "files"), Tokenizer.from_pretrained(NAME)
    assert there.context_length == here.context_length
    ids = [t(["a cat of a cat"], pad_to=9).tolist() for t in (here, there, tokenizer)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.slow
def test_a_transform_is_loaded_from_any_file_that_can_contain_it(hub, model, tmp_path):
    transform = ImageTransform(40, image_mean=(0.1, 0.2, 0.3))
    transform.save_pretrained(tmp_path / "files")
    files = contents(tmp_path / "files")
    settings = json.loads(files["preprocessor_config.json"])
    processor = json.dumps({"image_processor": settings}).encode()
    tokenizer = tokenizer_of(TINY)
    miniclip.save(tmp_path / "open_clip", model, tokenizer, transform, layout="open_clip")
    open_clip = (tmp_path / "open_clip" / "open_clip_config.json").read_bytes()
    for files in (
        files,
        {"processor_config.json": processor},
        {"open_clip_config.json": open_clip},
    ):
        hub.repositories[NAME]["main"] = files
        assert ImageTransform.from_pretrained(NAME) == transform


def test_from_pretrained_downloads_to_cache_dir(hub, model, tmp_path):
    assert_same_weights(CLIP.from_pretrained(NAME, cache_dir=tmp_path / "mine"), model)
    assert not Path(huggingface_hub.constants.HF_HUB_CACHE).exists()
    assert_same_weights(
        CLIP.from_pretrained(NAME, cache_dir=tmp_path / "mine", local_files_only=True), model
    )


def test_if_the_hub_has_several_weight_formats_only_safetensors_is_downloaded(hub, model):
    for name in ("pytorch_model.bin", "flax_model.msgpack", "onnx/model.safetensors"):
        hub.repositories[NAME]["main"][name] = b"not read"
    assert_same_weights(CLIP.from_pretrained(NAME), model)
    assert len(asked(hub, "HEAD ")) == 2


@pytest.mark.slow
def test_load_finds_the_clip_model_in_a_timm_repository(hub, model, tmp_path):
    """config.json and model.safetensors are timm's own. The CLIP is in open_clip's files."""
    folder = tmp_path / "timm"
    miniclip.save(folder, *miniclip.load(NAME), layout="open_clip")
    (folder / "config.json").write_text('{"architecture": "vit_tiny_clip_40", "num_classes": 36}')
    save_file({"cls_token": torch.zeros(1, 1, 48)}, folder / "model.safetensors")
    hub.repositories["timm/clip"] = {"main": contents(folder)}
    for name in ("timm/clip", folder):
        loaded, *_ = miniclip.load(name)
        assert_same_weights(loaded, model)
        assert CLIPConfig.from_pretrained(name) == loaded.config
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(
        CheckpointError, match="architecture is 'vit_tiny_clip_40'; expected timm's"
    ):
        miniclip.load(folder)


@pytest.mark.slow
def test_a_checkpoint_in_a_subfolder_of_a_repository_is_loaded(hub, model, other, tmp_path):
    """Stable Diffusion has a subfolder `text_encoder`. Only files in it are downloaded."""
    files = hub.repositories[NAME]["main"]
    inside = {f"text_encoder/{name}": data for name, data in files.items()}
    hub.repositories[NAME]["main"] = inside | other_files(other, tmp_path)
    assert_same_weights(miniclip.load(NAME, subfolder="text_encoder").model, model)
    assert len(asked(hub, "/stored/")) == 1
    assert all("/text_encoder/" in request for request in asked(hub, "/resolve/"))
    assert_same_weights(CLIP.from_pretrained(NAME), other)
    for read in READERS.values():
        read(NAME, subfolder="text_encoder")
    with pytest.raises(CheckpointError, match="has no folder 'vae'"):
        CLIP.from_pretrained(NAME, subfolder="vae")


@pytest.mark.parametrize("name", ["ViT-L/14@336px", "L/14-336", "vit-l/14@336"])
def test_model_names_of_openai_load_the_matching_repository_of_the_hub(hub, model, name):
    hub.repositories["openai/clip-vit-large-patch14-336"] = hub.repositories[NAME]
    assert_same_weights(CLIP.from_pretrained(name), model)


@pytest.mark.parametrize(
    "name",
    [
        f"hf-hub:{NAME}",
        f"https://huggingface.co/{NAME}",
        f"https://huggingface.co/{NAME}/?library=transformers",
        f"hf.co/{NAME}/tree/main",
    ],
)
def test_from_pretrained_accepts_a_pasted_address_of_a_repository(hub, model, name):
    assert_same_weights(CLIP.from_pretrained(name), model)


@pytest.mark.slow
def test_a_pasted_address_says_which_revision_and_which_folder(hub, files, model, other, tmp_path):
    parts = {f"parts/{name}": file for name, file in other_files(other, tmp_path).items()}
    hub.repositories[NAME]["second"] = parts
    address = f"https://huggingface.co/{NAME}/tree/second"
    assert_same_weights(CLIP.from_pretrained(f"{address}/parts"), other)
    assert_same_weights(CLIP.from_pretrained(address, subfolder="parts"), other)
    hub.repositories[NAME]["main"] = {f"whole/{name}": file for name, file in files.items()}
    explicit = {"revision": "main", "subfolder": "whole"}  # arguments override the address
    assert_same_weights(CLIP.from_pretrained(f"{address}/parts", **explicit), model)
    with pytest.raises(CheckpointError, match="expected a folder inside"):
        CLIP.from_pretrained(f"{address}/../../other")
    with pytest.raises(CheckpointError, match="no checkpoint called"):
        CLIP.from_pretrained(f"https://huggingface.co/{NAME}/blob/main/model.safetensors")


def test_a_pasted_address_can_contain_an_escaped_slash_or_space(monkeypatch):
    """On the hub, the page of a pull request has a slash in its revision."""
    monkeypatch.setattr(hub_files, "_download", lambda *arguments: arguments)
    asked = hub_files.resolve("https://hf.co/me/x/tree/refs%2Fpr%2F21/my%20files", "config")
    assert asked[:4] == ("me/x", "config", "refs/pr/21", "my files")


def test_the_command_prints_at_once_that_it_asks_the_hub(hub, capsys, monkeypatch):
    hub_files._say_once.cache_clear()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **options: 1 / 0)
    assert main(["info", "made-up/slow"]) == 2
    said, error = capsys.readouterr().err.splitlines()
    assert said == "miniclip: asking the Hugging Face hub for made-up/slow"
    assert error.startswith("miniclip: error: made-up/slow ")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    main(["info", "made-up/other"])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_repository_without_weights_is_an_error(hub):
    del hub.repositories[NAME]["main"]["model.safetensors"]
    with pytest.raises(CheckpointError, match="no weights; expected model.safetensors or"):
        CLIP.from_pretrained(NAME)


# --------------------------------------------------------------------------------- what goes wrong


@pytest.mark.slow
@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    "fault, complaint",
    [
        (Fault("", status=401), "401 Unauthorized"),
        (
            Fault("", status=401, code="RepoNotFound"),
            "private or gated repo, make sure",
        ),
        (Fault("", status=403, code="GatedRepo"), "GatedRepoError: 403 .*Cannot access gated repo"),
        (Fault("resolve", status=403, code="GatedRepo"), "GatedRepoError: 403"),
        (Fault("", status=404, code="RepoNotFound"), "RepositoryNotFoundError: 404"),
        (Fault("", status=500), "500 Internal Server Error"),
        (Fault("/tree/", status=502), "502 Bad Gateway"),
        (Fault(WEIGHTS, status=500), "500 Internal Server Error"),
    ],
    ids=[
        "401",
        "private",
        "gated",
        "gated files",
        "404",
        "500",
        "502 of the list",
        "500 of weights",
    ],
)
def test_a_failed_request_raises_one_clear_error_and_the_next_load_succeeds(
    hub, model, fault, complaint
):
    hub.faults = [fault]
    with pytest.raises(CheckpointError, match=f"{NAME} .* everyday.* says .*{complaint}") as it:
        CLIP.from_pretrained(NAME)
    assert "\n" not in str(it.value)
    hub.faults = []
    assert_same_weights(CLIP.from_pretrained(NAME), model)


@pytest.mark.parametrize("name", ["made-up/another", "made-up/clip--clip", "a/b.git"])
def test_an_unknown_repository_is_an_error(hub, name):
    with pytest.raises(CheckpointError, match=f"{name} is not a directory here"):
        CLIP.from_pretrained(name)


@pytest.mark.parametrize("revision", ["never", "0" * 40, "", "../../main", "a b", "\0"])
def test_an_unknown_revision_is_an_error(hub, revision):
    with pytest.raises(CheckpointError, match="the hub's client cannot download it"):
        CLIP.from_pretrained(NAME, revision=revision)


def test_the_error_for_an_unknown_revision_names_the_revision(hub):
    with pytest.raises(CheckpointError, match="RevisionNotFoundError.*Revision Not Found.*never"):
        CLIP.from_pretrained(NAME, revision="never")


@pytest.mark.parametrize("where", ["/tree/", "HEAD .*/resolve/.*safetensors"])
def test_a_request_that_fails_once_is_repeated(hub, model, where):
    if where == "/tree/" and huggingface_hub.__version__.startswith("1."):
        pytest.skip("before 2.0 the hub's client asks for the list of files only once")
    hub.faults = [Fault(where, times=1, status=500)]
    assert_same_weights(CLIP.from_pretrained(NAME), model)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 1, 10_000])
def test_a_download_continues_after_the_connection_is_cut_once(hub, model, keep):
    hub.faults = [Fault(WEIGHTS, times=1, keep=keep)]
    assert_same_weights(CLIP.from_pretrained(NAME), model)
    assert len(asked(hub, "/stored/")) == 2


def test_if_the_connection_is_always_cut_no_load_trusts_a_partial_file(hub, model):
    hub.faults = [Fault(WEIGHTS, keep=0)]
    with pytest.raises(CheckpointError, match="client says RemoteProtocolError: .* closed"):
        CLIP.from_pretrained(NAME)
    with pytest.raises(CheckpointError, match="incomplete"):
        CLIP.from_pretrained(NAME, local_files_only=True)
    hub.faults = []
    assert_same_weights(CLIP.from_pretrained(NAME), model)


def half(files):
    data = files["model.safetensors"]
    return data[: len(data) // 2]


def longer(files):
    return files["model.safetensors"] + b"\0"


def turned(files):
    """The weights with one bit flipped."""
    data = bytearray(files["model.safetensors"])
    data[-1] ^= 1
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "body, complaint",
    [
        (half, "should be of size .* but has size"),
        (longer, "should be of size .* but has size"),
        (turned, "model.safetensors was damaged in the download from the hub: its hash"),
    ],
)
def test_a_damaged_weights_file_raises_an_error_and_is_not_cached(
    hub, files, model, body, complaint
):
    hub.faults = [Fault(WEIGHTS, body=body(files))]
    for _ in range(2):
        with pytest.raises(CheckpointError, match=complaint):
            CLIP.from_pretrained(NAME)
    with pytest.raises(CheckpointError, match="incomplete"):
        CLIP.from_pretrained(NAME, local_files_only=True)
    hub.faults = []
    assert_same_weights(CLIP.from_pretrained(NAME), model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "vocab.json"])
def test_a_damaged_small_file_raises_an_error_and_is_not_cached(hub, files, name):
    other = files[name].replace(b"0", b"1", 1)
    assert len(other) == len(files[name]) and other != files[name]
    hub.faults = [Fault(f"GET .*/{name}", body=other)]
    with pytest.raises(CheckpointError, match=f"{name} was damaged in the download"):
        miniclip.load(NAME)
    hub.faults = []
    assert miniclip.load(NAME).model.config == TINY


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_from_an_earlier_unchecked_download_raises_an_error(hub, files, model, name):
    """The earlier call downloaded the file, but ended before it checked the file."""
    if name == "config.json":
        hub.faults = [Fault(f"GET .*/{name}", body=files[name].replace(b"0", b"1", 1))]
    else:
        hub.faults = [Fault(WEIGHTS, body=turned(files))]
    snapshot_download(NAME, allow_patterns=HUB_FILES["model"][0])  # without a check
    hub.faults = []
    with pytest.raises(CheckpointError, match=f"{name} is not the file .*Delete the file"):
        CLIP.from_pretrained(NAME)
    (file,) = Path(huggingface_hub.constants.HF_HUB_CACHE).glob(f"*/snapshots/*/{name}")
    file.resolve().unlink()
    file.unlink()
    assert_same_weights(CLIP.from_pretrained(NAME), model)


@pytest.mark.parametrize("change", [lambda data: data, lambda data: data[:-1] + b"!"])
def test_a_cached_file_is_checked_if_its_name_is_a_hash(tmp_path, change):
    data = b"the contents" * 200_000
    hashes = [hashlib.sha256(data), hashlib.sha1(b"blob %d\0" % len(data) + data)]
    hashes += [hashlib.sha1(data)]  # some mirrors of the hub use this hash
    for digest in hashes:
        (tmp_path / digest.hexdigest()).write_bytes(change(data))
        assert _has_its_hash(tmp_path / digest.hexdigest()) == (change(data) == data)
    (tmp_path / "a-name").write_bytes(change(data))
    assert _has_its_hash(tmp_path / "a-name")


def test_a_file_that_was_changed_after_the_check_is_checked_again(hub, model):
    CLIP.from_pretrained(NAME)
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    blob = (next(cache.glob("*/snapshots/*")) / "model.safetensors").resolve()
    os.utime(blob, ns=(0, 0))
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    for _ in range(2):  # a load deletes only files that it downloaded
        with pytest.raises(CheckpointError, match="model.safetensors is not the file .*Delete the"):
            CLIP.from_pretrained(NAME, local_files_only=True)
    (next(cache.glob("*/snapshots/*")) / "model.safetensors").unlink()
    blob.unlink()
    assert_same_weights(CLIP.from_pretrained(NAME), model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_if_the_cache_has_no_symlinks_the_hashes_come_from_the_hub(
    hub, files, model, monkeypatch, name
):
    """Windows has no symlinks, so the snapshot has the file itself. Its name is not a hash."""
    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda cache_dir=None: False)
    other = files[name][:-1] + b" " if name == "config.json" else turned(files)
    hub.faults = [Fault(f"GET .*/{name}" if name == "config.json" else WEIGHTS, body=other)]
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{name} was damaged in the download"):
            CLIP.from_pretrained(NAME)
    hub.faults = []
    assert_same_weights(CLIP.from_pretrained(NAME), model)
    hub.requests.clear()
    assert_same_weights(CLIP.from_pretrained(NAME), model)
    assert len(asked(hub, "GET /api/models")) == 1  # one request, by the hub's client
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    edited = next(cache.glob("*/snapshots/*")) / name
    assert not edited.is_symlink()
    edited.write_bytes(other)
    with pytest.raises(CheckpointError, match=f"{name} is not the file of the hub"):
        CLIP.from_pretrained(NAME)
    assert edited.read_bytes() == other


def test_a_failed_request_for_hashes_is_not_repeated(hub, files):
    hub.faults = [Fault("/api/models", status=503)]
    hub.requests.clear()
    assert _hashes_at(NAME, "main", local_files_only=False) == {}
    assert len(hub.requests) == 1


def test_a_damaged_file_that_cannot_be_deleted_is_a_checkpoint_error(hub, files, monkeypatch):
    unlink = Path.unlink

    def refuse(path, **options):
        if path.name == "model.safetensors" or len(path.name) == 64:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        unlink(path, **options)

    hub.faults = [Fault(WEIGHTS, body=turned(files))]
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CheckpointError, match="was damaged.*cannot be deleted: Read-only"):
        CLIP.from_pretrained(NAME)


@contextmanager
def moving_branch(hub, commits, at):
    """In the `with` statement, the branch moves to the second commit before request number `at`."""
    hub.repositories[NAME] = {"main": commits[0]}
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE, ignore_errors=True)
    left, answered = [at], type(hub).fault

    def fault(self, request):
        left[0] -= 1
        if not left[0]:
            self.repositories[NAME] = {"main": commits[1], "before": commits[0]}
        return answered(self, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(hub), "fault", fault)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("at", range(1, 12))
def test_a_load_or_conversion_uses_one_commit_even_if_the_branch_moves(
    hub, files, other, tmp_path, at
):
    """All files come from one commit."""
    commits = [dict(hub.repositories[NAME]["main"]), files | other_files(other, tmp_path)]
    for read in (miniclip.load, lambda name: convert(name, tmp_path / f"{at}", "transformers")):
        with moving_branch(hub, commits, at):
            read(NAME)
        folders = {*Path(huggingface_hub.constants.HF_HUB_CACHE).glob("*/snapshots/*")}
        assert len(folders) == 1, folders


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 12])
def test_cached_features_are_stored_with_the_commit_of_their_model(hub, model, other, tmp_path, at):
    """The branch on the hub may get a new commit at any time. The loaded commit is stored."""
    texts = [" ".join("abcdefghij"[i:] + "abcdefghij"[:j] for i in range(9)) for j in range(9)]
    tokenizer = Tokenizer.train(texts, TINY.text.vocab_size)
    commits = []
    for one in (model, other):
        miniclip.save(tmp_path / "saved", one, tokenizer, ImageTransform(TINY.vision.image_size))
        commits.append(contents(tmp_path / "saved"))
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (50, 50), (90 * i, 50, 0)).save(tmp_path / "data" / name / "a.png")
    command = ["eval", str(tmp_path / "data"), "--model", NAME, "--cache", str(tmp_path / "kept")]
    with moving_branch(hub, commits, at):
        assert main(command) == 0
    index = Index.load(next((tmp_path / "kept").glob("*.proj.safetensors")))
    made_by = {commit(files): one for files, one in zip(commits, (model, other))}
    assert index.encoder.revision in made_by
    assert index.encoder.fingerprint == fingerprint(made_by[index.encoder.revision])


def test_the_hash_of_a_cached_file_is_checked_only_once(hub, monkeypatch):
    CLIP.from_pretrained(NAME)
    monkeypatch.setattr(hub_files, "_has_its_hash", None)
    CLIP.from_pretrained(NAME)
    with pytest.raises(TypeError):
        miniclip.load(NAME)  # the tokenizer's files are not checked yet


def test_a_cache_that_cannot_store_the_list_of_checked_files_still_works(hub, model):
    CLIP.from_pretrained(NAME)
    (notes,) = Path(huggingface_hub.constants.HF_HUB_CACHE).glob("*/.miniclip-checked")
    notes.unlink()
    notes.mkdir()  # a folder, so it cannot be written as a file
    assert_same_weights(CLIP.from_pretrained(NAME), model)


@pytest.mark.slow
@pytest.mark.parametrize("more", [-100, 100])
def test_it_is_an_error_if_the_hub_states_a_wrong_file_length(hub, model, more):
    size = len(hub.repositories[NAME]["main"]["model.safetensors"])
    hub.faults = [Fault("HEAD .*/resolve/.*safetensors", stated=size + more)]
    with pytest.raises(CheckpointError, match=f"should be of size {size + more}"):
        CLIP.from_pretrained(NAME)
    hub.faults = []
    assert_same_weights(CLIP.from_pretrained(NAME), model)


def test_no_load_trusts_a_partial_file_of_a_killed_download(hub, model, tmp_path):
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    CLIP.from_pretrained(NAME)
    blob = (next(cache.glob("*/snapshots/*")) / "model.safetensors").resolve()
    (next(cache.glob("*/snapshots/*")) / "model.safetensors").unlink()
    blob.rename(blob.with_name(blob.name + ".01234567.incomplete"))
    with pytest.raises(CheckpointError, match="incomplete"):
        CLIP.from_pretrained(NAME, local_files_only=True)
    assert_same_weights(CLIP.from_pretrained(NAME), model)


@pytest.mark.parametrize("place", ["cache", "cache/models--made-up--clip"])
def test_a_cache_that_cannot_be_created_is_an_error(hub, tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("a file")
    with pytest.raises(CheckpointError, match="client says (NotADirectory|FileExists)Error"):
        CLIP.from_pretrained(NAME)


@pytest.mark.slow
@pytest.mark.parametrize("errno", [28, 30], ids=["full disk", "read-only"])
def test_a_cache_that_cannot_be_written_is_an_error(hub, model, monkeypatch, errno):
    def refuse(*args, **kwargs):
        raise OSError(errno, os.strerror(errno))

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", refuse)
        with pytest.raises(CheckpointError, match=f"client says OSError: .*{os.strerror(errno)}"):
            CLIP.from_pretrained(NAME)
    assert_same_weights(CLIP.from_pretrained(NAME), model)


# -------------------------------------------------------------------------------------- publishing


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # the client's code
def test_files_left_by_a_crashed_save_are_not_published(hub, files, tmp_path):
    """One save crashed while it wrote its files, and another while it moved them."""
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    unfinished = saving(tmp_path)
    (unfinished.__enter__() / "half.safetensors").write_bytes(b"half")
    (tmp_path / SAVED).mkdir()
    (tmp_path / SAVED / "model.safetensors").write_bytes(b"not moved yet")
    left = {path for path in tmp_path.rglob("*") if path.is_file()} - {*tmp_path.iterdir()}
    assert len(left) == 2
    api = HfApi(token="hf_made_up")
    api.create_repo("made-up/crashed", exist_ok=True)
    api.upload_folder(repo_id="made-up/crashed", folder_path=tmp_path)
    assert hub.repositories["made-up/crashed"]["main"] == files
    with pytest.raises(KeyboardInterrupt):
        unfinished.gen.throw(KeyboardInterrupt())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # the client's code
def test_a_saved_checkpoint_is_published_and_loaded_from_the_hub(hub, other, files, tmp_path):
    tokenizer = tokenizer_of(TINY)
    miniclip.save(tmp_path / "mine", other, tokenizer, ImageTransform(TINY.vision.image_size))
    api = HfApi(token="hf_made_up")
    api.create_repo("made-up/mine", exist_ok=True)
    api.upload_folder(repo_id="made-up/mine", folder_path=tmp_path / "mine")
    assert_same_weights(miniclip.load("made-up/mine").model, other)
    assert_same_weights(CLIP.from_pretrained("made-up/mine"), other)
    peer = CLIPModel.from_pretrained("made-up/mine", cache_dir=tmp_path / "theirs")
    assert torch.equal(peer.logit_scale, other.logit_scale)
