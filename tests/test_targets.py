"""Targets: what each kind of labels is trained and scored by, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import EVERY_HEAD, fit_options
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict
from tiny import save_features
from torch.nn import functional as F

import mlfusion
from mlfusion.errors import BadData
from mlfusion.probing.grids import SEARCH_GRIDS, Grid
from mlfusion.probing.protocol import fit
from mlfusion.probing.splits import split
from mlfusion.probing.targets import Number, OneClass, SeveralLabels, Target, target_of
from mlfusion.probing.training.batches import Tokens
from mlfusion.report import write_page
from mlfusion.results import Results
from mlfusion.specs.names import Head
from mlfusion.statistics import measures

F64 = torch.float64
SMALL = Grid(learning_rates=(1e-1, 1e-2), weight_decays=(1e-3,), dropouts=(0.0,), epochs=1, least_steps=120)


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=F64, generator=torch.Generator().manual_seed(seed))


# --- which one it is -------------------------------------------------------------------------------------------------


def test_the_labels_say_what_they_are() -> None:
    assert target_of(np.array([0, 2, 1]), 3) == OneClass(3)
    assert target_of(np.array([[0, 1], [1, 1]]), 2) == SeveralLabels(2)
    number = target_of(np.array([1.0, 3.0, 5.0]), 0)
    assert isinstance(number, Number) and (number.outputs, number.mean, number.origin) == (1, 0.0, 3.0)
    assert number.deviation == pytest.approx(np.sqrt(8 / 3))
    assert target_of(np.array([1.0, 2.0, 2.0, 5.0]), 0) == Number(1, 0.5, 1.5, origin=2.0)
    assert target_of(np.array([2.0, 2.0]), 0) == Number(1, 0.0, 1.0, origin=2.0)
    assert target_of(np.array([0, 1]), 2, smoothing=0.1) == OneClass(2, 0.1)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (np.zeros((2, 2, 2)), {}, r"labels of shape \(2, 2, 2\).*allowed: \[N\] integers"),
        (np.array(["a", "b"]), {}, "labels of shape.*allowed"),
        (np.array([0.5, 1.5]), {"smoothing": 0.1}, "labels are smoothed only where an image has one class"),
    ],
)
def test_labels_of_no_kind_are_refused(labels: np.ndarray, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadData, match=message):
        target_of(labels, 2, **options)


# --- the losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_classes_is_torchs(smoothing: float) -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    outputs = random(2, 4, 3)
    truth = torch.tensor([0, 2, 2, 1])
    weights = torch.tensor([6 / 9, 6 / 3, 6 / 6], dtype=F64)
    found = OneClass(3, smoothing).loss(labels, "cpu", F64)(outputs, truth)
    expected = [F.cross_entropy(one, truth, weight=weights, label_smoothing=smoothing) for one in outputs]
    torch.testing.assert_close(found, torch.stack(expected))


def test_the_loss_of_several_labels_is_torchs() -> None:
    labels = np.array([[0, 1, 1], [1, 0, 0]])
    outputs = random(4, 2, 3)
    found = SeveralLabels(3).loss(labels, "cpu", F64)(outputs, torch.from_numpy(labels))
    expected = [F.binary_cross_entropy_with_logits(one, torch.from_numpy(labels).double()) for one in outputs]
    torch.testing.assert_close(found, torch.stack(expected))


def test_the_loss_of_numbers_has_no_unit() -> None:
    labels = np.array([1.0, 2.0, 6.0])
    outputs = random(2, 3, 1)
    found, scaled = (
        target_of(unit * labels, 0).loss(unit * labels, "cpu", F64)(outputs, torch.from_numpy(unit * labels))
        for unit in (1, 1000)
    )
    expected = ((outputs[..., 0] - torch.tensor((labels - 3) / labels.std())) ** 2).mean(1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scaled, expected)


def test_what_is_predicted() -> None:
    outputs = random(5, 3)
    torch.testing.assert_close(OneClass(3).predictions(outputs), outputs.softmax(1).float())
    torch.testing.assert_close(SeveralLabels(3).predictions(outputs), outputs.sigmoid().float())
    torch.testing.assert_close(Number(1, 10.0, 2.0, origin=1e9).predictions(outputs), 10 + 2 * outputs)


def test_the_same_outputs_give_the_same_predictions_wherever_they_stand() -> None:
    """Vector and scalar instructions round an exponential differently; an average precision would see it."""
    outputs = torch.full((37, 1), 0.3).expand(37, 3) + torch.tensor([0.0, 1.7, -2.2])
    for target in (OneClass(3), SeveralLabels(3)):
        for images in (1, 2, 5, 37):
            assert len(target.predictions(outputs[:images]).unique(dim=0)) == 1


# --- the split -------------------------------------------------------------------------------------------------------


@given(st.integers(10, 200), st.integers(0, 5))
def test_numbers_are_held_out_all_along_their_range(count: int, seed: int) -> None:
    labels = np.random.default_rng(seed).normal(size=count) ** 3
    strata = Number(1).strata(labels)
    _, held_out = split(strata, seed=seed)
    assert abs(len(held_out) - count / 5) <= 1
    ranks = np.argsort(np.argsort(labels))[held_out]
    assert np.diff(np.sort(ranks)).max() <= 14  # never two fives without one, but the last may be nine


def test_rare_labels_are_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((200, 5)) < np.array([0.5, 0.5, 0.4, 0.3, 0.03])).astype(np.int64)
    target = SeveralLabels(5)
    for seed in range(5):
        fitted, held_out = split(target.strata(labels), seed=seed)
        assert labels[fitted].sum(0).min() > 0 and labels[held_out].sum(0).min() > 0
        assert abs(len(held_out) - 40) <= 3


# --- through the protocol --------------------------------------------------------------------------------------------


def several(images: int, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    labels = (rng.random((images, 3)) < 0.4).astype(np.int64)
    values = rng.normal(size=(images, 4, 12))
    values[:, 1, :3] += 4 * (2 * labels - 1)
    return Tokens(values, labels)


def numbers(images: int, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    labels = 1000 + 50 * rng.uniform(-1, 1, size=images)
    values = rng.normal(size=(images, 4, 12))
    values[:, 1, 0] += (labels - 1000) / 5
    return Tokens(values, labels)


@pytest.mark.parametrize(
    ("make", "classes", "metric", "floor"),
    [(several, ("sea", "sky", "sun"), "mean_average_precision", 0.7), (numbers, ("metres",), "r2", 0.5)],
    ids=["labels", "number"],
)
def test_from_the_cache_to_the_report(
    make: Callable[..., Tokens],
    classes: tuple[str, ...],
    metric: str,
    floor: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SEARCH_GRIDS, "quick", SMALL)
    data = {name: make(images, seed) for seed, (name, images) in enumerate((("train", 200), ("test", 80)))}
    for name, held in data.items():
        save_features(tmp_path / "cache", name, np.asarray(held.values), held.labels, classes)
    done = mlfusion.probe(
        "d", probes="all-tokens-last/linear", grid="quick", seeds=(0,), cache=tmp_path / "cache", results=tmp_path
    )
    [row] = Results(tmp_path).require()
    assert done.rows == [row] and row.metric == metric and row.test > floor
    assert row.classes == tuple(classes) and getattr(row.metrics, metric) == row.test
    held = Results(tmp_path).arrays(row)
    assert np.array_equal(held["labels"] + held.get("origin", 0), data["test"].labels)
    # What statistics compute from the stored arrays is what the row says, metric by metric.
    assert measures.scores(held["labels"], held["probabilities"]) == {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(row.metrics).items()
    }
    assert metric.replace("_", " ") in write_page([row], tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "attentive"])
@pytest.mark.parametrize(
    ("make", "metric", "chance", "floor"),
    [(several, "mean_average_precision", 0.4, 0.7), (numbers, "r2", 0.0, 0.5)],
    ids=["labels", "number"],
)
def test_labels_and_numbers_are_learnt(
    head: Head,
    make: Callable[..., Tokens],
    metric: str,
    chance: float,
    floor: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SEARCH_GRIDS, "quick", SMALL)
    train, test = make(120), make(300, seed=1)
    target = target_of(train.labels, 3)
    outcome = fit(head, train, lambda: test, target=target, options=fit_options())
    assert outcome.metric == metric
    assert outcome.test == outcome.metrics[metric] > floor
    assert outcome.predictions.shape == (300, target.outputs)
    assert outcome.test == pytest.approx(target.score(test.labels, outcome.predictions))
    rng = np.random.default_rng(0)
    mixed, other = (Tokens(one.values, rng.permutation(one.labels)) for one in (train, test))
    without = fit(head, mixed, lambda: other, target=target, options=fit_options())
    assert without.test < chance + 0.1


@pytest.mark.slow
def test_smoothing_is_off_unless_asked_for_and_makes_less_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEARCH_GRIDS, "quick", SMALL)
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    values = rng.normal(size=(90, 2, 12))
    values[:, 0, :3] += 6 * np.eye(3)[labels]
    train = Tokens(values, labels)
    plain, none, much = (
        fit("linear", train, lambda: train, target=target, options=fit_options()).predictions.max(1).mean()
        for target in (target_of(labels, 3), OneClass(3, 0.0), OneClass(3, 0.3))
    )
    assert plain == none > much + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("head", EVERY_HEAD)
def test_a_probe_of_one_number(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head may have one output."""
    monkeypatch.setitem(SEARCH_GRIDS, "quick", SMALL)
    train = numbers(60)
    outcome = fit(head, train, lambda: train, target=target_of(train.labels, 0), options=fit_options(heads=2))
    assert outcome.test > 0.1


