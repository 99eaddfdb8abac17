"""A file of embeddings, and exact search in the file."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from miniclip.checkpoint import Loaded, load
from miniclip.errors import shown
from miniclip.files.checks import as_list, check_unit_norm
from miniclip.files.hub import as_path, commit_of, embedded_names, is_local, resolve
from miniclip.files.modules import class_of, named_modules, state_of, unwrapped
from miniclip.files.reading import open_regular
from miniclip.files.tars import Member
from miniclip.files.writing import replacing
from miniclip.follow import check_towers, ids_for
from miniclip.model import CLIP, unit_norm
from miniclip.retrieval.pictures import open_picture, pixels_of
from miniclip.transform import ImageTransform

DTYPES = ("float32", "float64", "float16", "bfloat16")
BLOCK = 8192
"""How many rows a search compares at once. They take 16 MiB if each row has 512 numbers."""
SETTINGS = ("head_width", "causal", "eps", "approximate", "stride")
"""Module settings that change the output, even if the weights are the same."""
TENSORS = {  # the tensors of an index file: dtype and number of dimensions
    "embeddings": (torch.float32, 2),
    "paths": (torch.uint8, 1),
    "path_ends": (torch.int64, 1),
    "stamps": (torch.int64, 2),
    "skipped": (torch.uint8, 1),
    "skipped_ends": (torch.int64, 1),
}


class Encoder(NamedTuple):
    """The model that made the embeddings of an index. Queries need the same model."""

    model: str
    revision: str | None  # the commit of a hub repository
    fingerprint: str  # a hash of the weights and of the modules' settings
    dtype: str  # the dtype of the weights
    transform: ImageTransform

    def __str__(self) -> str:
        commit = f" at {self.revision}" if self.revision else ""
        return f"{self.model}{commit} (fingerprint {self.fingerprint[:12]}, {self.dtype})"

    def check(self, other: "Encoder", what: str, advice: str) -> None:
        """Raise ValueError unless `other` gives the same vectors. The error names both encoders."""
        ours, theirs = str(self), str(other)
        if self.fingerprint == other.fingerprint:
            if self.transform == other.transform:
                return
            ours, theirs = f"{self} with {self.transform}", f"{other} with {other.transform}"
        raise ValueError(f"{what} was made by {ours}, not by {theirs}: {advice}")


def fingerprint(model: CLIP) -> str:
    """Return the SHA-256 of all weights with their names, shapes and dtypes, in hexadecimal.

    The hash also covers the classes and SETTINGS of the modules that use the weights, and the class
    and the config of a fork. Wrappers, such as the wrapper of `torch.compile`, do not change the
    hash.
    """
    model = unwrapped(model)
    fork = "" if model.model_type == "clip" else f"{model.model_type} {model.config}"
    digest = sha256(fork.encode())
    for name, module in named_modules(model):
        settings = [getattr(module, setting, None) for setting in SETTINGS]
        digest.update(f"{name} {class_of(module).__name__} {settings}\n".encode())
    for name, tensor in sorted(state_of(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(loaded: Loaded, name: str, revision: str | None = None) -> Encoder:
    """Describe a model as the `Encoder` of an index. `name` and `revision` must load this model."""
    dtype = str(loaded.model.logit_scale.dtype).removeprefix("torch.")
    return Encoder(name, revision, fingerprint(loaded.model), dtype, loaded.transform)


def lasting_name(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return a name and a revision that load the same model from any folder, at any later time."""
    directory = resolve(name, "model", revision=revision)
    if name in embedded_names():
        return name, None
    if is_local(name):
        return os.path.abspath(as_path(name)), None
    return name, commit_of(directory)


class Strings(Sequence[str]):
    """Strings in one tensor, so that a file of millions of strings is memory-mapped, not read."""

    def __init__(self, text: Tensor, ends: Tensor) -> None:
        self.text = text  # uint8, UTF-8
        self.ends = ends  # (N,) int64, the position in `text` where each string ends

    @classmethod
    def pack(cls, strings: Iterable[str]) -> "Strings":
        """Join strings in one tensor."""
        # A file name may be invalid UTF-8. Python keeps such bytes as surrogates.
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

    def is_sound(self) -> bool:
        """Whether `ends` never decreases, and its last number is the length of `text`."""
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), self.ends])
        return bool((ends.diff() >= 0).all()) and int(ends[-1]) == len(self.text)


