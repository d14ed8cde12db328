"""A stream: tokens that were extracted together, as one array [images, layers, kinds x tokens, width] in shards.

An entry of the cache grows by streams: one more layer or token kind adds a stream and rewrites nothing. A shard holds all
layers of a run of images (few files), a chunk one layer and one kind, so that reading a layer reads no bytes of another.

A manifest holds sizes and digests of shards, and offsets and checksums of chunks. The commit record of a shard is a manifest
of that one shard; the manifest of a stream joins them all, and exists only when the stream is complete. A reader relies on
the manifest alone: it refuses a shard that was replaced by another valid one. Nothing in this module does I/O.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, Any

import msgspec
import numpy as np

from mlfusion.specs.identity import GRID_SIDES, KINDS, Dtype, FeatureSpec, Name, Pair, Text, TokenKind
from mlfusion.specs.names import layer_ranges
from mlfusion.specs.options import FormatName
from mlfusion.store.encoding import ENCODINGS, Encoding
from mlfusion.store.records import Count, Record

Size = Annotated[int, msgspec.Meta(gt=0, le=1 << 40)]
Tokens = Annotated[int, msgspec.Meta(gt=0, le=1 << 20)]
Layer = Annotated[int, msgspec.Meta(ge=0, le=10_000)]
Digest = Annotated[str, msgspec.Meta(min_length=32, max_length=32)]

TOKENS = "tokens"  # the folder of an entry's streams
CHUNK_BYTES = 768 * 1024  # a chunk is read whole: large enough for one disk request, small enough to buffer
SHARD_BYTES = 128 * 1024 * 1024
SHARD_ROWS = (256, 2048)  # fewest and most images of a shard; a kill loses at most one shard
CHUNK_EXTRA, FILE_EXTRA = 1 << 10, 1 << 20  # bytes that a format adds at most; a larger file is full of holes
MAX_SHARD_ROWS = 1 << 20  # that are read
MAX_SHARDS = 16  # more only in a large entry: publishing a shard takes as long as writing 10 MB

TOKENS_OF = dict.fromkeys(("cls", "ap", "dist", "max", "std"), 1) | {kind: n * n for kind, n in GRID_SIDES.items()}
"""Number of tokens of each kind that always has the same number."""


class Stream(Record, frozen=True):
    """Shape, shard size and chunk size of one array of tokens; fixed when the stream begins, the same for every writer."""

    layers: tuple[Layer, ...]
    kinds: tuple[TokenKind, ...]
    tokens: Tokens  # tokens of one kind: 1 for ap, 16 for grid4, the whole sequence for all
    width: Tokens  # channels per token
    images: Size
    dtype: Dtype
    shard_rows: Size  # images in a shard; a power of two, a multiple of chunk_rows
    chunk_rows: Size  # images in a chunk; a power of two
    format: FormatName

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError("its layers do not ascend")
        if not self.kinds or list(self.kinds) != sorted(set(self.kinds), key=KINDS.index):
            raise ValueError("its token kinds are not each given once, in their order")
        if any(self.tokens != TOKENS_OF.get(kind, self.tokens) for kind in self.kinds):
            raise ValueError("a token kind has another number of tokens")
        sizes = self.chunk_rows, self.shard_rows
        if any(size & (size - 1) for size in sizes) or sizes[0] > sizes[1] or sizes[1] > MAX_SHARD_ROWS:
            raise ValueError("its shards and chunks are of no allowed size")

    def fault(self, spec: FeatureSpec) -> str:
        """Why this cannot be a stream of an entry, in words; '' if it can."""
        model, data = spec.model, spec.data
        for what, mine, whole in (("images", self.images, data.images), ("type", self.dtype, spec.dtype)):
            if mine != whole:
                return f"its {what} is {mine}, that of its entry {whole}"
        if self.layers[-1] > model.depth:
            return f"it has layer {self.layers[-1]} of a model with {model.depth}"
        if model.kinds and (other := set(self.kinds) - set(model.kinds)):
            return f"it holds {min(other)} tokens, which the model does not have"
        return ""

    @property
    def name(self) -> str:
        """The stream's folder: 'cls.ap.L1-12'."""
        return ".".join(self.kinds) + ".L" + re.sub(",", ".", layer_ranges(self.layers))

    @property
    def folder(self) -> str:
        """Path of its folder in the entry's."""
        return f"{TOKENS}/{self.name}"

    @property
    def pairs(self) -> frozenset[Pair]:
        """Every (layer, kind) in this stream."""
        return frozenset((layer, kind) for layer in self.layers for kind in self.kinds)

    @property
    def encoding(self) -> Encoding:
        """The encoding of its numbers."""
        return ENCODINGS[self.dtype]

    @property
    def columns(self) -> int:
        """Stored numbers per token: its width, plus the bytes of its scale in int8."""
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

    @property
    def file_bytes(self) -> int:
        """Bytes of the largest file that a shard can be: whole chunks, and what a format adds to each and to the file."""
        chunks = self.shard_blocks * len(self.layers) * len(self.kinds)
        return chunks * (self.chunk_rows * self.row_bytes + CHUNK_EXTRA) + FILE_EXTRA

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
    """The fewest streams that hold `shapes`, (layer, kind) → (tokens, width); in a stream every layer has the same kinds."""
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


