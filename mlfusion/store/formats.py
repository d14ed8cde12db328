"""Two ways to lay a shard on disk, behind one pair of verbs: write whole, open and read by plane.

Zarr v3 shards are written and read here directly rather than through zarr-python: the files are the same, bit for bit
readable by it, but a direct read runs at the speed of a memory map where the library's pipeline reaches a fifth. HDF5
shards are small whole files, one a shard, never appended to.
"""

import io
import json
import mmap
import os
from pathlib import Path
from typing import Protocol

import google_crc32c
import h5py
import numpy as np

from mlfusion.errors import CacheUnusable
from mlfusion.store.stream import FormatName, Stream

ABSENT = np.uint64(2**64 - 1)  # Zarr's mark for a chunk that a shard does not hold


class ShardWriter(Protocol):
    """Takes a shard's rows in order and leaves one finished file at the path it was opened with."""

    def append(self, tokens: np.ndarray) -> None:
        """[rows, layers, kinds x tokens, width], the next rows of the shard."""

    def close(self) -> None:
        """Write what is buffered and flush it to the disk."""

    def abandon(self) -> None:
        """Let go of the file as it is; the caller removes it."""


class OpenShard(Protocol):
    """A finished shard."""

    def into(self, layer: int, kind: int, out: np.ndarray) -> None:
        """Fill `out` [rows, tokens, width] with one plane, checking every checksum."""

    def close(self) -> None:
        """Let go of the file."""


class Format(Protocol):
    """How the shards of a stream are named, described, written and opened."""

    def file(self, shard: int) -> str:
        """The shard's name inside the stream's folder."""

    def describe(self, stream: Stream) -> dict[str, str]:
        """Files, by name, that let a foreign reader open the stream's folder."""

    def writer(self, path: Path, stream: Stream, shard: int) -> ShardWriter:
        """Begin a new file at `path`."""

    def open(self, path: Path, stream: Stream, shard: int) -> OpenShard:
        """Open a finished shard."""


def checksum(data: np.ndarray | bytes) -> int:
    """crc32c, the checksum of Zarr's own codec."""
    return int(google_crc32c.value(data))


# --- Zarr ------------------------------------------------------------------------------------------------------------


class Zarr:
    """One Zarr v3 array a stream; sharding_indexed, chunks uncompressed, a crc32c behind each and behind the index."""

    def file(self, shard: int) -> str:
        return f"c.{shard}.0.0.0"

    def describe(self, stream: Stream) -> dict[str, str]:
        images, layers, tokens, width = stream.shape
        little = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        array = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [images, layers, tokens, width],
            "data_type": stream.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [stream.shard_rows, layers, tokens, width]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            # A missing shard reads as NaN elsewhere: a loss of NaN is noticed, plausible zeros are not.
            "fill_value": "NaN",
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [stream.chunk_rows, 1, stream.tokens, width],
                        "codecs": little,
                        "index_codecs": little,
                        "index_location": "end",
                    },
                }
            ],
            "dimension_names": ["image", "layer", "token", "channel"],
            "attributes": {"layers": list(stream.layers), "kinds": list(stream.kinds)},
        }
        return {"zarr.json": json.dumps(array, indent=2)}

    def writer(self, path: Path, stream: Stream, shard: int) -> "ZarrWriter":
        return ZarrWriter(path, stream)

    def open(self, path: Path, stream: Stream, shard: int) -> "ZarrShard":
        return ZarrShard(path, stream, len(stream.rows(shard)))


class ZarrWriter:
    """Appends chunk after chunk, never seeking back; holds one chunk's rows in memory."""

    def __init__(self, path: Path, stream: Stream) -> None:
        self._stream = stream
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by close()
        _, layers, tokens, width = stream.shape
        self._buffer = np.zeros((stream.chunk_rows, layers, tokens, width), stream.dtype)
        self._filled = 0
        blocks = stream.shard_rows // stream.chunk_rows
        self._index = np.full((blocks, layers, len(stream.kinds), 1, 2), ABSENT, "<u8")
        self._block = 0
        self._offset = 0

    def append(self, tokens: np.ndarray) -> None:
        while len(tokens):
            taken = min(len(tokens), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + taken] = tokens[:taken]
            self._filled += taken
            tokens = tokens[taken:]
            if self._filled == len(self._buffer):
                self._flush()

    def _flush(self) -> None:
        self._buffer[self._filled :] = 0  # chunks keep their full shape; rows past the last image are padding
        for layer in range(len(self._stream.layers)):
            for kind in range(len(self._stream.kinds)):
                span = slice(kind * self._stream.tokens, (kind + 1) * self._stream.tokens)
                chunk = np.ascontiguousarray(self._buffer[:, layer, span], self._buffer.dtype.newbyteorder("<"))
                self._put(chunk, self._index[self._block, layer, kind, 0])
        self._block += 1
        self._filled = 0

    def _put(self, data: np.ndarray, entry: np.ndarray | None = None) -> None:
        crc = np.array([checksum(data)], "<u4")
        if entry is not None:
            entry[:] = self._offset, data.nbytes + crc.nbytes
        for part in (data, crc):
            _write(self._file, part.data)
        self._offset += data.nbytes + crc.nbytes

    def close(self) -> None:
        if self._filled:
            self._flush()
        self._put(self._index)
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        self._file.close()


