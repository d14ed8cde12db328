"""The linear head, the baseline of every other head."""

from abc import ABC
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mlfusion.probing.heads.contract import HeadModule, HeadShape, generators, uniform
from mlfusion.shapes import Float


class LinearMap(HeadModule, ABC):
    """K linear maps of the concatenated tokens of an image, computed by one product; subclasses define the weights."""

    max_grad_norm: ClassVar[float | None] = None
    is_convex: ClassVar[bool] = True
    has_attention: ClassVar[bool] = False

    weight: nn.Parameter  # [K, C, T·D]
    bias: nn.Parameter  # [K, C]

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B C"]:
        # (B, T·D) × (T·D, K·C): one wide product for all configurations.
        logits = F.linear(tokens.flatten(1), self.weight.flatten(0, 1), self.bias.flatten())
        return logits.view(len(tokens), *self.bias.shape).transpose(0, 1)


class Linear(LinearMap):
    """K linear classifiers on the concatenated tokens of an image (arXiv 1610.01644), trained."""

    def __init__(self, shape: HeadShape, *, seeds: Sequence[int], dropouts: Sequence[float] = ()) -> None:
        """PyTorch's default initialisation, drawn for each configuration from its own seed; `dropouts` are ignored."""
        super().__init__()
        inputs, streams = shape.tokens * shape.width, generators(seeds)
        self.weight = uniform(streams, shape.classes, inputs, fan_in=inputs)
        self.bias = uniform(streams, shape.classes, fan_in=inputs)
