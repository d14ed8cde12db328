"""The row, the card and the arrays of a fitted job."""

from dataclasses import dataclass

import numpy as np

from mlfusion.probing import protocol, saved
from mlfusion.probing.jobs import PROTOCOL, Job, identity
from mlfusion.probing.targets import Number, Target
from mlfusion.results import (
    Attention,
    Duplicates,
    Fold,
    GroupCounts,
    ImageCounts,
    Row,
    Selected,
    Sources,
    metrics_of,
    provenance,
)
from mlfusion.specs.identity import digest
from mlfusion.specs.names import Probe
from mlfusion.store import Entry
from mlfusion.store.encoding import ENCODINGS
from mlfusion.store.features import SplitPair


@dataclass(frozen=True, eq=False)
class TestedGroups:
    """The groups of the images of a fit."""

    train: int  # number of groups of the training images; over folds the smallest
    tested: np.ndarray  # the number of each tested image's group [N]


@dataclass(frozen=True, eq=False)
class Fitted:
    """The outcome of the protocol for a job."""

    job: Job  # resolved
    labels: np.ndarray  # of the images that were tested
    device: str
    target: Target
    outcome: protocol.Outcome
    images: ImageCounts
    tokens: int  # T, tokens per image
    streamed: bool
    groups: TestedGroups | None  # None: every image is its own group


def row_of(pair: SplitPair, fitted: Fitted) -> Row:
    """The row of a job fitted on a pair of splits."""
    job, outcome, spec = fitted.job, fitted.outcome, pair.train.spec
    probe, depth, search = job.probe, spec.model.depth, job.search
    precision = search.precision
    assert precision != "auto"  # a resolved job
    return Row(
        id=job.row_id(identity(pair.keys, pair.group_digests)),
        model=pair.model,
        dataset=pair.dataset,
        probe=probe.name,
        seed=job.seed,
        metric=outcome.metric,
        val=outcome.val,
        test=outcome.test,
        train=outcome.train,
        metrics=metrics_of(fitted.target.kind, outcome.metrics),
        selected=Selected.of(outcome.selected),
        at_end=outcome.at_end,
        grid=search.grid,
        configurations=outcome.configurations,
        parameters=outcome.parameters,
        seconds=round(outcome.seconds, 3),
        layers=tuple(probe.representation.layers(depth)),
        tokens=probe.representation.kinds,
        depth=depth,
        width=spec.model.width,
        classes=spec.data.classes,
        images=fitted.images,
        features=(pair.train.key, pair.test.key),
        validation=pair.validation.key if pair.validation else None,
        folds=search.folds,
        by_fold=tuple(map(_fold, outcome.folds)),
        choose_on=search.choose_on if pair.validation is None else "validation",
        attention=_attention(probe, pair.train, outcome.attention),
        versions=provenance.versions(),
        code=provenance.code(),
        created=provenance.now(),
        protocol=PROTOCOL,
        device=fitted.device,
        precision=precision,
        bytes=(fitted.images.train + fitted.images.test)
        * fitted.tokens
        * ENCODINGS[spec.dtype].vector_bytes(spec.model.width),
        sources=_sources(pair),
        shots=job.shots,
        halving=search.halving,
        smoothing=search.smoothing or None,
        streamed=fitted.streamed,
        stability=outcome.stability,
        duplicates=Duplicates(bytes=pair.overlap.bytes, near=pair.overlap.near),
        drop_duplicates=search.drop_duplicates,
        groups=_group_counts(pair, fitted),
    )


def _sources(pair: SplitPair) -> Sources:
    names, validation = pair.names[0], pair.validation
    return Sources(
        model=names.model_argument or names.model_source,
        dataset=names.dataset_argument or names.dataset_source,
        weights=pair.train.spec.model.weights,
        train=pair.train.spec.data.content,
        test=pair.test.spec.data.content,
        validation=validation.spec.data.content if validation else None,
        options=tuple(pair.words()),
    )


def _group_counts(pair: SplitPair, fitted: Fitted) -> GroupCounts | None:
    if fitted.groups is None:
        return None
    return GroupCounts(
        column=pair.names[0].grouped_by,
        train=fitted.groups.train,
        test=len(np.unique(fitted.groups.tested)),
        digests=pair.group_digests,
    )


def card_of(pair: SplitPair, fitted: Fitted, row: Row) -> saved.Card:
    """The card that is saved with the weights of a row's probe."""
    spec, names = pair.train.spec, pair.names[0]
    return saved.Card(
        probe=row.probe,
        head=fitted.job.probe.head,
        shape=fitted.outcome.shape,
        target_fields=saved.describe(fitted.target),
        classes=row.classes,
        backbone=saved.Backbone(
            name=names.model,
            source=names.model_source,
            weights=spec.model.weights,
            config=spec.model.config,
            preprocess=digest(spec.model.preprocess),
            hook=spec.model.hook,
            compute=spec.model.compute,
            preparation=spec.model.preprocess,
        ),
        layers=row.layers,
        kinds=fitted.job.probe.representation.kinds,
        dtype=spec.dtype,
        features=row.features,
        dataset=row.dataset,
        seed=row.seed,
        selected=row.selected,
        metric=row.metric,
        scores={"val": row.val, "test": row.test, "train": row.train},
        versions=row.versions,
        code=row.code,
        created=row.created,
        chosen_on=row.chosen_on(),
    )


def arrays_of(fitted: Fitted) -> dict[str, np.ndarray]:
    """The arrays of the tested images as they were scored: predictions, labels, groups, folds, origin of numbers, attention."""
    outcome, target = fitted.outcome, fitted.target
    arrays = {
        "probabilities": outcome.predictions,
        "labels": target.scored(fitted.labels),
    }
    if fitted.groups is not None:
        arrays["groups"] = fitted.groups.tested
    if outcome.fold_of is not None:
        arrays["folds"] = outcome.fold_of
    if isinstance(target, Number):
        arrays["origin"] = np.array(target.origin)
    if outcome.attention is not None:
        arrays["attention"] = outcome.attention.astype(np.float16)
    return arrays


def _fold(outcome: protocol.Outcome) -> Fold:
    return Fold(
        images=len(outcome.predictions),
        val=outcome.val,
        test=outcome.test,
        train=outcome.train,
        selected=Selected.of(outcome.selected),
    )


def _attention(probe: Probe, entry: Entry, attention: np.ndarray | None) -> Attention | None:
    """Mean and spread over the test images of the attention on each token, [images, tokens]."""
    if attention is None:
        return None
    layers, kinds = probe.representation.layers(entry.spec.model.depth), probe.representation.kinds
    sources = entry.sources()
    tokens = [(layer, kind) for layer in layers for kind in kinds for _ in range(sources[layer, kind].stream.tokens)]
    return Attention(
        layers=tuple(layer for layer, _ in tokens),
        kinds=tuple(kind for _, kind in tokens),
        mean=tuple(attention.mean(0, dtype=np.float64).tolist()),
        sd=tuple(attention.std(0, dtype=np.float64).tolist()),
    )
