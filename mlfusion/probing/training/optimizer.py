"""AdamW for a population: every configuration is moved as it would be alone, at a rate, a decay and a clipping of its own."""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mlfusion.probing.heads import kernels

LAST_LEARNING_RATE = 1e-6


class AdamW:
    """`torch.optim.AdamW` (arXiv 1711.05101) for a population: learning rate and decay are vectors over K."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: Sequence[float],
        weight_decay: Sequence[float],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Parameters [K, …]; everything is decayed, scales and biases too."""
        self.parameters = list(parameters)
        self.betas, self.eps = betas, eps
        self.lr = torch.tensor(lr, dtype=torch.float64)
        self.weight_decay = torch.tensor(weight_decay, dtype=torch.float64)
        values = [p.detach() for p in self.parameters]
        moments = [[torch.zeros_like(p) for p in values] for _ in range(2)]
        steps = [torch.zeros(len(lr), device=p.device) for p in values]
        self._state = values, *moments, steps
        # What is a configuration's own: views, which cost more than a small probe's step if made anew for each.
        self._members = [tuple([each[k] for each in one] for one in self._state) for k in range(len(lr))]
        # Neighbours that move alike are moved by one call.
        alike = groupby(range(len(lr)), key=lambda k: (lr[k], weight_decay[k]))
        self._alike = [(weight_decay[own[0]], own) for own in (list(ks) for _, ks in alike)]
        self._factored: dict[int, kernels.FactoredGradient] = {}
        kernels.register(self.parameters)

    @torch.no_grad()
    def clip(self, largest: float) -> None:
        """Scale each configuration's gradients to a norm of `largest` at most, as `clip_grad_norm_` does for one."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self._factored |= {n: g for n, p in enumerate(self.parameters) if (g := kernels.pop_gradient(p)) is not None}
        norms = torch.stack(
            [
                *(torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients),
                *(g.norms() for g in self._factored.values()),
            ]
        )
        factor = (largest / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        if factor.is_cuda or bool((factor != 1).any()):  # to look would wait for a GPU
            for gradient in gradients:
                gradient.mul_(_over(factor, gradient))
            self._factored = {n: g.scaled(factor) for n, g in self._factored.items()}

    @torch.no_grad()
    def step(self, rates: Sequence[float] | None = None) -> None:
        """One update; gradients are forgotten after it.

        Args:
            rates: learning rates [K], the same for configurations whose `lr` is the same. By default `lr`.
        """
        rates = self.lr.tolist() if rates is None else rates
        factored = self._factored | {
            n: g for n, p in enumerate(self.parameters) if (g := kernels.pop_gradient(p)) is not None
        }
        self._factored = {}
        moved = [n for n, p in enumerate(self.parameters) if p.grad is not None]
        still = [n for n, p in enumerate(self.parameters) if p.grad is None and n not in factored]
        gradients = [self.parameters[n].grad.contiguous().unbind() for n in moved]  # type: ignore[union-attr]
        for decay, own in self._alike:
            lr = rates[own[0]]
            values, first, second, steps = ([self._members[k][i][n] for k in own for n in moved] for i in range(4))
            adamw(
                values,
                [gradient[k] for k in own for gradient in gradients],
                first,
                second,
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr,
                weight_decay=decay,
                eps=self.eps,
                maximize=False,
            )
            for value in (self._members[k][0][n] for k in own for n in still):  # a gradient of zero, which leaves decay
                value.sub_(value * (lr * decay))
        for n, made in factored.items():
            value, moment, square, count = (one[n] for one in self._state)
            count += 1
            by = kernels.AdamWStep(
                step=int(count[0]),
                lr=rates,
                weight_decay=self.weight_decay.tolist(),
                betas=self.betas,
                eps=self.eps,
            )
            kernels.adamw(value, moment, square, made, by)
        for n in moved:
            self.parameters[n].grad = None


def _over(vector: Tensor, like: Tensor) -> Tensor:
    """[K] → [K, 1, …], to broadcast over a parameter [K, …]."""
    return vector.view(-1, *[1] * (like.ndim - 1))


def cosine(lr: Tensor, step: int, steps: int) -> Tensor:
    """Learning rates [K] at `step` of a cosine decay from `lr` to 1e-6, without warm-up."""
    return LAST_LEARNING_RATE + (lr - LAST_LEARNING_RATE) * (1 + math.cos(math.pi * step / steps)) / 2
