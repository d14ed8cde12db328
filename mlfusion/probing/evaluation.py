"""Stage 2: cached tokens → probes → rows. A row that is stored already is not made again."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlfusion.errors import BadOption
from mlfusion.probing import saved
from mlfusion.probing.fitting import Resources, Trained, train
from mlfusion.probing.jobs import Job, identity, jobs_of
from mlfusion.probing.processes import trained as trained_jobs
from mlfusion.results import Results, Row, chosen_on
from mlfusion.results.trackers import Tracker, log_new, open_trackers
from mlfusion.specs.commands import extract_command
from mlfusion.specs.definitions import command
from mlfusion.specs.names import Probe, expand_braces, parse_probes
from mlfusion.specs.options import SearchOptions, StorageOptions, TrainingOptions
from mlfusion.store import FeatureStore
from mlfusion.store.features import SplitPair, split_pairs
from mlfusion.store.lookup import impossible
from mlfusion.system.display import Displayed
from mlfusion.system.words import plural

logger = logging.getLogger(__name__)

NAMED = 5  # number of classes that a message names


@dataclass(frozen=True, eq=False, repr=False)
class ProbeResult(Displayed):
    """The result of a call of `probe`."""

    rows: list[Row]
    trained: int  # number of rows that were not stored before
    left_out: list[str]  # probes of 'all' whose tokens are not cached, with what to run

    def summary(self) -> str:
        return f"{plural(len(self.rows), 'row')}, {self.trained:,} of them trained now; see .rows"

    def lines(self) -> list[dict[str, object]]:
        """Its rows."""
        names = ("model", "dataset", "probe", "seed", "val", "test")
        return [{name: getattr(row, name) for name in names} for row in self.rows]


def probe(
    dataset: str,
    model: str | None = None,
    probes: str | Sequence[str] = "all",
    search: SearchOptions = SearchOptions(),
    training: TrainingOptions = TrainingOptions(),
    storage: StorageOptions = StorageOptions(),
    log: Callable[[str], None] = lambda _: None,
) -> ProbeResult:
    """Train and test probes on cached features; arguments and errors as in `mlfusion.probe`.

    Tokens that take more than half of the memory are read in batches during training.
    """
    if not expand_braces(probes):
        raise BadOption("--probe names no probe; allowed are names (mlfusion ls probes), or all")
    store, results, trackers = FeatureStore(storage.cache), Results(Path(storage.results)), open_trackers(storage.track)
    rows: list[Row] = []
    trained, left_out = 0, []
    for pair in (pair.choosing_on(search.choose_on) for pair in split_pairs(store, dataset, model)):
        cached, missing = _select(pair, probes, model or pair.names[0].model_argument, dataset)
        left_out += missing
        for line in missing:
            log(line)
        log(f"{pair.model} on {pair.dataset}: features reused from the cache ({', '.join(pair.keys)}), no forward pass")
        if pair.older:
            others = plural(pair.older, "other set of features has", "other sets of features have")
            log(f"{others} these names; those extracted last are used")
        pair_rows, count = run(
            pair, jobs_of(cached, search), results, training, save=storage.save, trackers=trackers, log=log
        )
        rows += pair_rows
        trained += count
    return ProbeResult(rows, trained, left_out)


def run(
    pair: SplitPair,
    jobs: Sequence[Job],
    results: Results,
    training: TrainingOptions = TrainingOptions(),
    *,
    save: bool = False,
    trackers: list[Tracker] | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> tuple[list[Row], int]:
    """Return one row per job, training those that are not stored; and the number trained.

    Arguments and errors are those of `probe`. A tracker that fails is taken out of `trackers`.
    """
    if save and any(job.search.folds for job in jobs):
        raise BadOption(
            "--folds and --save exclude each other: folds train a probe for each part of the images, of which none is the one "
            "to keep; leave --folds out, to train on all of train and keep that probe"
        )
    resources = Resources.of(training)
    device = resources.device
    rows: list[Row] = []
    trained = 0
    features = identity(pair.keys, pair.group_digests)
    existing = {job: stored(results, job, features, device) for job in jobs}
    unsaved = {job for job, row in existing.items() if row and save and not is_saved(results, row)}
    if count := sum(row is not None for row in existing.values()):
        verb = "is" if count == 1 else "are"
        log(f"{count} of {plural(len(jobs), 'result')} {verb} in {results.root.absolute()} already and not made again")
    if unsaved:
        log(f"{len(unsaved)} of them are trained again, since their probes were not kept")
    fresh = trained_jobs(pair, [job.resolved(device) for job in jobs if existing[job] is None], resources)
    for job in jobs:
        row = existing[job]
        if row is None:
            new = next(fresh)
            row = new.row
            if save:
                log(save_probe(results, row, new))
            results.append(row, new.arrays)
            trained += 1
            logger.info(
                "%s seed %d: val %.4f, test %.4f, %.1f s, %s",
                *(row.probe, row.seed, row.val, row.test, row.seconds, row.selected.given()),
            )
            log_new(row, trackers or [], results.root, log)
        elif job in unsaved:
            again = train(pair, replace(job, search=row.search()), resources)
            log(save_probe(results, row, again) if same_scores(row, again.row) else _not_saved(results, row, again.row))
        rows.append(row)
    notes = [
        f"chosen on: {chosen_on(rows)}" if rows else "",
        *absent_notes(pair),
        *(row.duplicates_note() for row in rows),
    ]
    for note in dict.fromkeys(filter(None, notes)):
        log(note)
    return rows, trained


def absent_notes(pair: SplitPair) -> list[str]:
    """A sentence about classes of train that no image of validation has, on which the choice cannot depend."""
    if pair.validation is None:
        return []
    labels, classes = (entry.samples.labels[entry.rows()] for entry in (pair.train, pair.validation)), pair.train.spec
    of_train, of_validation = (_present(one, len(classes.data.classes)) for one in labels)
    absent = [classes.data.classes[k] for k in sorted(of_train - of_validation)]
    if not absent:
        return []
    named = ", ".join(map(repr, absent[:NAMED])) + (f" and {len(absent) - NAMED} more" if len(absent) > NAMED else "")
    return [f"validation has no image of {named}: the other classes choose"]


def _present(labels: np.ndarray, classes: int) -> set[int]:
    """The classes or labels that some image has; none for numbers."""
    if labels.dtype.kind == "f":
        return set()
    counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=classes)
    return set(np.flatnonzero(counts).tolist())


def stored(results: Results, job: Job, features: tuple[str, ...], device: str = "cpu") -> Row | None:
    """The stored row of a job on features of this `identity`, or None; with 'auto' a row of either precision counts."""
    candidates = (results.find(resolved.row_id(features)) for resolved in job.equivalents(device))
    return next((row for row in candidates if row is not None), None)


def same_scores(a: Row, b: Row) -> bool:
    """Whether scores and choice are the same to the last bit."""
    return all(getattr(a, name) == getattr(b, name) for name in ("val", "test", "train", "selected"))


def _folder(results: Results, row: Row) -> Path:
    """The folder of a row's trained probe."""
    return results.probe_folder(row)


