"""The results: rows that survive a kill, each leading home to its features, seed and code; a hundred thousand in one place.

`rows` says what a row is, `database` keeps them, `arrays` what each test image got, `export` hands rows on as CSV,
Parquet, JSON lines and pandas. They lie apart from the cache, so that deleting the cache loses no result. Reading needs no
torch: a report starts at once.
"""

from mlfusion.results.database import Results
from mlfusion.results.rows import (
    AnyMetrics,
    Attention,
    ImageCounts,
    LabelMetrics,
    Metrics,
    NumberMetrics,
    Row,
    Selected,
    Sources,
    metrics_of,
)

__all__ = [
    "AnyMetrics",
    "Attention",
    "ImageCounts",
    "LabelMetrics",
    "Metrics",
    "NumberMetrics",
    "Results",
    "Row",
    "Selected",
    "Sources",
    "metrics_of",
]
