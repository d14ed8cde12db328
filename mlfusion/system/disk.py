"""Atomic file creation: a file or folder is written under a temporary name, flushed, and then renamed in one step.

A file with its final name is therefore complete. No lock is taken: of two writers the first wins, and the second's draft is
removed. A draft's name contains host and process, so that drafts of dead processes are recognised and removed. Sealed JSON
contains a digest of its own text, which shows any changed byte.
"""

import errno
import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from mlfusion.errors import CacheUnusable, MlfusionError

DRAFT = ".draft~"
STALE = 24 * 3600.0  # seconds after which the draft of another host is removed


@cache
def process_scope() -> str:
    """The host and, on Linux, its namespace of process numbers (containers have their own)."""
    with suppress(OSError):
        return f"{socket.gethostname()}.{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def claim() -> str:
    """A unique name of the calling process: host~process.start~random."""
    return f"{process_scope()}~{os.getpid()}.{_start_time(os.getpid())}~{uuid.uuid4().hex[:8]}"


def alive(claim: str) -> bool | None:
    """Whether the process that made a claim is alive; None if that cannot be known on this host."""
    parts = claim.split("~")
    number, _, start = parts[1].partition(".") if len(parts) == 3 else ("", "", "")
    if not number.isdecimal() or parts[0] != process_scope():
        return None
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process
    current = _start_time(int(number))
    return not start or not current or start == current  # process numbers are reused, in containers soon


def _start_time(process: int) -> str:
    """Start time of a process in ticks since boot; '' if the system does not tell it."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return ""


def draft_name(folder: Path) -> Path:
    """A path in `folder` that no other writer uses, on any host."""
    return folder / f"{DRAFT}{claim()}"


@contextmanager
def drafted(draft: Path) -> Iterator[Path]:
    """Remove a draft if writing it fails."""
    try:
        yield draft
    except OSError:
        remove(draft)
        raise


def published(folder: Path, marker: str = "") -> list[Path]:
    """Sorted paths in `folder` that are not drafts; with `marker`, only folders that contain a file of that name."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith(DRAFT))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in names if not marker or os.path.exists(f"{folder}/{name}/{marker}")]


def sweep(folder: Path) -> None:
    """Remove the drafts in `folder` that dead processes left, and those of other hosts after a day."""
    for draft in folder.glob(f"{DRAFT}*"):
        owner_alive = alive(draft.name.removeprefix(DRAFT))
        if owner_alive is False or (owner_alive is None and age(draft) > STALE):
            remove(draft)


def remove(path: Path) -> None:
    """Remove a file or a folder; no error if it does not exist."""
    try:  # without a check of the type first: a prune may remove and restore its folder between check and removal
        path.unlink(missing_ok=True)
        return
    except IsADirectoryError:
        pass
    except PermissionError:  # some systems raise it for a folder
        if not path.is_dir():
            raise
    aside = draft_name(path.parent)
    try:  # renamed in one step, so that no other process publishes it half removed
        os.rename(path, aside)
    except FileNotFoundError:
        return
    except OSError:
        aside = path
    shutil.rmtree(aside, ignore_errors=True)


def clock(folder: Path) -> float:
    """The current time of the file system of `folder`, for comparison with files' times; the host's clock may differ."""
    probe = draft_name(folder)
    with suppress(OSError):
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now
    return time.time()  # the folder is read-only, so nothing in it is removed by age


def age(path: Path) -> float:
    """Seconds since `path` was last changed; 0 if it does not exist."""
    try:
        changed = path.stat().st_mtime
    except OSError:
        return 0.0
    return clock(path.parent) - changed


def publish_file(draft: Path, final: Path) -> bool:
    """Give a flushed draft its final name; False if that name exists (the first writer wins)."""
    created = True
    try:
        os.link(draft, final)  # unlike rename, never replaces a file
    except FileExistsError:
        created = False
    except OSError as err:
        if err.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            remove(draft)
            raise
        created = not final.exists()  # no hard links here: of two writers in the same instant the later one wins
        if created:
            os.rename(draft, final)
    draft.unlink(missing_ok=True)
    flush(final.parent)
    return created


