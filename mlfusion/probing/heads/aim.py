"""The attentive head of AIM and CoCa: BatchNorm of the tokens, attention from one learned query, and a linear map."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mlfusion.probing.heads.contract import HeadModule, HeadShape, classifier, generators, normal, uniform
from mlfusion.probing.heads.pooling import (
    by_configuration,
    concat_heads,
    folded_attention,
    head_count,
    linear,
    weighted_sums,
)
from mlfusion.shapes import Float

BATCH_NORM_EPS = 1e-6
MOMENTUM = 0.1


class Aim(HeadModule):
    """K multi-head attention poolings of AIM (arXiv 2401.08541, after CoCa's, arXiv 2205.01917), heads 64 wide.

    The query is a constant, so keys fold into it and tokens are averaged before they are projected to values. BatchNorm
    folds as well: its divisor goes into the folded keys and the average, its mean adds one constant to all scores of a head.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, shape: HeadShape, *, seeds: Sequence[int], dropouts: Sequence[float] = ()) -> None:
        """Query from N(0, 0.02²), projections as PyTorch's Linear; `shape.heads` and `dropouts` are ignored."""
        super().__init__()
        k, d, h, streams = len(seeds), shape.width, head_count(shape.width), generators(seeds)
        self.query = normal(streams, h, d // h)
        self.to_key = uniform(streams, h, d // h, d, fan_in=d)
        self.to_value = uniform(streams, h, d // h, d, fan_in=d)
        self.register_buffer("running_mean", torch.zeros(k, d))
        self.register_buffer("running_var", torch.ones(k, d))
        self.classifier, self.classifier_bias = classifier(streams, shape.classes, d)

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B C"]:
        k, h, _, d = self.to_value.shape
        if self.training:
            mean, variance = self._batch_statistics(tokens)
        else:
            mean, variance = self.running_mean, self.running_var
        inverse_std = torch.rsqrt(variance + BATCH_NORM_EPS)  # [K, D]
        averages = weighted_sums(self._weights(tokens, inverse_std), tokens).view(k, h, len(tokens), d)
        normed = (averages - mean[:, None, None]) * inverse_std[:, None, None]
        values = torch.bmm(normed.flatten(0, 1), self.to_value.flatten(0, 1).mT)
        return linear(concat_heads(values, k), self.classifier, self.classifier_bias)

    def attention(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B H T"]:
        """Normalised tokens → weights by the running statistics, which sum to one over T."""
        inverse_std = torch.rsqrt(self.running_var + BATCH_NORM_EPS)
        return by_configuration(self._weights(tokens, inverse_std), len(self.query))

    def _weights(self, tokens: Float[Tensor, "B T D"], inverse_std: Float[Tensor, "K D"]) -> Float[Tensor, "B KH T"]:
        folded = torch.einsum("khe,khed->khd", self.query, self.to_key) / math.sqrt(self.query.shape[-1])
        return folded_attention(tokens, folded * inverse_std[:, None])

    @torch.no_grad()
    def _batch_statistics(self, tokens: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "K D"], Float[Tensor, "K D"]]:
        """Mean and variance of this batch, the same for all K; the running ones follow as in `nn.BatchNorm1d`."""
        count = tokens.shape[0] * tokens.shape[1]
        variance, mean = torch.var_mean(tokens, dim=(0, 1), correction=0)
        self.running_mean.lerp_(mean.expand_as(self.running_mean), MOMENTUM)
        self.running_var.lerp_((variance * count / (count - 1)).expand_as(self.running_var), MOMENTUM)
        return mean.expand_as(self.running_mean), variance.expand_as(self.running_var)
