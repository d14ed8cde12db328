"""Resplits a split by a ratio and a seed: on every machine, and in any order, an image goes to the same part.

The images of each class are sorted by a hash of (seed, id) and assigned by share, so that the result does not depend on a
library's random numbers.
"""

import numpy as np
import xxhash

from mlfusion.datasets.split import Split
from mlfusion.errors import BadData
from mlfusion.specs.kinds import SPLIT_PARTS


def ratio_text(ratio: tuple[float, ...], seed: int) -> str:
    """The canonical text of a ratio and seed, which is part of the key: '0.8/0.1/0.1 seed 0'."""
    return "/".join(f"{share:.6g}" for share in ratio) + f" seed {seed}"


def split_by_ratio(split: Split, ratio: tuple[float, ...], seed: int) -> dict[str, Split]:
    """Part name → part of the split, in the split's order; stratified by class, rarest label, or size of the number.

    Every part has an image of every class: BadData if a class has fewer images than there are parts. Each share is met within
    two images in every stratum, and within one image over all strata.
    """
    part = np.full(len(split), -1)
    carried = np.zeros(len(ratio))  # fractions of an image carried over from earlier strata
    for rows in strata(split, seed):
        exact = carried + np.array(ratio) * len(rows)
        counts = np.floor(np.array(ratio) * len(rows) + 1e-9).astype(int)
        while counts.sum() < len(rows):
            counts[np.argmax(exact - counts)] += 1
        if split.label_kind == "class":
            _fill_empty_parts(counts, split.classes[split.labels[rows[0]]])
        carried = exact - counts
        part[rows] = np.repeat(np.arange(len(ratio)), counts)
    names = SPLIT_PARTS[len(ratio)]
    return {name: split.take(np.flatnonzero(part == i), name) for i, name in enumerate(names)}


def strata(split: Split, seed: int) -> list[np.ndarray]:
    """The rows of each stratum, sorted by the hash of (seed, id)."""
    hashes = np.array([xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()) for name in split.ids], np.uint64)
    shuffled = np.lexsort((np.array(split.ids), hashes)) if len(split) else np.arange(0)
    if split.label_kind == "number":
        ranked = shuffled[np.argsort(split.labels[shuffled], kind="stable")]
        # Each chunk of twenty similar numbers is shuffled, so that every part gets numbers of all sizes.
        chunks = np.array_split(ranked, max(1, len(ranked) // 20))
        return [chunk[np.argsort(hashes[chunk], kind="stable")] for chunk in chunks]
    keys = split.labels if split.label_kind == "class" else _rarest_labels(split.labels)
    return [shuffled[keys[shuffled] == key] for key in np.unique(keys)]


def _rarest_labels(labels: np.ndarray) -> np.ndarray:
    """Each image's rarest label, from labels [N, C]; -1 for an image without labels."""
    rank = np.argsort(np.argsort(labels.sum(0), kind="stable"))
    return np.where(labels.any(1), np.where(labels > 0, rank, len(rank)).argmin(1), -1)


def _fill_empty_parts(counts: np.ndarray, name: str) -> None:
    """Move an image of this class from the largest part to each empty one."""
    if counts.sum() < len(counts):
        raise BadData(
            f"class {name!r} has {counts.sum()} image{'' if counts.sum() == 1 else 's'}, too few for {len(counts)} parts; "
            "add images, leave the class out, or ask for fewer parts"
        )
    for i in np.flatnonzero(counts == 0):
        counts[counts.argmax()] -= 1
        counts[i] += 1
