"""Gated AbMIL: a small network scores every token by itself, and the tokens are averaged by the softmax of their scores."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mlfusion.probing.heads.contract import HeadModule, HeadShape, classifier, generators, uniform
from mlfusion.probing.heads.pooling import by_configuration, linear, standardize, weighted_sums
from mlfusion.shapes import Float

HIDDEN = 128  # the paper's L


class AbMIL(HeadModule):
    """K gated attention poolings (arXiv 1802.04712, equation 9; AbMILP as a probe in arXiv 2412.03215), linear map.

    Token t has the weight exp(wᵀ(tanh(V x_t + c) ⊙ σ(U x_t + d))). The scores are not linear in the tokens, so nothing can be
    folded. Tokens of length 1 would make the gates almost linear, so they get a LayerNorm without scale and shift.
    """

    def __init__(self, shape: HeadShape, *, seeds: Sequence[int], dropouts: Sequence[float] = ()) -> None:
        """PyTorch's default initialisation; `shape.heads` and `dropouts` are ignored."""
        super().__init__()
        d, streams = shape.width, generators(seeds)
        self.hidden, self.hidden_bias = uniform(streams, HIDDEN, d, fan_in=d), uniform(streams, HIDDEN, fan_in=d)
        self.gate, self.gate_bias = uniform(streams, HIDDEN, d, fan_in=d), uniform(streams, HIDDEN, fan_in=d)
        self.score = uniform(streams, HIDDEN, fan_in=HIDDEN)
        self.classifier, self.classifier_bias = classifier(streams, shape.classes, d)

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B C"]:
        x = standardize(tokens)
        return linear(weighted_sums(self._weights(x), x), self.classifier, self.classifier_bias)

    def attention(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B 1 T"]:
        return by_configuration(self._weights(standardize(tokens)), len(self.score))

    def _weights(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B K T"]:
        """Standardised tokens → weights, which sum to one over T."""
        # (B, T, D) × (D, K·L): one wide product for all configurations.
        hidden = F.linear(x, self.hidden.flatten(0, 1), self.hidden_bias.flatten())
        gate = F.linear(x, self.gate.flatten(0, 1), self.gate_bias.flatten())
        gated = (torch.tanh(hidden) * torch.sigmoid(gate)).unflatten(-1, self.score.shape)  # [B, T, K, L]
        return torch.softmax(torch.einsum("btkl,kl->bkt", gated, self.score), dim=-1)
