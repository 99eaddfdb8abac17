"""What a CLIP costs: its multiply-adds, counted; and its time beside that of others, measured.

The measuring alternates: one round is one trial of miniclip and one of every peer, and a ratio is
taken within a round. Nothing is timed before its output has been found equal to miniclip's.
"""

import gzip
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import ascii_lowercase
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from miniclip.checkpoint import check_device, load, load_model, save
from miniclip.config import LEGACY_EOS, CLIPConfig
from miniclip.imagenet import IMAGENET_CLASSES, IMAGENET_TEMPLATES
from miniclip.model import CLIP, TextTower, VisionTower, unit_norm
from miniclip.parity import OFFICIAL, random_inputs, randomize
from miniclip.tokenizer import OPENAI_VOCABULARY, Tokenizer
from miniclip.training.loss import contrastive_loss
from miniclip.transform import ImageTransform, resize_short_side
from miniclip.zeroshot import class_embeddings

# How far an output may be from miniclip's, as a share of its length: what rounding explains.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SECONDS = 6.0  # for each case


class Part(NamedTuple):
    """A part of a CLIP. What stands in every block is one part, counted over all of them."""

    name: str
    weights: str  # their shapes
    parameters: int
    multiply_adds: int  # for one image, or for one text as long as the context


def parts(config: CLIPConfig) -> list[Part]:
    """The architecture in the order data flows through it. No weights are made or read.

    >>> parts(CLIPConfig())[0]
    Part(name='vision.patch_embed', weights='(768, 3, 32, 32)', parameters=2359296, \
multiply_adds=115605504)
    """
    # Without data there is no end token to look for; the legacy rule does not look for one.
    text = replace(config.text, eos_token_id=LEGACY_EOS)
    with torch.device("meta"):
        model = CLIP(replace(config, text=text))
        pixels = torch.empty(1, config.vision.channels, *config.vision.height_width)
        ids = torch.empty(1, config.text.context_length, dtype=torch.long)
    model.set_attention("eager")  # its two matrix products are counted, which sdpa would hide
    return [
        *_tower_parts("vision", model.vision, pixels),
        *_tower_parts("text", model.text, ids),
        Part("logit_scale", "()", 1, 0),
    ]


