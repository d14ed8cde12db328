"""Trackers show what rows say: each is read back by its own library from its offline or local form."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from rows import row, study
from tiny import save_images, save_model

import mlfusion
from mlfusion.errors import MlfusionError, Unavailable, UnknownName
from mlfusion.probing import grids
from mlfusion.results import trackers


def installed(extra: str) -> Any:
    """Tests of a library that `make setup` does not install run where somebody installed it."""
    there = importlib.util.find_spec(extra) is not None
    return pytest.mark.skipif(not there, reason=f"needs {extra}: pip install 'mlfusion[{extra}]'")


ALF = study({"cls+ap-all-layers/attentive": [0.9]}, halving=True)[0]


def test_what_is_shown_of_a_row() -> None:
    assert trackers.scores(row("a"))["test"] == 0.75 and trackers.scores(row("a"))["metrics.loss"] == 0.9
    assert "metrics.recall" not in trackers.scores(row("a"))  # a number a class, not a number
    held = trackers.settings(ALF)
    assert held["selected.lr"] == 0.01 and held["halving"] is True and "shots" not in held
    assert all(type(value) in (str, int, float, bool) for value in held.values())
    shares = trackers.layers(ALF)
    assert set(shares) == {"cls", "ap"} and set(shares["cls"]) == {1, 2, 3, 4}
    assert sum(share for kind in shares.values() for share in kind.values()) == pytest.approx(1)
    assert trackers.layers(row("a")) == {}


def _events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [one] = [path for path in folder.iterdir() if path.is_dir()]
    return EventAccumulator(str(one)).Reload()


@installed("tensorboard")
def test_tensorboard_reads_the_scores(tmp_path: Path) -> None:
    [tracker] = trackers.open_trackers(f"tensorboard:{tmp_path}/runs")
    tracker.log(replace(ALF, model="of/a hub: ü"))
    events = _events(tmp_path / "runs")
    for name, value in trackers.scores(ALF).items():
        [event] = events.Scalars(name)
        assert event.value == pytest.approx(value)
        assert event.wall_time == 1767225600.0  # when the row was made, not when it was shown
    for kind, shares in trackers.layers(ALF).items():
        shown = {event.step: event.value for event in events.Scalars(f"attention/{kind}")}
        assert shown == pytest.approx(shares)
    told = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"selected.lr" in told and ALF.id.encode() in told


@installed("wandb")
def test_weights_and_biases_reads_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    [tracker] = trackers.open_trackers("wandb:a-project")
    for one in (ALF, row("b2")):
        tracker.log(one)
    files = {path.name: path for path in tmp_path.rglob("*.wandb")}
    assert sorted(files) == sorted([f"run-{ALF.id}.wandb", "run-b2.wandb"])
    held = files["run-b2.wandb"].read_bytes()
    for word in (b"a-project", b"metrics.balanced_accuracy", b"0.75", b"selected.lr", b"cls-last/linear"):
        assert word in held
    assert b"attention/cls" in files[f"run-{ALF.id}.wandb"].read_bytes()


@installed("mlflow")
def test_mlflow_reads_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    place = f"sqlite:///{tmp_path}/mlflow.db"
    [tracker] = trackers.open_trackers(f"mlflow:{place}")
    for one in (ALF, row("b2")):
        tracker.log(one)
    client = mlflow.MlflowClient(tracking_uri=place)
    experiment = client.get_experiment_by_name("mlfusion")
    runs = {run.data.tags["mlfusion.id"]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {ALF.id, "b2"}
    run = runs[ALF.id]
    assert run.info.status == "FINISHED" and run.data.params["selected.lr"] == "0.01"
    for name, value in trackers.scores(ALF).items():
        assert run.data.metrics[name] == pytest.approx(value)
    history = client.get_metric_history(run.info.run_id, "attention/ap")
    assert {one.step: one.value for one in history} == pytest.approx(trackers.layers(ALF)["ap"])


def test_a_tracker_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = {"tensorboard": "torch.utils.tensorboard.writer", "wandb": "wandb", "mlflow": "mlflow"}
    for extra, module in blocked.items():
        monkeypatch.setitem(sys.modules, module, None)  # as Python does where it is not there
        with pytest.raises(Unavailable, match=rf"is not installed.*pip install 'mlfusion\[{extra}\]'"):
            trackers.open_trackers(f"{extra}:somewhere")


def test_words_for_trackers() -> None:
    with pytest.raises(UnknownName, match=r"no tracker named 'tensorbord'. Did you mean tensorboard\?"):
        trackers.open_trackers("tensorbord:runs")
    assert trackers.open_trackers("") == [] and trackers.open_trackers(()) == []


@installed("tensorboard")
def test_new_rows_are_shown_as_they_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grids.Grid(learning_rates=(1e-1,), weight_decays=(1e-2,), dropouts=(0.0,), epochs=1, least_steps=2)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", grid)
    model, images = save_model("vit", tmp_path / "tiny-vit"), save_images(tmp_path / "c", {"train": 5, "test": 2})
    mlfusion.extract(str(model), str(images))
    options: dict[str, Any] = {"probes": "cls-last/linear", "grid": "quick", "track": "tensorboard:runs"}
    with pytest.raises(MlfusionError, match="no tracker named 'x'"):  # before any work
        mlfusion.probe(str(images), **(options | {"track": "x"}))
    done = mlfusion.probe(str(images), seeds=(0,), **options)
    assert _events(Path("runs")).Scalars("test")[0].value == pytest.approx(done.rows[0].test)
    mlfusion.probe(str(images), seeds=(0, 1), **options)
    assert len(list(Path("runs").iterdir())) == 2  # the one that was there already is not shown again
