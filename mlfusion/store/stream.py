"""A stream: tokens that were extracted together, as one array [images, layers, kinds x tokens, width] in shards.

An entry of the cache grows by streams. Asking for one more layer or token kind adds a stream and rewrites nothing. All of a
stream's layers lie in one shard (few files), but its chunks hold one layer and one kind each, so that reading a layer
touches that layer's bytes alone. Pure arithmetic; nothing here does I/O.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from mlfusion.specs import KINDS, Dtype, Pair, TokenKind, layer_ranges
from mlfusion.store.encoding import ENCODINGS, Encoding

FormatName = Literal["zarr", "hdf5"]

CHUNK_BYTES = 768 * 1024  # a chunk is read whole: large enough for one disk request, small enough to buffer
SHARD_BYTES = 128 * 1024 * 1024
SHARD_ROWS = (256, 2048)  # fewest and most; what a kill may cost is one shard
SHARDS = 16  # at most, of an entry that needs no more: names and flushes of each take as long as 10 MB more would


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Shape and cutting of one array of tokens. Fixed when the stream begins, so that every writer cuts alike."""

    layers: tuple[int, ...]
    kinds: tuple[TokenKind, ...]
    tokens: int  # tokens of one kind: 1 for ap, 16 for grid4, the whole sequence for all
    width: int  # channels per token
    images: int
    dtype: Dtype
    shard_rows: int  # images in a shard; a power of two, a multiple of chunk_rows
    chunk_rows: int  # images in a chunk; a power of two
    format: FormatName

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
        """Choose shard and chunk sizes; `pairs` is the full product of some layers and some kinds."""
        layers = tuple(sorted({layer for layer, _ in pairs}))
        kinds: tuple[TokenKind, ...] = tuple(k for k in KINDS if any(kind == k for _, kind in pairs))
        chunk_row = tokens * (width + ENCODINGS[dtype].extra) * ENCODINGS[dtype].stored.itemsize
        row_bytes = len(layers) * len(kinds) * chunk_row
        shard_rows = min(max(_power_of_two(images // SHARDS), SHARD_ROWS[0]), SHARD_ROWS[1])
        while shard_rows > 1 and shard_rows * row_bytes > SHARD_BYTES:
            shard_rows //= 2
        chunk_rows = min(_power_of_two(CHUNK_BYTES // chunk_row), shard_rows)
        return cls(
            layers=layers,
            kinds=kinds,
            tokens=tokens,
            width=width,
            images=images,
            dtype=dtype,
            shard_rows=shard_rows,
            chunk_rows=chunk_rows,
            format=format,
        )

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Stream":
        """The inverse of `to_json`.

        Raises:
            ValueError: no stream is like that.
        """
        try:
            stream = cls(**{**body, "layers": tuple(body["layers"]), "kinds": tuple(body["kinds"])})
            numbers = (stream.tokens, stream.width, stream.images, stream.shard_rows, stream.chunk_rows)
            sane = min(numbers) > 0 and stream.shard_rows % stream.chunk_rows == 0 and stream.layers and stream.kinds
            known = stream.dtype in ENCODINGS and stream.format in get_args(FormatName)
        except (KeyError, TypeError) as err:
            raise ValueError(f"a description of no stream: {err}") from err
        if not sane or not known:
            raise ValueError("a description of no stream")
        return stream

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored in stream.json."""
        return asdict(self)

    def kept_as(self, format: FormatName) -> "Stream":
        """The same stream, cut alike, in another format."""
        return replace(self, format=format)

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
        """How its numbers are kept."""
        return ENCODINGS[self.dtype]

    @property
    def columns(self) -> int:
        """Stored numbers of a token's vector: its width, and with int8 the bytes of its scale."""
        return self.width + self.encoding.extra

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As stored: [images, layers, kinds x tokens, columns]."""
        return self.images, len(self.layers), len(self.kinds) * self.tokens, self.columns

    @property
    def row_bytes(self) -> int:
        """Bytes that a chunk holds of one image."""
        return self.tokens * self.columns * self.encoding.stored.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers."""
        return math.prod(self.shape) * self.encoding.stored.itemsize

    @property
    def shards(self) -> int:
        """How many files hold it."""
        return -(-self.images // self.shard_rows)

    @property
    def shard_blocks(self) -> int:
        """Blocks of rows in a full shard; a chunk is one block, one layer and one kind."""
        return self.shard_rows // self.chunk_rows

    def rows(self, shard: int) -> range:
        """The images of shard number `shard`."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.images))

    def plane(self, layer: int, kind: TokenKind) -> tuple[int, int]:
        """Where (layer, kind) lies: index along layers, index along kinds."""
        return self.layers.index(layer), self.kinds.index(kind)

    def blocks(self, shard: int) -> Iterator[range]:
        """The rows of a shard, a chunk at a time."""
        rows = self.rows(shard)
        for start in range(rows.start, rows.stop, self.chunk_rows):
            yield range(start, min(start + self.chunk_rows, rows.stop))


def _power_of_two(at_least: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << max(at_least - 1, 0).bit_length()
