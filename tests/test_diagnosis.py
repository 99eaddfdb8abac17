"""Plant faults in weights, configs and code. Parity must name the site and cause of each fault.

The model is tiny and has random weights. A model with faulty weights is compared with
transformers' model, and a model with faulty code is compared with miniclip's model.
"""

import copy
import math
import re

import pytest
import torch
from torch import nn
from twin import TINY, exchanged, fork_of, twins

from miniclip import CLIPConfig, TextConfig
from miniclip.parity import assert_parity, compare


@pytest.fixture(scope="module")
def pair():
    return twins(TINY)


# ----------------------------------------------------------------------- faults in weights or parts

V, T = "vision.blocks.1", "text.blocks.1"
FAULTS = {}


def fault(site, cause):
    """Register a function that breaks a CLIP. Parity must report this site and this cause."""

    def register(function):
        FAULTS[function.__name__] = (function, site, cause)
        return function

    return register


def fault_in_weights(name, parameter, change, site, cause):
    def function(model):
        value = model.get_parameter(parameter)
        value.data = change(value.data)

    FAULTS[name] = (function, site, cause)


for tower, block in (("vision", V), ("text", T)):
    for linear, site in {
        "attn.q_proj": "q", "attn.k_proj": "k", "attn.v_proj": "v", "attn.out_proj": "attn_out",
        "mlp.fc1": "mlp_out", "mlp.fc2": "mlp_out",
    }.items():  # fmt: skip
        fault_in_weights(
            f"{tower}_no_bias_in_{linear}", f"{block}.{linear}.bias", torch.zeros_like,
            f"{block}.{site}", f"model has no bias in {linear}",
        )  # fmt: skip
        if site != "mlp_out":
            fault_in_weights(
                f"{tower}_{linear}_transposed", f"{block}.{linear}.weight", torch.t,
                f"{block}.{site}", f"model has {linear}.weight transposed",
            )  # fmt: skip
for tower, norm in (("vision", "ln_post"), ("text", "ln_final")):
    fault_in_weights(
        f"no_bias_in_{norm}", f"{tower}.{norm}.bias", torch.zeros_like,
        f"{tower}.pooled", f"model has no bias in {norm}",
    )  # fmt: skip
