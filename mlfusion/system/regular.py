"""Opens regular files of a folder that may come from a stranger, and makes folders that no other user can write to.

No link or pipe in a stranger's folder leads anywhere or waits; and nobody else plants a file in a folder of ours.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mlfusion.errors import BadOption
from mlfusion.system.tree import Tree


@contextmanager
def opened(root: Path, path: str) -> Iterator[IO[bytes]]:
    """Open a regular file below a root, such as 'arrays/a1.npz', for reading, as `Tree` does.

    Raises:
        OSError: it does not exist, or may not be read.
        ValueError: it, or a folder on the way to it, is a link or of another wrong sort.
    """
    with open(Tree(root, lambda _, why: ValueError(why)).open(path), "rb") as file:
        yield file


def make_private(folder: Path) -> None:
    """Create a folder of mode 700 for work files, or take an existing one that only this user can write to.

    Raises:
        BadOption: it is a link, or another user owns it or may write to it, so that its files may not be ours.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = os.lstat(folder)
    if not stat.S_ISDIR(state.st_mode):
        raise BadOption(f"{folder} is no folder; allowed: a folder of your own for the work files. Remove it: rm FILE")
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022):
        raise BadOption(
            f"{folder} belongs to another user, or others may write to it, and files in it may be theirs; allowed: a folder "
            "that only you can write to. Remove it or take another: mlfusion pretrain RECIPE --out FOLDER"
        )
