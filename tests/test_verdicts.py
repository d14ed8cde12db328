"""What is called a gain: by one rule, as seldom as it says, never on a handful of images, and with its metric named."""

import csv
import json
import sys
from math import comb, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from rows import row, stored, study
from scipy.stats import binom
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn import metrics as reference
from tiers import examples
from tiny import save_images, save_model

import mlfusion
from mlfusion import cli, statistics
from mlfusion.results import Results
from mlfusion.statistics import Bootstrap, uncertainty, verdicts

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import level  # type: ignore[import-not-found]

FEW = Bootstrap(resamples=200)
ALF, BASE = "cls+ap-all-layers/attentive", "cls-last/linear"


def told(
    labels: np.ndarray, a: np.ndarray, b: np.ndarray, metric: str = "balanced_accuracy", **more: Any
) -> verdicts.Verdict:
    found = statistics.difference(labels, a, b, metric=metric, bootstrap=FEW)
    return statistics.verdict(found, metric=metric, classes=[f"c{number}" for number in range(9)], **more)


def answers(labels: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.eye(labels.max() + 1)[np.where(right, labels, (labels + 1) % (labels.max() + 1))]


def differing(only_a: int, only_b: int, images: int = 100) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of two classes; images that only A or only B gets right, and the rest that both do."""
    labels, place = np.arange(images) % 2, np.arange(images)
    a, b = ~((place >= only_a) & (place < only_a + only_b)), place >= only_a
    return labels, answers(labels, a), answers(labels, b)


# --- the rule --------------------------------------------------------------------------------------------------------


@settings(max_examples=examples(15), deadline=None)
@given(st.integers(0, 10), st.integers(0, 10))
def test_the_mid_p_value_is_that_of_a_fair_coin(only_a: int, only_b: int) -> None:
    """For accuracy it is McNemar's mid-p: of ways to toss a coin, the more uneven ones and half of the as uneven ones."""
    images, gap = only_a + only_b, abs(only_a - only_b)
    ways = {k: comb(images, k) / 2**images for k in range(images + 1)}
    larger = sum(share for k, share in ways.items() if abs(2 * k - images) > gap)
    equal = sum(share for k, share in ways.items() if abs(2 * k - images) == gap)
    found = statistics.difference(*differing(only_a, only_b), metric="accuracy", bootstrap=Bootstrap(resamples=2**10))
    within = 0 if images <= 10 else 5 * sqrt(0.25 / 2**10)  # up to ten images every way is counted
    assert found.p == pytest.approx(larger + equal, abs=within + 1e-12)
    assert found.mid_p == pytest.approx(larger + equal / 2 if gap else 1.0, abs=within + 1e-12)
    assert found.evidence.different == images


def test_a_gain_a_loss_no_clear_difference_and_what_cannot_be_told() -> None:
    labels, a, b = differing(10, 0)
    assert (told(labels, a, b).word, told(labels, b, a).word) == ("gain", "loss")
    assert (told(labels, a, b).p or 0) < 0.02
    assert told(labels, a, b, spread=0.11).word == "no clear difference"  # a gain of 0.10 that seeds change by more
    assert told(*differing(6, 4)).word == "no clear difference"
    few = told(*differing(5, 0))
    assert (few.direction, few.reason) == (None, "the two differ on 5 of 100 test images; 6 are needed")
    assert told(*differing(6, 0)).word == "gain"
    none = statistics.verdict(None, metric="r2", classes=(), missing="the arrays are gone.")
    assert (none.word, none.reason, none.p) == ("cannot be told", "the arrays are gone", None)


def test_a_smaller_error_is_a_gain() -> None:
    random = np.random.default_rng(0)
    labels = random.normal(size=60)
    good, poor = labels + 0.1 * random.normal(size=60), labels + random.normal(size=60)
    for metric in ("mae", "rmse"):
        assert (told(labels, good, poor, metric).word, told(labels, poor, good, metric).word) == ("gain", "loss")
    assert told(labels, good, poor, "r2").word == "gain"


def test_a_class_of_seven_images_is_named_for_means_over_classes_alone() -> None:
    labels = np.repeat([0, 1], [113, 7])
    random = np.random.default_rng(1)
    a, b = answers(labels, random.random(120) < 0.95), answers(labels, random.random(120) < 0.4)
    for metric in ("balanced_accuracy", "macro_f1", "auroc"):
        assert told(labels, a, b, metric).reason == "7 test images of c1; about 20 of a class are needed"
    for metric in ("accuracy", "loss"):
        assert told(labels, a, b, metric).word == "gain"
    assert told(labels[:113], a[:113], b[:113], "auroc").word == "cannot be told"  # no pair of two classes
    assert told(labels[:15], a[:15], b[:15], "accuracy").reason == "15 test images; 20 are needed"


@pytest.mark.parametrize(
    ("sizes", "effective"),
    [((50, 50), 100), ((12,) * 47, 564), ((1000, 0, 20), 20.8), ((30,), 30), ((), 77), ((100, 100, 1), 1.04)],
)
def test_the_effective_number_of_images_is_all_of_equal_classes_and_that_of_one_rare_class(
    sizes: tuple[int, ...], effective: float
) -> None:
    assert uncertainty.effective_images(sizes, 77) == pytest.approx(effective, rel=0.01)


def test_many_small_classes_of_one_size_can_be_told() -> None:
    labels = np.arange(47 * 6) % 47
    random = np.random.default_rng(2)
    a, b = answers(labels, random.random(len(labels)) < 0.8), answers(labels, random.random(len(labels)) < 0.5)
    found = statistics.difference(labels, a, b, bootstrap=FEW)
    assert statistics.verdict(found, metric="balanced_accuracy", classes=[str(c) for c in range(47)]).word == "gain"


@settings(max_examples=examples(5), deadline=None)
@given(st.permutations(range(40)), st.booleans())
def test_a_verdict_depends_neither_on_the_order_of_images_nor_on_the_names_of_classes(
    order: list[int], turned: bool
) -> None:
    random = np.random.default_rng(3)
    labels = np.arange(40) % 2
    a, b = answers(labels, random.random(40) < 0.9), answers(labels, random.random(40) < 0.6)
    expected = statistics.difference(labels, a, b, bootstrap=Bootstrap(resamples=800))
    if turned:
        labels, a, b = 1 - labels, a[:, ::-1], b[:, ::-1]
    found = statistics.difference(labels[order], a[order], b[order], bootstrap=Bootstrap(resamples=800))
    assert found.value == pytest.approx(expected.value)
    assert found.mid_p == pytest.approx(expected.mid_p, abs=0.05)  # other swaps are drawn
    assert (found.evidence.different, found.evidence.effective) == (
        expected.evidence.different,
        expected.evidence.effective,
    )


def test_counted_images_have_the_interval_of_drawn_ones() -> None:
    """The bootstrap that draws counts of images of one kind, against SciPy's, which draws image by image."""
    random = np.random.default_rng(4)
    labels = np.repeat([0, 1, 2], [200, 60, 40])
    a, b = (answers(labels, random.random(300) < skill) for skill in (0.8, 0.7))
    gains = (a.argmax(1) == labels).astype(float) - (b.argmax(1) == labels)

    def balanced(rows: np.ndarray) -> float:
        return float(np.mean([gains[rows][labels[rows] == c].mean() for c in range(3)]))

    found = statistics.difference(labels, a, b, bootstrap=Bootstrap(resamples=8000))
    want = scipy_bootstrap(
        (np.arange(300),), balanced, n_resamples=800, method="percentile", vectorized=False, rng=random
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((want.low, want.high), abs=0.012)
    assert found.value == pytest.approx(balanced(np.arange(300)))


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in level.CALLED if "AUROC" not in name])
def test_of_null_worlds_few_are_called_a_gain_or_a_loss(name: str) -> None:
    worlds = 150
    for images in (120, 2000):
        wrong, told_worlds = level.called(level.CALLED[name], images, worlds, resamples=200)
        if "a class of 2 %" in name and images == 120 and not name.startswith("accuracy"):
            assert told_worlds < worlds / 4  # those whose two or three images of a class are none
        else:
            assert told_worlds > worlds / 3
            assert binom.ppf(0.0005, told_worlds, 0.03) <= wrong <= binom.ppf(0.9995, told_worlds, 0.07)


