"""Opens regular files of a folder that may come from a stranger, so that no link or pipe in it leads anywhere or waits."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe is opened without waiting for its other end


@contextmanager
def opened(root: Path, path: str) -> Iterator[IO[bytes]]:
    """Open a regular file below a root, such as 'arrays/a1.npz', for reading; the root itself may be a link.

    Raises:
        OSError: it does not exist, or it or a folder on the way to it is a link.
        ValueError: it is a pipe, a device or a folder.
    """
    *folders, name = path.split("/")
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folders:
            inner = os.open(part, FILE | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = inner
        descriptor = os.open(name, FILE, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is no regular file")
    with open(descriptor, "rb") as file:
        yield file
