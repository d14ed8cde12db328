"""What every probe of the family agrees on, so that training and protocol need to know none of them by name."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes from which a probe is built."""

    tokens: int  # T, tokens of an image
    width: int  # D, channels of a token
    classes: int  # C
    heads: int = 1  # H, attention heads; probes without attention ignore it


class Probe(Protocol):
    """A population of K configurations of one head; a population of one is the plain probe.

    Every parameter and buffer carries a leading axis K, and no number of one configuration depends on another.
    """

    clip: ClassVar[float | None]  # largest gradient norm of a configuration
    drops: ClassVar[bool]  # whether the dropout rate is one of its hyper-parameters
    attends: ClassVar[bool]  # whether it has `attention(tokens) -> [K, B, H, T]`

    def __init__(self, shape: Shape, *, seeds: Sequence[int], dropouts: Sequence[float]) -> None:
        """`seeds[k]` starts all random streams of configuration k."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → logits [K, B, C]."""

    def attention(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → weights [K, B, H, T], which sum to one over T."""

    def train(self, mode: bool = True) -> nn.Module: ...
    def eval(self) -> nn.Module: ...
    def to(self, device: torch.device, dtype: torch.dtype) -> nn.Module: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> object: ...


def generators(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """A random stream for each configuration: what it draws does not depend on its company."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def uniform(streams: Sequence[torch.Generator], *size: int, fan_in: int) -> nn.Parameter:
    """[K, *size] from U(−1/√fan_in, 1/√fan_in), PyTorch's default for a Linear's weight and bias alike."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.stack([torch.empty(size).uniform_(-bound, bound, generator=g) for g in streams]))


def bits(count: int, stream: torch.Generator) -> Tensor:
    """`count` random numbers of 16 bits, int16: four from each draw of the generator, which is what costs."""
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=stream.device)
    return words.random_(-(2**63), None, generator=stream).view(torch.int16)[:count]


def kept(rate: float, size: tuple[int, ...], stream: torch.Generator) -> Tensor:
    """Dropout factors in float32: 0 at `rate`, to 1 part in 65,536, and otherwise what makes their expectation exactly 1."""
    dropped = round(rate * 2**16)
    return (bits(math.prod(size), stream) >= dropped - 2**15).view(size) * (2**16 / (2**16 - dropped))
