"""Reads tokens out of shards: all of them, a layer, a kind, random rows, or rows in a shuffled order, and nothing else.

A chunk holds one layer and one kind of a run of images, so what was not asked for stays on the disk. Where much of a
shard is wanted, chunk after chunk is read into a core's cache, compared there with its checksum, and put where it
belongs: it travels from memory once. Images here and there come from shards that are mapped and stay so; there a chunk is
compared when it is first touched. A reader works in threads, and after fork or spawn: each process opens the files for
itself.
"""

import errno
import math
import mmap
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from mlfusion.errors import CacheUnusable, NotCached
from mlfusion.store.claims import Pin
from mlfusion.store.formats import FORMATS, checksum
from mlfusion.store.manifest import Manifest
from mlfusion.store.stream import Stream

Check = Literal["once", "always", "never"]

OPEN_SHARDS = 256  # mapped at once; each takes one of the process's file descriptors, of which it leaves three quarters
MIXED = 1 << 28  # bytes of images that are shuffled together, of at least
FEWEST = 4  # blocks
THREADS = min(4, os.cpu_count() or 1)
PIECE = 1 << 20  # bytes, as decoded
SMALL = 1 << 24  # bytes below which threads are not worth starting


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

    @cached_property
    def planes(self) -> "list[Span]":
        """Plane by plane."""
        tokens = self.source.stream.tokens
        first, start = self.into_layers.start, self.into_tokens.start
        return [
            Span(
                self.source,
                slice(first + i, first + i + 1),
                slice(start + j * tokens, start + (j + 1) * tokens),
                self.layers[i : i + 1],
                self.kinds[j : j + 1],
            )
            for i in range(len(self.layers))
            for j in range(len(self.kinds))
        ]

    def of(self, out: np.ndarray, stream: Stream) -> np.ndarray:
        """Its part of a result [rows, layers, tokens, width or more], as [rows, layers, kinds, tokens, width]."""
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


