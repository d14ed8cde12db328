"""Tests every image once, by a probe that was not trained on it: the protocol of one fit, repeated over folds."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from mlfusion.probing import protocol
from mlfusion.probing.protocol import Outcome
from mlfusion.probing.search import FitOptions, Running
from mlfusion.probing.targets import Target
from mlfusion.probing.training.batches import Tokens
from mlfusion.shapes import Int
from mlfusion.specs.names import Head, Stability

LEAST_STABLE: tuple[Stability | None, ...] = ("unstable", "instead of an unstable one", "stable", None)


def fit_folds(
    head: Head,
    tokens: Tokens,
    fold_of: Int[np.ndarray, " N"],
    *,
    target: Target,
    options: FitOptions,
    running: Running = Running(),
    validation: Tokens | None = None,
) -> Outcome:
    """Fit a probe for each fold on the images of the others, and pool the predictions for the images of the folds.

    Test scores are those of the pooled predictions; `val` and `train` are means over folds; of the hyper-parameters those that
    most folds chose are given, and the stability of the least stable choice. Arguments and errors are those of `fit`.

    Args:
        tokens: tokens and labels of all images.
        fold_of: the fold that tests each image, from 0; every fold has an image.
    """
    count = int(fold_of.max()) + 1
    for fold in range(count):  # before any probe is trained
        target.check(tokens.labels[fold_of == fold], f"fold {fold + 1} of {count}")
    outcomes: list[Outcome] = []
    for fold in range(count):
        fitted, tested = (np.flatnonzero(chosen) for chosen in (fold_of != fold, fold_of == fold))
        outcomes.append(
            protocol.fit(
                head,
                tokens.of(fitted),
                partial(tokens.of, tested),
                target=target.fitted_to(tokens.labels[fitted]),
                options=options,
                running=replace(running, progress=_share(running, fold, count)),
                validation=validation,
            )
        )
    return _pooled(outcomes, tokens, fold_of, target)


def _share(running: Running, fold: int, count: int) -> Callable[[int, int], None] | None:
    """The progress of one of the fits, as a part of that of all."""
    report = running.progress
    return report and (lambda done, steps: report(fold * steps + done, count * steps))


def _pooled(outcomes: list[Outcome], tokens: Tokens, fold_of: Int[np.ndarray, " N"], target: Target) -> Outcome:
    """One outcome for all images, in their order."""
    order = np.argsort(fold_of, kind="stable")  # the images of the first fold, of the second, …

    def placed(parts: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(parts)
        values = np.empty_like(joined)
        values[order] = joined
        return values

    predictions = placed([one.predictions for one in outcomes])
    attentions = [one.attention for one in outcomes if one.attention is not None]
    metrics = target.scores(tokens.labels, predictions)
    chosen = Counter(tuple(one.selected.items()) for one in outcomes).most_common(1)[0][0]
    first = next(one for one in outcomes if tuple(one.selected.items()) == chosen)
    return replace(
        first,
        val=float(np.mean([one.val for one in outcomes])),
        choosing=min(one.choosing for one in outcomes),
        test=metrics[target.metric],
        train=float(np.mean([one.train for one in outcomes])),
        metrics=metrics,
        stability=min((one.stability for one in outcomes), key=LEAST_STABLE.index),
        seconds=sum(one.seconds for one in outcomes),
        predictions=predictions,
        attention=placed(attentions) if attentions else None,
        weights={},
        folds=tuple(outcomes),
        fold_of=fold_of,
    )
