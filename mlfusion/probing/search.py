"""The search for each kind of head: configurations are trained or solved, scored on images that choose, and refitted."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlfusion.errors import BadData
from mlfusion.probing.grids import SEARCH_GRIDS, rungs
from mlfusion.probing.heads import HEADS, HeadModule, HeadShape
from mlfusion.probing.losses import Loss
from mlfusion.probing.solvers.design import Design, penalties
from mlfusion.probing.solvers.logistic import Logistic
from mlfusion.probing.solvers.neighbours import Neighbourhood, neighbourhoods, neighbours
from mlfusion.probing.solvers.ridge import Ridge
from mlfusion.probing.splits import split
from mlfusion.probing.targets import Target
from mlfusion.probing.training import population
from mlfusion.probing.training.batches import LARGEST_BATCH, Tokens
from mlfusion.probing.training.population import Configuration, Population, TrainingData
from mlfusion.probing.training.precision import Numerics
from mlfusion.shapes import Float, Int
from mlfusion.specs.names import Head, Stability
from mlfusion.specs.options import SearchOptions, TrainingOptions

Scores = tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]

NEAR = 8  # configurations near the best whose stability may be tried
CHANGED = 0.1  # a prediction that moves by more than this is another answer
UNSTABLE = 0.02  # share of images with another answer above which a configuration is unstable


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The options of one fit that its result depends on."""

    seed: int  # split, order, jitter, initialisation and dropout follow from it
    heads: int | None = None  # attention heads; None is one per token, as in ALF
    search: SearchOptions


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a fit runs, which changes its result by rounding at most."""

    training: TrainingOptions = TrainingOptions()  # device and memory
    progress: Callable[[int, int], None] | None = None  # called with the steps done and their total


class Search(ABC):
    """A search over the configurations of a head: it scores all of them, and refits the chosen one."""

    block: int = LARGEST_BATCH  # images in one forward pass of the probe
    candidates: Sequence[Any]  # what is searched, as dataclasses

    def __init__(
        self,
        head: Head,
        train: Tokens,
        target: Target,
        options: FitOptions,
        running: Running = Running(),
        validation: Tokens | None = None,
    ) -> None:
        """Set the images that are fitted and those that choose: `validation`, or without it a part of train."""
        self.head, self.train, self.target, self.options = head, train, target, options
        self.device, self.memory = running.training.device, running.training.memory
        self.everything = np.arange(len(train))
        self.choosing_tokens = train if validation is None else validation
        if validation is None:
            strata = target.strata(train.labels)
            self.fitted, self.held_out = split(strata, seed=options.seed, groups=train.groups, target=target)
        else:
            self.fitted, self.held_out = self.everything, np.arange(len(validation))
        _, t, d = train.shape
        self.shape = HeadShape(tokens=t, width=d, classes=target.outputs)
        self.progress, self.done, self.steps = running.progress, 0, 0

    def advance(self, steps: int = 1) -> None:
        """Report a number of the `self.steps` as done."""
        self.done += steps
        if self.progress:
            self.progress(self.done, self.steps)

    @abstractmethod
    def scores(self) -> Scores:
        """Score and loss of every configuration on images that it was not fitted to; -inf and inf if it diverged."""

    def settle(self, best: int, score: Float[np.ndarray, " K"]) -> tuple[int, Stability | None]:
        """The configuration to take where `best` has the best score, and its stability; None if there is nothing to try."""
        return best, None

    @abstractmethod
    def refit(self, best: int) -> HeadModule:
        """The configuration fitted to all of train."""

    @abstractmethod
    def selected(self, best: int) -> dict[str, float | int]:
        """The hyper-parameters of the configuration, for a row."""

    def outputs(self, probe: HeadModule, block: int) -> Float[Tensor, "K n C"]:
        """Outputs of a probe for the images that choose, `block` at a time."""
        return self._outputs_for(probe, self.choosing_tokens, self.held_out, block)

    def on_train(self, probe: HeadModule) -> Float[Tensor, "N C"]:
        """Outputs of a refitted probe for the images of train, from which its score on train follows."""
        return self._outputs_for(probe, self.train, self.everything, self.block)[0]

    def _outputs_for(
        self, probe: HeadModule, tokens: Tokens, rows: Int[np.ndarray, " n"], block: int
    ) -> Float[Tensor, "K n C"]:
        batches = population.read(probe, tokens, rows, block=block, device=self.device)
        return torch.cat([outputs for outputs, _ in batches], dim=1)

    def measure(self, outputs: Float[Tensor, "K n C"], loss: Loss) -> Scores:
        """Scores and losses of outputs for the images that choose."""
        truth = self.choosing_tokens.labels[self.held_out]
        finite = torch.isfinite(outputs).flatten(1).all(1).tolist()
        losses = loss(outputs, torch.from_numpy(truth).to(outputs.device)).double().cpu().numpy()
        predicted = self.target.predictions(outputs).numpy()
        scores = [self.target.score(truth, p) if good else -np.inf for p, good in zip(predicted, finite, strict=True)]
        return np.array(scores), np.where(finite, losses, np.inf)


class Training(Search):
    """Configurations that are trained in lockstep.

    With `halving`, all are trained for a ninth of the steps, the best third of them for a third, and the best third of those
    to the end (successive halving, arXiv 1502.07943). Each stage starts again, with the schedule of the whole training: a
    configuration that reaches the end has the same score as without halving.

    Training may be chaotic, at a high learning rate above all: it then amplifies rounding until other answers come out. So
    the best configuration is trained once more as a twin, whose initial weights differ in their last places (`settle`).
    """

    def __init__(self, *arguments: Any) -> None:
        """Arguments are those of `Search`.

        Raises:
            BadData: the number of attention heads does not fit the tokens.
        """
        super().__init__(*arguments)
        head, options, t, d = self.head, self.options, self.shape.tokens, self.shape.width
        heads = (t if options.heads is None else options.heads) if HEADS[head].has_attention else 1
        if not 1 <= heads <= d:
            raise BadData(
                f"{heads} attention heads do not fit tokens of width {d}; allowed: 1 to {d}. "
                f"Pass heads={min(8, d)}, or take fewer tokens where there is a head for each"
            )
        self.numerics = Numerics.of(self.device, options.search.precision)
        self.shape = replace(self.shape, heads=heads)
        grid = SEARCH_GRIDS[options.search.grid]
        self.candidates = grid.configurations(head)
        self.configurations = [replace(one, place=k) for k, one in enumerate(self.candidates)]
        self.choosing, self.refitting = grid.schedule(len(self.fitted)), grid.schedule(len(self.train))
        self.width = population.width_of(head, self.shape, self.choosing.batch_size, len(self.candidates))
        self.block = self.refitting.batch_size
        self.rungs = rungs(len(self.configurations), self.choosing.steps, halving=options.search.halving)
        self.steps = sum(members * until for members, until in self.rungs) + self.refitting.steps
        if not HEADS[head].is_convex:
            self.steps += self.choosing.steps  # of the twin
        self._outputs: dict[int, Tensor] = {}  # [n, C] of the best so far, for the images that choose

    def scores(self) -> Scores:
        """Scores as in `Search`; -inf and inf for a configuration that halving stopped."""
        score, loss = np.empty(0), np.empty(0)
        running = np.arange(len(self.configurations))
        for members, until in self.rungs:
            if members < len(running):
                running = np.sort(running[np.lexsort((loss[running], -score[running]))[:members]])
            score, loss = (np.full(len(self.configurations), value) for value in (-np.inf, np.inf))
            self._outputs = {}
            configurations = [self.configurations[k] for k in running]
            for ks, outputs, scores, losses in self._measured(configurations, until, self.width):
                score[running[ks]], loss[running[ks]] = scores, losses
                self._outputs |= dict(zip(running[ks].tolist(), outputs, strict=True))
                ranks = np.lexsort((loss, -score))[:NEAR].tolist()
                self._outputs = {k: self._outputs[k] for k in ranks if k in self._outputs}
        return score, loss

    def settle(self, best: int, score: Float[np.ndarray, " K"]) -> tuple[int, Stability | None]:
        """The configuration to take instead of an unstable best one: a stable one within its noise.

        A configuration is unstable if its twin gives other answers for more than a share `UNSTABLE` of the n images that
        choose. Its noise is max(|s − s'|, √(p / n)), s and s' being both scores and p that share: p·n answers that are right or
        wrong by chance have a mean with a standard deviation of √(p·n) / n at most.
        """
        if HEADS[self.head].is_convex:
            return best, None
        [(share, other)] = self._twins([best])
        if share <= UNSTABLE:
            return best, "stable"
        noise = max(abs(score[best] - other), np.sqrt(share / len(self.held_out)))
        near = [k for k in self._outputs if k != best and score[k] >= score[best] - noise]
        self.steps += len(near) * self.choosing.steps
        stable = (k for k, (share, _) in zip(near, self._twins(near), strict=True) if share <= UNSTABLE)
        taken = next(stable, None)
        return (best, "unstable") if taken is None else (taken, "instead of an unstable one")

    def _twins(self, members: Sequence[int]) -> list[tuple[float, float]]:
        """The share of answers that the twin of each changes, and its score."""
        found: list[tuple[float, float]] = []
        twins = [replace(self.configurations[k], twin=True) for k in members]
        for ks, outputs, scores, _ in self._measured(twins, None, 1) if twins else ():
            pairs = zip(members[ks], outputs, scores.tolist(), strict=True)
            found += [(changed(self.target, self._outputs[k], other), score) for k, other, score in pairs]
        return found

    def _measured(
        self, configurations: Sequence[Configuration], until: int | None, width: int
    ) -> Iterator[tuple[slice, Float[Tensor, "k n C"], Float[np.ndarray, " k"], Float[np.ndarray, " k"]]]:
        """Configurations trained on the fitted part: outputs, scores and losses for the images that choose."""
        loss = self.target.loss(self.train.labels[self.fitted], self.device, torch.float32)
        data = TrainingData(self.train, self.fitted, self.choosing, until)
        for part, probe in self._train(configurations, data, loss, width):
            outputs = self.outputs(probe, self.choosing.batch_size)
            yield part, outputs, *self.measure(outputs, loss)

    def refit(self, best: int) -> HeadModule:
        loss_function = self.target.loss(self.train.labels, self.device, torch.float32)
        data = TrainingData(self.train, self.everything, self.refitting)
        [(_, probe)] = self._train([self.configurations[best]], data, loss_function, 1)
        return probe

    def selected(self, best: int) -> dict[str, float | int]:
        configuration = self.configurations[best]
        selected: dict[str, float | int] = {"lr": configuration.lr, "weight_decay": configuration.weight_decay}
        if HEADS[self.head].has_dropout:
            selected["dropout"] = configuration.dropout
        if HEADS[self.head].has_attention:
            selected["heads"] = self.shape.heads
        return selected | {"steps": self.refitting.steps, "batch_size": self.refitting.batch_size}

    def _train(
        self, configurations: Sequence[Configuration], data: TrainingData, loss: Loss, width: int
    ) -> Iterator[tuple[slice, HeadModule]]:
        members = Population(self.head, self.shape, configurations, self.options.seed, width)
        return population.train(members, data, self.numerics, memory=self.memory, progress=self.advance, loss=loss)


def changed(target: Target, one: Float[Tensor, "n C"], other: Float[Tensor, "n C"]) -> float:
    """The share of images of which a probability, or the standardised number, differs by more than `CHANGED`."""
    a, b = (outputs if target.kind == "number" else target.predictions(outputs) for outputs in (one, other))
    same = (a - b).abs() <= CHANGED  # not where one is NaN
    return float((~same.all(1)).double().mean())


class SolvedSearch(Search):
    """Search over the settings of a head that is solved for."""

    @staticmethod
    def grid(name: str) -> Sequence[Any]:
        """The settings of a grid, as dataclasses."""
        return penalties(name)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.candidates = self.settings = self.grid(self.options.search.grid)
        self.steps = len(self.settings)

    @abstractmethod
    def solve(self) -> Iterator[Float[Tensor, "k n C"]]:
        """Outputs of the probes of all settings, in order, for the n images that choose."""

    def scores(self) -> Scores:
        measured = []
        for outputs in self.solve():
            loss = self.target.loss(self.train.labels[self.fitted], str(outputs.device), outputs.dtype)
            measured.append(self.measure(outputs, loss))
            self.advance(len(outputs))
        scores, losses = zip(*measured, strict=True)
        return np.concatenate(scores), np.concatenate(losses)

    def selected(self, best: int) -> dict[str, float | int]:
        return asdict(self.settings[best])


class RidgeSearch(SolvedSearch):
    """Penalties of ridge regression, chosen by leave-one-out scores on all of train, which need no further fit.

    Where images have groups, others of its group would tell a left-out image's label: the held-out groups choose instead, and
    the factor of the scores is theirs. A validation split chooses in the same way, among fits to all of train.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.leaves_one_out = self.choosing_tokens is self.train and self.train.groups is None
        if self.leaves_one_out:
            self.fitted = self.held_out = self.everything
        self.ridge = self._ridge(self.fitted)
        self.factors: list[float] = []

    def solve(self) -> Iterator[Float[Tensor, "1 n C"]]:
        if self.leaves_one_out:
            yield from (self.ridge.left_out(penalty)[None] for penalty in self.settings)
            return
        for penalty in self.settings:
            outputs = self.outputs(self.ridge.solve(penalty, factor=1.0), self.block)
            self.factors.append(self.ridge.factor(outputs[0], self.choosing_tokens.labels[self.held_out]))
            yield self.factors[-1] * outputs

    def refit(self, best: int) -> HeadModule:
        if self.leaves_one_out:
            return self.ridge.solve(self.settings[best])
        ridge = self.ridge if self.fitted is self.everything else self._ridge(self.everything)
        return ridge.solve(self.settings[best], factor=self.factors[best])

    def _ridge(self, rows: Int[np.ndarray, " N"]) -> Ridge:
        return Ridge(Design(self.train, rows, self.target, self.device))


class LogisticSearch(SolvedSearch):
    """Penalties of logistic regression, solved along one path."""

    def solve(self) -> Iterator[Float[Tensor, "k n C"]]:
        logistic = self._logistic(self.fitted)
        return (self.outputs(probe, self.block) for _, probe in logistic.solve(self.settings))

    def refit(self, best: int) -> HeadModule:
        logistic = self._logistic(self.everything)
        [*_, (_, probe)] = logistic.solve([*self.settings[: best : logistic.batch], self.settings[best]])
        return probe.last()

    def _logistic(self, rows: Int[np.ndarray, " N"]) -> Logistic:
        return Logistic(Design(self.train, rows, self.target, self.device), self.memory)


class NeighbourSearch(SolvedSearch):
    """Numbers of neighbours and temperatures, all from one search for the nearest images."""

    grid = staticmethod(neighbourhoods)

    def solve(self) -> Iterator[Float[Tensor, "K n C"]]:
        yield self.outputs(self._neighbours(self.fitted, self.settings), self.block)

    def refit(self, best: int) -> HeadModule:
        return self._neighbours(self.everything, [self.settings[best]])

    def on_train(self, probe: HeadModule) -> Float[Tensor, "N C"]:
        """Outputs by the votes of the images of other groups: an image's own would make every training image right."""
        blocks = np.split(self.everything, range(self.block, len(self.everything), self.block))
        tokens = (self.train.normalised(rows, self.device) for rows in blocks)
        groups = torch.from_numpy(self.everything if self.train.groups is None else self.train.groups)
        with torch.no_grad():
            return torch.cat(
                [
                    probe(x, (groups[torch.from_numpy(rows)].to(x.device), groups.to(x.device)))[0]
                    for x, rows in zip(tokens, blocks, strict=True)
                ]
            )

    def _neighbours(self, rows: Int[np.ndarray, " N"], settings: Sequence[Neighbourhood]) -> HeadModule:
        return neighbours(self.train, rows, settings, self.target, self.device)


SOLVERS: dict[Head, Callable[..., Search]] = {"ridge": RidgeSearch, "logistic": LogisticSearch, "knn": NeighbourSearch}
"""Heads that are solved for, rather than trained."""
