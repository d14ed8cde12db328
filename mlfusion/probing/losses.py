"""Cross-entropy with class weights, for all configurations of a population at once."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlfusion.shapes import Float, Int, Shaped

Loss = Callable[[Float[Tensor, "K B C"], Shaped[Tensor, "B ..."]], Float[Tensor, " K"]]
"""Outputs and labels → the mean loss of every configuration."""


def class_weights(labels: Int[np.ndarray, " N"], classes: int) -> Float[np.ndarray, " classes"]:
    """n / (C · n_c) for every class, so that each class weighs the same in the loss; 0 for one without images."""
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts > 0, len(labels) / (classes * np.maximum(counts, 1)), 0.0)


def cross_entropy(
    logits: Float[Tensor, "K B C"], labels: Int[Tensor, " B"], weights: Float[Tensor, " C"], *, smoothing: float = 0.0
) -> Float[Tensor, " K"]:
    """Cross-entropy with class weights, averaged as `torch.nn.CrossEntropyLoss` does."""
    (k, b, _), labels = logits.shape, labels.to(torch.int64)
    flat, repeated = logits.flatten(0, 1), labels.repeat(k)
    losses = F.cross_entropy(flat, repeated, weight=weights, reduction="none", label_smoothing=smoothing)
    return losses.view(k, b).sum(1) / weights[labels].sum()
