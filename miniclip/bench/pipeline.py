"""The suites that time the work around the model: tokenizing texts, transforming images, embedding
files, searching an index, and loading a model until its first logits."""

import itertools
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from miniclip.bench.first_logits import READY
from miniclip.bench.libraries import Library
from miniclip.bench.material import Setting, captions, invented_captions, mixed_captions
from miniclip.bench.measuring import Case, Trial, timed
from miniclip.files.ahead import read_ahead
from miniclip.model import unit_norm
from miniclip.retrieval.building import encode_parts
from miniclip.retrieval.index import BLOCK, Encoder, Index, Strings, embed
from miniclip.terminal import counted
from miniclip.transform import ImageTransform, resize_short_side


def tokenizer_suite(setting: Setting) -> Iterator[Case]:
    """Tokenize captions, texts in many scripts, and words that are in no cache."""
    end, count = setting.config.text.eos_token_id, 1000

    def without_padding(ids: Tensor) -> list[list[int]]:
        return [row[: row.index(end)] for row in ids.tolist()]

    def trial(tokenize: Callable[[list[str]], Tensor], stream: Iterator[list[str]]) -> Trial:
        """Make a trial that tokenizes the next texts of a stream. Making the texts is not timed."""
        return lambda: timed(partial(tokenize, next(stream)))()

    streams: dict[str, Callable[[], Iterator[list[str]]]] = {
        "ASCII captions": lambda: itertools.repeat(captions(count)),
        "mixed scripts and emoji": lambda: itertools.repeat(mixed_captions(count)),
        "words never seen before": lambda: invented_captions(count),
    }
    tokenizers = {library.name: library.tokenize for library in setting.libraries}
    if find_spec("instant_clip_tokenizer"):
        from instant_clip_tokenizer import Tokenizer

        merges = str(setting.directory / "merges.txt")
        batch = Tokenizer.load(merges, end + 1).tokenize_batch
        tokenizers["instant-clip-tokenizer"] = lambda texts: torch.from_numpy(batch(texts, 77))
    for work, stream in streams.items():
        trials = {name: trial(tokenize, stream()) for name, tokenize in tokenizers.items()}
        work = f"{counted(count, 'text')}, {work}"
        yield Case("tokenizer", work, count, "texts", trials, without_padding)


def transform_suite(setting: Setting) -> Iterator[Case]:
    """Transform one JPEG file, and then a list of sixteen JPEG files."""
    size = setting.config.vision.side

    def pillow_alone() -> None:
        resize_short_side(Image.open(setting.photographs[0]), size)

    if native := find_spec("hf_processors_rs"):
        from hf_processors_rs import AutoImageProcessor

        settings = str(setting.directory / "preprocessor_config.json")
        processor = AutoImageProcessor.from_pretrained(settings, backend="pil")

    def native_pixels(paths: list[str]) -> Tensor:
        return torch.from_numpy(processor(paths, num_threads=torch.get_num_threads()))

    for paths in (setting.photographs[:1], setting.photographs):
        runs: dict[str, Callable[[], Any]] = {
            library.name: partial(library.transform, paths) for library in setting.libraries
        }
        if native:
            runs["hf-processors-rs"] = partial(native_pixels, [str(path) for path in paths])
        if len(paths) == 1:
            runs["Pillow, decode + resize"] = pillow_alone
        work = f"{counted(len(paths), 'JPEG file')} of 640 x 480 pixels"
        trials = setting.timed(runs)
        yield Case("transform", work, len(paths), "images", trials, lambda pixels: pixels)


def embed_suite(setting: Setting) -> Iterator[Case]:
    """Embed four batches of files. Also time the two halves alone: decoding and encoding.

    On a CPU both halves share the cores, so the whole takes at least the sum of the two times.
    """
    paths = setting.photographs * (setting.batch // 4) or setting.photographs
    batches = [paths[i : i + setting.batch] for i in range(0, len(paths), setting.batch)]
    ours, *peers = setting.libraries
    pixels = ours.transform(batches[0]).to(setting.device)

    def together() -> Tensor:
        parts = [list(map(str, paths))]
        encode, transform = partial(embed, ours.model), cast(ImageTransform, ours.transform)
        ((embeds, *_),) = encode_parts(encode, transform, parts, setting.batch, silent=True)
        return torch.cat(embeds)

    @torch.inference_mode()
    def batch_by_batch(library: Library) -> Tensor:
        inputs = (library.transform(batch).to(setting.device) for batch in batches)
        return torch.cat([library.encode_image(x.to(setting.dtype)) for x in inputs])

    def decoding() -> None:
        deque(read_ahead(ours.transform, paths, 2 * setting.batch), maxlen=0)

    def encoding() -> None:
        for batch in batches:
            embed(ours.model, pixels[: len(batch)])

    runs: dict[str, Callable[[], Any]] = {"miniclip": together}
    runs |= {peer.name: partial(batch_by_batch, peer) for peer in peers}
    runs |= {"decoding alone": decoding, "encoder alone": encoding}
    work = f"{counted(len(paths), 'JPEG file')} of 640 x 480 pixels"
    yield setting.case("embed", work, len(paths), "images", setting.timed(runs))


SEARCHED = 1_000_000  # rows of 512 numbers, 2 GB


def search_suite(setting: Setting) -> Iterator[Case]:
    """Search a memory-mapped file of a million unit vectors for the twelve nearest to a query."""
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
    work = f"the {k} nearest of {SEARCHED:,} x {width}, float32"
    yield Case("search", work, 1, "queries", setting.timed(runs), lambda found: found)


def load_suite(setting: Setting) -> Iterator[Case]:
    """Load the files and compute the first logits, in this process."""
    inputs = first_inputs(setting)
    trials = setting.timed({name: partial(ready(), *inputs) for name, ready in READY.items()})
    yield setting.case("load", "files to logits", 1, "times", trials)


def startup_suite(setting: Setting) -> Iterator[Case]:
    """Start a process, import the library, load the files and compute the first logits."""

    def run(library: str) -> Tensor:
        return in_process(setting, library)[1]

    trials = setting.timed({name: partial(run, name) for name in READY})
    yield setting.case("startup", "a new process, files to logits", 1, "times", trials)


def memory_suite(setting: Setting) -> Iterator[Case]:
    """Measure the peak memory of the GPU or, on a CPU, of the process (Linux only)."""
    if not setting.device.startswith("cuda") and sys.platform != "linux":
        return
    size = (setting.directory / "model.safetensors").stat().st_size
    trials: dict[str, Trial] = {name: partial(in_process, setting, name) for name in READY}
    trials["the weights file"] = lambda: (size, None)
    yield setting.case("memory", "peak, files to logits", 1, "bytes", trials)


def first_inputs(setting: Setting) -> tuple[str, str, list[str], str, str]:
    """The arguments for `first_logits.py`: directory, photograph, texts, device and dtype."""
    texts = ["a photo of a cat", "a photo of two dogs"]
    photograph = str(setting.photographs[0])
    return str(setting.directory), photograph, texts, setting.device, setting.dtype_name


def in_process(setting: Setting, library: str) -> tuple[float, Tensor]:
    """Run `first_logits.py` in a new process. Returns its peak memory in bytes and its logits."""
    script = Path(__file__).with_name("first_logits.py")
    paths = [str(script.parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(script), library, json.dumps(first_inputs(setting))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it printed no error"])[-1]
        raise RuntimeError(f"{library} failed in a new process: {reason}")
    logits, most = json.loads(done.stdout)
    return most, torch.tensor(logits)
