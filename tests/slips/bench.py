"""Slips in what compares: bench, peers, parts, parity and the diagnosis."""

from slip import Slip

SLIPS = [
    Slip(
        "A tolerance of parity is ten times looser.",
        "torch.float32: 2e-5, torch.float64: 1e-10}",
        "torch.float32: 2e-4, torch.float64: 1e-10}",
        "tests/test_parity.py -k tolerances",
    ),
    Slip(
        "The limit on other devices is ten times looser.",
        "ON_DEVICES = 1e-4",
        "ON_DEVICES = 1e-3",
        "tests/test_parity.py -k tolerances",
    ),
]
