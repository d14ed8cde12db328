"""Keeps a shared cache within bounds: which entries may be removed, and their removal. An entry in use always stays.

An entry that is removed is first renamed into `trash/`; only there, where no new reader can find it, is it looked at once
more, and put back if a reader's pin came with it. So a reader that pins an entry before it opens it keeps it.
"""

import os
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlfusion.errors import MlfusionError, NotCached
from mlfusion.store.entry import Entry
from mlfusion.store.feature_store import TRASH, CachePath, FeatureStore
from mlfusion.store.leases import is_leased, is_pinned
from mlfusion.system import disk


@dataclass(frozen=True, kw_only=True)
class PruneDecision:
    """What becomes of one entry, and why."""

    entry: Entry
    bytes: int
    idle: float  # seconds since it was last read or extracted
    remove: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache prune --json` prints."""
        spec = self.entry.spec
        return {
            "model": spec.model.name,
            "dataset": spec.data.name,
            "split": spec.data.split,
            "bytes": self.bytes,
            "idle_days": round(self.idle / 86400, 2),
            "removed": self.remove,
            "why": self.why,
            "key": self.entry.key,
        }


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What `prune` did, or would do."""

    decisions: tuple[PruneDecision, ...]  # the longest unused first
    entries: int  # in the cache before
    dry_run: bool

    @property
    def removed(self) -> tuple[PruneDecision, ...]:
        """Decisions about the entries that were removed."""
        return tuple(each for each in self.decisions if each.remove)

    @property
    def bytes_freed(self) -> int:
        """Bytes on disk of the entries that were removed."""
        return sum(each.bytes for each in self.removed)

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion cache prune --json` prints."""
        return {
            "dry_run": self.dry_run,
            "entries": [each.to_json() for each in self.decisions],
            "bytes_freed": self.bytes_freed,
        }


def prune(
    cache: CachePath = None,
    *,
    model: str | None = None,
    dataset: str | None = None,
    older: float | None = None,
    quota: int | None = None,
    needed: Collection[str] | None = None,
    dry_run: bool = False,
) -> PruneResult:
    """Remove entries of a cache's uppermost layer by name, age or size, or because nothing needs them.

    Args:
        cache: its root, or layers of them; default $MLFUSION_CACHE, or ./cache.
        model: only entries of this model; default any.
        dataset: only entries of this data set; default any.
        older: only entries that were not used for so many seconds.
        quota: only as many entries, the longest unused first, as it takes to get the cache down to so many bytes.
        needed: keys of entries that stay, such as those that results were made from.
        dry_run: decide, but remove nothing.

    Raises:
        MlfusionError: there is no criterion: everything would be removed.
        CacheUnusable: the cache cannot be written.
    """
    if all(value is None for value in (model, dataset, older, quota, needed)):
        raise MlfusionError(
            "what may go? name at least one of --model, --dataset, --older, --size, --unneeded; with --dry-run nothing is "
            "removed"
        )
    store = FeatureStore(cache)
    every = list(store.own_entries())
    wanted = {entry.key for entry in store.find(model=model, dataset=dataset)}
    decisions = decide(
        [entry for entry in every if entry.key in wanted],
        every=every,
        now=disk.clock(store.root),
        older=older,
        quota=quota,
        needed=needed,
    )
    if not dry_run:
        empty_trash(store.root)
        decisions = [_carry_out(store.root, each) for each in decisions]
    return PruneResult(decisions=tuple(decisions), entries=len(every), dry_run=dry_run)


def _carry_out(root: Path, decision: PruneDecision) -> PruneDecision:
    if decision.remove and (why := remove_entry(root, decision.entry.path)):
        return replace(decision, remove=False, why=why)
    return decision


def decide(
    entries: Collection[Entry],
    *,
    every: Collection[Entry],
    now: float,
    older: float | None = None,
    quota: int | None = None,
    needed: Collection[str] | None = None,
) -> list[PruneDecision]:
    """Decide what is removed, the longest unused first.

    Args:
        entries: candidates: those of the model and data set that were named.
        every: all entries of the cache, which the quota counts.
        now: seconds by the clock of the cache's file system.
        older: seconds unused after which an entry is removed.
        quota: bytes that all entries together may take; the longest unused of `entries` are removed until they do.
        needed: keys that must stay, such as those that results were made from.
    """
    sizes = {entry.key: entry.size() for entry in every}
    over = sum(sizes.values()) - quota if quota is not None else 0
    decisions, read_at = [], {}
    for entry in entries:
        with suppress(NotCached):  # another prune was faster
            read_at[entry] = entry.read_at()
    for entry in sorted(read_at, key=lambda entry: read_at[entry]):
        idle, nbytes = max(now - read_at[entry], 0.0), sizes[entry.key]
        if needed is not None and entry.key in needed:
            remove, why = False, "results were made from it"
        elif older is not None and idle < older:
            remove, why = False, "used lately"
        elif quota is not None and over <= 0:
            remove, why = False, "the rest fits"
        elif use := in_use(entry.path):
            remove, why = False, use
        else:
            remove, why = True, "unused for longest" if quota is not None else "as asked"
            over -= nbytes
        decisions.append(PruneDecision(entry=entry, bytes=nbytes, idle=idle, remove=remove, why=why))
    return decisions


def in_use(folder: Path) -> str:
    """Who uses an entry's folder; '' if nobody does."""
    if is_pinned(folder / "pins"):
        return "it is being read"
    return "it is being extracted" if is_leased(folder / "leases") else ""


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
