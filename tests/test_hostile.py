"""Files with false contents. For each file, `load` raises a CheckpointError, or returns exactly the
weights and settings that the file states. The error comes quickly and takes little memory.

An untrusted directory or repository cannot run code. miniclip reads no file outside the directory,
but it follows symbolic links, because the hub's cache consists of them. Loading takes much time or
memory only if the files are large.
"""

import gzip
import io
import itertools
import json
import os
import pickle
import random
import re
import signal
import struct
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from twin import tokenizer_of

import miniclip
from miniclip import (
    CLIP,
    CheckpointError,
    CLIPConfig,
    ImageTransform,
    TextConfig,
    Tokenizer,
    VisionConfig,
)
from miniclip.files.tensors import read_tensors
from miniclip.parity import randomize

CONFIG = CLIPConfig(
    VisionConfig(width=8, layers=1, heads=2, mlp_width=12, image_size=16, patch_size=8),
    TextConfig(
        width=6, layers=2, heads=3, mlp_width=10, vocab_size=560, context_length=12,
        bos_token_id=558, eos_token_id=559,
    ),
    embed_dim=10,
)  # fmt: skip

DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000]
# JSON values that replace the expected whole number.
VALUES = [
    -1, 0, 1, 7, 10**6, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 0.5, 8.0, 1e300, float("inf"),
    float("nan"), "8", "", True, None, [], [8, 8], [1e9], {"8": 8}, "quick_gelu", [2] * 10**4,
]  # fmt: skip


# -------------------------------------------------------------------------------------- the referee


class Referee:
    """Load a directory with changed files, and collect complaints about wrong outcomes."""

    def __init__(self, files, directory):
        self.files, self.directory, self.complaints = files, directory, []
        for name, data in files.items():
            (directory / name).write_bytes(data)

    @contextmanager
    def changed(self, changes):
        """Replace these files in a `with` statement. A file whose contents are None is removed."""
        try:
            for name, data in changes.items():
                (self.directory / name).unlink(missing_ok=True)
                if data is not None:
                    (self.directory / name).write_bytes(data)
            yield
        finally:
            for name in changes:
                (self.directory / name).unlink(missing_ok=True)
                if name in self.files:
                    (self.directory / name).write_bytes(self.files[name])

    def judge(self, cases, load, is_as_stated):
        """Load each case. Return two lists of labels: cases with an error, and loaded cases.

        Fail if a case ends in any other way.
        """
        errors, loads = [], []
        reset_peak()
        before = peak()
        for label, changes in cases:
            with self.changed(changes):
                try:
                    with cpu_seconds(10):  # a case normally takes at most 0.3 s
                        loaded = load(self.directory)
                except CheckpointError as error:
                    errors.append(label)
                    if not str(error).partition("\n")[0].isprintable():
                        self.complaints.append(f"{label}: an unprintable message: {error!r}")
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # a Rust panic is a BaseException
                    self.complaints.append(f"{label}: {type(error).__name__}: {error}"[:300])
                else:
                    loads.append(label)
                    if not is_as_stated(loaded, label):
                        self.complaints.append(f"{label}: loaded, but not as the files state")
        if (growth := peak() - before) > 200e6:
            self.complaints.append(f"memory grew by {growth / 1e6:.0f} MB")
        assert not self.complaints, f"{len(self.complaints)}\n" + "\n".join(self.complaints[:40])
        return errors, loads


class TooLong(BaseException):
    """A BaseException, because the loader reports every Exception as a damaged file."""


