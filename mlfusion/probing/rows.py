"""The row, the card and the arrays of a fitted job."""

from dataclasses import dataclass

import numpy as np

from mlfusion.probing import protocol, saved
from mlfusion.probing.jobs import PROTOCOL, Job, identity
from mlfusion.probing.targets import Number, Target
from mlfusion.results import (
    Attention,
    Duplicates,
    GroupCounts,
    ImageCounts,
    Row,
    Selected,
    Sources,
    metrics_of,
    provenance,
)
from mlfusion.specs.grouping import codes_of
from mlfusion.specs.identity import digest
from mlfusion.specs.names import Probe
from mlfusion.store import Entry
from mlfusion.store.encoding import ENCODINGS
from mlfusion.store.features import SplitPair


@dataclass(frozen=True, eq=False)
class Fitted:
    """The outcome of the protocol for a job."""

    job: Job  # resolved
    device: str
    target: Target
    outcome: protocol.Outcome
    images: ImageCounts
    tokens: int  # T, tokens per image
    streamed: bool
    groups: int | None  # number of groups of the training images; None: every image is its own group


def row_of(pair: SplitPair, fitted: Fitted) -> Row:
    """The row of a job fitted on a pair of splits."""
    job, outcome, spec = fitted.job, fitted.outcome, pair.train.spec
    names, probe, depth = pair.names[0], job.probe, spec.model.depth
    search = job.search
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
        features=pair.keys,
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
        sources=Sources(
            model=names.model_argument or names.model_source,
            dataset=names.dataset_argument or names.dataset_source,
            weights=spec.model.weights,
            train=spec.data.content,
            test=pair.test.spec.data.content,
            options=tuple(pair.words()),
        ),
        shots=job.shots,
        halving=search.halving,
        smoothing=search.smoothing or None,
        streamed=fitted.streamed,
        stability=outcome.stability,
        duplicates=Duplicates(bytes=pair.overlap.bytes, near=pair.overlap.near),
        drop_duplicates=search.drop_duplicates,
        groups=_group_counts(pair, fitted),
    )


def _group_counts(pair: SplitPair, fitted: Fitted) -> GroupCounts | None:
    codes = _test_groups(pair)
    if fitted.groups is None or codes is None:
        return None
    return GroupCounts(
        column=pair.names[0].grouped_by, train=fitted.groups, test=len(np.unique(codes)), digests=pair.group_digests
    )


def _test_groups(pair: SplitPair) -> np.ndarray | None:
    """The number of each readable test image's group [N]."""
    groups = pair.groups[1]
    return None if groups is None else codes_of(groups.names)[pair.test.rows()]


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
    )


def arrays_of(pair: SplitPair, fitted: Fitted) -> dict[str, np.ndarray]:
    """The arrays of the test images as they were scored: predictions, labels, groups, the origin of numbers; and attention."""
    outcome, target = fitted.outcome, fitted.target
    arrays = {
        "probabilities": outcome.predictions,
        "labels": target.scored(pair.test.samples.labels[pair.test.rows()]),
    }
    if (groups := _test_groups(pair)) is not None:
        arrays["groups"] = groups
    if isinstance(target, Number):
        arrays["origin"] = np.array(target.origin)
    if outcome.attention is not None:
        arrays["attention"] = outcome.attention.astype(np.float16)
    return arrays


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