# --- class by class --------------------------------------------------------------------------------------------------


def test_scores_by_class_are_scikit_learns() -> None:
    random = np.random.default_rng(5)
    labels = random.integers(0, 3, 80)
    seeds = [random.dirichlet(np.ones(3), 80) * 0.7 + 0.3 * np.eye(3)[labels] for _ in range(2)]
    for c, one in enumerate(statistics.by_class(labels, seeds, ["x", "y", "z"])):
        own = labels == c
        taken = [of_seed.argmax(1) == c for of_seed in seeds]
        assert (one.name, one.images) == ("xyz"[c], own.sum())
        assert one.recall == pytest.approx(np.mean([reference.recall_score(own, each) for each in taken]))
        assert one.specificity == pytest.approx(np.mean([reference.recall_score(~own, ~each) for each in taken]))
        assert one.auroc == pytest.approx(np.mean([reference.roc_auc_score(own, of_seed[:, c]) for of_seed in seeds]))
        assert one.low is not None and one.high is not None and one.recall is not None
        for end in (one.low, one.high):  # Wilson's ends solve |p - r| = z √(p (1 - p) / n)
            assert abs(end - one.recall) / sqrt(end * (1 - end) / own.sum()) == pytest.approx(1.959964, abs=1e-5)


def test_two_classes_counted_by_hand() -> None:
    """Of seven malignant images four are found, of 113 benign two are taken for malignant."""
    labels = np.repeat([0, 1], [113, 7])
    place = np.arange(120)
    benign, malignant = statistics.by_class(
        labels, [answers(labels, (place >= 2) & (place < 117))], ["benign", "malignant"]
    )
    assert (malignant.images, malignant.recall, malignant.specificity) == (7, 4 / 7, 111 / 113)
    assert (benign.images, benign.recall, benign.specificity) == (113, 111 / 113, 4 / 7)
    assert malignant.auroc == benign.auroc == pytest.approx((4 / 7 + 111 / 113) / 2)


