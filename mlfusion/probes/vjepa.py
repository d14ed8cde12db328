"""The attentive pooler of V-JEPA: a cross-attention block with an MLP, and blocks of self-attention before it if deeper."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlfusion.probes.contract import Shape, generators
from mlfusion.probes.pooling import (
    average,
    classifier,
    heads_of,
    layer_norm,
    linear,
    merge,
    ones,
    split,
    standard,
    truncated,
    weigh,
    zeros,
)

WIDER = 4  # the MLP's hidden layer


class VJepa(nn.Module):
    """K poolers of one block (arXiv 2404.08471): q + attention(q, LN(x)), then + MLP(LN(·)), then a linear map.

    The query is a constant: keys fold into it, tokens are averaged before they are projected to values, and the bias of
    the keys, which adds the same to every score of a head, is not among the parameters.
    """

    clip: ClassVar[float | None] = 5.0
    drops: ClassVar[bool] = False
    attends: ClassVar[bool] = True
    depth: ClassVar[int] = 1

    def __init__(self, shape: Shape, *, seeds: Sequence[int], dropouts: Sequence[float] = ()) -> None:
        """Weights from N(0, 0.02²) cut at ±2, what enters a residual by 1/√(2·block) less; biases 0. Heads 64 wide."""
        super().__init__()
        k, d, h, streams = len(seeds), shape.width, heads_of(shape.width), generators(seeds)
        self.blocks = nn.ModuleList(_Block(streams, d, rank=rank) for rank in range(1, self.depth))
        last = 0.02 / math.sqrt(2 * self.depth)
        self.query = truncated(streams, d)
        self.norm_scale, self.norm_shift = ones(k, d), zeros(k, d)
        self.to_query, self.query_bias = truncated(streams, h, d // h, d), zeros(k, h, d // h)
        self.to_key = truncated(streams, h, d // h, d)
        self.to_value, self.value_bias = truncated(streams, h, d // h, d), zeros(k, d)
        self.to_output, self.output_bias = truncated(streams, d, d, std=last), zeros(k, d)
        self.mlp = _Mlp(streams, d, std=last)
        self.classifier, self.classifier_bias = classifier(streams, shape.classes, d)

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → logits [K, B, C]."""
        k, h = self.to_key.shape[:2]
        if self.blocks:
            x = self._mix(tokens)
            averages = (split(self._weights(x), k) @ x).transpose(1, 2)  # [K, H, B, D]
        else:
            x = standard(tokens)
            averages = average(self._weights(x), x).unflatten(0, (k, h))
        # LN's scale and shift come after the average, whose weights sum to one.
        scaled = averages * self.norm_scale[:, None, None] + self.norm_shift[:, None, None]
        values = merge(torch.bmm(scaled.flatten(0, 1), self.to_value.flatten(0, 1).mT), k) + self.value_bias[:, None]
        pooled = self.query[:, None] + linear(values, self.to_output, self.output_bias)
        return linear(pooled + self.mlp(pooled), self.classifier, self.classifier_bias)

    def attention(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → weights [K, B, H, T] of the pooling block, which sum to one over T."""
        return split(self._weights(self._mix(tokens) if self.blocks else standard(tokens)), len(self.query))

    def _mix(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, D] through each configuration's own blocks → [K, B, T, D], standardised."""
        x = tokens.expand(len(self.query), *tokens.shape)
        for block in self.blocks:
            x = block(x)
        return standard(x)

    def _weights(self, x: Tensor) -> Tensor:
        """Standardised tokens [B, T, D] or [K, B, T, D] → [B, K·H, T]."""
        query = torch.einsum("khed,kd->khe", self.to_query, self.query) + self.query_bias
        folded = torch.einsum("khe,khed->khd", query, self.to_key) * self.norm_scale[:, None]
        folded = folded / math.sqrt(query.shape[-1])
        if x.ndim == 3:
            return weigh(x, folded)
        scores = x @ folded[:, None].mT  # [K, B, T, H]
        return torch.softmax(scores.permute(1, 0, 3, 2).flatten(1, 2), dim=-1)


class VJepa4(VJepa):
    """The pooler of four blocks with which V-JEPA 2 is probed (arXiv 2506.09985): three of self-attention come first.

    The output projection of the pooling block, which V-JEPA 2's code leaves out and V-JEPA's has, is kept.
    """

    depth: ClassVar[int] = 4


class _Mlp(nn.Module):
    """MLP(LN(x)) of K configurations: [K, …, D] → the same."""

    def __init__(self, streams: Sequence[torch.Generator], d: int, *, std: float) -> None:
        super().__init__()
        k = len(streams)
        self.norm_scale, self.norm_shift = ones(k, d), zeros(k, d)
        self.widen, self.widen_bias = truncated(streams, WIDER * d, d), zeros(k, WIDER * d)
        self.narrow, self.narrow_bias = truncated(streams, d, WIDER * d, std=std), zeros(k, d)

    def forward(self, x: Tensor) -> Tensor:
        hidden = linear(layer_norm(x, self.norm_scale, self.norm_shift), self.widen, self.widen_bias)
        return linear(F.gelu(hidden), self.narrow, self.narrow_bias)


class _Block(nn.Module):
    """A pre-norm transformer block of K configurations: [K, B, T, D] → the same."""

    def __init__(self, streams: Sequence[torch.Generator], d: int, *, rank: int) -> None:
        """`rank` counts the blocks from 1."""
        super().__init__()
        k, std = len(streams), 0.02 / math.sqrt(2 * rank)
        self.norm_scale, self.norm_shift = ones(k, d), zeros(k, d)
        self.to_all, self.all_bias = truncated(streams, 3 * d, d), zeros(k, 3 * d)
        self.to_output, self.output_bias = truncated(streams, d, d, std=std), zeros(k, d)
        self.mlp = _Mlp(streams, d, std=std)

    def forward(self, x: Tensor) -> Tensor:
        heads = heads_of(x.shape[-1])
        normed = layer_norm(x, self.norm_scale, self.norm_shift)
        query, key, value = linear(normed, self.to_all, self.all_bias).unflatten(-1, (3, heads, -1)).unbind(-3)
        mixed = F.scaled_dot_product_attention(*(part.transpose(-3, -2) for part in (query, key, value)))
        x = x + linear(mixed.transpose(-3, -2).flatten(-2), self.to_output, self.output_bias)
        return x + self.mlp(x)
