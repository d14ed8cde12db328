"""What every head has in common, so that training and protocol need to know none of them by name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mlfusion.shapes import Float, Int


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """The sizes from which a head is built."""

    tokens: int  # T, tokens of an image
    width: int  # D, channels of a token
    classes: int  # C
    heads: int = 1  # H, attention heads; a module without attention ignores it


class HeadModule(nn.Module, ABC):
    """A population of K configurations of one head; a population of one is the plain head.

    Every parameter and buffer carries a leading axis K, and no number of one configuration depends on another. A head that
    is trained is built from `(shape: HeadShape, *, seeds: Sequence[int], dropouts: Sequence[float])`: one seed and one
    rate of dropout for each configuration; `seeds[k]` starts all random numbers of configuration k.
    """

    max_grad_norm: ClassVar[float | None] = None  # to which the gradient of each configuration is clipped
    has_dropout: ClassVar[bool] = False  # whether the rate of dropout is one of its hyper-parameters; see `rng_streams`
    has_attention: ClassVar[bool] = False

    @abstractmethod
    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B C"]:
        """Normalised tokens → logits, or predicted numbers."""

    def attention(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B H T"]:
        """Normalised tokens → attention weights, which sum to one over T.

        Raises:
            TypeError: this head has no attention; ask `has_attention` first.
        """
        raise TypeError(f"a head of class {type(self).__name__} has no attention")


def generators(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """A random stream for each configuration: what it draws does not depend on its company."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def uniform(streams: Sequence[torch.Generator], *size: int, fan_in: int) -> nn.Parameter:
    """[K, *size] from U(−1/√fan_in, 1/√fan_in), PyTorch's default for a Linear's weight and bias alike."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.stack([torch.empty(size).uniform_(-bound, bound, generator=g) for g in streams]))


def random_int16(count: int, stream: torch.Generator) -> Int[Tensor, " count"]:
    """Random numbers of 16 bits: four from each draw of the generator, which is what costs."""
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=stream.device)
    return words.random_(-(2**63), None, generator=stream).view(torch.int16)[:count]


def dropout_mask(rate: float, size: tuple[int, ...], stream: torch.Generator) -> Float[Tensor, "..."]:
    """Factors in float32: 0 at `rate`, to 1 part in 65,536, and otherwise the number that makes their expectation exactly 1."""
    dropped = round(rate * 2**16)
    return (random_int16(math.prod(size), stream) >= dropped - 2**15).view(size) * (2**16 / (2**16 - dropped))
