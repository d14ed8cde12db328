"""Each fault is tried a few times in `make test`, and many times in the long form; trials and losses are counted."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiers

from mlfusion.store import stream

pytest.register_assert_rewrite("workers")

TALLY: dict[str, list[int]] = {}  # what was tried → how often, how often something was lost
FIGURES: dict[str, dict[str, Any]] = {}  # what else was counted, by the name of the table that shows it


@pytest.fixture
def many(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How often to try: `many(short, long)`; the short number once the minutes of `make test-all` are over."""
    if tiers.LONG and not (in_time := tiers.in_time()):
        request.node.user_properties.append(("cut", "yes"))
    return lambda short, long: long if tiers.LONG and in_time else short


@pytest.fixture
def trial() -> Callable[[str], AbstractContextManager[None]]:
    """Counts what happens inside `with trial(what)` as one trial, and as a loss if it raises."""

    @contextmanager
    def one(what: str) -> Iterator[None]:
        count = TALLY.setdefault(what, [0, 0])
        count[0] += 1
        count[1] += 1
        yield
        count[1] -= 1

    return one


@pytest.fixture
def figures() -> dict[str, dict[str, Any]]:
    """For what a page shows beside trials and losses."""
    return FIGURES


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    """Shards of eight images, four of `all` tokens; chunks of four of one: many files of a few bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "SHARD_ROWS", (8, 8))
        patch.setattr(stream, "SHARD_BYTES", 4 * 17 * 4 * 2)
        patch.setattr(stream, "CHUNK_BYTES", 4 * 4 * 2)
        yield


def pytest_sessionfinish() -> None:
    """Trials and losses by what was tried, into the file that MLFUSION_TALLY names: for benchmarks/faults.py."""
    if place := os.environ.get("MLFUSION_TALLY"):
        Path(place).write_text(json.dumps({"tally": TALLY, "figures": FIGURES}), encoding="utf-8")
