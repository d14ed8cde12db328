"""Splits of one's own, cut from one split by a seed: the same images on every machine, whatever order they come in.

In every class the images are put in the order of a hash of (seed, id) and dealt out by share, so that no library's random
numbers are in the identity.
"""

import math
import re

import numpy as np
import xxhash

from mlfusion.datasets.split import Split
from mlfusion.errors import BadData

PARTS = {2: ("train", "test"), 3: ("train", "validation", "test")}


def parse(words: str) -> tuple[float, ...]:
    """'0.8/0.1/0.1', '80/20' → shares that sum to 1.

    Raises:
        BadData: not two or three positive numbers, or of a sum that is neither 1 nor 100.
    """
    parts = words.split("/")
    if len(parts) in PARTS and all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", part.strip()) for part in parts):
        shares = [float(part) for part in parts]
        total = math.fsum(shares)
        if min(shares) > 0 and any(math.isclose(total, whole, rel_tol=1e-6) for whole in (1, 100)):
            return tuple(share / total for share in shares)
    raise BadData(
        f"--carve {words!r}; allowed: the shares of train/test or train/validation/test, such as 0.8/0.2 or 80/10/10"
    )


def called(shares: tuple[float, ...], seed: int) -> str:
    """The one way to write a carve: '0.8/0.1/0.1 seed 0'."""
    return "/".join(f"{share:.6g}" for share in shares) + f" seed {seed}"


def cut(split: Split, shares: tuple[float, ...], seed: int) -> dict[str, Split]:
    """Parts of a split, each in the split's own order and stratified: by class, an image's rarest label, or the number's size.

    Every part has an image of every class. Where that asks for no more, shares are met to an image or two in every stratum
    and to one over all.

    Raises:
        BadData: a class has fewer images than there are parts.
    """
    part = np.full(len(split), -1)
    owed = np.zeros(len(shares))  # fractions of an image that earlier strata could not give
    for rows in strata(split, seed):
        exact = owed + np.array(shares) * len(rows)
        counts = np.floor(np.array(shares) * len(rows) + 1e-9).astype(int)
        while counts.sum() < len(rows):
            counts[np.argmax(exact - counts)] += 1
        if split.target == "class":
            _one_each(counts, split.classes[split.labels[rows[0]]])
        owed = exact - counts
        part[rows] = np.repeat(np.arange(len(shares)), counts)
    names = PARTS[len(shares)]
    return {name: split.take(np.flatnonzero(part == i), name) for i, name in enumerate(names)}


def strata(split: Split, seed: int) -> list[np.ndarray]:
    """Rows that are dealt out together, each stratum in the order of the seed."""
    hashes = np.array([xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()) for name in split.ids], np.uint64)
    shuffled = np.lexsort((np.array(split.ids), hashes)) if len(split) else np.arange(0)
    if split.target == "number":
        ranked = shuffled[np.argsort(split.labels[shuffled], kind="stable")]
        # Neighbours by size go to different parts; within twenty of them the seed decides which.
        return [np.array(sorted(some, key=lambda row: hashes[row])) for some in _runs(ranked, 20)]
    keys = split.labels if split.target == "class" else _rarest(split.labels)
    return [shuffled[keys[shuffled] == key] for key in np.unique(keys)]


def _runs(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return np.array_split(rows, max(1, len(rows) // size)) if len(rows) else []


def _rarest(labels: np.ndarray) -> np.ndarray:
    """Of each image's labels [N, C] the one that fewest images have; -1 where it has none."""
    rank = np.argsort(np.argsort(labels.sum(0), kind="stable"))
    return np.where(labels.any(1), np.where(labels > 0, rank, len(rank)).argmin(1), -1)


def _one_each(counts: np.ndarray, name: str) -> None:
    """Give every part an image of this class, of the part that has most."""
    if counts.sum() < len(counts):
        raise BadData(
            f"class {name!r} has {counts.sum()} image{'' if counts.sum() == 1 else 's'}, too few for {len(counts)} parts; "
            "add images, leave the class out, or carve fewer parts"
        )
    for i in np.flatnonzero(counts == 0):
        counts[counts.argmax()] -= 1
        counts[i] += 1
