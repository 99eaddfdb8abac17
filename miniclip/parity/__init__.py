"""The same input through two CLIPs, compared tensor by tensor in the order data flows.

The two are miniclip and transformers, or a fork and the original. Both run in one precision and in
float64. In float32 the unchanged model agrees with transformers to the last bit, and a model whose
operations are in another order agrees to rounding. In float64 a real difference cannot hide behind
rounding. `diagnosis.py` explains the first tensor that differs.
"""

from miniclip.parity.comparison import TOLERANCE, assert_parity, compare
from miniclip.parity.pairs import (
    copy_weights,
    load_pair,
    random_inputs,
    random_pair,
    randomize,
    transformers_twin,
)
from miniclip.parity.report import Difference, Report, measured_with, nearer, summarize

__all__ = [
    "TOLERANCE", "Difference", "Report", "assert_parity", "compare", "copy_weights", "load_pair",
    "measured_with", "nearer", "random_inputs", "random_pair", "randomize", "summarize",
    "transformers_twin",
]  # fmt: skip
