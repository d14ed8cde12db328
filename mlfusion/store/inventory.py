"""What lies in the cache: its entries, their folders, and the bytes that they take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfusion.errors import CacheUnusable, NotCached
from mlfusion.specs.identity import FeatureSpec
from mlfusion.specs.names import token_words
from mlfusion.store.entry import Entry, folder_bytes
from mlfusion.store.feature_store import QUARANTINE, TRASH, CachePath, FeatureStore


@dataclass(frozen=True, kw_only=True)
class EntrySummary:
    """One entry in a list."""

    spec: FeatureSpec
    key: str
    tokens: str  # as --tokens takes them; '' while none is complete
    bytes: int  # of the complete streams in the entry's own folder
    skipped: int  # images that could not be read
    unreadable: dict[str, str]  # sample id → why its image could not be read; empty if reasons were not asked for

    def row(self) -> dict[str, Any]:
        """The entry as a row of a table."""
        return {
            "model": self.spec.model.name,
            "dataset": self.spec.data.name,
            "split": self.spec.data.split,
            "images": self.spec.data.images,
            "skipped": self.skipped,
            "tokens": self.tokens or "(not complete)",
            "dtype": self.spec.dtype,
            "bytes": self.bytes,
            "key": self.key,
        }

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache ls --json` prints."""
        return self.row() | {"unreadable": self.unreadable}


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Entries, and a sentence about each one that is damaged."""

    entries: tuple[EntrySummary, ...]
    damaged: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache ls --json` prints."""
        return {"entries": [entry.to_json() for entry in self.entries], "damaged": list(self.damaged)}


def list_entries(
    cache: CachePath = None,
    *,
    model: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    reasons: bool = True,
) -> Listing:
    """List the entries of a cache, in all its layers.

    Args:
        cache: its root, or layers of them; default $MLFUSION_CACHE, or ./cache.
        model: only entries of this model; default any.
        dataset: only entries of this data set; default any.
        split: only entries of this split; default any.
        reasons: whether to read why images were skipped.
    """
    damaged: list[str] = []
    found = []
    for entry in FeatureStore(cache).find(model=model, dataset=dataset, split=split, on_damage=damaged.append):
        try:
            found.append(_summary(entry, reasons))
        except NotCached:  # removed since
            continue
        except CacheUnusable as err:
            damaged.append(str(err))
    return Listing(entries=tuple(found), damaged=tuple(damaged))


def _summary(entry: Entry, reasons: bool) -> EntrySummary:
    sources = entry.sources()
    own = [source for source in dict.fromkeys(sources.values()) if source.folder.is_relative_to(entry.path)]
    skipped = entry.skipped(sources)
    return EntrySummary(
        spec=entry.spec,
        key=entry.key,
        tokens=token_words(frozenset(sources)),
        bytes=sum(source.stream.nbytes for source in own),
        skipped=len(skipped),
        unreadable=entry.unreadable(skipped) if reasons else {},
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

    @property
    def bytes(self) -> int:
        """Bytes of all."""
        return sum(self.entries.values()) + sum(self.beside.values())

    def rows(self) -> list[dict[str, Any]]:
        """The entries as rows of a table."""
        return [{"model": model, "dataset": data, "bytes": size} for (model, data), size in self.entries.items()]

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache du --json` prints."""
        return {"entries": self.rows(), "beside": self.beside, "bytes": self.bytes}


def disk_usage(cache: CachePath = None) -> DiskUsage:
    """Bytes on disk by model and data set, measured file by file, in a cache's uppermost layer."""
    store = FeatureStore(cache)
    sums: dict[tuple[str, str], int] = {}
    for entry in store.own_entries():
        name = entry.spec.model.name, entry.spec.data.name
        sums[name] = sums.get(name, 0) + entry.size()
    return DiskUsage(
        root=store.root,
        entries=dict(sorted(sums.items(), key=lambda one: -one[1])),
        beside={name: folder_bytes(store.root / name) for name in (QUARANTINE, TRASH)},
    )
