"""The layouts of OpenAI and open_clip, single towers, and conversion between all layouts.

The embeddings are compared with a model in this file. This model uses torch's MultiheadAttention,
with fused matrices and transposed projections as in the originals. If openai/CLIP (`pip install
openai-clip`) or open_clip is installed, its classes are compared too. Both need torchvision.
"""

import json
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from twin import TINY, randomize, twins

from miniclip import (
    CLIP,
    CheckpointError,
    CLIPConfig,
    TextConfig,
    TextTower,
    Tokenizer,
    VisionConfig,
    VisionTower,
    load,
    save,
)
from miniclip.commands.main import main
from miniclip.config import LEGACY_EOS
from miniclip.convert import convert
from miniclip.files.configs import openai_numbers, tower_from_transformers, without_config
from miniclip.files.models import meta_device
from miniclip.files.names import LAYOUTS, OPENAI_NUMBERS, pack
from miniclip.files.open_clip import (
    context_of_open_clip,
    from_open_clip,
    preprocessing_from_open_clip,
    preprocessing_to_open_clip,
    to_open_clip,
)
from miniclip.files.tensors import read_tensors
from miniclip.published import PUBLISHED
from miniclip.transform import ImageTransform

# ---------------------------------------------------------------------- a CLIP as in OpenAI's code


class Block(nn.Module):
    def __init__(self, width, heads, mlp_width, act):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, mlp_width), act=act, c_proj=nn.Linear(mlp_width, width)
            )
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, tower, act):
        super().__init__()
        shape = (tower.width, tower.heads, tower.mlp_width)
        self.resblocks = nn.ModuleList(Block(*shape, act) for _ in range(tower.layers))

    def forward(self, x, mask=None):  # (B, T, W); the attention takes (T, B, W)
        x = x.transpose(0, 1)
        for block in self.resblocks:
            x = block(x, mask)
        return x.transpose(0, 1)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Visual(nn.Module):
    def __init__(self, c, act):
        super().__init__()
        v = c.vision
        self.conv1 = nn.Conv2d(3, v.width, v.patch_size, v.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(v.width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + v.patches, v.width))
        self.ln_pre = nn.LayerNorm(v.width)
        self.transformer = Transformer(v, act)
        self.ln_post = nn.LayerNorm(v.width)
        self.proj = nn.Parameter(torch.empty(v.width, c.embed_dim))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class TextHalf(nn.Module):
    """The text tower. Its tensors have the prefix `text` only in CustomTextCLIP."""

    def __init__(self, c, act):
        super().__init__()
        t = c.text
        self.positional_embedding = nn.Parameter(torch.empty(t.context_length, t.width))
        self.text_projection = nn.Parameter(torch.empty(t.width, c.embed_dim))
        self.transformer = Transformer(t, act)
        self.token_embedding = nn.Embedding(t.vocab_size, t.width)
        self.ln_final = nn.LayerNorm(t.width)

    def encode_text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1).to(x.dtype)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


class Original(TextHalf):
    def __init__(self, config):
        act = QuickGELU() if config.vision.act == "quick_gelu" else nn.GELU()
        super().__init__(config, act)
        self.visual = Visual(config, act)
        self.logit_scale = nn.Parameter(torch.empty(()))

    def encode_image(self, pixels):
        return self.visual(pixels)


OPENAI = CLIPConfig(
    VisionConfig(width=128, layers=3, heads=2, mlp_width=320, image_size=64, patch_size=16),
    TextConfig(
        width=64, layers=2, heads=1, mlp_width=200, vocab_size=500, context_length=20,
        bos_token_id=498, eos_token_id=LEGACY_EOS,
    ),
    embed_dim=48,
)  # fmt: skip


def variant(**changes):
    """Return the config OPENAI with the same changes in both towers."""
    vision, text = vars(OPENAI.vision) | changes, vars(OPENAI.text) | changes
    return CLIPConfig(VisionConfig(**vision), TextConfig(**text), OPENAI.embed_dim)


@torch.no_grad()
def original(config, dtype=torch.float64):
    """A model with OpenAI's structure and random parameters."""
    model = Original(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        std = 0.3 if parameter.ndim < 2 or "embedding" in name else parameter.shape[-1] ** -0.5
        parameter.normal_(
            1.0 if "ln_" in name and "weight" in name else 0.0, std, generator=generator
        )
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 499, (4, 20), generator=generator)
    ids[torch.arange(4), torch.tensor([19, 3, 7, 1])] = 499
    ids[3] = torch.randint(
        0, 499, (20,), generator=generator
    )  # this text has no end token, so it is pooled at its largest id
    return torch.randn(3, 3, 64, 64, generator=generator, dtype=torch.float64), ids


@torch.no_grad()
def assert_same_embeddings(model, peer, pixels, ids, atol=1e-12):
    pixels = pixels.to(peer.logit_scale.dtype)
    for ours, theirs in (
        (model.encode_image(pixels), peer.encode_image(pixels)),
        (model.encode_text(ids), peer.encode_text(ids)),
    ):
        assert theirs.abs().mean() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def assert_same_model(one, other):
    assert one.config == other.config
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def write_open_clip(directory, model, config, custom_text=False, **changes):
    directory.mkdir(exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if custom_text:
        towers = ("visual", "logit_scale")
        tensors = {n if n.startswith(towers) else f"text.{n}": t for n, t in tensors.items()}
    save_file(tensors, directory / "open_clip_model.safetensors")
    settings = {
        "model_cfg": config | changes,
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.3] * 3},
    }
    (directory / "open_clip_config.json").write_text(json.dumps(settings))
    return directory


OPEN_CLIP = {  # as open_clip writes it
    "embed_dim": 48,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "patch_size": 16, "mlp_ratio": 2.5},
    "text_cfg": {
        "context_length": 20, "vocab_size": 500, "width": 64, "heads": 1, "layers": 2,
        "mlp_ratio": 3.125,
    },
}  # fmt: skip


# -------------------------------------------------------------------------------- OpenAI's layout


def write_openai(path, model):
    tensors = model.state_dict()
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


NO_NUMBERS = "ignore:.*read as OpenAI's"


@pytest.mark.slow
@pytest.mark.filterwarnings(NO_NUMBERS)
@pytest.mark.parametrize("name", ["model.safetensors", "ViT-B-32.pt", "epoch_1.pt"])
def test_from_pretrained_loads_an_openai_state_dict_without_a_config(tmp_path, inputs, name):
    peer = original(OPENAI)
    if name == "epoch_1.pt":  # as open_clip saves it when it trains on several GPUs
        tensors = {f"module.{key}": tensor for key, tensor in peer.state_dict().items()}
        torch.save({"epoch": 1, "state_dict": tensors}, tmp_path / name)
    else:
        write_openai(tmp_path / name, peer)
    model = CLIP.from_pretrained(tmp_path / name, dtype=torch.float64)
    assert model.config == OPENAI
    assert_same_embeddings(model, peer, *inputs)


