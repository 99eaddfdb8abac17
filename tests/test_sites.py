"""Test hooks at sites: what a hook may change, how it is removed, and which tensor a site is.

test_model.py compares each site with transformers. This file compares the tensors of `cache` with
transformers and with each other.
"""

import copy
import pickle
import sys
from dataclasses import replace
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from twin import TINY, random_inputs, tiny_clip, twins

from miniclip.lens import attention_maps, decompose, logit_lens
from miniclip.model import Attention, Block
from miniclip.parity import compare
from miniclip.sites import KINDS, PARTS, cache, find, hooks, matches, site
from miniclip.surgery import add_lora, copied

FLOAT64 = 1e-10
REORDERED = 2e-5

# torch.compile of torch 2.13 raises these warnings about its own code.
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch.*")

TOWERS = [("vision", TINY.vision.layers), ("text", TINY.text.layers)]
READ_OFF = ["vision.ln_post", "vision.proj", "text.ln_final", "text.proj"]
IN_BLOCKS = [
    site(kind, tower=tower, layer=layer)
    for tower, layers in TOWERS
    for layer in range(layers)
    for kind in KINDS
]


@pytest.fixture
def tiny():
    model = tiny_clip()
    model.set_attention("eager")
    return model, random_inputs(TINY)


@torch.no_grad()
def logits(model, inputs):
    return model(*inputs).logits_per_image


def handles(model):
    return {name: dict(module._forward_hooks) for name, module in model.named_modules()}


def nothing(tensor, name):
    return None


# ------------------------------------------------------------------------------------------- hooks


def test_a_hook_that_returns_nothing_changes_no_bit(tiny):
    model, inputs = tiny
    expected = logits(model, inputs)
    every = [name for name, _ in model.named_modules() if name]
    seen = []
    with hooks(model, {name: lambda x, name: seen.append(name) for name in every}):
        assert torch.equal(logits(model, inputs), expected)
    assert sorted(seen) == sorted(every)
    assert torch.equal(logits(model, inputs), expected)


def test_sdpa_changes_its_rounding_only_if_scores_or_pattern_are_read():
    model = tiny_clip()
    inputs = random_inputs(TINY)
    expected = logits(model, inputs)
    for name in IN_BLOCKS:
        with hooks(model, {name: nothing}):
            watched = logits(model, inputs)
        if name.endswith(("scores", "pattern")):
            assert (watched - expected).abs().max() < REORDERED
        else:
            assert torch.equal(watched, expected), name


def test_an_edit_at_any_site_changes_the_output(tiny):
    model, inputs = tiny
    expected = logits(model, inputs)
    generator = torch.Generator().manual_seed(1)

    def noise(x, name):
        return x * (1 + torch.rand(x.shape, generator=generator))

    for name in [*IN_BLOCKS, *READ_OFF, "vision.ln_pre", "vision.patch_embed", "text.token_embed"]:
        with hooks(model, {name: noise}):
            assert (logits(model, inputs) - expected).abs().max() > 1e-4, name
        assert torch.equal(logits(model, inputs), expected), name


def test_zeroing_a_head_at_z_equals_zeroing_its_columns_of_out_proj(tiny):
    model, (pixels, _) = tiny
    model, pixels = model.double(), pixels.double()
    D = model.vision.blocks[1].attn.head_width
    keep = torch.tensor([1.0, 1, 0, 1], dtype=torch.float64)[:, None]
    with torch.no_grad(), hooks(model, {"vision.blocks.1.attn.z": lambda z, name: z * keep}):
        edited = model.encode_image(pixels)
        model.vision.blocks[1].attn.out_proj.weight[:, 2 * D : 3 * D] = 0
    with torch.no_grad():
        assert (edited - model.encode_image(pixels)).abs().max() < FLOAT64


def test_hook_functions_run_in_the_given_order(tiny):
    model, inputs = tiny
    seen = []
    name = "text.blocks.0"
    edits = {name: lambda x, _: x + 1, "text.blocks.[0]": lambda x, _: seen.append(x)}
    with cache(model, name) as before, hooks(model, edits), cache(model, name) as after:
        model(*inputs)
    assert torch.equal(seen[0], before[name] + 1) and torch.equal(after[name], seen[0])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("returns", [True, False])
