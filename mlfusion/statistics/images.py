"""Over the test images of one data set: how much another draw of images would change a score or a difference.

Every metric is written as a function of weights, one an image: a resample of the bootstrap is a row of whole-numbered
weights, and a thousand of them are scored by one product with a sparse matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlfusion.errors import BadData, UnknownName

RESAMPLES = 2000
LEVEL = 0.95
BINS = 15
TOP = 5
_BLOCK = 4_000_000  # weights held at a time: 32 MB
_TINY = 6e-8  # the least that a float16 can be: probabilities are kept as such

Measure = Callable[[np.ndarray], np.ndarray]
"""Weights of the images [B, N] → scores [B]; all ones is the score itself."""


@dataclass(frozen=True)
class Interval:
    """A score with a bootstrap interval over test images."""

    value: float
    low: float
    high: float
    level: float  # such as 0.95
    resamples: int


@dataclass(frozen=True)
class Difference:
    """Scores of A and B on the same images, and A - B with its interval and two-sided p-value, by a paired bootstrap."""

    a: float
    b: float
    value: float  # a - b
    low: float
    high: float
    level: float
    p: float  # never below 2 / (resamples + 1)
    resamples: int


@dataclass(frozen=True)
class McNemar:
    """How often which of two probes is right, and the exact two-sided p-value that they are equally often."""

    both: int
    only_a: int
    only_b: int
    neither: int
    p: float


@dataclass(frozen=True)
class Bin:
    """Images whose surest class has a probability in (low, high]."""

    low: float
    high: float
    images: int
    confidence: float | None  # mean probability of the surest class; None without images
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """Whether probabilities are as often right as they say."""

    ece: float  # expected calibration error: mean over images of |confidence - accuracy| of their bin
    bins: tuple[Bin, ...]  # the reliability curve


def interval(
    labels: np.ndarray,
    predictions: np.ndarray | Sequence[np.ndarray],
    *,
    metric: str = "balanced_accuracy",
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    method: str = "percentile",
) -> Interval:
    """A bootstrap interval over test images.

    Args:
        labels: classes [N] in 0..C-1; of several labels an image 0 and 1 [N, C]; or numbers [N].
        predictions: probabilities [N, C], or numbers [N]; or a sequence of such, one a seed: then of the mean over seeds, each
            resample drawing the same images for all.
        metric: of those in `METRICS`.
        level: part of such intervals that hold the true value.
        resamples: how many.
        seed: of the resampling.
        method: SciPy's 'percentile', 'basic' or 'BCa' (slower: it leaves out each image in turn).

    Raises:
        BadData: labels and predictions do not belong together, or are fewer than two.
        UnknownName: no such metric of such labels.
    """
    score = _mean(labels, predictions, metric)
    found = _bootstrap(score, len(labels), level, resamples, seed, method)
    low, high = found.confidence_interval
    return Interval(float(score(np.ones((1, len(labels))))[0]), float(low), float(high), level, resamples)


def difference(
    labels: np.ndarray,
    a: np.ndarray | Sequence[np.ndarray],
    b: np.ndarray | Sequence[np.ndarray],
    *,
    metric: str = "balanced_accuracy",
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    method: str = "percentile",
) -> Difference:
    """A paired bootstrap of A - B: each resample draws the same images for both, so what is hard for both cancels.

    The p-value is the least level at which the percentile interval would still hold 0. Arguments and errors as of `interval`.
    """
    score_a, score_b = _mean(labels, a, metric), _mean(labels, b, metric)
    found = _bootstrap(lambda w: score_a(w) - score_b(w), len(labels), level, resamples, seed, method)
    low, high = found.confidence_interval
    whole = np.ones((1, len(labels)))
    at_a, at_b = float(score_a(whole)[0]), float(score_b(whole)[0])
    drawn = found.bootstrap_distribution
    tail = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    p = min(1.0, 2 * (tail + 1) / (resamples + 1))
    return Difference(at_a, at_b, at_a - at_b, float(low), float(high), level, float(p), resamples)


def mcnemar(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> McNemar:
    """The exact test of McNemar (1947): of the images that one probe gets right and the other wrong, is it half and half?

    Args:
        labels: classes [N].
        a: probabilities [N, C].
        b: likewise.
    """
    from scipy.stats import binomtest

    for one in (a, b):
        _check(labels, one)
    if labels.ndim != 1 or labels.dtype.kind == "f":
        raise BadData("McNemar's test counts images that are right or wrong; allowed: one class an image")
    right_a, right_b = a.argmax(1) == labels, b.argmax(1) == labels
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return McNemar(int((right_a & right_b).sum()), only_a, only_b, int((~right_a & ~right_b).sum()), p)


def calibration(labels: np.ndarray, probabilities: np.ndarray, *, bins: int = BINS) -> Calibration:
    """The expected calibration error in bins of equal width (Guo et al. 2017, arXiv 1706.04599), and the curve behind it.

    Args:
        labels: classes [N].
        probabilities: [N, C].
        bins: how many.
    """
    _check(labels, probabilities)
    sure = probabilities.max(1).astype(np.float64)
    right = probabilities.argmax(1) == labels
    edges = np.linspace(0, 1, bins + 1)
    at = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)
    count = np.bincount(at, minlength=bins)
    held = np.maximum(count, 1)
    confidence, accuracy = np.bincount(at, sure, bins) / held, np.bincount(at, right, bins) / held
    ece = float((count * np.abs(confidence - accuracy)).sum() / len(labels))
    return Calibration(
        ece,
        tuple(
            Bin(
                float(edges[k]),
                float(edges[k + 1]),
                int(count[k]),
                float(confidence[k]) if count[k] else None,
                float(accuracy[k]) if count[k] else None,
            )
            for k in range(bins)
        ),
    )


def confusion(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Images of each true class (rows) by the class they were taken for (columns): counts [C, C] int64."""
    from sklearn.metrics import confusion_matrix

    _check(labels, probabilities)
    counts: np.ndarray = confusion_matrix(labels, probabilities.argmax(1), labels=np.arange(probabilities.shape[1]))
    return counts


