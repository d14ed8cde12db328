"""Reads the chunks of one shard's file, compares them with their checksums, and copies them into a result.

A chunk holds one layer and one kind of a run of images. If most of a block is read, each chunk is read into a core's cache,
compared and copied from there, so that memory is read only once. Single images are copied from a memory map of the shard,
after their chunks were compared.
"""

import errno
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import xxhash

from mlfusion.errors import NotCached
from mlfusion.store.formats import FORMATS
from mlfusion.store.records import damaged, removed_message, unread
from mlfusion.store.stream import Manifest, Stream
from mlfusion.system.tree import Tree

Check = Literal["once", "always", "never"]
"""When a chunk's checksum is compared: at its first read by a reader, at every read, or never."""

Index = np.ndarray | slice
T = TypeVar("T")

COPY_BYTES = 1 << 19  # bytes of one copy, so few that they stay in a core's cache
MIN_COPY_ITEMS = 512  # items of one copy: for fewer NumPy does not release the interpreter lock
MAX_COPY_BYTES = 1 << 22  # limit of a copy, even if it then has fewer than MIN_COPY_ITEMS


@dataclass(frozen=True, eq=False)
class Source:
    """A complete stream of one entry."""

    tree: Tree
    entry: str  # path of the entry below the cache's root
    stream: Stream
    manifest: Manifest

    @property
    def place(self) -> tuple[str, str]:
        """The cache's root and the path of the entry below it."""
        return self.tree.root, self.entry

    @cached_property
    def folder(self) -> str:
        """Path of the stream's folder below the cache's root."""
        return f"{self.entry}/{self.stream.folder}"

    def path(self, shard: int) -> Path:
        """Whole path of a shard's file, for messages."""
        return self.tree.path(self.file(shard))

    def file(self, shard: int) -> str:
        """Path of a shard's file below the cache's root."""
        return f"{self.folder}/{self._file(shard)}"

    def _file(self, shard: int) -> str:
        return f"c/{shard}/{FORMATS[self.stream.format].file}"

    def open(self, shard: int, held: Tree, spans: "Sequence[Span]" = ()) -> "Shard":
        """Open a shard's file; `held` is the stream's folder, and `spans` are those that will be read.

        NotCached if it is gone, CacheUnusable if its size is not the manifest's, or if it cannot be read.
        """
        try:
            descriptor = held.open(self._file(shard))
        except FileNotFoundError as err:
            raise NotCached(removed_message(self.path(shard))) from err
        except OSError as err:
            raise unread(self.path(shard), err) from err
        return Shard(self, shard, descriptor, spans)


@dataclass(frozen=True, eq=False)
class Span:
    """Planes (a layer and a kind) of one source that form one view [.., layers, kinds x tokens, ..] of the result."""

    source: Source
    out_layers: slice  # of the result
    out_tokens: slice
    layers: np.ndarray  # [l] indices in the source
    kinds: np.ndarray  # [k] indices in the source

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """(layer, kind) of every plane."""
        return [(layer, kind) for layer in self.layers.tolist() for kind in self.kinds.tolist()]

    def view(self, out: np.ndarray) -> np.ndarray:
        """This part of a result [rows, layers, tokens, width or more], as [rows, layers, kinds, tokens, width]."""
        stream = self.source.stream
        part = out[:, self.out_layers, self.out_tokens, : stream.width]
        return part.reshape(len(out), len(self.layers), len(self.kinds), stream.tokens, stream.width)


def spans(source: Source, planes: Sequence[tuple[int, int, int, int]]) -> list[Span]:
    """Join planes, each (result's layer, result's first token, source's layer, source's kind), into few spans."""
    tokens = source.stream.tokens
    # (first token, kinds) → [(result's layer, source's layer)]
    layers_of: dict[tuple[int, tuple[int, ...]], list[tuple[int, int]]] = {}
    for layer, row in groupby(planes, key=lambda plane: plane[0]):
        for run in _runs(row, lambda plane: plane[1], tokens):
            kinds = tuple(kind for *_, kind in run)
            layers_of.setdefault((run[0][1], kinds), []).append((layer, run[0][2]))
    return [
        Span(
            source,
            slice(run[0][0], run[0][0] + len(run)),
            slice(token, token + len(kinds) * tokens),
            np.array([layer for _, layer in run]),
            np.array(kinds),
        )
        for (token, kinds), layers in layers_of.items()
        for run in _runs(layers, lambda pair: pair[0], 1)
    ]


