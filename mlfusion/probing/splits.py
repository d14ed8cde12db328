"""The split of train into fitted images and those that choose, folds, and few-shot draws; groups such as patients stay whole.

A probe that is chosen on images of the groups it was fitted to is chosen for knowing them again.
"""

from collections.abc import Sequence

import numpy as np
import xxhash

from mlfusion.errors import BadData
from mlfusion.probing.targets import OneClass, Target
from mlfusion.probing.training.batches import stream
from mlfusion.shapes import Int, Shaped
from mlfusion.specs.grouping import NoPartition, assign, in_turn
from mlfusion.system.words import plural

VALIDATION = 0.2  # share of train that is held out for the choice


def split(
    labels: Shaped[np.ndarray, " N"],
    *,
    seed: int,
    groups: Int[np.ndarray, " N"] | None = None,
    target: Target | None = None,
) -> tuple[Int[np.ndarray, " fitted"], Int[np.ndarray, " held"]]:
    """Stratified split of the images into (fitted, held out), both ascending.

    The share `VALIDATION` of every class is held out, rounded, but at least one image and never all: scikit-learn's
    splitters refuse data with fewer images to hold out than classes, which is the few-shot case. Each class that occurs needs
    two images.

    With `groups`, whole groups are held out, so that about this share of every stratum is; if `target` is one class per image,
    both sides have every class.

    Raises:
        BadData: whole groups cannot be parted in this way; says how many groups there are.
    """
    random = np.random.default_rng(stream("split", seed))
    if groups is not None:
        part = part_groups(labels, groups, (1 - VALIDATION, VALIDATION), random, target)
        return np.flatnonzero(part == 0), np.flatnonzero(part == 1)
    held_out = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(1, round(VALIDATION * len(rows))), len(rows) - 1)
        held_out.append(random.permutation(rows)[:count])
    held = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held), held


def folds(
    strata: Int[np.ndarray, " N"],
    count: int,
    *,
    seed: int,
    ids: Sequence[str] | None = None,
    groups: Int[np.ndarray, " N"] | None = None,
    target: Target | None = None,
) -> Int[np.ndarray, " N"]:
    """The fold 0..count-1 of each image, stratified; they follow from the seed and the ids, whatever the order of the images.

    Without groups the sizes of two folds differ by one image at most, in all and in each stratum. With groups, all images of
    a group are in one fold, see `part_groups`.

    Args:
        strata: the stratum of each image, such as its class.
        count: number of folds.
        seed: shuffles the images.
        ids: names of the images; None: their numbers.
        groups: the number of each image's group, such as a patient.
        target: names the classes in messages.

    Raises:
        BadData: there are fewer images than folds, or too few groups.
    """
    if groups is not None:
        return part_groups(strata, groups, [1 / count] * count, np.random.default_rng(stream("folds", seed)), target)
    if len(strata) < count:
        raise BadData(f"{len(strata)} images are too few for --folds {count}; allowed: 2 to {len(strata)}")
    names = [str(row) for row in range(len(strata))] if ids is None else ids
    hashes = np.array([xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()) for name in names], np.uint64)
    order = np.lexsort((np.array(names), hashes))
    order = order[np.argsort(strata[order], kind="stable")]
    fold_of = np.empty(len(strata), np.int64)
    fold_of[order] = np.arange(len(strata)) % count
    return fold_of


def part_groups(
    strata: Shaped[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    shares: Sequence[float],
    random: np.random.Generator,
    target: Target | None = None,
) -> Int[np.ndarray, " N"]:
    """The part of each image, whole groups, by shares; if `target` is one class per image, every part has every class.

    Raises:
        BadData: whole groups cannot be parted in this way; says how many groups there are.
    """
    names, codes = np.unique(groups, return_inverse=True)
    try:
        every = isinstance(target, OneClass)
        return assign(strata, codes, shares, random.permutation(len(names)), every=every)
    except NoPartition as err:
        one = "training images" if err.stratum is None or target is None else f"class {target.name_of(err.stratum)}"
        shared = "; the classes share their groups" if err.groups >= err.parts else ""
        raise BadData(
            f"{one} {'are' if one == 'training images' else 'has training images'} of {plural(err.groups, 'group')} (of "
            f"{len(names):,} in all); allowed: enough to part whole groups so that each of {err.parts} parts has every "
            f"class{shared}. Add groups, leave the class out, or extract without groups"
        ) from err


def draw(
    labels: Shaped[np.ndarray, "N ..."],
    shots: int,
    *,
    target: Target,
    seed: int,
    groups: Int[np.ndarray, " N"] | None = None,
) -> Int[np.ndarray, " rows"]:
    """Rows of `shots` images of each class, ascending, drawn by the seed; more shots contain fewer shots of the same seed.

    With `groups`, one image of each group is drawn in turn: the images are of as many groups as there can be, two or more, so
    that images of other groups can be held out.

    Raises:
        BadData: the labels are not classes, or a class has fewer images, or images of one group only.
    """
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise BadData("few-shot training needs one class an image; leave --shots out for other labels")
    counts = np.bincount(labels, minlength=target.outputs)
    if counts.min() < shots:
        scarce = int(counts.argmin())
        raise BadData(
            f"class {target.name_of(scarce)} has {counts[scarce]} training image{'' if counts[scarce] == 1 else 's'}; allowed: "
            f"as many as --shots {shots} asks for, or more. Ask for at most {counts.min()}"
        )
    random = np.random.default_rng(stream("shots", seed))
    if groups is not None:
        of_class = [np.flatnonzero(labels == c) for c in range(target.outputs)]
        group_counts = [len(np.unique(groups[rows])) for rows in of_class]
        if min(group_counts) < 2:
            scarce = int(np.argmin(group_counts))
            raise BadData(
                f"class {target.name_of(scarce)} has {counts[scarce]} training images of one group; allowed: of two groups or "
                "more, one to fit and one to choose on. Add groups of that class or leave it out"
            )
        return np.sort(np.concatenate([in_turn(rows, groups, random)[:shots] for rows in of_class]))
    return np.sort(
        np.concatenate([random.permutation(np.flatnonzero(labels == c))[:shots] for c in range(target.outputs)])
    )
