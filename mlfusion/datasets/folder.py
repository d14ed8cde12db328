"""Finds and opens what lies below a data set's folder, so that nothing in a folder from a stranger leads out of it or waits.

A link that ends inside the folder is followed, since a snapshot in the hub's cache is a folder of links; one that leads out is
refused by name when the folder is listed. Only regular files are opened, and none that is larger than a file of its sort can
be. Who can exchange files between the listing and the opening is outside the trust model.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mlfusion.errors import BadData
from mlfusion.specs.identity import MAX_PIXELS
from mlfusion.system import room
from mlfusion.system.references import is_inside
from mlfusion.system.tree import SORTS

LABEL_BYTES = 4 << 20  # a label in a tar
NAMES_BYTES = 64 << 20  # a file of class names
TABLE_BYTES = 1 << 30  # a table of paths, which is read into memory
PIXEL_BYTES = 8  # of a pixel in an image file: at most four colours of 16 bits, not compressed
HEADER_BYTES = 1 << 20  # of an image file besides its pixels
AT_ONCE = 1 << 30  # bytes that the system reads in one call


def image_bytes(max_pixels: int) -> int:
    """The largest size of an image's file, in bytes. A low --max-pixels does not lower it, so that such images are named."""
    return PIXEL_BYTES * max(max_pixels, MAX_PIXELS) + HEADER_BYTES


def walk(root: Path | str, folder: str = "", *, strict: bool = False) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """(path below the root, entry) of all that lies below a folder and is no folder; hidden ones are left out.

    Links to folders are not entered, and given as entries. A folder that may not be read is left out, or BadData if `strict`.
    """
    folders = [folder]
    while folders:
        place = folders.pop()
        try:
            with os.scandir(os.path.join(root, place)) as items:
                entries = [item for item in items if not item.name.startswith(".")]
        except OSError as err:
            if not strict and place != folder:
                continue
            raise BadData(
                f"{os.path.join(root, place)} cannot be read: {err.strerror}; mend that, or remove it"
            ) from err
        for item in entries:
            path = f"{place}/{item.name}" if place else item.name
            if item.is_dir(follow_symlinks=False):
                folders.append(path)
            else:
                yield path, item


def files_below(root: Path, suffix: str) -> list[str]:
    """The paths of files with a suffix, relative to a folder, without hidden files and folders.

    Raises:
        BadData: one is a link that leads out of the folder, or no regular file.
    """
    found = [path for path, _ in walk(root) if path.endswith(suffix)]
    for path in found:
        require_inside(root / path, root)
    return found


def require_inside(path: Path | str, root: Path | str) -> None:
    """Check that a path is a file or folder that lies below a root, even if it is a link or lies behind one.

    Raises:
        BadData: it is elsewhere, does not exist, or is a pipe or a device.
    """
    target = os.path.realpath(path)
    if not is_inside(Path(target), Path(root)):
        raise BadData(f"{path} is a link that leads out of {root}; copy what it leads to into the folder instead")
    try:
        state = os.lstat(target)
    except OSError as err:
        raise BadData(f"{path} is a link that leads nowhere; remove it, or put the file there") from err
    if stat.S_ISLNK(state.st_mode):
        raise BadData(f"{path} is a link that leads nowhere, but in a circle; remove it, or put the file there")
    if not stat.S_ISDIR(state.st_mode):
        _require_regular(path, state)


def _require_regular(path: Path | str, state: os.stat_result, most: int | None = None) -> None:
    if not stat.S_ISREG(state.st_mode):
        sort = SORTS.get(stat.S_IFMT(state.st_mode), "of an unknown sort")
        raise BadData(f"{path} is {sort}; allowed: a regular file. Take it out of the data set")
    if most is not None and state.st_size > most:
        raise BadData(
            f"{path} has {state.st_size:,} bytes; allowed for a file of its sort: {most:,}. Take it out of the data set, or "
            "give a smaller one"
        )


# A pipe is opened without waiting for its other end. No system but POSIX has pipes in folders, and only Windows has text files.
_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def _without_waiting(path: Path | str) -> int:
    return os.open(path, os.O_RDONLY | _FLAGS)


def open_regular(path: Path | str, most: int | None = None) -> BinaryIO:
    """Open a regular file of at most `most` bytes, for reading; BadData if it is none, OSError if it may not be read."""
    file = _without_waiting(path)
    try:
        _require_regular(path, os.fstat(file), most)
    except BadData:
        os.close(file)
        raise
    return os.fdopen(file, "rb")


def read_regular(path: Path | str, most: int) -> bytes:
    """The bytes of a regular file; errors as of `open_regular`."""
    file = _without_waiting(path)
    try:
        state = os.fstat(file)
        _require_regular(path, state, most)
        room.take(size := state.st_size)
        data = os.read(file, min(size, AT_ONCE))
        while len(data) < size and (part := os.read(file, min(size - len(data), AT_ONCE))):
            data += part
        return data
    finally:
        os.close(file)
