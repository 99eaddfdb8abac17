"""Ten published modifications of CLIP. Each takes at most ten lines and uses only public names.

Each test compares a modification with a slow version of the paper's method. The slow version uses
transformers (PEFT for LoRA) and the same weights. As a control, each test must also notice a wrong
version of the modification. The model has the shape of the embedded checkpoint `shapes`, but random
weights.
"""

import ast
import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import nn
from transformers import CLIPModel
from twin import assert_close, assert_far, random_inputs, randomize

import miniclip
from miniclip import cache, hooks
from miniclip.files.names import TRANSFORMERS, layout_name
from miniclip.lens.decompose import decompose
from miniclip.lens.streams import forward_intermediates
from miniclip.parity import transformers_twin
from miniclip.surgery import (
    ablate_heads,
    add_lora,
    add_registers,
    average,
    copied,
    dense_features,
    encode_prompts,
    extend_context,
    interpolate,
    merge_lora,
    move_to_registers,
    prune_heads,
    resize_image,
    splice,
)

PHRASES = ["a red circle", "a blue star", "a green ring", "a square"]


@pytest.fixture
def loaded():
    loaded = miniclip.load("shapes", dtype=torch.float64)
    randomize(loaded.model)
    return loaded


@pytest.fixture
def theirs(loaded):
    return transformers_twin(loaded.model)


@pytest.fixture
def pixels(loaded):
    return random_inputs(loaded.model.config, images=4)[0].double()


@pytest.fixture
def ids(loaded):
    return loaded.tokenizer(PHRASES)


def their_images(theirs, pixels, **options):
    return theirs.get_image_features(pixels, **options).pooler_output


def their_texts(theirs, ids):
    return theirs.get_text_features(ids).pooler_output


# ---------------------------------------------------------------------------------- SCLIP attention


def sclip(model, pixels, texts):
    """In the last block, queries attend to queries, and keys to keys (arXiv 2312.01597, eq. 4)."""
    attn = f"vision.blocks.{len(model.vision.blocks) - 1}.attn"

    def correlative(pattern, name):
        q, k = (acts[f"{attn}.{site}"].transpose(1, 2) for site in "qk")
        return sum((x @ x.mT * x.shape[-1] ** -0.5).softmax(-1) for x in (q, k))

    with cache(model, f"{attn}.[qk]") as acts, hooks(model, {f"{attn}.pattern": correlative}):
        tokens, _ = forward_intermediates(model, pixels)
    patches = F.normalize(model.vision.proj(tokens[:, 1:]), dim=-1)
    return (patches @ texts.T).unflatten(1, model.config.vision.grid)  # (B, rows, columns, C)


@torch.no_grad()
def test_sclip_gives_the_same_outputs_as_the_method_in_its_paper(loaded, theirs, pixels, ids):
    texts = loaded.model.encode_text(ids, normalize=True)
    found = sclip(loaded.model, pixels, texts)

    layer = theirs.vision_model.encoder.layers[-1]
    x = theirs.vision_model(pixels, output_hidden_states=True).hidden_states[-2]

    def attention(similarities):
        y, heads = layer.layer_norm1(x), []
        for head in torch.arange(96).split(32):
            q, k, v = (
                getattr(layer.self_attn, f"{one}_proj")(y)[..., head].numpy() for one in "qkv"
            )
            weights = 0
            for one in similarities(q, k):
                scores = torch.from_numpy(one @ one.transpose(0, 2, 1) / 32**0.5)
                weights = weights + scores.exp() / scores.exp().sum(-1, keepdim=True)
            heads.append(weights @ torch.from_numpy(v))
        stream = x + layer.self_attn.out_proj(torch.cat(heads, -1))
        stream = stream + layer.mlp(layer.layer_norm2(stream))
        patches = theirs.visual_projection(theirs.vision_model.post_layernorm(stream[:, 1:]))
        patches = patches / patches.norm(dim=-1, keepdim=True)
        return torch.einsum("bpe,ce->bpc", patches, texts).view(4, 8, 8, 4)

    assert_close(found, attention(lambda q, k: (q, k)))
    assert_far(found, attention(lambda q, k: (q, q)))
    preset = F.normalize(dense_features(loaded.model, pixels, "sclip"), dim=-1)
    assert_close(found.flatten(1, 2), preset @ texts.T)


