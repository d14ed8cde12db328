"""Stage 2: cached tokens → probes → rows. Opens no image and no model; a row that is there already is not made again."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mlfusion import population, protocol, trained
from mlfusion.batches import Tokens
from mlfusion.devices import pick_device
from mlfusion.errors import BadData, NotCached, UnknownName
from mlfusion.features import SplitPair, extract_command, impossible, require, split_pairs
from mlfusion.memory import available
from mlfusion.options import Precision, SearchOptions, TrainingOptions
from mlfusion.progress import track as bar_of
from mlfusion.results import Attention, ImageCounts, Results, Row, Selected, Sources, metrics_of, provenance
from mlfusion.results.rows import RowPrecision
from mlfusion.specs import Probe, digest, parse_probes, spelt_out
from mlfusion.store import CachePath, Entry, FeatureStore, TokenReader
from mlfusion.store.encoding import ENCODINGS
from mlfusion.targets import Target, target_of
from mlfusion.trackers import Tracker, open_trackers

log = logging.getLogger(__name__)

PROBES = "probes"  # folder of the results that trained probes are kept in

PROTOCOL = 3
"""Part of every row's id: raised when a change of code changes scores, so that old rows are made again."""


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a call of `probe` came to."""

    rows: list[Row]
    trained: int  # rows that were not there before
    left_out: list[str]  # probes of 'all' whose tokens are not cached, with what to run


def probe(
    dataset: str,
    *,
    model: str | None = None,
    probes: str | Sequence[str] = "all",
    grid: str = "paper",
    seeds: Sequence[int] = (0, 1, 2),
    shots: Sequence[int | None] = (None,),
    halving: bool = False,
    smoothing: float = 0.0,
    save: bool = False,
    cache: CachePath = None,
    results: str | os.PathLike[str] = "results",
    device: str = "cpu",
    memory: int | None = None,
    precision: Precision = "auto",
    track: str | Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> ProbeResult:
    """Train and test probes on cached features, each by the study's protocol.

    Args:
        dataset: as given to `extract`.
        model: likewise; None is every model whose features of the data set are cached.
        probes: names as in `mlfusion ls probes`, or 'all': those of the study's ten that the cache can serve.
        grid: 'paper' (21 configurations, 63 for attentive probes) or 'quick'.
        seeds: each gives a row; split, initialisation, order, jitter and dropout follow from it.
        shots: train on so many images of each class, drawn by the seed; None is all of them.
        halving: stop configurations without hope early, see `protocol.Training`.
        smoothing: of the labels.
        save: keep every trained probe in RESULTS/probes/ID, for `mlfusion.predict`.
        cache: its root, or layers of them; default $MLFUSION_CACHE, or ./cache.
        results: the folder that rows are kept in.
        device: where to train.
        memory: bytes that a probe's training may take, by default most of what is free. Tokens that take more than half of
            it are not loaded but read in shuffled batches as training goes on.
        precision: of the matrix products of training: 'float32', 'bfloat16', or 'auto', bfloat16 where it is faster here. With
            'auto' a row of either precision that is there already is not made again; otherwise only one of that precision.
        track: where new rows are shown as they are saved, such as 'tensorboard:runs'; see `trackers`.
        say: told what is reused and what is left out, a line each.

    Raises:
        NotCached: says which `mlfusion extract` to run.
        MlfusionError: any other of its kinds.
    """
    if grid not in protocol.SEARCH_GRIDS:
        raise UnknownName("grid", grid, protocol.SEARCH_GRIDS)
    if not 0 <= smoothing < 1:
        raise BadData(f"--smoothing {smoothing:g}; allowed: from 0 to below 1, such as 0.1")
    store, kept, trackers = FeatureStore(cache), Results(Path(results)), open_trackers(track)
    rows: list[Row] = []
    made, left_out = 0, []
    for pair in split_pairs(store, dataset, model):
        word = model or pair.train.names()[0].model_source
        chosen, lacking = _servable(pair, probes, word, dataset)
        left_out += lacking
        for line in lacking:
            say(line)
        say(
            f"{pair.model} on {pair.dataset}: features reused from the cache ({pair.train.key}, {pair.test.key}), no "
            "forward pass"
        )
        if pair.older:
            say(f"{pair.older} other sets of features go by these names; those extracted last are used")
        jobs = jobs_of(chosen, seeds, grid, shots=shots, halving=halving, smoothing=smoothing, precision=precision)
        held, new = run(pair, jobs, kept, save=save, device=device, memory=memory, trackers=trackers, say=say)
        rows, made = rows + held, made + new
    return ProbeResult(rows, made, left_out)


def run(
    pair: SplitPair,
    jobs: Sequence["Job"],
    results: Results,
    *,
    save: bool = False,
    device: str = "cpu",
    memory: int | None = None,
    trackers: Sequence[Tracker] = (),
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[Row], int]:
    """Return one row per job, training those that are not stored; and the number trained.

    Arguments and errors as in `probe`.
    """
    device = pick_device(device)
    resources = Resources.of(device, memory)
    rows: list[Row] = []
    made = 0
    known = {job: stored(results, job, pair.keys, device) for job in jobs}
    lost = {job for job, row in known.items() if row and save and not (_folder(results, row) / trained.CARD).is_file()}
    if done := sum(row is not None for row in known.values()):
        say(f"{done} of {len(jobs)} results are in {results.root} already and are not made again")
    if lost:
        say(f"{len(lost)} of them are trained again, since their probes were not kept")
    for job in jobs:
        row = known[job]
        if row is None:
            new = train(pair, job.resolved(device), resources)
            row = new.row
            if save:
                say(_keep(results, row, new))
            results.append(row, new.arrays)
            made += 1
            log.info(
                "%s seed %d: val %.4f, test %.4f, %.1f s, %s",
                *(row.probe, row.seed, row.val, row.test, row.seconds, row.selected.given()),
            )
            for tracker in trackers:
                tracker.log(row)
        elif job in lost:
            again = train(pair, replace(job, precision=row.precision), resources)
            say(_keep(results, row, again) if same_scores(row, again.row) else _not_kept(results, row, again.row))
        rows.append(row)
    return rows, made


def stored(results: Results, job: "Job", features: tuple[str, str], device: str = "cpu") -> Row | None:
    """The row of a job on these features, if it is there; where `auto` was asked for, one of either precision."""
    found = (results.find(one.row_id(features)) for one in job.answers(device))
    return next((row for row in found if row is not None), None)


def same_scores(one: Row, other: Row) -> bool:
    """Whether scores and choice are the same to the last bit."""
    return all(getattr(one, name) == getattr(other, name) for name in ("val", "test", "train", "selected"))


def _folder(results: Results, row: Row) -> Path:
    """Where a row's trained probe is kept."""
    return results.root / PROBES / row.id