@contextmanager
def cpu_seconds(most):
    """Raise TooLong if a `with` statement takes more than this many seconds of CPU time.

    Wall time would depend on what else the machine does.
    """

    def stop(*args):
        raise TooLong(f"took more than {most} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, most)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def reset_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # only Linux can reset the peak


def peak():
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    except OSError:
        resource = pytest.importorskip("resource")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """All files of a checkpoint, as {name: contents}."""
    directory = tmp_path_factory.mktemp("whole")
    model = CLIP(CONFIG)
    randomize(model)
    tokenizer = tokenizer_of(CONFIG, "a photo of a cat and of a dog")
    miniclip.save(directory, model, tokenizer, ImageTransform(16))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def referee(files, tmp_path):
    return Referee(files, tmp_path)


@pytest.fixture(scope="module")
def their_names(files, tmp_path_factory):
    """Return {our name: the file's name} of each tensor. Tensors are matched by their values."""
    directory = tmp_path_factory.mktemp("names")
    for name, data in files.items():
        (directory / name).write_bytes(data)
    theirs = load_file(directory / "model.safetensors")
    ours = CLIP.from_pretrained(directory).state_dict()
    names = {o: [t for t in theirs if torch.equal(theirs[t], ours[o])] for o in ours}
    assert all(len(same) == 1 for same in names.values()) and len(names) == len(theirs)
    return {ours: same[0] for ours, same in names.items()}


# --------------------------------------------------------------------------- weights in safetensors

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def split(data):
    """(header, tensors) of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, body, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def as_safetensors_says(model, data, their_names):
    """Whether the weights equal the tensors in `data`. If a name is repeated, the last is used."""
    header, body = split(data)
    for ours, tensor in model.state_dict().items():
        entry = header[their_names[ours]]
        start, end = entry["data_offsets"]
        stated = torch.frombuffer(bytearray(body[start:end]), dtype=DTYPES[entry["dtype"]])
        same = stated.reshape(entry["shape"]).to(tensor.dtype)
        if not torch.equal(tensor.nan_to_num(7e7), same.nan_to_num(7e7)):
            return False
    return True


def truncated(data):
    """Cut the file after each punctuation mark of its header, and near the ends of tensors."""
    header, body = split(data)
    start = len(data) - len(body)
    ends = {end for key, e in header.items() if key != "__metadata__" for end in e["data_offsets"]}
    tokens = {8 + m.end() for m in re.finditer(rb'[{}\[\]:,"]', data[8:start])}
    near = {at + i for at in (0, start, *(start + e for e in ends)) for i in (-1, 0, 1)}
    for cut in sorted({*range(9), *tokens, *near} & {*range(len(data))}):
        yield f"cut at {cut}", data[:cut]
        if cut >= start:
            yield f"zeros from {cut}", data[:cut] + bytes(len(data) - cut)
    yield "one byte more", data + b"\0"
    yield "twice", data * 2


def lengths(data):
    header, body = split(data)
    text = data[8 : len(data) - len(body)]
    for near in (0, 1, 2, len(text), len(data), 10**8, 2**31, 2**32, 2**53, 2**63, 2**64):
        for length in {near - 9, near - 8, near - 1, near, near + 1}:
            if 0 <= length < 2**64:
                yield f"header of {length}", join(text, body, length)


def false_entries(data):
    """Change, remove, swap or repeat one tensor's entry in the header."""
    header, body = split(data)
    names = [name for name in header if name != "__metadata__"]
    for name in names[::16]:
        entry = header[name]
        start, end = entry["data_offsets"]
        shape = entry["shape"]
        offsets = [(start + i, end + j) for i in (-4, -1, 0, 1, 4) for j in (-4, -1, 0, 1, 4)]
        offsets += [(end, start), (0, len(body)), (len(body), len(body)), (0, end - start), (0, 0)]
        offsets += [(start, 2**63), (2**64 - 4, 2**64 - 4 + end - start), (start, 10**30)]
        changes = [{"data_offsets": list(pair)} for pair in offsets if pair != (start, end)]
        changes += [{"data_offsets": odd} for odd in ([], [start], [start, end, end], None, "0, 4")]
        shapes = [[10**12], [10**6, 10**6], [2**32, 2**32], [2**64], [-1], [0], [1] * 100, None, 5]
        shapes += [[*shape, 10**12], [*shape, 0], [*shape, 1], [1, *shape], shape[::-1] + [2], "8"]
        shapes += [[0, 10**12], [s + 0.5 for s in shape] or [0.5]]
        changes += [{"shape": odd} for odd in shapes]
        changes += [{"dtype": odd} for odd in [*SIZES, "F8_E4M3", "F4", "f32", "", "C64", 32, None]]
        changes += [{"dtype": "F16", "shape": [*shape, 2]}, {"dtype": "F64"}]
        for change in changes:
            yield f"{name} {change}", join(header | {name: entry | change}, body)
        for field in entry:
            rest = {key: value for key, value in entry.items() if key != field}
            yield f"{name} without {field}", join(header | {name: rest}, body)
        yield f"without {name}", join({n: e for n, e in header.items() if n != name}, body)
        yield f"{name} renamed", join({n + "x" * (n == name): e for n, e in header.items()}, body)
        for other in random.Random(name).sample(names, 3):
            swapped = header | {name: header[other], other: entry}
            yield f"{name} for {other}", join(swapped, body)
            yield f"{name} as {other}", join(header | {name: header[other]}, body)
            double = json.dumps({name: header[other]}).encode()[:-1] + b","
            text = json.dumps(header).encode()
            yield f"{name} twice, first as {other}", join(double + text[1:], body)
            yield (
                f"{name} twice, last as {other}",
                join(text[:-1] + b"," + double[1:-1] + b"}", body),
            )
        double = json.dumps({name: entry}).encode()[:-1] + b","
        yield f"{name} twice", join(double + json.dumps(header).encode()[1:], body)


def odd_headers(data):
    header, body = split(data)
    text = json.dumps(header).encode()
    for odd in [
        *DEEP,
        b"",
        b"null",
        b"[]",
        b"1",
        b'""',
        b"{}",
        b"{",
        b"\xff" * 9,
        b"\xef\xbb\xbf{}",
    ]:
        yield f"header {odd[:9]}", join(odd, body)
    deep = text[:-1] + b', "deep": ' + DEEP[2] + b"}"
    yield "a deep entry", join(deep, body)
    for value in VALUES:
        yield f"metadata {value!r:.50}", join(header | {"__metadata__": value}, body)
        yield f"metadata of {value!r:.50}", join(header | {"__metadata__": {"format": value}}, body)
        yield f"an entry more, {value!r:.50}", join(header | {"more": value}, body)
    for odd in ("", "\0", "\ud800", "é", "a" * 10**5, "../../x", "\n", "\x1b[2J"):
        entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        yield f"a tensor called {odd!r:.50}", join(header | {odd: entry}, body)
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(8_000)}
    yield "eight thousand empty tensors", join(header | many, body)
    yield "only them", join(many, b"")
    yield "spaces", join(text + b" " * 10**6, body)


def flipped(data, count, seed=0):
    """Change some bytes, mostly in the header."""
    dice = random.Random(seed)
    start = len(data) - len(split(data)[1])
    for _ in range(count):
        damaged = bytearray(data)
        limit = start if dice.random() < 0.8 else len(data)
        places = [dice.randrange(8, limit) for _ in range(dice.choice([1, 1, 2, 5]))]
        for place in places:
            damaged[place] = dice.randrange(256) if dice.random() < 0.5 else data[place] ^ 1
        yield f"other bytes at {places}", bytes(damaged)


