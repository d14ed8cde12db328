"""Lists, prunes and copies the entries of the cache. An entry that is in use is never removed.

A prune first renames an entry into `trash/`, where no new reader finds it, checks it once more for readers' pins, and moves it
back if there is one. So a reader that pins an entry before it opens it cannot lose it.
"""

import errno
import re
import stat
import uuid
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from mlfusion.errors import CacheUnusable, MlfusionError, NotCached
from mlfusion.specs.definitions import command
from mlfusion.specs.identity import FORMAT
from mlfusion.specs.names import token_words
from mlfusion.specs.options import FormatName
from mlfusion.specs.selection import CopyOptions, EntryFilter, PruneOptions
from mlfusion.store.entry import KEY, Entry
from mlfusion.store.feature_store import QUARANTINE, TRASH, CachePath, FeatureStore, read_or_report
from mlfusion.store.leases import in_use
from mlfusion.store.records import open_tree, owned_by
from mlfusion.store.shard import read_stored
from mlfusion.system import disk
from mlfusion.system.progress import track
from mlfusion.system.tree import Tree

PRUNED = re.compile(f"{KEY.pattern}~[0-9a-f]{{8}}")  # the name of an entry in the trash


@dataclass(frozen=True, kw_only=True)
class EntrySummary:
    """One entry of a listing."""

    model: str
    dataset: str
    split: str
    images: int
    skipped: int  # images that could not be read
    tokens: str  # in the form of --tokens; '(not complete)' if none are
    dtype: str
    bytes: int  # of the complete streams in the uppermost layer's folder
    key: str
    unreadable: dict[str, str]  # sample id → why its image could not be read; empty without `reasons`


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Entries, and a sentence about each one that is damaged."""

    entries: tuple[EntrySummary, ...]
    damaged: tuple[str, ...]


def cache_root(cache: CachePath = None) -> str:
    """The absolute path of a cache, and whether it is there, for messages."""
    root = FeatureStore(cache).root.absolute()
    return f"{root}" if root.is_dir() else f"{root}, which does not exist"


def list_entries(cache: CachePath = None, chosen: EntryFilter = EntryFilter(), *, reasons: bool = True) -> Listing:
    """List entries of all layers of a cache; with `reasons`, say why images were skipped."""
    damaged: list[str] = []
    entries = FeatureStore(cache).find(**chosen.changed(), on_damage=damaged.append)
    summaries = [read_or_report(partial(_summary, entry, reasons), damaged.append) for entry in entries]
    return Listing(entries=tuple(filter(None, summaries)), damaged=tuple(damaged))


def _summary(entry: Entry, reasons: bool) -> EntrySummary:
    spec, sources = entry.spec, entry.sources()
    own = [source for source in dict.fromkeys(sources.values()) if source.tree is entry.tree]
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


def entry_paths(cache: CachePath = None, chosen: EntryFilter = EntryFilter()) -> list[Path]:
    """Absolute path of the cache's root; given a model, data set or split, the folders of its entries."""
    store = FeatureStore(cache)
    if chosen == EntryFilter():
        return [store.root.absolute()]
    return [entry.path.absolute() for entry in store.find(**chosen.changed())]


