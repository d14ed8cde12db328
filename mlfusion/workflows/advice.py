"""Recommends a representation and a probe by a pilot study: a few hundred training images, the quick grid, some minutes.

Every candidate is cross-validated on the pilot, so each image is scored once by a probe that was not trained on it. The test
split is not used. The cost of the whole study is estimated from rates measured in the pilot.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mlfusion import datasets
from mlfusion.errors import BadData, NotCached
from mlfusion.extraction import run
from mlfusion.extraction.request import Request
from mlfusion.probing import costs, protocol
from mlfusion.probing.fitting import open_tokens
from mlfusion.probing.search import FitOptions, Running
from mlfusion.probing.splits import part_groups
from mlfusion.probing.targets import Target, target_of
from mlfusion.probing.training.batches import Tokens
from mlfusion.probing.training.precision import resolve
from mlfusion.specs.definitions import from_words
from mlfusion.specs.grouping import codes_of, in_turn
from mlfusion.specs.identity import Pair
from mlfusion.specs.names import BASELINE, Probe, parse_probes
from mlfusion.specs.options import ComputeOptions, FeatureOptions, PilotOptions, SearchOptions
from mlfusion.statistics.uncertainty import FEW_TEST_IMAGES, Difference, Interval, difference, interval
from mlfusion.statistics.verdicts import Verdict, verdict
from mlfusion.store import Alias, CachePath, Entry, FeatureStore, Groups
from mlfusion.store.features import belong_together
from mlfusion.store.lookup import newest_split
from mlfusion.system.progress import Bar, track

FOLDS = 3
PARTS = 100  # of work that the progress counts in the fastest fit
MIN_PER_CLASS = 4  # smallest number of images per class in the pilot
CANDIDATES = (
    BASELINE,
    "cls+ap-last/linear",
    "cls+ap-all-layers/linear",
    "cls+ap-all-layers/attentive",
    "all-tokens-last/attentive",
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A probe with its scores in the pilot and its estimated cost on the whole data set."""

    probe: str
    score: Interval  # on the pilot's images
    gain: Difference | None  # over the baseline, on the same images; None for the baseline, or if it is no candidate
    behind: Difference | None  # lead of the best candidate; None for the best candidate
    lead: Verdict | None  # what may be said of that lead; None for the best candidate
    bytes: int  # bytes to add to the cache, for both splits
    extract_seconds: float
    probe_seconds: float  # for one seed of the paper's grid

    @property
    def seconds(self) -> float:
        """Estimated duration of both stages."""
        return self.extract_seconds + self.probe_seconds


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The recommendation and its evidence."""

    model: str
    dataset: str
    metric: str
    images: int  # number of images in the pilot
    train_images: int  # number of training images of the data set
    test_images: int  # number of test images; 0: not known
    cached: bool  # whether the pilot's features came from the cache
    candidates: tuple[Candidate, ...]  # in the requested order
    seconds: float  # duration of the pilot

    @property
    def best(self) -> Candidate:
        """The candidate with the highest score; the cheaper one of two with equal scores."""
        return max(self.candidates, key=lambda candidate: (candidate.score.value, -candidate.seconds))

    @property
    def cheapest_equivalent(self) -> Candidate:
        """The cheapest candidate that is not told apart from the best one."""
        equivalent = [one for one in self.candidates if one.lead is None or one.lead.word != "gain"]
        return min(equivalent, key=lambda candidate: (candidate.seconds, -candidate.score.value))

    @property
    def wants_folds(self) -> bool:
        """Whether the test split is so small that folds of train and test together tell more."""
        return 0 < self.test_images < FEW_TEST_IMAGES

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion advise --json` prints."""
        names = {"use": self.best.probe, "enough": self.cheapest_equivalent.probe}
        return asdict(self) | names | {"seconds": round(self.seconds, 1)}


