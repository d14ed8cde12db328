"""Efficient probing: many queries straight on the tokens, each giving its own slice of the values."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mlfusion.probes.contract import Shape, generators, uniform
from mlfusion.probes.pooling import average, batch_norm, classifier, linear, merge, normal, split, standard, weigh

QUERIES = 32


class Efficient(nn.Module):
    """K probes of M = 32 learned queries without key projection (EP, arXiv 2506.10178), BatchNorm, linear map.

    Query m weighs the tokens by softmax(q_m · x / √D); its average is projected to ⌊D/M⌋ channels by rows of its own of the
    one value projection, and the slices stand side by side. The weights are averaged with before the projection, so it
    costs M/T of what it would per token. Tokens get a LayerNorm without scale and shift, since they come of length 1.
    """

    clip: ClassVar[float | None] = 5.0
    drops: ClassVar[bool] = False
    attends: ClassVar[bool] = True

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, shape: Shape, *, seeds: Sequence[int], dropouts: Sequence[float] = ()) -> None:
        """Queries from N(0, 0.02²); `shape.heads` and `dropouts` are ignored."""
        super().__init__()
        k, d, streams = len(seeds), shape.width, generators(seeds)
        m = min(QUERIES, d)
        self.queries = normal(streams, m, d)
        self.to_value = uniform(streams, m, d // m, d, fan_in=d)
        self.register_buffer("running_mean", torch.zeros(k, m * (d // m)))
        self.register_buffer("running_var", torch.ones(k, m * (d // m)))
        self.classifier, self.classifier_bias = classifier(streams, shape.classes, m * (d // m))

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → logits [K, B, C]."""
        x = standard(tokens)
        averages = average(self._weights(x), x)  # [K·M, B, D]
        pooled = merge(torch.bmm(averages, self.to_value.flatten(0, 1).mT), len(self.queries))
        normed = batch_norm(pooled, self.running_mean, self.running_var, training=self.training)
        return linear(normed, self.classifier, self.classifier_bias)

    def attention(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → weights [K, B, M, T], which sum to one over T."""
        return split(self._weights(standard(tokens)), len(self.queries))

    def _weights(self, x: Tensor) -> Tensor:
        return weigh(x, self.queries / math.sqrt(self.queries.shape[-1]))
