"""Reads tokens out of shards: all of them, a layer, a kind, random rows, or rows in a shuffled order, and nothing else.

A chunk holds one layer and one kind of a run of images, so what was not asked for stays on the disk. Where much of a block
is wanted, chunk after chunk is read into a core's cache, compared there with its checksum, and put where it belongs: it
travels from memory once. Images here and there come from shards that are mapped, once their chunks were compared. A reader
works in threads, and after fork or spawn: each process opens the files for itself.
"""

import errno
import math
import mmap
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from mlfusion.errors import CacheUnusable, NotCached
from mlfusion.store.claims import Pin
from mlfusion.store.formats import FORMATS, crc, xxh
from mlfusion.store.manifest import Manifest
from mlfusion.store.stream import Stream

Check = Literal["once", "always", "never"]
Index = np.ndarray | slice

OPEN_SHARDS = 256  # open at once; each takes one or, mapped, two of the process's file descriptors, and half are left
MIXED = 1 << 28  # bytes of images that are shuffled together, of at least
FEWEST = 4  # blocks
THREADS = min(4, os.cpu_count() or 1)
PIECE = 1 << 19  # bytes that are picked and put at once: they stay in a core's cache on the way,
APART = 512  # or so many items: of fewer NumPy does not let another thread work meanwhile,
PIECES = 1 << 22  # but no more bytes than these
ALL = slice(None)
SMALL = 1 << 24  # bytes of a result below which neither threads nor lent memory are worth their while
IDLE = 1 << 30  # bytes of memory that a process keeps for its next results


@dataclass(frozen=True, eq=False)
class Source:
    """A whole stream of one entry, as a reader needs it."""

    folder: Path  # of the stream
    stream: Stream
    manifest: Manifest

    def file(self, shard: int) -> str:
        """The file of a shard, inside the folder."""
        return f"c/{shard}/{FORMATS[self.stream.format].file}"

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / self.file(shard)


@dataclass(frozen=True, eq=False)
class Span:
    """Planes that stand next to each other in the result: [.., layers, kinds x tokens, ..] is one view of it."""

    source: Source
    into_layers: slice  # of the result
    into_tokens: slice
    layers: np.ndarray  # [l] of the source, one for each of the result's
    kinds: np.ndarray  # [k]

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """(layer, kind), plane by plane."""
        return [(layer, kind) for layer in self.layers.tolist() for kind in self.kinds.tolist()]

    def of(self, out: np.ndarray) -> np.ndarray:
        """Its part of a result [rows, layers, tokens, width or more], as [rows, layers, kinds, tokens, width]."""
        stream = self.source.stream
        part = out[:, self.into_layers, self.into_tokens, : stream.width]
        return part.reshape(len(out), len(self.layers), len(self.kinds), stream.tokens, stream.width)


def spans(source: Source, planes: Sequence[tuple[int, int, int, int]]) -> list[Span]:
    """Join planes, each (result's layer, result's first token, source's layer, source's kind), into few spans."""
    tokens = source.stream.tokens
    runs: list[tuple[int, int, list[int], list[int]]] = []  # first layer and token of the result; layers, kinds
    for layer, rows in groupby(planes, key=lambda plane: plane[0]):
        kinds: list[tuple[int, list[int]]] = []
        for _, token, _, kind in (found := list(rows)):
            if kinds and token == kinds[-1][0] + len(kinds[-1][1]) * tokens:
                kinds[-1][1].append(kind)
            else:
                kinds.append((token, [kind]))
        for token, some in kinds:
            for run in runs:
                if run[0] + len(run[2]) == layer and (run[1], run[3]) == (token, some):
                    run[2].append(found[0][2])
                    break
            else:
                runs.append((layer, token, [found[0][2]], some))
    return [
        Span(
            source,
            slice(layer, layer + len(layers)),
            slice(token, token + len(some) * tokens),
            np.array(layers),
            np.array(some),
        )
        for layer, token, layers, some in runs
    ]


