"""The attentive head of the study (ALF, AAT), folded so that nothing as wide as its heads is computed per token.

Its query is learned and does not depend on the image, so per head the key projection folds into one vector `u` of width
D. Attention is linear in the values, so tokens are averaged first and projected after. The function is the same as that
of projecting keys and values per token, at about a twentieth of the arithmetic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mlfusion.probing.heads import kernels
from mlfusion.probing.heads.contract import (
    HeadModule,
    HeadShape,
    classifier,
    dropout_mask,
    generators,
    normal,
    ones,
    uniform,
    zeros,
)
from mlfusion.probing.heads.pooling import NORM_EPS, standardize
from mlfusion.shapes import Float

BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1
MASK_SEED = 0x9E3779B97F4A7C15  # makes the seeds of dropout masks differ from those of the initialisation
CHUNK_BYTES = 1 << 25  # maximum size of the averages that are computed and projected at a time
SAVED_BYTES = 1 << 26  # maximum size of the averages that are saved for the backward pass; more are computed again


class Attentive(HeadModule):
    """K heads of cross-attention from one learned query (arXiv 2601.09322, its pooling from CAE, arXiv 2202.03026).

    LN_q(q0) attends to LN_k(x), LN_v(x) with H heads of width e = 2⌊D/H⌋, then output projection, BatchNorm, Linear.
    The shift of LN_k is not among the parameters: it adds the same constant to every score of a head, which the softmax
    cancels, so it has neither effect nor gradient.
    """

    has_dropout: ClassVar[bool] = True

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, shape: HeadShape, *, seeds: Sequence[int], dropouts: Sequence[float]) -> None:
        """Query from N(0, 0.02²), projections as PyTorch's Linear; an attention head is `2 * (width // heads)` wide."""
        super().__init__()
        k, d, h, e = len(seeds), shape.width, shape.heads, 2 * (shape.width // shape.heads)
        streams = generators(seeds)
        self.query = normal(streams, d)
        self.query_scale, self.query_shift = ones(k, d), zeros(k, d)
        self.key_scale = ones(k, d)
        self.value_scale, self.value_shift = ones(k, d), zeros(k, d)
        self.to_query = uniform(streams, h, e, d, fan_in=d)
        self.to_key = uniform(streams, h, e, d, fan_in=d)
        self.to_value = uniform(streams, h, e, d, fan_in=d)
        self.to_output = uniform(streams, d, h * e, fan_in=h * e)
        self.output_bias = uniform(streams, d, fan_in=h * e)
        self.norm_scale, self.norm_shift = ones(k, d), zeros(k, d)
        self.register_buffer("running_mean", torch.zeros(k, d))
        self.register_buffer("running_var", torch.ones(k, d))
        self.classifier, self.classifier_bias = classifier(streams, shape.classes, d)
        self.dropouts = tuple(dropouts)
        # With the seeds of the initialisation, the first masks would repeat its numbers.
        self._mask_streams = generators([seed ^ MASK_SEED for seed in seeds])

    def forward(
        self, tokens: Float[Tensor, "B T D"], mask: Float[Tensor, "K B H T"] | None = None
    ) -> Float[Tensor, "K B C"]:
        """Normalised tokens → logits.

        `mask` holds dropout factors on the attention weights, 0 or 1/(1 − rate). By default they are drawn from each
        configuration's own stream while training; in evaluation nothing is dropped.
        """
        b, t, _ = tokens.shape
        k, h, _, d = self.to_value.shape
        flat_mask = self.draw_mask(tokens) if mask is None else mask.permute(1, 3, 0, 2).reshape(b, t, k * h)
        inputs = PoolInputs(standardize(tokens), flat_mask, mean_removed=self.training)
        with torch.autocast(tokens.device.type, enabled=False):  # Pool itself sets the type of each product
            parameters = self.to_value, self.value_scale, self.value_shift, self.to_output
            pooled = Pool.apply(inputs, self._folded(), *parameters)
            # A constant over all images has no gradient in training, since BatchNorm subtracts it. Rounding would leave a
            # small gradient, which AdamW would scale up to steps of the full learning rate.
            pooled = pooled + (self.output_bias.detach() if self.training else self.output_bias)[..., None]
            normed = F.batch_norm(
                pooled.view(1, k * d, b),
                self.running_mean.view(-1),
                self.running_var.view(-1),
                self.norm_scale.view(-1),
                self.norm_shift.view(-1),
                training=self.training,
                momentum=BATCH_NORM_MOMENTUM,
                eps=BATCH_NORM_EPS,
            )
        return torch.baddbmm(self.classifier_bias[..., None], self.classifier, normed.view(k, d, b)).mT

    def attention(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "K B H T"]:
        k, h = self.to_key.shape[:2]
        weights = kernels.softmax(standardize(tokens), self._folded())  # [B, T, K·H]
        return weights.unflatten(2, (k, h)).permute(2, 0, 3, 1)

    def _folded(self) -> Float[Tensor, "KH D"]:
        """The vectors u whose products with a token are its scores."""
        query = F.layer_norm(self.query, self.query.shape[1:], eps=NORM_EPS) * self.query_scale + self.query_shift
        return (Fold.apply(query, self.to_query, self.to_key) * self.key_scale[:, None]).flatten(0, 1)

    def draw_mask(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B T KH"] | None:
        """Dropout factors while training; a rate of 0 draws nothing and keeps everything."""
        if not self.training or not any(self.dropouts):
            return None
        (b, t, _), (k, h) = tokens.shape, self.to_key.shape[:2]
        mask = self.query.new_ones(b, t, k, h)
        for n, (rate, stream) in enumerate(zip(self.dropouts, self._mask_streams, strict=True)):
            if rate:
                mask[:, :, n] = dropout_mask(rate, (b, t, h), stream, tokens.device)
        return mask.flatten(2)


class Fold(torch.autograd.Function):
    """Keys projected onto the query, W_kᵀ W_q q / √e of every head.

    The gradients are written by hand, because products with a single column are slow and those with a single row are not,
    and because the gradients of W_q and W_k are products of two vectors, whose factors the optimiser can take.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Float[Tensor, "K D"], to_query: Float[Tensor, "K H E D"], to_key: Float[Tensor, "K H E D"]
    ) -> Float[Tensor, "K H D"]:
        """Normalised queries and both projections → u."""
        k, h, e, d = to_key.shape
        ctx.parameters = to_query, to_key
        q = kernels.row_products(to_query.flatten(1, 2), query).view(k, h, e) / math.sqrt(e)
        ctx.save_for_backward(query, to_query, to_key, q)
        return kernels.row_sums(to_key.flatten(0, 1), q.view(k * h, e))[0].view(k, h, d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_folded: Float[Tensor, "K H D"]) -> tuple[Tensor | None, ...]:
        """Gradients by query, to_query and to_key."""
        query, to_query, to_key, q = ctx.saved_tensors
        k, h, e, d = to_key.shape
        grad_q = kernels.row_products(to_key.flatten(0, 1), grad_folded.reshape(k * h, d)).view(k, h, e) / math.sqrt(e)
        grad_query = kernels.row_sums(to_query.flatten(1, 2), grad_q.view(k, h * e))[0]
        if kernels.is_registered(*ctx.parameters):
            shape = k, h * e, d
            factors = (grad_q, query[:, None]), (q, grad_folded)
            for parameter, (left, right) in zip(ctx.parameters, factors, strict=True):
                gradient = kernels.FactoredGradient(shape, left=left.view(k, h * e), right=right)
                kernels.put_gradient(parameter, gradient)
            return grad_query, None, None
        return grad_query, grad_q[..., None] * query[:, None, None], q[..., None] * grad_folded[:, :, None]


@dataclass(frozen=True, eq=False)
class PoolInputs:
    """The inputs of `Pool` besides its parameters; they have no gradient."""

    x: Float[Tensor, "B T D"]  # standardised tokens, in the type of the products
    mask: Float[Tensor, "B T KH"] | None  # dropout factors
    mean_removed: bool  # BatchNorm subtracts the batch mean of the result, so constants over images get no gradient


class _Saved(NamedTuple):
    """The tensors that `Pool.forward` saves for the backward pass, in order; chunks of averages follow them."""

    x: Tensor  # [B, T, D]
    to_value: Tensor  # [K, H, E, D]
    scale: Tensor  # [K, D]
    shift: Tensor  # [K, D]
    to_output: Tensor  # [K, D, H·E], in the type of x
    projections: Tensor  # scale · to_value [K·H, E, D], in the type of x
    packed: Tensor | None  # the same as the kernels read it; None if PyTorch is used
    bias: Tensor  # to_value · shift [K·H, E]
    attention: Tensor  # [B, T, K·H]
    mask: Tensor | None  # [B, T, K·H]
    excess: Tensor | None  # [K·H, B]
    values: Tensor  # [K·H, E, B]


class Pool(torch.autograd.Function):
    """Tokens averaged by softmax of their scores, projected by every head, and the heads joined by the output projection.

    The gradients are written by hand, because tokens need no gradient, and because of the layout: every product writes its
    result as the next one reads it. The averages and their gradients, which are the largest tensors, are read by strides;
    all others have the images last, [K, H·E, B] and [K, D, B]. Products have the type of the tokens; softmax and gradients
    have that of the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: PoolInputs,
        folded: Float[Tensor, "KH D"],
        to_value: Float[Tensor, "K H E D"],
        scale: Float[Tensor, "K D"],
        shift: Float[Tensor, "K D"],
        to_output: Float[Tensor, "K D HE"],
    ) -> Float[Tensor, "K D B"]:
        """Standardised tokens → pooled tokens; `folded` is u, scale and shift are those of LN_v."""
        x, mask = inputs.x, inputs.mask
        k, h, e, _ = to_value.shape
        # Scale and shift of LN_v go to the projection, which is smaller than the averages of a batch.
        if use_kernels := kernels.supports_inputs(x, to_value):
            projections, packed, bias = kernels.fold_norm(to_value, scale, shift)
        else:
            projections, packed = (to_value * scale[:, None, None]).to(x.dtype).flatten(0, 1), None
            bias = kernels.row_products(to_value.flatten(1, 2), shift).view(k * h, e)
        attention = masked = kernels.softmax(x, folded)
        excess = None
        if mask is not None:
            # The shift follows the sum of the weights, which dropping moves away from one; by exactly 0 at a rate of 0.
            masked = attention * mask
            excess = (masked - attention).sum(1).T
        chunks = _chunks(x, k * h)
        parts, averages = [], []
        for images in chunks:
            average = _averages(masked[images], x[images], use_kernels)
            part_excess = None if excess is None else excess[:, images]
            parts.append(_values(projections, average, bias, part_excess, use_kernels))
            if len(chunks) * CHUNK_BYTES <= SAVED_BYTES:
                averages.append(average)
        values = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        output = to_output.to(x.dtype)
        saved = _Saved(x, to_value, scale, shift, output, projections, packed, bias, attention, mask, excess, values)
        ctx.save_for_backward(*saved, *averages)
        ctx.mean_removed, ctx.parameters = inputs.mean_removed, (to_value, to_output)
        return torch.bmm(output, values.view(k, h * e, -1)).to(attention.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Float[Tensor, "K D B"]) -> tuple[Tensor | None, ...]:
        """Gradients by folded, to_value, scale, shift and to_output."""
        count = len(_Saved._fields)
        saved, averages = _Saved._make(ctx.saved_tensors[:count]), ctx.saved_tensors[count:]
        (k, h, e, d), b = saved.to_value.shape, len(saved.x)
        grad_out = grad_out.to(saved.x.dtype)
        grad_to_output = torch.bmm(grad_out, saved.values.view(k, h * e, b).mT)
        grad_values = torch.bmm(saved.to_output.mT, grad_out).view(k * h, e, b)
        grad_projections = _projection_gradients(saved, averages, grad_values)
        grad_folded = _folded_gradients(saved, grad_values)
        grad_bias = _bias_gradients(saved, grad_values, ctx.mean_removed)
        if (
            saved.packed is not None
            and grad_projections.dtype is saved.x.dtype
            and kernels.is_registered(*ctx.parameters)
        ):
            gradient, grad_scale, grad_shift = _factored_gradients(saved, grad_projections, grad_bias)
            kernels.put_gradient(ctx.parameters[0], gradient)
            kernels.put_gradient(ctx.parameters[1], kernels.FactoredGradient((k, d, h * e), grad_to_output))
            return None, grad_folded, None, grad_scale, grad_shift, None
        grad_to_value, grad_scale, grad_shift = _dense_gradients(saved, grad_projections, grad_bias)
        return None, grad_folded, grad_to_value, grad_scale, grad_shift, grad_to_output.to(saved.attention.dtype)


# --- Parts of the backward pass ---------------------------------------------------------------------------------------


def _projection_gradients(
    saved: _Saved, averages: Sequence[Tensor], grad_values: Float[Tensor, "KH E B"]
) -> Float[Tensor, "KH E D"]:
    """Gradient by scale · to_value: in the type of the products from one chunk, in that of the parameters from several."""
    total: Tensor | None = None
    masked = saved.attention if averages or saved.mask is None else saved.attention * saved.mask
    for n, images in enumerate(_chunks(saved.x, len(saved.projections))):
        average = averages[n] if averages else _averages(masked[images], saved.x[images], saved.packed is not None)
        part = torch.bmm(grad_values[:, :, images], average)
        total = part if total is None else total + part.to(saved.attention.dtype)
    assert total is not None
    return total


def _folded_gradients(saved: _Saved, grad_values: Float[Tensor, "KH E B"]) -> Float[Tensor, "KH D"]:
    """Gradient by u, by way of those by the attention weights and their logits."""
    x, attention, mask = saved.x, saved.attention, saved.mask
    if saved.packed is not None:
        grad_attention = kernels.attention_gradients(x, grad_values, saved.packed)
    else:
        grad_attention = _attention_gradients(x, grad_values, saved.projections).to(attention.dtype)
    if mask is not None:
        # The gradients of masked = mask · attention and of excess = Σ (masked − attention).
        grad_excess = torch.bmm(saved.bias[:, None].to(x.dtype), grad_values)[:, 0].T.to(attention.dtype)[:, None]
        grad_attention = grad_attention.add_(grad_excess).mul_(mask).sub_(grad_excess)
    grad_logits = torch.ops.aten._softmax_backward_data(grad_attention, attention, 1, attention.dtype)
    grad_folded: Tensor = grad_logits.to(x.dtype).flatten(0, 1).T @ x.flatten(0, 1)
    return grad_folded.to(attention.dtype)


def _bias_gradients(
    saved: _Saved, grad_values: Float[Tensor, "KH E B"], mean_removed: bool
) -> Float[Tensor, "K HE"] | None:
    """Gradient by to_value · shift; None if its factor is the same for all images, since BatchNorm then subtracts it."""
    if saved.excess is None and mean_removed:
        return None
    (k, h, e, _), (b, dtype) = saved.to_value.shape, (len(saved.x), saved.attention.dtype)
    factor = torch.zeros(k * h, b, dtype=dtype, device=saved.x.device) if saved.excess is None else saved.excess
    factor = factor if mean_removed else factor + 1
    return torch.bmm(factor[:, None].to(saved.x.dtype), grad_values.mT).to(dtype).view(k, h * e)


def _factored_gradients(
    saved: _Saved, grad_projections: Float[Tensor, "KH E D"], grad_bias: Float[Tensor, "K HE"] | None
) -> tuple[kernels.FactoredGradient, Tensor, Tensor | None]:
    """Gradients by to_value, in factors, scale and shift."""
    k, h, e, d = saved.to_value.shape
    flat, dense = saved.to_value.flatten(1, 2), grad_projections.view(k, h * e, d)
    factors = flat.new_zeros(k, h * e) if grad_bias is None else grad_bias
    grad_shift, grad_scale = kernels.row_sums(flat, factors, dense)
    right = None if grad_bias is None else saved.shift[:, None]
    gradient = kernels.FactoredGradient((k, h * e, d), dense, saved.scale, grad_bias, right)
    assert grad_scale is not None
    return gradient, grad_scale, None if grad_bias is None else grad_shift


def _dense_gradients(
    saved: _Saved, grad_projections: Float[Tensor, "KH E D"], grad_bias: Float[Tensor, "K HE"] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients by to_value, scale and shift."""
    k, h, e, d = saved.to_value.shape
    grad_to_value = grad_projections.to(saved.attention.dtype).view(k, h, e, d)
    grad_scale = (grad_to_value * saved.to_value).sum((1, 2))
    grad_to_value *= saved.scale[:, None, None]
    if grad_bias is None:
        return grad_to_value, grad_scale, None
    grad_to_value.addcmul_(grad_bias.view(k, h, e, 1), saved.shift[:, None, None])
    return grad_to_value, grad_scale, kernels.row_sums(saved.to_value.flatten(1, 2), grad_bias)[0]


# --- Products, by the kernels where these can be used -----------------------------------------------------------------


def _chunks(x: Float[Tensor, "B T D"], heads: int) -> list[slice]:
    """Images in even parts whose averages by so many heads take CHUNK_BYTES at most; one part on a GPU."""
    b, _, d = x.shape
    count = 1 if x.is_cuda else min(b, -(-b * heads * d * x.element_size() // CHUNK_BYTES))
    edges = [b * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _averages(
    weights: Float[Tensor, "B T KH"], x: Float[Tensor, "B T D"], use_kernels: bool
) -> Float[Tensor, "KH B D"]:
    """Sums of tokens by weights; products write whole tensors, and the next ones read them by strides.

    A product that writes by strides computes its matrices one after another, which costs a small head twice as much.
    """
    if use_kernels:
        return kernels.averages(weights, x)
    return torch.bmm(weights.to(x.dtype).mT, x).transpose(0, 1)


def _values(
    projections: Float[Tensor, "KH E D"],
    average: Float[Tensor, "KH B D"],
    bias: Float[Tensor, "KH E"],
    excess: Float[Tensor, "KH B"] | None,
    use_kernels: bool,
) -> Float[Tensor, "KH E B"]:
    """Projections of averages, plus bias · (1 + excess)."""
    if use_kernels:
        return kernels.values(projections, average, bias, excess)
    values = torch.bmm(projections, average.mT)
    values += bias[:, :, None] if excess is None else bias[:, :, None] * (1 + excess[:, None])
    return values


def _attention_gradients(
    x: Float[Tensor, "B T D"], grad_values: Float[Tensor, "KH E B"], projections: Float[Tensor, "KH E D"]
) -> Float[Tensor, "B T KH"]:
    """Gradients by the weights of the averages."""
    (b, t, _), heads = x.shape, len(projections)
    grad_attention = x.new_empty(b, t, heads)
    for images in _chunks(x, heads):
        grad_averages = torch.bmm(grad_values[:, :, images].mT, projections).transpose(0, 1)
        torch.bmm(x[images], grad_averages.mT, out=grad_attention[images])
    return grad_attention