def mutations():
    def gelu(model):
        for block in model.vision.blocks:
            block.mlp.act = nn.GELU()

    def transposed(model):
        weight = model.text.blocks[0].attn.out_proj.weight
        weight.data = weight.data.T.contiguous()

    def q_for_k(model):
        attn = model.vision.blocks[1].attn
        attn.q_proj, attn.k_proj = attn.k_proj, attn.q_proj

    return [gelu, transposed, q_for_k]


@pytest.mark.filterwarnings(NO_NUMBERS)
@pytest.mark.parametrize("fault", mutations(), ids=lambda fault: fault.__name__)
def test_a_fault_in_the_loaded_model_changes_the_embeddings(tmp_path, inputs, fault):
    peer = original(OPENAI)
    model = CLIP.from_pretrained(write_openai(tmp_path / "x.pt", peer), dtype=torch.float64)
    fault(model)
    with pytest.raises(AssertionError):
        assert_same_embeddings(model, peer, *inputs)


def test_a_file_that_openai_or_open_clip_could_have_written_gives_a_warning(tmp_path):
    path = write_openai(tmp_path / "x.pt", original(OPENAI))
    with pytest.warns(UserWarning, match="read as OpenAI's.*open_clip_config.json"):
        CLIP.from_pretrained(path)


def test_dtype_none_keeps_the_mixed_precision_of_an_openai_file_and_so_does_convert(
    tmp_path, inputs
):
    """On a GPU, `clip.load` makes matrices float16 and leaves the rest float32."""
    peer = original(OPENAI, torch.float32)
    mixed = {n: t.half() if t.ndim > 1 else t for n, t in peer.state_dict().items()}
    peer.load_state_dict(mixed)
    numbers = {"input_resolution": 64, "context_length": 20, "vocab_size": 500}
    torch.save(mixed | {n: torch.tensor(v) for n, v in numbers.items()}, tmp_path / "mixed.pt")
    model = CLIP.from_pretrained(tmp_path / "mixed.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same_embeddings(model, peer, *inputs, atol=1e-5)
    kept = CLIP.from_pretrained(tmp_path / "mixed.pt", dtype=None)
    assert {p.dtype for p in kept.parameters() if p.ndim > 1} == {torch.float16}
    assert {p.dtype for p in kept.parameters() if p.ndim < 2} == {torch.float32}

    convert(tmp_path / "mixed.pt", tmp_path / "there", "transformers")
    convert(tmp_path / "there", tmp_path / "back", "openai")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == mixed.keys() | numbers.keys()
    for name, tensor in mixed.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


class Archive(nn.Module):
    """A model with three numbers as buffers, as in OpenAI's archives."""

    def __init__(self, peer):
        super().__init__()
        for name, child in peer.named_children():
            self.add_module(name, child)
        for name, parameter in peer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.register_buffer("input_resolution", torch.tensor(64))
        self.register_buffer("context_length", torch.tensor(20))
        self.register_buffer("vocab_size", torch.tensor(500))

    def forward(self, pixels):
        return self.visual(pixels)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    peer = original(OPENAI, torch.float32)
    path = tmp_path_factory.mktemp("archive") / "ViT-B-32.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, but OpenAI's files use it
        torch.jit.trace(Archive(peer).eval(), torch.zeros(1, 3, 64, 64)).save(path)
    return peer, path


def test_a_torchscript_archive_is_loaded_without_running_its_code(archive, inputs, monkeypatch):
    peer, path = archive
    monkeypatch.setattr(torch.jit, "load", None)
    model = CLIP.from_pretrained(path, dtype=torch.float64)
    assert model.config == OPENAI
    assert_same_embeddings(model, peer.double(), *inputs)


def rezip(path, to, change):
    """Copy an archive. `change` returns a file's new contents, or None to leave the file out."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(to, "w") as target:
        for name in source.namelist():
            data = change(name, source.read(name))
            if data is not None:
                target.writestr(name, data)


def other_function(name, data):
    return data.replace(b"ctorch._utils\n_rebuild_tensor_v2", b"cos\nsystem")


def short_storage(name, data):
    return data[:-4] if name.endswith("/data/1") else data


def no_storage(name, data):
    return None if name.endswith("/data/1") else data


@pytest.mark.parametrize("change", [other_function, short_storage, no_storage])
def test_an_archive_with_unsafe_or_incomplete_contents_is_an_error(archive, tmp_path, change):
    rezip(archive[1], tmp_path / "x.pt", change)
    assert change is no_storage or (tmp_path / "x.pt").stat().st_size
    with pytest.raises(CheckpointError, match="x.pt: the weights file cannot be read"):
        CLIP.from_pretrained(tmp_path / "x.pt")


def test_an_archive_with_compressed_pickles_is_an_error(archive, tmp_path):
    with zipfile.ZipFile(archive[1]) as source, zipfile.ZipFile(tmp_path / "x.pt", "w") as target:
        for name in source.namelist():
            kind = zipfile.ZIP_DEFLATED if name.endswith("/data.pkl") else zipfile.ZIP_STORED
            target.writestr(name, source.read(name), kind)
    with pytest.raises(CheckpointError, match="x.pt: the weights file"):
        read_tensors(tmp_path / "x.pt")


def test_a_stored_causal_mask_is_accepted_and_a_wrong_mask_is_an_error(tmp_path):
    model = CLIP(OPENAI)
    model.save_pretrained(tmp_path, layout="openai")
    path = tmp_path / "model.safetensors"
    mask = torch.full((20, 20), -torch.inf).triu(1)
    save_file(load_file(path) | {"attn_mask": mask}, path)
    assert_same_model(CLIP.from_pretrained(tmp_path), model)
    save_file(load_file(path) | {"attn_mask": mask.T.contiguous()}, path)
    with pytest.raises(CheckpointError, match="unexpected: attn_mask"):
        CLIP.from_pretrained(tmp_path)


@pytest.mark.slow
def test_a_file_is_memory_mapped_again_after_every_16_converted_megabytes(tmp_path, monkeypatch):
    opened = []

    def counted(*args, **kwargs):
        opened.append(args)
        return safe_open(*args, **kwargs)

    monkeypatch.setattr("miniclip.files.tensors.safe_open", counted)
    path = tmp_path / "x.safetensors"
    save_file({f"t{i}": torch.zeros(1, dtype=torch.float64) for i in range(1000)}, path)
    assert len(read_tensors(path, torch.float32)) == 1000 and len(opened) == 1
    save_file({f"t{i}": torch.zeros(2**19, dtype=torch.float64) for i in range(10)}, path)
    assert len(read_tensors(path, torch.float64)) == 10 and len(opened) == 2
    assert len(read_tensors(path, torch.float32)) == 10 and len(opened) == 3 + 10 // 5


@pytest.fixture(scope="module")
def packed():
    """The tensors of a file in OpenAI's layout."""
    return pack(CLIP(OPENAI).state_dict(), LAYOUTS["openai"]) | openai_numbers(asdict(OPENAI))


def test_load_finds_the_image_size_of_an_openai_file(tmp_path):
    """The folder has no file for the transform, so the image size comes from the weights."""
    model, tokenizer, transform = load("shapes")
    config = CLIPConfig(
        OPENAI.vision,
        TextConfig(**vars(OPENAI.text) | {"vocab_size": tokenizer.vocab_size, "bos_token_id": 1}),
        OPENAI.embed_dim,
    )
    CLIP(config).save_pretrained(tmp_path, layout="openai")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(CheckpointError, match="no tokenizer here"):
        load(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path, reference="openai")
    assert loaded.transform == ImageTransform(64, reference="openai")
    assert CLIPConfig.from_pretrained(tmp_path) == loaded.model.config


def test_a_config_for_an_openai_file_does_not_need_the_image_size(tmp_path):
    tokenizer = Tokenizer.from_pretrained("shapes")
    text = replace(OPENAI.text, vocab_size=tokenizer.vocab_size)
    vision = replace(OPENAI.vision, image_size=224, patch_size=32)
    config = replace(OPENAI, vision=vision, text=text)
    CLIP(config).save_pretrained(tmp_path, layout="openai")
    tokenizer.save_pretrained(tmp_path)
    settings = config.to_dict()
    del settings["vision_config"]["image_size"]
    (tmp_path / "sizes.json").write_text(json.dumps(settings))
    assert load(tmp_path, config=tmp_path / "sizes.json").transform == ImageTransform(224)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_resolution": torch.tensor(48)}, r"input_resolution is \[48\].* say 64"),
        ({"input_resolution": torch.zeros(10**6)}, r"input_resolution is \[0.0, 0.0\], but"),
        ({"vocab_size": torch.tensor(7)}, r"vocab_size is \[7\].* say 500"),
        ({"visual.conv1.weight": torch.zeros(100, 3, 16, 16)}, "width 100, not a multiple of 64"),
        ({"text_projection": None}, "no tensor text_projection of 2 dimensions"),
        ({"visual.proj": None}, "missing: visual.proj .128, 48."),
        (
            {"visual.proj": torch.zeros(48, 128)},
            r"wrong shape: visual.proj \(48, 128\), miniclip's vision",
        ),
        (
            {"transformer.resblocks.1.attn.in_proj_weight": torch.zeros(128, 64)},
            r"wrong shape: \S+_weight \(128, 64\), miniclip's text.blocks.1.attn.q_proj.weight",
        ),
        ({"context_length": torch.tensor(7)}, r"context_length is \[7\].* say 20"),
        ({"token_embedding.weight": torch.zeros(500, 100)}, "the text tower has width 100"),
        ({"visual.layer1.0.conv1.weight": torch.zeros(1)}, "a ResNet"),
        ({"visual.attnpool.q_proj.weight": torch.zeros(1)}, "a ResNet"),
        ({"visual.trunk.blocks.0.norm1.weight": torch.zeros(1)}, "no tensor visual.trunk"),
        ({"visual.attn_pool.query": torch.zeros(1)}, "attentional pooling"),
        ({"text.transformer.embeddings.x": torch.zeros(1)}, "a text tower from transformers"),
        ({"text_decoder.ln.weight": torch.zeros(1)}, "CoCa's text decoder"),
        ({"logit_bias": torch.zeros(())}, "the bias of SigLIP's loss"),
        ({"more": torch.zeros(2)}, r"unexpected: more \(2,\)"),
    ],
)
def test_a_wrong_missing_or_unexpected_tensor_in_an_openai_file_is_an_error(
    packed, tmp_path, change, message
):
    tensors = packed | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        CLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "section", "field", "value"),
    [
        ("visual.attn_pool.query", "vision_cfg", "attentional_pool", True),
        ("logit_bias", None, "init_logit_bias", -10),
        ("visual.trunk.cls_token", "vision_cfg", "timm_model_name", "vit_base_patch16_224"),
    ],
)
def test_the_error_for_an_unsupported_open_clip_architecture_names_the_field(
    tmp_path, tensor, section, field, value
):
    CLIP(OPENAI).save_pretrained(tmp_path, layout="open_clip")
    path = tmp_path / "open_clip_model.safetensors"
    save_file(load_file(path) | {tensor: torch.zeros(1)}, path)
    settings = json.loads((tmp_path / "open_clip_config.json").read_text())
    (settings["model_cfg"][section] if section else settings["model_cfg"])[field] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=f"{field} is "):
        CLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", ["L", [1], 3, True, {"size": [[64]]}, {"size": [{"a": 1}]}])
