"""Fitting of one job: reads its tokens, runs the protocol, and returns its row, arrays and weights."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from mlfusion.errors import BadData, TooLittleMemory
from mlfusion.probing import protocol, saved, splits
from mlfusion.probing.folds import fit_folds
from mlfusion.probing.jobs import Job
from mlfusion.probing.rows import Fitted, TestedGroups, arrays_of, card_of, row_of
from mlfusion.probing.search import FitOptions, Running
from mlfusion.probing.targets import Target, target_of
from mlfusion.probing.training import population
from mlfusion.probing.training.batches import Tokens
from mlfusion.results import ImageCounts, Row
from mlfusion.shapes import Int
from mlfusion.specs.grouping import codes_of
from mlfusion.specs.names import Probe
from mlfusion.specs.options import TrainingOptions
from mlfusion.store import Entry, Groups, TokenReader
from mlfusion.store.features import SplitPair
from mlfusion.store.overlap import compared_pair
from mlfusion.system.devices import pick_device
from mlfusion.system.memory import available
from mlfusion.system.progress import Bar, track

NONE = np.empty(0, np.int64)  # no rows


@dataclass(frozen=True)
class Resources:
    """The device and memory for training; results depend on the device only, by rounding."""

    device: str
    memory: int  # bytes
    streams: bool | None = None  # whether training reads tokens in batches; None: if they take over half of the memory

    @classmethod
    def of(cls, training: TrainingOptions, *, streams: bool | None = None) -> "Resources":
        """The device and memory of the options; the default is most of the free memory."""
        free = int(population.MEMORY_SHARE * available("cpu"))
        return cls(pick_device(training.device), training.memory or free, streams)


@dataclass(frozen=True, eq=False)
class Trained:
    """A new row, with its arrays, its card and its weights."""

    row: Row
    arrays: dict[str, np.ndarray]
    card: saved.Card | None  # None: folds have no single probe
    weights: Mapping[str, np.ndarray]


def train(pair: SplitPair, job: Job, resources: Resources) -> Trained:
    """Train and test the probe of a resolved job.

    Raises:
        MlfusionError: the features cannot be read, or no probe can be trained on them.
    """
    fitted = _fit(pair, job, resources)
    row = row_of(pair, fitted)
    card = card_of(pair, fitted, row) if job.search.folds is None else None
    return Trained(row, arrays_of(fitted), card, fitted.outcome.weights)


def _fit(pair: SplitPair, job: Job, resources: Resources) -> Fitted:
    with ExitStack() as stack:
        validation = None
        if pair.validation is not None:
            validation = _tokens(pair.validation, job.probe, replace(resources, streams=None), stack)
        bar = stack.enter_context(track(f"{job.probe.name} on {pair.dataset}, seed {job.seed}", 1, "steps"))
        fit = _fit_split if job.search.folds is None else _fit_pooled
        return fit(pair, job, resources, stack, validation, bar)


def _fit_split(
    pair: SplitPair, job: Job, resources: Resources, stack: ExitStack, validation: Tokens | None, bar: Bar
) -> Fitted:
    """Train on train and test on test."""
    train = _tokens(pair.train, job.probe, resources, stack, _left_out(pair, job), pair.groups[0])
    streamed = isinstance(train.values, TokenReader)
    target = _target(pair, job, train.labels)
    if job.shots is not None:
        train = train.of(splits.draw(train.labels, job.shots, target=target, seed=job.seed, groups=train.groups))
    outcome = protocol.fit(
        job.probe.head,
        train,
        lambda: _tokens(pair.test, job.probe, replace(resources, streams=None), stack),
        target=target,
        options=_options(job),
        running=_running(resources, bar, train, validation),
        validation=validation,
    )
    labels = pair.test.samples.labels[pair.test.rows()]
    images = ImageCounts(train=len(train), test=len(labels), choosing=outcome.choosing)
    groups = None
    if train.groups is not None and pair.groups[1] is not None:
        groups = TestedGroups(len(np.unique(train.groups)), codes_of(pair.groups[1].names)[pair.test.rows()])
    return Fitted(job, labels, resources.device, target, outcome, images, train.shape[1], streamed, groups)


def _fit_pooled(
    pair: SplitPair, job: Job, resources: Resources, stack: ExitStack, validation: Tokens | None, bar: Bar
) -> Fitted:
    """Train and test by folds of train and test together, in that order, all of whose tokens are in memory."""
    assert job.search.folds is not None
    parts = [stack.enter_context(open_tokens(entry, job.probe)) for entry in (pair.train, pair.test)]
    if (size := sum(part.nbytes for part in parts)) > resources.memory / 2:  # a fold's training images are a copy
        raise TooLittleMemory(
            f"--folds holds the tokens of all images in memory: {size / 1e6:,.0f} MB, of which there is room for "
            f"{resources.memory / 2e6:,.0f}; allowed: a probe that reads fewer tokens, a larger --memory, or no --folds"
        )
    labels = np.concatenate([part.labels for part in parts])
    ids = tuple(name for part in parts for name in part.ids or ())
    tokens = Tokens(torch.cat([part[:] for part in parts]), labels, ids, _pooled_groups(pair))
    target = _target(pair, job, labels)
    target.check_folds(labels, job.search.folds)
    fold_of = splits.folds(
        target.strata(labels), job.search.folds, seed=job.seed, ids=ids, groups=tokens.groups, target=target
    )
    outcome = fit_folds(
        job.probe.head,
        tokens,
        fold_of,
        target=target,
        options=_options(job),
        running=_running(resources, bar, tokens, validation),
        validation=validation,
    )
    fewest = len(tokens) - int(np.bincount(fold_of).max())
    images = ImageCounts(train=fewest, test=len(tokens), choosing=outcome.choosing)
    groups = None
    if tokens.groups is not None:
        per_fold = [len(np.unique(tokens.groups[fold_of != fold])) for fold in range(job.search.folds)]
        groups = TestedGroups(min(per_fold), tokens.groups)
    return Fitted(job, labels, resources.device, target, outcome, images, tokens.shape[1], False, groups)


def _pooled_groups(pair: SplitPair) -> Int[np.ndarray, " N"] | None:
    """The number of the group of each image of train and test: a group of both has one number."""
    of_train, of_test = pair.groups
    if of_train is None or of_test is None:
        return None
    codes = codes_of((*of_train.names, *of_test.names))
    return np.concatenate(
        [codes[: len(of_train.names)][pair.train.rows()], codes[len(of_train.names) :][pair.test.rows()]]
    )


def _left_out(pair: SplitPair, job: Job) -> Int[np.ndarray, " n"]:
    """The rows of train that are copies of test images, if they are to be left out."""
    if not job.search.drop_duplicates:
        return NONE
    names = pair.names[0]  # what is left out must not depend on which tokens happen to be cached
    pair.require(frozenset({compared_pair(pair.train.spec.model)}), names.model_argument, names.dataset_argument)
    without = pair.overlap.train_rows
    if len(without) == len(pair.train.rows()):
        raise BadData(
            f"every image of {pair.dataset}/train is in test too, byte for byte or as a near copy, so that "
            "--drop-duplicates leaves none; leave that option out, or train on other images"
        )
    return without


def _target(pair: SplitPair, job: Job, labels: np.ndarray) -> Target:
    classes = pair.train.spec.data.classes
    return target_of(labels, len(classes), smoothing=job.search.smoothing, names=classes)


def _options(job: Job) -> FitOptions:
    return FitOptions(seed=job.seed, heads=job.probe.attention_heads(), search=job.search)


def _running(resources: Resources, bar: Bar, *held: Tokens | None) -> Running:
    """Device and progress; and on a processor the memory that the tokens `held` in memory leave."""
    free = resources.memory - sum(each.nbytes for each in held if each is not None and not each.is_streamed)
    memory = max(1, free) if resources.device == "cpu" else None
    return Running(training=TrainingOptions(device=resources.device, memory=memory), progress=bar.to)


@contextmanager
def open_tokens(
    entry: Entry, probe: Probe, without: Int[np.ndarray, " n"] = NONE, groups: Groups | None = None
) -> Iterator[Tokens]:
    """The tokens [images, tokens, width] that a probe reads, layer by layer, CLS before AP, streamed from the cache.

    The rows `without` are left out; `groups` are those of all rows of the entry.

    Raises:
        MlfusionError: the entry cannot be read.
    """
    rows, samples = np.setdiff1d(entry.rows(), without), entry.samples
    layers, kinds = probe.representation.layers(entry.spec.model.depth), probe.representation.kinds
    with entry.open(layers, kinds, without=without.tolist()) as reader:
        codes = None if groups is None else codes_of(groups.names)[rows]
        yield Tokens(reader, samples.labels[rows], tuple(samples.ids[row] for row in rows), codes)


def _tokens(
    entry: Entry,
    probe: Probe,
    resources: Resources,
    stack: ExitStack,
    without: Int[np.ndarray, " n"] = NONE,
    groups: Groups | None = None,
) -> Tokens:
    """The tokens that a probe reads, in memory, or streamed during training."""
    tokens = stack.enter_context(open_tokens(entry, probe, without, groups))
    if resources.streams if resources.streams is not None else tokens.nbytes > resources.memory / 2:
        return tokens
    return replace(tokens, values=tokens[:])
