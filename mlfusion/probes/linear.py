"""The linear probe, the measure that every other probe is held against."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mlfusion.probes.contract import Shape, generators, uniform
from mlfusion.shapes import Float


class Linear(nn.Module):
    """K linear classifiers on the concatenated tokens of an image (arXiv 1610.01644), through one product."""

    clip: ClassVar[float | None] = None
    drops: ClassVar[bool] = False
    attends: ClassVar[bool] = False

    def __init__(self, shape: Shape, *, seeds: Sequence[int], dropouts: Sequence[float] = ()) -> None:
        """PyTorch's default initialisation, drawn for each configuration from its own seed; `dropouts` are ignored."""
        super().__init__()
        inputs = shape.tokens * shape.width
        streams = generators(seeds)
        self.weight = uniform(streams, shape.classes, inputs, fan_in=inputs)  # [K, C, T·D]
        self.bias = uniform(streams, shape.classes, fan_in=inputs)  # [K, C]

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B C"]:
        """Normalised tokens [B, T, D] → logits [K, B, C]."""
        # (B, T·D) × (T·D, K·C): the widest product there is, for all configurations at once.
        logits = F.linear(tokens.flatten(1), self.weight.flatten(0, 1), self.bias.flatten())
        return logits.view(len(tokens), *self.bias.shape).transpose(0, 1)

    def attention(self, tokens: Tensor) -> Tensor:
        """A linear probe attends to nothing.

        Raises:
            TypeError: always; ask `attends` first.
        """
        raise TypeError("a linear probe has no attention")
