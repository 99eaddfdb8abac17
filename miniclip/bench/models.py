"""Suites of the model: images and captions to embeddings, a zero-shot classifier, gradients."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.bench.libraries import Library
from miniclip.bench.material import Setting, captions
from miniclip.bench.measuring import Case, Trial, timed
from miniclip.engines import on_engine
from miniclip.files.names import OPENAI, TRANSFORMERS, layout_name, pack
from miniclip.loss import contrastive_loss
from miniclip.model import unit_norm
from miniclip.parity import random_inputs
from miniclip.terminal import counted
from miniclip.tokenizer import Tokenizer
from miniclip.zeroshot.classifier import class_embeddings
from miniclip.zeroshot.prompts import IMAGENET_CLASSES, TEMPLATE_SETS


def vision_suite(setting: Setting) -> Iterator[Case]:
    """Images to embeddings: one, and a batch."""
    for count in sorted({1, setting.batch}):
        pixels = random_inputs(setting.config, images=count)[0].to(setting.device)
        trials = encoders(setting, "encode_image", [pixels] * len(setting.libraries))
        trials |= ceiling(setting, setting.libraries[0].model.vision, pixels)
        yield setting.case("vision", counted(count, "image"), count, "images", trials)


def text_suite(setting: Setting) -> Iterator[Case]:
    """A batch of captions to embeddings."""
    texts = captions(setting.batch)
    ids = [library.tokenize(texts).to(setting.device) for library in setting.libraries]
    count, length = ids[0].shape
    trials = encoders(setting, "encode_text", ids)
    trials |= ceiling(setting, setting.libraries[0].model.text, ids[0])
    work = f"{counted(count, 'caption')} of at most {length} tokens"
    yield setting.case("text", work, count, "texts", trials)


def encoders(setting: Setting, method: str, inputs: list[Tensor]) -> dict[str, Trial]:
    """Each library's encoder on its input.

    With `compile`, miniclip's and transformers' encoders also run compiled, and all outputs are
    compared with miniclip's compiled encoder. `engines` run miniclip's tower.
    """
    pairs = zip(setting.libraries, inputs, strict=True)
    runs = {library.name: (getattr(library, method), x) for library, x in pairs}
    if setting.compile:
        mode = "max-autotune" if setting.device.startswith("cuda") else "default"
        compiled = {
            f"{name}, compiled": (torch.compile(runs[name][0], mode=mode), runs[name][1])
            for name in ("miniclip", "transformers")
        }
        runs = compiled | runs

    if setting.engines:
        model = setting.libraries[0].model
        tower = model.vision if method == "encode_image" else model.text
        torch._dynamo.reset()  # so that `compile` makes a graph for this very shape
        runs |= {name: (on_engine(tower, name), inputs[0]) for name in setting.engines}

    @torch.inference_mode()
    def encode(name: str) -> Tensor:
        encoder, x = runs[name]
        return encoder(x)

    return setting.timed({name: partial(encode, name) for name in runs})


def ceiling(setting: Setting, tower: nn.Module, x: Tensor) -> dict[str, Trial]:
    """The time of a tower's matrix products alone: its shapes, its weights, nothing in between.

    On a CPU this is the fastest of three ways: PyTorch's, which packs a weight at each call, and
    oneDNN's and MKL's, which pack it once. Attention's own two products are left out.
    """
    pairs = products(tower, x)
    ways = [lambda: [F.linear(x, w) for x, w in pairs]]  # on a CPU, float16 is fast only here
    if x.is_cpu and torch.backends.mkldnn.is_available() and setting.dtype != torch.float16:
        mkldnn = torch.ops.mkldnn
        blocks = [(x, mkldnn._reorder_linear_weight(w, len(x))) for x, w in pairs]
        ways.append(
            lambda: [mkldnn._linear_pointwise(x, w, None, "none", [], "") for x, w in blocks]
        )
    if x.is_cpu and torch.backends.mkl.is_available() and setting.dtype == torch.float32:
        mkl = torch.ops.mkl
        packed = [(x, mkl._mkl_reorder_linear_weight(w, len(x)), w) for x, w in pairs]
        ways.append(lambda: [mkl._mkl_linear(x, p, w, None, len(x)) for x, p, w in packed])
    trials = [timed(way, setting.device) for way in ways]
    fastest = min(trials, key=lambda trial: min(trial()[0] for _ in range(3)))
    return {"matrix products alone": lambda: (fastest()[0], None)}


@torch.no_grad()
def products(tower: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each linear layer, and for the convolution that embeds patches, which is one: random
    rows (N, in), as many as the tower multiplies, and the weight (out, in)."""
    pairs = []

    def record(layer: Any, args: tuple[Tensor]) -> None:
        weight = layer.weight.detach().flatten(1)
        rows = args[0].new_empty(args[0].numel() // weight.shape[1], weight.shape[1])
        pairs.append((rows.normal_(), weight))

    layers = [layer for layer in tower.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    tower(x)
    for handle in handles:
        handle.remove()
    return pairs


def zeroshot_suite(setting: Setting) -> Iterator[Case]:
    """Labels in 80 templates to a classifier."""
    ours, *peers = setting.libraries
    tokenizer = ours.tokenize
    assert isinstance(tokenizer, Tokenizer)
    # A few of the thousand, and the longest: a library that takes all at once pads them to it.
    longest = max(IMAGENET_CLASSES, key=lambda label: len(tokenizer.encode(label)))
    labels, templates = [*IMAGENET_CLASSES[::100], longest], TEMPLATE_SETS["imagenet"]
    prompts = [template.replace("{}", label) for label in labels for template in templates]

    @torch.inference_mode()
    def class_by_class(library: Library) -> Tensor:
        """As in OpenAI's notebook."""
        rows = []
        for label in labels:
            ids = library.tokenize([template.replace("{}", label) for template in templates])
            embeds = unit_norm(library.encode_text(ids.to(setting.device)))
            rows.append(unit_norm(embeds.mean(dim=0)))
        return torch.stack(rows)

    @torch.inference_mode()
    def all_at_once(library: Library) -> Tensor:
        """As the library pads a list of texts: to the longest text."""
        batches = library.tokenize(prompts).to(setting.device).split(256)
        embeds = unit_norm(torch.cat([library.encode_text(ids) for ids in batches]))
        return unit_norm(embeds.unflatten(0, (len(labels), -1)).mean(dim=1))

    runs = {"miniclip": partial(class_embeddings, ours.model, tokenizer, labels, templates)}
    runs |= {library.name: partial(class_by_class, library) for library in peers}
    runs["transformers, at once"] = partial(all_at_once, peers[0])
    work = f"{len(labels)} labels x {len(templates)} templates"
    yield setting.case("zeroshot", work, len(prompts), "texts", setting.timed(runs))


def train_suite(setting: Setting) -> Iterator[Case]:
    """The contrastive loss of a batch, and its gradients."""
    texts = captions(setting.batch)
    pixels = random_inputs(setting.config, images=len(texts))[0].to(setting.device)
    names = setting.libraries[0].model.state_dict().keys()

    def gradients(library: Library, ids: Tensor) -> dict[str, Tensor]:
        image_embeds = unit_norm(library.encode_image(pixels))
        text_embeds = unit_norm(library.encode_text(ids))
        loss = contrastive_loss(image_embeds, text_embeds, library.model.logit_scale)
        parameters = dict(library.model.named_parameters())
        grads = torch.autograd.grad(loss, list(parameters.values()))
        return dict(zip(parameters, grads, strict=True))

    def one_vector(gradients: dict[str, Tensor]) -> Tensor:
        """In OpenAI's layout. open_clip uses it, and the others are converted to it."""
        theirs = {name: layout_name(name, TRANSFORMERS) for name in names}
        if gradients.keys() == set(theirs.values()):
            gradients = {name: gradients[their] for name, their in theirs.items()}
        if gradients.keys() == names:
            gradients = pack(gradients, OPENAI)
        flat = [gradients[name].double().flatten().cpu() for name in sorted(gradients)]
        return torch.cat(flat)[None]

    runs = {
        library.name: partial(gradients, library, library.tokenize(texts).to(setting.device))
        for library in setting.libraries
    }
    work = f"the loss of {counted(len(texts), 'pair')} and its gradients"
    yield setting.case("train", work, len(texts), "pairs", setting.timed(runs), one_vector)