class Chunks:
    """Where the chunks of one shard lie in its file, and what their checksums are."""

    def __init__(self, source: Source, shard: int, descriptor: int) -> None:
        self._source, self._shard, self._stream = source, shard, source.stream
        self._rows = len(source.stream.rows(shard))
        self.blocks = -(-self._rows // source.stream.chunk_rows)
        first = shard * source.stream.shard_blocks
        self._offsets = source.manifest.offsets[first : first + self.blocks].astype(np.int64)
        self._checksums = source.manifest.checksums[first : first + self.blocks]
        self._row_bytes = self._stream.tokens * self._stream.columns * self._stream.encoding.stored.itemsize
        self._size = source.manifest.sizes[shard]
        if os.fstat(descriptor).st_size != self._size:
            raise self._damaged("its size is not the manifest's")

    def _damaged(self, why: str) -> CacheUnusable:
        return damaged(self._source.path(self._shard), why)

    def rows(self, block: int) -> int:
        """Images in a block."""
        return min(self._stream.chunk_rows, self._rows - block * self._stream.chunk_rows)

    def _bytes(self, block: int) -> int:
        return self.rows(block) * self._row_bytes

    def _compare(self, data: np.ndarray, block: int, layer: int, kind: int) -> None:
        """Refuse a chunk whose bytes are not those that were written."""
        if checksum(data) != self._checksums[block, layer, kind]:
            raise self._damaged(f"the checksum of chunk {block}, layer {self._stream.layers[layer]} is wrong")

    def _ranges(self, starts: np.ndarray, size: int) -> list[tuple[int, int]]:
        """First byte and length of what chunks of `size` bytes take of the file; a gap of less than a page is none."""
        starts = np.sort(starts, axis=None)
        breaks = np.flatnonzero(np.diff(starts) > size + mmap.PAGESIZE) + 1
        return [(int(run[0]), int(run[-1]) + size - int(run[0])) for run in np.split(starts, breaks)]


class ShardFile(Chunks):
    """Read into memory of one's own, chunk by chunk: for much of a shard at once."""

    def __init__(self, source: Source, shard: int, descriptor: int) -> None:
        super().__init__(source, shard, descriptor)
        self._descriptor = descriptor

    def chunk(self, block: int, layer: int, kind: int, check: bool) -> np.ndarray:
        """[rows, tokens, columns] as stored. Gone with the next read.

        Raises:
            CacheUnusable: a checksum is wrong, or the file ends before its time.
        """
        first, size = int(self._offsets[block, layer, kind]), self._bytes(block)
        data = _buffer(size)
        got = os.preadv(self._descriptor, [data.data], first)
        while got < size:
            more = os.preadv(self._descriptor, [data[got:].data], first + got)
            if more == 0:
                raise self._damaged("it ends before its time")
            got += more
        if check:
            self._compare(data, block, layer, kind)
        return data.view(self._stream.encoding.stored).reshape(-1, self._stream.tokens, self._stream.columns)

    def fetch(self, span: Span, blocks: slice = slice(None)) -> None:
        """Ask the disk for chunks that are about to be read, all at once, if the first of them is not in memory."""
        if not hasattr(os, "RWF_NOWAIT"):
            return
        starts = self._offsets[blocks, span.layers[:, None], span.kinds]
        try:
            os.preadv(self._descriptor, [bytearray(1)], int(starts.flat[0]), os.RWF_NOWAIT)
        except OSError:  # not there, or of a file system that cannot tell
            for first, length in self._ranges(starts, self._bytes(0)):
                os.posix_fadvise(self._descriptor, first, length, os.POSIX_FADV_WILLNEED)


class ShardMap(Chunks):
    """Mapped into memory: for some images of a shard, again and again."""

    def __init__(self, source: Source, shard: int, descriptor: int, wanted: Sequence[Span]) -> None:
        super().__init__(source, shard, descriptor)
        self._cold = self._absent(descriptor, wanted)
        self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self._data = np.frombuffer(self._map, np.uint8)
        self._lock = threading.Lock()
        self._compared = np.zeros(self._offsets.shape, bool)
        self._known: dict[tuple[int, Span], list[tuple[Span, np.ndarray]]] = {}

    def views(self, block: int, span: Span, check: Check) -> list[tuple[Span, np.ndarray]]:
        """A block of a span, as stored, without a copy: [rows, layers, kinds, tokens, columns], or plane by plane.

        Raises:
            CacheUnusable: a checksum is wrong.
        """
        known = self._known.get((block, span))
        if known is not None and check != "always":
            return known
        with self._lock:  # what one thread compares, another need not
            for layer, kind in span.pairs:
                if check == "always" or (check == "once" and not self._compared[block, layer, kind]):
                    start = int(self._offsets[block, layer, kind])
                    self._compare(self._data[start : start + self._bytes(block)], block, layer, kind)
                    self._compared[block, layer, kind] = True
        whole = self._view(block, span)
        if whole is not None:
            return self._known.setdefault((block, span), [(span, whole)])
        planes = ((plane, self._view(block, plane)) for plane in span.planes)
        # Of one plane there always is a view.
        return self._known.setdefault((block, span), [(plane, view) for plane, view in planes if view is not None])

    def _view(self, block: int, span: Span) -> np.ndarray | None:
        """[rows, layers, kinds, tokens, columns] as stored, without a copy, if the chunks lie at even distances."""
        places = self._offsets[block, span.layers[:, None], span.kinds].tolist()
        first = places[0][0]
        step = places[1][0] - first if len(places) > 1 else 0
        stride = places[0][1] - first if len(places[0]) > 1 else 0
        if any(start != first + i * step + j * stride for i, row in enumerate(places) for j, start in enumerate(row)):
            return None
        stored = self._stream.encoding.stored
        token = self._stream.columns * stored.itemsize
        return np.ndarray(
            (self.rows(block), len(places), len(places[0]), self._stream.tokens, self._stream.columns),
            stored,
            self._data.data,
            first,
            (self._row_bytes, step, stride, token, stored.itemsize),
        )

    def _absent(self, descriptor: int, wanted: Sequence[Span]) -> np.ndarray:
        """Chunks that are not in memory already, by their last byte: to ask for those that are costs as much as a copy."""
        absent = np.zeros(self._offsets.shape, bool)
        if hasattr(mmap, "MADV_WILLNEED"):
            for span in wanted:
                absent[np.ix_(np.arange(self.blocks), span.layers, span.kinds)] = True
        if hasattr(os, "RWF_NOWAIT"):
            byte = [bytearray(1)]
            with suppress(OSError):  # of a file system that cannot tell: all are asked for
                for chunk in np.flatnonzero(absent).tolist():
                    with suppress(BlockingIOError):
                        end = int(self._offsets.flat[chunk]) + self._row_bytes
                        absent.flat[chunk] = not os.preadv(descriptor, byte, end - 1, os.RWF_NOWAIT)
        return absent

    def fetch(self, block: int, span: Span) -> None:
        """Ask the disk for chunks that are about to be read: page by page, on first use, they would come ten times slower."""
        if not self._cold.any():
            return
        planes = np.ix_(np.array([block]), span.layers, span.kinds)
        starts = self._offsets[planes][self._cold[planes]]
        if not len(starts):
            return
        self._cold[planes] = False
        for first, length in self._ranges(starts, self._bytes(block)):
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, first + length - page)


