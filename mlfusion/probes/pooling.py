"""What the probes of the family have in common: sums of tokens for a whole population, and layers with K in front.

Where a query is a learned constant, keys fold into one vector a head and tokens are averaged before anything else is done
to them, so that no tensor as wide as a projection exists per token; see `attentive` for the derivation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from mlfusion.probes.contract import uniform
from mlfusion.shapes import Float

NORM_EPS = 1e-5
HEAD_WIDTH = 64

_standard = WeakTensorKeyDictionary()


def heads_of(width: int) -> int:
    """Attention heads of about 64 channels, as transformers have them: 12 of 768, 3 of 192; one divides every width."""
    return max(h for h in range(1, max(1, width // HEAD_WIDTH) + 1) if width % h == 0)


def standard(tokens: Tensor) -> Tensor:
    """Tokens [B, T, D] of mean 0 and variance 1 over D: LayerNorm without scale and shift, the same for all K.

    Under autocast they are of the type of its products.
    They are remembered as long as the batch is there, for the parts of a population that are trained on it in turn.
    """
    kind = tokens.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
    version, made = _standard.get(tokens, (None, tokens))
    if version != tokens._version or made.dtype != dtype:
        made = F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS).to(dtype)
        if not tokens.requires_grad:
            _standard[tokens] = tokens._version, made
    return made


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """[K, …, D] with scale and shift [K, D] of each configuration's own."""
    return standard(x) * _within(scale, x) + _within(shift, x)


def linear(
    x: Float[Tensor, "K ... I"], weight: Float[Tensor, "K O I"], bias: Float[Tensor, "K O"]
) -> Float[Tensor, "K ... O"]:
    """[K, …, I] by weights [K, O, I] and biases [K, O] → [K, …, O]."""
    return _Linear.apply(x.flatten(1, -2), weight, bias).view(*x.shape[:-1], weight.shape[1])


class _Linear(torch.autograd.Function):
    """Its gradients come laid out as the weights are, so that AdamW need not turn them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[K, B, I], [K, O, I], [K, O] → [K, B, O]."""
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        narrow = given.dtype
        to_weight = torch.bmm(given.mT, x.to(narrow)).to(weight.dtype)
        return torch.bmm(given, weight.to(narrow)).to(x.dtype), to_weight, given.sum(1, dtype=weight.dtype)


def weigh(tokens: Tensor, folded: Tensor) -> Tensor:
    """Softmax over T of the products of tokens [B, T, D] and vectors [K, H, D] → [B, K·H, T]."""
    return torch.softmax((tokens @ folded.flatten(0, 1).T).transpose(1, 2), dim=-1)


def average(weights: Tensor, tokens: Tensor) -> Tensor:
    """Tokens [B, T, D] by weights [B, K·H, T] → [K·H, B, D]."""
    return torch.bmm(weights, tokens).transpose(0, 1)


def split(weights: Tensor, k: int) -> Tensor:
    """[B, K·H, T] → [K, B, H, T], as `attention` gives weights."""
    return weights.view(len(weights), k, -1, weights.shape[-1]).transpose(0, 1)


def merge(each: Tensor, k: int) -> Tensor:
    """What each head made, [K·H, B, e] → side by side [K, B, H·e]."""
    heads, b, e = each.shape
    return each.view(k, heads // k, b, e).transpose(1, 2).reshape(k, b, -1)


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, *, training: bool, momentum: float = 0.1, eps: float = 1e-5
) -> Tensor:
    """BatchNorm without scale and shift: [K, B, D] over B while training, by running statistics [K, D] otherwise."""
    k, b, d = x.shape
    flat = x.transpose(0, 1).reshape(b, k * d)
    normed = F.batch_norm(flat, mean.view(-1), variance.view(-1), training=training, momentum=momentum, eps=eps)
    return normed.view(b, k, d).transpose(0, 1)


def truncated(streams: Sequence[torch.Generator], *size: int, std: float = 0.02) -> nn.Parameter:
    """[K, *size] from N(0, std²) cut at ±2, as transformers are initialised."""
    drawn = [nn.init.trunc_normal_(torch.empty(size), std=std, generator=stream) for stream in streams]
    return nn.Parameter(torch.stack(drawn))


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
    """Weight [K, C, D] and bias [K, C], as PyTorch's Linear."""
    return uniform(streams, classes, width, fan_in=width), uniform(streams, classes, fan_in=width)


def _within(vector: Tensor, x: Tensor) -> Tensor:
    """[K, D] → [K, 1, …, D], to broadcast over [K, …, D]."""
    return vector.view(len(vector), *[1] * (x.ndim - 2), vector.shape[-1])
