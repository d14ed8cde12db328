"""Leases keep two extractors off the same shard; pins keep `prune` off entries that are being read.

Neither is a lock. Publishing is safe without them (the first writer wins), so a lease that is lost, stolen or ignored by a
broken file system costs work done twice and nothing else. A lease is taken over when its holder is dead, or when nothing
renewed it for its whole term *as watched by the one who wants it, on its own clock*: hosts' clocks are never compared.
"""

import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from mlfusion.store.records import published
from mlfusion.system import disk

TERM = 60.0  # seconds without renewal after which a lease may be taken over
PIN_TERM = 24 * 3600.0  # seconds after which a pin of a process on another host is ignored
RENEWALS = 4  # per term


class Leases:
    """The leases of one worker in one folder, each named after a piece of work. Its threads may share it."""

    def __init__(self, folder: Path, term: float | None = None) -> None:
        self._folder = folder
        self.term = TERM if term is None else term
        self._held: dict[str, str] = {}  # name → what we wrote into it
        self._seen: dict[str, tuple[tuple[int, int, str], float]] = {}  # name → its state, and since when it is so
        self._renewed = time.monotonic()
        self._lock = threading.RLock()

    def take(self, names: Sequence[str]) -> bool:
        """Take the leases of all these pieces of work, or of none."""
        with self._lock:
            for taken, name in enumerate(names):
                if not self._take(name):
                    self.release(names[:taken])
                    return False
        return True

    def _take(self, name: str) -> bool:
        path, mine = self._folder / name, disk.claim()
        state = _state(path)
        if state is not None:
            seen, since = self._seen.get(name, (None, 0.0))
            if seen != state:
                since = time.monotonic()
                self._seen[name] = state, since
            lives = disk.alive(state[2])
            # A holder that is dead for certain need not be waited for.
            if lives is False or time.monotonic() - since > self.term:
                _take_away(path, state)
            else:
                return False
        with disk.drafted(disk.draft_name(self._folder)) as draft:
            draft.write_text(mine, encoding="utf-8")
            with suppress(FileNotFoundError):
                if _link(draft, path):
                    self._held[name] = mine
            draft.unlink(missing_ok=True)
        return name in self._held

    def renew(self) -> None:
        """Renew all leases; may be called often, it acts a few times per term."""
        with self._lock:
            if time.monotonic() - self._renewed < self.term / RENEWALS:
                return
            self._renewed = time.monotonic()
            for name, mine in list(self._held.items()):
                path = self._folder / name
                with suppress(OSError):
                    if path.read_text(encoding="utf-8") == mine:
                        os.utime(path)
                        continue
                del self._held[name]  # taken over while we were away; the work is finished all the same

    def release(self, names: Iterable[str] | None = None) -> None:
        """Give up some leases; default all."""
        with self._lock:
            for name in list(self._held) if names is None else names:
                mine = self._held.pop(name, None)
                path = self._folder / name
                with suppress(OSError):
                    if mine is not None and path.read_text(encoding="utf-8") == mine:
                        path.unlink()

    def holder(self, name: str) -> str:
        """The holder of a lease in words: 'process 17 on host'."""
        state = _state(self._folder / name)
        host, _, rest = (state[2] if state else "nobody~0~").partition("~")
        return f"process {rest.partition('~')[0].partition('.')[0]} on {host.rpartition('.')[0] or host}"


class Pin:
    """A reader's mark in an entry; a cache that cannot be written has none."""

    def __init__(self, folder: Path) -> None:
        self._path, self._process = folder / disk.claim(), os.getpid()
        self._touched = time.monotonic()
        with suppress(OSError):
            self._path.touch()

    def renew(self) -> None:
        """Renew the pin; may be called often."""
        if time.monotonic() - self._touched > PIN_TERM / 100:
            self._touched = time.monotonic()
            with suppress(OSError):
                os.utime(self._path)

    def close(self) -> None:
        """Remove the pin; a forked child leaves its parent's alone."""
        if os.getpid() == self._process:
            with suppress(OSError):
                self._path.unlink()


def in_use(folder: Path) -> str:
    """What is done with an entry's folder by processes that are not known to be dead; '' if nothing is."""
    if any(_may_live(path, PIN_TERM) for path in published(folder / "pins")):
        return "it is being read"
    return "it is being extracted" if any(_may_live(path, TERM * 10) for path in published(folder / "leases")) else ""


def sweep(folder: Path) -> None:
    """Remove leases and pins of dead processes, and those of other hosts after a day."""
    for path in published(folder):
        state = _state(path)
        if state is not None and not _may_live(path, disk.STALE):
            _take_away(path, state)


def _may_live(path: Path, term: float) -> bool:
    claim = path.name
    if claim.count("~") != 2:  # a lease: its name is the work's, its text the holder's
        try:
            claim = path.read_text(encoding="utf-8")
        except OSError:
            return False
    lives = disk.alive(claim)
    return disk.age(path) < term if lives is None else lives


def _state(path: Path) -> tuple[int, int, str] | None:
    """(inode, time, text): differs between two holders of a lease, and after each renewal."""
    try:
        about = path.stat()
        return about.st_ino, about.st_mtime_ns, path.read_text(encoding="utf-8")
    except OSError:
        return None


def _take_away(path: Path, state: tuple[int, int, str]) -> None:
    """Remove the lease that was seen, but not one that somebody else has taken since."""
    aside = disk.draft_name(path.parent)
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if _state(aside) != state:
            _link(aside, path)
        aside.unlink()


def _link(draft: Path, path: Path) -> bool:
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # no hard links on this file system: exclusive creation does as well for a small claim
        try:
            file = open(path, "x", encoding="utf-8")  # noqa: SIM115 - closed below
        except FileExistsError:
            return False
        with disk.drafted(path), file:
            file.write(draft.read_text(encoding="utf-8"))
    return True
