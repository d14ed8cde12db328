"""Statistics of rows: comparison of two probes, ranks over data sets, and cost."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, sqrt
from statistics import fmean
from typing import Any, NamedTuple

import msgspec
import numpy as np

from mlfusion.errors import BadData, ResultsUnusable
from mlfusion.results import Results, Row
from mlfusion.specs.names import full_name
from mlfusion.statistics import uncertainty
from mlfusion.statistics.datasets import (
    MIN_DATASETS,
    MIN_PROBES,
    GainTest,
    Ranking,
    SignedRank,
    gain_tests,
    ranking,
    wilcoxon_or_reason,
)
from mlfusion.statistics.resampling import BOOTSTRAP, Bootstrap
from mlfusion.statistics.uncertainty import Difference, McNemar
from mlfusion.statistics.verdicts import Verdict, verdict
from mlfusion.system.words import plural


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over n seeds: the variation over training runs; no deviation for n = 1."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of one value per seed."""
        numbers = list(values)
        mean, n = fmean(numbers), len(numbers)
        # `statistics.stdev` computes with fractions: ten seconds for a hundred thousand rows.
        return cls(mean, sqrt(fsum((value - mean) ** 2 for value in numbers) / (n - 1)) if n > 1 else None, n)


class Setting(NamedTuple):
    """The fields that rows must share for their probes to be compared seed by seed, in `compare`, in ranks and in reports."""

    model: str
    dataset: str
    grid: str
    metric: str
    features: tuple[str, ...]
    options: str  # such as '4 shots'; empty for the protocol as it is
    protocol: int


MARKED = (
    "seed",
    "grid",
    "code",
    "device",
    "precision",
    "shots",
    "halving",
    "smoothing",
    "drop_duplicates",
    "validation",
    "groups",
)
"""Fields of rows whose difference is marked where the rows are compared."""


@dataclass(frozen=True)
class Comparison:
    """Probe A against probe B on one data set. All scores are those of the test split, as fractions."""

    model: str  # 'one / other' where they differ
    dataset: str
    metric: str
    a: str
    b: str
    seeds: tuple[int, ...]  # seeds that both have, or those of the two rows
    score_a: Spread
    score_b: Spread
    gain: Spread  # A - B, seed by seed: the variation over training runs
    images: Difference | None  # A - B over the test images; None if arrays are missing
    verdict: Verdict  # what may be said about the gain
    mcnemar: tuple[
        McNemar, ...
    ]  # one per seed, of plain accuracy; empty if arrays are missing or images have no single class
    marks: tuple[str, ...]  # other differences between the two
    setting: str  # of A: its grid, and options such as '5 folds'


@dataclass(frozen=True)
class Cost:
    """The cost of a probe: the maximum of parameters over seeds, and the mean time."""

    parameters: int
    seconds: float
    bytes: int  # size of the tokens it reads in the cache


def setting(row: Row) -> Setting:
    """The setting of a row."""
    return Setting(row.model, row.dataset, row.grid, row.metric, row.made_from, row.options(), row.protocol)


def cost(rows: Sequence[Row]) -> Cost:
    """The cost of one probe, from one row per seed."""
    return Cost(
        max(row.parameters for row in rows),
        sum(row.seconds for row in rows) / len(rows),
        max(row.bytes for row in rows),
    )


