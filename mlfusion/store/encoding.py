"""Storage types of tokens: float16, bfloat16, float32, or int8 with a scale per token.

NumPy and Zarr have no bfloat16, so its bits are stored as uint16. An int8 token of D numbers is stored as D integers in
-127..127, followed by the four bytes of the float32 scale that they are multiplied with (little-endian). In every encoding
the fill value of a missing part decodes to NaN, never to plausible numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlfusion.shapes import Bool, Float, Num
from mlfusion.specs.identity import Dtype

INT8_MAX = 127  # -128 is left unused so that the range is symmetric
SCALE_BYTES = 4
CHECK_ITEMS = 1 << 17  # numbers in one comparison, so few that they stay in a core's cache


@dataclass(frozen=True)
class Encoding:
    """Conversion between floating-point numbers and stored ones."""

    stored: np.dtype  # in a shard, little-endian
    numbers: np.dtype  # of a reader's results
    fill: int | str  # Zarr's fill value for a missing part
    encode: Callable[[np.ndarray], np.ndarray]  # [..., D] floats → [..., D + extra] stored
    decode: Callable[[np.ndarray], np.ndarray]  # the inverse, to `numbers`
    finite: Callable[[np.ndarray], np.ndarray]  # [..., D + extra] stored → [...], whether every number is finite
    extra: int = 0  # stored columns of a vector besides its D

    def vector_bytes(self, width: int) -> int:
        """Stored bytes of a token of `width` channels."""
        return (width + self.extra) * self.stored.itemsize

    def blank(self) -> np.ndarray:
        """The stored value of a row without tokens."""
        return np.array(np.nan if self.fill == "NaN" else self.fill, self.stored)


def _floats(name: Dtype) -> Encoding:
    kind = np.dtype(name).newbyteorder("<")

    def encode(tokens: Float[np.ndarray, "*N D"]) -> Float[np.ndarray, "*N D"]:
        with np.errstate(over="ignore"):  # overflow becomes infinite, which `finite` finds
            return tokens.astype(kind, copy=False)

    infinity = int(np.array(np.inf, kind).view(f"<u{kind.itemsize}"))
    return Encoding(kind, kind, "NaN", encode, lambda stored: stored, lambda stored: _finite(stored, infinity))


def _finite(stored: Num[np.ndarray, "*N D"], infinity: int) -> Bool[np.ndarray, "*N"]:
    """Whether floats are finite. Their bits are compared as integers, which is faster: infinity and NaN are the largest."""
    sign = 1 << 8 * stored.itemsize - 1
    bits = np.ascontiguousarray(stored).view(f"<u{stored.itemsize}")
    signed = bits.view(f"<i{stored.itemsize}")
    pieces = [slice(start, start + CHECK_ITEMS) for start in range(0, bits.size, CHECK_ITEMS)]
    flat, flat_signed = bits.reshape(-1), signed.reshape(-1)
    if all(flat_signed[piece].max() < infinity and flat[piece].max() < sign + infinity for piece in pieces):
        return np.ones(stored.shape[:-1], bool)
    return (signed.max(-1) < infinity) & (bits.max(-1) < sign + infinity)


def _to_bfloat16(tokens: Float[np.ndarray, "*N D"]) -> Num[np.ndarray, "*N D"]:
    """Round to nearest, ties to even."""
    bits = np.ascontiguousarray(tokens, "<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding must not turn a NaN's bits into those of a number.
    return np.where(np.isnan(tokens), 0x7FC0, rounded).astype("<u2")


def _to_int8(tokens: Float[np.ndarray, "*N D"]) -> Num[np.ndarray, "*N D+4"]:
    tokens = np.asarray(tokens, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.abs(tokens).max(-1, keepdims=True) / np.float32(INT8_MAX)
        rounded = np.rint(tokens / np.where(scale > 0, scale, 1)).clip(-INT8_MAX, INT8_MAX)
        integers = np.nan_to_num(rounded).astype(np.int8)
    return np.concatenate([integers, np.ascontiguousarray(scale, "<f4").view(np.int8)], -1)


def _scale(stored: Num[np.ndarray, "*N columns"]) -> Float[np.ndarray, "*N 1"]:
    return np.ascontiguousarray(stored[..., -SCALE_BYTES:]).view("<f4")


ENCODINGS: dict[Dtype, Encoding] = {
    "float16": _floats("float16"),
    "bfloat16": Encoding(
        stored=np.dtype("<u2"),
        numbers=np.dtype("<f4"),
        fill=0xFFFF,
        encode=_to_bfloat16,
        decode=lambda stored: (stored.astype("<u4") << 16).view("<f4"),
        finite=lambda stored: _finite(stored, 0x7F80),
    ),
    "float32": _floats("float32"),
    "int8": Encoding(
        stored=np.dtype("i1"),
        numbers=np.dtype("<f4"),
        fill=-1,  # as a scale, four bytes of 0xFF are NaN
        encode=_to_int8,
        decode=lambda stored: stored[..., :-SCALE_BYTES] * _scale(stored),
        finite=lambda stored: np.isfinite(_scale(stored)[..., 0]),
        extra=SCALE_BYTES,
    ),
}
