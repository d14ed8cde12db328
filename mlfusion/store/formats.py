"""Writes shards in two file formats, Zarr v3 and HDF5; the reader is the same for both.

Both store chunks uncompressed, and a writer records the offset of each. So the reader reads chunks of both by offset, at the
speed of a memory map, and compares one checksum, xxh3, which is several times faster than crc32c; other programs use the
format's own checksum. zarr-python and h5py read the same files, a few times slower.
"""

import io
import json
import math
import os
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Protocol

import crc32c
import h5py
import numpy as np
import xxhash

from mlfusion.specs.options import FormatName
from mlfusion.store.stream import CHUNK, Stream

CRC_BYTES = 4
ABSENT = np.uint64(2**64 - 1)  # Zarr's mark for a chunk that a shard does not hold


Create = Callable[[], io.FileIO]
"""Creates the shard's file, open for writing."""


@dataclass(frozen=True, eq=False)
class WrittenShard:
    """A finished shard file."""

    size: int  # bytes
    digest: str  # xxh3-128 of the file
    chunks: np.ndarray  # [blocks, layers, kinds] of CHUNK


class ShardWriter(Protocol):
    """A file format: writes one shard, row after row, into one file."""

    file: ClassVar[str]  # the shard's file in its folder c/<shard>

    @staticmethod
    def describe(stream: Stream) -> dict[str, str]:
        """Name → text of the files that let other programs open the stream's folder; none by default."""
        return {}

    def __init__(self, create: Create, stream: Stream, shard: int) -> None:
        """Begin a new file, which `create` opens."""

    def append(self, stored: np.ndarray) -> None:
        """Add the next rows of the shard, [rows, layers, kinds x tokens, columns]."""

    def close(self) -> WrittenShard:
        """Write what is buffered and flush it to the disk."""

    def abandon(self) -> None:
        """Close the file, finished or not; the caller removes it."""


