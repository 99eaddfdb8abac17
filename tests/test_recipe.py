"""Compare a training run with a plain loop that is written from the recipe's definition.

The loop trains transformers' model with torch's AdamW, and with a Muon that uses a singular value
decomposition. Each run changes some fields of the recipe, and the final weights are compared.
"""

import json
import math
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from twin import copy_weights, transformers_config

from miniclip import CLIPConfig, ImageTransform, TextConfig, VisionConfig
from miniclip.files.names import TRANSFORMERS, layout_name
from miniclip.training import Recipe, from_scratch, processes, read_recipe, train
from miniclip.training import loop as loop_module
from miniclip.training import run as run_module
from miniclip.training.data import Pair, augment, draw_seed

SHAPE = CLIPConfig(
    VisionConfig(width=16, layers=2, heads=2, mlp_width=24, image_size=12, patch_size=4),
    TextConfig(
        width=12, layers=1, heads=2, mlp_width=20, vocab_size=530, context_length=10,
        bos_token_id=0, eos_token_id=0,
    ),
    embed_dim=8,
)  # fmt: skip
TRANSFORM = ImageTransform(12, image_mean=(0.1, 0.4, 0.7), image_std=(0.9, 0.5, 0.2))
COLOURS = ("red", "green", "blue", "white", "black")


class Spots:
    """Thirteen random images with two true captions each. Some images share a label."""

    skipped: list[str] = []

    def __len__(self):
        return 13

    def items(self, seed):
        return iter(torch.randperm(13, generator=torch.Generator().manual_seed(seed)).tolist())

    def captions(self):
        return [self[item, draw].caption for item in range(13) for draw in (0, 1)]

    def __getitem__(self, item_and_draw):
        item, draw = item_and_draw
        pixels = torch.randint(256, (3, 12, 12), generator=torch.Generator().manual_seed(item))
        colour, other = COLOURS[item % 5], COLOURS[(item + 1 + draw % 3) % 5]
        caption = ("a {} spot", "something {}")[draw % 2]
        label = item % 5 if item < 8 else item
        return Pair(pixels.byte(), caption.format(colour), label, caption.format(other))


