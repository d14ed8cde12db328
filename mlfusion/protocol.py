"""The study's protocol (arXiv 2601.09322): choose on a part of train, refit on all of it, read the test set once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlfusion import metrics, population
from mlfusion.errors import BadData, UnknownName
from mlfusion.population import Configuration, Schedule, Tokens
from mlfusion.probes import PROBES, Probe, Shape
from mlfusion.specs import Head

VALIDATION = 0.2  # part of train that the choice is made on


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The configurations to choose from, and how long each is trained."""

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    dropouts: tuple[float, ...]  # of the attention, so for attentive probes only
    epochs: int
    least_steps: int

    def configurations(self, head: Head) -> tuple[Configuration, ...]:
        """All of them, always in the same order: of two that do equally well in everything, the first is chosen."""
        dropouts = self.dropouts if PROBES[head].drops else (0.0,)
        return tuple(Configuration(*point) for point in product(self.learning_rates, self.weight_decays, dropouts))

    def schedule(self, images: int) -> Schedule:
        """Steps and batches for so many images."""
        return Schedule.of(images, epochs=self.epochs, least_steps=self.least_steps)


GRIDS = {
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
    """One probe of one seed, chosen, refitted and tested; scores are fractions."""

    seed: int
    val: float  # balanced accuracy of the chosen configuration on the part of train that it did not see
    test: float  # balanced accuracy
    train: float  # balanced accuracy of the refitted probe on what it was fitted to
    metrics: dict[str, Any]  # of the test set, see `metrics.scores`
    selected: dict[str, float | int]
    configurations: int
    parameters: int
    seconds: float
    probabilities: np.ndarray  # [N_test, C] float32
    attention: np.ndarray | None  # [N_test, T] float32, mean over heads; None for a head that does not attend
    weights: dict[str, np.ndarray]  # parameters and running statistics of the refitted probe


def fit(
    head: Head,
    train: Tokens,
    test: Callable[[], Tokens],
    *,
    classes: int,
    heads: int | None,
    grid: str,
    seed: int,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Choose a configuration on a stratified fifth of train, refit it on all of train, test it once.

    Args:
        head: the probe.
        train: tokens and labels of the training split.
        test: gives those of the test split; called once, after the choice is made and the probe refitted.
        classes: C.
        heads: attention heads; None is one for each token, as in ALF.
        grid: name in `GRIDS`.
        seed: split, order, jitter, initialisation and dropout follow from it.
        device: where to train.
        progress: called after each step with the steps done and all there are, counted per configuration.

    Raises:
        BadData: tokens or labels that no probe can be trained on, or a test split that does not match.
        UnknownName: no such grid.
    """
    begun = time.perf_counter()
    if grid not in GRIDS:
        raise UnknownName("grid", grid, GRIDS)
    _check(train, classes, "train")
    _check_classes(train.labels, classes)
    _, t, d = train.values.shape
    heads = (t if heads is None else heads) if PROBES[head].attends else 1
    if not 1 <= heads <= d:
        raise BadData(
            f"{heads} attention heads do not fit tokens of width {d}; allowed: 1 to {d}. "
            f"Pass heads={min(8, d)}, or take fewer tokens where there is a head for each"
        )
    shape = Shape(tokens=t, width=d, classes=classes, heads=heads)
    configurations = GRIDS[grid].configurations(head)
    fitted, held_out = split(train.labels, seed=seed)
    choosing, refitting = GRIDS[grid].schedule(len(fitted)), GRIDS[grid].schedule(len(train))
    all_steps = choosing.steps * len(configurations) + refitting.steps
    done = 0

    def advance(members: int) -> None:
        nonlocal done
        done += members
        if progress:
            progress(done, all_steps)

    truth = train.labels[held_out]
    weights = torch.from_numpy(population.class_weights(train.labels[fitted], classes)).to(device, torch.float32)
    accuracy, loss = np.empty(len(configurations)), np.empty(len(configurations))
    for group, probe in population.train(
        head, train, fitted, configurations, shape, choosing, seed=seed, device=device, progress=advance
    ):
        logits = _logits(probe, train, held_out, choosing.batch_size, device)
        accuracy[group] = [metrics.balanced_accuracy(truth, predicted) for predicted in logits.argmax(-1).cpu().numpy()]
        loss[group] = population.losses(logits, torch.from_numpy(truth).to(device, torch.int64), weights).cpu().numpy()
    best = choose(accuracy, loss)
    chosen = configurations[best]

    everything = np.arange(len(train))
    [(_, probe)] = population.train(
        head, train, everything, [chosen], shape, refitting, seed=seed, device=device, progress=advance
    )
    on_train = _logits(probe, train, everything, refitting.batch_size, device)[0].argmax(-1).cpu().numpy()

    unseen = test()
    _check(unseen, classes, "test")
    if unseen.values.shape[1:] != train.values.shape[1:]:
        raise BadData(
            f"test has tokens of shape {tuple(unseen.values.shape[1:])} and train {tuple(train.values.shape[1:])}; "
            "allowed: the same tokens and width, so extract both splits with the same model, layers and tokens"
        )
    probabilities, attention = _predict(probe, unseen, refitting.batch_size, device)
    found = metrics.scores(unseen.labels, probabilities)
    selected: dict[str, float | int] = {"lr": chosen.lr, "weight_decay": chosen.weight_decay}
    if probe.drops:
        selected["dropout"] = chosen.dropout
    if probe.attends:
        selected["heads"] = heads
    return Outcome(
        seed=seed,
        val=float(accuracy[best]),
        test=found["balanced_accuracy"],
        train=metrics.balanced_accuracy(train.labels, on_train),
        metrics=found,
        selected=selected | {"steps": refitting.steps, "batch_size": refitting.batch_size},
        configurations=len(configurations),
        parameters=sum(p.numel() for p in probe.parameters()),
        seconds=time.perf_counter() - begun,
        probabilities=probabilities,
        attention=attention,
        weights={name: value[0].detach().cpu().numpy().copy() for name, value in probe.state_dict().items()},
    )


def split(labels: np.ndarray, *, seed: int, part: float = VALIDATION) -> tuple[np.ndarray, np.ndarray]:
    """Stratified split of the images into (fitted, held out), both ascending.

    Of every class `part` is held out, rounded, but at least one image and never all: scikit-learn's splitters refuse
    data with fewer images to hold out than classes, which is the few-shot case.

    Args:
        labels: [N]; at least two images of each class that occurs.
        seed: names the split.
        part: fraction to hold out.
    """
    random = np.random.default_rng(population.stream("split", seed))
    held_out = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(1, round(part * len(rows))), len(rows) - 1)
        held_out.append(random.permutation(rows)[:count])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


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


def _logits(probe: Probe, tokens: Tokens, rows: np.ndarray, block: int, device: str) -> Tensor:
    """[K, rows, C]."""
    return torch.cat([logits for logits, _ in population.read(probe, tokens, rows, block=block, device=device)], dim=1)


def _predict(probe: Probe, tokens: Tokens, block: int, device: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Of a population of one: probabilities [N, C], and the attention [N, T] if it has any."""
    probabilities, attention = [], []
    for logits, batch in population.read(probe, tokens, np.arange(len(tokens)), block=block, device=device):
        probabilities.append(torch.softmax(logits[0], dim=-1).cpu().numpy())
        if probe.attends:
            with torch.no_grad():
                attention.append(probe.attention(batch)[0].mean(1).cpu().numpy())
    return np.concatenate(probabilities), np.concatenate(attention) if attention else None


def _check(tokens: Tokens, classes: int, name: str) -> None:
    """Refuse tokens and labels that do not belong together, or are not finite."""
    shape, labels = tuple(tokens.values.shape), tokens.labels
    if len(shape) != 3 or len(labels) != shape[0] or 0 in shape:
        raise BadData(
            f"{name} has tokens of shape {shape} and labels of shape {labels.shape}; "
            "allowed: [N, T, D] and [N], none of them 0"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise BadData(
            f"{name} row {wrong[0]} has label {labels[wrong[0]]}; allowed: 0 to {classes - 1}. "
            "Extract the split again, or pass the number of classes that the labels have"
        )
    block = max(1, 2**24 // (shape[1] * shape[2]))
    for start in range(0, shape[0], block):
        part = tokens.values[start : start + block]
        finite = (torch if isinstance(part, Tensor) else np).isfinite(part).reshape(len(part), -1).all(1)
        if not finite.all():
            row = start + int(finite.tolist().index(False))
            raise BadData(
                f"{name} row {row} has a token that is NaN or infinite; allowed: finite numbers. "
                "Extract that image again, with --dtype float32 if the model's activations overflow float16"
            )


def _check_classes(labels: np.ndarray, classes: int) -> None:
    """Refuse a training split from which no part can be held out."""
    if classes < 2:
        raise BadData(f"{classes} class in train; allowed: 2 or more, so choose a data set with at least two classes")
    counts = np.bincount(labels, minlength=classes)
    if counts.min() < 2:
        scarce = int(counts.argmin())
        raise BadData(
            f"class {scarce} has {counts[scarce]} training image{'' if counts[scarce] == 1 else 's'}; "
            "allowed: 2 or more, one to fit and one to choose on. Add images of that class or leave it out"
        )
