"""mlfusion: probes the layers of frozen vision transformers.

Stage 1, `extract`, caches every layer's tokens; stage 2, `probe`, trains heads on the cache. The import is cheap: modules are
loaded when a name is first used. The functions here take every option as a keyword, such as
`extract("clip-vit-b16", "dtd", layers="last")`; docs/reference.md lists the options.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfusion.specs.definitions import distribute
from mlfusion.specs.options import (
    ComputeOptions,
    FeatureOptions,
    PilotOptions,
    PredictorOptions,
    ReadOptions,
    RunOptions,
    SearchOptions,
    StorageOptions,
    TrainingOptions,
)
from mlfusion.specs.selection import EmbeddingOptions

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
    from mlfusion.workflows.prediction import Picture, Prediction, Predictor
    from mlfusion.workflows.study import StudyResult

__all__ = [
    "ComputeOptions",
    "EmbeddingOptions",
    "FeatureOptions",
    "FeatureStore",
    "Features",
    "MlfusionError",
    "PilotOptions",
    "PredictorOptions",
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
    "load_probe",
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
    """Cache a frozen model's tokens of a data set; cached tokens are not computed again.

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
    """Estimate what `extract` with the same arguments would write and how long it would take, by a trial of some seconds."""
    from mlfusion.extraction.plan import plan as plan_with

    return plan_with(model, dataset, *distribute(options, FeatureOptions, ComputeOptions), cache=cache, trial=trial)


def explain(model: str, dataset: "str | DataSet", *, cache: "CachePath" = None, **options: Any) -> "list[Explained]":
    """For each split, find the entry that `extract` with the same arguments would use, or how the nearest one differs."""
    from mlfusion.extraction.explain import explain as explain_with

    return explain_with(model, dataset, *distribute(options, FeatureOptions, ComputeOptions), cache=cache)