def test_an_invalid_preprocess_cfg_of_open_clip_is_an_error(tmp_path, value):
    settings = {"model_cfg": OPEN_CLIP, "preprocess_cfg": value}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="preprocess_cfg|size"):
        ImageTransform.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------ open_clip's layout


@pytest.mark.parametrize("custom_text", [False, True], ids=["plain", "custom_text"])
@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])
def test_from_pretrained_reads_the_layout_of_open_clip(tmp_path, inputs, custom_text, quick_gelu):
    config = variant(act="quick_gelu" if quick_gelu else "gelu")
    peer = original(config)
    changes = {"quick_gelu": True} if quick_gelu else {}
    changes |= {"custom_text": True} if custom_text else {}
    directory = write_open_clip(tmp_path / "oc", peer, OPEN_CLIP, **changes)
    model = CLIP.from_pretrained(directory, dtype=torch.float64)
    assert model.config == config == CLIPConfig.from_pretrained(directory)
    assert_same_embeddings(model, peer, *inputs)
    transform = ImageTransform.from_pretrained(directory)
    assert transform == ImageTransform(64, image_mean=(0.5,) * 3, image_std=(0.3,) * 3)


def test_the_model_uses_the_heads_and_eps_of_an_open_clip_config(tmp_path, inputs):
    settings = json.loads(json.dumps(OPEN_CLIP))
    settings["vision_cfg"] |= {"head_width": 32, "norm_kwargs": {"eps": 1e-3}}
    settings["text_cfg"] |= {"norm_kwargs": {"eps": 1e-2}}
    vision = vars(OPENAI.vision) | {"heads": 4, "act": "gelu", "ln_eps": 1e-3}
    text = vars(OPENAI.text) | {"act": "gelu", "ln_eps": 1e-2}
    config = CLIPConfig(VisionConfig(**vision), TextConfig(**text), OPENAI.embed_dim)
    peer = original(config)
    for name, module in peer.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3 if name.startswith("visual.") else 1e-2
    model = CLIP.from_pretrained(write_open_clip(tmp_path, peer, settings), dtype=torch.float64)
    assert model.config == config
    assert_same_embeddings(model, peer, *inputs)


