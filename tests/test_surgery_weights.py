"""Test freezing and arithmetic on weights, and compare LoRA with PEFT on the same modules."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import quantize_dynamic
from transformers import CLIPModel
from twin import TINY, fork_of, random_inputs, randomize, tiny_clip

from miniclip import CLIP
from miniclip.surgery import (
    TaskVector,
    add_lora,
    average,
    freeze,
    interpolate,
    keep_layers,
    layer_groups,
    merge_lora,
    prune_heads,
    reconfigure,
    resize_image,
    unmerge_lora,
)

FLOAT64, FLOAT32 = 1e-10, 1e-5
TOWERS = ["vision", "text"]


def three(dtype=torch.float64):
    return [tiny_clip(dtype, seed) for seed in range(3)]


def logits(model):
    pixels, ids = random_inputs(TINY)
    with torch.no_grad():
        return model(pixels.to(model.logit_scale.dtype), ids).logits_per_image


def assert_same_weights(one, other):
    weights, others = one.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def assert_close_weights(model, expected, tolerance=1e-14):
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    assert max((weights[name] - expected[name]).abs().max() for name in weights) < tolerance


# ----------------------------------------------------------------------------------- arithmetic


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_ends_of_an_interpolation_are_exact(dtype):
    one, other, _ = three(dtype)
    assert_same_weights(interpolate(one, other, 0), one)
    assert_same_weights(interpolate(one, other, 1), other)
    assert interpolate(one, other, 0.5).logit_scale.dtype == dtype
    assert_same_weights(one, three(dtype)[0])


@pytest.mark.sweep(3)
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9, -0.5, 1.5])
def test_interpolation_equals_its_formula(alpha):
    one, other, _ = three()
    a, b = one.state_dict(), other.state_dict()
    found = interpolate(one, other, alpha)
    assert_close_weights(found, {n: (1 - alpha) * a[n] + alpha * b[n] for n in a}, 1e-13)
    with pytest.raises(AssertionError):
        assert_close_weights(found, {n: (1 - alpha) * a[n] + 1.01 * alpha * b[n] for n in a})


def test_an_average_is_the_mean_in_float64_rounded_once():
    models = three(torch.float32)
    states = [model.state_dict() for model in models]
    found = average(models).state_dict()
    for name, tensor in found.items():
        total = torch.stack([state[name].double() for state in states]).sum(0) / 3
        assert torch.equal(tensor, total.float()), name
    assert not torch.equal(found["vision.proj.weight"], states[0]["vision.proj.weight"])
    assert_same_weights(average([models[0]] * 7), models[0])


def test_task_vectors_equal_their_formulas():
    base, tuned, other = three()
    task, second = TaskVector.between(base, tuned), TaskVector.between(base, other)
    a, b, c = (model.state_dict() for model in (base, tuned, other))
    assert_close_weights(task.apply(base), b)
    assert_close_weights((-task).apply(base), {n: 2 * a[n] - b[n] for n in a})
    assert_close_weights(task.apply(base, 0.4), {n: a[n] + 0.4 * (b[n] - a[n]) for n in a})
    both = {n: a[n] + 0.5 * (b[n] - a[n]) - 2 * (c[n] - a[n]) for n in a}
    assert_close_weights((0.5 * task - second * 2).apply(base), both)
    assert all((t == 0).all() for t in (task + -task).tensors.values())
    assert_same_weights(base, three()[0])
    with pytest.raises(AssertionError):
        assert_close_weights(second.apply(base), b)


def test_a_task_vector_between_float32_models_is_exact():
    base, tuned, _ = three(torch.float32)
    assert_same_weights(TaskVector.between(base, tuned).apply(base), tuned)


@pytest.mark.slow
@pytest.mark.parametrize("combine", [
    lambda a, b: interpolate(a, b, 0.5),
    lambda a, b: average([a, a, b]),
    lambda a, b: TaskVector.between(a, b),
    lambda a, b: TaskVector.between(a, a).apply(b),
    lambda a, b: TaskVector.between(a, a) + TaskVector.between(b, b),
])  # fmt: skip
def test_combining_models_of_different_shapes_is_an_error(combine):
    model = three()[0]
    for other in (keep_layers(model, "text", [0]), resize_image(model, 64)):
        with pytest.raises(ValueError, match="differ in the names or shapes of .* tensors"):
            combine(model, other)


def gelu(model):
    for block in (*model.vision.blocks, *model.text.blocks):
        block.mlp.act = nn.GELU()
    return reconfigure(reconfigure(model, "vision", act="gelu"), "text", act="gelu")


def tied(model):
    model.text.blocks[0].ln_1.weight = model.text.blocks[1].ln_1.weight
    return model


class Counting(CLIP):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))


COMBINE = [
    lambda a, b: interpolate(a, b, 0.5),
    lambda a, b: average([a, b]),
    lambda a, b: TaskVector.between(a, b),
]


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("change, words", [
    (gelu, "differ in more than their weights: the model|config is CLIPConfig"),
    (tied, "differ in more than their weights: parameters that are shared"),
    (lambda m: fork_of(m, "resid_mid(x +", "resid_mid(2 * x +"), r"model is \S+.CLIP, expected"),
])  # fmt: skip
def test_combining_models_that_differ_in_more_than_weights_is_an_error(combine, change, words):
    with pytest.raises(ValueError, match=words):
        combine(tiny_clip(), change(tiny_clip(seed=1)))
    if change is not gelu:
        return
    combine(gelu(tiny_clip()), gelu(tiny_clip(seed=1)))


def wrong_activation(model):
    model.text.blocks[0].mlp.act = nn.GELU()
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize:UserWarning")
@pytest.mark.parametrize("combine", [*COMBINE, lambda a, b: TaskVector({}).apply(a)])
@pytest.mark.parametrize("change", [
    add_lora, wrong_activation, lambda m: quantize_dynamic(m, {nn.Linear}, torch.qint8),
], ids=["LoRA", "GELU", "quantised"])  # fmt: skip
def test_combining_models_is_an_error_if_their_configs_do_not_describe_them(combine, change):
    """A mean of unmerged models would be wrong, because it averages LoRA's A and B separately."""
    with pytest.raises(ValueError, match="does not describe the model: .*surgery.merge_lora"):
        combine(change(tiny_clip()), change(tiny_clip(seed=1)))


