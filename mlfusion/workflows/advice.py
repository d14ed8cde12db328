"""Which representation and which probe to use, by a pilot: a few hundred images of train, the quick grid, minutes at most.

Every candidate is trained on parts of the pilot and scored on the part left out, so that each image is scored once by a probe
that did not see it; the test split is not looked at. What the rest would cost is reckoned from rates measured on the way.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlfusion import datasets
from mlfusion.errors import BadData
from mlfusion.extraction import run
from mlfusion.extraction.request import Request
from mlfusion.probing import costs, protocol
from mlfusion.probing.search import FitOptions
from mlfusion.probing.targets import Target, target_of
from mlfusion.probing.training.batches import Tokens
from mlfusion.probing.training.precision import resolve
from mlfusion.specs.identity import Pair
from mlfusion.specs.names import BASELINE, Probe, parse_probes
from mlfusion.specs.options import ComputeOptions, FeatureOptions, PilotOptions, SearchOptions
from mlfusion.statistics.images import Difference, Interval, difference, interval
from mlfusion.store import CachePath, Entry, FeatureStore
from mlfusion.system.progress import track

FOLDS = 3
FEWEST = 4  # images of a class, however many classes there are
CANDIDATES = (
    BASELINE,
    "cls+ap-last/linear",
    "cls+ap-all-layers/linear",
    "cls+ap-all-layers/attentive",
    "all-tokens-last/attentive",
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A probe, what the pilot says of it, and what it would cost on the whole data set."""

    probe: str
    score: Interval  # over the pilot's images
    gain: Difference | None  # over the baseline, on the same images; None of itself, or without it
    behind: Difference | None  # the best candidate's lead over it; None of the best
    bytes: int  # of cache, both splits, beyond what is cached
    extract_seconds: float
    probe_seconds: float  # one seed, the paper's grid

    @property
    def seconds(self) -> float:
        """Of both stages."""
        return self.extract_seconds + self.probe_seconds


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to use, and why."""

    model: str
    dataset: str
    metric: str
    images: int  # of the pilot
    train_images: int  # of the data set
    cached: bool  # the pilot's features came from the cache
    candidates: tuple[Candidate, ...]  # as asked for
    seconds: float  # that the pilot took

    @property
    def best(self) -> Candidate:
        """The highest score; of two alike the cheaper one."""
        return max(self.candidates, key=lambda each: (each.score.value, -each.seconds))

    @property
    def enough(self) -> Candidate:
        """The cheapest that the pilot cannot tell from the best."""
        alike = [each for each in self.candidates if each.behind is None or each.behind.low <= 0]
        return min(alike, key=lambda each: (each.seconds, -each.score.value))

    def to_json(self) -> dict[str, Any]:
        """The object that `mlfusion advise --json` prints."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "use": self.best.probe,
            "enough": self.enough.probe,
            "metric": self.metric,
            "images": self.images,
            "train_images": self.train_images,
            "cached": self.cached,
            "candidates": [asdict(each) for each in self.candidates],
            "seconds": round(self.seconds, 1),
        }


def advise(
    model: str,
    dataset: str,
    pilot_options: PilotOptions = PilotOptions(),
    *,
    probes: str | Sequence[str] = CANDIDATES,
    cache: CachePath = None,
    device: str = "auto",
) -> Advice:
    """Say by a pilot which probe to use on a model's features of a data set. Writes nothing into the cache.

    Args:
        model: a catalogue name, an id on the hub, or a folder.
        dataset: a catalogue name, an id on the hub, a folder or a file.
        pilot_options: which images of train are looked at: no fewer than four.
        probes: the candidates, as in `mlfusion ls probes`.
        cache: where features are taken from, if they are there.
        device: device of the forward pass, if they are not.

    Raises:
        BadData: too few images, or labels that cannot be dealt out.
        MlfusionError: any other of its kinds.
    """
    began = time.perf_counter()
    if pilot_options.images < 2 * FOLDS:
        raise BadData(
            f"--images {pilot_options.images}: allowed are {2 * FOLDS} and more, such as {PilotOptions().images}"
        )
    with _pilot(model, dataset, pilot_options, probes, cache, device) as pilot:
        said = _scored(pilot, pilot_options.seed)
        candidates = _candidates(pilot, said)
    return Advice(
        model=pilot.model,
        dataset=pilot.dataset,
        metric=pilot.target.metric,
        images=len(pilot.labels),
        train_images=pilot.train_images,
        cached=not pilot.seconds_each,
        candidates=candidates,
        seconds=time.perf_counter() - began,
    )


