"""Metrics: the score of a row, of a resample, and of stored arrays, held to scikit-learn and to loops over images."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from tiers import examples

from mlfusion.errors import BadData, UnknownName
from mlfusion.statistics import measures

Images = tuple[np.ndarray, np.ndarray]


def of_class(seed: int, n: int = 50, classes: int = 8) -> Images:
    """Labels, and probabilities of which none are the same."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    return labels, random.dirichlet(np.ones(classes), n) * 0.8 + 0.2 * np.eye(classes)[labels]


def of_labels(seed: int, n: int = 50, labels: int = 4) -> Images:
    """Labels, some of them rare, and confidences of which many are the same."""
    random = np.random.default_rng(seed)
    truth = (random.random((n, labels)) < np.linspace(0.05, 0.6, labels)).astype(int)
    return truth, random.integers(1, 10, (n, labels)) / 10


def of_numbers(seed: int, n: int = 50) -> Images:
    random = np.random.default_rng(seed)
    labels = random.normal(size=n)
    return labels, (labels + 0.3 * random.normal(size=n))[:, None]


MAKE: dict[str, Callable[[int], Images]] = {"class": of_class, "labels": of_labels, "number": of_numbers}
EVERY = [(kind, metric) for kind, metrics in measures.METRICS.items() for metric in metrics]


def score(labels: np.ndarray, predictions: np.ndarray, metric: str) -> float:
    return measures.full_score(measures.measure(labels, predictions, metric), len(labels))


# --- second computations ---------------------------------------------------------------------------------------------


def present(labels: np.ndarray) -> np.ndarray:
    return np.flatnonzero(labels.any(0))


REFERENCE: dict[tuple[str, str], Callable[[Any, Any], float]] = {
    ("class", "balanced_accuracy"): lambda y, p: reference.recall_score(
        y, p.argmax(1), labels=np.unique(y), average="macro"
    ),
    ("class", "accuracy"): lambda y, p: reference.accuracy_score(y, p.argmax(1)),
    ("class", "top5"): lambda y, p: reference.top_k_accuracy_score(y, p, k=5, labels=np.arange(p.shape[1])),
    ("class", "macro_f1"): lambda y, p: reference.f1_score(y, p.argmax(1), average="macro", labels=np.unique(y)),
    ("class", "loss"): lambda y, p: reference.log_loss(y, p, labels=np.arange(p.shape[1])),
    ("labels", "mean_average_precision"): lambda y, p: reference.average_precision_score(
        y[:, present(y)], p[:, present(y)], average="macro"
    ),
    ("labels", "micro_f1"): lambda y, p: reference.f1_score(y, p > 0.5, average="micro"),
    ("labels", "macro_f1"): lambda y, p: reference.f1_score(
        y, p > 0.5, labels=present(y), average="macro", zero_division=0
    ),
    ("labels", "loss"): lambda y, p: reference.log_loss(y.ravel(), p.ravel(), labels=[0, 1]),
    ("number", "r2"): reference.r2_score,
    ("number", "mae"): reference.mean_absolute_error,
    ("number", "rmse"): reference.root_mean_squared_error,
}


@pytest.mark.parametrize(("kind", "metric"), EVERY)
@pytest.mark.parametrize("seed", range(3))
def test_every_metric_is_scikit_learns(kind: str, metric: str, seed: int) -> None:
    labels, predictions = MAKE[kind](seed)
    assert score(labels, predictions, metric) == pytest.approx(REFERENCE[kind, metric](labels, predictions), abs=1e-12)


@pytest.mark.parametrize(("kind", "metric"), EVERY)
def test_a_weighted_score_is_that_of_a_data_set_in_which_images_stand_as_often(kind: str, metric: str) -> None:
    """Also where a resample misses a class or a label, which then counts nowhere."""
    labels, predictions = MAKE[kind](0)
    random = np.random.default_rng(1)
    drawn = [random.integers(0, len(labels), size) for size in (50, 50, 30, 5, 2)]
    weights = np.stack([np.bincount(rows, minlength=len(labels)) for rows in drawn]).astype(float)
    found = measures.measure(labels, predictions, metric)(weights)
    want = [score(labels[rows], predictions[rows], metric) for rows in drawn]
    np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-12)


