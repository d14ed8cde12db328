"""How a file or folder comes to exist: written under a draft's name, flushed, then given its own name in one step.

What exists under its own name is therefore whole. No lock is taken; of two writers the first wins and the second's draft
is dropped. Drafts carry host and process in their name, so those of the dead can be told and swept.
"""

import errno
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlfusion.errors import CacheUnusable

DRAFT = ".draft~"


def draft_name(folder: Path) -> Path:
    """A path in `folder` that no other writer uses, on any host."""
    return folder / f"{DRAFT}{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex[:8]}"


def finished(folder: Path, marker: str) -> list[Path]:
    """Folders in `folder` that hold the file `marker` and bear a name of their own, by name."""
    return sorted(file.parent for file in folder.glob(f"*/{marker}") if not file.parent.name.startswith(DRAFT))


def sweep(folder: Path) -> None:
    """Remove the drafts that dead processes of this host left in `folder`."""
    for draft in folder.glob(f"{DRAFT}*"):
        parts = draft.name.split("~")
        if len(parts) == 4 and parts[1] == socket.gethostname() and not _alive(int(parts[2])):
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's process
    return True


def publish_file(draft: Path, final: Path) -> bool:
    """Give a flushed draft its name; False if that name was taken already (the first writer wins)."""
    try:
        os.link(draft, final)  # unlike rename, never replaces what is there
    except FileExistsError:
        won = False
    else:
        won = True
    draft.unlink()
    flush_folder(final.parent)
    return won


def publish_json(final: Path, body: Any) -> bool:
    """A small JSON file, whole or absent; False if it was there already."""
    draft = draft_name(final.parent)
    with open(draft, "x", encoding="utf-8") as file:
        json.dump(body, file, indent=2, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    return publish_file(draft, final)


def publish_folder(draft: Path, final: Path) -> bool:
    """Give a folder that holds finished files its name; False if another writer was first."""
    flush_folder(draft)
    try:
        os.rename(draft, final)  # onto a folder that is not empty this fails
    except OSError:
        shutil.rmtree(draft)
        if not final.is_dir():  # no lost race: a real failure
            raise
        return False
    flush_folder(final.parent)
    return True


def flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def told(root: Path) -> Iterator[None]:
    """Turn the disk's refusals into words about the cache at `root`."""
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(root).free if root.exists() else 0
            raise CacheUnusable(
                f"no space left for the cache at {root} ({free / 1e6:,.0f} MB free); what was written is safe: "
                "free some space, or choose another place with --cache, and run the same command again"
            ) from err
        if err.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise CacheUnusable(
                f"the cache at {root} cannot be written ({err.strerror or err}); choose another place with "
                "--cache PATH or the variable MLFUSION_CACHE"
            ) from err
        raise
