"""What a step of attentive probes does that PyTorch does badly, by this processor's own bfloat16, where it could be compiled.

`kernels.c` says what and how. Without a compiler at installation, on another processor or device, or in another precision,
the same is done by PyTorch, and differs by the order of summation alone.
"""

import ctypes
import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

COLUMNS = 32  # the width of tokens must be a multiple
PART = 1 << 21  # numbers that are worth a thread of their own

_on = os.environ.get("MLFUSION_KERNELS") != "0"


@contextmanager
def off() -> Iterator[None]:
    """Within it, PyTorch does all the work, in every thread; MLFUSION_KERNELS=0 in the environment has the same effect."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


def absent() -> str | None:
    """Why there is nothing of the kind here, or None."""
    if not _on:
        return "switched off"
    if (made := _compiled()) is None:
        return "not compiled: there was no C compiler at installation"
    if not made.mlfusion_supported():
        return "this processor has no AVX-512 BF16"
    if torch.cpu._is_amx_tile_supported():  # several times as fast as AVX-512, in PyTorch's products
        return "this processor has AMX, which PyTorch uses"
    return None


def library() -> ctypes.CDLL | None:
    """What was compiled, if this processor has its instructions and no faster ones."""
    return _usable() if _on else None


@cache
def _usable() -> ctypes.CDLL | None:
    return None if absent() else _compiled()


@cache
def _compiled() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("mlfusion.probes._kernels")
    if found is None or found.origin is None:
        return None
    return ctypes.CDLL(found.origin)


def weigh(weight: Tensor) -> bool:
    """Whether what is done with weights [..., D] alone can be done here."""
    return (
        weight.dtype is torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.shape[-1] % COLUMNS == 0
        and library() is not None
    )


def fit(x: Tensor, weight: Tensor) -> bool:
    """Whether tokens [B, T, D] and the weights [..., D] of what is made of them can be multiplied here."""
    return x.dtype is torch.bfloat16 and x.is_contiguous() and weigh(weight) and x.device == weight.device


# --- Tokens and heads -------------------------------------------------------------------------------------------------


def softmax(x: Tensor, folded: Tensor) -> Tensor:
    """Tokens [B, T, D] that fit and vectors [K·H, D], both narrow → the softmax over T of their products [B, T, K·H]."""
    (b, t, d), heads = x.shape, len(folded)
    out = torch.empty(b, t, heads)
    _spread("softmax", b, (x, folded.contiguous(), out), (t, heads, d), each=heads * d)
    return out


def averages(weights: Tensor, x: Tensor) -> Tensor:
    """Weights [B, T, K·H], float32, and tokens [B, T, D] that fit → [K·H, B, D], the tokens' sums."""
    (b, t, d), heads = x.shape, weights.shape[2]
    out = x.new_empty(heads, b, d)
    _spread("averages", b, (x, weights.contiguous(), out), (b, t, heads, d), each=heads * d)
    return out


def values(projections: Tensor, averages: Tensor, constant: Tensor, gained: Tensor | None) -> Tensor:
    """Projections [K·H, e, D] of averages [K·H, B, D] with a constant [K·H, e] by 1 + gained [K·H, B] → [K·H, e, B]."""
    (heads, e, d), b = projections.shape, averages.shape[1]
    out = averages.new_empty(heads, e, b)
    tensors = projections, averages, constant, None if gained is None else gained.contiguous(), out
    _spread("values", heads, tensors, (b, e, d), each=e * d)
    return out


def slopes(x: Tensor, given: Tensor, packed: Tensor) -> Tensor:
    """Tokens [B, T, D] that fit, gradients [K·H, e, B] of what packed projections make of averages → [B, T, K·H].

    The gradient by the weights of `averages`, in float32. That by the averages themselves is rounded, as it would be if it
    were a tensor, which it never is.
    """
    (b, t, d), (heads, e, _) = x.shape, given.shape
    out = torch.empty(b, t, heads)
    _spread("slopes", b, (x, given.contiguous(), packed, out), (b, t, heads, d, e), each=heads * d)
    return out


