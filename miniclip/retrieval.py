"""A folder of pictures into an index, and an index searched by words and by pictures.

The vision tower reads every picture once and leaves a unit vector; a query is a unit vector too,
and what is searched for are the largest inner products, which here are cosines. An index is one
safetensors file, mapped into memory: `embeddings`, and the pictures' names beside them.

    miniclip embed photographs --out index.safetensors
    miniclip search index.safetensors "a red bicycle" --sheet bicycles.png

The search is exact and reads every row: at 512 numbers a row, two cores and a second are enough for
a million. For far more, the same file can be handed to FAISS (pip install faiss-cpu), whose indices
answer from memory that is smaller, or faster, or on another machine:

    import faiss
    from safetensors.numpy import load_file

    vectors = load_file("index.safetensors")["embeddings"]
    engine = faiss.IndexFlatIP(vectors.shape[1])  # or faiss.index_factory(512, "IVF4096,PQ64")
    engine.add(vectors)
    scores, rows = engine.search(query[None].numpy(), 12)
    print([index.paths[row] for row in rows[0]])

where `index` is `Index.load("index.safetensors")` and `query` comes from `embed_query`.
"""

import glob
import io
import json
import math
import os
import shutil
import sys
import tarfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from miniclip.checkpoint import Loaded, load
from miniclip.errors import ImageError
from miniclip.files.hub import embedded_names, resolve
from miniclip.files.pictures import open_image
from miniclip.files.reading import read_json
from miniclip.files.writing import replacing, write_json
from miniclip.model import CLIP, unit_norm
from miniclip.transform import ImageTransform, to_rgb
from miniclip.zeroshot import read_ahead

PART = 512
"""Pictures between two savings: so many, at most, are embedded again after a kill."""

BLOCK = 8192
"""Rows that a search looks at together: 16 MiB at 512 numbers a row."""

# ------------------------------------------------------------------------------------------------
# names -> pictures


class Member(NamedTuple):
    """A picture inside a tar, uncompressed: its bytes can be read without the rest."""

    archive: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


Source = str | Member


@cache
def picture_suffixes() -> frozenset[str]:
    """The endings of the formats that Pillow reads."""
    return frozenset(s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def is_picture(name: str) -> bool:
    """Whether the name ends as one of `picture_suffixes`, in any case."""
    return os.path.splitext(name)[1].lower() in picture_suffixes()


def find_pictures(paths: Iterable[str | PathLike[str]]) -> tuple[list[Source], list[str]]:
    """The pictures that files, folders, patterns and tars stand for, and what is wrong with tars.

    A folder stands for the pictures and the tars in it and deeper, by their endings; a tar, such as
    WebDataset's shards, for the pictures in it; a pattern such as `2024/**/*.jpg` for the files it
    fits. A file that is named is a picture, whatever its ending. Each is listed once, in the order
    of the arguments, and sorted within. Raises ValueError where there is nothing.
    """
    found: dict[Source, None] = {}
    damage: list[str] = []
    for path in (os.fspath(path) for path in paths):
        known_damage = len(damage)
        pictures: list[Source] = []
        for name in _files(path):
            pictures += _members(name, damage) if name.endswith(".tar") else [name]
        if not pictures and len(damage) == known_damage:
            raise ValueError(f"{path}: no pictures; expected a picture, a folder or a .tar of them")
        found.update(dict.fromkeys(pictures))
    return list(found), damage


def _files(path: str) -> list[str]:
    if os.path.isdir(path):
        return sorted(_files_below(path), key=Path)
    if os.path.lexists(path):  # a link to nowhere is reported when it is read
        return [path]
    if not (matches := sorted(glob.glob(path, recursive=True))):
        raise ValueError(f"{path}: no such file or folder, and no pattern that fits any")
    return [name for match in matches for name in _files(match)]


def _files_below(root: str) -> Iterator[str]:
    """Pictures and tars, in linked folders too, each of which is gone into once."""
    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, followlinks=True):
        real = {os.path.realpath(os.path.join(folder, name)): name for name in sorted(folders)}
        new = [name for path, name in real.items() if path not in seen]  # the same in each run
        folders[:] = [name for name in new if not name.startswith(".")]
        seen |= real.keys()
        for path in (str(Path(folder, name)) for name in names if not name.startswith(".")):
            is_wanted = is_picture(path) or path.endswith(".tar")
            if is_wanted and (os.path.isfile(path) or not os.path.exists(path)):
                yield path


