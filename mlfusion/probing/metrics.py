"""Scores of a probe, all of them scikit-learn's, in the one form in which results keep them."""

from typing import Any

import numpy as np
from sklearn import metrics

TOP = 5


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean recall of the classes that occur in `labels`, as a fraction: the metric of arXiv 2601.09322."""
    return float(metrics.recall_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0))


def scores(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Every metric of a result, as fractions.

    Args:
        labels: true classes [N], in 0..C-1.
        probabilities: of every class [N, C], rows summing to one.

    Returns:
        balanced_accuracy; accuracy; top5 (top-C for C < 5, so 1); macro_f1 and recall over the classes, where recall is
        None for a class without images; loss, the mean cross-entropy in nats without class weights.
    """
    classes = np.arange(probabilities.shape[1])
    predicted = probabilities.argmax(1)
    present = np.isin(classes, labels)
    recall = metrics.recall_score(labels, predicted, labels=classes, average=None, zero_division=0)
    # With no more classes than places every label is among the first; scikit-learn warns instead of saying so.
    within = len(classes) <= TOP or metrics.top_k_accuracy_score(labels, probabilities, k=TOP, labels=classes)
    return {
        "balanced_accuracy": balanced_accuracy(labels, predicted),
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "top5": float(within),
        "macro_f1": float(
            metrics.f1_score(labels, predicted, labels=classes[present], average="macro", zero_division=0)
        ),
        "recall": [float(r) if there else None for r, there in zip(recall, present, strict=True)],
        "loss": float(metrics.log_loss(labels, probabilities, labels=classes)),
    }


def mean_average_precision(labels: np.ndarray, scored: np.ndarray) -> float:
    """Mean over the labels that occur of the area under precision against recall, without interpolation.

    Args:
        labels: 0 or 1 [N, C].
        scored: the higher, the surer [N, C].
    """
    return float(np.nanmean(_average_precision(labels, scored)))


def label_scores(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Every metric of several labels an image, as fractions.

    Args:
        labels: 0 or 1 [N, C].
        probabilities: of every label by itself [N, C].

    Returns:
        mean_average_precision; average_precision of each label, None for one that is on no image; micro_f1 and macro_f1
        at a probability of one half; loss, the mean binary cross-entropy in nats.
    """
    each = _average_precision(labels, probabilities)
    predicted = probabilities > 0.5
    sure = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    return {
        "mean_average_precision": float(np.nanmean(each)),
        "average_precision": [None if np.isnan(value) else float(value) for value in each],
        "micro_f1": float(metrics.f1_score(labels, predicted, average="micro", zero_division=0)),
        "macro_f1": float(metrics.f1_score(labels, predicted, average="macro", zero_division=0)),
        "loss": float(-(labels * np.log(sure) + (1 - labels) * np.log(1 - sure)).mean()),
    }


def r2(labels: np.ndarray, predicted: np.ndarray) -> float:
    """The part of the variance of `labels` [N] that is explained: 1 is perfect, 0 is the mean, below 0 is worse."""
    return float(metrics.r2_score(labels, predicted))


def number_scores(labels: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Of numbers [N]: r2; mae, the mean absolute error, and rmse, both in the labels' own unit."""
    return {
        "r2": r2(labels, predicted),
        "mae": float(metrics.mean_absolute_error(labels, predicted)),
        "rmse": float(metrics.root_mean_squared_error(labels, predicted)),
    }


def _average_precision(labels: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """[C], NaN for a label that is on no image."""
    return np.array(
        [
            metrics.average_precision_score(truth, score) if truth.any() else np.nan
            for truth, score in zip(labels.T, scored.T, strict=True)
        ]
    )
