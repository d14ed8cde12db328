"""What training a probe will take, by a trial of a few steps on made-up tokens: for plans and for advice."""

import time
from functools import cache as once

import numpy as np
import torch

from mlfusion import population, protocol
from mlfusion.batches import Schedule, Tokens
from mlfusion.population import Precision
from mlfusion.probes import PROBES, Shape
from mlfusion.specs import Head, Probe
from mlfusion.targets import OneClass

IMAGES = (32, 64, 128, 256)  # of the trial's batch: the next one below stands for what lies between
STEPS = 3  # of which the first does not count
CLASSES = (16, 128, 1024)  # that are tried: the next above stands for what lies between


def seconds(
    probe: Probe,
    *,
    tokens: int,
    width: int,
    classes: int,
    images: int,
    grid: str,
    halving: bool = False,
    device: str = "cpu",
    precision: Precision = "auto",
) -> float:
    """That one seed takes to be chosen and refitted, roughly: the shape of the work is exact, its rate is measured here.

    Args:
        probe: which.
        tokens: T, those that it reads of an image.
        width: D.
        classes: C.
        images: N, of the training split.
        grid: as in `protocol.GRIDS`.
        halving: see `protocol.Training`.
        device: where it trains.
        precision: of its matrix products.
    """
    tried = next((c for c in CLASSES if c >= classes), CLASSES[-1])
    heads = probe.attention_heads() or min(tokens, width)
    if probe.head in protocol.SOLVERS:
        return _solving(probe.head, tokens, width, grid) * images / IMAGES[-1]
    schedule = protocol.GRIDS[grid].schedule(images)
    configurations = len(protocol.GRIDS[grid].configurations(probe.head))
    steps = sum(many * until for many, until in protocol.rungs(configurations, schedule.steps, halving=halving))
    batch = max((b for b in IMAGES if b <= schedule.batch_size), default=IMAGES[0])
    rate = _training(probe.head, heads, tokens, width, tried, batch, device, precision)
    return rate * (steps + schedule.steps) * schedule.batch_size / batch


def _made_up(images: int, tokens: int, width: int, classes: int) -> Tokens:
    random = np.random.default_rng(0)
    values = random.standard_normal((images, tokens, width), np.float32).astype(np.float16)
    return Tokens(values, np.arange(images) % classes)


@once
def _training(
    head: Head, heads: int, tokens: int, width: int, classes: int, images: int, device: str, precision: Precision
) -> float:
    """Seconds of one step of one configuration on a batch."""
    # As many as there are threads: a grid has more, and keeps all of them busy.
    count = torch.get_num_threads()
    chosen = [population.Configuration(1e-3, 1e-2 + k, 0.1) for k in range(count)]
    shape = Shape(tokens=tokens, width=width, classes=classes, heads=heads if PROBES[head].attends else 1)
    ends: list[float] = []
    trained = population.train(
        head,
        _made_up(images, tokens, width, classes),
        np.arange(images),
        chosen,
        shape,
        Schedule(images, steps=100, batch_size=images, batches=1),
        seed=0,
        device=device,
        precision=precision,
        progress=lambda _: ends.append(time.perf_counter()),
        until=STEPS,
    )
    for _ in trained:
        pass
    if len(ends) > STEPS:  # not all at once: there is little memory
        count = -(-count * STEPS // len(ends))
        ends = ends[:STEPS]
    return (ends[-1] - ends[0]) / (STEPS - 1) / count


@once
def _solving(head: Head, tokens: int, width: int, grid: str) -> float:
    """Seconds of a whole search over a few images of two classes."""
    made_up = _made_up(IMAGES[-1], tokens, width, 2)
    began = time.perf_counter()
    protocol.fit(head, made_up, lambda: made_up, target=OneClass(2), heads=None, grid=grid, seed=0)
    return time.perf_counter() - began