def advise(
    model: str,
    dataset: str,
    pilot_options: PilotOptions = PilotOptions(),
    *,
    probes: str | Sequence[str] = CANDIDATES,
    cache: CachePath = None,
    device: str = "auto",
) -> Advice:
    """Recommend a probe by a pilot; arguments and errors as in `mlfusion.advise`. Writes nothing into the cache."""
    start = time.perf_counter()
    if pilot_options.images < 2 * FOLDS:
        raise BadData(
            f"--images {pilot_options.images}: allowed are {2 * FOLDS} and more, such as {PilotOptions().images}"
        )
    with _pilot(model, dataset, pilot_options, probes, cache, device) as pilot:
        outcomes = _cross_validate(pilot, pilot_options.seed)
        candidates = _candidates(pilot, outcomes)
    return Advice(
        model=pilot.model,
        dataset=pilot.dataset,
        metric=pilot.target.metric,
        images=len(pilot.labels),
        train_images=pilot.train_images,
        test_images=pilot.all_images - pilot.train_images,
        cached=not pilot.seconds_each,
        candidates=candidates,
        seconds=time.perf_counter() - start,
    )


def _candidates(pilot: "_Pilot", outcomes: dict[Probe, tuple[np.ndarray, tuple[int, ...]]]) -> tuple[Candidate, ...]:
    """The score, the gains and the estimated cost of each probe."""
    target = pilot.target
    labels = target.scored(pilot.labels)
    by_name = {probe.name: predictions for probe, (predictions, _) in outcomes.items()}
    scores = {
        name: interval(labels, predictions, metric=target.metric, groups=pilot.groups)
        for name, predictions in by_name.items()
    }
    best = max(scores, key=lambda name: scores[name].value)
    candidates = []
    for probe in pilot.probes:
        absent = probe.representation.pairs(pilot.depth) - pilot.cached
        name, (predictions, (_, tokens, width)) = probe.name, outcomes[probe]
        base, top = by_name.get(BASELINE), by_name[best]
        problem = costs.Problem(tokens=tokens, width=width, classes=target.outputs, images=pilot.train_images)
        behind = None
        if name != best:
            behind = difference(labels, top, predictions, metric=target.metric, groups=pilot.groups)
        candidates.append(
            Candidate(
                probe=name,
                score=scores[name],
                gain=difference(labels, predictions, base, metric=target.metric, groups=pilot.groups)
                if base is not None and name != BASELINE
                else None,
                behind=behind,
                lead=verdict(behind, metric=target.metric, classes=target.names) if behind else None,
                bytes=pilot.all_images * sum(pilot.bytes_of[pair] for pair in absent),
                extract_seconds=pilot.all_images * pilot.seconds_each if absent else 0.0,
                probe_seconds=costs.seconds(probe, problem, SearchOptions()),
            )
        )
    return tuple(candidates)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Pilot:
    """The pilot's images and tokens."""

    model: str
    dataset: str
    depth: int
    probes: tuple[Probe, ...]
    labels: np.ndarray
    groups: np.ndarray | None  # [images] int64; None: every image is its own group
    target: Target
    train_images: int
    all_images: int  # number of images in train and test
    cached: frozenset[Pair]
    bytes_of: dict[Pair, int]  # bytes of one image
    seconds_each: float  # duration of the forward pass of one image; 0 if none was run
    tokens: Callable[[Probe], Tokens]


@contextmanager
def _pilot(
    model: str, dataset: str, options: PilotOptions, probes: str | Sequence[str], cache: CachePath, device: str
) -> Iterator[_Pilot]:
    """Read the pilot's tokens from the cache if it has all of them, else extract them into a temporary cache."""
    store = FeatureStore(cache)
    newest: Alias | None = None
    cached: frozenset[Pair] = frozenset()
    with suppress(NotCached, BadData):  # the data set is read instead
        newest = newest_split(store, model, dataset, "train")
        cached = newest.entry.complete_pairs()
    if newest is not None:
        depth = newest.entry.spec.model.depth
        candidates = parse_probes(probes, depth)
        if all(probe.representation.pairs(depth) <= cached for probe in candidates):
            yield _cached_pilot(newest, store.aliases(split="test"), candidates, options)
            return
    data = _load(dataset, newest)
    with tempfile.TemporaryDirectory() as folder:
        yield replace(_extracted_pilot(model, data, options, probes, Path(folder), device), cached=cached)