def load_features(
    model: str,
    dataset: str,
    split: str,
    *,
    layers: str | int | Sequence[int] = "all",
    tokens: "str | Sequence[TokenKind]" = ("cls", "ap"),
    view: str = "plain",
    cache: "CachePath" = None,
) -> "Features[np.ndarray]":
    """Cached tokens as NumPy arrays, in their storage type; images skipped at extraction are left out.

        features = mlfusion.load_features("formula-vit", "digits", "train")
        features.tokens, features.labels        # [1442, 8, 2, 128] float16, [1442] int64
        tokens, labels = features.tensors()     # the same memory, as torch tensors
        features.write("digits.parquet")        # id, label and embedding of each image; or .npy

    bfloat16 and 8-bit tokens are returned as float32, since NumPy has no such types.

    Args:
        model: a name, hub id or folder, as given to `extract`.
        dataset: a name, hub id, folder or file, as given to `extract`.
        split: the name of a cached split, such as 'train', 'test' or 'val' (the same as 'validation').
        layers: 'all' (1..L), 'last', '1-4,12', a number or numbers; the order is kept.
        tokens: token kinds; the order is kept.
        view: view of the images, as extracted by --views: 'flip', 'crop1', …
        cache: its root, or layers of them; default $MLFUSION_CACHE, or ./cache.

    Raises:
        NotCached: the message has the `mlfusion extract` command to run.
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
    layers: str | int | Sequence[int] = "all",
    tokens: "str | Sequence[TokenKind]" = ("cls", "ap"),
    view: str = "plain",
    cache: "CachePath" = None,
    check: "Check" = "once",
) -> "Features[TokenReader]":
    """Cached tokens that are read on demand, so they need not fit into memory.

        features = mlfusion.open_features("formula-vit", "digits", "train", layers="last")
        features.tokens[[5, 3, 900]], features.labels[[5, 3, 900]]      # these images, in this order
        for rows, tokens in features.tokens.batches(256, seed=0): ...   # one pass in a shuffled order
        features[5], len(features)                                      # one image's (tokens, label); number of images
        torch.utils.data.DataLoader(features, batch_size=256)           # works too; `batches` reads larger pieces

    The reader works in threads and in the workers of a torch DataLoader; a prune does not remove entries in use. `check` sets
    when a chunk's checksum is verified: 'once' (at the first read), 'always' or 'never'. Other arguments and errors are those
    of `load_features`.
    """
    from mlfusion.store.features import Selection
    from mlfusion.store.features import open_features as open_with

    selection = Selection(layers=layers, tokens=tokens, view=view)
    return open_with(model, dataset, split, selection, cache=cache, check=check)


def probe(
    dataset: str,
    *,
    model: str | None = None,
    probes: str | Sequence[str] = "all",
    log: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> "ProbeResult":
    """Train and test probes on cached features by the study's protocol.

    Args:
        dataset: as given to `extract`.
        model: as given to `extract`; None: every model cached for the data set.
        probes: names as in `mlfusion ls probes`, or 'all': the study's ten, if their tokens are cached.
        log: called with messages about reused rows and omitted probes.
        options: fields of `SearchOptions`, `TrainingOptions` and `StorageOptions`.

    Raises:
        NotCached: the message has the `mlfusion extract` command to run.
        MlfusionError: any other of its kinds.
    """
    from mlfusion.probing.evaluation import probe as probe_with

    search, training, storage = distribute(options, SearchOptions, TrainingOptions, StorageOptions)
    return probe_with(dataset, model, probes, search, training, storage, log)


def load_probe(probe: str | os.PathLike[str], **options: Any) -> "Predictor":
    """Load a saved probe and its backbone once, for any number of predictions.

        predictor = mlfusion.load_probe("results/probes/r17b75bdf052900c")
        predictor.predict("cat.jpg")                  # 'cat'
        predictor.predict_proba([image, other])       # [2, C], columns in the order of predictor.classes_

    Images are preprocessed as the probe's card says, not as the files of a model that has moved say.

    Args:
        probe: the folder that `mlfusion probe --save` wrote, or the id of its result, or the first characters of the id.
        options: fields of `PredictorOptions`.

    Raises:
        ResultsUnusable: no probe in that folder, or a damaged one; or the probe of that result was not kept.
        UnknownName: no result has that id.
        BadModel: the backbone is another than the probe's.
    """
    from mlfusion.workflows.prediction import load_probe as load

    return load(probe, *distribute(options, PredictorOptions))


def predict(
    probe: str | os.PathLike[str], images: "Iterable[Picture]", *, top: int = 5, batch_size: int = 32, **options: Any
) -> "list[Prediction]":
    """Predict images with a saved probe, once; a program that predicts more often holds `load_probe`.

    Args:
        probe: as of `load_probe`.
        images: paths, of which a folder means the images below it in the order of their paths; or images in memory, as
            `load_probe`'s predictor takes them.
        top: number of classes in a prediction.
        batch_size: number of images in a forward pass.
        options: fields of `PredictorOptions`.

    Raises:
        MlfusionError: as of `load_probe`; BadData: an image cannot be read.
    """
    from mlfusion.workflows.prediction import predict as predict_with

    return predict_with(probe, images, *distribute(options, PredictorOptions), top=top, batch_size=batch_size)


def rerun(row_id: str, *, keep: bool = False, device: str | None = None, **options: Any) -> "Rerun":
    """Train the probe of a row again, and compare the scores.

    Args:
        row_id: id of the row, or the first characters of it.
        keep: store missing arrays and the trained probe if the scores are the same.
        device: device of the training; None: the row's own.
        options: fields of `StorageOptions`.
    """
    from mlfusion.probing.rerun import rerun as rerun_with

    [storage] = distribute(options, StorageOptions)
    return rerun_with(row_id, keep=keep, device=device, storage=storage)


def run(
    recipe: str | os.PathLike[str], *, log: Callable[[str], None] = lambda _: None, **options: Any
) -> "StudyResult":
    """Run both stages of a recipe file (see `pipelines/`); cached features and stored rows are reused.

    `log` is called with messages about the progress; `options` are fields of `RunOptions` and `StorageOptions`.
    """
    from mlfusion.workflows import study
    from mlfusion.workflows.recipe import load

    run_options, storage = distribute(options, RunOptions, StorageOptions)
    loaded = load(Path(recipe), data=run_options.data, seeds=run_options.seeds)
    return study.run(study.plan(loaded, storage, device=run_options.device), log=log)


def advise(
    model: str,
    dataset: str,
    *,
    probes: str | Sequence[str] | None = None,
    cache: "CachePath" = None,
    device: str = "auto",
    **options: Any,
) -> "Advice":
    """Recommend a probe for a model's features of a data set by a pilot study; `options` are fields of `PilotOptions`."""
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