class Shard:
    """One shard's file: where its chunks lie, and which of them were compared with their checksum."""

    def __init__(self, source: Source, number: int, descriptor: int, wanted: Sequence[Span] = ()) -> None:
        self._descriptor = descriptor  # ours from here on
        stream, manifest = source.stream, source.manifest
        self._stream, self._path = stream, source.path(number)
        self._rows = len(stream.rows(number))
        self.blocks = -(-self._rows // stream.chunk_rows)
        first = number * stream.shard_blocks
        mine = slice(first, first + self.blocks)
        self._starts = manifest.offsets[mine].astype(np.int64)  # [blocks, layers, kinds]
        self._sum: Callable[[np.ndarray], int]
        if manifest.xxh3 is not None:
            self._sum, self._sums = xxh, manifest.xxh3[mine]
        else:  # written by an earlier version
            self._sum, self._sums = crc, manifest.crc32c[mine]
        self._compared = np.zeros(self._starts.shape, bool)
        self._row_bytes, self._item = stream.row_bytes, np.dtype(f"V{stream.row_bytes}")  # an image's part of a chunk
        self._size = manifest.sizes[number]
        if os.fstat(descriptor).st_size != self._size:
            raise self._damaged("its size is not the manifest's")
        self._cold = self._absent(wanted)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def _damaged(self, why: str) -> CacheUnusable:
        return damaged(self._path, why)

    def rows(self, block: int) -> int:
        """Images in a block."""
        return min(self._stream.chunk_rows, self._rows - block * self._stream.chunk_rows)

    def chunk(self, block: int, layer: int, kind: int, check: Check = "always") -> np.ndarray:
        """[rows] as stored, an item an image, in memory of the thread's own: gone with its next chunk.

        Raises:
            CacheUnusable: the checksum is wrong, or the disk does not give all of it.
        """
        data = _buffer(self.rows(block) * self._row_bytes)
        first, got = int(self._starts[block, layer, kind]), 0
        try:
            while got < len(data):
                more = os.preadv(self._descriptor, [data[got:].data], first + got)
                if more == 0:
                    raise self._damaged("it ends before its time")
                got += more
        except OSError as err:
            raise self._damaged(f"the disk does not give all of it ({err.strerror})") from err
        self._compare(data, block, layer, kind, check)
        return data.view(self._item)

    def _compare(self, data: np.ndarray, block: int, layer: int, kind: int, check: Check) -> None:
        if check == "always" or (check == "once" and not self._compared[block, layer, kind]):
            if self._sum(data) != self._sums[block, layer, kind]:
                raise self._damaged(f"the checksum of chunk {block}, layer {self._stream.layers[layer]} is wrong")
            self._compared[block, layer, kind] = True  # of two threads at once each compares for itself

    @cached_property
    def _bytes(self) -> np.ndarray:
        """The whole file, mapped into memory."""
        try:
            mapped = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        except OSError as err:
            if err.errno != errno.ENOMEM:
                raise
            raise MemoryError(
                f"there is no room in the process's memory to map {self._path}; free some, or raise its limits "
                "(ulimit -v; vm.max_map_count)"
            ) from err
        return np.frombuffer(mapped, np.uint8)

    @cached_property
    def _items(self) -> np.ndarray:
        """At each byte of it the item that would begin there."""
        return np.ndarray((self._size - self._row_bytes + 1,), self._item, self._bytes.data, strides=(1,))

    def put(self, block: int, span: Span, out: np.ndarray, where: Index, inside: Index, check: Check) -> None:
        """out[where] = images `inside` of a block, decoded; out is [.., layers, tokens, width] of the whole result.

        Many images come with their chunks, read and compared one after another; few from the map, once their chunks are
        compared.

        Raises:
            CacheUnusable: see `chunk`.
        """
        part = span.of(out)
        if isinstance(inside, slice) or 2 * len(inside) > self.rows(block):
            for plane, pair in zip(np.ndindex(part.shape[1:3]), span.pairs, strict=True):
                _put(part[:, *plane], where, self.chunk(block, *pair, check), inside, self._stream)
            return
        planes = span.layers[:, None], span.kinds
        if check == "always" or (check == "once" and not self._compared[block, *planes].all()):
            for pair in span.pairs:
                first = int(self._starts[block, *pair])
                mapped = self._bytes[first : first + self.rows(block) * self._row_bytes]
                self._compare(mapped, block, *pair, check)
        starts = self._starts[block, *planes] + (inside * self._row_bytes)[:, None, None]
        _put(part, where, self._items, starts, self._stream)

    def _absent(self, wanted: Sequence[Span]) -> np.ndarray:
        """Chunks that are not in memory already, by their last byte: to ask for those that are costs as much as a copy."""
        absent = np.zeros(self._starts.shape, bool)
        if hasattr(os, "posix_fadvise"):
            for span in wanted:
                absent[np.ix_(np.arange(self.blocks), span.layers, span.kinds)] = True
        if hasattr(os, "RWF_NOWAIT"):
            byte = [bytearray(1)]
            for chunk in np.flatnonzero(absent).tolist():
                try:
                    os.preadv(
                        self._descriptor, byte, int(self._starts.flat[chunk]) + self._row_bytes - 1, os.RWF_NOWAIT
                    )
                except BlockingIOError:
                    continue
                except OSError:  # of a file system that cannot tell: all are asked for
                    break
                absent.flat[chunk] = False
        return absent

    def fetch(self, block: int, span: Span) -> None:
        """Ask the disk for chunks that are about to be read, all at once."""
        if not self._cold.any():
            return
        planes = np.ix_(np.array([block]), span.layers, span.kinds)
        starts = np.sort(self._starts[planes][self._cold[planes]])
        if not len(starts):
            return
        self._cold[planes] = False
        size = self.rows(block) * self._row_bytes
        breaks = np.flatnonzero(np.diff(starts) > size + mmap.PAGESIZE) + 1  # a gap of less than a page is none
        for run in np.split(starts, breaks):
            os.posix_fadvise(self._descriptor, int(run[0]), int(run[-1]) + size - int(run[0]), os.POSIX_FADV_WILLNEED)


_buffers = threading.local()


def _buffer(size: int) -> np.ndarray:
    """[size] uint8, the same memory for every call of a thread."""
    if len(getattr(_buffers, "one", ())) < size:
        _buffers.one = np.empty(size, np.uint8)
    found: np.ndarray = _buffers.one[:size]
    return found


def _put(into: np.ndarray, where: Index, items: np.ndarray, places: Index, stream: Stream) -> None:
    """into[where] = what `items[places]` stand for: [.., tokens, width] of [.., tokens, columns] as stored."""
    whole = _whole(into) if stream.encoding.plain else None
    if whole is not None and isinstance(places, slice):
        whole[where] = items[places]
        return
    size = max(1, math.prod(into.shape[1:]) * into.itemsize)
    items_each = max(1, math.prod(into.shape[1:-2]))
    step = max(1, PIECE // size, min(-(-APART // items_each), PIECES // size))
    for start in range(0, len(items) if isinstance(places, slice) else len(places), step):
        some = slice(start, start + step)
        kept = items[some] if isinstance(places, slice) else items[places[some]]
        there = some if isinstance(where, slice) else where[some]
        if whole is not None:
            whole[there] = kept
        else:
            stored = kept.view(stream.encoding.stored).reshape(*kept.shape, stream.tokens, stream.columns)
            into[there] = stream.encoding.decode(stored)


def _whole(tokens: np.ndarray) -> np.ndarray | None:
    """[.., tokens, channels] as [..] of one item each, which NumPy moves faster; None if they do not stand together."""
    *_, step, stride = tokens.strides
    *outer, count, channels = tokens.shape
    if stride != tokens.itemsize or (count > 1 and step != channels * stride):
        return None
    items: np.ndarray = tokens.reshape(*outer, count * channels).view(f"V{count * channels * stride}")[..., 0]
    return items


class Lent:
    """Memory of results. It is lent again once nobody holds a view of it: to clear fresh memory takes as long as to fill it.

    Some of it stays with the process while nobody wants it, and the system takes that when it is short of memory.
    """

    idle: ClassVar[deque[mmap.mmap]] = deque()

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.__array_interface__ = np.frombuffer(memory, np.uint8).__array_interface__

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with whatever is in it."""
        size = math.prod(shape) * dtype.itemsize
        if size >= max(SMALL, 1) and hasattr(mmap, "MADV_FREE"):
            with suppress(OSError):  # there is no such memory: NumPy says so
                return np.asarray(cls(cls._found(size)))[:size].view(dtype).reshape(shape)
        return np.empty(shape, dtype)

    @classmethod
    def _found(cls, size: int) -> mmap.mmap:
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
            while sum(map(len, list(self.idle))) > IDLE:
                self.idle.popleft()
        except Exception:  # noqa: BLE001 - another thread was faster, or the interpreter ends: the memory goes with it
            pass


class TokenReader:
    """Tokens of one entry: some layers, some kinds. Made by `Entry.open`; close it, or use it in a `with`.

    with entry.open([6, 12], ["cls", "ap"]) as tokens:
        tokens.shape                    # (images, 2 layers, 2 tokens, width)
        tokens[np.array([5, 3, 900])]   # these images, in this order
        for rows, batch in tokens.batches(256, seed=0):
            ...                         # one pass in a shuffled order
    """

    _OWN = ("_shards", "_lock", "_most", "_pins", "_folders")  # of this process

    def __init__(
        self,
        spans: Sequence[Span],
        *,
        layers: int,
        tokens: int,
        width: int,
        images: int,
        skipped: Sequence[int],
        check: Check,
    ) -> None:
        self._spans, self._check = tuple(spans), check
        self._rows = np.setdiff1d(np.arange(images), np.asarray(skipped, np.int64)) if len(skipped) else None
        self._images = images
        self.shape = (images - len(skipped), layers, tokens, width)
        self.dtype = spans[0].source.stream.encoding.numbers
        self._begin()

    def _begin(self) -> None:
        self._shards: OrderedDict[tuple[Path, int], Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._most = OPEN_SHARDS
        with suppress(ImportError):
            import resource  # where there are such limits

            self._most = min(OPEN_SHARDS, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        folders = list(dict.fromkeys(span.source.folder for span in self._spans))
        self._pins = [Pin(folder) for folder in dict.fromkeys(folder.parent.parent / "pins" for folder in folders)]
        # Files are opened from here on relative to the folder itself: a prune that moves it away takes nothing from us.
        self._folders: dict[Path, int] = {}
        for folder in folders:
            for last in (False, False, True):
                try:
                    self._folders[folder] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                    break
                except FileNotFoundError as err:
                    if last:
                        self.close()
                        raise NotCached(gone(folder)) from err
                    time.sleep(0.1)  # a prune that sees our mark puts it back

    # --- the five ways to read --------------------------------------------------------------------------------------

    def read(self) -> np.ndarray:
        """Everything: [images, layers, tokens, width] in `dtype`."""
        out = self._empty(self._images)
        jobs = [(span, shard) for span in self._spans for shard in range(span.source.stream.shards)]

        def copy(some: np.ndarray) -> None:
            for span, number in (jobs[job] for job in some.tolist()):
                shard, stream = self._shard(span.source, number), span.source.stream
                for block in range(shard.blocks):
                    shard.fetch(block, span)
                for block in range(shard.blocks):
                    first = number * stream.shard_rows + block * stream.chunk_rows
                    shard.put(block, span, out[first : first + shard.rows(block)], ALL, ALL, self._anew)

        # A thread takes neighbours: two that write to one page of the result wait for each other.
        threads = 1 if out.nbytes < SMALL else THREADS
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(copy, np.array_split(np.arange(len(jobs)), threads)))
        return out if self._rows is None else out[self._rows]

    def __len__(self) -> int:
        """How many images there are to read."""
        return self.shape[0]

    def __getitem__(self, rows: "slice | Sequence[int] | np.ndarray") -> np.ndarray:
        """Some images in the order asked for, [rows, layers, tokens, width]; an image may come twice.

        Raises:
            IndexError: there is no such image.
            CacheUnusable: a shard is damaged.
        """
        wanted = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows, np.int64)
        if wanted.size and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} of {len(self)} images")
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        images = wanted if self._rows is None else self._rows[wanted]
        out = self._empty(len(images))
        self._gather(images, out, self._check)
        return out

    def order(self, seed: int, rows: np.ndarray | None = None) -> np.ndarray:
        """The order of `batches`: all images, or those of `rows`, [n] int64. The same seed gives the same order."""
        groups = self._groups(seed, rows)
        return np.concatenate(groups) if groups else np.empty(0, np.int64)

    def batches(
        self, size: int | Sequence[int], *, seed: int, rows: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One pass in a shuffled order over all images, or over `rows`: (rows [b], tokens [b, layers, tokens, width]).

        Blocks of neighbouring images are drawn from the whole entry, as many as MIXED bytes hold; their images are
        shuffled among themselves and dealt out while threads read the next blocks. So memory does not grow with the
        entry, every block is read once and in one piece, and what comes as sorted by class leaves well mixed. An entry
        smaller than MIXED is shuffled without such bounds.

        Args:
            size: images of a batch, the last one may be smaller; or the sizes of all batches.
            seed: names the order.
            rows: images to read, by default all.

        Raises:
            ValueError: sizes that do not add up to the images there are.
            CacheUnusable: a shard is damaged.
        """
        groups = self._groups(seed, rows)
        images = sum(map(len, groups))
        sizes = (
            [size] * (images // size) + [images % size] * (images % size > 0) if isinstance(size, int) else list(size)
        )
        if sum(sizes) != images:
            raise ValueError(f"batches of {sum(sizes)} images in all, and there are {images}")
        order = np.concatenate(groups) if groups else np.empty(0, np.int64)
        ends = np.cumsum([0, *sizes])
        turns: list[tuple[int, int]] = [(0, 0)]  # up to where is read, and up to where there are whole batches
        for stop in np.cumsum([len(group) for group in groups]).tolist():
            whole = int(ends[np.searchsorted(ends, stop, "right") - 1])
            if whole > turns[-1][1]:  # else more groups go into the same turn
                turns.append((stop, whole))

        def fill(begun: np.ndarray, start: int, stop: int) -> np.ndarray:
            memory = self._empty(len(begun) + stop - start)
            memory[: len(begun)] = begun
            rows = order[start:stop]
            self._gather(rows if self._rows is None else self._rows[rows], memory[len(begun) :], self._anew)
            return memory

        batches = deque(pairwise(ends.tolist()))
        memory = self._empty(0)
        with ThreadPoolExecutor(1) as ahead:
            waiting: Future[np.ndarray] | None = None
            for (start, first), (stop, whole), after in zip(turns, turns[1:], [*turns[2:], None], strict=False):
                memory = waiting.result() if waiting else fill(memory, start, stop)
                waiting = None
                while batches and batches[0][1] <= whole:
                    a, b = batches.popleft()
                    yield order[a:b], memory[a - first : b - first]
                    if after and waiting is None:
                        # Who asks for a second batch has let go of the turn before: its memory is there to be filled.
                        # What is left of this turn belongs to a batch of the next.
                        waiting = ahead.submit(fill, memory[whole - first :], stop, after[0])

    def fetch(self, rows: np.ndarray) -> None:
        """Ask the disk for images that will be read soon; returns at once."""
        images = rows if self._rows is None else self._rows[rows]
        for span in self._spans:
            for number in np.unique(images // span.source.stream.chunk_rows).tolist():
                self._fetch_block(span, number)

    # --- what they stand on -----------------------------------------------------------------------------------------

    def _groups(self, seed: int, rows: np.ndarray | None) -> list[np.ndarray]:
        """Rows that are in memory together, each [n] int64, in the order in which they are dealt out."""
        random = np.random.default_rng(seed)
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64)
        size = max(span.source.stream.chunk_rows for span in self._spans)  # powers of two
        block = (chosen if self._rows is None else self._rows[chosen]) // size
        numbers = random.permutation(-(-self._images // size))
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        together = max(FEWEST, MIXED // (size * row_bytes))
        group = np.empty(len(numbers), np.int64)
        count = -(-len(numbers) // together)
        group[numbers] = np.arange(len(numbers)) * count // max(len(numbers), 1)  # groups of like size
        mixed = random.permutation(len(chosen))
        mixed = mixed[np.argsort(group[block[mixed]], kind="stable")]
        cuts = np.flatnonzero(np.diff(group[block[mixed]])) + 1
        return np.split(chosen[mixed], cuts) if len(chosen) else []

    def _gather(self, images: np.ndarray, out: np.ndarray, check: Check) -> None:
        """Tokens of `images`, chunk after chunk, to where each belongs in `out`."""
        for pin in self._pins:
            pin.renew()
        jobs = [(span, *run) for span in self._spans for run in _runs(images // span.source.stream.chunk_rows)]
        for span, number, _ in jobs:
            self._fetch_block(span, number)

        def put(job: tuple[Span, int, np.ndarray]) -> None:
            span, number, where = job
            stream = span.source.stream
            shard, block = self._shard(span.source, number // stream.shard_blocks), number % stream.shard_blocks
            inside = images[where] % stream.chunk_rows
            sort = np.argsort(inside)
            if np.array_equal(inside[sort], np.arange(shard.rows(block))):  # all of it: nothing need be picked
                shard.put(block, span, out, where[sort], ALL, check)
                return
            try:
                shard.put(block, span, out, where, inside, check)
            except MemoryError:
                with self._lock:
                    self._shards.clear()  # the maps that nobody looks into go, and make room
                shard.put(block, span, out, where, inside, check)

        if out.nbytes < SMALL:
            for job in jobs:
                put(job)
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(put, jobs))

    @property
    def _anew(self) -> Check:
        """For what is read from end to end: each chunk once a pass."""
        return "never" if self._check == "never" else "always"

    def _empty(self, images: int) -> np.ndarray:
        out = Lent.empty((images, *self.shape[1:]), self.dtype)
        if any(span.source.stream.width < self.shape[-1] for span in self._spans):
            out.fill(0)  # beside the narrow ones
        return out

    def _fetch_block(self, span: Span, number: int) -> None:
        shards = span.source.stream.shard_blocks
        self._shard(span.source, number // shards).fetch(number % shards, span)

    def _shard(self, source: Source, number: int) -> Shard:
        key = (source.folder, number)
        with self._lock:
            shard = self._shards.get(key)
            if shard is not None:
                self._shards.move_to_end(key)
                return shard
        shard = Shard(source, number, self._file(source, number), [s for s in self._spans if s.source is source])
        with self._lock:
            shard = self._shards.setdefault(key, shard)
            while len(self._shards) > self._most:
                self._shards.popitem(last=False)  # its map goes with the last view of it
        return shard

    def _file(self, source: Source, number: int) -> int:
        path = source.path(number)
        try:
            return os.open(source.file(number), os.O_RDONLY, dir_fd=self._folders[source.folder])
        except FileNotFoundError as err:
            raise NotCached(gone(path)) from err
        except OSError as err:
            raise CacheUnusable(f"{path} cannot be read ({err.strerror}); look at its permissions") from err

    def close(self) -> None:
        """Let go of the files; the reader must not be used after."""
        self._shards.clear()
        while self._folders:
            os.close(self._folders.popitem()[1])
        for pin in self._pins:
            pin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "_folders" in vars(self):
            try:  # noqa: SIM105 - when the interpreter ends, `suppress` may be gone before it, and what `close` calls too
                self.close()
            except Exception:  # noqa: BLE001
                pass

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to open the same shards for itself."""
        return {name: value for name, value in vars(self).items() if name not in self._OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()


def _runs(blocks: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """For each block that occurs: its number, and where."""
    order = np.argsort(blocks, kind="stable")
    numbers, starts = np.unique(blocks[order], return_index=True)
    if not len(numbers):
        return []
    return list(zip(numbers.tolist(), np.split(order, starts[1:]), strict=True))


def stored(source: Source, rows: range) -> np.ndarray:
    """Rows of one shard as they are kept, [rows, layers, kinds x tokens, columns]; every chunk is checked.

    Raises:
        CacheUnusable: a chunk is damaged.
    """
    stream = source.stream
    number = rows.start // stream.shard_rows
    path = source.path(number)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as err:
        raise CacheUnusable(f"{path} cannot be read ({err.strerror}); run `mlfusion cache verify`") from err
    shard = Shard(source, number, descriptor)
    out = np.empty((len(rows), len(stream.layers), len(stream.kinds)), f"V{stream.row_bytes}")
    first = rows.start - stream.rows(number).start
    for block in range(first // stream.chunk_rows, -(-(first + len(rows)) // stream.chunk_rows)):
        start = block * stream.chunk_rows
        at = max(start - first, 0)
        for layer, kind in np.ndindex(out.shape[1:]):
            some = shard.chunk(block, layer, kind)[max(first - start, 0) : first + len(rows) - start]
            out[at : at + len(some), layer, kind] = some
    return out.view(stream.encoding.stored).reshape(len(rows), *stream.shape[1:])


def gone(path: Path) -> str:
    """The words of the error of what a prune took away."""
    return f"{path} was removed while it was in use; run the same `mlfusion extract` again"


def damaged(path: Path, why: str) -> CacheUnusable:
    """The error of a file that is not what the manifest says."""
    return CacheUnusable(
        f"{path} is damaged: {why}; run `mlfusion cache verify --repair`, then the same `mlfusion extract` again"
    )