def _load(dataset: str, newest: Alias | None) -> datasets.DataSet:
    """The data set, read with the options of its last extraction, such as the column of the groups, if there was one."""
    if newest is None:
        return datasets.load(dataset)
    words = [word for word in newest.names.options if word != "--skip-bad"]
    return datasets.load(newest.names.dataset_argument or dataset, from_words(FeatureOptions, words).read)


def _cached_pilot(train: Alias, tests: Sequence[Alias], probes: tuple[Probe, ...], options: PilotOptions) -> _Pilot:
    newest = train.entry
    labels = newest.samples.labels[newest.rows()]
    target = target_of(labels, len(newest.spec.data.classes), names=newest.spec.data.classes)
    grouped = newest.groups(train.names)
    groups = None if grouped is None else codes_of(grouped.names)[newest.rows()]
    rows = sample_rows(target.strata(labels), options.images, options.seed, groups)
    test_images = [test.entry.spec.data.images for test in tests if belong_together(train, test)]
    return _Pilot(
        model=train.names.model,
        dataset=train.names.dataset,
        depth=newest.spec.model.depth,
        probes=probes,
        labels=labels[rows],
        groups=None if groups is None else groups[rows],
        target=target,
        train_images=len(labels),
        all_images=len(labels) + max(test_images, default=0),
        cached=newest.complete_pairs(),
        bytes_of={},
        seconds_each=0.0,
        tokens=_reader(newest, rows, grouped),
    )


def _extracted_pilot(
    model: str,
    data: datasets.DataSet,
    options: PilotOptions,
    probes: str | Sequence[str],
    folder: Path,
    device: str,
) -> _Pilot:
    split = data.split("train")
    target = target_of(split.labels, len(split.classes), names=split.classes)
    codes = None if split.groups is None else codes_of(split.groups)
    rows = sample_rows(target.strata(split.labels), options.images, options.seed, codes)
    subset = replace(data, splits={"train": split.take(rows, "train")})
    request = Request.of(model, subset, FeatureOptions(splits=("train",)), ComputeOptions(device=device))
    depth = request.jobs[0].spec.model.depth
    candidates = parse_probes(probes, depth)
    pairs = frozenset(pair for probe in candidates for pair in probe.representation.pairs(depth))
    request = replace(request, pairs=pairs)
    loaded = run.load(request)
    start = time.perf_counter()
    [extracted] = run.fill(request, cache=folder, model=lambda _: loaded)
    seconds = (time.perf_counter() - start) / len(rows)
    streams = {pair: source.stream for pair, source in extracted.entry.sources().items()}
    return _Pilot(
        model=request.names.model,
        dataset=request.names.dataset,
        depth=depth,
        probes=candidates,
        labels=split.labels[rows],
        groups=None if codes is None else codes[rows],
        target=target,
        train_images=len(split),
        all_images=sum(len(data.split(name)) for name in ("train", "test")),
        cached=frozenset(),
        bytes_of={pair: stream.tokens * stream.width * 2 for pair, stream in streams.items()},
        seconds_each=seconds,
        tokens=_reader(extracted.entry, np.arange(len(rows)), extracted.entry.groups(request.jobs[0].names)),
    )


def _reader(entry: Entry, rows: np.ndarray, groups: Groups | None) -> Callable[[Probe], Tokens]:
    def tokens(probe: Probe) -> Tokens:
        with open_tokens(entry, probe, groups=groups) as opened:
            return opened.of(rows)

    return tokens


