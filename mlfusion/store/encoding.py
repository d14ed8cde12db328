"""How the cache keeps a token's vector: as float16, bfloat16, float32, or in 8 bits with a scale.

NumPy and Zarr have no bfloat16, so it is kept as its 16 bits in a uint16. In 8 bits a vector of D numbers is D whole numbers
in -127..127 and behind them, in four more bytes, the float32 that they are multiplied with (little-endian): a vector and
its scale cannot part ways. In every encoding the fill value of a missing part decodes to NaN, never to plausible numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlfusion.specs import Dtype

LARGEST = 127  # of an 8-bit number; -128 is left unused so that the range is symmetric
SCALE_BYTES = 4
PIECE = 1 << 17  # numbers that are looked at twice while they are in a core's cache


@dataclass(frozen=True)
class Encoding:
    """Numbers on disk and back."""

    stored: np.dtype  # little-endian, as the shards hold it
    numbers: np.dtype  # what reading gives
    extra: int  # stored columns of a vector beyond its D
    fill: int | str  # of a missing part, in Zarr's words
    encode: Callable[[np.ndarray], np.ndarray]  # [..., D] floats → [..., D + extra] stored
    decode: Callable[[np.ndarray], np.ndarray]  # the inverse, to `numbers`
    finite: Callable[[np.ndarray], np.ndarray]  # [..., D + extra] stored → [...], whether every number could be kept

    @property
    def plain(self) -> bool:
        """Whether stored numbers are the numbers themselves."""
        return self.stored == self.numbers

    def vector_bytes(self, width: int) -> int:
        """Bytes that a token of so many channels takes in the cache, before compression."""
        return (width + self.extra) * self.stored.itemsize

    def blank(self) -> np.ndarray:
        """The stored value of a row that holds nothing."""
        return np.array(np.nan if self.fill == "NaN" else self.fill, self.stored)


def _floats(name: Dtype) -> Encoding:
    kind = np.dtype(name).newbyteorder("<")

    def encode(tokens: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # overflow becomes infinite, and `finite` says so
            return tokens.astype(kind, copy=False)

    infinity = int(np.array(np.inf, kind).view(f"<u{kind.itemsize}"))
    return Encoding(kind, kind, 0, "NaN", encode, lambda stored: stored, lambda stored: _finite(stored, infinity))


def _finite(stored: np.ndarray, infinity: int) -> np.ndarray:
    """[...] of [..., D] floats, by their bits: infinity and NaN are the largest of either sign, and integers compare faster."""
    sign = 1 << 8 * stored.itemsize - 1
    bits = np.ascontiguousarray(stored).view(f"<u{stored.itemsize}")
    signed = bits.view(f"<i{stored.itemsize}")
    some = [slice(start, start + PIECE) for start in range(0, bits.size, PIECE)]
    one, other = bits.reshape(-1), signed.reshape(-1)
    if all(other[piece].max() < infinity and one[piece].max() < sign + infinity for piece in some):
        return np.ones(stored.shape[:-1], bool)
    return (signed.max(-1) < infinity) & (bits.max(-1) < sign + infinity)


def _to_bfloat16(tokens: np.ndarray) -> np.ndarray:
    """Rounded to nearest, halves to even."""
    bits = np.ascontiguousarray(tokens, "<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding must not turn a NaN's bits into those of a number.
    return np.where(np.isnan(tokens), 0x7FC0, rounded).astype("<u2")


def _from_bfloat16(stored: np.ndarray) -> np.ndarray:
    return (stored.astype("<u4") << 16).view("<f4")


def _to_int8(tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.abs(tokens).max(-1, keepdims=True) / np.float32(LARGEST)
        whole = np.rint(tokens / np.where(scale > 0, scale, 1)).clip(-LARGEST, LARGEST)
        kept = np.nan_to_num(whole).astype(np.int8)
    return np.concatenate([kept, np.ascontiguousarray(scale, "<f4").view(np.int8)], -1)


def _scale(stored: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(stored[..., -SCALE_BYTES:]).view("<f4")


def _from_int8(stored: np.ndarray) -> np.ndarray:
    return stored[..., :-SCALE_BYTES] * _scale(stored)


ENCODINGS: dict[Dtype, Encoding] = {
    "float16": _floats("float16"),
    "bfloat16": Encoding(
        np.dtype("<u2"),
        np.dtype("<f4"),
        0,
        0xFFFF,
        _to_bfloat16,
        _from_bfloat16,
        lambda stored: _finite(stored, 0x7F80),
    ),
    "float32": _floats("float32"),
    "int8": Encoding(
        np.dtype("i1"),
        np.dtype("<f4"),
        SCALE_BYTES,
        -1,  # four bytes of 0xFF are a NaN for a scale
        _to_int8,
        _from_int8,
        lambda stored: np.isfinite(_scale(stored)[..., 0]),
    ),
}
