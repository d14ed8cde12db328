"""Building blocks that heads share: attention pooling for a whole population, and layers with the axis K in front.

Where a query is a learned constant, keys fold into one vector a head, and tokens are averaged before they are projected,
so that no tensor as wide as a projection exists per token; `attentive` has the derivation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from mlfusion.probing.heads.contract import uniform
from mlfusion.shapes import Float

NORM_EPS = 1e-5
HEAD_WIDTH = 64

_standardized = WeakTensorKeyDictionary()


def head_count(width: int) -> int:
    """Attention heads of about 64 channels, as transformers have them: 12 of 768, 3 of 192; it divides the width."""
    return max(h for h in range(1, max(1, width // HEAD_WIDTH) + 1) if width % h == 0)


def standardize(tokens: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes D"]:
    """Mean 0 and variance 1 over D: LayerNorm without scale and shift, the same for all configurations.

    Under autocast the result has the type of autocast's products.
    It is remembered as long as the batch exists, for the parts of a population that are trained on the batch in turn.
    """
    device = tokens.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
    version, result = _standardized.get(tokens, (None, tokens))
    if version != tokens._version or result.dtype != dtype:
        result = F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS).to(dtype)
        if not tokens.requires_grad:
            _standardized[tokens] = tokens._version, result
    return result


def layer_norm(
    x: Float[Tensor, "K *axes D"], scale: Float[Tensor, "K D"], shift: Float[Tensor, "K D"]
) -> Float[Tensor, "K *axes D"]:
    """LayerNorm with scale and shift of each configuration's own."""
    broadcast = len(scale), *[1] * (x.ndim - 2), scale.shape[-1]
    return standardize(x) * scale.view(broadcast) + shift.view(broadcast)


def linear(
    x: Float[Tensor, "K *axes I"], weight: Float[Tensor, "K O I"], bias: Float[Tensor, "K O"]
) -> Float[Tensor, "K *axes O"]:
    """A linear layer with weights and biases of each configuration's own."""
    return _Linear.apply(x.flatten(1, -2), weight, bias).view(*x.shape[:-1], weight.shape[1])


class _Linear(torch.autograd.Function):
    """Its gradients are laid out as the weights are, so that AdamW need not transpose them."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "K B I"], weight: Float[Tensor, "K O I"], bias: Float[Tensor, "K O"]
    ) -> Float[Tensor, "K B O"]:
        """x · weightᵀ + bias."""
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Float[Tensor, "K B O"]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by x, weight and bias."""
        x, weight = ctx.saved_tensors
        dtype = grad_out.dtype
        grad_weight = torch.bmm(grad_out.mT, x.to(dtype)).to(weight.dtype)
        return torch.bmm(grad_out, weight.to(dtype)).to(x.dtype), grad_weight, grad_out.sum(1, dtype=weight.dtype)


def folded_attention(tokens: Float[Tensor, "B T D"], folded: Float[Tensor, "K H D"]) -> Float[Tensor, "B K*H T"]:
    """Softmax over T of the products of tokens and folded keys."""
    return torch.softmax((tokens @ folded.flatten(0, 1).T).transpose(1, 2), dim=-1)


def weighted_sums(weights: Float[Tensor, "B KH T"], tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "KH B D"]:
    """Tokens summed by the weights of every head of every configuration."""
    return torch.bmm(weights, tokens).transpose(0, 1)


def by_configuration(weights: Float[Tensor, "B KH T"], k: int) -> Float[Tensor, "{k} B H T"]:
    """Attention weights in the layout that `HeadModule.attention` returns."""
    return weights.view(len(weights), k, -1, weights.shape[-1]).transpose(0, 1)


def concat_heads(values: Float[Tensor, "KH B E"], k: int) -> Float[Tensor, "{k} B HE"]:
    """The values of a configuration's heads, side by side."""
    heads, b, e = values.shape
    return values.view(k, heads // k, b, e).transpose(1, 2).reshape(k, b, -1)


def batch_norm(
    x: Float[Tensor, "K B D"],
    mean: Float[Tensor, "K D"],
    variance: Float[Tensor, "K D"],
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Float[Tensor, "K B D"]:
    """BatchNorm without scale and shift: by the batch while training, by running mean and variance otherwise."""
    k, b, d = x.shape
    flat = x.transpose(0, 1).reshape(b, k * d)
    normed = F.batch_norm(flat, mean.view(-1), variance.view(-1), training=training, momentum=momentum, eps=eps)
    return normed.view(b, k, d).transpose(0, 1)


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
    """Weight [K, C, D] and bias [K, C], as PyTorch's Linear."""
    return uniform(streams, classes, width, fan_in=width), uniform(streams, classes, fan_in=width)
