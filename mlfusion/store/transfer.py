"""Carries entries from one cache to another, or from one format to the other, bit by bit, every chunk checked on the way."""

from collections.abc import Callable

from mlfusion.errors import CacheUnusable
from mlfusion.store.entry import Entry
from mlfusion.store.reader import Source, stored
from mlfusion.store.stream import FormatName


def copy(
    entry: Entry, into: Entry, *, format: FormatName | None = None, done: Callable[[int], None] = lambda _: None
) -> int:
    """Every whole stream of `entry` that `into` lacks; stopped, the next call goes on after the last whole shard.

    Args:
        entry: read.
        into: the same features in another cache, made by `FeatureStore.create`.
        format: of the shards that are written; None keeps each stream's.
        done: told the bytes of each shard as it is finished.

    Returns:
        Bytes of the tokens that were written.

    Raises:
        CacheUnusable: a chunk is damaged; nothing of its shard is written.
    """
    if entry.key != into.key:
        raise CacheUnusable(f"{into.path} holds other features than {entry.path}")
    written = 0
    for source in dict.fromkeys(entry.sources().values()):
        if source.stream.pairs <= into.held():
            continue
        stream = source.stream.kept_as(format or source.stream.format)
        into.begin([stream])
        # What stands there may have been begun by somebody else with another cutting.
        stream = next(one for one in into.streams() if one.name == stream.name)
        step = min(stream.chunk_rows, source.stream.chunk_rows)  # powers of two: a step never leaves a shard
        for shard in into.missing_shards(stream):
            rows = stream.rows(shard)
            with into.draft(stream, shard) as draft:
                for start in range(rows.start, rows.stop, step):
                    part = range(start, min(start + step, rows.stop))
                    draft.append_stored(stored(source, part), _unread(source, part))
                draft.publish()
            nbytes = len(rows) * stream.nbytes // stream.images
            written += nbytes
            done(nbytes)
        into.seal()
    return written


def _unread(source: Source, rows: range) -> dict[int, str]:
    return {row: why for row, why in source.manifest.skipped.items() if row in rows}
