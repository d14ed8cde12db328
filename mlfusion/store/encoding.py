"""Storage types of tokens: float16, bfloat16, float32, or 8 bits with a scale per token.

NumPy and Zarr have no bfloat16, so its 16 bits are stored in a uint16. In 8 bits a vector of D numbers is stored as D integers
in -127..127, followed by the float32 scale that they are multiplied with (four bytes, little-endian): a vector and its scale
cannot be separated. In every encoding the fill value of a missing part decodes to NaN, never to plausible numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlfusion.shapes import Bool, Float, Num
from mlfusion.specs.identity import Dtype

INT8_MAX = 127  # -128 is left unused so that the range is symmetric
SCALE_BYTES = 4
CHECK_ITEMS = 1 << 17  # compared at a time: twice, while they are in a core's cache


@dataclass(frozen=True)
class Encoding:
    """Conversion between floating-point numbers and stored ones."""

    stored: np.dtype  # little-endian, as the shards hold it
    numbers: np.dtype  # what reading gives
    fill: int | str  # Zarr's fill value for a missing part
    encode: Callable[[np.ndarray], np.ndarray]  # [..., D] floats → [..., D + extra] stored
    decode: Callable[[np.ndarray], np.ndarray]  # the inverse, to `numbers`
    finite: Callable[[np.ndarray], np.ndarray]  # [..., D + extra] stored → [...], whether every number is finite
    extra: int = 0  # stored columns of a vector in addition to its D

    @property
    def plain(self) -> bool:
        """Whether numbers are stored as they are."""
        return self.stored == self.numbers

    def vector_bytes(self, width: int) -> int:
        """Bytes that a token of so many channels takes in the cache, before compression."""
        return (width + self.extra) * self.stored.itemsize

    def blank(self) -> np.ndarray:
        """The stored value of a row without tokens."""
        return np.array(np.nan if self.fill == "NaN" else self.fill, self.stored)


def _floats(name: Dtype) -> Encoding:
    kind = np.dtype(name).newbyteorder("<")

    def encode(tokens: Float[np.ndarray, "*N D"]) -> Float[np.ndarray, "*N D"]:
        with np.errstate(over="ignore"):  # overflow becomes infinite, and `finite` says so
            return tokens.astype(kind, copy=False)

    infinity = int(np.array(np.inf, kind).view(f"<u{kind.itemsize}"))
    return Encoding(kind, kind, "NaN", encode, lambda stored: stored, lambda stored: _finite(stored, infinity))


def _finite(stored: Num[np.ndarray, "*N D"], infinity: int) -> Bool[np.ndarray, "*N"]:
    """Whether floats are finite, by their bits: infinity and NaN are the largest of either sign; integers compare faster."""
    sign = 1 << 8 * stored.itemsize - 1
    bits = np.ascontiguousarray(stored).view(f"<u{stored.itemsize}")
    signed = bits.view(f"<i{stored.itemsize}")
    some = [slice(start, start + CHECK_ITEMS) for start in range(0, bits.size, CHECK_ITEMS)]
    one, other = bits.reshape(-1), signed.reshape(-1)
    if all(other[piece].max() < infinity and one[piece].max() < sign + infinity for piece in some):
        return np.ones(stored.shape[:-1], bool)
    return (signed.max(-1) < infinity) & (bits.max(-1) < sign + infinity)


def _to_bfloat16(tokens: Float[np.ndarray, "*N D"]) -> Num[np.ndarray, "*N D"]:
    """Rounded to nearest, halves to even."""
    bits = np.ascontiguousarray(tokens, "<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding must not turn a NaN's bits into those of a number.
    return np.where(np.isnan(tokens), 0x7FC0, rounded).astype("<u2")


def _from_bfloat16(stored: Num[np.ndarray, "*N D"]) -> Float[np.ndarray, "*N D"]:
    return (stored.astype("<u4") << 16).view("<f4")


def _to_int8(tokens: Float[np.ndarray, "*N D"]) -> Num[np.ndarray, "*N D+4"]:
    tokens = np.asarray(tokens, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.abs(tokens).max(-1, keepdims=True) / np.float32(INT8_MAX)
        whole = np.rint(tokens / np.where(scale > 0, scale, 1)).clip(-INT8_MAX, INT8_MAX)
        kept = np.nan_to_num(whole).astype(np.int8)
    return np.concatenate([kept, np.ascontiguousarray(scale, "<f4").view(np.int8)], -1)


def _scale(stored: Num[np.ndarray, "*N columns"]) -> Float[np.ndarray, "*N 1"]:
    return np.ascontiguousarray(stored[..., -SCALE_BYTES:]).view("<f4")


def _from_int8(stored: Num[np.ndarray, "*N columns"]) -> Float[np.ndarray, "*N columns-4"]:
    return stored[..., :-SCALE_BYTES] * _scale(stored)


ENCODINGS: dict[Dtype, Encoding] = {
    "float16": _floats("float16"),
    "bfloat16": Encoding(
        np.dtype("<u2"),
        np.dtype("<f4"),
        0xFFFF,
        _to_bfloat16,
        _from_bfloat16,
        lambda stored: _finite(stored, 0x7F80),
    ),
    "float32": _floats("float32"),
    "int8": Encoding(
        np.dtype("i1"),
        np.dtype("<f4"),
        -1,  # four bytes of 0xFF are a NaN for a scale
        _to_int8,
        _from_int8,
        lambda stored: np.isfinite(_scale(stored)[..., 0]),
        extra=SCALE_BYTES,
    ),
}