# -------------------------------------------------------------------------------- Long-CLIP stretch


def long_clip(loaded, directory):
    """Extend the context from 77 to 248 tokens (arXiv 2403.15378, section 3.2)."""
    model, tokenizer, transform = loaded
    tokenizer.context_length = 248
    miniclip.save(directory, extend_context(model, 248), tokenizer, transform)
    return miniclip.load(directory, dtype=torch.float64)


@pytest.mark.slow
@torch.no_grad()
def test_long_clip_gives_the_same_outputs_as_the_method_in_its_paper(loaded, ids, tmp_path):
    short, rows = loaded.model.encode_text(ids), loaded.model.text.pos_embed.detach()
    long, tokenizer, _ = long_clip(loaded, tmp_path)
    longer = tokenizer(["a red circle above a blue star. " * 25, "a star"])
    assert 77 < longer.shape[1] <= 248
    theirs = CLIPModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_close(long.encode_text(longer), their_texts(theirs, longer))
    assert torch.equal(long.encode_text(ids), short)  # short texts use only unchanged positions

    def stretched(keep):
        out = [*rows[:keep]]
        for i in range(keep, 77):
            slope = rows[min(i, 75) + 1] - rows[min(i, 75)]
            out += [rows[i] + slope * quarter / 4 for quarter in range(4)]
        return torch.stack(out)[:248]

    assert_close(long.text.pos_embed.detach(), stretched(20))
    assert_far(long.text.pos_embed.detach(), stretched(16))


# ----------------------------------------------------------------------------- images of 336 pixels


def larger_images(loaded, size, directory):
    """Make a model take larger images, as in CLIP's paper (224 to 336 pixels, section 2.5)."""
    model, tokenizer, transform = loaded
    transform = replace(transform, size=size, crop_size=size)
    miniclip.save(directory, resize_image(model, size), tokenizer, transform)
    return miniclip.load(directory, dtype=torch.float64)


@torch.no_grad()
def test_larger_images_have_the_embeddings_of_transformers(loaded, theirs, tmp_path):
    model, _, transform = larger_images(loaded, 96, tmp_path)  # the original size is 64
    picture = torch.randint(256, (3, 120, 150), dtype=torch.uint8)
    pixels = transform([picture]).double()
    expected = their_images(theirs, pixels, interpolate_pos_encoding=True)
    assert_close(model.encode_image(pixels), expected)
    assert_far(resize_image(loaded.model, 96, "timm").encode_image(pixels), expected)
    saved = CLIPModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_close(their_images(saved, pixels), expected)


# ------------------------------------------------------------------------------------- head pruning


def without_least_important_heads(model, pixels, ids, count):
    """Prune the `count` least important heads (arXiv 1905.10650). A gate is a factor on the output
    of a head. The head's importance is the mean absolute gradient of the loss at this gate."""
    with cache(model, "vision.blocks.*.attn.z", grad=True) as acts:
        logits = model(pixels, ids).logits_per_image
        loss = F.cross_entropy(logits, torch.arange(len(ids)), reduction="sum")
    slopes = torch.autograd.grad(loss, list(acts.values()))
    importance = torch.stack(
        [(slope * z).sum((1, 3)).abs().mean(0) for slope, z in zip(slopes, acts.values())]
    )  # (L, H)
    gone = (importance <= importance.flatten().sort().values[count - 1]).tolist()
    gone = {layer: [h for h, weak in enumerate(row) if weak] for layer, row in enumerate(gone)}
    return prune_heads(model, "vision", gone), importance