fault_in_weights(
    "no_class_token", "vision.class_embed", torch.zeros_like,
    "vision.embeddings", "model has no embedding of the class token",
)  # fmt: skip
fault_in_weights(
    "positions_shifted", "text.pos_embed", lambda x: x.roll(1, 0),
    "text.embeddings", "model has positions that are shifted by one",
)  # fmt: skip
fault_in_weights(
    "no_position_of_the_class_token", "vision.pos_embed", lambda x: torch.cat([0 * x[:1], x[1:]]),
    "vision.embeddings", "model has no position for the first token",
)  # fmt: skip
OF_PATCHES, GRID = "vision.patch_embed.weight", TINY.vision.grid
for name, parameter, change, site, cause in (
    ("patch_kernel_transposed", OF_PATCHES, lambda x: x.mT.contiguous(),
     "vision.embeddings", "patch_embed.weight transposed"),
    ("patch_kernel_flipped", OF_PATCHES, lambda x: x.flip(-1),
     "vision.embeddings", "patch_embed.weight flipped along axis 3"),
    ("patch_kernel_of_a_true_convolution", OF_PATCHES, lambda x: x.flip(-1, -2),
     "vision.embeddings", "patch_embed.weight turned by 180 degrees"),
    ("patch_kernel_with_colours_last", OF_PATCHES, lambda x: x.permute(0, 2, 3, 1).reshape(x.shape),
     "vision.embeddings", "patch_embed.weight with channels last"),
    ("patch_kernel_bgr", OF_PATCHES, lambda x: x.flip(1),
     "vision.embeddings", "the colours in the order BGR"),
    ("rows_rolled", f"{V}.mlp.fc1.weight", lambda x: x.roll(1, 0),
     f"{V}.mlp_out", "mlp.fc1.weight rolled along axis 0"),
    ("rows_in_another_order", f"{V}.mlp.fc1.weight", lambda x: x[torch.arange(100) * 7 % 100],
     f"{V}.mlp_out", "mlp.fc1.weight in another order along axis 0"),
    ("columns_in_another_order", "text.proj.weight", lambda x: x[:, torch.arange(40) * 7 % 40],
     "text.projected", "proj.weight in another order along axis 1"),
    ("heads_in_another_order", f"{V}.attn.q_proj.weight", lambda x: x.roll(12, 0),
     f"{V}.q", "attn.q_proj.weight with heads in another order along axis 0"),
    ("read_in_the_other_order", f"{T}.mlp.fc1.weight", lambda x: x.mT.reshape(x.shape),
     f"{T}.mlp_out", "mlp.fc1.weight transposed"),
    ("negated", f"{T}.attn.out_proj.weight", torch.neg,
     f"{T}.attn_out", "attn.out_proj.weight multiplied by -1"),
    ("scaled", f"{T}.mlp.fc2.weight", lambda x: 1.1 * x,
     f"{T}.mlp_out", "mlp.fc2.weight multiplied by 1.1"),
    ("lost", f"{T}.mlp.fc2.weight", torch.zeros_like, f"{T}.mlp_out", "mlp.fc2.weight of zeros"),
    ("one_weight_in_float16", f"{T}.mlp.fc1.weight", lambda x: x.half().float(),
     f"{T}.mlp_out", "mlp.fc1.weight rounded to float16"),
    ("one_weight_in_bfloat16", "text.token_embed.weight", lambda x: x.bfloat16().float(),
     "text.embeddings", "token_embed.weight rounded to bfloat16"),
    ("one_weight_in_float8", f"{V}.mlp.fc1.weight", lambda x: x.to(torch.float8_e4m3fn).float(),
     f"{V}.mlp_out", "mlp.fc1.weight rounded to float8_e4m3fn"),
    ("no_weight_of_a_norm", f"{T}.ln_2.weight", torch.ones_like,
     f"{T}.mlp_out", "no weight in ln_2"),
    ("tokens_off_by_one", "text.token_embed.weight", lambda x: x.roll(1, 0),
     "text.embeddings", "token_embed.weight rolled along axis 0"),
    ("positions_of_rows_and_columns", "vision.pos_embed",
     lambda x: torch.cat([x[:1], x[1:].unflatten(0, GRID).transpose(0, 1).flatten(0, 1)]),
     "vision.embeddings", "rows and columns of positions exchanged"),
    ("positions_mirrored", "vision.pos_embed",
     lambda x: torch.cat([x[:1], x[1:].unflatten(0, GRID).flip(1).flatten(0, 1)]),
     "vision.embeddings", "positions that are mirrored"),
    ("patch_positions_shifted", "vision.pos_embed",
     lambda x: torch.cat([x[:1], x[1:].roll(1, 0)]),
     "vision.embeddings", "patch positions that are shifted by one"),
):  # fmt: skip
    fault_in_weights(name, parameter, change, site, f"model has {cause}")
fault_in_weights(
    "padding_of_zeros", "text.token_embed.weight", lambda x: torch.cat([0 * x[:1], x[1:]]),
    "text.embeddings",
    "different weights: token_embed.weight (1 of 600 rows differ, by at most 5.5e-01)",
)  # fmt: skip
fault_in_weights(
    "positions_beyond_the_twelfth", "text.pos_embed", lambda x: torch.cat([x[:12], 0.9 * x[12:]]),
    "text.embeddings", "different weights: pos_embed (8 of 20 rows differ, by at most 8.1e-02)",
)  # fmt: skip
fault_in_weights(
    "another_temperature", "logit_scale", lambda x: torch.full_like(x, 2.6592),
    "logits", "different weights: logit_scale (2.65919995 in model, 4.60517025 in other)",
)  # fmt: skip
fault_in_weights(
    "noise_in_a_weight", "text.blocks.0.mlp.fc2.weight", lambda x: x + 1e-3,
    "text.blocks.0.mlp_out",
    "different weights: mlp.fc2.weight (40 of 40 rows differ, by at most 1.0e-03)",
)  # fmt: skip


@fault("text.blocks.0.mlp_out", "model has the activation gelu instead of quick_gelu")
def gelu_for_quick_gelu(model):
    for block in model.text.blocks:
        block.mlp.act = nn.GELU()


@fault("vision.blocks.2.mlp_out", "model has the activation relu instead of quick_gelu")
def relu_in_one_layer(model):
    model.vision.blocks[2].mlp.act = nn.ReLU()


def set_eps(tower, eps):
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


@fault("vision.blocks.0.resid_pre", "model has a LayerNorm eps of 1e-06 instead of 2e-05")
def vision_eps(model):
    set_eps(model.vision, 1e-6)


@fault("text.blocks.0.q", "model has a LayerNorm eps of 1e-06 instead of 1e-05")
def text_eps(model):
    set_eps(model.text, 1e-6)


@fault("vision.pooled", "model has a LayerNorm eps of 1e-12 instead of 2e-05")
def eps_of_ln_post(model):
    model.vision.ln_post.eps = 1e-12


