"""Export of results to experiment trackers: TensorBoard, Weights & Biases and MLflow, each an extra.

Rows are logged when they are saved, or later; the results folder stays the authoritative copy. Each row becomes one run
with the row's id, so that a chart can be traced to its row, and a row that was logged is not logged again.
"""

import logging
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from msgspec import to_builtins

from mlfusion.errors import Unavailable, UnknownName
from mlfusion.results import Row
from mlfusion.specs.definitions import command

logger = logging.getLogger(__name__)


DONE = "mlfusion.done"
"""Empty file in a row's TensorBoard folder, written after everything else: the row is not logged again."""


class Tracker(Protocol):
    """An experiment tracker that rows are logged to."""

    word: str  # as the user named it, such as 'tensorboard:runs'

    def log(self, row: Row) -> None:
        """Log a row as a run, unless the tracker has it already. Errors are those of the tracker's library."""


def settings(row: Row) -> dict[str, str | int | float]:
    """The options of a row, which trackers call hyper-parameters, without those that were not used."""
    fields = to_builtins(row)
    names = ("model", "dataset", "probe", "seed", "grid", "metric", "parameters", "code", "id")
    options = (
        "shots",
        "halving",
        "smoothing",
        "drop_duplicates",
        "choose_on",
        "folds",
        "precision",
        "device",
        "protocol",
    )
    selected = {f"selected.{name}": value for name, value in fields["selected"].items()}
    return {name: fields[name] for name in (*names, *options) if name in fields} | selected


def scores(row: Row) -> dict[str, float]:
    """The scores as fractions, and the seconds of training."""
    metrics = {f"metrics.{k}": value for k, value in to_builtins(row.metrics).items() if isinstance(value, float)}
    return {"test": row.test, "val": row.val, "train": row.train, "seconds": row.seconds} | metrics


def layers(row: Row) -> dict[str, dict[int, float]]:
    """{token kind: {layer: share of the attention}}; empty for a probe of a single layer."""
    attention = row.attention
    shares: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    if attention and len(set(attention.layers)) > 1:
        for layer, kind, mean in zip(attention.layers, attention.kinds, attention.mean, strict=True):
            shares[kind][layer] += mean
    return shares


def title(row: Row) -> str:
    """'formula-vit on digits: cls-last/linear, seed 0'."""
    return f"{row.model} on {row.dataset}: {row.probe}, seed {row.seed}"


class TensorBoard:
    """A folder that `tensorboard --logdir` reads: scalars, attention by layer, and hyper-parameters with their scores."""

    def __init__(self, location: str) -> None:
        """`location` is the folder; default runs."""
        self.word, self.folder = f"tensorboard:{location or 'runs'}", Path(location or "runs")
        self._writer = _imported("torch.utils.tensorboard.writer", "tensorboard", "TensorBoard").SummaryWriter

    def log(self, row: Row) -> None:
        from torch.utils.tensorboard.summary import hparams

        words = row.model, row.dataset, row.probe, row.seed, row.id
        name = "__".join(re.sub(r"[^\w+.-]|_", "-", str(word)) for word in words)  # a folder's name on any file system
        created = datetime.fromisoformat(row.created).timestamp()
        folder = self.folder / name
        if (folder / DONE).exists():
            return
        shutil.rmtree(folder, ignore_errors=True)  # what a kill or a full disk left of this row
        with self._writer(str(folder)) as writer:
            numbers = scores(row)
            for summary in hparams(settings(row), dict(numbers)):
                writer.file_writer.add_summary(summary, walltime=created)
            for name, value in numbers.items():
                writer.add_scalar(name, value, walltime=created)
            for kind, shares in layers(row).items():
                for layer, share in shares.items():
                    writer.add_scalar(f"attention/{kind}", share, layer, walltime=created)
        (folder / DONE).touch()


class WandB:
    """Weights & Biases, one run per row. WANDB_MODE, WANDB_DIR and the login are configured as usual there."""

    def __init__(self, location: str) -> None:
        """`location` is the project; default mlfusion."""
        self.project, self._wandb = location or "mlfusion", _imported("wandb", "wandb", "Weights & Biases")
        self.word = f"wandb:{self.project}"

    def log(self, row: Row) -> None:
        run = self._wandb.init(
            project=self.project,
            id=row.id,  # a run of the same id is written again, so that a row has one
            name=title(row),
            group=f"{row.model} on {row.dataset}",
            job_type=row.probe,
            config=settings(row),
            settings=self._wandb.Settings(silent=True, console="off"),
        )
        try:
            for kind, shares in layers(row).items():
                run.define_metric(f"attention/{kind}", step_metric="layer")
                for layer, share in shares.items():
                    run.log({"layer": layer, f"attention/{kind}": share})
            run.log(scores(row))
        finally:
            run.finish()


