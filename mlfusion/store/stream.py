"""A stream: tokens that were extracted together, as one array [images, layers, kinds x tokens, width] in shards.

An entry of the cache grows by streams. Asking for one more layer or token kind adds a stream and rewrites nothing. All of a
stream's layers lie in one shard (few files), but its chunks hold one layer and one kind each, so that reading a layer
touches that layer's bytes alone. Pure arithmetic; nothing here does I/O.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated

import msgspec

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

    @classmethod
    def cut(
        cls,
        pairs: Iterable[Pair],
        *,
        tokens: int,
        width: int,
        images: int,
        dtype: Dtype,
        format: FormatName,
    ) -> "Stream":
        """Choose shard and chunk sizes.

        Args:
            pairs: the full product of some layers and some kinds.
            tokens: tokens of one kind, of one image and layer.
            width: channels per token.
            images: rows of the stream.
            dtype: storage type.
            format: of the shards.
        """
        layers = tuple(sorted({layer for layer, _ in pairs}))
        kinds: tuple[TokenKind, ...] = tuple(k for k in KINDS if any(kind == k for _, kind in pairs))
        chunk_row = tokens * (width + ENCODINGS[dtype].extra) * ENCODINGS[dtype].stored.itemsize
        row_bytes = len(layers) * len(kinds) * chunk_row
        shard_rows = min(max(_power_of_two(images // MAX_SHARDS), SHARD_ROWS[0]), SHARD_ROWS[1])
        while shard_rows > 1 and shard_rows * row_bytes > SHARD_BYTES:
            shard_rows //= 2
        return cls(
            layers=layers,
            kinds=kinds,
            tokens=tokens,
            width=width,
            images=images,
            dtype=dtype,
            shard_rows=shard_rows,
            chunk_rows=min(_power_of_two(CHUNK_BYTES // chunk_row), shard_rows),
            format=format,
        )

    def with_format(self, format: FormatName) -> "Stream":
        """The same stream, cut alike, in another format."""
        return msgspec.structs.replace(self, format=format)

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

    def blocks(self, shard: int) -> Iterator[range]:
        """The rows of a shard, chunk by chunk."""
        rows = self.rows(shard)
        for start in range(rows.start, rows.stop, self.chunk_rows):
            yield range(start, min(start + self.chunk_rows, rows.stop))


def _power_of_two(at_least: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << max(at_least - 1, 0).bit_length()


def streams_for(
    shapes: Mapping[Pair, tuple[int, int]], *, images: int, dtype: Dtype, format: FormatName
) -> list[Stream]:
    """The fewest streams that hold these pairs: a stream holds pairs of one shape, as the product of layers and kinds.

    Args:
        shapes: (layer, kind) → (tokens, width) of one image.
        images: rows of the streams.
        dtype: storage type.
        format: of the shards.
    """
    kinds_of: dict[tuple[int, int, int], list[TokenKind]] = {}
    for (layer, kind), (count, width) in sorted(shapes.items()):
        kinds_of.setdefault((layer, width, count), []).append(kind)
    groups: dict[tuple[int, int, tuple[TokenKind, ...]], list[int]] = {}
    for (layer, width, count), kinds in kinds_of.items():
        groups.setdefault((width, count, tuple(kinds)), []).append(layer)
    return [
        Stream.cut(
            [(layer, kind) for layer in layers for kind in kinds],
            tokens=count,
            width=width,
            images=images,
            dtype=dtype,
            format=format,
        )
        for (width, count, kinds), layers in groups.items()
    ]
