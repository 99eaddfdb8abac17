"""`compare` accepts forks that compute the same numbers in another way, and finds rare faults."""

import copy
import json
import math

import pytest
import torch
import transformers
from forks.siglip import Siglip
from torch import nn
from torch.nn.utils import prune
from twin import TINY, fork_of, random_inputs, randomize, twins

from miniclip import CLIP, Tokenizer, surgery
from miniclip.checkpoint import Loaded
from miniclip.commands.parity import rows_dict
from miniclip.parity import compare


@pytest.fixture(scope="module")
def pair():
    return twins(TINY)


FUSED = "z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)"
SAME = {
    "mask_in_the_default_precision": (
        FUSED,
        "future = torch.full((q.shape[2], q.shape[2]), -torch.inf).triu(1)\n"
        "            mask = future if self.causal else None\n"
        "            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)",
    ),
    "mask_that_is_no_buffer": (
        "self.causal, self.eager = causal, False",
        "self.causal, self.eager = causal, False\n"
        "        self.future = torch.full((77, 77), -torch.inf).triu(1)",
        FUSED,
        "mask = self.future[: q.shape[2], : q.shape[2]] * 1.0 if self.causal else None\n"
        "            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)",
    ),
    "mlp_in_pieces": (
        "self.mlp(self.ln_2(x))",
        "torch.cat([self.mlp(part) for part in self.ln_2(x).chunk(2, 1)], 1)",
    ),
    "images_one_by_one": (
        "image_embeds = self.encode_image(pixels, normalize=True)",
        "image_embeds = torch.cat([self.encode_image(p[None], normalize=True) for p in pixels])",
    ),
    "texts_in_two_halves": (
        "text_embeds = self.encode_text(ids, normalize=True)",
        "text_embeds = torch.cat([self.encode_text(i, normalize=True) for i in ids.chunk(2)])",
    ),
    "tokens_before_the_batch": (
        "x = self.blocks(self.embed_tokens(pixels))",
        "x = self.blocks(self.embed_tokens(pixels).transpose(0, 1)).transpose(0, 1)",
        "x = self.blocks(self.embed_tokens(ids))",
        "x = self.blocks(self.embed_tokens(ids).transpose(0, 1)).transpose(0, 1)",
        "q, k, v = self.qkv(x)", "x = x.transpose(0, 1)\n        q, k, v = self.qkv(x)",
        "return self.out_proj(z.flatten(2))", "return self.out_proj(z.flatten(2)).transpose(0, 1)",
    ),
    "tokens_as_rows": (
        "self.mlp(self.ln_2(x))", "self.mlp(self.ln_2(x).flatten(0, 1)).view_as(x)",
    ),
    "arguments_by_name": (
        "return self.proj(self.pool(x))", "return self.proj(input=self.pool(x))",
        "return self.ln_pre(x)", "return self.ln_pre(input=x)",
        "x = self.blocks(self.embed_tokens(pixels))",
        "x = self.embed_tokens(pixels)\n"
        "        for block in self.blocks:\n            x = block(x=x)",
    ),
    "a_tuple_of_logits": (
        "return CLIPOutput(logits_per_text.T, logits_per_text, image_embeds, text_embeds)",
        "return logits_per_text.T, logits_per_text",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_a_fork_that_computes_the_same_numbers_passes(name, pair):
    same = fork_of(pair[0], *SAME[name])
    for report in (compare(same, pair[0]), compare(pair[1], same)):
        assert report.first is None, report


@pytest.mark.slow
def test_a_model_passes_if_its_patched_forward_calls_the_original_forward(pair):
    for model, part in (
        (pair[0], lambda m: m), (pair[0], lambda m: m.vision.blocks[1].mlp),
        (pair[1], lambda m: m), (pair[1], lambda m: m.text_model.encoder.layers[0]),
    ):  # fmt: skip
        same = copy.deepcopy(model).train()
        wrapped = part(same)
        forward = wrapped.forward
        wrapped.forward = lambda *args, forward=forward, **named: forward(*args, **named)
        before = {name: weight.clone() for name, weight in same.state_dict().items()}
        report = compare(same, pair[0])
        assert report.first is None and len(report.rows) == 50, report
        assert same.training and all(m.training for m in same.modules())
        assert all(torch.equal(w, before[n]) for n, w in same.state_dict().items())
        if model is pair[1]:
            assert same.config._attn_implementation == "sdpa"


MASK_KEPT = (
    "self.causal, self.eager = causal, False",
    "self.causal, self.eager = causal, False\n        self.kept = None",
    FUSED,
    "if self.kept is None:\n"
    "                future = q.new_full((q.shape[2], q.shape[2]), -torch.inf).triu(1)\n"
    "                self.kept = future if self.causal else 0 * future.exp()\n"
    "            z = F.scaled_dot_product_attention(q, k, v, attn_mask=self.kept)",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_comparison_removes_tensors_that_a_forward_pass_stores(dtype, pair):
    same = fork_of(pair[0], *MASK_KEPT)
    assert compare(same, pair[0], dtype=dtype).first is None
    same(*random_inputs(TINY, tokens=17))  # `compare` removed the stored mask, so 17 tokens work


def test_a_comparison_restores_buffers_and_parameters_that_a_forward_pass_changes(pair):
    same = copy.deepcopy(pair[0])
    same.register_buffer("count", torch.zeros((), dtype=torch.long))

    def change(model, args):
        model.count += 1
        model.logit_scale.data.clamp_(max=3.0)

    same.register_forward_pre_hook(change)
    compare(same, pair[0])
    assert same.count == 0 and same.logit_scale == pair[0].logit_scale


def test_a_pruned_model_passes_and_still_runs_after_the_comparison(pair):
    same = copy.deepcopy(pair[0])
    prune.identity(same.vision.patch_embed, "weight")
    same(*random_inputs(TINY))
    assert compare(same, pair[0]).first is None
    same(*random_inputs(TINY))


def test_compare_reports_a_fault_in_a_model_with_tokens_as_the_first_axis(pair):
    faulty = fork_of(
        pair[0],
        *SAME["tokens_before_the_batch"],
        "x * torch.sigmoid_(1.702 * x)", "F.gelu(x)",
    )  # fmt: skip
    cause = " has the activation gelu instead of quick_gelu"
    assert compare(faulty, pair[0]).cause == f"model{cause}"
    assert compare(pair[0], faulty).cause == f"other{cause}"


def test_compare_reports_swapped_batch_rows(pair):
    swapped = ("self.encode_image(pixels, n", "self.encode_image(pixels.flip(0), n")
    cause = "model has vision.embeddings with batch rows in the wrong place: 0 to 1"
    assert compare(fork_of(pair[0], *swapped), pair[0]).cause == cause


def test_a_model_that_stores_an_activation_passes(pair):
    same = copy.deepcopy(pair[0])
    same.text.blocks[0].register_forward_hook(lambda m, args, out: setattr(m, "last", out))
    same.text(torch.tensor([[598, 5, 599]]))
    assert compare(same, pair[0]).first is None


@pytest.mark.slow
def test_compiled_models_pass(pair):
    same = copy.deepcopy(pair[0])
    same.vision = torch.compile(same.vision, backend="eager")
    assert compare(same, pair[0]).first is None
    assert compare(pair[0], torch.compile(copy.deepcopy(pair[1]), backend="eager")).first is None


class Attention(nn.Module):
    """Attention with a fused projection. It returns no pattern."""

    def __init__(self, attn, causal):
        super().__init__()
        linears = (attn.q_proj, attn.k_proj, attn.v_proj)
        width = attn.q_proj.in_features
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), attn.out_proj, attn.num_heads
        self.qkv.weight.data = torch.cat([linear.weight for linear in linears])
        self.qkv.bias.data = torch.cat([linear.bias for linear in linears])
        self.causal = causal

    def forward(self, hidden_states, **options):
        heads = [x.unflatten(-1, (self.heads, -1)) for x in self.qkv(hidden_states).chunk(3, -1)]
        q, k, v = (x.transpose(1, 2) for x in heads)
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(z.transpose(1, 2).flatten(2)), None


@pytest.mark.slow
@torch.no_grad()
def test_modules_of_a_transformers_model_may_be_replaced(pair):
    same = copy.deepcopy(pair[1])
    for tower in ("vision", "text"):
        for layer in getattr(same, f"{tower}_model").encoder.layers:
            layer.self_attn = Attention(layer.self_attn, tower == "text")
    assert compare(same, pair[0]).first is None
    same.vision_model.post_layernorm = nn.Identity()
    report = compare(pair[0], same)
    assert (report.first, report.cause) == ("vision.pooled", "other has no ln_post")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, table",
    [("text.token_embed.weight", "token_embed.weight"), ("text.pos_embed", "pos_embed")],
)
def test_compare_reports_a_difference_in_one_row_of_an_embedding_table(name, table, pair):
    for row in (0, 1, len(pair[0].get_parameter(name)) // 2, -2, -1):
        faulty = copy.deepcopy(pair[0])
        faulty.get_parameter(name).data[row] += 0.5
        report = compare(faulty, pair[0])
        assert report.first == "text.embeddings"
        assert report.cause.startswith(f"different weights: {table} (1 of "), report


@pytest.mark.slow
def test_a_model_and_its_copy_with_added_tokens_pass(pair):
    text = TINY.text.__class__(**{**vars(TINY.text), "vocab_size": 610})
    more = twins(TINY.__class__(TINY.vision, text, TINY.embed_dim))[0]
    weights, table = pair[0].state_dict(), "text.token_embed.weight"
    rows = torch.cat([weights[table], torch.ones(10, 40)])
    more.load_state_dict(weights | {table: rows})
    assert compare(more, pair[0]).first is None and compare(pair[0], more).first is None


@pytest.mark.slow
@torch.no_grad()
def test_a_model_with_lora_and_its_merged_copy_pass(pair):
    """Merging adds a rounding error, which is within tolerance. A small fault is still found."""
    tuned = surgery.add_lora(pair[0], rank=2)
    for name, weight in tuned.named_parameters():
        if name.endswith((".A", ".B")):
            weight.normal_(std=0.1)
    merged = surgery.merge_lora(tuned)
    for one, other in ((tuned, merged), (merged, tuned)):
        report = compare(one, other)
        assert report.first is None and max(row.float64 for row in report.rows) > 1e-8, report
    for module in merged.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    assert compare(merged, tuned).first == "vision.blocks.0.resid_pre"


@pytest.mark.parametrize(
    "change, site, cause",
    [
        (("logits_per_text, image_embeds,", "2 * logits_per_text, image_embeds,"),
         "logits_per_text", "model has logits_per_text multiplied by 2"),
        (("_text, image_embeds, text_embeds)", "_text, text_embeds[:2], text_embeds)"),
         "image_embeds", ""),
    ],
)  # fmt: skip
def test_compare_checks_every_output_of_a_model(change, site, cause, pair):
    report = compare(fork_of(pair[0], *change), pair[0])
    assert (report.first, report.cause) == (site, cause)


def test_a_fork_without_logits_does_not_pass(pair):
    output = "CLIPOutput(logits_per_text.T, logits_per_text, image_embeds, text_embeds)"
    other = "dict(scores=logits_per_text.T, image_embeds=image_embeds)"
    report = compare(fork_of(pair[0], output, other), pair[0])
    cause = "model raises ValueError: the output is a dict without logits_per_image"
    assert (report.first, report.cause) == ("logits", cause)


def test_the_json_of_a_report_has_no_nan(pair):
    faulty = copy.deepcopy(pair[0])
    faulty.text.proj.weight.data[0, 0] = math.nan
    json.dumps(rows_dict(compare(pair[0], faulty)), allow_nan=False)


@pytest.mark.slow
def test_compare_reports_swapped_ids_of_byte_tokens(pair):
    right = Tokenizer.from_pretrained("everyday")
    for one, other in ("Ñ", "Ð"), ("!", '"'):  # Ñ and Ð stand for the bytes D1 and D0
        vocab = {**right.vocab, one: right.vocab[other], other: right.vocab[one]}
        faulty = Tokenizer(vocab, right.merges, context_length=right.context_length)
        report = compare(*(Loaded(pair[0], t, None) for t in (faulty, right)))
        assert report.first == "tokens" and report.cause.startswith("different ids for the word")


@pytest.mark.slow
def test_a_fork_of_siglip_is_compared_with_siglip_in_transformers(tmp_path):
    size = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 40,
    }  # fmt: skip
    config = transformers.SiglipConfig(
        vision_config=size | {"image_size": 32, "patch_size": 8},
        text_config=size | {"vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 58,
                            "eos_token_id": 59, "pad_token_id": 0},
    )  # fmt: skip
    theirs = transformers.SiglipModel(config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = Siglip.from_pretrained(tmp_path)
    report = compare(ours, theirs)
    assert report.first is None and len(report.rows) == 38, report
    ours.text.blocks[1].mlp.act = nn.ReLU()
    report = compare(theirs, ours)
    cause = "other has the activation relu instead of gelu_pytorch_tanh"
    assert (report.first, report.cause) == ("text.blocks.1.mlp_out", cause)


class WithBoxes(CLIP):
    """A fork with one more output than CLIP."""

    factor = 1.0

    def forward(self, pixels, ids):
        output = super().forward(pixels, ids)._asdict()
        return output | {"boxes": self.factor * output["image_embeds"]}


def test_compare_checks_an_output_that_clip_does_not_have():
    one, other = WithBoxes(TINY), WithBoxes(TINY)
    other.load_state_dict(one.state_dict())
    assert compare(one, other).rows[-1].site == "output_boxes"
    assert compare(one, other).first is None
    other.factor = 2.0
    assert compare(one, other).first == "output_boxes"


def test_a_model_without_blocks_is_an_error(pair):
    other = copy.deepcopy(pair[0])
    del other.text.blocks
    with pytest.raises(ValueError, match="CLIP has no blocks in its text tower"):
        compare(other, pair[0])


def test_a_block_may_have_different_modules_inside(pair):
    """`compare` skips the sites inside the block, and compares the residual stream after it."""

    class Plain(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.inner = block

        def forward(self, x):
            return self.inner(x)

    other = copy.deepcopy(pair[0])
    other.vision.blocks[0] = Plain(other.vision.blocks[0])
    report = compare(other, pair[0])
    sites = {row.site for row in report.rows}
    assert report.first is None and "vision.blocks.0.resid_post" in sites
    assert not sites & {"vision.blocks.0.attn_out", "vision.blocks.0.mlp_out"}