# --- what is refused -------------------------------------------------------------------------------------------------


def spoiled(kind: str) -> tuple[Tokens, Target]:
    data = numbers(30) if "number" in kind else several(30)
    labels = data.labels.copy()
    if kind == "number-nan":
        labels[4] = np.nan
    if kind == "number-same":
        labels[:] = 7.0
    if kind == "labels-two":
        labels[3, 1] = 2
    if kind == "labels-none":
        labels[:] = 0
    if kind == "labels-scarce":
        labels[:, 2] = 0
        labels[5, 2] = 1
    if kind == "number-few":
        return Tokens(data.values[:6], labels[:6]), Number(1)
    wide = kind == "labels-wide"
    return Tokens(data.values, labels), Number(1) if "number" in kind else SeveralLabels(4 if wide else 3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("number-nan", "train row 4 has label nan; allowed: finite numbers"),
        ("number-same", "all 30 labels of train are 7.0, so that no R² exists; allowed: two different"),
        ("number-few", "train has 6 images; allowed: 10 or more to choose by R²"),
        ("labels-two", "train row 3 has 2 for label 1; allowed: 0 or 1"),
        ("labels-none", "no image of train has a label, so that no average precision exists"),
        ("labels-scarce", "label 2 is on 1 training image; allowed: 2 or more"),
        ("labels-wide", r"train has labels of shape \(30, 3\); allowed: \[N, 4\]"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(kind: str, message: str) -> None:
    train, target = spoiled(kind)
    with pytest.raises(BadData, match=message):
        fit("linear", train, lambda: train, target=target, options=fit_options())


def test_train_and_test_have_labels_of_one_kind() -> None:
    train, test = several(30), numbers(30)
    with pytest.raises(
        BadData, match="test has labels of the kind 'number' where 'labels' is asked for; allowed: train"
    ):
        fit("linear", train, lambda: test, target=SeveralLabels(3), options=fit_options())


def test_fewer_images_than_classes() -> None:
    train = Tokens(np.ones((4, 1, 3)), np.arange(4))
    with pytest.raises(BadData, match="train has 4 images of 9 classes; allowed: two images of every class or more"):
        fit("linear", train, lambda: train, target=OneClass(9), options=fit_options())


def test_an_image_whose_token_is_not_finite_is_named() -> None:
    data = several(30)
    data.values[7, 2, 3] = np.inf
    named = Tokens(data.values, data.labels, tuple(f"train/{i}.png" for i in range(30)))
    with pytest.raises(BadData, match=r"train row 7 \(train/7.png\) has a token that is NaN or infinite"):
        fit("linear", named, lambda: named, target=SeveralLabels(3), options=fit_options())


def test_features_of_different_images_are_not_mixed() -> None:
    data = several(30)
    mixed = Tokens(data.values, data.labels, tuple(str(i) for i in range(29)))
    with pytest.raises(BadData, match="tokens of 30 images and ids of 29; allowed: features of the same images"):
        fit("linear", mixed, lambda: mixed, target=SeveralLabels(3), options=fit_options())
