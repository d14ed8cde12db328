"""The study's protocol (arXiv 2601.09322): choose on a part of train, refit on all of it, read the test set once."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlfusion import exact, population
from mlfusion.batches import LARGEST_BATCH, Schedule, Tokens, stream
from mlfusion.errors import BadData
from mlfusion.losses import Loss
from mlfusion.options import SearchOptions, TrainingOptions
from mlfusion.population import Configuration, Numerics, Population, TrainingData
from mlfusion.probes import HEADS, HeadModule, HeadShape
from mlfusion.specs import Head
from mlfusion.targets import Target, kind_of

VALIDATION = 0.2  # share of train that is held out for the choice
HALVING_FACTOR = 3  # of successive halving: one configuration in three goes on, for three times as many steps
RUNGS = 3


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The configurations to choose from, and how long each is trained."""

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    dropouts: tuple[float, ...]  # of the attention weights, for heads that have dropout
    epochs: int
    least_steps: int

    def configurations(self, head: Head) -> tuple[Configuration, ...]:
        """All configurations, always in the same order: of two with equal scores and losses, the first is chosen."""
        dropouts = self.dropouts if HEADS[head].has_dropout else (0.0,)
        return tuple(Configuration(*point) for point in product(self.learning_rates, self.weight_decays, dropouts))

    def schedule(self, images: int) -> Schedule:
        """Steps and batches for a number of images."""
        return Schedule.of(images, epochs=self.epochs, least_steps=self.least_steps)


