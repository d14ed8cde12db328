"""Predicts the time that training a probe takes, from a trial of a few steps on random tokens; plans and advice use it."""

import time
from dataclasses import dataclass
from functools import cache

import numpy as np

from mlfusion.probing import grids, protocol
from mlfusion.probing.heads import HEADS, HeadShape
from mlfusion.probing.search import SOLVERS, FitOptions
from mlfusion.probing.targets import OneClass
from mlfusion.probing.training import population
from mlfusion.probing.training.batches import Schedule, Tokens
from mlfusion.probing.training.population import Configuration, Population, TrainingData
from mlfusion.probing.training.precision import Numerics
from mlfusion.specs.names import Head, Probe
from mlfusion.specs.options import SearchOptions
from mlfusion.system import threads

IMAGES = (32, 64, 128, 256)  # sizes of the trial's batch; the next smaller one is tried
STEPS = 3  # steps of the trial; the first is not counted
CLASSES = (16, 128, 1024)  # numbers of classes; the next larger one is tried


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The sizes that determine the cost of training a probe."""

    tokens: int  # T, tokens per image
    width: int  # D
    classes: int  # C
    images: int  # N, training images


def seconds(
    probe: Probe, problem: Problem, search: SearchOptions, *, device: str = "cpu", beside_others: bool = False
) -> float:
    """Time to choose and refit one seed's probe, roughly: the number of steps is exact, the rate of a step is measured here.

    `beside_others`: whether others are trained at the same time, so that no core waits.
    """
    if probe.head in SOLVERS:
        return _search_seconds(probe.head, problem.tokens, problem.width, search) * problem.images / IMAGES[-1]
    grid = grids.SEARCH_GRIDS[search.grid]
    schedule, configurations = grid.schedule(problem.images), len(grid.configurations(probe.head))
    stages = grids.rungs(configurations, schedule.steps, halving=search.halving)
    steps = sum(members * until for members, until in stages)
    heads = probe.heads or (8 if probe.representation.spatial else min(problem.tokens, problem.width))
    shape = HeadShape(
        tokens=problem.tokens,
        width=problem.width,
        classes=next((c for c in CLASSES if c >= problem.classes), CLASSES[-1]),
        heads=heads if HEADS[probe.head].has_attention else 1,
    )
    batch = max((b for b in IMAGES if b <= schedule.batch_size), default=IMAGES[0])
    numerics = Numerics.of(device, search.precision)
    width = population.width_of(probe.head, shape, batch, configurations)
    together, alone = (_step_seconds(probe.head, shape, batch, numerics, each) for each in (width, 1))
    singles = 1 if HEADS[probe.head].is_convex else 2  # the refit, and the twin that tries the choice: one thread each
    idle = 1 if beside_others else threads.count()
    step = together * steps + alone * singles * schedule.steps * idle
    return step * schedule.batch_size / batch


def _random_tokens(images: int, tokens: int, width: int, classes: int) -> Tokens:
    random = np.random.default_rng(0)
    values = random.standard_normal((images, tokens, width), np.float32).astype(np.float16)
    return Tokens(values, np.arange(images) % classes)


@cache
def _step_seconds(head: Head, shape: HeadShape, images: int, numerics: Numerics, width: int) -> float:
    """Seconds of one step of one configuration on a batch, where all threads are busy; `width` share products."""
    # One block per thread: a grid has more, and keeps all threads busy.
    count = width * threads.count()
    configurations = [Configuration(1e-3, 1e-2 + k, 0.1, place=k) for k in range(count)]
    tokens = _random_tokens(images, shape.tokens, shape.width, shape.classes)
    schedule = Schedule(images, steps=100, batch_size=images, batches=1)
    ends: list[float] = []
    for _ in population.train(
        Population(head, shape, configurations, seed=0, width=width),
        TrainingData(tokens, np.arange(images), schedule, until=STEPS),
        numerics,
        progress=lambda _: ends.append(time.perf_counter()),
    ):
        pass
    if len(ends) > STEPS:  # little memory: several groups were trained
        count = -(-count * STEPS // len(ends))
        ends = ends[:STEPS]
    return (ends[-1] - ends[0]) / (STEPS - 1) / count


@cache
def _search_seconds(head: Head, tokens: int, width: int, search: SearchOptions) -> float:
    """Seconds of a whole search over the largest trial batch, with two classes."""
    samples = _random_tokens(IMAGES[-1], tokens, width, 2)
    start = time.perf_counter()
    protocol.fit(head, samples, lambda: samples, target=OneClass(2), options=FitOptions(seed=0, search=search))
    return time.perf_counter() - start
