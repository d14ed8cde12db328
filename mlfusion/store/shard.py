"""One shard's file: where its chunks lie, how they are read and compared with their checksums, and where they go.

A chunk holds one layer and one kind of a run of images. Where much of a block is wanted, chunk after chunk is read into a
core's cache, compared there with its checksum, and put where it belongs: it travels from memory once. Single images come
from a memory map of the shard, once their chunks were compared.
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

from mlfusion.errors import CacheUnusable
from mlfusion.store.formats import FORMATS
from mlfusion.store.records import damaged
from mlfusion.store.stream import Manifest, Stream

Check = Literal["once", "always", "never"]
"""When a chunk's checksum is compared: at its first reading, at every reading, or never."""

Index = np.ndarray | slice
T = TypeVar("T")

COPY_BYTES = 1 << 19  # copied at a time: they stay in a core's cache on the way,
MIN_COPY_ITEMS = 512  # but no fewer items than these: below, NumPy does not let another thread work meanwhile,
MAX_COPY_BYTES = 1 << 22  # and no more bytes than these


@dataclass(frozen=True, eq=False)
class Source:
    """A complete stream of one entry, as a reader needs it."""

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
    """Planes that are neighbours in the result: [.., layers, kinds x tokens, ..] is one view of it."""

    source: Source
    into_layers: slice  # of the result
    into_tokens: slice
    layers: np.ndarray  # [l] of the source, one for each of the result's
    kinds: np.ndarray  # [k]

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """(layer, kind), plane by plane."""
        return [(layer, kind) for layer in self.layers.tolist() for kind in self.kinds.tolist()]

    def view(self, out: np.ndarray) -> np.ndarray:
        """Its part of a result [rows, layers, tokens, width or more], as [rows, layers, kinds, tokens, width]."""
        stream = self.source.stream
        part = out[:, self.into_layers, self.into_tokens, : stream.width]
        return part.reshape(len(out), len(self.layers), len(self.kinds), stream.tokens, stream.width)


