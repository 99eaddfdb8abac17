"""The same work by miniclip and by its peers, side by side, timed.

A round is one trial of each, and a ratio is taken within a round: what slows the machine for a
while slows them all. Nothing is timed before its output is found equal to miniclip's.
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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, cached_property, partial
from pathlib import Path
from string import ascii_lowercase
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from miniclip.checkpoint import Loaded, save
from miniclip.config import CLIPConfig
from miniclip.files.ahead import read_ahead
from miniclip.files.hub import OPENAI_VOCABULARY
from miniclip.files.models import check_device
from miniclip.files.names import OPENAI, TRANSFORMERS, layout_name, pack
from miniclip.loss import contrastive_loss
from miniclip.model import CLIP, unit_norm
from miniclip.parity import random_inputs, randomize
from miniclip.parts import parts
from miniclip.peers import Library, import_transformers, libraries, versions
from miniclip.presets import PRESETS
from miniclip.retrieval.building import embed_parts
from miniclip.retrieval.index import BLOCK, Encoder, Index, Strings, embed
from miniclip.terminal import progress
from miniclip.tokenizer import Tokenizer
from miniclip.transform import ImageTransform, resize_short_side
from miniclip.zeroshot.classifier import class_embeddings
from miniclip.zeroshot.imagenet import IMAGENET_CLASSES, IMAGENET_TEMPLATES

# How far an output may be from miniclip's, as a share of its length: what rounding explains.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SECONDS = 6.0  # for each case


# ------------------------------------------------------------------------------------------------
# The same work by miniclip and by others: what is compared, and how


Trial = Callable[[], tuple[float, Any]]


class Contender(NamedTuple):
    """Someone who does the work. A trial returns what it cost, in seconds or bytes, and the output.

    An output of None is not held against miniclip's: it comes from less work, shown for scale.
    """

    name: str
    trial: Trial


class Case(NamedTuple):
    """One piece of work. The first contender is miniclip; the others are held against it."""

    suite: str
    work: str
    # How many of them, per trial.
    count: int  # type: ignore[assignment]  # hides a method of tuples, which nobody needs here
    unit: str  # "images", "texts", ...; or "bytes", which are themselves the cost
    contenders: list[Contender]
    form: Callable[[Any], Any]  # an output in the form that `distance` compares
    tolerance: float = 0.0


class Row(NamedTuple):
    """What one contender took. Quartiles are (lower, median, upper)."""

    suite: str
    work: str
    count: int  # type: ignore[assignment]  # as in Case
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
    if differences[0] != 0:  # from itself
        raise RuntimeError(f"{case.suite}: miniclip's own output has numbers that are not finite")
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
    contenders: list[Contender], seconds: float, *, least: int = 3, most: int = 40
) -> list[list[float]]:
    """Rounds of a trial each, so that what slows the machine for a while slows all of them.

    The order is drawn anew in each round: who follows the one large product finds the caches full
    of it, and that must not always be the same one. Costs are in the given order.
    """
    draw = random.Random(0)
    start = time.perf_counter()
    rounds: list[list[float]] = []
    while len(rounds) < least or (len(rounds) < most and time.perf_counter() - start < seconds):
        cost = {c.name: c.trial()[0] for c in draw.sample(contenders, len(contenders))}
        rounds.append([cost[contender.name] for contender in contenders])
    return rounds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile.

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


def timed(run: Callable[[], Any], device: str = "cpu") -> Trial:
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
# What there is to work on: random weights, a vocabulary, captions and photographs, all made here


@dataclass(frozen=True)
class Setting:
    """What the suites work with; the libraries and the photographs are made when first needed."""

    directory: Path  # of a checkpoint with random weights
    config: CLIPConfig
    shape: str
    device: str
    dtype: torch.dtype
    compile: bool
    batch: int

    @cached_property
    def libraries(self) -> list[Library]:
        """miniclip first, then its peers, with the checkpoint loaded."""
        return libraries(self.directory, self.device, self.dtype)

    @cached_property
    def photographs(self) -> list[Path]:
        """Sixteen JPEG files."""
        return [photograph(self.directory / f"{i}.jpg", i) for i in range(16)]

    @property
    def dtype_name(self) -> str:
        """The dtype without its module: "float32"."""
        return str(self.dtype).removeprefix("torch.")

    def timed(self, run: Callable[[], Any]) -> Trial:
        """A trial of the work, timed on this device."""
        return timed(run, self.device)

    def case(
        self,
        suite: str,
        work: str,
        count: int,
        unit: str,
        contenders: list[Contender],
        form: Callable[[Any], Any],
    ) -> Case:
        """Work of the model, whose result depends on rounding."""
        work = f"{work}, {self.shape}, {self.dtype_name}"
        return Case(suite, work, count, unit, contenders, form, TOLERANCE[self.dtype])


def prepare(directory: Path, shape: str) -> CLIPConfig:
    """Write a checkpoint of random weights in an official shape, for every library to read.

    The vocabulary is learned from the captions, because the package brings no published one; the
    embedding has as many rows as the published models' all the same.
    """
    tokenizer = Tokenizer.train([*captions(2000), *MIXED_SCRIPTS], 4096)
    config = PRESETS[shape]
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
    save(directory, model, tokenizer, ImageTransform(config.vision.side))
    lines = ["#version", *(" ".join(pair) for pair in tokenizer.merges)]
    (directory / OPENAI_VOCABULARY).write_bytes(gzip.compress("\n".join(lines).encode()))
    return config


def captions(count: int) -> list[str]:
    """OpenAI's templates with OpenAI's class names in them; up to 80,000 hardly any comes twice.

    >>> captions(2)
    ['a bad photo of a tench.', 'a photo of many rooster.']
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
    "人人生而自由,在尊严和权利上一律平等。",
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
    """Images to embeddings: one, and a batch."""
    multiply_adds = tower_multiply_adds(setting.config, "vision")
    for count in sorted({1, setting.batch}):
        pixels = random_inputs(setting.config, images=count)[0].to(setting.device)
        contenders = encoders(setting, "encode_image", [pixels] * len(setting.libraries))
        contenders.append(ceiling(setting, count * multiply_adds))
        yield setting.case("vision", plural(count, "image"), count, "images", contenders, unit_rows)


