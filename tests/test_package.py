"""Test the package that a user gets: the wheel, imports, types, output and reference pages."""

import ast
import os
import re
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ("config", "model", "loss", "tokenizer", "transform", "checkpoint")


@pytest.mark.slow
def test_the_wheel_works_outside_the_repository(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    # The new environment gets the wheel. It imports other packages from the current environment.
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (packages,) = (tmp_path / "env" / "lib").glob("*/site-packages")
    # Without this file, type checkers ignore our types.
    assert (packages / "miniclip" / "py.typed").is_file()
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    script = (
        "import miniclip, sys; from miniclip.commands.main import main;"
        f"assert {str(packages)!r} in miniclip.__file__, miniclip.__file__;"
        "sys.exit(main(['tokenize', 'a cat', '--model', 'everyday', '--json']) or"
        " main(['info', 'everyday']))"
    )
    done = subprocess.run(
        [python, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert '"ids"' in done.stdout
    entry = subprocess.run([python.parent / "miniclip", "--help"], capture_output=True, text=True)
    assert "classify" in entry.stdout, entry.stderr


def test_importing_miniclip_prints_nothing_and_imports_no_heavy_library():
    script = (
        "import sys, miniclip, miniclip.commands.main;"
        "heavy = {'transformers', 'matplotlib', 'skimage', 'ftfy', 'huggingface_hub'};"
        "print(*sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_imports_neither_transformers_nor_an_instrument(name):
    source = (ROOT / "miniclip" / f"{name}.py").read_text()
    imported = set(re.findall(r"^\s*(?:from|import) miniclip\.(\w+)", source, re.MULTILINE))
    assert imported <= {*REFERENCE, "errors", "files", "text"}
    assert not re.search(r"^\s*(from|import) transformers", source, re.MULTILINE)


def test_miniclip_exports_exactly_its_public_names():
    import miniclip

    assert {*miniclip.__all__} == {
        *("load", "save", "Loaded", "CLIP", "CLIPOutput", "VisionTower", "TextTower"),
        *("CLIPConfig", "VisionConfig", "TextConfig", "Tokenizer", "ImageTransform"),
        *("ZeroShotClassifier", "cache", "hooks"),
        *("CheckpointError", "ContextLengthError", "ImageError"),
    }
    for name in miniclip.__all__:
        assert getattr(miniclip, name).__name__ == name and name in dir(miniclip)
    assert miniclip.__version__ == version("miniclip")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        miniclip.nonsense


@pytest.mark.parametrize("name", ["everyday", "shapes"])
def test_a_loaded_model_is_in_evaluation_mode_on_the_cpu_and_in_float32(name):
    """All modules are in evaluation mode, on the CPU and in float32."""
    import torch

    import miniclip

    towers = [part.from_pretrained(name) for part in (miniclip.VisionTower, miniclip.TextTower)]
    for model in (miniclip.load(name).model, miniclip.CLIP.from_pretrained(name), *towers):
        assert not any(module.training for module in model.modules())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {p.device.type for p in model.parameters()} == {"cpu"}


def command(*argv, **options):
    argv = [sys.executable, "-m", "miniclip", *argv, "--model", "everyday"]
    return subprocess.run(argv, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_cannot_be_written_gives_a_one_line_error():
    with open("/dev/full", "w") as full:
        done = command("tokenize", "a cat", stdout=full)
    assert done.returncode == 2
    assert done.stderr == "miniclip: error: [Errno 28] No space left on device\n"


@pytest.mark.slow
def test_a_character_that_a_terminal_cannot_show_becomes_a_question_mark(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    argv = ["classify", str(tmp_path / "red.png"), "--labels", "cat", "château"]
    done = command(*argv, stdout=subprocess.PIPE, env=ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ch?teau" in done.stdout and "%" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_report_every_wrong_call_and_no_other_call(checker):
    """Type checkers know the arguments of a model, tower or fork, so they find wrong calls."""
    pytest.importorskip(checker)
    program = ROOT / "tests" / "typed_user.py"
    lines = program.read_text().splitlines()
    wrong = {i for i, line in enumerate(lines, 1) if "# wrong" in line}
    where = ["--pythonpath", sys.executable] if checker == "pyright" else []
    command = [sys.executable, "-m", checker, *where, str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r"typed_user\.py:(\d+):.*error", done.stdout)
    assert {int(line) for line in found} == wrong, done.stdout + done.stderr
    assert len(wrong) == 6


@pytest.mark.slow
def test_the_first_page_of_the_api_docs_links_to_every_module_in_reading_order(tmp_path):
    pytest.importorskip("pdoc")
    modules = [
        "miniclip",
        *(f"miniclip.{name}" for name in ("loss", "sites", "lens.heat", "config")),
    ]
    options = ["-t", str(ROOT / ".ci"), "-d", "google", "-o", str(tmp_path)]
    command = [sys.executable, "-m", "pdoc", *options, *modules]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    links = re.findall(r'href="\./(miniclip/.+?\.html)"', (tmp_path / "miniclip.html").read_text())
    assert [link for link in links if (tmp_path / link).is_file()] == links
    assert links[:4] == [
        f"miniclip/{name}.html" for name in ("config", "loss", "sites", "lens/heat")
    ]


@pytest.mark.slow
def test_no_docstring_loses_words_or_columns_in_the_api_docs():
    """A browser hides <class> without backticks, because <class> looks like a tag. It also removes
    the spaces between aligned columns, so a docstring needs a list in place of columns."""
    pytest.importorskip("pdoc")
    from pdoc import docstrings, render_helpers

    for path in sorted((ROOT / "miniclip").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = ast.get_docstring(node) or ""
            columns = re.search(r"^\w\S* {2,}\S.*", text, re.MULTILINE)
            assert not columns, (path, "columns run into each other", columns)
            if "<" in re.sub("`.*?`", "", text):
                page = render_helpers.to_html(docstrings.convert(text, "google", path))
                tags = {*re.findall(r"<(\w+)", page)}
                assert tags <= MARKDOWN_TAGS, (path, getattr(node, "name", ""), tags)


MARKDOWN_TAGS = {*"p a h2 h6 ul ol li strong em code pre span div blockquote hr br".split()} | {
    *"table thead tbody tr th td".split()
}