def safetensors_cases(files):
    data = files["model.safetensors"]
    families = truncated(data), lengths(data), false_entries(data), odd_headers(data)
    return [*itertools.chain(*families, flipped(data, 200))]


@pytest.mark.slow
def test_faulty_safetensors_raise_an_error_or_load_as_the_file_says(referee, files, their_names):
    cases = safetensors_cases(files)

    def is_as_stated(model, label):
        data = (referee.directory / "model.safetensors").read_bytes()
        return model.config == CONFIG and as_safetensors_says(model, data, their_names)

    changes = [(label, {"model.safetensors": data}) for label, data in cases]
    errors, loads = referee.judge(changes, CLIP.from_pretrained, is_as_stated)
    assert len(errors) > 1200 and len(loads) > 50


# ------------------------------------------------------------------------------- weights in pickles


def pickled(tensors, **options):
    buffer = io.BytesIO()
    torch.save(tensors, buffer, **options)
    return buffer.getvalue()


class Harmful:
    """An object that creates a file when it is unpickled."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return (open, (self.proof, "w"))


def zip_boundaries(data):
    """Positions in an archive: near the start of each header and of each file's data."""
    at = [
        m.start() for m in re.finditer(rb"PK\x03\x04|PK\x01\x02|PK\x05\x06|PK\x06[\x06\x07]", data)
    ]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        at += [info.header_offset + 30 + len(info.filename) for info in archive.infolist()]
    return sorted({cut for place in at for cut in (place - 1, place, place + 1, place + 12)})


def rezipped(data, change):
    """Copy an archive, but replace each record by the records that `change` returns for it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            for name, contents in change(info.filename, old.read(info)):
                new.writestr(name, contents)
    return buffer.getvalue()


def compressed(data):
    """A small archive that decompresses to 250 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
            for info in old.infolist():
                contents = old.read(info)
                if info.filename.endswith("data.pkl"):
                    contents += bytes(250_000_000)
                new.writestr(info.filename, contents)
    return buffer.getvalue()


def pickle_cases(files, tensors, proof):
    modern = pickled(tensors)
    legacy = pickled(tensors, _use_new_zipfile_serialization=False)
    for cut in zip_boundaries(modern):
        yield f"archive cut at {cut}", modern[:cut]
    for cut in [*range(0, 700, 11), *range(700, len(legacy), 1091)]:
        yield f"legacy file cut at {cut}", legacy[:cut]
    dice = random.Random(0)
    start, end = modern.index(b"data.pkl"), modern.index(b"data/0")
    for data, first, last in ((modern, start, end), (modern, 0, len(modern)), (legacy, 0, 4000)):
        for _ in range(60):
            damaged = bytearray(data)
            places = [dice.randrange(first, last) for _ in range(dice.choice([1, 1, 2, 5]))]
            for place in places:
                damaged[place] = dice.randrange(256)
            yield f"other bytes of {len(data)} at {places}", bytes(damaged)
    yield "compressed", compressed(modern)
    for name in ("data.pkl", "version", "byteorder", "data/0"):
        kept = [(lambda n, c, name=name: [] if n.endswith("/" + name) else [(n, c)])]
        kept.append(lambda n, c, name=name: [(n, b"" if n.endswith("/" + name) else c)])
        kept.append(lambda n, c, name=name: [(n, c[:-1] if n.endswith("/" + name) else c)])
        for change in kept:
            yield f"a lying record {name}", rezipped(modern, change)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    name = "visual_projection.weight"
    lies = [
        {name: torch.zeros(1).expand(10**12)},
        {name: torch.zeros(1).expand(shapes[name])},
        {name: torch.zeros(10**4).as_strided(shapes[name], (1, 0))},
        {name: torch.zeros(0, 10**12)},
        dict.fromkeys((f"more{i}" for i in range(3000)), torch.zeros(100_000)),
        {"text_model.embeddings.position_ids": torch.zeros(1, dtype=torch.long).expand(10**10)},
        {"text_model.embeddings.position_ids": torch.zeros(1, dtype=torch.long).expand(10**12)},
        {"vision_model.embeddings.position_ids": torch.zeros(0, 10**12, dtype=torch.long)},
        {name: torch.nn.Parameter(torch.zeros(shapes[name]), requires_grad=False).T},
        {name: torch.quantize_per_tensor(torch.zeros(shapes[name]), 0.1, 0, torch.qint8)},
        {name: torch.zeros(shapes[name], dtype=torch.complex64)},
        {name: torch.zeros(shapes[name]).to_sparse_csr()},
        {name: [0.0]}, {name: Harmful(proof)}, {("a", 1): torch.zeros(1)}, {name: {name: name}},
    ]  # fmt: skip
    for lie in lies:
        for zipped in (True, False):
            value = pickled(tensors | lie, _use_new_zipfile_serialization=zipped)
            yield f"{lie!r:.90} {zipped}", value
    for odd in (
        tensors["logit_scale"],
        [tensors],
        "text",
        None,
        10**100,
        {},
        tensors | {"epoch": 3},
    ):
        yield f"a pickle of {odd!r:.30}", pickled(odd)
    for protocol in range(6):
        yield f"bare code {protocol}", pickle.dumps(Harmful(proof), protocol)
        yield f"code after {protocol}", legacy + pickle.dumps(Harmful(proof), protocol)
    yield "numbers that call", b"cos\nsystem\n(S'touch " + str(proof).encode() + b"'\ntR."
    yield "nothing", b""
    yield "an archive of nothing", rezipped(modern, lambda name, contents: [])
    yield "safetensors under this name", files["model.safetensors"]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning"
)  # torch warns when it saves
def test_faulty_pickles_raise_an_error_or_load_as_the_file_says(
    referee, files, their_names, tmp_path
):
    tensors = load_file(referee.directory / "model.safetensors")
    proof = tmp_path / "proof"
    cases = pickle_cases(files, tensors, proof)

    def is_as_stated(model, label):
        path = referee.directory / "pytorch_model.bin"
        stated = tensors
        for mmap in (True, False):  # with mmap, torch ignores checksums, as miniclip does
            with suppress(RuntimeError, OSError, pickle.UnpicklingError):
                stated = torch.load(path, weights_only=True, mmap=mmap)
        weights = model.state_dict()
        return model.config == CONFIG and all(
            torch.equal(weights[ours].nan_to_num(7e7), stated[theirs].float().nan_to_num(7e7))
            for ours, theirs in their_names.items()
        )

    gone = {"model.safetensors": None}
    changes = [(label, gone | {"pytorch_model.bin": data}) for label, data in cases]
    errors, loads = referee.judge(changes, CLIP.from_pretrained, is_as_stated)
    assert len(errors) > 300 and len(loads) > 20
    assert not proof.exists()