# All numbers differ, so that a test notices a number in the wrong field.
DISTINCT = CLIPConfig(
    VisionConfig(96, 5, 6, 240, "gelu", 1e-6, 60, 12),
    TextConfig(80, 3, 4, 300, "gelu", 3e-5, 1000, 50, 998, LEGACY_EOS),
    embed_dim=44,
)
DISTINCT_OPEN_CLIP = {  # the fields of open_clip's CLIPVisionCfg and CLIPTextCfg, in model.py
    "embed_dim": 44,
    "quick_gelu": False,
    "vision_cfg": {
        "image_size": 60, "layers": 5, "width": 96, "head_width": 16, "mlp_ratio": 2.5,
        "patch_size": 12, "norm_kwargs": {"eps": 1e-6},
    },
    "text_cfg": {
        "context_length": 50, "vocab_size": 1000, "width": 80, "heads": 4, "layers": 3,
        "mlp_ratio": 3.75, "norm_kwargs": {"eps": 3e-5},
    },
}  # fmt: skip


def test_each_field_is_converted_to_open_clip_and_back():
    assert to_open_clip(asdict(DISTINCT)) == DISTINCT_OPEN_CLIP
    assert CLIPConfig.from_fields(from_open_clip({"model_cfg": DISTINCT_OPEN_CLIP})) == DISTINCT


def test_an_eps_is_written_for_open_clip_only_if_it_is_not_the_default():
    vision, text = (replace(t, ln_eps=1e-5) for t in (DISTINCT.vision, DISTINCT.text))
    written = to_open_clip(asdict(replace(DISTINCT, vision=vision)))
    assert "norm_kwargs" not in written["vision_cfg"] and "norm_kwargs" in written["text_cfg"]
    written = to_open_clip(asdict(replace(DISTINCT, text=text)))
    assert "norm_kwargs" in written["vision_cfg"] and "norm_kwargs" not in written["text_cfg"]


def test_an_absent_field_has_the_default_of_open_clip():
    """The defaults of CLIPVisionCfg and CLIPTextCfg describe a ViT-B/16 with exact GELU."""
    empty = {"model_cfg": {"embed_dim": 9, "vision_cfg": {}, "text_cfg": {}}}
    assert CLIPConfig.from_fields(from_open_clip(empty)) == CLIPConfig(
        VisionConfig(768, 12, 12, 3072, "gelu", 1e-5, 224, 16),
        TextConfig(512, 12, 8, 2048, "gelu", 1e-5, 49408, 77, 49406, LEGACY_EOS),
        embed_dim=9,
    )
    assert context_of_open_clip(empty) == 77


def test_optional_fields_of_open_clip_are_read():
    settings = json.loads(json.dumps(DISTINCT_OPEN_CLIP))
    settings["vision_cfg"]["image_size"] = [60, 36]
    settings["text_cfg"] |= {"pool_type": "eos", "eos_id": 999}
    settings["init_logit_scale"] = 1.5
    vision, text = (
        replace(DISTINCT.vision, image_size=(60, 36)),
        replace(DISTINCT.text, eos_token_id=999),
    )
    expected = replace(DISTINCT, vision=vision, text=text, logit_scale_init=1.5)
    assert CLIPConfig.from_fields(from_open_clip({"model_cfg": settings})) == expected


@pytest.mark.parametrize(
    ("section", "field", "values"),
    [
        ("vision_cfg", "pool_type", ["tok"]),
        ("vision_cfg", "pos_embed_type", ["learnable"]),
        ("vision_cfg", "block_type", ["default"]),
        ("vision_cfg", "patch_dropout", [0.5]),
        ("vision_cfg", "output_tokens", [True]),
        ("vision_cfg", "attn_pooler_heads", [8]),
        ("vision_cfg", "timm_drop", [0.1]),
        ("text_cfg", "pool_type", ["argmax"]),
        ("text_cfg", "proj_type", ["linear"]),
        ("text_cfg", "pad_id", [1]),
        ("text_cfg", "eos_id", [7]),
        ("text_cfg", "hf_tokenizer_name", ["openai/clip-vit-base-patch32"]),
        ("text_cfg", "tokenizer_kwargs", [{"clean": "lower"}]),
        ("text_cfg", "tokenizer_mode", ["clips"]),  # only the tokenizer raises an error
        ("text_cfg", "hf_proj_type", ["mlp"]),
        ("", "custom_text", [True]),
        ("", "output_dict", [True]),
    ],
)
def test_an_open_clip_field_that_does_not_change_the_output_is_accepted(section, field, values):
    """A field may be empty, or have a value that does not change the output."""
    for value in [0, "", {}, None, False, *values]:
        settings = json.loads(json.dumps(DISTINCT_OPEN_CLIP))
        (settings[section] if section else settings)[field] = value
        assert CLIPConfig.from_fields(from_open_clip({"model_cfg": settings})) == DISTINCT


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("", {"multimodal_cfg": {"width": 8}}, "multimodal_cfg"),
        ("", {"init_logit_bias": -10}, "init_logit_bias"),
        ("", {"embed_dim": None}, "embed_dim is None"),
        ("", {"vision_cfg": None}, "expected a section vision_cfg"),
        ("vision_cfg", {"timm_model_name": "vit_base"}, "vision_cfg.timm_model_name"),
        ("vision_cfg", {"pool_type": "avg"}, "vision_cfg.pool_type is 'avg'"),
        ("vision_cfg", {"attentional_pool": True}, "vision_cfg.attentional_pool"),
        ("vision_cfg", {"no_ln_pre": True}, "vision_cfg.no_ln_pre"),
        ("vision_cfg", {"ls_init_value": 0.1}, "vision_cfg.ls_init_value"),
        ("vision_cfg", {"pos_embed_type": "sin_cos_2d"}, "pos_embed_type"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "a ResNet"),
        ("vision_cfg", {"head_width": 60}, "head_width 60 does not divide"),
        ("vision_cfg", {"head_width": 0}, "expected a number above 0"),
        ("vision_cfg", {"width": "wide"}, "expected a number above 0"),
        ("vision_cfg", {"mlp_ratio": float("nan")}, "expected a number above 0"),
        ("vision_cfg", {"width": "%500000000d"}, "vision_cfg.width is '%500000000d'; exp"),
        ("text_cfg", {"width": 10**13, "mlp_ratio": "1"}, "text_cfg.width is 10000000000000; e"),
        ("text_cfg", {"mlp_ratio": "1"}, "text_cfg.mlp_ratio is '1'; expected"),
        ("", {"quick_gelu": "false"}, "quick_gelu is 'false'; expected true or false"),
        ("", {"quick_gelu": [1]}, r"quick_gelu is \[1\]; expected true or false"),
        ("", {"quick_gelu": float("nan")}, "quick_gelu is nan; expected true or false"),
        ("", {"quick_gelu": 1}, "quick_gelu is 1; expected true or false"),
        ("vision_cfg", {"head_width": True}, "vision_cfg.head_width is True; expected"),
        ("vision_cfg", {"norm_kwargs": {"bias": False}}, "vision_cfg.norm_kwargs is {'bias': Fal"),
        ("vision_cfg", {"norm_kwargs": "eps"}, "vision_cfg.norm_kwargs is 'eps'; expected"),
        ("text_cfg", {"norm_kwargs": [1e-5]}, r"text_cfg.norm_kwargs is \[1e-05\]; expected"),
        (
            "text_cfg",
            {"norm_kwargs": {"eps": "1"}},
            "text_cfg.norm_kwargs is {'eps': '1'}; expected",
        ),
        ("text_cfg", {"vocab_size": "500"}, "text_cfg.vocab_size is '500'; expected"),
        ("vision_cfg", {"act_kwargs": {"approximate": "tanh"}}, "act_kwargs"),
        ("vision_cfg", {"a_field_of_tomorrow": 1}, "a_field_of_tomorrow"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg.hf_model_name"),
        ("text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask"),
        ("text_cfg", {"pool_type": "last"}, "text_cfg.pool_type is 'last'"),
        ("text_cfg", {"pool_type": "eos"}, "text_cfg.pool_type is 'eos'; expected a field eos_id"),
        ("text_cfg", {"proj_type": "none"}, "text_cfg.proj_type"),
        ("text_cfg", {"proj_bias": True}, "text_cfg.proj_bias"),
        ("text_cfg", {"embed_cls": True}, "text_cfg.embed_cls"),
    ],
)
def test_an_unsupported_or_invalid_open_clip_field_is_an_error(tmp_path, section, change, message):
    settings = json.loads(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    (settings["model_cfg"][section] if section else settings["model_cfg"]).update(change)
    with pytest.raises(ValueError, match=message):
        CLIPConfig.from_fields(from_open_clip(settings))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=f"open_clip_config.json: .*({message})"):
        CLIPConfig.from_pretrained(tmp_path)


