"""Tunes the C library's memory allocator. The setting holds for a whole process, so only the command line makes it."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Option of mallopt(3): (value while a command runs, glibc's default). The padding equals the size of the threads' heaps,
# so a heap that is empty for a moment is not released.
OPTIONS = {
    -1: (2**30, 2**17),  # M_TRIM_THRESHOLD
    -2: (2**26, 2**17),  # M_TOP_PAD
    -3: (2**25, 2**17),  # M_MMAP_THRESHOLD
    -4: (0, 2**16),  # M_MMAP_MAX
    -8: (1, 0),  # M_ARENA_MAX
}
VARIABLES = {  # the same values for processes that are started meanwhile, which read them from the environment
    "MALLOC_TRIM_THRESHOLD_": -1,
    "MALLOC_TOP_PAD_": -2,
    "MALLOC_MMAP_THRESHOLD_": -3,
    "MALLOC_MMAP_MAX_": -4,
    "MALLOC_ARENA_MAX": -8,
}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside the context glibc reuses freed memory for the next training step: fresh pages cost a fifth of a step.

    So it does in processes that are started inside. On exit glibc's defaults are restored. The context has no effect with
    another C library, or if environment variables tune the allocator (MALLOC_…, GLIBC_TUNABLES).
    """
    tuned_by_user = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    if platform.libc_ver()[0] != "glibc" or tuned_by_user:
        yield
        return
    library = ctypes.CDLL(None)
    for option, (value, _) in OPTIONS.items():
        library.mallopt(option, value)
    os.environ |= {name: str(OPTIONS[option][0]) for name, option in VARIABLES.items()}
    try:
        yield
    finally:
        for name in VARIABLES:
            os.environ.pop(name, None)
        for option, (_, default) in OPTIONS.items():
            library.mallopt(option, default)
        library.malloc_trim(0)
