"""The cache as a whole: entries by key, by name, in one folder or in layers, and how an extraction fills one.

Any number of extractors may fill one entry: each takes leases on the shards that it writes next, skips those that others have
leased, and waits for them at the end. When an extraction ends or fails, published shards stay; drafts and leases are removed.
"""

import logging
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Self, TypeVar

from mlfusion.errors import CacheUnusable, MlfusionError, NotCached
from mlfusion.specs.identity import FORMAT, FeatureSpec, Pair
from mlfusion.specs.names import ModelRef
from mlfusion.specs.options import FormatName
from mlfusion.store import records
from mlfusion.store.entry import KEY, Entry, ShardDraft, draft_entry, restore_missing_files
from mlfusion.store.leases import Leases
from mlfusion.store.records import CacheMarker, Names, Samples, removed_message
from mlfusion.store.stream import Stream, streams_for
from mlfusion.system import disk
from mlfusion.system.references import Kind, find_path, parse_model
from mlfusion.system.tree import Tree

CACHEDIR_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# A cache of mlfusion; see README.md beside this file.\n"
MARKER = "mlfusion-cache.json"
QUARANTINE, TRASH = "quarantine", "trash"  # folders of damaged files, and of entries that are being pruned
WAIT = 0.5  # seconds between checks of what other extractors have finished

T = TypeVar("T")
logger = logging.getLogger(__name__)

OnDamage = Callable[[str], None]
"""Called with one sentence about each damaged entry."""

CachePath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
"""Root of a cache; or a list (or 'mine:/lab/shared') of roots: the first is written, the others are only read."""

Missing = dict[Stream, set[int]]
"""Stream → numbers of the shards that are missing."""

Piece = tuple[range, list[Stream]]
"""(rows of at most one shard of each stream, streams that lack these rows)."""


@dataclass(frozen=True, eq=False)
class Alias:
    """An entry under one of its names."""

    entry: Entry
    names: Names
    at_ns: int  # time of the last extraction under these names, in nanoseconds; only compared, never shown
    matches: bool  # whether the user's words refer to these names


def default_root() -> str:
    """$MLFUSION_CACHE, or `cache` in the working folder."""
    return os.environ.get("MLFUSION_CACHE") or "cache"


