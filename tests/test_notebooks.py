"""The notebooks run in a fresh kernel, and their outputs are committed.

`python tests/test_notebooks.py` runs all notebooks and stores their outputs, except for the parts
that vary from run to run. To run only some notebooks, name them on the command line.

A solution is a folded `<details>` in a markdown cell. It has a block of Python code, and a block
with the output of this code. A run executes the notebook's cells first, then the solutions' code.
It updates all outputs.
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
SOLUTION = re.compile(
    r"<details>\n<summary><b>Solution (\d)</b></summary>\n\n.+?"
    r"\n\n```python\n(.+?)\n```\n\n```text\n(.*?)```\n\n</details>",
    re.DOTALL,
)

# This code runs in the kernel before the notebook. It makes each warning an error. A figure
# without a title is an error too, and so is an axis without a name.
STRICT = """
import warnings
from matplotlib.backend_bases import FigureCanvasBase


def draw_labelled(canvas, *args, draw=FigureCanvasBase.print_figure, **options):
    figure = canvas.figure
    titles = [axes.get_title(side) for axes in figure.axes for side in ("left", "center")]
    assert any([figure.get_suptitle(), *titles]), "a figure without a title"
    for axes in figure.axes:
        names = axes.get_xlabel(), axes.get_ylabel()
        is_named = any(names) if hasattr(axes, "_colorbar") else all(names)
        assert is_named or not axes.axison, f"axes with the names {names}"
    return draw(canvas, *args, **options)


FigureCanvasBase.print_figure = draw_labelled
warnings.simplefilter("error")
warnings.filterwarnings("ignore", module="ipykernel|asyncio")
warnings.filterwarnings("ignore", "__array_")  # torch does not yet follow NumPy 2
"""

# These warnings come from the kernel's libraries, not from the notebooks.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def executed(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in a fresh kernel of this interpreter, and return it with its outputs.

    Jupyter and IPython read their settings from an empty folder. So the run uses no kernel of
    another environment and no startup file of the user.
    """
    notebook = nbformat.read(path, as_version=4)
    solutions = [cell for cell in notebook.cells if SOLUTION.search(cell.source)]
    shown = len(notebook.cells)
    for cell in solutions:
        source = SOLUTION.search(cell.source)[2]
        notebook.cells.append(nbformat.v4.new_code_cell(source))
    with tempfile.TemporaryDirectory() as empty, pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            patch.setenv(name, empty)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        startup = Path(empty, "profile_default", "startup")
        startup.mkdir(parents=True)
        (startup / "strict.py").write_text(STRICT)
        nbclient.NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=None,  # no limit, because a busy machine is slow
            startup_timeout=600,
            iopub_timeout=600,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": path.parent}},
        ).execute()
    notebook.metadata.language_info = {"name": "python"}  # leave out Python's version
    for cell in notebook.cells:
        cell.metadata.clear()
    check_outputs(notebook)
    for cell, ran in zip(solutions, notebook.cells[shown:], strict=True):
        printed = "".join(output.text for output in ran.outputs)
        start, end = SOLUTION.search(cell.source).span(3)
        cell.source = cell.source[:start] + printed + cell.source[end:]
    del notebook.cells[shown:]
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def texts(notebook: nbformat.NotebookNode) -> str:
    """Return the text of all outputs, but not the images."""
    return "\n".join(
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in outputs(notebook)
    )


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    """Assert that the outputs have no error, no warning and no path of this machine."""
    assert outputs(notebook)
    assert not any(output.output_type == "error" for output in outputs(notebook))
    assert not any(output.get("name") == "stderr" for output in outputs(notebook))
    assert not A_PLACE.search(texts(notebook))


def test_no_notebook_is_missing():
    assert tuple(path.stem for path in NOTEBOOKS) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_runs_without_an_error_or_a_warning(path):
    executed(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_outputs_of_each_notebook_come_from_a_complete_run(path):
    assert path.stat().st_size < MOST_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_has_goals_exercises_solutions_and_explained_figures(path):
    """A notebook states its goals and how to run it. It has a text before every code cell, an
    explanation of every figure, and three exercises with folded solutions."""
    cells = nbformat.read(path, as_version=4).cells
    goals = cells[0].source.partition("**After this notebook you can**\n\n")[2]
    assert goals.count("\n- ") >= 2
    assert "**To run it**" in goals
    assert "openai/clip-vit-" in goals + cells[1].source
    assert any(has_figure(cell) for cell in cells)
    for before, cell, after in zip(cells, cells[1:], cells[2:], strict=False):
        assert cell.cell_type == "markdown" or before.cell_type == "markdown"
        assert not has_figure(cell) or after.source.startswith("**What to see:** ")

    start = next(i for i, cell in enumerate(cells) if "## Exercises\n" in cell.source)
    asked = cells[start].source.partition("## Exercises\n")[2]
    assert re.findall(r"^(\d)\. ", asked, re.MULTILINE) == ["1", "2", "3"]
    solutions = [SOLUTION.fullmatch(cell.source) for cell in cells[start + 1 :]]
    assert [solution[1] for solution in solutions] == ["1", "2", "3"]
    assert all(solution[3] for solution in solutions)


def has_figure(cell: nbformat.NotebookNode) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for path in NOTEBOOKS:
        if not wanted or path.stem in wanted:
            nbformat.write(executed(path), path)
            print(f"{path.name}: {path.stat().st_size:,} bytes")