def test_the_metrics_of_a_row_are_the_measures_with_all_weights_one() -> None:
    for kind, make in MAKE.items():
        labels, predictions = make(3)
        found = measures.scores(labels, predictions)
        for metric in measures.METRICS[kind]:
            assert found.pop(metric) == score(labels, predictions, metric)
        assert found.keys() == measures.BY_CLASS.get(kind, {}).keys()


def test_scores_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1])
    probabilities = np.array([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.5, 0.5]])
    found = measures.scores(labels, probabilities)
    assert found == {
        "balanced_accuracy": pytest.approx((3 / 4 + 1 / 2) / 2),
        "accuracy": pytest.approx(4 / 6),
        "top5": 1.0,
        "macro_f1": pytest.approx((2 * 3 / (2 * 3 + 1 + 1) + 2 * 1 / (2 * 1 + 1 + 1)) / 2),
        "recall": pytest.approx([3 / 4, 1 / 2]),
        "loss": pytest.approx(-np.log([0.7, 0.6, 0.9, 0.2, 0.6, 0.5]).mean()),
    }
    assert all(type(value) is float for name, value in found.items() if name != "recall")


def test_average_precision_by_hand() -> None:
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]])
    confidences = np.array([[0.9, 0.3, 0.2], [0.8, 0.1, 0.9], [0.7, 0.2, 0.1]])
    found = measures.scores(labels, confidences)
    # Label 0: right at ranks 1 and 3. Label 1: right at rank 3. Label 2 is on no image.
    assert found["average_precision"] == [pytest.approx((1 + 2 / 3) / 2), pytest.approx(1 / 3), None]
    assert found["mean_average_precision"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3) / 2)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    assert found["macro_f1"] == pytest.approx((4 / 5 + 0) / 2)


def test_scores_of_numbers_by_hand() -> None:
    labels, predicted = np.array([1.0, 2.0, 3.0, 6.0]), np.array([1.0, 3.0, 3.0, 4.0])
    assert measures.scores(labels, predicted) == {
        "r2": pytest.approx(1 - 5 / 14),
        "mae": pytest.approx(3 / 4),
        "rmse": pytest.approx(np.sqrt(5 / 4)),
    }


# --- ties ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 10_000))
@settings(max_examples=examples(60), deadline=None)
def test_of_classes_with_the_same_probability_the_first_is_ahead(classes: int, images: int, seed: int) -> None:
    """As an answer is the first of the most probable classes: top-1 by this order is accuracy. No vote is no place."""
    random = np.random.default_rng(seed)
    probabilities = random.integers(0, 4, (images, classes)) / 4
    labels = random.integers(0, classes, images)

    def among(k: int) -> float:
        inside = 0
        for own, row in zip(labels, probabilities, strict=True):
            first = sorted(range(classes), key=lambda c: (-row[c], c))[:k]
            inside += own in first and row[own] > 0
        return inside / images

    assert score(labels, probabilities, "top5") == pytest.approx(among(5))
    positive = probabilities + 0.25
    right = sum(
        own == min(range(classes), key=lambda c: (-row[c], c)) for own, row in zip(labels, positive, strict=True)
    )
    assert score(labels, positive, "accuracy") == pytest.approx(right / images)
    assert score(labels, positive, "top5") >= score(labels, positive, "accuracy")


@pytest.mark.parametrize("classes", [2, 5, 6, 40])
def test_where_one_class_has_all_votes_top_5_is_top_1(classes: int) -> None:
    random = np.random.default_rng(0)
    labels, taken = random.integers(0, classes, (2, 200))
    votes = np.eye(classes, dtype=np.float32)[taken]
    assert score(labels, votes, "top5") == score(labels, votes, "accuracy") == pytest.approx((labels == taken).mean())


def test_with_five_classes_or_fewer_that_have_a_probability_all_are_among_five() -> None:
    labels, probabilities = of_class(0, classes=5)
    assert score(labels, probabilities, "top5") == 1.0
    seven = np.tile([0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05], (7, 1))
    assert score(np.arange(7), seven, "top5") == pytest.approx(5 / 7)