@pytest.mark.slow
def test_the_mean_of_merged_lora_models_is_the_mean_of_their_weights():
    models = [merge_lora(adapted(seed=seed)[1]) for seed in (1, 2)]
    weights = [model.get_submodule(NAMES[0]).weight for model in models]
    found = average(models).get_submodule(NAMES[0]).weight
    assert (found - (weights[0] + weights[1]) / 2).abs().max() < 1e-14
    assert (weights[0] - weights[1]).abs().max() > 1e-2


def test_the_buffers_of_a_fork_are_averaged_like_its_weights():
    one, other = Counting(TINY), Counting(TINY)
    one.mean.fill_(1), other.mean.fill_(3), one.count.fill_(5)
    found = average([one, other])
    assert found.mean.tolist() == [2, 2, 2] and found.count == 5
    with torch.no_grad():
        assert (TaskVector.between(one, other).apply(one, 2).mean == 5).all()


def test_the_mean_of_no_models_is_an_error():
    with pytest.raises(ValueError, match="at least one model to average"):
        average([])


# -------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize("tower", TOWERS)
def test_layer_groups_hold_every_parameter_once_in_order_from_input_to_output(tower):
    part = getattr(three()[0], tower)
    groups = layer_groups(part)
    names = {id(p): name for name, p in part.named_parameters()}
    assert sorted(id(p) for group in groups for p in group) == sorted(names)
    assert len(groups) == len(part.blocks) + 2
    for i, group in enumerate(groups[1:-1]):
        assert {id(p) for p in group} == {id(p) for p in part.blocks[i].parameters()}
    embeddings = ["class_embed", "pos_embed", "patch_embed.weight", "ln_pre.weight", "ln_pre.bias"]
    embeddings = embeddings if tower == "vision" else ["pos_embed", "token_embed.weight"]
    assert [names[id(p)] for p in groups[0]] == embeddings
    last = "ln_post" if tower == "vision" else "ln_final"
    output = {f"{last}.weight", f"{last}.bias", "proj.weight"}
    assert {names[id(p)] for p in groups[-1]} == output


@pytest.mark.parametrize("tower", TOWERS)
def test_only_groups_that_are_not_frozen_get_gradients(tower):
    model = three()[0]
    part = getattr(model, tower)
    pixels, ids = random_inputs(TINY)
    for count in (2, 0, len(part.blocks) + 2, 1):
        freeze(part, count)
        model.zero_grad()
        model(pixels, ids).logits_per_image.square().sum().backward()
        for i, group in enumerate(layer_groups(part)):
            assert all((p.grad is None) == (i < count) for p in group)
        assert model.logit_scale.grad is not None
    for count in (-1, len(part.blocks) + 3):
        with pytest.raises(ValueError, match=f"groups is {count}; expected 0 "):
            freeze(part, count)


# ------------------------------------------------------------------------------------------ LoRA

