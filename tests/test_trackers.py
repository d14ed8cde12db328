"""Trackers show what rows say: each is read back by its own library from its offline or local form."""

import http.server
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import threading
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


@installed("mlflow")
def test_mlflow_has_one_run_of_a_row_however_often_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    place = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(tracking_uri=place)
    experiment = client.create_experiment("mlfusion")
    client.create_run(experiment, tags={"mlfusion.id": ALF.id})  # the server was gone before the scores arrived
    for _ in range(2):  # in two processes
        trackers.log_rows([ALF, row("b2")], trackers.open_trackers(f"mlflow:{place}"))
    runs = client.search_runs([experiment])
    assert sorted(run.data.tags["mlfusion.id"] for run in runs) == sorted([ALF.id, "b2"])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.metrics["test"] for run in runs} == {0.9, 0.75}


@installed("tensorboard")
def test_tensorboard_has_one_run_of_a_row_however_often_it_is_sent(tmp_path: Path) -> None:
    for _ in range(2):
        trackers.log_rows([ALF], trackers.open_trackers(f"tensorboard:{tmp_path}/runs"))
    events = _events(tmp_path / "runs")
    assert len(events.Scalars("test")) == 1
    [folder] = (tmp_path / "runs").iterdir()
    (folder / trackers.DONE).unlink()  # as after a kill in the middle
    trackers.log_rows([ALF], trackers.open_trackers(f"tensorboard:{tmp_path}/runs"))
    assert len(_events(tmp_path / "runs").Scalars("test")) == 1


FAKE_MLFLOW = """
import json, urllib.request
class entities:
    Metric = Param = staticmethod(lambda *values: values)
class MlflowClient:
    def __init__(self, tracking_uri=None):
        self.uri = tracking_uri
    def __getattr__(self, name):
        def call(*values, **named):
            body = json.dumps([name, values, named], default=str).encode()
            with urllib.request.urlopen(self.uri + "/" + name, body, timeout=5) as answer:
                return as_object(json.load(answer))
        return call
class Answer:
    pass
def as_object(value):
    if isinstance(value, list):
        return [as_object(one) for one in value]
    if not isinstance(value, dict):
        return value
    made = Answer()
    made.__dict__.update({name: as_object(one) for name, one in value.items()})
    return made
"""
"""MLflow's client as far as it is used, over HTTP, for machines without MLflow; the server is a real one."""


class Server(http.server.ThreadingHTTPServer):
    """A tracking server that keeps runs by the id of their row, and drops the connection once `answers` are used up."""

    def __init__(self, port: int = 0, answers: int = 10**6) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.answers, self.runs, self.created = answers, dict[str, dict[str, Any]](), 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    """One call of the client."""

    server: Server

    def do_POST(self) -> None:
        name, values, named = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.answers -= 1
        if self.server.answers < 0:
            self.connection.close()
            return
        body = json.dumps(self.answer(name, values, named)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, name: str, values: list[Any], named: dict[str, Any]) -> Any:
        runs = self.server.runs
        if name == "get_experiment_by_name":
            return {"experiment_id": "1"}
        if name == "search_runs":
            return [run for row_id, run in runs.items() if f"'{row_id}'" in named["filter_string"]]
        if name == "create_run":
            self.server.created += 1
            row_id = named["tags"]["mlfusion.id"]
            runs[row_id] = {"info": {"run_id": row_id, "status": "RUNNING"}}
            return runs[row_id]
        if name == "set_terminated":
            runs[values[0]]["info"]["status"] = "FINISHED"
        return None

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("answers", [0, 2, 3, 6])  # gone from the start; in the middle of the first row; of the second
def test_a_server_that_is_gone_costs_one_warning_and_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: int
) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "mlflow.py").write_text(FAKE_MLFLOW)
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    server = Server(answers=answers)
    where = f"mlflow:http://127.0.0.1:{server.server_port}"
    rows = [ALF, row("b2"), row("c3"), row("d4")]
    warnings: list[str] = []
    opened = trackers.open_trackers(where)
    for one in rows:
        trackers.log_new(one, opened, Path("my results"), warnings.append)
    [warning] = warnings
    assert re.match(rf"the tracker {where} does not take results \(.+\)\. All results are kept in my results", warning)
    assert warning.endswith(f"mlfusion results track --results 'my results' {where}")
    assert opened == []
    with pytest.raises(Unavailable, match="not sent again: repeat the command when it answers"):
        trackers.log_rows(rows, trackers.open_trackers(where))
    server.answers = 10**6  # it is there again
    for _ in range(2):
        trackers.log_rows(rows, trackers.open_trackers(where))
    server.close()
    monkeypatch.delitem(sys.modules, "mlflow")
    assert server.created == 4 and {run["info"]["status"] for run in server.runs.values()} == {"FINISHED"}


@pytest.mark.slow
@installed("tensorboard")
def test_a_file_where_tensorboard_writes_costs_one_warning_and_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = grids.Grid(learning_rates=(1e-1,), weight_decays=(1e-2,), dropouts=(0.0,), epochs=1, least_steps=2)
    monkeypatch.setitem(grids.SEARCH_GRIDS, "quick", grid)
    model, images = save_model("vit", tmp_path / "tiny-vit"), save_images(tmp_path / "c", {"train": 5, "test": 2})
    mlfusion.extract(str(model), str(images))
    Path("runs").write_text("in the way")
    lines: list[str] = []
    options: dict[str, Any] = {"probes": "cls-last/linear", "grid": "quick", "track": "tensorboard:runs"}
    done = mlfusion.probe(str(images), seeds=(0, 1, 2), log=lines.append, **options)
    assert len(done.rows) == 3 and len(mlfusion.Results("results").rows()) == 3
    [warning] = [line for line in lines if "tensorboard:runs" in line]
    Path("runs").unlink()
    subprocess.run([sys.executable, "-m", *shlex.split(warning.partition("To send them later: ")[2])], check=True)
    assert len(list(Path("runs").iterdir())) == 3


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
