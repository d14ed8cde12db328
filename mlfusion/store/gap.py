"""Fills what one entry lacks: which shards are missing, which of them this worker makes, and what is left when it is done.

Any number of extractors may fill one entry: each takes leases on the shards it is about to make, passes over those that others
hold, and waits for them at the end. Whatever ends an extraction, published shards stay, drafts and leases go.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from mlfusion.errors import CacheUnusable
from mlfusion.specs.identity import FeatureSpec, Pair
from mlfusion.specs.options import FormatName
from mlfusion.store.draft import ShardDraft
from mlfusion.store.entry import Entry
from mlfusion.store.leases import Leases
from mlfusion.store.records import RunRecord
from mlfusion.store.stream import Stream, streams_for
from mlfusion.system import disk

WAIT = 0.5  # seconds between looks at what other extractors still hold

Missing = dict[Stream, set[int]]
"""Stream → numbers of the shards that are missing."""

Piece = tuple[range, list[Stream]]
"""Rows of at most one shard of each of these streams, all of which lack them."""


class Gap:
    """What one entry lacks, held open for one extractor. Made by `FeatureStore.filling`.

    for pieces in gap.rounds():
        for rows, streams in pieces:
            ...  # compute; gap.draft(stream, shard), append its rows, gap.publish(draft); gap.renew() now and then
    gap.commit(run)
    """

    def __init__(self, entry: Entry, pairs: frozenset[Pair], log: Callable[[str], None]) -> None:
        self.entry, self._wanted, self._log = entry, pairs, log
        self.pairs = (
            pairs  # all (layer, kind) of the streams that are filled in this round: a stream is filled as a whole
        )
        self._leases = Leases(entry.path / "leases")
        self._undo = ExitStack()
        self._claimed = False  # whether there was anything to do in this round

    @property
    def title(self) -> str:
        """The work in words: model, data set, split and view."""
        spec = self.entry.spec
        view = "" if spec.model.view == "plain" else f", {spec.model.view}"
        return f"{spec.model.name} on {spec.data.name}/{spec.data.split}{view}"

    def rounds(self) -> Iterator[Iterator[Piece]]:
        """Go through the missing rows until none is left; a round must be published before the next one is asked for.

        Yields:
            The pieces that this worker claimed, in the order of rows. A piece is claimed when it is asked for.
        """
        waited_for = ""
        while missing := self._missing():
            self.pairs = frozenset(pair for stream in missing for pair in stream.pairs)
            self._claimed = False
            yield self._claim(missing)
            if self._claimed:
                continue
            stream, shards = next(iter(missing.items()))  # all that is missing is being made by others
            if waited_for != (waited_for := self._leases.holder(lease_name(stream, min(shards)))):
                self._log(f"the rest of {self.title} is being extracted by {waited_for}; waiting for it")
            time.sleep(min(WAIT, self._leases.term / 4))

    def _missing(self) -> Missing:
        self.entry.seal()
        return self.entry.missing(self._wanted)

    def _claim(self, missing: Missing) -> Iterator[Piece]:
        # Shard sizes are powers of two: a unit holds whole shards of every stream, and each is a multiple of a step.
        unit, step = (pick(stream.shard_rows for stream in missing) for pick in (max, min))
        images = self.entry.spec.data.images
        for first in range(0, images, unit):
            rows = range(first, min(first + unit, images))
            wanted = {
                stream: shards & set(range(rows.start // stream.shard_rows, -(-rows.stop // stream.shard_rows)))
                for stream, shards in missing.items()
            }
            names = [lease_name(stream, shard) for stream, shards in wanted.items() for shard in sorted(shards)]
            if not names or not self._leases.take(names):
                continue
            # Another may have published a shard between our look and our lease.
            lacking = {stream: shards & set(self.entry.missing_shards(stream)) for stream, shards in wanted.items()}
            self._leases.release(
                lease_name(stream, shard) for stream, shards in wanted.items() for shard in shards - lacking[stream]
            )
            for start in range(rows.start, rows.stop, step):
                streams = [stream for stream, shards in lacking.items() if start // stream.shard_rows in shards]
                if streams:
                    self._claimed = True
                    yield range(start, min(start + step, rows.stop)), streams

    def draft(self, stream: Stream, shard: int) -> ShardDraft:
        """Begin a claimed shard; it is removed in the end if it was not published."""
        return self._undo.enter_context(self.entry.draft(stream, shard))

    def publish(self, draft: ShardDraft) -> None:
        """Publish a shard, unless somebody else has, and give up its lease."""
        draft.publish()
        self._leases.release([lease_name(draft.stream, draft.shard)])

    def renew(self) -> None:
        """Keep the leases; to be called after every batch."""
        self._leases.renew()

    def commit(self, run: RunRecord) -> None:
        """Record how the extraction went."""
        self.entry.record_run(run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.callback(self._leases.release)
        self._undo.close()


def lease_name(stream: Stream, shard: int) -> str:
    """Name of the lease on a shard."""
    return f"{stream.name}~{shard}"


def new_streams(
    entry: Entry | None, spec: FeatureSpec, shapes: Mapping[Pair, tuple[int, int]], format: FormatName
) -> list[Stream]:
    """Streams for every pair that no stream of the entry holds or has begun; `shapes` as for `streams_for`."""
    begun = {pair for stream in entry.streams() for pair in stream.pairs} | entry.held() if entry else frozenset()
    new = {pair: shape for pair, shape in shapes.items() if pair not in begun}
    return streams_for(new, images=spec.data.images, dtype=spec.dtype, format=format)


def missing_bytes(missing: Missing) -> int:
    """Bytes of shards that are missing."""
    return sum(stream.shard_bytes(shard) for stream, shards in missing.items() for shard in shards)


def check_space(folder: Path, needed: int) -> None:
    """Refuse early what the disk cannot hold.

    Raises:
        CacheUnusable: fewer than `needed` bytes are free.
    """
    if needed > disk.free_bytes(folder):
        raise CacheUnusable(
            f"no space left for the cache: {needed / 1e6:,.3f} MB are needed under {folder}, {disk.free_text(folder)}; "
            "free some space (mlfusion cache prune), choose another place with --cache, or ask for fewer --layers or --tokens"
        )
