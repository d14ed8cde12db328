"""Measures the values of 16-bit images: the window of a data set, and whether a data set needs one."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mlfusion.datasets.images import Decoder
from mlfusion.datasets.split import Split
from mlfusion.errors import BadData, BadImage
from mlfusion.system.progress import track

logger = logging.getLogger(__name__)

SHARE_OUTSIDE = 0.001  # share of the pixels that may lie below the window, and above it
SAMPLED = 4  # first images, whose depth is looked at before an extraction


def measure_window(split: Split, name: str) -> tuple[int, int]:
    """The values between which all but a thousandth of the pixels on each side lie, of all 16-bit images of a split.

    Single hot or dead pixels do not decide, as they would with the least and the greatest value. The values depend on the
    images alone, not on their order. Images that cannot be read are left out.

    Raises:
        BadData: no image is grey with 16 bits, or all have one value.
    """
    counts = np.zeros(65536, np.int64)
    workers = min(8, (os.cpu_count() or 1) + 1)
    with track(f"measuring the window of {name}", len(split), "images") as bar, ThreadPoolExecutor(workers) as pool:
        for one in pool.map(lambda row: _histogram(split, row), range(len(split))):
            counts += 0 if one is None else one
            bar.advance()
    if not counts.any():
        raise BadData(f"{name}: no image of train is grey with 16 bits, so that there is no --window to measure")
    below, total = counts.cumsum(), counts.sum()
    low = int(np.searchsorted(below, SHARE_OUTSIDE * total, "right"))
    high = int(np.searchsorted(below, total - SHARE_OUTSIDE * total, "left"))
    if low >= high:
        raise BadData(f"{name}: nearly every pixel of train has the value {low}; give --window LOW,HIGH")
    logger.warning("%s: --window auto is %d,%d, measured on train", name, low, high)
    return low, high


def _histogram(split: Split, row: int) -> np.ndarray | None:
    """[65536] numbers of pixels; None for an image of 8 bits, or one that cannot be read."""
    assert isinstance(split.decode, Decoder)
    with split.at_work(row):
        try:
            values, bits = split.decode.values(split.read(row))
        except BadImage:
            return None
        return np.bincount(values.ravel(), minlength=65536) if bits == 16 and values.ndim == 2 else None


def report_depth(name: str, split: Split) -> None:
    """Report in one line that images have 16 bits of which only the high byte is used; the first images decide."""
    if not isinstance(split.decode, Decoder):
        return
    for row in range(min(SAMPLED, len(split))):
        try:
            bits = split.decode.bits(split.read(row))
        except BadData:
            continue
        if bits == 16:
            logger.warning(
                "%s, split %s: images of 16 bits, of which the high byte is used; see `mlfusion data --check`, and give "
                "--window auto or --window LOW,HIGH for another range",
                name,
                split.name,
            )
            return
