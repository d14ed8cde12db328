"""SimPool: the mean token is the query, the tokens are keys and values, and values are averaged by a generalised mean."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mlfusion.probing.heads.contract import HeadModule, HeadShape, classifier, generators, uniform
from mlfusion.probing.heads.pooling import linear, standardize
from mlfusion.shapes import Float

EXPONENT = 1.25  # the paper's γ for vision transformers
EPSILON = 1e-6  # keeps the power's gradient finite at the smallest value


class SimPool(HeadModule):
    """K poolings (Σ_t a_t (x_t − min)^γ)^(1/γ) with a = softmax(K x̂ · Q mean(x) / √D) (arXiv 2309.06891), linear map.

    The query depends on the image, but keys still fold into it: Kᵀ Q mean(x) is one vector per image, not one per token.
    The minimum is taken over the image. The paper's code takes it over the batch, so that the score of an image would
    depend on its neighbours. LayerNorm has no scale and shift here; they would be the same as a factor in Q, K and the map.
    """

    def __init__(self, shape: HeadShape, *, seeds: Sequence[int], dropouts: Sequence[float] = ()) -> None:
        """PyTorch's default initialisation; `shape.heads` and `dropouts` are ignored."""
        super().__init__()
        d, streams = shape.width, generators(seeds)
        self.to_query = uniform(streams, d, d, fan_in=d)
        self.to_key = uniform(streams, d, d, fan_in=d)
        self.classifier, self.classifier_bias = classifier(streams, shape.classes, d)

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B C"]:
        x = standardize(tokens)
        raised = (x - x.amin((1, 2), keepdim=True) + EPSILON) ** EXPONENT
        pooled = torch.bmm(self._weights(x), raised).transpose(0, 1)  # [K, B, D]
        return linear(pooled ** (1 / EXPONENT), self.classifier, self.classifier_bias)

    def attention(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B 1 T"]:
        return self._weights(standardize(tokens)).transpose(0, 1)[:, :, None]

    def _weights(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B K T"]:
        """Standardised tokens → weights, which sum to one over T."""
        query = torch.matmul(x.mean(1), self.to_query.mT)  # [K, B, D]
        folded = torch.bmm(query, self.to_key) / math.sqrt(x.shape[-1])
        return torch.softmax(torch.bmm(folded.transpose(0, 1), x.mT), dim=-1)