class ZarrShard:
    """Reads planes straight from a memory map."""

    def __init__(self, path: Path, stream: Stream, rows: int) -> None:
        self._path, self._stream, self._rows = path, stream, rows
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            blocks = stream.shard_rows // stream.chunk_rows
            shape = (blocks, len(stream.layers), len(stream.kinds), 1, 2)
            index_bytes = int(np.prod(shape)) * 8
            if size < index_bytes + 4:
                raise _damaged(path, "it is cut short")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)
        index, crc = self._bytes[-index_bytes - 4 : -4], self._bytes[-4:]
        if checksum(index) != int(crc.view("<u4")[0]):
            raise _damaged(path, "the checksum of its index is wrong")
        self._index = index.copy().view("<u8").reshape(shape)

    def into(self, layer: int, kind: int, out: np.ndarray) -> None:
        stream = self._stream
        shape = (stream.chunk_rows, stream.tokens, stream.width)
        nbytes = int(np.prod(shape)) * np.dtype(stream.dtype).itemsize
        for block, start in enumerate(range(0, self._rows, stream.chunk_rows)):
            offset, length = (int(v) for v in self._index[block, layer, kind, 0])
            if length != nbytes + 4 or offset + length > len(self._bytes):
                raise _damaged(self._path, "its index points outside")
            chunk = self._bytes[offset : offset + nbytes]
            if checksum(chunk) != int.from_bytes(self._bytes[offset + nbytes : offset + length].tobytes(), "little"):
                raise _damaged(self._path, f"the checksum of chunk {block}, layer {stream.layers[layer]} is wrong")
            rows = min(stream.chunk_rows, self._rows - start)
            out[start : start + rows] = np.frombuffer(chunk, np.dtype(stream.dtype).newbyteorder("<")).reshape(shape)[
                :rows
            ]

    def close(self) -> None:
        # The map goes with its last view: closing it under one, which an error's traceback may hold, is refused.
        del self._bytes, self._map


# --- HDF5 ------------------------------------------------------------------------------------------------------------


class Hdf5:
    """One immutable HDF5 file a shard, dataset 'tokens', chunked like the Zarr form, with Fletcher-32 checksums."""

    def file(self, shard: int) -> str:
        return f"shard-{shard:06d}.h5"

    def describe(self, stream: Stream) -> dict[str, str]:
        return {}  # every file describes itself

    def writer(self, path: Path, stream: Stream, shard: int) -> "Hdf5Writer":
        return Hdf5Writer(path, stream, shard)

    def open(self, path: Path, stream: Stream, shard: int) -> "Hdf5Shard":
        return Hdf5Shard(path, stream)


class Hdf5Writer:
    """Builds the file in memory and writes it whole on close: HDF5's own writing crashes the process on a full disk."""

    def __init__(self, path: Path, stream: Stream, shard: int) -> None:
        self._path = path
        rows = stream.rows(shard)
        # v110: a file that was cut short refuses to open, where the older layout opens with part of its rows.
        self._image = h5py.File(path, "w", driver="core", backing_store=False, libver="v110")
        self._data = self._image.create_dataset(
            "tokens",
            shape=(len(rows), *stream.shape[1:]),
            dtype=np.dtype(stream.dtype).newbyteorder("<"),
            chunks=(min(stream.chunk_rows, len(rows)), 1, stream.tokens, stream.width),
            fletcher32=True,
        )
        self._data.attrs.update(layers=stream.layers, kinds=list(stream.kinds), first_row=rows.start)
        self._row = 0

    def append(self, tokens: np.ndarray) -> None:
        self._data[self._row : self._row + len(tokens)] = tokens
        self._row += len(tokens)

    def close(self) -> None:
        self._image.flush()
        with open(self._path, "xb", buffering=0) as file:
            _write(file, self._image.id.get_file_image())
            os.fsync(file.fileno())
        self._image.close()

    def abandon(self) -> None:
        self._image.close()


class Hdf5Shard:
    """Reads planes through h5py; the library checks the checksums."""

    def __init__(self, path: Path, stream: Stream) -> None:
        self._path, self._stream = path, stream
        try:
            self._file = h5py.File(path, "r", locking=False)  # published files never change
            self._data = self._file["tokens"]
        except (OSError, KeyError) as err:
            raise _damaged(path, str(err)) from err

    def into(self, layer: int, kind: int, out: np.ndarray) -> None:
        tokens = self._stream.tokens
        try:
            out[:] = self._data[:, layer, kind * tokens : (kind + 1) * tokens]
        except (OSError, ValueError) as err:
            raise _damaged(self._path, str(err)) from err

    def close(self) -> None:
        self._file.close()


FORMATS: dict[FormatName, Format] = {"zarr": Zarr(), "hdf5": Hdf5()}


def _write(file: io.FileIO, data: memoryview | bytes) -> None:
    """All of it: a raw write may be short."""
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def _damaged(path: Path, why: str) -> CacheUnusable:
    return CacheUnusable(f"{path} is damaged: {why}; delete that file and run the same `mlfusion extract` again")
