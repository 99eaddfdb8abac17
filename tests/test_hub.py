"""The hub's own client against a hub on loopback that fails in every way hubs do.

Each test ends in the right model or in one CheckpointError, and what is left in the cache is never
a file that a later run wrongly trusts.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_server import Fault, commit, running_hub
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
from twin import TINY, twins

import miniclip
from miniclip import CLIP, CheckpointError, CLIPConfig, ImageTransform, Tokenizer, checkpoint
from miniclip.files.hub import HUB_FILES

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
    tokenizer = Tokenizer.train(["a photo of a cat"], TINY.text.vocab_size)
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
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before the client tries again
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


def test_a_fresh_download_is_the_whole_checkpoint(hub, model):
    loaded = miniclip.load(NAME)
    assert_same_weights(loaded.model, model)
    assert loaded.tokenizer(["a photo of a cat"]).shape == (1, 7)
    assert loaded.transform.size == TINY.vision.image_size


def test_a_fresh_process_downloads_with_progress(hub, tmp_path):
    script = f"import miniclip; print(miniclip.load({NAME!r}).model.config)"
    mine = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=os.environ | mine, capture_output=True, text=True)
    assert run.stdout == f"{TINY}\n", run.stderr
    assert "Fetching 2 files: 100%" in run.stderr


def test_a_second_load_asks_for_no_file_again(hub, model):
    miniclip.load(NAME)
    assert len(asked(hub, "/stored/")) == 1
    hub.requests.clear()
    assert_same_weights(miniclip.load(NAME).model, model)
    assert hub.requests == [f"GET /api/models/{NAME}/revision/main"] * 3


def test_local_files_only_makes_no_request(hub, model):
    with pytest.raises(CheckpointError, match="LocalEntryNotFoundError.*disabled"):
        CLIP.from_pretrained(NAME, local_files_only=True)
    assert not hub.requests
    CLIP.from_pretrained(NAME)
    hub.requests.clear()
    assert_same_weights(CLIP.from_pretrained(NAME, local_files_only=True), model)
    with pytest.raises(CheckpointError, match="incomplete: 4 file"):
        Tokenizer.from_pretrained(NAME, local_files_only=True)
    assert not hub.requests


def test_a_hub_that_is_gone_leaves_what_was_downloaded(hub, model):
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
    assert_same_weights(CLIP.from_pretrained(NAME), other)  # a branch moves
    hub.requests.clear()
    assert_same_weights(CLIP.from_pretrained(NAME, revision=pinned), model)  # a commit does not
    assert not hub.requests
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    assert_same_weights(CLIP.from_pretrained(NAME, revision=pinned), model)


def test_cache_dir_is_where_the_files_go(hub, model, tmp_path):
    assert_same_weights(CLIP.from_pretrained(NAME, cache_dir=tmp_path / "mine"), model)
    assert not Path(huggingface_hub.constants.HF_HUB_CACHE).exists()
    assert_same_weights(
        CLIP.from_pretrained(NAME, cache_dir=tmp_path / "mine", local_files_only=True), model
    )


def test_a_repository_of_pickles_alone(hub, model, tmp_path):
    files = hub.repositories[NAME]["main"]
    (tmp_path / "model.safetensors").write_bytes(files.pop("model.safetensors"))
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    files["pytorch_model.bin"] = (tmp_path / "pytorch_model.bin").read_bytes()
    assert_same_weights(CLIP.from_pretrained(NAME), model)
    assert_same_weights(CLIP.from_pretrained(NAME, local_files_only=True), model)


def test_only_one_form_of_the_weights_is_downloaded(hub, model):
    for name in ("pytorch_model.bin", "flax_model.msgpack", "onnx/model.safetensors"):
        hub.repositories[NAME]["main"][name] = b"not read"
    assert_same_weights(CLIP.from_pretrained(NAME), model)
    assert len(asked(hub, "HEAD ")) == 2


def test_a_repository_of_timms(hub, model, tmp_path):
    """It has a config and weights of timm's under the plain names, and a CLIP as open_clip's."""
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
    with pytest.raises(CheckpointError, match="two towers: no sections"):
        miniclip.load(folder)


def test_sharded_weights(hub, tmp_path):
    model, peer = twins(TINY)
    peer.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    hub.repositories[NAME]["main"] = contents(tmp_path)
    assert_same_weights(CLIP.from_pretrained(NAME), model)


def test_a_repository_without_weights(hub):
    del hub.repositories[NAME]["main"]["model.safetensors"]
    with pytest.raises(CheckpointError, match="no weights; expected model.safetensors or"):
        CLIP.from_pretrained(NAME)


# --------------------------------------------------------------------------------- what goes wrong


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
@pytest.mark.parametrize("read", [miniclip.load, CLIP.from_pretrained])
def test_a_refusal_is_one_clear_error_and_the_next_load_is_well(hub, model, fault, complaint, read):
    hub.faults = [fault]
    with pytest.raises(CheckpointError, match=f"{NAME} .* cifar10.* says .*{complaint}") as it:
        read(NAME)
    assert "\n" not in str(it.value)
    hub.faults = []
    assert_same_weights(CLIP.from_pretrained(NAME), model)


@pytest.mark.parametrize("name", ["made-up/another", "made-up/clip--clip", "a/b.git"])
def test_a_repository_that_is_none(hub, name):
    with pytest.raises(CheckpointError, match=f"{name} is no directory here"):
        CLIP.from_pretrained(name)


@pytest.mark.parametrize("revision", ["never", "0" * 40, "", "../../main", "a b", "\0"])
def test_a_revision_that_is_none(hub, revision):
    with pytest.raises(CheckpointError, match="cannot be had from the hub"):
        CLIP.from_pretrained(NAME, revision=revision)


def test_the_message_of_a_missing_revision_names_it(hub):
    with pytest.raises(CheckpointError, match="RevisionNotFoundError.*Revision Not Found.*never"):
        CLIP.from_pretrained(NAME, revision="never")


@pytest.mark.parametrize("where", ["/tree/", "HEAD .*/resolve/.*safetensors"])
def test_what_fails_once_is_asked_for_again(hub, model, where):
    hub.faults = [Fault(where, times=1, status=500)]
    assert_same_weights(CLIP.from_pretrained(NAME), model)


@pytest.mark.parametrize("keep", [0, 1, 10_000])
def test_a_connection_that_is_cut_is_resumed(hub, model, keep):
    hub.faults = [Fault(WEIGHTS, times=1, keep=keep)]
    assert_same_weights(CLIP.from_pretrained(NAME), model)
    assert len(asked(hub, "/stored/")) == 2


def test_a_connection_that_is_always_cut_leaves_nothing_that_is_trusted(hub, model):
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
    """One bit of one weight is another."""
    data = bytearray(files["model.safetensors"])
    data[-1] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    "body, complaint",
    [
        (half, "should be of size .* but has size"),
        (longer, "should be of size .* but has size"),
        (turned, "model.safetensors came damaged from the hub, for its hash is not the one"),
    ],
)
def test_a_file_that_is_another_is_an_error_and_not_kept(hub, files, model, body, complaint):
    hub.faults = [Fault(WEIGHTS, body=body(files))]
    for _ in range(2):
        with pytest.raises(CheckpointError, match=complaint):
            CLIP.from_pretrained(NAME)
    with pytest.raises(CheckpointError, match="incomplete"):
        CLIP.from_pretrained(NAME, local_files_only=True)
    hub.faults = []
    assert_same_weights(CLIP.from_pretrained(NAME), model)


@pytest.mark.parametrize("name", ["config.json", "vocab.json"])
def test_a_small_file_that_is_another_is_an_error_and_not_kept(hub, files, name):
    other = files[name].replace(b"0", b"1", 1)
    assert len(other) == len(files[name]) and other != files[name]
    hub.faults = [Fault(f"GET .*/{name}", body=other)]
    with pytest.raises(CheckpointError, match=f"{name} came damaged from the hub"):
        miniclip.load(NAME)
    hub.faults = []
    assert miniclip.load(NAME).model.config == TINY


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_not_trusted_after_another_one_failed(hub, files, model, name):
    """Nor after the process was killed before the check, which leaves the same files."""
    if name == "config.json":
        hub.faults = [Fault(f"GET .*/{name}", body=files[name].replace(b"0", b"1", 1))]
    else:
        hub.faults = [Fault(WEIGHTS, body=turned(files))]
    snapshot_download(NAME, allow_patterns=HUB_FILES["model"][0])  # as a call that was cut short
    hub.faults = []
    with pytest.raises(CheckpointError, match=f"{name} came damaged from the hub"):
        CLIP.from_pretrained(NAME)
    assert_same_weights(CLIP.from_pretrained(NAME), model)


def test_hashes_are_looked_at_once(hub, monkeypatch):
    CLIP.from_pretrained(NAME)
    monkeypatch.setattr(checkpoint, "_has_its_hash", None)
    CLIP.from_pretrained(NAME)
    with pytest.raises(TypeError):
        miniclip.load(NAME)  # of the tokenizer's files


@pytest.mark.parametrize("more", [-100, 100])
def test_a_file_whose_stated_length_is_wrong(hub, model, more):
    size = len(hub.repositories[NAME]["main"]["model.safetensors"])
    hub.faults = [Fault("HEAD .*/resolve/.*safetensors", stated=size + more)]
    with pytest.raises(CheckpointError, match=f"should be of size {size + more}"):
        CLIP.from_pretrained(NAME)
    hub.faults = []
    assert_same_weights(CLIP.from_pretrained(NAME), model)


def test_a_process_killed_in_mid_file_leaves_nothing_that_is_trusted(hub, model, tmp_path):
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    CLIP.from_pretrained(NAME)
    blob = (next(cache.glob("*/snapshots/*")) / "model.safetensors").resolve()
    (next(cache.glob("*/snapshots/*")) / "model.safetensors").unlink()
    blob.rename(blob.with_name(blob.name + ".01234567.incomplete"))
    with pytest.raises(CheckpointError, match="incomplete"):
        CLIP.from_pretrained(NAME, local_files_only=True)
    assert_same_weights(CLIP.from_pretrained(NAME), model)


@pytest.mark.parametrize("place", ["cache", "cache/models--made-up--clip"])
def test_a_cache_that_cannot_be_made(hub, tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("a file")
    with pytest.raises(CheckpointError, match="client says (NotADirectory|FileExists)Error"):
        CLIP.from_pretrained(NAME)


@pytest.mark.parametrize("errno", [28, 30], ids=["full disk", "read-only"])
def test_a_cache_that_cannot_be_written(hub, model, monkeypatch, errno):
    def refuse(*args, **kwargs):
        raise OSError(errno, os.strerror(errno))

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", refuse)
        with pytest.raises(CheckpointError, match=f"client says OSError: .*{os.strerror(errno)}"):
            CLIP.from_pretrained(NAME)
    assert_same_weights(CLIP.from_pretrained(NAME), model)


# -------------------------------------------------------------------------------------- publishing


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # the client's own
def test_a_saved_checkpoint_is_published_and_loaded_from_the_hub(hub, other, files, tmp_path):
    tokenizer = Tokenizer.train(["a photo of a dog"], TINY.text.vocab_size)
    miniclip.save(tmp_path / "mine", other, tokenizer, ImageTransform(TINY.vision.image_size))
    api = HfApi(token="hf_made_up")
    api.create_repo("made-up/mine", exist_ok=True)
    api.upload_folder(repo_id="made-up/mine", folder_path=tmp_path / "mine")
    assert_same_weights(miniclip.load("made-up/mine").model, other)
    assert_same_weights(CLIP.from_pretrained("made-up/mine"), other)
    peer = CLIPModel.from_pretrained("made-up/mine", cache_dir=tmp_path / "theirs")
    assert torch.equal(peer.logit_scale, other.logit_scale)
