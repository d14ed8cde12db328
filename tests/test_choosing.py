"""From many results to one: the best probe, results that are removed, models compared, models as columns of one table."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from rich.console import Console
from rows import study

import mlfusion
from mlfusion import cli, statistics
from mlfusion.errors import BadData, ResultsUnusable, UnknownName
from mlfusion.report import terminal
from mlfusion.results import Results
from mlfusion.results.best import best
from mlfusion.specs.definitions import build
from mlfusion.specs.selection import BestOptions

BASE, ALF, RIDGE = "cls-last/linear", "cls+ap-all-layers/attentive", "cls+ap-all-layers/ridge"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    def call(*words: str, answer: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlfusion", "results", *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capfd.readouterr()

    return call


def stored(**changes: Any) -> Results:
    results = Results("results")
    for row in study({BASE: [0.70, 0.72], RIDGE: [0.80, 0.79], ALF: [0.74, 0.86]}, **changes):
        parameters = {BASE: 10, RIDGE: 100, ALF: 1000}[row.probe]
        # by test the attentive probe is the best, by val ridge is
        results.append(replace(row, parameters=parameters, val=row.test - (0.05 if row.probe == ALF else 0.01)))
    return results


def test_the_best_probe_is_that_of_the_best_mean_over_seeds(tmp_path: Path) -> None:
    results = stored()
    for options, probe, mean, seed in (
        ({}, RIDGE, 0.785, 0),
        ({"by": "test"}, ALF, 0.80, 1),
        ({"max_params": 99}, BASE, 0.70, 1),
        ({"max_params": 100, "by": "test"}, RIDGE, 0.795, 0),
        ({"probe": "alf"}, ALF, 0.75, 1),
    ):
        found = best(results, build(BestOptions, options))
        assert (found.row.probe, found.row.seed, found.seeds, found.folder) == (probe, seed, 2, None)
        assert found.mean == pytest.approx(mean)
    with pytest.raises(BadData, match="every probe has more than 9 parameters; the smallest has 10"):
        best(results, BestOptions(max_params=9))
    stored(dataset="dtd")
    with pytest.raises(BadData, match=r"several datasets \(digits, dtd\).*choose one with --dataset"):
        best(results, BestOptions())


def test_the_command_prints_the_folder_of_the_best_probe(run: Any, tmp_path: Path) -> None:
    results = stored()
    code, out, err = run("best", "-d", "digits")
    [line] = out.splitlines()
    row = results.named("a_vit_digits_2")
    assert code == 0 and line.startswith(
        f"{row.id}: {RIDGE} of a-vit on digits, 100 parameters, val 78.5 % over 2 seeds"
    )
    assert f"was not kept; to have it: mlfusion results rerun {row.id} --keep --results {tmp_path}/results" in err
    results.probe_folder(row).mkdir(parents=True)
    code, out, _ = run("best", "-d", "digits")
    assert out.splitlines()[1] == str(tmp_path / "results" / "probes" / row.id)
    said = json.loads(run("best", "-d", "digits", "--by", "test", "--json")[1])
    assert (said["result"]["probe"], said["folder"]) == (ALF, None)


def test_a_probe_of_folds_is_not_kept_and_the_command_trains_one_that_is(run: Any, tmp_path: Path) -> None:
    row = replace(study({RIDGE: [0.8]}, folds=5)[0], id="r0123456789abcde")
    results = Results("results")
    results.append(row)
    assert row.keep_command("here") == (
        f"mlfusion probe --model org/a-vit --dataset digits --results here --probe {RIDGE} --grid quick --seeds 0 --precision "
        "float32 --save"
    )
    code, _, err = run("best", "-d", "digits")
    assert code == 0 and "each of its 5 folds has a probe of its own" in err
    assert row.keep_command(f"{tmp_path}/results") in err
    with pytest.raises(ResultsUnusable, match=r"has no single probe: each of its 5 folds .*: mlfusion probe .*--save"):
        mlfusion.load_probe(row.id)


# --- removing --------------------------------------------------------------------------------------------------------


def test_removed_results_are_gone_with_arrays_and_probe(run: Any) -> None:
    results = stored()
    gone, kept = results.named("a_vit_digits_2"), results.named("a_vit_digits_3")
    for row in (gone, kept):
        labels = np.arange(4000) % 2
        results.append(row, {"labels": labels, "probabilities": np.full((4000, 2), 0.5, np.float32)})
        results.probe_folder(row).mkdir(parents=True)
        (results.probe_folder(row) / "card.json").touch()
    code, _, err = run("rm", gone.id, answer="n")
    assert code == 1 and results.find(gone.id) and "test 0.8000" in err
    assert run("rm", gone.id)[0] == 1 and results.find(gone.id)  # no answer is a no
    code, out, _ = run("rm", gone.id, "a_vit_digits_0", answer="y\n")
    assert code == 0 and out.startswith("removed 2 results of ")
    assert [row.id for row in results.rows()] == ["a_vit_digits_1", "a_vit_digits_4", "a_vit_digits_5", kept.id]
    assert [path.name for path in (results.root / "arrays").iterdir()] == [f"{kept.id}.npz"]
    assert [path.name for path in (results.root / "probes").iterdir()] == [kept.id]
    with pytest.raises(UnknownName):
        results.named(gone.id)
    assert run("rm", gone.id, "--yes")[0] == 1
    results.append(gone)  # and may be made again
    assert results.find(gone.id) == gone


def test_nothing_behind_a_link_is_removed(tmp_path: Path) -> None:
    results = stored()
    row = results.named("a_vit_digits_2")
    (tmp_path / "elsewhere" / row.id).mkdir(parents=True)
    (results.root / "probes").symlink_to(tmp_path / "elsewhere")
    results.remove([row])
    assert (tmp_path / "elsewhere" / row.id).is_dir() and results.find(row.id) is None


# --- models ----------------------------------------------------------------------------------------------------------


def test_two_models_are_compared_by_one_probe(run: Any) -> None:
    """The gain is that of the scores, seed by seed, and the interval that of the same images."""
    results, random = Results("results"), np.random.default_rng(0)
    for model, tests in (("a-vit", [0.9, 0.8]), ("b-vit", [0.6, 0.7])):
        for row in study({BASE: tests, RIDGE: [0.5]}, model=model, images={"train": 100, "test": 400}):
            labels = np.arange(400) % 2
            right = random.random(400) < row.test
            first = np.where(right == (labels == 0), 0.9, 0.1)
            results.append(row, {"labels": labels, "probabilities": np.stack([first, 1 - first], 1).astype(np.float32)})
    [found] = statistics.compare_models(results, "a-vit", "b-vit", BASE)
    assert (found.model, found.a, found.b, found.seeds) == ("a-vit / b-vit", BASE, BASE, (0, 1))
    assert found.gain.mean == pytest.approx(0.2) and found.images and found.images.low > 0.1
    code, out, _ = run("compare", "a-vit", "b-vit", "--probe", BASE, "-d", "digits")
    assert code == 0 and "a-vit / b-vit" in out and "+20.0" in out
    results.append(replace(results.rows(model="b-vit", probe=RIDGE)[0], seed=5))
    with pytest.raises(BadData, match="by both a-vit and b-vit with a seed, grid and options in common"):
        statistics.compare_models(results, "a-vit", "b-vit", "ridge")


def test_models_on_one_data_set_are_columns_of_one_table() -> None:
    rows = study({BASE: [0.70], ALF: [0.75]}, model="vit-b16") + study(
        {BASE: [0.60], ALF: [0.55]}, model="clip-vit-b16"
    )
    console = Console(width=100, markup=False)
    with console.capture() as captured:
        console.print(terminal.table(rows, width=100))
    lines = captured.get().splitlines()
    assert lines[0].startswith("digits ") and lines[1].split() == ["vit-b16", "clip-vit-b16"]
    assert lines[2].split()[:2] == [BASE, "70.0"] and "60.0" in lines[2].split()
    assert lines[3].split()[0] == ALF and {"75.0", "+5.0", "55.0"} <= set(lines[3].split())
    assert not any("mean" in line.split() for line in lines[:4])  # scores of two models have no mean