@dataclass(frozen=True, kw_only=True)
class DiskUsage:
    """Bytes on disk of a cache's uppermost layer."""

    root: Path
    entries: dict[tuple[str, str], int]  # (model, data set) → bytes, the largest first
    beside: dict[str, int]  # other folder, which may be deleted (quarantine, trash, an older format) → bytes
    damaged: tuple[str, ...] = ()  # a sentence about each entry that is damaged, and not counted

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache du --json` prints."""
        rows = [{"model": model, "dataset": data, "bytes": size} for (model, data), size in self.entries.items()]
        size = sum(self.entries.values()) + sum(self.beside.values())
        return {"entries": rows, "beside": self.beside, "bytes": size, "damaged": list(self.damaged)}


def disk_usage(cache: CachePath = None) -> DiskUsage:
    """Measure, file by file, the bytes on disk of a cache's uppermost layer."""
    store = FeatureStore(cache)
    sums: Counter[tuple[str, str]] = Counter()
    damaged: list[str] = []
    for entry in store.own_entries(damaged.append):
        sums[entry.spec.model.name, entry.spec.data.name] += entry.size()
    beside = {name: store.tree.size(name) for name in (QUARANTINE, TRASH, *map("v{}".format, range(1, FORMAT)))}
    return DiskUsage(root=store.root, entries=dict(sums.most_common()), beside=beside, damaged=tuple(damaged))


@dataclass(frozen=True, kw_only=True)
class PruneDecision:
    """Whether one entry is removed, and why."""

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
    """Result of `prune`; with `dry_run`, entries that it would remove."""

    decisions: tuple[PruneDecision, ...]  # the least recently used first
    entries: int  # in the cache before
    dry_run: bool
    damaged: tuple[str, ...] = ()  # a sentence about each entry that is damaged, and therefore stays

    @property
    def bytes_freed(self) -> int:
        """Bytes on disk of the entries that were removed."""
        return sum(decision.bytes for decision in self.decisions if decision.removed)

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache prune --json` prints."""
        decisions = [asdict(decision) for decision in self.decisions]
        body = {"dry_run": self.dry_run, "entries": decisions, "bytes_freed": self.bytes_freed}
        return body | {"damaged": list(self.damaged)}


def prune(options: PruneOptions, cache: CachePath = None, *, needed: Collection[str] | None = None) -> PruneResult:
    """Remove entries of a cache's uppermost layer by name, age or size, or because nothing needs them.

    `needed` are keys of entries that stay, those of the results `options.unneeded`. MlfusionError if no criterion is given,
    since everything would be removed; CacheUnusable if the cache cannot be written.
    """
    older, quota = options.older, options.size
    if options.entries == EntryFilter() and older is None and quota is None and needed is None:
        raise MlfusionError(
            "what may go? name at least one of --model, --dataset, --split, --older, --size, --unneeded; with --dry-run "
            "nothing is removed"
        )
    store = FeatureStore(cache)
    damaged: dict[str, None] = {}  # each sentence once
    sizes = {entry: entry.size() for entry in store.own_entries(damaged.setdefault)}
    excess = sum(sizes.values()) - quota if quota is not None else 0
    selected = {entry.key for entry in store.find(**options.entries.changed(), on_damage=damaged.setdefault)}
    read_at: dict[Entry, float] = {}
    for entry in sizes:
        at = read_or_report(entry.read_at, damaged.setdefault) if entry.key in selected else None
        read_at |= {} if at is None else {entry: at}  # else another prune was faster, or it is damaged
    now, decisions = store.tree.clock() if sizes else 0.0, []
    if not options.dry_run:
        empty_trash(store.root)
    for entry in sorted(read_at, key=lambda entry: read_at[entry]):
        idle, spec, why = max(now - read_at[entry], 0.0), entry.spec, ""
        if needed is not None and entry.key in needed:
            why = "results were made from it"
        elif older is not None and idle < older:
            why = "used lately"
        elif quota is not None and excess <= 0:
            why = "the rest fits"
        why = why or _in_use(store.tree, entry.at) or ("" if options.dry_run else remove_entry(store.root, entry.path))
        if not why:
            excess -= sizes[entry]
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
    return PruneResult(decisions=tuple(decisions), entries=len(sizes), dry_run=options.dry_run, damaged=tuple(damaged))


def _in_use(tree: Tree, folder: str) -> str:
    """`in_use`; an entry whose marks are damaged stays too, since it may be in use."""
    try:
        return in_use(tree, folder)
    except CacheUnusable as err:
        return str(err)


def remove_entry(root: Path, folder: Path) -> str:
    """Remove an entry's folder; returns '', or why it was not removed."""
    tree, at = open_tree(root), f"{folder.parent.name}/{folder.name}"
    removed = f"{TRASH}/{folder.name}~{uuid.uuid4().hex[:8]}"
    with disk.translate_os_errors(root):
        if not tree.require(TRASH, stat.S_IFDIR):
            with suppress(FileExistsError):
                tree.make(TRASH)
        try:
            tree.rename(at, removed)
        except OSError as err:
            if err.errno == errno.ENOENT:  # another prune was faster
                return ""
            if err.errno in (errno.EPERM, errno.EACCES):
                return f"it may not be removed ({err.strerror}){owned_by(folder)}"
            if err.errno != errno.EXDEV:
                raise
            removed = at  # a folder in the lower layer of an overlay has no other name
        if use := _in_use(tree, removed):
            with suppress(OSError):  # a new extraction has just made the folder again: the new one stays
                tree.rename(removed, at)
                return use
        tree.remove(removed)
    return ""


