"""The scalar mix: one weighted mean of an image's tokens, with the same weights for every image, and a linear map."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mlfusion.probing.heads.contract import HeadModule, HeadShape, classifier, generators, ones, zeros
from mlfusion.probing.heads.pooling import linear
from mlfusion.shapes import Float


class ScalarMix(HeadModule):
    """K mixes γ Σ_t softmax(s)_t x_t of ELMo (arXiv 1802.05365, equation 1; S3PRL's probes in arXiv 2105.01051).

    ELMo's LayerNorm before the mix, which keeps one layer from drowning another, is not needed: tokens have length 1. The
    order of the tokens matters: each place has a weight of its own.
    """

    max_grad_norm: ClassVar[float | None] = None

    def __init__(self, shape: HeadShape, *, seeds: Sequence[int], dropouts: Sequence[float] = ()) -> None:
        """Equal weights and γ = 1 at the start, as in ELMo; `shape.heads` and `dropouts` are ignored."""
        super().__init__()
        k, streams = len(seeds), generators(seeds)
        self.scores = zeros(k, shape.tokens)
        self.scale = ones(k)
        self.classifier, self.classifier_bias = classifier(streams, shape.classes, shape.width)

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B C"]:
        weights = torch.softmax(self.scores, dim=-1) * self.scale[:, None]
        return linear(torch.einsum("kt,btd->kbd", weights, tokens), self.classifier, self.classifier_bias)

    def attention(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B 1 T"]:
        """Normalised tokens → the weights of the mix, the same for every image."""
        return torch.softmax(self.scores, dim=-1)[:, None, None].expand(-1, len(tokens), -1, -1)
