"""Fixtures that several test files share, and the environment that every test sees."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).resolve().parent.parent
collect_ignore = ["plant_slips.py", "slips"]  # run by hand


# The tests remove these environment variables. Otherwise they would change a command's output, the
# download folder, or training.
DROPPED_PREFIXES = ("hf_", "huggingface_", "transformers_", "tqdm_")
DROPPED = {
    *("columns", "force_color", "python_colors", "pythonwarnings", "rank"),
    *("http_proxy", "https_proxy", "all_proxy"),
}


def pytest_configure(config: pytest.Config) -> None:
    """Give the tests, and the processes they start, one environment on every machine.

    huggingface_hub reads its variables when it is imported, so a fixture would come too late. For
    the same reason this file imports neither miniclip nor transformers. The tests marked `hub` are
    the exception: they need the user's cache, token and proxy.
    """
    if os.environ.get("MINICLIP_HUB") == "1":
        return
    patch, home = pytest.MonkeyPatch(), TemporaryDirectory()
    for name in list(os.environ):
        if name.lower() in DROPPED or name.lower().startswith(DROPPED_PREFIXES):
            patch.delenv(name)
    patch.setenv("COLUMNS", "80")
    patch.setenv("HF_HOME", home.name)  # an empty folder, so no test uses a user's downloads
    # Use a new cache for torch's compiler, because a killed run leaves broken files in its cache.
    patch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{home.name}/torchinductor_")
    # One thread is fastest for tiny shapes.
    patch.setenv("OMP_NUM_THREADS", "1")
    config.add_cleanup(home.cleanup)
    config.add_cleanup(patch.undo)


@pytest.hookimpl(tryfirst=True)  # run this before pytest selects tests by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the marker `slow` to the cases of a `sweep(n)` test, except for every n-th case."""
    cases: Counter[str] = Counter()
    for item in items:
        sweep = item.get_closest_marker("sweep")
        if sweep and not any(map(item.get_closest_marker, ("slow", "gpu"))):
            test = item.nodeid.partition("[")[0]
            if cases[test] % sweep.args[0]:
                item.add_marker("slow")
            cases[test] += 1


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let torch use two threads, to test that a result does not depend on the number of threads."""
    import torch

    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with vocabularies, recorded values and difficult images. It is not in the repo."""
    if not DATA.is_dir():
        pytest.skip(f"no test data at {DATA}; set MINICLIP_TEST_DATA to its folder")
    return DATA


DATA = Path(os.environ.get("MINICLIP_TEST_DATA", ROOT.parent / "shared" / "data"))