def _runs(items: Iterable[T], place: Callable[[T], int], step: int) -> Iterator[list[T]]:
    """Runs of items whose places are `step` apart."""
    for _, run in groupby(enumerate(items), key=lambda each: place(each[1]) - each[0] * step):
        yield [item for _, item in run]


class Shard:
    """An open shard: the offsets of its chunks, and which of them were compared with their checksum."""

    def __init__(self, source: Source, number: int, descriptor: int, spans: Sequence[Span] = ()) -> None:
        self._descriptor = descriptor  # closed by this object
        stream, manifest = source.stream, source.manifest
        self._stream, self._path = stream, source.path(number)
        self._rows = len(stream.rows(number))
        self.blocks = -(-self._rows // stream.chunk_rows)
        first = number * stream.shard_blocks
        blocks = slice(first, first + self.blocks)
        self._starts = manifest.table("offsets")[blocks].astype(np.int64)  # [blocks, layers, kinds]
        self._checksums = manifest.table("xxh3_64")[blocks]
        self._compared = np.zeros(self._starts.shape, bool)
        self._row_bytes, self._item = stream.row_bytes, np.dtype(f"V{stream.row_bytes}")  # an image's part of a chunk
        self._size = manifest.sizes[number]
        if os.fstat(descriptor).st_size != self._size:
            raise damaged(self._path, "its size is not the manifest's")
        self._uncached = self._find_uncached(spans)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def rows(self, block: int) -> int:
        """Number of images in a block."""
        return min(self._stream.chunk_rows, self._rows - block * self._stream.chunk_rows)

    def chunk(self, block: int, layer: int, kind: int, check: Check = "always") -> np.ndarray:
        """[rows] as stored, in a buffer that the thread's next chunk overwrites; CacheUnusable if the chunk is damaged."""
        data = _buffer(self.rows(block) * self._row_bytes)
        first, done = int(self._starts[block, layer, kind]), 0
        try:
            if not hasattr(os, "preadv"):  # elsewhere by the memory map, which several threads may read too
                data[:] = self._bytes[first : first + len(data)]
                done = len(data)
            while done < len(data):
                count = os.preadv(self._descriptor, [data[done:].data], first + done)
                if count == 0:
                    raise damaged(self._path, "it ends before its time")
                done += count
        except OSError as err:
            raise damaged(self._path, f"the disk does not give all of it ({err.strerror})") from err
        self._compare(data, block, layer, kind, check)
        return data.view(self._item)

    def _compare(self, data: np.ndarray, block: int, layer: int, kind: int, check: Check) -> None:
        if check == "always" or (check == "once" and not self._compared[block, layer, kind]):
            if xxhash.xxh3_64_intdigest(data.data) != self._checksums[block, layer, kind]:
                raise damaged(self._path, f"the checksum of chunk {block}, layer {self._stream.layers[layer]} is wrong")
            self._compared[block, layer, kind] = True  # two threads may both compare it

    @cached_property
    def _bytes(self) -> np.ndarray:
        """The file as a memory map."""
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
        """For every byte of the file, the item that would begin there."""
        return np.ndarray((self._size - self._row_bytes + 1,), self._item, self._bytes.data, strides=(1,))

    def put(self, block: int, span: Span, out: np.ndarray, targets: Index, offsets: Index, check: Check) -> None:
        """out[targets] = images number `offsets` of a block, decoded; `out` is the result [rows, layers, tokens, width].

        Many images are copied chunk by chunk; few from the memory map, after their chunks were compared. Raises as `chunk`.
        """
        part = span.view(out)
        if isinstance(offsets, slice) or 2 * len(offsets) > self.rows(block):
            for plane, pair in zip(np.ndindex(part.shape[1:3]), span.pairs, strict=True):
                _put(part[:, *plane], targets, self.chunk(block, *pair, check), offsets, self._stream)
            return
        planes = span.layers[:, None], span.kinds
        if check == "always" or (check == "once" and not self._compared[block, *planes].all()):
            for pair in span.pairs:
                first = int(self._starts[block, *pair])
                mapped = self._bytes[first : first + self.rows(block) * self._row_bytes]
                self._compare(mapped, block, *pair, check)
        starts = self._starts[block, *planes] + (offsets * self._row_bytes)[:, None, None]
        _put(part, targets, self._items, starts, self._stream)

    def _find_uncached(self, spans: Sequence[Span]) -> np.ndarray:
        """Whether each chunk's last byte is not in the page cache: to prefetch a cached chunk costs as much as a copy."""
        uncached = np.zeros(self._starts.shape, bool)
        if hasattr(os, "posix_fadvise"):
            for span in spans:
                uncached[:, span.layers[:, None], span.kinds] = True
        if hasattr(os, "RWF_NOWAIT"):
            byte = [bytearray(1)]
            for chunk in np.flatnonzero(uncached).tolist():
                last = int(self._starts.flat[chunk]) + self._row_bytes - 1
                try:
                    os.preadv(self._descriptor, byte, last, os.RWF_NOWAIT)
                except BlockingIOError:
                    continue
                except OSError:  # the file system does not support this: all are prefetched
                    break
                uncached.flat[chunk] = False
        return uncached

    def fetch(self, block: int, span: Span) -> None:
        """Prefetch the chunks of a block that are about to be read, and not in the page cache."""
        planes = block, span.layers[:, None], span.kinds
        if not self._uncached[planes].any():
            return
        starts = np.sort(self._starts[planes][self._uncached[planes]])
        self._uncached[planes] = False
        size = self.rows(block) * self._row_bytes
        breaks = np.flatnonzero(np.diff(starts) > size + mmap.PAGESIZE) + 1  # smaller gaps are prefetched too
        for run in np.split(starts, breaks):
            os.posix_fadvise(self._descriptor, int(run[0]), int(run[-1]) + size - int(run[0]), os.POSIX_FADV_WILLNEED)


_buffers = threading.local()


def _buffer(size: int) -> np.ndarray:
    """[size] uint8; every call of a thread returns the same memory."""
    if len(getattr(_buffers, "memory", ())) < size:
        _buffers.memory = np.empty(size, np.uint8)
    buffer: np.ndarray = _buffers.memory[:size]
    return buffer


def _put(out: np.ndarray, targets: Index, items: np.ndarray, sources: Index, stream: Stream) -> None:
    """out[targets] = the decoded `items[sources]`: [.., tokens, width] from [.., tokens, columns] as stored."""
    # Numbers that need no decoding are copied as whole items.
    out_items = _as_items(out) if stream.encoding.stored == stream.encoding.numbers else None
    if out_items is not None and isinstance(sources, slice):
        out_items[targets] = items[sources]
        return
    size = max(1, math.prod(out.shape[1:]) * out.itemsize)
    items_per_row = max(1, math.prod(out.shape[1:-2]))
    step = max(1, COPY_BYTES // size, min(-(-MIN_COPY_ITEMS // items_per_row), MAX_COPY_BYTES // size))
    for start in range(0, len(items) if isinstance(sources, slice) else len(sources), step):
        rows = slice(start, start + step)
        part = items[rows] if isinstance(sources, slice) else items[sources[rows]]
        destination = rows if isinstance(targets, slice) else targets[rows]
        if out_items is not None:
            out_items[destination] = part
        else:
            stored = part.view(stream.encoding.stored).reshape(*part.shape, stream.tokens, stream.columns)
            out[destination] = stream.encoding.decode(stored)


def _as_items(tokens: np.ndarray) -> np.ndarray | None:
    """View [.., tokens, channels] as [..] of one item each, which NumPy copies faster; None if not contiguous."""
    *_, step, stride = tokens.strides
    *outer, count, channels = tokens.shape
    if stride != tokens.itemsize or (count > 1 and step != channels * stride):
        return None
    items: np.ndarray = tokens.reshape(*outer, count * channels).view(f"V{count * channels * stride}")[..., 0]
    return items


def read_stored(source: Source, rows: range) -> np.ndarray:
    """Rows of one block as stored, [rows, layers, kinds x tokens, columns]; CacheUnusable if a chunk is damaged."""
    stream = source.stream
    number = rows.start // stream.shard_rows
    with source.tree.hold(source.folder) as held:
        shard = source.open(number, held)
    out = np.empty((len(rows), len(stream.layers), len(stream.kinds)), f"V{stream.row_bytes}")
    block, first = divmod(rows.start - stream.rows(number).start, stream.chunk_rows)
    for layer, kind in np.ndindex(out.shape[1:]):
        out[:, layer, kind] = shard.chunk(block, layer, kind)[first : first + len(rows)]
    return out.view(stream.encoding.stored).reshape(len(rows), *stream.shape[1:])
