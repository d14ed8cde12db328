"""Leases stop two extractors from making the same shard; pins stop `prune` from removing entries that are being read.

Neither is a lock. Publishing is safe without them (the first writer wins), so a lost or ignored lease only costs duplicate
work. A lease is taken over when its holder is dead, or when it was not renewed for its whole term *as measured by the process
that takes it over, on its own clock*: clocks of different hosts are never compared.
"""

import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from mlfusion.system import disk

TERM = 60.0  # seconds without renewal after which a lease may be taken over
PIN_TERM = 24 * 3600.0  # seconds after which a pin of a process on another host is ignored
RENEWALS = 4  # per term


class Leases:
    """The leases of one worker in one folder, each named after a piece of work. Safe for threads."""

    def __init__(self, folder: Path, term: float | None = None) -> None:
        self._folder = folder
        self.term = TERM if term is None else term
        self._owned: dict[str, str] = {}  # name → the claim that we wrote into it
        # name → last observed state, and the time of its first observation
        self._observed: dict[str, tuple[tuple[int, int, str], float]] = {}
        self._renewed = time.monotonic()
        self._lock = threading.RLock()

    def take(self, names: Sequence[str]) -> bool:
        """Take the leases of all these pieces of work, or of none."""
        with self._lock:
            for count, name in enumerate(names):
                if not self._take(name):
                    self.release(names[:count])
                    return False
        return True

    def _take(self, name: str) -> bool:
        path, claim = self._folder / name, disk.claim()
        state = _state(path)
        if state is not None:
            observed, since = self._observed.get(name, (None, 0.0))
            if observed != state:
                since = time.monotonic()
                self._observed[name] = state, since
            if disk.alive(state[2]) is not False and time.monotonic() - since <= self.term:
                return False
            _remove_unchanged(path, state)
        with disk.drafted(disk.draft_name(self._folder)) as draft:
            draft.write_text(claim, encoding="utf-8")
            with suppress(FileNotFoundError):
                if _link(draft, path):
                    self._owned[name] = claim
            draft.unlink(missing_ok=True)
        return name in self._owned

    def renew(self) -> None:
        """Renew all leases; cheap to call often, it acts RENEWALS times per term."""
        with self._lock:
            if time.monotonic() - self._renewed < self.term / RENEWALS:
                return
            self._renewed = time.monotonic()
            for name, claim in list(self._owned.items()):
                path = self._folder / name
                with suppress(OSError):
                    if path.read_text(encoding="utf-8") == claim:
                        os.utime(path)
                        continue
                del self._owned[name]  # another worker took it over; this one finishes its work anyway

    def release(self, names: Iterable[str] | None = None) -> None:
        """Release some leases; default all."""
        with self._lock:
            for name in list(self._owned) if names is None else names:
                claim = self._owned.pop(name, None)
                path = self._folder / name
                with suppress(OSError):
                    if claim is not None and path.read_text(encoding="utf-8") == claim:
                        path.unlink()

    def holder(self, name: str) -> str:
        """The holder of a lease in words: 'process 17 on host'."""
        state = _state(self._folder / name)
        host, _, rest = (state[2] if state else "nobody~0~").partition("~")
        return f"process {rest.partition('~')[0].partition('.')[0]} on {host.rpartition('.')[0] or host}"


class Pin:
    """A reader's mark in an entry; a read-only cache gets none."""

    def __init__(self, folder: Path) -> None:
        self._path, self._process = folder / disk.claim(), os.getpid()
        self._renewed = time.monotonic()
        with suppress(OSError):
            self._path.touch()

    def renew(self) -> None:
        """Renew the pin; cheap to call often."""
        if time.monotonic() - self._renewed > PIN_TERM / 100:
            self._renewed = time.monotonic()
            with suppress(OSError):
                os.utime(self._path)

    def close(self) -> None:
        """Remove the pin; does nothing in a forked child."""
        if os.getpid() == self._process:
            with suppress(OSError):
                self._path.unlink()


def in_use(folder: Path) -> str:
    """How processes that may be alive use an entry's folder, in words; '' if none does."""
    if any(_may_be_alive(path, PIN_TERM) for path in disk.published(folder / "pins")):
        return "it is being read"
    leased = any(_may_be_alive(path, TERM * 10) for path in disk.published(folder / "leases"))
    return "it is being extracted" if leased else ""


def sweep(folder: Path) -> None:
    """Remove leases and pins of dead processes, and those of other hosts after a day."""
    for path in disk.published(folder):
        state = _state(path)
        if state is not None and not _may_be_alive(path, disk.STALE):
            _remove_unchanged(path, state)


def _may_be_alive(path: Path, term: float) -> bool:
    claim = path.name
    if claim.count("~") != 2:  # a lease: the claim is its text
        try:
            claim = path.read_text(encoding="utf-8")
        except OSError:
            return False
    alive = disk.alive(claim)
    return disk.age(path) < term if alive is None else alive


def _state(path: Path) -> tuple[int, int, str] | None:
    """(inode, time, text): differs between two holders of a lease, and after each renewal."""
    try:
        status = path.stat()
        return status.st_ino, status.st_mtime_ns, path.read_text(encoding="utf-8")
    except OSError:
        return None


def _remove_unchanged(path: Path, state: tuple[int, int, str]) -> None:
    """Remove a lease in this state, but not one that another worker has taken since."""
    draft = disk.draft_name(path.parent)
    with suppress(FileNotFoundError):
        os.rename(path, draft)
        if _state(draft) != state:
            _link(draft, path)
        draft.unlink()


def _link(draft: Path, path: Path) -> bool:
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # no hard links on this file system: exclusive creation is enough for a small claim
        try:
            file = open(path, "x", encoding="utf-8")  # noqa: SIM115 - closed below
        except FileExistsError:
            return False
        with disk.drafted(path), file:
            file.write(draft.read_text(encoding="utf-8"))
    return True
