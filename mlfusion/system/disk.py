"""Atomic file creation: a file or folder is written under a temporary name, flushed, and then renamed in one step.

A file with its final name is therefore complete. No lock is taken: of two writers the first wins, and the second's draft is
removed. A draft's name contains host and process, so that drafts of dead processes are recognised and removed. Sealed JSON
contains a digest of its own text, which shows any changed byte.
"""

import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from mlfusion.errors import CacheUnusable, MlfusionError

GUARDED = os.open in os.supports_dir_fd and hasattr(os, "O_DIRECTORY") and hasattr(os, "O_NOFOLLOW")
"""Whether the system opens names relative to an opened folder, and follows no link on demand; not so on Windows."""

FOLDER = os.O_RDONLY | os.O_DIRECTORY if GUARDED else os.O_RDONLY
LINK_ITSELF: dict[str, Any] = {"follow_symlinks": False} if os.link in os.supports_follow_symlinks else {}

Folder = int | str
"""An opened folder: its descriptor, or its path where the system is not `GUARDED`."""

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
    return f"{process_scope()}~{_own_process(os.getpid())}~{uuid.uuid4().hex[:8]}"


@cache
def _own_process(number: int) -> str:
    """Number and start time of the calling process; to read the time takes as long as to read a record."""
    return f"{number}.{_start_time(number)}"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_own_process.cache_clear)


_CLAIM = re.compile(r"[^~/]+~[1-9]\d*(\.\d*)?~[0-9a-f]{8}")


def is_claim(text: str) -> bool:
    """Whether this is a claim, of any process on any host."""
    return _CLAIM.fullmatch(text) is not None


def alive(claim: str) -> bool | None:
    """Whether the process that made a claim is alive; None if that cannot be known on this host."""
    parts = claim.split("~")
    number, _, start = parts[1].partition(".") if len(parts) == 3 else ("", "", "")
    if not number.isdecimal() or parts[0] != process_scope() or os.name == "nt":  # where asking would end the process
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


def draft_owner(name: str) -> str | None:
    """The claim in the name of a draft; None if it is not the name of a draft of mlfusion."""
    owner = name.removeprefix(DRAFT)
    return owner if name.startswith(DRAFT) and is_claim(owner) else None


@contextmanager
def drafted(draft: Path) -> Iterator[Path]:
    """Remove a draft if writing it fails."""
    try:
        yield draft
    except OSError:
        remove(draft)
        raise


def sweep(folder: Path) -> None:
    """Remove the drafts in `folder` that dead processes left, and those of other hosts after a day."""
    with suppress(FileNotFoundError):
        opened: Folder = os.open(folder, FOLDER) if GUARDED else str(folder)
        try:
            sweep_at(opened)
        finally:
            close(opened)


def close(folder: Folder) -> None:
    """Close an opened folder."""
    if isinstance(folder, int):
        os.close(folder)


def place(name: Path | str, folder: Folder | None) -> tuple[Path | str, int | None]:
    """What the system is given for a name in an opened folder: a path, and the descriptor that it is relative to."""
    return (f"{folder}/{name}", None) if isinstance(folder, str) else (name, folder)


def sweep_at(folder: Folder) -> None:
    """`sweep` for an opened folder. What may not be removed, such as another user's drafts, is left."""
    for name in os.listdir(folder):
        if owner := draft_owner(name):
            owner_alive = alive(owner)
            if owner_alive is False or (owner_alive is None and age(name, folder) > STALE):
                with suppress(PermissionError):
                    remove(name, folder)


# Each of the following functions takes a path, or a name and the opened folder `at` that holds it.


def remove(path: Path | str, at: Folder | None = None) -> None:
    """Remove a file, a link or a folder; no error if it does not exist. Nothing behind a link is removed."""
    path, at = place(path, at)
    try:  # without a check of the type first: a prune may remove and restore its folder between check and removal
        os.unlink(path, dir_fd=at)
        return
    except FileNotFoundError:
        return
    except IsADirectoryError:
        pass
    except PermissionError:  # some systems raise it for a folder
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.lstat(path, dir_fd=at).st_mode):
                raise
    aside = beside(path)
    try:  # renamed in one step, so that no other process publishes it half removed
        os.rename(path, aside, src_dir_fd=at, dst_dir_fd=at)
    except FileNotFoundError:
        return
    except OSError:
        aside = path
    shutil.rmtree(aside, ignore_errors=True, dir_fd=at)


