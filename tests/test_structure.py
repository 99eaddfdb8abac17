"""Test the imports between the package's modules, and the length of the package's files.
Each fault of `plant_slips.py` quotes code, which must occur exactly once in the package.

Imports at the top of a file, inside a function and under TYPE_CHECKING are all tested.
"""

import ast
import re
from pathlib import Path

import pytest
from plant_slips import AREAS, places, read_sources, slips_of

ROOT = Path(__file__).resolve().parent.parent / "miniclip"
REFERENCE = ["config.py", "model.py", "loss.py", "tokenizer.py", "transform.py", "checkpoint.py"]
MOST_LINES = 1000
MOST_LINES_OF_A_FILE = 420  # a longer file must explain its length at the top


def modules() -> dict[str, Path]:
    """Return {name of a module without "miniclip.": file of the module}."""
    paths = {path.relative_to(ROOT).with_suffix(""): path for path in ROOT.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in (name.removeprefix("miniclip.") for name in names if name.startswith("mini")):
            found |= {name, name.rpartition(".")[0]} & known.keys() - {"__init__"}
    return found


GRAPH = {name: imports(path) - {name} for name, path in modules().items()}


def reached(start: str) -> set[str]:
    """Return all modules that a module imports, directly or indirectly."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = GRAPH[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def test_no_module_imports_itself_indirectly():
    assert [name for name in GRAPH.keys() - {"__init__"} if name in reached(name)] == []


def test_miniclip_files_imports_neither_the_model_nor_the_tokenizer_nor_the_config():
    above = {"model", "tokenizer", "transform", "checkpoint", "config"}
    files = [name for name in GRAPH if name.startswith("files")]
    assert [name for name in files if reached(name) & above] == [] and len(files) > 10


@pytest.mark.parametrize("file", REFERENCE)
def test_the_reference_imports_no_subpackage_except_files_and_text(file):
    below = {name.removesuffix(".py") for name in REFERENCE} | {"errors"}
    others = {
        n for n in reached(file.removesuffix(".py")) if n.split(".")[0] not in ("files", "text")
    }
    assert others <= below


def test_no_file_of_the_reference_imports_a_file_later_in_reading_order():
    """No file of the reference imports a file that comes later in the reading order."""
    order = [file.removesuffix(".py") for file in REFERENCE]
    for i, name in enumerate(order):
        assert not GRAPH[name] & {*order[i:]}


def test_the_reference_has_at_most_a_thousand_lines():
    lines = {
        file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in REFERENCE
    }
    assert sum(lines.values()) <= MOST_LINES, lines


def test_the_docstring_of_a_long_file_explains_its_length():
    for path in modules().values():
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MOST_LINES_OF_A_FILE:
            assert "This file is long because" in ast.get_docstring(ast.parse(text)), path


def test_the_import_check_finds_a_circular_import(monkeypatch):
    monkeypatch.setitem(GRAPH, "errors", {"files.reading"})
    assert "errors" in reached("errors")


def test_definitions_come_before_their_use():
    """In the reference, a function uses only itself and definitions above it."""
    for file in REFERENCE:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        place = {node.name: node.lineno for node in tree.body if hasattr(node, "name")}
        for node in tree.body:
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & place.keys()
            late = {name for name in used if place[name] > getattr(node, "lineno", 0)}
            assert not late, (
                f"{file}: {getattr(node, 'name', '')} uses {late} before its definition"
            )


@pytest.mark.parametrize("area", AREAS)
def test_each_planted_fault_replaces_code_that_occurs_once_in_the_package(area):
    sources, tests = read_sources(ROOT.parent), Path(__file__).parent.parent
    slips = slips_of(area)
    assert len({slip.what for slip in slips}) == len(slips)
    assert [slip.what for slip in slips if len(places(sources, slip)) != 1] == []
    for slip in slips:
        files, _, expression = slip.tests.partition(" -k ")
        paths = [tests / name.partition("::")[0] for name in files.split()]
        source = "".join(path.read_text(encoding="utf-8") for path in paths).lower()
        words = {*re.findall(r"[\w-]+", expression.lower())} - {"and", "or", "not"}
        assert not (lost := [word for word in words if word not in source]), (slip.what, lost)
