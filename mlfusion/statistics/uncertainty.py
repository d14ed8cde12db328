"""Uncertainty over the test images of one data set: how much another sample of images would change a score or difference.

`interval` is of one score, `difference` and `mcnemar` are of two probes on the same images. docs/method.md shows how often the
intervals contain the true value, and how often the tests are wrong, in simulated worlds of 8 to 1,000 images. Images of one
group, such as the slices of a patient, are no independent sample: with `groups` whole groups are drawn and swapped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt

import numpy as np

from mlfusion.errors import BadData
from mlfusion.shapes import Int
from mlfusion.statistics.measures import AVERAGES, SUMS, Measure, check, full_score, image_terms, measure
from mlfusion.system.words import plural

MIN_IMAGES = 20
"""Minimum number of test images for a bootstrap interval: with fewer, 95 % intervals contain the true value less often."""

MIN_DIFFERENT = 6
"""Minimum number of images on which two probes give different answers, for an interval of their difference."""

MIN_OUTCOMES = 10
"""Minimum number of right and of wrong images for a bootstrap interval: with fewer, resamples have too few different scores."""

_BLOCK = 500_000  # weights in memory at a time: 4 MB, which fits into a processor's cache
_ROUNDING = 1e-12  # differences of two swaps that differ by less, as a share of the scores, are equal up to rounding
_ALL_EQUAL = (
    "no interval: almost every sample of these test images has the same score, so a bootstrap shows no variation"
)

Predictions = np.ndarray | Sequence[np.ndarray]
"""Probabilities [N, C], or numbers [N]; or a sequence of them, one per seed."""


@dataclass(frozen=True)
class Bootstrap:
    """How test images are resampled, and how many times the answers of two probes are swapped."""

    level: float = 0.95  # share of such intervals that contain the true value
    resamples: int = 2000
    seed: int = 0

    def limits(self, score: Measure, units: "Units", means: int) -> tuple[float, float]:
        """The percentile interval of a score that is a mean over `units`, or over so many means of parts of them.

        A sample of n units varies less around its own mean than around the true one. The percentiles are moved apart
        accordingly, as the interval of Student's t is wider than that of the normal distribution (Hesterberg 2015, The
        American Statistician 69(4), "expanded percentile interval").
        """
        from scipy.special import ndtr, stdtrit  # quicker to import than scipy.stats

        random, block = np.random.default_rng(self.seed), max(1, _BLOCK // units.images)
        found = []
        for start in range(0, self.resamples, block):
            weights = np.empty((min(block, self.resamples - start), units.images))
            for of_resample in weights:
                of_resample[:] = units.draw(random)
            found.append(score(weights))
        freedom = units.count - means
        tail = float(ndtr(sqrt(units.count / freedom) * stdtrit(freedom, (1 - self.level) / 2)))
        low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
        return float(low), float(high)

    def swaps(self, units: int) -> Iterator[np.ndarray]:
        """For which units A and B swap answers [B, units], in blocks: every way if so few, else ways drawn at random."""
        if 2**units <= self.resamples:
            yield np.array(list(product((False, True), repeat=units)))
            return
        random, block = np.random.default_rng(self.seed), max(1, _BLOCK // (2 * units))
        for start in range(0, self.resamples, block):
            yield random.random((min(block, self.resamples - start), units), np.float32) < 0.5


BOOTSTRAP = Bootstrap()


@dataclass(frozen=True, eq=False)
class Units:
    """What a bootstrap draws: single images, or whole groups of them (Davison & Hinkley 1997, section 3.8; Field & Welsh
    2007, JRSS B 69(3), "cluster bootstrap").

    If no group has images of two classes, groups are drawn class by class, so that every class has as many groups in each
    resample as in the data.
    """

    of: Int[np.ndarray, " N"]  # the unit of each image
    strata: tuple[Int[np.ndarray, " _"], ...]  # the units that are drawn together
    noun: str = "test image"

    @classmethod
    def single(cls, images: int) -> "Units":
        """Every image by itself."""
        return cls(np.arange(images), (np.arange(images),))

    @classmethod
    def of_groups(cls, groups: np.ndarray | None, labels: np.ndarray) -> "Units":
        """The groups of images with these labels; every image by itself if `groups` is None.

        Raises:
            BadData: not one group per image.
        """
        if groups is None:
            return cls.single(len(labels))
        if groups.shape != (len(labels),):
            raise BadData(
                f"groups of shape {groups.shape} and {len(labels)} labels; allowed: the group of every image [N]"
            )
        names, of = np.unique(groups, return_inverse=True)
        strata: tuple[np.ndarray, ...] = (np.arange(len(names)),)
        if labels.ndim == 1 and labels.dtype.kind != "f":
            pairs = np.unique(np.column_stack([of, labels]), axis=0)
            if len(pairs) == len(names):  # pure
                strata = tuple(np.flatnonzero(pairs[:, 1] == label) for label in np.unique(labels))
        return cls(of, strata, "test group")

    @property
    def images(self) -> int:
        """N."""
        return len(self.of)

    @property
    def count(self) -> int:
        """The number of units."""
        return sum(map(len, self.strata))

    def draw(self, random: np.random.Generator) -> Int[np.ndarray, " N"]:
        """How often each image is in a resample of as many units."""
        drawn = [stratum[random.integers(len(stratum), size=len(stratum))] for stratum in self.strata]
        return np.bincount(np.concatenate(drawn), minlength=self.count)[self.of]

    def counts(self, labels: np.ndarray) -> Int[np.ndarray, " C"]:
        """The number of units with images of each class."""
        return np.bincount(np.unique(np.column_stack([self.of, labels]), axis=0)[:, 1])

    def refusal(self, means: int) -> str | None:
        """Why there are too few units for an interval of so many means, or None."""
        if min(map(len, self.strata)) < 2 and len(self.strata) > 1:
            return "no interval: the test images of a class are of one group, which shows no variation"
        if self.count >= MIN_IMAGES and self.count > means:
            return None
        needed = max(MIN_IMAGES, means + 1)
        return f"no interval from {plural(self.count, self.noun)}: a bootstrap needs {needed} or more"


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
class Difference:
    """Scores of A and B on the same images, and A - B with its bootstrap interval and its two-sided p-value."""

    a: float
    b: float
    value: float  # a - b
    low: float | None
    high: float | None
    level: float
    p: float  # of the permutation test that swaps the answers of A and B
    resamples: int
    refused: str | None = None  # why there is no interval


@dataclass(frozen=True)
class McNemar:
    """Counts of images by which of two probes is right, and the exact two-sided p-value of equal accuracy."""

    both: int
    only_a: int
    only_b: int
    neither: int
    p: float


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
                return Interval(value, *_wilson(value, counts[counts > 0], level), level, 0)
            refused = (
                f"no interval: a bootstrap needs {MIN_OUTCOMES} right and {MIN_OUTCOMES} wrong test images or more"
            )
    if refused := refused or units.refusal(means):
        return Interval(value, None, None, level, bootstrap.resamples, refused)
    low, high = bootstrap.limits(score, units, means)
    if low == high:
        return Interval(value, None, None, level, bootstrap.resamples, _ALL_EQUAL)
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
    With `groups`, answers to all images of a group are swapped together. Arguments and errors are those of `interval`; A and B
    have as many seeds.
    """
    if len(_seeds(a)) != len(_seeds(b)):
        raise BadData(f"A has {len(_seeds(a))} seeds, B has {len(_seeds(b))}; allowed: predictions of the same seeds")
    score_a, score_b = _mean_measure(labels, a, metric), _mean_measure(labels, b, metric)
    a_score, b_score = full_score(score_a, len(labels)), full_score(score_b, len(labels))
    value, means = a_score - b_score, _means(labels, metric)
    units = Units.of_groups(groups, labels)
    refused = units.refusal(means) or _too_alike(labels, a, b, metric, units)
    low, high = (None, None)
    if not refused:
        low, high = bootstrap.limits(lambda weights: score_a(weights) - score_b(weights), units, means)
        if low == high:
            low, high, refused = None, None, _ALL_EQUAL
    unit = 0.0 if metric in ("mae", "rmse") else 1.0  # errors have the unit of the labels, other scores end at 1
    least = abs(value) - _ROUNDING * max(unit, abs(a_score), abs(b_score))
    count, gaps = _gaps(labels, a, b, metric, units)
    p = _swap_p(count, gaps, least, bootstrap)
    return Difference(a_score, b_score, value, low, high, bootstrap.level, p, bootstrap.resamples, refused)


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