CHUNK = np.dtype([("offsets", "<u8"), ("crc32c", "<u4"), ("xxh3_64", "<u8")])
"""Offset of a chunk in its shard; checksums of its rows without padding: that of Zarr's codec, and a faster one."""


class Manifest(Record, frozen=True, rename={"sizes": "bytes", "digests": "xxh3_128"}):
    """Consecutive shards of a stream; their blocks of rows are numbered consecutively."""

    sizes: tuple[Count, ...]  # bytes of each shard's file
    digests: tuple[Digest, ...]  # xxh3-128 of each shard's file
    samples: tuple[Digest, ...]  # digest of ids, labels and images of each shard's rows
    skipped: dict[Count, Text]  # row → why its image could not be read; such rows hold no numbers
    chunks: tuple[Count, Count, Count]  # [blocks, layers, kinds], the shape of the tables, in C order
    offsets: bytes  # tables of the fields of CHUNK; msgspec writes them as base64
    crc32c: bytes
    xxh3_64: bytes

    def __post_init__(self) -> None:
        for name in CHUNK.names or ():
            if (size := len(getattr(self, name))) != math.prod(self.chunks) * CHUNK[name].itemsize:
                raise ValueError(f"a table of {size:,} bytes is not of shape {self.chunks}")

    def table(self, name: str) -> np.ndarray:
        """[blocks, layers, kinds] of a field of CHUNK."""
        return np.frombuffer(getattr(self, name), CHUNK[name]).reshape(self.chunks)

    def fits(self, stream: Stream, shards: range) -> bool:
        """Whether counts, rows and offsets can be those of these shards of a stream, before anything is made of them."""
        rows = range(shards.start * stream.shard_rows, min(shards.stop * stream.shard_rows, stream.images))
        if not (
            len(self.sizes) == len(self.digests) == len(self.samples) == len(shards)
            and self.chunks == (-(-len(rows) // stream.chunk_rows), len(stream.layers), len(stream.kinds))
            and all(row in rows for row in self.skipped)
        ):
            return False
        sizes = np.array(self.sizes)
        if sizes.max() > stream.file_bytes:
            return False
        blocks = np.full(self.chunks[0], stream.chunk_rows)  # rows of each block; a shard holds whole blocks
        blocks[-1:] -= len(blocks) * stream.chunk_rows - len(rows)
        files = np.repeat(sizes, stream.shard_blocks)[: len(blocks)]
        last = files - blocks * stream.row_bytes  # largest possible offset in each block
        offsets = self.table("offsets").view(np.int64)  # too large ones are negative
        return bool((offsets >= 0).all() and (offsets <= last[:, None, None]).all())


class CommitRecord(Manifest, frozen=True):
    """The record of one shard, published with it."""

    stream: Name
    shard: Count


class StreamManifest(Manifest, frozen=True):
    """The record of a complete stream."""

    stream: Stream

    @classmethod
    def join(cls, stream: Stream, parts: Sequence[Manifest]) -> "StreamManifest":
        """The manifest of a stream from its shards' commit records, in order."""
        joined: dict[str, Any] = {name: b"".join(getattr(part, name) for part in parts) for name in CHUNK.names or ()}
        for name in ("sizes", "digests", "samples"):
            joined[name] = tuple(chain.from_iterable(getattr(part, name) for part in parts))
        skipped = dict(chain.from_iterable(part.skipped.items() for part in parts))
        chunks = sum(part.chunks[0] for part in parts), *parts[0].chunks[1:]
        return cls(stream=stream, skipped=skipped, chunks=chunks, **joined)