def test_all_fields_that_open_clip_writes_are_accepted():
    """Most fields have open_clip's defaults. In evaluation, the others do not change embeddings."""
    settings = json.loads(json.dumps({"model_cfg": OPEN_CLIP}))
    plain = CLIPConfig.from_fields(from_open_clip(settings))
    settings["model_cfg"]["vision_cfg"] |= {
        "ls_init_value": None, "patch_dropout": 0.5, "attentional_pool": False,
        "attn_pooler_queries": 256, "attn_pooler_heads": 8, "no_ln_pre": False, "head_width": 64,
        "pos_embed_type": "learnable", "final_ln_after_pool": False, "pool_type": "tok",
        "output_tokens": True, "act_kwargs": {}, "norm_kwargs": {}, "block_type": "default",
        "qk_norm": False, "timm_model_name": None, "timm_pool": "avg", "timm_proj": "linear",
        "timm_model_pretrained": False, "timm_drop": 0.0, "timm_drop_path": None,
    }  # fmt: skip
    settings["model_cfg"]["text_cfg"] |= {
        "hf_tokenizer_name": "openai/clip-vit-base-patch32", "tokenizer_kwargs": {"clean": "lower"},
        "pad_id": 0, "eos_id": 2, "pool_type": "argmax", "proj_type": "linear", "proj_bias": False,
        "hf_model_name": None, "hf_model_pretrained": True, "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "mlp",
    }  # fmt: skip
    assert CLIPConfig.from_fields(from_open_clip(settings)) == plain


TOKENIZING = [
    ({"tokenizer_kwargs": {"clean": "canonicalize"}}, "tokenizer_kwargs.clean is 'canonicalize'"),
    ({"tokenizer_kwargs": {"clean": "whitespace"}}, "tokenizer_kwargs.clean is 'whitespace'"),
    ({"tokenizer_kwargs": {"strip_sep_token": True}}, "tokenizer_kwargs.strip_sep_token is True"),
    ({"tokenizer_kwargs": {"reduction_mask": "simple"}}, "tokenizer_kwargs.reduction_mask is"),
    ({"tokenizer_kwargs": {"additional_special_tokens": ["<x>"]}}, "tokenizer_kwargs.additional"),
    ({"tokenizer_kwargs": "lower"}, "tokenizer_kwargs is 'lower'; expected an object"),
    ({"tokenizer_mode": "clips"}, "tokenizer_mode is 'clips'"),
    ({"context_length": "20"}, "context_length is '20'; expected a whole number"),
]


@pytest.mark.parametrize(("change", "message"), TOKENIZING)
def test_open_clip_settings_that_change_the_tokens_are_an_error(tmp_path, change, message):
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    Tokenizer.from_pretrained("shapes").save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).context_length == 20
    settings = {"model_cfg": OPEN_CLIP | {"text_cfg": OPEN_CLIP["text_cfg"] | change}}
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=f"open_clip_config.json: text_cfg.{message}"):
        Tokenizer.from_pretrained(tmp_path)
    if "context_length" not in change:
        assert CLIPConfig.from_pretrained(tmp_path) == variant(act="gelu")


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_kwargs": {"clean": "lower", "reduction_mask": ""}, "tokenizer_mode": None},
        {"tokenizer_kwargs": {"clean": "whitespace"}, "hf_tokenizer_name": "openai/clip-vit-l"},
    ],
)
def test_open_clip_settings_that_do_not_change_the_tokens_are_accepted(tmp_path, change):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    Tokenizer.from_pretrained("shapes").save_pretrained(tmp_path)
    plain = Tokenizer.from_pretrained(tmp_path)
    settings = {"model_cfg": OPEN_CLIP | {"text_cfg": OPEN_CLIP["text_cfg"] | change}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    tokenizer, text = Tokenizer.from_pretrained(tmp_path), ["A  red circle"]
    assert torch.equal(tokenizer(text), plain(text))
    settings["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "facebook/xlm-v-base"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="text_cfg.hf_tokenizer_name is 'facebook/xlm-v-base'"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolation": "bilinear"}, "interpolation is 'bilinear'"),
        (
            {"resize_mode": "longest"},
            "resize_mode is 'longest'; .* 'shortest' or 'squash'",
        ),
        ({"mode": "L"}, "mode is 'L'; expected 'RGB'"),
        ({"size": [64, 32]}, r"size is \[64, 32\]"),
        ({"mean": [0.5]}, "image_mean"),
    ],
)
def test_an_unsupported_transform_of_open_clip_is_an_error(tmp_path, change, message):
    settings = {"model_cfg": OPEN_CLIP, "preprocess_cfg": change}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=f"open_clip_config.json: .*{message}"):
        ImageTransform.from_pretrained(tmp_path)


def test_an_open_clip_size_of_two_equal_numbers_is_accepted():
    settings = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"size": [32, 32], "fill_color": 0}}
    assert preprocessing_from_open_clip(settings)["size"] == 32


def test_each_transform_setting_is_converted_to_open_clip_and_back():
    """The settings become fields of PreprocessCfg in open_clip's transform.py."""
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    transform = ImageTransform(40, image_mean=mean, image_std=std)
    written = preprocessing_to_open_clip(asdict(transform))
    assert written == {
        "size": 40, "mode": "RGB", "mean": [*mean], "std": [*std], "interpolation": "bicubic",
        "resize_mode": "shortest",
    }  # fmt: skip
    settings = {"model_cfg": OPEN_CLIP, "preprocess_cfg": written}
    assert ImageTransform.from_dict(preprocessing_from_open_clip(settings)) == transform
    with pytest.raises(ValueError, match="this transform resizes to 40 and crops to 36"):
        preprocessing_to_open_clip(asdict(replace(transform, crop_size=36)))