class Hit(NamedTuple):
    """One result of a search: a row of the index."""

    path: str
    score: float  # the cosine of the image's embedding and the query
    row: int


@dataclass(frozen=True, eq=False)
class Index:
    """Unit vectors of N images, with the name of each image.

    >>> encoder = Encoder("a model", None, "", "float32", ImageTransform(32))
    >>> index = Index(torch.eye(3), Strings.pack(["a.jpg", "b.jpg", "c.jpg"]), encoder)
    >>> index.search(torch.tensor([0.6, 0.8, 0.0]), k=2)  # doctest: +ELLIPSIS
    [Hit(path='b.jpg', score=0.8..., row=1), Hit(path='a.jpg', score=0.6..., row=0)]
    """

    embeddings: Tensor  # (N, E) float32
    paths: Strings  # the path of each image, such as "photos.tar/1.jpg" in a tar
    encoder: Encoder
    skipped: Sequence[str] = ()  # a line for each unreadable image: its name and the reason
    folder: str = ""  # relative paths start in this folder
    stamps: Tensor = torch.empty(0, 2, dtype=torch.int64)  # (N, 2), the `stamp` of each image

    def __len__(self) -> int:
        return len(self.embeddings)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the index to one safetensors file, atomically."""
        skipped = Strings.pack(self.skipped)
        parts = (self.embeddings, self.paths.text, self.paths.ends, self.stamps)
        tensors = dict(zip(TENSORS, (*parts, skipped.text, skipped.ends), strict=True))
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
        """Memory-map an index. Raises ValueError if the file is not an index, or is damaged."""
        try:
            open_regular(path).close()
            is_one = False
            # safetensors opens the file twice. If a save replaces the file in between, open again.
            while not is_one:
                before = os.stat(path)
                with safe_open(path, framework="pt") as file:
                    about = json.loads((file.metadata() or {})["miniclip.index"])
                    tensors = {name: file.get_tensor(name) for name in TENSORS}
                is_one = os.path.samestat(before, os.stat(path))
            for name, kind in TENSORS.items():
                if (tensors[name].dtype, tensors[name].ndim) != kind:
                    raise ValueError(f"{name} has an unexpected dtype or shape")
            embeddings, *of_paths, stamps, text, ends = tensors.values()
            paths, skipped = Strings(*of_paths), Strings(text, ends)
            if not paths.is_sound() or not skipped.is_sound():
                raise ValueError("the positions where the strings end do not fit the text")
            if len(paths) != (n := len(embeddings)) or stamps.shape not in ((n, 2), (0, 2)):
                found = f"{n} embeddings, {len(paths)} paths and {len(stamps)} stamps"
                raise ValueError(f"expected one path and one stamp for each embedding: {found}")
            names = [about[name] for name in ("model", "fingerprint", "dtype", "folder")]
            names += [about["revision"]] * (about["revision"] is not None)
            if not all(isinstance(name, str) for name in names) or about["dtype"] not in DTYPES:
                raise ValueError(f"the description of the model is not valid: {shown(about)}")
            transform = ImageTransform.from_dict(about["transform"], reference=about["reference"])
            made_by = {name: about[name] for name in Encoder._fields} | {"transform": transform}
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; `miniclip embed` writes one") from None
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError,
                RecursionError) as error:  # fmt: skip
            reason = f"not an index of `miniclip embed`, or damaged: {type(error).__name__}"
            raise ValueError(f"{path}: {reason}: {error}") from None
        return cls(embeddings, paths, Encoder(**made_by), skipped, about["folder"], stamps)

    def search(self, query: Tensor, k: int = 12) -> list[Hit]:
        """Find the images with the largest cosines, exactly.

        A float32 product finds the rows that may be among the best. Their scores are then computed
        in float64. For unit vectors, the float32 error is at most E u / (1 - E u), where u is
        eps / 2 (Higham 2002, section 3.1). The search uses twice this error as a margin. Memory
        does not grow with N.

        Args:
            query: a unit vector (E,).
            k: the number of images to find.

        Returns:
            At most k hits, the best first. If scores are equal, the smaller row number comes first.
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
            if not coarse.abs().max() <= query.norm() * 1.01 + rounding:  # NaN raises the error too
                raise ValueError("the index is damaged: it has rows that are not unit vectors")
            near = (coarse >= worst - rounding).nonzero().squeeze(1)
            scores = torch.cat([scores, (block[near].double() * query).sum(1)])
            rows = torch.cat([rows, start + near])
            order = scores.argsort(descending=True, stable=True)[:k]
            scores, rows = scores[order], rows[order]
        found = zip(rows.tolist(), scores.tolist(), strict=True)
        return [Hit(self.paths[row], score, row) for row, score in found]

    def open(self, path: str) -> Image.Image:
        """Open an image by its path in the index. Raises ImageError."""
        return open_picture(os.path.join(self.folder, path))

    def check(self, loaded: Loaded, name: str = "the model given") -> None:
        """Raise ValueError unless `loaded` made the index. The error names both models."""
        advice = "cosines between vectors of different models mean nothing"
        self.encoder.check(describe(loaded, name), "the index", advice)

    def load_encoder(self, name: str | None = None, device: str = "cpu") -> Loaded:
        """Load the model that made the index. `name`: where the model is now, if it has moved."""
        made_by = self.encoder
        loaded = load(
            name or made_by.model,
            device=device,
            dtype=getattr(torch, made_by.dtype),
            reference=made_by.transform.reference,
            revision=None if name else made_by.revision,
        )
        check_towers(loaded.model, name or made_by.model)
        self.check(loaded, name or made_by.model)
        return loaded


