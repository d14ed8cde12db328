"""Uncertainty over the test images of one data set: how much another sample of images would change a score or difference.

`interval` is of one score, `difference` and `mcnemar` are of two probes on the same images. docs/method.md shows how often the
intervals contain the true value, and how often the tests are wrong, in simulated worlds of 8 to 1,000 images. Images of one
group, such as the slices of a patient, are no independent sample: with `groups` whole groups are drawn and swapped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from mlfusion.errors import BadData
from mlfusion.shapes import Int
from mlfusion.statistics.measures import AVERAGES, SUMS, Measure, check, full_score, image_terms, measure
from mlfusion.statistics.resampling import BOOTSTRAP, Bootstrap, Cells, Units
from mlfusion.system.words import plural

RANKS = ("auroc", "mean_average_precision")
"""Metrics that depend on the order of the probabilities of a class alone."""

MIN_EFFECTIVE = 20
"""Minimum of `effective_images` for a verdict, and for an interval of a difference. Below it two probes with equal balanced
accuracy are told apart in up to 70 % of the cases, if one is better on a rare class and the other on the frequent ones."""

MIN_DIFFERENT = 6
"""Minimum number of images on which two probes give different answers, for an interval of their difference."""

MIN_OUTCOMES = 10
"""Minimum number of right and of wrong images for a bootstrap interval: with fewer, resamples have too few different scores."""

FEW_TEST_IMAGES = 300
"""Number of test images below which folds are recommended: the interval of an accuracy of 80 % is then ± 4.5 points or
more, and the gains of the study are 5.8 points on average."""

BY_CLASS_MEANS = ("balanced_accuracy", "macro_f1", "auroc", "mean_average_precision")
"""Metrics that are means over classes or labels, so that a rare one weighs as much as a frequent one."""

_ERRORS = ("mae", "rmse", "loss")  # metrics that have no upper end
_ROUNDING = 1e-12  # differences of two swaps that differ by less, as a share of the scores, are equal up to rounding
_ALL_EQUAL = (
    "no interval: almost every sample of these test images has the same score, so a bootstrap shows no variation"
)

Predictions = np.ndarray | Sequence[np.ndarray]
"""Probabilities [N, C], or numbers [N]; or a sequence of them, one per seed."""


@dataclass(frozen=True)
class Interval:
    """A score with its interval over test images."""

    value: float
    low: float | None
    high: float | None
    level: float  # such as 0.95
    resamples: int  # 0: the interval is Wilson's
    refused: str | None = None  # why there is no interval


@dataclass(frozen=True)
class Evidence:
    """The test images behind a difference, which decide whether it can be called a gain or a loss."""

    images: int  # test images, or groups of them
    different: int  # those on which A and B differ
    effective: float  # see `effective_images`
    by_class: tuple[int, ...]  # images of each class or label; empty for a metric that is a mean over images
    noun: str = "test image"


@dataclass(frozen=True)
class Difference:
    """Scores of A and B on the same images, and A - B with its bootstrap interval and its two-sided p-value."""

    a: float
    b: float
    value: float  # a - b
    low: float | None
    high: float | None
    level: float
    p: float  # of the permutation test that swaps the answers of A and B
    mid_p: float  # the same, with half of the swaps whose difference is as large; verdicts follow from it
    resamples: int
    evidence: "Evidence"
    refused: str | None = None  # why there is no interval


def few_test_images(images: int) -> str:
    """A sentence about a small test split, without its end."""
    return f"The test split has {plural(images, 'image')}, too few to tell a gain of some points; folds test every image once"


@dataclass(frozen=True)
class McNemar:
    """Counts of images by which of two probes is right, and the exact two-sided p-value of equal accuracy."""

    both: int
    only_a: int
    only_b: int
    neither: int
    p: float
    metric: str = "accuracy"  # whatever metric the rows report


def interval(
    labels: np.ndarray,
    predictions: Predictions,
    *,
    metric: str = "balanced_accuracy",
    bootstrap: Bootstrap = BOOTSTRAP,
    groups: np.ndarray | None = None,
) -> Interval:
    """An interval over test images: a bootstrap's, or Wilson's for an accuracy with few right or few wrong images.

    Args:
        labels: classes [N] in 0..C-1; several labels per image, 0 or 1 [N, C]; or numbers [N].
        predictions: with several seeds the interval is that of their mean; each resample draws the same images for all.
        metric: one of `METRICS`.
        bootstrap: how images are resampled.
        groups: the group of each image [N], such as its patient: whole groups are drawn, and the least numbers of images
            below which there is no bootstrap are those of groups. Wilson's interval then counts a group as one image, as if
            its images were all alike. None: every image is its own group.

    Raises:
        BadData: labels, predictions and groups do not match.
        UnknownName: there is no such metric for such labels.
    """
    score = _mean_measure(labels, predictions, metric)
    value, level = full_score(score, len(labels)), bootstrap.level
    units = Units.of_groups(groups, labels)
    means, refused = _means(labels, metric), None
    if metric in ("accuracy", "balanced_accuracy", "macro_f1", "top5"):
        hits = AVERAGES["class"]["top5" if metric == "top5" else "accuracy"]
        right = float(np.mean([hits(labels, answers) for answers in _seeds(predictions)], axis=0).sum())
        if min(right, len(labels) - right) < MIN_OUTCOMES:
            if metric != "macro_f1":
                counts = units.counts(labels) if metric == "balanced_accuracy" else np.array([units.count])
                return Interval(value, *wilson(value, counts[counts > 0] / bootstrap.widening**2, level), level, 0)
            refused = (
                f"no interval: a bootstrap needs {MIN_OUTCOMES} right and {MIN_OUTCOMES} wrong test images or more"
            )
    if refused := refused or units.refusal(means):
        return Interval(value, None, None, level, bootstrap.resamples, refused)
    low, high = bootstrap.limits(score, units, means)
    if low == high:
        return Interval(value, None, None, level, bootstrap.resamples, _ALL_EQUAL)
    if bootstrap.folds is not None:
        low, high = bootstrap.widened(value, low, high)
        # A widened interval may lead out of what a score can be.
        high = high if metric in _ERRORS else min(high, 1.0)
        low = low if metric == "r2" else max(low, 0.0)
    return Interval(value, low, high, level, bootstrap.resamples)


def difference(
    labels: np.ndarray,
    a: Predictions,
    b: Predictions,
    *,
    metric: str = "balanced_accuracy",
    bootstrap: Bootstrap = BOOTSTRAP,
    groups: np.ndarray | None = None,
) -> Difference:
    """A - B on the same images, so that the difficulty of images cancels.

    Each resample of the interval draws the same images for both. The p-value is that of a permutation test: if A and B are
    alike, their answers to an image, of all seeds, may be swapped without effect. It is the share of swaps with a difference as
    large, among all swaps (up to ten images that matter) or `resamples` of them. Its level holds for any number of images.
    The mid-p value counts half of those with an equal difference (Lancaster 1961, Biometrika 48; Fagerland, Lydersen and Laake
    2013, BMC Medical Research Methodology 13:91): the plain one is too large where few images differ.
    With `groups`, answers to all images of a group are swapped together. Arguments and errors are those of `interval`; A and B
    have as many seeds. With folds the difference is divided by `Bootstrap.widening` before it is compared.
    """
    if len(_seeds(a)) != len(_seeds(b)):
        raise BadData(f"A has {len(_seeds(a))} seeds, B has {len(_seeds(b))}; allowed: predictions of the same seeds")
    score_a, score_b = _mean_measure(labels, a, metric), _mean_measure(labels, b, metric)
    a_score, b_score = full_score(score_a, len(labels)), full_score(score_b, len(labels))
    value, means = a_score - b_score, _means(labels, metric)
    units = Units.of_groups(groups, labels)
    by_class, different = units_by_class(labels, metric, units), _different(labels, a, b, metric, units)
    effective = effective_images(by_class, units.count)
    if metric == "auroc" and np.count_nonzero(by_class) < 2:
        effective = 0.0  # there is no pair of images of two classes
    evidence = Evidence(units.count, different, effective, by_class, units.noun)
    refused = units.refusal(means) or _too_alike(evidence) or _too_rare(evidence)
    low, high = (None, None)
    if not refused:
        if groups is None and metric in ("accuracy", "balanced_accuracy"):
            low, high = bootstrap.limits(*_cells(labels, a, b, metric), means)
        else:
            low, high = bootstrap.limits(lambda weights: score_a(weights) - score_b(weights), units, means)
        if low == high:
            low, high, refused = None, None, _ALL_EQUAL
        else:
            low, high = bootstrap.widened(value, low, high)
    unit = 0.0 if metric in ("mae", "rmse") else 1.0  # errors have the unit of the labels, other scores end at 1
    rounding = _ROUNDING * max(unit, abs(a_score), abs(b_score))
    kinds, gaps = _gaps(labels, a, b, metric, units)
    p, mid_p = _swap_p(kinds, gaps, abs(value) / bootstrap.widening, rounding, bootstrap)
    level, resamples = bootstrap.level, bootstrap.resamples
    return Difference(a_score, b_score, value, low, high, level, p, mid_p, resamples, evidence, refused)


def effective_images(by_class: Sequence[int], images: int) -> float:
    """The number of images of one class that a mean over classes of these sizes varies like.

    It is (Σ 1/n)² / Σ 1/n³, the degrees of freedom of Welch and Satterthwaite (1946) for classes of equal variance: all images
    for classes of equal size, about those of the rarest class where one is rare. Classes without images do not count. Without
    classes it is the number of images.
    """
    counts = np.array([count for count in by_class if count], np.float64)
    return float((1 / counts).sum() ** 2 / (1 / counts**3).sum()) if len(counts) else float(images)


def mcnemar(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> McNemar:
    """The exact test of McNemar (1947): is each probe right on half of the images that only one gets right?

    `labels` are classes [N], `a` and `b` probabilities [N, C].

    Raises:
        BadData: they have other shapes, or are of different images.
    """
    from scipy.stats import binomtest

    for probabilities in (a, b):
        check(labels, probabilities)
    if labels.ndim != 1 or labels.dtype.kind == "f":
        raise BadData("McNemar's test counts images that are right or wrong; allowed: one class an image")
    right_a, right_b = a.argmax(1) == labels, b.argmax(1) == labels
    neither, only_b, only_a, both = np.bincount(2 * right_a + right_b, minlength=4).tolist()
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return McNemar(both, only_a, only_b, neither, p)


def _swap_p(
    kinds: np.ndarray, gaps: Measure, value: float, rounding: float, bootstrap: Bootstrap
) -> tuple[float, float]:
    """The shares of swaps with a difference of at least `value`, and with half of those whose difference is equal to it."""
    count = at_least = larger = 0
    for swapped in bootstrap.swaps(kinds):
        found = gaps(swapped)
        at_least += int((found >= value - rounding).sum())
        larger += int((found > value + rounding).sum())
        count += len(swapped)
    if count != 2 ** int(
        kinds.sum()
    ):  # the answers as they are are one more swap; among all swaps they are counted already
        at_least, count = at_least + 1, count + 1
    p = at_least / count
    return p, p if value <= rounding else (larger + at_least) / (2 * count)


def _ranks(probabilities: np.ndarray) -> np.ndarray:
    """The rank of each probability among those of its class, equal for equal ones [N, C] (Venkatraman and Begg 1996)."""
    return np.stack([np.unique(column, return_inverse=True)[1] for column in probabilities.T], axis=1)


def _cells(labels: np.ndarray, a: Predictions, b: Predictions, metric: str) -> tuple[Measure, Cells]:
    """The difference of two accuracies or balanced accuracies by the counts of images [B, M], and these counts [M]."""
    pairs = list(zip(_seeds(a), _seeds(b), strict=True))
    gains = np.sum([(x.argmax(1) == labels).astype(int) - (y.argmax(1) == labels) for x, y in pairs], axis=0)
    classes = labels if metric == "balanced_accuracy" else np.zeros_like(labels)
    kinds = 2 * len(pairs) + 1  # of gains, from -seeds to seeds
    cells, counts = np.unique(classes * kinds + gains + len(pairs), return_counts=True)
    starts, of_cells = np.flatnonzero(np.diff(cells // kinds, prepend=-1)), cells % kinds - len(pairs)

    def score(weights: np.ndarray) -> np.ndarray:
        gained, images = (np.add.reduceat(part, starts, axis=1) for part in (weights * of_cells, weights))
        present = images > 0
        return (gained / np.where(present, images, 1)).sum(1) / (len(pairs) * present.sum(1))

    return score, Cells(counts)


def _gaps(
    labels: np.ndarray, a: Predictions, b: Predictions, metric: str, units: Units
) -> tuple[Int[np.ndarray, " M"], Measure]:
    """The units whose swap counts, by kind [M], and numbers of swaps [B, M] → differences without their sign [B].

    Units are of one kind if their swap changes the difference by as much: of an accuracy there are few kinds.
    """
    pairs = list(zip(_seeds(a), _seeds(b), strict=True))
    if metric in SUMS:
        gains = np.mean([image_terms(labels, x, metric) - image_terms(labels, y, metric) for x, y in pairs], axis=0)
        gains = np.bincount(units.of, gains, units.count)
        found, kinds = np.unique(np.abs(gains[gains != 0]), return_counts=True)
        return kinds, lambda swapped: np.abs((kinds - 2.0 * swapped) @ found)
    if metric in RANKS:  # the probabilities of A and B may have other scales, of which these metrics know nothing
        pairs = [(_ranks(x), _ranks(y)) for x, y in pairs]
    # The answers of A stand above those of B, weighted 0 or 1.
    score = _mean_measure(np.concatenate([labels, labels]), [np.concatenate(pair) for pair in pairs], metric)

    def gaps(swapped: np.ndarray) -> np.ndarray:
        swapped = swapped[:, units.of]
        first = np.hstack([~swapped, swapped]).astype(np.float64)
        return np.abs(score(first) - score(1 - first))

    return np.ones(units.count, np.int64), gaps


def wilson(value: float, counts: np.ndarray, level: float) -> tuple[float, float]:
    """The score interval of Wilson (1927) for a mean of C recalls, with `counts` images each.

    The mean varies like a share of n = C² / Σ(1 / count) images; with one group, n is its number of images.
    """
    from scipy.special import ndtri

    z2 = float(ndtri((1 + level) / 2)) ** 2
    images = len(counts) ** 2 / float((1 / counts).sum())
    middle = (value + z2 / (2 * images)) / (1 + z2 / images)
    half = sqrt(z2 * (value * (1 - value) / images + z2 / (4 * images**2))) / (1 + z2 / images)
    return min(value, max(0.0, middle - half)), max(value, min(1.0, middle + half))


def _seeds(predictions: Predictions) -> list[np.ndarray]:
    return [predictions] if isinstance(predictions, np.ndarray) else list(predictions)


def _means(labels: np.ndarray, metric: str) -> int:
    """The number of means that a metric is made of: one for each class, or a single one."""
    return len(np.unique(labels)) if metric in ("balanced_accuracy", "macro_f1", "auroc") else 1


def units_by_class(labels: np.ndarray, metric: str, units: Units) -> tuple[int, ...]:
    """The number of units of each class or label, for a metric that is a mean over these."""
    if metric not in BY_CLASS_MEANS or labels.dtype.kind == "f":
        return ()
    if labels.ndim == 2:
        return tuple(len(np.unique(units.of[column > 0])) for column in labels.T)
    return tuple(units.counts(labels).tolist())


def _different(labels: np.ndarray, a: Predictions, b: Predictions, metric: str, units: Units) -> int:
    """The number of units on which A and B differ in what the metric counts."""
    pairs = list(zip(_seeds(a), _seeds(b), strict=True))
    if metric in ("accuracy", "balanced_accuracy"):
        differs = np.any([(x.argmax(1) == labels) != (y.argmax(1) == labels) for x, y in pairs], axis=0)
    else:
        differs = np.any([(x != y).reshape(len(labels), -1).any(1) for x, y in pairs], axis=0)
    return len(np.unique(units.of[differs]))


def _too_alike(evidence: Evidence) -> str | None:
    """Why the answers differ on too few units for an interval of the difference, or None."""
    if evidence.different >= MIN_DIFFERENT:
        return None
    return f"no interval of the difference: {differs_on(evidence)}, and a bootstrap needs {MIN_DIFFERENT} or more"


def _too_rare(evidence: Evidence) -> str | None:
    """Why the rarest class has too few units for an interval of the difference, or None."""
    if evidence.effective >= MIN_EFFECTIVE:
        return None
    rarest = plural(min(filter(None, evidence.by_class), default=evidence.images), evidence.noun)
    return f"no interval of the difference: its rarest class has {rarest}, and a mean over classes needs about {MIN_EFFECTIVE}"


def differs_on(evidence: Evidence) -> str:
    """'the two differ on 3 of 120 test images'."""
    return f"the two differ on {evidence.different} of {plural(evidence.images, evidence.noun)}"


def _mean_measure(labels: np.ndarray, predictions: Predictions, metric: str) -> Measure:
    """The mean of a metric over seeds, as a function of weights."""
    scores = [measure(labels, of_seed, metric) for of_seed in _seeds(predictions)]
    if not scores:
        raise BadData("no predictions; allowed: those of one seed or more")
    return scores[0] if len(scores) == 1 else lambda weights: np.mean([score(weights) for score in scores], axis=0)
