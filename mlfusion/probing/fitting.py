"""Fitting of one job: reads its tokens, runs the protocol, and returns its row, arrays and weights."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np

from mlfusion.errors import BadData
from mlfusion.probing import protocol, saved, splits
from mlfusion.probing.jobs import Job
from mlfusion.probing.rows import Fitted, arrays_of, card_of, row_of
from mlfusion.probing.search import FitOptions
from mlfusion.probing.targets import target_of
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
from mlfusion.system.progress import track

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
    card: saved.Card
    weights: Mapping[str, np.ndarray]


def train(pair: SplitPair, job: Job, resources: Resources) -> Trained:
    """Train and test the probe of a resolved job.

    Raises:
        MlfusionError: the features cannot be read, or no probe can be trained on them.
    """
    fitted = _fit(pair, job, resources)
    row = row_of(pair, fitted)
    return Trained(row, arrays_of(pair, fitted), card_of(pair, fitted, row), fitted.outcome.weights)


def _fit(pair: SplitPair, job: Job, resources: Resources) -> Fitted:
    with ExitStack() as stack:
        without = NONE
        if job.search.drop_duplicates:  # what is left out must not depend on which tokens happen to be cached
            names = pair.names[0]
            pair.require(
                frozenset({compared_pair(pair.train.spec.model)}), names.model_argument, names.dataset_argument
            )
            without = pair.overlap.train_rows
            if len(without) == len(pair.train.rows()):
                raise BadData(
                    f"every image of {pair.dataset}/train is in test too, byte for byte or as a near copy, so that "
                    "--drop-duplicates leaves none; leave that option out, or train on other images"
                )
        train = _tokens(pair.train, job.probe, resources, stack, without, pair.groups[0])
        streamed = isinstance(train.values, TokenReader)
        classes = pair.train.spec.data.classes
        target = target_of(train.labels, len(classes), smoothing=job.search.smoothing, names=classes)
        if job.shots is not None:
            rows = splits.draw(train.labels, job.shots, target=target, seed=job.seed, groups=train.groups)
            train = train.of(rows)
        free = resources.memory - (0 if streamed else train.nbytes)
        with track(f"{job.probe.name} on {pair.dataset}, seed {job.seed}", 1, "steps") as bar:
            outcome = protocol.fit(
                job.probe.head,
                train,
                lambda: _tokens(pair.test, job.probe, replace(resources, streams=None), stack),
                target=target,
                options=FitOptions(seed=job.seed, heads=job.probe.attention_heads(), search=job.search),
                training=TrainingOptions(
                    device=resources.device, memory=max(1, free) if resources.device == "cpu" else None
                ),
                progress=bar.to,
            )
        images = ImageCounts(train=len(train), test=len(pair.test.rows()))
        groups = None if train.groups is None else len(np.unique(train.groups))
        return Fitted(job, resources.device, target, outcome, images, train.shape[1], streamed, groups)


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