class MLflow:
    """An MLflow server or database, one run per row in the experiment mlfusion."""

    def __init__(self, location: str) -> None:
        """`location` is the tracking URI; default MLflow's own, such as $MLFLOW_TRACKING_URI."""
        # MLflow's own default waits some minutes for a server that does not answer.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._mlflow, self._uri = _imported("mlflow", "mlflow", "MLflow"), location or None
        self.word = f"mlflow:{location}" if location else "mlflow"
        self._client: Any = None
        self._experiment = ""

    def log(self, row: Row) -> None:
        entities = self._mlflow.entities
        client = self._client = self._client or self._mlflow.MlflowClient(tracking_uri=self._uri)
        if not self._experiment:
            existing = client.get_experiment_by_name("mlfusion")
            self._experiment = existing.experiment_id if existing else client.create_experiment("mlfusion")
        created = round(1000 * datetime.fromisoformat(row.created).timestamp())
        runs = client.search_runs([self._experiment], filter_string=f"tags.`mlfusion.id` = '{row.id}'", max_results=1)
        if runs and runs[0].info.status == "FINISHED":
            return
        # A run that is not finished is one whose server was gone before the scores arrived.
        new = {"start_time": created, "run_name": title(row), "tags": {"mlfusion.id": row.id}}
        run = runs[0] if runs else client.create_run(self._experiment, **new)
        metrics = [entities.Metric(name, value, created, 0) for name, value in scores(row).items()]
        metrics += [
            entities.Metric(f"attention/{kind}", share, created, layer)
            for kind, shares in layers(row).items()
            for layer, share in shares.items()
        ]
        params = [entities.Param(name, str(value)) for name, value in settings(row).items()]
        client.log_batch(run.info.run_id, metrics=metrics, params=params)
        client.set_terminated(run.info.run_id)


TRACKERS: dict[str, Callable[[str], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def open_trackers(words: str | Sequence[str]) -> list[Tracker]:
    """'tensorboard:runs,wandb:project,mlflow:sqlite:///mlflow.db' → trackers; the location follows the first colon.

    Raises:
        UnknownName: there is no such tracker.
        Unavailable: its extra is not installed; says how to.
    """
    parts = [part.strip() for part in (words.split(",") if isinstance(words, str) else words)]
    trackers: list[Tracker] = []
    for part in filter(None, parts):
        name, _, location = part.partition(":")
        if name not in TRACKERS:
            raise UnknownName("tracker", name, TRACKERS, otherwise="A place may follow, as in tensorboard:runs.")
        trackers.append(TRACKERS[name](location))
    return trackers


def log_rows(rows: Iterable[Row], trackers: Sequence[Tracker], progress: Callable[[], object] = lambda: None) -> None:
    """Log stored rows to trackers, each row once; `progress` is called after each row.

    Raises:
        Unavailable: a tracker cannot be reached or written; the rows that it has are not logged again the next time.
    """
    for row in rows:
        for tracker in trackers:
            if problem := _problem(tracker, row):
                raise Unavailable(
                    f"{problem}. Rows that were sent are not sent again: repeat the command when it answers"
                )
        progress()


def log_new(row: Row, trackers: list[Tracker], results: Path, warn: Callable[[str], None]) -> None:
    """Log a row that was just saved to `results`. A tracker that fails leaves the list, with one warning."""
    for tracker in list(trackers):
        if problem := _problem(tracker, row):
            trackers.remove(tracker)
            later = command("results track", [tracker.word], results=str(results))
            warn(
                f"{problem}. All results are kept in {results}, and no more are sent there now. To send them later: {later}"
            )


def _problem(tracker: Tracker, row: Row) -> str | None:
    """Log a row to a tracker; why it failed in one line, or None. A failing tracker must not cost a result."""
    try:
        tracker.log(row)
    except Exception as err:
        logger.debug("%s failed", tracker.word, exc_info=True)
        reason = " ".join(str(err).split())[:200] or type(err).__name__
        return f"the tracker {tracker.word} does not take results ({reason})"
    return None


def _imported(module: str, extra: str, product: str) -> Any:
    try:
        return import_module(module)
    except ImportError as err:
        raise Unavailable(
            f"{product} is not installed ({err}). Install it with: pip install 'mlfusion[{extra}]', or leave "
            f"{extra} out of --track"
        ) from err