@pytest.mark.slow
@torch.no_grad()
def test_head_pruning_gives_the_same_outputs_as_the_method_in_its_paper(
    loaded, theirs, pixels, ids
):
    with torch.enable_grad():
        pruned, importance = without_least_important_heads(loaded.model, pixels, ids, 5)

    def losses(layer, head, gate):
        """Return the loss of each image when one head's output is multiplied by `gate`."""
        gates = torch.ones(3, 1, dtype=torch.float64)
        gates[head] = gate
        attn = theirs.vision_model.encoder.layers[layer].self_attn
        handle = attn.out_proj.register_forward_pre_hook(
            lambda _, args: (args[0].unflatten(-1, (3, 32)) * gates).flatten(2)
        )
        logits = theirs(pixel_values=pixels, input_ids=ids).logits_per_image
        handle.remove()
        return -logits.log_softmax(-1).diag()

    for layer in range(4):
        for head in range(3):
            slope = (losses(layer, head, 1 + 1e-5) - losses(layer, head, 1 - 1e-5)) / 2e-5
            assert abs(slope.abs().mean() / importance[layer, head] - 1) < 1e-5
    weakest = importance.flatten().argsort()[:5].tolist()
    assert sum(pruned.config.vision.heads) == 12 - 5
    for n in weakest:
        columns = slice(n % 3 * 32, n % 3 * 32 + 32)
        theirs.vision_model.encoder.layers[n // 3].self_attn.out_proj.weight[:, columns] = 0
    assert_close(pruned.encode_image(pixels), their_images(theirs, pixels))
    theirs.vision_model.encoder.layers[0].self_attn.out_proj.weight[:] = 0
    assert_far(pruned.encode_image(pixels), their_images(theirs, pixels))


# -------------------------------------------------------------------------------- LoRA on q and v


def tuned_with_lora(model, pixels, ids, steps=3):
    """Train LoRA (arXiv 2106.09685) on the queries and values of both towers."""
    tuned = add_lora(model, rank=4, alpha=8)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        logits, pairs = tuned(pixels, ids).logits_per_image, torch.arange(len(ids))
        optimizer.zero_grad()
        (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)).backward()
        optimizer.step()
    return merge_lora(tuned)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's code
