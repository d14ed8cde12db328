"""Calibration, confusion and scores by class of the predictions for the test images of one data set."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from mlfusion.statistics.measures import auroc, check
from mlfusion.statistics.resampling import Units
from mlfusion.statistics.uncertainty import wilson


@dataclass(frozen=True)
class Bin:
    """Images whose most probable class has a probability in (low, high]."""

    low: float
    high: float
    images: int
    confidence: float | None  # mean probability of that class; None without images
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """The calibration of probabilities: accuracy compared with confidence."""

    ece: float  # expected calibration error: mean over images of |confidence - accuracy| of their bin
    bins: tuple[Bin, ...]  # the reliability curve


def calibration(labels: np.ndarray, probabilities: np.ndarray, *, bins: int = 15) -> Calibration:
    """The expected calibration error in bins of equal width (Guo et al. 2017, arXiv 1706.04599), and the reliability curve.

    `labels` are classes [N], `probabilities` [N, C].
    """
    check(labels, probabilities)
    top = probabilities.max(1).astype(np.float64)
    right = probabilities.argmax(1) == labels
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, top, side="left") - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    confidence, accuracy = (np.bincount(bin_of, values, bins) / np.maximum(count, 1) for values in (top, right))
    columns = (column.tolist() for column in (edges[:-1], edges[1:], count, confidence, accuracy))
    return Calibration(
        float((count * np.abs(confidence - accuracy)).sum() / len(labels)),
        tuple(
            Bin(low, high, images, mean if images else None, share if images else None)
            for low, high, images, mean, share in zip(*columns, strict=True)
        ),
    )


def confusion(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Number of images by true class (rows) and predicted class (columns), [C, C] int64."""
    from sklearn.metrics import confusion_matrix

    check(labels, probabilities)
    return confusion_matrix(labels, probabilities.argmax(1), labels=np.arange(probabilities.shape[1]))


class ClassScores(msgspec.Struct, frozen=True):
    """One class or label against the rest; means over seeds, None without images on one of the two sides."""

    name: str = msgspec.field(name="class")
    images: int  # test images of the class
    recall: float | None  # share of its images that are taken for it: the sensitivity to this class
    low: float | None  # Wilson's interval of the recall
    high: float | None
    specificity: float | None  # share of the other images that are not taken for it
    auroc: float | None  # area under the ROC curve against the rest


def by_class(
    labels: np.ndarray,
    predictions: Sequence[np.ndarray],
    classes: Sequence[str],
    *,
    groups: np.ndarray | None = None,
    level: float = 0.95,
    widening: float = 1.0,
) -> tuple[ClassScores, ...]:
    """Recall, specificity and area under the ROC curve of each class against the rest.

    An image is taken for its most probable class; of several labels it gets those above one half. The interval of a recall is
    Wilson's (1927) for the number of the class's images, or of their groups.

    Args:
        labels: classes [N] in 0..C-1, or several labels per image, 0 or 1 [N, C].
        predictions: probabilities [N, C], one array per seed.
        classes: the names of the C classes or labels.
        groups: the group of each image [N]; None: every image is its own group.
        level: share of such intervals that contain the true value.
        widening: of the intervals over folds, see `Bootstrap.widening`.

    Raises:
        BadData: labels and predictions do not match.
    """
    counts = [_hits(labels, of_seed) for of_seed in predictions]
    owned, others = counts[0][1], len(labels) - counts[0][1]
    units = Units.of_groups(groups, labels)
    areas = [auroc(labels, of_seed)(np.ones((1, len(labels))))[0] for of_seed in predictions]
    found = []
    for c, name in enumerate(classes):
        recall = specificity = area = low = high = None
        if owned[c]:
            recall = float(np.mean([hits[c] for hits, _, _ in counts]) / owned[c])
            members = labels[:, c] > 0 if labels.ndim == 2 else labels == c
            low, high = wilson(recall, np.array([len(np.unique(units.of[members])) / widening**2]), level)
        if others[c]:
            specificity = 1 - float(np.mean([taken[c] - hits[c] for hits, _, taken in counts]) / others[c])
        if owned[c] and others[c]:
            area = float(np.mean([of_seed[c] for of_seed in areas]))
        found.append(ClassScores(name, int(owned[c]), recall, low, high, specificity, area))
    return tuple(found)


def _hits(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The number of images that have each class and are taken for it, that have it, and that are taken for it [C]."""
    if labels.ndim == 2:
        check(labels, probabilities)
        taken = probabilities > 0.5
        return (labels * taken).sum(0), labels.sum(0), taken.sum(0)
    counts = confusion(labels, probabilities)
    return np.diag(counts), counts.sum(1), counts.sum(0)
