"""The cache: every layer's tokens of every model and data set seen so far, shared by all experiments.

Only this package knows the paths under the cache's root; `cache/README.md` describes the format.
"""

from mlfusion.store.entry import Entry, ShardDraft
from mlfusion.store.feature_store import (
    CachePath,
    FeatureStore,
    Gap,
    Missing,
    Piece,
    default_root,
    differences,
    missing_bytes,
)
from mlfusion.store.reader import TokenReader
from mlfusion.store.records import Names, RunPart, RunRecord, Samples
from mlfusion.store.shard import Check
from mlfusion.store.stream import Stream, streams_for

__all__ = [
    "CachePath",
    "Check",
    "Entry",
    "FeatureStore",
    "Gap",
    "Missing",
    "Names",
    "Piece",
    "RunPart",
    "RunRecord",
    "Samples",
    "ShardDraft",
    "Stream",
    "TokenReader",
    "default_root",
    "differences",
    "missing_bytes",
    "streams_for",
]