def spans(source: Source, planes: Sequence[tuple[int, int, int, int]]) -> list[Span]:
    """Join planes, each (result's layer, result's first token, source's layer, source's kind), into few spans."""
    tokens = source.stream.tokens
    layers_of: dict[
        tuple[int, tuple[int, ...]], list[tuple[int, int]]
    ] = {}  # first token, kinds → (result's, own) layers
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
    """An open shard: where its chunks lie, and which of them were compared with their checksum."""

    def __init__(self, source: Source, number: int, descriptor: int, wanted: Sequence[Span] = ()) -> None:
        self._descriptor = descriptor  # ours from here on
        stream, manifest = source.stream, source.manifest
        self._stream, self._path = stream, source.path(number)
        self._rows = len(stream.rows(number))
        self.blocks = -(-self._rows // stream.chunk_rows)
        first = number * stream.shard_blocks
        mine = slice(first, first + self.blocks)
        self._starts = manifest.offsets[mine].astype(np.int64)  # [blocks, layers, kinds]
        self._checksums = manifest.xxh3[mine]
        self._compared = np.zeros(self._starts.shape, bool)
        self._row_bytes, self._item = stream.row_bytes, np.dtype(f"V{stream.row_bytes}")  # an image's part of a chunk
        self._size = manifest.sizes[number]
        if os.fstat(descriptor).st_size != self._size:
            raise damaged(self._path, "its size is not the manifest's")
        self._cold = self._absent(wanted)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def rows(self, block: int) -> int:
        """Number of images in a block."""
        return min(self._stream.chunk_rows, self._rows - block * self._stream.chunk_rows)

    def chunk(self, block: int, layer: int, kind: int, check: Check = "always") -> np.ndarray:
        """[rows] as stored, one item per image, in memory of the thread that is overwritten by its next chunk.

        Raises:
            CacheUnusable: the checksum is wrong, or the disk does not give all of it.
        """
        data = _buffer(self.rows(block) * self._row_bytes)
        first, got = int(self._starts[block, layer, kind]), 0
        try:
            while got < len(data):
                more = os.preadv(self._descriptor, [data[got:].data], first + got)
                if more == 0:
                    raise damaged(self._path, "it ends before its time")
                got += more
        except OSError as err:
            raise damaged(self._path, f"the disk does not give all of it ({err.strerror})") from err
        self._compare(data, block, layer, kind, check)
        return data.view(self._item)

    def _compare(self, data: np.ndarray, block: int, layer: int, kind: int, check: Check) -> None:
        if check == "always" or (check == "once" and not self._compared[block, layer, kind]):
            if xxhash.xxh3_64_intdigest(data.data) != self._checksums[block, layer, kind]:
                raise damaged(self._path, f"the checksum of chunk {block}, layer {self._stream.layers[layer]} is wrong")
            self._compared[block, layer, kind] = True  # of two threads at once each compares for itself

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
        """At every byte of the file the item that would begin there."""
        return np.ndarray((self._size - self._row_bytes + 1,), self._item, self._bytes.data, strides=(1,))

    def put(self, block: int, span: Span, out: np.ndarray, where: Index, inside: Index, check: Check) -> None:
        """out[where] = images `inside` of a block, decoded; out is [.., layers, tokens, width] of the whole result.

        Many images come with their chunks, read and compared one after another; few from the map, once their chunks are
        compared. Errors are those of `chunk`.
        """
        part = span.view(out)
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
        """Which chunks are not in the page cache, by their last byte: prefetching one that is costs as much as a copy."""
        absent = np.zeros(self._starts.shape, bool)
        if hasattr(os, "posix_fadvise"):
            for span in wanted:
                absent[np.ix_(np.arange(self.blocks), span.layers, span.kinds)] = True
        if hasattr(os, "RWF_NOWAIT"):
            byte = [bytearray(1)]
            for chunk in np.flatnonzero(absent).tolist():
                last = int(self._starts.flat[chunk]) + self._row_bytes - 1
                try:
                    os.preadv(self._descriptor, byte, last, os.RWF_NOWAIT)
                except BlockingIOError:
                    continue
                except OSError:  # of a file system that cannot tell: all are asked for
                    break
                absent.flat[chunk] = False
        return absent

    def fetch(self, block: int, span: Span) -> None:
        """Prefetch chunks that are about to be read, all at once."""
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
    """[size] uint8; every call of a thread returns the same memory."""
    if len(getattr(_buffers, "one", ())) < size:
        _buffers.one = np.empty(size, np.uint8)
    found: np.ndarray = _buffers.one[:size]
    return found


def _put(into: np.ndarray, where: Index, items: np.ndarray, places: Index, stream: Stream) -> None:
    """into[where] = the decoded `items[places]`: [.., tokens, width] from [.., tokens, columns] as stored."""
    whole = _whole(into) if stream.encoding.plain else None
    if whole is not None and isinstance(places, slice):
        whole[where] = items[places]
        return
    size = max(1, math.prod(into.shape[1:]) * into.itemsize)
    items_each = max(1, math.prod(into.shape[1:-2]))
    step = max(1, COPY_BYTES // size, min(-(-MIN_COPY_ITEMS // items_each), MAX_COPY_BYTES // size))
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
    """View [.., tokens, channels] as [..] of one item each, which NumPy copies faster; None if they are not contiguous."""
    *_, step, stride = tokens.strides
    *outer, count, channels = tokens.shape
    if stride != tokens.itemsize or (count > 1 and step != channels * stride):
        return None
    items: np.ndarray = tokens.reshape(*outer, count * channels).view(f"V{count * channels * stride}")[..., 0]
    return items


def read_stored(source: Source, rows: range) -> np.ndarray:
    """Rows of one block as stored, [rows, layers, kinds x tokens, columns]; every chunk is checked.

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
    block, first = divmod(rows.start - stream.rows(number).start, stream.chunk_rows)
    for layer, kind in np.ndindex(out.shape[1:]):
        out[:, layer, kind] = shard.chunk(block, layer, kind)[first : first + len(rows)]
    return out.view(stream.encoding.stored).reshape(len(rows), *stream.shape[1:])
