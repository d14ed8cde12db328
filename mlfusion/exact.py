"""Heads that are solved for, not trained: ridge and logistic regression at their optimum, and nearest neighbours.

All three take the concatenation of an image's tokens, each of length 1, as the linear probe does, and give probes with the
interface of the trained heads. They compute in float64: float32 loses a penalty of 1e-6 beside an eigenvalue of 1e4.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlfusion.batches import Tokens
from mlfusion.errors import BadData
from mlfusion.probes.contract import HeadModule
from mlfusion.probes.linear import LinearMap
from mlfusion.targets import OneClass, Target

F64 = torch.float64
BLOCK = 1 << 24  # numbers of a block of images, neighbours or votes
AT_ONCE = 8  # penalties that L-BFGS follows together
MOST_ITERATIONS = 1000  # as in CLIP's protocol
TOLERANCE = 1e-8  # of the loss
SCALES = tuple(np.geomspace(1e-1, 1e3, 81).tolist())  # of ridge's scores, to choose from


@dataclass(frozen=True)
class Penalty:
    """λ of λ‖W‖² (ridge) or ½λ‖W‖² (logistic), added to the sum of the losses over images: scikit-learn's alpha, and 1/C."""

    penalty: float


@dataclass(frozen=True)
class Neighbourhood:
    """The number of neighbours that vote, each with a weight of exp(cosine / temperature)."""

    neighbours: int
    temperature: float


def penalties(grid: str) -> tuple[Penalty, ...]:
    """λ from 1e6 to 1e-6: eight a decade, or one a decade for grid 'quick'.

    The eight are the values among which CLIP's protocol (arXiv 2103.00020, A.3) searches by halves, looking at fifteen.
    Here all are solved for, which a path makes cheap.
    """
    return tuple(Penalty(float(value)) for value in np.logspace(6, -6, 13 if grid == "quick" else 97))


def neighbourhoods(grid: str) -> tuple[Neighbourhood, ...]:
    """21 neighbourhoods, or 3 for grid 'quick'."""
    quick = grid == "quick"
    counts, temperatures = ((1, 10, 50), (0.07,)) if quick else ((1, 5, 10, 20, 50, 100, 200), (0.02, 0.07, 0.2))
    return tuple(Neighbourhood(*point) for point in product(counts, temperatures))


