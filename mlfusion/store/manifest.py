"""What a run of shards holds, kept apart from the shards: sizes, digests, where each chunk lies and its checksums.

The commit record of a shard is a manifest of that one shard; the manifest of a stream joins them all, and its being
there says that the stream is whole. A reader goes by the manifest alone: a shard that was swapped for another, sound in
itself, does not match it.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    crc32c: np.ndarray  # [blocks, layers, kinds] uint32: of a chunk's rows, without padding
    xxh3: (
        np.ndarray | None
    )  # likewise uint64, the 64-bit form: several times faster; None of shards of earlier versions

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """One manifest of consecutive ones."""
        hashes = [part.xxh3 for part in parts if part.xxh3 is not None]
        return cls(
            sizes=tuple(size for part in parts for size in part.sizes),
            digests=tuple(digest for part in parts for digest in part.digests),
            samples=tuple(samples for part in parts for samples in part.samples),
            skipped={row: why for part in parts for row, why in part.skipped.items()},
            offsets=np.concatenate([part.offsets for part in parts]),
            crc32c=np.concatenate([part.crc32c for part in parts]),
            xxh3=np.concatenate(hashes) if len(hashes) == len(parts) else None,
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
            and self.offsets.shape == self.crc32c.shape == (len(first), len(stream.layers), len(stream.kinds))
            and (self.xxh3 is None or self.xxh3.shape == self.offsets.shape)
            and all(0 <= row < stream.images for row in self.skipped)
        ):
            return False
        held = np.minimum(stream.images - first, stream.chunk_rows) * stream.row_bytes
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
            "offsets": _text(self.offsets, "<u8"),
            "crc32c": _text(self.crc32c, "<u4"),
            **({} if self.xxh3 is None else {"xxh3_64": _text(self.xxh3, "<u8")}),
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
            offsets=_table(body["offsets"], "<u8", body["chunks"]),
            crc32c=_table(body["crc32c"], "<u4", body["chunks"]),
            xxh3=_table(body["xxh3_64"], "<u8", body["chunks"]) if "xxh3_64" in body else None,
        )

    def matches(self, other: "Manifest") -> bool:
        """Whether both say the same of the same shards; one that an earlier version wrote says less."""
        if self.xxh3 is None or other.xxh3 is None:
            return replace(self, xxh3=None).to_json() == replace(other, xxh3=None).to_json()
        return self.to_json() == other.to_json()


def _text(table: np.ndarray, kind: str) -> str:
    return base64.b64encode(table.astype(kind).tobytes()).decode()


def _table(text: str, kind: str, shape: Sequence[int]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind).reshape(shape)
