"""Metrics of test images as functions of the images' weights: with all weights one, the scores of a row.

A resample of the bootstrap is a row of whole-numbered weights, and its score is that of a data set in which each image stands
as often. docs/method.md has the rules for ties and for classes without images.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from mlfusion.errors import BadData, UnknownName

TOP = 5
TINY = 2.0**-23
"""Smallest probability in a log loss, as in scikit-learn's of float32 probabilities: an image costs 15.9 nats or less."""
_FLAT = 1e-24  # variance, relative to the squared range, below which labels are all the same but for rounding

Measure = Callable[[np.ndarray], np.ndarray]
"""Weights of the images [B, N] → scores [B]; all ones is the score itself."""


def measure(labels: np.ndarray, predictions: np.ndarray, metric: str) -> Measure:
    """A metric of these images as a function of their weights.

    Args:
        labels: classes [N] in 0..C-1; several labels per image, 0 or 1 [N, C]; or numbers [N].
        predictions: probabilities [N, C], or numbers [N] or [N, 1].
        metric: one of `METRICS` or of `RANKED`.

    Raises:
        BadData: labels and predictions do not match.
        UnknownName: there is no such metric for such labels.
    """
    check(labels, predictions)
    known = METRICS[_kind(labels)] | RANKED.get(_kind(labels), {})
    if metric not in known:
        raise UnknownName("metric", metric, known)
    return known[metric](labels, predictions)


def full_score(score: Measure, images: int) -> float:
    """The score of all images, with equal weights."""
    return float(score(np.ones((1, images)))[0])


