"""What a run of shards holds, kept apart from the shards: sizes, digests, where each chunk lies and its checksum.

The commit record of a shard is a manifest of that one shard; the manifest of a stream joins them all, and its being
there says that the stream is whole. A reader goes by the manifest alone: a shard that was swapped for another, sound in
itself, does not match it.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from mlfusion.store.stream import Stream


@dataclass(frozen=True, eq=False)
class Manifest:
    """Of `shards` consecutive shards; chunks are numbered through, block by block of rows."""

    sizes: tuple[int, ...]  # bytes of each shard's file
    digests: tuple[str, ...]  # xxh3-128 of each shard's file
    samples: tuple[str, ...]  # digest of ids, labels and images of each shard's rows
    skipped: dict[int, str]  # row → why its image could not be read; such rows hold no numbers
    offsets: np.ndarray  # [blocks, layers, kinds] uint64: where in its shard a chunk's bytes begin
    checksums: np.ndarray  # [blocks, layers, kinds] uint32: crc32c of a chunk's rows, without padding

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """One manifest of consecutive ones."""
        return cls(
            sizes=tuple(size for part in parts for size in part.sizes),
            digests=tuple(digest for part in parts for digest in part.digests),
            samples=tuple(samples for part in parts for samples in part.samples),
            skipped={row: why for part in parts for row, why in part.skipped.items()},
            offsets=np.concatenate([part.offsets for part in parts]),
            checksums=np.concatenate([part.checksums for part in parts]),
        )

    @property
    def shards(self) -> int:
        """How many shards it speaks of."""
        return len(self.sizes)

    def fits(self, stream: Stream) -> bool:
        """Whether it can be of this whole stream: its shards, blocks, planes and images, and chunks that lie in their files."""
        first = np.arange(0, stream.images, stream.chunk_rows)  # of each block; a shard is a whole number of blocks
        if not (
            len(self.sizes) == len(self.digests) == len(self.samples) == stream.shards
            and self.offsets.shape == self.checksums.shape == (len(first), len(stream.layers), len(stream.kinds))
            and all(0 <= row < stream.images for row in self.skipped)
        ):
            return False
        row_bytes = stream.tokens * stream.columns * stream.encoding.stored.itemsize
        held = np.minimum(stream.images - first, stream.chunk_rows) * row_bytes
        last = np.array(self.sizes)[first // stream.shard_rows] - held  # where a block's chunks may begin at the latest
        offsets = self.offsets.astype(np.int64)  # beyond its range they turn negative
        return bool(np.all((offsets >= 0) & (offsets <= last[:, None, None])))

    def to_json(self) -> dict[str, Any]:
        """Plain values; the tables as base64 of little-endian numbers in C order."""
        return {
            "bytes": list(self.sizes),
            "xxh3_128": list(self.digests),
            "samples": list(self.samples),
            "skipped": {str(row): why for row, why in self.skipped.items()},
            "chunks": list(self.offsets.shape),
            "offsets": base64.b64encode(self.offsets.astype("<u8").tobytes()).decode(),
            "crc32c": base64.b64encode(self.checksums.astype("<u4").tobytes()).decode(),
        }

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is no manifest.
        """
        if min(body["chunks"]) < 0:  # which NumPy would take for "whatever fits"
            raise ValueError("a table of a negative shape")
        return cls(
            sizes=tuple(body["bytes"]),
            digests=tuple(body["xxh3_128"]),
            samples=tuple(body["samples"]),
            skipped={int(row): why for row, why in body["skipped"].items()},
            offsets=np.frombuffer(base64.b64decode(body["offsets"]), "<u8").reshape(body["chunks"]),
            checksums=np.frombuffer(base64.b64decode(body["crc32c"]), "<u4").reshape(body["chunks"]),
        )

    def matches(self, other: "Manifest") -> bool:
        """Whether both say the same of the same shards."""
        return self.to_json() == other.to_json()