def plain_run(peer, tokenizer, data, recipe, rank=0, world=1):
    """Train transformers' model. Return the loss, learning rate and logit scale of each step."""
    per_epoch = len(data) // recipe.batch
    steps = recipe.epochs * per_epoch
    rising = max(1, round(recipe.warmup * steps))
    for name, p in peer.named_parameters():
        p.requires_grad_(not (recipe.freeze and name.startswith(PARTS[recipe.freeze])))
    bias = torch.nn.Parameter(torch.tensor(-10.0))  # SigLIP's initial bias
    optimizers = plain_optimizers(peer, recipe, [bias] * (recipe.loss == "siglip"))
    peaks = [recipe.lr, recipe.muon_lr]
    average, history = None, []
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        order = list(data.items(draw_seed(recipe.seed, epoch)))
        numbers = range(rank, recipe.batch, world)
        pairs = [
            data[order[place * recipe.batch + i], draw_seed(recipe.seed, step, i)] for i in numbers
        ]
        torch.manual_seed(draw_seed(recipe.seed, step, recipe.batch + rank))
        pixels = torch.stack([pair.pixels for pair in pairs])
        if recipe.augment:
            pixels = augment(pixels)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.1, 0.4, 0.7], [0.9, 0.5, 0.2]))
        pixels = (pixels.float() / 255 - mean) / std
        drops = recipe.patch_dropout and epoch < recipe.epochs - recipe.full_epochs
        texts = [pair.caption for pair in pairs]
        if recipe.hard_negatives:
            texts += [pair.negative for pair in pairs]
        images = embed_images(peer, pixels, recipe.patch_dropout if drops else 0)
        texts = embed_texts(peer, tokenizer(texts, pad_to=10))
        labels = torch.tensor([pair.label for pair in pairs])
        true, false = texts[: len(pairs)], texts[len(pairs) :]
        if recipe.loss == "siglip":
            loss = plain_sigmoid_loss(images, true, peer.logit_scale, bias, labels)
        else:
            loss = plain_loss(images, true, false, peer.logit_scale, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*peer.parameters(), bias], recipe.clip_gradient)
        rate = (step + 1) / rising
        if step >= rising:
            rate = (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2
        for optimizer, peak in zip(optimizers, peaks):
            for group in optimizer.param_groups:
                group["lr"] = rate * peak * group["share"]
            optimizer.step()
            optimizer.zero_grad()
        if recipe.loss == "clip":
            peer.logit_scale.data.clamp_(max=math.log(100))  # CLIP's paper, section 2.5
        if recipe.ema:
            share = recipe.ema if average else 0
            average = [
                share * mean + (1 - share) * p.detach()
                for mean, p in zip(average or peer.parameters(), peer.parameters())
            ]
        history.append((loss.item(), rate * recipe.lr, peer.logit_scale.exp().item()))
    for mean, p in zip(average or (), peer.parameters()):
        p.data = mean
    return history


def embed_images(peer, pixels, dropped):
    """Drop random patches of the images, and return the embeddings at unit length."""

    def drop(module, inputs, x):
        patches = x.shape[1] - 1
        kept = torch.rand(len(x), patches).argsort(1)[:, : round(patches * (1 - dropped))]
        rows = [[0, *(1 + kept[i].sort().values)] for i in range(len(x))]
        return torch.stack([x[i, row] for i, row in enumerate(rows)])

    tower = peer.vision_model
    handle = tower.pre_layrnorm.register_forward_hook(drop) if dropped else None
    embeds = peer.visual_projection(tower(pixel_values=pixels).pooler_output)
    if handle:
        handle.remove()
    return embeds / embeds.norm(dim=1, keepdim=True)


def embed_texts(peer, ids):
    embeds = peer.text_projection(peer.text_model(input_ids=ids).pooler_output)
    return embeds / embeds.norm(dim=1, keepdim=True)


def plain_loss(images, texts, negatives, scale, labels):
    """Compute CLIP's loss (figure 3) with UniCL's shared labels. Add a loss for false captions."""
    logits = scale.exp() * images @ texts.T
    same = (labels[:, None] == labels).float()
    target = same / same.sum(1, keepdim=True)
    both = [-(target * x.log_softmax(1)).sum(1).mean() for x in (logits, logits.T)]
    loss = (both[0] + both[1]) / 2
    if len(negatives):
        wrong = scale.exp() * (images * negatives).sum(1)
        loss = loss - (logits.diagonal() - wrong).sigmoid().log().mean()
    return loss


def plain_sigmoid_loss(images, texts, scale, bias, labels):
    """Compute SigLIP's loss (algorithm 1) pair by pair."""
    total = 0
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            sign = 1 if labels[i] == labels[j] else -1
            total = total - (sign * (scale.exp() * image @ text + bias)).sigmoid().log()
    return total / len(images)


PARTS = {
    "vision": ("vision_model", "visual_projection"),
    "text": ("text_model", "text_projection"),
}
# The number of layers above each module. The vision tower has two blocks, the text tower has one.
ABOVE = {
    "vision_model.embeddings": 3, "vision_model.pre_layrnorm": 3,
    "vision_model.encoder.layers.0": 2,
    "vision_model.encoder.layers.1": 1, "vision_model.post_layernorm": 0, "visual_projection": 0,
    "text_model.embeddings": 2, "text_model.encoder.layers.0": 1, "text_model.final_layer_norm": 0,
    "text_projection": 0, "logit_scale": 0,
}  # fmt: skip


def plain_optimizers(peer, recipe, more):
    """Make AdamW with betas and eps of CLIP's ViTs (table 18), and Muon if the recipe uses it."""
    named = [(name, p) for name, p in peer.named_parameters() if p.requires_grad]
    shares = {
        p: recipe.layer_decay ** next(n for part, n in ABOVE.items() if name.startswith(part))
        for name, p in named
    }
    inner = [p for name, p in named if "encoder.layers" in name and p.ndim == 2]
    muon = PlainMuon(inner, recipe.weight_decay, shares) if recipe.muon_lr else None
    adam = [p for _, p in named if muon is None or all(p is not q for q in inner)]
    decay = recipe.weight_decay
    groups = [
        {"params": [p], "weight_decay": decay * (p.ndim > 1), "share": shares.get(p, 1)}
        for p in [*adam, *more]
    ]
    return [torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6), *([muon] if muon else [])]


class PlainMuon:
    """Muon as its author describes it: Nesterov momentum, then singular values moved close to 1."""

    def __init__(self, params, weight_decay, shares, momentum=0.95):
        self.param_groups = [{"params": [p], "share": shares[p]} for p in params]
        self.weight_decay, self.momentum = weight_decay, momentum
        self.means = [torch.zeros_like(p) for p in params]

    def step(self):
        for group, mean in zip(self.param_groups, self.means):
            (p,) = group["params"]
            mean.copy_(self.momentum * mean + (1 - self.momentum) * p.grad)
            ahead = self.momentum * mean + (1 - self.momentum) * p.grad
            taller = max(1, p.shape[0] / p.shape[1]) ** 0.5
            p.data *= 1 - group["lr"] * self.weight_decay
            p.data -= group["lr"] * taller * nearly_orthogonal(ahead)

    def zero_grad(self):
        for group in self.param_groups:
            group["params"][0].grad = None


