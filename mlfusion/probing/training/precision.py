"""The precision of matrix products in training, and which one is faster on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from time import perf_counter

import torch

from mlfusion.specs.options import Precision


@dataclass(frozen=True)
class Numerics:
    """The device of a computation, and the types of its numbers."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32  # type of parameters, statistics and losses
    bf16: bool = False  # whether matrix products are bfloat16

    @classmethod
    def of(cls, device: str, precision: Precision) -> "Numerics":
        """float32 with matrix products of this precision; 'auto' is the one that is faster on the device."""
        return cls(device, bf16=resolve(precision, device) == "bfloat16")

    @property
    def is_accelerated(self) -> bool:
        """Whether the device works on one block at a time, rather than one on each core."""
        return torch.device(self.device).type != "cpu"


@contextmanager
def tensor_cores(device: str) -> Iterator[None]:
    """Context in which products of float32 use TF32 on devices that have it."""
    before = torch.get_float32_matmul_precision()
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def has_fast_bfloat16(device: str) -> bool:
    """Whether a bfloat16 product takes less than two thirds of the time of a float32 one here; measured in milliseconds."""
    seconds, size = {}, 384 if torch.device(device).type == "cpu" else 4096
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, device=device, dtype=dtype)
        durations = []
        for _ in range(6):
            start = perf_counter()
            _ = float((a @ a)[0, 0])  # waits for the device
            durations.append(perf_counter() - start)
        seconds[dtype] = min(durations[1:])  # other work on the machine only ever adds
    return seconds[torch.bfloat16] < seconds[torch.float32] * 2 / 3


def resolve(precision: Precision, device: str) -> Precision:
    """'auto' → 'bfloat16' where it is faster, or 'float32'."""
    if precision == "auto":
        return "bfloat16" if has_fast_bfloat16(device) else "float32"
    return precision
