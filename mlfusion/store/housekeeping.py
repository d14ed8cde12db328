"""Looks after the cache: what lies in it, which entries may be removed, and copies of entries. One in use always stays.

An entry that is removed is first renamed into `trash/`; only there, where no new reader can find it, is it looked at once
more, and put back if a reader's pin came with it. So a reader that pins an entry before it opens it keeps it.
"""

import os
import uuid
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec

from mlfusion.errors import CacheUnusable, MlfusionError, NotCached, UnknownName
from mlfusion.specs.names import token_words
from mlfusion.specs.options import FormatName, PruneOptions
from mlfusion.store.entry import Entry, folder_bytes
from mlfusion.store.feature_store import QUARANTINE, TRASH, CachePath, FeatureStore, sound
from mlfusion.store.leases import in_use
from mlfusion.store.shard import read_stored
from mlfusion.system import disk
from mlfusion.system.progress import track


@dataclass(frozen=True, kw_only=True)
class EntrySummary:
    """One entry in a list."""

    model: str
    dataset: str
    split: str
    images: int
    skipped: int  # images that could not be read
    tokens: str  # as --tokens takes them; '(not complete)' while none is
    dtype: str
    bytes: int  # of the complete streams in the entry's own folder
    key: str
    unreadable: dict[str, str]  # sample id → why its image could not be read; empty if reasons were not asked for


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Entries, and a sentence about each one that is damaged."""

    entries: tuple[EntrySummary, ...]
    damaged: tuple[str, ...]


def list_entries(
    cache: CachePath = None,
    *,
    model: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    reasons: bool = True,
) -> Listing:
    """List the entries of a cache in all its layers, by default all; `reasons` says why images were skipped."""
    damaged: list[str] = []
    found = FeatureStore(cache).find(model=model, dataset=dataset, split=split, on_damage=damaged.append)
    listed = [sound(partial(_summary, entry, reasons), damaged.append) for entry in found]
    return Listing(entries=tuple(filter(None, listed)), damaged=tuple(damaged))


def _summary(entry: Entry, reasons: bool) -> EntrySummary:
    spec, sources = entry.spec, entry.sources()
    own = [source for source in dict.fromkeys(sources.values()) if source.folder.is_relative_to(entry.path)]
    return EntrySummary(
        model=spec.model.name,
        dataset=spec.data.name,
        split=spec.data.split,
        images=spec.data.images,
        skipped=len(entry.skipped(sources)),
        tokens=token_words(frozenset(sources)) or "(not complete)",
        dtype=spec.dtype,
        bytes=sum(source.stream.nbytes for source in own),
        key=entry.key,
        unreadable=entry.unreadable(sources) if reasons else {},
    )


def entry_paths(
    cache: CachePath = None, *, model: str | None = None, dataset: str | None = None, split: str | None = None
) -> list[Path]:
    """Absolute path of the cache's root; if a model, data set or split is given, paths of its entries' folders."""
    store = FeatureStore(cache)
    if not (model or dataset or split):
        return [store.root.absolute()]
    return [entry.path.absolute() for entry in store.find(model=model, dataset=dataset, split=split)]


@dataclass(frozen=True, kw_only=True)
class DiskUsage:
    """Bytes on disk of a cache's uppermost layer."""

    root: Path
    entries: dict[tuple[str, str], int]  # (model, data set) → bytes, the largest first
    beside: dict[str, int]  # folder beside the entries → bytes; may be deleted

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache du --json` prints."""
        return {
            "entries": [
                {"model": model, "dataset": data, "bytes": size} for (model, data), size in self.entries.items()
            ],
            "beside": self.beside,
            "bytes": sum(self.entries.values()) + sum(self.beside.values()),
        }


def disk_usage(cache: CachePath = None) -> DiskUsage:
    """Bytes on disk by model and data set, measured file by file, in a cache's uppermost layer."""
    store = FeatureStore(cache)
    sums: Counter[tuple[str, str]] = Counter()
    for entry in store.own_entries():
        sums[entry.spec.model.name, entry.spec.data.name] += entry.size()
    beside = {name: folder_bytes(store.root / name) for name in (QUARANTINE, TRASH)}
    return DiskUsage(root=store.root, entries=dict(sums.most_common()), beside=beside)


# --- removing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PruneDecision:
    """What becomes of one entry, and why."""

    model: str
    dataset: str
    split: str
    bytes: int
    idle_days: float  # since it was last read or extracted
    removed: bool
    why: str
    key: str


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What `prune` did, or would do."""

    decisions: tuple[PruneDecision, ...]  # the longest unused first
    entries: int  # in the cache before
    dry_run: bool

    @property
    def bytes_freed(self) -> int:
        """Bytes on disk of the entries that were removed."""
        return sum(each.bytes for each in self.decisions if each.removed)

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache prune --json` prints."""
        decisions = [asdict(each) for each in self.decisions]
        return {"dry_run": self.dry_run, "entries": decisions, "bytes_freed": self.bytes_freed}


def prune(options: PruneOptions, cache: CachePath = None, *, needed: Collection[str] | None = None) -> PruneResult:
    """Remove entries of a cache's uppermost layer by name, age or size, or because nothing needs them.

    Args:
        options: which entries are removed; `older` in seconds, `size` in bytes.
        cache: its root, or layers of them; default $MLFUSION_CACHE, or ./cache.
        needed: keys of entries that stay, those that the results `options.unneeded` were made from.

    Raises:
        MlfusionError: there is no criterion: everything would be removed.
        CacheUnusable: the cache cannot be written.
    """
    model, dataset, older, quota = options.model, options.dataset, options.older, options.size
    if all(value is None for value in (model, dataset, older, quota, needed)):
        raise MlfusionError(
            "what may go? name at least one of --model, --dataset, --older, --size, --unneeded; with --dry-run nothing is "
            "removed"
        )
    store = FeatureStore(cache)
    sizes = {entry: entry.size() for entry in store.own_entries()}
    over = sum(sizes.values()) - quota if quota is not None else 0
    named = {entry.key for entry in store.find(model=model, dataset=dataset)}
    read_at: dict[Entry, float] = {}
    for entry in sizes:
        with suppress(NotCached):  # another prune was faster
            read_at |= {entry: entry.read_at()} if entry.key in named else {}
    now, decisions = disk.clock(store.root), []  # by the clock of the cache's file system
    if not options.dry_run:
        empty_trash(store.root)
    for entry in sorted(read_at, key=lambda entry: read_at[entry]):
        idle, spec, why = max(now - read_at[entry], 0.0), entry.spec, ""
        if needed is not None and entry.key in needed:
            why = "results were made from it"
        elif older is not None and idle < older:
            why = "used lately"
        elif quota is not None and over <= 0:
            why = "the rest fits"
        why = why or in_use(entry.path) or ("" if options.dry_run else remove_entry(store.root, entry.path))
        if not why:
            over -= sizes[entry]
        decisions.append(
            PruneDecision(
                model=spec.model.name,
                dataset=spec.data.name,
                split=spec.data.split,
                bytes=sizes[entry],
                idle_days=round(idle / 86400, 2),
                removed=not why,
                why=why or ("unused for longest" if quota is not None else "as asked"),
                key=entry.key,
            )
        )
    return PruneResult(decisions=tuple(decisions), entries=len(sizes), dry_run=options.dry_run)


def remove_entry(root: Path, folder: Path) -> str:
    """Remove an entry's folder; '' or, where it stays, why."""
    trash = root / TRASH
    with disk.translate_os_errors(root):
        trash.mkdir(exist_ok=True)
        aside = trash / f"{folder.name}~{uuid.uuid4().hex[:8]}"
        try:
            os.rename(folder, aside)
        except FileNotFoundError:
            return ""  # somebody else was faster
        if use := in_use(aside):
            with suppress(OSError):  # extracted anew in this instant: then the new one stands
                os.rename(aside, folder)
                return use
        disk.remove(aside)
    return ""


