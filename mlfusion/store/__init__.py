"""The cache: every layer's tokens of every model and data set seen so far, shared by all experiments.

The only room that knows a path under the cache's root. Both stages meet here and nowhere else. The format is written down
in `cache/README.md`.
"""

from mlfusion.specs.options import FormatName
from mlfusion.store.encoding import ENCODINGS
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
from mlfusion.store.leases import Leases
from mlfusion.store.reader import TokenReader
from mlfusion.store.records import Names, RunPart, RunRecord, Samples
from mlfusion.store.shard import Check
from mlfusion.store.stream import Stream, streams_for

__all__ = [
    "ENCODINGS",
    "CachePath",
    "Check",
    "Entry",
    "FeatureStore",
    "FormatName",
    "Gap",
    "Leases",
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
