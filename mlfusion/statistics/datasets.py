"""Tests over data sets: is one probe better than another in general? The unit is a data set, with its mean over seeds.

The tests follow Demšar (2006), Statistical Comparisons of Classifiers over Multiple Data Sets: signed ranks for two probes,
Friedman's test and the critical difference of Nemenyi for more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

from mlfusion.errors import BadData

MIN_DATASETS = 6
"""Minimum number of data sets for a test: with fewer, no two-sided signed-rank test can give p < 0.05."""

MIN_PROBES = 3
"""Minimum number of probes for ranks: two are compared by a signed-rank test."""

ALPHA = 0.05

_LAST_BITS = 1e-12  # of the largest score; one image in a million of a thousand classes is a difference of 1e-9


@dataclass(frozen=True)
class SignedRank:
    """Wilcoxon's signed-rank test of n differences against 0."""

    n: int
    mean: float
    median: float
    p: float
    alternative: str


@dataclass(frozen=True)
class GainTest:
    """The test of a probe's gains over the baseline, one per data set; p and q are None if there are too few data sets."""

    name: str
    n: int
    mean: float  # mean of the gains
    median: float
    p: float | None  # one-sided, for a gain above 0
    q: float | None  # p adjusted for all probes tested together (Benjamini and Hochberg)
    significant: bool  # q below the level
    refused: str | None  # why p is None


@dataclass(frozen=True)
class RankedPair:
    """Two ranked probes, with the p-values of the hypothesis that they are equally good."""

    a: str
    b: str
    nemenyi: float
    holm: float | None  # of Wilcoxon's two-sided test, adjusted by Holm's method; None: too few differ to be tested


@dataclass(frozen=True)
class Ranking:
    """Mean ranks over data sets, 1 the best, as a critical-difference diagram shows them."""

    names: tuple[str, ...]  # sorted by mean rank
    ranks: tuple[float, ...]
    means: tuple[float, ...]  # mean scores
    datasets: int
    friedman: float | None  # p-value of the hypothesis that all are equally good; None: all are equal everywhere
    critical_difference: float  # smallest significant difference of two mean ranks, by Nemenyi
    level: float
    groups: tuple[tuple[str, ...], ...]  # neighbours that do not differ significantly; at least two each
    pairs: tuple[RankedPair, ...]


def merge_last_bits(values: ArrayLike) -> np.ndarray:
    """Values [...] as float64, with those that differ in nothing but their last bits made equal.

    Every test and every rank reads scores through this function, so that all of them see the same ties: the mean of the same
    seeds in another order differs by 1e-16. Rounding to decimals would not do, since it splits such a pair at a half.

    Raises:
        BadData: one of them is no finite number.
    """
    numbers = np.asarray(values, np.float64)
    if not np.isfinite(numbers).all():
        raise BadData(
            "a score that is infinite or not a number can be neither ranked nor tested; allowed: finite scores"
        )
    order = np.argsort(numbers, axis=None, kind="stable")
    ascending = numbers.ravel()[order]
    first = np.diff(ascending, prepend=-np.inf) > _LAST_BITS * max(1.0, np.abs(ascending).max(initial=0.0))
    merged = np.empty_like(ascending)
    merged[order] = ascending[np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))]
    return merged.reshape(numbers.shape)


def wilcoxon(differences: Sequence[float], *, alternative: str = "greater") -> SignedRank:
    """Test whether differences, one per data set, are above 0: exactly, for any number of them, with ties or without.

    Differences of 0, up to the last bits, are left out, as Wilcoxon did; the p-value is that of the signs of the others.
    `alternative` is 'greater', 'less' or 'two-sided'.

    Raises:
        BadData: fewer than six differences are not 0.
    """
    from scipy.stats import rankdata

    values = np.asarray(differences, np.float64)
    sizes = merge_last_bits([0.0, *np.abs(values)])[1:]
    nonzero = values[sizes > 0]
    if len(nonzero) < MIN_DATASETS:
        equal = f" ({len(values) - len(nonzero)} of {len(values)} are 0)" if len(nonzero) < len(values) else ""
        raise BadData(
            f"a signed-rank test of {len(nonzero)} data set{'s' if len(nonzero) != 1 else ''}{equal} is refused: with fewer "
            f"than {MIN_DATASETS} it cannot give a two-sided p below 0.05, whatever they show. Probe more data sets, or look "
            "at each with `mlfusion results compare`, which tests over images"
        )
    doubled = np.rint(2 * rankdata(sizes[sizes > 0])).astype(int)  # ties share half ranks: these are whole
    chances, positive = _sum_chances(doubled), int(doubled[nonzero > 0].sum())
    tails = {"greater": float(chances[positive:].sum()), "less": float(chances[: positive + 1].sum())}
    p = min(1.0, tails.get(alternative, 2 * min(tails.values())))
    return SignedRank(len(values), float(values.mean()), float(np.median(values)), p, alternative)


