"""Computes a part of a resized picture, equal to the bit to that part of PIL's resize, without computing the rest.

Source of the method: PIL's src/libImaging/Resample.c. A picture is resized along its rows first, then along its columns; the
columns of a tall picture that shrinks are first. Each pass rounds to bytes, and its coefficients are whole numbers of 2⁻²².
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from mlfusion.shapes import UInt8

PRECISION_BITS = 32 - 8 - 2

Part = tuple[int, int]
"""First row or column of a part, and their number."""

Kernel = Callable[[np.ndarray], np.ndarray]


def _bicubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(x)
    inner, outer = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, inner, np.where(x < 2.0, outer, 0.0))


def _hamming(x: np.ndarray) -> np.ndarray:
    angle = np.abs(x) * np.pi
    inner = np.sin(angle) / np.where(angle == 0, 1.0, angle) * (0.54 + 0.46 * np.cos(angle))
    return np.where(angle == 0, 1.0, np.where(np.abs(x) >= 1.0, 0.0, inner))


def _sinc(x: np.ndarray) -> np.ndarray:
    angle = x * np.pi
    return np.where(x == 0, 1.0, np.sin(angle) / np.where(x == 0, 1.0, angle))


KERNELS: dict[str, tuple[float, Kernel]] = {  # filter → its support, and its weight at a distance
    "box": (0.5, lambda x: np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)),
    "bilinear": (1.0, lambda x: np.where(np.abs(x) < 1.0, 1.0 - np.abs(x), 0.0)),
    "hamming": (1.0, _hamming),
    "bicubic": (2.0, _bicubic),
    "lanczos": (3.0, lambda x: np.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3), 0.0)),
}


def _resize_rows(
    pixels: UInt8[np.ndarray, "_ _ 3"], size: int, part: Part, resample: str
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Rows `part` of the picture whose rows are resized to the number `size`; its columns stay."""
    support, kernel = KERNELS[resample]
    scale = len(pixels) / size
    spread = max(scale, 1.0)
    rows = []
    for row in range(part[0], part[0] + part[1]):
        centre = (row + 0.5) * scale
        first = max(int(centre - support * spread + 0.5), 0)
        last = min(int(centre + support * spread + 0.5), len(pixels))
        weights = kernel((np.arange(first, last) - centre + 0.5) * (1.0 / spread))
        weights = weights / np.cumsum(weights)[-1] * (1 << PRECISION_BITS)
        whole = np.trunc(weights + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
        total = np.tensordot(whole, pixels[first:last].astype(np.int64), 1) + (1 << (PRECISION_BITS - 1))
        rows.append(np.clip(total >> PRECISION_BITS, 0, 255).astype(np.uint8))
    return np.stack(rows)


def resize_part(
    image: Image.Image, size: tuple[int, int], parts: tuple[Part, Part], resample: str
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Resize an RGB image to `size` (height, width), and return the part of it with these rows and columns.

    Only the longer side is computed in parts; PIL resizes the shorter one.
    """
    (height, width), (rows, columns) = size, parts
    filters = Image.Resampling[resample.upper()]
    if height < width:
        pixels = _resize_rows(np.asarray(image).transpose(1, 0, 2), width, columns, resample)
        whole = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 0, 2))).resize((columns[1], height), filters)
        return np.asarray(whole)[rows[0] : rows[0] + rows[1]]
    if height < image.height:  # PIL shrinks the columns of a tall picture first
        part = Image.fromarray(_resize_rows(np.asarray(image), height, rows, resample))
        return np.asarray(part.resize((width, rows[1]), filters))[:, columns[0] : columns[0] + columns[1]]
    reach = KERNELS[resample][0] + 1
    first = max(0, int(rows[0] * image.height / height - reach))
    last = min(image.height, int((rows[0] + rows[1]) * image.height / height + reach) + 1)
    pixels = np.zeros((image.height, width, 3), np.uint8)  # of the columns, only what these rows need is computed
    pixels[first:last] = np.asarray(image.crop((0, first, image.width, last)).resize((width, last - first), filters))
    return _resize_rows(pixels, height, rows, resample)[:, columns[0] : columns[0] + columns[1]]
