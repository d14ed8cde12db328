"""Probes of images with groups: no group is fitted and held out, in splits, few shots, and scores on train."""

from typing import Any

import numpy as np
import pytest
from fits import fit_options
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score

from mlfusion.errors import BadData
from mlfusion.probing import protocol, splits
from mlfusion.probing.search import RidgeSearch
from mlfusion.probing.solvers.neighbours import Neighbourhood, neighbours
from mlfusion.probing.targets import Number, OneClass, SeveralLabels, target_of
from mlfusion.probing.training.batches import Tokens

GROUPS = st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6)), min_size=4, max_size=25)
"""The classes of the images of each group."""


def images(groups: list[tuple[list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    labels = np.array([label for (classes,) in groups for label in classes])
    numbers = np.array([17 * number for number, (classes,) in enumerate(groups) for _ in classes])
    _, labels = np.unique(labels, return_inverse=True)
    order = np.random.default_rng(len(labels)).permutation(len(labels))
    return labels[order], numbers[order]


def group_counts(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return np.bincount(np.unique(np.column_stack([groups, labels]), axis=0)[:, 1])


@given(GROUPS, st.integers(0, 5))
def test_no_group_is_on_both_sides_and_every_class_is(made: list[Any], seed: int) -> None:
    labels, groups = images(made)
    assume(labels.max() > 0)
    target = OneClass(int(labels.max()) + 1, names=("a", "b", "c")[: labels.max() + 1])
    refused = ""
    try:
        fitted, held = splits.split(labels, seed=seed, groups=groups, target=target)
    except BadData as err:
        refused = str(err)
    if refused:
        assert "training images of" in refused and f"(of {len(made):,} in all)" in refused
        assert group_counts(labels, groups).min() < 2 or "the classes share their groups" in refused
        return
    assert sorted([*fitted, *held]) == list(range(len(labels)))
    assert (np.diff(fitted) > 0).all() and (np.diff(held) > 0).all()
    assert not set(groups[fitted]) & set(groups[held])
    assert set(labels[fitted]) == set(labels[held]) == set(labels)


@given(GROUPS, st.integers(0, 5))
def test_labels_and_numbers_need_no_stratum_on_both_sides(made: list[Any], seed: int) -> None:
    labels, groups = images(made)
    for target in (SeveralLabels(3), Number(1)):
        fitted, held = splits.split(labels, seed=seed, groups=groups, target=target)
        assert len(fitted) and len(held) and not set(groups[fitted]) & set(groups[held])


@pytest.mark.parametrize(("groups", "each"), [(40, 5), (25, 7), (30, 100)])
def test_numbers_that_are_alike_in_a_group_are_parted_evenly(groups: int, each: int) -> None:
    """The age of a patient is that of all slices: five slices of similar ages are then of one patient."""
    random = np.random.default_rng(groups)
    ages = np.repeat(random.integers(20, 90, groups).astype(float), each)
    patients = np.repeat(np.arange(groups), each)
    target = Number(1)
    _, held = splits.split(target.strata(ages), seed=0, groups=patients, target=target)
    assert 0.1 <= len(held) / len(ages) <= 0.3 and abs(ages[held].mean() - ages.mean()) < 12
    fold_of = splits.folds(target.strata(ages), 5, seed=0, groups=patients, target=target)
    assert np.bincount(fold_of).min() >= 0.6 * len(ages) / 5 and np.bincount(fold_of).max() <= 1.4 * len(ages) / 5
    assert max(abs(ages[fold_of == fold].mean() - ages.mean()) for fold in range(5)) < 12


@given(GROUPS, st.integers(2, 4), st.integers(0, 5))
def test_few_shots_are_of_several_groups_so_that_others_can_be_held_out(made: list[Any], shots: int, seed: int) -> None:
    labels, groups = images(made)
    assume(np.bincount(labels).min() >= shots)
    target = OneClass(int(labels.max()) + 1)
    counts = group_counts(labels, groups)
    if counts.min() < 2:
        with pytest.raises(BadData, match=r"has \d+ training images of one group; allowed: of two groups or more"):
            splits.draw(labels, shots, target=target, seed=seed, groups=groups)
        return
    rows = splits.draw(labels, shots, target=target, seed=seed, groups=groups)
    assert np.bincount(labels[rows]).tolist() == [shots] * target.outputs
    for label in range(target.outputs):
        chosen = rows[labels[rows] == label]
        assert len(set(groups[chosen])) == min(shots, counts[label])
    fewer = splits.draw(labels, 2, target=target, seed=seed, groups=groups)
    assert set(fewer) <= set(rows)


def test_without_groups_the_split_and_the_draw_are_those_of_before() -> None:
    """Written down before groups were known: ids and scores of earlier rows depend on them."""
    labels = np.arange(30) % 3
    fitted, held = splits.split(labels, seed=1)
    assert held.tolist() == HELD and len(fitted) == 24
    assert splits.draw(labels, 2, target=OneClass(3), seed=1).tolist() == DRAWN


HELD = [8, 9, 13, 20, 24, 28]
DRAWN = [4, 6, 8, 9, 13, 23]


# --- heads that are solved for ---------------------------------------------------------------------------------------


def slices(seed: int, classes: int = 3) -> Tokens:
    """60 groups of four near copies, whose classes have nothing to do with their tokens."""
    random = np.random.default_rng(seed)
    values = np.repeat(random.normal(size=(60, 1, 80)), 4, axis=0) + 0.05 * random.normal(size=(240, 1, 80))
    return Tokens(values.astype(np.float32), np.repeat(np.arange(60) % classes, 4), None, np.repeat(np.arange(60), 4))


def without_groups(train: Tokens) -> Tokens:
    return Tokens(train.values, train.labels)


@pytest.mark.parametrize("head", ["ridge", "knn"])
def test_near_copies_of_held_out_images_are_held_out_too(head: str) -> None:
    """Labels are random, so that the truth is a third; copies of an image tell its label."""
    train = slices(0)
    fits = {
        name: [protocol.fit(head, tokens, lambda: train, target=OneClass(3), options=fit_options(s)) for s in range(3)]
        for name, tokens in (("groups", train), ("none", without_groups(train)))
    }
    assert np.mean([fit.val for fit in fits["none"]]) > 0.95 and np.mean([fit.val for fit in fits["groups"]]) < 0.6
    if head == "knn":
        assert fits["none"][0].train > 0.95 and fits["groups"][0].train < 0.6


@pytest.mark.parametrize("kind", ["class", "number"])
def test_ridge_with_groups_is_chosen_on_the_held_out_groups(kind: str) -> None:
    """Held to scikit-learn's ridge on the fitted part, with the same weights, for every penalty."""
    train = slices(1)
    if kind == "number":
        train = Tokens(train.values, np.repeat(np.random.default_rng(2).normal(size=60), 4), None, train.groups)
    target = target_of(train.labels, 3)
    search = RidgeSearch("ridge", train, target, fit_options())
    score, _ = search.scores()
    fitted, held = splits.split(target.strata(train.labels), seed=0, groups=train.groups, target=target)
    np.testing.assert_array_equal(search.fitted, fitted)
    tokens = train.values[:, 0].astype(np.float64)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    wanted = np.eye(3)[train.labels] if kind == "class" else train.labels
    weights = target.weights(train.labels[fitted])
    for penalty, found in zip(search.settings, score, strict=True):
        if penalty.penalty > 1e3:  # answers are ties up to the rounding of float32
            continue
        model = Ridge(alpha=penalty.penalty).fit(tokens[fitted], wanted[fitted], sample_weight=weights)
        answers = model.predict(tokens[held])
        if kind == "class":
            expected = balanced_accuracy_score(train.labels[held], answers.argmax(1))
        else:
            expected = r2_score(train.labels[held], answers)
        assert found == pytest.approx(expected, abs=1e-5)


def test_no_training_image_votes_for_one_of_its_group() -> None:
    """Held to a search over all pairs of images."""
    import torch

    train, setting = slices(3), Neighbourhood(3, 0.07)
    rows, groups = np.arange(240), torch.from_numpy(train.groups)
    probe = neighbours(train, rows, [setting], OneClass(3), "cpu")
    found = probe(train.normalised(rows, "cpu"), (groups, groups))[0].exp().numpy()
    tokens = train.normalised(rows, "cpu")[:, 0].double().numpy()
    for row in rows:
        others = np.flatnonzero(train.groups != train.groups[row])
        cosine = tokens[others] @ tokens[row]
        nearest = np.argsort(-cosine)[:3]
        votes = np.exp(cosine[nearest] / 0.07)
        expected = np.bincount(train.labels[others[nearest]], votes, 3) / votes.sum()
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
