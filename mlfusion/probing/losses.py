"""Cross-entropy with class weights, for all configurations of a population at once."""

from collections.abc import Callable

import numpy as np
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs [K, B, C] and labels [B, …] → the mean loss of every configuration [K]."""


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """n / (C · n_c) for every class [C], so that each class weighs the same in the loss; 0 for one without images."""
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts > 0, len(labels) / (classes * np.maximum(counts, 1)), 0.0)


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with class weights, averaged as `torch.nn.CrossEntropyLoss` does: [K, B, C], [B], [C] → [K]."""
    k, b, _ = logits.shape
    each = F.cross_entropy(
        logits.flatten(0, 1), labels.repeat(k), weight=weights, reduction="none", label_smoothing=smoothing
    )
    return each.view(k, b).sum(1) / weights[labels].sum()