def scores(labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
    """Every metric of the images, and the recall of each class or the average precision of each label, as rows store them.

    Arguments and errors as in `measure`. A class or label that no image has is None.
    """
    check(labels, predictions)
    kind = _kind(labels)
    whole: dict[str, Any] = {
        name: full_score(metric(labels, predictions), len(labels)) for name, metric in METRICS[kind].items()
    }
    for name, by_class in BY_CLASS.get(kind, {}).items():
        values = by_class(labels, predictions)(np.ones((1, len(labels))))[0]
        whole[name] = [None if np.isnan(value) else float(value) for value in values]
    return whole


def check(labels: np.ndarray, predictions: np.ndarray) -> None:
    """Check that labels and predictions are of the same images and classes.

    Raises:
        BadData: they are not.
    """
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


def _kind(labels: np.ndarray) -> str:
    return "number" if labels.dtype.kind == "f" else "labels" if labels.ndim == 2 else "class"


def _mean_of_present(by_class: Measure) -> Measure:
    """Mean over the classes that are not NaN; 0 if all are."""

    def score(weights: np.ndarray) -> np.ndarray:
        values = by_class(weights)
        present = ~np.isnan(values)
        return np.where(present, values, 0).sum(1) / np.maximum(present.sum(1), 1)

    return score


def _share(part: np.ndarray, whole: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    """The quotient, or `otherwise` where `whole` is 0."""
    return np.divide(part, whole, out=np.full(whole.shape, otherwise, np.float64), where=whole > 0)


def _average(values: np.ndarray) -> Measure:
    values = values.astype(np.float64)
    return lambda weights: weights @ values / weights.sum(1)


def image_terms(labels: np.ndarray, predictions: np.ndarray, metric: str) -> np.ndarray:
    """What each image adds to a score that is a sum over these images, one of `SUMS` [N]; arguments as in `measure`."""
    if metric == "balanced_accuracy":
        counts = np.bincount(labels)
        return _right(labels, predictions) / (counts[labels] * np.count_nonzero(counts))
    return AVERAGES[_kind(labels)][metric](labels, predictions) / len(labels)


# --- one class per image ---------------------------------------------------------------------------------------------


def _totals(groups: np.ndarray, count: int) -> Measure:
    """Weights of the images [B, N] → weight of each of `count` groups [B, count]; `groups` are those of the images [N]."""
    return lambda weights: np.stack([np.bincount(groups, of_images, count) for of_images in weights])


def _by_class(labels: np.ndarray, answers: np.ndarray, classes: int) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    """Weights [B, N] → weight of each class [B, C] on the images that are right, and on all images of the class."""
    totals = _totals(labels + classes * (answers == labels), 2 * classes)

    def right_and_all(weights: np.ndarray) -> tuple[np.ndarray, ...]:
        wrong, right = np.split(totals(weights), 2, axis=1)
        return right, right + wrong

    return right_and_all


def _recall(labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    """The recall of each class [B, C]; NaN for one without images."""
    right_and_all = _by_class(labels, probabilities.argmax(1), probabilities.shape[1])

    def score(weights: np.ndarray) -> np.ndarray:
        right, present = right_and_all(weights)
        return _share(right, present)

    return score


def _f1(labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    """F1 of each class [B, C]; NaN for one without images."""
    answers, classes = probabilities.argmax(1), probabilities.shape[1]
    right_and_all, guesses = _by_class(labels, answers, classes), _totals(answers, classes)

    def score(weights: np.ndarray) -> np.ndarray:
        right, present = right_and_all(weights)
        return np.where(present > 0, _share(2 * right, present + guesses(weights)), np.nan)

    return score


def _right(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Whether each image's own class is the most probable [N]."""
    return np.asarray(probabilities.argmax(1) == labels)


def _own_class(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Probability of each image's own class [N, 1]."""
    return np.take_along_axis(probabilities, labels[:, None], axis=1)


def _in_top(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Whether each image's own class is among the `TOP` most probable, in the order of `argmax` [N]."""
    own = _own_class(labels, probabilities)
    before = np.arange(probabilities.shape[1]) < labels[:, None]
    ahead = (probabilities > own) | ((probabilities == own) & before)
    return (ahead.sum(1) < TOP) & (own[:, 0] > 0)


def _log_loss(probabilities: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(probabilities.astype(np.float64), TINY))


# --- one class or several labels per image ---------------------------------------------------------------------------


def _one_against_rest(labels: np.ndarray, classes: int) -> np.ndarray:
    """Whether each image has each class or label [N, C], bool."""
    return labels > 0 if labels.ndim == 2 else labels[:, None] == np.arange(classes)


def auroc(labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    """The area under the ROC curve of each class or label against the rest [B, C]; NaN where one side has no image.

    It is the share of pairs of an image with the class and one without it in which the first has the larger probability, and
    half of the pairs with equal ones (Mann and Whitney 1947; Hanley and McNeil 1982).
    """
    owned, columns = _one_against_rest(labels, probabilities.shape[1]), []
    for column in probabilities.T:
        order = np.argsort(column, kind="stable")
        columns.append(
            (order, np.flatnonzero(np.diff(column[order], prepend=-np.inf)))
        )  # the first of each probability

    def score(weights: np.ndarray) -> np.ndarray:
        areas = np.full((len(weights), owned.shape[1]), np.nan)
        for c, (order, starts) in enumerate(columns):
            ordered = weights[:, order]
            own = ordered * owned[order, c]
            others = ordered - own
            if len(starts) < len(order):
                own, others = np.add.reduceat(own, starts, axis=1), np.add.reduceat(others, starts, axis=1)
            below = others.cumsum(1) - others / 2
            areas[:, c] = _share(np.einsum("bn,bn->b", own, below), own.sum(1) * others.sum(1))
        return areas

    return score


# --- several labels per image ----------------------------------------------------------------------------------------


def _average_precision(labels: np.ndarray, confidences: np.ndarray) -> Measure:
    """The average precision of each label [B, C]; NaN for one that no image has.

    It is the area under precision against recall without interpolation; images with the same confidence count together.
    """
    orders, ends = [], []
    for column in confidences.T:
        order = np.argsort(-column, kind="stable")
        ordered = column[order]
        last = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
        orders.append(order)
        ends.append(last[np.searchsorted(last, np.arange(len(ordered)))])  # the last image with the same confidence

    def score(weights: np.ndarray) -> np.ndarray:
        by_label = np.full((len(weights), labels.shape[1]), np.nan)
        for c, (order, end) in enumerate(zip(orders, ends, strict=True)):
            w = weights[:, order]
            positive = w * labels[order, c]
            precision = _share(positive.cumsum(1)[:, end], w.cumsum(1)[:, end], 0)
            by_label[:, c] = _share((positive * precision).sum(1), positive.sum(1))
        return by_label

    return score


def _label_counts(labels: np.ndarray, probabilities: np.ndarray) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    """Weights [B, N] → weight of each label [B, C] on the images that have it and get it, have it, and get it.

    An image gets the labels that are more probable than one half.
    """
    predicted = probabilities > 0.5
    parts = [part.astype(np.float64) for part in (labels * predicted, labels, predicted)]
    return lambda weights: tuple(weights @ part for part in parts)


def _label_f1(labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    """F1 of each label [B, C]; NaN for one that no image has."""
    counts = _label_counts(labels, probabilities)

    def score(weights: np.ndarray) -> np.ndarray:
        both, truth, guesses = counts(weights)
        return np.where(truth > 0, _share(2 * both, truth + guesses), np.nan)

    return score


def _micro_f1(labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    counts = _label_counts(labels, probabilities)

    def score(weights: np.ndarray) -> np.ndarray:
        both, truth, guesses = (part.sum(1) for part in counts(weights))
        return _share(2 * both, truth + guesses, 0)

    return score


def _label_loss(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    wide = probabilities.astype(np.float64)
    return np.asarray(_log_loss(np.where(labels > 0, wide, 1 - wide)).mean(1))


# --- a number per image ----------------------------------------------------------------------------------------------


def _errors(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return labels.astype(np.float64) - predicted.reshape(len(predicted)).astype(np.float64)


def _r2(labels: np.ndarray, predicted: np.ndarray) -> Measure:
    squares = _errors(labels, predicted) ** 2
    truth = labels.astype(np.float64) - float(labels[0])
    flat = _FLAT * float(np.abs(truth).max()) ** 2

    def score(weights: np.ndarray) -> np.ndarray:
        total = weights.sum(1)
        mean = weights @ truth / total
        # The mean is taken away before squaring: a difference of two sums of squares loses all digits far from zero.
        spread = np.einsum("bn,bn->b", weights, (truth - mean[:, None]) ** 2)
        missed = weights @ squares
        constant = spread <= flat * total
        r2 = 1 - missed / np.where(constant, 1, spread)
        return np.where(constant, missed == 0, r2)  # scikit-learn's rule for labels that are all the same

    return score


def _rmse(labels: np.ndarray, predicted: np.ndarray) -> Measure:
    mean = _average(_errors(labels, predicted) ** 2)
    return lambda weights: np.sqrt(mean(weights))


AVERAGES: dict[str, dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "class": {
        "accuracy": _right,
        "top5": _in_top,
        "loss": lambda labels, p: _log_loss(_own_class(labels, p)[:, 0]),
    },
    "labels": {"loss": _label_loss},
    "number": {"mae": lambda labels, predicted: np.abs(_errors(labels, predicted))},
}
"""{kind of labels: {metric: values of the images [N], whose mean it is}}."""

SUMS = {"balanced_accuracy"}.union(*AVERAGES.values())
"""Metrics that are sums over images as long as no image changes its weight."""


def _averages(kind: str) -> dict[str, Callable[[np.ndarray, np.ndarray], Measure]]:
    def average(values: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[np.ndarray, np.ndarray], Measure]:
        return lambda labels, predictions: _average(values(labels, predictions))

    return {name: average(values) for name, values in AVERAGES[kind].items()}


METRICS: dict[str, dict[str, Callable[[np.ndarray, np.ndarray], Measure]]] = {
    "class": {
        "balanced_accuracy": lambda labels, p: _mean_of_present(_recall(labels, p)),
        "macro_f1": lambda labels, p: _mean_of_present(_f1(labels, p)),
        **_averages("class"),
    },
    "labels": {
        "mean_average_precision": lambda labels, p: _mean_of_present(_average_precision(labels, p)),
        "micro_f1": _micro_f1,
        "macro_f1": lambda labels, p: _mean_of_present(_label_f1(labels, p)),
        **_averages("labels"),
    },
    "number": {"r2": _r2, "rmse": _rmse, **_averages("number")},
}
"""{kind of labels: {metric: measure}}: one class per image, several labels, or a number."""

BY_CLASS: dict[str, dict[str, Callable[[np.ndarray, np.ndarray], Measure]]] = {
    "class": {"recall": _recall},
    "labels": {"average_precision": _average_precision},
}
"""{kind of labels: {metric of each class: measure}}, whose scores are [B, C]."""

RANKED: dict[str, dict[str, Callable[[np.ndarray, np.ndarray], Measure]]] = {
    kind: {"auroc": lambda labels, p: _mean_of_present(auroc(labels, p))} for kind in ("class", "labels")
}
"""{kind of labels: {metric: measure}} of metrics that rows do not store: they are computed from the arrays when asked for."""