@fault("text.blocks.0.pattern", "model has no causal mask")
def no_causal_mask(model):
    for block in model.text.blocks:
        block.attn.causal = False


@fault("vision.blocks.0.pattern", "model has a causal mask")
def causal_mask_in_vision(model):
    for block in model.vision.blocks:
        block.attn.causal = True


@fault("vision.blocks.1.q", "model has ln_1 and ln_2 swapped")
def layer_norms_swapped(model):
    block = model.vision.blocks[1]
    block.ln_1, block.ln_2 = block.ln_2, block.ln_1


@fault("text.blocks.0.q", "model has the weights of block 1")
def layers_swapped_in_text(model):
    model.text.blocks = nn.Sequential(*reversed(model.text.blocks))


@fault("vision.blocks.1.q", "model has the weights of block 2")
def layers_swapped_in_vision(model):
    blocks = list(model.vision.blocks)
    model.vision.blocks = nn.Sequential(blocks[0], blocks[2], blocks[1])


def swap(i, one, two):
    def in_attention(model):
        attn = model.text.blocks[i].attn
        first, second = (getattr(attn, f"{name}_proj") for name in (one, two))
        setattr(attn, f"{one}_proj", second)
        setattr(attn, f"{two}_proj", first)

    cause = f"model has attn.{one}_proj and attn.{two}_proj swapped"
    FAULTS[f"{one}_and_{two}_swapped"] = (in_attention, f"text.blocks.{i}.{one}", cause)


swap(0, "q", "k")
swap(1, "k", "v")


@fault("vision.blocks.1.q", "model has ln_1.weight and ln_1.bias swapped")
def weight_and_bias_swapped(model):
    norm = model.vision.blocks[1].ln_1
    norm.weight, norm.bias = norm.bias, norm.weight


@fault("text.blocks.0.mlp_out", "model has no bias in mlp.fc1 and mlp.fc2")
def no_bias_in_the_mlp(model):
    for name, parameter in model.text.named_parameters():
        if re.search(r"fc\d\.bias", name):
            parameter.zero_()


@fault("vision.blocks.2.q", "model has the weights of block 1")
def a_block_twice(model):
    blocks = model.vision.blocks
    model.vision.blocks = nn.Sequential(blocks[0], blocks[1], copy.deepcopy(blocks[1]))


@fault("vision.blocks.2.resid_pre", "model runs vision.blocks.1 twice")
def a_block_run_twice(model):
    blocks = model.vision.blocks
    model.vision.blocks = SkipList(blocks, order=(0, 1, 1, 2))


@fault("vision.blocks.2.resid_pre", "model does not run vision.blocks.1")
def a_block_not_run(model):
    model.vision.blocks = SkipList(model.vision.blocks, order=(0, 2))


@fault("text.pooled", "model does not run text.blocks.1")
def clip_skip(model):
    model.text.blocks = SkipList(model.text.blocks, order=(0,))


class SkipList(nn.ModuleList):
    """Run the blocks whose numbers are in `order`, in this order."""

    def __init__(self, blocks, order):
        super().__init__(blocks)
        self.order = order

    def forward(self, x):
        for i in self.order:
            x = self[i](x)
        return x


@fault("text.projected", "model does not compute CLIP's formula with its own weights")
def no_projection(model):
    model.text.proj = nn.Linear(40, 36, bias=False)
    model.text.proj.forward = lambda x: x[:, :36]
    model.text.proj.weight.data = torch.eye(40)[:36] * 2


@fault("vision.blocks.0.pattern", "model has heads of width 24 instead of 12")
def half_the_heads(model):
    for block in model.vision.blocks:
        block.attn.head_width = 24


@fault(
    "text.blocks.0.mlp_out",
    "model gives different numbers in two runs: is dropout active in evaluation?",
)
def dropout_in_evaluation(model):
    for block in model.text.blocks:
        block.mlp.register_forward_hook(lambda mlp, x, out: nn.functional.dropout(out, 0.1, True))


def round_to(dtype):
    def break_(model):
        model.to(dtype).float()

    return break_


FAULTS["weights_in_float16"] = (
    round_to(torch.float16), "vision.embeddings", "model has weights rounded to float16"
)  # fmt: skip
FAULTS["weights_in_bfloat16"] = (
    round_to(torch.bfloat16), "vision.embeddings", "model has weights rounded to bfloat16"
)  # fmt: skip


@fault("vision.blocks.0.resid_pre", "model has no ln_pre")
def ln_pre_skipped(model):
    model.vision.ln_pre = nn.Identity()


@fault("text.pooled", "model has no ln_final")
def no_ln_final(model):
    model.text.ln_final = nn.Identity()