def test_images_with_the_same_confidence_count_together_in_average_precision() -> None:
    """The precision at a confidence is that of all images with it, in whatever order they stand."""
    labels, confidences = np.array([[1], [0], [1], [0]]), np.array([[0.5], [0.5], [0.5], [0.1]])
    for order in ([0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 1, 0]):
        assert score(labels[order], confidences[order], "mean_average_precision") == pytest.approx(2 / 3)


def test_a_label_is_given_from_above_one_half() -> None:
    labels, half = np.array([[1], [1]]), np.array([[0.5], [np.nextafter(0.5, 1)]])
    assert score(labels, half, "micro_f1") == pytest.approx(2 / 3)  # one of two


# --- absent classes and labels ---------------------------------------------------------------------------------------


def test_a_class_without_test_images_has_no_recall_and_counts_nowhere() -> None:
    labels, probabilities = np.array([0, 0, 2, 2]), np.eye(3)[[0, 1, 2, 2]] * 0.97 + 0.01
    found = measures.scores(labels, probabilities)
    assert found["recall"] == [0.5, None, 1.0]
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("given_to", [0, 1, 3])
def test_a_label_that_no_test_image_has_counts_in_no_mean(given_to: int) -> None:
    """Not even where images get it; the micro-F1, which counts answers, has those."""
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    confidences = np.where(labels > 0, 0.9, 0.1)
    confidences[:given_to, 2] = 0.8
    found = measures.scores(labels, confidences)
    assert found["average_precision"] == [1.0, 1.0, None]
    assert found["mean_average_precision"] == found["macro_f1"] == 1.0
    assert found["micro_f1"] == pytest.approx(8 / (8 + given_to))


