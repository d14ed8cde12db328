"""The attentive pooler of V-JEPA: a cross-attention block with an MLP, and blocks of self-attention before it if deeper."""

import math
from abc import ABC
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlfusion.probing.heads.contract import HeadModule, HeadShape, classifier, generators, ones, truncated_normal, zeros
from mlfusion.probing.heads.pooling import (
    by_configuration,
    concat_heads,
    folded_attention,
    head_count,
    layer_norm,
    linear,
    standardize,
    weighted_sums,
)
from mlfusion.shapes import Float

MLP_RATIO = 4  # width of the MLP's hidden layer, in widths of a token


class AttentivePooler(HeadModule, ABC):
    """K poolers: blocks of self-attention, then q + attention(q, LN(x)), then + MLP(LN(·)), then a linear map.

    The query is a constant: keys fold into it, tokens are averaged before they are projected to values, and the bias of
    the keys, which adds the same to every score of a head, is not among the parameters. Subclasses define the depth.
    """

    depth: ClassVar[int]  # number of blocks, with the pooling block

    def __init__(self, shape: HeadShape, *, seeds: Sequence[int], dropouts: Sequence[float] = ()) -> None:
        """Weights from N(0, 0.02²) cut at ±2, those into a residual divided by √(2·block); biases 0; heads 64 wide."""
        super().__init__()
        k, d, h, streams = len(seeds), shape.width, head_count(shape.width), generators(seeds)
        self.blocks = nn.ModuleList(_Block(streams, d, rank=rank) for rank in range(1, self.depth))
        last_std = 0.02 / math.sqrt(2 * self.depth)
        self.query = truncated_normal(streams, d)
        self.norm_scale, self.norm_shift = ones(k, d), zeros(k, d)
        self.to_query, self.query_bias = truncated_normal(streams, h, d // h, d), zeros(k, h, d // h)
        self.to_key = truncated_normal(streams, h, d // h, d)
        self.to_value, self.value_bias = truncated_normal(streams, h, d // h, d), zeros(k, d)
        self.to_output, self.output_bias = truncated_normal(streams, d, d, std=last_std), zeros(k, d)
        self.mlp = _Mlp(streams, d, std=last_std)
        self.classifier, self.classifier_bias = classifier(streams, shape.classes, d)

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B C"]:
        k, h = self.to_key.shape[:2]
        if self.blocks:
            x = self._through_blocks(tokens)
            averages = (by_configuration(self._weights(x), k) @ x).transpose(1, 2)  # [K, H, B, D]
        else:
            x = standardize(tokens)
            averages = weighted_sums(self._weights(x), x).unflatten(0, (k, h))
        # LN's scale and shift come after the average, whose weights sum to one.
        scaled = averages * self.norm_scale[:, None, None] + self.norm_shift[:, None, None]
        values = concat_heads(torch.bmm(scaled.flatten(0, 1), self.to_value.flatten(0, 1).mT), k)
        attended = linear(values + self.value_bias[:, None], self.to_output, self.output_bias)
        pooled = self.query[:, None] + attended
        return linear(pooled + self.mlp(pooled), self.classifier, self.classifier_bias)

    def attention(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B H T"]:
        """Normalised tokens → weights of the pooling block, which sum to one over T."""
        x = self._through_blocks(tokens) if self.blocks else standardize(tokens)
        return by_configuration(self._weights(x), len(self.query))

    def _through_blocks(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B T D"]:
        """Tokens through each configuration's own blocks, standardised."""
        x = tokens.expand(len(self.query), *tokens.shape)
        for block in self.blocks:
            x = block(x)
        return standardize(x)

    def _weights(self, x: Float[Tensor, "B T D"] | Float[Tensor, "K B T D"]) -> Float[Tensor, "B KH T"]:
        """Standardised tokens, the same for all configurations or each one's own → weights, which sum to one over T."""
        query = torch.einsum("khed,kd->khe", self.to_query, self.query) + self.query_bias
        folded = torch.einsum("khe,khed->khd", query, self.to_key) * self.norm_scale[:, None]
        folded = folded / math.sqrt(query.shape[-1])
        if x.ndim == 3:
            return folded_attention(x, folded)
        scores = x @ folded[:, None].mT  # [K, B, T, H]
        return torch.softmax(scores.permute(1, 0, 3, 2).flatten(1, 2), dim=-1)


class VJepa(AttentivePooler):
    """The pooler of one block of V-JEPA (arXiv 2404.08471)."""

    depth: ClassVar[int] = 1


class VJepa4(AttentivePooler):
    """The pooler of four blocks with which V-JEPA 2 is probed (arXiv 2506.09985): three of self-attention come first.

    The output projection of the pooling block, which V-JEPA 2's code leaves out and V-JEPA's has, is kept.
    """

    depth: ClassVar[int] = 4


class _Mlp(nn.Module):
    """MLP(LN(x)) of K configurations."""

    def __init__(self, streams: Sequence[torch.Generator], d: int, *, std: float) -> None:
        super().__init__()
        k = len(streams)
        self.norm_scale, self.norm_shift = ones(k, d), zeros(k, d)
        self.widen, self.widen_bias = truncated_normal(streams, MLP_RATIO * d, d), zeros(k, MLP_RATIO * d)
        self.narrow, self.narrow_bias = truncated_normal(streams, d, MLP_RATIO * d, std=std), zeros(k, d)

    def forward(self, x: Float[Tensor, "K *axes D"]) -> Float[Tensor, "K *axes D"]:
        hidden = linear(layer_norm(x, self.norm_scale, self.norm_shift), self.widen, self.widen_bias)
        return linear(F.gelu(hidden), self.narrow, self.narrow_bias)


class _Block(nn.Module):
    """A pre-norm transformer block of K configurations."""

    def __init__(self, streams: Sequence[torch.Generator], d: int, *, rank: int) -> None:
        """`rank` counts the blocks from 1."""
        super().__init__()
        k, std = len(streams), 0.02 / math.sqrt(2 * rank)
        self.norm_scale, self.norm_shift = ones(k, d), zeros(k, d)
        self.to_all, self.all_bias = truncated_normal(streams, 3 * d, d), zeros(k, 3 * d)
        self.to_output, self.output_bias = truncated_normal(streams, d, d, std=std), zeros(k, d)
        self.mlp = _Mlp(streams, d, std=std)

    def forward(self, x: Float[Tensor, "K B T D"]) -> Float[Tensor, "K B T D"]:
        heads = head_count(x.shape[-1])
        normed = layer_norm(x, self.norm_scale, self.norm_shift)
        qkv = linear(normed, self.to_all, self.all_bias).unflatten(-1, (3, heads, -1))  # [K, B, T, 3, H, E]
        q, k, v = (each.transpose(-3, -2) for each in qkv.unbind(-3))  # [K, B, H, T, E]
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)
        x = x + linear(attended, self.to_output, self.output_bias)
        return x + self.mlp(x)
