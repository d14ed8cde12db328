"""Calibration and confusion of the predictions for the test images of one data set."""

from dataclasses import dataclass

import numpy as np

from mlfusion.statistics.measures import check


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
