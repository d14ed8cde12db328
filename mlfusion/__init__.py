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

from mlfusion.specs.definitions import distribute
from mlfusion.specs.options import (
    ComputeOptions,
    FeatureOptions,
    PilotOptions,
    ReadOptions,
    RunOptions,
    SearchOptions,
    StorageOptions,
    TrainingOptions,
)

if TYPE_CHECKING:
    import numpy as np

    from mlfusion.datasets import DataSet, array_dataset
    from mlfusion.errors import MlfusionError
    from mlfusion.extraction.explain import Explained
    from mlfusion.extraction.plan import Plan
    from mlfusion.extraction.run import ExtractionResult
    from mlfusion.probing.evaluation import ProbeResult
    from mlfusion.probing.rerun import Rerun
    from mlfusion.report import write_page
    from mlfusion.results import Results
    from mlfusion.specs.identity import TokenKind
    from mlfusion.store import CachePath, Check, FeatureStore, TokenReader
    from mlfusion.store.features import Features
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


def load_features(
    model: str,
    dataset: str,
    split: str,
    *,
    layers: str | Sequence[int] = "all",
    tokens: "str | Sequence[TokenKind]" = ("cls", "ap"),
    view: str = "plain",
    cache: "CachePath" = None,
) -> "Features[np.ndarray]":
    """Cached tokens as NumPy arrays, in their storage type; images skipped at extraction are left out.

        features = mlfusion.load_features("formula-vit", "digits", "train")
        features.tokens, features.labels        # [1442, 8, 2, 128] float16, [1442] int64
        tokens, labels = features.tensors()     # the same memory, as torch tensors

    bfloat16 and 8-bit tokens come as float32, which NumPy has.

    Args:
        model: a name, hub id or folder, as given to `extract`.
        dataset: a name, hub id, folder or file, as given to `extract`.
        split: 'train' or 'test'.
        layers: 'all' (1..L), 'last', '1-4,12', or numbers; their order is kept.
        tokens: token kinds, in the order wanted.
        view: view of the images, as extracted by --views: 'flip', 'crop1', …
        cache: its root, or layers of them; default $MLFUSION_CACHE, or ./cache.

    Raises:
        NotCached: says which `mlfusion extract` would make it so.
        CacheUnusable: a checksum is wrong.
    """
    from mlfusion.store.features import Selection
    from mlfusion.store.features import load_features as load

    return load(model, dataset, split, Selection(layers=layers, tokens=tokens, view=view), cache=cache)


def open_features(
    model: str,
    dataset: str,
    split: str,
    *,
    layers: str | Sequence[int] = "all",
    tokens: "str | Sequence[TokenKind]" = ("cls", "ap"),
    view: str = "plain",
    cache: "CachePath" = None,
    check: "Check" = "once",
) -> "Features[TokenReader]":
    """Cached tokens that are read on demand: they need not fit into memory.

        features = mlfusion.open_features("formula-vit", "digits", "train", layers="last")
        features.tokens[[5, 3, 900]], features.labels[[5, 3, 900]]      # these images, in this order
        for rows, tokens in features.tokens.batches(256, seed=0): ...   # one pass in a shuffled order

    The reader works in threads and in the workers of a torch DataLoader; a prune leaves it what it reads. With `check`
    'once' a chunk's checksum is compared when it is first read, with 'always' at every reading, with 'never' not at all. The
    other arguments and the errors are those of `load_features`.
    """
    from mlfusion.store.features import Selection
    from mlfusion.store.features import open_features as open_with

    wanted = Selection(layers=layers, tokens=tokens, view=view)
    return open_with(model, dataset, split, wanted, cache=cache, check=check)


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
