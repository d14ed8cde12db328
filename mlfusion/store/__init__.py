"""The cache: tokens of all extracted layers, models and data sets, shared by all experiments.

Only this package knows the paths under the cache's root; `cache/README.md` describes the format.
"""

from mlfusion.store.entry import Entry as Entry
from mlfusion.store.entry import ShardDraft as ShardDraft
from mlfusion.store.feature_store import Alias as Alias
from mlfusion.store.feature_store import CachePath as CachePath
from mlfusion.store.feature_store import FeatureStore as FeatureStore
from mlfusion.store.feature_store import Gap as Gap
from mlfusion.store.feature_store import Missing as Missing
from mlfusion.store.feature_store import Piece as Piece
from mlfusion.store.feature_store import default_root as default_root
from mlfusion.store.feature_store import differences as differences
from mlfusion.store.feature_store import missing_bytes as missing_bytes
from mlfusion.store.reader import TokenReader as TokenReader
from mlfusion.store.records import Groups as Groups
from mlfusion.store.records import Names as Names
from mlfusion.store.records import RunPart as RunPart
from mlfusion.store.records import RunRecord as RunRecord
from mlfusion.store.records import Samples as Samples
from mlfusion.store.shard import Check as Check
from mlfusion.store.stream import Stream as Stream
from mlfusion.store.stream import streams_for as streams_for
