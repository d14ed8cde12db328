"""Decodes and prepares images ahead of the forward pass, in order, by threads or processes.

Batches lie in a ring of buffers that are reused, so memory does not grow with the number of images, and no more is decoded
than the buffers hold. Workers write into the buffers directly; between processes they are shared memory.
"""

import logging
import math
import mmap
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from mlfusion import datasets
from mlfusion.errors import BadData, BadImage, MlfusionError
from mlfusion.models.preprocessing import Preprocessing
from mlfusion.system.devices import processor_count

logger = logging.getLogger(__name__)

PREFETCHED_BATCHES = 2  # batches that are decoded while one is in use
IMAGES_PER_TASK = {False: 4, True: 16}
"""By whether workers are processes: to hand a task to a process takes a tenth of a millisecond of the thread that computes."""

NICENESS = 10  # of decoding threads, so that the forward pass has priority on a shared processor
MAX_PROCESSES = 32
PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU, not only for the current one

Decoded = tuple[float, dict[int, str]]
"""(duration in seconds, {row: error message of an unreadable image})."""

T = TypeVar("T")


def picture(split: datasets.Split, row: int, steps: Preprocessing) -> np.ndarray:
    """[3, height, width]: an image, read and preprocessed.

    Raises:
        BadImage: it cannot be read.
        BadData: there is too little memory for it.
    """
    with split.at_work(row):
        return prepare(split.read(row), split.ids[row], split.decode, steps)


def prepare(data: bytes, name: str, decode: datasets.Decode, steps: Preprocessing) -> np.ndarray:
    """[3, height, width]: an image file's bytes, decoded and preprocessed; random crops depend on `name`.

    Raises:
        BadImage: it cannot be decoded; says which and why.
        BadData: there is too little memory for it.
    """
    with datasets.at_work(name):
        return _prepare(data, name, decode, steps)


def _prepare(data: bytes, name: str, decode: datasets.Decode, steps: Preprocessing) -> np.ndarray:
    if steps.decodes_jpeg and isinstance(decode, datasets.Decoder) and not decode.exif_transpose:
        pixels = steps.from_jpeg(data, name, decode.max_pixels)
        if pixels is not None:
            return pixels
    return steps.picture(datasets.decoded(data, name, decode), name)


@dataclass(eq=False)
class LoadedBatch(Generic[T]):
    """A batch, valid until the next one is requested."""

    rows: range
    payload: T  # passed through with the rows
    pictures: Tensor  # [rows, 3, height, width], see `picture`; black for unread images
    unread: dict[int, str]  # row → error message of an unreadable image
    free: Callable[[], None] = lambda: None  # returns when the pictures are no longer needed; replaceable


@dataclass(frozen=True, eq=False)
class _DecodeTask:
    """The task of a worker: decode rows into a buffer."""

    split: datasets.Split
    steps: Preprocessing
    ring: Tensor  # [slots, images, 3, height, width]

    def __call__(self, slot: int, at: int, rows: range) -> Decoded:
        start = time.perf_counter()
        unread: dict[int, str] = {}
        for row, target in zip(rows, self.ring[slot][at : at + len(rows)].numpy(), strict=True):
            try:
                target[:] = picture(self.split, row, self.steps)
            except BadImage as err:
                target[:] = 0
                unread[row] = str(err)
        return time.perf_counter() - start, unread


