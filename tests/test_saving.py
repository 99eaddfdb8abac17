"""If a save is killed or the disk is full, the folder has the complete old or new checkpoint."""

import errno
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import nn
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
from miniclip.files import reading, writing
from miniclip.files.saving import one_version
from miniclip.files.writing import PLACE, PREFIX, SAVED, finish_save, saving
from miniclip.parity import randomize

# Two checkpoints that differ in every file. Their weights have the same shapes, so a mixture of the
# two raises no error.
VISION = VisionConfig(width=24, layers=1, heads=2, mlp_width=40, image_size=16, patch_size=8)
TEXT = TextConfig(
    width=16, layers=1, heads=2, mlp_width=24, vocab_size=600, context_length=12,
    bos_token_id=598, eos_token_id=599,
)  # fmt: skip
OLD = CLIPConfig(VISION, TEXT, embed_dim=12)
NEW = replace(OLD, vision=replace(VISION, act="gelu"), text=replace(TEXT, act="gelu"))


def checkpoint(config, seed, words):
    tokenizer = tokenizer_of(config, words, context_length=10 + seed)
    transform = ImageTransform(16 + seed, crop_size=16)
    model = CLIP(config).eval()
    randomize(model, seed)
    return model, tokenizer, transform


def old():
    return checkpoint(OLD, 0, "a photo of a cat")


def new():
    return checkpoint(NEW, 1, "a small drawing of the moon")


def contents(loaded):
    """Return the contents of a checkpoint as values that can be compared."""
    model, tokenizer, transform = loaded
    weights = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    tokens = tokenizer.vocab, tokenizer.merges, tokenizer.context_length
    return model.config, weights, tokens, transform


# This script kills processes that save the two checkpoints in turn. After each kill, it loads the
# checkpoint from the folder.
SCRIPT = """
import os, random, signal, sys, time
from miniclip import load, save
from test_saving import contents, new, old

directory, times = sys.argv[1], int(sys.argv[2])
parts = [old(), new()]
states = [contents(part) for part in parts]
save(directory, *parts[0])
start = time.perf_counter()
save(directory, *parts[0])
duration = time.perf_counter() - start
ends = [0, 0]

def outcome(victim):
    pid = os.fork()
    if not pid:
        victim()
        os._exit(0)
    return pid

def check():
    state = contents(load(directory))
    assert state in states, "a mixture"
    ends[states.index(state)] += 1

def save_for_ever():
    while True:
        for part in parts:
            save(directory, *part)

random.seed(0)
for _ in range(times):
    pid = outcome(save_for_ever)
    time.sleep(random.uniform(0.5, 4) * duration)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    check()

def save_until(operation):
    left = [operation]
    def hook(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event.startswith("os.") and event not in ("os.listdir", "os.scandir"):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    save(directory, *parts[1])

operation, status = 0, 1
while status:
    operation += 1
    save(directory, *parts[0])
    status = os.waitpid(outcome(lambda: save_until(operation)), 0)[1]
    check()
save(directory, *parts[1])
assert contents(load(directory)) == states[1]
print(operation - 1, *ends)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_process_killed_while_saving_leaves_the_old_or_the_new_checkpoint(tmp_path):
    """The process is killed at ten random moments, and then before each change of a file."""
    paths = [str(Path(miniclip.__file__).parent.parent), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "saved"), "10"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    operations, olds, news = map(int, run.stdout.split())
    assert operations > 20 and min(olds, news) > 10, run.stdout


# -------------------------------------------------------------------------------------- a full disk


@contextmanager
def disk_of(size):
    """Limit the size of each file. Python ignores SIGXFSZ, so a larger file raises an OSError."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def saved(tmp_path):
    miniclip.save(tmp_path / "saved", *old())
    return tmp_path / "saved"


@pytest.mark.parametrize("size", [0, 100, 500, 5_000, 50_000])
def test_a_full_disk_raises_an_error_and_leaves_the_old_checkpoint(saved, size):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert size < max(map(len, before.values()))
    with disk_of(size), pytest.raises(CheckpointError, match="saved.*: cannot save.*: .*too large"):
        miniclip.save(saved, *new())
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert contents(miniclip.load(saved)) == contents(old())