# --- metrics as functions of weights ---------------------------------------------------------------------------------


def measure(labels: np.ndarray, predictions: np.ndarray, metric: str) -> Measure:
    """A metric of these images as a function of their weights.

    Raises:
        BadData: labels and predictions do not belong together.
        UnknownName: no such metric of such labels.
    """
    _check(labels, predictions)
    known = METRICS["number" if labels.dtype.kind == "f" else "labels" if labels.ndim == 2 else "class"]
    if metric not in known:
        raise UnknownName("metric", metric, known)
    made: Measure = known[metric](labels, predictions)
    return made


def _one_hot(classes: np.ndarray, count: int) -> Any:
    from scipy.sparse import csr_array

    images = len(classes)
    return csr_array((np.ones(images), classes, np.arange(images + 1)), shape=(images, count))


def _counts(weights: np.ndarray, members: Any) -> np.ndarray:
    """Weight of each class [B, C]."""
    found: np.ndarray = (members.T @ weights.T).T
    return found


def _balanced_accuracy(labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    members = _one_hot(labels, probabilities.shape[1])
    right = (probabilities.argmax(1) == labels).astype(np.float64)

    def score(weights: np.ndarray) -> np.ndarray:
        there = _counts(weights, members)
        with np.errstate(invalid="ignore"):
            return np.nanmean(_counts(weights * right, members) / there, axis=1)

    return score


def _macro_f1(labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    truth, taken = _one_hot(labels, classes), _one_hot(predicted, classes)
    right = (predicted == labels).astype(np.float64)
    present = np.unique(labels)

    def score(weights: np.ndarray) -> np.ndarray:
        both = _counts(weights, truth) + _counts(weights, taken)
        hits = 2 * _counts(weights * right, truth)
        with np.errstate(invalid="ignore"):
            return np.nanmean((hits / both)[:, present], axis=1)

    return score


def _average(each: np.ndarray) -> Measure:
    return lambda weights: weights @ each / weights.sum(1)


def _accuracy(labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    return _average((probabilities.argmax(1) == labels).astype(np.float64))


def _top5(labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    if probabilities.shape[1] <= TOP:
        return _average(np.ones(len(labels)))
    own = probabilities[np.arange(len(labels)), labels][:, None]
    return _average(((probabilities > own).sum(1) < TOP).astype(np.float64))


def _loss(labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return _average(-np.log(np.maximum(own, _TINY)))


def _mean_average_precision(labels: np.ndarray, scored: np.ndarray) -> Measure:
    """The area under precision against recall without interpolation; images with the same score count together."""
    orders, ends = [], []
    for column in scored.T:
        order = np.argsort(-column, kind="stable")
        held = column[order]
        last = np.append(np.flatnonzero(held[1:] != held[:-1]), len(held) - 1)
        orders.append(order)
        ends.append(last[np.searchsorted(last, np.arange(len(held)))])  # of each image the last one with its score

    def score(weights: np.ndarray) -> np.ndarray:
        each = np.full((len(weights), labels.shape[1]), np.nan)
        for c, (order, end) in enumerate(zip(orders, ends, strict=True)):
            w = weights[:, order]
            positive = w * labels[order, c]
            found, seen = positive.cumsum(1)[:, end], w.cumsum(1)[:, end]
            precision = np.divide(found, seen, out=np.zeros_like(found), where=seen > 0)
            total = positive.sum(1)
            np.divide((positive * precision).sum(1), total, out=each[:, c], where=total > 0)
        return np.nanmean(each, axis=1)

    return score


def _r2(labels: np.ndarray, predicted: np.ndarray) -> Measure:
    truth = labels.astype(np.float64)
    squares = (truth - _flat(predicted)) ** 2

    def score(weights: np.ndarray) -> np.ndarray:
        mean = weights @ truth / weights.sum(1)
        spread = weights @ truth**2 - weights.sum(1) * mean**2
        result: np.ndarray = 1 - weights @ squares / spread
        return result

    return score


def _mae(labels: np.ndarray, predicted: np.ndarray) -> Measure:
    return _average(np.abs(labels - _flat(predicted)))


def _rmse(labels: np.ndarray, predicted: np.ndarray) -> Measure:
    mean = _average((labels - _flat(predicted)) ** 2)
    return lambda weights: np.sqrt(mean(weights))


def _flat(predicted: np.ndarray) -> np.ndarray:
    return predicted.reshape(len(predicted)).astype(np.float64)


METRICS: dict[str, dict[str, Callable[[np.ndarray, np.ndarray], Measure]]] = {
    "class": {
        "balanced_accuracy": _balanced_accuracy,
        "accuracy": _accuracy,
        "top5": _top5,
        "macro_f1": _macro_f1,
        "loss": _loss,
    },
    "labels": {"mean_average_precision": _mean_average_precision},
    "number": {"r2": _r2, "mae": _mae, "rmse": _rmse},
}
"""By what the labels are: one class an image, several labels, or a number."""


# --- resampling ------------------------------------------------------------------------------------------------------


def _mean(labels: np.ndarray, predictions: np.ndarray | Sequence[np.ndarray], metric: str) -> Measure:
    """The mean over seeds."""
    each = [predictions] if isinstance(predictions, np.ndarray) else list(predictions)
    if not each:
        raise BadData("no predictions; allowed: those of one seed or more")
    scores = [measure(labels, one, metric) for one in each]
    return scores[0] if len(scores) == 1 else lambda weights: np.mean([score(weights) for score in scores], axis=0)


def _bootstrap(score: Measure, images: int, level: float, resamples: int, seed: int, method: str) -> Any:
    from scipy.stats import bootstrap

    if images < 2:
        raise BadData(f"{images} test image cannot be resampled; allowed: two or more")

    def statistic(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        drawn = np.moveaxis(drawn, axis, -1)
        flat = drawn.reshape(-1, drawn.shape[-1]).astype(np.int64)
        offsets = images * np.arange(len(flat))[:, None]
        weights = np.bincount((flat + offsets).ravel(), minlength=images * len(flat)).reshape(len(flat), images)
        return score(weights.astype(np.float64)).reshape(drawn.shape[:-1])

    return bootstrap(
        (np.arange(images),),
        statistic,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _BLOCK // images),
        confidence_level=level,
        method=method,
        rng=np.random.default_rng(seed),
    )


def _check(labels: np.ndarray, predictions: np.ndarray) -> None:
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
