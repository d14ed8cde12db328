"""Folds: every image is tested once, by a probe that was not trained on it; and intervals that know it."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fits import fit_options
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score, r2_score
from sklearn.model_selection import StratifiedKFold
from tiny import save_images

import mlfusion
from mlfusion import statistics
from mlfusion.errors import BadData, BadOption
from mlfusion.probing import grids
from mlfusion.probing.folds import fit_folds
from mlfusion.probing.protocol import fit
from mlfusion.probing.splits import folds
from mlfusion.probing.targets import OneClass, SeveralLabels, target_of
from mlfusion.probing.training.batches import Tokens
from mlfusion.results import Row
from mlfusion.specs.names import Head
from mlfusion.specs.options import SearchOptions
from mlfusion.statistics.uncertainty import Bootstrap, difference, interval
from mlfusion.workflows import study
from mlfusion.workflows.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

MODEL = "formula-vit"


@pytest.fixture(autouse=True)
def _short_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grids.Grid(learning_rates=(1e-1, 1e-3), weight_decays=(1e-2,), dropouts=(0.0,), epochs=2, least_steps=20)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", grid)


# --- which image is in which fold ------------------------------------------------------------------------------------

COUNTS = st.lists(st.integers(1, 30), min_size=2, max_size=6)


@given(COUNTS, st.integers(2, 7), st.integers(0, 9))
def test_folds_are_as_even_as_scikit_learns(counts: list[int], count: int, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), np.maximum(counts, count)))
    found = folds(labels, count, seed=seed)
    sizes = np.bincount(found, minlength=count)
    assert sizes.sum() == len(labels) and np.ptp(sizes) <= 1
    expected = StratifiedKFold(count).split(labels, labels)
    of_class = np.array([np.bincount(labels[rows], minlength=len(counts)) for _, rows in expected])
    ours = np.array([np.bincount(labels[found == fold], minlength=len(counts)) for fold in range(count)])
    assert np.array_equal(np.sort(ours, axis=0), np.sort(of_class, axis=0))


@given(st.integers(0, 99), st.permutations(range(40)))
def test_folds_follow_from_seed_and_ids_alone(seed: int, order: list[int]) -> None:
    labels, ids = np.arange(40) % 3, np.array([f"image {n}" for n in range(40)])
    found = folds(labels, 5, seed=seed, ids=ids.tolist())
    again = folds(labels[order], 5, seed=seed, ids=ids[order].tolist())
    assert np.array_equal(found[order], again)
    assert not np.array_equal(found, folds(labels, 5, seed=seed + 100, ids=ids.tolist()))


@given(st.lists(st.integers(1, 9), min_size=8, max_size=30), st.integers(2, 5), st.integers(0, 9))
def test_a_group_is_in_one_fold(sizes: list[int], count: int, seed: int) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    labels = groups % 2
    found = folds(labels, count, seed=seed, groups=groups)
    assert all(len(set(found[groups == group])) == 1 for group in range(len(sizes)))
    assert set(found.tolist()) == set(range(count))


def test_too_few_for_so_many_folds() -> None:
    with pytest.raises(BadData, match="3 images are too few for --folds 4; allowed: 2 to 3"):
        folds(np.zeros(3, np.int64), 4, seed=0)
    with pytest.raises(BadData, match="training images are of 2 groups"):
        folds(np.zeros(6, np.int64), 3, seed=0, groups=np.arange(6) % 2)
    target = OneClass(2, names=("cat", "dog"))
    with pytest.raises(BadData, match="class 'dog' has 2 images, so that not every one of --folds 3 can test it"):
        target.check_folds(np.array([0] * 9 + [1] * 2), 3)
    with pytest.raises(BadData, match="label 1 has 1 image, so"):
        SeveralLabels(2).check_folds(np.array([[1, 0]] * 9 + [[1, 1]]), 2)
    with pytest.raises(BadData, match="9 images are too few for --folds 5; allowed: 2 to 4"):
        target_of(np.linspace(0, 1, 9), 0).check_folds(np.linspace(0, 1, 9), 5)


# --- pooled predictions ----------------------------------------------------------------------------------------------


def tokens(images: int, kind: str, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(images) % 3)
    values = rng.normal(size=(images, 2, 6)).astype(np.float32)
    values[:, 0, :3] += 1.5 * np.eye(3, dtype=np.float32)[labels]
    return Tokens(values, 1e9 + labels + rng.normal(scale=0.1, size=images) if kind == "number" else labels)


def test_a_fold_without_a_score_of_its_own_is_refused_before_training() -> None:
    data, fold_of = tokens(20, "number"), np.arange(20) // 4
    data.labels[fold_of == 2] = 7.0
    with pytest.raises(BadData, match=r"all 4 labels of fold 3 of 5 are 7\.0"):
        fit_folds("ridge", data, fold_of, target=target_of(data.labels, 0), options=fit_options())


@pytest.mark.parametrize(
    ("head", "kind"), [("ridge", "class"), ("ridge", "number"), ("knn", "class"), ("attentive", "class")]
)
@pytest.mark.parametrize("validated", [False, True])
def test_folds_are_a_loop_of_fits(head: Head, kind: str, validated: bool) -> None:
    data = tokens(64, kind)
    validation = tokens(30, kind, seed=1) if validated else None
    target = target_of(data.labels, 3)
    fold_of = np.random.default_rng(2).permutation(np.arange(64) % 3)
    found = fit_folds(head, data, fold_of, target=target, options=fit_options(), validation=validation)
    vals, trains, pooled = [], [], np.zeros((64, target.outputs))
    for fold in range(3):
        rest, own = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
        part = Tokens(data.values[rest], data.labels[rest])
        of_fold = target_of(part.labels, 3)
        one = fit(
            head,
            part,
            lambda own=own: Tokens(data.values[own], data.labels[own]),  # type: ignore[misc]
            target=of_fold,
            options=fit_options(),
            validation=validation,
        )
        vals.append(one.val)
        trains.append(one.train)
        pooled[own] = one.predictions + (of_fold.origin - target.origin if kind == "number" else 0)
    np.testing.assert_allclose(found.predictions, pooled, atol=1e-5)
    assert (found.val, found.train) == pytest.approx((np.mean(vals), np.mean(trains)))
    expected = (
        r2_score(data.labels - 1e9, found.predictions[:, 0] + target.origin - 1e9)
        if kind == "number"
        else balanced_accuracy_score(data.labels, found.predictions.argmax(1))
    )
    assert found.test == pytest.approx(expected)
    assert len(found.folds) == 3 and found.weights == {}
    assert (found.attention is None) == (head != "attentive")


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "colours"
    for number, (split, count) in enumerate({"train": 8, "val": 4, "test": 5}.items()):
        save_images(root, {split: count}, seed=number)
    return root


def probed(pictures: Path, **options: Any) -> list[Row]:
    asked = {"probes": "cls-last/knn,cls-last/ridge", "grid": "quick", "seeds": (0,), "folds": 3}
    return mlfusion.probe(str(pictures), **{**asked, **options}).rows


def test_a_row_tests_every_image_of_train_and_test_once(pictures: Path) -> None:
    made = mlfusion.extract(MODEL, str(pictures), layers="last", tokens="cls")
    rows = probed(pictures)
    results = mlfusion.Results("results")
    for row in rows:
        assert (row.images.test, row.images.train, row.folds) == (39, 26, 3)
        assert row.validation is not None and row.images.choosing == 12
        assert [fold.images for fold in row.by_fold] == [13, 13, 13]
        arrays = results.arrays(row)
        labels = np.concatenate([one.entry.samples.labels for one in made[:2]])
        assert np.array_equal(arrays["labels"], labels)
        predicted = arrays["probabilities"].argmax(1)
        assert row.test == pytest.approx(balanced_accuracy_score(labels, predicted))
        for fold, scores in enumerate(row.by_fold):
            own = arrays["folds"] == fold
            assert scores.test == pytest.approx(balanced_accuracy_score(labels[own], predicted[own]))
        assert row.options() == "chosen on validation, 3 folds"
        assert "--folds 3" in row.probe_command()
        assert mlfusion.rerun(row.id).same
    one, other = (results.arrays(row)["folds"] for row in rows)
    assert np.array_equal(one, other)
    compared = statistics.compare(results, *rows)
    assert compared.mcnemar == () and any("no McNemar test" in mark for mark in compared.marks)
    held_out = probed(pictures, choose_on="held-out")
    assert held_out[0].chosen_on() == "a fifth of the other 2 folds (6 images)"
    assert len({row.id for row in (*rows, *held_out, *probed(pictures, folds=None))}) == 6
    with pytest.raises(BadData, match=r"was tested in 3 folds, .* in 2; allowed"):
        statistics.compare(results, rows[0], probed(pictures, folds=2)[0])


def test_what_folds_exclude_is_refused_in_a_sentence(pictures: Path) -> None:
    mlfusion.extract(MODEL, str(pictures), layers="last", tokens="cls")
    for options, message in (
        ({"save": True}, "--folds and --save exclude each other"),
        ({"shots": (2,)}, "--folds and --shots exclude each other"),
        ({"drop_duplicates": True}, "--folds and --drop-duplicates exclude each other"),
        ({"folds": 1}, "--folds 1: allowed are whole numbers from 2"),
    ):
        with pytest.raises(BadOption, match=message):
            probed(pictures, **options)
    with pytest.raises(BadData, match="class 'blue' has 13 images, so that not every one of --folds 14 can test it"):
        probed(pictures, folds=14)
    with pytest.raises(BadData, match="--folds holds the tokens of all images in memory"):
        probed(pictures, memory=4000)


def test_a_recipe_may_ask_for_folds(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "TRIAL_SECONDS", 0.01)
    mlfusion.extract(MODEL, str(pictures), layers="last", tokens="cls")
    recipe = Recipe.of([MODEL], [str(pictures)], ["cls-last/knn"], grid="quick", seeds=(0,), folds=3)
    done = study.run(study.plan(recipe))
    assert [row.folds for row in done.rows] == [3] and not done.failures
    assert SearchOptions(folds=3).words() == ["--folds", "3"]


# --- intervals -------------------------------------------------------------------------------------------------------


def answers(seed: int, right: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(120) % 3
    scores = random.normal(size=(120, 3)) + right * np.eye(3)[labels]
    return labels, softmax(scores, axis=1)


@pytest.mark.parametrize("count", [2, 5, 10])
def test_folds_widen_an_interval_by_the_correction_of_nadeau_and_bengio(count: int) -> None:
    labels, a = answers(0, 1.0)
    b = answers(1, 0.8)[1]
    naive, tested = 1 / count, 1 / count + (len(labels) / count) / (len(labels) * (count - 1) / count)
    for one, other in (
        (interval(labels, a), interval(labels, a, bootstrap=Bootstrap(folds=count))),
        (difference(labels, a, b), difference(labels, a, b, bootstrap=Bootstrap(folds=count))),
    ):
        assert one.value == other.value
        assert one.low is not None and other.low is not None and one.high is not None and other.high is not None
        assert (other.value - other.low) / (one.value - one.low) == pytest.approx(np.sqrt(tested / naive))
        assert (other.high - other.value) / (one.high - one.value) == pytest.approx(np.sqrt(tested / naive))
    p, wide = (difference(labels, a, b, bootstrap=Bootstrap(folds=k)).p for k in (None, count))
    assert p < wide <= 1


def test_a_widened_interval_stays_a_score() -> None:
    labels, a = answers(0, 2.2)
    found = interval(labels, a, bootstrap=Bootstrap(folds=2))
    assert found.high is not None and found.high <= 1
    sure = interval(labels, np.eye(3)[labels], bootstrap=Bootstrap(folds=5))  # Wilson's, of fewer images
    plain = interval(labels, np.eye(3)[labels])
    assert sure.low is not None and plain.low is not None and sure.low < plain.low and sure.high == 1


@pytest.mark.slow
def test_intervals_over_folds_contain_the_truth() -> None:
    """A small part of the table in docs/method.md: 95 % intervals of probes that are equally good by construction."""
    benchmark = importlib.import_module("folds")
    found = benchmark.coverage(benchmark.WORLDS[1], 5, worlds=120, resamples=200)
    assert found["compare"] >= 0.93
    assert found["p"] <= 0.07