# ---------------------------------------------------- pickles made by hand, which no program writes


LARGEST = 400_000  # the most bytes that miniclip reads from a pickle


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def many(*parts, kind=b"t"):
    return b"(" + b"".join(parts) + kind


def called(module, name):
    return f"c{module}\n{name}\n".encode()


def storage(key="0", numel=4, kind="FloatStorage", view=b""):
    size = number(numel) if isinstance(numel, int) else numel
    return many(text("storage"), called("torch", kind), text(key), text("cpu"), size, view) + b"Q"


EMPTY = called("collections", "OrderedDict") + b")R"


def tensor(shape=(2, 2), stride=(2, 1), offset=0, of=None):
    numbers = many(*map(number, shape)), many(*map(number, stride))
    parts = many(of or storage(), number(offset), *numbers, b"\x89", EMPTY)
    return called("torch._utils", "_rebuild_tensor_v2") + parts + b"R"


def dictionary(items):
    return b"}" + many(*(text(name) + value for name, value in items.items()), kind=b"u")


MODULE = called("__torch__.m", "M") + b")\x81"


def module(items):
    return MODULE + dictionary(items) + b"b"


def kept(value, place=0):
    """Return opcodes that store a value in the pickle's memo, and opcodes that fetch it again."""
    number = struct.pack("<I", place)
    return value + b"r" + number + b"0", b"j" + number


def nested(depth, each, core, place=0):
    """Nest `core` in `depth` objects. `each(x)` returns the opcodes of an object around x."""
    made, again = kept(core, place)
    for further in range(1, depth + 1):
        more, again = kept(each(again), place + further)
        made += more
    return made + again


