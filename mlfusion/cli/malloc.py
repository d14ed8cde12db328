"""Tuning of the C library's memory allocator: a process-wide setting, so only the command line makes it, never the library."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Option of mallopt(3): (while a command runs, glibc's default). The padding is as large as the heaps that threads allocate
# from, so that a heap that is empty for a moment is kept too.
OPTIONS = {
    -1: (2**30, 2**17),  # M_TRIM_THRESHOLD
    -2: (2**26, 2**17),  # M_TOP_PAD
    -3: (2**25, 2**17),  # M_MMAP_THRESHOLD
    -4: (0, 2**16),  # M_MMAP_MAX
    -8: (1, 0),  # M_ARENA_MAX
}


def _tuned_by_user() -> bool:
    return any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within it, glibc keeps freed memory for the next step: to fetch and clear pages again takes a fifth of a step.

    Afterwards glibc's defaults hold again. Nothing is changed with another C library, or where the environment tunes
    the allocator (MALLOC_…, GLIBC_TUNABLES).
    """
    if platform.libc_ver()[0] != "glibc" or _tuned_by_user():
        yield
        return
    library = ctypes.CDLL(None)
    for option, (value, _) in OPTIONS.items():
        library.mallopt(option, value)
    try:
        yield
    finally:
        for option, (_, default) in OPTIONS.items():
            library.mallopt(option, default)
        library.malloc_trim(0)