def narrow(weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [K, H, e, D] by scale [K, D], in bfloat16 [K·H, e, D]; the same packed; weights by shift [K, D] → [K·H, e]."""
    k, h, e, d = weight.shape
    out, constant = weight.new_empty(k * h, e, d, dtype=torch.bfloat16), weight.new_empty(k * h, e)
    packed = torch.empty(k * h, -(-e // 2) * d, dtype=torch.int32)
    tensors = weight.contiguous(), scale.contiguous(), shift.contiguous(), out, packed, constant
    _spread("narrow", k * h, tensors, (e, d, h), each=e * d)
    return out, packed, constant


# --- Weights ----------------------------------------------------------------------------------------------------------


def rows(weight: Tensor, vectors: Tensor) -> Tensor:
    """Weights [G, R, D], float32, and vectors [G, D] → their products [G, R]."""
    g, r, d = weight.shape
    out = weight.new_empty(g, r)
    _spread("rows", g, (weight, vectors.contiguous(), out), (r, d), each=r * d)
    return out


def columns(weight: Tensor, factors: Tensor, by: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weights [G, R, D] by factors [G, R], and by `by` [G, R, D], which is narrow, summed over R → both [G, D]."""
    g, r, d = weight.shape
    out, other = weight.new_empty(g, d), None if by is None else weight.new_empty(g, d)
    _spread("columns", g, (weight, factors.contiguous(), by, out, other), (r, d), each=r * d)
    return out, other


@dataclass(frozen=True, eq=False)
class Factored:
    """A gradient [K, R, D], kept as what it is made of: narrow · scale + left · right."""

    shape: tuple[int, int, int]
    narrow: Tensor | None = None  # [K, R, D] bfloat16
    scale: Tensor | None = None  # [K, D]
    left: Tensor | None = None  # [K, R]
    right: Tensor | None = None  # [K, G, D]: R / G rows after one another have one in common

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """As the kernels want them."""
        parts = self.narrow, self.scale, self.left, self.right
        return tuple(None if each is None else each.contiguous() for each in parts)

    @property
    def share(self) -> int:
        """Rows that have one of right in common."""
        return self.shape[1] if self.right is None else self.shape[1] // self.right.shape[1]

    def norms(self) -> Tensor:
        """Of each of the K, [K]."""
        out = torch.empty(self.shape[0], dtype=torch.float64)
        k, count, width = self.shape
        _spread("squares", k, (*self.parts, out), (count, self.share, width), each=count * width)
        return out.sqrt().float()

    def times(self, factor: Tensor) -> Self:
        """Each of the K by its factor [K]."""
        k, _, d = self.shape
        scale = self.scale
        if self.narrow is not None:
            scale = (torch.ones(k, d) if scale is None else scale) * factor[:, None]
        left = None if self.left is None else self.left * factor[:, None]
        return type(self)(self.shape, self.narrow, scale, left, self.right)


def adamw(
    value: Tensor,
    moment: Tensor,
    square: Tensor,
    gradient: Factored,
    *,
    step: int,
    lr: Sequence[float],
    weight_decay: Sequence[float],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """The `step`th step of `torch.optim.AdamW` (arXiv 1711.05101) on weights [K, …] and moments, in place; rates of each k."""
    k, count, width = gradient.shape
    first, second = 1 - betas[0] ** step, 1 - betas[1] ** step
    rates = torch.tensor([(a / first, 1 - a * b) for a, b in zip(lr, weight_decay, strict=True)], dtype=torch.float32)
    how = torch.tensor([*betas, eps, math.sqrt(second)], dtype=torch.float32)
    tensors = value, moment, square, *gradient.parts, rates, how
    _spread("adamw", k * count, tensors, (count, gradient.share, width), each=width)


_gradients = WeakTensorKeyDictionary()


def accept(parameters: Iterable[Tensor]) -> None:
    """From now on gradients of these parameters may be given factored: who says so `take`s them, and `adamw` follows them."""
    for parameter in parameters:
        if weigh(parameter):
            _gradients[parameter] = None


def accepted(*parameters: Tensor) -> bool:
    """Whether somebody takes all of these."""
    return library() is not None and all(each in _gradients for each in parameters)


def give(parameter: Tensor, gradient: Factored) -> None:
    """In place of a gradient that autograd would add up.

    Raises:
        RuntimeError: one was given already, and not taken: this one would be lost, or that.
    """
    if _gradients[parameter] is not None:
        raise RuntimeError("a second backward pass before the optimiser's step; step after each")
    _gradients[parameter] = gradient


def take(parameter: Tensor) -> Factored | None:
    """What was given for it since it was taken last."""
    gradient: Factored | None = _gradients.get(parameter)
    if gradient is not None:
        _gradients[parameter] = None
    return gradient


# --- Calls ------------------------------------------------------------------------------------------------------------


def _spread(name: str, count: int, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], each: int) -> None:
    """`count` pieces of work of `each` so many numbers, by as many threads as PyTorch would take."""
    threads = max(1, min(torch.get_num_threads(), count, count * each // PART))
    edges = [count * n // threads for n in range(threads + 1)]
    pointers = [_pointer(tensor) for tensor in tensors]
    function = getattr(library(), f"mlfusion_{name}")

    def work(n: int) -> None:
        if function(*pointers, *map(ctypes.c_long, (edges[n], edges[n + 1], *sizes))):
            raise MemoryError(f"no memory for {name} of {sizes}")

    _share(work, threads)


def _share(work: Callable[[int], None], threads: int) -> None:
    if threads == 1:
        work(0)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
