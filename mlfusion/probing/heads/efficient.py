"""Efficient probing: many queries attend to the tokens directly, each for its own slice of the values."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mlfusion.probing.heads.contract import HeadModule, HeadShape, classifier, generators, normal, uniform
from mlfusion.probing.heads.pooling import (
    by_configuration,
    concat_heads,
    folded_attention,
    linear,
    standardize,
    weighted_sums,
)
from mlfusion.shapes import Float

QUERIES = 32


class Efficient(HeadModule):
    """K poolings by M = 32 learned queries without key projection (EP, arXiv 2506.10178), BatchNorm, linear map.

    Query m weighs the tokens by softmax(q_m · x / √D); its average is projected to ⌊D/M⌋ channels by its own rows of the
    one value projection, and the slices stand side by side. Tokens are averaged before the projection, which costs M/T of
    what it would per token. Tokens get a LayerNorm without scale and shift, since they come of length 1.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, shape: HeadShape, *, seeds: Sequence[int], dropouts: Sequence[float] = ()) -> None:
        """Queries from N(0, 0.02²); `shape.heads` and `dropouts` are ignored."""
        super().__init__()
        k, d, streams = len(seeds), shape.width, generators(seeds)
        m = min(QUERIES, d)
        self.queries = normal(streams, m, d)
        self.to_value = uniform(streams, m, d // m, d, fan_in=d)
        self.register_buffer("running_mean", torch.zeros(k, m * (d // m)))
        self.register_buffer("running_var", torch.ones(k, m * (d // m)))
        self.classifier, self.classifier_bias = classifier(streams, shape.classes, m * (d // m))

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B C"]:
        x = standardize(tokens)
        averages = weighted_sums(self._weights(x), x)  # [K·M, B, D]
        pooled = concat_heads(torch.bmm(averages, self.to_value.flatten(0, 1).mT), len(self.queries))
        flat, statistics = pooled.transpose(0, 1), (self.running_mean.view(-1), self.running_var.view(-1))
        normed = F.batch_norm(flat.flatten(1), *statistics, training=self.training).view(flat.shape).transpose(0, 1)
        return linear(normed, self.classifier, self.classifier_bias)

    def attention(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B M T"]:
        """Normalised tokens → weights of each query, which sum to one over T."""
        return by_configuration(self._weights(standardize(tokens)), len(self.queries))

    def _weights(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B KM T"]:
        return folded_attention(x, self.queries / math.sqrt(self.queries.shape[-1]))
