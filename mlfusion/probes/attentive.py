"""The attentive probe of the study (ALF, AAT), folded so that nothing as wide as its heads is computed per token.

Its query is learned and does not depend on the image, so per head the key projection folds into one vector `u` of width
D. Attention is linear in the values, so tokens are averaged first and projected after. The function is the same as that
of projecting keys and values per token, at about a twentieth of the arithmetic.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlfusion.probes.contract import Shape, generators, uniform

QUERY_STD = 0.02
LAYER_NORM_EPS = 1e-5
BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1
MASKS = 0x9E3779B97F4A7C15


class Attentive(nn.Module):
    """K probes of cross-attention from one learned query (arXiv 2601.09322, its pooling from CAE, arXiv 2202.03026).

    LN_q(q0) attends to LN_k(x), LN_v(x) with H heads of width e = 2⌊D/H⌋, then output projection, BatchNorm, Linear.
    The shift of LN_k is not among the parameters: it adds the same constant to every score of a head, which the softmax
    takes out again, so it has neither effect nor gradient.
    """

    clip: ClassVar[float | None] = 5.0
    drops: ClassVar[bool] = True
    attends: ClassVar[bool] = True

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, shape: Shape, *, seeds: Sequence[int], dropouts: Sequence[float]) -> None:
        """Query from N(0, 0.02²), projections as PyTorch's Linear; each configuration from its own seed.

        Args:
            shape: sizes; a head is `2 * (width // heads)` wide.
            seeds: one integer for each configuration, which starts its initialisation and its dropout masks.
            dropouts: rate of attention dropout of each configuration, in [0, 1).
        """
        super().__init__()
        k, d, h, e = len(seeds), shape.width, shape.heads, 2 * (shape.width // shape.heads)
        streams = generators(seeds)
        self.query = nn.Parameter(torch.stack([torch.randn(d, generator=g) for g in streams]) * QUERY_STD)
        self.query_scale, self.query_shift = nn.Parameter(torch.ones(k, d)), nn.Parameter(torch.zeros(k, d))
        self.key_scale = nn.Parameter(torch.ones(k, d))
        self.value_scale, self.value_shift = nn.Parameter(torch.ones(k, d)), nn.Parameter(torch.zeros(k, d))
        self.to_query = uniform(streams, h, e, d, fan_in=d)
        self.to_key = uniform(streams, h, e, d, fan_in=d)
        self.to_value = uniform(streams, h, e, d, fan_in=d)
        self.to_output = uniform(streams, d, h * e, fan_in=h * e)
        self.output_bias = uniform(streams, d, fan_in=h * e)
        self.norm_scale, self.norm_shift = nn.Parameter(torch.ones(k, d)), nn.Parameter(torch.zeros(k, d))
        self.register_buffer("running_mean", torch.zeros(k, d))
        self.register_buffer("running_var", torch.ones(k, d))
        self.classifier = uniform(streams, shape.classes, d, fan_in=d)
        self.classifier_bias = uniform(streams, shape.classes, fan_in=d)
        self.dropouts = tuple(dropouts)
        self._seeds = tuple(seeds)
        self._masks: list[torch.Generator] = []

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Normalised tokens [B, T, D] → logits [K, B, C].

        Args:
            tokens: the same images for all configurations.
            keep: factors on the attention weights [K, B, H, T], 0 or 1/(1 − rate). By default they are drawn from each
                configuration's own stream while training; in evaluation nothing is dropped.
        """
        k, h, e, d = self.to_value.shape
        b = len(tokens)
        x = F.layer_norm(tokens, (d,), eps=LAYER_NORM_EPS)
        weights = self._weights(x)  # [B, K·H, T]
        # Scale and shift of LN_v go to the projection, which is smaller than the average of a batch.
        project = (self.to_value * self.value_scale[:, None, None]).flatten(0, 1)  # [K·H, e, D]
        shift = torch.einsum("khed,kd->khe", self.to_value, self.value_shift).flatten(0, 1)[:, None]  # [K·H, 1, e]
        # What is added to every image alike has no gradient in training: BatchNorm takes it out again. The little that
        # rounding would leave, AdamW would blow up to steps of the full learning rate.
        constant: Tensor = shift
        bias: Tensor = self.output_bias
        if self.training:
            constant, bias = constant.detach(), bias.detach()
        if keep is None and self.training and any(self.dropouts):
            keep = self._draw(weights)
        if keep is not None:
            kept = weights * keep.transpose(0, 1).reshape(weights.shape)
            # The shift follows the sum of the weights, which dropping moves away from one; by exactly 0 at a rate of 0.
            constant = constant + (kept - weights).sum(-1).T[:, :, None] * shift
            weights = kept
        average = torch.bmm(weights, x).transpose(0, 1)  # [K·H, B, D], a view: the product reads it strided
        value = torch.bmm(average, project.mT) + constant  # [K·H, B, e]
        value = value.view(k, h, b, e).transpose(1, 2).reshape(k, b, h * e)
        output = torch.baddbmm(bias[:, None], value, self.to_output.mT)  # [K, B, D]
        return torch.baddbmm(self.classifier_bias[:, None], self._batch_norm(output), self.classifier.mT)

    def attention(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → weights [K, B, H, T] without dropout, which sum to one over T."""
        k, h, _, d = self.to_key.shape
        weights = self._weights(F.layer_norm(tokens, (d,), eps=LAYER_NORM_EPS))
        return weights.view(len(weights), k, h, -1).transpose(0, 1)

    def _weights(self, x: Tensor) -> Tensor:
        """LayerNormed tokens without affine [B, T, D] → softmax of the scores over T, [B, K·H, T]."""
        k, h, e, d = self.to_key.shape
        query = F.layer_norm(self.query, (d,), eps=LAYER_NORM_EPS) * self.query_scale + self.query_shift
        projected = torch.bmm(self.to_query.flatten(1, 2), query[:, :, None]).view(k * h, 1, e) / math.sqrt(e)
        u = torch.bmm(projected, self.to_key.flatten(0, 1)).view(k, h, d) * self.key_scale[:, None]
        return torch.softmax((x @ u.view(k * h, d).T).transpose(1, 2), dim=-1)

    def _batch_norm(self, x: Tensor) -> Tensor:
        """BatchNorm1d of every configuration: [K, B, D] over B while training, by running statistics otherwise."""
        k, b, d = x.shape
        normed = F.batch_norm(
            x.transpose(0, 1).reshape(b, k * d),
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.norm_scale.view(-1),
            self.norm_shift.view(-1),
            training=self.training,
            momentum=BATCH_NORM_MOMENTUM,
            eps=BATCH_NORM_EPS,
        )
        return normed.view(b, k, d).transpose(0, 1)

    def _draw(self, weights: Tensor) -> Tensor:
        """Dropout factors [K, B, H, T] for weights [B, K·H, T]; a rate of 0 draws nothing and keeps everything."""
        if not self._masks:
            # Not the seeds of the initialisation: the first masks would repeat its numbers.
            self._masks = generators([seed ^ MASKS for seed in self._seeds], weights.device)
        k, h = self.to_key.shape[:2]
        b, _, t = weights.shape
        keep = weights.new_ones(k, b, h, t)
        for mask, rate, stream in zip(keep, self.dropouts, self._masks, strict=True):
            if rate:
                mask.bernoulli_(1 - rate, generator=stream).div_(1 - rate)
        return keep

    @staticmethod
    def bytes_each(shape: Shape, batch: int) -> int:
        """Averages and their gradients (the large ones), attention weights, projections; weights and both moments."""
        d, h, t = shape.width, shape.heads, shape.tokens
        he = h * 2 * (d // h)
        parameters = 4 * he * d + (shape.classes + 9) * d
        return 4 * (8 * parameters + batch * (3 * h * d + 7 * h * t + 6 * he + 8 * d + 4 * shape.classes))
