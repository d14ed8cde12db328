"""The cache: every layer's tokens of every model and data set seen so far, shared by all experiments.

The only room that knows a path under the cache's root. Both stages meet here and nowhere else. The format is written down
in `cache/README.md`.
"""

from mlfusion.specs.options import FormatName
from mlfusion.store.draft import ShardDraft
from mlfusion.store.encoding import ENCODINGS, Encoding
from mlfusion.store.entry import Entry, folder_bytes
from mlfusion.store.feature_store import CachePath, FeatureStore, default_root, differences
from mlfusion.store.gap import Gap, Missing, Piece, missing_bytes
from mlfusion.store.leases import Leases
from mlfusion.store.manifest import CommitRecord, Manifest, StreamManifest
from mlfusion.store.reader import TokenReader
from mlfusion.store.records import Names, RunPart, RunRecord
from mlfusion.store.samples import Samples
from mlfusion.store.shard import Check
from mlfusion.store.stream import Stream, streams_for

__all__ = [
    "ENCODINGS",
    "CachePath",
    "Check",
    "CommitRecord",
    "Encoding",
    "Entry",
    "FeatureStore",
    "FormatName",
    "Gap",
    "Leases",
    "Manifest",
    "Missing",
    "Names",
    "Piece",
    "RunPart",
    "RunRecord",
    "Samples",
    "ShardDraft",
    "Stream",
    "StreamManifest",
    "TokenReader",
    "default_root",
    "differences",
    "folder_bytes",
    "missing_bytes",
    "streams_for",
]
