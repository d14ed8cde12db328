"""Scores of a classifier, all of them scikit-learn's, in the one form in which results keep them."""

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