_buffers = threading.local()


def _buffer(size: int) -> np.ndarray:
    """[size] uint8, the same memory for every call of a thread."""
    if len(getattr(_buffers, "one", ())) < size:
        _buffers.one = np.empty(size, np.uint8)
    found: np.ndarray = _buffers.one[:size]
    return found


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
        self._shards: OrderedDict[tuple[Path, int], ShardMap] = OrderedDict()
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
        out, check = self._empty(self._images), self._check != "never"
        jobs = [(span, shard) for span in self._spans for shard in range(span.source.stream.shards)]

        def copy(job: int) -> None:
            span, number = jobs[job]
            stream = span.source.stream
            with self._file(span.source, number) as descriptor:
                file = ShardFile(span.source, number, descriptor)
                file.fetch(span)
                for block in range(file.blocks):
                    first = number * stream.shard_rows + block * stream.chunk_rows
                    rows = out[first : first + file.rows(block)]
                    for plane, (layer, kind) in zip(span.planes, span.pairs, strict=True):
                        _put(
                            plane.of(rows, stream),
                            ALL,
                            stream,
                            file.chunk(block, layer, kind, check)[:, None, None],
                            ALL,
                        )

        def copy_some(some: np.ndarray) -> None:
            for job in some.tolist():
                copy(job)

        # A thread takes neighbours: two that write to one page of the result wait for each other.
        threads = 1 if out.nbytes < SMALL else THREADS
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(copy_some, np.array_split(np.arange(len(jobs)), threads)))
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
        if self._dense(images):
            self._scatter(wanted, [out])
            return out
        for pin in self._pins:
            pin.renew()
        jobs = [(span, *run) for span in self._spans for run in _runs(images // span.source.stream.chunk_rows)]
        for span, number, _ in jobs:
            self._fetch_block(span, number)

        def gather(job: tuple[Span, int, np.ndarray]) -> None:
            span, number, where = job
            stream = span.source.stream
            shard = self._shard(span.source, number // stream.shard_blocks)
            inside = images[where] % stream.chunk_rows
            for part, view in shard.views(number % stream.shard_blocks, span, self._check):
                _put(part.of(out, stream), where, stream, view, inside)

        if out.nbytes < SMALL:
            for job in jobs:
                gather(job)
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(gather, jobs))
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
        ends, bounds = np.cumsum(sizes), np.cumsum([0, *map(len, groups)]).tolist()
        begun: deque[tuple[int, np.ndarray]] = deque([(0, self._empty(0))])  # memory, and which image is its first
        reach = 0  # images that there is memory for: up to the end of a batch, which a later group may complete

        def begin(group: int) -> Future[None]:
            nonlocal reach
            first, end = bounds[group : group + 2]
            start, memory = begun[-1]
            into = [memory[first - start : end - start]]
            if reach < end:
                start, reach = reach, int(ends[np.searchsorted(ends, end)])
                begun.append((start, self._empty(reach - start)))
                into.append(begun[-1][1][: end - start])
            return ahead.submit(self._scatter, groups[group], into)

        batches = deque(pairwise([0, *ends.tolist()]))
        with ThreadPoolExecutor(1) as ahead:
            waiting = begin(0) if groups else None
            for group in range(len(groups)):
                assert waiting is not None
                waiting.result()
                waiting = begin(group + 1) if group + 1 < len(groups) else None
                while batches and batches[0][1] <= bounds[group + 1]:
                    first, end = batches.popleft()
                    while len(begun) > 1 and begun[1][0] <= first:
                        begun.popleft()
                    start, memory = begun[0]
                    yield order[first:end], memory[first - start : end - start]

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

    def _scatter(self, rows: np.ndarray, into: Sequence[np.ndarray]) -> None:
        """Tokens of `rows`, chunk after chunk, to one array behind the other; each is read and compared once."""
        images = rows if self._rows is None else self._rows[rows]
        ends = np.cumsum([len(part) for part in into])
        for pin in self._pins:
            pin.renew()
        jobs = [(span, *run) for span in self._spans for run in _runs(images // span.source.stream.chunk_rows)]

        def scatter(job: tuple[Span, int, np.ndarray]) -> None:
            span, number, where = job
            stream = span.source.stream
            shard, block = divmod(number, stream.shard_blocks)
            with self._file(span.source, shard) as descriptor:
                file = ShardFile(span.source, shard, descriptor)
                file.fetch(span, slice(block, block + 1))
                parts: list[tuple[np.ndarray, np.ndarray, np.ndarray | slice]] = []
                for part, end, (a, b) in zip(into, ends, pairwise([0, *np.searchsorted(where, ends)]), strict=True):
                    there, inside = where[a:b] - (end - len(part)), images[where[a:b]] % stream.chunk_rows
                    sort = np.argsort(inside)
                    if np.array_equal(inside[sort], np.arange(file.rows(block))):
                        parts.append((part, there[sort], ALL))  # all, in the order of the disk: nothing is picked
                    else:
                        parts.append((part, there, inside))
                for plane, (layer, kind) in zip(span.planes, span.pairs, strict=True):
                    chunk = file.chunk(block, layer, kind, self._check != "never")
                    for part, there, inside in parts:
                        _put(plane.of(part, stream), there, stream, chunk[:, None, None], inside)

        if sum(part.nbytes for part in into) < SMALL:
            for job in jobs:
                scatter(job)
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(scatter, jobs))

    def _dense(self, images: np.ndarray) -> bool:
        """Whether most of the chunks that these images are in would be read: then they are, rather than mapped."""
        blocks = [(len(np.unique(images // rows)), rows) for rows in {s.source.stream.chunk_rows for s in self._spans}]
        return all(len(images) >= count * rows / 2 for count, rows in blocks)

    def _empty(self, images: int) -> np.ndarray:
        _, layers, tokens, width = self.shape
        narrow = any(span.source.stream.width < width for span in self._spans)
        return (np.zeros if narrow else np.empty)((images, layers, tokens, width), self.dtype)

    def _fetch_block(self, span: Span, number: int) -> None:
        shards = span.source.stream.shard_blocks
        self._shard(span.source, number // shards).fetch(number % shards, span)

    def _shard(self, source: Source, number: int) -> ShardMap:
        key = (source.folder, number)
        with self._lock:
            shard = self._shards.get(key)
            if shard is not None:
                self._shards.move_to_end(key)
                return shard
        with self._file(source, number) as descriptor:
            shard = self._mapped(source, number, descriptor)
        with self._lock:
            shard = self._shards.setdefault(key, shard)
            while len(self._shards) > self._most:
                self._shards.popitem(last=False)  # its map goes with the last view of it
        return shard

    def _mapped(self, source: Source, number: int, descriptor: int) -> ShardMap:
        wanted = [span for span in self._spans if span.source is source]
        for last in (False, True):
            try:
                return ShardMap(source, number, descriptor, wanted)
            except OSError as err:
                if err.errno != errno.ENOMEM:
                    raise
                if last:
                    raise MemoryError(
                        f"there is no room in the process's memory to map {source.path(number)}; free some, or raise its "
                        "limits (ulimit -v; vm.max_map_count)"
                    ) from err
            with self._lock:
                self._shards.clear()  # the maps that nobody looks into go, and make room
        raise AssertionError

    @contextmanager
    def _file(self, source: Source, number: int) -> Iterator[int]:
        path = source.path(number)
        try:
            descriptor = os.open(source.file(number), os.O_RDONLY, dir_fd=self._folders[source.folder])
        except FileNotFoundError as err:
            raise NotCached(gone(path)) from err
        except OSError as err:
            raise CacheUnusable(f"{path} cannot be read ({err.strerror}); look at its permissions") from err
        try:
            yield descriptor
        finally:
            os.close(descriptor)

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


ALL = slice(None)


def _put(
    into: np.ndarray, where: np.ndarray | slice, stream: Stream, kept: np.ndarray, inside: np.ndarray | slice
) -> None:
    """into[where] = what `kept[inside]` stands for; both [images, layers, kinds, tokens, channels].

    By pieces that stay in a core's cache on the way, where there is something on the way.
    """
    if stream.encoding.plain:
        there, here = _whole(into), _whole(kept)
        if there is not None and here is not None:
            into, kept = there, here
        if isinstance(inside, slice):
            into[where] = kept[inside]
            return
    images = len(kept) if isinstance(inside, slice) else len(inside)
    step = max(1, PIECE // max(1, math.prod(into.shape[1:]) * into.itemsize))
    for start in range(0, images, step):
        some = slice(start, start + step)
        picked = kept[some] if isinstance(inside, slice) else kept[inside[some]]
        into[some if isinstance(where, slice) else where[some]] = (
            picked if stream.encoding.plain else stream.encoding.decode(picked)
        )


def _whole(tokens: np.ndarray) -> np.ndarray | None:
    """[..., tokens, channels] as [...] of one item each, which NumPy moves faster; None if they do not stand together."""
    *_, step, stride = tokens.strides
    *outer, count, channels = tokens.shape
    if stride != tokens.itemsize or (count > 1 and step != channels * stride):
        return None
    items: np.ndarray = tokens.reshape(*outer, count * channels).view(f"V{count * channels * stride}")[..., 0]
    return items


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
    out = np.empty((len(rows), *stream.shape[1:]), stream.encoding.stored)
    split = out.reshape(len(rows), len(stream.layers), len(stream.kinds), stream.tokens, stream.columns)
    try:
        shard = ShardFile(source, number, descriptor)
        first = rows.start - stream.rows(number).start
        for block in range(first // stream.chunk_rows, -(-(first + len(rows)) // stream.chunk_rows)):
            start = block * stream.chunk_rows
            at = max(start - first, 0)
            for layer, kind in np.ndindex(split.shape[1:3]):
                chunk = shard.chunk(block, layer, kind, check=True)
                some = chunk[max(first - start, 0) : first + len(rows) - start]
                split[at : at + len(some), layer, kind] = some
    finally:
        os.close(descriptor)
    return out


def gone(path: Path) -> str:
    """The words of the error of what a prune took away."""
    return f"{path} was removed while it was in use; run the same `mlfusion extract` again"


def damaged(path: Path, why: str) -> CacheUnusable:
    """The error of a file that is not what the manifest says."""
    return CacheUnusable(
        f"{path} is damaged: {why}; run `mlfusion cache verify --repair`, then the same `mlfusion extract` again"
    )