class Gap:
    """The missing tokens of one entry, for one extractor. `FeatureStore.filling` creates it.

    for pieces in gap.rounds():
        for rows, streams in pieces:
            ...  # compute; gap.draft(stream, shard), append its rows, gap.publish(draft); gap.renew() now and then
    gap.entry.record_run(run)
    """

    def __init__(self, entry: Entry, pairs: frozenset[Pair], log: Callable[[str], None]) -> None:
        self.entry, self._requested, self._log = entry, pairs, log
        self.pairs = pairs  # of all streams of this round, since all pairs of a stream are filled together
        self._leases = Leases(entry.tree, f"{entry.at}/leases")
        self.renew = self._leases.renew  # to be called after every batch
        self._cleanup = ExitStack()
        self._claimed = False  # whether this worker claimed a piece in this round
        self._advances = False  # whether a missing shard belongs to a piece, which this or another worker makes

    @property
    def title(self) -> str:
        """The work in words: model, data set, split and view."""
        spec = self.entry.spec
        view = "" if spec.model.view == "plain" else f", {spec.model.view}"
        return f"{spec.model.name} on {spec.data.name}/{spec.data.split}{view}"

    def rounds(self) -> Iterator[Iterator[Piece]]:
        """Yield rounds of pieces until no row is missing; publish a round's shards before asking for the next round.

        A round gives pieces in the order of rows, and claims each when it is asked for.
        """
        waited_for = ""
        while True:
            self.entry.seal()
            missing = self.entry.missing(self._requested)
            if not missing:
                return
            self.pairs = frozenset(pair for stream in missing for pair in stream.pairs)
            self._claimed = self._advances = False
            yield self._claim(missing)
            if self._claimed:
                continue
            if not self._advances:
                raise CacheUnusable(
                    f"the extraction of {self.title} does not advance: shards are missing under {self.entry.path} that no "
                    "extraction makes; run: mlfusion cache verify --repair"
                )
            stream, shards = next(iter(missing.items()))  # other extractors make all that is missing
            holder = self._leases.holder(lease_name(stream, min(shards)))
            if waited_for != (waited_for := holder) and holder:
                self._log(f"the rest of {self.title} is being extracted by {holder}; waiting for it")
            time.sleep(min(WAIT, self._leases.term / 4))

    def _claim(self, missing: Missing) -> Iterator[Piece]:
        # Shard sizes are powers of two: a unit holds whole shards of every stream, and each is a multiple of a step.
        unit, step = (pick(stream.shard_rows for stream in missing) for pick in (max, min))
        images = self.entry.spec.data.images
        for first in range(0, images, unit):
            rows = range(first, min(first + unit, images))
            unleased = {
                stream: shards & set(range(rows.start // stream.shard_rows, -(-rows.stop // stream.shard_rows)))
                for stream, shards in missing.items()
            }
            names = [lease_name(stream, shard) for stream, shards in unleased.items() for shard in sorted(shards)]
            self._advances = self._advances or bool(names)
            if not names or not self._leases.take(names):
                continue
            # Another extractor may have published a shard before we took its lease.
            lacking = {stream: shards & set(self.entry.missing_shards(stream)) for stream, shards in unleased.items()}
            self._leases.release(
                lease_name(stream, shard) for stream, shards in unleased.items() for shard in shards - lacking[stream]
            )
            for start in range(rows.start, rows.stop, step):
                streams = [stream for stream, shards in lacking.items() if start // stream.shard_rows in shards]
                if streams:
                    self._claimed = True
                    yield range(start, min(start + step, rows.stop)), streams

    def draft(self, stream: Stream, shard: int) -> ShardDraft:
        """Begin a claimed shard; its draft is removed at exit if it was not published."""
        return self._cleanup.enter_context(self.entry.draft(stream, shard))

    def publish(self, draft: ShardDraft) -> None:
        """Publish a shard, unless another extractor has, and release its lease."""
        draft.publish()
        self._leases.release([lease_name(draft.stream, draft.shard)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.callback(self._leases.release)
        self._cleanup.close()


def lease_name(stream: Stream, shard: int) -> str:
    """Name of the lease on a shard."""
    return f"{stream.name}~{shard}"


def _new_streams(
    entry: Entry | None, spec: FeatureSpec, shapes: Mapping[Pair, tuple[int, int]], format: FormatName
) -> list[Stream]:
    """New streams for every pair that is in no stream of the entry yet; `shapes` as for `streams_for`."""
    known = entry.complete_pairs().union(*(stream.pairs for stream in entry.streams())) if entry else frozenset()
    new = {pair: shape for pair, shape in shapes.items() if pair not in known}
    return streams_for(new, images=spec.data.images, dtype=spec.dtype, format=format)


def missing_bytes(missing: Missing) -> int:
    """Bytes of shards that are missing."""
    return sum(stream.shard_bytes(shard) for stream, shards in missing.items() for shard in shards)


class FeatureStore:
    """Entries by key, in one folder, or in layers: the user's own cache above caches that are only read."""

    def __init__(self, cache: CachePath = None) -> None:
        """Open a cache, existing or not; CacheUnusable if a newer mlfusion made it, or a lower layer does not exist."""
        self.root, *lower = _roots(cache)
        self.folder = self.root / f"v{FORMAT}"  # of the entries
        self.lower = tuple(FeatureStore([root]) for root in lower)
        for layer in self.lower:
            if not layer.root.is_dir():
                raise CacheUnusable(f"there is no cache at {layer.root}, which was named as one to read from")
        self.tree, self.version = records.open_tree(self.root), self.folder.name
        if self.root.is_dir():
            with suppress(FileNotFoundError):
                records.load(Tree(self.root, records.no_cache), MARKER, CacheMarker)

    def entry(self, spec: FeatureSpec) -> Entry | None:
        """The entry of these features, complete or not; None if there is none."""
        return self.by_key(spec.key)

    def by_key(self, key: str) -> Entry | None:
        """The entry of this key in the uppermost layer that has it, joined with those of lower layers."""
        lower = [entry for layer in self.lower if (entry := layer.by_key(key))]
        with suppress(NotCached):
            return Entry(self.folder / key, lower, self.tree)
        return Entry(lower[0].path, lower[1:]) if lower else None

    def entries(self, on_damage: OnDamage | None = None) -> Iterator[Entry]:
        """All entries of all layers, complete or not; damaged ones are skipped and reported, by default to the log."""
        layers = (self, *self.lower)
        keys = {key for layer in layers for key in layer.entry_names()}
        yield from filter(None, (read_or_report(partial(self.by_key, key), on_damage) for key in sorted(keys)))

    def entry_names(self) -> list[str]:
        """Names of the folders of the uppermost layer that can be an entry's."""
        return [name for name in self.tree.names(self.version) if KEY.fullmatch(name)]

    def own_entries(self, on_damage: OnDamage | None = None) -> Iterator[Entry]:
        """Entries of the uppermost layer alone; damaged ones are reported, by default to the log."""
        paths = (self.folder / key for key in self.entry_names())
        yield from filter(None, (read_or_report(partial(Entry, path), on_damage) for path in paths))

    def find(
        self,
        *,
        model: str | None = None,
        dataset: str | None = None,
        split: str | None = None,
        on_damage: OnDamage | None = None,
    ) -> list[Entry]:
        """Entries that were extracted under these names (catalogue names, hub ids or folders); by default all.

        `model` may name a hook point and settings, as in 'clip-vit-b16:block'. For `on_damage` see `entries`.
        """
        if model is None and dataset is None:
            return [entry for entry in self.entries(on_damage) if split in (None, entry.spec.data.split)]
        found = self.aliases(model=model, dataset=dataset, split=split, on_damage=on_damage)
        return list(dict.fromkeys(alias.entry for alias in found if alias.matches))

    def aliases(
        self,
        *,
        model: str | None = None,
        dataset: str | None = None,
        split: str | None = None,
        on_damage: OnDamage | None = None,
    ) -> list[Alias]:
        """All entries of a split, or of all splits, under each of their names; arguments as for `find`."""
        ref = parse_model(model) if model else None
        found: list[Alias] = []
        for entry in self.entries(on_damage):
            if split in (None, entry.spec.data.split):
                times = read_or_report(entry.aliases, on_damage) or {}
                found += [Alias(entry, names, at, _match(names, ref, dataset)) for names, at in times.items()]
        return found

    def complete_pairs(self, spec: FeatureSpec) -> frozenset[Pair]:
        """Every (layer, kind) of these features that is complete."""
        entry = self.entry(spec)
        return entry.complete_pairs() if entry else frozenset()

    def missing(self, spec: FeatureSpec, shapes: Mapping[Pair, tuple[int, int]], format: FormatName) -> Missing:
        """The shards that `filling` with the same arguments would write."""
        entry = self.entry(spec)
        new = {stream: set(range(stream.shards)) for stream in _new_streams(entry, spec, shapes, format)}
        return (entry.missing(frozenset(shapes)) if entry else {}) | new

    @contextmanager
    def filling(
        self,
        spec: FeatureSpec,
        samples: Samples,
        names: Names,
        shapes: Mapping[Pair, tuple[int, int]],
        *,
        format: FormatName = "zarr",
        log: Callable[[str], None] = lambda _: None,
    ) -> Iterator[Gap]:
        """Fill an entry with the tokens of `shapes` (as for `streams_for`) that it lacks; see `Gap`.

        A missing entry is created, and `names` refer to it from now on; `format` is that of new streams. Raises as `create`,
        and CacheUnusable if the disk is too small. `log` gets a message while this waits for another extractor.
        """
        entry, pairs = self.create(spec, samples, names), frozenset(shapes)
        with disk.translate_os_errors(self.root, lambda: missing_bytes(entry.missing(pairs))):
            new = _new_streams(entry, spec, shapes, format)
            needed = missing_bytes(entry.missing(pairs)) + sum(stream.nbytes for stream in new)
            if needed > disk.free_bytes(entry.path):  # refuse early what the disk cannot hold
                raise CacheUnusable(
                    f"no space left for the cache: {needed / 1e6:,.3f} MB are needed under {entry.path}, "
                    f"{disk.free_text(entry.path)}; free some space (mlfusion cache prune), choose another place with --cache, "
                    "or ask for fewer --layers or --tokens"
                )
            entry.begin(new)
            self._compare(entry, shapes)
            with Gap(entry, pairs, log) as gap:
                yield gap
        entry.mark_used(names, samples.groups)

    @staticmethod
    def _compare(entry: Entry, shapes: Mapping[Pair, tuple[int, int]]) -> None:
        """CacheUnusable if a stream that will be filled has other sizes than the model's tokens: numbers from elsewhere."""
        for stream in entry.streams():
            for pair in stream.pairs & shapes.keys():
                if shapes[pair] != (stream.tokens, stream.width):
                    tokens, width = shapes[pair]
                    raise CacheUnusable(
                        f"{entry.folder(stream)} is for {stream.tokens} tokens of width {stream.width}, the model has {tokens} "
                        f"of width {width}: it is from elsewhere; remove this folder, and run the same command again"
                    )

    def reuse(self, spec: FeatureSpec, samples: Samples, names: Names) -> Entry:
        """The entry of complete features; restores small files that a repair removed, NotCached if a prune removed it."""
        entry = self.entry(spec)
        if entry is None:
            raise NotCached(removed_message(self.folder / spec.key))
        if entry.path.parent == self.folder:
            with suppress(OSError):  # the cache may be read-only
                restore_missing_files(entry.tree, entry.at, spec, samples)
                entry.sweep()  # drafts of an extractor that was killed after its last shard
        entry.mark_used(names, samples.groups)
        if names not in entry.names():  # the entry is in a cache that is only read
            with suppress(CacheUnusable):
                return self.create(spec, samples, names)
        return entry

    def create(self, spec: FeatureSpec, samples: Samples, names: Names) -> Entry:
        """The entry of these features in the uppermost layer, created if missing; drafts of dead writers are removed.

        CacheUnusable if the cache cannot be written, NotCached if a prune removed the entry meanwhile.
        """
        with disk.translate_os_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            if owner := records.owned_by(self.root.resolve()):
                _say_once(f"the cache at {self.root} is another user's{owner}, who can change what you extract")
            marker = CacheMarker(format=FORMAT, uuid=str(uuid.uuid4()))
            for name, text in {"CACHEDIR.TAG": CACHEDIR_TAG, MARKER: records.encode(marker)}.items():
                if not self.tree.require(name, stat.S_IFREG):
                    self.tree.publish(name, text.encode())
            if not self.tree.require(self.version, stat.S_IFDIR):
                with suppress(FileExistsError):
                    self.tree.make(self.version)
            self.tree.sweep()
            self.tree.sweep(self.version)
            at, path = f"{self.version}/{spec.key}", self.folder / spec.key
            if not self.tree.require(at, stat.S_IFDIR):
                self.tree.publish_folder(draft_entry(self.tree, self.version, spec, samples), at)
            restore_missing_files(self.tree, at, spec, samples)
            entry = self.entry(spec)
            if entry is None or entry.path != path:
                raise NotCached(removed_message(path))
            entry.add_alias(names, groups=samples.groups)
            entry.sweep()
            return entry


@lru_cache
def _say_once(line: str) -> None:
    logger.warning(line)


def read_or_report(read: Callable[[], T | None], on_damage: OnDamage | None = None) -> T | None:
    """The result of `read`; None if the entry was removed, or is damaged, which is reported."""
    with suppress(NotCached):
        try:
            return read()
        except CacheUnusable as err:
            (on_damage or logger.warning)(str(err))
    return None


def _match(names: Names, model: ModelRef | None, dataset: str | None) -> bool:
    """Whether the user's words for a model and a data set refer to an entry with these names."""

    def same(kind: Kind, reference: str, name: str, source: str, suffix: str = "") -> bool:
        if path := find_path(kind, reference):  # two folders or files may have the same name: their paths are compared
            return source == f"{path}{suffix}"
        return reference + suffix in (name, source)

    if dataset is not None and not same("data set", dataset, names.dataset, names.dataset_source):
        return False
    return model is None or same("model", model.name, names.model, names.model_source, model.suffix)


def _roots(cache: CachePath) -> list[Path]:
    if cache is None or cache == "":
        cache = default_root()
    if isinstance(cache, (str, os.PathLike)):
        text = os.fspath(cache)
        # The name of an existing folder may contain the separator.
        cache = [text] if Path(text).expanduser().is_dir() else [part for part in text.split(os.pathsep) if part]
    roots = [Path(root).expanduser() for root in cache]
    if not roots:
        raise MlfusionError("--cache names no folder; allowed: PATH, or several as MINE:SHARED")
    return roots


def differences(one: FeatureSpec, other: FeatureSpec) -> list[tuple[str, object, object]]:
    """Fields in which two specs differ: (name, value of `one`, value of `other`)."""
    changed: list[tuple[str, object, object]] = []
    for group in ("model", "data", None):
        a, b = (getattr(one, group), getattr(other, group)) if group else (one, other)
        for field in fields(a):
            values = getattr(a, field.name), getattr(b, field.name)
            if field.compare and field.name not in ("model", "data") and values[0] != values[1]:
                changed.append((f"{group}.{field.name}" if group else field.name, *values))
    return changed