def _candidates(pilot: "_Pilot", said: dict[Probe, tuple[np.ndarray, tuple[int, ...]]]) -> tuple[Candidate, ...]:
    """What the pilot says of each probe: its score, its gains, and what the rest would cost."""
    labels, target = pilot.labels, pilot.target
    by_name = {probe.name: made for probe, (made, _) in said.items()}
    scores = {name: interval(labels, made, metric=target.metric) for name, made in by_name.items()}
    best = max(scores, key=lambda name: scores[name].value)
    candidates = []
    for probe in pilot.probes:
        absent = probe.representation.pairs(pilot.depth) - pilot.held
        name, (made, (_, tokens, width)) = probe.name, said[probe]
        base, top = by_name.get(BASELINE), by_name[best]
        problem = costs.Problem(tokens=tokens, width=width, classes=target.outputs, images=pilot.train_images)
        candidates.append(
            Candidate(
                probe=name,
                score=scores[name],
                gain=difference(labels, made, base, metric=target.metric)
                if base is not None and name != BASELINE
                else None,
                behind=None if name == best else difference(labels, top, made, metric=target.metric),
                bytes=pilot.every * sum(pilot.bytes_of[pair] for pair in absent),
                extract_seconds=pilot.every * pilot.seconds_each if absent else 0.0,
                probe_seconds=costs.seconds(probe, problem, SearchOptions()),
            )
        )
    return tuple(candidates)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Pilot:
    """Some images of train, as tokens."""

    model: str
    dataset: str
    depth: int
    probes: tuple[Probe, ...]
    labels: np.ndarray
    target: Target
    train_images: int
    every: int  # images of train and test
    held: frozenset[Pair]  # that are cached
    bytes_of: dict[Pair, int]  # of an image
    seconds_each: float  # that an image's forward pass took; 0 where none was run
    tokens: Callable[[Probe], Tokens]


@contextmanager
def _pilot(
    model: str, dataset: str, options: PilotOptions, probes: str | Sequence[str], cache: CachePath, device: str
) -> Iterator[_Pilot]:
    """From the cache if it has all that the candidates read, else by a few forward passes into a cache that goes away."""
    store = FeatureStore(cache)
    train, test = (store.find(model=model, dataset=dataset, split=split) for split in ("train", "test"))
    newest = max(train, key=lambda entry: entry.extracted_at_ns(), default=None)
    held = newest.complete_pairs() if newest else frozenset()
    if newest is not None:
        asked = parse_probes(probes, newest.spec.model.depth)
        if all(probe.representation.pairs(newest.spec.model.depth) <= held for probe in asked):
            yield _cached_pilot(newest, test, asked, options)
            return
    with tempfile.TemporaryDirectory() as folder:
        yield replace(_extracted_pilot(model, dataset, options, probes, Path(folder), device), held=held)


def _cached_pilot(newest: Entry, test: Sequence[Entry], probes: tuple[Probe, ...], options: PilotOptions) -> _Pilot:
    labels = newest.samples.labels[newest.rows()]
    target = target_of(labels, len(newest.spec.data.classes))
    rows = chosen(target.strata(labels), options.images, options.seed)
    others = [entry for entry in test if entry.spec.model == newest.spec.model]
    return _Pilot(
        model=newest.names()[0].model,
        dataset=newest.names()[0].dataset,
        depth=newest.spec.model.depth,
        probes=probes,
        labels=labels[rows],
        target=target,
        train_images=len(labels),
        every=len(labels) + max((entry.spec.data.images for entry in others), default=0),
        held=newest.complete_pairs(),
        bytes_of={},
        seconds_each=0.0,
        tokens=_reader(newest, rows),
    )


