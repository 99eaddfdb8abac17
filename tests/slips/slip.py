"""The type of an entry in a list of slips."""

from typing import NamedTuple


class Slip(NamedTuple):
    """A small mistake to plant in the package, and the tests that should notice it."""

    what: str  # one sentence: "No gradient is clipped."
    old: str  # a snippet that occurs exactly once in the package, so it may move to another file
    new: str
    tests: str  # arguments for pytest: "tests/test_training.py -k clip"