def test_an_edit_in_place_is_an_error(tiny, mode, returns):
    model, inputs = tiny

    def nudge_a_head(z, name):
        with torch.no_grad():
            z[:, :, 1] *= 1 + 1e-6
        return z if returns else None

    with mode(), pytest.raises(ValueError, match=r"vision.blocks.0.attn.z: .* in place"):
        with hooks(model, {"vision.blocks.0.attn.z": nudge_a_head}):
            model(*inputs)


def test_a_nan_in_a_tensor_is_not_mistaken_for_an_edit(tiny):
    model, (pixels, ids) = tiny
    pixels[:] = torch.nan
    with torch.inference_mode(), hooks(model, {"vision.blocks.*": nothing}):
        model(pixels, ids)


def test_a_hook_must_receive_and_return_a_tensor(tiny):
    model, inputs = tiny
    with pytest.raises(ValueError, match="text.proj: the hook returned a float"):
        with hooks(model, {"text.proj": lambda x, name: x.sum().item()}):
            model(*inputs)
    with pytest.raises(ValueError, match="0: expected a tensor, found tuple"):
        lstm = nn.Sequential(nn.LSTM(3, 3))
        with hooks(lstm, {"0": nothing}):
            lstm(torch.zeros(1, 3))


OTHERS = {
    "fewer rows": lambda x, _: x[:1],
    "the mean": lambda x, _: x.mean(0),
    "one token": lambda x, _: x[:, :1],
    "fewer neurons": lambda x, _: x[..., :-1],
    "another dtype": lambda x, _: x.double(),
    "another device": lambda x, _: x.to("meta"),
}


@pytest.mark.parametrize("edit", OTHERS)
@pytest.mark.parametrize("name", ["attn.z", "attn.scores", "mlp", "resid_mid"])
def test_a_hook_that_returns_a_different_shape_dtype_or_device_is_an_error(tiny, edit, name):
    model, inputs = tiny
    site = f"vision.blocks.1.{name}"
    with hooks(model, {site: OTHERS[edit]}):
        if (edit, name) == ("one token", "resid_mid"):  # hooks may remove tokens here
            assert model.vision.blocks(model.vision.embed_tokens(inputs[0])).shape[1] == 1
            return
        with pytest.raises(ValueError, match=f"{site}: the hook returned shape .*; expected shape"):
            model(*inputs)


def test_a_hook_can_return_a_different_dtype_under_autocast(tiny):
    model, (pixels, _) = tiny
    with torch.autocast("cpu", torch.bfloat16):
        with hooks(model, {"vision.blocks.0.mlp": lambda x, _: x.float()}):
            model.encode_image(pixels)


@pytest.mark.parametrize("look", [
    lambda m, x: cache(m, "vision.blocks.0").__enter__(),
    lambda m, x: cache(m, "vision.blocks.*.attn.pattern").__enter__(),
    lambda m, x: attention_maps(m, x),
    lambda m, x: logit_lens(m, x),
    lambda m, x: decompose(m, x),
])  # fmt: skip
def test_a_hook_on_a_shared_module_is_an_error(tiny, look):
    model, (pixels, _) = tiny
    blocks = model.vision.blocks
    blocks[1] = blocks[0]
    with pytest.raises(ValueError, match="blocks.0.*: a module with several names"):
        look(model, pixels)
    parameters = {id(parameter): parameter for parameter in blocks[0].parameters()}
    blocks[1] = copy.deepcopy(blocks[0], parameters)  # two modules with the same weights
    assert blocks[1].mlp.fc1.weight is blocks[0].mlp.fc1.weight
    assert len(attention_maps(model, pixels)) == 3


# --------------------------------------------- the input of a module, and the steps of a LayerNorm