def sample_rows(strata: np.ndarray, images: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Select about `images` rows, in ascending order: equally many of each stratum, at least four or all that it has.

    With `groups`, one image of each group is taken in turn.

    Raises:
        BadData: a stratum has fewer than three images.
    """
    random = np.random.default_rng(seed)
    classes = np.unique(strata)
    per_class = max(MIN_PER_CLASS, images // len(classes))
    of_class = [np.flatnonzero(strata == label) for label in classes]
    shuffled = (random.permutation(rows) if groups is None else in_turn(rows, groups, random) for rows in of_class)
    rows = [each[:per_class] for each in shuffled]
    if min(map(len, rows)) < FOLDS:
        raise BadData(f"a class has fewer than {FOLDS} images to train on; a pilot parts them into {FOLDS}")
    return np.sort(np.concatenate(rows))


def folds(strata: np.ndarray, seed: int, groups: np.ndarray | None = None, target: Target | None = None) -> np.ndarray:
    """The fold in which each image is left out [N], stratified; whole groups, see `probing.splits.part_groups`."""
    random = np.random.default_rng(seed + 1)
    if groups is not None:
        return part_groups(strata, groups, [1 / FOLDS] * FOLDS, random, target)
    fold_of = np.empty(len(strata), np.int64)
    for number, label in enumerate(np.unique(strata)):
        rows = random.permutation(np.flatnonzero(strata == label))
        fold_of[rows] = (np.arange(len(rows)) + number) % FOLDS
    return fold_of


def _work(pilot: _Pilot, search: SearchOptions) -> dict[Probe, float]:
    """The parts of work of one fit of each probe, `PARTS` for the fastest: probes differ so much that their number says little.

    They are in the ratio of the estimated times.
    """
    seconds = {}
    for probe in pilot.probes:
        _, tokens, width = pilot.tokens(probe).shape
        images = len(pilot.labels) * (FOLDS - 1) // FOLDS
        problem = costs.Problem(tokens=tokens, width=width, classes=pilot.target.outputs, images=images)
        seconds[probe] = costs.seconds(probe, problem, search)
    return {probe: PARTS * each / min(seconds.values()) for probe, each in seconds.items()}


def _show(bar: Bar, start: float, parts: float, step: int, steps: int) -> None:
    """Show that a step of a fit is done, which began at `start` parts of all work and has `parts` itself."""
    bar.to(round(start + parts * min(1.0, step / steps)))


def _cross_validate(pilot: _Pilot, seed: int) -> dict[Probe, tuple[np.ndarray, tuple[int, ...]]]:
    """Predictions [images, outputs] of each candidate by probes that were not trained on the image; and its tokens' shape."""
    fold_of = folds(pilot.target.strata(pilot.labels), seed, pilot.groups, pilot.target)
    search = SearchOptions(grid="quick", precision=resolve("auto", "cpu"))
    outcomes: dict[Probe, tuple[np.ndarray, tuple[int, ...]]] = {}
    work = _work(pilot, search)
    with track(f"pilot of {pilot.model} on {pilot.dataset}", round(FOLDS * sum(work.values())), "parts") as bar:
        for done, probe in zip(accumulate(work.values(), initial=0.0), pilot.probes, strict=False):
            tokens = pilot.tokens(probe)
            predictions = np.zeros((len(tokens), pilot.target.outputs))
            for fold in range(FOLDS):
                start = FOLDS * done + fold * work[probe]
                fitted, left_out = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
                outcome = protocol.fit(
                    probe.head,
                    tokens.of(fitted),
                    lambda left_out=left_out, tokens=tokens: tokens.of(left_out),  # type: ignore[misc]
                    target=pilot.target,
                    options=FitOptions(seed=seed, heads=probe.attention_heads(), search=search),
                    running=Running(progress=partial(_show, bar, start, work[probe])),
                )
                predictions[left_out] = outcome.predictions
                bar.to(round(start + work[probe]))
            outcomes[probe] = predictions, tokens.shape
    return outcomes
