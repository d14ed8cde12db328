"""Two ways to lay a shard on disk: Zarr v3 and HDF5. Written here, read by one reader.

A writer says where in its file each chunk's bytes begin, and both formats keep them uncompressed: so shards of either are
read by offset, at the speed of a memory map, and checked by the same checksums. Through zarr-python's pipeline, or
through h5py, the same files read as well, a few times slower.
"""

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import crc32c
import h5py
import numpy as np
import xxhash

from mlfusion.store.stream import FormatName, Stream

ABSENT = np.uint64(2**64 - 1)  # Zarr's mark for a chunk that a shard does not hold


@dataclass(frozen=True, eq=False)
class Written:
    """A finished shard file."""

    size: int  # bytes
    digest: str  # xxh3-128 of the file
    offsets: np.ndarray  # [blocks, layers, kinds] uint64
    checksums: np.ndarray  # [blocks, layers, kinds] uint32, crc32c of a chunk's rows


class ShardWriter(Protocol):
    """Takes a shard's rows in order and leaves one finished file."""

    def append(self, stored: np.ndarray) -> None:
        """[rows, layers, kinds x tokens, columns], the next rows of the shard."""

    def close(self) -> Written:
        """Write what is buffered and flush it to the disk."""

    def abandon(self) -> None:
        """Let go of the file as it is; the caller removes it."""


class Format(Protocol):
    """How the shards of a stream are named, described and written."""

    file: str  # the shard's file inside its own folder c/<shard>

    def describe(self, stream: Stream) -> dict[str, str]:
        """Files, by name, that let a foreign reader open the stream's folder."""

    def writer(self, path: Path, stream: Stream, shard: int) -> ShardWriter:
        """Begin a new file at `path`."""


def checksum(data: Any) -> int:
    """crc32c, the checksum of Zarr's own codec, computed while other threads go on."""
    return int(crc32c.crc32c(data))


# --- Zarr ------------------------------------------------------------------------------------------------------------


class Zarr:
    """One Zarr v3 array a stream; sharding_indexed, chunks uncompressed, a crc32c behind each and behind the index."""

    file = "0/0/0"

    def describe(self, stream: Stream) -> dict[str, str]:
        images, layers, tokens, columns = stream.shape
        little = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        if stream.encoding.stored.itemsize == 1:  # one byte has no order
            little[0] = {"name": "bytes"}
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        array = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [images, layers, tokens, columns],
            "data_type": stream.encoding.stored.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [stream.shard_rows, layers, tokens, columns]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            # A missing shard reads as NaN elsewhere: a loss of NaN is noticed, plausible zeros are not.
            "fill_value": stream.encoding.fill,
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [stream.chunk_rows, 1, stream.tokens, columns],
                        "codecs": little,
                        "index_codecs": index,
                        "index_location": "end",
                    },
                }
            ],
            "dimension_names": ["image", "layer", "token", "channel"],
            "attributes": {"layers": list(stream.layers), "kinds": list(stream.kinds), "dtype": stream.dtype},
        }
        return {"zarr.json": json.dumps(array, indent=2)}

    def writer(self, path: Path, stream: Stream, shard: int) -> "ZarrWriter":
        return ZarrWriter(path, stream)