def test_saving_a_transform_updates_each_file_with_image_settings(tmp_path):
    """A program may read only one of these files, so all of them must agree."""
    earlier, later = ImageTransform(40), ImageTransform(32, image_mean=(0.1, 0.2, 0.3))
    files = {
        "open_clip_config.json": {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"size": 40}},
        "processor_config.json": {"image_processor": earlier.to_dict(), "processor_class": "mine"},
        "preprocessor_config.json": earlier.to_dict(),
    }
    for name, settings in files.items():
        (tmp_path / name).write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="this transform resizes to 40 and crops to 36"):
        replace(later, size=40, crop_size=36).save_pretrained(tmp_path)
    assert {name: json.loads((tmp_path / name).read_text()) for name in files} == files
    later.save_pretrained(tmp_path)
    for name in ("processor_config.json", "preprocessor_config.json", "open_clip_config.json"):
        assert ImageTransform.from_pretrained(tmp_path) == later
        saved = json.loads((tmp_path / name).read_text())
        assert saved.get("processor_class", "mine") == "mine"
        assert saved.get("model_cfg", OPEN_CLIP) == OPEN_CLIP
        (tmp_path / name).unlink()


# ------------------------------------------------------------- conversion to a layout and back


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), [*product(LAYOUTS, LAYOUTS)])
def test_conversion_to_any_layout_and_back_changes_no_bit(tmp_path, one, other, inputs):
    model = CLIP(OPENAI).double()
    randomize(model)
    model.save_pretrained(tmp_path / "a", layout=one)
    convert(tmp_path / "a", tmp_path / "b", other)
    convert(tmp_path / "b", tmp_path / "c", one)
    assert_same_model(CLIP.from_pretrained(tmp_path / "c", dtype=torch.float64), model)
    (weights,) = (path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "c" / weights).read_bytes()
    peer = Original(OPENAI).double().eval()
    if other != "transformers":
        tensors = load_file(next((tmp_path / "b").glob("*.safetensors")))
        tensors = {n: t for n, t in tensors.items() if n in peer.state_dict()}
        peer.load_state_dict(tensors, strict=True)
        assert_same_embeddings(model, peer, *inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_save_writes_model_tokenizer_and_transform_in_every_layout(tmp_path, layout):
    shapes = load("shapes")
    vision = vars(OPENAI.vision) | {"image_size": 64, "patch_size": 8}
    text = vars(OPENAI.text) | {"vocab_size": shapes.tokenizer.vocab_size, "bos_token_id": 1}
    model = CLIP(CLIPConfig(VisionConfig(**vision), TextConfig(**text), 48))
    save(tmp_path, model, shapes.tokenizer, shapes.transform, layout=layout)
    loaded = load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), model.parameters()))
    assert loaded.transform == shapes.transform
    text = "a red circle to the left of a blue square"
    assert torch.equal(loaded.tokenizer([text]), shapes.tokenizer([text]))
    with safe_open(next(tmp_path.glob("*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def vision_with(**changes):
    return replace(OPENAI, vision=replace(OPENAI.vision, **changes))


def text_with(**changes):
    return replace(OPENAI, text=replace(OPENAI.text, **changes))


# Each entry has a config, the field that some layouts cannot express, and these layouts' names.
UNSAYABLE = [
    (variant(act="gelu"), "act gelu", {"openai"}),
    (variant(act="gelu_pytorch_tanh"), "act gelu_pytorch_tanh", {"openai", "open_clip"}),
    (vision_with(act="gelu"), "two activations, gelu and quick_gelu", {"openai", "open_clip"}),
    (vision_with(ln_eps=1e-6), "ln_eps 1e-06", {"openai"}),
    (text_with(ln_eps=1e-6), "ln_eps 1e-06", {"openai"}),
    (vision_with(heads=4), r"4 heads in a width of 128 \(.*width 64\)", {"openai"}),
    (text_with(heads=2), r"2 heads in a width of 64 \(.*width 64\)", {"openai"}),
    (vision_with(head_width=32), "head_width 32", {"openai", "open_clip"}),
    (text_with(head_width=32), "head_width 32", {"openai", "open_clip"}),
    (vision_with(registers=2), "registers 2", {"openai", "open_clip"}),
    (vision_with(channels=1), "channels 1", {"openai", "open_clip"}),
    (vision_with(image_size=70), "image_size 70", {"openai"}),
    (vision_with(image_size=(64, 32)), r"image_size \(64, 32\)", {"openai", "open_clip"}),
    (text_with(eos_token_id=7), "eos_token_id 7", {"openai", "open_clip"}),
    (text_with(eos_token_id=499), "", set()),  # every layout can express the largest id
]


@pytest.mark.sweep(4)
@pytest.mark.parametrize(("config", "found", "refusing"), UNSAYABLE)
def test_the_error_names_the_field_that_a_layout_cannot_express(tmp_path, config, found, refusing):
    with meta_device():
        unweighted = CLIP(config)
    for layout in refusing:
        with pytest.raises(CheckpointError, match=f"layout '{layout}' cannot express {found}; 't"):
            unweighted.save_pretrained(tmp_path / layout, layout=layout)
        assert not (tmp_path / layout).exists()
    model = CLIP(config)
    for layout in LAYOUTS.keys() - refusing:
        model.save_pretrained(tmp_path / layout, layout=layout)
        loaded = CLIP.from_pretrained(tmp_path / layout)
        if layout != "transformers":  # only the layout of transformers stores the id 499
            text = replace(model.config.text, eos_token_id=LEGACY_EOS)
            assert loaded.config == replace(model.config, text=text)
        else:
            assert loaded.config == model.config
        assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))


def test_saving_is_an_error_if_load_would_then_read_an_older_weights_file(tmp_path):
    model = CLIP(OPENAI)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model.safetensors, which would be loaded instead"):
        model.save_pretrained(tmp_path, layout="open_clip")
    assert_same_model(CLIP.from_pretrained(tmp_path), model)


def test_the_mlp_width_is_restored_from_the_mlp_ratio_of_open_clip():
    # For the last pair, float64 rounding makes mlp_ratio * width smaller than mlp_width.
    for width, mlp_width in [(1408, 6144), (1664, 8192), (96, 385), (7, 3), (49, 1000), (13, 63)]:
        vision = VisionConfig(width=width, heads=1, mlp_width=mlp_width)
        config = CLIPConfig(vision, TextConfig(width=width, heads=1, mlp_width=mlp_width))
        again = CLIPConfig.from_fields(from_open_clip({"model_cfg": to_open_clip(asdict(config))}))
        assert again.vision.mlp_width == again.text.mlp_width == mlp_width


def read_shapes(tensors):
    fields, _ = without_config(tensors, LAYOUTS["openai"], ("vision", "text"))
    return CLIPConfig.from_fields(fields)


def test_the_shapes_of_openai_tensors_determine_every_field_of_the_config():
    """miniclip would not save this file, because the model takes images of four channels."""
    config = CLIPConfig(
        VisionConfig(192, 5, 3, 240, image_size=84, patch_size=12, channels=4),
        TextConfig(128, 4, 2, 300, "quick_gelu", 1e-5, 1000, 50, 998, LEGACY_EOS),
        embed_dim=44,
    )
    with meta_device():
        tensors = pack(CLIP(config).state_dict(), LAYOUTS["openai"])
    assert read_shapes(tensors) == config
    numbers = dict(zip(OPENAI_NUMBERS, map(torch.tensor, (84, 50, 1000))))
    assert read_shapes(tensors | numbers) == config


def test_the_fused_qkv_tensors_for_openai_share_no_memory_with_the_model():
    model = CLIP(OPENAI)
    packed = pack(model.state_dict(), LAYOUTS["openai"])
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    packed[name].zero_()
    assert model.vision.blocks[0].attn.q_proj.weight.any()


def test_convert_reports_the_tensor_names_of_source_and_destination(tmp_path):
    CLIP(OPENAI).save_pretrained(tmp_path / "a")
    done = convert(tmp_path / "a", tmp_path / "b", "openai")
    rows = {row.name: row for row in done.parameters}
    assert done.layout == "transformers" and not done.tokenizer and not done.transform
    row = rows["text.blocks.1.attn.v_proj.bias"]
    assert row.source == ("text_model.encoder.layers.1.self_attn.v_proj.bias", "")
    assert row.destination == ("transformer.resblocks.1.attn.in_proj_bias", "2")
    assert rows["vision.proj.weight"].destination == ("visual.proj", "T")


def test_a_file_without_vocabulary_gets_the_tokenizer_given_to_convert(tmp_path, capsys):
    """OpenAI's own files have no vocabulary, because it is part of OpenAI's code."""
    tokenizer = load("shapes").tokenizer
    text = vars(OPENAI.text) | {"vocab_size": tokenizer.vocab_size, "bos_token_id": 1}
    config = CLIPConfig(OPENAI.vision, TextConfig(**text), OPENAI.embed_dim)
    (tmp_path / "source").mkdir()
    CLIP(config).save_pretrained(tmp_path / "source", layout="openai")
    source = str(tmp_path / "source/model.safetensors")
    options = ["--layout", "transformers"]
    assert main(["convert", source, "--out", str(tmp_path / "bare"), *options]) == 0
    said = capsys.readouterr().out
    assert "tokenizer not found" in said and "--tokenizer openai/clip-vit-base-patch32" in said
    with pytest.raises(CheckpointError, match="no tokenizer here; expected vocab.json and merges"):
        load(tmp_path / "bare")
    assert (
        main(["convert", source, "--out", str(tmp_path / "b"), *options, "--tokenizer", "shapes"])
        == 0
    )
    assert "needs a tokenizer" not in capsys.readouterr().out
    assert load(tmp_path / "b").tokenizer.vocab == tokenizer.vocab
    with pytest.raises(CheckpointError, match="has vocab.json, which would be loaded instead"):
        convert(source, tmp_path / "b", "transformers")
    with pytest.raises(CheckpointError, match="^everyday: the tokenizer has"):
        convert(source, tmp_path / "c", "transformers", tokenizer="everyday")
    assert not (tmp_path / "c").exists()


# ----------------------------------------------------------------------------------- single towers

VISION = dict(
    hidden_size=48, intermediate_size=100, num_hidden_layers=3, num_attention_heads=4,
    image_size=40, patch_size=8, projection_dim=36, hidden_act="gelu",
)  # fmt: skip
TEXT = dict(
    hidden_size=40, intermediate_size=92, num_hidden_layers=2, num_attention_heads=2,
    vocab_size=600, max_position_embeddings=20, projection_dim=36, eos_token_id=2, bos_token_id=0,
)  # fmt: skip


def tower_inputs(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "vision":
        return {"pixel_values": torch.randn(2, 3, 40, 40, generator=generator)}
    return {"input_ids": torch.randint(3, 600, (3, 9), generator=generator)}


PEERS = {
    "vision": (CLIPVisionModel, CLIPVisionConfig, VISION),
    "vision, projected": (CLIPVisionModelWithProjection, CLIPVisionConfig, VISION),
    "text": (CLIPTextModel, CLIPTextConfig, TEXT),
    "text, projected": (CLIPTextModelWithProjection, CLIPTextConfig, TEXT),
}


@pytest.mark.sweep(4)
@pytest.mark.parametrize("prefixed", [True, False, None], ids=["prefix", "as saved", "no prefix"])
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_load_reads_one_tower_saved_by_transformers(tmp_path, name, prefixed):
    model_class, config_class, shape = PEERS[name]
    kind = name.partition(",")[0]
    peer = model_class(config_class(**shape))
    generator = torch.Generator().manual_seed(0)
    for parameter in peer.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    peer.eval().save_pretrained(tmp_path)
    if prefixed:  # until 5.6, transformers added a prefix to towers without projection
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        if "projected" not in name:
            tensors = {f"{kind}_model.{key}": tensor for key, tensor in tensors.items()}
        tensors[f"{kind}_model.embeddings.position_ids"] = torch.arange(26)[None]
        save_file(tensors, path)
    if prefixed is None:
        path = tmp_path / "model.safetensors"
        tensors = load_file(path).items()
        save_file({name.removeprefix(f"{kind}_model."): t for name, t in tensors}, path)

    tower = load(tmp_path).model
    assert type(tower) is {"vision": VisionTower, "text": TextTower}[kind]
    inputs = tower_inputs(kind)
    output = peer(**inputs)
    theirs = (
        output.pooler_output
        if "projected" not in name
        else getattr(output, {"vision": "image_embeds", "text": "text_embeds"}[kind])
    )
    assert torch.equal(tower(*inputs.values()), theirs)
    same, other = (VisionTower, TextTower) if kind == "vision" else (TextTower, VisionTower)
    assert torch.equal(same.from_pretrained(tmp_path)(*inputs.values()), theirs)
    with pytest.raises(CheckpointError, match="has no (vision|text) tower"):
        other.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"load it with {same.__name__}.from_pretrained"):
        CLIP.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="only one tower"):
        convert(tmp_path, tmp_path / "out", "openai")
    with pytest.raises(CheckpointError, match="has only a (vision|text) tower"):
        CLIPConfig.from_pretrained(tmp_path)


