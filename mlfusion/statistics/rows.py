"""Statistics of rows: which may be compared, how two probes, their fit and their cost compare, how sure one row is."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from statistics import fmean
from typing import NamedTuple, Unpack

import msgspec
import numpy as np

from mlfusion.errors import BadData, ResultsUnusable
from mlfusion.results import Results, Row
from mlfusion.results.database import RowFilter
from mlfusion.specs.names import ALIASES
from mlfusion.statistics import images
from mlfusion.statistics.datasets import Against, Ranking, Signed, against, ranking, wilcoxon_or_reason
from mlfusion.statistics.images import BOOTSTRAP, Bootstrap, Calibration, Difference, Interval, McNemar


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over n seeds, by which another training run would differ; no deviation for one."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """One value a seed."""
        held = list(values)
        mean, n = fmean(held), len(held)
        # `statistics.stdev` reckons in fractions, which takes a hundred thousand rows ten seconds.
        return cls(mean, sqrt(fsum((value - mean) ** 2 for value in held) / (n - 1)) if n > 1 else None, n)


class Setting(NamedTuple):
    """What rows must have in common for their probes to be compared seed by seed."""

    model: str
    dataset: str
    grid: str
    metric: str
    features: tuple[str, ...]
    options: str  # such as '4 shots'; empty for the protocol as it is
    protocol: int


@dataclass(frozen=True)
class Comparison:
    """Probe A against probe B on one data set. All scores are those of the test split, as fractions."""

    model: str  # 'one / other' where they differ
    dataset: str
    metric: str
    a: str
    b: str
    seeds: tuple[int, ...]  # that both were trained with, or those of the two rows
    score_a: Spread
    score_b: Spread
    gain: Spread  # A - B, seed by seed: how much another training would differ
    images: Difference | None  # A - B over the test images: how much other images would; None where arrays are missing
    mcnemar: tuple[McNemar, ...]  # one a seed; empty where arrays are missing or images have no single class
    marks: tuple[str, ...]  # what else differs between the two


@dataclass(frozen=True)
class Fit:
    """Train against test: how much of what was learned was learned by heart."""

    train: Spread
    test: Spread
    gap: Spread  # train - test, seed by seed


@dataclass(frozen=True)
class Cost:
    """What a probe costs: the most of any seed's parameters, and the mean time."""

    parameters: int
    seconds: float
    bytes: int  # of the tokens it reads in the cache


def setting(row: Row) -> Setting:
    """What other rows must share with this one."""
    return Setting(row.model, row.dataset, row.grid, row.metric, row.features, row.options(), row.protocol)


def fit(rows: Sequence[Row]) -> Fit:
    """Of one probe's rows, one a seed."""
    return Fit(
        Spread.of(row.train for row in rows),
        Spread.of(row.test for row in rows),
        Spread.of(row.train - row.test for row in rows),
    )


def cost(rows: Sequence[Row]) -> Cost:
    """Of one probe's rows, one a seed."""
    return Cost(
        max(row.parameters for row in rows),
        sum(row.seconds for row in rows) / len(rows),
        max(row.bytes for row in rows),
    )


