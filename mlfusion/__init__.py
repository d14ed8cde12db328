"""mlfusion: ask a frozen vision transformer what its layers know, and which head gets it out.

Stage 1, `extract`, caches every layer's tokens; stage 2, `probe`, trains heads on the cache. Importing this is cheap: each
name brings what it needs when it is first used. The functions here take every option as a keyword, such as
`extract("clip-vit-b16", "dtd", layers="last")`; docs/reference.md lists them.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfusion.specs.options import (
    ComputeOptions,
    FeatureOptions,
    PilotOptions,
    ReadOptions,
    RunOptions,
    SearchOptions,
    StorageOptions,
    TrainingOptions,
    distribute,
)

if TYPE_CHECKING:
    from mlfusion.datasets import DataSet, array_dataset
    from mlfusion.errors import MlfusionError
    from mlfusion.extraction.explain import Explained
    from mlfusion.extraction.plan import Plan
    from mlfusion.extraction.run import ExtractionResult
    from mlfusion.probing.evaluation import ProbeResult
    from mlfusion.probing.rerun import Rerun
    from mlfusion.report import write_page
    from mlfusion.results import Results
    from mlfusion.store import CachePath, FeatureStore
    from mlfusion.store.features import Features, load_features, open_features
    from mlfusion.workflows.advice import Advice
    from mlfusion.workflows.prediction import predict
    from mlfusion.workflows.study import StudyResult

__all__ = [
    "ComputeOptions",
    "FeatureOptions",
    "FeatureStore",
    "Features",
    "MlfusionError",
    "PilotOptions",
    "ReadOptions",
    "Results",
    "RunOptions",
    "SearchOptions",
    "StorageOptions",
    "TrainingOptions",
    "advise",
    "array_dataset",
    "explain",
    "extract",
    "load_features",
    "open_features",
    "plan",
    "predict",
    "probe",
    "rerun",
    "run",
    "write_page",
]

_HOME = {
    "FeatureStore": "store",
    "Features": "store.features",
    "MlfusionError": "errors",
    "Results": "results",
    "array_dataset": "datasets",
    "load_features": "store.features",
    "open_features": "store.features",
    "predict": "workflows.prediction",
    "write_page": "report",
}


def extract(
    model: str,
    dataset: "str | DataSet",
    *,
    cache: "CachePath" = None,
    log: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> "list[ExtractionResult]":
    """Cache a frozen model's tokens of a data set; what is there already is not computed again.

    Args:
        model: a catalogue name, an id on the hub, or a folder.
        dataset: a catalogue name, an id on the hub, a folder or a file; or images in memory, by `array_dataset`.
        cache: its root, or layers of them; default $MLFUSION_CACHE, or ./cache.
        log: called with a message while waiting for another extractor of the same entry.
        options: fields of `FeatureOptions`, `ReadOptions` and `ComputeOptions`.

    Raises:
        MlfusionError: one of its kinds; see `mlfusion.errors`.
    """
    from mlfusion.extraction.run import extract as extract_with

    return extract_with(model, dataset, *distribute(options, FeatureOptions, ComputeOptions), cache=cache, log=log)


def plan(
    model: str, dataset: "str | DataSet", *, cache: "CachePath" = None, trial: float = 5.0, **options: Any
) -> "Plan":
    """Say what `extract` with the same arguments would write and how long it would take, by a trial of some seconds."""
    from mlfusion.extraction.plan import plan as plan_with

    return plan_with(model, dataset, *distribute(options, FeatureOptions, ComputeOptions), cache=cache, trial=trial)


def explain(model: str, dataset: "str | DataSet", *, cache: "CachePath" = None, **options: Any) -> "list[Explained]":
    """Say for each split which entry `extract` with the same arguments would use, or how the nearest one differs."""
    from mlfusion.extraction.explain import explain as explain_with

    return explain_with(model, dataset, *distribute(options, FeatureOptions, ComputeOptions), cache=cache)


def probe(
    dataset: str,
    *,
    model: str | None = None,
    probes: str | Sequence[str] = "all",
    log: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> "ProbeResult":
    """Train and test probes on cached features, each by the study's protocol.

    Args:
        dataset: as given to `extract`.
        model: as given to `extract`; None is every model whose features of the data set are cached.
        probes: names as in `mlfusion ls probes`, or 'all': those of the study's ten that the cache can serve.
        log: called with a line about what is reused and what is left out.
        options: fields of `SearchOptions`, `TrainingOptions` and `StorageOptions`.

    Raises:
        NotCached: says which `mlfusion extract` to run.
        MlfusionError: any other of its kinds.
    """
    from mlfusion.probing.evaluation import probe as probe_with

    search, training, storage = distribute(options, SearchOptions, TrainingOptions, StorageOptions)
    return probe_with(dataset, model, probes, search, training, storage, log)


def rerun(row_id: str, *, keep: bool = False, device: str | None = None, **options: Any) -> "Rerun":
    """Train a row's probe again from the row alone, and compare.

    Args:
        row_id: its id, or the beginning of it.
        keep: put arrays and trained probe beside the row if the scores are the same and they are not there.
        device: device of the training; None is the row's own.
        options: fields of `StorageOptions`.
    """
    from mlfusion.probing.rerun import rerun as rerun_with

    [storage] = distribute(options, StorageOptions)
    return rerun_with(row_id, keep=keep, device=device, storage=storage)


def run(
    recipe: str | os.PathLike[str], *, log: Callable[[str], None] = lambda _: None, **options: Any
) -> "StudyResult":
    """Both stages, as a recipe (a file of `pipelines/`) says; what is cached or done already is not done again.

    `log` is called with a line about what is done; `options` are fields of `RunOptions` and `StorageOptions`.
    """
    from mlfusion.workflows import study
    from mlfusion.workflows.recipe import load

    asked, storage = distribute(options, RunOptions, StorageOptions)
    whole = load(Path(recipe), data=asked.data)
    if asked.seeds:
        whole = replace(whole, search=replace(whole.search, seeds=asked.seeds))
    return study.run(study.plan(whole, storage, device=asked.device), log=log)


def advise(
    model: str,
    dataset: str,
    *,
    probes: str | Sequence[str] | None = None,
    cache: "CachePath" = None,
    device: str = "auto",
    **options: Any,
) -> "Advice":
    """Say by a pilot which probe to use on a model's features of a data set; `options` are fields of `PilotOptions`."""
    from mlfusion.workflows.advice import CANDIDATES
    from mlfusion.workflows.advice import advise as advise_with

    [pilot] = distribute(options, PilotOptions)
    return advise_with(model, dataset, pilot, probes=probes or CANDIDATES, cache=cache, device=device)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"mlfusion.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mlfusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
