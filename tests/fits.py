"""Options of one fit, for tests: the quick grid, and matrix products of float32, which are the same on every machine."""

from typing import Any

from mlfusion.probing.search import FitOptions
from mlfusion.specs.options import SearchOptions


def fit_options(seed: int = 0, *, heads: int | None = None, **search: Any) -> FitOptions:
    return FitOptions(
        seed=seed, heads=heads, search=SearchOptions(**{"grid": "quick", "precision": "float32"} | search)
    )