@torch.no_grad()
def embed(model: CLIP, pixels: Tensor) -> Tensor:
    """Embed pixels (B, 3, S, S) as unit vectors (B, E), always in float32 and on the CPU."""
    x = unit_norm(model.encode_image(pixels.to(model.logit_scale.device)).float()).cpu()
    return check_unit_norm(x, model.logit_scale.dtype)


@torch.no_grad()
def embed_query(
    loaded: Loaded,
    texts: str | Iterable[str] = (),
    pictures: Sequence[str | Member] = (),
    minus: str | Iterable[str] = (),
    minus_pictures: Sequence[str | Member] = (),
) -> Tensor:
    """Make a query: add the unit vectors to search for, and subtract the unit vectors to avoid.

    Args:
        loaded: the model that made the index, see `Index.load_encoder`.
        texts: texts to search for.
        pictures: paths of images to search for.
        minus: texts to subtract, which the results should not match.
        minus_pictures: paths of images to subtract.

    Returns:
        The sum as a unit vector (E,).

    Raises:
        ValueError: a text is empty, an embedding is NaN or infinite, or the sum is zero.
        ImageError: an image cannot be read.

    >>> import miniclip
    >>> query = embed_query(miniclip.load("everyday"), ["a ship"], minus=["a truck"])
    >>> round(query.norm().item(), 5)
    1.0
    """
    model, tokenizer, transform = loaded
    texts, minus = as_list(texts), as_list(minus)
    if not all(text.strip() for text in (*texts, *minus)):
        raise ValueError("a text is empty: expected at least one word in it")
    rows = [torch.empty(0, model.config.embed_dim, dtype=torch.float32)]
    if texts or minus:
        ids = ids_for(model.text, tokenizer, [*texts, *minus])
        x = model.encode_text(ids.to(model.logit_scale.device))
        rows.append(check_unit_norm(unit_norm(x.float()).cpu(), model.logit_scale.dtype))
    if pictures or minus_pictures:
        pixels = [pixels_of(picture, transform) for picture in (*pictures, *minus_pictures)]
        rows.append(embed(model, torch.stack(pixels)))
    signs = [1] * len(texts) + [-1] * len(minus) + [1] * len(pictures) + [-1] * len(minus_pictures)
    query = torch.tensor(signs, dtype=torch.float32) @ torch.cat(rows)
    if query.norm() < 1e-3:
        raise ValueError("the query is zero: the subtracted embeddings equal the added embeddings")
    return unit_norm(query)
