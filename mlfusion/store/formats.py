"""Two ways to lay a shard on disk: Zarr v3 and HDF5. Written here, read by one reader.

A writer records where in its file each chunk's bytes begin, and both formats keep them uncompressed. So shards of either are
read by offset, at the speed of a memory map, and our reader compares the same checksum, xxh3, which is several times faster
than crc32c; each format's own checksum serves other readers. zarr-python and h5py read the same files, a few times slower.
"""

import io
import json
import math
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import crc32c
import h5py
import numpy as np
import xxhash

from mlfusion.specs.options import FormatName
from mlfusion.store.stream import Stream

CRC_BYTES = 4
ABSENT = np.uint64(2**64 - 1)  # Zarr's mark for a chunk that a shard does not hold


@dataclass(frozen=True, eq=False)
class WrittenShard:
    """A finished shard file."""

    size: int  # bytes
    digest: str  # xxh3-128 of the file
    offsets: np.ndarray  # [blocks, layers, kinds] uint64
    crc32c: np.ndarray  # [blocks, layers, kinds] uint32, of a chunk's rows
    xxh3: np.ndarray  # [blocks, layers, kinds] uint64, of a chunk's rows


class ShardWriter(Protocol):
    """A format: how its shards are described, and how one is written, which takes rows in order and leaves one file."""

    file: ClassVar[str]  # the shard's file inside its own folder c/<shard>

    @staticmethod
    def describe(stream: Stream) -> dict[str, str]:
        """Name → text of the files that let other readers open the stream's folder."""

    def __init__(self, path: Path, stream: Stream, shard: int) -> None:
        """Begin a new file at `path`."""

    def append(self, stored: np.ndarray) -> None:
        """Add the next rows of the shard, [rows, layers, kinds x tokens, columns]."""

    def close(self) -> WrittenShard:
        """Write what is buffered and flush it to the disk."""

    def abandon(self) -> None:
        """Close the unfinished file; the caller removes it."""


# --- Zarr ------------------------------------------------------------------------------------------------------------