@dataclass
class Loader:
    """Reads a split's rows in batches of at most `batch_size`."""

    split: datasets.Split
    steps: Preprocessing
    batch_size: int
    skip_bad: bool = False
    workers: int = 0  # number of decoding workers; 0: one per core
    processes: bool = False  # else threads
    pinned: bool = False  # page-locked buffers, from which a GPU copies by itself
    busy: float = field(default=0.0, init=False)  # seconds of work, summed over the workers
    waited: float = field(default=0.0, init=False)  # seconds that the caller waited for pictures

    def __call__(self, batches: Iterable[tuple[range, T]]) -> Iterator[LoadedBatch[T]]:
        """Yield the pictures of these rows, in this order.

        Raises:
            BadData: an image cannot be read, and `skip_bad` is not set.
        """
        ring = _ring((PREFETCHED_BATCHES + 1, self.batch_size, 3, *self.steps.pixels), self.steps.dtype)
        pool, fill = self._pool(_DecodeTask(self.split, self.steps, ring))
        pending: deque[tuple[LoadedBatch[T], list[Future[Decoded]]]] = deque()
        batch: LoadedBatch[T] | None = None
        with pool, _pinned(ring, self.pinned):
            try:
                for number, (rows, payload) in enumerate(batches):
                    slot = number % len(ring)
                    step = IMAGES_PER_TASK[self.processes]
                    starts = range(0, len(rows), step)
                    futures = [pool.submit(fill, slot, at, rows[at : at + step]) for at in starts]
                    pending.append((LoadedBatch(rows, payload, ring[slot][: len(rows)], {}), futures))
                    if len(pending) > PREFETCHED_BATCHES:  # the next batch goes into the buffer of this one
                        yield (batch := self._ready(*pending.popleft()))
                        batch.free()
                        batch = None
                while pending:
                    yield (batch := self._ready(*pending.popleft()))
                    batch.free()
                    batch = None
            finally:
                for _, futures in pending:
                    for future in futures:
                        future.cancel()
                if (
                    batch is not None
                ):  # the loop ends early, perhaps since the device failed; a copy may still read the buffer
                    with suppress(RuntimeError):
                        batch.free()

    def _ready(self, batch: LoadedBatch[T], futures: list[Future[Decoded]]) -> LoadedBatch[T]:
        start = time.perf_counter()
        for future in futures:
            try:
                seconds, unread = future.result()
            except BrokenProcessPool as err:
                raise MlfusionError(
                    "a process that decodes images was killed, as happens when memory runs out; run the same command again "
                    "with fewer of them: --workers 2. What was extracted is kept"
                ) from err
            self.busy += seconds
            batch.unread |= unread
        self.waited += time.perf_counter() - start
        if batch.unread and not self.skip_bad:
            raise BadData(
                f"{batch.unread[min(batch.unread)]}; mend or remove it, or go on without such images by --skip-bad. What "
                "was extracted is kept"
            )
        return batch

    def _pool(self, task: _DecodeTask) -> tuple[Executor, Callable[[int, int, range], Decoded]]:
        if not self.processes:
            return ThreadPoolExecutor(self.workers or processor_count(), initializer=_lower_priority), task
        # Forked processes share the split and the buffers.
        workers = self.workers or min(MAX_PROCESSES, max(1, processor_count() - 1))
        fork = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(workers, fork, initializer=_init_worker, initargs=(task, os.getpid()))
        # Memory is locked for a GPU only after the workers were forked: some drivers take locked memory from a fork.
        for started in [pool.submit(os.getpid) for _ in range(workers)]:
            started.result()
        return pool, _run_in_worker


def can_fork() -> bool:
    """Whether worker processes can share memory and loaded data on this system."""
    return sys.platform == "linux"


def _lower_priority() -> None:
    """Give the forward pass priority. Only Linux has priorities of threads; elsewhere this would change the process."""
    if sys.platform == "linux":
        with suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS))


_task: _DecodeTask | None = None  # the task of this worker process


def _init_worker(task: _DecodeTask, parent: int) -> None:
    global _task
    _task = task
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent has ended: a worker gets no other signal."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run_in_worker(slot: int, at: int, rows: range) -> Decoded:
    assert _task is not None
    return _task(slot, at, rows)


def _ring(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that is shared with forked processes."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


@contextmanager
def _pinned(ring: Tensor, enabled: bool) -> Iterator[None]:
    """Lock the buffers in memory, from which any GPU copies by itself; if the system refuses, copies are slower."""
    if not enabled:
        yield
        return
    runtime = torch.cuda.cudart()
    if refused := int(runtime.cudaHostRegister(ring.data_ptr(), ring.nbytes, PORTABLE)):
        logger.warning(
            "the system does not lock %.0f MB of memory for copies to the GPU (error %d), so they are slower; a container may "
            "need a higher limit: ulimit -l",
            ring.nbytes / 1e6,
            refused,
        )
        with suppress(RuntimeError):  # CUDA reports the refusal once more, with the next computation
            torch.zeros(1, device="cuda")
        yield
        return
    try:
        yield
    finally:
        runtime.cudaHostUnregister(ring.data_ptr())