def _swap_p(units: int, gaps: Measure, least: float, bootstrap: Bootstrap) -> float:
    """The share of swaps with a difference of at least `least`."""
    count = larger = 0
    for swapped in bootstrap.swaps(units):
        larger += int((gaps(swapped) >= least).sum())
        count += len(swapped)
    every = count == 2**units  # the answers as they are are one of them
    return larger / count if every else (larger + 1) / (count + 1)


def _gaps(labels: np.ndarray, a: Predictions, b: Predictions, metric: str, units: Units) -> tuple[int, Measure]:
    """The number n of units whose swap counts, and swaps [B, n] → differences without their sign [B]."""
    pairs = list(zip(_seeds(a), _seeds(b), strict=True))
    if metric in SUMS:
        gains = np.mean([image_terms(labels, x, metric) - image_terms(labels, y, metric) for x, y in pairs], axis=0)
        gains = np.bincount(units.of, gains, units.count)
        gains = gains[gains != 0]
        return len(gains), lambda swapped: np.abs(np.where(swapped, -1.0, 1.0) @ gains)
    # The answers of A stand above those of B, weighted 0 or 1.
    score = _mean_measure(np.concatenate([labels, labels]), [np.concatenate(pair) for pair in pairs], metric)

    def gaps(swapped: np.ndarray) -> np.ndarray:
        swapped = swapped[:, units.of]
        first = np.hstack([~swapped, swapped]).astype(np.float64)
        return np.abs(score(first) - score(1 - first))

    return units.count, gaps


