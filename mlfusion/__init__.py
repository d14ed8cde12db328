"""mlfusion: ask a frozen vision transformer what its layers know, and which head gets it out.

Stage 1, `extract`, caches every layer's tokens; stage 2, `probe`, trains heads on the cache. Importing this is cheap: each
name brings what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlfusion.datasets import ReadOptions, array_dataset
    from mlfusion.errors import MlfusionError
    from mlfusion.extraction.request import Making
    from mlfusion.extraction.run import extract
    from mlfusion.probing.evaluation import probe
    from mlfusion.results import Results
    from mlfusion.store import FeatureStore
    from mlfusion.store.features import Features, load_features, open_features
    from mlfusion.workflows.prediction import predict

__all__ = [
    "FeatureStore",
    "Features",
    "Making",
    "MlfusionError",
    "ReadOptions",
    "Results",
    "array_dataset",
    "extract",
    "load_features",
    "open_features",
    "predict",
    "probe",
]

_HOME = {
    "FeatureStore": "store",
    "Features": "store.features",
    "Making": "extraction.request",
    "MlfusionError": "errors",
    "ReadOptions": "datasets",
    "Results": "results",
    "array_dataset": "datasets",
    "extract": "extraction.run",
    "load_features": "store.features",
    "open_features": "store.features",
    "predict": "workflows.prediction",
    "probe": "probing.evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"mlfusion.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mlfusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