def hand_made_archives():
    w = {"w": tensor()}
    for kind, holder in (("torch.save", dictionary), ("torch.jit.save", module)):
        for label, value in {
            "as it should be": tensor(),
            "numbers backwards": tensor((2, 2), (-2, 1)),
            "before the first number": tensor(offset=-4),
            "after the last number": tensor(offset=1),
            "a negative shape": tensor((-2, -2)),
            "one number 10^12 times": tensor((10**6, 10**6), (0, 0)),
            "numbers for 2^30": tensor((2**30,), (1,), of=storage(numel=2**30)),
            "more numbers than are there": tensor((5,), (1,), of=storage(numel=5)),
            "fewer numbers than are there": tensor((3,), (1,), of=storage(numel=3)),
            "a negative number of numbers": tensor(of=storage(numel=-4)),
            "no whole number of numbers": tensor(of=storage(numel=b"G@\x10" + bytes(6))),
            "2^62 numbers": tensor(of=storage(numel=b"\x8a\x08" + struct.pack("<q", 2**62))),
            "a number of 250 bytes": tensor(of=storage(numel=b"\x8a\xfa" + bytes(249) + b"\x01")),
            "a part of a storage": tensor(of=storage(view=many(text("1"), number(0), number(4)))),
            "numbers outside": tensor(of=storage("../../x")),
            "numbers of the list of contents": tensor(of=storage("../data.pkl")),
            "two kinds in one storage": dictionary({"a": tensor(of=storage(kind="IntStorage"))})
            + b"0"
            + tensor(),
            "50,000 dimensions": tensor((1,) * 50_000, (1,) * 50_000),
            "no tensor": number(3),
            "a text for a shape": called("torch._utils", "_rebuild_tensor_v2")
            + many(storage(), number(0), text("22"), text("21"), b"\x89", EMPTY)
            + b"R",
            "a tensor by its constructor": called("torch", "Tensor")
            + many(number(1000), number(1000))
            + b"R",
            "4 GB of zeros": called("builtins", "bytearray") + many(b"I4000000000\n") + b"R",
            "a tensor changed afterwards": tensor() + many(number(1)) + b"b",
            "a function changed": called("torch._utils", "_rebuild_tensor_v2")
            + b"N"
            + dictionary({"__kwdefaults__": b"}"})
            + b"\x86b",
            "a place in the memo of 2^27": b"Nr" + struct.pack("<I", 2**27) + b"0" + tensor(),
            "a place in the memo of 2^32": b"Nr" + b"\xff" * 4 + b"0" + tensor(),
            "8 GB of a frame": b"\x95" + struct.pack("<Q", 2**33) + tensor(),
            "8 GB of bytes": b"\x96" + struct.pack("<Q", 2**33) + b"0" + tensor(),
            "a text of 4 GB": b"X" + b"\xff" * 4 + b"0" + tensor(),
        }.items():
            yield f"{kind}: {label}", holder({"w": value})
        yield f"{kind}: a name that drives a terminal", holder({"w\x1b[31m": tensor()})
        one, again = kept(tensor())
        names = {f"w{i}": again for i in range(10_000)}
        yield f"{kind}: 10,000 tensors", holder({"w": one + again} | names)
    yield "a name that is a number", b"}" + number(5) + tensor() + b"s"
    yield "an attribute that is a number", module({})[:-1] + number(5) + tensor() + b"sb"
    yield "a module in itself", MODULE + b"q\0" + dictionary({"a": b"h\0"}) + b"b"
    yield "2^40 modules", nested(40, lambda m: module({"a": m, "b": m}), module(w))
    yield "900 modules deep", nested(900, lambda m: module({"a": m}), module(w))
    yield "long names, deep", nested(90, lambda m: module({"a" * 5000: m}), module(w))
    name, again = kept(text("a" * 100_000))
    holder_of_it = MODULE + b"}" + again + MODULE + b"}bsb"
    yield "a long name again and again", name + module({f"{i}": holder_of_it for i in range(3_000)})
    kinds = [nested(60, lambda t: b"(N" + t * 2 + b"t", b"N", place) for place in (0, 61)]
    of_kinds = [
        many(text("storage"), kind, text("0"), text("cpu"), number(4)) + b"Q" for kind in kinds
    ]
    yield "a storage of two odd kinds", b"0".join(of_kinds)
    false = MODULE + dictionary({"key": text("0"), "numel": number(2**30), "nbytes": number(8)})
    posing = tensor((2**15, 2**14), (0, 0), of=false + b"b")
    yield "a module as a storage", dictionary({"w": posing})
    one, again = kept(tensor())
    yield "one tensor by 9,000 names", one + dictionary({f"w{i}": again for i in range(9_000)})
    yield "another sign", dictionary({"w": tensor()[:-2] + dictionary({"neg": b"\x88"}) + b"tR"})
    for pair in (b"\x86", b"t"):
        start = b"(" * (pair == b"t")
        key = nested(60, lambda t, pair=pair, start=start: start + t * 2 + pair, b"N")
        yield f"a key of 2^60 tuples by {pair}", b"}" + key + b"Ns"
    for name, values in {
        "numbers that look alike": [b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little")
                                    for k in range(1, 40_000)],
        "texts": [text(f"{k}") for k in range(40_000)],
    }.items():  # fmt: skip
        yield f"a dictionary of {name}", b"}" + many(*(v + b"N" for v in values), kind=b"u")
    long, again = kept(b"]" + many(*[b"N"] * 200_000, kind=b"e"))
    wide, state = kept(b"}" + many(*(text(f"{k}") + b"N" for k in range(40_000)), kind=b"u"))
    for label, start, step in (
        ("arguments", long, called("torch._utils", "_rebuild_tensor_v2") + again + b"R0"),
        ("arguments of a dictionary", long, called("collections", "OrderedDict") + again + b"R0"),
        ("arguments of a new one", long, called("collections", "OrderedDict") + again + b"\x810"),
        ("a list of a list", long, called("torch.jit._pickle", "build_intlist")
         + again + b"\x85R"),
        ("storages", long, again + b"Q0"),
        ("states", wide + MODULE + b"}b", state + b"b"),
        ("tensors in tensors", b"]" + many(*[b"N"] * 7, kind=b"e") + b"q\0",
         b"0" + called("torch._utils", "_rebuild_tensor_v2") + b"h\0R"),
    ):  # fmt: skip
        rest = (LARGEST - 10 - len(start)) // len(step)
        yield f"again and again: {label}", start + step * rest
    for op in b"()}]N\x8f":
        yield f"nothing but {op:x}", bytes([op]) * (LARGEST - 10)
    rest = len(b"\x80\x02" + text("") + b"0" + dictionary(w) + b".")
    for label, more in (("as large a pickle as may be", 0), ("too large a pickle", 1)):
        yield label, text("a" * (LARGEST - rest + more)) + b"0" + dictionary(w)


def hand_made_cases():
    for label, pickled in hand_made_archives():
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02" + pickled + b".")
            archive.writestr("a/constants.pkl", b"\x80\x02).")
            archive.writestr("a/data/0", struct.pack("<4f", 1, 2, 3, 4))
            archive.writestr("x", bytes(16))
        yield label, buffer.getvalue()
        if label == "torch.save: as it should be":
            right = buffer.getvalue()
    for order in ("little", "big"):
        record = [("a/byteorder", order.encode())]
        yield f"{order}-endian", rezipped(right, lambda n, c, r=record: [(n, c), *r * (n == "x")])
    entry = [m.start() for m in re.finditer(b"PK\1\2", right)][2]  # directory entry of data/0
    for label, at, value in (
        ("encrypted", 8, b"\1"),
        ("compressed", 10, b"\x08"),
        ("where another's header is", 42, bytes(4)),
        ("where no header is", 42, struct.pack("<I", 20)),
        ("behind the end", 42, b"\xff\xff\xff\0"),
        ("of another size", 24, b"\x20"),
    ):
        yield f"numbers {label}", right[: entry + at] + value + right[entry + at + len(value) :]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for k in range(60_000):
            archive.writestr(f"{k}", b"")
    yield "60,000 records", buffer.getvalue()


