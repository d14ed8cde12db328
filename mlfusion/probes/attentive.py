"""The attentive probe of the study (ALF, AAT), folded so that nothing as wide as its heads is computed per token.

Its query is learned and does not depend on the image, so per head the key projection folds into one vector `u` of width
D. Attention is linear in the values, so tokens are averaged first and projected after. The function is the same as that
of projecting keys and values per token, at about a twentieth of the arithmetic.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mlfusion.probes import kernels
from mlfusion.probes.contract import Shape, generators, kept, uniform
from mlfusion.probes.pooling import NORM_EPS, standard

QUERY_STD = 0.02
BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1
MASKS = 0x9E3779B97F4A7C15
SLAB = 1 << 25  # bytes of averages that are made and projected at a time
KEPT = 1 << 26  # bytes of averages that are kept for the backward pass; more are made again


class Attentive(nn.Module):
    """K probes of cross-attention from one learned query (arXiv 2601.09322, its pooling from CAE, arXiv 2202.03026).

    LN_q(q0) attends to LN_k(x), LN_v(x) with H heads of width e = 2⌊D/H⌋, then output projection, BatchNorm, Linear.
    The shift of LN_k is not among the parameters: it adds the same constant to every score of a head, which the softmax
    takes out again, so it has neither effect nor gradient.
    """

    clip: ClassVar[float | None] = 5.0
    drops: ClassVar[bool] = True
    attends: ClassVar[bool] = True

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, shape: Shape, *, seeds: Sequence[int], dropouts: Sequence[float]) -> None:
        """Query from N(0, 0.02²), projections as PyTorch's Linear; each configuration from its own seed.

        Args:
            shape: sizes; a head is `2 * (width // heads)` wide.
            seeds: one integer for each configuration, which starts its initialisation and its dropout masks.
            dropouts: rate of attention dropout of each configuration, in [0, 1).
        """
        super().__init__()
        k, d, h, e = len(seeds), shape.width, shape.heads, 2 * (shape.width // shape.heads)
        streams = generators(seeds)
        self.query = nn.Parameter(torch.stack([torch.randn(d, generator=g) for g in streams]) * QUERY_STD)
        self.query_scale, self.query_shift = nn.Parameter(torch.ones(k, d)), nn.Parameter(torch.zeros(k, d))
        self.key_scale = nn.Parameter(torch.ones(k, d))
        self.value_scale, self.value_shift = nn.Parameter(torch.ones(k, d)), nn.Parameter(torch.zeros(k, d))
        self.to_query = uniform(streams, h, e, d, fan_in=d)
        self.to_key = uniform(streams, h, e, d, fan_in=d)
        self.to_value = uniform(streams, h, e, d, fan_in=d)
        self.to_output = uniform(streams, d, h * e, fan_in=h * e)
        self.output_bias = uniform(streams, d, fan_in=h * e)
        self.norm_scale, self.norm_shift = nn.Parameter(torch.ones(k, d)), nn.Parameter(torch.zeros(k, d))
        self.register_buffer("running_mean", torch.zeros(k, d))
        self.register_buffer("running_var", torch.ones(k, d))
        self.classifier = uniform(streams, shape.classes, d, fan_in=d)
        self.classifier_bias = uniform(streams, shape.classes, fan_in=d)
        self.dropouts = tuple(dropouts)
        self._seeds = tuple(seeds)
        self.mask_streams: list[torch.Generator] = []

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Normalised tokens [B, T, D] → logits [K, B, C].

        Args:
            tokens: the same images for all configurations.
            keep: factors on the attention weights [K, B, H, T], 0 or 1/(1 − rate). By default they are drawn from each
                configuration's own stream while training; in evaluation nothing is dropped.
        """
        b, t, _ = tokens.shape
        k, h, _, d = self.to_value.shape
        factors = self._draw(tokens) if keep is None else keep.permute(1, 3, 0, 2).reshape(b, t, k * h)
        x = standard(tokens)
        with torch.autocast(tokens.device.type, enabled=False):  # what is narrow is said
            out = Pool.apply(
                x,
                self._folded(),
                self.to_value,
                self.value_scale,
                self.value_shift,
                self.to_output,
                factors,
                self.training,
            )
            # What is added to every image alike has no gradient in training: BatchNorm takes it out again. The little
            # that rounding would leave, AdamW would blow up to steps of the full learning rate.
            out = out + (self.output_bias.detach() if self.training else self.output_bias)[..., None]
            normed = F.batch_norm(
                out.view(1, k * d, b),
                self.running_mean.view(-1),
                self.running_var.view(-1),
                self.norm_scale.view(-1),
                self.norm_shift.view(-1),
                training=self.training,
                momentum=BATCH_NORM_MOMENTUM,
                eps=BATCH_NORM_EPS,
            )
        return torch.baddbmm(self.classifier_bias[..., None], self.classifier, normed.view(k, d, b)).mT

    def attention(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → weights [K, B, H, T] without dropout, which sum to one over T."""
        k, h = self.to_key.shape[:2]
        weights = _softmax(standard(tokens), self._folded())  # [B, T, K·H]
        return weights.unflatten(2, (k, h)).permute(2, 0, 3, 1)

    def _folded(self) -> Tensor:
        """The vectors u [K·H, D] whose products with a token are its scores."""
        query = F.layer_norm(self.query, self.query.shape[1:], eps=NORM_EPS) * self.query_scale + self.query_shift
        return (Fold.apply(query, self.to_query, self.to_key) * self.key_scale[:, None]).flatten(0, 1)

    def _draw(self, tokens: Tensor) -> Tensor | None:
        """Dropout factors [B, T, K·H] while training; a rate of 0 draws nothing and keeps everything."""
        if not self.training or not any(self.dropouts):
            return None
        if not self.mask_streams:
            # Not the seeds of the initialisation: the first masks would repeat its numbers.
            self.mask_streams = generators([seed ^ MASKS for seed in self._seeds], tokens.device)
        (b, t, _), (k, h) = tokens.shape, self.to_key.shape[:2]
        keep = self.query.new_ones(b, t, k, h)
        for n, (rate, stream) in enumerate(zip(self.dropouts, self.mask_streams, strict=True)):
            if rate:
                keep[:, :, n] = kept(rate, (b, t, h), stream)
        return keep.flatten(2)


class Fold(torch.autograd.Function):
    """Keys projected onto the query, W_kᵀ W_q q / √e of every head.

    By hand because products with a single column are slow, and those with a single row are not; and because the gradients
    of W_q and W_k are products of two vectors, which need not be written out for an optimiser that follows them as such.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, to_query: Tensor, to_key: Tensor) -> Tensor:
        """[K, D], [K, H, e, D] and the same → [K, H, D]."""
        k, h, e, d = to_key.shape
        ctx.sinks = to_query, to_key
        projected = _times(to_query, query).view(k, h, e) / math.sqrt(e)
        ctx.save_for_backward(query, to_query, to_key, projected)
        return _summed(to_key.flatten(0, 1), projected.view(k * h, e)).view(k, h, d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        query, to_query, to_key, projected = ctx.saved_tensors
        k, h, e, d = to_key.shape
        to_projected = _products(to_key.flatten(0, 1), given.reshape(k * h, d)).view(k, h, e) / math.sqrt(e)
        by_query = _summed(to_query.flatten(1, 2), to_projected.view(k, h * e))
        if kernels.accepted(*ctx.sinks):
            shape = k, h * e, d
            kernels.give(ctx.sinks[0], kernels.Factored(shape, left=to_projected.view(k, h * e), right=query[:, None]))
            kernels.give(ctx.sinks[1], kernels.Factored(shape, left=projected.view(k, h * e), right=given))
            return by_query, None, None
        return by_query, to_projected[..., None] * query[:, None, None], projected[..., None] * given[:, :, None]


class Pool(torch.autograd.Function):
    """Tokens averaged by softmax of their scores, projected by every head and joined: what the probe sees of an image.

    By hand because tokens need no gradient, and for the layout: every product writes what it makes as the next one wants
    it, the averages and their gradients, which are the largest tensors there are, by strides, and all else with the images
    last, [K, H·e, B] and [K, D, B]. Products are of the type of the tokens, softmax and gradients as wide as the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        folded: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        output: Tensor,
        keep: Tensor | None,
        centred: bool,
    ) -> Tensor:
        """Standard tokens [B, T, D] → [K, D, B].

        Args:
            ctx: for the backward pass.
            x: tokens.
            folded: u [K·H, D].
            weight: of the values [K, H, e, D].
            scale: of LN_v [K, D].
            shift: likewise.
            output: of the projection that joins the heads [K, D, H·e].
            keep: factors on the attention [B, T, K·H], or None.
            centred: what is added to all images alike has no effect and gets no gradient.
        """
        k, h, e, _ = weight.shape
        narrow = x.dtype
        # Scale and shift of LN_v go to the projection, which is smaller than the averages of a batch.
        if ours := kernels.fit(x, weight):
            project, packed, constant = kernels.narrow(weight, scale, shift)
        else:
            project, packed = (weight * scale[:, None, None]).to(narrow).flatten(0, 1), None  # [K·H, e, D]
            constant = _times(weight, shift)  # [K·H, e]
        join = output.to(narrow)
        weights = _softmax(x, folded)
        if keep is None:
            gained, dropped = None, weights
        else:
            # The shift follows the sum of the weights, which dropping moves away from one; by exactly 0 at a rate of 0.
            dropped = weights * keep
            gained = (dropped - weights).sum(1).T  # [K·H, B]
        parts = _slabs(x, k * h)
        value, kept = [], []
        for some in parts:
            average = _averages(dropped[some], x[some], ours)
            value.append(_values(project, average, constant, None if gained is None else gained[:, some], ours))
            if len(parts) * SLAB <= KEPT:
                kept.append(average)
        joined = value[0] if len(value) == 1 else torch.cat(value, 2)
        ctx.save_for_backward(
            x, weight, scale, shift, project, packed, join, constant, weights, keep, gained, joined, *kept
        )
        ctx.centred, ctx.sinks = centred, (weight, output)
        return torch.bmm(join, joined.view(k, h * e, -1)).to(weights.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        """∂/∂out [K, D, B] → ∂/∂u and those of weight, scale, shift and output."""
        x, weight, scale, shift, project, packed, join, constant, weights, keep, gained, joined, *kept = (
            ctx.saved_tensors
        )
        (k, h, e, d), b = weight.shape, len(x)
        wide, narrow, ours = weights.dtype, x.dtype, packed is not None
        given = given.to(narrow)
        to_output = torch.bmm(given, joined.view(k, h * e, b).mT)
        given = torch.bmm(join.mT, given).view(k * h, e, b)
        dropped = weights if keep is None else weights * keep
        to_project = None
        for n, some in enumerate(_slabs(x, k * h)):
            average = kept[n] if kept else _averages(dropped[some], x[some], ours)
            part = torch.bmm(given[:, :, some], average)
            to_project = part if to_project is None else to_project + part.to(wide)
        assert to_project is not None
        slope = kernels.slopes(x, given, packed) if ours else _slopes(x, given, project).to(wide)
        if keep is not None:
            # Of dropped = keep · weights, and of gained = Σ (dropped − weights).
            lifted = torch.bmm(constant[:, None].to(narrow), given)[:, 0].T.to(wide)  # ∂/∂gained [B, K·H]
            slope = slope.add_(lifted[:, None]).mul_(keep).sub_(lifted[:, None])
        slope = torch.ops.aten._softmax_backward_data(slope, weights, 1, wide)
        to_folded = (slope.to(narrow).flatten(0, 1).T @ x.flatten(0, 1)).to(wide)
        # Of project = weight · scale, and of constant = weight · shift where its factor differs from image to image.
        to_constant = to_shift = None
        if gained is not None or not ctx.centred:
            factor = torch.zeros(k * h, b, dtype=wide, device=x.device) if gained is None else gained
            factor = factor if ctx.centred else factor + 1
            to_constant = torch.bmm(factor[:, None].to(narrow), given.mT).to(wide).view(k, h * e)
        flat = weight.flatten(1, 2)
        if ours and to_project.dtype is narrow and kernels.accepted(*ctx.sinks):
            by = to_project.view(flat.shape)
            factors, right = (flat.new_zeros(k, h * e), None) if to_constant is None else (to_constant, shift[:, None])
            to_shift, to_scale = kernels.columns(flat, factors, by)
            kernels.give(ctx.sinks[0], kernels.Factored((k, h * e, d), by, scale, to_constant, right))
            kernels.give(ctx.sinks[1], kernels.Factored((k, d, h * e), to_output))
            return None, to_folded, None, to_scale, None if right is None else to_shift, None, None, None
        to_weight = to_project.to(wide).view(k, h, e, d)
        to_scale = (to_weight * weight).sum((1, 2))
        to_weight *= scale[:, None, None]
        if to_constant is not None:
            to_weight.addcmul_(to_constant.view(k, h, e, 1), shift[:, None, None])
            to_shift = _summed(flat, to_constant)
        return None, to_folded, to_weight, to_scale, to_shift, to_output.to(wide), None, None


def _slabs(x: Tensor, heads: int) -> list[slice]:
    """Images [B, T, D] in even parts whose averages by so many heads take a slab at most; one part on a GPU."""
    b, _, d = x.shape
    count = 1 if x.is_cuda else min(b, -(-b * heads * d * x.element_size() // SLAB))
    edges = [b * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _averages(weights: Tensor, x: Tensor, ours: bool) -> Tensor:
    """[b, T, K·H] and tokens [b, T, D] → [K·H, b, D], written in that order: to turn them afterwards costs as much again."""
    if ours:
        return kernels.averages(weights, x)
    weights = weights.to(x.dtype)
    out = x.new_empty(weights.shape[2], len(x), x.shape[2])
    torch.bmm(weights.mT, x, out=out.transpose(0, 1))
    return out


def _values(project: Tensor, average: Tensor, constant: Tensor, gained: Tensor | None, ours: bool) -> Tensor:
    """Projections [K·H, e, D] of averages [K·H, b, D], and a constant [K·H, e] by 1 + gained [K·H, b] → [K·H, e, b]."""
    if ours:
        return kernels.values(project, average, constant, gained)
    value = torch.bmm(project, average.mT)
    value += constant[:, :, None] if gained is None else constant[:, :, None] * (1 + gained[:, None])
    return value


def _slopes(x: Tensor, given: Tensor, project: Tensor) -> Tensor:
    """Tokens [B, T, D], ∂/∂values [K·H, e, B] and their projections [K·H, e, D] → ∂/∂weights of the averages [B, T, K·H]."""
    (b, t, d), heads = x.shape, len(project)
    slope = x.new_empty(b, t, heads)
    for some in _slabs(x, heads):
        back = x.new_empty(len(x[some]), heads, d)  # ∂/∂averages, laid out as the next product wants them
        torch.bmm(given[:, :, some].mT, project, out=back.transpose(0, 1))
        torch.bmm(x[some], back.mT, out=slope[some])
    return slope


def _times(weight: Tensor, vector: Tensor) -> Tensor:
    """[K, H, e, D] by [K, D] → [K·H, e]."""
    k, h, e, _ = weight.shape
    return _products(weight.flatten(1, 2), vector).view(k * h, e)


def _products(weight: Tensor, vectors: Tensor) -> Tensor:
    """[G, R, D] by [G, D] → [G, R]."""
    if kernels.weigh(weight):
        return kernels.rows(weight, vectors)
    return torch.bmm(vectors[:, None], weight.mT)[:, 0]


def _summed(weight: Tensor, factors: Tensor) -> Tensor:
    """[G, R, D] by [G, R] → [G, D]."""
    if kernels.weigh(weight):
        return kernels.columns(weight, factors)[0]
    return torch.bmm(factors[:, None], weight)[:, 0]


def _softmax(x: Tensor, folded: Tensor) -> Tensor:
    """Standard tokens [B, T, D] and vectors [K·H, D] → weights [B, T, K·H], which sum to one over T."""
    if kernels.fit(x, folded):
        return kernels.softmax(x, folded.to(x.dtype))
    scores = x.flatten(0, 1) @ folded.to(x.dtype).T
    return torch.softmax(scores.view(*x.shape[:2], -1).to(folded.dtype), dim=1)