def _keep(results: Results, row: Row, made: "Trained") -> str:
    """Save the trained probe of a row; says where."""
    trained.save(_folder(results, row), made.card, made.weights)
    return f"{row.probe}, seed {row.seed}, is kept in {_folder(results, row)}"


def _not_kept(results: Results, row: Row, again: Row) -> str:
    return (
        f"{row.probe}, seed {row.seed}, is not kept: trained again it does not give the scores of result {row.id} (test "
        f"{row.test} then, {again.test} now). What differs: mlfusion results rerun {row.id} --results {results.root}"
    )


@dataclass(frozen=True, eq=False)
class Rerun:
    """A row, and what training it again from what it says gave."""

    row: Row
    again: Row
    differs: list[str]  # in how the two were made: code, versions, the protocol

    @property
    def same(self) -> bool:
        """Scores and choice are the same to the last bit."""
        return same_scores(self.row, self.again)

    def scores(self) -> list[tuple[str, Any, Any]]:
        """(name, then, now) of scores and choice."""
        names = ("val", "test", "train")
        found = [(name, getattr(self.row, name), getattr(self.again, name)) for name in names]
        return [*found, ("selected", self.row.selected.given(), self.again.selected.given())]


def rerun(
    row_id: str,
    *,
    keep: bool = False,
    cache: CachePath = None,
    results: str | os.PathLike[str] = "results",
    device: str | None = None,
    memory: int | None = None,
) -> Rerun:
    """Train a row's probe again from the row alone: its features by their keys, its probe, seed, grid and options.

    Args:
        row_id: its id, or the beginning of it.
        keep: where the scores are the same, put arrays and trained probe beside the row if they are not there.
        cache: where the features are, as for `probe`.
        results: where the row is.
        device: where to train; None is where the row was.
        memory: as for `probe`; whether tokens are loaded or streamed is as it was.

    Raises:
        NotCached: the features are gone; says how to make them again.
        UnknownName: no such row.
    """
    store, kept = FeatureStore(cache), Results(Path(results))
    row = kept.named(row_id)
    [one] = parse_probes(row.probe, row.depth)
    pair = _pair_of(store, row, one)
    job = Job(
        one,
        row.seed,
        row.grid,
        precision=row.precision,
        shots=row.shots,
        halving=row.halving,
        smoothing=row.smoothing or 0.0,
    )
    resources = Resources.of(pick_device(device or row.device), memory, streams=row.streamed)
    again = train(pair, job, resources)
    then, now = ({"code": made.code, "device": made.device, **made.versions} for made in (row, again.row))
    differs = [f"{name} {then[name]} then, {now[name]} now" for name in now if then.get(name, now[name]) != now[name]]
    if row.protocol != again.row.protocol:
        differs.append(f"protocol {row.protocol} then, {again.row.protocol} now")
    done = Rerun(row, again.row, differs)
    if keep and done.same:
        kept.keep_arrays(row, again.arrays)
        _keep(kept, row, again)
    return done


