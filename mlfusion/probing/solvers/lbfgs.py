"""A batched L-BFGS that minimises many independent problems side by side."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mlfusion.shapes import Float, Int

HISTORY = 10  # number of previous steps in the inverse Hessian
MAX_ITERATIONS = 1000  # as in CLIP's protocol
TOLERANCE = 1e-8  # relative to the loss

Function = Callable[[Float[Tensor, "k P"], Int[Tensor, " k"]], tuple[Float[Tensor, " k"], Float[Tensor, "k P"]]]
"""(points, indices of their functions) → (values, gradients)."""


class _Point(NamedTuple):
    """Points of k functions, with values and gradients."""

    x: Float[Tensor, "k P"]
    value: Float[Tensor, " k"]
    gradient: Float[Tensor, "k P"]


def minimise(function: Function, start: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
    """Minima of K convex functions of P numbers each, by L-BFGS (Liu & Nocedal, 1989), all K in step.

    Backtracking is enough: for a convex function every step meets the curvature condition of Wolfe's line search. A function
    is done when ten steps gained less than `TOLERANCE` of its value and its squared gradient is as small.
    """
    result = start.clone()
    indices = torch.arange(len(start), device=start.device)
    x = start.clone()
    value, gradient = function(x, indices)
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    history: list[Tensor] = [value]
    for _ in range(MAX_ITERATIONS):
        direction = -_inverse_hessian_product(gradient, steps, changes)
        slope = (direction * gradient).sum(1)
        uphill = slope >= 0  # happens only because of rounding
        direction[uphill], slope[uphill] = -gradient[uphill], -gradient[uphill].square().sum(1)
        if not steps:  # the scale of a step is not known yet
            shorter = 1 / direction.norm(dim=1).clamp(min=1.0)
            direction, slope = direction * shorter[:, None], slope * shorter
        new, new_value, new_gradient = _backtrack(function, indices, _Point(x, value, gradient), direction, slope)
        steps, changes = [*steps, new - x][-HISTORY:], [*changes, new_gradient - gradient][-HISTORY:]
        x, value, gradient = new, new_value, new_gradient
        history = [*history, value][-11:]
        small = gradient.square().sum(1) <= TOLERANCE * (value.abs() + 1e-300)
        full = len(history) == 11
        settled = (history[0] - value <= TOLERANCE * value.abs()) & small if full else torch.zeros_like(small)
        done = settled | (value == history[-2])  # rounding hides the effect of any further step
        if bool(done.any()):
            result[indices[done]] = x[done]
            active = ~done
            indices, x, value, gradient = indices[active], x[active], value[active], gradient[active]
            steps, changes, history = ([t[active] for t in tensors] for tensors in (steps, changes, history))
            if not len(indices):
                return result
    result[indices] = x
    return result


def _backtrack(
    function: Function,
    indices: Int[Tensor, " k"],
    at: _Point,
    direction: Float[Tensor, "k P"],
    slope: Float[Tensor, " k"],
) -> _Point:
    """The point along `direction` where each function has fallen enough (Armijo's condition), by halving the step.

    A function that has not fallen after 40 halvings keeps its point.
    """
    new = _Point(at.x.clone(), at.value.clone(), at.gradient.clone())
    size = torch.ones_like(at.value)
    remaining = torch.arange(len(at.x), device=at.x.device)
    for _ in range(40):
        x = at.x[remaining] + size[remaining, None] * direction[remaining]
        value, gradient = function(x, indices[remaining])
        fallen = value <= at.value[remaining] + 1e-4 * size[remaining] * slope[remaining]
        accepted = remaining[fallen]
        new.x[accepted], new.value[accepted], new.gradient[accepted] = x[fallen], value[fallen], gradient[fallen]
        remaining = remaining[~fallen]
        if not len(remaining):
            break
        size[remaining] *= 0.5
    return new


def _inverse_hessian_product(
    gradient: Float[Tensor, "k P"], steps: list[Float[Tensor, "k P"]], changes: list[Float[Tensor, "k P"]]
) -> Float[Tensor, "k P"]:
    """The inverse Hessian by the two-loop recursion, times the gradient."""
    q, coefficients = gradient.clone(), []
    for step, change in zip(reversed(steps), reversed(changes), strict=True):
        curvature = (step * change).sum(1)
        rho = torch.where(curvature > 0, 1 / curvature, 0.0)  # curvature is 0 if no step was taken
        alpha = rho * (step * q).sum(1)
        q -= alpha[:, None] * change
        coefficients.append((rho, alpha))
    if steps:
        length = (changes[-1] ** 2).sum(1)
        q *= torch.where(length > 0, (steps[-1] * changes[-1]).sum(1) / length, 1.0)[:, None]
    for step, change, (rho, alpha) in zip(steps, changes, reversed(coefficients), strict=True):
        q += (alpha - rho * (change * q).sum(1))[:, None] * step
    return q
