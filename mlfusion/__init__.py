"""mlfusion: ask a frozen vision transformer what its layers know, and which head gets it out.

Stage 1, `extract`, caches every layer's tokens; stage 2, `probe`, trains heads on the cache. Importing this is cheap: each
name brings what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlfusion.datasets import ReadOptions, array_dataset
    from mlfusion.errors import MlfusionError
    from mlfusion.evaluation import probe
    from mlfusion.extraction import Making, extract
    from mlfusion.features import Features, load_features, open_features
    from mlfusion.prediction import predict
    from mlfusion.results import Results
    from mlfusion.store import FeatureStore

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
    "Features": "features",
    "Making": "extraction",
    "MlfusionError": "errors",
    "ReadOptions": "datasets",
    "Results": "results",
    "array_dataset": "datasets",
    "extract": "extraction",
    "load_features": "features",
    "open_features": "features",
    "predict": "prediction",
    "probe": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"mlfusion.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mlfusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
