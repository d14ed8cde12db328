"""How each kind of head is searched: configurations trained or solved, scored on the validation part, and fitted again."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlfusion.errors import BadData
from mlfusion.probing.grids import SEARCH_GRIDS, rungs
from mlfusion.probing.heads import HEADS, HeadModule, HeadShape
from mlfusion.probing.losses import Loss
from mlfusion.probing.solvers import neighbours, ridge
from mlfusion.probing.solvers.design import Design, penalties
from mlfusion.probing.solvers.logistic import AT_ONCE, Logistic
from mlfusion.probing.splits import split
from mlfusion.probing.targets import Target
from mlfusion.probing.training import population
from mlfusion.probing.training.batches import LARGEST_BATCH, Tokens
from mlfusion.probing.training.population import Configuration, Population, TrainingData
from mlfusion.probing.training.precision import Numerics
from mlfusion.specs.names import Head
from mlfusion.specs.options import SearchOptions, TrainingOptions

DEFAULTS = TrainingOptions()


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What decides the numbers of one fit, beside its head, tokens and labels."""

    seed: int  # split, order, jitter, initialisation and dropout follow from it
    heads: int | None = None  # attention heads; None is one per token, as in ALF
    search: SearchOptions


class Search(ABC):
    """A search over the configurations of a head: it scores all of them, and refits the chosen one."""

    block: int = LARGEST_BATCH  # images in one forward pass of the probe

    def __init__(
        self,
        train: Tokens,
        target: Target,
        options: FitOptions,
        training: TrainingOptions,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Hold out a part of train."""
        self.train, self.target, self.device = train, target, training.device
        self.fitted, self.held_out = split(target.strata(train.labels), seed=options.seed)
        self.everything = np.arange(len(train))
        _, t, d = train.shape
        self.shape = HeadShape(tokens=t, width=d, classes=target.outputs)
        self.progress, self.done, self.steps = progress, 0, 0

    def advance(self, steps: int = 1) -> None:
        """Report a number of the `self.steps` as done."""
        self.done += steps
        if self.progress:
            self.progress(self.done, self.steps)

    @abstractmethod
    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Score and loss of every configuration [K] on images it was not fitted to; -inf and inf of one that diverged."""

    @abstractmethod
    def refit(self, best: int) -> HeadModule:
        """That configuration, fitted to all of train."""

    @abstractmethod
    def selected(self, best: int) -> dict[str, float | int]:
        """The hyper-parameters of that configuration, for a row."""

    def measure(self, outputs: Tensor, rows: np.ndarray, loss: Loss) -> tuple[np.ndarray, np.ndarray]:
        """Scores [K] and losses [K] of outputs [K, n, C] for images `rows` [n]."""
        truth = self.train.labels[rows]
        sound = torch.isfinite(outputs).flatten(1).all(1)
        losses = loss(outputs, torch.from_numpy(truth).to(outputs.device)).double().cpu().numpy()
        predicted = self.target.predictions(outputs).cpu().numpy()
        scores = [self.target.score(truth, p) if good else -np.inf for p, good in zip(predicted, sound, strict=True)]
        return np.array(scores), np.where(sound.cpu().numpy(), losses, np.inf)


class Training(Search):
    """Configurations that are trained in lockstep.

    With `halving`, all are trained for a ninth of the steps, the best third of them for a third, and the best third of those
    to the end (successive halving, arXiv 1502.07943). Each stage starts again, in the schedule of the whole training: a
    configuration that gets to the end has the score that it would have had without halving.
    """

    def __init__(
        self,
        head: Head,
        train: Tokens,
        target: Target,
        options: FitOptions,
        training: TrainingOptions = DEFAULTS,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Arguments as in `fit`.

        Raises:
            BadData: heads that do not fit the tokens.
        """
        super().__init__(train, target, options, training, progress)
        _, t, d = train.shape
        heads = (t if options.heads is None else options.heads) if HEADS[head].has_attention else 1
        if not 1 <= heads <= d:
            raise BadData(
                f"{heads} attention heads do not fit tokens of width {d}; allowed: 1 to {d}. "
                f"Pass heads={min(8, d)}, or take fewer tokens where there is a head for each"
            )
        self.head, self.seed, self.memory = head, options.seed, training.memory
        self.numerics = Numerics.of(training.device, options.search.precision)
        self.shape = HeadShape(tokens=t, width=d, classes=target.outputs, heads=heads)
        grid = SEARCH_GRIDS[options.search.grid]
        self.configurations = grid.configurations(head)
        self.choosing, self.refitting = grid.schedule(len(self.fitted)), grid.schedule(len(train))
        self.block = self.refitting.batch_size
        self.rungs = rungs(len(self.configurations), self.choosing.steps, halving=options.search.halving)
        self.steps = sum(members * until for members, until in self.rungs) + self.refitting.steps

    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """As in `Search`; -inf and inf of a configuration that halving stopped."""
        score, loss = np.empty(0), np.empty(0)
        alive = np.arange(len(self.configurations))
        measure = self.target.loss(self.train.labels[self.fitted], self.device, torch.float32)
        for members, until in self.rungs:
            if members < len(alive):
                alive = np.sort(alive[np.lexsort((loss[alive], -score[alive]))[:members]])
            score, loss = (np.full(len(self.configurations), value) for value in (-np.inf, np.inf))
            chosen = [self.configurations[k] for k in alive]
            data = TrainingData(self.train, self.fitted, self.choosing, until)
            for group, probe in self._train(chosen, data, measure):
                outputs = _outputs(probe, self.train, self.held_out, self.choosing.batch_size, self.device)
                score[alive[group]], loss[alive[group]] = self.measure(outputs, self.held_out, measure)
        return score, loss

    def refit(self, best: int) -> HeadModule:
        measure = self.target.loss(self.train.labels, self.device, torch.float32)
        data = TrainingData(self.train, self.everything, self.refitting)
        [(_, probe)] = self._train([self.configurations[best]], data, measure)
        return probe

    def selected(self, best: int) -> dict[str, float | int]:
        chosen = self.configurations[best]
        selected: dict[str, float | int] = {"lr": chosen.lr, "weight_decay": chosen.weight_decay}
        if HEADS[self.head].has_dropout:
            selected["dropout"] = chosen.dropout
        if HEADS[self.head].has_attention:
            selected["heads"] = self.shape.heads
        return selected | {"steps": self.refitting.steps, "batch_size": self.refitting.batch_size}

    def _train(
        self, chosen: Sequence[Configuration], data: TrainingData, loss: Loss
    ) -> Iterator[tuple[slice, HeadModule]]:
        return population.train(
            Population(self.head, self.shape, chosen, self.seed),
            data,
            self.numerics,
            memory=self.memory,
            progress=self.advance,
            loss=loss,
        )


class RidgeSearch(Search):
    """Penalties of ridge regression, chosen by leave-one-out scores on all of train, which need no further fit."""

    def __init__(self, train: Tokens, target: Target, options: FitOptions, *others: Any) -> None:
        """Arguments as in `Search`."""
        super().__init__(train, target, options, *others)
        self.path = penalties(options.search.grid)
        self.steps = len(self.path)
        self.ridge = ridge.Ridge(Design(train, self.everything, target, self.device))

    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        score, loss = np.empty(len(self.path)), np.empty(len(self.path))
        for k, penalty in enumerate(self.path):
            outputs = self.ridge.left_out(penalty)[None]
            measure = self.target.loss(self.train.labels, str(outputs.device), outputs.dtype)
            score[k : k + 1], loss[k : k + 1] = self.measure(outputs, self.everything, measure)
            self.advance()
        return score, loss

    def refit(self, best: int) -> HeadModule:
        return self.ridge.solve(self.path[best])

    def selected(self, best: int) -> dict[str, float | int]:
        return asdict(self.path[best])


class LogisticSearch(Search):
    """Penalties of logistic regression, along one path."""

    def __init__(self, train: Tokens, target: Target, options: FitOptions, *others: Any) -> None:
        """Arguments as in `Search`.

        Raises:
            BadData: the labels are numbers.
        """
        super().__init__(train, target, options, *others)
        self.path = penalties(options.search.grid)
        self.steps = len(self.path)
        self.logistic = Logistic(Design(train, self.fitted, target, self.device))

    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        score, loss = np.empty(len(self.path)), np.empty(len(self.path))
        measure = self.target.loss(self.train.labels[self.fitted], self.device, torch.float32)
        for group, probe in self.logistic.solve(self.path):
            outputs = _outputs(probe, self.train, self.held_out, self.block, self.device)
            score[group], loss[group] = self.measure(outputs, self.held_out, measure)
            self.advance(group.stop - group.start)
        return score, loss

    def refit(self, best: int) -> HeadModule:
        logistic = Logistic(Design(self.train, self.everything, self.target, self.device))
        [*_, (_, probe)] = logistic.solve([*self.path[:best:AT_ONCE], self.path[best]])
        return probe.last()

    def selected(self, best: int) -> dict[str, float | int]:
        return asdict(self.path[best])


class NeighbourSearch(Search):
    """Numbers of neighbours and temperatures, all from one search of the neighbours."""

    def __init__(self, train: Tokens, target: Target, options: FitOptions, *others: Any) -> None:
        """Arguments as in `Search`."""
        super().__init__(train, target, options, *others)
        self.grid = neighbours.neighbourhoods(options.search.grid)
        self.steps = 1

    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        measure = self.target.loss(self.train.labels[self.fitted], self.device, torch.float32)
        outputs = _outputs(self._of(self.fitted, self.grid), self.train, self.held_out, self.block, self.device)
        return self.measure(outputs, self.held_out, measure)

    def refit(self, best: int) -> HeadModule:
        self.advance()
        return self._of(self.everything, [self.grid[best]])

    def selected(self, best: int) -> dict[str, float | int]:
        return asdict(self.grid[best])

    def _of(self, rows: np.ndarray, chosen: Sequence[neighbours.Neighbourhood]) -> HeadModule:
        return neighbours.neighbours(self.train, rows, chosen, self.target, self.device)


SOLVERS: dict[Head, Callable[..., Search]] = {
    "ridge": RidgeSearch,
    "logistic": LogisticSearch,
    "knn": NeighbourSearch,
}
"""Heads that are solved for, rather than trained."""


def _outputs(probe: HeadModule, tokens: Tokens, rows: np.ndarray, block: int, device: str) -> Tensor:
    """[K, rows, C]."""
    return torch.cat(
        [outputs for outputs, _ in population.read(probe, tokens, rows, block=block, device=device)], dim=1
    )