def test_a_class_without_test_images_has_no_recall_and_counts_in_no_mean() -> None:
    labels = np.repeat([0, 1], 30)
    probabilities = np.hstack([answers(labels, np.arange(60) % 3 > 0) * 0.9, np.full((60, 1), 0.1)])
    absent = statistics.by_class(labels, [probabilities], ["a", "b", "absent"])[2]
    assert (absent.images, absent.recall, absent.low, absent.auroc) == (0, None, None, None)
    assert absent.specificity == 1.0
    found = statistics.interval(labels, probabilities, bootstrap=FEW)
    assert found.value == pytest.approx(reference.balanced_accuracy_score(labels, probabilities.argmax(1)))
    evidence = statistics.difference(labels, probabilities, probabilities, bootstrap=FEW).evidence
    assert evidence.by_class == (30, 30) and evidence.effective == 60


def test_several_labels_are_each_against_the_rest() -> None:
    random = np.random.default_rng(6)
    labels, confidences = (random.random((50, 3)) < 0.4).astype(int), random.random((50, 3))
    for c, one in enumerate(statistics.by_class(labels, [confidences], ["x", "y", "z"])):
        taken = confidences[:, c] > 0.5
        assert one.recall == pytest.approx(reference.recall_score(labels[:, c], taken))
        assert one.specificity == pytest.approx(reference.recall_score(1 - labels[:, c], ~taken))
        assert one.auroc == pytest.approx(reference.roc_auc_score(labels[:, c], confidences[:, c]))


