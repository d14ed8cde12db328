"""Metrics over the test images of one data set as functions of weights; calibration and confusion of the same images.

A resample of the bootstrap is a row of whole-numbered weights, one per image, and a thousand resamples are scored by one
product with a sparse matrix (`uncertainty`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mlfusion.errors import BadData, UnknownName

TOP = 5
_TINY = 6e-8  # the smallest float16, in which probabilities are saved

Measure = Callable[[np.ndarray], np.ndarray]
"""Weights of the images [B, N] → scores [B]; all ones is the score itself."""

Predictions = np.ndarray | Sequence[np.ndarray]
"""Probabilities [N, C], or numbers [N]; or a sequence of them, one per seed."""


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


# --- metrics as functions of weights ---------------------------------------------------------------------------------


def measure(labels: np.ndarray, predictions: np.ndarray, metric: str) -> Measure:
    """A metric of these images as a function of their weights.

    Raises:
        BadData: labels and predictions do not match.
        UnknownName: there is no such metric for such labels.
    """
    check(labels, predictions)
    known = METRICS["number" if labels.dtype.kind == "f" else "labels" if labels.ndim == 2 else "class"]
    if metric not in known:
        raise UnknownName("metric", metric, known)
    return known[metric](labels, predictions)


def _by_class(classes: np.ndarray, count: int) -> Measure:
    """Weights of the images [B, N] → weight of each class [B, C]."""
    from scipy.sparse import csr_array

    images = len(classes)
    members = csr_array((np.ones(images), classes, np.arange(images + 1)), shape=(images, count))
    return lambda weights: (members.T @ weights.T).T


def _balanced_accuracy(labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    truth = _by_class(labels, probabilities.shape[1])
    right = probabilities.argmax(1) == labels

    def score(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.nanmean(truth(weights * right) / truth(weights), axis=1)

    return score


def _macro_f1(labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    predicted = probabilities.argmax(1)
    truth, guesses = (_by_class(classes, probabilities.shape[1]) for classes in (labels, predicted))
    right, present = predicted == labels, np.unique(labels)

    def score(weights: np.ndarray) -> np.ndarray:
        both = truth(weights) + guesses(weights)
        with np.errstate(invalid="ignore"):
            return np.nanmean((2 * truth(weights * right) / both)[:, present], axis=1)

    return score


def _average(values: np.ndarray) -> Measure:
    values = values.astype(np.float64)
    return lambda weights: weights @ values / weights.sum(1)


def _own_class(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Probability of each image's own class [N, 1]."""
    return np.take_along_axis(probabilities, labels[:, None], axis=1)


def _mean_average_precision(labels: np.ndarray, scores: np.ndarray) -> Measure:
    """The area under precision against recall without interpolation; images with the same score count together."""
    orders, ends = [], []
    for column in scores.T:
        order = np.argsort(-column, kind="stable")
        ordered = column[order]
        last = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
        orders.append(order)
        ends.append(last[np.searchsorted(last, np.arange(len(ordered)))])  # the last image with the same score

    def score(weights: np.ndarray) -> np.ndarray:
        by_label = np.full((len(weights), labels.shape[1]), np.nan)
        for c, (order, end) in enumerate(zip(orders, ends, strict=True)):
            w = weights[:, order]
            positive = w * labels[order, c]
            hits, counted = positive.cumsum(1)[:, end], w.cumsum(1)[:, end]
            precision = np.divide(hits, counted, out=np.zeros_like(hits), where=counted > 0)
            total = positive.sum(1)
            np.divide((positive * precision).sum(1), total, out=by_label[:, c], where=total > 0)
        return np.nanmean(by_label, axis=1)

    return score


def _errors(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return labels - predicted.reshape(len(predicted)).astype(np.float64)


def _r2(labels: np.ndarray, predicted: np.ndarray) -> Measure:
    truth = labels.astype(np.float64)
    squares = _errors(truth, predicted) ** 2

    def score(weights: np.ndarray) -> np.ndarray:
        mean = weights @ truth / weights.sum(1)
        return 1 - weights @ squares / (weights @ truth**2 - weights.sum(1) * mean**2)

    return score


def _rmse(labels: np.ndarray, predicted: np.ndarray) -> Measure:
    mean = _average(_errors(labels, predicted) ** 2)
    return lambda weights: np.sqrt(mean(weights))


METRICS: dict[str, dict[str, Callable[[np.ndarray, np.ndarray], Measure]]] = {
    "class": {
        "balanced_accuracy": _balanced_accuracy,
        "accuracy": lambda labels, probabilities: _average(probabilities.argmax(1) == labels),
        "top5": lambda labels, p: _average((p > _own_class(labels, p)).sum(1) < TOP),
        "macro_f1": _macro_f1,
        "loss": lambda labels, p: _average(-np.log(np.maximum(_own_class(labels, p)[:, 0].astype(np.float64), _TINY))),
    },
    "labels": {"mean_average_precision": _mean_average_precision},
    "number": {
        "r2": _r2,
        "mae": lambda labels, predicted: _average(np.abs(_errors(labels, predicted))),
        "rmse": _rmse,
    },
}
"""{kind of labels: {metric: measure}}: one class per image, several labels, or a number."""


def mean_measure(labels: np.ndarray, predictions: Predictions, metric: str) -> Measure:
    """The mean of a metric over seeds, as a function of weights."""
    seeds = [predictions] if isinstance(predictions, np.ndarray) else predictions
    if not seeds:
        raise BadData("no predictions; allowed: those of one seed or more")
    scores = [measure(labels, of_seed, metric) for of_seed in seeds]
    return scores[0] if len(scores) == 1 else lambda weights: np.mean([score(weights) for score in scores], axis=0)


def full_score(score: Measure, labels: np.ndarray) -> float:
    """The score of all images, with equal weights."""
    return float(score(np.ones((1, len(labels))))[0])


def check(labels: np.ndarray, predictions: np.ndarray) -> None:
    if not len(labels) or len(labels) != len(predictions):
        raise BadData(
            f"{len(labels)} labels and predictions of {len(predictions)} images; allowed: both of the same images, one or more"
        )
    if labels.dtype.kind == "f":
        if predictions.size != len(predictions):
            raise BadData(
                f"labels that are numbers and predictions of shape {predictions.shape}; allowed: one an image"
            )
    elif predictions.ndim != 2 or (labels.ndim == 2 and labels.shape != predictions.shape):
        raise BadData(
            f"labels of shape {labels.shape} and predictions of shape {predictions.shape}; allowed: [N] or [N, C], and [N, C]"
        )
    elif labels.ndim == 1 and not (labels.min() >= 0 and labels.max() < predictions.shape[1]):
        raise BadData(f"labels outside 0..{predictions.shape[1] - 1}, the classes that there are probabilities of")
