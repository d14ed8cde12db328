"""Test scores of a probe, computed by scikit-learn, in the form that result rows store."""

from typing import Any

import numpy as np
from sklearn import metrics

from mlfusion.shapes import Float, Int, Num, Shaped

TOP = 5


def balanced_accuracy(labels: Int[np.ndarray, " N"], predicted: Int[np.ndarray, " N"]) -> float:
    """Mean recall of the classes that occur in `labels`, as a fraction: the metric of arXiv 2601.09322."""
    return float(metrics.recall_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0))


def scores(labels: Int[np.ndarray, " N"], probabilities: Float[np.ndarray, "N C"]) -> dict[str, Any]:
    """All metrics for one class per image, as fractions; each row of `probabilities` sums to one.

    Returns:
        balanced_accuracy; accuracy; top5 (1 for five classes or fewer); macro_f1, averaged over the classes that occur; recall
        of each class, None for a class without images; loss, the mean cross-entropy in nats, without class weights.
    """
    classes = np.arange(probabilities.shape[1])
    predicted = probabilities.argmax(1)
    present = np.isin(classes, labels)
    recall = metrics.recall_score(labels, predicted, labels=classes, average=None, zero_division=0)
    # With five classes or fewer, every label is among the first five; scikit-learn would warn.
    top5 = len(classes) <= TOP or metrics.top_k_accuracy_score(labels, probabilities, k=TOP, labels=classes)
    macro_f1 = metrics.f1_score(labels, predicted, labels=classes[present], average="macro", zero_division=0)
    return {
        "balanced_accuracy": balanced_accuracy(labels, predicted),
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "top5": float(top5),
        "macro_f1": float(macro_f1),
        "recall": [float(r) if occurs else None for r, occurs in zip(recall, present, strict=True)],
        "loss": float(metrics.log_loss(labels, probabilities, labels=classes)),
    }


def mean_average_precision(labels: Shaped[np.ndarray, "N C"], confidences: Float[np.ndarray, "N C"]) -> float:
    """Mean of the average precisions of the labels that occur.

    The average precision is the area under the curve of precision against recall, without interpolation. Labels are 0 or 1;
    a higher score means a surer prediction.
    """
    return float(np.nanmean(_average_precision(labels, confidences)))


def label_scores(labels: Shaped[np.ndarray, "N C"], probabilities: Float[np.ndarray, "N C"]) -> dict[str, Any]:
    """All metrics for several labels per image, as fractions; labels are 0 or 1.

    Returns:
        mean_average_precision; average_precision of each label, None for a label that no image has; micro_f1 and macro_f1 at a
        threshold of one half; loss, the mean binary cross-entropy in nats.
    """
    per_label = _average_precision(labels, probabilities)
    predicted = probabilities > 0.5
    clipped = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    return {
        "mean_average_precision": float(np.nanmean(per_label)),
        "average_precision": [None if np.isnan(value) else float(value) for value in per_label],
        "micro_f1": float(metrics.f1_score(labels, predicted, average="micro", zero_division=0)),
        "macro_f1": float(metrics.f1_score(labels, predicted, average="macro", zero_division=0)),
        "loss": float(-(labels * np.log(clipped) + (1 - labels) * np.log(1 - clipped)).mean()),
    }


def r2(labels: Num[np.ndarray, " N"], predicted: Num[np.ndarray, " N"]) -> float:
    """Coefficient of determination: 1 is perfect, 0 is as good as the mean, below 0 is worse."""
    return float(metrics.r2_score(labels, predicted))


def number_scores(labels: Num[np.ndarray, " N"], predicted: Num[np.ndarray, " N"]) -> dict[str, Any]:
    """All metrics for one number per image: r2; mean absolute error and root mean squared error, in the labels' unit."""
    return {
        "r2": r2(labels, predicted),
        "mae": float(metrics.mean_absolute_error(labels, predicted)),
        "rmse": float(metrics.root_mean_squared_error(labels, predicted)),
    }


def _average_precision(
    labels: Shaped[np.ndarray, "N C"], confidences: Float[np.ndarray, "N C"]
) -> Float[np.ndarray, " C"]:
    """The average precision of each label; NaN for a label that no image has."""
    pairs = zip(labels.T, confidences.T, strict=True)
    return np.array([metrics.average_precision_score(*pair) if pair[0].any() else np.nan for pair in pairs])