def nearly_orthogonal(matrix):
    """Apply Jordan's polynomial of degree 5 to the singular values, five times."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u @ s.diag() @ vh).float()


# BASE has six steps. The learning rate rises in the first three, because round(0.45 * 6) is 3.
BASE = Recipe(epochs=2, batch=4, lr=4e-3, warmup=0.45)
RUNS = {
    "plain": {},
    "longer": {"epochs": 3, "batch": 6, "seed": 3, "warmup": 0.0},
    "short gradients": {"lr": 1e-3, "weight_decay": 5.0, "clip_gradient": 2e-4},
    "muon": {"muon_lr": 0.03, "weight_decay": 2.0, "clip_gradient": 0.5},
    "noise, and none in the last epoch": {"patch_dropout": 0.6, "augment": True, "seed": 1},
    "noise to the end": {"patch_dropout": 0.3, "full_epochs": 0},
    "hard negatives": {"hard_negatives": True},
    "in chunks": {"chunk": 3, "hard_negatives": True},
    "moving average": {"ema": 0.6},
    "layers at their own rates": {"layer_decay": 0.5, "muon_lr": 0.03},
    "a frozen image tower": {"freeze": "vision", "muon_lr": 0.03},
    "a frozen text tower, in chunks": {"freeze": "text", "chunk": 3},
    "each pair by itself": {"loss": "siglip", "clip_gradient": 0.5},
    "blocks twice": {"checkpoint_blocks": True, "patch_dropout": 0.5},
}


def two_models(logit_scale=SHAPE.logit_scale_init):
    """Return our model and transformers' model with the same random weights, and a tokenizer."""
    ours, tokenizer = from_scratch(SHAPE, Spots(), seed=0)
    ours.logit_scale.data.fill_(logit_scale)
    ours.eval()  # the run itself must switch to training mode
    peer = transformers.CLIPModel(transformers_config(ours.config)).train()
    copy_weights(ours, peer)
    return ours, peer, tokenizer


def assert_same_weights(ours, peer, prefix=""):
    theirs = peer.state_dict()
    for name, value in ours.state_dict().items():
        # softmax cancels this bias, so the bias gets only rounding errors as its gradient
        if name.endswith("k_proj.bias"):
            continue
        difference = (value - theirs[layout_name(prefix + name, TRANSFORMERS)]).abs().max()
        assert difference < 2e-5, name


@pytest.mark.slow
@pytest.mark.sweep(4)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_same_weights_as_a_plain_training_loop(name, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "LOG_EVERY", 2)
    recipe = replace(BASE, **RUNS[name])
    ours, peer, tokenizer = two_models()
    train(ours, tokenizer, TRANSFORM, Spots(), recipe, tmp_path)
    history = plain_run(peer, tokenizer, Spots(), recipe)
    assert_same_weights(ours, peer)

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    per_epoch = len(Spots()) // recipe.batch
    ends = [n for n in range(1, len(history) + 1) if n % 2 == 0 or n % per_epoch == 0]
    assert [row["step"] for row in rows] == ends
    for row, start, end in zip(rows, [0, *ends], ends):
        losses, rates, scales = zip(*history[start:end])
        assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert row["lr"] == pytest.approx(rates[-1])
        assert row["logit_scale"] == pytest.approx(scales[-1], rel=1e-5)


def test_the_compared_runs_cover_all_recipe_fields_not_tested_elsewhere():
    switched = set().union(*RUNS.values()) | {"epochs", "batch", "lr"}
    elsewhere = {"precision", "compile", "fsdp", "lora", "val_every"}
    assert {field.name for field in fields(Recipe)} - switched == elsewhere


def test_the_logit_scale_is_limited_to_100(tmp_path):
    ours, peer, tokenizer = two_models(logit_scale=math.log(300))
    train(ours, tokenizer, TRANSFORM, Spots(), replace(BASE, epochs=1), tmp_path)
    plain_run(peer, tokenizer, Spots(), replace(BASE, epochs=1))
    assert_same_weights(ours, peer)


def one_of_two(rank):
    """A fake torch.distributed with only the functions that the loop uses."""
    return SimpleNamespace(
        is_initialized=lambda: True,
        get_rank=lambda: rank,
        get_world_size=lambda: 2,
        all_gather_object=lambda notes, own: notes.__setitem__(slice(None), [own, own]),
    )