class FixedLinear(LinearMap):
    """K linear maps whose weights are given."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """Weights [K, C, T·D] and biases [K, C]."""
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def last(self) -> "FixedLinear":
        """The last of the K maps, as a population of one."""
        return FixedLinear(self.weight.detach()[-1:], self.bias.detach()[-1:])


# --- one factorisation -----------------------------------------------------------------------------------------------


class Design:
    """Images as rows x of width F = T·D, rotated so that their columns are orthogonal under the images' weights w.

    With Σ w = N, centre μ = Σ w x / N and (x − μ) = z Vᵀ, Σ w z zᵀ is diagonal: the `eigenvalues`. A penalty on ‖W‖² is the
    same penalty in these coordinates, so that no penalty needs a factorisation of its own. V comes from the smaller of the
    two products, F × F or N × N.
    """

    def __init__(self, tokens: Tokens, rows: np.ndarray, target: Target, device: str) -> None:
        self.tokens, self.rows, self.target, self.device = tokens, rows, target, _device(device)
        labels = tokens.labels[rows]
        self.weights = torch.from_numpy(target.weights(labels)).to(self.device, F64)  # [N]
        self.targets = torch.from_numpy(target.regressand(labels)).to(self.device, F64)  # [N, C]
        width = int(np.prod(tokens.shape[1:]))
        total = self.weights.sum()
        self.centre = torch.zeros(width, device=self.device, dtype=F64)
        for some, x in self.blocks():
            self.centre += self.weights[some] @ x / total
        if width <= len(rows):
            gram = torch.zeros(width, width, device=self.device, dtype=F64)
            for some, x in self.blocks():
                centred = (x - self.centre) * self.weights[some].sqrt()[:, None]
                gram.addmm_(centred.T, centred)
            eigenvalues, basis = torch.linalg.eigh(gram)
        else:
            centred = torch.cat([x - self.centre for _, x in self.blocks()]) * self.weights.sqrt()[:, None]
            eigenvalues, left = torch.linalg.eigh(centred @ centred.T)
            basis = centred.T @ left / eigenvalues.clamp(min=1e-300).sqrt()
        sound = eigenvalues > eigenvalues.max() * 1e-14  # smaller ones are rounding; the images span no more
        self.eigenvalues, self.basis = eigenvalues[sound], basis[:, sound]  # [r], [F, r]
        self.rotated = torch.cat([(x - self.centre) @ self.basis for _, x in self.blocks()])  # z [N, r]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Images [b, F] in float64, a block at a time, with their places among `rows`."""
        width = int(np.prod(self.tokens.shape[1:]))
        step = max(1, BLOCK // width)
        for start in range(0, len(self.rows), step):
            some = slice(start, min(start + step, len(self.rows)))
            yield some, self.tokens.normalised(self.rows[some], self.device, F64).flatten(1)

    def back(self, rotated: Tensor, bias: Tensor) -> FixedLinear:
        """Maps [K, C, r] of z and biases [K, C] → the same maps of x, in float32."""
        weight = rotated @ self.basis.T
        return FixedLinear(weight.float(), (bias - weight @ self.centre).float())


# --- ridge -----------------------------------------------------------------------------------------------------------


class Ridge:
    """Σ w ‖y − Wx − b‖² + λ‖W‖² at its minimum (Hoerl & Kennard, 1970), for any number of λ from one factorisation.

    y is the number, or 1 for a class or label and 0 for the others. The score of an image by a probe fitted without it
    needs no fit: (ŷ − h y) / (1 − h), h being the image's leverage (Allen, 1974). By those scores λ is chosen.

    Scores of classes and labels are no logits: they are taken relative to one half, times the factor that makes the left-out
    labels most probable, which orders nothing anew.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        self.mean = design.weights @ design.targets / design.weights.sum()  # [C]
        self.product = design.rotated.T @ (design.weights[:, None] * (design.targets - self.mean))  # [r, C]

    def left_out(self, setting: Penalty) -> Tensor:
        """Outputs for every image by the probe fitted to all others [N, C]."""
        scores = self._left_out(setting)
        return self._outputs(scores, self._factor(scores))

    def solve(self, setting: Penalty) -> FixedLinear:
        """The probe fitted to all images."""
        factor = self._factor(self._left_out(setting))
        rotated = (self.product / (self.design.eigenvalues + setting.penalty)[:, None]).T
        return self.design.back(factor * rotated[None], self._outputs(self.mean, factor)[None])

    def _left_out(self, setting: Penalty) -> Tensor:
        design = self.design
        share = 1 / (design.eigenvalues + setting.penalty)
        fitted = self.mean + design.rotated @ (share[:, None] * self.product)
        leverage = design.weights * (1 / design.weights.sum() + design.rotated.square() @ share)
        return (fitted - leverage[:, None] * design.targets) / (1 - leverage)[:, None]

    def _outputs(self, scores: Tensor, factor: float) -> Tensor:
        return scores if self.design.target.kind == "number" else factor * (scores - 0.5)

    def _factor(self, scores: Tensor) -> float:
        if self.design.target.kind == "number":
            return 1.0
        labels = self.design.tokens.labels[self.design.rows]
        loss, truth = self.design.target.loss(labels, self.design.device, F64), torch.from_numpy(labels)
        truth = truth.to(self.design.device)

        def at(place: int) -> float:
            return float(loss(self._outputs(scores, SCALES[place])[None], truth)[0])

        low, high = 0, len(SCALES) - 1
        while low < high:  # the loss is convex in the factor: it falls, then rises
            middle = (low + high) // 2
            low, high = (low, middle) if at(middle) <= at(middle + 1) else (middle + 1, high)
        return SCALES[low]


# --- logistic regression ---------------------------------------------------------------------------------------------


class Logistic:
    """Σ w · cross-entropy + ½λ‖W‖² at its minimum, the bias free: multinomial for classes, one by one for several labels.

    The linear probe of CLIP (arXiv 2103.00020, A.3). L-BFGS runs in the rotated coordinates, where the curvature at W = 0 is
    diagonal and is divided out, for `AT_ONCE` penalties together: of the path, from strong to weak, each run starts
    where the one before ended.
    """

    def __init__(self, design: Design) -> None:
        if design.target.kind == "number":
            raise BadData("logistic regression has no numbers; allowed: classes or labels. For numbers take ridge")
        self.design = design
        self.classes = design.targets.shape[1]
        self.one = isinstance(design.target, OneClass)

    def solve(
        self, path: Sequence[Penalty], advance: Callable[[int], None] | None = None
    ) -> Iterator[tuple[slice, FixedLinear]]:
        """Slices of the path, strong penalties first, each with its probe."""
        r = self.design.rotated.shape[1]
        start = self.design.rotated.new_zeros(self.classes, r + 1)
        for first in range(0, len(path), AT_ONCE):
            run = slice(first, min(first + AT_ONCE, len(path)))
            penalties = torch.tensor([one.penalty for one in path[run]], device=self.design.device, dtype=F64)
            found = self._minimum(penalties, start)  # [K, C, r + 1]
            start = found[-1]
            if advance:
                advance(len(penalties))
            yield run, self.design.back(found[..., :r], found[..., r])

    def _minimum(self, penalties: Tensor, start: Tensor) -> Tensor:
        """[K] and a start [C, r + 1], the bias last → the minima [K, C, r + 1]."""
        curvature = 1 / self.classes if self.one else 0.25
        ones = penalties.new_ones(len(penalties), 1) * self.design.weights.sum()
        eigenvalues = torch.cat([self.design.eigenvalues.expand(len(penalties), -1), ones], dim=1)
        penalty = torch.cat([penalties[:, None].expand(-1, eigenvalues.shape[1] - 1), 0 * ones], dim=1)
        scale = 1 / (curvature * eigenvalues + penalty).sqrt()[:, None]  # [K, 1, r + 1]
        shape = (-1, *start.shape)

        def function(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            own, paid = scale[which], penalty[which][:, None]
            map_ = x.view(shape) * own
            loss, gradient = self._loss(map_)
            loss = loss + 0.5 * (paid * map_.square()).sum((1, 2))
            return loss, ((gradient + paid * map_) * own).flatten(1)

        found = minimise(function, (start / scale).flatten(1))
        return found.view(shape) * scale

    def _loss(self, map_: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [K, C, r + 1] → the weighted sum of losses [K] and its gradient, the shape of the maps."""
        design, (k, c, _) = self.design, map_.shape
        z, targets = design.rotated, design.targets
        logits = torch.matmul(z, map_[..., :-1].flatten(0, 1).T).view(-1, k, c) + map_[..., -1]  # [N, K, C]
        if self.one:
            each = torch.logsumexp(logits, dim=-1) - (logits * targets[:, None]).sum(-1)
            slope = torch.softmax(logits, dim=-1) - targets[:, None]
        else:
            each = (F.softplus(logits) - logits * targets[:, None]).sum(-1)
            slope = torch.sigmoid(logits) - targets[:, None]
        slope = slope * design.weights[:, None, None]
        gradient = (slope.flatten(1).T @ z).view(k, c, -1)
        return design.weights @ each, torch.cat([gradient, slope.sum(0)[..., None]], dim=-1)


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


# --- nearest neighbours ----------------------------------------------------------------------------------------------


class Neighbours(HeadModule):
    """K weighted votes of the nearest training images (arXiv 1805.01978, equation 7): exp(cosine / temperature) each.

    The cosine of two images is the mean over their tokens. All K share one search. A class without any vote has a
    probability of 0, up to rounding; of numbers the weighted mean is taken.
    """

    bank: Tensor
    values: Tensor
    neighbours: Tensor
    temperature: Tensor

    def __init__(self, bank: Tensor, values: Tensor, chosen: Sequence[Neighbourhood], kind: str) -> None:
        """Normalised training tokens [N, T·D], what each votes for [N, C], and the kind of target."""
        super().__init__()
        self.kind = kind
        self.register_buffer("bank", bank[None])
        self.register_buffer("values", values[None])
        self.register_buffer("neighbours", torch.tensor([one.neighbours for one in chosen]))
        self.register_buffer("temperature", torch.tensor([one.temperature for one in chosen]))

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalised tokens [B, T, D] → outputs [K, B, C], whose softmax or sigmoid are the votes."""
        most = min(int(self.neighbours.max()), self.bank.shape[1])
        votes = self.values.shape[2] * most
        parts = tokens.split(max(1, BLOCK // max(votes, 4 * most)))
        p = torch.cat([self._votes(part, most) for part in parts], dim=1)
        if self.kind == "class":
            return (p + torch.finfo(p.dtype).tiny).log()
        return torch.logit(p, eps=1e-7) if self.kind == "labels" else p

    def _votes(self, tokens: Tensor, most: int) -> Tensor:
        cosine, where = self._nearest(tokens.flatten(1) / tokens.shape[1], most)
        values = self.values[0][where]  # [B, most, C]
        found = []
        for count, temperature in zip(self.neighbours.tolist(), self.temperature.tolist(), strict=True):
            weights = torch.softmax(cosine[:, :count] / temperature, dim=1)
            found.append(torch.einsum("bn,bnc->bc", weights, values[:, :count]))
        return torch.stack(found)

    def _nearest(self, queries: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Cosines of the nearest images [B, most], in falling order, and which they are."""
        step = max(most, BLOCK // max(len(queries), self.bank.shape[2]))
        cosine = queries.new_full((len(queries), 0), -math.inf)
        where = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start in range(0, self.bank.shape[1], step):
            block = self.bank[0, start : start + step].to(queries.dtype)
            near = queries @ block.T
            rows = torch.arange(start, start + len(block), device=queries.device).expand(len(queries), -1)
            cosine, rank = torch.cat([cosine, near], dim=1).topk(min(most, cosine.shape[1] + near.shape[1]), dim=1)
            where = torch.cat([where, rows], dim=1).gather(1, rank)
        return cosine, where


def neighbours(
    tokens: Tokens, rows: np.ndarray, chosen: Sequence[Neighbourhood], target: Target, device: str
) -> Neighbours:
    """The probe whose votes are those of images `rows`."""
    device = _device(device)
    bank = tokens.normalised(rows, device).flatten(1)
    values = torch.from_numpy(target.regressand(tokens.labels[rows])).to(device, torch.float32)
    return Neighbours(bank, values, chosen, target.kind)


def _device(device: str) -> str:
    """The device itself, or the processor instead of one without float64."""
    return "cpu" if device == "mps" else device
