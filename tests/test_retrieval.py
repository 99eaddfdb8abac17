"""Test image indexes: their images, the order of the images, and damaged or unfinished files."""

import errno
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_hostile import cpu_seconds
from twin import TINY, twins

import miniclip
from miniclip import CLIP, ImageError, ImageTransform, retrieval
from miniclip.checkpoint import Loaded
from miniclip.commands.main import main
from miniclip.files import ahead
from miniclip.retrieval import building
from miniclip.retrieval.building import build_index, embed_images, only_writer
from miniclip.retrieval.index import (
    Encoder,
    Index,
    Strings,
    describe,
    embed_query,
    fingerprint,
    lasting_name,
)
from miniclip.retrieval.pictures import find_pictures, open_member, open_picture
from miniclip.retrieval.sheet import draw_sheet
from miniclip.zeroshot.classifier import embed_texts
from miniclip.zeroshot.data import labelled_images

ENCODER = Encoder("a model", None, "0" * 64, "float32", ImageTransform(40))


@pytest.fixture(scope="module")
def loaded():
    """A model with random weights, and the tokenizer of `everyday`."""
    config = replace(TINY, text=replace(TINY.text, vocab_size=2000, eos_token_id=2))
    model = twins(config)[0]
    tokenizer = miniclip.load("everyday").tokenizer
    tokenizer.context_length = config.text.context_length
    return Loaded(model, tokenizer, ImageTransform(40))


