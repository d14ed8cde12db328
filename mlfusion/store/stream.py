"""A stream: tokens that were extracted together, as one array [images, layers, kinds x tokens, width] in shards.

An entry of the cache grows by streams. Asking for one more layer or token kind adds a stream and rewrites nothing. All of a
stream's layers lie in one shard (few files), but its chunks hold one layer and one kind each, so that reading a layer
touches that layer's bytes alone.

A manifest holds sizes, digests, where each chunk lies and its checksums, apart from the shards. The commit record of a shard
is a manifest of that one shard; the manifest of a stream joins them all, and its existence says that the stream is whole. A
reader goes by the manifest alone: a shard that was swapped for another, sound in itself, does not match it.

Pure arithmetic; nothing here does I/O.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated

import msgspec
import numpy as np

from mlfusion.specs.identity import KINDS, Dtype, Pair, TokenKind
from mlfusion.specs.names import layer_ranges
from mlfusion.specs.options import FormatName
from mlfusion.store.encoding import ENCODINGS, Encoding
from mlfusion.store.records import Count, Record

Size = Annotated[int, msgspec.Meta(gt=0)]


CHUNK_BYTES = 768 * 1024  # a chunk is read whole: large enough for one disk request, small enough to buffer
SHARD_BYTES = 128 * 1024 * 1024
SHARD_ROWS = (256, 2048)  # fewest and most images of a shard; a kill costs at most one shard
MAX_SHARDS = 16  # unless the entry is too large: naming and flushing a shard takes as long as writing 10 MB more


class Stream(Record, frozen=True):
    """Shape and cutting of one array of tokens. Fixed when the stream begins, so that every writer cuts alike."""

    layers: tuple[Count, ...]
    kinds: tuple[TokenKind, ...]
    tokens: Size  # tokens of one kind: 1 for ap, 16 for grid4, the whole sequence for all
    width: Size  # channels per token
    images: Size
    dtype: Dtype
    shard_rows: Size  # images in a shard; a power of two, a multiple of chunk_rows
    chunk_rows: Size  # images in a chunk; a power of two
    format: FormatName

    def __post_init__(self) -> None:
        if not self.layers or not self.kinds or self.shard_rows % self.chunk_rows:
            raise ValueError("a description of no stream")

    @property
    def name(self) -> str:
        """The stream's folder: 'cls.ap.L1-12'."""
        return ".".join(self.kinds) + ".L" + re.sub(",", ".", layer_ranges(self.layers))

    @property
    def pairs(self) -> frozenset[Pair]:
        """Every (layer, kind) held here."""
        return frozenset((layer, kind) for layer in self.layers for kind in self.kinds)

    @property
    def encoding(self) -> Encoding:
        """The encoding of its numbers."""
        return ENCODINGS[self.dtype]

    @property
    def columns(self) -> int:
        """Number of stored columns of a token: its width, and with int8 the bytes of its scale."""
        return self.width + self.encoding.extra

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape as stored: [images, layers, kinds x tokens, columns]."""
        return self.images, len(self.layers), len(self.kinds) * self.tokens, self.columns

    @property
    def row_bytes(self) -> int:
        """Bytes of one image in a chunk."""
        return self.tokens * self.columns * self.encoding.stored.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all stored numbers."""
        return math.prod(self.shape) * self.encoding.stored.itemsize

    @property
    def shards(self) -> int:
        """Number of shards, one file each."""
        return -(-self.images // self.shard_rows)

    @property
    def shard_blocks(self) -> int:
        """Blocks of rows in a full shard; a chunk is one block, one layer and one kind."""
        return self.shard_rows // self.chunk_rows

    def shard_bytes(self, shard: int) -> int:
        """Bytes of the stored numbers of one shard."""
        return len(self.rows(shard)) * self.nbytes // self.images

    def rows(self, shard: int) -> range:
        """The images of shard number `shard`."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.images))

    def plane(self, layer: int, kind: TokenKind) -> tuple[int, int]:
        """Index along the layers and index along the kinds of (layer, kind)."""
        return self.layers.index(layer), self.kinds.index(kind)


def _power_of_two(at_least: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << max(at_least - 1, 0).bit_length()


def streams_for(
    shapes: Mapping[Pair, tuple[int, int]], *, images: int, dtype: Dtype, format: FormatName
) -> list[Stream]:
    """The fewest streams that hold these pairs: a stream holds pairs of one shape, as the product of layers and kinds.

    `shapes` is (layer, kind) → (tokens, width) of one image.
    """
    kinds_of: dict[tuple[int, int, int], list[TokenKind]] = {}
    for (layer, kind), (tokens, width) in sorted(shapes.items()):
        kinds_of.setdefault((layer, width, tokens), []).append(kind)
    groups: dict[tuple[int, int, tuple[TokenKind, ...]], list[int]] = {}
    for (layer, width, tokens), kinds in kinds_of.items():
        groups.setdefault((width, tokens, tuple(sorted(kinds, key=KINDS.index))), []).append(layer)
    streams = []
    for (width, tokens, ordered), layers in groups.items():
        row_bytes = tokens * ENCODINGS[dtype].vector_bytes(width)  # of a chunk
        shard_rows = min(max(_power_of_two(images // MAX_SHARDS), SHARD_ROWS[0]), SHARD_ROWS[1])
        while shard_rows > 1 and shard_rows * row_bytes * len(layers) * len(ordered) > SHARD_BYTES:
            shard_rows //= 2
        streams.append(
            Stream(
                layers=tuple(layers),
                kinds=ordered,
                tokens=tokens,
                width=width,
                images=images,
                dtype=dtype,
                shard_rows=shard_rows,
                chunk_rows=min(_power_of_two(CHUNK_BYTES // row_bytes), shard_rows),
                format=format,
            )
        )
    return streams


OFFSETS, CRC32C, XXH3 = "<u8", "<u4", "<u8"  # types of the tables; msgspec writes their bytes as base64


class Manifest(
    Record,
    frozen=True,
    rename={
        "sizes": "bytes",
        "digests": "xxh3_128",
        "offset_table": "offsets",
        "crc32c_table": "crc32c",
        "xxh3_table": "xxh3_64",
    },
):
    """Consecutive shards of a stream; chunks are numbered through, block by block of rows."""

    sizes: tuple[Count, ...]  # bytes of each shard's file
    digests: tuple[str, ...]  # xxh3-128 of each shard's file
    samples: tuple[str, ...]  # digest of ids, labels and images of each shard's rows
    skipped: dict[Count, str]  # row → why its image could not be read; such rows hold no numbers
    chunks: tuple[Count, Count, Count]  # [blocks, layers, kinds], the shape of the tables, in C order
    offset_table: bytes
    crc32c_table: bytes
    xxh3_table: bytes

    def __post_init__(self) -> None:
        for table, kind in ((self.offset_table, OFFSETS), (self.crc32c_table, CRC32C), (self.xxh3_table, XXH3)):
            if len(table) != math.prod(self.chunks) * np.dtype(kind).itemsize:
                raise ValueError(f"a table of {len(table):,} bytes is not of shape {self.chunks}")

    @property
    def offsets(self) -> np.ndarray:
        """Where in its shard a chunk's bytes begin."""
        return np.frombuffer(self.offset_table, OFFSETS).reshape(self.chunks)

    @property
    def crc32c(self) -> np.ndarray:
        """Checksum of a chunk's rows without padding, as in Zarr's codec."""
        return np.frombuffer(self.crc32c_table, CRC32C).reshape(self.chunks)

    @property
    def xxh3(self) -> np.ndarray:
        """The 64-bit xxh3 of the same bytes, several times faster."""
        return np.frombuffer(self.xxh3_table, XXH3).reshape(self.chunks)

    def fits(self, stream: Stream) -> bool:
        """Whether it can describe the whole of a stream: its shards, blocks, planes and images, and where chunks lie."""
        first = np.arange(0, stream.images, stream.chunk_rows)  # of each block; a shard is a whole number of blocks
        if not (
            len(self.sizes) == len(self.digests) == len(self.samples) == stream.shards
            and self.chunks == (len(first), len(stream.layers), len(stream.kinds))
            and all(row < stream.images for row in self.skipped)
        ):
            return False
        held = np.minimum(stream.images - first, stream.chunk_rows) * stream.row_bytes
        last = np.array(self.sizes)[first // stream.shard_rows] - held  # where a block's chunks may begin at the latest
        offsets = self.offsets.astype(np.int64)  # beyond its range they turn negative
        return bool(np.all((offsets >= 0) & (offsets <= last[:, None, None])))


class CommitRecord(Manifest, frozen=True):
    """The record that is published together with one shard."""

    stream: str
    shard: Count


class StreamManifest(Manifest, frozen=True):
    """The record that seals a stream: it exists when all shards do."""

    stream: Stream

    @classmethod
    def join(cls, stream: Stream, parts: Sequence[Manifest]) -> "StreamManifest":
        """One manifest of a stream's commit records, in the order of its shards."""
        return cls(
            stream=stream,
            sizes=tuple(chain.from_iterable(part.sizes for part in parts)),
            digests=tuple(chain.from_iterable(part.digests for part in parts)),
            samples=tuple(chain.from_iterable(part.samples for part in parts)),
            skipped=dict(chain.from_iterable(part.skipped.items() for part in parts)),
            chunks=(sum(part.chunks[0] for part in parts), *parts[0].chunks[1:]),
            offset_table=b"".join(part.offset_table for part in parts),
            crc32c_table=b"".join(part.crc32c_table for part in parts),
            xxh3_table=b"".join(part.xxh3_table for part in parts),
        )