@torch.no_grad()
def test_the_input_scale_and_normalized_values_of_a_layer_norm_are_right():
    ours, theirs = twins(TINY, attention="eager")
    pixels, ids = random_inputs(TINY)
    expected = logits(ours, (pixels, ids))
    names = [f"*.blocks.*.ln_[12].{part}" for part in ("input", "scale", "normalized")]
    rest = ["vision.ln_pre.input", "text.blocks.0.input", "*.blocks.*", "*.blocks.*.resid_mid"]
    with cache(ours, *names, *rest, "*.blocks.*.ln_[12]", "vision.ln_pre") as acts:
        found = logits(ours, (pixels, ids))
    assert torch.equal(found, expected)
    assert torch.equal(acts["vision.ln_pre.input"], theirs.vision_model.embeddings(pixels))
    assert torch.equal(acts["text.blocks.0.input"], theirs.text_model.embeddings(ids))
    starts = {"vision": acts["vision.ln_pre"], "text": acts["text.blocks.0.input"]}
    for tower, layers in TOWERS:
        for i in range(layers):
            block = f"{tower}.blocks.{i}"
            first = acts[f"{tower}.blocks.{i - 1}"] if i else starts[tower]
            for ln, x in (("ln_1", first), ("ln_2", acts[f"{block}.resid_mid"])):
                norm = ours.get_submodule(f"{block}.{ln}")
                assert torch.equal(acts[f"{block}.{ln}.input"], x)
                scale, normalized = (acts[f"{block}.{ln}.{part}"] for part in PARTS[1:])
                centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
                length = centred.square().sum(-1, keepdim=True) / x.shape[-1] + norm.eps
                torch.testing.assert_close(scale, length.sqrt(), rtol=1e-5, atol=0)
                torch.testing.assert_close(normalized * scale, centred, rtol=0, atol=1e-5)
                out = acts[f"{block}.{ln}"]
                torch.testing.assert_close(
                    normalized * norm.weight + norm.bias, out, rtol=0, atol=1e-5
                )


@torch.no_grad()
@pytest.mark.parametrize("affine", [True, False, "no bias"])
def test_an_edit_of_a_step_inside_a_layer_norm_changes_the_next_step(affine):
    norm = nn.LayerNorm(6, elementwise_affine=bool(affine), bias=affine is True).double()
    for parameter in norm.parameters():
        parameter.normal_()
    model, x = nn.Sequential(nn.Identity(), norm), torch.randn(2, 3, 6, dtype=torch.float64)
    weight, bias = norm.weight if affine else 1, norm.bias if affine is True else 0
    half, add = {"1.scale": lambda s, _: s / 2}, {"1.normalized": lambda n, _: n + 1}
    out = {"1": lambda x, _: 3 * x}
    plain = F.layer_norm(x, (6,), eps=norm.eps)
    expected = 3 * ((2 * plain + 1) * weight + bias)
    for first, second, third in permutations((half, add, out)):
        with hooks(model, first), hooks(model, second), hooks(model, third):
            torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
        with hooks(model, first | second | third):
            torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    with hooks(model, half):
        with hooks(model, add):
            pass
        torch.testing.assert_close(model(x), 2 * plain * weight + bias, rtol=0, atol=1e-12)
    assert torch.equal(model(x), norm(x)) and not norm._forward_hooks


def test_gradients_inside_a_layer_norm_equal_finite_differences(tiny):
    model, (pixels, _) = tiny
    model, pixels = model.double().requires_grad_(False), pixels.double()
    names = [f"vision.ln_pre.{part}" for part in PARTS]
    with cache(model, *names, grad=True) as acts:
        output = model.encode_image(pixels)
    slopes = torch.autograd.grad(output[0, 5], [acts[name] for name in names])
    for name, slope in zip(names, slopes, strict=True):
        nudge = torch.zeros_like(slope)
        nudge[0, 2, 0] = 1e-5
        with hooks(model, {name: lambda x, _: x + nudge}):
            up = model.encode_image(pixels)[0, 5]
        with hooks(model, {name: lambda x, _: x - nudge}):
            down = model.encode_image(pixels)[0, 5]
        assert ((up - down) / 2e-5 - slope[0, 2, 0]).abs() < 1e-7


