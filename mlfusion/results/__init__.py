"""The results: rows that survive a kill, each leading home to its features, seed and code; a hundred thousand in one place.

`rows` says what a row is, `database` keeps them and what each test image got, `export` hands rows on as CSV, Parquet, JSON
lines and pandas, `trackers` as runs of other tools. They lie apart from the cache, so that deleting the cache loses no
result. Reading needs no torch: a report starts at once.
"""

from mlfusion.results.database import Results
from mlfusion.results.rows import Attention, ImageCounts, Row, Selected, Sources, metrics_of

__all__ = ["Attention", "ImageCounts", "Results", "Row", "Selected", "Sources", "metrics_of"]
