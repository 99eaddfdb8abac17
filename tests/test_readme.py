"""Run the Python code and the commands that README and the packages' headers show.

The tests use small substitutes for photos, for models from the hub and for commands that need a
GPU. `python tests/test_readme.py` runs the commands after a `$` in the headers of `parity` and
`bench`, and writes the output of each command below the command.
"""

import ast
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from forks import own_names
from PIL import Image
from twin import TINY

import miniclip
from miniclip.bench import measuring
from miniclip.commands.main import main
from miniclip.lens.heat import METHODS
from miniclip.published import PUBLISHED
from miniclip.world import scoring

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HEADERS = [ROOT / "miniclip" / f"{name}.py" for name in ("sites", "follow", "convert")]
HEADERS += [
    ROOT / "miniclip" / name / "__init__.py"
    for name in ("files", "lens", "surgery", "evaluation", "retrieval", "training", "page")
]
TABLES = [ROOT / "miniclip" / name / "__init__.py" for name in ("parity", "bench")]


def shown() -> str:
    """Return README and the packages' headers as one text."""
    headers = (ast.parse(path.read_text(encoding="utf-8")) for path in HEADERS + TABLES)
    return "\n".join([README, *(ast.get_docstring(header) or "" for header in headers)])


def lines_of_code() -> list[str]:
    """Return the lines of indented blocks and the commands in tables. Join continued lines."""
    text = re.sub(r"\\\n *", "", shown())
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    in_tables = re.findall(r"^\|.*`(miniclip [a-z].*)` \|$", text, re.M)
    return [line.strip() for line in text.split("\n") if line.startswith("    ")] + in_tables


def commands() -> list[str]:
    """Return the commands that a reader types, without prompts, comments and output."""
    parts = [part.strip() for line in lines_of_code() for part in line.split(" && ")]
    found = [
        re.match(r"(?:\$ )?((?:miniclip [a-z]|torchrun ).*?)(?: +# |$)", part) for part in parts
    ]
    return list(dict.fromkeys(part[1].strip() for part in found if part))


# {a command that is slow, or needs a GPU or a data set: the short command that the test runs}
INSTEAD = {
    "miniclip bench": "miniclip bench --suite tokenizer --shape tiny",
    "miniclip bench --suite vision text": "miniclip bench --suite vision text --shape tiny",
    "miniclip bench --suite tokenizer transform load startup memory search": (
        "miniclip bench --suite load --shape tiny"
    ),
    "miniclip bench --device cuda --json": "miniclip bench --suite transform --json --shape tiny",
    "miniclip parity --random B/32": "miniclip parity --random tiny",
    "miniclip train shapes --out runs/shapes": (
        "miniclip train shapes --out runs/shapes --config tiny.json --batch 8 --epochs 1"
    ),
    "miniclip explain --score shapes --model shapes -o methods.png": (
        "miniclip explain --score shapes --model shapes -o methods.png --scenes 2"
    ),
    "miniclip eval dataset_flickr30k.json --task retrieval --images flickr30k-images": (
        "miniclip eval dataset_flickr30k.json --task retrieval --images photographs "
        "--model everyday"
    ),
    "miniclip eval cifar10/test --task fewshot --train cifar10/train --model everyday "
    "--plot shots.png": (
        "miniclip eval cifar10/test --task fewshot --train cifar10/train --model everyday --shots 1"
    ),
}


@pytest.fixture
def little(monkeypatch):
    """Use fewer scenes, fewer rounds in `bench` and fewer methods in `explain`, to save time."""
    monkeypatch.setitem(PUBLISHED, "tiny", TINY)
    monkeypatch.setattr("miniclip.bench.suites.measure", partial(measuring.measure, seconds=0))
    monkeypatch.setattr(scoring, "score", partial(scoring.score, scenes=8))
    monkeypatch.setattr("miniclip.training.drawn.Shapes.__init__.__defaults__", (32, 0))
    for method in ("occlusion", "relevance", "gradcam", "rollout"):
        monkeypatch.delitem(METHODS, method)


def stand_in(command: str) -> list[str]:
    command = INSTEAD.get(command, command)
    command = re.sub(r"^torchrun --nproc-per-node \d+ -m ", "", command)
    command = re.sub(r"openai/clip-vit-[\w-]+", "everyday", command)
    command = command.replace(" --device cuda", "")
    if " train " in command and "shapes" not in command:
        command += " --batch 2 --epochs 1"
        if "--recipe" not in command and "--model" not in command:
            command += " --config tiny.json"
    program, *argv = shlex.split(command)
    assert program == "miniclip", command
    return argv


TINY_CONFIG = """{
  "model_type": "clip", "projection_dim": 16,
  "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 64, "patch_size": 16},
  "text_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 600, "max_position_embeddings": 77,
    "bos_token_id": 598, "eos_token_id": 599}
}"""


