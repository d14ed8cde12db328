"""AdamW for a population: each configuration has its own learning rate, weight decay and gradient clipping."""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mlfusion.probing.heads import kernels
from mlfusion.shapes import Float

BETAS, EPS = (0.9, 0.999), 1e-8
LAST_LEARNING_RATE = 1e-6


class AdamW:
    """`torch.optim.AdamW` (arXiv 1711.05101) for a population: learning rate and weight decay are vectors over K."""

    def __init__(
        self, parameters: Iterable[Float[Tensor, "K ..."]], *, lr: Sequence[float], weight_decay: Sequence[float]
    ) -> None:
        """Weight decay applies to every parameter, scales and biases included."""
        self.parameters = list(parameters)
        self.lr = lr
        self.weight_decay = weight_decay
        values = [p.detach() for p in self.parameters]
        moments = [[torch.zeros_like(p) for p in values] for _ in range(2)]
        steps = [torch.zeros(len(lr), device=p.device) for p in values]
        self._state = values, *moments, steps
        # Views of each configuration's part are made once: making them costs more than a step of a small probe.
        self._members = [tuple([tensor[k] for tensor in kind] for kind in self._state) for k in range(len(lr))]
        # One call updates neighbouring configurations with the same rate and decay.
        runs = groupby(range(len(lr)), key=lambda k: (lr[k], weight_decay[k]))
        self._runs = [(weight_decay[members[0]], members) for members in (list(ks) for _, ks in runs)]
        self._factored: dict[int, kernels.FactoredGradient] = {}
        kernels.register(self.parameters)

    @torch.no_grad()
    def clip(self, max_norm: float) -> None:
        """Scale each configuration's gradients to a norm of at most `max_norm`, as `clip_grad_norm_` does for one model."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self._pop_factored()
        norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
        norms += [g.norms() for g in self._factored.values()]
        factor = (max_norm / (torch.linalg.vector_norm(torch.stack(norms), dim=0) + 1e-6)).clamp(max=1.0)
        if factor.is_cuda or bool((factor != 1).any()):  # reading the factor would wait for a GPU
            for gradient in gradients:
                gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))
            self._factored = {n: g.scaled(factor) for n, g in self._factored.items()}

    @torch.no_grad()
    def step(self, rates: Sequence[float] | None = None) -> None:
        """Update every parameter once, and clear the gradients.

        Args:
            rates: learning rates [K], equal for configurations whose `lr` is equal. Default: `lr`.
        """
        rates = self.lr if rates is None else rates
        self._pop_factored()
        with_gradient = [n for n, p in enumerate(self.parameters) if p.grad is not None]
        without_gradient = [n for n, p in enumerate(self.parameters) if p.grad is None and n not in self._factored]
        gradients = [self.parameters[n].grad.contiguous().unbind() for n in with_gradient]  # type: ignore[union-attr]
        for decay, members in self._runs:
            lr = rates[members[0]]
            values, first, second, steps = (
                [self._members[k][i][n] for k in members for n in with_gradient] for i in range(4)
            )
            adamw(
                values,
                [gradient[k] for k in members for gradient in gradients],
                first,
                second,
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=lr,
                weight_decay=decay,
                eps=EPS,
                maximize=False,
            )
            # The gradient of these is zero, so that only the decay changes them.
            for value in (self._members[k][0][n] for k in members for n in without_gradient):
                value.sub_(value * (lr * decay))
        for n, factored in self._factored.items():
            value, moment, square, count = (tensors[n] for tensors in self._state)
            count += 1
            first_correction, second_correction = (1 - beta ** int(count[0]) for beta in BETAS)
            pairs = [
                (lr / first_correction, 1 - lr * decay) for lr, decay in zip(rates, self.weight_decay, strict=True)
            ]
            constants = torch.tensor([*BETAS, EPS, math.sqrt(second_correction)], dtype=torch.float32)
            kernels.adamw(value, moment, square, factored, torch.tensor(pairs, dtype=torch.float32), constants)
        self._factored = {}
        for n in with_gradient:
            self.parameters[n].grad = None

    def _pop_factored(self) -> None:
        for n, parameter in enumerate(self.parameters):
            if (gradient := kernels.pop_gradient(parameter)) is not None:
                self._factored[n] = gradient


def cosine(lr: Sequence[float], step: int, steps: int) -> list[float]:
    """Learning rates at `step` of a cosine decay from `lr` to 1e-6, without warm-up."""
    share = (1 + math.cos(math.pi * step / steps)) / 2
    return [LAST_LEARNING_RATE + (each - LAST_LEARNING_RATE) * share for each in lr]
