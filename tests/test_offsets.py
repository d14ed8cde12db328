"""Labels that are numbers far from zero, such as seconds since 1970 or metres north: no score knows where zero is."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fits import fit_options
from msgspec.structs import asdict
from PIL import Image
from sklearn.linear_model import Ridge as Reference
from sklearn.metrics import r2_score
from tiny import save_model
from typer.testing import CliRunner

import mlfusion
from mlfusion import statistics
from mlfusion.cli import app
from mlfusion.probing import protocol
from mlfusion.probing.grids import SEARCH_GRIDS, Grid
from mlfusion.probing.heads import HEADS
from mlfusion.probing.targets import Number, target_of
from mlfusion.probing.training.batches import Tokens
from mlfusion.results import Results
from mlfusion.specs.names import Head
from mlfusion.statistics import measures

SHORT = Grid(learning_rates=(1e-1, 1e-2), weight_decays=(1e-2,), dropouts=(0.1,), epochs=1, least_steps=25)
OFFSETS = [1e6, 1e8, 1_700_000_000.0, 5_500_000.0, -3e9]


def numbers(images: int, seed: int, offset: float = 0.0, scale: float = 1.0) -> Tokens:
    """Images whose label is in their tokens, in steps of `scale` / 1024, so that adding an offset rounds nothing."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(-3000, 3000, images) / 1024
    values = rng.normal(size=(images, 3, 8))
    values[:, 1, 0] += 4 * labels
    return Tokens(values, scale * labels + offset)


def fitted(head: Head, offset: float, scale: float = 1.0) -> tuple[protocol.Outcome, Number]:
    train, test = numbers(60, 0, offset, scale), numbers(40, 1, offset, scale)
    target = target_of(train.labels, 1)
    assert isinstance(target, Number)
    return protocol.fit(head, train, lambda: test, target=target, options=fit_options(heads=2)), target


FAST = ("linear", "attentive", "ridge", "knn")


@pytest.mark.parametrize("head", [*FAST, *(pytest.param(h, marks=pytest.mark.long) for h in HEADS if h not in FAST)])
def test_every_head_has_the_scores_of_the_same_labels_near_zero(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEARCH_GRIDS, "quick", SHORT)
    near, _ = fitted(head, 0.0)
    for offset in OFFSETS if head in ("ridge", "knn", "linear") else OFFSETS[2:3]:
        far, target = fitted(head, offset)
        assert (far.val, far.test, far.train, far.selected) == (near.val, near.test, near.train, near.selected)
        assert far.metrics == near.metrics
        assert far.predictions.dtype == np.float64
        np.testing.assert_array_equal(
            far.predictions + (target.origin - offset), near.predictions + fitted_origin(near)
        )


def fitted_origin(near: protocol.Outcome) -> float:
    """The origin of the labels near zero, which all fits share."""
    target = target_of(numbers(60, 0).labels, 1)
    assert isinstance(target, Number)
    return target.origin


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1000.0])
def test_ridge_far_from_zero_is_scikit_learns_near_zero(scale: float) -> None:
    outcome, _ = fitted("ridge", 5_500_000.0, scale)
    train, test = (numbers(*which) for which in ((60, 0), (40, 1)))

    def flat(tokens: Tokens) -> np.ndarray:
        values = np.asarray(tokens.values)
        return (values / np.linalg.norm(values, axis=2, keepdims=True)).reshape(len(values), -1)

    reference = Reference(alpha=outcome.selected["penalty"]).fit(flat(train), train.labels)
    assert outcome.test == pytest.approx(r2_score(test.labels, reference.predict(flat(test))), abs=1e-4)


# --- from files to rows, intervals, comparisons and new images -------------------------------------------------------


def table(folder: Path, offset: float) -> Path:
    """Pictures whose brightness is their label, in steps of a quarter."""
    rng = np.random.default_rng(0)
    rows = []
    for split, count in (("train", 40), ("test", 16)):
        for number in range(count):
            grey = int(rng.integers(20, 230))
            folder.mkdir(exist_ok=True)
            noise = rng.integers(-10, 10, (24, 24, 3))
            Image.fromarray(np.clip(grey + noise, 0, 255).astype(np.uint8)).save(folder / f"{split}{number}.png")
            rows.append([f"{split}{number}.png", split, repr(offset + grey / 4)])
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "split", "label"], *rows])
    return folder / "table.csv"


@pytest.mark.slow
@pytest.mark.parametrize(
    "probes",
    [
        ("cls-last/ridge", "cls-last/knn"),
        pytest.param(("cls-last/linear", "cls+ap-last/attentive"), marks=pytest.mark.long),
    ],
)
def test_seconds_since_1970_are_scored_and_predicted_as_seconds_of_the_day(
    probes: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SEARCH_GRIDS, "quick", SHORT)
    model = str(save_model("vit", tmp_path / "model"))
    start = 1_700_000_000.0
    said: list[dict[str, Any]] = []
    for offset in (0.0, start):
        data = table(tmp_path / f"from-{offset:g}", offset)
        mlfusion.extract(model, str(data), layers="last", read=mlfusion.ReadOptions(label_column="label"))
        done = mlfusion.probe(
            str(data), model=model, probes=probes, grid="quick", seeds=(0,), results=offset_folder(offset), save=True
        )
        results = Results(offset_folder(offset))
        for row in done.rows:
            held = results.arrays(row)
            assert measures.scores(held["labels"], held["probabilities"]) == asdict(row.metrics)
            assert held["probabilities"].dtype == held["labels"].dtype == np.float64
            lines = csv.DictReader(data.read_text().splitlines())
            truth = [float(line["label"]) for line in lines if line["split"] == "test"]
            assert sorted(held["labels"] + held["origin"]) == sorted(truth)
        pictures = sorted(str(path) for path in data.parent.glob("test*.png"))
        rows = {row.probe: (row.val, row.test, row.train, row.metrics) for row in done.rows}
        certain = [statistics.certainty(results, row).interval for row in done.rows]
        assert [one and one.value for one in certain] == [row.test for row in done.rows]
        [compared] = statistics.compare_named(results, *probes)
        answers = [
            [one.number for one in mlfusion.predict(f"{offset_folder(offset)}/probes/{row.id}", pictures)]
            for row in done.rows
        ]
        printed = CliRunner().invoke(
            app, ["predict", "--probe", f"{offset_folder(offset)}/probes/{done.rows[1].id}", pictures[0]]
        )
        assert printed.exit_code == 0
        assert float(printed.output.split(": ")[1]) == pytest.approx(answers[1][0], abs=0.1)
        said.append({"rows": rows, "intervals": certain, "difference": compared.images, "answers": answers})
    near, far = said
    assert far["rows"] == near["rows"]
    assert far["intervals"] == near["intervals"]
    assert far["difference"] == near["difference"]
    np.testing.assert_allclose(
        np.array(far["answers"]) - start, near["answers"], rtol=0, atol=5e-7
    )  # a double's last digit


def offset_folder(offset: float) -> str:
    return f"results-{offset:g}"