def _pair_of(store: FeatureStore, row: Row, one: Probe) -> SplitPair:
    """The features that a row was made from, by their keys."""
    train, test = (store.by_key(key) for key in row.features)
    if train is None or test is None:
        raise NotCached(
            f"the features of result {row.id} ({', '.join(row.features)}) are not in {store.root}. Name the cache that "
            f"has them with --cache, or make them again: {row.sources.extract}"
        )
    for entry in (train, test):
        require(entry, one.representation.pairs(row.depth), row.sources.model, row.sources.dataset)
    return SplitPair(row.model, row.dataset, train, test, older=0)


def _servable(pair: SplitPair, names: str | Sequence[str], model: str, dataset: str) -> tuple[list[Probe], list[str]]:
    """The probes asked for. Of 'all', those whose tokens are not cached are left out with a word; others are refused."""
    depth = pair.train.spec.model.depth
    words = spelt_out(names)
    named = parse_probes([word for word in words if word != "all"], depth)
    for one in named:
        for entry in (pair.train, pair.test):
            require(entry, one.representation.pairs(depth), model, dataset)
    chosen, lacking = dict.fromkeys(named), []
    for one in parse_probes("all", depth) if "all" in words else ():
        if absent := one.representation.pairs(depth) - pair.held:
            none = impossible(pair.train.spec.model, absent)
            lacking.append(
                f"{one.name} is left out: {model} {none}"
                if none
                else f"{one.name} is left out, its tokens are not cached; to have it: {extract_command(model, dataset, absent)}"
            )
        else:
            chosen[one] = None
    return list(chosen), lacking


OPTIONS: dict[str, Any] = {"shots": None, "halving": False, "smoothing": 0.0}
"""What changes a result beyond probe, grid, seed and precision; at these values it is as if the option did not exist."""


@dataclass(frozen=True)
class Job:
    """One row to make."""

    probe: Probe
    seed: int
    grid: str
    precision: Precision = "auto"  # of the matrix products of training
    shots: int | None = None
    halving: bool = False
    smoothing: float = 0.0

    def options(self) -> dict[str, Any]:
        """Options that are not at their default; a part of the row and of its id."""
        return {name: getattr(self, name) for name, usual in OPTIONS.items() if getattr(self, name) != usual}

    def resolved(self, device: str) -> "Job":
        """The same job with the precision that 'auto' means on this machine; float32 for a head that is solved for."""
        solved = self.probe.head in protocol.SOLVERS
        return replace(self, precision="float32" if solved else population.resolve(self.precision, device))

    def answers(self, device: str) -> list["Job"]:
        """The resolved jobs whose row answers this one: with 'auto' those of either precision, this machine's own first."""
        own = self.resolved(device)
        if self.precision != "auto" or self.probe.head in protocol.SOLVERS:
            return [own]
        return [own, replace(own, precision="float32" if own.precision == "bfloat16" else "bfloat16")]

    def row_id(self, features: tuple[str, str]) -> str:
        """Id of the row that a resolved job makes: the same features (keys of train and test), probe, grid, seed, precision
        and options under the same protocol are the same result.
        """
        named = [PROTOCOL, *features, self.probe.name, self.grid, self.seed, _narrowed(self.precision)]
        return digest([*named, self.options()] if self.options() else named)


