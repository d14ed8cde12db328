"""The predicted time of training a probe: exact in the number of steps, measured in the rate of one, finite, positive."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch

from mlfusion.probing import costs
from mlfusion.probing.costs import Problem
from mlfusion.probing.heads import HEADS
from mlfusion.specs.names import parse_probes
from mlfusion.specs.options import SearchOptions

SMALL = Problem(tokens=2, width=16, classes=10, images=300)
QUICK = SearchOptions(grid="quick", precision="float32")
PAPER = SearchOptions(grid="paper", precision="float32")


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A clock by which every step of a trial takes one second, whatever the machine is at."""
    ticks = count()
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    for measured in (costs._step_seconds, costs._search_seconds):
        measured.cache_clear()
    yield
    for measured in (costs._step_seconds, costs._search_seconds):
        measured.cache_clear()


def seconds(name: str, problem: Problem = SMALL, search: SearchOptions = QUICK) -> float:
    [probe] = parse_probes(name, depth=12)
    return costs.seconds(probe, problem, search)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_has_a_time(head: str) -> None:
    """A trial is run of each, at the sizes that a probe of that head has."""
    time = seconds(f"cls+ap-last/{head}")
    assert math.isfinite(time)
    assert time > 0


@pytest.mark.parametrize(
    ("name", "search", "configurations", "alone"),
    [
        ("cls-last/linear", QUICK, 3, 1),
        ("cls-last/linear", PAPER, 3 * 7, 1),
        ("cls+ap-last/attentive:h2", QUICK, 3, 2),
        ("cls+ap-last/attentive:h2", PAPER, 3 * 7 * 3, 2),
    ],
)
def test_a_grid_takes_its_steps_by_the_time_of_one(
    name: str, search: SearchOptions, configurations: int, alone: int
) -> None:
    """300 images are five batches of 60; the trial has 32, one second for as many blocks as there are threads."""
    steps = {"quick": max(12 * 5, 300), "paper": max(40 * 5, 1000)}[search.grid]
    width = min(7, configurations)
    # One refit and one twin by a thread each.
    expected = (configurations / (width * torch.get_num_threads()) + alone) * steps * 60 / 32
    assert seconds(name, search=search) == pytest.approx(expected)


def test_beside_other_rows_no_thread_waits() -> None:
    """On two threads the refit and the twin take half of their time each, as another row has the other thread."""
    [probe] = parse_probes("cls+ap-last/attentive:h2", depth=12)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    alone, beside = (costs.seconds(probe, SMALL, QUICK, beside_others=beside) for beside in (False, True))
    torch.set_num_threads(before)
    steps = 300 * 60 / 32
    assert (alone, beside) == pytest.approx(((3 / (3 * 2) + 2) * steps, (3 / (3 * 2) + 2 / 2) * steps))


def test_halving_runs_a_third_of_the_grid() -> None:
    """63 configurations for 112 steps, 21 for 334, 7 for 1,000, in place of 63 for 1,000."""
    whole = seconds("cls+ap-last/attentive:h2", search=PAPER)
    halved = seconds("cls+ap-last/attentive:h2", search=replace(PAPER, halving=True))
    alone = 2 * 1000 * torch.get_num_threads() * 7  # refit and twin, by one step each for seven of a block
    assert halved / whole == pytest.approx((63 * 112 + 21 * 334 + 7 * 1000 + alone) / (63 * 1000 + alone))


@pytest.mark.parametrize(
    ("head", "images"),
    [
        ("linear", (64, 100, 300)),  # the least number of steps, and larger batches: of the smallest trial
        ("linear", (2_000, 10_000, 500_000, 10**7)),  # larger batches up to 2,048, then more steps
        ("ridge", (64, 300, 10_000, 10**7)),
    ],
)
def test_more_images_take_longer(head: str, images: tuple[int, ...]) -> None:
    times = [seconds(f"cls-last/{head}", replace(SMALL, images=count)) for count in images]
    assert all(one < other for one, other in pairwise(times))


def test_classes_are_rounded_up_to_the_next_trial() -> None:
    """Problems between two sizes share one trial, so that a study of many data sets measures few."""
    problems = [replace(SMALL, classes=classes) for classes in (2, 16, 17, 128, 5000)]
    for problem in problems:
        seconds("cls-last/linear", problem)
    assert costs._step_seconds.cache_info().misses == 2 * 3  # a block and one alone, of 16, 128 and 1,024 classes
