"""Resplits a split by a ratio and a seed: on every machine, and in any order, an image goes to the same part.

The images of each class are sorted by a hash of (seed, id) and assigned by share, so that the result does not depend on a
library's random numbers. Of a data set with groups, whole groups are sorted by a hash of (seed, group) and assigned.
"""

import numpy as np
import xxhash

from mlfusion.datasets.split import Split
from mlfusion.errors import BadData
from mlfusion.specs.grouping import NoPartition, assign
from mlfusion.specs.kinds import SPLIT_PARTS
from mlfusion.system.words import plural


def ratio_text(ratio: tuple[float, ...], seed: int, *, by_group: bool = False) -> str:
    """The canonical text of a ratio and seed, which is part of the key: '0.8/0.1/0.1 seed 0', or '… seed 0 by group'."""
    return "/".join(f"{share:.6g}" for share in ratio) + f" seed {seed}" + (" by group" if by_group else "")


def split_by_ratio(split: Split, ratio: tuple[float, ...], seed: int) -> dict[str, Split]:
    """Part name → part of the split, in the split's order; stratified by class, rarest label, or size of the number.

    Every part has an image of every class: BadData if a class has fewer images than there are parts. Each share is met within
    two images in every stratum, and within one image over all strata.

    Of a split with groups, every group goes to one part as a whole, see `specs.grouping.assign`: BadData if a class has images
    of fewer groups than there are parts.
    """
    part = _by_group(split, ratio, seed) if split.groups is not None else _by_image(split, ratio, seed)
    names = SPLIT_PARTS[len(ratio)]
    return {name: split.take(np.flatnonzero(part == i), name) for i, name in enumerate(names)}


def _by_group(split: Split, ratio: tuple[float, ...], seed: int) -> np.ndarray:
    """The part of each image [N], the same for all images of a group."""
    assert split.groups is not None
    names = sorted(set(split.groups))  # in an order that does not depend on that of the rows
    number = {name: i for i, name in enumerate(names)}
    hashes = np.array([_hash(seed, name) for name in names], np.uint64)
    stratum = np.empty(len(split), np.int64)
    for i, rows in enumerate(strata(split, seed)):
        stratum[rows] = i
    try:
        return assign(
            stratum,
            np.array([number[name] for name in split.groups]),
            ratio,
            np.argsort(np.argsort(hashes, kind="stable")),
            every=split.label_kind == "class",
        )
    except NoPartition as err:
        raise BadData(_too_few_groups(split, err, seed)) from err


def _too_few_groups(split: Split, err: NoPartition, seed: int) -> str:
    """The sentence about a class whose groups cannot be parted."""
    assert split.groups is not None
    if err.stratum is None:
        return f"there are {plural(err.groups, 'group')}, too few for {err.parts} parts; add groups, or ask for fewer parts"
    label = split.labels[strata(split, seed)[err.stratum][0]]
    count = len(set(split.groups))
    more = "; the classes share their groups" if err.groups >= err.parts else ""
    return (
        f"class {split.classes[label]!r} has images of {plural(err.groups, 'group')} (of {count:,} in all), too few to part "
        f"whole groups so that each of {err.parts} parts has every class{more}; add groups, leave the class out, or ask for "
        "fewer parts"
    )


def _hash(seed: int, name: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode())


def _by_image(split: Split, ratio: tuple[float, ...], seed: int) -> np.ndarray:
    """The part of each image [N]."""
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
    return part


def strata(split: Split, seed: int) -> list[np.ndarray]:
    """The rows of each stratum, sorted by the hash of (seed, id)."""
    hashes = np.array([_hash(seed, name) for name in split.ids], np.uint64)
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