@pytest.mark.slow
def test_pickles_made_by_hand_raise_an_error_or_load_as_the_file_says(referee):
    """The test reads only tensors, because no config describes a model of four numbers."""
    numbers = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    cases = [(label, {"x.bin": data}) for label, data in hand_made_cases()]

    def is_as_stated(tensors, label):
        return all(torch.equal(tensor, numbers) for tensor in tensors.values())

    def read(folder):
        return read_tensors(folder / "x.bin")

    errors, loads = referee.judge(cases, read, is_as_stated)
    assert len(errors) > 60
    assert loads == [
        "torch.save: as it should be",
        "torch.jit.save: as it should be",
        "2^40 modules",
        "one tensor by 9,000 names",
        "as large a pickle as may be",
        "little-endian",
    ]


# ------------------------------------------------------------------------------------------ shards


def shard_cases(files):
    names = list(split(files["model.safetensors"])[0])[1:]
    whole = {name: "a.safetensors" for name in names}
    shards = [
        "../a.safetensors", "../../a.safetensors", "/etc/passwd", "/a.safetensors", "", ".", "..",
        "./a.safetensors", "b/../a.safetensors", "a.safetensors/", "a.safetensors\0", "a" * 300,
        "a" * 5000 + ".safetensors",
        "absent.safetensors", "config.json", "model.safetensors.index.json", "..\\a.safetensors",
        "~/a.safetensors", "http://127.0.0.1/a.safetensors", "loop.safetensors", "\ud800.bin",
        "folder.safetensors", "a.SAFETENSORS", None, 3, [], {}, ["a.safetensors"],
    ]  # fmt: skip
    for shard in shards:
        yield f"all in {shard!r:.40}", {"weight_map": dict.fromkeys(names, shard)}
        yield f"one in {shard!r:.40}", {"weight_map": whole | {names[0]: shard}}
        yield f"one more, in {shard!r:.40}", {"weight_map": whole | {"more": shard}}
    for value in VALUES:
        yield f"map {value!r:.40}", {"weight_map": value}
    yield "no map", {}
    yield "empty map", {"weight_map": {}}
    for name in names:
        yield f"{name} in two", {"weight_map": whole | {name: "again.safetensors"}}
    yield "sizes that lie", {"weight_map": whole, "metadata": {"total_size": -1}}


@pytest.mark.slow
def test_a_faulty_index_of_shards_raises_an_error_or_loads_as_the_file_says(
    referee, files, their_names
):
    directory = referee.directory
    (directory.parent / "a.safetensors").write_bytes(files["model.safetensors"])
    (directory / "loop.safetensors").symlink_to("loop.safetensors")
    (directory / "folder.safetensors").mkdir()
    data = files["model.safetensors"]
    one = {"logit_scale": torch.zeros(())}
    save_file(one, directory / "again.safetensors")
    fixed = {"model.safetensors": None, "a.safetensors": data}
    name = "model.safetensors.index.json"
    cases = [(label, json.dumps(index).encode()) for label, index in shard_cases(files)]
    cases += [(f"deep {text[:6]}", text) for text in DEEP]
    whole = json.dumps({"weight_map": {"logit_scale": "a.safetensors"}}).encode()
    cases += [(f"cut at {cut}", whole[:cut]) for cut in range(len(whole))]
    cases += [("not UTF-8", whole.replace(b"logit", b"\xff\xfe")), ("the rest unsaid", whole)]

    def is_as_stated(model, label):
        return as_safetensors_says(model, data, their_names)

    changes = [(label, fixed | {name: text}) for label, text in cases]
    errors, loads = referee.judge(changes, CLIP.from_pretrained, is_as_stated)
    assert len(errors) > 150 and len(loads) > 1


# ------------------------------------------------------------------------------------------ config


def config_cases(files):
    """Yield a label, a config, and the changed values. Each field gets each wrong value in turn."""
    config = json.loads(files["config.json"])
    places = [
        (section, key) for section in ("text_config", "vision_config") for key in config[section]
    ]
    for section, key in [
        *places,
        ("text_config", "head_dim"),
        ("vision_config", "num_register_tokens"),
    ]:
        rest = {k: v for k, v in config[section].items() if k != key}
        yield f"{section} without {key}", config | {section: rest}, {}
        for value in VALUES:
            changed = config | {section: config[section] | {key: value}}
            yield f"{section}.{key} {value!r:.40}", changed, {(section, key): value}
    for key in config:
        yield f"without {key}", {k: v for k, v in config.items() if k != key}, {}
        for value in VALUES:
            yield f"{key} {value!r:.40}", config | {key: value}, {(key,): value}
    for key in ("text_config_dict", "vision_config_dict"):
        for value in VALUES:
            yield f"{key} {value!r:.40}", config | {key: value}, {}
    for first, second in itertools.permutations(config, 2):  # two wrong entries
        for value in (5, {}, [[5]], "x"):
            yield f"{first}, {second} {value}", config | {first: value, second: value}, {}