def _sum_chances(ranks: np.ndarray) -> np.ndarray:
    """The chance of each sum of the positive ranks, from 0 to the sum of all, if every sign is a fair coin."""
    chances = np.zeros(int(ranks.sum()) + 1)
    chances[0] = 1.0
    for rank in ranks:
        chances[rank:] = (chances[rank:] + chances[:-rank]) / 2
        chances[:rank] /= 2
    return chances


def wilcoxon_or_reason(differences: Sequence[float], alternative: str = "greater") -> SignedRank | str:
    """The test, or why it is refused."""
    try:
        return wilcoxon(differences, alternative=alternative)
    except BadData as err:
        return str(err)


def adjust(p: Sequence[float]) -> np.ndarray:
    """Adjust p-values so that on average at most the share α of those below α is false (Benjamini and Hochberg 1995)."""
    from scipy.stats import false_discovery_control

    return false_discovery_control(p, method="bh") if len(p) else np.empty(0)


def holm(p: Sequence[float]) -> np.ndarray:
    """Adjust p-values so that the chance of any false one below α is at most α (Holm 1979)."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values))))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def gain_tests(gains: Mapping[str, Sequence[float]], *, level: float = ALPHA) -> list[GainTest]:
    """Test the gains of several probes over one baseline by one-sided signed-rank tests, adjusted together.

    `gains` holds each probe's gains over the baseline, one per data set (mean over seeds); `level` is the false discovery rate.
    """
    tests = {name: wilcoxon_or_reason(values) for name, values in gains.items()}
    p_values = {name: test.p for name, test in tests.items() if isinstance(test, SignedRank)}
    adjusted = dict(zip(p_values, adjust(list(p_values.values())).tolist(), strict=True))
    return [
        GainTest(
            name,
            len(values),
            float(np.mean(values)),
            float(np.median(values)),
            p_values.get(name),
            adjusted.get(name),
            adjusted.get(name, 1.0) < level,
            None if name in p_values else str(tests[name]),
        )
        for name, values in gains.items()
    ]


def ranking(scores: Mapping[str, Sequence[float]], *, level: float = ALPHA) -> Ranking:
    """Rank probes, and test which of them differ.

    `scores` holds each probe's score on each data set, for the same data sets in the same order; higher is better.

    Raises:
        BadData: fewer than three probes or six data sets, or not every probe on every data set.
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    names, lengths = list(scores), {len(values) for values in scores.values()}
    if len(lengths) > 1:
        raise BadData(
            "ranks need every probe on every data set; allowed: scores of the same data sets in the same order"
        )
    k, n = len(names), lengths.pop() if lengths else 0
    if k < MIN_PROBES or n < MIN_DATASETS:
        raise BadData(
            f"ranks of {k} probes on {n} data sets are refused: Friedman's test needs {MIN_PROBES} probes, and says nothing of "
            f"fewer than {MIN_DATASETS} data sets. Probe more of them, or compare two probes with `mlfusion results compare`"
        )
    table = merge_last_bits([scores[name] for name in names])  # [k, n]
    ranks = rankdata(-table, axis=0).mean(1)
    friedman = float(friedmanchisquare(*table).pvalue) if np.ptp(table, axis=0).any() else None
    unit = sqrt(k * (k + 1) / (6 * n))
    critical = float(studentized_range.ppf(1 - level, k, np.inf)) / sqrt(2) * unit
    order = np.argsort(ranks, kind="stable").tolist()
    indices = list(combinations(order, 2))
    tests = [wilcoxon_or_reason((table[a] - table[b]).tolist(), "two-sided") for a, b in indices]
    tested = [test.p for test in tests if isinstance(test, SignedRank)]
    adjusted = iter(holm(tested).tolist())
    signed = [next(adjusted) if isinstance(test, SignedRank) else None for test in tests]
    nemenyi = [float(studentized_range.sf(abs(ranks[a] - ranks[b]) / unit * sqrt(2), k, np.inf)) for a, b in indices]
    pairs = tuple(
        RankedPair(names[a], names[b], rank_p, signed_p)
        for (a, b), rank_p, signed_p in zip(indices, nemenyi, signed, strict=True)
    )
    return Ranking(
        tuple(names[i] for i in order),
        tuple(float(ranks[i]) for i in order),
        tuple(float(table[i].mean()) for i in order),
        n,
        friedman,
        critical,
        level,
        tuple(tuple(names[i] for i in order[a:b]) for a, b in _groups(ranks[order], critical)),
        pairs,
    )


def _groups(ranks: np.ndarray, critical: float) -> list[tuple[int, int]]:
    """The longest runs [a, b) of sorted ranks whose ends differ by no more than the critical difference."""
    runs: list[tuple[int, int]] = []
    for a in range(len(ranks)):
        b = int(np.searchsorted(ranks, ranks[a] + critical + 1e-12, side="right"))
        if b - a > 1 and (not runs or b > runs[-1][1]):
            runs.append((a, b))
    return runs
