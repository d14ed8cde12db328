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

from mlfusion.errors import CacheUnusable
from mlfusion.system import disk
from mlfusion.system.tree import Tree

TERM = 60.0  # seconds without renewal after which a lease may be taken over
PIN_TERM = 24 * 3600.0  # seconds after which a pin of a process on another host is ignored
RENEWALS = 4  # per term
CLAIM_BYTES = 1000  # of the longest claim


class Leases:
    """The leases of one worker in one folder, each named after a piece of work. Safe for threads."""

    def __init__(self, tree: Tree, folder: str, term: float | None = None) -> None:
        self._tree, self._folder = tree, folder
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

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _take(self, name: str) -> bool:
        path, claim = self._path(name), disk.claim()
        state = _state(self._tree, path)
        if state is not None:
            observed, since = self._observed.get(name, (None, 0.0))
            if observed != state:
                since = time.monotonic()
                self._observed[name] = state, since
            if disk.alive(state[2]) is not False and time.monotonic() - since <= self.term:
                return False
            try:
                _remove_unchanged(self._tree, path, state)
            except PermissionError:  # another user's, in a folder with the sticky bit: work without a lease is safe
                self._owned[name] = claim
                return True
        with suppress(FileNotFoundError), self._tree.drafted(self._folder) as draft:
            self._tree.write(draft, claim.encode(), flush=False)  # it ends with the machine, as its holder does
            if _link(self._tree, draft, path, claim):
                self._owned[name] = claim
            self._tree.remove(draft)
        return name in self._owned

    def renew(self) -> None:
        """Renew all leases; cheap to call often, it acts RENEWALS times per term."""
        with self._lock:
            if time.monotonic() - self._renewed < self.term / RENEWALS:
                return
            self._renewed = time.monotonic()
            for name, claim in list(self._owned.items()):
                with suppress(OSError, CacheUnusable):
                    if _text(self._tree, self._path(name)) == claim:
                        self._tree.touch(self._path(name))
                        continue
                del self._owned[name]  # another worker took it over; this one finishes its work anyway

    def release(self, names: Iterable[str] | None = None) -> None:
        """Release some leases; default all."""
        with self._lock:
            for name in list(self._owned) if names is None else names:
                claim = self._owned.pop(name, None)
                with suppress(OSError, CacheUnusable):
                    if claim is not None and _text(self._tree, self._path(name)) == claim:
                        self._tree.remove(self._path(name))

    def holder(self, name: str) -> str:
        """The other holder of a lease in words: 'process 17 on host'; '' if there is none."""
        state = _state(self._tree, self._path(name))
        if state is None or state[2] == self._owned.get(name):
            return ""
        host, _, rest = state[2].partition("~")
        return f"process {rest.partition('~')[0].partition('.')[0]} on {host.rpartition('.')[0] or host}"


class Pin:
    """A reader's mark in an entry; a cache that cannot be written gets none."""

    def __init__(self, tree: Tree, folder: str) -> None:
        self._name, self._process, self._renewed = disk.claim(), os.getpid(), time.monotonic()
        self._folder: Tree | None = None  # open until the end, since a prune may move it
        with suppress(OSError):
            self._folder = tree.hold(folder)
            self._folder.create(self._name).close()

    def renew(self) -> None:
        """Renew the pin; cheap to call often."""
        if time.monotonic() - self._renewed > PIN_TERM / 100:
            self._renewed = time.monotonic()
            with suppress(OSError):
                if self._folder:
                    self._folder.touch(self._name)

    def close(self) -> None:
        """Remove the pin; a forked child leaves it to its parent."""
        if self._folder:
            if os.getpid() == self._process:
                with suppress(OSError):
                    self._folder.remove(self._name)
            self._folder.close()


def in_use(tree: Tree, folder: str) -> str:
    """How processes that may be alive use an entry's folder, in words; '' if none does."""
    for name, term, use in (("pins", PIN_TERM, "it is being read"), ("leases", TERM * 10, "it is being extracted")):
        if any(_may_be_alive(tree, f"{folder}/{name}/{mark}", term) for mark in tree.names(f"{folder}/{name}")):
            return use
    return ""


def sweep(tree: Tree, folder: str) -> None:
    """Remove leases and pins of dead processes, and those of other hosts after a day.

    What is neither is left, and so is what may not be removed.
    """
    for name in tree.names(folder):
        path = f"{folder}/{name}"
        with suppress(PermissionError, CacheUnusable):
            state = _state(tree, path)
            marks = state is not None and disk.is_claim(_claim_of(name, state[2]))
            if state is not None and marks and not _may_be_alive(tree, path, disk.STALE):
                _remove_unchanged(tree, path, state)


def _claim_of(name: str, text: str) -> str:
    """The claim of a mark: a pin's is its name, a lease's its text."""
    return name if disk.is_claim(name) else text


def _may_be_alive(tree: Tree, path: str, term: float) -> bool:
    with suppress(OSError, CacheUnusable):
        claim = _claim_of(path.rpartition("/")[2], "") or _text(tree, path)
        if disk.is_claim(claim):
            alive = disk.alive(claim)
            if alive is not None:
                return alive
            with tree.at(path) as (folder, name):
                return disk.age(name, folder) < term
    return False


def _state(tree: Tree, path: str) -> tuple[int, int, str] | None:
    """(inode, time, text): differs between two holders of a lease, and after each renewal; None if there is none.

    CacheUnusable if it is a link, a pipe, a folder, or larger than any claim.
    """
    try:
        text, status = tree.read_at(path, CLAIM_BYTES)
    except (FileNotFoundError, PermissionError):
        return None
    return status.st_ino, status.st_mtime_ns, text.decode(errors="replace")


def _text(tree: Tree, path: str) -> str:
    return tree.read(path, CLAIM_BYTES).decode(errors="replace")


def _remove_unchanged(tree: Tree, path: str, state: tuple[int, int, str]) -> None:
    """Remove a lease in this state, but not one that another worker has taken since."""
    draft = tree.draft(path.rpartition("/")[0])
    with suppress(FileNotFoundError):
        tree.rename(path, draft)
        if _state(tree, draft) != state:
            _link(tree, draft, path, _text(tree, draft))
        tree.remove(draft)


def _link(tree: Tree, draft: str, path: str, claim: str) -> bool:
    """Give a claim its final name; False if another worker was first."""
    with tree.at(draft) as (folder, name):
        (source, at), (goal, _) = disk.place(name, folder), disk.place(path.rpartition("/")[2], folder)
        try:
            os.link(source, goal, src_dir_fd=at, dst_dir_fd=at, **disk.LINK_ITSELF)
        except FileExistsError:
            return False
        except OSError:  # no hard links here, or the draft was removed: exclusive creation is enough for a small claim
            try:
                tree.write(path, claim.encode(), flush=False)
            except FileExistsError:
                return False
    return True
