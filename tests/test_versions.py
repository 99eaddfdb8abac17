"""Test that versions are reported, and that the lists of tested versions are complete."""

import re
import sys
from pathlib import Path
from types import ModuleType

import PIL
import pytest
import torch
import transformers

from miniclip import bench, parity, peers
from miniclip.peers import versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest installs tomli on Python 3.10

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(project: dict, *extras: str) -> dict[str, str]:
    """Return {name: lowest version} of each library that the package and these extras need."""
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return dict(
        re.fullmatch(r"([\w-]+)>=([\w.]+)", line).groups() for line in lines if "[" not in line
    )


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "tests" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_library_versions_come_from_the_imported_modules(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.8.7+cu130")  # pip installed a different version
    assert versions()["torch"] == "9.8.7+cu130"
    assert versions()["transformers"] == transformers.__version__
    assert versions()["pillow"] == PIL.__version__
    assert bench.environment("cpu")["torch"] == "9.8.7+cu130"
    expected = f"torch 9.8.7+cu130, transformers {transformers.__version__}, CPU"
    assert parity.measured_with().startswith(expected)


def test_pip_gives_the_version_if_a_module_does_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "clip", ModuleType("clip"))
    monkeypatch.setattr("miniclip.peers.version", {"openai-clip": "1.0.1"}.__getitem__)
    assert versions()["openai-clip"] == "1.0.1"


def test_versions_lists_a_library_of_unknown_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "clip", ModuleType("clip"))
    monkeypatch.setitem(peers.DISTRIBUTIONS, "clip", "no-such-library")
    assert versions()["no-such-library"] == "of unknown version"


def test_versions_omits_a_library_that_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    assert "faiss-cpu" not in versions()


def test_the_lowest_tested_versions_equal_the_lower_bounds_in_pyproject(project):
    assert pins("constraints-lowest.txt") == requirements(project, "demo", "train", "eval", "test")


def test_every_library_that_the_tests_need_has_a_pinned_version(project):
    needed = requirements(project, "demo", "train", "test", "dev")
    assert needed.keys() <= pins("constraints.txt").keys()
