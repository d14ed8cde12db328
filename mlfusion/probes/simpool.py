"""SimPool: the mean token asks, all tokens answer, and what they answer is averaged by a generalised mean."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mlfusion.probes.contract import Shape, generators, uniform
from mlfusion.probes.pooling import classifier, linear, standard

EXPONENT = 1.25  # the paper's γ for vision transformers
LEAST = 1e-6  # keeps the power's gradient finite at the smallest value


class SimPool(nn.Module):
    """K poolings (Σ_t a_t (x_t − min)^γ)^(1/γ) with a = softmax(K x̂ · Q mean(x) / √D) (arXiv 2309.06891), linear map.

    The query depends on the image, but keys still fold into it: Kᵀ Q mean(x) is one vector an image, not one a token. The
    minimum is that of the image, where the paper's code takes the batch's, by which the score of an image would depend
    on its neighbours. LayerNorm has no scale and shift here; they would be the same as a factor in Q, K and the map.
    """

    clip: ClassVar[float | None] = 5.0
    drops: ClassVar[bool] = False
    attends: ClassVar[bool] = True

    def __init__(self, shape: Shape, *, seeds: Sequence[int], dropouts: Sequence[float] = ()) -> None:
        """PyTorch's default initialisation; `shape.heads` and `dropouts` are ignored."""
        super().__init__()
        d, streams = shape.width, generators(seeds)
        self.to_query = uniform(streams, d, d, fan_in=d)
        self.to_key = uniform(streams, d, d, fan_in=d)
        self.classifier, self.classifier_bias = classifier(streams, shape.classes, d)

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → logits [K, B, C]."""
        x = standard(tokens)
        raised = (x - x.amin((1, 2), keepdim=True) + LEAST) ** EXPONENT
        pooled = torch.bmm(self._weights(x), raised).transpose(0, 1)  # [K, B, D]
        return linear(pooled ** (1 / EXPONENT), self.classifier, self.classifier_bias)

    def attention(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → weights [K, B, 1, T], which sum to one over T."""
        return self._weights(standard(tokens)).transpose(0, 1)[:, :, None]

    def _weights(self, x: Tensor) -> Tensor:
        """LayerNormed tokens [B, T, D] → [B, K, T]."""
        query = torch.matmul(x.mean(1), self.to_query.mT)  # [K, B, D]
        folded = torch.bmm(query, self.to_key) / math.sqrt(x.shape[-1])
        return torch.softmax(torch.bmm(folded.transpose(0, 1), x.mT), dim=-1)
