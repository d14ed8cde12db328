"""Each fault is tried a few times in `make test`, and many times with MLFUSION_FAULTS=long, which counts trials and losses."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from mlfusion.store import stream

pytest.register_assert_rewrite("workers")

LONG = os.environ.get("MLFUSION_FAULTS") == "long"
TALLY: dict[str, list[int]] = {}  # what was tried → how often, how often something was lost


@pytest.fixture
def many() -> Callable[[int, int], int]:
    """How often to try: `many(short, long)`."""
    return lambda short, long: long if LONG else short


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


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    """Shards of eight images, four of `all` tokens; chunks of four of one: many files of a few bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "SHARD_ROWS", (8, 8))
        patch.setattr(stream, "SHARD_BYTES", 4 * 17 * 4 * 2)
        patch.setattr(stream, "CHUNK_BYTES", 4 * 4 * 2)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table that docs/faults.md publishes."""
    if LONG and TALLY:
        terminalreporter.write_line("\n| what | trials | lost |\n|---|---:|---:|")
        for what, (tried, lost) in TALLY.items():
            terminalreporter.write_line(f"| {what} | {tried:,} | {lost:,} |")
        terminalreporter.write_line(
            f"| **all** | **{sum(t for t, _ in TALLY.values()):,}** | **{sum(n for _, n in TALLY.values()):,}** |"
        )
