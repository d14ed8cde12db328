"""Intervals and tests by group: held to those of single images where each group is one, to loops, and to simulated worlds."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import binom

from mlfusion import statistics
from mlfusion.errors import BadData
from mlfusion.statistics import Bootstrap, uncertainty

PER_GROUP = 5


def copies(values: np.ndarray) -> np.ndarray:
    """Each image five times."""
    return np.repeat(values, PER_GROUP, axis=0)


def numbers(seed: int, n: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.normal(size=n)
    return labels, labels + random.normal(size=n), labels + 0.8 * random.normal(size=n)


def test_five_copies_of_every_image_in_one_group_tell_no_more_than_the_images() -> None:
    labels, a, b = numbers(0)
    groups, few = copies(np.arange(len(labels))), Bootstrap(resamples=300)
    for metric in ("mae", "r2"):
        one = statistics.interval(labels, a, metric=metric, bootstrap=few)
        many = statistics.interval(copies(labels), copies(a), metric=metric, bootstrap=few, groups=groups)
        assert (many.low, many.high) == pytest.approx((one.low, one.high), rel=1e-12)
        apart = statistics.interval(copies(labels), copies(a), metric=metric, bootstrap=few)
        assert apart.high - apart.low < 0.6 * (many.high - many.low)
        one = statistics.difference(labels, a, b, metric=metric, bootstrap=few)
        many = statistics.difference(copies(labels), copies(a), copies(b), metric=metric, bootstrap=few, groups=groups)
        assert (many.low, many.high, many.p) == pytest.approx((one.low, one.high, one.p), rel=1e-12)


def grouped_world(random: np.random.Generator, groups: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of pure groups, whether each image is right, and the groups: all images of a group are nearly alike."""
    label = np.arange(groups) % 2
    easy = random.random(groups) < 0.7
    right = np.where(random.random((groups, PER_GROUP)) < 0.9, easy[:, None], ~easy[:, None])
    return copies(label), right.ravel(), copies(np.arange(groups))


def answers(labels: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.eye(2)[np.where(right, labels, 1 - labels)]


@pytest.mark.slow
def test_intervals_by_group_cover_the_truth_as_often_as_they_say_and_those_by_image_do_not() -> None:
    truth = 0.7 * 0.9 + 0.3 * 0.1
    random, worlds, by_group, by_image = np.random.default_rng(1), 150, 0, 0
    for number in range(worlds):
        labels, right, groups = grouped_world(random)
        options = Bootstrap(resamples=250, seed=number)
        found = statistics.interval(labels, answers(labels, right), bootstrap=options, groups=groups)
        by_group += found.low <= truth <= found.high
        found = statistics.interval(labels, answers(labels, right), bootstrap=options)
        by_image += found.low <= truth <= found.high
    assert binom.ppf(0.0005, worlds, 0.93) <= by_group <= binom.ppf(0.9995, worlds, 0.97), by_group / worlds
    assert by_image < 0.85 * worlds


@pytest.mark.long
def test_two_alike_probes_differ_by_group_as_rarely_as_p_says() -> None:
    random, worlds, by_group, by_image = np.random.default_rng(2), 200, 0, 0
    for number in range(worlds):
        labels, a, groups = grouped_world(random)
        b = grouped_world(random)[1]
        pair, options = (answers(labels, a), answers(labels, b)), Bootstrap(resamples=200, seed=number)
        by_group += statistics.difference(labels, *pair, bootstrap=options, groups=groups).p < 0.1
        by_image += statistics.difference(labels, *pair, bootstrap=options).p < 0.1
    assert binom.ppf(0.0005, worlds, 0.08) <= by_group <= binom.ppf(0.9995, worlds, 0.13), by_group / worlds
    assert by_image > 0.25 * worlds


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_the_p_value_by_enumeration_of_all_swaps_of_groups(metric: str) -> None:
    random = np.random.default_rng(3)
    groups = np.array([4, 4, 7, 7, 7, 1, 1, 9, 9, 9, 9, 2])
    labels = random.integers(0, 2, len(groups))
    a, b = (np.eye(2)[random.integers(0, 2, len(groups))] for _ in range(2))
    observed = abs(statistics.difference(labels, a, b, metric=metric).value)
    larger = []
    for swap in product((False, True), repeat=5):
        swapped = dict(zip((1, 2, 4, 7, 9), swap, strict=True))
        mask = np.array([swapped[group] for group in groups])[:, None]
        one, other = np.where(mask, b, a), np.where(mask, a, b)
        larger.append(abs(statistics.difference(labels, one, other, metric=metric).value) >= observed - 1e-12)
    assert statistics.difference(labels, a, b, metric=metric, groups=groups).p == pytest.approx(np.mean(larger))


def test_a_resample_holds_whole_groups_and_as_many_of_every_class() -> None:
    groups = np.repeat(np.arange(9), [1, 2, 3, 4, 5, 6, 1, 2, 3])
    labels = (groups % 3 == 0).astype(int)
    units, random = uncertainty.Units.of_groups(groups, labels), np.random.default_rng(0)
    for _ in range(50):
        weights = units.draw(random)
        of_group = [set(weights[groups == group].tolist()) for group in range(9)]
        assert all(len(found) == 1 for found in of_group)
        times = np.array([found.pop() for found in of_group])
        assert times[[0, 3, 6]].sum() == 3 and times.sum() == 9
    mixed = uncertainty.Units.of_groups(groups, np.arange(len(groups)) % 2)
    assert {mixed.draw(random)[groups == 5].sum() for _ in range(50)} > {0, 6}


def test_what_groups_cannot_tell_is_refused() -> None:
    labels, right, groups = grouped_world(np.random.default_rng(4), groups=19)
    found = statistics.interval(labels, answers(labels, right), groups=groups)
    assert found.low is None and found.refused == "no interval from 19 test groups: a bootstrap needs 20 or more"
    labels, right, _ = grouped_world(np.random.default_rng(5))
    one = np.where(labels == 1, 0, 1 + np.arange(len(labels)))
    found = statistics.difference(labels, answers(labels, right), answers(labels, ~right), groups=one)
    assert found.low is None and found.refused == (
        "no interval: the test images of a class are of one group, which shows no variation"
    )
    with pytest.raises(BadData, match="groups of shape"):
        statistics.interval(labels, answers(labels, right), groups=one[:-1])
    few = statistics.interval(labels, answers(labels, np.arange(len(labels)) > 3), groups=copies(np.arange(40)))
    every = statistics.interval(labels, answers(labels, np.arange(len(labels)) > 3))
    assert few.resamples == every.resamples == 0  # Wilson's, of 40 groups and of 200 images
    assert few.high - few.low > 1.5 * (every.high - every.low)
