"""The split of train into fitted and validation images, and few-shot draws."""

import numpy as np

from mlfusion.errors import BadData
from mlfusion.probing.targets import Target
from mlfusion.probing.training.batches import stream
from mlfusion.shapes import Int, Shaped

VALIDATION = 0.2  # share of train that is held out for the choice


def split(
    labels: Shaped[np.ndarray, " N"], *, seed: int
) -> tuple[Int[np.ndarray, " fitted"], Int[np.ndarray, " held"]]:
    """Stratified split of the images into (fitted, held out), both ascending.

    The share `VALIDATION` of every class is held out, rounded, but at least one image and never all: scikit-learn's
    splitters refuse data with fewer images to hold out than classes, which is the few-shot case. Each class that occurs needs
    two images.
    """
    random = np.random.default_rng(stream("split", seed))
    held_out = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(1, round(VALIDATION * len(rows))), len(rows) - 1)
        held_out.append(random.permutation(rows)[:count])
    held = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held), held


def draw(labels: Shaped[np.ndarray, "N ..."], shots: int, *, target: Target, seed: int) -> Int[np.ndarray, " rows"]:
    """Rows of `shots` images of each class, ascending, drawn by the seed; more shots contain fewer shots of the same seed.

    Raises:
        BadData: the labels are not classes, or a class has fewer images.
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
    return np.sort(
        np.concatenate([random.permutation(np.flatnonzero(labels == c))[:shots] for c in range(target.outputs)])
    )
