"""How test images are drawn anew: single images, images counted by what they add, or whole groups of images."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import sqrt

import numpy as np

from mlfusion.errors import BadData
from mlfusion.shapes import Int
from mlfusion.statistics.measures import Measure
from mlfusion.system.words import plural

MIN_IMAGES = 20
"""Minimum number of test images for a bootstrap interval: with fewer, 95 % intervals contain the true value less often."""

_BLOCK = 500_000  # weights in memory at a time: 4 MB, which fits into a processor's cache


@dataclass(frozen=True)
class Bootstrap:
    """How test images are resampled, and how many times the answers of two probes are swapped."""

    level: float = 0.95  # share of such intervals that contain the true value
    resamples: int = 2000
    seed: int = 0
    folds: int | None = None  # the predictions are those of so many folds; None: of one probe on a test set

    @property
    def widening(self) -> float:
        """The factor by which folds widen an interval around its value.

        The probes of K folds share training images, so that their errors vary together, which no resample of the images
        shows. The variance of a mean over K folds is (1/K + n₂/n₁) σ² instead of σ²/K, for n₂ images of a fold and n₁ that it
        is trained on (Nadeau & Bengio 2003, Machine Learning 52, 239-281): larger by 1 + K / (K - 1).
        """
        return 1.0 if self.folds is None else sqrt(1 + self.folds / (self.folds - 1))

    def widened(self, value: float, low: float, high: float) -> tuple[float, float]:
        """The limits of an interval around a value, as far apart as folds ask for."""
        if self.folds is None:
            return low, high
        return value - self.widening * (value - low), value + self.widening * (high - value)

    def limits(self, score: Measure, units: "Units | Cells", means: int) -> tuple[float, float]:
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

    def swaps(self, kinds: Int[np.ndarray, " M"]) -> Iterator[np.ndarray]:
        """For how many units of each kind A and B swap answers [B, M], in blocks; `kinds` are the numbers of units.

        These are all ways to swap the answers of single units if they are so few, else ways drawn at random. If every kind is
        one unit, the numbers are bool.
        """
        units, random = int(kinds.sum()), np.random.default_rng(self.seed)
        if 2**units <= self.resamples:
            ways = np.array(list(product((False, True), repeat=units)))
            single = len(kinds) == units
            yield ways if single else np.add.reduceat(ways.astype(np.int64), kinds.cumsum() - kinds, axis=1)
            return
        block = max(1, _BLOCK // (2 * len(kinds)))
        for start in range(0, self.resamples, block):
            shape = min(block, self.resamples - start), len(kinds)
            if len(kinds) == units:
                yield random.random(shape, np.float32) < 0.5
            else:
                yield random.binomial(kinds, 0.5, shape)


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
        if self.count == self.images:
            return np.bincount(labels)
        return np.bincount(np.unique(np.column_stack([self.of, labels]), axis=0)[:, 1])

    def refusal(self, means: int) -> str | None:
        """Why there are too few units for an interval of so many means, or None."""
        if min(map(len, self.strata)) < 2 and len(self.strata) > 1:
            return "no interval: the test images of a class are of one group, which shows no variation"
        if self.count >= MIN_IMAGES and self.count > means:
            return None
        needed = max(MIN_IMAGES, means + 1)
        return f"no interval from {plural(self.count, self.noun)}: a bootstrap needs {needed} or more"


@dataclass(frozen=True, eq=False)
class Cells:
    """Images that add the same to a difference, counted together: a resample of the images is a draw of the counts.

    This is the same distribution as that of `Units.single`, and its cost does not depend on the number of images.
    """

    counts: Int[np.ndarray, " M"]

    @property
    def images(self) -> int:
        """M, the number of cells."""
        return len(self.counts)

    @property
    def count(self) -> int:
        """The number of images."""
        return int(self.counts.sum())

    def draw(self, random: np.random.Generator) -> Int[np.ndarray, " M"]:
        """How often an image of each cell is in a resample of as many images."""
        return random.multinomial(self.count, self.counts / self.count)
