"""The notebooks run, from a bare kernel, and what is committed is what they print.

`python tests/test_notebooks.py` executes them all and writes them back, without what varies from
run to run; with names after it, those.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = (
    "1_architecture", "2_tokenizer", "3_transform", "4_zeroshot", "5_training", "6_inside",
    "7_surgery", "8_parity", "9_your_own_clip",
)  # fmt: skip
MOST_BYTES = 300_000
A_PLACE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|opt|work|mnt|var|Users)/")

# The kernel's machinery, not the notebooks, is what these come from.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in a fresh kernel of this interpreter.

    An empty folder for Jupyter's and IPython's own settings: neither another environment's kernel
    of the same name nor a startup file of the user's gets in between.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as empty, pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            patch.setenv(name, empty)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        nbclient.NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=None,  # a loaded machine takes its time
            startup_timeout=600,
            iopub_timeout=600,
            record_timing=False,
            resources={"metadata": {"path": path.parent}},
        ).execute()
    notebook.metadata.language_info = {"name": "python"}  # without the version
    for cell in notebook.cells:
        cell.metadata.clear()
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def texts(notebook: nbformat.NotebookNode) -> str:
    """All that the outputs say in words; pictures are left out."""
    return "\n".join(
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in outputs(notebook)
    )


def test_the_ladder_is_whole():
    assert tuple(path.stem for path in NOTEBOOKS) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_without_an_error_or_a_warning(path):
    notebook = executed(path)  # an error in a cell is raised here
    said = [o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stderr"]
    assert not said
    check_outputs(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_a_whole_run(path):
    assert path.stat().st_size < MOST_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_can_be_learnt_from(path):
    """How to run it, a text before every cell of code, and exercises whose solutions are run."""
    notebook = nbformat.read(path, as_version=4)
    cells = notebook.cells
    assert "**To run it**" in cells[0].source
    assert "openai/clip-vit-" in cells[0].source + cells[1].source
    kinds = [cell.cell_type for cell in cells]
    assert all(kinds[i - 1] == "markdown" for i, kind in enumerate(kinds) if kind == "code")

    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    _, _, rest = prose.partition("\n## Exercises\n")
    exercises, _, solutions = rest.partition("\n## Solutions\n")
    asked = re.findall(r"^(\d)\. ", exercises, re.MULTILINE)
    assert 2 <= len(asked) <= 4
    assert re.findall(r"^\*\*(\d)\.\*\*", solutions, re.MULTILINE) == asked
    start = next(i for i, cell in enumerate(cells) if "## Solutions" in cell.source)
    assert kinds[start:].count("code") >= len(asked)
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    """No error, and no folder of the machine that they were made on."""
    assert outputs(notebook)
    assert not any(output.output_type == "error" for output in outputs(notebook))
    assert not A_PLACE.search(texts(notebook))


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for path in NOTEBOOKS:
        if not wanted or path.stem in wanted:
            nbformat.write(executed(path), path)
            print(f"{path.name}: {path.stat().st_size:,} bytes")