def by_dataset(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """{probe: {data set: mean test score over seeds}}, as `against` and `ranking` want them, of one model and setting.

    Raises:
        BadData: rows of several models, grids, options, metrics or protocols, whose scores do not belong in one table.
    """
    held: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    kinds: dict[str, set[str]] = defaultdict(set)
    places: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for row in rows:
        of = setting(row)
        values = (of.model, of.grid, of.metric, of.options, of.protocol)
        for name, value in zip(("models", "grids", "metrics", "options", "protocols"), values, strict=True):
            kinds[name].add(str(value) or "none")
        places[of.dataset].add(of.features)
        held[row.probe][row.dataset].append(row.test)
    if mixed := [f"{name} {', '.join(sorted(given))}" for name, given in kinds.items() if len(given) > 1]:
        raise BadData(f"these rows cannot stand in one table, they are of {' and '.join(mixed)}; choose one of each")
    if several := [name for name, features in places.items() if len(features) > 1]:
        raise BadData(
            f"rows on {', '.join(several)} were made from several sets of features; allowed: one a data set. Take the rows "
            "of one, by their 'features'"
        )
    return {probe: {name: float(np.mean(v)) for name, v in sets.items()} for probe, sets in held.items()}


def compare(
    results: Results, a: Row | Sequence[Row], b: Row | Sequence[Row], *, bootstrap: Bootstrap = BOOTSTRAP
) -> Comparison:
    """Two probes on the same test images: scores, the paired difference, and how sure it is.

    `a` and `b` are a row each, or rows of one probe, one a seed: of several seeds those that both have count. `results` hold
    what each test image got.

    Raises:
        BadData: the two cannot be compared: other data, images, metric or protocol.
    """
    held_a, held_b = _paired([a] if isinstance(a, Row) else list(a), [b] if isinstance(b, Row) else list(b))
    one, other = held_a[0], held_b[0]
    _comparable(one, other)
    drawn: Difference | None = None
    tests: tuple[McNemar, ...] = ()
    marks = _marks(held_a, held_b)
    try:
        arrays_a, arrays_b = ([results.arrays(row) for row in rows] for rows in (held_a, held_b))
    except ResultsUnusable as err:
        marks = (*marks, f"no interval: {err}")
    else:
        labels = arrays_a[0]["labels"]
        if not all(np.array_equal(labels, held["labels"]) for held in (*arrays_a, *arrays_b)):
            raise BadData(
                f"{one.id} and {other.id} were tested on other images, or in another order; allowed: the same test "
                "split. Extract and probe both again from the data set as it is now"
            )
        of_a, of_b = ([held["probabilities"] for held in each] for each in (arrays_a, arrays_b))
        drawn = images.difference(labels, of_a, of_b, metric=one.metric, bootstrap=bootstrap)
        if labels.ndim == 1 and labels.dtype.kind != "f":
            tests = tuple(images.mcnemar(labels, x, y) for x, y in zip(of_a, of_b, strict=True))
    return Comparison(
        model=one.model if one.model == other.model else f"{one.model} / {other.model}",
        dataset=one.dataset,
        metric=one.metric,
        a=one.probe,
        b=other.probe,
        seeds=tuple(dict.fromkeys(row.seed for row in (*held_a, *held_b))),
        score_a=Spread.of(row.test for row in held_a),
        score_b=Spread.of(row.test for row in held_b),
        gain=Spread.of(x.test - y.test for x, y in zip(held_a, held_b, strict=True)),
        images=drawn,
        mcnemar=tests,
        marks=marks,
    )


def compare_probes(
    results: Results, rows: Sequence[Row], a: str, b: str, *, bootstrap: Bootstrap = BOOTSTRAP
) -> list[Comparison]:
    """Probe `a` against probe `b` in every setting among `rows` that has both with a seed in common; by model, then data set.

    Raises:
        BadData: there is none.
    """
    grouped: dict[Setting, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.probe in (a, b):
            grouped[setting(row)][row.probe].append(row)
    both = {
        key: held
        for key, held in sorted(grouped.items(), key=lambda each: each[0][:2])
        if {row.seed for row in held[a]} & {row.seed for row in held[b]}
    }
    if not both:
        there = ", ".join(sorted({row.probe for row in rows})[:12])
        raise BadData(
            f"no data set has rows of both {a} and {b} with a seed, grid and protocol in common; there are rows of {there}. "
            f"Make them with `mlfusion probe --probe {a},{b}`"
        )
    return [compare(results, held[a], held[b], bootstrap=bootstrap) for held in both.values()]


def compare_named(
    results: Results, a: str, b: str, *, bootstrap: Bootstrap = BOOTSTRAP, **chosen: Unpack[RowFilter]
) -> list[Comparison]:
    """What `mlfusion results compare` shows: probes in every setting of the chosen rows; or, if either is an id, two results.

    Raises:
        BadData: they cannot be compared.
        UnknownName: no result has such an id.
        ResultsUnusable: there are no results.
    """
    probe_a, probe_b = _probe_name(a), _probe_name(b)
    if probe_a and probe_b:
        return compare_probes(results, results.require(**chosen), probe_a, probe_b, bootstrap=bootstrap)
    return [compare(results, results.named(a), results.named(b), bootstrap=bootstrap)]


def _probe_name(word: str) -> str | None:
    """The name of a probe, or None if it is not one: ids have no '/'."""
    return word if "/" in word else ALIASES.get(word.lower())


def over_datasets(compared: Sequence[Comparison]) -> dict[str, Signed | str]:
    """Of each model, the one-sided signed-rank test that A gains over B on its data sets, or why there is none."""
    gains: dict[str, list[float]] = defaultdict(list)
    for one in compared:
        gains[one.model].append(one.gain.mean)
    return {model: wilcoxon_or_reason(held) for model, held in gains.items()}


@dataclass(frozen=True)
class Rank:
    """Probes over data sets: their mean ranks, and the gains over one of them."""

    ranking: Ranking
    against: tuple[Against, ...]  # one a probe but the baseline; empty where there are no rows of the baseline
    baseline: str
    left_out: tuple[str, ...]  # probes without rows on every data set


def rank(rows: Iterable[Row], *, baseline: str, level: float = 0.95) -> Rank:
    """Rank the probes of one model and setting over the data sets that most of them have, by mean test scores.

    Several seeds of a probe are averaged. `baseline` is the name or alias of the probe that gains are counted from, `level` the
    confidence level of the tests: 0.95 means p below 0.05.

    Raises:
        BadData: the scores do not belong in one table, or the data sets are too few.
    """
    table, baseline = by_dataset(rows), _probe_name(baseline) or baseline
    most = max((frozenset(sets) for sets in table.values()), key=len, default=frozenset())
    whole = {probe: sets for probe, sets in table.items() if sets.keys() >= most}
    order = sorted(most)
    scores = {probe: [sets[name] for name in order] for probe, sets in whole.items()}
    base = scores.get(baseline, [])
    others = {probe: held for probe, held in scores.items() if base and probe != baseline}
    gains = {probe: np.subtract(held, base).tolist() for probe, held in others.items()}
    return Rank(
        ranking=ranking(scores, level=1 - level),
        against=tuple(against(gains, level=1 - level)),
        baseline=baseline,
        left_out=tuple(sorted(table.keys() - whole.keys())),
    )


class Confused(msgspec.Struct, frozen=True):
    """Test images of one class that were taken for another."""

    name: str = msgspec.field(name="class")
    taken_for: str
    images: int
    of: int  # images of the class


@dataclass(frozen=True)
class Certainty:
    """How sure a row's score is, by what each test image got; None where the target has no such thing or arrays are gone."""

    interval: Interval | None = None
    calibration: Calibration | None = None
    confusions: tuple[Confused, ...] | None = None  # the most frequent
    missing: str | None = None  # why there is nothing, and what to do


def certainty(results: Results, row: Row, *, confusions: int = 5) -> Certainty:
    """The interval of a row's score over test images, its calibration, and its most frequent confusions."""
    try:
        held = results.arrays(row)
    except ResultsUnusable as err:
        return Certainty(missing=str(err))
    labels, predictions = held["labels"], held["probabilities"]
    sure = images.interval(labels, predictions, metric=row.metric)
    if labels.ndim != 1 or labels.dtype.kind == "f":
        return Certainty(sure)
    counts = images.confusion(labels, predictions)
    wrong = [(int(counts[i, j]), i, j) for i, j in zip(*counts.nonzero(), strict=True) if i != j]
    most = tuple(
        Confused(row.classes[i], row.classes[j], many, int(counts[i].sum()))
        for many, i, j in sorted(wrong, reverse=True)[:confusions]
    )
    return Certainty(sure, images.calibration(labels, predictions), most)


def _paired(a: list[Row], b: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of the same seeds, in the order of the seeds; of one row each, these two."""
    if len(a) == len(b) == 1:
        return a, b
    by_seed = [{row.seed: row for row in rows} for rows in (a, b)]
    if shared := sorted(by_seed[0].keys() & by_seed[1].keys()):
        return [by_seed[0][s] for s in shared], [by_seed[1][s] for s in shared]
    raise BadData("the two have no seed in common; probe both with the same --seeds")


def _comparable(a: Row, b: Row) -> None:
    """Refuse what would compare two different things."""
    same = "allowed: rows of the same test images, metric and protocol"
    if a.metric != b.metric:
        raise BadData(f"{a.id} is measured by {a.metric}, {b.id} by {b.metric}; {same}")
    if a.dataset != b.dataset or a.images.test != b.images.test:
        raise BadData(
            f"{a.id} was tested on {a.images.test} images of {a.dataset}, {b.id} on {b.images.test} of "
            f"{b.dataset}; {same}"
        )
    if a.sources.test != b.sources.test:
        raise BadData(
            f"{a.dataset} changed between {a.id} and {b.id}: they were tested on other images; {same}. Extract and "
            "probe both again"
        )
    if a.protocol != b.protocol:
        raise BadData(
            f"{a.id} was made by protocol {a.protocol}, {b.id} by protocol {b.protocol}, which measure differently; {same}. "
            "Make the older one again with the same `mlfusion probe`"
        )


def _marks(a: Sequence[Row], b: Sequence[Row]) -> tuple[str, ...]:
    """What differs between the two beside the probe, and may be why their scores do; 'none' of options that were not used."""
    told: list[str] = []
    held = [[msgspec.to_builtins(row) for row in rows] for rows in (a, b)]  # which leave out options at their default
    for name in ("seed", "grid", "code", "protocol", "device", "precision", "shots", "halving", "smoothing"):
        of_a, of_b = (sorted({str(row.get(name, "none")) for row in rows}) for rows in held)
        if of_a != of_b:
            told.append(f"{name}: {', '.join(of_a)} against {', '.join(of_b)}")
    return tuple(told)
