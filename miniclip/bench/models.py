"""The suites that time the model: both towers, a zero-shot classifier, the loss and gradients."""

from collections.abc import Callable, Iterator, Sequence
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
    """Encode one image, and a batch of images."""
    for count in sorted({1, setting.batch}):
        pixels = random_inputs(setting.config, images=count)[0].to(setting.device)
        trials = encoders(setting, "encode_image", [pixels] * len(setting.libraries))
        trials |= ceiling(setting, setting.libraries[0].model.vision, pixels)
        yield setting.case("vision", counted(count, "image"), count, "images", trials)


def text_suite(setting: Setting) -> Iterator[Case]:
    """Encode a batch of captions."""
    texts = captions(setting.batch)
    ids = [library.tokenize(texts).to(setting.device) for library in setting.libraries]
    count, length = ids[0].shape
    trials = encoders(setting, "encode_text", ids)
    trials |= ceiling(setting, setting.libraries[0].model.text, ids[0])
    work = f"{counted(count, 'caption')} of at most {length} tokens"
    yield setting.case("text", work, count, "texts", trials)


def encoders(setting: Setting, method: str, inputs: list[Tensor]) -> dict[str, Trial]:
    """Make a trial of each library's encoder, on the library's own input.

    If `setting.compile` is true, the compiled encoders of miniclip and transformers also run. All
    outputs are then compared with compiled miniclip's output. Each engine runs miniclip's tower.
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
        torch._dynamo.reset()  # so that `compile` makes a new graph, for this shape alone
        runs |= {name: (on_engine(tower, name), inputs[0]) for name in setting.engines}

    @torch.inference_mode()
    def encode(name: str) -> Tensor:
        encoder, x = runs[name]
        return encoder(x)

    return setting.timed({name: partial(encode, name) for name in runs})


def ceiling(setting: Setting, tower: nn.Module, x: Tensor) -> dict[str, Trial]:
    """Make a trial that computes only the matrix products with a tower's weights.

    On a CPU, this uses the fastest of PyTorch, oneDNN and MKL. PyTorch packs a weight at each call.
    oneDNN and MKL pack it once. The two products inside attention are not included.
    """
    pairs = products(tower, x)
    ways = [each(F.linear, pairs)]  # on a CPU, float16 is fast only in F.linear
    if x.is_cpu and torch.backends.mkldnn.is_available() and setting.dtype != torch.float16:
        mkldnn = torch.ops.mkldnn
        blocks = [(x, mkldnn._reorder_linear_weight(w, len(x))) for x, w in pairs]
        ways.append(each(lambda x, w: mkldnn._linear_pointwise(x, w, None, "none", [], ""), blocks))
    if x.is_cpu and torch.backends.mkl.is_available() and setting.dtype == torch.float32:
        mkl = torch.ops.mkl
        packed = [(x, mkl._mkl_reorder_linear_weight(w, len(x)), w) for x, w in pairs]
        ways.append(each(lambda x, p, w: mkl._mkl_linear(x, p, w, None, len(x)), packed))
    trials = [timed(way, setting.device) for way in ways]
    # The trials alternate, so that no trial finds its own data in the caches.
    rounds = zip(*([trial()[0] for trial in trials] for _ in range(4)))
    fastest = trials[min(enumerate(rounds), key=lambda column: min(column[1]))[0]]
    return {"matrix products alone": lambda: (fastest()[0], None)}


def each(
    multiply: Callable[..., Tensor], operands: Sequence[tuple[Any, ...]]
) -> Callable[[], None]:
    """Return a function that computes all products in order, and keeps no result."""

    def run() -> None:
        for some in operands:
            multiply(*some)

    return run


@torch.no_grad()
def products(tower: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return random rows (N, in) and the weight (out, in) of each linear layer and of the patch
    embedding. N is the number of rows that the tower multiplies by this weight."""
    pairs = []
    # Layers share inputs of the same shape. Separate inputs would take 58 GB (L/14, 256 images).
    rows: dict[tuple[int, int], Tensor] = {}

    def record(layer: Any, args: tuple[Tensor]) -> None:
        weight = layer.weight.detach().flatten(1)
        shape = (args[0].numel() // weight.shape[1], weight.shape[1])
        if shape not in rows:
            rows[shape] = args[0].new_empty(shape).normal_()
        pairs.append((rows[shape], weight))

    layers = [layer for layer in tower.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    tower(x)
    for handle in handles:
        handle.remove()
    return pairs


def zeroshot_suite(setting: Setting) -> Iterator[Case]:
    """Make a classifier from labels and 80 templates."""
    ours, *peers = setting.libraries
    tokenizer = ours.tokenize
    assert isinstance(tokenizer, Tokenizer)
    # Every hundredth label, and the longest: `all_at_once` pads all texts to the longest text.
    longest = max(IMAGENET_CLASSES, key=lambda label: len(tokenizer.encode(label)))
    labels, templates = [*IMAGENET_CLASSES[::100], longest], TEMPLATE_SETS["imagenet"]
    prompts = [template.replace("{}", label) for label in labels for template in templates]

    @torch.inference_mode()
    def class_by_class(library: Library) -> Tensor:
        """Embed the prompts of one label at a time, as in OpenAI's notebook."""
        rows = []
        for label in labels:
            ids = library.tokenize([template.replace("{}", label) for template in templates])
            embeds = unit_norm(library.encode_text(ids.to(setting.device)))
            rows.append(unit_norm(embeds.mean(dim=0)))
        return torch.stack(rows)

    @torch.inference_mode()
    def all_at_once(library: Library) -> Tensor:
        """Tokenize all prompts at once, so that the library pads them to the longest prompt."""
        batches = library.tokenize(prompts).to(setting.device).split(256)
        embeds = unit_norm(torch.cat([library.encode_text(ids) for ids in batches]))
        return unit_norm(embeds.unflatten(0, (len(labels), -1)).mean(dim=1))

    runs = {"miniclip": partial(class_embeddings, ours.model, tokenizer, labels, templates)}
    runs |= {library.name: partial(class_by_class, library) for library in peers}
    runs["transformers, at once"] = partial(all_at_once, peers[0])
    work = f"{len(labels)} labels x {len(templates)} templates"
    yield setting.case("zeroshot", work, len(prompts), "texts", setting.timed(runs))


def train_suite(setting: Setting) -> Iterator[Case]:
    """Compute the contrastive loss of a batch, and the gradients of the loss."""
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
        """Convert gradients to one vector in OpenAI's layout. open_clip uses the same layout."""
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
