"""The same work by miniclip and by its peers, side by side, timed."""

from miniclip.bench.measuring import Row
from miniclip.bench.report import environment, table
from miniclip.bench.suites import SUITES, bench

__all__ = ["SUITES", "Row", "bench", "environment", "table"]