def test_what_a_resample_does_not_define_is_0_without_a_warning() -> None:
    """No image with a label, or labels that are all the same: 0, as in scikit-learn."""
    nothing, some = np.zeros((2, 3), int), np.full((2, 3), 0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {score(nothing, some, metric) for metric in ("mean_average_precision", "macro_f1", "micro_f1")} == {0.0}
        for value in (0.1, 7.0, 1e8, 1.7e9 + 0.1):
            same = np.full(5, value)
            assert score(same, same + 1, "r2") == reference.r2_score(same, same + 1) == 0.0
            assert score(same, same, "r2") == reference.r2_score(same, same) == 1.0
            varied = np.append(same, [0.0, 1.0])
            found = measures.measure(varied, varied + 1, "r2")(np.array([[2.0, 3, 0, 0, 1, 0, 0]]))
            assert found == [0.0]


# --- log loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_probability_of_0_costs_as_much_as_scikit_learn_says(dtype: Any) -> None:
    """The smallest probability is the resolution of float32, whatever type the array has."""
    labels, probabilities = np.array([0, 1, 2]), np.array([[1, 0, 0], [1, 0, 0], [0, 0.5, 0.5]], dtype)
    by_hand = (0 + 23 * np.log(2) + np.log(2)) / 3
    assert score(labels, probabilities, "loss") == pytest.approx(by_hand, rel=1e-12)
    assert by_hand == pytest.approx(reference.log_loss(labels, probabilities.astype(np.float32)), rel=1e-6)
    several, sure = np.array([[1, 0], [0, 0]]), np.array([[0, 1], [0, 0.5]], dtype)
    assert score(several, sure, "loss") == pytest.approx((23 + 23 + 0 + 1) * np.log(2) / 4, rel=1e-12)


# --- numbers far from zero -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1e6, 1e8, 1.7e9, -5.5e6])
def test_scores_of_numbers_do_not_depend_on_where_zero_is(offset: float) -> None:
    """Labels and predictions in steps of 2^-20, so that adding an offset rounds nothing."""
    labels, predicted = (np.round(part * 2**20) / 2**20 for part in of_numbers(4))
    near, far = (measures.scores(labels + move, predicted + move) for move in (0, offset))
    assert far == pytest.approx(near, rel=1e-12)
    drawn = np.random.default_rng(5).multinomial(50, np.full(50, 1 / 50), size=200).astype(float)
    for metric in ("r2", "mae", "rmse"):
        here, there = (measures.measure(labels + move, predicted + move, metric)(drawn) for move in (0, offset))
        np.testing.assert_allclose(there, here, rtol=1e-11)
    assert (measures.measure(labels + offset, predicted + offset, "r2")(drawn) <= 1).all()


def test_one_label_far_from_the_others_spoils_no_resample_without_it() -> None:
    labels, predicted = of_numbers(6, n=20)
    with_far, its_guess = np.append(labels, 1e8), np.append(predicted[:, 0], 1e8)
    weights = np.append(np.ones(20), 0.0)[None]
    found = measures.measure(with_far, its_guess, "r2")(weights)[0]
    assert found == pytest.approx(reference.r2_score(labels, predicted), rel=1e-6)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_does_not_belong_together_is_refused() -> None:
    labels, probabilities = of_class(7, classes=4)
    for spoiled, message in (
        ((labels, probabilities[:-1]), "50 labels and predictions of 49"),
        ((labels[:0], probabilities[:0]), "0 labels"),
        ((labels, probabilities[:, :3]), r"labels outside 0\.\.2"),
        ((np.eye(4, dtype=int)[labels], probabilities[:, :3]), r"labels of shape \(50, 4\)"),
        ((labels.astype(float), probabilities), "labels that are numbers"),
    ):
        for compute in (measures.scores, lambda y, p: measures.measure(y, p, "accuracy")):
            with pytest.raises(BadData, match=message):
                compute(*spoiled)
    with pytest.raises(UnknownName, match=r"no metric named 'r2'.*balanced_accuracy"):
        measures.measure(labels, probabilities, "r2")


# --- ranked metrics --------------------------------------------------------------------------------------------------


@settings(max_examples=examples(25), deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(2, 12))
def test_the_area_under_the_roc_curve_is_scikit_learns_with_ties_and_weights(
    seed: int, classes: int, levels: int
) -> None:
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(0, classes, 30)])
    probabilities = random.integers(0, levels, (len(labels), classes)).astype(np.float32) / levels  # many ties
    weights = random.integers(0, 4, (3, len(labels))).astype(float)
    found = measures.auroc(labels, probabilities)(weights)
    for b, c in np.ndindex(*found.shape):
        own = labels == c
        if weights[b, own].sum() and weights[b, ~own].sum():
            want = reference.roc_auc_score(own, probabilities[:, c], sample_weight=weights[b])
            assert found[b, c] == pytest.approx(want, abs=1e-12)
        else:
            assert np.isnan(found[b, c])
    several = np.eye(classes, dtype=int)[labels]
    np.testing.assert_array_equal(measures.auroc(several, probabilities)(weights), found)


def test_the_macro_area_is_scikit_learns_one_against_the_rest() -> None:
    labels, probabilities = of_class(5)
    whole = probabilities / probabilities.sum(1, keepdims=True)
    want = reference.roc_auc_score(labels, whole, multi_class="ovr", average="macro")
    assert score(labels, whole, "auroc") == pytest.approx(want, abs=1e-12)
    two, sure = np.array([0, 0, 1, 1, 1]), np.array([0.2, 0.6, 0.4, 0.6, 0.9])
    # pairs of an image of each class: 0.2 is below all three, 0.6 is above 0.4, equal to 0.6 and below 0.9
    assert score(two, np.stack([1 - sure, sure], 1), "auroc") == pytest.approx((3 + 0 + 0.5 + 1) / 6)


@settings(max_examples=examples(20), deadline=None)
@given(st.permutations(range(12)))
def test_the_area_depends_neither_on_the_order_of_images_nor_on_that_of_classes(order: list[int]) -> None:
    labels, probabilities = np.arange(12) % 3, np.random.default_rng(6).integers(0, 5, (12, 3)) / 5
    expected = measures.auroc(labels, probabilities)(np.ones((1, 12)))[0]
    moved = measures.auroc(labels[order], probabilities[order])(np.ones((1, 12)))[0]
    np.testing.assert_allclose(moved, expected, atol=1e-12)
    renamed = measures.auroc((labels + 1) % 3, np.roll(probabilities, 1, axis=1))(np.ones((1, 12)))[0]
    np.testing.assert_allclose(np.roll(renamed, -1), expected, atol=1e-12)
