"""The same work by miniclip and by its peers, side by side, timed."""

from miniclip.bench.measuring import Row, table
from miniclip.bench.suites import SUITES, bench, environment

__all__ = ["SUITES", "Row", "bench", "environment", "table"]
