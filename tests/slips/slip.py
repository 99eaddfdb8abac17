"""The type of an entry in the lists of faults to plant."""

from typing import NamedTuple


class Slip(NamedTuple):
    """A small fault to plant in the package, and the tests that should notice it."""

    what: str  # what the fault does, in one sentence, such as "No gradient is clipped."
    old: str  # text that occurs exactly once in the package, in any file
    new: str
    tests: str  # arguments for pytest: "tests/test_training.py -k clip"
