"""Common tools for PyTorch models work on a miniclip model, because a site is a module.

    pip install captum grad-cam nnsight bertviz torchao peft

A test is skipped if its tool is not installed.
"""

import pytest
import torch
from torch import nn
from twin import TINY, assert_close, assert_far, random_inputs, tiny_clip

from miniclip import Tokenizer, cache, hooks
from miniclip.lens import attention_maps, gradcam, on_grid
from miniclip.surgery import splice

pytestmark = pytest.mark.filterwarnings("ignore")  # the tools raise warnings about their own code


@pytest.fixture
def model():
    return tiny_clip(torch.float64)


@pytest.fixture
def pixels():
    return random_inputs(TINY, images=2)[0].double()


@pytest.fixture
def ids():
    return random_inputs(TINY, texts=2)[1]


def installed(name):
    return pytest.importorskip(name, reason=f"{name} cannot be imported", exc_type=ImportError)


class Scores(nn.Module):
    """A classifier for other tools. It returns the logits (B, 1) of a single text."""

    def __init__(self, model, ids):
        super().__init__()
        self.model, self.ids = model, ids

    def forward(self, pixels):
        return self.model(pixels, self.ids).logits_per_image


def test_captum_computes_attributions_of_sites_and_pixels(model, pixels, ids):
    captum = installed("captum.attr")
    scores = Scores(model, ids[:1])
    site = "vision.blocks.1.attn.pattern"
    found = captum.LayerGradCam(scores, model.vision.blocks[1].attn.pattern).attribute(pixels, 0)
    with cache(model, site, grad=True) as acts:
        score = scores(pixels).sum()
    slope = torch.autograd.grad(score, acts[site])[0]
    heads = slope.mean((2, 3), keepdim=True)  # the heads are the channels of (B, H, T, T)
    assert_close(found, (heads * acts[site]).sum(1, keepdim=True).detach())

    found = captum.IntegratedGradients(scores).attribute(pixels, target=0, n_steps=200)
    with torch.no_grad():
        gained = scores(pixels) - scores(torch.zeros_like(pixels))
    assert ((found.sum((1, 2, 3)) - gained[:, 0]).abs() < 1e-3 * gained.abs().max()).all()


def test_pytorch_grad_cam_and_our_gradcam_give_the_same_map(model, pixels, ids):
    grad_cam = installed("pytorch_grad_cam")
    from pytorch_grad_cam.utils.image import scale_cam_image

    def on_patches(tokens):  # (B, T, W) -> (B, W, rows, columns)
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (5, 5))

    layer = model.vision.blocks[-1].ln_1
    with grad_cam.GradCAM(Scores(model, ids[:1]), [layer], on_patches) as cam:
        found = torch.from_numpy(cam(pixels, targets=None))
    maps = on_grid(model, pixels, gradcam(model, pixels, ids[:1].expand(2, -1)))
    resized = scale_cam_image(maps.numpy(), (40, 40))  # this also scales to [0, 1]
    expected = torch.from_numpy(scale_cam_image(resized))  # grad-cam scales a second time
    assert (found - expected).abs().max() < 1e-5
    assert (found - expected.flip(0)).abs().max() > 0.1


def test_nnsight_reads_and_edits_sites(model, pixels, ids):
    nnsight = installed("nnsight")
    traced = nnsight.NNsight(model)
    with torch.no_grad(), traced.trace(pixels, ids):
        pattern = traced.vision.blocks[1].attn.pattern.output.save()
        traced.vision.blocks[2].mlp.output[:] = 0
        embeds = traced.vision.output.save()
    assert_close(pattern, attention_maps(model, pixels)[1])
    with torch.no_grad(), hooks(model, {"vision.blocks.2.mlp": lambda out, name: 0 * out}):
        assert_close(embeds, model.encode_image(pixels))


def test_bertviz_shows_attention_maps():
    bertviz = installed("bertviz")
    tokenizer = Tokenizer.from_pretrained("shapes")
    ids = tokenizer(["a red circle"])
    model = tiny_clip()
    model.text.token_embed = nn.Embedding(tokenizer.vocab_size, TINY.text.width)
    model.text.config = model.text.config.__class__(
        **{**vars(model.text.config), "vocab_size": tokenizer.vocab_size,
           "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
    )  # fmt: skip
    maps = attention_maps(model, ids)
    page = bertviz.head_view(maps, tokenizer.tokens(ids[0]), html_action="return").data
    labels = [token.removesuffix("</w>") for token in tokenizer.tokens(ids[0])]  # as bertviz shows
    assert all(f'"{label}"' in page for label in labels)
    with pytest.raises(ValueError):
        bertviz.head_view(maps, ["one", "token"], html_action="return")


def test_sites_still_work_after_torchao_quantises_a_tower(pixels):
    torchao = installed("torchao.quantization")
    model, pixels = tiny_clip(), pixels.float()
    with torch.no_grad():
        whole = model.encode_image(pixels)
        torchao.quantize_(model.vision, torchao.Int8WeightOnlyConfig())
        with cache(model, "vision.blocks.1.attn.pattern") as acts:
            found = model.encode_image(pixels)
    assert nn.functional.cosine_similarity(found, whole).min() > 0.99
    assert not torch.equal(found, whole)
    assert_close(acts["vision.blocks.1.attn.pattern"].sum(-1), torch.ones(2, 4, 26))


def test_peft_adds_lora_to_a_model_and_merges_the_weights(model, pixels, ids):
    peft = installed("peft")
    with torch.no_grad():
        whole = model.encode_image(pixels)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        adapted = tuned.encode_image(pixels)
        assert_far(adapted, whole)
        assert_close(tuned.merge_and_unload().encode_image(pixels), adapted)


class PrismaSAE(nn.Module):
    """ViT-Prisma's sparse autoencoder, ReLU((x - b_dec) W_enc + b_enc) W_dec + b_dec."""

    def __init__(self, path):
        super().__init__()
        saved = torch.load(path, weights_only=True)
        self.weights = nn.ParameterDict(saved.get("state_dict", saved))
        self.features = nn.ReLU()  # a module, so that hooks can edit the features

    def forward(self, x):
        w = self.weights
        return self.features((x - w.b_dec) @ w.W_enc + w.b_enc) @ w.W_dec + w.b_dec


@pytest.fixture
def sae_file(tmp_path):
    """A file with the same tensor names and shapes as ViT-Prisma's files on the hub."""
    torch.manual_seed(0)
    shapes = {"W_enc": (48, 96), "b_enc": (96,), "W_dec": (96, 48), "b_dec": (48,)}
    weights = {name: torch.randn(shape, dtype=torch.float64) / 7 for name, shape in shapes.items()}
    torch.save(weights, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@torch.no_grad()
def test_a_sparse_autoencoder_of_vit_prisma_can_be_spliced_into_a_model(model, pixels, sae_file):
    sae, site = PrismaSAE(sae_file), "vision.blocks.1"
    with splice(model, site, sae), cache(sae, "features") as acts:
        found = model.encode_image(pixels)
    with hooks(model, {site: lambda x, name: sae(x)}):
        assert_close(found, model.encode_image(pixels))
    assert acts["features"].shape == (2, 26, 96) and (acts["features"] >= 0).all()
    whole = model.encode_image(pixels)
    assert_far(found, whole)
    with splice(model, site, sae, error_term=True):
        assert_close(model.encode_image(pixels), whole)