def text_suite(setting: Setting) -> Iterator[Case]:
    """A batch of captions to embeddings."""
    texts = captions(setting.batch)
    ids = [library.tokenize(texts).to(setting.device) for library in setting.libraries]
    count, length = ids[0].shape
    contenders = encoders(setting, "encode_text", ids)
    multiply_adds = tower_multiply_adds(setting.config, "text", length)
    contenders.append(ceiling(setting, count * multiply_adds))
    work = f"{plural(count, 'caption')} of at most {length} tokens"
    yield setting.case("text", work, count, "texts", contenders, unit_rows)


def encoders(setting: Setting, method: str, inputs: list[Tensor]) -> list[Contender]:
    """Each library's encoder on its input. With `compile` those of miniclip and transformers
    compiled as well, and then miniclip's compiled one is what all are held against."""
    pairs = zip(setting.libraries, inputs, strict=True)
    runs = {library.name: (getattr(library, method), x) for library, x in pairs}
    if setting.compile:
        mode = "reduce-overhead" if setting.device.startswith("cuda") else "default"
        compiled = {
            f"{name}, compiled": (torch.compile(runs[name][0], mode=mode), runs[name][1])
            for name in ("miniclip", "transformers")
        }
        runs = compiled | runs

    def trial(encode: Callable[[Tensor], Tensor], x: Tensor) -> Trial:
        return setting.timed(torch.inference_mode()(lambda: encode(x)))

    return [Contender(name, trial(*run)) for name, run in runs.items()]


def ceiling(setting: Setting, multiply_adds: int) -> Contender:
    """So many multiply-adds at the speed of one large matrix product, this machine's best."""
    n = 8192 if setting.device.startswith("cuda") else 2048
    a, b = torch.randn(2, n, n, device=setting.device, dtype=setting.dtype)
    trial = setting.timed(lambda: F.linear(a, b))  # of float16 the one product a CPU is quick at
    return Contender("one matrix product", lambda: (trial()[0] * multiply_adds / n**3, None))


@cache
def tower_multiply_adds(config: CLIPConfig, tower: str, tokens: int | None = None) -> int:
    """Of one image, or of one text of so many tokens."""
    if tokens is not None:
        config = replace(config, text=replace(config.text, context_length=tokens))
    return sum(part.multiply_adds for part in parts(config) if part.name.startswith(tower))


def unit_rows(embeds: Tensor) -> Tensor:
    """Embeddings (B, E) as `distance` compares them: unit vectors, float64, on the CPU."""
    return unit_norm(embeds.double().cpu())