@torch.no_grad()
def test_a_hooked_input_can_be_passed_by_keyword_or_with_a_second_input():
    class Sum(nn.Module):
        def forward(self, x, y=0):
            return x - y

    model = nn.Sequential(Sum())
    with hooks(model, {"0.input": lambda x, _: 10 * x}):
        assert [model[0](2 * x, x).item() for x in (torch.tensor(1),)] == [19]
        assert model[0](x=torch.tensor(2), y=torch.tensor(1)).item() == 19
        with pytest.raises(ValueError, match="0.input: expected a tensor, found int"):
            model(3)
    assert model(torch.tensor(2)).item() == 2
    with pytest.raises(ValueError, match=r"0.input: the hook returned shape \(1\)"):
        with hooks(model, {"0.input": lambda x, _: x[:1]}):
            model(torch.ones(2))


@torch.no_grad()
def test_a_hook_on_the_input_of_a_block_can_add_more_tokens(tiny):
    model, (pixels, _) = tiny
    twice = lambda x, _: torch.cat([x, x], 1)  # noqa: E731
    for name in ("vision.ln_pre.input", "vision.blocks.1.input"):
        with hooks(model, {name: twice}), cache(model, "vision.blocks.1") as acts:
            model.encode_image(pixels)
        assert acts["vision.blocks.1"].shape[1] == 2 * (1 + TINY.vision.patches)
    with pytest.raises(ValueError, match="ln_1.input: the hook returned shape"):
        with hooks(model, {"vision.blocks.1.ln_1.input": twice}):
            model.encode_image(pixels)


def test_only_a_layer_norm_has_a_scale_site_and_a_child_can_be_named_input(tiny):
    model, _ = tiny
    with pytest.raises(ValueError, match=r"'vision.blocks.0.mlp.scale'.*nearest.*ln_2.scale"):
        with cache(model, "vision.blocks.0.mlp.scale"):
            pass

    class Float32Norm(nn.LayerNorm):  # as in openai/CLIP
        def forward(self, x):
            return super().forward(x.float()).to(x.dtype)

    model.vision.ln_pre = Float32Norm(48)
    with pytest.raises(ValueError, match="no site is called 'vision.ln_pre.scale'"):
        with cache(model, "vision.ln_pre.scale"):
            pass
    scaled = nn.Sequential(nn.ModuleDict({"input": nn.ReLU()}))
    with cache(scaled, "0.input") as acts:
        scaled[0]["input"](torch.tensor([-1.0]))
    assert acts["0.input"].item() == 0
    with pytest.raises(ValueError, match="no site is called 'vision.blocks.0.attn.q_proj.input'"):
        add_lora(tiny_clip(), ["vision.blocks.0.attn.q_proj.input"])


@torch.no_grad()
def test_the_scale_of_a_half_precision_layer_norm_is_float32():
    norm = nn.LayerNorm(6).half()
    model, x = (
        nn.Sequential(norm),
        300 * torch.randn(2, 6).half(),
    )  # a variance of 90,000 is inf in float16
    with cache(model, "0.scale", "0.normalized") as acts:
        assert torch.equal(model(x), norm(x))
    expected = (x.double().var(-1, correction=0, keepdim=True) + norm.eps).sqrt().float()
    torch.testing.assert_close(acts["0.scale"], expected)
    with hooks(model, {"0.scale": lambda s, _: s.clone()}):
        assert model(x).dtype == torch.float16
        torch.testing.assert_close(model(x), norm(x), rtol=0, atol=2e-3)


@torch.no_grad()
def test_a_copy_of_a_hooked_model_has_no_hooks_but_keeps_its_pruning(tiny):
    model, (pixels, _) = tiny
    fc1 = model.vision.blocks[0].mlp.fc1
    prune.random_unstructured(fc1, "weight", 0.5)  # a pre-hook computes `weight_orig * mask`
    expected = model.encode_image(pixels)
    with hooks(model, {"vision.blocks.*.input": lambda x, _: 0 * x, "*.ln_pre.scale": nothing}):
        twin = copied(model)
    assert torch.equal(twin.encode_image(pixels), expected)
    twin.vision.blocks[0].mlp.fc1.weight_orig.zero_()
    assert not torch.equal(twin.encode_image(pixels), expected)


