"""What a run of shards holds, kept apart from the shards: sizes, digests, where each chunk lies and its checksums.

The commit record of a shard is a manifest of that one shard; the manifest of a stream joins them all, and its existence
says that the stream is whole. A reader goes by the manifest alone: a shard that was swapped for another, sound in itself,
does not match it.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mlfusion.store.formats import WrittenShard
from mlfusion.store.records import Count, Record
from mlfusion.store.stream import Stream

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
    """Consecutive shards of a stream; chunks are numbered through, block by block of rows.

    The tables are [blocks, layers, kinds] in C order: where in its shard a chunk's bytes begin, and two checksums of its
    rows, without padding: crc32c as in Zarr's codec, and the 64-bit xxh3, which is several times faster.
    """

    sizes: tuple[Count, ...]  # bytes of each shard's file
    digests: tuple[str, ...]  # xxh3-128 of each shard's file
    samples: tuple[str, ...]  # digest of ids, labels and images of each shard's rows
    skipped: dict[Count, str]  # row → why its image could not be read; such rows hold no numbers
    chunks: tuple[Count, Count, Count]  # shape of the tables
    offset_table: bytes
    crc32c_table: bytes
    xxh3_table: bytes

    def __post_init__(self) -> None:
        for table, kind in ((self.offset_table, OFFSETS), (self.crc32c_table, CRC32C), (self.xxh3_table, XXH3)):
            if len(table) != math.prod(self.chunks) * np.dtype(kind).itemsize:
                raise ValueError(f"a table of {len(table):,} bytes is not of shape {self.chunks}")

    @property
    def offsets(self) -> np.ndarray:
        """[blocks, layers, kinds] uint64: where in its shard a chunk's bytes begin."""
        return np.frombuffer(self.offset_table, OFFSETS).reshape(self.chunks)

    @property
    def crc32c(self) -> np.ndarray:
        """[blocks, layers, kinds] uint32."""
        return np.frombuffer(self.crc32c_table, CRC32C).reshape(self.chunks)

    @property
    def xxh3(self) -> np.ndarray:
        """[blocks, layers, kinds] uint64."""
        return np.frombuffer(self.xxh3_table, XXH3).reshape(self.chunks)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.sizes)

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
        skipped: dict[int, str] = {}
        for part in parts:
            skipped |= part.skipped
        return cls(
            stream=stream,
            sizes=tuple(size for part in parts for size in part.sizes),
            digests=tuple(digest for part in parts for digest in part.digests),
            samples=tuple(samples for part in parts for samples in part.samples),
            skipped=skipped,
            chunks=(sum(part.chunks[0] for part in parts), *parts[0].chunks[1:]),
            offset_table=b"".join(part.offset_table for part in parts),
            crc32c_table=b"".join(part.crc32c_table for part in parts),
            xxh3_table=b"".join(part.xxh3_table for part in parts),
        )


def commit_record(
    stream: Stream, shard: int, written: WrittenShard, *, samples: str, skipped: Mapping[int, str]
) -> CommitRecord:
    """The record of a shard that was written."""
    return CommitRecord(
        stream=stream.name,
        shard=shard,
        sizes=(written.size,),
        digests=(written.digest,),
        samples=(samples,),
        skipped=dict(skipped),
        chunks=written.offsets.shape,
        offset_table=written.offsets.astype(OFFSETS).tobytes(),
        crc32c_table=written.crc32c.astype(CRC32C).tobytes(),
        xxh3_table=written.xxh3.astype(XXH3).tobytes(),
    )