@contextmanager
def atomic(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Create the file `path` in one step: yields the path of a draft, then flushes it and gives it its final name.

    An existing file stays, unless `replace`. No draft is left after an error.
    """
    draft = draft_name(path.parent)
    try:
        yield draft
        flush(draft)
        if replace:
            os.replace(draft, path)
            flush(path.parent)
        else:
            publish_file(draft, path)
    except BaseException:
        remove(draft)
        raise


def publish_text(path: Path, text: str) -> None:
    """Create a text file in one step; an existing file stays."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write(path: Path, text: str) -> None:
    """Write and flush a new file in a draft; no file is left after an error."""
    with drafted(path), open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sealed(text: str) -> str:
    """The text of a JSON object with the digest of the rest in its first line."""
    rest = text.removeprefix("{")
    return f'{{"sha256": "{hashlib.sha256(rest.encode()).hexdigest()}",{rest}\n'


def read_sealed(path: Path) -> bytes:
    """The JSON text that was given to `sealed`; raises CacheUnusable if a byte of the file was changed."""
    with open(path, "rb", buffering=0) as file:
        text = file.readall()
    head, _, rest = text.partition(b",")
    if head != b'{"sha256": "%s"' % hashlib.sha256(rest[:-1]).hexdigest().encode() or rest[-1:] != b"\n":
        raise CacheUnusable(
            f"{path} is damaged: its text does not match its digest; run `mlfusion cache verify --repair`, then the same "
            "`mlfusion extract` again"
        )
    return b"{" + rest


def publish_folder(draft: Path, final: Path) -> bool:
    """Give a folder of finished files its final name; False if another writer was first."""
    with drafted(draft):
        for folder in (*(path for path in draft.rglob("*") if path.is_dir()), draft):
            flush(folder)
    while True:
        try:
            os.rename(draft, final)  # fails if a folder that is not empty has this name
            break
        except OSError as err:
            if final.is_dir():
                remove(draft)
                return False
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else a prune removed the folder: try again
                remove(draft)
                raise
    flush(final.parent)
    return True


def flush(path: Path) -> None:
    """fsync a file or a folder, so that its bytes or names survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or the nearest parent that exists."""
    while not folder.exists():
        folder = folder.absolute().parent
    return folder


def free_bytes(folder: Path) -> int:
    """Free bytes of the file system of a folder, existing or not."""
    return shutil.disk_usage(nearest_existing(folder)).free


def free_text(folder: Path) -> str:
    """The free space in words; a file system may run out of files before it is full."""
    free = f"{free_bytes(folder) / 1e6:,.3f} MB are free"
    files = os.statvfs(nearest_existing(folder)) if hasattr(os, "statvfs") else None
    return f"{free} in at most {files.f_favail:,} files" if files and files.f_files else free


@contextmanager
def translate_os_errors(root: Path, needed: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn disk errors into `CacheUnusable` about the cache at `root`; `needed` gives the bytes still to be written."""
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            size = ""
            if needed is not None:
                with suppress(OSError, MlfusionError):
                    size = f"{needed() / 1e6:,.3f} MB are needed, "
            raise CacheUnusable(
                f"no space left for the cache at {root}: {size}{free_text(root)}; what was written is safe: "
                "free some space, or choose another place with --cache, and run the same command again"
            ) from err
        if err.errno == errno.EIO:
            raise CacheUnusable(
                f"the disk under the cache at {root} fails ({err.strerror}); what was published is safe: look at the disk, "
                "or choose another place with --cache, and run the same command again"
            ) from err
        if err.errno in (errno.ENOENT, errno.ESTALE):
            raise CacheUnusable(
                f"a part of the cache at {root} was removed while it was in use ({err.filename}); run the same command again"
            ) from err
        if err.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise CacheUnusable(
                f"the cache at {root} cannot be written ({err.strerror or err}); choose another place with "
                "--cache PATH or the variable MLFUSION_CACHE"
            ) from err
        raise
