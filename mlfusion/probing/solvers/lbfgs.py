"""A batched L-BFGS that minimises many independent problems side by side."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MOST_ITERATIONS = 1000  # as in CLIP's protocol
TOLERANCE = 1e-8  # of the loss


class _Point(NamedTuple):
    """Where k functions are: points [k, P], values [k] and gradients [k, P]."""

    x: Tensor
    value: Tensor
    gradient: Tensor


def minimise(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    *,
    history: int = 10,
    most: int = MOST_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Minima of K convex functions of P numbers each, by L-BFGS (Liu & Nocedal, 1989), all K in step.

    Backtracking is enough: of a convex function every step has the curvature that a line search for Wolfe's condition
    looks for. A function is done when ten steps gained less than `tolerance` of its value and the gradient, squared,
    is as small beside it.

    Args:
        function: points [k, P] and which of the K they are for [k] → values [k] and gradients [k, P].
        start: [K, P].
        history: steps that are remembered.
        most: iterations.
        tolerance: relative to the value.

    Returns:
        [K, P].
    """
    result = start.clone()
    which = torch.arange(len(start), device=start.device)
    x = start.clone()
    value, gradient = function(x, which)
    steps: list[Tensor] = []
    turns: list[Tensor] = []
    past: list[Tensor] = [value]
    for _ in range(most):
        direction = -_inverse(gradient, steps, turns)
        slope = (direction * gradient).sum(1)
        uphill = slope >= 0  # by rounding only
        direction[uphill], slope[uphill] = -gradient[uphill], -gradient[uphill].square().sum(1)
        if not steps:  # no scale is known yet
            shorter = 1 / direction.norm(dim=1).clamp(min=1.0)
            direction, slope = direction * shorter[:, None], slope * shorter
        new, new_value, new_gradient = _backtrack(function, which, _Point(x, value, gradient), direction, slope)
        steps, turns = [*steps, new - x][-history:], [*turns, new_gradient - gradient][-history:]
        x, value, gradient = new, new_value, new_gradient
        past = [*past, value][-11:]
        small = gradient.square().sum(1) <= tolerance * (value.abs() + 1e-300)
        settled = (past[0] - value <= tolerance * value.abs()) & small if len(past) == 11 else torch.zeros_like(small)
        done = settled | (value == past[-2])  # no step is found that rounding does not hide
        if bool(done.any()):
            result[which[done]] = x[done]
            rest = ~done
            which, x, value, gradient = which[rest], x[rest], value[rest], gradient[rest]
            steps, turns, past = [s[rest] for s in steps], [t[rest] for t in turns], [p[rest] for p in past]
            if not len(which):
                return result
    result[which] = x
    return result


def _backtrack(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    which: Tensor,
    at: _Point,
    direction: Tensor,
    slope: Tensor,
) -> _Point:
    """The point along `direction` [k, P] where each function has fallen enough (Armijo's condition), by halving the step.

    A function that has not after 40 halvings stays where it is.
    """
    new = _Point(at.x.clone(), at.value.clone(), at.gradient.clone())
    size = torch.ones_like(at.value)
    todo = torch.arange(len(at.x), device=at.x.device)
    for _ in range(40):
        tried = at.x[todo] + size[todo, None] * direction[todo]
        value, gradient = function(tried, which[todo])
        good = value <= at.value[todo] + 1e-4 * size[todo] * slope[todo]
        taken = todo[good]
        new.x[taken], new.value[taken], new.gradient[taken] = tried[good], value[good], gradient[good]
        todo = todo[~good]
        if not len(todo):
            break
        size[todo] *= 0.5
    return new


def _inverse(gradient: Tensor, steps: list[Tensor], turns: list[Tensor]) -> Tensor:
    """The inverse Hessian by the two-loop recursion, times the gradient [k, P]."""
    q, kept = gradient.clone(), []
    for step, turn in zip(reversed(steps), reversed(turns), strict=True):
        curvature = (step * turn).sum(1)
        rho = torch.where(curvature > 0, 1 / curvature, 0.0)  # no step was taken: nothing is learnt
        alpha = rho * (step * q).sum(1)
        q -= alpha[:, None] * turn
        kept.append((rho, alpha))
    if steps:
        length = (turns[-1] ** 2).sum(1)
        q *= torch.where(length > 0, (steps[-1] * turns[-1]).sum(1) / length, 1.0)[:, None]
    for step, turn, (rho, alpha) in zip(steps, turns, reversed(kept), strict=True):
        q += (alpha - rho * (turn * q).sum(1))[:, None] * step
    return q