@pytest.mark.slow
def test_a_faulty_config_raises_an_error_or_loads_as_the_file_says(referee, files, their_names):
    cases = [*config_cases(files)]
    stated = {label: values for label, _, values in cases}
    texts = [(label, json.dumps(config).encode()) for label, config, _ in cases]
    whole = files["config.json"]
    texts += [(f"deep {text[:6]}", text) for text in DEEP]
    texts += [(f"cut at {cut}", whole[:cut]) for cut in range(0, len(whole), 5)]
    texts += [("not UTF-8", whole.replace(b"clip", b"\xff\xfe")), ("a long number", b"9" * 10**5)]
    texts += [("UTF-16", whole.decode().encode("utf-16")), ("with a mark", b"\xef\xbb\xbf" + whole)]

    def is_as_stated(model, label):
        """Whether weights and changed field are as the file says. Some fields are not compared."""
        for place, value in stated.get(label, {}).items():
            found = model.config.to_dict()
            for key in place:
                found = found.get(key, value)  # skip a field that miniclip renames
            unread = value is None or place[-1] in ("architectures", "model_type", "projection_dim")
            if not unread and value not in (found, [found]):
                return False
        return as_safetensors_says(model, files["model.safetensors"], their_names)

    changes = [(label, {"config.json": text}) for label, text in texts]
    errors, loads = referee.judge(changes, CLIP.from_pretrained, is_as_stated)
    assert len(errors) > 400 and len(loads) > 50


# ----------------------------------------------------------------------------------- long files

LONG = 6 * 10**6


