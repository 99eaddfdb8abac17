"""Load OpenAI's four checkpoints by name, and compare ids, pixels and logits with transformers.

This command downloads the checkpoints from the hub into the user's own cache:

    MINICLIP_HUB=1 pytest -m hub

HF_ENDPOINT can name another hub. OpenAI's weights must also give the values that other projects
recorded. Without MINICLIP_HUB, the tests are a rehearsal: they load small random weights from a
local hub, which serves files with the same names.
"""

import hashlib
import json
import mmap
import os
import re
from functools import lru_cache

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from golden import (
    Ours,
    Theirs,
    find_or_draw_picture,
    find_picture,
    measure,
    mismatches,
    numbers,
    published,
    read_entries,
    tolerance,
)
from hub_server import running_hub, sha256
from official import OFFICIAL, SHA256, config_json, files, random_weights, shrunk
from PIL import Image
from transformers import CLIPModel

import miniclip
from miniclip.commands.main import main
from miniclip.files.hub import WEIGHTS, resolve
from miniclip.files.names import TRANSFORMERS, layout_name
from miniclip.published import PUBLISHED

# The hub's client warns about symbolic links, tokens and open connections on some machines.
pytestmark = [
    pytest.mark.filterwarnings("default::Warning:huggingface_hub"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
THE_HUB = "https://huggingface.co"
REORDERED = 2e-5  # the tolerance of logits at scale 100, because the order of operations may differ
ENTRIES = {entry["id"]: entry for entry in read_entries()}


@pytest.fixture(scope="module", params=["rehearsal", pytest.param("real", marks=pytest.mark.hub)])
def hub(request, tmp_path_factory):
    """Start a local hub for the rehearsal, or yield None to use the user's own hub."""
    if request.param == "real":
        if os.environ.get("MINICLIP_HUB") != "1":
            pytest.skip("downloads OpenAI's weights: set MINICLIP_HUB=1")
        yield None
        return
    constants = huggingface_hub.constants
    with running_hub() as server, pytest.MonkeyPatch.context() as patch:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for seed, name in enumerate(OFFICIAL):
            server.repositories[name] = {"main": files(name, seed=seed)}
        yield server


def weights_file(name):
    directory = resolve(name, "model")
    return next(directory / file for file in WEIGHTS if (directory / file).is_file())


# ------------------------------------------------------------------------------------------------
# Compared with transformers

TEXTS = [
    "a photo of a cat",
    "A diagram,  isn't it?",
    "naïve Café №5 日本 🙂",
    "the dog and " * 40,
]


def pictures():
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(256, size=(231, 300, 3), dtype=np.uint8))
    smooth = noise.resize((7, 5)).resize((401, 517), Image.Resampling.BICUBIC)
    return [noise, smooth, smooth.convert("L"), noise.convert("RGBA"), smooth.convert("P")]


@torch.no_grad()
def logits(model, pixels, ids):
    if isinstance(model, CLIPModel):
        return model(pixel_values=pixels, input_ids=ids).logits_per_image
    return model(pixels, ids).logits_per_image


@pytest.mark.parametrize("name", [
    "openai/clip-vit-base-patch32",
    *(pytest.param(name, marks=pytest.mark.slow) for name in list(OFFICIAL)[1:]),
])  # fmt: skip
def test_an_official_checkpoint_gives_the_ids_pixels_and_logits_of_transformers(
    hub, name, tmp_path, capsys
):
    ours, theirs = miniclip.load(name), Theirs(name)
    directory = weights_file(name).parent

    ids = ours.tokenizer(TEXTS, truncate=True)
    assert torch.equal(ids, theirs.ids(TEXTS))
    pixels = ours.transform(pictures())
    assert torch.equal(pixels, theirs.pixels(pictures()))
    weights = dict(theirs.model.named_parameters())
    for key, parameter in ours.model.named_parameters():
        other = weights.pop(layout_name(key, TRANSFORMERS))
        # Strides must be equal too, because they can change the last bit of a large matrix product.
        assert torch.equal(parameter, other) and parameter.stride() == other.stride()
    assert not weights
    expected = logits(theirs.model, pixels, ids)
    assert torch.equal(logits(ours.model, pixels, ids), expected)

    for dtype in (torch.float16, torch.bfloat16):
        half = miniclip.CLIP.from_pretrained(name, dtype=dtype)
        peer = CLIPModel.from_pretrained(directory, dtype=dtype)
        found = [logits(model, pixels.to(dtype), ids) for model in (half, peer)]
        assert found[0].dtype == dtype
        exact = logits(peer.double(), pixels.to(dtype).double(), ids)
        error, peer_error = ((x.double() - exact).abs() for x in found)
        assert 0 < error.mean() <= 1.1 * peer_error.mean()
        assert error.max() <= 1.1 * peer_error.max()

    picture = tmp_path / "picture.png"
    pictures()[0].save(picture)
    command = ["classify", str(picture), "--model", name, "--template", "{}", "--json", "--labels"]
    assert main([*command, *TEXTS[:3]]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    found = {score["label"]: score["logit"] for score in row["labels"]}
    inputs = theirs.pixels(pictures()[:1]), theirs.ids(TEXTS[:3])
    wanted = dict(zip(TEXTS, logits(theirs.model, *inputs)[0].tolist()))
    assert found == pytest.approx(wanted, rel=0, abs=REORDERED)

    miniclip.save(tmp_path / "saved", *ours)
    again = miniclip.load(tmp_path / "saved")
    assert torch.equal(again.tokenizer(TEXTS, truncate=True), ids)
    assert torch.equal(again.transform(pictures()), pixels)
    peer = CLIPModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again.model, pixels, ids), logits(peer, pixels, ids))
    for parameter, original in zip(again.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(parameter, original)


# ------------------------------------------------------------------------------------------------
# Comparison with values that other projects recorded


def strangers(name):
    """Return an error message if the weights of `name` are not OpenAI's, and "" otherwise."""
    path = weights_file(name)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = hashlib.sha256(data).hexdigest()
    if found in SHA256 or huggingface_hub.constants.ENDPOINT == THE_HUB:
        return ""
    return f"these are not OpenAI's weights: {name}/{path.name} has an unknown sha256, {found}"


@pytest.fixture(scope="module")
def ours(hub):
    reason, load = lru_cache(strangers), lru_cache(Ours)

    def load_or_skip(name):
        if hub is None and reason(name):
            pytest.skip(reason(name))
        return load(name)

    return load_or_skip


@pytest.fixture(scope="module")
def theirs(hub):
    return lru_cache(Theirs)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [*map(published, ENTRIES.values())], ids=ENTRIES)