def _extracted_pilot(
    model: str, dataset: str, options: PilotOptions, probes: str | Sequence[str], folder: Path, device: str
) -> _Pilot:
    data = datasets.load(dataset)
    split = data.split("train")
    target = target_of(split.labels, len(split.classes))
    rows = chosen(target.strata(split.labels), options.images, options.seed)
    part = replace(data, splits={"train": split.take(rows, "train")})
    request = Request.of(model, part, FeatureOptions(splits=("train",)), ComputeOptions(device=device))
    depth = request.jobs[0].spec.model.depth
    asked = parse_probes(probes, depth)
    request = replace(request, pairs=frozenset(pair for probe in asked for pair in probe.representation.pairs(depth)))
    loaded = run.load(request)
    began = time.perf_counter()
    [made] = run.fill(request, cache=folder, model=lambda _: loaded)
    seconds = (time.perf_counter() - began) / len(rows)
    return _Pilot(
        model=request.names.model,
        dataset=request.names.dataset,
        depth=depth,
        probes=asked,
        labels=split.labels[rows],
        target=target,
        train_images=len(split),
        every=sum(len(data.split(name)) for name in ("train", "test")),
        held=frozenset(),
        bytes_of={pair: home.stream.tokens * home.stream.width * 2 for pair, home in made.entry.sources().items()},
        seconds_each=seconds,
        tokens=_reader(made.entry, np.arange(len(rows))),
    )


def _reader(entry: Entry, rows: np.ndarray) -> Callable[[Probe], Tokens]:
    def tokens(probe: Probe) -> Tokens:
        layers = probe.representation.layers(entry.spec.model.depth)
        with entry.open(layers, probe.representation.kinds) as reader:
            samples = entry.samples
            ids = tuple(samples.ids[row] for row in entry.rows())
            return Tokens(reader, samples.labels[entry.rows()], ids).of(rows)

    return tokens


def chosen(strata: np.ndarray, images: int, seed: int) -> np.ndarray:
    """Rows [about `images`] in ascending order: of each stratum alike many, at least four, and all of one that has fewer.

    Raises:
        BadData: a stratum has a single image.
    """
    random = np.random.default_rng(seed)
    kinds = np.unique(strata)
    each = max(FEWEST, images // len(kinds))
    rows = [random.permutation(np.flatnonzero(strata == kind))[:each] for kind in kinds]
    if min(map(len, rows)) < FOLDS:
        raise BadData(f"a class has fewer than {FOLDS} images to train on; a pilot parts them into {FOLDS}")
    return np.sort(np.concatenate(rows))


def folds(strata: np.ndarray, seed: int) -> np.ndarray:
    """The part that each image is left out in [N], of each stratum alike many in each part."""
    random = np.random.default_rng(seed + 1)
    part = np.empty(len(strata), np.int64)
    for number, kind in enumerate(np.unique(strata)):
        rows = random.permutation(np.flatnonzero(strata == kind))
        part[rows] = (np.arange(len(rows)) + number) % FOLDS
    return part


def _scored(pilot: _Pilot, seed: int) -> dict[Probe, tuple[np.ndarray, tuple[int, ...]]]:
    """Predictions [images, outputs] of each candidate, each by a probe that did not see the image; and its tokens' shape."""
    parts = folds(pilot.target.strata(pilot.labels), seed)
    search = SearchOptions(grid="quick", precision=resolve("auto", "cpu"))
    said: dict[Probe, tuple[np.ndarray, tuple[int, ...]]] = {}
    with track(f"pilot of {pilot.model} on {pilot.dataset}", len(pilot.probes) * FOLDS, "fits") as bar:
        for probe in pilot.probes:
            tokens = pilot.tokens(probe)
            made = np.zeros((len(tokens), pilot.target.outputs), np.float32)
            for part in range(FOLDS):
                fitted, left_out = (np.flatnonzero((parts != part) == inside) for inside in (True, False))
                outcome = protocol.fit(
                    probe.head,
                    tokens.of(fitted),
                    lambda left_out=left_out, tokens=tokens: tokens.of(left_out),  # type: ignore[misc]
                    target=pilot.target,
                    options=FitOptions(seed=seed, heads=probe.attention_heads(), search=search),
                )
                made[left_out] = outcome.predictions
                bar.advance()
            said[probe] = made, tokens.shape
    return said