def replace_config(model, **fields):
    text = TextConfig(**{**vars(model.config.text), **fields})
    model.config = CLIPConfig(model.config.vision, text, model.config.embed_dim)
    model.text.config = text


@fault("text.pooled", "model has the end token 597")
def another_end_token(model):
    replace_config(model, eos_token_id=597)


@fault("vision.projected", "model has proj.weight flipped along axis 0")
def another_projection(model):
    model.vision.proj.weight.data = model.vision.proj.weight.flipud()


@fault("text.projected", "model has numbers that are not finite")
def not_a_number(model):
    model.text.proj.weight.data[0, 0] = math.nan


def norm(formula):
    """Return snippets for `fork_of`: LayerNorm becomes `formula` * weight + bias. d is x - mean."""
    of_a_fork = f"""class Norm(nn.LayerNorm):
    def forward(self, x):
        d, eps = x - x.mean(-1, keepdim=True), self.eps
        return {formula} * self.weight + self.bias


class QuickGELU"""
    return ("class QuickGELU", of_a_fork, "nn.LayerNorm(", "Norm(")


BOTH_STEPS = """x = self.resid_mid(x + self.attn(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))"""
# For each fork: old and new snippets, the first site that differs, and the first words of `cause`.
CODE = {
    "no_mask_in_the_fused_kernel": (
        "is_causal=self.causal", "is_causal=False",
        "text.blocks.0.attn_out", "model has no causal mask",
    ),
    "no_mask_where_it_is_written_out": (
        "if self.causal:", "if False:", "text.blocks.0.pattern", "model has no causal mask",
    ),
    "scores_not_scaled": (
        " * self.head_width**-0.5", "",
        "vision.blocks.0.pattern", "model has scores that are not scaled",
    ),
    "scores_scaled_by_the_head_width": (
        "self.head_width**-0.5", "(1 / self.head_width)",
        "vision.blocks.0.pattern", "model has scores divided by the head width, not by its root",
    ),
    "scale_of_the_fused_kernel": (
        "is_causal=self.causal)", "is_causal=self.causal, scale=1)",
        "vision.blocks.0.attn_out", "model has scores that are not scaled",
    ),
    "heads_interleaved": (
        "unflatten(-1, split)).transpose(1, 2)",
        "unflatten(-1, split[::-1]).transpose(-1, -2)).transpose(1, 2)",
        "vision.blocks.0.q", "model does not compute CLIP's formula",
    ),
    "queries_are_keys": (
        "self.q(self.q_proj(x)", "self.q(self.k_proj(x)",
        "vision.blocks.0.q", "model has attn.q_proj and attn.k_proj swapped",
    ),
    "a_weight_transposed": (
        "self.out_proj(z.flatten(2))",
        "F.linear(z.flatten(2), self.out_proj.weight.T, self.out_proj.bias)",
        "vision.blocks.0.attn_out", "model has attn.out_proj.weight transposed",
    ),
    "a_bias_not_used": (
        "self.fc2(self.act(self.fc1(x)))", "F.linear(self.act(self.fc1(x)), self.fc2.weight)",
        "vision.blocks.0.mlp_out", "model has no bias in mlp.fc2",
    ),
    "gelu_under_the_name_of_quick_gelu": (
        "x * torch.sigmoid_(1.702 * x)", "F.gelu(x)",
        "vision.blocks.0.mlp_out", "model has the activation gelu instead of quick_gelu",
    ),
    "another_constant": (
        "1.702", "1.71", "vision.blocks.0.mlp_out", "model does not compute CLIP's formula",
    ),
    "one_norm_for_both": (
        "x + self.mlp(self.ln_2(x))", "x + self.mlp(self.ln_1(x))",
        "vision.blocks.0.mlp_out", "model has ln_1 before the MLP, not ln_2",
    ),
    "no_ln_1": (
        "self.attn(self.ln_1(x))", "self.attn(x)", "vision.blocks.0.q", "model has no ln_1",
    ),
    "no_residual": (
        "return x + self.mlp(self.ln_2(x))", "return self.mlp(self.ln_2(x))",
        "vision.blocks.0.resid_post", "model has no residual connection around the MLP",
    ),
    "no_residual_around_attention": (
        "self.resid_mid(x + self.attn(self.ln_1(x)))", "self.resid_mid(self.attn(self.ln_1(x)))",
        "vision.blocks.0.mlp_out", "model has no residual connection around attention",
    ),
    "mlp_beside_attention": (
        "x = self.resid_mid(x + self.attn(self.ln_1(x)))\n        return x +",
        "return x + self.attn(self.ln_1(x)) +",
        "vision.blocks.0.mlp_out", "model has the MLP parallel to attention, not after it",
    ),
    "blocks_from_last_to_first": (
        "self.blocks(self.embed_tokens(pixels))", "self.blocks[::-1](self.embed_tokens(pixels))",
        "vision.blocks.0.resid_pre", "model has vision.blocks.2 in the place of vision.blocks.0",
    ),
    "eps_of_1e-6": (
        "eps=config.ln_eps", "eps=1e-6",
        "vision.blocks.0.resid_pre", "model has a LayerNorm eps of 1e-06 instead of 2e-05",
    ),
    "no_ln_pre": (
        "self.ln_pre(x)", "x", "vision.blocks.0.resid_pre", "model has no ln_pre",
    ),
    "no_position_of_the_class_token": (
        "x = x + self.pos_embed\n", "x[:, 1:] += self.pos_embed[1:]\n",
        "vision.embeddings", "model has no position for the first token",
    ),
    "class_token_last": (
        "torch.cat([self.class_embed.expand(x.shape[0], 1, -1), x], dim=1)",
        "torch.cat([x, self.class_embed.expand(x.shape[0], 1, -1)], dim=1)",
        "vision.embeddings", "model has the class token last",
    ),
    "patches_in_columns": (
        "x.flatten(2).transpose(1, 2)  # (B, P, W)", "x.mT.flatten(2).transpose(1, 2)",
        "vision.embeddings", "model has patches column by column, not row by row",
    ),
    "colours_in_the_order_bgr": (
        "self.patch_embed(pixels", "self.patch_embed(pixels.flip(1)",
        "vision.embeddings", "model has the colours in the order BGR",
    ),
    "pooling_by_mean": (
        "self.ln_post(x[:, 0])", "self.ln_post(x).mean(1)",
        "vision.pooled", "model has pooling by the mean of all tokens",
    ),
    "pooling_before_ln_post": (
        "self.ln_post(x[:, 0])", "x[:, 0]", "vision.pooled", "model has no ln_post",
    ),
    "read_at_the_last_token": (
        "is_eos.int().argmax(-1), -1)", "ids.shape[1] - 1, -1)",
        "text.pooled", "model has pooling at the last token",
    ),
    "read_at_the_first_token": (
        "is_eos.int().argmax(-1), -1)", "is_eos.int().argmin(-1), -1)",
        "text.pooled", "model has pooling at the first token",
    ),
    "read_before_the_end_token": (
        "is_eos.int().argmax(-1), -1)", "is_eos.int().argmax(-1) - 1, -1)",
        "text.pooled", "model has pooling at the token before the end token",
    ),
    "end_token_that_no_text_has": (
        "ids == self.config.eos_token_id", "ids == 1",
        "text.pooled", "model raises ValueError: row 0 of ids has no end token",
    ),
    "no_ln_final": (
        "x = self.ln_final(x)  # (B, T, W)", "", "text.pooled", "model has no ln_final",
    ),
    "logit_scale_not_exponentiated": (
        "self.logit_scale.exp()", "self.logit_scale",
        "logits", "model has a logit scale that is not exponentiated",
    ),
    "not_normalised": (
        "return x / x.pow(2).sum(-1, keepdim=True).pow(0.5)", "return x",
        "logits", "model has embeddings that are not normalised",
    ),
    "texts_not_normalised": (
        "self.encode_text(ids, normalize=True)", "self.encode_text(ids)",
        "logits", "model has text embeddings that are not normalised",
    ),
    "queries_and_keys_exchanged": (
        "q @ k.transpose", "k @ q.transpose",
        "vision.blocks.0.pattern", "model has q and k exchanged",
    ),
    "softmax_over_queries": (
        "scores.softmax(-1", "scores.softmax(-2",
        "vision.blocks.0.pattern", "model has a softmax over queries, not keys",
    ),
    "softmax_over_heads": (
        "scores.softmax(-1", "scores.softmax(1",
        "vision.blocks.0.pattern", "model has a softmax over heads, not keys",
    ),
    "sigmoid_attention": (
        "scores.softmax(-1, dtype=dtype)", "scores.sigmoid()",
        "vision.blocks.0.pattern", "model has a sigmoid in the place of the softmax",
    ),
    "softmax_in_bfloat16": (
        "scores.softmax(-1, dtype=dtype)", "scores.bfloat16().softmax(-1)",
        "vision.blocks.0.pattern", "model has vision.blocks.0.pattern rounded to bfloat16",
    ),
    "mask_shows_the_next_token": (
        "triu(1)", "triu(2)",
        "text.blocks.0.pattern", "model has a causal mask that shows the next token",
    ),
    "mask_hides_the_token_itself": (
        "triu(1)", "triu(0)",
        "-torch.inf", "-1e9",
        "text.blocks.0.pattern", "model has a causal mask that hides a token from itself",
    ),
    "mask_the_wrong_way_round": (
        "triu(1)", "tril(-1)",
        "text.blocks.0.pattern", "model has a causal mask that hides earlier tokens",
    ),
    "mask_of_zeros": (
        "-torch.inf", "0.0",
        "text.blocks.0.pattern", "model has masked scores of 0, not of -inf",
    ),
    "scaled_by_the_heads": (
        "self.head_width**-0.5", "q.shape[1]**-0.5",
        "vision.blocks.0.pattern", "model has scores divided by the root of the number of heads",
    ),
    "scaled_by_the_width": (
        "self.head_width**-0.5", "self.q_proj.in_features**-0.5",
        "vision.blocks.0.pattern", "model has scores divided by the root of the width",
    ),
    "queries_scaled_twice": (
        "self.q(self.q_proj(x)", "self.q(0.5 * self.q_proj(x)",
        "vision.blocks.0.q", "model has vision.blocks.0.q multiplied by 0.5",
    ),
    "pattern_transposed": (
        "z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)",
        "z = self.attend(q, k, v)",
        "return pattern @ v", "return pattern.mT @ v",
        "vision.blocks.0.attn_out", "model has a pattern that is transposed",
    ),
    "heads_joined_interleaved": (
        "z.flatten(2)", "z.transpose(2, 3).flatten(2)",
        "vision.blocks.0.attn_out", "model has heads that are joined as (D, H), not (H, D)",
    ),
    "heads_not_transposed_back": (
        "self.z(z.transpose(1, 2))", "self.z(z.reshape(*x.shape[:2], -1, self.head_width))",
        "vision.blocks.0.attn_out", "model has heads that are joined without being transposed",
    ),
    "another_leak": (
        "x * torch.sigmoid_(1.702 * x)", "F.leaky_relu(x, 0.1)",
        "vision.blocks.0.mlp_out",
        "model has the activation leaky_relu with slope 0.1 instead of quick_gelu",
    ),
    "relu_squared": (
        "x * torch.sigmoid_(1.702 * x)", "F.relu(x) ** 2",
        "vision.blocks.0.mlp_out", "model has the activation relu squared instead of quick_gelu",
    ),
    "quick_gelu_of_1.7": (
        "1.702", "1.7",
        "vision.blocks.0.mlp_out",
        "model has the activation quick_gelu with 1.7 instead of quick_gelu",
    ),
    "no_activation": (
        "x * torch.sigmoid_(1.702 * x)", "x",
        "vision.blocks.0.mlp_out", "model has the activation identity instead of quick_gelu",
    ),
    "activation_twice": (
        "self.act(self.fc1(x))", "self.act(self.act(self.fc1(x)))",
        "vision.blocks.0.mlp_out",
        "model has the activation quick_gelu twice instead of quick_gelu",
    ),
    "norm_after_the_mlp": (
        "self.mlp(self.ln_2(x))", "self.ln_2(self.mlp(x))",
        "vision.blocks.0.mlp_out", "model has no ln_2 before the MLP",
    ),
    "one_norm_beside": (
        BOTH_STEPS,
        "h = self.ln_1(x)\n        return x + self.attn(h) + self.mlp(h)",
        "vision.blocks.0.mlp_out", "model has the MLP parallel to attention, after the same ln_1",
    ),
    "mlp_first": (
        BOTH_STEPS,
        "x = x + self.mlp(self.ln_2(x))\n        return x + self.attn(self.ln_1(x))",
        "vision.blocks.0.q",
        "model has vision.blocks.0.mlp_out in the place of vision.blocks.0.attn_out",
    ),
    "stream_after_the_norm": (
        "x = self.resid_mid(x", "x = self.ln_1(x)\n        x = self.resid_mid(x",
        "self.attn(self.ln_1(x))", "self.attn(x)",
        "vision.blocks.0.mlp_out",
        "model has a residual connection from ln_1's output, not its input",
    ),
    "half_the_mlp": (
        "return x + self.mlp(", "return x + 0.5 * self.mlp(",
        "vision.blocks.0.resid_post", "model has the sum 1 resid_pre + 1 attn_out + 0.5 mlp_out",
    ),
    "stream_in_bfloat16": (
        "return x + self.mlp(self.ln_2(x))",
        "return (x + self.mlp(self.ln_2(x))).bfloat16().to(x.dtype)",
        "vision.blocks.0.resid_post", "model has vision.blocks.0.resid_post rounded to bfloat16",
    ),
    "unbiased_variance": (
        *norm("d / (x.var(-1, keepdim=True) + eps).sqrt()"),
        "vision.blocks.0.resid_pre", "model has LayerNorm with the unbiased variance",
    ),
    "eps_outside_the_root": (
        *norm("d / (x.var(-1, keepdim=True, correction=0).sqrt() + eps)"),
        "vision.blocks.0.resid_pre", "model has LayerNorm with eps outside the root",
    ),
    "rms_norm": (
        *norm("x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()"),
        "vision.blocks.0.resid_pre", "model has RMSNorm instead of LayerNorm",
    ),
    "rms_norm_without_bias": (
        *norm("x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()"),
        " * self.weight + self.bias", " * self.weight",
        "vision.blocks.0.resid_pre", "model has RMSNorm without bias instead of LayerNorm",
    ),
    "ln_pre_twice": (
        "self.ln_pre(x)", "self.ln_pre(self.ln_pre(x))",
        "vision.blocks.0.resid_pre", "model has ln_pre twice",
    ),
    "ln_final_first": (
        "x = self.blocks(self.embed_tokens(ids))",
        "x = self.blocks(self.ln_final(self.embed_tokens(ids)))",
        "x = self.ln_final(x)  # (B, T, W)", "",
        "text.embeddings", "model has ln_final before the first block",
    ),
    "patches_not_transposed": (
        "x.flatten(2).transpose(1, 2)  # (B, P, W)", "x.reshape(x.shape[0], -1, x.shape[1])",
        "vision.embeddings", "model has patches that are reshaped, not transposed",
    ),
    "pixels_mirrored": (
        "self.patch_embed(pixels", "self.patch_embed(pixels.flip(-1)",
        "vision.embeddings", "model has pixels that are mirrored",
    ),
    "pixels_times_255": (
        "self.patch_embed(pixels", "self.patch_embed(255 * pixels",
        "vision.embeddings", "model has pixels that are multiplied by 255",
    ),
    "patch_kernel_transposed": (
        "self.patch_embed(pixels.to(self.patch_embed.weight.dtype))",
        "F.conv2d(pixels, self.patch_embed.weight.mT, stride=8)",
        "vision.embeddings", "model has patch_embed.weight transposed",
    ),
    "tokens_scaled": (
        "self.add_positions(self.token_embed(ids))",
        "self.add_positions(self.token_embed(ids) * 40**0.5)",
        "text.embeddings", "model has token embeddings multiplied by the root of the width",
    ),
    "positions_off_by_two": (
        "self.pos_embed[: x.shape[1]]", "self.pos_embed[2 : 2 + x.shape[1]]",
        "text.embeddings", "model has positions that are shifted by two",
    ),
    "positions_from_the_end": (
        "self.pos_embed[: x.shape[1]]", "self.pos_embed[-x.shape[1] :]",
        "text.embeddings", "model has positions that are shifted by three",
    ),
    "ids_clamped": (
        "self.token_embed(ids)", "self.token_embed(ids.clamp(max=300))",
        "text.embeddings",
        "model does not compute CLIP's formula with its own weights: the models differ only at "
        "id 303 to 599",
    ),
    "patches_with_a_bias": (
        "x = x.flatten(2).transpose(1, 2)", "x = x.flatten(2).transpose(1, 2) + self.ln_pre.bias",
        "vision.embeddings", "model has the same vector added to each patch, but not to the first",
    ),
    "projection_with_a_bias": (
        "nn.Linear(width, embed_dim, bias=False)", "Biased(width, embed_dim, bias=False)",
        "class QuickGELU", """class Biased(nn.Linear):
    def forward(self, x):
        return super().forward(x) + self.weight[:, 0]


class QuickGELU""",
        "vision.projected", "model has the same vector added to each row of vision.projected",
    ),
    "a_block_that_returns_its_input": (
        "        x = self.resid_mid(x +", "        before, x = x, self.resid_mid(x +",
        "return x + self.mlp(self.ln_2(x))", "self.mlp(self.ln_2(x))\n        return before",
        "vision.blocks.0.resid_post",
        "model has resid_pre in the place of vision.blocks.0.resid_post",
    ),
    "positions_twice": (
        "x = x + self.pos_embed\n", "x = x + 2 * self.pos_embed\n",
        "vision.embeddings", "model has position embeddings that are added twice",
    ),
    "pooling_by_mean_before_ln_post": (
        "self.ln_post(x[:, 0])", "self.ln_post(x.mean(1))",
        "vision.pooled", "model has pooling by the mean of all tokens, before the last LayerNorm",
    ),
    "pooling_by_mean_of_patches": (
        "self.ln_post(x[:, 0])", "self.ln_post(x[:, 1:].mean(1))",
        "vision.pooled", "model has pooling by the mean of the patches, before the last LayerNorm",
    ),
    "pooling_by_maximum": (
        "self.ln_post(x[:, 0])", "self.ln_post(x).amax(1)",
        "vision.pooled", "model has pooling by the maximum of all tokens",
    ),
    "penultimate_layer": (
        "x = self.blocks(self.embed_tokens(pixels))",
        "x = self.blocks[:-1](self.embed_tokens(pixels))\n        self.blocks[-1](x)",
        "vision.pooled", "model has the residual stream after block 1 as this site's input",
    ),
    "text_pooling_by_mean": (
        "x[torch.arange(x.shape[0], device=x.device), eos]", "x.mean(1)",
        "text.pooled", "model has pooling by the mean of all tokens",
    ),
    "read_at_the_last_end_token": (
        "is_eos.int().argmax(-1), -1)",
        "ids.shape[1] - 1 - is_eos.flip(-1).int().argmax(-1), -1)",
        "text.pooled", "model has pooling at the last end token",
    ),
    "logit_scale_squared": (
        "self.logit_scale.exp()", "self.logit_scale.exp() ** 2",
        "logits", "model has a logit scale that is squared",
    ),
    "logit_scale_exponentiated_twice": (
        "self.logit_scale.exp()", "self.logit_scale.exp().exp()",
        "logits", "model has a logit scale that is exponentiated twice",
    ),
    "logit_scale_divides": (
        "* self.logit_scale.exp()", "/ self.logit_scale.exp()",
        "logits", "model has a logit scale that divides the cosines",
    ),
    "logit_scale_cut": (
        "self.logit_scale.exp()", "self.logit_scale.exp().clamp(max=50)",
        "logits", "model has logits multiplied by 0.5",
    ),
    "logits_with_a_bias": (
        "* self.logit_scale.exp()", "* self.logit_scale.exp() - 10",
        "logits", "model has -10 added to logits",
    ),
    "logits_transposed": (
        "CLIPOutput(logits_per_text.T, logits_per_text,",
        "CLIPOutput(logits_per_text, logits_per_text.T,",
        "logits", "model has logits transposed",
    ),
    "normalised_over_the_batch": (
        "x.pow(2).sum(-1,", "x.pow(2).sum(0,",
        "logits", "model has embeddings divided by the root of the sum of squares over the batch",
    ),
    "normalised_without_the_root": (
        ".pow(0.5)", "",
        "logits", "model has embeddings divided by the sum of squares",
    ),
    "normalised_with_an_eps": (
        ".pow(0.5)", ".pow(0.5).add(1e-5)",
        "logits", "model has embeddings divided by their length plus an eps of 1e-05",
    ),
    "normalised_by_l1": (
        "x.pow(2).sum(-1, keepdim=True).pow(0.5)", "x.abs().sum(-1, keepdim=True)",
        "logits", "model has embeddings divided by the sum of absolute values",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CODE)
def test_compare_reports_a_fault_in_the_code_of_a_fork(name, pair):
    *change, site, cause = CODE[name]
    report = compare(fork_of(pair[0], *change), pair[0])
    assert report.first == site, report
    assert report.cause.startswith(cause), report


@pytest.mark.parametrize("name", ["no_ln_1", "another_constant", "not_normalised"])
def test_compare_reports_a_fault_in_the_second_model(name, pair):
    *change, site, cause = CODE[name]
    report = compare(pair[0], fork_of(pair[0], *change))
    assert report.first == site and report.cause.startswith(exchanged(cause))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_compare_reports_a_fault_in_weights_or_modules(name, pair):
    ours, theirs = pair
    break_, site, cause = FAULTS[name]
    faulty = copy.deepcopy(ours)
    with torch.no_grad():
        break_(faulty)
    report = compare(faulty, theirs)
    assert (report.first, report.cause) == (site, cause)


def test_assert_parity_names_the_site_and_the_cause(pair):
    faulty = copy.deepcopy(pair[0])
    set_eps(faulty.vision, 1e-6)
    site, cause = "vision.blocks.0.resid_pre", "model has a LayerNorm eps of 1e-06 instead of 2e-05"
    with pytest.raises(AssertionError, match=re.escape(f"first at {site}\nlikely cause: {cause}")):
        assert_parity(faulty, pair[0])