def tokenizer_suite(setting: Setting) -> Iterator[Case]:
    """Texts to ids: captions, other scripts, and words that no cache has seen."""
    end, count = setting.config.text.eos_token_id, 1000

    def without_padding(ids: Tensor) -> list[list[int]]:
        return [row[: row.index(end)] for row in ids.tolist()]

    def next_of(tokenize: Callable[[list[str]], Tensor], stream: Iterator[list[str]]) -> Tensor:
        return tokenize(next(stream))

    streams: dict[str, Callable[[], Iterator[list[str]]]] = {
        "ASCII captions": lambda: itertools.repeat(captions(count)),
        "mixed scripts and emoji": lambda: itertools.repeat(mixed_captions(count)),
        "words never seen before": lambda: invented_captions(count),
    }
    for work, stream in streams.items():
        contenders = [
            Contender(library.name, timed(partial(next_of, library.tokenize, stream())))
            for library in setting.libraries
        ]
        work = f"{plural(count, 'text')}, {work}"
        yield Case("tokenizer", work, count, "texts", contenders, without_padding)


def transform_suite(setting: Setting) -> Iterator[Case]:
    """Files to pixels: one photograph, and sixteen."""
    size = setting.config.vision.side

    def pillow_alone() -> None:
        resize_short_side(Image.open(setting.photographs[0]), size)

    for paths in (setting.photographs[:1], setting.photographs):
        runs: dict[str, Callable[[], Any]] = {
            library.name: partial(library.transform, paths) for library in setting.libraries
        }
        if len(paths) == 1:
            runs["Pillow, decode + resize"] = pillow_alone
        contenders = [Contender(name, timed(run)) for name, run in runs.items()]
        work = f"{plural(len(paths), 'JPEG file')} of 640 x 480 pixels"
        yield Case("transform", work, len(paths), "images", contenders, lambda pixels: pixels)


def zeroshot_suite(setting: Setting) -> Iterator[Case]:
    """Labels in 80 templates to a classifier."""
    ours, *peers = setting.libraries
    tokenizer = ours.tokenize
    assert isinstance(tokenizer, Tokenizer)
    # Some of the thousand and their longest, to which all are padded where they go in at once.
    longest = max(IMAGENET_CLASSES, key=lambda label: len(tokenizer.encode(label)))
    labels, templates = [*IMAGENET_CLASSES[::100], longest], IMAGENET_TEMPLATES
    prompts = [template.replace("{}", label) for label in labels for template in templates]

    @torch.inference_mode()
    def class_by_class(library: Library) -> Tensor:
        """As OpenAI's notebook does it."""
        rows = []
        for label in labels:
            ids = library.tokenize([template.replace("{}", label) for template in templates])
            embeds = unit_norm(library.encode_text(ids.to(setting.device)))
            rows.append(unit_norm(embeds.mean(dim=0)))
        return torch.stack(rows)

    @torch.inference_mode()
    def all_at_once(library: Library) -> Tensor:
        """As the library pads a list of texts: to the longest of them."""
        batches = library.tokenize(prompts).to(setting.device).split(256)
        embeds = unit_norm(torch.cat([library.encode_text(ids) for ids in batches]))
        return unit_norm(embeds.unflatten(0, (len(labels), -1)).mean(dim=1))

    runs = {"miniclip": partial(class_embeddings, ours.model, tokenizer, labels, templates)}
    runs |= {library.name: partial(class_by_class, library) for library in peers}
    runs["transformers, at once"] = partial(all_at_once, peers[0])
    contenders = [Contender(name, setting.timed(run)) for name, run in runs.items()]
    lengths = [2 + len(tokenizer.encode(prompt)) for prompt in prompts]
    multiply_adds = sum(tower_multiply_adds(setting.config, "text", n) for n in lengths)
    contenders.append(ceiling(setting, multiply_adds))
    work = f"{len(labels)} labels x {len(templates)} templates"
    yield setting.case("zeroshot", work, len(prompts), "texts", contenders, unit_rows)


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
        """In OpenAI's layout, which is open_clip's, and the others can be brought into."""
        theirs = {name: layout_name(name, TRANSFORMERS) for name in names}
        if gradients.keys() == set(theirs.values()):
            gradients = {name: gradients[their] for name, their in theirs.items()}
        if gradients.keys() == names:
            gradients = pack(gradients, OPENAI)
        flat = [gradients[name].double().flatten().cpu() for name in sorted(gradients)]
        return torch.cat(flat)[None]

    contenders = []
    for library in setting.libraries:
        ids = library.tokenize(texts).to(setting.device)
        contenders.append(Contender(library.name, setting.timed(partial(gradients, library, ids))))
    work = f"the loss of {plural(len(texts), 'pair')} and its gradients"
    yield setting.case("train", work, len(texts), "pairs", contenders, one_vector)


