"""The interface of every head, so that training and protocol depend on no head by name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mlfusion.probing.training.batches import to_device
from mlfusion.shapes import Float


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """The sizes from which a head is built."""

    tokens: int  # T, tokens of an image
    width: int  # D, channels of a token
    classes: int  # C
    heads: int = 1  # H, attention heads; a module without attention ignores it


class HeadModule(nn.Module, ABC):
    """A population of K configurations of one head; a population of one is the plain head.

    Every parameter and buffer has a leading axis K, and no number of one configuration depends on another. A head that
    is trained is built from `(shape: HeadShape, *, seeds: Sequence[int], dropouts: Sequence[float])`: one seed and one
    rate of dropout for each configuration; `seeds[k]` starts all random numbers of configuration k.
    """

    max_grad_norm: ClassVar[float | None] = 5.0  # each configuration's gradient is clipped to it
    is_convex: ClassVar[bool] = False  # whether the loss is, so that training amplifies no rounding
    has_dropout: ClassVar[bool] = False  # whether the rate of dropout is one of its hyper-parameters
    has_attention: ClassVar[bool] = True  # whether `attention` is implemented

    @abstractmethod
    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B C"]:
        """Normalised tokens → logits, or predicted numbers."""

    def attention(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B H T"]:
        """Normalised tokens → attention weights, which sum to one over T.

        Raises:
            TypeError: this head has no attention; ask `has_attention` first.
        """
        raise TypeError(f"a head of class {type(self).__name__} has no attention")


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A random stream for each configuration, which does not depend on the other configurations."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uniform(streams: Sequence[torch.Generator], *size: int, fan_in: int) -> nn.Parameter:
    """[K, *size] from U(−1/√fan_in, 1/√fan_in), PyTorch's default for the weight and bias of a Linear."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.stack([torch.empty(size).uniform_(-bound, bound, generator=g) for g in streams]))


def truncated_normal(streams: Sequence[torch.Generator], *size: int, std: float = 0.02) -> nn.Parameter:
    """[K, *size] from N(0, std²) cut at ±2, as transformers are initialised."""
    members = [nn.init.trunc_normal_(torch.empty(size), std=std, generator=stream) for stream in streams]
    return nn.Parameter(torch.stack(members))


def normal(streams: Sequence[torch.Generator], *size: int, std: float = 0.02) -> nn.Parameter:
    """[K, *size] from N(0, std²)."""
    return nn.Parameter(torch.stack([torch.randn(size, generator=stream) for stream in streams]) * std)


def zeros(k: int, *size: int) -> nn.Parameter:
    """[K, *size] of zeros."""
    return nn.Parameter(torch.zeros(k, *size))


def ones(k: int, *size: int) -> nn.Parameter:
    """[K, *size] of ones."""
    return nn.Parameter(torch.ones(k, *size))


def classifier(streams: Sequence[torch.Generator], classes: int, width: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight [K, C, D] and bias [K, C], initialised as in PyTorch's Linear."""
    return uniform(streams, classes, width, fan_in=width), uniform(streams, classes, fan_in=width)


def dropout_mask(
    rate: float, size: tuple[int, ...], stream: torch.Generator, device: torch.device
) -> Float[Tensor, "..."]:
    """Factors in float32: 0 at `rate`, to 1 part in 65,536, and otherwise the number that makes their expectation exactly 1.

    The random bits come from the processor's generator, so that every device drops the same weights.
    """
    count, dropped = math.prod(size), round(rate * 2**16)
    words = torch.empty(-(-count // 4), dtype=torch.int64)  # a draw is slow and gives four numbers of 16 bits
    bits = to_device(words.random_(-(2**63), None, generator=stream).view(torch.int16)[:count], device)
    return (bits >= dropped - 2**15).view(size) * (2**16 / (2**16 - dropped))