def _wilson(value: float, counts: np.ndarray, level: float) -> tuple[float, float]:
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
    return len(np.unique(labels)) if metric in ("balanced_accuracy", "macro_f1") else 1


def _too_alike(labels: np.ndarray, a: Predictions, b: Predictions, metric: str, units: Units) -> str | None:
    """Why the answers differ on too few images, or in too few groups, for an interval of the difference, or None."""
    pairs = list(zip(_seeds(a), _seeds(b), strict=True))
    if metric in ("accuracy", "balanced_accuracy"):
        differs = np.any([(x.argmax(1) == labels) != (y.argmax(1) == labels) for x, y in pairs], axis=0)
    else:
        differs = np.any([(x != y).reshape(len(labels), -1).any(1) for x, y in pairs], axis=0)
    if (different := len(np.unique(units.of[differs]))) >= MIN_DIFFERENT:
        return None
    return (
        f"no interval of the difference: the two differ on {different} of {plural(units.count, units.noun)}, and a bootstrap "
        f"needs {MIN_DIFFERENT} or more"
    )


def _mean_measure(labels: np.ndarray, predictions: Predictions, metric: str) -> Measure:
    """The mean of a metric over seeds, as a function of weights."""
    scores = [measure(labels, of_seed, metric) for of_seed in _seeds(predictions)]
    if not scores:
        raise BadData("no predictions; allowed: those of one seed or more")
    return scores[0] if len(scores) == 1 else lambda weights: np.mean([score(weights) for score in scores], axis=0)