def empty_trash(root: Path) -> None:
    """Remove the entries that interrupted prunes left in the trash; what a prune cannot have put there stays."""
    tree = open_tree(root)
    tree.sweep(TRASH)
    for name in tree.names(TRASH):
        if PRUNED.fullmatch(name) and not _in_use(tree, f"{TRASH}/{name}"):
            with suppress(PermissionError):
                tree.remove(f"{TRASH}/{name}")


def copy_entries(source: CachePath, target: CachePath, options: CopyOptions = CopyOptions()) -> list[tuple[Entry, int]]:
    """Copy complete streams of entries into another cache; returns each copy with the bytes of tokens written.

    The tokens stay the same bit by bit; a missing target is created.
    NotCached if there are no such entries; CacheUnusable if a chunk is damaged, or the source or target cannot be used.
    """
    store, copies = FeatureStore(source), FeatureStore(target)
    if not store.root.is_dir():
        raise CacheUnusable(f"there is no cache at {store.root}")
    found = store.find(**options.entries.changed())
    entries = [(entry, names) for entry in found if entry.complete_pairs() and (names := entry.aliases())]
    if not entries:
        raise NotCached(f"nothing of that in {store.root}; see: " + command("cache ls", cache=str(store.root)))
    copied = []
    with track("copying", sum(entry.nbytes() for entry, _ in entries), "bytes") as bar:
        for entry, names in entries:
            first = next(iter(names))
            copy = copies.create(entry.spec, replace(entry.samples, groups=entry.groups(first)), first)
            for alias, at_ns in names.items():
                copy.add_alias(alias, at_ns, groups=entry.groups(alias))
            copied.append((copy, copy_entry(entry, copy, format=options.format, advance=bar.advance)))
    return copied


def copy_entry(
    entry: Entry, target: Entry, *, format: FormatName | None = None, advance: Callable[[int], None] = lambda _: None
) -> int:
    """Copy the complete streams that `target`, the same entry of another cache, lacks; returns the bytes of tokens written.

    After an interruption the next call continues with the next shard. `advance` gets the bytes of every finished shard.
    CacheUnusable if a chunk is damaged; its shard is not written.
    """
    if entry.key != target.key:
        raise CacheUnusable(f"{target.path} holds other features than {entry.path}")
    written = 0
    for source in dict.fromkeys(entry.sources().values()):
        if source.stream.pairs <= target.complete_pairs():
            continue
        stream = msgspec.structs.replace(source.stream, format=format or source.stream.format)
        target.begin([stream])
        # Another writer may have begun the stream first, with other shard sizes.
        stream = next(begun for begun in target.streams() if begun.name == stream.name)
        step = min(stream.chunk_rows, source.stream.chunk_rows)  # powers of two: a step never leaves a block
        skipped = source.manifest.skipped
        for shard in target.missing_shards(stream):
            rows = stream.rows(shard)
            with target.draft(stream, shard) as draft:
                for start in range(rows.start, rows.stop, step):
                    part = range(start, min(start + step, rows.stop))
                    unread = {row: skipped[row] for row in part if row in skipped}
                    draft.append_stored(read_stored(source, part), unread)
                draft.publish()
            written += stream.shard_bytes(shard)
            advance(stream.shard_bytes(shard))
        target.seal()
    return written
