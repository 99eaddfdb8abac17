"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
collect_ignore = ["plant_slips.py", "slips"]  # run by hand


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real vocabularies, golden values and hard images, which is not in the repo."""
    if not DATA.is_dir():
        pytest.skip(f"no test data at {DATA}; set MINICLIP_TEST_DATA to its folder")
    return DATA


DATA = Path(os.environ.get("MINICLIP_TEST_DATA", ROOT.parent / "shared" / "data"))