class ZarrWriter:
    """Appends chunk after chunk, never seeking back; holds one block of rows in memory."""

    def __init__(self, path: Path, stream: Stream) -> None:
        self._stream = stream
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by close()
        _, layers, _, columns = stream.shape
        # Laid out as it is written, chunk behind chunk, so that a chunk goes to the file from where it stands.
        shape = (layers, len(stream.kinds), stream.chunk_rows, stream.tokens, columns)
        self._buffer = np.zeros(shape, stream.encoding.stored)
        self._filled = 0
        self._index = np.full((stream.shard_blocks, layers, len(stream.kinds), 1, 2), ABSENT, "<u8")
        self._checksums: list[int] = []
        self._digest = xxhash.xxh3_128()
        self._block = 0
        self._size = 0

    def append(self, stored: np.ndarray) -> None:
        layers, kinds, rows, tokens, columns = self._buffer.shape
        while len(stored):
            taken = min(len(stored), rows - self._filled)
            split = stored[:taken].reshape(taken, layers, kinds, tokens, columns)
            self._buffer[:, :, self._filled : self._filled + taken] = split.transpose(1, 2, 0, 3, 4)
            self._filled += taken
            stored = stored[taken:]
            if self._filled == rows:
                self._flush()

    def _flush(self) -> None:
        whole = self._filled == self._stream.chunk_rows
        self._buffer[:, :, self._filled :] = 0  # chunks keep their full shape; rows past the last image are padding
        for layer, kinds in enumerate(self._buffer):
            for kind, chunk in enumerate(kinds):
                crc = checksum(chunk)
                self._index[self._block, layer, kind, 0] = self._size, chunk.nbytes + 4
                self._checksums.append(crc if whole else checksum(np.ascontiguousarray(chunk[: self._filled])))
                self._put(chunk, np.array([crc], "<u4"))
        self._block += 1
        self._filled = 0

    def _put(self, *parts: np.ndarray) -> None:
        for part in parts:
            write_all(self._file, part.data)
            self._digest.update(part.data)
            self._size += part.nbytes

    def close(self) -> Written:
        if self._filled:
            self._flush()
        self._put(self._index, np.array([checksum(self._index)], "<u4"))
        os.fsync(self._file.fileno())
        self._file.close()
        offsets = self._index[: self._block, :, :, 0, 0].astype(np.uint64)
        checksums = np.array(self._checksums, np.uint32).reshape(offsets.shape)
        return Written(self._size, self._digest.hexdigest(), offsets, checksums)

    def abandon(self) -> None:
        self._file.close()


# --- HDF5 ------------------------------------------------------------------------------------------------------------


class Hdf5:
    """One immutable HDF5 file a shard, dataset 'tokens', chunked like the Zarr form, with Fletcher-32 checksums."""

    file = "tokens.h5"

    def describe(self, stream: Stream) -> dict[str, str]:
        return {}  # every file describes itself

    def writer(self, path: Path, stream: Stream, shard: int) -> "Hdf5Writer":
        return Hdf5Writer(path, stream, shard)


class Hdf5Writer:
    """Builds the file in memory and writes it whole on close: HDF5's own writing crashes the process on a full disk."""

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

    def close(self) -> Written:
        self._image.flush()
        step, _, tokens, columns = self._data.chunks
        starts = range(0, len(self._rows), step)
        offsets = np.zeros((len(starts), len(self._stream.layers), len(self._stream.kinds)), np.uint64)
        for block, layer, kind in np.ndindex(offsets.shape):
            at = self._data.id.get_chunk_info_by_coord((starts[block], layer, kind * tokens, 0))
            offsets[block, layer, kind] = at.byte_offset
        image = np.frombuffer(self._image.id.get_file_image(), np.uint8)
        self._image.close()
        checksums = np.zeros(offsets.shape, np.uint32)
        row_bytes = tokens * columns * self._stream.encoding.stored.itemsize
        for (block, layer, kind), offset in np.ndenumerate(offsets.astype(np.int64)):
            nbytes = min(step, len(self._rows) - starts[block]) * row_bytes
            checksums[block, layer, kind] = checksum(image[offset : offset + nbytes])
        with open(self._path, "xb", buffering=0) as file:
            write_all(file, image.data)
            os.fsync(file.fileno())
        return Written(len(image), xxhash.xxh3_128_hexdigest(image.data), offsets, checksums)

    def abandon(self) -> None:
        if self._image:  # a file that was closed is false
            self._image.close()


FORMATS: dict[FormatName, Format] = {"zarr": Zarr(), "hdf5": Hdf5()}


def write_all(file: io.FileIO, data: memoryview | bytes) -> None:
    """A raw write may be short."""
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]
