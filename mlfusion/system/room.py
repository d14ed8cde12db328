"""Bounds the memory of large images that several threads decode at once: a thread waits until there is room for its own.

Small images are not counted. A thread keeps its room until the end of `one_image`, so that what it makes of an image, such as a
resized copy, is counted as long as the image is in memory.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

LARGE = 64 << 20  # bytes; less is not counted
SHARE = 0.5  # of the free memory is for images
PIXEL_BYTES = 12  # of a pixel while its image is decoded: the file's mode, RGB with four bytes, an array of it


class _Own(threading.local):
    """What one thread holds."""

    depth = 0  # of `one_image`
    held = 0  # bytes


_changed = threading.Condition()
_own = _Own()
_total = 0  # bytes held by all threads
_most = 0.0  # bytes that all threads may hold, measured whenever the first one takes room


@contextmanager
def one_image() -> Iterator[None]:
    """Work on one image: what `take` reserves inside is given back at the end."""
    _own.depth += 1
    try:
        yield
    finally:
        _own.depth -= 1
        if not _own.depth and _own.held:
            _give_back()


def _give_back() -> None:
    global _total
    with _changed:
        _total -= _own.held
        _own.held = 0
        _changed.notify_all()


def take(nbytes: int) -> None:
    """Reserve memory inside `one_image`; waits until other threads leave enough of it. Outside, or for little, no operation.

    Raises:
        MemoryError: more is needed than the system has free, even without other threads.
    """
    global _total, _most
    if nbytes < LARGE or not _own.depth:
        return
    with _changed:
        # Who holds some already does not wait, since two such threads would wait for each other.
        while _total and not _own.held and _total + nbytes > _most:
            _changed.wait()
        if not _total:
            free = free_bytes()
            if nbytes > free:
                raise MemoryError(f"{nbytes / 1e6:,.0f} MB are needed, and {free / 1e6:,.0f} MB are free")
            _most = SHARE * free
        _total += nbytes
        _own.held += nbytes


def free_bytes() -> int:
    """Bytes that this process can still allocate."""
    from mlfusion.system.memory import available  # imports torch, which small images have no need of

    return available()
