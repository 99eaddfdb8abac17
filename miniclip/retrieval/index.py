"""A file of embeddings, and exact search in it."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from miniclip.checkpoint import Loaded, load
from miniclip.errors import shown
from miniclip.files.checks import as_list
from miniclip.files.hub import commit_of, embedded_names, resolve
from miniclip.files.reading import open_regular
from miniclip.files.tars import Member
from miniclip.files.writing import replacing
from miniclip.follow import ids_for
from miniclip.model import CLIP, unit_norm
from miniclip.retrieval.pictures import open_picture, pixels_of
from miniclip.transform import ImageTransform

DTYPES = ("float32", "float64", "float16", "bfloat16")
BLOCK = 8192
"""Rows that a search looks at together: 16 MiB at 512 numbers a row."""


class Encoder(NamedTuple):
    """What made the embeddings of an index, and so must make those of its queries."""

    model: str
    revision: str | None  # of a hub repository: the commit
    fingerprint: str  # of the weights, in the dtype they were used in
    dtype: str
    transform: ImageTransform

    def __str__(self) -> str:
        commit = f" at {self.revision}" if self.revision else ""
        return f"{self.model}{commit} (weights {self.fingerprint[:12]}, {self.dtype})"

    def check(self, other: "Encoder", what: str, advice: str) -> None:
        """Raises ValueError, which names both, unless the other one gives the same embeddings."""
        ours, theirs = str(self), str(other)
        if self.fingerprint == other.fingerprint:
            if self.transform == other.transform:
                return
            ours, theirs = f"{self} with {self.transform}", f"{other} with {other.transform}"
        raise ValueError(f"{what} was made by {ours}, not by {theirs}: {advice}")


def fingerprint(model: CLIP) -> str:
    """SHA-256 of every weight with its name, its shape and its dtype, in hexadecimal digits.

    A fork's class counts too, because the same weights give other embeddings there.
    """
    digest = sha256(b"" if model.model_type == "clip" else model.model_type.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(loaded: Loaded, name: str, revision: str | None = None) -> Encoder:
    """`loaded`, under the name and the revision that it is to be found by."""
    dtype = str(loaded.model.logit_scale.dtype).removeprefix("torch.")
    return Encoder(name, revision, fingerprint(loaded.model), dtype, loaded.transform)


def lasting_name(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """The name, and the revision, by which a model that has been loaded is found from any folder
    and after its repository has changed."""
    if name in embedded_names():
        return name, None
    if os.path.exists(name):
        return os.path.abspath(name), None
    return name, commit_of(resolve(name, "model", revision=revision))


class Strings(Sequence[str]):
    """Strings end to end in one tensor, so that a file of millions is mapped and not read."""

    def __init__(self, text: Tensor, ends: Tensor) -> None:
        self.text = text  # uint8, UTF-8
        self.ends = ends  # (N,) int64, where each string ends in the text

    @classmethod
    def pack(cls, strings: Iterable[str]) -> "Strings":
        """Put strings end to end."""
        # File names need not be Unicode: what is not is kept by surrogates, as Python does it.
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        text = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
        ends = torch.tensor([len(string) for string in encoded], dtype=torch.int64).cumsum(0)
        return cls(text[: int(ends[-1]) if encoded else 0], ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:  # type: ignore[override]  # no slices
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} of {len(self)} strings")
        i %= len(self)
        start, end = int(self.ends[i - 1]) if i else 0, int(self.ends[i])
        return self.text[start:end].numpy().tobytes().decode("utf-8", "surrogateescape")


class Hit(NamedTuple):
    """A row of an index that a search has found."""

    path: str
    score: float  # the cosine between the picture's embedding and the query
    row: int


@dataclass(frozen=True, eq=False)
class Index:
    """Unit vectors of N pictures, and where each comes from.

    >>> encoder = Encoder("a model", None, "", "float32", ImageTransform(32))
    >>> index = Index(torch.eye(3), Strings.pack(["a.jpg", "b.jpg", "c.jpg"]), encoder)
    >>> index.search(torch.tensor([0.6, 0.8, 0.0]), k=2)  # doctest: +ELLIPSIS
    [Hit(path='b.jpg', score=0.8..., row=1), Hit(path='a.jpg', score=0.6..., row=0)]
    """

    embeddings: Tensor  # (N, E) float32
    paths: Strings  # of the N pictures; what lies in a tar has the tar's name before its own
    encoder: Encoder
    skipped: Sequence[str] = ()  # for each picture that could not be read, which and why
    folder: str = ""  # that relative paths start from
    stamps: Tensor = torch.empty(
        0, 2, dtype=torch.int64
    )  # (N, 2), each picture's `stamp`, if known

    def __len__(self) -> int:
        return len(self.embeddings)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the index as one safetensors file, whole or not at all."""
        skipped = Strings.pack(self.skipped)
        tensors = {
            "embeddings": self.embeddings,
            "paths": self.paths.text,
            "path_ends": self.paths.ends,
            "stamps": self.stamps,
            "skipped": skipped.text,
            "skipped_ends": skipped.ends,
        }
        about = self.encoder._asdict() | {
            "transform": self.encoder.transform.to_dict(),
            "reference": self.encoder.transform.reference,
            "folder": self.folder,
        }
        try:
            with replacing(Path(path)) as temporary:
                save_file(tensors, temporary, metadata={"miniclip.index": json.dumps(about)})
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Index":
        """Map an index into memory. Raises ValueError where the file is none."""

        def damaged(what: str) -> ValueError:
            return ValueError(f"{path}: an index of `miniclip embed`, but damaged: it has {what}")

        try:
            open_regular(path).close()
            is_one = False
            while not is_one:  # safetensors opens a file twice, and a save may come in between
                before = os.stat(path)
                with safe_open(path, framework="pt") as file:
                    about = json.loads((file.metadata() or {})["miniclip.index"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}
                is_one = os.path.samestat(before, os.stat(path))
            transform = ImageTransform.from_dict(about["transform"], reference=about["reference"])
            made_by = {name: about[name] for name in Encoder._fields} | {"transform": transform}
            index = cls(
                tensors["embeddings"],
                Strings(tensors["paths"], tensors["path_ends"]),
                Encoder(**made_by),
                Strings(tensors["skipped"], tensors["skipped_ends"]),
                about["folder"],
                tensors["stamps"],
            )
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; `miniclip embed` writes one") from None
        except (
            *(OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError),
            RecursionError,
        ) as error:
            reason = f"no index of `miniclip embed`, or damaged: {type(error).__name__}: {error}"
            raise ValueError(f"{path}: {reason}") from None
        expected = {
            "embeddings": (torch.float32, 2),
            "paths": (torch.uint8, 1),
            "path_ends": (torch.int64, 1),
            "stamps": (torch.int64, 2),
            "skipped": (torch.uint8, 1),
            "skipped_ends": (torch.int64, 1),
        }
        for name, kind in expected.items():
            if (tensors[name].dtype, tensors[name].ndim) != kind:
                raise damaged(f"{name} of {tensors[name].dtype} {tuple(tensors[name].shape)}")
        n = len(index)
        if len(index.paths) != n or index.stamps.shape not in ((n, 2), (0, 2)):
            raise damaged(
                f"{n} embeddings, {len(index.paths)} paths and {len(index.stamps)} stamps"
            )
        for strings in (index.paths, Strings(tensors["skipped"], tensors["skipped_ends"])):
            ends = torch.cat([torch.zeros(1, dtype=torch.int64), strings.ends])
            if (ends.diff() < 0).any() or ends[-1] != len(strings.text):
                raise damaged("strings that end where there is no text")
        texts = (
            about["folder"],
            *index.encoder[:1],
            *index.encoder[2:4],
            "" if about["revision"] is None else about["revision"],
        )
        if not all(isinstance(text, str) for text in texts) or about["dtype"] not in DTYPES:
            raise damaged(f"made by {shown(about)}")
        return index

    def search(self, query: Tensor, k: int = 12) -> list[Hit]:
        """The k pictures of the largest cosine with `query`, a unit vector (E,): the best first,
        and of equals the one that comes first. Takes the memory of a block, whatever N is.

        Exact: scores are float64's. A float32 product tells which rows cannot be among the best:
        it is off by at most E u / (1 - E u), u = eps / 2, times both lengths (Higham 2002, section
        3.1), of which twice as much is granted here.
        """
        width = self.embeddings.shape[1]
        if query.shape != (width,):
            raise ValueError(f"the query has shape {tuple(query.shape)}; expected ({width},)")
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1")
        query = query.detach().cpu().double()
        coarse_query = query.float()
        rounding = (width + 2) * torch.finfo(torch.float32).eps * query.norm().item()
        scores, rows = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
        for start in range(0, len(self), BLOCK):
            block = self.embeddings[start : start + BLOCK]
            worst = scores[-1].item() if len(scores) == k else -math.inf
            coarse = block @ coarse_query
            if not coarse.abs().max() <= query.norm() * 1.01 + rounding:  # nor is NaN
                raise ValueError("the index is damaged: it has rows that are not unit vectors")
            near = (coarse >= worst - rounding).nonzero().squeeze(1)
            scores = torch.cat([scores, (block[near].double() * query).sum(1)])
            rows = torch.cat([rows, start + near])
            order = scores.argsort(descending=True, stable=True)[:k]
            scores, rows = scores[order], rows[order]
        found = zip(rows.tolist(), scores.tolist(), strict=True)
        return [Hit(self.paths[row], score, row) for row, score in found]

    def open(self, path: str) -> Image.Image:
        """One of the pictures, by its path in the index. Raises ImageError."""
        return open_picture(os.path.join(self.folder, path))

    def check(self, loaded: Loaded, name: str = "the model given") -> None:
        """Raises ValueError, which names both, unless `loaded` is what made the index."""
        found, advice = describe(loaded, name), "cosines between the two mean nothing"
        self.encoder.check(found, "the index", advice)

    def load_encoder(self, name: str | None = None, device: str = "cpu") -> Loaded:
        """Load the model that made the index, from `name` if it has moved. Raises ValueError where
        another one is found there."""
        made_by = self.encoder
        options: Any = {"device": device, "reference": made_by.transform.reference}
        revision, dtype = None if name else made_by.revision, getattr(torch, made_by.dtype)
        loaded = load(name or made_by.model, revision=revision, dtype=dtype, **options)
        self.check(loaded, name or made_by.model)
        return loaded


def embed(model: CLIP, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, S, S) to unit vectors (B, E), float32 and on the CPU whatever the model is."""
    with torch.no_grad():
        x = model.encode_image(pixels.to(model.logit_scale.device))
        x = unit_norm(x.float()).cpu()
    if not x.isfinite().all():
        raise ValueError(
            f"an embedding is not finite: the model, in {model.logit_scale.dtype}, overflows; "
            "bfloat16 and float32 reach further"
        )
    return x


def embed_query(
    loaded: Loaded,
    texts: str | Iterable[str] = (),
    pictures: Sequence[str | Member] = (),
    minus: str | Iterable[str] = (),
    minus_pictures: Sequence[str | Member] = (),
) -> Tensor:
    """The sum of the unit vectors of texts and pictures, less those of others, of length 1: (E,).

    Raises ValueError where nothing is left, and the errors of the tokenizer and the transform.

    >>> import miniclip
    >>> query = embed_query(miniclip.load("everyday"), ["a ship"], minus=["a truck"])
    >>> round(query.norm().item(), 5)
    1.0
    """
    model, tokenizer, transform = loaded
    texts, minus = as_list(texts), as_list(minus)
    if not all(text.strip() for text in (*texts, *minus)):
        raise ValueError("a text is empty: expected at least one word in it")
    rows = [torch.empty(0, model.config.embed_dim)]
    if texts or minus:
        with torch.no_grad():
            ids = ids_for(model.text, tokenizer, [*texts, *minus])
            x = model.encode_text(ids.to(model.logit_scale.device))
        rows.append(unit_norm(x.float()).cpu())
    if pictures or minus_pictures:
        pixels = [pixels_of(picture, transform) for picture in (*pictures, *minus_pictures)]
        rows.append(embed(model, torch.stack(pixels)))
    signs = [1] * len(texts) + [-1] * len(minus) + [1] * len(pictures) + [-1] * len(minus_pictures)
    query = torch.tensor(signs, dtype=torch.float32) @ torch.cat(rows)
    if query.norm() < 1e-3:
        raise ValueError(
            "nothing is left of the query: expected a text or a picture, more than it takes away"
        )
    return unit_norm(query)