SITES = ["*.blocks.*.attn.q_proj", "text.blocks.*.mlp.fc1", "vision.blocks.1.attn.out_proj"]
NAMES = [f"vision.blocks.{i}.attn.q_proj" for i in range(3)]
NAMES += [f"text.blocks.{i}.attn.q_proj" for i in range(2)]
NAMES += ["text.blocks.0.mlp.fc1", "text.blocks.1.mlp.fc1", "vision.blocks.1.attn.out_proj"]


def adapted(dtype=torch.float64, seed=5):
    """Return (base model, a copy with LoRA). LoRA's A and B are random."""
    base = tiny_clip(dtype)
    model = add_lora(base, SITES, rank=3, alpha=5)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data.copy_(drawn)
    return base, model


def low_rank(model, name):
    return model.get_submodule(name).parametrizations.weight[0]


def test_a_new_lora_model_equals_its_base_model_bit_for_bit():
    base = tiny_clip()
    model = add_lora(base)
    assert torch.equal(logits(model), logits(base))
    trained = {n.partition(".parametrizations")[0] for n, p in model.named_parameters()
               if p.requires_grad}  # fmt: skip
    blocks = [f"vision.blocks.{i}" for i in range(3)] + [f"text.blocks.{i}" for i in range(2)]
    assert trained == {f"{block}.attn.{p}_proj" for block in blocks for p in "qv"}
    assert all(p.requires_grad for p in base.parameters())  # the base is unchanged


def test_lora_matrix_a_starts_like_a_linear_layer_and_matrix_b_starts_at_zero():
    """PEFT and the paper's code begin with the same values. The defaults are rank 4 and scale 1."""
    name = "text.blocks.0.mlp.fc1"
    torch.manual_seed(0)
    lora = low_rank(add_lora(tiny_clip(), [name]), name)
    torch.manual_seed(0)
    assert torch.equal(lora.A, nn.Linear(TINY.text.width, 4).weight)
    assert lora.B.shape == (TINY.text.mlp_width, 4) and not lora.B.any() and lora.scale == 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
def test_lora_equals_its_formula(dtype, tolerance):
    base, model = adapted(dtype)
    for name in NAMES:
        old, new, lora = base.get_submodule(name), model.get_submodule(name), low_rank(model, name)
        x = torch.randn(4, old.in_features, dtype=dtype)
        delta = torch.stack([sum(lora.A[r] * lora.B[i, r] for r in range(3))
                             for i in range(old.out_features)])  # fmt: skip
        expected = F.linear(x, old.weight, old.bias) + 5 / 3 * x @ delta.T
        assert (new(x) - expected).abs().max() < tolerance
        change = (new.weight - old.weight).double()
        assert torch.linalg.matrix_rank(change, rtol=1e-5) == 3
    untouched = "vision.blocks.0.attn.v_proj"
    assert type(model.get_submodule(untouched)) is nn.Linear


def test_training_changes_the_lora_matrices_a_and_b_and_no_base_weight():
    base, model = adapted(torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pixels, ids = random_inputs(TINY)
    for _ in range(3):
        model(pixels, ids).logits_per_image.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        learns = name.endswith((".A", ".B"))
        assert learns == parameter.requires_grad == (not torch.equal(parameter, before[name])), name
    for name in NAMES:
        original = model.get_submodule(name).parametrizations.weight.original
        assert torch.equal(original, base.get_submodule(name).weight)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unmerging_lora_restores_the_model_bit_for_bit(dtype):
    base, model = adapted(dtype)
    merged = merge_lora(model)
    assert torch.equal(logits(merged), logits(model))
    assert not torch.equal(logits(merged), logits(base))
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert all(type(merged.get_submodule(name)) is nn.Linear for name in NAMES)
    assert not any(merged.get_submodule(name).weight.requires_grad for name in NAMES)
    assert not any(module.training for module in merged.modules())
    merged.get_submodule(NAMES[0]).weight.data.zero_()
    restored = unmerge_lora(merged)
    assert_same_weights(restored, model)
    for name in NAMES:
        original = restored.get_submodule(name).parametrizations.weight.original
        assert torch.equal(original, base.get_submodule(name).weight)


def test_subtracting_the_lora_update_does_not_restore_the_weight_exactly():
    """`merge_lora` keeps the old weight. Subtracting LoRA's update would leave a rounding error."""
    base, model = adapted(torch.float32)
    weight, lora = base.get_submodule(NAMES[0]).weight, low_rank(model, NAMES[0])
    delta = lora.scale * (lora.B @ lora.A)
    assert not torch.equal(weight + delta - delta, weight)


def test_transformers_loads_a_saved_model_with_merged_lora(tmp_path):
    _, model = adapted()
    with pytest.raises(ValueError, match="not saved"):
        model.save_pretrained(tmp_path)
    merged = merge_lora(model)
    merged.save_pretrained(tmp_path)
    assert_same_weights(CLIP.from_pretrained(tmp_path, dtype=torch.float64), merged)
    theirs = CLIPModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    pixels, ids = random_inputs(TINY)
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, input_ids=ids).logits_per_image
    assert (logits(merged) - expected).abs().max() < FLOAT64


