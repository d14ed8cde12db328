"""The attentive probe of AIM and CoCa: BatchNorm of the tokens, one learned query, and a linear map of what it gathers."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mlfusion.probes.contract import Shape, generators, uniform
from mlfusion.probes.pooling import average, classifier, heads_of, linear, merge, normal, split, weigh

BATCH_NORM_EPS = 1e-6
MOMENTUM = 0.1


class Aim(nn.Module):
    """K multi-head attention poolings of AIM (arXiv 2401.08541, after CoCa's, arXiv 2205.01917), heads 64 wide.

    The query is a constant, so keys fold into it and tokens are averaged before they are projected to values. BatchNorm
    folds as well: its divisor goes into the folded keys and the average, its mean adds one constant to all scores of a head.
    """

    clip: ClassVar[float | None] = 5.0
    drops: ClassVar[bool] = False
    attends: ClassVar[bool] = True

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, shape: Shape, *, seeds: Sequence[int], dropouts: Sequence[float] = ()) -> None:
        """Query from N(0, 0.02²), projections as PyTorch's Linear; `shape.heads` and `dropouts` are ignored."""
        super().__init__()
        k, d, h, streams = len(seeds), shape.width, heads_of(shape.width), generators(seeds)
        self.query = normal(streams, h, d // h)
        self.to_key = uniform(streams, h, d // h, d, fan_in=d)
        self.to_value = uniform(streams, h, d // h, d, fan_in=d)
        self.register_buffer("running_mean", torch.zeros(k, d))
        self.register_buffer("running_var", torch.ones(k, d))
        self.classifier, self.classifier_bias = classifier(streams, shape.classes, d)

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → logits [K, B, C]."""
        k, h, _, d = self.to_value.shape
        if self.training:
            mean, variance = self._observe(tokens)
        else:
            mean, variance = self.running_mean, self.running_var
        divisor = torch.rsqrt(variance + BATCH_NORM_EPS)  # [K, D]
        averages = average(self._weights(tokens, divisor), tokens).view(k, h, len(tokens), d)
        normed = (averages - mean[:, None, None]) * divisor[:, None, None]
        values = torch.bmm(normed.flatten(0, 1), self.to_value.flatten(0, 1).mT)
        return linear(merge(values, k), self.classifier, self.classifier_bias)

    def attention(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → weights [K, B, H, T] by the running statistics, which sum to one over T."""
        return split(self._weights(tokens, torch.rsqrt(self.running_var + BATCH_NORM_EPS)), len(self.query))

    def _weights(self, tokens: Tensor, divisor: Tensor) -> Tensor:
        """Tokens [B, T, D] and divisors [K, D] → [B, K·H, T]."""
        folded = torch.einsum("khe,khed->khd", self.query, self.to_key) / math.sqrt(self.query.shape[-1])
        return weigh(tokens, folded * divisor[:, None])

    @torch.no_grad()
    def _observe(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [K, D] of this batch, the same for all K; the running ones follow as in `nn.BatchNorm1d`."""
        count = tokens.shape[0] * tokens.shape[1]
        variance, mean = torch.var_mean(tokens, dim=(0, 1), correction=0)
        self.running_mean.lerp_(mean.expand_as(self.running_mean), MOMENTUM)
        self.running_var.lerp_((variance * count / (count - 1)).expand_as(self.running_var), MOMENTUM)
        return mean.expand_as(self.running_mean), variance.expand_as(self.running_var)