# -------------------------------------------------------------------------- what hooks leave behind


def test_a_with_statement_removes_only_its_own_hooks(tiny):
    model, inputs = tiny
    calls = []
    block = model.vision.blocks[0]
    mine = block.register_forward_hook(lambda *_: calls.append("mine"))
    before = handles(model)
    with hooks(model, {"vision.blocks.0": nothing, "*.blocks.*.attn.z": nothing}):
        with cache(model, "vision.blocks.*"):
            assert handles(model) != before
            model(*inputs)
    assert handles(model) == before and calls == ["mine"]

    with pytest.raises(ZeroDivisionError):
        with cache(model, "vision.blocks.*.attn.z"):
            with hooks(model, {"vision.blocks.*": lambda x, name: 1 / 0}):
                model(*inputs)
    assert handles(model) == before
    mine.remove()


def test_a_name_pattern_without_a_match_is_an_error_and_adds_no_hook(tiny):
    model, _ = tiny
    before = handles(model)
    with pytest.raises(ValueError, match=r"'vision.blocks.7.attn.z'.*nearest.*vision.blocks.\d"):
        with hooks(model, {"vision.blocks.0": nothing, "vision.blocks.7.attn.z": nothing}):
            pass
    assert handles(model) == before
    with pytest.raises(ValueError, match=r"vision.blocks.\d.attn.pattern"):
        with cache(model, "vision.blocks.*.attn.patern"):
            pass
    with pytest.raises(ValueError, match=r"'zzz'.*nearest are (vision|text|logit)"):
        with cache(model, "zzz"):
            pass
    with pytest.raises(ValueError, match="no site is given"):
        with cache(model):
            pass
    with pytest.raises(TypeError):
        with cache(model, "vision.blocks.*", incl_bwd=True):
            pass


def test_a_model_is_unchanged_after_hooks(tiny):
    model, inputs = tiny
    keys, expected = list(model.state_dict()), logits(model, inputs)
    with cache(model, "*.blocks.*.attn.*"):
        model(*inputs)
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, inputs), expected)
    assert all(
        row.absolute == row.float64 == 0 for row in compare(model, copy.deepcopy(model)).rows
    )


# -------------------------------------------------------------------------------- the cost of sites


class BareAttention(Attention):
    def forward(self, x):
        heads = (-1, self.head_width)
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, heads).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(z.transpose(1, 2).flatten(2))