def empty_trash(root: Path) -> None:
    """Remove what earlier prunes left half done."""
    for aside in (root / TRASH).glob("*"):
        if not in_use(aside):
            disk.remove(aside)


# --- copying ---------------------------------------------------------------------------------------------------------


def copy_entries(
    source: CachePath,
    target: CachePath,
    *,
    model: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    format: FormatName | None = None,
) -> list[tuple[Entry, int]]:
    """Copy the complete streams of entries into another cache, bit by bit; every chunk is checked on the way.

    `model`, `dataset` and `split` choose entries, by default all; `format` is that of the copies, by default unchanged. The
    target is made if need be.

    Returns:
        The copies, each with the bytes of tokens that were written: 0 if all were there.

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
            copied.append((into, copy_entry(entry, into, format=format, advance=bar.advance)))
    return copied


def copy_entry(
    entry: Entry, into: Entry, *, format: FormatName | None = None, advance: Callable[[int], None] = lambda _: None
) -> int:
    """Copy every complete stream that `into` lacks; after an interruption the next call goes on with the next shard.

    `into` is the same entry of another cache. Returns the bytes of tokens that were written; `advance` gets those of each
    shard when it is finished.

    Raises:
        CacheUnusable: a chunk is damaged; nothing of its shard is written.
    """
    if entry.key != into.key:
        raise CacheUnusable(f"{into.path} holds other features than {entry.path}")
    written = 0
    for source in dict.fromkeys(entry.sources().values()):
        if source.stream.pairs <= into.held():
            continue
        stream = msgspec.structs.replace(source.stream, format=format or source.stream.format)
        into.begin([stream])
        # What stands there may have been begun by somebody else with another cutting.
        stream = next(one for one in into.streams() if one.name == stream.name)
        step = min(stream.chunk_rows, source.stream.chunk_rows)  # powers of two: a step never leaves a block
        skipped = source.manifest.skipped
        for shard in into.missing_shards(stream):
            rows = stream.rows(shard)
            with into.draft(stream, shard) as draft:
                for start in range(rows.start, rows.stop, step):
                    part = range(start, min(start + step, rows.stop))
                    draft.append_stored(
                        read_stored(source, part), {row: skipped[row] for row in part if row in skipped}
                    )
                draft.publish()
            written += stream.shard_bytes(shard)
            advance(stream.shard_bytes(shard))
        into.seal()
    return written
