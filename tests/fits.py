"""Options of one fit, and every head, for tests: the quick grid, and matrix products of float32, the same on every machine."""

from typing import Any

import pytest

from mlfusion.probing.heads import HEADS
from mlfusion.probing.search import FitOptions
from mlfusion.specs.options import SearchOptions

EVERY_HEAD = [pytest.param(head, marks=pytest.mark.long) if head == "v-jepa-4" else head for head in HEADS]
"""The heads that are trained, for `parametrize`; the deepest takes as long as all others together."""


def fit_options(seed: int = 0, *, heads: int | None = None, **search: Any) -> FitOptions:
    return FitOptions(
        seed=seed, heads=heads, search=SearchOptions(**{"grid": "quick", "precision": "float32"} | search)
    )