FORKS = {  # this code makes the forks that the header of `parity` uses
    "my_transformers": "parity.transformers_twin(original)",
    "my_openai": "openai_names.CLIP(original)",
    "my_open_clip": "openai_names.CLIP(original, 'custom_text')\nbuild = lambda: model",
    "my_own": "own_names.CLIP(original)",
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with all files that README's commands and code read."""
    skimage = pytest.importorskip("skimage.data")
    folder = tmp_path_factory.mktemp("desk")
    pictures = {name: getattr(skimage, name)() for name in ("coffee", "chelsea", "rocket")}
    (folder / "pictures").mkdir()
    for name in ("cat.jpg", "dog.jpg", "pictures/coffee.png"):
        Image.fromarray(pictures["coffee"]).save(folder / name)
    labels = ("cat", "ship", "truck")
    classes = dict.fromkeys(("photographs", "cifar10/train", "cifar10/test", "shards"), labels)
    classes["imagenet/val"] = ("n01440764", "n01443537", "n01484850")
    for place, names in classes.items():
        for name in names:
            (folder / place / name).mkdir(parents=True)
            for i, picture in enumerate([*pictures.values()] * 2):
                Image.fromarray(np.roll(picture, i)).save(folder / place / name / f"{i}.jpg")
    sentences = [{"raw": "a cat"}, {"raw": "a face"}]
    flickr = {"images": [{"filename": "cat/0.jpg", "split": "test", "sentences": sentences}]}
    (folder / "dataset_flickr30k.json").write_text(json.dumps(flickr))
    (folder / "tiny.json").write_text(TINY_CONFIG)
    for name, code in FORKS.items():
        head = "import miniclip\nfrom forks import openai_names, own_names\n"
        head += "from miniclip import parity\n\noriginal = miniclip.load('everyday').model\n"
        (folder / f"{name}.py").write_text(f"{head}model = {code}\n")
    fork = re.search(r"^```python\n([^`]*\nfork = .*?)^```", README, re.S | re.M)
    (folder / "my_fork.py").write_text(fork[1])
    (folder / "names.json").write_text(json.dumps(own_names.NAMES))
    miniclip.save(folder / "mine", *miniclip.load("everyday"))
    index = str(folder / "index.safetensors")
    assert main(["embed", str(folder / "photographs"), "--out", index, "--model", "everyday"]) == 0
    return folder


def test_readme_is_short_and_its_line_counts_and_links_are_right():
    assert len(README.splitlines()) <= 300
    for name, lines in re.findall(r"^\| \[`(\w+\.py)`\].* \| (\d+) \|", README, re.M):
        code = (ROOT / "miniclip" / name).read_text(encoding="utf-8")
        assert len(code.splitlines()) == int(lines), name
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 20 and all((ROOT / link).exists() for link in links)
    headings = {line[3:].lower().replace(" ", "-") for line in README.splitlines()}
    anchors = re.findall(r"\]\(#([^)]+)\)", README)
    assert len(anchors) > 10 and headings.issuperset(anchors)


def test_the_search_in_readme_finds_every_command():
    found = commands()
    assert INSTEAD.keys() <= {*found}  # a misspelt key would replace no command
    assert len(found) >= 25
    for name in ("classify", "embed", "search", "serve", "convert", "bench", "parity", "eval"):
        assert any(f"miniclip {name}" in command for command in found), name


def shallow(model):
    """Return a new model of the same shape, except that each tower has one layer."""
    towers = {name: replace(vars(model.config)[name], layers=1) for name in ("vision", "text")}
    return miniclip.CLIP(replace(model.config, **towers)).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # torch warns when it exports
@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")
def test_the_python_code_in_readme_runs_unchanged(desk, monkeypatch):
    """All blocks run one after the other in one Python session, as a reader would type them."""
    blocks = re.findall(r"^```python\n(.*?)^```", shown(), re.S | re.M)
    assert len(blocks) >= 6
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(desk)
    assert main(["embed", "photographs", "--out", "index.safetensors", "--model", "everyday"]) == 0
    names: dict = {"__name__": "__main__"}
    with redirect_stdout(io.StringIO()) as out:
        for block in blocks:
            if "onnx" in block:  # the export takes a second for each layer
                names["model"], whole = shallow(names["model"]), names["model"]
            exec(compile(block, "README.md", "exec"), names)
            if "onnx" in block:
                names["model"] = whole
    first = README[README.index("```python") :].split("```\n\n```\n")[1].split("```")[0]
    assert out.getvalue().startswith(first)


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_each_command_in_readme_works(desk, command, little, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    argv = stand_in(command)
    if argv[0] == "serve":
        monkeypatch.setattr(
            "miniclip.page.serve.serve_until_interrupted", lambda app, socket: socket.close()
        )
    if argv[0] == "train":
        shutil.rmtree(argv[argv.index("--out") + 1], ignore_errors=True)
    status = main(argv)
    assert status == 0, capsys.readouterr().err


# ------------------------------------------------------------------------------------------------


def refreshed(text: str) -> str:
    """Return the text with new output below each `$` command."""

    def run(block: re.Match[str]) -> str:
        argv = shlex.split(block["command"])[1:]
        done = subprocess.run(
            [sys.executable, "-m", "miniclip", *argv], stdout=subprocess.PIPE, text=True, check=True
        )
        lines = [f"    {line}".rstrip() for line in done.stdout.rstrip().split("\n")]
        return f"    $ {block['command']}\n" + "\n".join(lines) + "\n"

    return re.sub(
        r"^    \$ (?P<command>miniclip .*)\n(?:(?:    .*)?\n)+?(?=\S)",
        lambda block: run(block) + "\n",
        text,
        flags=re.M,
    )


if __name__ == "__main__":
    for path in TABLES:
        path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")