def _members(archive: str, damage: list[str]) -> list[Member]:
    """The pictures of a tar, up to where it is damaged. Of two of one name the later counts, as it
    does when a tar is unpacked."""
    members: dict[str, Member] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for file in tar:
                if file.isfile() and is_picture(file.name):
                    member = Member(archive, file.name, file.offset_data, file.size)
                    members[file.name] = member
    except (OSError, tarfile.TarError) as error:
        damage.append(f"{archive}: cannot be read as a tar to its end: {error}")
    return list(members.values())


def pixels_of(source: Source, transform: ImageTransform) -> Tensor:
    """A file, or a member of a tar, to (3, S, S). Raises ImageError, which names it."""
    if isinstance(source, str):
        return transform(source)
    try:
        return transform(open_member(source))
    except ImageError as error:
        raise ImageError(naming(str(source), error)) from None


def naming(name: str, error: ImageError) -> str:
    """What an error says, of an image that need not have had a name when it was raised."""
    return str(error) if name in str(error) else f"{name}: {error}"


def open_member(member: Member) -> Image.Image:
    """A picture inside a tar, as `open_image` reads a file. Raises ImageError."""
    try:
        with open(member.archive, "rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
    except OSError as error:
        raise ImageError(f"{member}: cannot be read: {error.strerror}") from error
    try:
        return open_image(io.BytesIO(data))
    except ImageError as error:
        raise ImageError(f"{member}: {error}") from None


def open_picture(name: str) -> Image.Image:
    """A picture by its name in an index, which may go on inside a tar. Raises ImageError."""
    archive, inside, member = name.partition(".tar/")
    if not inside or os.path.exists(name):
        return open_image(name)
    damage: list[str] = []
    for found in _members(f"{archive}.tar", damage):
        if found.name == member:
            return open_member(found)
    raise ImageError(f"{name}: cannot be read: {', '.join(damage) or 'no such picture in the tar'}")


# ------------------------------------------------------------------------------------------------
# the index, and its file


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


def fingerprint(model: CLIP) -> str:
    """SHA-256 of every weight with its name, its shape and its dtype, in hexadecimal digits."""
    digest = sha256()
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
    return name, resolve(name, "model", revision=revision).name  # .../snapshots/COMMIT


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

    def __len__(self) -> int:
        return len(self.embeddings)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the index as one safetensors file, whole or not at all."""
        skipped = Strings.pack(self.skipped)
        tensors = {
            "embeddings": self.embeddings,
            "paths": self.paths.text,
            "path_ends": self.paths.ends,
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
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["miniclip.index"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            transform = ImageTransform.from_dict(about["transform"], reference=about["reference"])
            made_by = {name: about[name] for name in Encoder._fields} | {"transform": transform}
            index = cls(
                tensors["embeddings"],
                Strings(tensors["paths"], tensors["path_ends"]),
                Encoder(**made_by),
                Strings(tensors["skipped"], tensors["skipped_ends"]),
                about["folder"],
            )
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; `miniclip embed` writes one") from None
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path}: no index of `miniclip embed`, or damaged: {reason}"
            ) from None
        x = index.embeddings
        if x.ndim != 2 or x.dtype != torch.float32 or len(x) != len(index.paths):
            raise ValueError(
                f"{path}: expected float32 embeddings (N, E) and N paths, found {x.dtype} "
                f"{tuple(x.shape)} and {len(index.paths)}"
            )
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
            near = (block @ coarse_query >= worst - rounding).nonzero().squeeze(1)
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
        found = describe(loaded, name)
        if found.fingerprint != self.encoder.fingerprint:
            raise ValueError(
                f"the index was made by {self.encoder}, not by {found}: cosines between the two "
                "mean nothing"
            )
        if found.transform != self.encoder.transform:
            raise ValueError(
                f"the index was made by {self.encoder} with {self.encoder.transform}, and this is "
                f"{name} with {found.transform}"
            )

    def load_encoder(self, name: str | None = None, device: str = "cpu") -> Loaded:
        """Load the model that made the index, from `name` if it has moved. Raises ValueError where
        another one is found there."""
        made_by = self.encoder
        loaded = load(
            name or made_by.model,
            device=device,
            dtype=getattr(torch, made_by.dtype),
            reference=made_by.transform.reference,
            revision=None if name else made_by.revision,
        )
        self.check(loaded, name or made_by.model)
        return loaded


# ------------------------------------------------------------------------------------------------
# pictures -> index


def embed_images(
    loaded: Loaded,
    pictures: Sequence[Source],
    name: str = "a model in memory",
    batch: int = 64,
    workers: int | None = None,
) -> Index:
    """An index in memory of pictures that `find_pictures` has found, or of paths.

    Threads (`workers`, or as many as torch uses) decode ahead of the encoder. A picture that cannot
    be read is listed in `skipped`. Raises ValueError where an embedding is no unit vector.

    Threads and not processes: of a JPEG of 640 x 480 Python's lock is held for 3 % of the time
    (0.2 of 7 ms), and two processes of a DataLoader, alternated with two threads on two busy cores,
    were no faster: threads gave 1.02, 1.12 and 0.90 times as many images a second (an encoder of
    one thin layer, the checkpoints shapes and cifar10; torch 2.13.0, 2026-11-24).
    """
    check_counts(batch, workers)
    ((embeddings, paths, skipped),) = embed_parts(loaded, [pictures], batch, workers)
    return Index(embeddings, Strings.pack(paths), describe(loaded, name), skipped, os.getcwd())


def build_index(
    out: str | PathLike[str],
    loaded: Loaded,
    pictures: Sequence[Source],
    encoder: Encoder,
    damage: Sequence[str] = (),
    batch: int = 64,
    workers: int | None = None,
) -> Index:
    """`embed_images` into the file `out`, with what `find_pictures` found damaged among `skipped`.

    Saves a part every 512 pictures, in a folder beside `out` that goes when the index is whole. A
    build that was killed and is started again continues, and ends in the same bytes; so does one
    under torchrun, each of whose processes calls this. Raises ValueError where the folder holds the
    parts of another build, or no picture can be read.
    """
    check_counts(batch, workers)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    barrier = dist.barrier if dist.is_initialized() else lambda: None
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; expected the name of a file to be written")
    if out.exists():
        Index.load(out)  # an older index is replaced, and nothing else is
    folder = out.with_name(f"{out.name}.parts")
    parts = [pictures[i : i + PART] for i in range(0, len(pictures), PART)]
    files = [folder / f"{i:06}.safetensors" for i in range(len(parts))]
    if rank == 0:
        begin(folder, build_settings(loaded, pictures, encoder, batch))
    barrier()
    missing = [i for i, file in enumerate(files) if not file.exists()]
    if rank == 0 and len(missing) < len(parts):
        print(
            f"{out}: continued, {len(parts) - len(missing)} of {len(parts)} parts were done",
            file=sys.stderr,
        )
    barrier()  # before a part is added to those that the others count

    mine = missing[rank::world]
    made = embed_parts(loaded, [parts[i] for i in mine], batch, workers, silent=rank > 0)
    for i, (embeddings, paths, skipped) in zip(mine, made, strict=True):
        index = Index(embeddings, Strings.pack(paths), encoder, skipped, os.getcwd())
        index.save(files[i])
    barrier()
    if rank == 0:
        merged([Index.load(file) for file in files], damage, folder / "embeddings").save(out)
        shutil.rmtree(folder)
    barrier()
    return Index.load(out)


def check_counts(batch: int, workers: int | None) -> None:
    """Raises ValueError for a batch or a number of workers below 1."""
    for name, count in (("batch", batch), ("workers", workers)):
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")


def embed_parts(
    loaded: Loaded,
    parts: Sequence[Sequence[Source]],
    batch: int = 64,
    workers: int | None = None,
    silent: bool = False,
) -> Iterator[tuple[Tensor, list[str], list[str]]]:
    """For each part its embeddings (N, E), their N paths, and why the others were skipped.

    Which pictures share a batch is decided by their places in the part alone: the rounding of an
    embedding depends on it.
    """
    model, _, transform = loaded
    decode = partial(pixels_of, transform=transform)
    decoded = read_ahead(decode, chain(*parts), 2 * batch, workers)
    total = sum(map(len, parts))
    with tqdm(total=total, unit="image", delay=2, disable=silent or None, leave=False) as bar:
        for part in parts:
            rows = [torch.empty(0, model.config.embed_dim)]
            paths: list[str] = []
            skipped: list[str] = []
            for start in range(0, len(part), batch):
                some = part[start : start + batch]
                found = list(zip(map(str, some), islice(decoded, len(some)), strict=True))
                good = [(path, x) for path, x in found if isinstance(x, Tensor)]
                skipped += [str(x) for _, x in found if isinstance(x, ImageError)]
                if good:
                    names, pixels = zip(*good, strict=True)
                    rows.append(embed(model, torch.stack(pixels)))
                    paths += names
                bar.update(len(some))
            yield torch.cat(rows), paths, skipped


def embed(model: CLIP, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, S, S) to unit vectors (B, E), float32 and on the CPU whatever the model is."""
    with torch.inference_mode():
        x = model.encode_image(pixels.to(model.logit_scale.device))
        x = unit_norm(x.float()).cpu()
    if not x.isfinite().all():
        raise ValueError(
            f"an embedding is not finite: the model, in {model.logit_scale.dtype}, overflows; "
            "bfloat16 and float32 reach further"
        )
    return x


def build_settings(
    loaded: Loaded, pictures: Sequence[Source], encoder: Encoder, batch: int
) -> dict[str, Any]:
    """What decides the bytes of a part."""
    listed = "\0".join(map(repr, pictures)).encode("utf-8", "surrogateescape")
    return encoder._asdict() | {
        "transform": repr(encoder.transform),
        "device": loaded.model.logit_scale.device.type,
        "batch": batch,
        "part": PART,
        "pictures": sha256(listed).hexdigest(),
        "folder": os.getcwd(),
    }


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder for parts, or see that those in it were made with the same settings."""
    path = folder / "settings.json"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written: {error.strerror}") from None
    found = read_json(path)
    if changed := [name for name, value in settings.items() if found.get(name) != value]:
        raise ValueError(
            f"{folder}: holds an unfinished index with another {', '.join(changed)}; give the same "
            "again to continue it, or delete the folder"
        )


def merged(parts: Sequence[Index], damage: Sequence[str], scratch: Path) -> Index:
    """The parts as one index, which lies in the file `scratch` and not in memory."""
    skipped = [*damage, *chain(*(part.skipped for part in parts))]
    rows = sum(map(len, parts))
    if not rows:
        shutil.rmtree(scratch.parent)  # another time they may be readable
        raise ValueError(
            f"none of the pictures can be read, {len(skipped)}; the first: {skipped[0]}"
        )
    width = parts[0].embeddings.shape[1]
    size = rows * width
    embeddings = torch.from_file(str(scratch), shared=True, size=size).view(rows, width)
    torch.cat([part.embeddings for part in parts], out=embeddings)
    paths = Strings.pack(chain(*(part.paths for part in parts)))
    return Index(embeddings, paths, parts[0].encoder, skipped, parts[0].folder)


class Throughput(NamedTuple):
    """Pictures a second."""

    decoding: float  # to pixels, by the workers, with nothing else to do
    encoding: float  # by the vision tower, of pixels that are there
    together: float


def throughput(
    loaded: Loaded, pictures: Sequence[Source], batch: int = 64, workers: int | None = None
) -> Throughput:
    """How fast `embed_images` is, and how fast each half of its work alone."""
    check_counts(batch, workers)
    model, _, transform = loaded
    pixels = torch.zeros(batch, 3, transform.crop_size, transform.crop_size)
    sizes = [min(batch, len(pictures) - i) for i in range(0, len(pictures), batch)]
    embed(model, pixels)  # the first call of a model takes longer

    def rate(work: Iterable[Any]) -> float:
        start = time.perf_counter()
        deque(work, maxlen=0)
        return len(pictures) / (time.perf_counter() - start)

    return Throughput(
        rate(read_ahead(partial(pixels_of, transform=transform), pictures, 2 * batch, workers)),
        rate(embed(model, pixels[:size]) for size in sizes),
        rate(embed_parts(loaded, [pictures], batch, workers)),
    )


# ------------------------------------------------------------------------------------------------
# queries, and what they find


def embed_query(
    loaded: Loaded,
    texts: Sequence[str] = (),
    pictures: Sequence[Source] = (),
    minus: Sequence[str] = (),
    minus_pictures: Sequence[Source] = (),
) -> Tensor:
    """The sum of the unit vectors of texts and pictures, less those of others, of length 1: (E,).

    Raises ValueError where nothing is left, and the errors of the tokenizer and the transform.

    >>> import miniclip
    >>> query = embed_query(miniclip.load("cifar10"), ["a ship"], minus=["a truck"])
    >>> round(query.norm().item(), 5)
    1.0
    """
    model, tokenizer, transform = loaded
    texts, minus = ([x] if isinstance(x, str) else x for x in (texts, minus))
    if not all(text.strip() for text in (*texts, *minus)):
        raise ValueError("a text is empty: expected at least one word in it")
    rows = [torch.empty(0, model.config.embed_dim)]
    if texts or minus:
        with torch.inference_mode():
            x = model.encode_text(tokenizer([*texts, *minus]).to(model.logit_scale.device))
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


TILE = 240  # pixels, of a picture on a sheet
SHEETS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf")


def draw_sheet(
    index: Index, hits: Sequence[Hit], title: str, path: str | PathLike[str]
) -> list[str]:
    """What a search has found as one picture, with scores, the best first in reading order.

    Returns for each picture that has moved or gone since, and leaves its place empty, which and
    why. Raises ValueError where the sheet cannot be written.
    """
    columns = min(len(hits), 4)
    gap, line = 16, 22
    step_x, step_y = TILE + gap, TILE + 2 * line + gap
    rows = -(-len(hits) // columns)
    sheet = Image.new("RGB", (columns * step_x + gap, rows * step_y + 3 * gap + line), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(20), ImageFont.load_default(15)
    font = font_for(title, 20)
    draw.text((gap, gap), fitting(title, font, sheet.width - 2 * gap), "black", font)
    lost = []
    for i, hit in enumerate(hits):
        x, y = gap + i % columns * step_x, 2 * gap + line + i // columns * step_y
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), "#eeeeee")
        try:
            picture = ImageOps.contain(to_rgb(index.open(hit.path)), (TILE, TILE))
            left, top = (TILE - picture.width) // 2, (TILE - picture.height) // 2
            sheet.paste(picture, (x + left, y + top))
        except ImageError as error:
            lost.append(str(error))
            draw.text((x + gap, y + gap), "cannot be read", "black", small)
        draw.text((x, y + TILE + 4), f"{i + 1}   {hit.score:.3f}", "#0072b2", large)
        font = font_for(hit.path, 15)
        name = fitting(hit.path, font, TILE, keep_end=True)
        draw.text((x, y + TILE + 4 + line), name, "black", font)
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be written: {error}") from None
    return lost


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's font, which is for Latin; for other scripts one that matplotlib knows, if any."""
    if text.isascii():
        return ImageFont.load_default(size)
    try:
        from miniclip.figures import font_file
    except ValueError:  # matplotlib is not installed
        return ImageFont.load_default(size)
    return ImageFont.truetype(font_file(text), size)


def fitting(
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: int,
    keep_end: bool = False,
) -> str:
    """As much of a text as `width` pixels have room for: its beginning, or its end."""
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    shown = text
    while shown and font.getlength(shown) > width:
        text = text[1:] if keep_end else text[:-1]
        shown = f"…{text}" if keep_end else f"{text}…"
    return shown
