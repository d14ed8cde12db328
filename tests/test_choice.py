"""The images that choose a configuration: a data set's own validation split, or a fifth of train."""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fits import fit_options
from rows import key, row_object
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from tiny import save_images, save_model
from typer.testing import CliRunner

import mlfusion
from mlfusion import cli
from mlfusion.errors import BadData, MlfusionError, NotCached
from mlfusion.probing import grids
from mlfusion.probing.protocol import Outcome, fit
from mlfusion.probing.targets import OneClass, SeveralLabels
from mlfusion.probing.training.batches import Tokens
from mlfusion.results import Row
from mlfusion.results.records import NotARow, from_object
from mlfusion.specs.names import Head
from mlfusion.workflows import study
from mlfusion.workflows.recipe import Recipe

MODEL = "formula-vit"
FOLD = {"images": 40, "val": 0.5, "test": 0.5, "train": 0.5, "selected": {}}
SETTING = {"probes": "cls-last/knn", "grid": "quick", "seeds": (0,)}


@pytest.fixture(autouse=True)
def _short_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grids.Grid(learning_rates=(1e-1, 1e-3), weight_decays=(1e-2,), dropouts=(0.0,), epochs=2, least_steps=30)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", grid)


# --- one fit ---------------------------------------------------------------------------------------------------------