@pytest.mark.parametrize("part", range(3), ids=["model", "tokenizer", "transform"])
def test_a_full_disk_during_the_save_of_one_part_leaves_the_old_checkpoint(saved, part):
    with disk_of(100), pytest.raises(CheckpointError, match="cannot save"):
        new()[part].save_pretrained(saved)
    assert contents(miniclip.load(saved)) == contents(old())
    assert not list(saved.glob(".*"))


# ------------------------------------------------------------------------- files of other programs


def test_a_save_keeps_other_files_and_the_permissions_of_all_files(saved):
    (saved / "README.md").write_text("mine")
    (saved / "empty").touch()
    (saved / "runs" / "1").mkdir(parents=True)
    processor = {"processor_class": "CLIPProcessor", "image_processor": old()[2].to_dict()}
    (saved / "processor_config.json").write_text(json.dumps(processor))
    for number, path in enumerate(sorted(saved.glob("*.*"))):
        path.chmod(0o600 + number)
    before = {path.name: path.stat().st_mode for path in saved.iterdir()}
    miniclip.save(saved, *new())
    assert {path.name: path.stat().st_mode for path in saved.iterdir()} == before
    assert (saved / "README.md").read_text() == "mine"
    assert "CLIPProcessor" in (saved / "processor_config.json").read_text()
    assert contents(miniclip.load(saved)) == contents(new())


def test_a_save_without_a_transform_keeps_the_image_settings_of_open_clip(tmp_path):
    model, tokenizer, transform = quick()
    miniclip.save(tmp_path, model, tokenizer, replace(transform, size=16), layout="open_clip")
    (tmp_path / "preprocessor_config.json").unlink()  # open_clip does not write this file
    before = (tmp_path / "open_clip_config.json").read_text()
    miniclip.save(tmp_path, model, tokenizer, None, layout="open_clip")
    assert (tmp_path / "open_clip_config.json").read_text() == before


def test_a_context_length_that_open_clip_cannot_store_is_an_error(tmp_path):
    model, tokenizer, transform = quick()  # the text tower has 12 positions
    tokenizer.context_length = 11
    message = "context length of 11, but `load` would use 12, .* tokenizer.context_length = 12"
    with pytest.raises(CheckpointError, match=message):
        miniclip.save(tmp_path / "new", model, tokenizer, transform, layout="open_clip")
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path, "open_clip")
    with pytest.raises(CheckpointError, match=message):
        tokenizer.save_pretrained(tmp_path)
    miniclip.save(tmp_path / "t", model, tokenizer, transform)
    assert Tokenizer.from_pretrained(tmp_path / "t").context_length == 11


def test_a_save_removes_old_tokenizer_files_in_another_format(saved):
    (saved / "tokenizer.json").write_text("of another")
    (saved / "added_tokens.json").write_text("of another")
    miniclip.save(saved, *new())
    assert not {"tokenizer.json", "added_tokens.json"} & {path.name for path in saved.iterdir()}
    assert contents(miniclip.load(saved)) == contents(new())


def test_the_metadata_of_the_weights_file_has_the_format_pt(saved):
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


# ---------------------------------------------------------------- a save over another checkpoint

LAYOUTS = ("transformers", "openai", "open_clip")


def quick():
    """Make a checkpoint that every layout can express. `old` and `new` have other vocabularies."""
    config = CLIPConfig(
        replace(VISION, width=64, heads=1), replace(TEXT, width=64, heads=1, vocab_size=550,
        bos_token_id=548, eos_token_id=549), embed_dim=20,
    )  # fmt: skip
    return checkpoint(config, 2, "another vocabulary, of other words")


