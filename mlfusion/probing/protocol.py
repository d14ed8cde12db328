"""The study's protocol (arXiv 2601.09322): choose on images that are not fitted, refit on all of train, read test once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlfusion.errors import BadData
from mlfusion.probing.grids import at_end
from mlfusion.probing.heads import HeadModule, HeadShape
from mlfusion.probing.search import SOLVERS, FitOptions, Running, Training
from mlfusion.probing.targets import Target, kind_of
from mlfusion.probing.training import population
from mlfusion.probing.training.batches import LARGEST_BATCH, Tokens
from mlfusion.shapes import Float, Int, Num
from mlfusion.specs.names import Head, Stability
from mlfusion.system.threads import in_order


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One probe of one seed, chosen, refitted and tested."""

    seed: int
    metric: str  # metric of val, test and train, which are fractions; see `targets`
    val: float  # score of the chosen configuration on the images that choose
    choosing: int  # number of images that choose
    test: float
    train: float  # score of the refitted probe on its training images; of neighbours, by the votes of the others
    metrics: dict[str, Any]  # scores on the test set, see `statistics.measures`
    selected: dict[str, float | int]
    at_end: dict[str, str]  # those selected at an end of the grid, see `grids.at_end`
    stability: Stability | None  # of the choice; None: not tried
    configurations: int
    parameters: int
    shape: HeadShape
    seconds: float
    predictions: Float[
        np.ndarray, "N C"
    ]  # for the test images: probabilities, float32; or numbers from `Number.origin`, float64
    attention: Float[np.ndarray, "N T"] | None  # mean over heads, float32; None for a head that does not attend
    weights: dict[str, np.ndarray]  # parameters and statistics of the refitted probe; empty over folds
    folds: "tuple[Outcome, ...]" = ()  # those that this one pools
    fold_of: Int[np.ndarray, " N"] | None = None  # the fold that tested each image


@in_order()
def fit(
    head: Head,
    train: Tokens,
    test: Callable[[], Tokens],
    *,
    target: Target,
    options: FitOptions,
    running: Running = Running(),
    validation: Tokens | None = None,
) -> Outcome:
    """Choose a configuration on `validation` or on a stratified fifth of train, refit it on all of train, test it once.

    Args:
        head: the probe.
        train: tokens and labels of the training split.
        test: returns those of the test split; called once, after the choice is made and the probe refitted.
        target: the kind of the labels.
        options: seed, attention heads and how to search.
        running: device and memory; and what is called after each step, with the steps done and their total, counted per
            configuration.
        validation: images that choose, while the configurations are fitted to all of train; None: a fifth of train is
            held out.

    Raises:
        BadData: no probe can be trained on the tokens or labels, or another split does not match train.
    """
    start = time.perf_counter()
    _check(train, target, "train")
    target.check_choice(train.labels, least=2 if validation is None else 1)
    if validation is not None:
        _check_like_train(validation, train, target, "validation")
    search = SOLVERS.get(head, Training)(head, train, target, options, running, validation)
    score, loss = search.scores()
    best, stability = search.settle(choose(score, loss), score)
    probe = search.refit(best)
    on_train = target.predictions(search.on_train(probe)).numpy()
    test_tokens = test()
    _check_like_train(test_tokens, train, target, "test")
    predictions, attention = predict(probe, test_tokens, target, block=search.block, device=search.device)
    metrics = target.scores(test_tokens.labels, predictions)
    return Outcome(
        seed=options.seed,
        metric=target.metric,
        val=float(score[best]),
        choosing=len(search.held_out),
        test=metrics[target.metric],
        train=target.score(train.labels, on_train),
        metrics=metrics,
        selected=search.selected(best),
        at_end=at_end(search.candidates, best),
        stability=stability,
        configurations=len(score),
        parameters=sum(p.numel() for p in probe.parameters()),
        shape=search.shape,
        seconds=time.perf_counter() - start,
        predictions=predictions,
        attention=attention,
        weights={name: value[0].detach().cpu().numpy().copy() for name, value in probe.state_dict().items()},
    )


def _check_like_train(tokens: Tokens, train: Tokens, target: Target, name: str) -> None:
    """Raise `BadData` for tokens of another split that do not match those of train."""
    _check(tokens, target, name)
    if tokens.shape[1:] != train.shape[1:]:
        raise BadData(
            f"{name} has tokens of shape {tokens.shape[1:]} and train {train.shape[1:]}; "
            "allowed: the same tokens and width, so extract both splits with the same model, layers and tokens"
        )


def choose(score: Num[np.ndarray, " K"], loss: Num[np.ndarray, " K"]) -> int:
    """Index of the best configuration: highest score, then lowest loss, then the first.

    Raises:
        BadData: every configuration diverged.
    """
    finite = np.isfinite(loss)
    if not finite.any():
        raise BadData(
            "every configuration of the grid diverged; allowed: tokens on which at least one trains. "
            "Extract them again, with --dtype float32, and look at the images if that does not help"
        )
    return int(np.lexsort((np.where(finite, loss, np.inf), -np.where(finite, score, -np.inf)))[0])


def predict(
    probe: HeadModule, tokens: Tokens, target: Target, *, block: int = LARGEST_BATCH, device: str = "cpu"
) -> tuple[Float[np.ndarray, "N C"], Float[np.ndarray, "N T"] | None]:
    """Predictions of a population of one, and its attention, the mean over heads, if it has any."""
    predictions, attention = [], []
    for outputs, batch in population.read(probe, tokens, np.arange(len(tokens)), block=block, device=device):
        with torch.no_grad(), in_order():
            predictions.append(target.predictions(outputs[0]).numpy())
            if probe.has_attention:
                attention.append(probe.attention(batch)[0].mean(1).cpu().numpy())
    return np.concatenate(predictions), np.concatenate(attention) if attention else None


def _check(tokens: Tokens, target: Target, name: str) -> None:
    """Raise `BadData` for tokens and labels that do not match, or are not finite."""
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
    if tokens.is_streamed:  # the cache does not store numbers that are not finite
        return
    block = max(1, 2**24 // (shape[1] * shape[2]))
    for start in range(0, shape[0], block):
        finite = torch.isfinite(tokens[start : start + block]).flatten(1).all(1)
        if not finite.all():
            row = start + finite.tolist().index(False)
            raise BadData(
                f"{name} row {row}{f' ({ids[row]})' if ids else ''} has a token that is NaN or infinite; allowed: finite "
                "numbers. Extract that image again, with --dtype float32 if the model's activations overflow float16"
            )