def _narrowed(precision: Precision) -> RowPrecision:
    """The precision of a resolved job."""
    if precision == "auto":
        raise ValueError("'auto' names no row; resolve the job first")
    return precision


def jobs_of(
    probes: Iterable[Probe],
    seeds: Sequence[int],
    grid: str,
    *,
    shots: Sequence[int | None] = (None,),
    halving: bool = False,
    smoothing: float = 0.0,
    precision: Precision = "auto",
) -> list[Job]:
    """Every row that `probe` makes of one model's features of one data set."""
    return [
        Job(one, seed, grid, precision, count, halving, smoothing) for count, one, seed in product(shots, probes, seeds)
    ]


# --- from a job to its row -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """What training may take; a result does not depend on it beyond rounding."""

    device: str
    memory: int  # bytes
    streams: bool | None = None  # whether training reads tokens in batches; None: if they take over half of the memory

    @classmethod
    def of(cls, device: str, memory: int | None, *, streams: bool | None = None) -> "Resources":
        """By default most of the memory that is free."""
        return cls(device, int(population.SPARE * available("cpu")) if memory is None else memory, streams)


@dataclass(frozen=True, eq=False)
class Trained:
    """A row that was made, and what is kept beside it."""

    row: Row
    arrays: dict[str, np.ndarray]
    card: trained.Card
    weights: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Fitted:
    """What the protocol gave for a job, before it is written down."""

    job: Job  # resolved
    device: str
    target: Target
    outcome: protocol.Outcome
    images: ImageCounts
    tokens: int  # T, of an image
    streamed: bool


def train(pair: SplitPair, job: Job, resources: Resources) -> Trained:
    """Train and test the probe of a resolved job.

    Raises:
        MlfusionError: the features cannot be read, or no probe can be trained on them.
    """
    fitted = _fit(pair, job, resources)
    row = row_of(pair, fitted)
    return Trained(row, _arrays(pair, fitted), card_of(pair, fitted, row), fitted.outcome.weights)


def _fit(pair: SplitPair, job: Job, resources: Resources) -> Fitted:
    with ExitStack() as opened:
        train = _tokens(pair.train, job.probe, resources, opened)
        streamed = isinstance(train.values, TokenReader)
        target = target_of(train.labels, len(pair.train.spec.data.classes), smoothing=job.smoothing)
        if job.shots is not None:
            train = train.of(protocol.draw(train.labels, job.shots, classes=target.outputs, seed=job.seed))
        spare = resources.memory - (0 if streamed else train.nbytes)
        with bar_of(f"{job.probe.name} on {pair.dataset}, seed {job.seed}", 1, "steps") as bar:
            outcome = protocol.fit(
                job.probe.head,
                train,
                lambda: _tokens(pair.test, job.probe, replace(resources, streams=None), opened),
                target=target,
                options=protocol.FitOptions(
                    seed=job.seed,
                    heads=job.probe.attention_heads(),
                    search=SearchOptions(grid=job.grid, halving=job.halving, precision=job.precision),  # type: ignore[arg-type]
                ),
                training=TrainingOptions(
                    device=resources.device, memory=max(1, spare) if resources.device == "cpu" else None
                ),
                progress=bar.to,
            )
        images = ImageCounts(train=len(train), test=len(pair.test.rows()))
        return Fitted(job, resources.device, target, outcome, images, train.shape[1], streamed)


def _tokens(entry: Entry, one: Probe, resources: Resources, opened: ExitStack) -> Tokens:
    """[images, tokens, width]: layer by layer, in each layer CLS before AP; in memory, or read as training goes on."""
    layers = one.representation.layers(entry.spec.model.depth)
    rows, samples = entry.rows(), entry.samples
    ids = tuple(samples.ids[row] for row in rows)
    reader = opened.enter_context(entry.open(layers, one.representation.kinds))
    tokens = Tokens(reader, samples.labels[rows], ids)
    if resources.streams if resources.streams is not None else tokens.nbytes > resources.memory / 2:
        return tokens
    return Tokens(tokens[:], tokens.labels, ids)