def test_images_of_one_group_widen_the_interval_of_a_recall() -> None:
    labels = np.repeat([0, 1], 60)
    guesses = [answers(labels, np.arange(120) % 4 > 0)]
    apart = statistics.by_class(labels, guesses, ["a", "b"])[0]
    grouped = statistics.by_class(labels, guesses, ["a", "b"], groups=np.arange(120) // 4)[0]
    folds = statistics.by_class(labels, guesses, ["a", "b"], widening=3.0)[0]
    assert (folds.low, folds.high) == pytest.approx(uncertainty.wilson(apart.recall, np.array([60 / 9]), 0.95))
    assert apart.recall == grouped.recall and apart.low > grouped.low and apart.images == grouped.images == 60


# --- where they are shown --------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Results:
    """Two probes of one seed on 120 test images, seven of them malignant."""
    rows = study({BASE: [0.6], ALF: [0.8]}, images={"train": 240, "test": 120}, classes=["benign", "malignant"])
    results = stored(tmp_path / "results", rows, shares=(113 / 120, 7.01 / 120))
    for one in results.rows():  # the score that the arrays give
        arrays = results.arrays(one)
        score = reference.balanced_accuracy_score(arrays["labels"], arrays["probabilities"].argmax(1))
        results.append(replace(one, test=float(score)), arrays)
    return results


def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["mlfusion", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert not ended.value.code, err
    return out + err


def test_show_has_recall_by_class_with_its_images_and_interval(
    kept: Results, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    [one] = kept.rows(probe=BASE)
    where = str(kept.root)
    text = run(monkeypatch, capfd, "results", "show", one.id, "--results", where)
    [line] = [line for line in text.splitlines() if line.startswith("malignant ")]
    assert line.split()[:5] == ["malignant", "7", "57.1", "25.0", "to"]  # Wilson's interval of 4 of 7: 25.0 to 84.2
    assert "7 test images of malignant: too few" in text
    assert "AUROC, one class against the rest, mean over classes: 58." in text
    found = json.loads(run(monkeypatch, capfd, "results", "show", one.id, "--results", where, "--json"))
    assert [item["class"] for item in found["by_class"]] == ["benign", "malignant"]
    assert found["rare"] == [{"class": "malignant", "images": 7, "noun": "test image"}]


def test_compare_names_the_metric_of_each_p_and_says_why_nothing_is_told(
    kept: Results, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = run(monkeypatch, capfd, "results", "compare", "alf", BASE, "--results", str(kept.root))
    head = text.splitlines()[0]
    assert "p of balanced accuracy" in head and "p of accuracy (McNemar)" in head and "verdict" in head
    assert "cannot be told" in text.splitlines()[1]
    assert "cannot be told: 7 test images of malignant; about 20 of a class are needed" in text


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_scores_by_class_are_exported_as_a_line_per_result_and_class(
    ending: str, kept: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"by-class.{ending}"
    words = ("results", "export", str(path), "--by-class", "--results", str(kept.root))
    assert "4 lines, one per result and class" in run(monkeypatch, capfd, *words)
    if ending == "parquet":
        lines = pandas.read_parquet(path).to_dict("records")
    elif ending == "csv":
        lines = list(csv.DictReader(path.read_text().splitlines()))
    else:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["probe"], line["class"], int(line["images"])) for line in lines] == [
        (probe, name, images) for probe in (BASE, ALF) for name, images in (("benign", 113), ("malignant", 7))
    ]
    assert float(lines[1]["recall"]) == pytest.approx(4 / 7)


def test_a_row_without_arrays_has_no_scores_by_class(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append(row("a"))
    found = statistics.certainty(results, results.rows()[0])
    assert found.by_class == () and found.rare == () and found.missing


@pytest.mark.slow
def test_a_class_without_test_images_goes_through_all_stages(tmp_path: Path) -> None:
    model, data = save_model("vit", tmp_path / "tiny-vit"), save_images(tmp_path / "set", {"train": 8, "test": 8})
    save_images(data, {"train": 8}, ["more"])
    mlfusion.extract(str(model), str(data), cache=tmp_path / "cache")
    options: dict[str, Any] = {"cache": tmp_path / "cache", "results": tmp_path / "results"}
    [one] = mlfusion.probe(str(data), probes="cls-last/ridge", seeds=(0,), grid="quick", **options).rows
    absent = one.classes.index("more")
    present = [recall for c, recall in enumerate(one.metrics.recall) if c != absent]
    assert one.metrics.recall[absent] is None
    assert one.test == pytest.approx(np.mean(present))
    found = statistics.certainty(Results(tmp_path / "results"), one)
    assert found.by_class[absent].images == 0 and found.by_class[absent].recall is None
    assert [each.recall for c, each in enumerate(found.by_class) if c != absent] == pytest.approx(present)
    assert found.interval and found.interval.value == pytest.approx(one.test)