def test_a_batch_has_at_most_all_pairs_and_at_least_one_pair_per_process(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "dist", one_of_two(0))
    monkeypatch.setattr(loop_module, "parallel", lambda objective, skips: objective)
    model, _, tokenizer = two_models()
    train(model, tokenizer, TRANSFORM, Spots(), Recipe(epochs=1, batch=100), tmp_path / "all")
    assert read_recipe(tmp_path / "all" / "recipe.json").batch == 13  # the number of all pairs
    three = {**vars(one_of_two(0)), "get_world_size": lambda: 3}
    monkeypatch.setattr(processes, "dist", SimpleNamespace(**three))
    with pytest.raises(ValueError, match="a batch of 2 cannot be shared by 3 processes"):
        train(model, tokenizer, TRANSFORM, Spots(), Recipe(batch=2), tmp_path / "few")


def test_a_frozen_tower_stays_as_it_is(tmp_path):
    model, peer, tokenizer = two_models()
    model.vision.requires_grad_(False)
    train(model, tokenizer, TRANSFORM, Spots(), replace(BASE, epochs=1, muon_lr=0.03), tmp_path)
    assert_same_weights(model.vision, peer, "vision.")
    assert not torch.equal(model.text.proj.weight, peer.text_projection.weight)
    assert not model.training


@pytest.mark.sweep(2)
@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_two_processes_has_its_share_of_pairs_and_random_numbers(
    rank, tmp_path, monkeypatch
):
    """A process has its own share of the pairs and its own random numbers. The other
    process does not exist (see `one_of_two`), so embeddings and gradients are not gathered."""
    monkeypatch.setattr(processes, "dist", one_of_two(rank))
    monkeypatch.setattr(loop_module, "parallel", lambda objective, skips: objective)
    recipe = replace(BASE, patch_dropout=0.6, augment=True)
    ours, peer, tokenizer = two_models()
    train(ours, tokenizer, TRANSFORM, Spots(), recipe, tmp_path)
    plain_run(peer, tokenizer, Spots(), recipe, rank, world=2)
    assert_same_weights(ours, peer)
    assert (tmp_path / "model.safetensors").exists() == (rank == 0)


def test_draw_seed_computes_a_fixed_formula_of_seed_and_step_and_index():
    """This formula must never change, because a resumed run must get the same data."""
    assert draw_seed(2, 3, 4) == 2 * 1_000_003**2 + 3 * 1_000_003 + 4
    assert 0 <= draw_seed(2**62, 2**40, 1) < 2**63


SAVINGS = {
    "chunk": 3,
    "checkpoint_blocks": True,
    "precision": "bfloat16",
    "compile": True,
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", [None, *SAVINGS])
def test_a_run_saves_memory_or_time_only_if_the_recipe_asks_for_it(name, tmp_path, monkeypatch):
    """The weights hardly show whether an option is used, so the test records the towers' calls."""
    monkeypatch.setattr(run_module, "LOG_EVERY", 1)
    model, _, tokenizer = two_models()
    seen = {"rows": 0, "blocks": 0, "types": set(), "compiled": []}

    def look(module, inputs, output):
        seen["rows"] = max(seen["rows"], len(output))
        seen["blocks"] += 1
        seen["types"].add(output.dtype)

    for tower in (model.vision, model.text):
        tower.blocks[0].mlp.fc1.register_forward_hook(look)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda tower: seen["compiled"].append(tower))
    recipe = replace(BASE, epochs=1, **({name: SAVINGS[name]} if name else {}))
    train(model, tokenizer, TRANSFORM, Spots(), recipe, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = torch.tensor([row["loss"] for row in rows])
    assert (losses.bfloat16().float() != losses).all()  # the loss itself is never bfloat16
    assert seen == {
        "rows": 3 if name == "chunk" else 4,
        "blocks": {"chunk": 24, "checkpoint_blocks": 12}.get(
            name, 6
        ),  # how often blocks are called in 3 steps and 2 towers
        "types": {torch.bfloat16 if name == "precision" else torch.float32},
        "compiled": [model.vision, model.text] if name == "compile" else [],
    }


@pytest.mark.parametrize(
    "field", [{"lr": math.inf}, {"warmup": math.inf}, {"warmup": 1.5}, {"seed": 2**64}]
)
def test_a_recipe_number_above_its_limit_is_an_error(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name} is .*expected at least 0, at most"):
        Recipe(**field)