class ZarrWriter(ShardWriter):
    """One Zarr v3 array a stream; sharding_indexed, chunks uncompressed, a crc32c behind each and behind the index.

    Appends block after block, never seeking back: one block of rows is filled while the one before it is written.
    """

    file = "0/0/0"
    _idle: ClassVar[deque[bytearray]] = deque(maxlen=4)  # reused blocks: fresh memory must be cleared

    @staticmethod
    def describe(stream: Stream) -> dict[str, str]:
        little, checked = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
        chunk = {"name": "bytes"} if stream.encoding.stored.itemsize == 1 else little  # one byte has no order
        array = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(stream.shape),
            "data_type": stream.encoding.stored.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [stream.shard_rows, *stream.shape[1:]]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            # A missing shard reads as NaN elsewhere: a loss of NaN is noticed, plausible zeros are not.
            "fill_value": stream.encoding.fill,
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [stream.chunk_rows, 1, stream.tokens, stream.columns],
                        "codecs": [chunk, checked],
                        "index_codecs": [little, checked],
                        "index_location": "end",
                    },
                }
            ],
            "dimension_names": ["image", "layer", "token", "channel"],
            "attributes": {"layers": list(stream.layers), "kinds": list(stream.kinds), "dtype": stream.dtype},
        }
        return {"zarr.json": json.dumps(array, indent=2)}

    def __init__(self, path: Path, stream: Stream, shard: int) -> None:
        self._stream = stream
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by close()
        self._chunk_bytes = stream.chunk_rows * stream.row_bytes
        self._planes = len(stream.layers), len(stream.kinds)
        self._filled = 0
        self._index = np.full((stream.shard_blocks, *self._planes, 1, 2), ABSENT, "<u8")
        self._crc32c, self._xxh3 = (np.zeros(self._index.shape[:3], kind) for kind in (np.uint32, np.uint64))
        self._digest = xxhash.xxh3_128()
        self._blocks = 0
        self._behind = ThreadPoolExecutor(1)
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
        """[chunk_rows, layers, kinds] of the block being filled; an item is one image's part of a chunk.

        The block is as it is written, to the byte: what came to the system's cache by few large writes reads faster.
        """
        size, step = self._stream.row_bytes, self._chunk_bytes + CRC_BYTES
        shape = self._stream.chunk_rows, *self._planes
        return np.ndarray(shape, f"V{size}", self._block, strides=(size, self._planes[1] * step, step))

    def append(self, stored: np.ndarray) -> None:
        into = self._rows
        rows = np.ascontiguousarray(stored).reshape(-1).view(into.dtype).reshape(-1, *into.shape[1:])
        while len(rows):
            taken = min(len(rows), len(into) - self._filled)
            into[self._filled : self._filled + taken] = rows[:taken]
            self._filled += taken
            rows = rows[taken:]
            if self._filled == len(into):
                self._flush()
                into = self._rows

    def _flush(self) -> None:
        """Queue a full block for writing, once the block before it is written."""
        self._wait()
        self._writing = self._behind.submit(self._write, self._block, self._filled)
        self._block = self._memory()
        self._filled = 0

    def _wait(self) -> None:
        """Wait for the queued block. If it could not be written, every call raises OSError, so nothing follows a gap."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def _write(self, memory: bytearray, filled: int) -> None:
        held, size = filled * self._stream.row_bytes, self._chunk_bytes
        block = np.frombuffer(memory, np.uint8)
        for start, place in zip(range(0, len(block), size + CRC_BYTES), np.ndindex(self._planes), strict=True):
            chunk = block[start : start + size + CRC_BYTES]
            rows, whole = chunk[:held], chunk[:size]
            whole[held:] = 0  # chunks keep their full shape; rows past the last image are padding
            checksum = crc32c.crc32c(whole.data)
            chunk[size:] = np.frombuffer(checksum.to_bytes(CRC_BYTES, "little"), np.uint8)
            self._crc32c[self._blocks, *place] = checksum if held == size else crc32c.crc32c(rows.data)
            self._xxh3[self._blocks, *place] = xxhash.xxh3_64_intdigest(rows.data)
            self._digest.update(chunk.data)
            self._index[self._blocks, *place, 0] = self._blocks * len(block) + start, len(chunk)
        write_all(self._file, block.data)
        self._blocks += 1
        self._idle.append(memory)

    def close(self) -> WrittenShard:
        if self._filled:
            self._flush()
        self._wait()
        self._behind.shutdown()
        index = self._index.tobytes()
        index += crc32c.crc32c(index).to_bytes(CRC_BYTES, "little")
        self._digest.update(index)
        write_all(self._file, index)
        os.fsync(self._file.fileno())
        self._file.close()
        self._idle.append(self._block)
        size = self._blocks * math.prod(self._planes) * (self._chunk_bytes + CRC_BYTES) + len(index)
        tables = self._index[..., 0, 0], self._crc32c, self._xxh3
        return WrittenShard(size, self._digest.hexdigest(), *(table[: self._blocks] for table in tables))

    def abandon(self) -> None:
        self._behind.shutdown()
        self._file.close()


# --- HDF5 ------------------------------------------------------------------------------------------------------------


class Hdf5Writer(ShardWriter):
    """One immutable HDF5 file a shard, dataset 'tokens', chunked like the Zarr form, with Fletcher-32 checksums.

    Builds the file in memory and writes it whole on close: HDF5's own writing crashes the process on a full disk.
    """

    file = "tokens.h5"

    @staticmethod
    def describe(stream: Stream) -> dict[str, str]:
        return {}  # every file describes itself

    def __init__(self, path: Path, stream: Stream, shard: int) -> None:
        self._path, self._stream = path, stream
        self._rows = stream.rows(shard)
        # v110: a file that was cut short refuses to open, where the older layout opens with part of its rows.
        self._image = h5py.File(path, "w", driver="core", backing_store=False, libver="v110")
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
        shape = len(starts), len(self._stream.layers), len(self._stream.kinds)
        offsets, crc32cs, xxh3s = (np.zeros(shape, kind) for kind in (np.uint64, np.uint32, np.uint64))
        for block, layer, kind in np.ndindex(shape):
            at = self._data.id.get_chunk_info_by_coord((starts[block], layer, kind * tokens, 0)).byte_offset
            rows = image[at : at + min(step, len(self._rows) - starts[block]) * self._stream.row_bytes]
            offsets[block, layer, kind], crc32cs[block, layer, kind] = at, crc32c.crc32c(rows.data)
            xxh3s[block, layer, kind] = xxhash.xxh3_64_intdigest(rows.data)
        self._image.close()
        with open(self._path, "xb", buffering=0) as file:
            write_all(file, image.data)
            os.fsync(file.fileno())
        return WrittenShard(len(image), xxhash.xxh3_128_hexdigest(image.data), offsets, crc32cs, xxh3s)

    def abandon(self) -> None:
        if self._image:  # a file that was closed is false
            self._image.close()


FORMATS: dict[FormatName, type[ShardWriter]] = {"zarr": ZarrWriter, "hdf5": Hdf5Writer}


def write_all(file: io.FileIO, data: memoryview | bytes) -> None:
    """A raw write may be short."""
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]