def long_files(files):
    """Files with megabytes in places where a real checkpoint has bytes or kilobytes."""
    config = json.loads(files["config.json"])
    vision = config["vision_config"]
    odd = {
        "heads": {"num_attention_heads": [12] * (LONG // 4)},
        "as many layers": {"num_attention_heads": [4] * 10**5, "num_hidden_layers": 10**5},
        "layers": {"num_hidden_layers": 10**6},
        "a name": {"hidden_act": "gelu" * (LONG // 4)},
        "a name that fits": {"hidden_act": "x" * 900_000},
        "nested lists": {"image_size": [[[[8] * 9] * 9] * 9] * 9},
    }
    for label, change in odd.items():
        lie = json.dumps(config | {"vision_config": vision | change}).encode()
        yield f"config.json: {label}", {"config.json": lie}
    yield "config.json of spaces", {"config.json": files["config.json"] + b" " * 4 * LONG}
    for name in ("config.json", "vocab.json", "tokenizer_config.json", "preprocessor_config.json"):
        for unit in (b'{"a":1},', b"1,"):
            for size in (LONG // 7, LONG):
                lie = b"[" + unit * (size // len(unit) - 9) + b"0]"
                yield f"{name}: {size:,} bytes of {unit}", {name: lie}
    names = {f"t{i}": f"model-{i}.safetensors" for i in range(LONG // 20)}
    for index in (names, {"t" * LONG: "a.bin"}, {"t": "a" * 900_000}):
        index = json.dumps({"weight_map": index}).encode()
        yield "shards", {"model.safetensors": None, "model.safetensors.index.json": index}
    for line in (b"aa bb\n", b"a b\n", b"\n", b"x"):
        yield f"merges {line}", {"merges.txt": line * min(299_999, LONG // 2 // len(line) - 1)}
        yield f"more merges {line}", {"merges.txt": line * (LONG // len(line))}
    vocab = json.loads(files["vocab.json"])
    yield "a token", {"vocab.json": json.dumps(vocab | {"x" * 10**6: 3}).encode()}
    settings = json.loads(files["preprocessor_config.json"])
    for key in settings:
        lie = json.dumps(settings | {key: "x" * 900_000, "do_" * 10**4: 1}).encode()
        yield f"{key}", {"preprocessor_config.json": lie}
    header, body = split(files["model.safetensors"])
    one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for name, shape, count in (("t", [0], 10**4), ("t", [0], 30_000), ("t" * 10**6, [0], 1),
                               ("t", [0] * 10**6, 1)):  # fmt: skip
        more = {f"{name}{i}": one | {"shape": shape} for i in range(count)}
        yield f"{count} entries", {"model.safetensors": join(header | more, body)}
    ids = bytes(4 * LONG)
    end = len(body) + len(ids)
    more = {"dtype": "I64", "shape": [LONG // 2], "data_offsets": [len(body), end]}
    more = {"text_model.embeddings.position_ids": more}
    yield "position ids", {"model.safetensors": join(header | more, body + ids)}


@pytest.mark.slow
def test_very_long_files_take_little_memory_and_give_short_error_messages(referee, files):
    messages = []

    def load(directory):
        try:
            return miniclip.load(directory)
        except CheckpointError as error:
            messages.append(str(error))
            raise

    errors, loads = referee.judge([*long_files(files)], load, lambda loaded, label: False)
    assert len(errors) == len(messages) > 40 and not loads
    first_lines = [message.partition("\n")[0] for message in messages]
    assert max(map(len, first_lines)) < 1000


@pytest.mark.parametrize("name", ["config.json", "merges.txt", "vocab.json", "model.safetensors"])
def test_a_named_pipe_raises_an_error_without_waiting(files, tmp_path, name):
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError):
        miniclip.load(tmp_path)


# ------------------------------------------------------------------------- tokenizer and transform


def as_merges(lines):
    return ("#version: 0.2\n" + "\n".join(lines) + "\n").encode()


def tokenizer_cases(files):
    vocab = json.loads(files["vocab.json"])
    lines = files["merges.txt"].decode().splitlines()[1:]
    last, end = len(vocab) - 1, "<|endoftext|>"

    def with_vocab(changes):
        return json.dumps({t: id for t, id in (vocab | changes).items() if id is not ...}).encode()

    for value in VALUES:
        for token in ("a", lines[0].replace(" ", ""), end):
            yield f"{token} has {value!r:.40}", {"vocab.json": with_vocab({token: value})}
        yield f"one more has {value!r:.40}", {"vocab.json": with_vocab({"more": value})}
        yield f"vocab {value!r:.40}", {"vocab.json": json.dumps(value).encode()}
    for token in list(vocab)[::7] + [end]:
        yield f"no {token}", {"vocab.json": with_vocab({token: ...})}
        yield f"{token} twice", {"vocab.json": with_vocab({token: last})}
    for at in range(len(lines)):
        yield f"merge {at} missing", {"merges.txt": as_merges(lines[:at] + lines[at + 1 :])}
        yield f"merge {at} twice", {"merges.txt": as_merges([*lines[:at], *lines[at - 1 :]])}
        yield f"gap at {at}", {"merges.txt": as_merges([*lines[:at], "", *lines[at:]])}
        for odd in ("a", "a b c", " ", "a  b", "a b ", "\ud83d".encode("utf-8", "surrogatepass"),
                    b"\xff \xfe", "x" * 10**5 + " y", "\0 \0", "a é", "#version a"):  # fmt: skip
            odd = odd if isinstance(odd, bytes) else odd.encode()
            lie = as_merges(lines).replace(lines[at].encode() + b"\n", odd + b"\n", 1)
            yield f"merge {at} is {odd[:20]}", {"merges.txt": lie}
    yield "merges backwards", {"merges.txt": as_merges(lines[::-1])}
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        yield f"no {name}", {name: None}
        for text in [*DEEP, b"", b"\0", b"\xff\xfe", files[name].decode().encode("utf-16")]:
            yield f"{name} {text[:9]}", {name: text}
        for cut in range(1, len(files[name]), len(files[name]) // 25):
            yield f"{name} cut at {cut}", {name: files[name][:cut]}
    config = json.loads(files["tokenizer_config.json"])
    for key in [*config, "added_tokens_decoder", "extra_special_tokens", "cls_token"]:
        for value in VALUES:
            lie = json.dumps(config | {key: value}).encode()
            yield f"{key} {value!r:.40}", {"tokenizer_config.json": lie}
    gone = {"vocab.json": None, "merges.txt": None}
    for value in VALUES:
        for model in (value, {"vocab": value, "merges": lines}, {"vocab": vocab, "merges": value}):
            lie = json.dumps({"model": model}).encode()
            yield f"tokenizer.json {model!r:.60}", gone | {"tokenizer.json": lie}
    simple = gzip.compress(as_merges(lines))
    for cut in range(0, len(simple), 9):
        yield (
            f"the archive cut at {cut}",
            gone | {miniclip.files.hub.OPENAI_VOCABULARY: simple[:cut]},
        )


@pytest.mark.slow
def test_a_faulty_tokenizer_raises_an_error_or_loads_as_the_files_say(referee, files):
    def is_as_stated(tokenizer, label):
        if tokenizer.encode("a cat")[:2] == [] or re.fullmatch(r"merge \d+ missing", label):
            return False
        try:
            vocab = json.loads((referee.directory / "vocab.json").read_bytes())
        except FileNotFoundError:
            return True
        lines = (referee.directory / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
        return tokenizer.vocab.items() >= vocab.items() and list(tokenizer.merges) == merges

    errors, loads = referee.judge(tokenizer_cases(files), Tokenizer.from_pretrained, is_as_stated)
    assert len(errors) > 500 and len(loads) > 20


def transform_cases(files):
    settings = json.loads(files["preprocessor_config.json"])
    name = "preprocessor_config.json"
    odd = [[0.5] * 3, [0.5, 0.5, "0.5"], [0.5, 0.5, float("nan")], {"height": 8, "width": 9}]
    odd += [{"shortest_edge": value} for value in VALUES]
    for key in [*settings, "do_pad", "resize_mode"]:
        for value in VALUES + odd:
            yield f"{key} {value!r:.40}", {name: json.dumps(settings | {key: value}).encode()}
    for text in [*DEEP, b"", b"[]", b"\xff\xfe"]:
        yield f"{text[:9]}", {name: text}
        yield f"processor {text[:9]}", {"processor_config.json": text}
    for cut in range(0, len(files[name]), 9):
        yield f"cut at {cut}", {name: files[name][:cut]}


def test_a_faulty_transform_file_raises_an_error_or_loads_as_it_says(referee, files):
    picture = torch.zeros(3, 20, 30, dtype=torch.uint8)

    def is_as_stated(transform, label):
        side = transform.crop_size
        return side > 4096 or transform(picture).shape == (3, side, side)

    cases = transform_cases(files)
    errors, loads = referee.judge(cases, ImageTransform.from_pretrained, is_as_stated)
    assert len(errors) > 300 and len(loads) > 20


def test_a_checkpoint_with_missing_or_contradictory_files_raises_an_error_or_loads(referee, files):
    """Only `load` can notice that a tokenizer has more tokens than the model embeds."""
    longer = json.loads(files["vocab.json"])
    longer |= {f"more{i}": len(longer) + i for i in range(600 - len(longer))}
    cases = [("more tokens", {"vocab.json": json.dumps(longer).encode()})]
    for name in files:
        cases.append((f"no {name}", {name: None}))
        cases.append((f"empty {name}", {name: b""}))
    errors, loads = referee.judge(cases, miniclip.load, lambda loaded, label: True)
    assert len(errors) > len(files) and len(loads) < len(cases) / 2
