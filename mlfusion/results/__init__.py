"""The results: rows that survive a kill, each with the keys of its features, its seed and its code version.

`rows` defines a row, `database` stores rows and the arrays of the test images, `export` writes rows as CSV, Parquet, JSON
lines and pandas, and `trackers` logs them to other tools. Results are stored apart from the cache, so that deleting the
cache loses none. Reading needs no torch: a report starts at once.
"""

from mlfusion.results.database import Results
from mlfusion.results.rows import (
    Attention,
    Duplicates,
    Fold,
    GroupCounts,
    ImageCounts,
    Row,
    Selected,
    Sources,
    chosen_on,
    metrics_of,
)

__all__ = [
    "Attention",
    "Duplicates",
    "Fold",
    "GroupCounts",
    "ImageCounts",
    "Results",
    "Row",
    "Selected",
    "Sources",
    "chosen_on",
    "metrics_of",
]
