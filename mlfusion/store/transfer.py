"""Copies entries from one cache to another, or from one format to the other, bit by bit; every chunk is checked on the way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from mlfusion.errors import CacheUnusable, NotCached, UnknownName
from mlfusion.specs.options import FormatName
from mlfusion.store.entry import Entry
from mlfusion.store.feature_store import CachePath, FeatureStore
from mlfusion.store.shard import Source, read_stored
from mlfusion.system.progress import track


@dataclass(frozen=True, kw_only=True)
class Copied:
    """One entry that was copied."""

    entry: Entry  # the copy
    bytes: int  # of tokens that were written; 0 if all were there

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache export --json` prints."""
        return {"key": self.entry.key, "path": str(self.entry.path), "bytes": self.bytes}


def copy_entries(
    source: CachePath,
    target: CachePath,
    *,
    model: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    format: FormatName | None = None,
) -> list[Copied]:
    """Copy the complete streams of entries into another cache; what is there already is not copied again.

    Args:
        source: root of the cache to copy from.
        target: root of the cache to copy to; made if need be.
        model: only entries of this model; default any.
        dataset: only entries of this data set; default any.
        split: only entries of this split; default any.
        format: of the shards that are written; default each stream's own.

    Raises:
        NotCached: there are no such entries.
        CacheUnusable: there is no source, a chunk is damaged, or the target cannot be written.
    """
    if format not in (None, *get_args(FormatName)):
        raise UnknownName("format", str(format), get_args(FormatName))
    here, there = FeatureStore(source), FeatureStore(target)
    if not here.root.is_dir():
        raise CacheUnusable(f"there is no cache at {here.root}")
    found = here.find(model=model, dataset=dataset, split=split)
    entries = [(entry, names) for entry in found if entry.held() and (names := entry.names())]
    if not entries:
        raise NotCached(f"nothing of that in {here.root}; see: mlfusion cache ls --cache {here.root}")
    copied = []
    with track("copying", sum(entry.nbytes() for entry, _ in entries), "bytes") as bar:
        for entry, names in entries:
            into = there.create(entry.spec, entry.samples, names[0])
            for more in names[1:]:
                into.add_alias(more)
            written = copy_entry(entry, into, format=format, advance=bar.advance)
            copied.append(Copied(entry=into, bytes=written))
    return copied


def copy_entry(
    entry: Entry, into: Entry, *, format: FormatName | None = None, advance: Callable[[int], None] = lambda _: None
) -> int:
    """Copy every complete stream that `into` lacks; after an interruption the next call goes on with the next shard.

    Args:
        entry: read.
        into: the same features in another cache, made by `FeatureStore.create`.
        format: of the shards that are written; None keeps each stream's.
        advance: called with the bytes of each shard that is finished.

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
        stream = source.stream.with_format(format or source.stream.format)
        into.begin([stream])
        # What stands there may have been begun by somebody else with another cutting.
        stream = next(one for one in into.streams() if one.name == stream.name)
        step = min(stream.chunk_rows, source.stream.chunk_rows)  # powers of two: a step never leaves a shard
        for shard in into.missing_shards(stream):
            rows = stream.rows(shard)
            with into.draft(stream, shard) as draft:
                for start in range(rows.start, rows.stop, step):
                    part = range(start, min(start + step, rows.stop))
                    draft.append_stored(read_stored(source, part), _unread(source, part))
                draft.publish()
            written += stream.shard_bytes(shard)
            advance(stream.shard_bytes(shard))
        into.seal()
    return written


def _unread(source: Source, rows: range) -> dict[int, str]:
    return {row: why for row, why in source.manifest.skipped.items() if row in rows}
