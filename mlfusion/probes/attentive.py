"""The attentive probe of the study (ALF, AAT), folded so that nothing as wide as its heads is computed per token.

Its query is learned and does not depend on the image, so per head the key projection folds into one vector `u` of width
D. Attention is linear in the values, so tokens are averaged first and projected after. The function is the same as that
of projecting keys and values per token, at about a twentieth of the arithmetic.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mlfusion.probes.contract import Shape, generators, kept, uniform
from mlfusion.probes.pooling import NORM_EPS, linear, standard

QUERY_STD = 0.02
BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1
MASKS = 0x9E3779B97F4A7C15
IN_CACHE = 1 << 22  # bytes of averages that are at hand at a time


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
        self._masks: list[torch.Generator] = []

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Normalised tokens [B, T, D] → logits [K, B, C].

        Args:
            tokens: the same images for all configurations.
            keep: factors on the attention weights [K, B, H, T], 0 or 1/(1 − rate). By default they are drawn from each
                configuration's own stream while training; in evaluation nothing is dropped.
        """
        b, t, _ = tokens.shape
        k, h = self.to_value.shape[:2]
        factors = self._draw(tokens) if keep is None else keep.permute(1, 3, 0, 2).reshape(b, t, k * h)
        # What is added to every image alike has no gradient in training: BatchNorm takes it out again. The little that
        # rounding would leave, AdamW would blow up to steps of the full learning rate.
        value = Gather.apply(
            standard(tokens), self._folded(), self.to_value, self.value_scale, self.value_shift, factors, self.training
        )
        bias = self.output_bias.detach() if self.training else self.output_bias
        normed = self._batch_norm(linear(value, self.to_output, bias).to(self.norm_scale.dtype))
        return linear(normed, self.classifier, self.classifier_bias)

    def attention(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → weights [K, B, H, T] without dropout, which sum to one over T."""
        k, h = self.to_key.shape[:2]
        weights = _softmax(standard(tokens), self._folded())  # [B, T, K·H]
        return weights.unflatten(2, (k, h)).permute(2, 0, 3, 1)

    def _folded(self) -> Tensor:
        """The vectors u [K·H, D] whose products with a token are its scores."""
        k, h, e, d = self.to_key.shape
        query = F.layer_norm(self.query, (d,), eps=NORM_EPS) * self.query_scale + self.query_shift
        projected = torch.bmm(self.to_query.flatten(1, 2), query[:, :, None]).view(k * h, 1, e) / math.sqrt(e)
        u = torch.bmm(projected, self.to_key.flatten(0, 1)).view(k, h, d) * self.key_scale[:, None]
        return u.flatten(0, 1)

    def _batch_norm(self, x: Tensor) -> Tensor:
        """BatchNorm1d of every configuration: [K, B, D] over B while training, by running statistics otherwise."""
        k, b, d = x.shape
        normed = F.batch_norm(
            x.transpose(0, 1).reshape(b, k * d),
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.norm_scale.view(-1),
            self.norm_shift.view(-1),
            training=self.training,
            momentum=BATCH_NORM_MOMENTUM,
            eps=BATCH_NORM_EPS,
        )
        return normed.view(b, k, d).transpose(0, 1)

    def _draw(self, tokens: Tensor) -> Tensor | None:
        """Dropout factors [B, T, K·H] while training; a rate of 0 draws nothing and keeps everything."""
        if not self.training or not any(self.dropouts):
            return None
        if not self._masks:
            # Not the seeds of the initialisation: the first masks would repeat its numbers.
            self._masks = generators([seed ^ MASKS for seed in self._seeds], tokens.device)
        (b, t, _), (k, h) = tokens.shape, self.to_key.shape[:2]
        keep = self.query.new_ones(b, t, k, h)
        for n, (rate, stream) in enumerate(zip(self.dropouts, self._masks, strict=True)):
            if rate:
                keep[:, :, n] = kept(rate, (b, t, h), stream)
        return keep.flatten(2)


class Gather(torch.autograd.Function):
    """Tokens averaged by softmax of their scores and then projected: what every head sees of an image.

    By hand because tokens need no gradient, and because averages and their gradients, the largest tensors there are, are
    made and used up for a few images at a time, while they are in a core's cache. Under autocast the products are of its
    type; softmax and its gradient stay as wide as the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        folded: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        keep: Tensor | None,
        centred: bool,
    ) -> Tensor:
        """Standard tokens [B, T, D] → values [K, B, H·e].

        Args:
            ctx: for the backward pass.
            x: tokens.
            folded: u [K·H, D].
            weight: of the values [K, H, e, D].
            scale: of LN_v [K, D].
            shift: likewise.
            keep: factors on the attention [B, T, K·H], or None.
            centred: what is added to all images alike has no effect and gets no gradient.
        """
        k, h, e, _ = weight.shape
        narrow = x.dtype
        # Scale and shift of LN_v go to the projection, which is smaller than the averages of a batch.
        project = (weight * scale[:, None, None]).to(narrow).flatten(0, 1)  # [K·H, e, D]
        constant = _times(weight, shift)  # [K·H, e]
        weights = _softmax(x, folded)
        if keep is None:
            gained, dropped = None, weights
        else:
            # The shift follows the sum of the weights, which dropping moves away from one; by exactly 0 at a rate of 0.
            dropped = weights * keep
            gained = (dropped - weights).sum(1)  # [B, K·H]
        dropped = dropped.to(narrow)
        value = torch.empty(k, len(x), h, e, dtype=narrow, device=x.device)
        for some in _pieces(x, k * h):
            average = torch.bmm(dropped[some].mT, x[some])  # [b, K·H, D]
            each = torch.bmm(average.transpose(0, 1), project.mT)  # [K·H, b, e]
            each += constant[:, None] if gained is None else constant[:, None] * (1 + gained[some].T[:, :, None])
            value[:, some] = each.unflatten(0, (k, h)).transpose(1, 2)
        ctx.save_for_backward(x, weight, scale, shift, project, constant, weights, keep, gained)
        ctx.centred = centred
        return value.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        """∂/∂value [K, B, H·e] → ∂/∂u and those of weight, scale and shift."""
        x, weight, scale, shift, project, constant, weights, keep, gained = ctx.saved_tensors
        (k, h, e, d), (b, t, _) = weight.shape, x.shape
        wide, narrow = weights.dtype, x.dtype
        given = given.unflatten(2, (h, e)).transpose(1, 2).flatten(0, 1)  # [K·H, B, e]
        dropped = (weights if keep is None else weights * keep).to(narrow)
        slope = torch.empty(b, t, k * h, dtype=wide, device=x.device)
        to_project = torch.zeros(k * h, e, d, dtype=wide, device=x.device)
        for some in _pieces(x, k * h):
            part = given[:, some].to(narrow)
            average = torch.bmm(dropped[some].mT, x[some]).transpose(
                0, 1
            )  # made again: that is cheaper than to fetch it
            if wide == narrow:
                to_project.baddbmm_(part.mT, average)
            else:
                to_project += torch.bmm(part.mT, average)
            back = torch.bmm(part, project)  # [K·H, b, D], the gradient of some averages
            slope[some] = torch.bmm(x[some], back.permute(1, 2, 0))
        if keep is not None:
            # Of dropped = keep · weights, and of gained = Σ (dropped − weights).
            lifted = torch.bmm(given, constant.to(given.dtype)[:, :, None])[:, :, 0].T  # ∂/∂gained [B, K·H]
            slope = slope.add_(lifted[:, None]).mul_(keep).sub_(lifted[:, None])
        slope = torch.ops.aten._softmax_backward_data(slope, weights, 1, wide)
        to_folded = (slope.to(narrow).flatten(0, 1).T @ x.flatten(0, 1)).to(wide)
        # Of project = weight · scale.
        to_weight = to_project.view(k, h, e, d)
        to_scale = torch.linalg.vecdot(to_weight, weight, dim=2).sum(1)
        to_weight *= scale[:, None, None]
        # Of constant = weight · shift, where its factor differs from image to image.
        to_shift = None
        if gained is not None or not ctx.centred:
            factor = torch.zeros(k * h, b, dtype=wide, device=x.device) if gained is None else gained.T
            factor = factor if ctx.centred else factor + 1
            to_constant = torch.bmm(factor[:, None].to(given.dtype), given).to(wide).view(k, h, e)
            to_weight.addcmul_(to_constant[..., None], shift[:, None, None])
            to_shift = torch.bmm(to_constant.view(k, 1, h * e), weight.flatten(1, 2))[:, 0]
        return None, to_folded, to_weight, to_scale, to_shift, None, None


def _pieces(x: Tensor, heads: int) -> list[slice]:
    """Images [B, T, D] in parts whose averages by so many heads stay in a core's cache."""
    b, _, d = x.shape
    step = b if x.is_cuda else max(1, IN_CACHE // (heads * d * x.element_size()))
    return [slice(start, min(start + step, b)) for start in range(0, b, step)]


def _times(weight: Tensor, vector: Tensor) -> Tensor:
    """[K, H, e, D] by [K, D] → [K·H, e]."""
    k, h, e, d = weight.shape
    return torch.bmm(weight.view(k, h * e, d), vector[:, :, None]).view(k * h, e)


def _softmax(x: Tensor, folded: Tensor) -> Tensor:
    """Standard tokens [B, T, D] and vectors [K·H, D] → weights [B, T, K·H], which sum to one over T."""
    scores = x.flatten(0, 1) @ folded.to(x.dtype).T
    return torch.softmax(scores.view(*x.shape[:2], -1).to(folded.dtype), dim=1)