def test_lora_gives_the_same_logits_as_peft_after_three_training_steps(loaded, theirs, pixels, ids):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    start = add_lora(loaded.model, rank=4, alpha=8)  # LoRA's A is random, and its B is zero

    def trained_by_peft(alpha):
        options = dict(r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"])
        wrapped = peft.get_peft_model(transformers_twin(loaded.model), peft.LoraConfig(**options))
        for name, A in start.named_parameters():
            if name.endswith(".A"):
                linear = name.partition(".parametrizations")[0]
                name = layout_name(f"{linear}.weight", TRANSFORMERS).removesuffix(".weight")
                lora = wrapped.base_model.model.get_submodule(name)
                lora.lora_A["default"].weight.data.copy_(A)
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        assert len(trained) == 2 * 2 * (4 + 2)
        for _ in range(3):
            logits = wrapped(pixel_values=pixels, input_ids=ids).logits_per_image
            loss = -logits.log_softmax(0).diag().mean() - logits.log_softmax(1).diag().mean()
            for parameter, slope in zip(trained, torch.autograd.grad(loss, trained)):
                parameter.data -= 0.01 * slope
        return wrapped.merge_and_unload()

    torch.manual_seed(0)
    tuned = tuned_with_lora(loaded.model, pixels, ids)
    peers = [trained_by_peft(alpha) for alpha in (8, 4)]
    with torch.no_grad():
        found = tuned(pixels, ids).logits_per_image
        for peer, check in zip(peers, (assert_close, assert_far)):
            check(found, peer(pixel_values=pixels, input_ids=ids).logits_per_image)
    assert_far(found, loaded.model(pixels, ids).logits_per_image)


# ----------------------------------------------------------------------------------- prompt vectors


def coop(model, tokenizer, images, labels, classes, steps=3):
    """Learn four vectors in place of "a photo of a", for all classes (arXiv 2109.01134).

    The authors' code puts a full stop after each label, but their paper does not.
    """
    ids = tokenizer([f"x x x x {name}" for name in classes])  # each x is a place for a vector
    words = model.text.token_embed(ids).detach()
    context = words.new_zeros(4, words.shape[2]).requires_grad_()
    for _ in range(steps):
        prompts = torch.cat([words[:, :1], context.expand(len(ids), -1, -1), words[:, 5:]], 1)
        texts = encode_prompts(model, prompts, model.text.eos_positions(ids), normalize=True)
        loss = F.cross_entropy(model.logit_scale.exp() * images @ texts.T, labels)
        context.data -= 0.01 * torch.autograd.grad(loss, context)[0]
    return context


def test_coop_learns_the_same_prompt_vectors_as_the_method_in_its_paper(loaded, theirs, pixels):
    model, tokenizer, _ = loaded
    images, labels = model.encode_image(pixels, normalize=True).detach(), torch.tensor([0, 1, 0, 2])
    classes = ["circle", "green star", "ring"]
    found = coop(model, tokenizer, images, labels, classes)

    def slowly(first):
        """Learn the vectors with transformers' layers, and encode one class at a time."""
        text, context = theirs.text_model, torch.zeros(4, 96, dtype=torch.float64)
        for _ in range(3):
            context.requires_grad_()
            texts = []
            for name in classes:
                ids = tokenizer([name])
                words = text.embeddings.token_embedding(ids)
                x = torch.cat([words[:, :first], context[None], words[:, first:]], 1)
                x = text.embeddings(inputs_embeds=x)
                for layer in text.encoder.layers:
                    x = layer(x, None, is_causal=True)
                x = theirs.text_projection(text.final_layer_norm(x[:, -1]))[0]
                texts.append(x / x.norm())
            logits = theirs.logit_scale.exp() * images @ torch.stack(texts).T
            loss = -logits.log_softmax(1)[range(4), labels].mean()
            context = (context - 0.01 * torch.autograd.grad(loss, context)[0]).detach()
        return context

    assert_close(found, slowly(first=1))
    assert_far(found, slowly(first=0))


# -------------------------------------------------------------------------------------- registers


def with_registers(model, pixels, neurons):
    """Move the activations of some neurons to a new token, without training (arXiv 2506.08010).

    As in the authors' code, all chosen neurons of a layer get the same value at the new token: the
    activation with the largest absolute value. In the paper, each neuron gets its own largest
    activation, and the activations at the class token also become 0.
    """
    with move_to_registers(model, neurons):
        return model.encode_image(pixels)


@torch.no_grad()
def test_registers_give_the_same_outputs_as_the_authors_code(loaded, theirs, pixels):
    neurons = {1: [3, 50, 51, 300], 3: [0, 7]}
    found = with_registers(loaded.model, pixels, neurons)

    def slowly(emptied):
        vision, images = theirs.vision_model, []
        for image in pixels:
            x = vision.embeddings(image[None])
            x = vision.pre_layrnorm(torch.cat([x, torch.zeros_like(x[:, :1])], 1))
            for i, layer in enumerate(vision.encoder.layers):
                x = x + layer.self_attn(layer.layer_norm1(x))[0]
                act = layer.mlp.activation_fn(layer.mlp.fc1(layer.layer_norm2(x)))
                most = max(act[0, :, neurons.get(i, [])].flatten().tolist(), key=abs, default=0)
                for neuron in neurons.get(i, []):
                    act[0, emptied, neuron] = 0
                    act[0, -1, neuron] = most
                x = x + layer.mlp.fc2(act)
            images.append(theirs.visual_projection(vision.post_layernorm(x[:, 0])))
        return torch.cat(images)

    assert_close(found, slowly(emptied=slice(1, None)))
    assert_far(found, slowly(emptied=slice(None)))  # the class token keeps its activations
    assert_far(found, add_registers(loaded.model, 1).encode_image(pixels))


@torch.no_grad()
def test_registers_get_the_activation_of_largest_magnitude_even_if_it_is_negative(loaded, pixels):
    model = copied(loaded.model)
    fc1 = model.vision.blocks[1].mlp.fc1
    fc1.weight[:2] = 0
    fc1.bias[:2] = torch.tensor([-1.0, -0.1])  # activations of -0.15 and -0.05 at every token
    with move_to_registers(model, {1: [0, 1]}), cache(model, "vision.blocks.1.mlp.act") as acts:
        model.encode_image(pixels)
    expected = model.vision.blocks[1].mlp.act(torch.tensor(-1.0).double())
    assert_close(acts["vision.blocks.1.mlp.act"][:, 1, :2], expected.expand(len(pixels), 2))


# -------------------------------------------------------------------------------------- SAE splice


class SparseAutoencoder(nn.Module):
    def __init__(self, width, features):
        super().__init__()
        self.encoder, self.relu = nn.Linear(width, features), nn.ReLU()
        self.decoder = nn.Linear(features, width)

    def forward(self, x):
        return self.decoder(self.relu(self.encoder(x)))


def without_features(model, pixels, site, sae, features):
    """Set features of an autoencoder to 0, but keep its error (arXiv 2403.19647, section 2)."""

    def off(activations, name):
        kept = activations.clone()
        kept[..., features] = 0
        return kept

    with splice(model, site, sae, error_term=True), hooks(sae, {"relu": off}):
        return model.encode_image(pixels)


@torch.no_grad()
def test_splicing_an_autoencoder_gives_the_same_outputs_as_the_method_in_its_paper(
    loaded, theirs, pixels
):
    torch.manual_seed(0)
    sae = SparseAutoencoder(96, 200).double()
    site, features = "vision.blocks.2", [7, 120]
    found = without_features(loaded.model, pixels, site, sae, features)

    def slowly(features):
        """In transformers, subtract the features' contributions from the residual stream."""

        def taken(module, args, x):
            left = x
            for n in features:
                strength = (x @ sae.encoder.weight[n] + sae.encoder.bias[n]).clamp(min=0)
                left = left - strength[..., None] * sae.decoder.weight[:, n]
            return left

        handle = theirs.vision_model.encoder.layers[2].register_forward_hook(taken)
        images = their_images(theirs, pixels)
        handle.remove()
        return images

    assert_close(found, slowly(features))
    assert_far(found, slowly(features[:1]))
    assert_close(without_features(loaded.model, pixels, site, sae, []), slowly([]))
    with splice(loaded.model, site, sae):  # without the error term, the output differs
        assert_far(loaded.model.encode_image(pixels), slowly([]))


# ------------------------------------------------------------------------- heads chosen by a text


def without_heads_for(model, pixels, text, count):
    """Replace some heads' output with the mean over the batch (arXiv 2310.05916, section 5.1).

    The contributions of these heads have the largest dot products with a text embedding.
    """
    parts = decompose(model, pixels, by="head")
    written = torch.stack([part for name, part in parts.items() if name.endswith("attn")], 1)
    scores = (written @ text).mean(0)  # (B, L, H, E) -> (L, H)
    heads = {}
    for n in scores.flatten().topk(count).indices.tolist():
        heads.setdefault(n // scores.shape[1], []).append(n % scores.shape[1])
    with ablate_heads(model, "vision", heads, mode="mean"):
        return model.encode_image(pixels), scores


@torch.no_grad()
def test_head_ablation_by_text_gives_the_same_outputs_as_the_method_in_its_paper(
    loaded, theirs, pixels, ids
):
    text = loaded.model.encode_text(ids[:1], normalize=True)[0]
    found, scores = without_heads_for(loaded.model, pixels, text, 3)

    vision, reads = theirs.vision_model, []
    attns = [layer.self_attn for layer in vision.encoder.layers]
    for attn in attns:
        attn.out_proj.register_forward_pre_hook(lambda _, args: reads.append(args[0]))
    stream = vision(pixels, output_hidden_states=True).hidden_states[-1][:, 0]
    length = (stream.var(-1, correction=0) + vision.post_layernorm.eps).sqrt()
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for layer, (attn, z) in enumerate(zip(attns, reads)):
        for head in range(3):
            own = slice(head * 32, head * 32 + 32)
            wrote = (z[:, 0, own] - attn.v_proj.bias[own]) @ attn.out_proj.weight[:, own].T
            wrote = (wrote - wrote.mean(-1, keepdim=True)) / length[:, None]
            wrote = theirs.visual_projection(wrote * vision.post_layernorm.weight)
            expected[layer, head] = (wrote @ text).mean()
    assert_close(scores, expected)

    def slowly(chosen):
        def ablated(attn, args):
            z = args[0].clone()
            for n in chosen:
                own = slice(n % 3 * 32, n % 3 * 32 + 32)
                if attns[n // 3].out_proj is attn:
                    z[..., own] = sum(z[..., own]) / len(z)
            return z

        handles = [attn.out_proj.register_forward_pre_hook(ablated) for attn in attns]
        features = their_images(theirs, pixels)
        for handle in handles:
            handle.remove()
        return features

    ranked = expected.flatten().argsort(descending=True).tolist()
    assert_close(found, slowly(ranked[:3]))
    assert_far(found, slowly(ranked[:2]))


# ------------------------------------------------------------------------------------ a greedy soup


def greedy_soup(models, score):
    """Average models, but skip a model that lowers the score (arXiv 2203.05482, recipe 1).

    The best model comes first. In the paper, a model is added if the score does not fall (`>=`). In
    the authors' code, a model is added only if the score rises (`>`).
    """
    ranked = sorted(models, key=score, reverse=True)
    kept = ranked[:1]
    for model in ranked[1:]:
        if score(average([*kept, model])) >= score(average(kept)):
            kept.append(model)
    return average(kept)


@pytest.mark.slow
@torch.no_grad()
def test_a_greedy_soup_gives_the_same_outputs_as_the_method_in_its_paper(
    loaded, pixels, ids, tmp_path
):
    """The mean of the first three models has the best score. The fourth model is far from them."""
    base = miniclip.load("shapes", dtype=torch.float64).model
    models = []
    for seed, distance in ((1, 0.003), (2, 0.003), (3, 0.003), (4, 0.2)):
        randomize(loaded.model, seed)
        models.append(interpolate(base, loaded.model, distance))
        models[-1].save_pretrained(tmp_path / str(seed))

    def mean_of_files(seeds):
        files = [load_file(tmp_path / str(seed) / "model.safetensors") for seed in seeds]
        mean = {name: sum(file[name] for file in files) / len(files) for name in files[0]}
        theirs = CLIPModel.from_pretrained(tmp_path / "1", dtype=torch.float64).eval()
        theirs.load_state_dict({name: torch.tensor(array) for name, array in mean.items()})
        return torch.cat([their_images(theirs, pixels), their_texts(theirs, ids)])

    best, asked = mean_of_files([1, 2, 3]), []

    def embeddings(model):
        return torch.cat([model.encode_image(pixels), model.encode_text(ids)])

    def score(model):
        asked.append(model)
        return -(embeddings(model) - best).square().mean().item()

    found = embeddings(greedy_soup(models, score))
    assert len(asked) == 4 + 3 * 2
    assert_close(found, best)
    for wrong in ([1, 2], [1, 2, 3, 4]):
        assert_far(found, mean_of_files(wrong))


# --------------------------------------------------------------------------------------------------

RECIPES = [
    sclip, long_clip, larger_images, without_least_important_heads, tuned_with_lora, coop,
    with_registers, without_features, without_heads_for, greedy_soup,
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_each_modification_takes_at_most_ten_lines(recipe):
    definition = ast.parse(inspect.getsource(recipe)).body[0]
    first, last = definition.body[1].lineno, definition.end_lineno  # after the docstring
    lines = inspect.getsource(recipe).splitlines()[first - 1 : last]
    assert len([line for line in lines if line.strip()]) <= 10
