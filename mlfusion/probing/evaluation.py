"""Stage 2: cached tokens → probes → rows. Opens no image and no model; a row that is there already is not made again."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlfusion.errors import BadData, UnknownName
from mlfusion.probing import grids, saved
from mlfusion.probing.fitting import Resources, Trained, train
from mlfusion.probing.jobs import Job, jobs_of
from mlfusion.results import Results, Row
from mlfusion.results.trackers import Tracker, open_trackers
from mlfusion.specs.names import Probe, parse_probes, spelt_out
from mlfusion.specs.options import Precision
from mlfusion.store import CachePath, FeatureStore
from mlfusion.store.features import SplitPair, extract_command, impossible, require, split_pairs
from mlfusion.system.devices import pick_device

log = logging.getLogger(__name__)

PROBES = "probes"  # folder of the results that trained probes are kept in


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
    if grid not in grids.SEARCH_GRIDS:
        raise UnknownName("grid", grid, grids.SEARCH_GRIDS)
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
    lost = {job for job, row in known.items() if row and save and not (_folder(results, row) / saved.CARD).is_file()}
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
    saved.save(_folder(results, row), made.card, made.weights)
    return f"{row.probe}, seed {row.seed}, is kept in {_folder(results, row)}"


def _not_kept(results: Results, row: Row, again: Row) -> str:
    return (
        f"{row.probe}, seed {row.seed}, is not kept: trained again it does not give the scores of result {row.id} (test "
        f"{row.test} then, {again.test} now). What differs: mlfusion results rerun {row.id} --results {results.root}"
    )


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