class BareBlock(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def without_sites(tower):
    """Return a tower with the same parameters, but without sites."""
    bare = copy.deepcopy(tower, {id(p): p for p in tower.parameters()})
    for module in bare.modules():
        kind = type(module)
        module.__class__ = {Attention: BareAttention, Block: BareBlock}.get(kind, kind)
    return bare


def test_unused_sites_add_no_operation_and_change_no_bit():
    """Unused sites cost only Python calls. Their time is not tested, because it varies too much."""
    model = tiny_clip()
    bare, (pixels, _) = without_sites(model.vision), random_inputs(TINY)

    class Operations(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.inference_mode():
        with Operations() as with_sites:
            found = model.vision(pixels)
        with Operations() as without:
            expected = bare(pixels)
    assert torch.equal(found, expected)
    assert with_sites.names == without.names and len(without.names) > 50


def test_unused_sites_add_nothing_to_an_exported_graph(shallow):
    model, (pixels, _) = shallow
    model.set_attention("sdpa")
    graphs = [
        torch.export.export(tower, (pixels,)).graph
        for tower in (model.vision, without_sites(model.vision))
    ]
    steps, bare = ([(node.op, node.target) for node in graph.nodes] for graph in graphs)
    assert steps == bare and len(steps) > 30


# ------------------------------------------------------------------------------------------- names


def test_a_star_matches_one_part_of_a_name(tiny):
    model, _ = tiny
    names = [name for name, _ in find(model, "vision.blocks.*")]
    assert names == [f"vision.blocks.{i}" for i in range(TINY.vision.layers)]
    assert len(find(model, "*.blocks.*.attn.[qkv]")) == 3 * (TINY.vision.layers + TINY.text.layers)
    assert not matches("vision.blocks.10", "vision.blocks.1")
    assert not matches("vision.blocks.1.LN_1", "vision.blocks.*.ln_1")


def test_cache_works_on_a_single_tower_and_on_any_other_module(tiny):
    model, (pixels, _) = tiny
    with cache(model.vision, "blocks.*.attn.z") as acts:
        model.vision(pixels)
    assert list(acts) == [f"blocks.{i}.attn.z" for i in range(TINY.vision.layers)]
    with cache(nn.Sequential(nn.Linear(3, 2)), "0") as acts:
        pass
    assert acts == {}


def test_site_translates_the_names_of_transformer_lens(tiny):
    model, _ = tiny
    assert site("attn_scores", tower="vision", layer=2) == "vision.blocks.2.attn.scores"
    assert site("resid_post", tower="text", layer=1) == "text.blocks.1"
    assert site("resid_pre", tower="vision", layer=0) == "vision.ln_pre"
    assert site("resid_pre", tower="text", layer=0) == "text.blocks.0.input"
    assert all(find(model, name) for name in IN_BLOCKS)
    for wrong in (
        dict(kind="resid", tower="vision", layer=0),
        dict(kind="z", tower="image", layer=0),
        dict(kind="z", tower="vision", layer=-1),
        dict(kind="z", tower="vision", layer=True),
    ):
        with pytest.raises(ValueError):
            site(**wrong)


# ------------------------------------------------------------------------------------------- cache


def test_the_residual_stream_is_the_sum_of_its_parts(tiny):
    model, inputs = tiny
    with torch.no_grad(), cache(model, *IN_BLOCKS, "vision.ln_pre", "text.blocks.0.input") as acts:
        model(*inputs)
    for tower, layers in TOWERS:
        for layer in range(layers):
            names = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
            pre, attn, mid, mlp, post = (
                acts[site(kind, tower=tower, layer=layer)] for kind in names
            )
            assert torch.equal(mid, pre + attn) and torch.equal(post, mid + mlp)
            assert not torch.equal(post, pre + mlp)


def test_the_sites_of_a_block_can_be_computed_from_each_other(tiny):
    model, inputs = tiny
    with torch.no_grad(), cache(model, *IN_BLOCKS) as acts:
        model(*inputs)
    for tower, layers in TOWERS:
        for layer in range(layers):
            block = getattr(model, tower).blocks[layer]
            names = ("resid_mid", "ln1", "q", "k", "v", "ln2", "mlp_pre", "mlp_post", "mlp_out")
            mid, ln1, q, k, v, ln2, pre, post, out = (
                acts[site(kind, tower=tower, layer=layer)] for kind in names
            )
            for linear, found in (
                (block.attn.q_proj, q),
                (block.attn.k_proj, k),
                (block.attn.v_proj, v),
            ):
                assert torch.equal(found.flatten(2), F.linear(ln1, linear.weight, linear.bias))
            norm, fc1, fc2 = block.ln_2, block.mlp.fc1, block.mlp.fc2
            assert torch.equal(
                ln2, F.layer_norm(mid, mid.shape[-1:], norm.weight, norm.bias, norm.eps)
            )
            assert torch.equal(pre, F.linear(ln2, fc1.weight, fc1.bias))
            assert torch.equal(post, pre * torch.sigmoid(1.702 * pre))
            assert torch.equal(out, F.linear(post, fc2.weight, fc2.bias))


def test_attention_patterns_and_residual_streams_equal_those_of_transformers():
    """The test is in float32, because transformers' eager softmax is always float32."""
    ours, theirs = twins(TINY, attention="eager")
    pixels, ids = random_inputs(TINY)
    with torch.no_grad(), cache(ours, "*.blocks.*.attn.pattern", "*.blocks.*") as acts:
        ours(pixels, ids)
        options = {"output_attentions": True, "output_hidden_states": True}
        peers = {
            "vision": theirs.vision_model(pixels, **options),
            "text": theirs.text_model(ids, **options),
        }
    for tower, layers in TOWERS:
        for i in range(layers):
            block = f"{tower}.blocks.{i}"
            assert torch.equal(acts[f"{block}.attn.pattern"], peers[tower].attentions[i])
            assert torch.equal(acts[block], peers[tower].hidden_states[i + 1])


def test_the_sites_of_attention_can_be_computed_from_each_other(tiny):
    model, (pixels, ids) = tiny
    with torch.no_grad(), cache(model.double(), "*.blocks.*.attn.*") as acts:
        model(pixels.double(), ids)
    for tower, layers in TOWERS:
        for i in range(layers):
            q, k, v, scores, pattern, z = (
                acts[site(kind, tower=tower, layer=i)]
                for kind in ("q", "k", "v", "attn_scores", "pattern", "z")
            )
            products = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
            assert torch.allclose(scores, products, rtol=0, atol=FLOAT64)
            if tower == "text":  # the causal mask is applied after the site `scores`
                assert pattern.triu(1).abs().max() == 0
                products[..., ~torch.ones_like(pattern[0, 0]).tril().bool()] = -torch.inf
            assert (pattern - products.softmax(-1)).abs().max() < FLOAT64
            assert (z - torch.einsum("bhqk,bkhd->bqhd", pattern, v)).abs().max() < FLOAT64


def test_cached_tensors_are_copies(tiny):
    model, inputs = tiny
    name = "vision.blocks.0.attn.q"
    held = []
    with torch.no_grad(), cache(model, name) as acts:
        with hooks(model, {name: lambda x, _: held.append(x)}):
            model(*inputs)
    assert torch.equal(acts[name], held[0])
    held[0].zero_()
    assert acts[name].abs().max() > 0 and not acts[name].requires_grad
    first = acts[name]
    with cache(model, name) as acts:
        model(*inputs)
        model(inputs[0] + 1, inputs[1])
    assert not torch.equal(acts[name], first)  # `acts` has the tensors of the last run
    assert not acts[name].requires_grad


def test_the_argument_device_of_cache_moves_only_the_copies(tiny):
    model, inputs = tiny
    with cache(model, "vision.blocks.*", device="meta") as acts:
        model(*inputs)
    assert {x.device.type for x in acts.values()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_gradients_at_a_site_equal_finite_differences(tiny):
    model, (pixels, _) = tiny
    model, pixels = model.double().requires_grad_(False), pixels.double()
    name = "vision.blocks.1.attn.pattern"
    expected = model.encode_image(pixels)
    with cache(model, name, grad=True) as acts:
        output = model.encode_image(pixels)
    assert torch.equal(output, expected)
    (slope,) = torch.autograd.grad(output[0, 5], acts[name])
    for place in ((0, 2, 0, 7), (0, 3, 4, 1), (1, 2, 0, 7)):
        nudge = torch.zeros_like(slope)
        nudge[place] = 1e-5
        with hooks(model, {name: lambda x, _: x + nudge}):
            up = model.encode_image(pixels)[0, 5]
        with hooks(model, {name: lambda x, _: x - nudge}):
            down = model.encode_image(pixels)[0, 5]
        assert ((up - down) / 2e-5 - slope[place]).abs() < 1e-7
    with torch.no_grad(), pytest.raises(ValueError, match="grad=True"):
        with cache(model, name, grad=True):
            model.encode_image(pixels)


# ---------------------------------------------------------------------------------- wrapped models


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, "blocks"])
def test_a_wrapped_model_has_the_same_site_names(tiny, wrap):
    model, inputs = tiny
    expected = [name for name, _ in find(model, "*.blocks.*.attn.*")]
    if wrap == "blocks":
        wrapped = copy.deepcopy(model)
        is_block = lambda module: isinstance(module, Block)  # noqa: E731
        apply_activation_checkpointing(wrapped, check_fn=is_block)
        inner = wrapped
    else:
        wrapped = wrap(model)
        inner = wrapped.module
    assert [name for name, _ in find(wrapped, "*.blocks.*.attn.*")] == expected
    with torch.no_grad(), cache(wrapped, "vision.blocks.1") as acts:
        inner(*inputs)
    with torch.no_grad(), cache(model, "vision.blocks.1") as plain:
        model(*inputs)
    assert torch.equal(acts["vision.blocks.1"], plain["vision.blocks.1"])
    assert torch.equal(logit_lens(wrapped, inputs[0]), logit_lens(model, inputs[0]))


# ---------------------------------------------------------------------------------- compiled models


def test_the_compiler_is_not_imported_for_hooks(tiny, monkeypatch):
    """The compiler takes more than a second to import. Only compiled models need the compiler."""
    model, inputs = tiny
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(torch.compiler, "set_stance", None)
    with cache(model, "vision.blocks.*") as acts:
        model(*inputs)
    assert len(acts) == 3 and "torch._dynamo" not in sys.modules


def test_tracing_a_model_with_hooks_is_an_error(shallow):
    model, (pixels, _) = shallow
    with hooks(model, {"vision.blocks.0.attn.z": nothing}):
        with pytest.raises(Exception, match="vision.blocks.0.attn.z: is hooked; compile or export"):
            torch.export.export(model.vision, (pixels,), strict=False)


@pytest.fixture
def shallow():
    """One layer in each tower, because compiling is slow."""
    towers = {name: replace(getattr(TINY, name), layers=1) for name, _ in TOWERS}
    config = replace(TINY, **towers)
    return twins(config, attention="eager")[0], random_inputs(config)


@pytest.mark.slow
@pytest.mark.sweep(3)
@pytest.mark.parametrize("how", ["wrapped", "in place", "a tower"])
def test_hooks_of_a_compiled_model_run(shallow, how):
    model, inputs = shallow
    expected = logits(model, inputs)
    called = model
    if how == "wrapped":
        called = torch.compile(model, backend="eager", fullgraph=True)
    elif how == "in place":
        model.compile(backend="eager", fullgraph=True)
    else:
        model.vision = torch.compile(model.vision, backend="eager", fullgraph=True)
    assert torch.equal(logits(called, inputs), expected)
    name = "vision.blocks.0.attn.z"
    for whole in {model, called}:  # the compiled model and the original
        with cache(whole, name) as acts, hooks(whole, {name: lambda z, _: 0 * z}):
            assert (logits(called, inputs) - expected).abs().max() > 1e-3
        assert acts[name].abs().max() > 0
        assert torch.equal(logits(called, inputs), expected)
    torch._dynamo.reset()


@pytest.mark.slow
def test_with_statements_of_hooks_can_overlap_and_end_in_any_order(shallow):
    """Compiled models run uncompiled until the last `with` block ends."""
    model, runs = shallow[0], []
    compiled = torch.compile(
        lambda x: x + 1, backend=lambda graph, _: lambda *given: runs.append(1) or graph(*given)
    )
    for order in ((0, 1), (1, 0), (1, 2, 0)):
        blocks = [hooks(model, {"vision.ln_pre": nothing}) for _ in order]
        for block in blocks:
            block.__enter__()
        for i in order:
            compiled(torch.ones(1))
            assert not runs
            blocks[i].__exit__(None, None, None)
        compiled(torch.ones(1))
        assert runs.pop() and not runs, order
    torch._dynamo.reset()


@pytest.mark.slow
def test_without_set_stance_a_compiled_model_ignores_hooks(shallow):
    """Compiled code ignores hooks, so `hooks` calls `set_stance` to run the model uncompiled."""
    model, inputs = shallow
    compiled = torch.compile(model, backend="eager")
    expected = logits(compiled, inputs)
    handle = model.vision.blocks[0].attn.z.register_forward_hook(lambda *args: 0 * args[-1])
    assert torch.equal(logits(compiled, inputs), expected)
    handle.remove()
    torch._dynamo.reset()
