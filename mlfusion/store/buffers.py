"""Memory for results of readers, reused once no array refers to it: clearing fresh memory takes as long as filling it."""

import math
import mmap
from collections import deque
from contextlib import suppress
from typing import ClassVar

import numpy as np

SMALL_RESULT_BYTES = 1 << 24  # below this, neither threads nor reused memory are worth their cost
IDLE_BYTES = 1 << 30  # unused memory that a process keeps for its next results


class BufferPool:
    """Pool of result buffers: a buffer returns to the pool when no array refers to it any more.

    The pool keeps up to IDLE_BYTES of unused memory, which the system may take back when it runs short.
    """

    idle: ClassVar[deque[mmap.mmap]] = deque()

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.__array_interface__ = np.frombuffer(memory, np.uint8).__array_interface__

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An uninitialised array."""
        size = math.prod(shape) * dtype.itemsize
        if size >= max(SMALL_RESULT_BYTES, 1) and hasattr(mmap, "MADV_FREE"):
            with suppress(OSError):  # there is no such memory: NumPy says so
                return np.asarray(cls(cls._take(size)))[:size].view(dtype).reshape(shape)
        return np.empty(shape, dtype)

    @classmethod
    def _take(cls, size: int) -> mmap.mmap:
        for _ in range(len(cls.idle)):
            with suppress(IndexError):  # another thread was faster
                if size <= len(memory := cls.idle.popleft()) <= 2 * size:
                    return memory
                cls.idle.append(memory)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def __del__(self) -> None:
        try:
            self._memory.madvise(mmap.MADV_FREE)
            self.idle.append(self._memory)
            while sum(map(len, list(self.idle))) > IDLE_BYTES:
                self.idle.popleft()
        except Exception:  # noqa: BLE001 - another thread was faster, or the interpreter ends: the memory goes with it
            pass
