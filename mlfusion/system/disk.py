"""Atomic file creation: a file or folder is written under a temporary name, flushed, and then renamed in one step.

What exists under its own name is therefore whole. No lock is taken; of two writers the first wins and the second's draft
is dropped. The names of drafts carry host and process, so that drafts of dead processes can be recognised and swept. Sealed
JSON carries a digest of its own text, so that one changed byte is noticed.
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
from functools import cache as once
from pathlib import Path

from mlfusion.errors import CacheUnusable, MlfusionError

DRAFT = ".draft~"
STALE = 24 * 3600.0  # seconds after which the draft of an unknown host counts as left behind


@once
def here() -> str:
    """The scope of process numbers: the host and, on Linux, the namespace of its process numbers (containers)."""
    with suppress(OSError):
        return f"{socket.gethostname()}.{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def claim() -> str:
    """A unique word that names the process that writes it: host~process.start~random."""
    return f"{here()}~{os.getpid()}.{_begun(os.getpid())}~{uuid.uuid4().hex[:8]}"


def alive(claim: str) -> bool | None:
    """Whether the process that made a claim lives; None where that cannot be known from here."""
    parts = claim.split("~")
    number, _, begun = parts[1].partition(".") if len(parts) == 3 else ("", "", "")
    if not number.isdecimal() or parts[0] != here():
        return None
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's process
    now = _begun(int(number))
    return not begun or not now or begun == now  # process numbers are used again, in a container soon


def _begun(process: int) -> str:
    """When a process started, in ticks since the machine was booted; '' where the system does not say."""
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


def finished(folder: Path, marker: str) -> list[Path]:
    """Sorted list of the folders in `folder` that hold the file `marker`; drafts are left out."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith(DRAFT))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in names if os.path.exists(f"{folder}/{name}/{marker}")]


def sweep(folder: Path) -> None:
    """Remove the drafts in `folder` that dead processes left, and those of other hosts after a day."""
    for draft in folder.glob(f"{DRAFT}*"):
        lives = alive(draft.name.removeprefix(DRAFT))
        if lives is False or (lives is None and age(draft) > STALE):
            remove(draft)


def remove(path: Path) -> None:
    """Remove a file or a folder; not an error if it is gone already."""
    try:  # without a look at which it is: a prune may remove and restore its folder in between
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
    """The current time by the file system of `folder`: times of files are compared with it, not with the host's clock."""
    probe = draft_name(folder)
    with suppress(OSError):
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now
    return time.time()  # read-only: nothing can be removed for its age either


def age(path: Path) -> float:
    """Seconds since `path` was last changed; 0 if it is gone."""
    try:
        changed = path.stat().st_mtime
    except OSError:
        return 0.0
    return clock(path.parent) - changed


def publish_file(draft: Path, final: Path) -> bool:
    """Give a flushed draft its name; False if that name was taken already (the first writer wins)."""
    won = True
    try:
        os.link(draft, final)  # unlike rename, never replaces what is there
    except FileExistsError:
        won = False
    except OSError as err:
        if err.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            remove(draft)
            raise
        won = not final.exists()  # no hard links here: of two writers in the same instant the later one wins
        if won:
            os.rename(draft, final)
    draft.unlink(missing_ok=True)
    flush(final.parent)
    return won


@contextmanager
def atomic(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Create the file `path` in one step: yields a draft's path to write to, then flushes it and gives it its name.

    With `replace`, a file that already has this name is replaced; otherwise it stays. No draft is left, whatever fails.
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
    """Create a text file in one step; a file that has the name already stays."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write(path: Path, text: str) -> None:
    """Write and flush a new file inside a draft; nothing is left if that fails."""
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
    """Give a folder that holds finished files its name; False if another writer was first."""
    with drafted(draft):
        for folder in (*(path for path in draft.rglob("*") if path.is_dir()), draft):
            flush(folder)
    while True:
        try:
            os.rename(draft, final)  # onto a folder that is not empty this fails
            break
        except OSError as err:
            if final.is_dir():
                remove(draft)
                return False
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else a prune took away what stood there
                remove(draft)  # no lost race: a real failure
                raise
    flush(final.parent)
    return True


def flush(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, survive a power loss."""
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
    """Free bytes of the file system that a folder lies on or would lie on."""
    return shutil.disk_usage(nearest_existing(folder)).free


def free_text(folder: Path) -> str:
    """The free space in words; a file system may run out of files before it is full."""
    free = f"{free_bytes(folder) / 1e6:,.3f} MB are free"
    files = os.statvfs(nearest_existing(folder)) if hasattr(os, "statvfs") else None
    return f"{free} in at most {files.f_favail:,} files" if files and files.f_files else free


@contextmanager
def translate_os_errors(root: Path, needed: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn errors of the disk into `CacheUnusable` with a sentence about the cache at `root`.

    `needed` gives the bytes that are still to be written, for the sentence about a full disk.
    """
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            wanted = ""
            if needed is not None:
                with suppress(OSError, MlfusionError):
                    wanted = f"{needed() / 1e6:,.3f} MB are needed, "
            raise CacheUnusable(
                f"no space left for the cache at {root}: {wanted}{free_text(root)}; what was written is safe: "
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