def test_lora_composes_with_other_surgery():
    _, model = adapted()
    assert_same_weights(merge_lora(resize_image(model, 64)), resize_image(merge_lora(model), 64))
    kept = keep_layers(model, "vision", [1])
    assert_same_weights(merge_lora(kept), keep_layers(merge_lora(model), "vision", [1]))
    for attempt in (lambda: prune_heads(model, "vision", {0: [1]}), lambda: add_lora(model, SITES)):
        with pytest.raises(ValueError, match="ParametrizedLinear"):
            attempt()
    pruned = prune_heads(merge_lora(model), "vision", {0: [1]})
    with pytest.raises(
        ValueError, match=r"has shape \(36, 48\), but merge_lora made it \(48, 48\)"
    ):
        unmerge_lora(pruned)
    assert_same_weights(unmerge_lora(merge_lora(model).float()), adapted()[1].float())
    twice = merge_lora(add_lora(merge_lora(model), SITES))
    assert torch.equal(logits(twice), logits(model))


@pytest.mark.parametrize("call, words", [
    (lambda m: add_lora(m, rank=0), "rank is 0; expected a positive whole number"),
    (lambda m: add_lora(m, rank=True), "rank is True; expected a positive whole number"),
    (lambda m: add_lora(m, ["vision.blocks.*.attn.x_proj"]), "no site is called"),
    (lambda m: add_lora(m, ["vision.ln_pre"]), "vision.ln_pre is a LayerNorm; expected a plain"),
    (lambda m: merge_lora(m), "no Linear here has LoRA"),
    (lambda m: unmerge_lora(m), "no Linear here has LoRA"),
    (lambda m: unmerge_lora(add_lora(m)), "no Linear here has LoRA"),
])  # fmt: skip
def test_impossible_lora_surgery_is_an_error(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call(tiny_clip())


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def peft_config(peft):
    suffixes = [r".*attn\.q_proj", r"text.*\.fc1", r"vision.*blocks\.1\.attn\.out_proj"]
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules="|".join(suffixes))


def test_peft_gives_the_same_logits_on_the_same_modules(peft):
    base, model = adapted()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(peft)).eval()
    inner = theirs.base_model.model
    wrapped = {
        n for n, m in inner.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")
    }
    assert wrapped == set(NAMES)
    assert (logits_of(theirs) - logits(base)).abs().max() < FLOAT64  # PEFT's B is still zero
    for name in NAMES:
        layer, lora = inner.get_submodule(name), low_rank(model, name)
        layer.lora_A["default"].weight.data.copy_(lora.A)
        layer.lora_B["default"].weight.data.copy_(lora.B)
    assert (logits_of(theirs) - logits(model)).abs().max() < FLOAT64
    low_rank(model, NAMES[-1]).scale = 1  # a fault that the comparison must notice
    assert (logits_of(theirs) - logits(model)).abs().max() > 1e-3


def logits_of(theirs):
    pixels, ids = random_inputs(TINY)
    with torch.no_grad():
        return theirs(pixels.double(), ids).logits_per_image


def test_peft_trains_merges_and_unloads_a_miniclip_model(peft, tmp_path):
    base = tiny_clip(torch.float64)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(peft))
    trained = [n for n, p in theirs.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    expected = logits_of(theirs.eval())
    pixels, ids = random_inputs(TINY)
    theirs(pixels.double(), ids).logits_per_image.sum().backward()
    assert all((p.grad is None) == ("lora_" not in n) for n, p in theirs.named_parameters())
    merged = theirs.merge_and_unload()
    assert type(merged) is CLIP and (logits(merged) - expected).abs().max() < FLOAT64
    merged.save_pretrained(tmp_path)
    assert_same_weights(CLIP.from_pretrained(tmp_path, dtype=torch.float64), merged)


def test_models_with_the_same_seed_are_equal():
    """Other tests make a second model from the same seed, to see whether the first has changed."""
    one, other = three()[0], three()[0]
    assert_same_weights(one, other)
    randomize(other, 9)
    with pytest.raises(AssertionError):
        assert_same_weights(one, other)