def blots(seed, size=(50, 44)):
    """Draw large blots of colour, because all noise looks the same to a model."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def encoded(image, kind="png"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def photographs(tmp_path):
    """A folder with eleven images, four of them in a tar, and with other common files."""
    root = tmp_path / "photographs"
    (root / "b" / ".thumbnails").mkdir(parents=True)
    for i, name in enumerate(
        ["z.png", "a.JPG", "b/[1].png", "b/é.bmp", "b/x.webp", "b/y.gif", "c.tiff"]
    ):
        blots(i).convert("RGB").save(root / name)
    (root / "b" / ".thumbnails" / "z.png").write_bytes(b"")
    (root / "z.txt").write_text("a caption")
    (root / "z.json").write_text("{}")
    members = {f"{i}.png": encoded(blots(i)) for i in (7, 8, 9)}
    make_tar(
        root / "b" / "0.tar",
        {"7.txt": b"a", "7.json": b"{}"} | members | {"k/10.jpg": encoded(blots(10), "jpeg")},
    )
    return root


HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf"  # the first bytes of a HEIC file


def names(pictures, root):
    return [str(picture).removeprefix(f"{root}/") for picture in pictures]


IN_TAR = ["b/0.tar/7.png", "b/0.tar/8.png", "b/0.tar/9.png", "b/0.tar/k/10.jpg"]
IN_B = [*IN_TAR, "b/[1].png", "b/x.webp", "b/y.gif", "b/é.bmp"]


@pytest.mark.parametrize(
    "paths, found",
    [
        ([""], ["a.JPG", *IN_B, "c.tiff", "z.png"]),
        (["z.png", ""], ["z.png", "a.JPG", *IN_B, "c.tiff"]),
        (["", "z.png"], ["a.JPG", *IN_B, "c.tiff", "z.png"]),
        (["b/0.tar"], IN_TAR),
        (["z.txt"], ["z.txt"]),  # the user named this file, so its error will be reported
        (["*.png"], ["z.png"]),
        (["**/*.[pw]*"], ["b/[1].png", "b/x.webp", "z.png"]),
        (["b/[1].png"], ["b/[1].png"]),  # this is a file's name, not a pattern
        (["?"], IN_B),
    ],
)
def test_images_are_found_by_paths_and_patterns(photographs, paths, found):
    pictures, damage = find_pictures(photographs / path for path in paths)
    assert names(pictures, photographs) == found and damage == []


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "no images"),
        (lambda path: make_tar(path.with_name("x.tar"), {"a.txt": b"a"}), "no such file or folder"),
    ],
)
def test_paths_without_images_are_an_error(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        find_pictures([tmp_path / "x"])


def test_a_tar_without_images_is_an_error(tmp_path):
    make_tar(tmp_path / "x.tar", {"a.txt": b"a"})
    with pytest.raises(ValueError, match="x.tar: no images"):
        find_pictures([tmp_path / "x.tar"])


@pytest.mark.parametrize("kept, found", [(0, 0), (100, 0), (0.6, 2), (1, 4)])
def test_a_damaged_tar_is_read_up_to_the_damage(tmp_path, kept, found):
    make_tar(tmp_path / "x.tar", {f"{i}.bmp": encoded(blots(i), "bmp") for i in range(4)})
    data = (tmp_path / "x.tar").read_bytes()
    cut = data[: int(kept * 4 * (512 + 6656)) + 512 if isinstance(kept, float) else kept or None]
    (tmp_path / "x.tar").write_bytes(cut if kept != 1 else data)
    if kept == 0:
        (tmp_path / "x.tar").write_bytes(b"no tar at all, but some text" * 100)
    pictures, damage = find_pictures([tmp_path])
    assert len(pictures) in (found, found + 1)  # one more if the cut image's header is complete
    assert len(damage) == (kept != 1) and all("x.tar" in line for line in damage)


def test_find_pictures_skips_and_reports_links_in_a_tar(tmp_path):
    (tmp_path / "0.bmp").write_bytes(encoded(blots(0), "bmp"))
    (tmp_path / "hard.bmp").hardlink_to(tmp_path / "0.bmp")
    (tmp_path / "soft.bmp").symlink_to("0.bmp")
    (tmp_path / "folder").symlink_to(tmp_path)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("0.bmp", "hard.bmp", "soft.bmp", "folder"):
            tar.add(tmp_path / name, name)
    pictures, damage = find_pictures([tmp_path / "x.tar"])
    assert [picture.name for picture in pictures] == ["0.bmp"]
    links = "links are not read: hard.bmp, soft.bmp. Unpack the tar first"
    assert damage == [f"{tmp_path}/x.tar: {links}"]


def false_headers():
    """Yield (name of the fault, bytes of a tar) for each fault in a tar's header."""

    def header(name, size=0, kind=tarfile.REGTYPE, **fields):
        info = tarfile.TarInfo(name)
        info.type = kind
        data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        data[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
        data[148:156] = b"%06o\0 " % sum(data[:148] + b" " * 8 + data[156:])
        return bytes(data)

    def pax(record):
        return header("pax", len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0")

    for size in (2**40, 2**36, -512, -1024, -1):
        yield f"size {size}", header("a.bmp", size) + bytes(512)
        yield f"size {size} of no picture", header("a.txt", size) + bytes(512)
        yield f"size {size} of an unknown kind", header("a.txt", size, b"Z") + bytes(512)
        yield f"long name of {size}", header("x", size, tarfile.GNUTYPE_LONGNAME) + bytes(512)
        yield f"pax of {size}", header("x", size, tarfile.XHDTYPE) + bytes(512)
        record = f" size={size}\n".encode()
        yield f"pax says {size}", pax(b"%d" % (len(record) + 2) + record) + header("a.bmp", 9)
    yield "a record of 20 digits", pax(b"9" * 20 + b" path=a.bmp\n") + header("a.bmp", 9)
    yield "a record of 5,000 digits", pax(b"9" * 400 + b" path=a.bmp\n") + header("a.bmp", 9)
    yield "a wrong checksum", header("a.bmp", 9).replace(b"a.bmp", b"b.bmp") + bytes(512)
    yield "no header", b"some text" * 100
    yield "half a header", header("a.bmp", 9)[:200]
    name = header("x", 3, tarfile.GNUTYPE_LONGNAME) + b"ab".ljust(512, b"\0")
    yield "3,000 long names", name * 3000 + header("a.bmp", 9) + bytes(512)
    sparse = b"22 GNU.sparse.major=1\n" + b"22 GNU.sparse.minor=0\n"
    yield "a sparse map without end", pax(sparse) + header("a.bmp", 512) + b"7" * 9 + b"\n" * 503
    yield "a sparse map of 10**18", pax(sparse) + header("a.bmp", 512) + b"1" + b"0" * 18 + b"\n"
    yield "an old sparse file", header("a.bmp", 512, tarfile.GNUTYPE_SPARSE) + bytes(512)


@pytest.mark.parametrize("what, lie", [*false_headers()], ids=lambda value: str(value)[:40])
def test_a_tar_with_a_false_header_is_read_up_to_that_header(tmp_path, what, lie):
    make_tar(tmp_path / "x.tar", {"0.bmp": encoded(blots(0), "bmp")})
    data = (tmp_path / "x.tar").read_bytes()
    first = 512 + -(-len(encoded(blots(0), "bmp")) // 512) * 512
    (tmp_path / "x.tar").write_bytes(data[:first] + lie)
    with cpu_seconds(5):  # reading it takes less than 0.1 s
        pictures, damage = find_pictures([tmp_path])
    assert [picture.name for picture in pictures] == ["0.bmp"]
    assert len(damage) == 1 and "x.tar: the tar cannot be read to its end" in damage[0]


@pytest.mark.parametrize(
    "change",
    [
        {"embeddings": torch.tensor(3.0)},
        {"embeddings": torch.eye(3, dtype=torch.float64)},
        {"path_ends": torch.tensor([1, 2, 9**9])},
        {"path_ends": torch.tensor([2, 1, 3])},
        {"path_ends": torch.tensor(3)},
        {"paths": torch.zeros(3)},
        {"stamps": torch.zeros(3, 2)},
        {"stamps": torch.zeros(5, 2, dtype=torch.int64)},
        {"skipped_ends": torch.tensor([-1])},
        *({field: value} for field in Encoder._fields[:4] for value in (3, ["x"], {})),
        {"dtype": "no_grad"},
        {"dtype": "int64"},
        {"folder": 7},
        {"reference": []},
        {"transform": 5},
        {"transform": {"crop_size": "x"}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_an_invalid_index_gives_a_one_line_error(tmp_path, change):
    index = Index(torch.eye(3), Strings.pack("abc"), ENCODER)
    index.save(tmp_path / "i")
    with safe_open(tmp_path / "i", framework="pt") as file:
        about = json.loads(file.metadata()["miniclip.index"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    (name,) = change
    if name in tensors:
        tensors |= change
    else:
        about |= change
    save_file(tensors, tmp_path / "i", metadata={"miniclip.index": json.dumps(about)})
    with pytest.raises(ValueError, match="damaged") as caught:
        Index.load(tmp_path / "i")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e37, 1.5])
def test_a_search_raises_an_error_if_a_row_is_not_a_unit_vector(value):
    rows = torch.eye(3)
    rows[1, 0] = value
    with pytest.raises(ValueError, match="not unit vectors"):
        Index(rows, Strings.pack("abc"), ENCODER).search(torch.tensor([1.0, 0, 0]))


@pytest.mark.parametrize("name", ["pipe.jpg", "pipe.tar"])
def test_a_named_pipe_gives_an_error_without_waiting(tmp_path, name):
    os.mkfifo(tmp_path / name)
    blots(1).save(tmp_path / "a.png")
    pictures, damage = find_pictures([tmp_path / name, tmp_path])
    assert all("not a regular file" in line for line in damage)
    with pytest.raises(ImageError, match="not a regular file"):
        open_picture(str(tmp_path / name) + "/a.jpg" * name.endswith("tar"))


HIDDEN = [
    *("@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", ".@__thumb/a.jpg", "#recycle/a.jpg", "._a.jpg"),
    *("System Volume Information/a.jpg", "$RECYCLE.BIN/S-1/a.jpg", "__MACOSX/a.jpg"),
    *("lost+found/a.jpg", "deep/@eaDir/a.jpg"),
]


def test_find_pictures_leaves_out_hidden_files_and_system_folders(tmp_path):
    for name in (*HIDDEN, "a.jpg", "@home/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        blots(0).save(tmp_path / name)
    make_tar(tmp_path / "t.tar", {name: encoded(blots(0)) for name in (*HIDDEN, "./c.jpg")})
    expected = ["@home/b.jpg", "a.jpg", "t.tar/./c.jpg"]
    assert names(find_pictures([tmp_path])[0], tmp_path) == expected
    assert names(find_pictures([tmp_path / "**" / "*.jpg"])[0], tmp_path) == expected[:2]
    for asked in (HIDDEN[0], "@eaDir", "@eaDir/*/*.jpg"):  # the user may name hidden paths
        assert names(find_pictures([tmp_path / asked])[0], tmp_path) == HIDDEN[:1]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """Otherwise an evaluation would miss its images, and an update of an index would drop them."""
    for name in ("cat/a.png", "dog/a.png", "dog/deep/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        blots(0).save(tmp_path / name)
    scandir, closed = os.scandir, tmp_path / "dog" / "deep"

    def fail(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    says = re.escape(f"{closed}: the folder cannot be read: Permission denied")
    for find in (labelled_images, lambda root: find_pictures([root])):
        with pytest.raises(ValueError, match=says):
            find(tmp_path)
    assert names(find_pictures([tmp_path], ["deep"])[0], tmp_path) == ["cat/a.png", "dog/a.png"]


@pytest.mark.parametrize(
    "exclude, left",
    [
        (["b"], ["a.JPG", "c.tiff", "z.png"]),
        (["B", "*.jpg"], ["c.tiff", "z.png"]),  # patterns ignore upper and lower case
        (["b/"], ["a.JPG", "c.tiff", "z.png"]),
        (["*.png", "*.tar"], ["a.JPG", "b/x.webp", "b/y.gif", "b/é.bmp", "c.tiff"]),
        (["b/*.tar", "[yz].*"], ["a.JPG", "b/[1].png", "b/x.webp", "b/é.bmp", "c.tiff"]),
        (["k", "[0-9].png"], ["a.JPG", *IN_B[4:], "c.tiff", "z.png"]),  # this excludes tar images
    ],
)
def test_exclude_leaves_out_images_that_match_a_pattern(photographs, monkeypatch, exclude, left):
    assert names(find_pictures([photographs], exclude)[0], photographs) == left
    monkeypatch.chdir(photographs)
    assert list(map(str, find_pictures(["."], exclude)[0])) == left
    every = [path for path in find_pictures(["."])[0] if isinstance(path, str)]
    named = [*every, "b/0.tar"]  # a shell replaces * with all these paths
    assert sorted(map(str, find_pictures(named, exclude)[0])) == sorted(left)
    with pytest.raises(ValueError, match="all images are excluded by a b"):
        find_pictures(["b"], ["a", "b"])


def test_find_pictures_follows_a_link_once_and_opening_a_broken_link_is_an_error(tmp_path):
    folder = tmp_path / "folder"
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "a.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "round").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    expected = [str(folder / "gone.png"), str(folder / "linked" / "a.png")]
    assert find_pictures([folder]) == (expected, [])
    assert find_pictures([folder / "g*.png"]) == (expected[:1], [])
    with pytest.raises(ImageError, match="gone.png: cannot be read"):
        open_picture(expected[0])


def test_images_before_the_damaged_place_in_a_tar_can_be_opened(tmp_path):
    make_tar(tmp_path / "x.tar", {f"{i}.bmp": encoded(blots(i), "bmp") for i in range(4)})
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 2 * (512 + 6656) + 600])
    pictures, _ = find_pictures([tmp_path / "x.tar"])
    assert np.array_equal(np.asarray(open_picture(str(pictures[0]))), np.asarray(blots(0)))
    with pytest.raises(ImageError, match="3.bmp: cannot be read: .*cannot be read to its end"):
        open_picture(f"{tmp_path}/x.tar/3.bmp")


def test_a_tar_with_two_images_of_the_same_name_gives_the_later_image(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(2):
            data = encoded(blots(i))
            info = tarfile.TarInfo("same.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (picture,), _ = find_pictures([tmp_path / "x.tar"])
    for opened in (open_picture(str(picture)), open_member(picture)):
        assert np.array_equal(np.asarray(opened), np.asarray(blots(1)))


# ------------------------------------------------------------------------------------------------
# Embeddings


def test_an_index_contains_the_embeddings_that_encode_image_returns(loaded, photographs):
    pictures, _ = find_pictures([photographs])
    index = embed_images(loaded, pictures, batch=4)
    assert list(index.paths) == list(map(str, pictures)) and list(index.skipped) == []
    opened = [index.open(path) for path in index.paths]
    with torch.no_grad():
        expected = torch.cat(
            [
                loaded.model.encode_image(loaded.transform(opened[i : i + 4]), normalize=True)
                for i in range(0, 11, 4)
            ]
        )
    assert torch.equal(index.embeddings, expected)
    assert len({tuple(row) for row in expected.tolist()}) == 11


def test_a_file_that_is_not_an_index_is_not_overwritten(loaded, photographs, tmp_path):
    precious = tmp_path / "precious.jpg"
    precious.write_bytes(encoded(blots(0), "jpeg"))
    before = precious.read_bytes()
    pictures, _ = find_pictures([photographs])
    made_by = describe(loaded, "everyday")
    with pytest.raises(ValueError, match="precious.jpg: not an index of"):
        build_index(precious, loaded, pictures, made_by)
    assert precious.read_bytes() == before and not list(tmp_path.glob("precious.jpg.*"))
    for _ in range(2):
        assert len(build_index(tmp_path / "x.index", loaded, pictures, made_by)) == 11


def test_an_image_in_a_tar_has_the_same_embedding_as_the_unpacked_file(loaded, tmp_path):
    data = {f"{i}.{kind}": encoded(blots(i), kind) for i, kind in enumerate(["jpeg", "png", "gif"])}
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned by 90 degrees
    buffer = io.BytesIO()
    blots(3).save(buffer, "jpeg", exif=exif)
    data["3.jpg"] = buffer.getvalue()
    make_tar(tmp_path / "x.tar", data)
    (tmp_path / "files").mkdir()
    for name, content in data.items():
        (tmp_path / "files" / name).write_bytes(content)
    inside, beside = (
        embed_images(loaded, find_pictures([tmp_path / name])[0]) for name in ("x.tar", "files")
    )
    assert torch.equal(inside.embeddings, beside.embeddings)


def test_embed_images_skips_unreadable_images_and_lists_them(loaded, photographs, tmp_path):
    good = embed_images(loaded, find_pictures([photographs])[0])
    (photographs / "b" / "empty.png").write_bytes(b"")
    (photographs / "cut.png").write_bytes((photographs / "z.png").read_bytes()[:60])
    make_tar(photographs / "1.tar", {"no.jpg": b"not a picture", "thin.png": encoded(thin())})
    index = embed_images(loaded, find_pictures([photographs])[0])
    assert list(index.paths) == list(good.paths)
    assert len(index.skipped) == 4
    for name, reason in zip(
        ["1.tar/no.jpg", "1.tar/thin.png", "b/empty.png", "cut.png"], index.skipped, strict=True
    ):
        assert str(photographs / name) in reason
    torch.testing.assert_close(index.embeddings, good.embeddings)


def thin():
    """Return an image that is too thin to be resized. It would get 40 x 12,000,000 pixels."""
    return Image.new("1", (1, 300_000))


def test_a_bfloat16_model_gives_unit_vectors_in_float32(loaded, photographs):
    single = embed_images(loaded, find_pictures([photographs])[0])
    model = twins(loaded.model.config, dtype=torch.bfloat16)[0]
    half = embed_images(loaded._replace(model=model), find_pictures([photographs])[0])
    assert half.embeddings.dtype == torch.float32 and half.encoder.dtype == "bfloat16"
    assert (half.embeddings.norm(dim=1) - 1).abs().max() < 1e-6
    assert (half.embeddings * single.embeddings).sum(1).min() > 0.99
    assert not torch.equal(half.embeddings, single.embeddings)


def test_a_nan_embedding_of_an_image_is_an_error(loaded, photographs):
    model = twins(loaded.model.config)[0]
    model.vision.ln_post.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match="NaN, infinite or zero"):
        embed_images(loaded._replace(model=model), find_pictures([photographs])[0])


def test_a_nan_embedding_of_a_text_is_an_error(loaded):
    """Comparisons with NaN are false, so each caption's rank would be 1."""
    model = twins(loaded.model.config)[0]
    model.text.ln_final.bias.data[0] = torch.inf
    says = "NaN, infinite or zero: the model overflows in torch.float32"
    with pytest.raises(ValueError, match=says):
        embed_query(loaded._replace(model=model), ["a ship"])
    with pytest.raises(ValueError, match=says):
        embed_texts(model, loaded.tokenizer, ["a ship"])


def test_an_index_is_float32_for_any_default_dtype(loaded, photographs, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        pictures, encoder = find_pictures([photographs])[0], describe(loaded, "a model")
        index = build_index(tmp_path / "i", loaded, pictures, encoder)
        index.search(embed_query(loaded, ["a ship"]))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_full_disk_is_an_error(loaded, photographs, tmp_path, monkeypatch):
    """A write to a mapped file on a full disk would end Python with a bus error."""

    def fail(file, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail, raising=False)
    with pytest.raises(ValueError, match="embeddings: cannot save here: .*No space left on device"):
        build_index(
            tmp_path / "i", loaded, find_pictures([photographs])[0], describe(loaded, "a model")
        )


@pytest.mark.parametrize("options", [{"batch": 0}, {"workers": 0}])
def test_zero_workers_or_a_batch_size_of_zero_is_an_error(loaded, photographs, options):
    with pytest.raises(ValueError, match="is 0; expected at least 1"):
        embed_images(loaded, [str(photographs / "z.png")], **options)


# ------------------------------------------------------------------------------------------------
# The file


def index_of(rows, **options):
    paths = Strings.pack(f"{i}.jpg" for i in range(len(rows)))
    return Index(rows, paths, options.pop("encoder", ENCODER), **options)


def test_a_loaded_index_equals_the_saved_index(tmp_path):
    strange = ["a.jpg", "", "ü/日本.png", "line\nbreak", os.fsdecode(b"\xff\xfe.gif"), "z"]
    encoder = Encoder("m", "c0ffee", "1" * 64, "bfloat16", ImageTransform(3, reference="openai"))
    rows = torch.randn(6, 5)
    Index(rows, Strings.pack(strange), encoder, ["x: bad"], "/home").save(tmp_path / "i")
    index = Index.load(tmp_path / "i")
    assert torch.equal(index.embeddings, rows) and len(index) == 6
    assert list(index.paths) == strange and index.paths[-1] == "z"
    assert list(index.skipped) == ["x: bad"]
    assert (index.encoder, index.folder) == (encoder, "/home")
    with pytest.raises(IndexError):
        index.paths[6]
    index_of(rows[:0]).save(tmp_path / "i")
    assert len(Index.load(tmp_path / "i")) == 0


def test_a_failed_save_leaves_the_old_index_unchanged(tmp_path, monkeypatch):
    index_of(torch.eye(3)).save(tmp_path / "i")
    monkeypatch.setattr(retrieval.index, "save_file", lambda *args, **kw: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index_of(torch.ones(2, 2)).save(tmp_path / "i")
    assert torch.equal(Index.load(tmp_path / "i").embeddings, torch.eye(3))
    assert [path.name for path in tmp_path.iterdir()] == ["i"]


def test_an_index_is_read_again_if_a_save_replaces_it_during_the_read(tmp_path, monkeypatch):
    """safetensors opens a file twice, first for its header and then for its numbers. Here, a new
    index is saved after the first opening."""
    new = replace(index_of(torch.eye(3).flip(0)), encoder=ENCODER._replace(model="another"))
    index_of(torch.eye(3)).save(tmp_path / "i")
    times = []

    @contextmanager
    def opened(path, framework):
        with safe_open(path, framework=framework) as header:
            if not times:
                new.save(path)
            times.append(path)
            with safe_open(path, framework=framework) as numbers:
                yield SimpleNamespace(
                    metadata=header.metadata, keys=header.keys, get_tensor=numbers.get_tensor
                )

    monkeypatch.setattr(retrieval.index, "safe_open", opened)
    index = Index.load(tmp_path / "i")
    assert index.encoder == new.encoder and torch.equal(index.embeddings, new.embeddings)
    assert len(times) == 2


def damaged(path, how):
    if how == "text":
        path.write_text("no index")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif how == "weights":
        save_file({"weight": torch.ones(3)}, path)
    elif how == "absent":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
        if how == "rows":
            tensors["embeddings"] = tensors["embeddings"][:2].clone()
        elif how == "half":
            tensors["embeddings"] = tensors["embeddings"].half()
        elif how == "about":
            about = {"miniclip.index": "{}"}
        save_file(tensors, path, metadata=about)


@pytest.mark.parametrize(
    "how", ["text", "cut", "weights", "absent", "folder", "rows", "half", "about"]
)
def test_loading_a_file_that_is_not_an_index_is_an_error(tmp_path, how):
    index_of(torch.eye(3)).save(tmp_path / "index.safetensors")
    damaged(tmp_path / "index.safetensors", how)
    with pytest.raises(ValueError, match="index.safetensors: "):
        Index.load(tmp_path / "index.safetensors")


# ------------------------------------------------------------------------------------------------
# The search


def unit_rows(n, width, seed=0):
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows)


def best_by_float64(rows, query, k):
    """Find the `k` rows with the highest scores in plain Python, which computes in float64."""
    scores = [
        math.fsum(a * b for a, b in zip(row, query, strict=True)) for row in rows.double().tolist()
    ]
    return sorted(range(len(rows)), key=lambda i: (-scores[i], i))[:k]


@pytest.mark.parametrize("block", [1, 7, 64, 8192])
@pytest.mark.parametrize("k", [1, 5, 300, 1000])
def test_the_search_is_exact(monkeypatch, block, k):
    monkeypatch.setattr(retrieval.index, "BLOCK", block)
    rows, query = unit_rows(300, 48), unit_rows(1, 48, seed=1)[0]
    hits = index_of(rows).search(query, k)
    assert [hit.row for hit in hits] == best_by_float64(rows, query.tolist(), k)
    for hit in hits:
        assert hit.path == f"{hit.row}.jpg"
        expected = (rows[hit.row].double() @ query.double()).item()
        assert hit.score == pytest.approx(expected, abs=1e-12)


def crowd(n=1500, width=256):
    """Return (rows, query). The cosines are too similar to sort the rows in float32."""
    query = unit_rows(1, width, seed=1)[0]
    return torch.nn.functional.normalize(query + 2e-4 * unit_rows(n, width, seed=2)), query


def test_the_search_is_exact_even_if_float32_would_sort_the_rows_wrongly(monkeypatch):
    monkeypatch.setattr(retrieval.index, "BLOCK", 128)
    rows, query = crowd()
    expected = best_by_float64(rows, query.tolist(), 10)
    assert [hit.row for hit in index_of(rows).search(query, 10)] == expected
    assert (rows @ query).argsort(descending=True, stable=True)[:10].tolist() != expected


def test_hits_with_equal_scores_have_the_same_order_as_in_the_index(monkeypatch):
    monkeypatch.setattr(retrieval.index, "BLOCK", 50)
    rows = unit_rows(3, 32).repeat(200, 1)
    query = rows[1]
    hits = index_of(rows).search(query, 250)
    assert [hit.row for hit in hits[:200]] == list(range(1, 600, 3))
    assert len({hit.score for hit in hits[:200]}) == 1


def test_a_query_vector_of_any_norm_finds_the_same_rows(monkeypatch):
    monkeypatch.setattr(retrieval.index, "BLOCK", 128)
    rows, query = crowd()
    expected = [hit.row for hit in index_of(rows).search(query, 10)]
    for length in (1e-4, 1e4):
        found = index_of(rows).search(query.double() * length, 10)
        assert [hit.row for hit in found] == expected


@pytest.mark.parametrize(
    "query, k", [(torch.ones(3), 1), (torch.ones(1, 4), 1), (torch.ones(4), 0)]
)
def test_a_query_of_the_wrong_shape_or_a_k_of_0_is_an_error(query, k):
    with pytest.raises(ValueError, match="expected"):
        index_of(torch.eye(4)).search(query, k)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_search_needs_memory_for_only_one_block_of_rows(tmp_path):
    index_of(unit_rows(200_000, 128)).save(tmp_path / "i")  # 102 MB
    script = f"""
import re, torch
from miniclip.retrieval.index import Index
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.ones(9) @ torch.ones(9)
before = anonymous()
index = Index.load({str(tmp_path / "i")!r})
found = index.search(index.embeddings[150_000], 5)
print(found[0].row, anonymous() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    row, kilobytes = map(int, done.stdout.split())
    assert row == 150_000 and kilobytes < 25_000, done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")  # from faiss
def test_faiss_reads_an_index_and_finds_the_same_rows_as_the_search(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    index_of(unit_rows(3000, 64)).save("index.safetensors")
    index, query = Index.load("index.safetensors"), unit_rows(1, 64, seed=1)[0]
    (code,) = re.findall(r"^    import faiss\n(?:(?:    .*)?\n)*?(?=\S)", retrieval.__doc__, re.M)
    assert len(code.strip().splitlines()) <= 10
    exec(re.sub("^    ", "", code, flags=re.M), {"index": index, "query": query})
    assert capsys.readouterr().out == f"{[hit.path for hit in index.search(query, 12)]}\n"


# ------------------------------------------------------------------------------------------------
# The right model


def test_the_fingerprint_depends_on_every_weight(loaded):
    model = twins(loaded.model.config)[0]
    first = fingerprint(model)
    assert first == fingerprint(loaded.model) and len(first) == 64
    seen = {first}
    for parameter in model.parameters():
        value = parameter.data.view(-1)[-1].clone()
        parameter.data.view(-1)[-1] += 1e-3
        seen.add(fingerprint(model))
        parameter.data.view(-1)[-1] = value
    assert len(seen) == 1 + len(list(model.parameters()))
    assert fingerprint(model) == first
    assert fingerprint(model.double()) not in seen
    for parameter in model.parameters():
        parameter.data.zero_()  # zeros have the same bytes in both dtypes
    assert fingerprint(model.half()) != fingerprint(model.bfloat16())


def test_the_fingerprint_depends_on_the_settings_and_not_only_on_the_weights(loaded):
    vision = loaded.model.config.vision
    models = [
        CLIP(replace(loaded.model.config, vision=replace(vision, **change)))
        for change in ({}, {"act": "gelu"}, {"heads": vision.heads * 2}, {"ln_eps": 1e-6})
    ]
    for model in models:
        model.load_state_dict(loaded.model.state_dict())
    first, *others = map(fingerprint, models)
    assert first == fingerprint(loaded.model) == fingerprint(torch.nn.DataParallel(loaded.model))
    assert len({first, *others}) == 4
    models[0].vision.blocks[1].mlp.act = torch.nn.GELU("tanh")
    assert fingerprint(models[0]) not in (first, *others)


def test_check_raises_an_error_that_names_both_models_if_they_differ(loaded):
    index = index_of(torch.eye(3), encoder=describe(loaded, "the first"))
    index.check(loaded)
    other = twins(loaded.model.config, seed=1)[0]
    with pytest.raises(
        ValueError, match="by the first .fingerprint .*not by the second .fingerprint"
    ):
        index.check(loaded._replace(model=other), "the second")
    with pytest.raises(ValueError, match="float32.*bfloat16"):
        model = twins(loaded.model.config)[0].bfloat16()
        index.check(loaded._replace(model=model))
    with pytest.raises(ValueError, match="ImageTransform.*size=40.*ImageTransform.*size=41"):
        index.check(loaded._replace(transform=ImageTransform(41, crop_size=40)))
    with pytest.raises(ValueError, match="openai"):
        index.check(loaded._replace(transform=ImageTransform(40, reference="openai")))


def test_load_encoder_loads_the_model_with_the_options_of_the_index():
    loaded = miniclip.load("everyday", dtype=torch.bfloat16, reference="openai")
    again = index_of(torch.eye(3), encoder=describe(loaded, "everyday")).load_encoder()
    assert again.model.logit_scale.dtype == torch.bfloat16
    assert again.transform.reference == again.tokenizer.reference == "openai"


def test_lasting_name_returns_an_absolute_path_or_a_commit(tmp_path, monkeypatch):
    assert lasting_name("everyday") == ("everyday", None)
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    assert lasting_name("model") == (str(tmp_path / "model"), None)
    snapshot = tmp_path / "models--openai--clip" / "snapshots" / "c0ffee"
    monkeypatch.setattr(retrieval.index, "resolve", lambda *args, **kwargs: snapshot)
    assert lasting_name("openai/clip", "main") == ("openai/clip", "c0ffee")


# ------------------------------------------------------------------------------------------------
# Queries


def test_a_query_is_the_sum_and_the_difference_of_unit_vectors(loaded, tmp_path):
    for i in (1, 2):
        blots(i).save(tmp_path / f"{i}.png")
    one, two = (str(tmp_path / f"{i}.png") for i in (1, 2))
    model, tokenizer, transform = loaded
    with torch.no_grad():
        texts = model.encode_text(tokenizer(["a cat", "a dog", "a frog"]), normalize=True)
        pictures = model.encode_image(transform([one, two]), normalize=True)
    for query, expected in [
        (embed_query(loaded, ["a cat"]), texts[0]),
        (embed_query(loaded, "a cat"), texts[0]),  # one text, not five letters
        (embed_query(loaded, pictures=[one]), pictures[0]),
        (embed_query(loaded, minus=["a dog"]), -texts[1]),
        (
            embed_query(loaded, ["a cat", "a frog"], [one], ["a dog"], [two]),
            texts[0] - texts[1] + texts[2] + pictures[0] - pictures[1],
        ),
    ]:
        torch.testing.assert_close(query, expected / expected.norm())
        assert not query.requires_grad


@pytest.mark.parametrize(
    "texts, minus, message",
    [
        ([], [], "the query is zero"),
        (["a cat"], ["a cat"], "the query is zero"),
        (["a cat", " "], [], "a text is empty"),
        (["a cat"], [""], "a text is empty"),
        (["a cat " * 50], [], "tokens"),
    ],
)
def test_a_query_that_is_zero_or_empty_or_too_long_is_an_error(loaded, texts, minus, message):
    with pytest.raises(ValueError, match=message):
        embed_query(loaded, texts, minus=minus)


def test_a_query_image_that_cannot_be_read_is_an_error(loaded, tmp_path):
    with pytest.raises(ImageError, match="absent.png"):
        embed_query(loaded, pictures=[str(tmp_path / "absent.png")])


@pytest.mark.sweep(3)
@pytest.mark.parametrize("k", [1, 3, 11])
def test_a_sheet_shows_the_image_of_each_hit(loaded, photographs, tmp_path, k):
    index = embed_images(loaded, find_pictures([photographs])[0])
    hits = index.search(index.embeddings[0], k)
    assert draw_sheet(index, hits, "a title that is far too long" * 20, tmp_path / "s.png") == []
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width == min(k, 4) * 256 + 16
        for i in range(k):  # the middle of each tile is the middle of its image
            place = (16 + i % 4 * 256 + 120, 54 + i // 4 * 300 + 120)
            shown, true = sheet.getpixel(place), index.open(hits[i].path).convert("RGB")
            middle = true.resize(
                (1, 1),
                box=(
                    true.width / 2 - 1,
                    true.height / 2 - 1,
                    true.width / 2 + 1,
                    true.height / 2 + 1,
                ),
            )
            assert np.abs(np.subtract(shown, middle.getpixel((0, 0)))).max() < 12


def test_a_sheet_cuts_the_start_of_long_names_and_the_end_of_long_titles(
    loaded, tmp_path, monkeypatch
):
    written = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *args: written.append(args[2]))
    monkeypatch.chdir(tmp_path)
    pictures = [20 * "long " + "end.png", "short.png"]
    for i, path in enumerate(pictures):
        blots(i).save(path)
    index = embed_images(loaded, pictures)
    hits = index.search(index.embeddings[0], 2)
    draw_sheet(index, hits, "a title " * 50, tmp_path / "s.png")
    title, first, long, second, short = written
    assert title.startswith("a title a title") and title.endswith("…")
    assert (first, second) == ("1   1.000", f"2   {hits[1].score:.3f}")
    assert long.startswith("…") and long.endswith(" end.png") and short == "short.png"


def test_a_sheet_has_empty_places_for_missing_images(loaded, photographs, tmp_path):
    index = embed_images(loaded, find_pictures([photographs])[0])
    hits = index.search(index.embeddings[0], 11)
    (photographs / "z.png").unlink()
    (photographs / "b" / "0.tar").unlink()
    lost = draw_sheet(index, hits, "", tmp_path / "s.png")
    assert len(lost) == 5 and sum("0.tar/k/10.jpg" in reason for reason in lost) == 1
    with pytest.raises(ValueError, match="cannot be written"):
        draw_sheet(index, hits, "", tmp_path / "absent" / "s.png")
    with pytest.raises(ValueError, match="cannot be written"):
        draw_sheet(index, hits, "", tmp_path / "s.nothing")


# ------------------------------------------------------------------------------------------------
# Builds that are interrupted, or that find the parts of a different build


@pytest.fixture
def build(loaded, photographs, monkeypatch):
    monkeypatch.setattr(retrieval.building, "PART", 4)

    def build(out, pictures=None, batch=2, damage=(), model=loaded, **options):
        pictures = find_pictures([photographs])[0] if pictures is None else pictures
        return build_index(
            out, model, pictures, describe(model, "tiny"), damage, batch=batch, **options
        )

    return build


@pytest.fixture
def interrupt(build, tmp_path, monkeypatch):
    """Start to build an index, and stop after some parts are saved."""

    def interrupt(parts, **options):
        save, saved = Index.save, []

        def interrupted(index, path):
            save(index, path)
            saved.append(path)
            if len(saved) == parts:
                raise KeyboardInterrupt

        monkeypatch.setattr(Index, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "i", **options)
        monkeypatch.setattr(Index, "save", save)

    return interrupt


def test_build_index_gives_the_same_embeddings_as_embed_images(
    build, loaded, photographs, tmp_path
):
    (photographs / "a.png").write_bytes(b"")
    built = build(tmp_path / "i", damage=["a tar"])
    whole = embed_images(loaded, find_pictures([photographs])[0])
    assert list(built.paths) == list(whole.paths)
    torch.testing.assert_close(built.embeddings, whole.embeddings)
    assert list(built.skipped) == ["a tar", *whole.skipped] and len(whole.skipped) == 1
    assert not (tmp_path / "i.parts").exists()


def test_a_new_build_continues_an_interrupted_build(
    build, interrupt, tmp_path, monkeypatch, capsys
):
    build(tmp_path / "whole")
    interrupt(parts=2)
    assert len(list((tmp_path / "i.parts").glob("*.safetensors"))) == 2
    assert not (tmp_path / "i").exists()
    save, saved = Index.save, []
    monkeypatch.setattr(Index, "save", lambda index, path: [save(index, path), saved.append(path)])
    capsys.readouterr()
    build(tmp_path / "i")
    assert "continued after 2 of 3 parts" in capsys.readouterr().err
    assert len(saved) == 2  # only the third part and the whole index were missing
    assert (tmp_path / "i").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "i.parts").exists()


@pytest.mark.parametrize("changed", ["batch", "pictures", "picture", "folder", "part"])
def test_a_build_ignores_the_parts_of_a_different_build(
    build, interrupt, photographs, tmp_path, monkeypatch, changed
):
    """A build ignores the parts that a different build saved. The user need not delete them."""
    monkeypatch.chdir(tmp_path)
    interrupt(parts=3)
    options = {}
    if changed == "batch":
        options["batch"] = 3
    elif changed == "pictures":
        options["pictures"] = find_pictures([photographs])[0][1:]
    elif changed == "picture":
        blots(50).save(photographs / "a.JPG")
    elif changed == "folder":
        monkeypatch.chdir(photographs)
    else:
        monkeypatch.setattr(retrieval.building, "PART", 3)
    build(tmp_path / "i", **options)
    build(tmp_path / "fresh", **options)
    assert (tmp_path / "i").read_bytes() == (tmp_path / "fresh").read_bytes()
    assert not (tmp_path / "i.parts").exists()


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("changed", ["weights", "dtype", "transform", "reference"])
def test_a_build_replaces_an_index_of_a_different_model_only_with_force(
    build, interrupt, loaded, tmp_path, changed, whole
):
    """Without `force`, a finished index or the parts of an unfinished index stay as they are."""
    if whole:
        build(tmp_path / "i")
    else:
        interrupt(parts=1)
    other = loaded._replace(model=twins(loaded.model.config, seed=1)[0])
    if changed == "dtype":
        other = loaded._replace(model=twins(loaded.model.config, dtype=torch.bfloat16)[0])
    elif changed == "transform":
        other = loaded._replace(transform=ImageTransform(40, image_std=(1, 1, 1)))
    elif changed == "reference":
        other = loaded._replace(transform=ImageTransform(40, reference="openai"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="was made by tiny.*, not by tiny.*--force") as raised:
        build(tmp_path / "i", model=other)
    assert str(raised.value).startswith(str(tmp_path / "i"))
    assert {path: path.read_bytes() for path in before} == before
    build(tmp_path / "i", model=other, force=True)
    build(tmp_path / "fresh", model=other)
    assert (tmp_path / "i").read_bytes() == (tmp_path / "fresh").read_bytes()


# ------------------------------------------------------------------------------------------------
# Updates


@pytest.fixture
def embedded(monkeypatch):
    """A list of the images that a build decodes for the model, in any order."""
    seen, real = [], retrieval.building.pixels_of

    def pixels_of(source, transform):
        seen.append(str(source))
        return real(source, transform)

    monkeypatch.setattr(retrieval.building, "pixels_of", pixels_of)
    return seen


def test_an_update_embeds_new_and_changed_images_and_copies_the_other_embeddings(
    build, loaded, photographs, tmp_path, embedded, capsys
):
    before = build(tmp_path / "i")
    rows = dict(zip(before.paths, before.embeddings.clone(), strict=True))
    del embedded[:]
    blots(20).save(photographs / "new.png")
    (photographs / "b" / "deep").mkdir()
    blots(21).save(photographs / "b" / "deep" / "new.png")
    (photographs / "z.png").unlink()
    (photographs / "c.tiff").rename(photographs / "d.tiff")
    blots(22).save(photographs / "a.JPG")
    (photographs / "b" / "x.webp").write_bytes(b"no picture any more")
    capsys.readouterr()
    after = build(tmp_path / "i")
    new = ["a.JPG", "b/deep/new.png", "b/x.webp", "d.tiff", "new.png"]
    assert sorted(embedded) == [str(photographs / name) for name in new]
    assert "updated, 7 of 12 images" in capsys.readouterr().err
    expected = find_pictures([photographs])[0]
    gone = str(photographs / "b" / "x.webp")
    assert list(after.paths) == [str(path) for path in expected if str(path) != gone]
    (reason,) = after.skipped
    assert gone in reason
    kept = [path for path in after.paths if path in rows and path not in embedded]
    assert len(kept) == 7
    found = dict(zip(after.paths, after.embeddings, strict=True))
    assert all(torch.equal(found[path], rows[path]) for path in kept)
    whole = embed_images(loaded, expected)
    torch.testing.assert_close(after.embeddings, whole.embeddings)
    assert torch.equal(after.stamps, whole.stamps)

    del embedded[:]
    bits = (tmp_path / "i").read_bytes()
    again = build(tmp_path / "i")
    assert embedded == [gone]  # this image is tried again, because it may have been repaired
    assert (tmp_path / "i").read_bytes() == bits and len(again) == len(after)


def test_an_update_notices_a_changed_file_of_the_same_size(build, photographs, tmp_path, embedded):
    build(tmp_path / "i")
    z = photographs / "z.png"
    size, then = z.stat().st_size, z.stat().st_mtime_ns
    pixels = np.asarray(Image.open(z))[::-1]
    Image.fromarray(pixels).save(z)
    z.write_bytes(z.read_bytes().ljust(size, b" ")[:size])
    os.utime(z, ns=(then, then + 1))
    del embedded[:]
    build(tmp_path / "i")
    assert embedded == [str(z)]


def test_an_update_reads_a_changed_tar_again(build, photographs, tmp_path, embedded):
    build(tmp_path / "i")
    make_tar(photographs / "b" / "0.tar", {f"{i}.png": encoded(blots(i)) for i in (7, 30)})
    del embedded[:]
    after = build(tmp_path / "i")
    in_tar = [str(photographs / "b" / "0.tar" / name) for name in ("30.png", "7.png")]
    assert sorted(embedded) == in_tar
    assert [path for path in after.paths if ".tar" in path] == in_tar[::-1]


def test_force_embeds_everything_again(build, interrupt, tmp_path, embedded):
    """The first forced build finds parts of an interrupted build, and the second finds an index."""
    build(tmp_path / "whole")
    interrupt(parts=1)
    for _ in range(2):
        del embedded[:]
        build(tmp_path / "i", force=True)
        assert len(embedded) == 11
        assert (tmp_path / "i").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_killed_update_leaves_the_old_index_unchanged_and_can_be_continued(
    build, interrupt, photographs, tmp_path, embedded
):
    build(tmp_path / "i")
    for i in range(6):
        blots(40 + i).save(photographs / f"new{i}.png")
    old = (tmp_path / "i").read_bytes()
    (tmp_path / "j").write_bytes(old)
    build(tmp_path / "j")
    interrupt(parts=1)
    assert (tmp_path / "i").read_bytes() == old
    del embedded[:]
    build(tmp_path / "i")
    assert sorted(Path(path).name for path in embedded) == ["new4.png", "new5.png"]
    assert (tmp_path / "i").read_bytes() == (tmp_path / "j").read_bytes()


def test_an_update_does_not_embed_images_again_if_their_folder_has_moved(
    build, photographs, tmp_path, monkeypatch, embedded
):
    """An update compares old and new paths as the user wrote them. A relative path is still
    the same after the folder has moved."""
    monkeypatch.chdir(photographs)
    build("i", pictures=find_pictures(["."])[0])
    photographs.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    del embedded[:]
    index = build("i", pictures=find_pictures(["."])[0])
    assert embedded == [] and len(index) == 11
    assert np.array_equal(np.asarray(index.open("z.png")), np.asarray(blots(0)))


@pytest.mark.slow
def test_the_workers_option_sets_the_number_of_threads(
    build, loaded, photographs, tmp_path, monkeypatch, two_threads
):
    pools, real = [], ahead.ThreadPoolExecutor

    def pool(threads):
        pools.append(threads)
        return real(threads)

    monkeypatch.setattr(ahead, "ThreadPoolExecutor", pool)
    pictures, _ = find_pictures([photographs])
    embed_images(loaded, pictures, workers=3)
    build_index(tmp_path / "i", loaded, pictures, describe(loaded, "tiny"), workers=4)
    embed_images(loaded, pictures)
    assert pools == [3, 4, 2]


def test_a_build_raises_an_error_while_another_process_builds_the_same_index(build, tmp_path):
    """As soon as the first build has ended, a new build works."""
    out = tmp_path / "index"
    with only_writer(tmp_path / "index.parts"):
        with pytest.raises(ValueError, match="another process is writing here"):
            build(out)
    assert len(build(out)) and not (tmp_path / "index.parts").exists()


def test_a_build_is_an_error_if_no_image_can_be_read(build, photographs, tmp_path):
    with pytest.raises(ValueError, match="images can be read: 2 errors; the first: .*z.txt"):
        build(tmp_path / "i", pictures=[str(photographs / name) for name in ("z.txt", "z.json")])
    assert not (tmp_path / "i").exists() and not (tmp_path / "i.parts").exists()


KILLED = """
import os, signal
from miniclip.commands.main import main
from miniclip.retrieval import building
def save_and_die(index, path):
    save(index, path)
    if path.name.startswith("000001-"):
        os.kill(os.getpid(), signal.SIGKILL)
building.PART, save, building.Index.save = 8, building.Index.save, save_and_die
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_embed_command_continues_if_it_is_run_again(loaded, tmp_path, monkeypatch, capsys):
    """A folder with 17 images, a broken image and a tar of five images makes three parts."""
    many, out = tmp_path / "many", tmp_path / "out"
    many.mkdir()
    out.mkdir()
    for i in range(17):
        blots(i).save(many / f"{i:02}.png")
    (many / "broken.png").write_bytes(b"")
    make_tar(many / "x.tar", {f"{i}.png": encoded(blots(20 + i)) for i in range(5)})
    miniclip.save(tmp_path / "model", *loaded)
    assert building.PART == 512  # a killed `embed` loses at most this many images
    monkeypatch.setattr(building, "PART", 8)
    line = ["embed", str(many), "--model", str(tmp_path / "model"), "--out"]
    assert main([*line, str(tmp_path / "whole")]) == 0

    line.append(str(out / "i"))
    done = subprocess.run([sys.executable, "-c", KILLED, *line], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "i").exists()
    assert [len(Index.load(path)) for path in sorted(out.glob("i.parts/*"))] == [8, 8]
    capsys.readouterr()
    assert main(line) == 0
    said, err = capsys.readouterr()
    assert "continued after 2 of 3 parts" in err
    assert "miniclip: skipped 1 file; the index lists the reasons. The first: " in err
    assert "broken.png" in err
    assert said.startswith(f"{out / 'i'}: 22 images, by {tmp_path / 'model'} (fingerprint ")
    assert (out / "i").read_bytes() == (tmp_path / "whole").read_bytes()
    assert [path.name for path in out.iterdir()] == ["i"]


# ------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def run(capsys):
    def run(*argv):
        try:
            status = main(list(map(str, argv)))
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """An index of eleven images. The last image is z.png."""
    folder = tmp_path_factory.mktemp("indexed")
    for i in range(10):
        blots(i).save(folder / f"{i}.png")
    blots(10).save(folder / "z.png")
    line = ["embed", folder, "--model", "everyday", "--out", folder / "index.safetensors"]
    assert main(list(map(str, line))) == 0
    return folder / "index.safetensors"


def test_embed_excludes_images_and_counts_unreadable_images_and_updates_the_index(
    run, photographs, tmp_path
):
    for name in ("1.heic", "2.HEIC", "b/3.NEF", "4.png"):
        (photographs / name).write_bytes(HEIC if name.endswith(("c", "C")) else b"nothing")
    line = ["embed", photographs, "--model", "everyday", "--out", tmp_path / "i"]
    status, out, err = run(*line, "--exclude", "b", "--exclude", "*.tiff")
    assert status == 0 and "2 images, by everyday" in out
    counts = re.findall(
        r"skipped (\d+) files?; the index lists the reasons\. The first: \S*/(\S+):", err
    )
    if "HEIF" not in Image.OPEN:
        assert counts == [("2", "1.heic"), ("1", "4.png")]
        assert "pip install pillow-heif" in err
    status, out, err = run(*line)
    assert status == 0 and "11 images" in out and "updated, 2 of 15 images" in err
    if "rawpy" not in sys.modules:
        assert re.search(r"skipped 1 file; .*3.NEF: .*pip install rawpy", err)
    status, out, err = run(*line, "--exclude", "b")  # an update removes excluded images
    assert status == 0 and "3 images" in out and "updated, 3 of 6 images" in err
    status, out, err = run(*line[:-3], "shapes", "--out", tmp_path / "i")
    assert status == 2 and err.count("\n") == 1 and "everyday" in err and "--force" in err
    status, out, err = run(*line[:-3], "shapes", "--out", tmp_path / "i", "--force")
    assert status == 0 and "11 images, by shapes" in out


def test_search_prints_the_nearest_images(run, indexed):
    z = indexed.with_name("z.png")
    status, out, err = run("search", indexed, "--image", z, "-k", 3)
    assert status == 0 and re.fullmatch(r"11 images searched in \d+\.\d\d s\n", err)
    assert len(out.splitlines()) == 3
    assert out.splitlines()[0].split() == ["1", "1.0000", str(z)]
    query = embed_query(miniclip.load("everyday"), ["a cat"], minus=["a dog"])
    expected = [hit._asdict() for hit in Index.load(indexed).search(query, 12)]
    status, out, err = run("search", indexed, "a cat", "--minus", "a dog", "--json")
    assert (status, json.loads(out)) == (0, expected) and len(expected) == 11


def test_search_draws_a_sheet_in_any_working_directory(run, photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(photographs)
    run("embed", ".", "--model", "everyday", "--out", "index.safetensors")
    monkeypatch.chdir(tmp_path)
    line = ["search", photographs / "index.safetensors", "a cat", "--out", tmp_path / "s.png"]
    status, out, err = run(*line)
    assert status == 0 and err.startswith(f"picture: {tmp_path / 's.png'}\n") and "z.png" in out
    (photographs / "z.png").unlink()
    status, out, err = run(*line)
    assert status == 0 and "not in the picture" in err and "z.png" in err


def test_search_with_a_different_model_is_an_error_that_names_both_models(run, indexed):
    status, out, err = run("search", indexed, "a cat", "--model", "shapes")
    assert status == 2 and err.startswith("miniclip: error: ") and err.count("\n") == 1
    assert "by everyday" in err and "not by shapes" in err
    assert run("search", indexed, "a cat", "--model", "everyday")[0] == 0


@pytest.mark.parametrize(
    "argv, words",
    [
        (["search", "INDEX"], ["no query"]),
        (["search", "absent", "a cat"], ["absent", "no such file", "miniclip embed"]),
        (["search", "PHOTO", "a cat"], ["z.png", "not an index"]),
        (["search", "INDEX", "a cat", "-k", "0"], ["k is 0"]),
        (["search", "INDEX", "--image", "absent.png"], ["absent.png"]),
        (["search", "INDEX", "word " * 500], ["tokens"]),
        (["search", "INDEX", "a cat", "--out", "no/such/sheet"], ["cannot be written"]),
        (["search", "INDEX", "a cat", "--device", "toaster"], ["toaster"]),
        (["embed", "absent", "--out", "i", "--model", "everyday"], ["absent", "no such file"]),
        (["embed", "PHOTO", "--out", "i", "--model", "cifar11"], ["cifar11"]),
        (["embed", "PHOTO", "--out", "i", "--model", "everyday", "--batch", "0"], ["batch is 0"]),
        (["embed", "PHOTO", "--model", "everyday"], ["--out"]),
        (["embed", "PHOTO", "--out", ".", "--model", "everyday"], ["is a folder"]),
        (["embed", "PHOTO", "--out", "/dev/null/i", "--model", "everyday"], ["cannot be written"]),
        (["embed", "--out", "i"], ["PATH"]),
    ],
)
def test_wrong_arguments_give_a_one_line_error(run, indexed, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    real = {"INDEX": indexed, "PHOTO": indexed.with_name("z.png")}
    status, out, err = run(*(real.get(word, word) for word in argv))
    assert status == 2 and err.startswith("miniclip: error: ") and err.count("\n") == 1
    assert all(word in err for word in words)
    assert not Path("i").exists() and not Path("i.parts").exists()


@pytest.mark.slow
def test_a_sheet_shows_letters_that_the_default_font_of_pillow_lacks(loaded, tmp_path):
    titles = ("Кот и пёс", "Пёс и кот", "γάτα", "日本", "nothing \udcff")
    blots(0).save(tmp_path / "кот.png")
    index = embed_images(loaded, [str(tmp_path / "кот.png")])
    hits = index.search(index.embeddings[0], 1)
    drawn = []
    for title in titles:
        assert draw_sheet(index, hits, title, tmp_path / "s.png") == []
        drawn.append((tmp_path / "s.png").read_bytes())
    assert len(set(drawn)) == len(titles)  # a font without these letters draws equal boxes