SEARCH_GRIDS = {
    "paper": Grid(
        learning_rates=(1e-1, 1e-2, 1e-3),
        weight_decays=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0),
        dropouts=(0.0, 0.1, 0.3),
        epochs=40,
        least_steps=1000,
    ),
    "quick": Grid(
        learning_rates=(1e-1, 1e-2, 1e-3),
        weight_decays=(1e-2,),
        dropouts=(0.1,),
        epochs=12,
        least_steps=300,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One probe of one seed, chosen, refitted and tested."""

    seed: int
    metric: str  # what val, test and train are, as fractions; see `targets`
    val: float  # of the chosen configuration on images of train that it did not see
    test: float
    train: float  # of the refitted probe on what it was fitted to
    metrics: dict[str, Any]  # of the test set, see `metrics`
    selected: dict[str, float | int]
    configurations: int
    parameters: int
    shape: HeadShape
    seconds: float
    predictions: np.ndarray  # [N_test, C] float32: probabilities, or the number
    attention: np.ndarray | None  # [N_test, T] float32, mean over heads; None for a head that does not attend
    weights: dict[str, np.ndarray]  # parameters and statistics of the refitted probe


DEFAULTS = TrainingOptions()


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What decides the numbers of one fit, beside its head, tokens and labels."""

    seed: int  # split, order, jitter, initialisation and dropout follow from it
    heads: int | None = None  # attention heads; None is one per token, as in ALF
    search: SearchOptions


def fit(
    head: Head,
    train: Tokens,
    test: Callable[[], Tokens],
    *,
    target: Target,
    options: FitOptions,
    training: TrainingOptions = DEFAULTS,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Choose a configuration on a stratified fifth of train, refit it on all of train, test it once.

    Args:
        head: the probe.
        train: tokens and labels of the training split.
        test: gives those of the test split; called once, after the choice is made and the probe refitted.
        target: the kind of the labels.
        options: seed, attention heads and how to search.
        training: device and memory.
        progress: called after each step with the steps done and all there are, counted per configuration.

    Raises:
        BadData: tokens or labels that no probe can be trained on, or a test split that does not match.
    """
    begun = time.perf_counter()
    _check(train, target, "train")
    target.check_choice(train.labels)
    search: Search = (
        SOLVERS[head](train, target, options, training, progress)
        if head in SOLVERS
        else Training(head, train, target, options, training, progress)
    )
    score, loss = search.scores()
    best = choose(score, loss)
    probe = search.refit(best)
    on_train = target.predictions(_outputs(probe, train, search.everything, search.block, search.device)[0])
    unseen = _unseen(test, train, target)
    predictions, attention = predict(probe, unseen, target, block=search.block, device=search.device)
    found = target.scores(unseen.labels, predictions)
    return Outcome(
        seed=options.seed,
        metric=target.metric,
        val=float(score[best]),
        test=found[target.metric],
        train=target.score(train.labels, on_train.cpu().numpy()),
        metrics=found,
        selected=search.selected(best),
        configurations=len(score),
        parameters=sum(p.numel() for p in probe.parameters()),
        shape=search.shape,
        seconds=time.perf_counter() - begun,
        predictions=predictions,
        attention=attention,
        weights={name: value[0].detach().cpu().numpy().copy() for name, value in probe.state_dict().items()},
    )


def _unseen(test: Callable[[], Tokens], train: Tokens, target: Target) -> Tokens:
    """The test split, if it matches train."""
    unseen = test()
    _check(unseen, target, "test")
    if unseen.shape[1:] != train.shape[1:]:
        raise BadData(
            f"test has tokens of shape {unseen.shape[1:]} and train {train.shape[1:]}; "
            "allowed: the same tokens and width, so extract both splits with the same model, layers and tokens"
        )
    return unseen


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
        self.path = exact.penalties(options.search.grid)
        self.steps = len(self.path)
        self.ridge = exact.Ridge(exact.Design(train, self.everything, target, self.device))

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
        self.path = exact.penalties(options.search.grid)
        self.steps = len(self.path)
        self.logistic = exact.Logistic(exact.Design(train, self.fitted, target, self.device))

    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        score, loss = np.empty(len(self.path)), np.empty(len(self.path))
        measure = self.target.loss(self.train.labels[self.fitted], self.device, torch.float32)
        for group, probe in self.logistic.solve(self.path):
            outputs = _outputs(probe, self.train, self.held_out, self.block, self.device)
            score[group], loss[group] = self.measure(outputs, self.held_out, measure)
            self.advance(group.stop - group.start)
        return score, loss

    def refit(self, best: int) -> HeadModule:
        logistic = exact.Logistic(exact.Design(self.train, self.everything, self.target, self.device))
        [*_, (_, probe)] = logistic.solve([*self.path[: best : exact.AT_ONCE], self.path[best]])
        return probe.last()

    def selected(self, best: int) -> dict[str, float | int]:
        return asdict(self.path[best])


class NeighbourSearch(Search):
    """Numbers of neighbours and temperatures, all from one search of the neighbours."""

    def __init__(self, train: Tokens, target: Target, options: FitOptions, *others: Any) -> None:
        """Arguments as in `Search`."""
        super().__init__(train, target, options, *others)
        self.grid = exact.neighbourhoods(options.search.grid)
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

    def _of(self, rows: np.ndarray, chosen: Sequence[exact.Neighbourhood]) -> HeadModule:
        return exact.neighbours(self.train, rows, chosen, self.target, self.device)


SOLVERS: dict[Head, Callable[..., Search]] = {
    "ridge": RidgeSearch,
    "logistic": LogisticSearch,
    "knn": NeighbourSearch,
}
"""Heads that are solved for, rather than trained."""


def rungs(configurations: int, steps: int, *, halving: bool) -> list[tuple[int, int]]:
    """(configurations, steps) of every stage of successive halving; one stage with all of both without halving.

    63 configurations for 1,000 steps give (63, 112), (21, 334), (7, 1000): a third of the work.
    """
    if not halving:
        return [(configurations, steps)]
    parts = [HALVING_FACTOR**power for power in range(RUNGS)]
    return [(-(-configurations // part), -(-steps * part // parts[-1])) for part in parts]


def split(labels: np.ndarray, *, seed: int, part: float = VALIDATION) -> tuple[np.ndarray, np.ndarray]:
    """Stratified split of the images into (fitted, held out), both ascending.

    The share `part` of every class is held out, rounded, but at least one image and never all: scikit-learn's splitters
    refuse data with fewer images to hold out than classes, which is the few-shot case.

    Args:
        labels: [N]; at least two images of each class that occurs.
        seed: names the split.
        part: fraction to hold out.
    """
    random = np.random.default_rng(stream("split", seed))
    held_out = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(1, round(part * len(rows))), len(rows) - 1)
        held_out.append(random.permutation(rows)[:count])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def draw(labels: np.ndarray, shots: int, *, classes: int, seed: int) -> np.ndarray:
    """Rows of `shots` images of each class, ascending, drawn by the seed; more shots contain fewer shots of the same seed.

    Args:
        labels: classes [N].
        shots: images of each class.
        classes: C.
        seed: names the draw.

    Raises:
        BadData: labels that are no classes, or a class with fewer images.
    """
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise BadData("few-shot training needs one class an image; leave --shots out for other labels")
    counts = np.bincount(labels, minlength=classes)
    if counts.min() < shots:
        scarce = int(counts.argmin())
        raise BadData(
            f"class {scarce} has {counts[scarce]} training image{'' if counts[scarce] == 1 else 's'}; allowed: as many as "
            f"--shots {shots} asks for, or more. Ask for at most {counts.min()}"
        )
    random = np.random.default_rng(stream("shots", seed))
    return np.sort(np.concatenate([random.permutation(np.flatnonzero(labels == c))[:shots] for c in range(classes)]))


def choose(accuracy: np.ndarray, loss: np.ndarray) -> int:
    """Index of the best configuration: highest accuracy [K], then lowest loss [K], then the first.

    Raises:
        BadData: every configuration diverged.
    """
    sound = np.isfinite(loss)
    if not sound.any():
        raise BadData(
            "every configuration of the grid diverged; allowed: tokens on which at least one trains. "
            "Extract them again, with --dtype float32, and look at the images if that does not help"
        )
    return int(np.lexsort((np.where(sound, loss, np.inf), -np.where(sound, accuracy, -np.inf)))[0])


def _outputs(probe: HeadModule, tokens: Tokens, rows: np.ndarray, block: int, device: str) -> Tensor:
    """[K, rows, C]."""
    return torch.cat(
        [outputs for outputs, _ in population.read(probe, tokens, rows, block=block, device=device)], dim=1
    )


def predict(
    probe: HeadModule, tokens: Tokens, target: Target, *, block: int = LARGEST_BATCH, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray | None]:
    """Predictions [N, C] of a population of one, and its attention [N, T] if it has any."""
    predictions, attention = [], []
    for outputs, batch in population.read(probe, tokens, np.arange(len(tokens)), block=block, device=device):
        predictions.append(target.predictions(outputs[0]).cpu().numpy())
        if probe.has_attention:
            with torch.no_grad():
                attention.append(probe.attention(batch)[0].mean(1).cpu().numpy())
    return np.concatenate(predictions), np.concatenate(attention) if attention else None


def _check(tokens: Tokens, target: Target, name: str) -> None:
    """Refuse tokens and labels that do not belong together, or are not finite."""
    shape, labels, ids = tokens.shape, tokens.labels, tokens.ids
    if len(shape) != 3 or len(labels) != shape[0] or 0 in shape:
        raise BadData(
            f"{name} has tokens of shape {shape} and labels of shape {labels.shape}; "
            "allowed: [N, T, D] and a label for each of the N, none of them 0"
        )
    if ids is not None and len(ids) != shape[0]:
        raise BadData(
            f"{name} has tokens of {shape[0]} images and ids of {len(ids)}; allowed: features of the same images in the "
            "same order, so read them from one entry of the cache"
        )
    if (kind := kind_of(labels)) is not type(target):
        raise BadData(
            f"{name} has labels of the kind {kind.kind!r} where {target.kind!r} is asked for; allowed: train and test with "
            "labels of one kind. Extract both splits of one data set"
        )
    target.check(labels, name)
    if tokens.is_streamed:  # the cache refuses at writing what is not finite
        return
    block = max(1, 2**24 // (shape[1] * shape[2]))
    for start in range(0, shape[0], block):
        part = tokens[start : start + block]
        finite = torch.isfinite(part).flatten(1).all(1)
        if not finite.all():
            row = start + int(finite.tolist().index(False))
            raise BadData(
                f"{name} row {row}{f' ({ids[row]})' if ids else ''} has a token that is NaN or infinite; allowed: finite "
                "numbers. Extract that image again, with --dtype float32 if the model's activations overflow float16"
            )