def _tower_parts(prefix: str, tower: VisionTower | TextTower, inputs: torch.Tensor) -> list[Part]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(inputs)
    flops = {
        name.partition(".")[2]: sum(by_operation.values())
        for name, by_operation in counter.get_flop_counts().items()
    }
    shapes = (tower.config.heads, tower.config.mlp_width)
    depth = 1 if any(isinstance(n, tuple) for n in shapes) else len(tower.blocks)  # in one row
    rows = []
    for name, part in _in_order(tower, len(tower.blocks) // depth):
        weights = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        if not weights:
            continue  # a Site
        label = name.replace("blocks.0", f"blocks.0-{depth - 1}") if depth > 1 else name
        copies = depth if name.startswith("blocks.") else 1
        rows.append(
            Part(
                f"{prefix}.{label}",
                _shapes(weights),
                copies * sum(weight.numel() for weight in weights),
                copies * flops.get(name, 0) // 2,  # a multiply-add is two operations
            )
        )
    return rows


def _in_order(
    tower: VisionTower | TextTower, blocks: int
) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    embeddings = dict(tower.named_parameters(recurse=False))
    for name, child in tower.named_children():
        if name != "blocks":
            yield name, child
        else:
            for i, block in enumerate(child[:blocks]):
                for part, module in block.named_children():
                    yield f"blocks.{i}.{part}", module
        yield from embeddings.items()  # they come second: after the first embedding
        embeddings = {}


def _shapes(weights: list[nn.Parameter]) -> str:
    """The shapes of the matrices, or of the vectors where there are no matrices."""
    shapes = [tuple(w.shape) for w in weights if w.ndim > 1] or [tuple(weights[0].shape)]
    counts = {shape: shapes.count(shape) for shape in shapes}
    return ", ".join(f"{n} x {shape}" if n > 1 else str(shape) for shape, n in counts.items())


# ------------------------------------------------------------------------------------------------
# The same work by miniclip and by others: what is compared, and how


class Contender(NamedTuple):
    """Someone who does the work. A trial returns what it cost, in seconds or bytes, and the output.

    An output of None is not held against miniclip's: it comes from less work, shown for scale.
    """

    name: str
    trial: Callable[[], tuple[float, Any]]


class Case(NamedTuple):
    """One piece of work. The first contender is miniclip; the others are held against it."""

    suite: str
    work: str
    count: int  # how many of them, per trial
    unit: str  # "images", "texts", ...; or "bytes", which are themselves the cost
    contenders: list[Contender]
    form: Callable[[Any], Any]  # an output in the form that `distance` compares
    tolerance: float = 0.0


class Row(NamedTuple):
    """What one contender took. Quartiles are (lower, median, upper)."""

    suite: str
    work: str
    count: int
    unit: str
    contender: str
    difference: float | None  # of its output from miniclip's; None where there is no output
    cost: tuple[float, float, float] | None  # seconds or bytes; None: it differs, so is not timed
    ratio: tuple[float, float, float] | None  # of its cost to miniclip's in the same round


def measure(case: Case, seconds: float = SECONDS) -> list[Row]:
    """Compare all outputs, and only then take the time of those whose output is miniclip's."""
    outputs = []
    for contender in case.contenders:
        output = contender.trial()[1]  # brought into form at once: a CUDA graph reuses its memory
        outputs.append(None if output is None else case.form(output))
    differences = [None if out is None else distance(out, outputs[0]) for out in outputs]
    equal = [
        contender
        for contender, difference in zip(case.contenders, differences, strict=True)
        if difference is None or difference <= case.tolerance
    ]
    alternate(equal, 1, least=1, most=3)  # compilers, caches and clocks warm up
    costs = dict(zip(equal, zip(*alternate(equal, seconds), strict=True), strict=True))
    first = costs[case.contenders[0]]
    rows = []
    for contender, difference in zip(case.contenders, differences, strict=True):
        cost = ratio = None
        if contender in costs:
            cost = quartiles(costs[contender])
            ratio = quartiles([a / b for a, b in zip(costs[contender], first, strict=True)])
        rows.append(Row(*case[:4], contender.name, difference, cost, ratio))
    return rows


def alternate(
    contenders: list[Contender], seconds: float, *, least: int = 5, most: int = 40
) -> list[list[float]]:
    """Rounds of a trial each, A B A B: what slows the machine for a while slows all of them."""
    start = time.perf_counter()
    rounds: list[list[float]] = []
    while len(rounds) < least or (len(rounds) < most and time.perf_counter() - start < seconds):
        rounds.append([contender.trial()[0] for contender in contenders])
    return rounds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """
    >>> quartiles([5.0, 1.0, 2.0, 4.0, 3.0])
    (2.0, 3.0, 4.0)
    """
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def distance(one: Any, other: Any) -> float:
    """Of two tensors (..., N) the largest |one - other| / |other| of any row; of other things, 0 if
    they are equal, else infinite.

    >>> distance(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 5.0]])) < 0.2
    True
    """
    if not isinstance(one, Tensor):
        return 0.0 if one == other else math.inf
    if one.shape != other.shape:
        return math.inf
    one, other = one.double(), other.double()
    far = ((one - other).norm(dim=-1) / other.norm(dim=-1)).max().item()
    return math.inf if math.isnan(far) else far


def timed(run: Callable[[], Any], device: str = "cpu") -> Callable[[], tuple[float, Any]]:
    """A trial that costs the seconds that `run` takes, to the end of what it started on a GPU."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def trial() -> tuple[float, Any]:
        wait()
        start = time.perf_counter()
        output = run()
        wait()
        return time.perf_counter() - start, output

    return trial


# ------------------------------------------------------------------------------------------------
# The libraries, all with the weights, the vocabulary and the settings of one checkpoint


@dataclass(frozen=True)
class Setting:
    """What the suites work with."""

    directory: Path  # a checkpoint with random weights
    config: CLIPConfig
    shape: str
    device: str
    dtype: torch.dtype
    compile: bool
    batch: int

    @cached_property
    def libraries(self) -> "list[Library]":
        found = [use_miniclip(self), use_transformers(self)]
        for use in (use_open_clip, use_openai):
            try:
                found.append(use(self))
            except ImportError:
                pass  # not installed, or not without torchvision
        return found

    @cached_property
    def photographs(self) -> list[Path]:
        return [photograph(self.directory / f"{i}.jpg", i) for i in range(16)]


class Library(NamedTuple):
    """A CLIP, used as its documentation uses it."""

    name: str
    model: nn.Module
    encode_image: Callable[[Tensor], Tensor]  # pixels (B, 3, S, S) -> (B, E)
    encode_text: Callable[[Tensor], Tensor]  # its own ids (B, T) -> (B, E)
    tokenize: Callable[[list[str]], Tensor]
    transform: Callable[[list[Path]], Tensor]


def use_miniclip(setting: Setting) -> Library:
    model, tokenizer, transform = load(
        setting.directory, device=setting.device, dtype=setting.dtype
    )
    return Library("miniclip", model, model.encode_image, model.encode_text, tokenizer, transform)


def use_transformers(setting: Setting) -> Library:
    try:
        import transformers
        from transformers.models.clip import CLIPImageProcessorPil
    except ImportError:
        raise ValueError("nothing to compare with: pip install 'miniclip[test]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.CLIPModel.from_pretrained(setting.directory, dtype=setting.dtype)
    model.to(setting.device).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(setting.directory)
    processor = CLIPImageProcessorPil.from_pretrained(setting.directory)

    def transform(paths: list[Path]) -> Tensor:
        return processor([Image.open(path) for path in paths], return_tensors="pt").pixel_values

    return Library(
        "transformers",
        model,
        lambda pixels: model.get_image_features(pixels).pooler_output,
        lambda ids: model.get_text_features(ids).pooler_output,
        lambda texts: tokenizer(texts, padding=True, return_tensors="pt").input_ids,
        transform,
    )


def use_open_clip(setting: Setting) -> Library:
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    vision, text = setting.config.vision, setting.config.text
    model = open_clip.CLIP(
        setting.config.embed_dim,
        dict(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            width=vision.width,
            layers=vision.layers,
            head_width=vision.width // vision.heads,
        ),
        dict(
            context_length=text.context_length,
            vocab_size=text.vocab_size,
            width=text.width,
            layers=text.layers,
            heads=text.heads,
        ),
        quick_gelu=True,
    )
    tokenizer = SimpleTokenizer(str(setting.directory / OPENAI_VOCABULARY))
    preprocess = open_clip.image_transform(vision.image_size, is_train=False)
    return _of_openai_layout("open_clip", model, tokenizer, preprocess, setting)


def use_openai(setting: Setting) -> Library:
    from clip import clip, model, simple_tokenizer

    vision, text = setting.config.vision, setting.config.text
    clip._tokenizer = simple_tokenizer.SimpleTokenizer(str(setting.directory / OPENAI_VOCABULARY))
    theirs = model.CLIP(
        setting.config.embed_dim,
        vision.image_size,
        vision.layers,
        vision.width,
        vision.patch_size,
        text.context_length,
        text.vocab_size,
        text.width,
        text.heads,
        text.layers,
    )
    preprocess = clip._transform(vision.image_size)
    return _of_openai_layout("openai/CLIP", theirs, clip.tokenize, preprocess, setting)


def _of_openai_layout(
    name: str,
    model: nn.Module,
    tokenize: Callable[[list[str]], Tensor],
    preprocess: Callable[[Image.Image], Tensor],
    setting: Setting,
) -> Library:
    weights = openai_weights(load_model(setting.directory))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise RuntimeError(f"the weights do not fit {name}: {[*missing, *unexpected][:3]}")
    model.to(setting.device, setting.dtype).eval()
    return Library(
        name,
        model,
        lambda pixels: model.encode_image(pixels.to(setting.dtype)),
        model.encode_text,
        tokenize,
        lambda paths: torch.stack([preprocess(Image.open(path)) for path in paths]),
    )


def openai_weights(model: CLIP) -> dict[str, Tensor]:
    """Our weights under the names of openai/CLIP, which open_clip shares: q, k and v as one matrix,
    and projections that multiply from the right."""
    ours = model.state_dict()
    theirs = {
        "logit_scale": ours["logit_scale"],
        "visual.class_embedding": ours["vision.class_embed"],
        "visual.positional_embedding": ours["vision.pos_embed"],
        "visual.conv1.weight": ours["vision.patch_embed.weight"],
        "visual.proj": ours["vision.proj.weight"].T,
        "token_embedding.weight": ours["text.token_embed.weight"],
        "positional_embedding": ours["text.pos_embed"],
        "text_projection": ours["text.proj.weight"].T,
    }
    for tower, prefix, norms in (
        ("vision", "visual.", ("ln_pre", "ln_post")),
        ("text", "", ("ln_final",)),
    ):
        for kind in ("weight", "bias"):
            for norm in norms:
                theirs[f"{prefix}{norm}.{kind}"] = ours[f"{tower}.{norm}.{kind}"]
            for i in range(len(getattr(model, tower).blocks)):
                block, layer = f"{tower}.blocks.{i}.", f"{prefix}transformer.resblocks.{i}."
                qkv = [ours[f"{block}attn.{name}_proj.{kind}"] for name in "qkv"]
                theirs[f"{layer}attn.in_proj_{kind}"] = torch.cat(qkv)
                for name, part in (
                    ("attn.out_proj", "attn.out_proj"),
                    ("ln_1", "ln_1"),
                    ("ln_2", "ln_2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    theirs[f"{layer}{name}.{kind}"] = ours[f"{block}{part}.{kind}"]
    return theirs


# ------------------------------------------------------------------------------------------------
# What there is to work on: random weights, a vocabulary, captions and photographs, all made here


def prepare(directory: Path, shape: str) -> CLIPConfig:
    """Write a checkpoint of random weights in an official shape, for every library to read.

    The vocabulary is learned from the captions, because the package brings no published one; the
    embedding has as many rows as the published models' all the same.
    """
    tokenizer = Tokenizer.train([*captions(2000), *MIXED_SCRIPTS], 4096)
    config = OFFICIAL[shape]
    text = replace(
        config.text,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=max(config.text.vocab_size, tokenizer.vocab_size),
    )
    config = replace(config, text=text)
    with torch.device("meta"):
        model = CLIP(config)
    randomize(model.to_empty(device="cpu"))
    save(directory, model, tokenizer, ImageTransform(config.vision.image_size))
    lines = ["#version", *(" ".join(pair) for pair in tokenizer.merges)]
    (directory / OPENAI_VOCABULARY).write_bytes(gzip.compress("\n".join(lines).encode()))
    return config


def captions(count: int) -> list[str]:
    """OpenAI's templates with OpenAI's class names in them, all different up to 80,000.

    >>> captions(2)
    ['a bad photo of a tench.', 'a photo of many tusker.']
    """
    return [
        IMAGENET_TEMPLATES[i % 80].replace("{}", IMAGENET_CLASSES[(i // 80 + 7 * i) % 1000])
        for i in range(count)
    ]


# Article 1 of the Universal Declaration of Human Rights, its first sentence; and emoji.
MIXED_SCRIPTS = [
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "人人生而自由，在尊严和权利上一律平等。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "a photo of 🐈 and 🐕‍🦺, 👩🏽‍🚀 ❤️ 🇫🇷 no. 42",
]


def mixed_captions(count: int) -> list[str]:
    """Eight words each, from twelve scripts."""
    words = [word for text in MIXED_SCRIPTS for word in text.split()]
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=8)) for _ in range(count)]


def invented_captions(count: int) -> Iterator[list[str]]:
    """Again and again `count` texts of words that were in none before."""
    draw = random.Random(0)
    while True:
        yield [
            " ".join(
                "".join(draw.choices(ascii_lowercase, k=draw.randint(5, 10))) for _ in "123456"
            )
            for _ in range(count)
        ]


def photograph(path: Path, seed: int) -> Path:
    """Write a JPEG file of 640 x 480 pixels, of soft colours with grain, as large as a photograph's
    (about 90 kB)."""
    draw = np.random.default_rng(seed)
    blots = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(blots.resize((640, 480), Image.Resampling.BICUBIC), np.float32)
    grained = (smooth + draw.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(grained).save(path, quality=90)
    return path


# ------------------------------------------------------------------------------------------------
# The suites


def vision_suite(setting: Setting) -> Iterator[Case]:
    config = setting.config
    multiply_adds = tower_multiply_adds(config, "vision")
    for count in sorted({1, setting.batch}):
        pixels = random_inputs(config, images=count)[0].to(setting.device)
        work = f"{count} image{'s' * (count > 1)}, {setting.shape}, {dtype_name(setting)}"
        contenders = encoders(setting, "encode_image", [pixels] * len(setting.libraries))
        contenders.append(ceiling(setting, count * multiply_adds))
        yield Case(
            "vision", work, count, "images", contenders, directions, TOLERANCE[setting.dtype]
        )


def text_suite(setting: Setting) -> Iterator[Case]:
    texts = captions(setting.batch)
    ids = [library.tokenize(texts).to(setting.device) for library in setting.libraries]
    length = ids[0].shape[1]
    contenders = encoders(setting, "encode_text", ids)
    contenders.append(
        ceiling(setting, len(texts) * tower_multiply_adds(setting.config, "text", length))
    )
    work = f"{len(texts)} captions of at most {length} tokens, {setting.shape}, "
    yield Case(
        "text",
        work + dtype_name(setting),
        len(texts),
        "texts",
        contenders,
        directions,
        TOLERANCE[setting.dtype],
    )


def encoders(setting: Setting, method: str, inputs: list[Tensor]) -> list[Contender]:
    """Each library's encoder on its input. With `compile`, miniclip's and transformers' compiled
    ones as well, and miniclip's goes first."""
    runs = {
        library.name: (getattr(library, method), x)
        for library, x in zip(setting.libraries, inputs, strict=True)
    }
    if setting.compile:
        mode = "reduce-overhead" if setting.device.startswith("cuda") else "default"
        compiled = {
            f"{name}, compiled": (torch.compile(runs[name][0], mode=mode), runs[name][1])
            for name in ("miniclip", "transformers")
        }
        runs = compiled | runs

    def trial(encode: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
        return timed(torch.inference_mode()(lambda: encode(x)), setting.device)

    return [Contender(name, trial(*run)) for name, run in runs.items()]


def ceiling(setting: Setting, multiply_adds: int) -> Contender:
    """As many multiply-adds in one large matrix product: what this machine can do at best."""
    n = 8192 if setting.device.startswith("cuda") else 2048
    a, b = torch.randn(2, n, n, device=setting.device, dtype=setting.dtype)
    trial = timed(lambda: torch.mm(a, b), setting.device)
    return Contender("one matrix product", lambda: (trial()[0] * multiply_adds / n**3, None))


def tokenizer_suite(setting: Setting) -> Iterator[Case]:
    end = setting.config.text.eos_token_id

    def form(ids: Tensor) -> list[list[int]]:
        rows = [row.tolist() for row in ids]
        return [row[: row.index(end)] for row in rows]  # without the padding, which differs

    count = 1000
    streams = {
        "ASCII captions": lambda: itertools.repeat(captions(count)),
        "mixed scripts and emoji": lambda: itertools.repeat(mixed_captions(count)),
        "words never seen before": lambda: invented_captions(count),
    }
    for work, stream in streams.items():
        contenders = []
        for library in setting.libraries:
            texts = stream()
            run = lambda tokenize=library.tokenize, texts=texts: tokenize(next(texts))  # noqa: E731
            contenders.append(Contender(library.name, timed(run)))
        yield Case("tokenizer", f"{count:,} texts, {work}", count, "texts", contenders, form)


def transform_suite(setting: Setting) -> Iterator[Case]:
    size = setting.config.vision.image_size
    ours = setting.libraries[0].transform

    def form(pixels: Tensor) -> Tensor:
        return pixels.reshape(-1, 3, size, size)

    def pillow_alone() -> None:
        resize_short_side(Image.open(setting.photographs[0]), size)

    for paths in (setting.photographs[:1], setting.photographs):
        runs = {library.name: partial(library.transform, paths) for library in setting.libraries}
        if len(paths) == 1:
            runs["miniclip"] = partial(ours, paths[0])
            runs["Pillow's decode and resize"] = pillow_alone
        contenders = [Contender(name, timed(run)) for name, run in runs.items()]
        work = f"{len(paths)} JPEG file{'s' * (len(paths) > 1)} of 640 x 480 pixels"
        yield Case("transform", work, len(paths), "images", contenders, form)


def zeroshot_suite(setting: Setting) -> Iterator[Case]:
    labels, templates = IMAGENET_CLASSES[::100], IMAGENET_TEMPLATES
    ours, *peers = setting.libraries
    tokenizer = ours.tokenize
    lengths = [len(tokenizer.encode(t.replace("{}", x))) + 2 for x in labels for t in templates]
    multiply_adds = sum(tower_multiply_adds(setting.config, "text", n) for n in lengths)

    @torch.inference_mode()
    def class_by_class(library: Library) -> Tensor:
        """As OpenAI's notebook does it."""
        rows = []
        for label in labels:
            ids = library.tokenize([template.replace("{}", label) for template in templates])
            embeds = unit_norm(library.encode_text(ids.to(setting.device)))
            rows.append(unit_norm(embeds.mean(dim=0)))
        return torch.stack(rows)

    runs = {"miniclip": partial(class_embeddings, ours.model, tokenizer, labels, templates)}
    runs |= {library.name: partial(class_by_class, library) for library in peers}
    contenders = [Contender(name, timed(run, setting.device)) for name, run in runs.items()]
    contenders.append(ceiling(setting, multiply_adds))
    work = f"{len(labels)} labels x {len(templates)} templates, {setting.shape}, "
    yield Case(
        "zeroshot",
        work + dtype_name(setting),
        len(lengths),
        "texts",
        contenders,
        directions,
        TOLERANCE[setting.dtype],
    )


def train_suite(setting: Setting) -> Iterator[Case]:
    pixels = random_inputs(setting.config, images=setting.batch)[0].to(setting.device)
    texts = captions(setting.batch)

    def gradients(library: Library, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        images = unit_norm(library.encode_image(pixels))
        loss = contrastive_loss(
            images, unit_norm(library.encode_text(ids)), library.model.logit_scale
        )
        return loss, torch.autograd.grad(loss, list(library.model.parameters()))

    def form(output: tuple[Tensor, tuple[Tensor, ...]]) -> Tensor:
        loss, grads = output
        norm = torch.stack([grad.double().norm() for grad in grads]).norm()
        return torch.stack([loss.double(), norm]).detach().cpu()[:, None]

    contenders = []
    for library in setting.libraries:
        ids = library.tokenize(texts).to(setting.device)
        run = timed(partial(gradients, library, ids), setting.device)
        contenders.append(Contender(library.name, run))
    work = f"loss and gradients of {len(texts)} pairs, {setting.shape}, {dtype_name(setting)}"
    # The loss sees each embedding's rounding a hundred times: the logit scale.
    tolerance = 100 * TOLERANCE[setting.dtype]
    yield Case("train", work, len(texts), "pairs", contenders, form, tolerance)


# As source, because two of the suites below run it in a process of its own.
IMPORTS = {
    "miniclip": "import miniclip",
    "transformers": """
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip import CLIPImageProcessorPil
""",
}
FIRST_LOGITS = {
    "miniclip": """
model, tokenizer, transform = miniclip.load(directory, device=device, dtype=dtype)
ids = tokenizer(texts).to(device)
pixels = transform([photograph]).to(device)
with torch.inference_mode():
    logits = model(pixels, ids).logits_per_image
""",
    "transformers": """
model = CLIPModel.from_pretrained(directory, dtype=dtype).to(device).eval()
tokenizer = CLIPTokenizer.from_pretrained(directory)
transform = CLIPImageProcessorPil.from_pretrained(directory)
ids = tokenizer(texts, padding=True, return_tensors="pt").to(device)
pixels = transform([Image.open(photograph)], return_tensors="pt").to(device)
with torch.inference_mode():
    logits = model(**ids, **pixels).logits_per_image
""",
}
PROCESS = """
import json, sys
import torch
directory, photograph, texts, device, dtype = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)
{imports}
if device == "cpu":
    import resource
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{first_logits}
logits = logits.tolist()
if device == "cpu":
    scale = 1 if sys.platform == "darwin" else 1024
    peak = scale * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
else:
    peak = torch.cuda.max_memory_allocated()
print(json.dumps([logits, peak]))
"""


def load_suite(setting: Setting) -> Iterator[Case]:
    directory, photograph, texts, device, _ = first_inputs(setting)

    def run(name: str) -> Tensor:
        scope = dict(directory=directory, photograph=photograph, texts=texts, device=device)
        scope |= dict(torch=torch, dtype=setting.dtype)
        exec(IMPORTS[name] + FIRST_LOGITS[name], scope)
        return scope["logits"]

    contenders = [Contender(name, timed(partial(run, name), device)) for name in IMPORTS]
    yield first_case(setting, "load", "from files to logits", "times", contenders)


def startup_suite(setting: Setting) -> Iterator[Case]:
    contenders = [
        Contender(name, timed(partial(lambda name: in_process(setting, name)[0], name)))
        for name in IMPORTS
    ]
    yield first_case(setting, "startup", "a new process, to its first logits", "times", contenders)


def memory_suite(setting: Setting) -> Iterator[Case]:
    contenders = [
        Contender(name, partial(lambda name: in_process(setting, name)[::-1], name))
        for name in IMPORTS
    ]
    size = (setting.directory / "model.safetensors").stat().st_size
    contenders.append(Contender("the weights file", lambda: (size, None)))
    yield first_case(
        setting, "memory", "peak from the imports to the first logits", "bytes", contenders
    )


def first_inputs(setting: Setting) -> tuple[str, str, list[str], str, str]:
    texts = ["a photo of a cat", "a photo of two dogs"]
    photograph = str(setting.photographs[0])
    return str(setting.directory), photograph, texts, setting.device, dtype_name(setting)


def first_case(
    setting: Setting, suite: str, work: str, unit: str, contenders: list[Contender]
) -> Case:
    work = f"{work}, {setting.shape}, {dtype_name(setting)}"
    tolerance = TOLERANCE[setting.dtype]
    return Case(suite, work, 1, unit, contenders, lambda x: x.double().cpu(), tolerance)


def in_process(setting: Setting, name: str) -> tuple[Tensor, int]:
    """The logits of a new process, and the bytes it took at most since its imports."""
    source = PROCESS.format(imports=IMPORTS[name], first_logits=FIRST_LOGITS[name])
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", source, json.dumps(first_inputs(setting))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{name} in a process of its own: {reason}")
    logits, peak = json.loads(done.stdout)
    return torch.tensor(logits), peak


def directions(embeds: Tensor) -> Tensor:
    """Embeddings as they are compared: of length 1, in float64."""
    return unit_norm(embeds.detach().double().cpu())


def dtype_name(setting: Setting) -> str:
    return str(setting.dtype).removeprefix("torch.")


@cache
def tower_multiply_adds(config: CLIPConfig, tower: str, tokens: int | None = None) -> int:
    """Of one image, or of one text of so many tokens."""
    if tokens is not None:
        config = replace(config, text=replace(config.text, context_length=tokens))
    return sum(part.multiply_adds for part in parts(config) if part.name.startswith(tower))


SUITES: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "vision": vision_suite,
    "text": text_suite,
    "tokenizer": tokenizer_suite,
    "transform": transform_suite,
    "load": load_suite,
    "startup": startup_suite,
    "zeroshot": zeroshot_suite,
    "train": train_suite,
    "memory": memory_suite,
}


def bench(
    suites: Sequence[str] = tuple(SUITES),
    *,
    shape: str = "B/32",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    batch: int | None = None,
    seconds: float = SECONDS,
) -> list[Row]:
    """Do the same work with miniclip and with every peer that is installed, and take the time.

    `suites` are names from SUITES; `shape` is one of parity.OFFICIAL, with random weights; `batch`
    is 16, on a GPU 256, unless given; each case takes about `seconds`, and at least five rounds.
    Peers are transformers, and open_clip and openai/CLIP where they can be imported.
    """
    for name in suites:
        if name not in SUITES:
            raise ValueError(f"no suite is called {name!r}; expected {', '.join(SUITES)}")
    if shape not in OFFICIAL:
        raise ValueError(f"no official shape is called {shape!r}; expected {', '.join(OFFICIAL)}")
    if dtype not in TOLERANCE:
        names = ", ".join(str(known).removeprefix("torch.") for known in TOLERANCE)
        raise ValueError(f"dtype is {dtype}; expected one of {names}")
    batch = batch if batch is not None else 256 if device.startswith("cuda") else 16
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    check_device(device)
    rows: list[Row] = []
    with TemporaryDirectory() as folder, exact_float32():
        config = prepare(Path(folder), shape)
        setting = Setting(Path(folder), config, shape, device, dtype, compile, batch)
        bar = tqdm(suites, unit="suite", delay=2, disable=None, leave=False)
        for name in bar:
            bar.set_description(name)
            for case in SUITES[name](setting):
                rows += measure(case, seconds)
    return rows


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32, which is float32 with ten bits of fraction: cuDNN's convolutions have it on."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


# ------------------------------------------------------------------------------------------------


def environment(device: str) -> dict[str, str]:
    """The hardware and the versions that numbers were measured with."""
    hardware = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"
    hardware += f", {torch.get_num_threads()} threads"
    if device.startswith("cuda"):
        hardware = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; {hardware}"
    libraries = ("torch", "transformers", "tokenizers", "open_clip_torch", "openai-clip", "pillow")
    versions = {"Python": platform.python_version()}
    for library in libraries:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            pass
    return {"date": str(date.today()), "hardware": hardware} | versions


def processor() -> str:
    """What Linux calls it; elsewhere what Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(rows: Sequence[Row]) -> str:
    """A paragraph for each case, 80 columns wide."""
    lines = []
    for (suite, work), group in itertools.groupby(rows, key=lambda row: (row.suite, row.work)):
        lines += ["", f"{suite}: {work}"]
        for row in group:
            name = f"  {row.contender:<27}"
            if row.cost is None:
                lines.append(f"{name} not timed: its output differs by {row.difference:.1g}")
                continue
            _, median, _ = row.cost
            if row.unit == "bytes":
                numbers = f"{median / 1e6:>11,.0f} MB" + " " * 16
            else:
                rate = f"{row.count / median:,.{0 if row.count / median >= 100 else 1}f}"
                numbers = f"{median * 1e3:>11,.1f} ms{rate:>9} {row.unit}/s"
            lower, middle, upper = row.ratio
            spread = f"{middle:>6.2f}x ({lower:.2f} to {upper:.2f})"
            lines.append(f"{name}{numbers:<31}{spread}".rstrip())
    return "\n".join(lines[1:])