def test_from_pretrained_reads_one_tower_of_a_checkpoint_with_two_towers(tmp_path):
    model = twins(TINY)[0]
    model.save_pretrained(tmp_path)
    vision, text = VisionTower.from_pretrained(tmp_path), TextTower.from_pretrained(tmp_path)
    for tower, whole in ((vision, model.vision), (text, model.text)):
        assert tower.state_dict().keys() == whole.state_dict().keys()
        assert all(map(torch.equal, tower.parameters(), whole.parameters()))
    half = VisionTower.from_pretrained(tmp_path, dtype=torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


def test_loading_a_text_tower_returns_the_tokenizer_but_no_transform(tmp_path):
    shapes = load("shapes")
    CLIPTextModel(CLIPTextConfig(**TEXT | {"vocab_size": 700})).save_pretrained(tmp_path)
    assert load(tmp_path)[1:] == (None, None)  # this folder has no tokenizer and no transform
    shapes.tokenizer.save_pretrained(tmp_path)
    shapes.transform.save_pretrained(tmp_path)
    _, tokenizer, transform = load(tmp_path)
    assert tokenizer.vocab == shapes.tokenizer.vocab and transform is None


@pytest.mark.parametrize(
    ("name", "layers", "width", "act"),
    [
        ("sd15_text_encoder_config.json", 12, 768, "quick_gelu"),
        ("sd21_text_encoder_config.json", 23, 1024, "gelu"),
        ("ipadapter_h14_image_encoder_config.json", 32, 1280, "gelu"),
    ],
)
def test_published_configs_of_one_tower_are_read(data, name, layers, width, act):
    fields = tower_from_transformers(json.loads((data / "configs" / name).read_text()))
    tower = fields["text" if "text" in name else "vision"]
    assert (tower["layers"], tower["width"], tower["act"]) == (layers, width, act)


@pytest.mark.parametrize("projection_dim", [0, -1, "wide", None, 2**40])
def test_an_invalid_projection_dim_of_a_tower_is_an_error(tmp_path, projection_dim):
    CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text()) | {"projection_dim": projection_dim}
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="config.json: projection_dim is"):
        TextTower.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------- presets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "file"),
    [
        ("B/32", "openai_clip-vit-base-patch32"),
        ("L/14", "openai_clip-vit-large-patch14"),
        ("TinyCLIP-8M/16", "TinyCLIP-8M"),
    ],
)
def test_presets_have_the_shapes_of_the_published_files(data, preset, file):
    header = json.loads((data / f"headers/{file}.reconstructed_header.json").read_text())
    published = {n: entry["shape"] for n, entry in header.items() if entry.get("dtype") == "F32"}
    with torch.device("meta"):
        model = CLIP(PUBLISHED[preset])
    ours = pack(model.state_dict(), LAYOUTS["transformers"])
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == published