def test_miniclip_reproduces_the_values_that_other_projects_published(hub, entry, ours, theirs):
    """Without the real weights, transformers computes the expected values. The test checks that a
    wrong value fails."""
    picture = find_picture if hub is None else find_or_draw_picture
    if hub is not None:
        expected = measure(entry, theirs, picture)
        if "file" not in entry:  # a file is from the real, wider model, so it has more values
            assert dict(numbers(expected)).keys() == dict(numbers(entry["expected"])).keys()
        entry = entry | {"expected": expected}
    elif entry["expected"] is None:
        pytest.skip(f"needs {entry['file']}, which is not in the test data")
    found = dict(numbers(measure(entry, ours, picture)))
    assert not mismatches(entry, found)
    if hub is not None:
        for path, value in numbers(entry["expected"]):
            off = value + (3 * tolerance(entry, value) or 1e-6)
            assert len(mismatches(entry, found | {path: off})) == 1


@pytest.mark.parametrize("hub", ["rehearsal"], indirect=True)
def test_an_unknown_sha256_means_that_weights_are_not_from_openai(hub, monkeypatch):
    name = "openai/clip-vit-base-patch32"
    reason = strangers(name)
    assert "not OpenAI's weights" in reason and "patch32/pytorch_model.bin" in reason
    monkeypatch.setitem(SHA256, reason.split()[-1], "")
    assert not strangers(name)


# ------------------------------------------------------------------------------------------------
# The local hub of the rehearsal behaves like the real hub


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["rehearsal"], indirect=True)
def test_loading_downloads_only_the_files_that_it_needs(hub, tmp_path):
    needed = {"config.json", "preprocessor_config.json", "tokenizer_config.json"}
    needed |= {"special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.json"}
    for name in OFFICIAL:
        for kind in ("model", "tokenizer", "transform"):
            directory = resolve(name, kind, cache_dir=tmp_path)
        weights = "model.safetensors" if name.endswith("large-patch14") else "pytorch_model.bin"
        assert {path.name for path in directory.iterdir()} == needed | {weights}


def test_the_settings_files_of_the_local_hub_equal_the_files_of_openai():
    name = "openai/clip-vit-base-patch32"
    small = files(name)
    config = config_json(name, PUBLISHED["B/32"])
    # OpenAI's config.json was edited by hand. "projection_dim" is one line higher than in the files
    # of transformers, and one space was added.
    moved = r'(    "problem_type": null,\n)(    "projection_dim)": 512,\n'
    config = re.sub(moved, r'\2": 512,\n\1', config, count=1)
    config = re.sub(moved, r'\2" : 512,\n\1', config, count=1)
    contents = small | {"config.json": config.encode()}
    published = {
        "config.json": "b575ef3c36f2a057fa19e221650105052d61cc9c1a972ec15019c6261ec98770",
        "preprocessor_config.json": (
            "910e70b3956ac9879ebc90b22fb3bc8a75b6a0677814500101a4c072bd7857bd"
        ),
        "special_tokens_map.json": (
            "f8c0d6c39aee3f8431078ef6646567b0aba7f2246e9c54b8b99d55c22b707cbf"
        ),
        "tokenizer_config.json": "34b7336e4bee12e0a9730eaf5189f582ef3c3eea5027f65730e5717256755aad",
    }
    assert {file: sha256(contents[file]) for file in published} == published


@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"])
def test_the_local_hub_has_weights_with_the_tensor_names_and_dtypes_of_openai(name, data):
    path = data / "headers" / f"{name.replace('/', '_')}.reconstructed_header.json"
    header = json.loads(path.read_text())
    published = {
        (re.sub(r"layers\.\d+", "layers", key), tensor["dtype"], len(tensor["shape"]))
        for key, tensor in header.items()
        if key != "__metadata__"
    }
    dtypes = {torch.float32: "F32", torch.int64: "I64"}
    tensors = random_weights(shrunk(PUBLISHED[OFFICIAL[name]]), seed=0)
    assert published == {
        (re.sub(r"layers\.\d+", "layers", key), dtypes[tensor.dtype], tensor.ndim)
        for key, tensor in tensors.items()
    }
