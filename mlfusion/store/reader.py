"""Reads tokens of an entry: all of them, a layer, a kind, random rows, or rows in a shuffled order.

Only the requested tokens are read. Several threads may use one reader, and so may a forked or spawned process, which opens
the files again.
"""

import math
import mmap
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from mlfusion.errors import NotCached
from mlfusion.shapes import Int, Num
from mlfusion.store.leases import Pin
from mlfusion.store.records import removed_message
from mlfusion.store.shard import Check, Shard, Source, Span
from mlfusion.system.tree import Tree

OPEN_SHARDS = 256  # at most; each takes one file descriptor, or two once it is mapped
SHUFFLE_BYTES = 1 << 28  # bytes of images that are shuffled together
MIN_SHUFFLE_BLOCKS = 4  # blocks that are shuffled together, even if they are larger
THREADS = min(4, os.cpu_count() or 1)
ALL = slice(None)
SMALL_RESULT_BYTES = 1 << 24  # a smaller result gains nothing from threads or reused memory
IDLE_BYTES = 1 << 30  # of unused memory in the pool of a process


class BufferPool:
    """Memory for results, reused once no array refers to it: clearing fresh memory takes as long as filling it."""

    idle: ClassVar[deque[mmap.mmap]] = deque()

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.__array_interface__ = np.frombuffer(memory, np.uint8).__array_interface__

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An uninitialised array."""
        size = math.prod(shape) * dtype.itemsize
        if size >= max(SMALL_RESULT_BYTES, 1) and hasattr(mmap, "MADV_FREE"):
            with suppress(OSError):  # no memory left: NumPy raises the MemoryError below
                return np.asarray(cls(cls._take(size)))[:size].view(dtype).reshape(shape)
        return np.empty(shape, dtype)

    @classmethod
    def _take(cls, size: int) -> mmap.mmap:
        for _ in range(len(cls.idle)):
            with suppress(IndexError):  # another thread was faster
                if size <= len(memory := cls.idle.popleft()) <= 2 * size:
                    return memory
                cls.idle.append(memory)
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, size, **private)
        with suppress(AttributeError, OSError):  # not on every system
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def __del__(self) -> None:
        try:
            self._memory.madvise(mmap.MADV_FREE)
            self.idle.append(self._memory)
            while sum(map(len, list(self.idle))) > IDLE_BYTES:
                self.idle.popleft()
        except Exception:  # noqa: BLE001 - another thread was faster, or the interpreter exits: the memory is freed
            pass


class TokenReader:
    """Tokens of some layers and kinds of one entry. `Entry.open` creates it; close it, or use it in a `with`.

    with entry.open([6, 12], ["cls", "ap"]) as tokens:
        tokens.shape                    # (images, 2 layers, 2 tokens, width)
        tokens[np.array([5, 3, 900])]   # these images, in this order
        tokens[5]                       # one image: [2 layers, 2 tokens, width]
        for rows, batch in tokens.batches(256, seed=0):
            ...                         # one pass in a shuffled order
    """

    _PROCESS_STATE = ("_shards", "_lock", "_max_open", "_pins", "_folders")  # not pickled

    def __init__(
        self, spans: Sequence[Span], shape: tuple[int, int, int, int], skipped: Sequence[int], check: Check
    ) -> None:
        """Open the files of `spans`; `shape` is [images, layers, tokens, width] before `skipped` rows are left out."""
        self._spans, self._check, self._images = spans, check, shape[0]
        self._pass_check: Check = "never" if check == "never" else "always"  # a pass reads every chunk once
        self._rows = np.setdiff1d(np.arange(self._images), np.asarray(skipped, np.int64)) if skipped else None
        self.shape = (self._images - len(skipped), *shape[1:])
        self.dtype = spans[0].source.stream.encoding.numbers
        self._open()

    def _open(self) -> None:
        self._shards: OrderedDict[tuple[Source, int], Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._max_open = OPEN_SHARDS
        with suppress(ImportError):
            import resource  # not on every system

            self._max_open = min(OPEN_SHARDS, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._pins: list[Pin] = []
        # Files are opened relative to these folders, so a reader still finds them after a prune moved the entry.
        self._folders: dict[Source, Tree] = {}
        for source in dict.fromkeys(span.source for span in self._spans):
            if source not in self._folders:
                self._hold([span.source for span in self._spans if span.source.place == source.place])

    def _hold(self, sources: Sequence[Source]) -> None:
        """Pin the entry of these sources, and open their folders."""
        first = sources[0]
        for last_attempt in (False, False, True):
            try:
                with first.tree.hold(first.entry) as entry:
                    self._pins.append(Pin(entry, "pins"))
                    for source in sources:
                        if source not in self._folders:
                            self._folders[source] = entry.hold(source.stream.folder)
                return
            except FileNotFoundError as err:
                if last_attempt:
                    self.close()
                    raise NotCached(removed_message(Path(err.filename))) from err
                time.sleep(0.1)  # a prune that finds our pin moves the folder back

    def read(self) -> Num[np.ndarray, "N L T D"]:
        """Everything, in `dtype`; T counts kinds x tokens."""
        out = self._empty(self._images)
        jobs = [(span, shard) for span in self._spans for shard in range(span.source.stream.shards)]

        def copy(chosen: np.ndarray) -> None:
            for span, number in (jobs[job] for job in chosen.tolist()):
                shard, stream = self._shard(span.source, number), span.source.stream
                for block in range(shard.blocks):
                    shard.fetch(block, span)
                for block in range(shard.blocks):
                    first = number * stream.shard_rows + block * stream.chunk_rows
                    shard.put(block, span, out[first : first + shard.rows(block)], ALL, ALL, self._pass_check)

        # Each thread copies neighbouring jobs: two threads that write to one page of the result would block each other.
        threads = 1 if out.nbytes < SMALL_RESULT_BYTES else THREADS
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(copy, np.array_split(np.arange(len(jobs)), threads)))
        return out if self._rows is None else out[self._rows]

    def __len__(self) -> int:
        """Number of readable images."""
        return self.shape[0]

    def __getitem__(
        self, rows: int | np.integer | slice | Sequence[int] | Int[np.ndarray, " B"]
    ) -> Num[np.ndarray, "*B L T D"]:
        """Images in the order of `rows`, which may repeat, [B, L, T, D]; of one number, that image, [L, T, D].

        Raises:
            IndexError: there is no such row.
            CacheUnusable: a shard is damaged.
        """
        if isinstance(rows, (int, np.integer)):
            return self[np.array([rows])][0]
        indices = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows, np.int64)
        if indices.size and not (-len(self) <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of {len(self)} images")
        indices = np.where(indices < 0, indices + len(self), indices)
        images = indices if self._rows is None else self._rows[indices]
        out = self._empty(len(images))
        self._gather(images, out, self._check)
        return out

    def order(self, seed: int, rows: Int[np.ndarray, " N"] | None = None) -> Int[np.ndarray, " N"]:
        """The order in which `batches` yields all images, or those of `rows`; it depends only on the seed."""
        return np.concatenate(self._groups(seed, rows))

    def batches(
        self, size: int | Sequence[int], *, seed: int, rows: Int[np.ndarray, " N"] | None = None
    ) -> Iterator[tuple[Int[np.ndarray, " B"], Num[np.ndarray, "B L T D"]]]:
        """One pass in a shuffled order over all images, or over `rows`: yields (rows, their tokens).

        Blocks of neighbouring images are drawn from the whole entry, as many as fit in SHUFFLE_BYTES; their images are
        shuffled together and yielded while threads read the next blocks. So memory does not grow with the entry, every
        block is read once, and rows that are sorted by class are well mixed.

        `size` is the number of images per batch (the last may be smaller), or the sizes of all batches: ValueError if these
        do not add up to the number of images. CacheUnusable if a shard is damaged.
        """
        groups = self._groups(seed, rows)
        order = np.concatenate(groups)
        if isinstance(size, int):
            size = [size] * (len(order) // size) + [len(order) % size] * (len(order) % size > 0)
        elif sum(size) != len(order):
            raise ValueError(f"batches of {sum(size)} images in all, and there are {len(order)}")
        ends = np.cumsum([0, *size])
        steps = _plan_steps(ends, np.cumsum([len(group) for group in groups]))

        def fill(rest: np.ndarray, start: int, stop: int) -> np.ndarray:
            memory = self._empty(len(rest) + stop - start)
            memory[: len(rest)] = rest
            rows = order[start:stop]
            self._gather(rows if self._rows is None else self._rows[rows], memory[len(rest) :], self._pass_check)
            return memory

        batches = deque(pairwise(ends.tolist()))
        memory = self._empty(0)
        with ThreadPoolExecutor(1) as ahead:
            waiting: Future[np.ndarray] | None = None
            for (start, first), (stop, complete), after in zip(steps, steps[1:], [*steps[2:], None], strict=False):
                memory = waiting.result() if waiting else fill(memory, start, stop)
                waiting = None
                while batches and batches[0][1] <= complete:
                    a, b = batches.popleft()
                    yield order[a:b], memory[a - first : b - first]
                    if after and waiting is None:
                        # The caller asks for a second batch, so it has released the memory of the step before, which can
                        # be filled. The rest of this step belongs to a batch of the next.
                        waiting = ahead.submit(fill, memory[complete - first :], stop, after[0])

    def _groups(self, seed: int, rows: np.ndarray | None) -> list[np.ndarray]:
        """Groups of rows that are in memory at the same time, each [n] int64, in the order of the pass."""
        random = np.random.default_rng(seed)
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64)
        size = max(span.source.stream.chunk_rows for span in self._spans)  # powers of two
        block = (chosen if self._rows is None else self._rows[chosen]) // size
        numbers = random.permutation(-(-self._images // size))
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        group_blocks = max(MIN_SHUFFLE_BLOCKS, SHUFFLE_BYTES // (size * row_bytes))
        group = np.empty(len(numbers), np.int64)
        count = -(-len(numbers) // group_blocks)
        group[numbers] = np.arange(len(numbers)) * count // max(len(numbers), 1)  # groups of similar size
        shuffled = random.permutation(len(chosen))
        shuffled = shuffled[np.argsort(group[block[shuffled]], kind="stable")]
        cuts = np.flatnonzero(np.diff(group[block[shuffled]])) + 1
        return np.split(chosen[shuffled], cuts)

    def _gather(self, images: np.ndarray, out: np.ndarray, check: Check) -> None:
        """Read the tokens of `images` into `out`, chunk after chunk."""
        for pin in self._pins:
            pin.renew()
        jobs = [(span, *run) for span in self._spans for run in _runs(images // span.source.stream.chunk_rows)]
        for span, number, _ in jobs:
            blocks = span.source.stream.shard_blocks
            self._shard(span.source, number // blocks).fetch(number % blocks, span)

        def put(job: tuple[Span, int, np.ndarray]) -> None:
            span, number, targets = job
            stream = span.source.stream
            shard, block = self._shard(span.source, number // stream.shard_blocks), number % stream.shard_blocks
            offsets = images[targets] % stream.chunk_rows
            sort = np.argsort(offsets)
            if np.array_equal(offsets[sort], np.arange(shard.rows(block))):  # the whole block
                shard.put(block, span, out, targets[sort], ALL, check)
                return
            try:
                shard.put(block, span, out, targets, offsets, check)
            except MemoryError:
                with self._lock:
                    self._shards.clear()  # unmaps the shards that no other thread is reading
                shard.put(block, span, out, targets, offsets, check)

        if out.nbytes < SMALL_RESULT_BYTES:
            for job in jobs:
                put(job)
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(put, jobs))

    def _empty(self, images: int) -> np.ndarray:
        out = BufferPool.empty((images, *self.shape[1:]), self.dtype)
        if any(span.source.stream.width < self.shape[-1] for span in self._spans):
            out.fill(0)  # pads narrower layers
        return out

    def _shard(self, source: Source, number: int) -> Shard:
        key = (source, number)
        with self._lock:
            shard = self._shards.get(key)
            if shard is not None:
                self._shards.move_to_end(key)
                return shard
        shard = source.open(number, self._folders[source], [span for span in self._spans if span.source is source])
        with self._lock:
            shard = self._shards.setdefault(key, shard)
            while len(self._shards) > self._max_open:
                self._shards.popitem(last=False)  # unmapped with its last view
        return shard

    def close(self) -> None:
        """Close the files; the reader must not be used afterwards."""
        self._shards.clear()
        while self._folders:
            self._folders.popitem()[1].close()
        while self._pins:
            self._pins.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "_folders" in vars(self):
            try:  # noqa: SIM105 - at interpreter exit `suppress`, and what `close` calls, may no longer exist
                self.close()
            except Exception:  # noqa: BLE001
                pass

    def __getstate__(self) -> dict[str, Any]:
        """State from which another process opens the same shards."""
        return {name: value for name, value in vars(self).items() if name not in self._PROCESS_STATE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()


def _runs(blocks: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Each distinct block number, with the indices at which it occurs."""
    order = np.argsort(blocks, kind="stable")
    numbers, starts = np.unique(blocks[order], return_index=True)
    return list(zip(numbers.tolist(), np.split(order, starts[1:]), strict=False))  # split gives one part of no blocks


def _plan_steps(ends: np.ndarray, read: np.ndarray) -> list[tuple[int, int]]:
    """Steps of a pass, each (images read so far, images in complete batches so far); a step completes at least one batch.

    `ends` and `read` are the cumulative numbers of images of the batches and of the groups, which are read at once.
    """
    steps = [(0, 0)]
    for stop in read.tolist():
        complete = int(ends[np.searchsorted(ends, stop, "right") - 1])
        if complete > steps[-1][1]:  # else the next group joins this step
            steps.append((stop, complete))
    return steps