def is_saved(results: Results, row: Row) -> bool:
    """Whether the trained probe of a row is kept."""
    return (_folder(results, row) / saved.CARD).is_file()


def save_probe(results: Results, row: Row, trained: Trained) -> str:
    """Save the trained probe of a row; return a line that says where."""
    assert trained.card is not None  # folds are refused
    saved.save(_folder(results, row), trained.card, trained.weights)
    return f"{row.probe}, seed {row.seed}, is kept in {_folder(results, row).absolute()}"


def _not_saved(results: Results, row: Row, again: Row) -> str:
    return (
        f"{row.probe}, seed {row.seed}, is not kept: trained again it does not give the scores of result {row.id} (test "
        f"{row.test} then, {again.test} now). What differs: "
        + command(f"results rerun {row.id}", results=str(results.root.absolute()))
    )


def _select(pair: SplitPair, names: str | Sequence[str], model: str, dataset: str) -> tuple[list[Probe], list[str]]:
    """The probes to train, and a line for each probe of 'all' that is left out because its tokens are not cached.

    Raises:
        NotCached: the tokens of a probe that was named are not cached.
    """
    depth = pair.train.spec.model.depth
    words = expand_braces(names)
    named = parse_probes([word for word in words if word != "all"], depth)
    for probe in named:
        pair.require(probe.representation.pairs(depth), model, dataset)
    cached, missing = dict.fromkeys(named), []
    for probe in parse_probes("all", depth) if "all" in words else ():
        if absent := probe.representation.pairs(depth) - pair.complete_pairs:
            reason = impossible(pair.train.spec.model, absent)
            again = extract_command(model, dataset, absent, pair.words())
            explanation = f": {model} {reason}" if reason else f", its tokens are not cached; to have it: {again}"
            missing.append(f"{probe.name} is left out{explanation}")
        else:
            cached[probe] = None
    return list(cached), missing