def beside(path: Path | str) -> Path | str:
    """A new draft's name in the folder of a path; of the same type as `path`."""
    if isinstance(path, Path):
        return draft_name(path.parent)
    folder, separator, _ = path.rpartition("/")
    return f"{folder}{separator}{DRAFT}{claim()}"


def clock(folder: Folder) -> float:
    """The current time of the file system of a folder, for comparison with files' times; the host's clock may differ."""
    probe, at = place(f"{DRAFT}{claim()}", folder)
    with suppress(OSError):
        file = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=at)
        now = os.fstat(file).st_mtime
        os.close(file)
        os.unlink(probe, dir_fd=at)
        return now
    return time.time()  # the folder is read-only, so nothing in it is removed by age


def age(name: str, folder: Folder) -> float:
    """Seconds since a name in a folder was last changed; 0 if it does not exist."""
    path, at = place(name, folder)
    try:
        changed = os.lstat(path, dir_fd=at).st_mtime
    except OSError:
        return 0.0
    return clock(folder) - changed


def publish_file(draft: Path | str, final: Path | str, at: Folder | None = None) -> bool:
    """Give a flushed draft its final name; False if that name exists (the first writer wins)."""
    (source, fd), (goal, _) = place(draft, at), place(final, at)
    created = True
    try:
        os.link(source, goal, src_dir_fd=fd, dst_dir_fd=fd, **LINK_ITSELF)  # unlike rename, never replaces a file
    except FileExistsError:
        created = False
    except OSError as err:
        if err.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            remove(draft, at)
            raise
        try:  # no hard links here: of two writers in the same instant the later one wins
            os.lstat(goal, dir_fd=fd)
            created = False
        except FileNotFoundError:
            os.rename(source, goal, src_dir_fd=fd, dst_dir_fd=fd)
    with suppress(FileNotFoundError):
        os.unlink(source, dir_fd=fd)
    flush_folder(final, at)
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


def unsealed(text: bytes) -> bytes:
    """The JSON text that was given to `sealed`; raises ValueError if a byte was changed."""
    head, _, rest = text.partition(b",")
    if head != b'{"sha256": "%s"' % hashlib.sha256(rest[:-1]).hexdigest().encode() or rest[-1:] != b"\n":
        raise ValueError("its text does not match its digest")
    return b"{" + rest


def publish_folder(draft: Path | str, final: Path | str, at: Folder | None = None, to: Folder | None = None) -> bool:
    """Give a folder of finished files its final name, in the folder `to`; False if another writer was first."""
    (source, source_fd), (goal, goal_fd) = place(draft, at), place(final, to)
    try:
        _flush_folders(source, source_fd)
    except OSError:
        remove(draft, at)
        raise
    while True:
        try:  # fails if a folder that is not empty has this name
            os.rename(source, goal, src_dir_fd=source_fd, dst_dir_fd=goal_fd)
            break
        except OSError as err:
            if _is_folder(final, to):
                remove(draft, at)
                return False
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else a prune removed the folder: try again
                remove(draft, at)
                raise
    flush_folder(final, to)
    return True


def _flush_folders(path: Path | str, at: int | None) -> None:
    """fsync a folder and all in it."""
    if GUARDED:
        for _, _, _, descriptor in os.fwalk(path, topdown=False, onerror=_fail, dir_fd=at):
            os.fsync(descriptor)
    else:
        for folder, _, _ in os.walk(path, topdown=False, onerror=_fail):
            flush(Path(folder))


def _fail(err: OSError) -> None:
    raise err


def _is_folder(path: Path | str, at: Folder | None) -> bool:
    whole, fd = place(path, at)
    try:
        return stat.S_ISDIR(os.lstat(whole, dir_fd=fd).st_mode)
    except FileNotFoundError:
        return False


def flush(path: Path) -> None:
    """fsync a file or a folder, so that its bytes or names survive a power loss."""
    if os.name == "nt":  # which flushes what is open for writing only
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path | str, at: Folder | None = None) -> None:
    """fsync the folder that holds a path."""
    if isinstance(at, int):
        os.fsync(at)
    else:
        flush(Path(path).parent if at is None else Path(at))


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