def names_and_bytes(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["all", "no tokenizer", "no transform", "model"])
@pytest.mark.parametrize("later", LAYOUTS)
@pytest.mark.parametrize("earlier", LAYOUTS)
def test_a_save_over_another_checkpoint_replaces_it_or_is_an_error(tmp_path, earlier, later, parts):
    model, tokenizer, transform = old()
    text = replace(model.config.text, width=64, heads=1)
    model = CLIP(replace(model.config, vision=replace(VISION, width=64, heads=1), text=text)).eval()
    transform = replace(transform, size=16, crop_size=16, image_mean=(0.5,) * 3)
    tokenizer.context_length = text.context_length
    miniclip.save(tmp_path, model, tokenizer, transform, layout=earlier)
    (tmp_path / "README.md").write_text("mine")
    before = names_and_bytes(tmp_path)

    model, tokenizer, transform = quick()
    transform = replace(transform, size=16, crop_size=16)
    try:
        if parts == "model":
            model.save_pretrained(tmp_path, layout=later)
        else:
            tokenizer = None if parts == "no tokenizer" else tokenizer
            transform = None if parts == "no transform" else transform
            miniclip.save(tmp_path, model, tokenizer, transform, layout=later)
    except CheckpointError as error:
        assert earlier != later or parts.startswith("no ")
        assert "which would be loaded instead of the saved files. Save" in str(error)
        assert names_and_bytes(tmp_path) == before
        return
    assert earlier == later or earlier == "openai" and later == "transformers"
    assert parts in ("all", "model")
    assert (tmp_path / "README.md").read_text() == "mine"
    assert CLIPConfig.from_pretrained(tmp_path) == CLIP.from_pretrained(tmp_path).config
    assert CLIP.from_pretrained(tmp_path).config.vision == model.config.vision
    if parts == "all":
        loaded = miniclip.load(tmp_path)
        assert loaded.tokenizer.vocab == tokenizer.vocab and loaded.transform == transform
    else:  # the earlier transform is still there
        assert ImageTransform.from_pretrained(tmp_path).image_mean == (0.5,) * 3
        if later == "open_clip":  # open_clip reads the transform from its own file
            settings = json.loads((tmp_path / "open_clip_config.json").read_text())
            assert settings["preprocess_cfg"]["mean"] == [0.5] * 3


# -------------------------------------------------------------------------- the name of a directory


def savers():
    """Return the four functions that save to a directory. Each takes the directory's name."""
    return [lambda name: miniclip.save(name, *old()), *(part.save_pretrained for part in old())]


