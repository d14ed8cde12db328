"""The results: rows that survive a kill, each leading home to its features, seed and code; a hundred thousand in one place.

`rows` says what a row is, `database` keeps them, `export` hands them on as CSV, Parquet, JSON lines and pandas. They lie
apart from the cache, so that deleting the cache loses no result. Reading needs no torch: a report starts at once.
"""

from mlfusion.results.database import Results
from mlfusion.results.rows import (
    Attention,
    Images,
    LabelMetrics,
    Metrics,
    NumberMetrics,
    Row,
    Selected,
    Sources,
)

__all__ = ["Attention", "Images", "LabelMetrics", "Metrics", "NumberMetrics", "Results", "Row", "Selected", "Sources"]
