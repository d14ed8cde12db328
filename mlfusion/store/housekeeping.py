"""Keeps a shared cache within bounds: what lies there, and what may go. Never takes what somebody reads or extracts.

An entry that goes is first renamed into `trash/`; only there, where no new reader can find it, is it looked at once more,
and put back if a reader's mark came with it. So a reader that marks an entry before it opens it keeps it.
"""

import os
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfusion import disk
from mlfusion.errors import MlfusionError, NotCached
from mlfusion.store.claims import pinned, working
from mlfusion.store.entry import Entry

TRASH = "trash"


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What becomes of one entry."""

    entry: Entry
    bytes: int
    idle: float  # seconds since it was last read or extracted
    goes: bool
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
            "removed": self.goes,
            "why": self.why,
            "key": self.entry.key,
        }


def decide(
    entries: Collection[Entry],
    *,
    every: Collection[Entry],
    now: float,
    older: float | None = None,
    quota: int | None = None,
    needed: Collection[str] | None = None,
) -> list[Fate]:
    """What would go, the longest unused first.

    Args:
        entries: that may go: those of the model and data set that were named.
        every: all entries of the cache, which the quota counts.
        now: by the clock of the cache's file system.
        older: seconds unused after which an entry goes.
        quota: bytes that all entries together may take; of `entries` the longest unused go until they do.
        needed: keys that must stay, such as those that results were made from.
    """
    sizes = {entry.key: entry.size() for entry in every}
    over = sum(sizes.values()) - quota if quota is not None else 0
    fates, used = [], {}
    for entry in entries:
        with suppress(NotCached):  # another prune was faster
            used[entry] = entry.used
    for entry in sorted(used, key=lambda entry: used[entry]):
        idle, nbytes = max(now - used[entry], 0.0), sizes[entry.key]
        if needed is not None and entry.key in needed:
            goes, why = False, "results were made from it"
        elif older is not None and idle < older:
            goes, why = False, "used lately"
        elif quota is not None and over <= 0:
            goes, why = False, "the rest fits"
        elif kept := in_use(entry.path):
            goes, why = False, kept
        else:
            goes, why = True, "unused for longest" if quota is not None else "as asked"
            over -= nbytes
        fates.append(Fate(entry=entry, bytes=nbytes, idle=idle, goes=goes, why=why))
    return fates


def in_use(folder: Path) -> str:
    """Who is at work in an entry's folder; '' if nobody is."""
    if pinned(folder / "pins"):
        return "it is being read"
    return "it is being extracted" if working(folder / "leases") else ""


def remove(root: Path, folder: Path) -> str:
    """Take an entry out of the cache; '' or, where it stays, why."""
    trash = root / TRASH
    with disk.told(root):
        trash.mkdir(exist_ok=True)
        aside = trash / f"{folder.name}~{uuid.uuid4().hex[:8]}"
        try:
            os.rename(folder, aside)
        except FileNotFoundError:
            return ""  # somebody else was faster
        if kept := in_use(aside):
            with suppress(OSError):  # extracted anew in this instant: then the new one stands
                os.rename(aside, folder)
                return kept
        disk.remove(aside)
    return ""


def empty(root: Path) -> None:
    """Remove what earlier prunes left half done."""
    for aside in (root / TRASH).glob("*"):
        if not in_use(aside):
            disk.remove(aside)


def check_criteria(**criteria: object) -> None:
    """Refuse a prune that names nothing to go by: it would remove everything."""
    if all(value in (None, False) for value in criteria.values()):
        names = ", ".join("--" + name.replace("_", "-") for name in criteria)
        raise MlfusionError(f"what may go? name at least one of {names}; with --dry-run nothing is removed")