# --------------------------------------------------------------------------------- damaged weights


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_load_warns_of_weights_that_are_not_finite_and_does_not_change_them(tmp_path, value):
    model = twins(TINY)[0]
    model.vision.blocks[1].mlp.fc1.bias.data[3] = value
    model.text.pos_embed.data[0, 0] = value
    model.save_pretrained(tmp_path)
    names = r"vision\.blocks\.1\.mlp\.fc1\.bias, text\.pos_embed$"
    with pytest.warns(UserWarning, match=f"NaN or infinity in 2 tensors: {names}") as warned:
        loaded = CLIP.from_pretrained(tmp_path)
    assert [warning.filename for warning in warned] == [__file__]
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    with pytest.warns(UserWarning, match="in 1 tensors: blocks.1.mlp.fc1.bias"):
        VisionTower.from_pretrained(tmp_path)


def test_large_weights_whose_sum_overflows_give_no_warning(tmp_path):
    model = twins(TINY)[0].half()
    model.vision.pos_embed.data[:] = 60_000.0
    assert model.vision.pos_embed.sum().isinf()
    model.save_pretrained(tmp_path)
    loaded = CLIP.from_pretrained(tmp_path, dtype=torch.float16)  # a warning fails the test
    assert torch.equal(loaded.vision.pos_embed, model.vision.pos_embed)


def test_float8_weights_are_loaded_unchanged_and_checked_for_nan(tmp_path):
    twins(TINY)[0].save_pretrained(tmp_path)
    path, dtype = tmp_path / "model.safetensors", torch.float8_e4m3fn
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    assert {p.dtype for p in CLIP.from_pretrained(tmp_path, dtype=None).parameters()} == {dtype}
    tensors["logit_scale"] = torch.tensor(torch.nan).to(dtype)
    save_file(tensors, path)
    with pytest.warns(UserWarning, match="NaN or infinity in 1 tensors: logit_scale"):
        CLIP.from_pretrained(tmp_path, dtype=None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_converted_to_the_requested_dtype(tmp_path, layout, dtype=torch.bfloat16):
    model = CLIP(OPENAI)
    randomize(model)
    model.save_pretrained(tmp_path, layout=layout)
    loaded = CLIP.from_pretrained(tmp_path, dtype=dtype)
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert theirs.is_contiguous() and torch.equal(ours.to(dtype), theirs)


# ------------------------------------------------------------ the originals, if they are installed


@pytest.fixture(scope="module")
def openai_model():
    clip = pytest.importorskip("clip", reason="openai/CLIP's own classes: pip install openai-clip")
    return clip.model


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip(
        "open_clip", reason="open_clip's classes: pip install open_clip_torch"
    )


@torch.no_grad()
def random_weights(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


@pytest.mark.filterwarnings(NO_NUMBERS)
def test_the_original_class_of_openai_gives_the_same_embeddings(openai_model, tmp_path, inputs):
    peer = random_weights(openai_model.CLIP(48, 64, 3, 128, 16, 20, 500, 64, 1, 2))
    torch.save(peer.state_dict(), tmp_path / "x.pt")
    pixels, ids = inputs
    model = CLIP.from_pretrained(tmp_path / "x.pt")
    assert_same_embeddings(model, peer, pixels.float(), ids, atol=1e-5)
    model.save_pretrained(tmp_path / "back", layout="openai")
    tensors = load_file(tmp_path / "back/model.safetensors")
    assert openai_model.build_model(dict(tensors)).visual.input_resolution == 64
    assert all(torch.equal(tensors[name], tensor) for name, tensor in peer.state_dict().items())


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_original_classes_of_open_clip_give_the_same_embeddings(
    open_clip, tmp_path, inputs, custom_text, quick_gelu
):
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    peer = random_weights(kind(**OPEN_CLIP, quick_gelu=quick_gelu))
    settings = OPEN_CLIP | {"quick_gelu": quick_gelu, "custom_text": custom_text}
    write_open_clip(tmp_path / "a", peer, settings)
    model = CLIP.from_pretrained(tmp_path / "a")
    pixels, ids = inputs
    assert_same_embeddings(model, peer, pixels.float(), ids, atol=1e-5)
    save(tmp_path / "b", model, load("shapes").tokenizer, ImageTransform(64), layout="open_clip")
    again = open_clip.create_model(f"local-dir:{tmp_path / 'b'}").eval()
    assert_same_embeddings(model, again, pixels.float(), ids, atol=1e-5)