def by_dataset(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """{probe: {data set: mean test score over seeds}}, as `gain_tests` and `ranking` need them, for one model and setting.

    Raises:
        BadData: rows of several models, grids, options, metrics or protocols, whose scores do not belong in one table.
    """
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    kinds: dict[str, set[str]] = defaultdict(set)
    features: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for row in rows:
        shared = setting(row)
        values = (shared.model, shared.grid, shared.metric, shared.options, shared.protocol)
        for name, value in zip(("models", "grids", "metrics", "options", "protocols"), values, strict=True):
            kinds[name].add(str(value) or "none")
        features[shared.dataset].add(shared.features)
        scores[row.probe][row.dataset].append(row.test)
    if mixed := [f"{name} {', '.join(sorted(values))}" for name, values in kinds.items() if len(values) > 1]:
        raise BadData(f"these rows cannot stand in one table, they are of {' and '.join(mixed)}; choose one of each")
    if several := [name for name, keys in features.items() if len(keys) > 1]:
        raise BadData(
            f"rows on {', '.join(several)} were made from several sets of features; allowed: one a data set. Take the rows "
            "of one, by their 'features'"
        )
    return {probe: {name: float(np.mean(v)) for name, v in sets.items()} for probe, sets in scores.items()}


def compare(
    results: Results, a: Row | Sequence[Row], b: Row | Sequence[Row], *, bootstrap: Bootstrap = BOOTSTRAP
) -> Comparison:
    """Compare two probes on the same test images: scores, the paired difference and its uncertainty.

    `a` and `b` are a row each, or rows of one probe, one per seed; only seeds that both have count. `results` holds the
    arrays of the test images.

    Raises:
        BadData: the two differ in data, images, metric or protocol.
    """
    rows_a, rows_b = _paired([a] if isinstance(a, Row) else list(a), [b] if isinstance(b, Row) else list(b))
    one, other = rows_a[0], rows_b[0]
    _comparable(one, other)
    bootstrap = replace(bootstrap, folds=one.folds)
    image_difference: Difference | None = None
    tests: tuple[McNemar, ...] = ()
    marks = tuple(differences(rows_a, rows_b).values())
    gain, missing = Spread.of(x.test - y.test for x, y in zip(rows_a, rows_b, strict=True)), ""
    try:
        arrays_a, arrays_b = ([results.arrays(row) for row in rows] for rows in (rows_a, rows_b))
    except ResultsUnusable as err:
        missing = str(err)
        marks = (*marks, f"no interval: {err}")
    else:
        labels = arrays_a[0]["labels"]
        # One of the two may have been made without groups; the images are no more independent for that.
        groups = next((arrays["groups"] for arrays in (*arrays_a, *arrays_b) if "groups" in arrays), None)
        if not all(np.array_equal(labels, arrays["labels"]) for arrays in (*arrays_a, *arrays_b)):
            raise BadData(
                f"{one.id} and {other.id} were tested on other images, or in another order; allowed: the same test "
                "split. Extract and probe both again from the data set as it is now"
            )
        predictions_a, predictions_b = ([arrays["probabilities"] for arrays in seeds] for seeds in (arrays_a, arrays_b))
        image_difference = uncertainty.difference(
            labels, predictions_a, predictions_b, metric=one.metric, bootstrap=bootstrap, groups=groups
        )
        marks = (*marks, *filter(None, [image_difference.refused]))
        if labels.ndim == 1 and labels.dtype.kind != "f":  # images are right or wrong
            if reason := _no_mcnemar(one, groups):
                marks = (*marks, reason)
            else:
                pairs = zip(predictions_a, predictions_b, strict=True)
                tests = tuple(uncertainty.mcnemar(labels, x, y) for x, y in pairs)
    return Comparison(
        model=one.model if one.model == other.model else f"{one.model} / {other.model}",
        dataset=one.dataset,
        metric=one.metric,
        a=one.probe,
        b=other.probe,
        seeds=tuple(dict.fromkeys(row.seed for row in (*rows_a, *rows_b))),
        score_a=Spread.of(row.test for row in rows_a),
        score_b=Spread.of(row.test for row in rows_b),
        gain=gain,
        images=image_difference,
        verdict=verdict(image_difference, metric=one.metric, classes=one.classes, spread=gain.sd, missing=missing),
        mcnemar=tests,
        marks=marks,
        setting=", ".join(filter(None, [f"{one.grid} grid", one.options()])),
    )


def _no_mcnemar(row: Row, groups: np.ndarray | None) -> str:
    """Why McNemar's test, which takes images to be independent, would find too much; empty if it would not."""
    if row.folds is not None:
        return f"no McNemar test: the probes of {row.folds} folds share training images"
    return "" if groups is None else "no McNemar test: it counts images one by one, and those of one group are alike"


def compare_probes(
    results: Results, rows: Sequence[Row], a: str, b: str, *, bootstrap: Bootstrap = BOOTSTRAP
) -> list[Comparison]:
    """Probe `a` against probe `b` in every setting among `rows` that has both with a seed in common; by model, then data set.

    Raises:
        BadData: there is no such setting.
    """
    grouped: dict[Setting, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.probe in (a, b):
            grouped[setting(row)][row.probe].append(row)
    both = {
        key: by_probe
        for key, by_probe in sorted(grouped.items(), key=lambda item: item[0][:2])
        if {row.seed for row in by_probe[a]} & {row.seed for row in by_probe[b]}
    }
    if not both:
        existing = ", ".join(sorted({row.probe for row in rows})[:12])
        raise BadData(
            f"no data set has rows of both {a} and {b} with a seed, grid and protocol in common; there are rows of {existing}. "
            f"Make them with `mlfusion probe --probe {a},{b}`"
        )
    return [compare(results, by_probe[a], by_probe[b], bootstrap=bootstrap) for by_probe in both.values()]


def compare_named(
    results: Results, a: str, b: str, *, bootstrap: Bootstrap = BOOTSTRAP, **filters: str | None
) -> list[Comparison]:
    """Compare two probes in every setting of the rows that pass the filters; or two results, if either is an id.

    Raises:
        BadData: they cannot be compared.
        UnknownName: no result has this id.
        ResultsUnusable: there are no results.
    """
    probe_a, probe_b = _probe_name(a), _probe_name(b)
    if probe_a and probe_b:
        return compare_probes(results, results.require(**filters), probe_a, probe_b, bootstrap=bootstrap)
    return [compare(results, results.named(a), results.named(b), bootstrap=bootstrap)]


def _probe_name(word: str) -> str | None:
    """The name of a probe, or None if it is not one: ids have no '/'."""
    name = full_name(word)
    return name if "/" in name else None


def over_datasets(comparisons: Sequence[Comparison]) -> dict[str, SignedRank | str]:
    """{model: one-sided signed-rank test that A is better than B over its data sets, or why there is none}."""
    by_model: dict[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        by_model[comparison.model].append(comparison)
    return {model: _over_datasets(compared) for model, compared in by_model.items()}


def _over_datasets(comparisons: Sequence[Comparison]) -> SignedRank | str:
    counts = Counter(one.dataset for one in comparisons)
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        return (
            f"a signed-rank test counts every data set once, and {', '.join(repeated)} is compared in several settings; choose "
            "one with --grid, or remove the other results with mlfusion results rm"
        )
    return wilcoxon_or_reason([one.gain.mean for one in comparisons])


@dataclass(frozen=True)
class FairTable:
    """The largest table of scores without a gap: the same data sets for every probe."""

    scores: dict[str, list[float]]  # {probe: score on each data set}
    datasets: tuple[str, ...]
    probes_left_out: tuple[str, ...]
    datasets_left_out: tuple[str, ...]


def fair_table(table: Mapping[str, Mapping[str, float]], *, baseline: str) -> FairTable:
    """The probes and data sets of {probe: {data set: score}} that make the largest table without a gap.

    A table that can be ranked comes before one that cannot, and one with the baseline before one without; then the number of
    its scores counts, then that of its data sets.
    """
    choices: set[frozenset[str]] = set()  # what several probes have in common
    for sets in {frozenset(sets) for sets in table.values()}:
        choices |= {sets & choice for choice in choices} | {sets}

    def probes_on(datasets: frozenset[str]) -> list[str]:
        return [probe for probe, sets in table.items() if datasets <= sets.keys()]

    def size(datasets: frozenset[str]) -> tuple[bool, bool, int, int, list[str]]:
        probes = probes_on(datasets)
        ranked = len(probes) >= MIN_PROBES and len(datasets) >= MIN_DATASETS
        return ranked, baseline in probes, len(probes) * len(datasets), len(datasets), sorted(datasets)

    best = max(choices, key=size, default=frozenset())
    datasets, probes = tuple(sorted(best)), probes_on(best)
    every = {name for sets in table.values() for name in sets}
    return FairTable(
        {probe: [table[probe][name] for name in datasets] for probe in probes},
        datasets,
        tuple(sorted(table.keys() - set(probes))),
        tuple(sorted(every - best)),
    )


@dataclass(frozen=True)
class ProbeRanking:
    """Mean ranks of probes over data sets, and tests of their gains over the baseline."""

    ranking: Ranking
    against: tuple[GainTest, ...]  # one per other probe; empty without rows of the baseline
    baseline: str
    left_out: tuple[str, ...]  # probes without rows on every ranked data set
    datasets_left_out: tuple[str, ...]  # data sets on which not every ranked probe was run
    marks: tuple[str, ...]  # sentences: rows of older protocols that do not count, differences between the rows that do


def rank(rows: Iterable[Row], *, baseline: str, level: float = 0.95) -> ProbeRanking:
    """Rank the probes of one model and setting over data sets, by mean test scores, in the largest `fair_table`.

    Several seeds of a probe are averaged. Of rows of several protocols those of the newest count. `baseline` is the name or
    alias of the probe that gains are counted from, `level` the confidence level of the tests: 0.95 means p below 0.05.

    Raises:
        BadData: the scores do not belong in one table, or the data sets are too few.
    """
    every = list(rows)
    newest = max((row.protocol for row in every), default=0)
    rows, baseline = [row for row in every if row.protocol == newest], _probe_name(baseline) or baseline
    table = fair_table(by_dataset(rows), baseline=baseline)
    base = table.scores.get(baseline, [])
    others = {probe: values for probe, values in table.scores.items() if base and probe != baseline}
    gains = {probe: np.subtract(values, base).tolist() for probe, values in others.items()}
    marks = [
        f"the ranked rows differ in {name}: {', '.join(sorted(values))}"
        for name in ("code", "precision")
        if len(values := {str(getattr(row, name)) for row in rows if row.probe in table.scores}) > 1
    ]
    cases = {probe: {(row.dataset, row.seed) for row in rows if row.probe == probe} for probe in table.scores}
    ranked = [{case for case in each if case[0] in table.datasets} for each in cases.values()]
    if any(each != ranked[0] for each in ranked):
        marks.append("the ranked probes do not have the same seeds")
    if older := len(every) - len(rows):
        marks.insert(
            0, f"{plural(older, 'row')} of protocols before {newest} cannot count: protocols measure differently"
        )
    return ProbeRanking(
        ranking=ranking(table.scores, level=1 - level),
        against=tuple(gain_tests(gains, level=1 - level)),
        baseline=baseline,
        left_out=table.probes_left_out,
        datasets_left_out=table.datasets_left_out,
        marks=tuple(marks),
    )


def _paired(a: list[Row], b: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of the seeds that both have, by seed; or the two rows themselves if each has one."""
    if len(a) == len(b) == 1:
        return a, b
    by_seed = [{row.seed: row for row in rows} for rows in (a, b)]
    if shared := sorted(by_seed[0].keys() & by_seed[1].keys()):
        return [by_seed[0][s] for s in shared], [by_seed[1][s] for s in shared]
    raise BadData("the two have no seed in common; probe both with the same --seeds")


def _comparable(a: Row, b: Row) -> None:
    """Raise `BadData` for rows that cannot be compared."""
    same = "allowed: rows of the same test images, metric and protocol"
    if a.metric != b.metric:
        raise BadData(f"{a.id} is measured by {a.metric}, {b.id} by {b.metric}; {same}")
    if a.dataset != b.dataset or a.images.test != b.images.test:
        raise BadData(
            f"{a.id} was tested on {a.images.test} images of {a.dataset}, {b.id} on {b.images.test} of "
            f"{b.dataset}; {same}"
        )
    if a.folds != b.folds:
        raise BadData(
            f"{a.id} was tested in {a.folds or 'no'} folds, {b.id} in {b.folds or 'no'}; {same}, in as many folds. Probe both "
            "with the same --folds"
        )
    if a.sources.test != b.sources.test or (a.folds and a.sources.train != b.sources.train):
        raise BadData(
            f"{a.dataset} changed between {a.id} and {b.id}: they were tested on other images; {same}. Extract and "
            "probe both again"
        )
    if a.protocol != b.protocol:
        raise BadData(
            f"{a.id} was made by protocol {a.protocol}, {b.id} by protocol {b.protocol}, which measure differently; {same}. "
            "Make the older one again with the same `mlfusion probe`"
        )


def differences(a: Sequence[Row], b: Sequence[Row]) -> dict[str, str]:
    """Differences between rows of one setting, paired by seed, which may explain a difference in scores, by field.

    {'code': 'code: abc against def'}; an option that was not used is 'none'. `compare` and reports mark them.
    """
    found: dict[str, str] = {}
    objects = [[msgspec.to_builtins(row) for row in rows] for rows in (a, b)]  # without options at their default
    for name in MARKED:
        by_row = [[_shown(row.get(name, "none")) for row in rows] for rows in objects]
        if by_row[0] == by_row[1]:
            continue
        values_a, values_b = (", ".join(sorted(set(values))) for values in by_row)
        where = " in other seeds" if values_a == values_b else ""
        found[name] = f"{name}: {values_a} against {values_b}{where}"
    return found


def _shown(value: Any) -> str:
    """A field as a difference names it: of groups their column and their digests."""
    if isinstance(value, dict):
        return f"{value['column']} ({'+'.join(digest[:6] for digest in value['digests'])})"
    return str(value)