class ZarrWriter(ShardWriter):
    """One Zarr v3 array per stream: sharding_indexed, chunks uncompressed, a crc32c after each and after the index.

    Appends block after block without seeking: one block of rows is filled while the previous one is written.
    """

    file = "0/0/0"
    _idle: ClassVar[deque[bytearray]] = deque(maxlen=4)  # blocks for reuse: the system clears fresh memory first

    @staticmethod
    def describe(stream: Stream) -> dict[str, str]:
        little, checked = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
        chunk = {"name": "bytes"} if stream.encoding.stored.itemsize == 1 else little  # one byte has no order
        sharding = {
            "chunk_shape": [stream.chunk_rows, 1, stream.tokens, stream.columns],
            "codecs": [chunk, checked],
            "index_codecs": [little, checked],
            "index_location": "end",
        }
        array = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(stream.shape),
            "data_type": stream.encoding.stored.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [stream.shard_rows, *stream.shape[1:]]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            # Other programs read a missing shard as NaN: users notice a loss of NaN, but not plausible zeros.
            "fill_value": stream.encoding.fill,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["image", "layer", "token", "channel"],
            "attributes": {"layers": list(stream.layers), "kinds": list(stream.kinds), "dtype": stream.dtype},
        }
        return {"zarr.json": json.dumps(array, indent=2)}

    def __init__(self, create: Create, stream: Stream, shard: int) -> None:
        self._stream = stream
        self._file = create()
        self._chunk_bytes = stream.chunk_rows * stream.row_bytes
        self._planes = len(stream.layers), len(stream.kinds)
        self._filled = 0
        self._index = np.full((stream.shard_blocks, *self._planes, 1, 2), ABSENT, "<u8")
        self._chunks = np.zeros(self._index.shape[:3], CHUNK)
        self._digest = xxhash.xxh3_128()
        self._blocks = 0
        self._executor = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._block = self._memory()

    def _memory(self) -> bytearray:
        size = math.prod(self._planes) * (self._chunk_bytes + CRC_BYTES)
        with suppress(IndexError):
            while len(memory := self._idle.popleft()) != size:
                pass
            return memory
        return bytearray(size)

    @property
    def _rows(self) -> np.ndarray:
        """View [chunk_rows, layers, kinds] of the block that is being filled; an item is one image's part of a chunk.

        The block has the layout of the file, so that one large write is enough: its pages are read faster afterwards.
        """
        size, step = self._stream.row_bytes, self._chunk_bytes + CRC_BYTES
        shape = self._stream.chunk_rows, *self._planes
        return np.ndarray(shape, f"V{size}", self._block, strides=(size, self._planes[1] * step, step))

    def append(self, stored: np.ndarray) -> None:
        block = self._rows
        rows = np.ascontiguousarray(stored).reshape(-1).view(block.dtype).reshape(-1, *block.shape[1:])
        while len(rows):
            count = min(len(rows), len(block) - self._filled)
            block[self._filled : self._filled + count] = rows[:count]
            self._filled += count
            rows = rows[count:]
            if self._filled == len(block):
                self._flush()
                block = self._rows

    def _flush(self) -> None:
        """Queue a block for writing, once the previous one is written."""
        self._wait()
        self._writing = self._executor.submit(self._write, self._block, self._filled)
        self._block = self._memory()
        self._filled = 0

    def _wait(self) -> None:
        """Wait for the queued block; if it could not be written, this and all later calls raise OSError."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def _write(self, memory: bytearray, filled: int) -> None:
        used, size = filled * self._stream.row_bytes, self._chunk_bytes
        block = np.frombuffer(memory, np.uint8)
        for start, plane in zip(range(0, len(block), size + CRC_BYTES), np.ndindex(self._planes), strict=True):
            chunk = block[start : start + size + CRC_BYTES]
            rows, whole = chunk[:used], chunk[:size]
            whole[used:] = 0  # a chunk has its full shape: rows after the last image are padding
            checksum = crc32c.crc32c(whole.data)
            chunk[size:] = np.frombuffer(checksum.to_bytes(CRC_BYTES, "little"), np.uint8)
            self._digest.update(chunk.data)
            offset = self._blocks * len(block) + start
            self._index[self._blocks, *plane, 0] = offset, len(chunk)
            row_crc = checksum if used == size else crc32c.crc32c(rows.data)
            self._chunks[self._blocks, *plane] = offset, row_crc, xxhash.xxh3_64_intdigest(rows.data)
        write_all(self._file, block.data)
        self._blocks += 1
        self._idle.append(memory)

    def close(self) -> WrittenShard:
        if self._filled:
            self._flush()
        self._wait()
        self._executor.shutdown()
        index = self._index.tobytes()
        index += crc32c.crc32c(index).to_bytes(CRC_BYTES, "little")
        self._digest.update(index)
        write_all(self._file, index)
        os.fsync(self._file.fileno())
        self._file.close()
        self._idle.append(self._block)
        size = self._blocks * math.prod(self._planes) * (self._chunk_bytes + CRC_BYTES) + len(index)
        return WrittenShard(size, self._digest.hexdigest(), self._chunks[: self._blocks])

    def abandon(self) -> None:
        self._executor.shutdown()
        self._file.close()


class Hdf5Writer(ShardWriter):
    """One HDF5 file per shard, dataset 'tokens', with the same chunks as Zarr and Fletcher-32 checksums.

    Builds the file in memory and writes it on close: HDF5's own writing crashes the process on a full disk.
    """

    file = "tokens.h5"

    def __init__(self, create: Create, stream: Stream, shard: int) -> None:
        self._create, self._stream = create, stream
        self._rows = stream.rows(shard)
        # With v110 a truncated file cannot be opened; the older layout would open with part of its rows.
        self._image = h5py.File(uuid.uuid4().hex, "w", driver="core", backing_store=False, libver="v110")
        self._data = self._image.create_dataset(
            "tokens",
            shape=(len(self._rows), *stream.shape[1:]),
            dtype=stream.encoding.stored,
            chunks=(min(stream.chunk_rows, len(self._rows)), 1, stream.tokens, stream.columns),
            fillvalue=stream.encoding.blank(),
            fletcher32=True,
        )
        self._data.attrs.update(
            layers=stream.layers, kinds=list(stream.kinds), dtype=stream.dtype, first_row=self._rows.start
        )
        self._row = 0

    def append(self, stored: np.ndarray) -> None:
        self._data[self._row : self._row + len(stored)] = stored
        self._row += len(stored)

    def close(self) -> WrittenShard:
        self._image.flush()
        image = np.frombuffer(self._image.id.get_file_image(), np.uint8)
        step, _, tokens, _ = self._data.chunks
        starts = range(0, len(self._rows), step)
        chunks = np.zeros((len(starts), len(self._stream.layers), len(self._stream.kinds)), CHUNK)
        for block, layer, kind in np.ndindex(chunks.shape):
            at = self._data.id.get_chunk_info_by_coord((starts[block], layer, kind * tokens, 0)).byte_offset
            rows = image[at : at + min(step, len(self._rows) - starts[block]) * self._stream.row_bytes]
            chunks[block, layer, kind] = at, crc32c.crc32c(rows.data), xxhash.xxh3_64_intdigest(rows.data)
        self._image.close()
        with self._create() as file:
            write_all(file, image.data)
            os.fsync(file.fileno())
        return WrittenShard(len(image), xxhash.xxh3_128_hexdigest(image.data), chunks)

    def abandon(self) -> None:
        if self._image:  # false once it is closed
            self._image.close()


FORMATS: dict[FormatName, type[ShardWriter]] = {"zarr": ZarrWriter, "hdf5": Hdf5Writer}


def write_all(file: io.FileIO, data: memoryview | bytes) -> None:
    """Write all of `data`; one raw write may write less."""
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]
