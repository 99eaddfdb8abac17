"""The inputs of the suites: random weights, a vocabulary, captions and photographs."""

import gzip
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from PIL import Image

from miniclip.bench.libraries import Library, libraries
from miniclip.bench.measuring import Case, Trial, timed, unit_rows
from miniclip.checkpoint import save
from miniclip.config import CLIPConfig
from miniclip.engines import find_engine
from miniclip.files.hub import OPENAI_VOCABULARY
from miniclip.model import CLIP
from miniclip.parity import randomize
from miniclip.published import PUBLISHED
from miniclip.tokenizer import Tokenizer
from miniclip.transform import ImageTransform
from miniclip.zeroshot.prompts import IMAGENET_CLASSES, TEMPLATE_SETS

MAX_DISTANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""A library is timed only if its relative difference from miniclip's output is at most this."""


@dataclass(frozen=True)
class Setting:
    """The arguments of a suite. `libraries` and `photographs` are made when they are first used."""

    directory: Path  # of a checkpoint with random weights
    config: CLIPConfig
    shape: str
    device: str
    dtype: torch.dtype
    compile: bool
    batch: int
    engines: tuple[str, ...] = ()

    @cached_property
    def libraries(self) -> list[Library]:
        """The checkpoint, loaded in each library. miniclip comes first."""
        return libraries(self.directory, self.device, self.dtype)

    @cached_property
    def photographs(self) -> list[Path]:
        """The paths of sixteen JPEG files."""
        return [photograph(self.directory / f"{i}.jpg", i) for i in range(16)]

    @property
    def dtype_name(self) -> str:
        """The name of the dtype, such as "float32"."""
        return str(self.dtype).removeprefix("torch.")

    def timed(self, runs: Mapping[str, Callable[[], Any]]) -> dict[str, Trial]:
        """Make one trial for each function. A trial measures a function on this device."""
        return {name: timed(run, self.device) for name, run in runs.items()}

    def case(
        self,
        suite: str,
        work: str,
        count: int,
        unit: str,
        trials: dict[str, Trial],
        form: Callable[[Any], Any] = unit_rows,
    ) -> Case:
        """Make a Case for a suite that runs the model. Outputs may differ by rounding errors."""
        work = f"{work}, {self.shape}, {self.dtype_name}"
        loose = {name: find_engine(name).tolerance for name in self.engines if "-" in name}
        return Case(suite, work, count, unit, trials, form, MAX_DISTANCE[self.dtype], loose)


def prepare(directory: Path, shape: str) -> CLIPConfig:
    """Write random weights in an official shape to files that every library can read.

    The vocabulary is learnt from captions, because OpenAI's vocabulary is not in the package. The
    new vocabulary is small, but the token embedding keeps the size of the published model.
    """
    tokenizer = Tokenizer.train([*captions(2000), *MIXED_SCRIPTS], 4096)
    config = PUBLISHED[shape]
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
    """Put OpenAI's class names into OpenAI's templates.

    The first 80,000 captions contain few duplicates.

    >>> captions(2)
    ['a bad photo of a tench.', 'a photo of many rooster.']
    """
    return [
        TEMPLATE_SETS["imagenet"][i % 80].replace("{}", IMAGENET_CLASSES[(i // 80 + 7 * i) % 1000])
        for i in range(count)
    ]


# The first sentence of article 1 of the Universal Declaration of Human Rights, and emoji.
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
    """Make texts of eight random words from MIXED_SCRIPTS."""
    words = [word for text in MIXED_SCRIPTS for word in text.split()]
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=8)) for _ in range(count)]


def invented_captions(count: int) -> Iterator[list[str]]:
    """Yield lists of `count` texts of random letters, without end. No cache has these words."""
    draw = random.Random(0)
    while True:
        yield [
            " ".join(
                "".join(draw.choices(ascii_lowercase, k=draw.randint(5, 10))) for _ in "123456"
            )
            for _ in range(count)
        ]


def photograph(path: Path, seed: int) -> Path:
    """Write a JPEG file of 640 x 480 pixels and about 90 kB, with random colours and noise."""
    draw = np.random.default_rng(seed)
    blots = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(blots.resize((640, 480), Image.Resampling.BICUBIC), np.float32)
    grained = (smooth + draw.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(grained).save(path, quality=90)
    return path
