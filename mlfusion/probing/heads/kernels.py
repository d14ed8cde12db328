"""Optional AVX-512 BF16 kernels for the attentive head; PyTorch is the fallback.

`kernels.c` documents the computations. Without a compiler at installation, on another processor or device, or in another
precision, PyTorch computes the same, up to the order of summation: here, or in `attentive` for the functions that need
packed projections.
"""

import ctypes
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Self

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mlfusion.shapes import Float, Int
from mlfusion.system.threads import pool

WIDTH_MULTIPLE = 32  # the width of tokens must be a multiple
FEW_COLUMNS = 128  # of folded keys: queries of all configurations of a block
NUMBERS_PER_THREAD = 1 << 21  # minimum for which a thread of its own is faster

_enabled = os.environ.get("MLFUSION_KERNELS") != "0"


@contextmanager
def off() -> Iterator[None]:
    """Context in which PyTorch computes everything, in all threads; MLFUSION_KERNELS=0 in the environment does the same."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def why_unavailable() -> str | None:
    """Why the kernels cannot be used here, or None if they can."""
    if not _enabled:
        return "switched off"
    if (compiled := _compiled()) is None:
        return "not compiled: there was no C compiler at installation"
    if not compiled.mlfusion_supported():
        return "this processor has no AVX-512 BF16"
    if torch.cpu._is_amx_tile_supported():  # several times as fast as AVX-512, in PyTorch's products
        return "this processor has AMX, which PyTorch uses"
    return None


def library() -> ctypes.CDLL | None:
    """The compiled kernels, if they are switched on and this processor has their instructions and no faster ones."""
    return _usable() if _enabled else None


@cache
def _usable() -> ctypes.CDLL | None:
    return None if why_unavailable() else _compiled()


@cache
def _compiled() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("mlfusion.probing.heads._kernels")
    return ctypes.CDLL(spec.origin) if spec and spec.origin else None


def supports_weight(weight: Float[Tensor, "... D"]) -> bool:
    """Whether the kernels that read weights alone can be used on these."""
    return (
        weight.dtype is torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.shape[-1] % WIDTH_MULTIPLE == 0
        and library() is not None
    )


def supports_inputs(x: Float[Tensor, "B T D"], weight: Float[Tensor, "... D"]) -> bool:
    """Whether the kernels that multiply tokens, or results computed from them, by these weights can be used."""
    return x.dtype is torch.bfloat16 and x.is_contiguous() and supports_weight(weight) and x.device == weight.device


# --- Tokens and heads -------------------------------------------------------------------------------------------------


def softmax(x: Float[Tensor, "B T D"], folded: Float[Tensor, "KH D"]) -> Float[Tensor, "B T KH"]:
    """Softmax over T of the products of tokens and folded keys; products have the type of tokens, results that of keys."""
    (b, t, d), heads = x.shape, len(folded)
    if not supports_inputs(x, folded):
        keys = folded.to(x.dtype).T
        # In float32 on a processor, a product for each image is faster than one of many rows and few columns.
        each = x.device.type == "cpu" and x.dtype is folded.dtype and heads <= FEW_COLUMNS
        scores = torch.bmm(x, keys.expand(b, d, heads)) if each else (x.flatten(0, 1) @ keys).view(b, t, heads)
        return torch.softmax(scores.to(folded.dtype), dim=1)
    out = torch.empty(b, t, heads)
    _run("softmax", b, (x, folded.to(x.dtype), out), (t, heads, d), numbers=heads * d)
    return out


def averages(weights: Float[Tensor, "B T KH"], x: Float[Tensor, "B T D"]) -> Float[Tensor, "KH B D"]:
    """Sums of tokens (bfloat16, as the result) by attention weights (float32)."""
    (b, t, d), heads = x.shape, weights.shape[2]
    out = x.new_empty(heads, b, d)
    _run("averages", b, (x, weights.contiguous(), out), (b, t, heads, d), numbers=heads * d)
    return out


def values(
    projections: Float[Tensor, "KH E D"],
    averages: Float[Tensor, "KH B D"],
    bias: Float[Tensor, "KH E"],
    excess: Float[Tensor, "KH B"] | None,
) -> Float[Tensor, "KH E B"]:
    """Projections of averages, plus bias · (1 + excess)."""
    (heads, e, d), b = projections.shape, averages.shape[1]
    out = averages.new_empty(heads, e, b)
    tensors = projections, averages, bias, None if excess is None else excess.contiguous(), out
    _run("values", heads, tensors, (b, e, d), numbers=e * d)
    return out


def attention_gradients(
    x: Float[Tensor, "B T D"], grad_values: Float[Tensor, "KH E B"], packed: Int[Tensor, "KH packed"]
) -> Float[Tensor, "B T KH"]:
    """Gradients by the weights of `averages`, in float32, from those by the values and the packed projections.

    The gradient by the averages themselves, which never exists as a tensor, is rounded as it would be in one.
    """
    (b, t, d), (heads, e, _) = x.shape, grad_values.shape
    out = torch.empty(b, t, heads)
    _run("attention_gradients", b, (x, grad_values.contiguous(), packed, out), (b, t, heads, d, e), numbers=heads * d)
    return out


def fold_norm(
    weight: Float[Tensor, "K H E D"], scale: Float[Tensor, "K D"], shift: Float[Tensor, "K D"]
) -> tuple[Float[Tensor, "K*H E D"], Int[Tensor, "K*H packed"], Float[Tensor, "K*H E"]]:
    """LayerNorm's scale and shift folded into a projection: weight · scale in bfloat16, the same packed, weight · shift."""
    k, h, e, d = weight.shape
    out, bias = weight.new_empty(k * h, e, d, dtype=torch.bfloat16), weight.new_empty(k * h, e)
    packed = torch.empty(k * h, -(-e // 2) * d, dtype=torch.int32)
    tensors = weight.contiguous(), scale.contiguous(), shift.contiguous(), out, packed, bias
    _run("fold_norm", k * h, tensors, (e, d, h), numbers=e * d)
    return out, packed, bias


# --- Weights ----------------------------------------------------------------------------------------------------------


def row_products(weight: Float[Tensor, "G R D"], vectors: Float[Tensor, "G D"]) -> Float[Tensor, "G R"]:
    """The product of every row with the vector of its group."""
    if not supports_weight(weight):
        return torch.bmm(vectors[:, None], weight.mT)[:, 0]
    g, r, d = weight.shape
    out = weight.new_empty(g, r)
    _run("row_products", g, (weight, vectors.contiguous(), out), (r, d), numbers=r * d)
    return out


def row_sums(
    weight: Float[Tensor, "G R D"], factors: Float[Tensor, "G R"], other: Float[Tensor, "G R D"] | None = None
) -> tuple[Float[Tensor, "G D"], Float[Tensor, "G D"] | None]:
    """Rows summed by their factors; and rows times those of `other` (bfloat16), number by number, summed."""
    if not supports_weight(weight):
        return torch.bmm(factors[:, None], weight)[:, 0], None if other is None else (weight * other).sum(1)
    g, r, d = weight.shape
    out, product = weight.new_empty(g, d), None if other is None else weight.new_empty(g, d)
    _run("row_sums", g, (weight, factors.contiguous(), other, out, product), (r, d), numbers=r * d)
    return out, product


@dataclass(frozen=True, eq=False)
class FactoredGradient:
    """The factors of a gradient [K, R, D] = dense · scale + left ⊗ right. Each part may be missing."""

    shape: tuple[int, int, int]
    dense: Float[Tensor, "K R D"] | None = None  # bfloat16
    scale: Float[Tensor, "K D"] | None = None
    left: Float[Tensor, "K R"] | None = None
    right: Float[Tensor, "K G D"] | None = None  # R / G consecutive rows share one

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """The factors in the order and layout that the kernels read."""
        parts = self.dense, self.scale, self.left, self.right
        return tuple(None if each is None else each.contiguous() for each in parts)

    @property
    def rows_per_right(self) -> int:
        """R / G."""
        return self.shape[1] if self.right is None else self.shape[1] // self.right.shape[1]

    def norms(self) -> Float[Tensor, " K"]:
        """The norm of each configuration's gradient."""
        out = torch.empty(self.shape[0], dtype=torch.float64)
        k, rows, width = self.shape
        _run("squares", k, (*self.parts, out), (rows, self.rows_per_right, width), numbers=rows * width)
        return out.sqrt().float()

    def scaled(self, factors: Float[Tensor, " K"]) -> Self:
        """Each configuration's gradient multiplied by its factor."""
        k, _, d = self.shape
        scale = self.scale
        if self.dense is not None:
            scale = (torch.ones(k, d) if scale is None else scale) * factors[:, None]
        left = None if self.left is None else self.left * factors[:, None]
        return type(self)(self.shape, self.dense, scale, left, self.right)


def adamw(
    value: Float[Tensor, "K ..."],
    moment: Float[Tensor, "K ..."],
    square: Float[Tensor, "K ..."],
    gradient: FactoredGradient,
    rates: Float[Tensor, "K 2"],
    constants: Float[Tensor, " 4"],
) -> None:
    """A step of `torch.optim.AdamW` (arXiv 1711.05101) on weights and their moments, in place.

    `rates` are the learning rate over the bias correction of the first moment, and 1 - learning rate · weight decay;
    `constants` are beta1, beta2, eps and the root of the bias correction of the second moment.
    """
    k, rows, width = gradient.shape
    tensors = value, moment, square, *gradient.parts, rates, constants
    _run("adamw", k * rows, tensors, (rows, gradient.rows_per_right, width), numbers=width)


_gradients = WeakTensorKeyDictionary()


def register(parameters: Iterable[Tensor]) -> None:
    """Let backward passes put factored gradients of these parameters; the caller pops them and calls `adamw`."""
    for parameter in parameters:
        if supports_weight(parameter):
            _gradients[parameter] = None


def is_registered(*parameters: Tensor) -> bool:
    """Whether factored gradients of all these parameters are popped by an optimiser."""
    return library() is not None and all(parameter in _gradients for parameter in parameters)


def put_gradient(parameter: Tensor, gradient: FactoredGradient) -> None:
    """Hand over the gradient of a registered parameter, in place of one that autograd would add up.

    Raises:
        RuntimeError: the previous gradient was not popped, and would be lost.
    """
    if _gradients[parameter] is not None:
        raise RuntimeError("a second backward pass before the optimiser's step; step after each")
    _gradients[parameter] = gradient


def pop_gradient(parameter: Tensor) -> FactoredGradient | None:
    """The gradient that was put since the last call, if any."""
    gradient: FactoredGradient | None = _gradients.get(parameter)
    if gradient is not None:
        _gradients[parameter] = None
    return gradient


# --- Calls ------------------------------------------------------------------------------------------------------------


def _run(name: str, count: int, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], numbers: int) -> None:
    """Call a kernel on `count` items of work of `numbers` each, split among at most as many threads as PyTorch uses."""
    threads = max(1, min(torch.get_num_threads(), count, count * numbers // NUMBERS_PER_THREAD))
    edges = [count * n // threads for n in range(threads + 1)]
    kernel = partial(
        getattr(library(), f"mlfusion_{name}"),
        *(ctypes.c_void_p(each if each is None else each.data_ptr()) for each in tensors),
    )
    ranges = [tuple(map(ctypes.c_long, (*edges[n : n + 2], *sizes))) for n in range(threads)]
    if threads == 1:
        codes = [kernel(*ranges[0])]
    else:
        with pool(threads) as workers:
            codes = list(workers.map(lambda longs: kernel(*longs), ranges))
    if any(codes):
        raise MemoryError(f"no memory for {name} of {sizes}")