def test_a_tilde_means_the_home_folder_in_a_save_and_in_a_load(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for number, save in enumerate(savers()):
        save(f"~/{min(number, 1)}")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert contents(miniclip.load("~/0")) == contents(miniclip.load("~/1")) == contents(old())
    assert Tokenizer.from_directory("~/1").vocab == old()[1].vocab


def test_a_save_under_the_name_of_an_embedded_checkpoint_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for save in savers():
        with pytest.raises(CheckpointError, match="gives the embedded.*Save to './shapes'"):
            save("shapes")
        assert not (tmp_path / "shapes").exists()
    miniclip.save("./shapes", *old())
    assert contents(miniclip.load("./shapes")) == contents(old())


# ---------------------------------------------------------------------------- the steps of a save


@pytest.mark.parametrize("layout", ["openai", "open_clip"])
def test_a_save_that_raises_an_error_leaves_no_folder(tmp_path, layout):
    _, tokenizer, transform = old()
    model = CLIP(replace(OLD, vision=replace(VISION, registers=2)))
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with pytest.raises(CheckpointError, match=f"{name}: the layout '{layout}' cannot express"):
            miniclip.save(tmp_path / name, model, tokenizer, transform, layout=layout)
    assert [*tmp_path.rglob("*")] == [tmp_path / "mine"]


@pytest.mark.parametrize("layout", ["transformers", "openai", "open_clip"])
def test_saving_tied_parameters_is_an_error_before_anything_is_written(tmp_path, layout):
    wide = {"width": 64, "heads": 1, "ln_eps": 1e-5}
    text = replace(TEXT, **wide, mlp_width=256, eos_token_id=2, layers=2)
    vision = replace(VISION, **wide, mlp_width=256)
    model = CLIP(replace(OLD, vision=vision, text=text))
    blocks = model.text.blocks
    model.text.proj.weight = model.vision.proj.weight
    blocks[1].mlp.fc1.weight.data = blocks[0].mlp.fc1.weight.data
    said = (
        "vision.proj.weight = text.proj.weight, text.blocks.0.mlp.fc1.weight = "
        "text.blocks.1.mlp.fc1.weight. First give each name a copy"
    )
    with pytest.raises(CheckpointError, match=said):
        model.save_pretrained(tmp_path / "tied", layout)
    assert not (tmp_path / "tied").exists()
    for one in (model.text.proj, blocks[1].mlp.fc1):
        one.weight = nn.Parameter(one.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied", layout)


def test_no_file_is_replaced_before_all_files_are_written(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), saving(tmp_path) as folder:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_file_is_on_the_disk_before_it_gets_its_final_name(saved, monkeypatch):
    """A power cut right after the save must not leave an empty file."""
    written, synced = os.replace, os.fsync
    numbers = []

    def fsync(descriptor):
        numbers.append(os.fstat(descriptor).st_ino)
        synced(descriptor)

    def move(source, target):
        if Path(source).is_file():
            assert Path(source).stat().st_ino in numbers
        written(source, target)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.replace", move)
    miniclip.save(saved, *new())
    assert len(set(numbers)) >= len([path for path in saved.iterdir()])


@pytest.mark.parametrize("place", [SAVED, Path(SAVED).name])
def test_the_next_load_finishes_an_interrupted_save(saved, place):
    miniclip.save(saved / place, *new())  # as if a save was killed before its last step
    (saved / "tokenizer.json").write_text("of another")
    (saved / place / "tokenizer.json").touch()
    assert contents(miniclip.load(saved)) == contents(new())
    assert not (saved / place).exists() and not (saved / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["", "model.safetensors"])
@pytest.mark.slow
def test_loading_any_part_or_file_finishes_an_interrupted_save(saved, name):
    for part, kind in enumerate([CLIP, Tokenizer, ImageTransform]):
        miniclip.save(saved / SAVED, *old())
        miniclip.save(saved, *new())
        miniclip.save(saved / SAVED, *old())
        kind.from_pretrained(saved / name)
        assert contents(miniclip.load(saved)) == contents(old()), part


def test_an_interrupted_save_that_cannot_be_finished_is_an_error(saved, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    miniclip.save(saved / SAVED, *new())
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)
        with pytest.raises(CheckpointError, match="a save was interrupted here.*Read-only"):
            miniclip.load(saved)
    assert contents(miniclip.load(saved)) == contents(new())


def test_a_link_is_not_mistaken_for_an_interrupted_save(saved, tmp_path):
    miniclip.save(tmp_path / "elsewhere", *new())
    (saved / SAVED).parent.mkdir(parents=True)
    (saved / SAVED).symlink_to(tmp_path / "elsewhere")
    assert contents(miniclip.load(saved)) == contents(old())
    assert contents(miniclip.load(tmp_path / "elsewhere")) == contents(new())


def test_the_next_load_finishes_an_interrupted_save_with_a_broken_link(saved):
    (saved / SAVED).mkdir(parents=True)
    (saved / SAVED / "notes").symlink_to("nowhere")
    assert contents(miniclip.load(saved)) == contents(old())
    assert not (saved / SAVED).exists() and (saved / "notes").is_symlink()


def test_a_save_removes_files_of_killed_processes_but_not_of_running_processes(saved):
    """A lock, not the age of the files, shows that a process is alive. The files are in
    .cache/huggingface, because upload_folder never uploads that folder."""
    killed, alive = (saved / PLACE / f"{PREFIX}{name}" for name in ("old", "new"))
    for folder in (killed, alive):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        os.utime(folder, (0, 0))
    lock = writing.lock(alive)
    miniclip.save(saved, *new())
    assert not killed.exists() and (alive / "model.safetensors").exists()
    os.close(lock)
    miniclip.save(saved, *new())
    assert not [*saved.glob(".*")]


@pytest.mark.parametrize("cache", ["folder", "mount", "link", "link to no folder"])
def test_a_save_keeps_other_folders_wherever_the_cache_folder_is(
    saved, tmp_path, monkeypatch, cache
):
    """`.cache` may be on another disk, where a rename fails, or it may link to a missing disk."""
    if "link" in cache:
        (saved / ".cache").symlink_to(tmp_path / "disk")
    if cache != "link to no folder":
        (tmp_path / "disk").mkdir()
        (saved / PLACE / "miniclip-runs").mkdir(parents=True)
    (saved / "miniclip-runs").mkdir()
    before = {path for path in saved.rglob("*")}

    def between_disks(function):
        def move(source, target):
            if (PLACE in str(source)) != (PLACE in str(target)):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            function(source, target)

        return move

    if cache in ("mount", "link"):
        for function in (os.rename, os.replace):
            monkeypatch.setattr(os, function.__name__, between_disks(function))
    miniclip.save(saved, *new())
    assert contents(miniclip.load(saved)) == contents(new())
    assert {path for path in saved.rglob("*")} == before


def test_two_saves_at_the_same_time_write_to_different_temporary_files(tmp_path):
    """The file's name has no process id, because two threads or containers can share an id."""
    path = tmp_path / "index"
    with writing.replacing(path) as first, writing.replacing(path) as second:
        assert first != second and str(os.getpid()) not in f"{first}{second}".split("-", 1)[1]
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and [*tmp_path.iterdir()] == [path]


def test_a_save_does_not_replace_a_pipe_or_a_device_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OSError, match="not a regular file"), writing.replacing(path):
            pass
        assert not path.is_file()


@pytest.mark.parametrize("read", [miniclip.load, Tokenizer.from_pretrained])
@pytest.mark.slow
def test_a_load_during_a_save_reads_the_files_of_one_save(saved, monkeypatch, read):
    """In round n, another checkpoint is saved right after the load has opened n files."""
    parts = [old(), new()]
    saves = [0]
    opened = open

    def opening(at):
        calls = [0]

        def hook(*args, **options):
            file = opened(*args, **options)
            calls[0] += 1
            if calls[0] == at:
                saves[0] += 1
                with monkeypatch.context() as patch:
                    patch.setattr(reading, "open", opened, raising=False)
                    miniclip.save(saved, *parts[1])
            return file

        return hook

    for at in range(1, 6):
        miniclip.save(saved, *parts[0])
        before = saves[0]
        with monkeypatch.context() as patch:
            patch.setattr(reading, "open", opening(at), raising=False)
            found = read(saved)
        expected = parts[saves[0] - before]  # no save if the load opens fewer than `at` files
        vocab = found.tokenizer if isinstance(found, tuple) else found
        assert (vocab.vocab, vocab.merges) == (expected[1].vocab, expected[1].merges)
        if isinstance(found, tuple):
            assert contents(found) == contents(expected)
    assert saves[0] > 2


@pytest.mark.parametrize(
    "written, times",
    [("train_log.txt", 1), ("metrics.json", 1), ("merges.txt", 2), ("my.pt", 2)]
    + [("model-00001-of-00002.safetensors", 2), ("added_tokens.json", 2), ("other.pt", 1)],
)
def test_a_read_is_repeated_only_if_a_file_of_the_checkpoint_has_changed(tmp_path, written, times):
    """Another program may write a log to the folder of a checkpoint all the time."""
    reads = []

    @one_version
    def read(name):
        reads.append(name)
        if len(reads) < 2 or times == 1:
            with open(tmp_path / written, "a") as file:
                file.write("step\n")

    (tmp_path / "my.pt").touch()
    read(tmp_path / "my.pt")
    assert len(reads) == times


def test_a_directory_named_vocab_json_is_an_error_before_any_file_is_replaced(saved):
    (saved / "vocab.json").unlink()
    (saved / "vocab.json").mkdir()
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="cannot save here: .*vocab.json is a directory"):
        miniclip.save(saved, *new())
    assert (saved / "model.safetensors").read_bytes() == before
    assert not list(saved.glob(".*"))


def test_two_saves_at_the_same_time_leave_one_complete_checkpoint(tmp_path):
    """Two threads save, and a third calls `finish_save`. A save may raise "Directory not empty"
    if the other thread has just saved in the same folder."""
    from concurrent.futures import ThreadPoolExecutor

    def save_often(text):
        for _ in range(50):
            try:
                with saving(tmp_path) as folder:
                    for name in "abc":
                        (folder / name).write_text(text)
            except OSError as error:
                assert error.errno in (errno.ENOTEMPTY, errno.EEXIST)

    with ThreadPoolExecutor(3) as pool:
        tasks = [pool.submit(save_often, text) for text in ("one", "two")]
        tasks.append(pool.submit(lambda: [finish_save(tmp_path) for _ in range(500)]))
        for task in tasks:
            task.result()
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts in (dict.fromkeys("abc", "one"), dict.fromkeys("abc", "two"))
