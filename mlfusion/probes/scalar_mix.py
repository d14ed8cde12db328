"""The scalar mix: one weighted mean of an image's tokens, its weights the same for every image, and a linear map."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mlfusion.probes.contract import Shape, generators
from mlfusion.probes.pooling import classifier, linear, ones, zeros


class ScalarMix(nn.Module):
    """K mixes γ Σ_t softmax(s)_t x_t of ELMo (arXiv 1802.05365, equation 1; S3PRL's probes in arXiv 2105.01051).

    What ELMo gets from a LayerNorm before the mix, that no layer drowns another, tokens of length 1 have already. The
    order of the tokens matters: each place has a weight of its own.
    """

    clip: ClassVar[float | None] = None
    drops: ClassVar[bool] = False
    attends: ClassVar[bool] = True

    def __init__(self, shape: Shape, *, seeds: Sequence[int], dropouts: Sequence[float] = ()) -> None:
        """All tokens alike and γ = 1 at the start, as in ELMo; `shape.heads` and `dropouts` are ignored."""
        super().__init__()
        k, streams = len(seeds), generators(seeds)
        self.scores = zeros(k, shape.tokens)
        self.scale = ones(k)
        self.classifier, self.classifier_bias = classifier(streams, shape.classes, shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → logits [K, B, C]."""
        weights = torch.softmax(self.scores, dim=-1) * self.scale[:, None]
        return linear(torch.einsum("kt,btd->kbd", weights, tokens), self.classifier, self.classifier_bias)

    def attention(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → the mix [K, B, 1, T], the same for every image."""
        return torch.softmax(self.scores, dim=-1)[:, None, None].expand(-1, len(tokens), -1, -1)