def tokens(images: int, seed: int, classes: int = 3) -> Tokens:
    """Two tokens an image, with classes that overlap."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(images) % classes)
    values = rng.normal(size=(images, 2, 6))
    values[:, 0, :classes] += 1.2 * np.eye(classes)[labels]
    return Tokens(values.astype(np.float32), labels)


def flat(part: Tokens) -> np.ndarray:
    """Both tokens of each image, scaled to length 1, side by side."""
    values = np.asarray(part.values, np.float64)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).reshape(len(part), -1)


def fitted(head: Head, train: Tokens, validation: Tokens | None, test: Tokens) -> Outcome:
    return fit(head, train, lambda: test, target=OneClass(3), options=fit_options(), validation=validation)


TRAIN, VALIDATION, TEST = tokens(91, 0), tokens(70, 1), tokens(80, 2)


def ridge(outcome: Outcome) -> Callable[[np.ndarray], np.ndarray]:
    weights = (len(TRAIN) / (3 * np.bincount(TRAIN.labels)))[TRAIN.labels]
    model = Ridge(alpha=outcome.selected["penalty"]).fit(flat(TRAIN), np.eye(3)[TRAIN.labels], sample_weight=weights)
    return lambda x: model.predict(x).argmax(1)


def logistic(outcome: Outcome) -> Callable[[np.ndarray], np.ndarray]:
    settings = {"C": 1 / outcome.selected["penalty"], "class_weight": "balanced", "tol": 1e-9, "max_iter": 10_000}
    return LogisticRegression(**settings).fit(flat(TRAIN), TRAIN.labels).predict


def knn(outcome: Outcome) -> Callable[[np.ndarray], np.ndarray]:
    neighbours, temperature = outcome.selected["neighbours"], outcome.selected["temperature"]
    x, counts = flat(TRAIN), np.bincount(TRAIN.labels)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    near = KNeighborsClassifier(neighbours, metric="cosine").fit(x, TRAIN.labels)

    def predict(images: np.ndarray) -> np.ndarray:
        distances, rows = near.kneighbors(images)
        votes = np.exp((1 - distances) / temperature)[..., None] * np.eye(3)[TRAIN.labels[rows]] / counts
        return votes.sum(1).argmax(1)

    return predict


def linear(outcome: Outcome) -> Callable[[np.ndarray], np.ndarray]:
    """The refitted probe itself: it was trained as it was chosen, on all of train."""
    return lambda x: (x @ outcome.weights["weight"].reshape(3, -1).T + outcome.weights["bias"]).argmax(1)


@pytest.mark.parametrize(
    ("head", "literal"), [("ridge", ridge), ("logistic", logistic), ("knn", knn), ("linear", linear)]
)
def test_a_validation_split_chooses_among_fits_on_all_of_train(
    head: Head, literal: Callable[[Outcome], Callable[[np.ndarray], np.ndarray]]
) -> None:
    outcome = fitted(head, TRAIN, VALIDATION, TEST)
    predict = literal(outcome)
    for part, score in ((VALIDATION, outcome.val), (TEST, outcome.test)):
        assert balanced_accuracy_score(part.labels, predict(flat(part))) == pytest.approx(score, abs=1e-9)
    assert outcome.choosing == len(VALIDATION)


def test_no_other_penalty_is_better_on_the_validation_split() -> None:
    outcome = fitted("ridge", TRAIN, VALIDATION, TEST)
    for penalty in np.logspace(6, -6, 13):
        predict = ridge(replace(outcome, selected={"penalty": penalty}))
        assert balanced_accuracy_score(VALIDATION.labels, predict(flat(VALIDATION))) <= outcome.val + 1e-9


@pytest.mark.parametrize("head", ["ridge", "logistic", "knn", "linear"])
def test_labels_of_validation_decide_nothing_but_the_choice(head: Head) -> None:
    """A probe that is chosen on wrong labels is one of the same grid: fitted to the same images, tested on the same."""
    wrong = Tokens(VALIDATION.values, np.roll(VALIDATION.labels, 1))
    one, other = (fitted(head, TRAIN, part, TEST) for part in (VALIDATION, wrong))
    assert one.val > other.val
    if one.selected == other.selected:
        answers = [outcome.predictions.argmax(1) for outcome in (one, other)]  # ridge scales its scores by these labels
        np.testing.assert_array_equal(*answers)


def test_one_image_of_a_class_is_enough_to_fit_where_others_choose() -> None:
    rows = np.concatenate([[int(np.flatnonzero(TRAIN.labels == k)[0]) for k in range(3)]])
    few = TRAIN.of(rows)
    assert fitted("ridge", few, VALIDATION, TEST).choosing == len(VALIDATION)
    with pytest.raises(
        BadData, match="class 0 has 1 training image; allowed: 2 or more, one to fit and one to choose on"
    ):
        fitted("ridge", few, None, TEST)
    without = TRAIN.of(np.flatnonzero(TRAIN.labels != 1))
    with pytest.raises(BadData, match="class 1 has 0 training images; allowed: 1 or more"):
        fitted("ridge", without, VALIDATION, TEST)


def test_a_validation_split_that_does_not_fit_is_refused() -> None:
    for validation, message in (
        (tokens(40, 3, classes=5), "validation row .* has label [34]; allowed: 0 to 2"),
        (Tokens(np.asarray(VALIDATION.values)[:, :1], VALIDATION.labels), "validation has tokens of shape"),
        (Tokens(VALIDATION.values, np.zeros(len(VALIDATION))), "validation has labels of the kind 'number'"),
    ):
        with pytest.raises(BadData, match=message):
            fitted("ridge", TRAIN, validation, TEST)
    labels = np.eye(3, dtype=np.uint8)[TRAIN.labels]
    empty = Tokens(VALIDATION.values, np.zeros((len(VALIDATION), 3), np.uint8))
    with pytest.raises(BadData, match="no image of validation has a label"):
        fit(
            "ridge",
            Tokens(TRAIN.values, labels),
            lambda: empty,
            target=SeveralLabels(3),
            options=fit_options(),
            validation=empty,
        )


def test_the_score_is_that_of_the_classes_that_validation_has() -> None:
    part = VALIDATION.of(np.flatnonzero(VALIDATION.labels != 2))
    outcome = fitted("ridge", TRAIN, part, TEST)
    recalls = [np.mean(ridge(outcome)(flat(part))[part.labels == k] == k) for k in range(2)]
    assert outcome.val == pytest.approx(np.mean(recalls))


# --- from a folder to a row ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "colours"
    for number, (split, count) in enumerate({"train": 8, "val": 4, "test": 5}.items()):
        save_images(root, {split: count}, seed=number)
    return root


def extracted(pictures: Path, **options: object) -> list[str]:
    """The splits of the entries that an extraction makes."""
    made = mlfusion.extract(MODEL, str(pictures), **{"layers": "last", "tokens": "cls", **options})
    return [one.entry.spec.data.split for one in made]


def probed(pictures: Path, **options: object) -> Row:
    [row] = mlfusion.probe(str(pictures), **{**SETTING, **options}).rows
    return row


def test_a_validation_split_is_extracted_and_chooses(pictures: Path) -> None:
    said: list[str] = []
    assert extracted(pictures, log=said.append) == ["train", "test", "validation"]
    assert [line for line in said if "--split train,test" in line]
    said.clear()
    row = probed(pictures, log=said.append)
    assert (row.images.train, row.images.choosing, row.images.test) == (24, 12, 15)
    assert row.chosen_on() == "validation (12 images)"
    assert f"chosen on: {row.chosen_on()}" in said
    assert row.validation is not None and len(set(row.keys)) == 3
    assert "--choose-on validation" in row.probe_command() and "--split" not in row.extract_command()
    assert mlfusion.rerun(row.id).same
    assert probed(pictures, choose_on="validation").id == row.id
    held_out = probed(pictures, choose_on="held-out")
    assert held_out.id != row.id and held_out.validation is None
    assert held_out.chosen_on() == "a fifth of train (6 images)"
    assert "--choose-on held-out" in held_out.probe_command()


def test_a_validation_split_that_is_not_extracted_leaves_ids_as_they_were(pictures: Path, tmp_path: Path) -> None:
    """The id of the held-out fifth does not depend on what else the cache holds."""
    assert extracted(pictures, splits="train,test") == ["train", "test"]
    before = probed(pictures)
    assert before.validation is None and "--split train,test" in before.extract_command()
    extracted(pictures, splits="validation")
    after = probed(pictures)
    assert after.validation is not None and after.id != before.id and "--split" not in after.extract_command()
    assert probed(pictures, choose_on="held-out").id == before.id
    without = tmp_path / "colours"
    for split in ("train", "test"):
        shutil.copytree(pictures / split, without / split)
    assert extracted(without) == ["train", "test"]
    assert probed(without).id == before.id
    with pytest.raises(NotCached, match="--choose-on validation: no split validation of colours"):
        probed(without, choose_on="validation")


def test_the_images_of_test_never_choose(pictures: Path) -> None:
    extracted(pictures)
    extracted(pictures, splits="train,test=val")
    row = probed(pictures)
    assert row.images.test == 12 and row.validation is None
    assert "test=val" in row.extract_command()


def test_another_reading_of_validation_does_not_choose(pictures: Path, tmp_path: Path) -> None:
    changing = shutil.copytree(pictures, tmp_path / "colours")
    extracted(changing)
    next((changing / "val").rglob("*.png")).unlink()
    extracted(changing, splits="train,test")
    assert probed(changing).validation is None


def test_tokens_that_validation_lacks_are_told_with_the_command(pictures: Path) -> None:
    extracted(pictures)
    extracted(pictures, splits="train,test", tokens="ap")
    with pytest.raises(NotCached, match=r"validation features of .* lack ap.*mlfusion extract .*--tokens ap@8"):
        probed(pictures, probes="ap-last/knn")
    assert probed(pictures, probes="ap-last/knn", choose_on="held-out").images.choosing == 6


def test_a_class_that_validation_lacks_is_told_once(pictures: Path, tmp_path: Path) -> None:
    without = shutil.copytree(pictures, tmp_path / "colours")
    shutil.rmtree(without / "val" / "green")
    said: list[str] = []
    try:
        extracted(without)
    except MlfusionError:
        pytest.skip("a data set needs every class in every split")
    mlfusion.probe(str(without), **{**SETTING, "seeds": (0, 1)}, log=said.append)
    assert said.count("validation has no image of 'green': the other classes choose") == 1


def test_a_split_ratio_of_three_chooses_on_the_middle_part(pictures: Path, tmp_path: Path) -> None:
    flat_set = shutil.copytree(pictures / "train", tmp_path / "one")
    assert extracted(flat_set, split_ratio="0.5/0.25/0.25") == ["train", "test", "validation"]
    row = probed(flat_set)
    assert row.chosen_on() == "validation (6 images)"
    assert "--split-ratio 0.5/0.25/0.25" in row.extract_command()


def test_a_study_chooses_as_its_recipe_says(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "TRIAL_SECONDS", 0.01)
    save_model("vit", tmp_path / "tiny")
    asked = {
        "models": [str(tmp_path / "tiny")],
        "datasets": [str(pictures)],
        "probes": ["cls-last/knn"],
        "grid": "quick",
    }
    recipe = Recipe.of(**asked, seeds=(0,), choose_on="held-out")
    done = study.run(study.plan(recipe))
    assert not done.failures and {one.entry.spec.data.split for one in done.extracted} == {"train", "test"}
    assert [row.validation for row in done.rows] == [None]
    done = study.run(study.plan(Recipe.of(**asked, seeds=(0,))))
    assert [row.chosen_on() for row in done.rows] == ["validation (12 images)"]
    assert study.plan(Recipe.of(**asked, seeds=(0,), choose_on="validation")).is_done
    assert study.plan(recipe).is_done
    refused = study.plan(Recipe.of(**asked, seeds=(0,), choose_on="validation", split="train,test=val"))
    assert "has no split validation beside train and test" in refused.failures[0].error


def test_every_output_says_which_images_chose(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mlfusion.report import write_findings, write_page

    caplog.set_level(logging.ERROR)
    extracted(pictures, tokens="cls")
    row = probed(pictures, save=True, probes="cls-last/ridge")
    results = mlfusion.Results("results")
    write_page([row], tmp_path / "page.html", results=results)
    write_findings([row], tmp_path / "page.md", results=results, title="t", about="a", command="c")
    shown = CliRunner().invoke(cli.app, ["results", "show", row.id]).output
    card = (Path("results") / "probes" / row.id / "README.md").read_text()
    for text in (shown, (tmp_path / "page.html").read_text(), (tmp_path / "page.md").read_text(), card):
        assert "validation (12 images)" in text.replace("\N{NO-BREAK SPACE}", " ").replace(
            "\N{NARROW NO-BREAK SPACE}", " "
        )
    held_out = probed(pictures, probes="cls-last/ridge", choose_on="held-out")
    assert held_out.chosen_on() == "train, each image left out in turn (24 images)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": key("validation")}, "choose_on 'auto', and the sources say otherwise"),
        ({"validation": "validation"}, "validation 'validation' is no key of a cache entry"),
        ({"choose_on": "test"}, "choose_on is 'test'; allowed: 'auto', 'validation', 'held-out'"),
        ({"folds": 3}, "by_fold has 0 folds; allowed: as many as folds says, 2 or more"),
        ({"folds": 2, "by_fold": [FOLD, FOLD]}, "by_fold tests 80 images; the row has 40"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(NotARow, match=re.escape(message)):
        from_object(row_object(**changes))
