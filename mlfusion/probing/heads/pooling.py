"""Building blocks that heads share: attention pooling for a whole population, and layers with the axis K in front.

If a query is a learned constant, keys fold into one vector per head, and tokens are averaged before they are projected,
so that no tensor as wide as a projection exists per token; `attentive` has the derivation.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from mlfusion.shapes import Float

NORM_EPS = 1e-5
HEAD_WIDTH = 64

_standardized = WeakTensorKeyDictionary()


def head_count(width: int) -> int:
    """Attention heads of about 64 channels, as transformers have them: 12 of 768, 3 of 192; it divides the width."""
    return max(h for h in range(1, max(1, width // HEAD_WIDTH) + 1) if width % h == 0)


def standardize(tokens: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes D"]:
    """Mean 0 and variance 1 over D: LayerNorm without scale and shift, the same for all configurations.

    Under autocast the result has the type of autocast's products. The result is kept as long as the batch exists, for the
    blocks of a population that are trained on the batch one after another.
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
    """A linear layer whose gradients have the layout of its weights, so that AdamW need not transpose them."""

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