def row_of(pair: SplitPair, fitted: Fitted) -> Row:
    """The row of what was fitted on a pair of splits."""
    job, outcome, spec = fitted.job, fitted.outcome, pair.train.spec
    names, one, depth = pair.train.names()[0], job.probe, spec.model.depth
    options = job.options()
    return Row(
        id=job.row_id(pair.keys),
        model=pair.model,
        dataset=pair.dataset,
        probe=one.name,
        seed=job.seed,
        metric=outcome.metric,
        val=outcome.val,
        test=outcome.test,
        train=outcome.train,
        metrics=metrics_of(fitted.target.kind, outcome.metrics),
        selected=Selected.of(outcome.selected),
        grid=job.grid,  # type: ignore[arg-type]
        configurations=outcome.configurations,
        parameters=outcome.parameters,
        seconds=round(outcome.seconds, 3),
        layers=tuple(one.representation.layers(depth)),
        tokens=one.representation.kinds,
        depth=depth,
        width=spec.model.width,
        classes=spec.data.classes,
        images=fitted.images,
        features=pair.keys,
        attention=_attention(one, pair.train, outcome.attention),
        versions=provenance.versions(),
        code=provenance.code(),
        created=provenance.now(),
        protocol=PROTOCOL,
        device=fitted.device,
        precision=_narrowed(job.precision),
        bytes=(fitted.images.train + fitted.images.test)
        * fitted.tokens
        * ENCODINGS[spec.dtype].vector_bytes(spec.model.width),
        sources=Sources(
            model=names.model_source,
            dataset=names.dataset_source,
            weights=spec.model.weights,
            train=spec.data.content,
            test=pair.test.spec.data.content,
            extract=_command(pair, one),
        ),
        shots=options.get("shots"),
        halving=job.halving,
        smoothing=options.get("smoothing"),
        streamed=fitted.streamed,
    )


def card_of(pair: SplitPair, fitted: Fitted, row: Row) -> trained.Card:
    """What is written beside the weights of a row's probe."""
    spec, names = pair.train.spec, pair.train.names()[0]
    return trained.Card(
        probe=row.probe,
        head=fitted.job.probe.head,
        shape=fitted.outcome.shape,
        target_fields=trained.describe(fitted.target),
        classes=row.classes,
        backbone=trained.Backbone(
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


def _arrays(pair: SplitPair, fitted: Fitted) -> dict[str, np.ndarray]:
    """What each test image got."""
    outcome = fitted.outcome
    # Probabilities lose nothing that matters in half the bytes; numbers might, and may be larger than float16 holds.
    kind = np.float32 if fitted.target.kind == "number" else np.float16
    arrays = {
        "probabilities": outcome.predictions.astype(kind),
        "labels": pair.test.samples.labels[pair.test.rows()],
    }
    if outcome.attention is not None:
        arrays["attention"] = outcome.attention.astype(np.float16)
    return arrays


def _command(pair: SplitPair, one: Probe) -> str:
    """What caches the tokens of this probe from the model and the images themselves."""
    names, spec = pair.train.names()[0], pair.train.spec
    command = extract_command(
        names.model_source, names.dataset_source, one.representation.pairs(spec.model.depth), spec
    )
    return command if spec.model.view == "plain" else f"{command} --view {spec.model.view}"


def _attention(one: Probe, entry: Entry, attention: np.ndarray | None) -> Attention | None:
    """Mean and spread over the test images of the attention on each token, [images, tokens]."""
    if attention is None:
        return None
    layers, kinds = one.representation.layers(entry.spec.model.depth), one.representation.kinds
    homes = entry.sources()
    tokens = [(layer, kind) for layer in layers for kind in kinds for _ in range(homes[layer, kind].stream.tokens)]
    return Attention(
        layers=tuple(layer for layer, _ in tokens),
        kinds=tuple(kind for _, kind in tokens),
        mean=tuple(attention.mean(0, dtype=np.float64).tolist()),
        sd=tuple(attention.std(0, dtype=np.float64).tolist()),
    )
