"""How a file or folder comes to exist: written under a draft's name, flushed, then given its own name in one step.

What exists under its own name is therefore whole. No lock is taken; of two writers the first wins and the second's draft
is dropped. Drafts carry host and process in their name, so those of the dead can be told and swept. JSON carries a digest
of its own text, so that one changed byte is noticed.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache as once
from pathlib import Path
from typing import Any

from mlfusion.errors import CacheUnusable, MlfusionError

DRAFT = ".draft~"
STALE = 24 * 3600.0  # seconds after which the draft of an unknown host counts as left behind


@once
def here() -> str:
    """What processes are numbered by: the host, and on Linux the namespace of its process numbers (containers)."""
    with suppress(OSError):
        return f"{socket.gethostname()}.{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def claim() -> str:
    """A word that says who writes it and is used once: host~process.start~random."""
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
    """When a process began, in ticks since the machine did; '' where that is not told."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return ""


def draft_name(folder: Path) -> Path:
    """A path in `folder` that no other writer uses, on any host."""
    return folder / f"{DRAFT}{claim()}"


@contextmanager
def drafted(draft: Path) -> Iterator[Path]:
    """Takes a draft away if what fills it fails."""
    try:
        yield draft
    except OSError:
        remove(draft)
        raise


def finished(folder: Path, marker: str) -> list[Path]:
    """Folders in `folder` that hold the file `marker` and bear a name of their own, by name."""
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
    """A file or a folder; no complaint if somebody else was faster."""
    try:  # and not first a look at which it is: a prune may take away and bring back what it lies in
        path.unlink(missing_ok=True)
        return
    except IsADirectoryError:
        pass
    except PermissionError:  # which some systems say of a folder
        if not path.is_dir():
            raise
    aside = draft_name(path.parent)
    try:  # in one step out of the hands of who may be about to publish it: else that would be published by halves
        os.rename(path, aside)
    except FileNotFoundError:
        return
    except OSError:
        aside = path
    shutil.rmtree(aside, ignore_errors=True)


def clock(folder: Path) -> float:
    """Now, by the file system that `folder` lies on: times of files are compared with it and not with a host's clock."""
    probe = draft_name(folder)
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:  # read-only: nothing will be done about what is old either
        return time.time()
    return now


def age(path: Path) -> float:
    """Seconds since `path` was last changed; 0 if it is gone."""
    try:
        changed = path.stat().st_mtime
    except OSError:
        return 0.0
    return clock(path.parent) - changed


def publish_file(draft: Path, final: Path) -> bool:
    """Give a flushed draft its name; False if that name was taken already (the first writer wins)."""
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
    else:
        won = True
    draft.unlink(missing_ok=True)
    flush(final.parent)
    return won


def write(path: Path, text: str) -> None:
    """A new file, flushed; nothing is left where that fails."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        remove(path)
        raise


def publish_json(final: Path, body: dict[str, Any]) -> bool:
    """A small JSON file with its digest, whole or absent; False if it was there already."""
    draft = draft_name(final.parent)
    write(draft, sealed(body))
    return publish_file(draft, final)


def sealed(body: dict[str, Any]) -> str:
    """JSON whose first line is the digest of the rest."""
    text = json.dumps(body, indent=1, ensure_ascii=False).removeprefix("{")
    return f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}",{text}\n'


def read_json(path: Path) -> dict[str, Any]:
    """What `publish_json` wrote.

    Raises:
        CacheUnusable: a byte of it was changed.
        FileNotFoundError: it is not there.
    """
    with open(path, "rb", buffering=0) as file:
        text = file.readall()
    head, _, rest = text.partition(b",")
    if head != b'{"sha256": "%s"' % hashlib.sha256(rest[:-1]).hexdigest().encode() or rest[-1:] != b"\n":
        raise CacheUnusable(
            f"{path} is damaged: its text does not match its digest; run `mlfusion cache verify --repair`, then the same "
            "`mlfusion extract` again"
        )
    body: dict[str, Any] = json.loads(b"{" + rest)
    return body


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
            if err.errno not in (
                errno.ENOTEMPTY,
                errno.EEXIST,
            ):  # else a prune took away in this instant what stood there
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


def room(folder: Path) -> str:
    """What is free where a folder lies or would lie, for people; a file system may run out of files before it is full."""
    while not folder.exists():
        folder = folder.absolute().parent
    free = f"{shutil.disk_usage(folder).free / 1e6:,.3f} MB are free"
    files = os.statvfs(folder) if hasattr(os, "statvfs") else None
    return f"{free} in at most {files.f_favail:,} files" if files and files.f_files else free


@contextmanager
def told(root: Path, needed: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn the disk's refusals into words about the cache at `root`; `needed`: the bytes that are still to be written."""
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            wanted = ""
            if needed is not None:
                with suppress(OSError, MlfusionError):
                    wanted = f"{needed() / 1e6:,.3f} MB are needed, "
            raise CacheUnusable(
                f"no space left for the cache at {root}: {wanted}{room(root)}; what was written is safe: "
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