# From the files to the first logits: as source, for it is also run in a process of its own.
IMPORTS = {
    "miniclip": "import miniclip",
    "transformers": """
import transformers
from PIL import Image
from transformers.models.clip import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
transformers.utils.logging.disable_progress_bar()
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
import json, re, sys
import torch
directory, photograph, texts, device, dtype = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)
def kilobytes(field):  # not getrusage, whose peak a new process inherits from its parent
    with open("/proc/self/status") as status:
        return int(re.search(field + r":\\s*(\\d+) kB", status.read())[1])
{imports}
on_linux = sys.platform == "linux"
before = kilobytes("VmRSS") if on_linux else 0
{first_logits}
logits = logits.tolist()
if device.startswith("cuda"):
    most = torch.cuda.max_memory_allocated()
else:
    most = 1024 * (kilobytes("VmHWM") - before) if on_linux else 0
print(json.dumps([logits, most]))
"""


def load_suite(setting: Setting) -> Iterator[Case]:
    """From the files to the first logits, in this process."""
    names = ("directory", "photograph", "texts", "device")
    inputs = dict(zip(names, first_inputs(setting)), torch=torch, dtype=setting.dtype)

    def first_logits(library: str) -> Tensor:
        scope: dict[str, Any] = dict(inputs)
        exec(IMPORTS[library] + FIRST_LOGITS[library], scope)
        return scope["logits"]

    contenders = [Contender(name, setting.timed(partial(first_logits, name))) for name in IMPORTS]
    yield setting.case("load", "files to logits", 1, "times", contenders, unit_rows)


def startup_suite(setting: Setting) -> Iterator[Case]:
    """The same in a new process, imports and all."""

    def first_logits(library: str) -> Tensor:
        return in_process(setting, library)[1]

    contenders = [Contender(name, timed(partial(first_logits, name))) for name in IMPORTS]
    work = "a new process, files to logits"
    yield setting.case("startup", work, 1, "times", contenders, unit_rows)


def memory_suite(setting: Setting) -> Iterator[Case]:
    """Of the GPU, or of the process, which only Linux tells."""
    if not setting.device.startswith("cuda") and sys.platform != "linux":
        return
    contenders = [Contender(name, partial(in_process, setting, name)) for name in IMPORTS]
    size = (setting.directory / "model.safetensors").stat().st_size
    contenders.append(Contender("the weights file", lambda: (size, None)))
    work = "most at once, files to logits"
    yield setting.case("memory", work, 1, "bytes", contenders, unit_rows)


def first_inputs(setting: Setting) -> tuple[str, str, list[str], str, str]:
    """What PROCESS reads: directory, photograph, texts, device and dtype."""
    texts = ["a photo of a cat", "a photo of two dogs"]
    photograph = str(setting.photographs[0])
    return str(setting.directory), photograph, texts, setting.device, setting.dtype_name


def in_process(setting: Setting, library: str) -> tuple[float, Tensor]:
    """The bytes that a new process takes after its imports, at most, and its first logits."""
    source = PROCESS.format(imports=IMPORTS[library], first_logits=FIRST_LOGITS[library])
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", source, json.dumps(first_inputs(setting))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"{library} failed in a process of its own: {reason}")
    logits, most = json.loads(done.stdout)
    return most, torch.tensor(logits)


def embed_suite(setting: Setting) -> Iterator[Case]:
    """Files to unit vectors, four batches of them, and each half of the work alone. On a CPU the
    halves share its cores, which bounds the whole."""
    paths = setting.photographs * (setting.batch // 4) or setting.photographs
    batches = [paths[i : i + setting.batch] for i in range(0, len(paths), setting.batch)]
    ours, *peers = setting.libraries
    loaded = Loaded(ours.model, ours.tokenize, ours.transform)  # type: ignore[arg-type]
    pixels = ours.transform(batches[0]).to(setting.device)

    def together() -> Tensor:
        ((embeds, *_),) = embed_parts(loaded, [list(map(str, paths))], setting.batch, silent=True)
        return embeds

    @torch.inference_mode()
    def batch_by_batch(library: Library) -> Tensor:
        inputs = (library.transform(batch).to(setting.device) for batch in batches)
        return torch.cat([library.encode_image(x.to(setting.dtype)) for x in inputs])

    def decoding() -> None:
        deque(read_ahead(ours.transform, paths, 2 * setting.batch), maxlen=0)

    def encoding() -> None:
        for batch in batches:
            embed(ours.model, pixels[: len(batch)])

    contenders = [Contender("miniclip", setting.timed(together))]
    contenders += [
        Contender(peer.name, setting.timed(partial(batch_by_batch, peer))) for peer in peers
    ]
    contenders += [
        Contender("decoding alone", timed(decoding)),
        Contender("encoder alone", setting.timed(encoding)),
    ]
    work = f"{plural(len(paths), 'JPEG file')} of 640 x 480 pixels"
    yield setting.case("embed", work, len(paths), "images", contenders, unit_rows)


SEARCHED = 1_000_000  # rows of 512 numbers, 2 GB


def search_suite(setting: Setting) -> Iterator[Case]:
    """A query against a million unit vectors, which are mapped from a file that is no longer than
    them: the rows of the twelve largest inner products."""
    width, k = 512, 12
    draw = torch.Generator().manual_seed(0)
    path = str(setting.directory / "vectors")
    rows = torch.from_file(path, shared=True, size=SEARCHED * width).view(SEARCHED, width)
    for block in rows.split(BLOCK):
        block.copy_(unit_norm(torch.randn(block.shape, generator=draw)))
    query = unit_norm(torch.randn(width, generator=draw))
    made_by = Encoder("noise", None, "", "float32", ImageTransform())
    index = Index(rows, Strings.pack(map(str, range(SEARCHED))), made_by)
    runs: dict[str, Callable[[], Any]] = {
        "miniclip": lambda: [hit.row for hit in index.search(query, k)],
        "torch, matmul + topk": lambda: (rows @ query).topk(k).indices.tolist(),
    }
    try:
        from faiss import IndexFlatIP
    except ImportError:
        pass
    else:
        flat = IndexFlatIP(width)
        for block in rows.split(BLOCK):
            flat.add(block.numpy())
        runs["FAISS, IndexFlatIP"] = lambda: flat.search(query[None].numpy(), k)[1][0].tolist()
    contenders = [Contender(name, timed(run)) for name, run in runs.items()]
    work = f"the {k} nearest of {SEARCHED:,} x {width}, float32"
    yield Case("search", work, 1, "queries", contenders, lambda found: found)


def plural(count: int, unit: str) -> str:
    """A number and its unit: "1 image", "1,000 texts"."""
    return f"{count:,} {unit}{'s' * (count > 1)}"


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
    "embed": embed_suite,
    "search": search_suite,
}


def bench(
    suites: Sequence[str] = tuple(SUITES),
    *,
    shape: str = "B/32",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    batch: int | None = None,
) -> list[Row]:
    """Do the same work with miniclip and with every peer that is installed, and take the time.

    `suites` are names from SUITES; `shape` is one of config.PRESETS, with random weights; `batch`
    is 16, on a GPU 256, unless given. The peers are those of `peers.libraries`.
    """
    for name in suites:
        if name not in SUITES:
            raise ValueError(f"no suite is called {name!r}; expected {', '.join(SUITES)}")
    if shape not in PRESETS:
        raise ValueError(f"no shape is called {shape!r}; expected {', '.join(PRESETS)}")
    if dtype not in TOLERANCE:
        names = ", ".join(str(known).removeprefix("torch.") for known in TOLERANCE)
        raise ValueError(f"dtype is {dtype}; expected one of {names}")
    batch = batch if batch is not None else 256 if device.startswith("cuda") else 16
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    check_device(device)
    import_transformers()  # before the work, so that a missing one shows at once
    rows: list[Row] = []
    with TemporaryDirectory() as folder, exact_float32():
        config = prepare(Path(folder), shape)
        setting = Setting(Path(folder), config, shape, device, dtype, compile, batch)
        bar = progress(suites, "suite")
        for name in bar:
            bar.set_description(name)
            for case in SUITES[name](setting):
                rows += measure(case)
    return rows


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32, which is float32 with ten bits of fraction: cuDNN's convolutions have it on."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
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
    return {"date": str(date.today()), "hardware": hardware} | versions()


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
    lines = ["Medians over the rounds, and of each round's cost in miniclip's (quartiles)."]
    for (suite, work), group in itertools.groupby(rows, key=lambda row: row[:2]):
        lines += ["", f"{suite}: {work}"]
        lines += [f"  {row.contender:<24}{_numbers(row)}" for row in group]
    return "\n".join(lines)


def _numbers(row: Row) -> str:
    if row.cost is None or row.ratio is None:
        return f"not timed: its output is another, by {row.difference:.1g}"
    _, cost, _ = row.cost
    if row.unit == "bytes":
        amount = f"{cost / 1e6:>9,.0f} MB{'':13}"
    else:
        rate = row.count / cost
        amount = f"{cost * 1e3:>9,.1f} ms{rate:>10,.{int(rate < 100)}f}/s "
    lower, median, upper = row.ratio
    return f"{amount}{median:>7.2f}x ({lower:.2f} to {upper:.2f})"
