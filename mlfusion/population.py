"""Training: a whole grid of configurations in lockstep, on one pass over the tokens.

All configurations see the same images, in the same order, with the same jitter. Whatever is a configuration's own
(start, masks, learning rate, decay, clipping) is a vector over the population, so it ends where it would have alone.

A population is trained in blocks of few configurations, each small enough for a core's caches and worked on by one thread:
a grid has more configurations than a machine has cores, so that products need not be parted among threads that wait for
each other. How many blocks are alive at once follows from the memory at hand and from what a trial step takes of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from itertools import islice, pairwise
from time import perf_counter
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlfusion.batches import Schedule, Tokens, batches, stream
from mlfusion.errors import BadData
from mlfusion.memory import Footprint, available
from mlfusion.optimizer import AdamW, cosine
from mlfusion.probes import HEADS, HeadModule, HeadShape
from mlfusion.specs import Head

SPARE = 0.8  # of the free memory that may be taken
IN_CACHE = 1 << 26  # bytes that a block's step may touch
FEW = 3  # configurations, which share their tokens, may be in a block always
AHEAD = 2  # batches that are at hand where blocks are worked on in lanes
Precision = Literal["auto", "float32", "bfloat16"]
Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs [K, B, C] and labels → [K]."""


@dataclass(frozen=True)
class Configuration:
    """One point of the grid."""

    lr: float
    weight_decay: float
    dropout: float = 0.0

    def seed(self, seed: int) -> int:
        """Start of this configuration's own random streams: the same in every population that it is a part of."""
        return stream("configuration", seed, self.lr, self.weight_decay, self.dropout)


@dataclass(frozen=True)
class Arithmetic:
    """Where a population is computed, and in what."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32  # of parameters, statistics and losses
    bf16: bool = False  # whether products are narrower


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """n / (C · n_c) for every class [C], so that each class weighs the same in the loss; 0 for one without images."""
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts > 0, len(labels) / (classes * np.maximum(counts, 1)), 0.0)


def losses(logits: Tensor, labels: Tensor, weights: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with class weights, as `torch.nn.CrossEntropyLoss` averages it: [K, B, C], [B], [C] → [K]."""
    k, b, _ = logits.shape
    each = F.cross_entropy(
        logits.flatten(0, 1), labels.repeat(k), weight=weights, reduction="none", label_smoothing=smoothing
    )
    return each.view(k, b).sum(1) / weights[labels].sum()


@dataclass(frozen=True)
class Needs:
    """What training takes of memory, in bytes."""

    batch: int  # a batch of tokens with what is made from it for all configurations
    each: int  # parameters and moments of one configuration
    step: int  # what a step of one configuration makes and forgets


@once
def needs(head: Head, shape: HeadShape, images: int, by: Arithmetic = Arithmetic()) -> Needs:
    """Measured by a trial step of one configuration on a batch of `images`."""
    with Footprint() as batch:
        tokens = torch.ones(images, shape.tokens, shape.width, device=by.device, dtype=by.dtype)
        labels = torch.zeros(images, dtype=torch.int64, device=by.device)
    with Footprint() as kept:
        block = _Block(head, shape, (Configuration(1e-3, 1e-2, 0.1),), 0, by, loss=_squares)
    with Footprint() as step:
        block.step(tokens, labels, 0, 1)
    # What the probes share of a batch, such as standard tokens, is made by the first of them and stays as long as it.
    return Needs(batch.most + step.alive, kept.alive, step.most - step.alive)


def _squares(outputs: Tensor, _: Tensor) -> Tensor:
    return outputs.float().square().mean((1, 2))


@dataclass(frozen=True)
class Layout:
    """How a population is parted: into groups that are alive together, and those into blocks."""

    together: int  # configurations of a group
    block: int  # configurations of a block
    lanes: int  # blocks that are worked on at the same time

    @classmethod
    def of(cls, count: int, need: Needs, *, memory: int, threads: int, shared: bool) -> "Layout":
        """As many of `count` together as `memory` bytes hold.

        Args:
            count: K.
            need: what one configuration takes.
            memory: bytes.
            threads: cores.
            shared: whether blocks run on a device that works on one at a time, rather than one on each core.

        Raises:
            BadData: not even one fits.
        """
        # A block of one small configuration is over before Python has begun the next: fewer lanes, with a few in each.
        few = max(1, min(FEW, IN_CACHE // (need.each + need.step)))
        lanes = 1 if shared else max(1, min(threads, count // few))
        while lanes > 1 and AHEAD * need.batch + lanes * (need.each + need.step) > memory:
            lanes -= 1
        batch = need.batch * (AHEAD if lanes > 1 else 1)
        room = memory - batch - lanes * need.step
        if room < need.each:
            parts = (need.batch + need.step + need.each, need.batch, need.step + need.each, memory)
            least, tokens, probe, free = (f"{part / 1e6:,.1f} MB" for part in parts)
            raise BadData(
                f"not even one configuration can be trained: it needs {least} of memory ({tokens} for a batch of tokens, "
                f"{probe} for the probe), and {free} may be taken; allowed: a probe that fits. Free memory, raise --memory, or "
                "choose fewer layers or another head"
            )
        together = min(count, room // need.each)
        if shared:
            return cls(max(1, min(together, (memory - need.batch) // (need.each + need.step))), together, 1)
        # More configurations at a time than a core's caches hold wait for memory; fewer wait for Python.
        most = max(1, min(max(FEW, IN_CACHE // (need.each + need.step)), together // lanes))
        while most > 1 and batch + together * need.each + lanes * most * need.step > memory:
            most -= 1
        return cls(together, most, lanes)

    def groups(self, count: int) -> list[list[slice]]:
        """Blocks of every group, as slices of the population."""
        edges = np.linspace(0, count, math.ceil(count / self.together) + 1).round().astype(int)
        return [
            [slice(a + i, min(a + i + self.block, b)) for i in range(0, b - a, self.block)]
            for a, b in pairwise(edges.tolist())
        ]


class _Block:
    """Some configurations with their optimiser."""

    def __init__(
        self,
        head: Head,
        shape: HeadShape,
        members: Sequence[Configuration],
        seed: int,
        by: Arithmetic,
        *,
        loss: Loss,
    ) -> None:
        self.probe = HEADS[head](shape, seeds=[c.seed(seed) for c in members], dropouts=[c.dropout for c in members])
        self.probe.to(torch.device(by.device), by.dtype)
        self.probe.train()
        self._optimizer = AdamW(
            self.probe.parameters(), lr=[c.lr for c in members], weight_decay=[c.weight_decay for c in members]
        )
        self._by, self._loss = by, loss
        self._autocast = partial(torch.autocast, torch.device(by.device).type, torch.bfloat16, enabled=by.bf16)

    def step(self, tokens: Tensor, labels: Tensor, step: int, steps: int) -> None:
        """One of `steps` steps, on a batch."""
        with self._autocast():
            logits = self.probe(tokens)
        # The sum over the population: no configuration's loss has a gradient for another's parameters.
        torch.autograd.backward(self._loss(logits.to(self._by.dtype), labels).sum())
        if self.probe.max_grad_norm is not None:
            self._optimizer.clip(self.probe.max_grad_norm)
        self._optimizer.step(cosine(self._optimizer.lr, step, steps).tolist())


class _Lanes:
    """Works on blocks, so many at a time, each by one thread; by all threads together if there is one lane.

    No lane waits for the others at the end of a step: it goes on with the next batch, which is prepared meanwhile.
    """

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count) if count > 1 else None
        self._last: dict[_Block, Future[None]] = {}
        self._ahead: list[Future[None]] = []

    def __enter__(self) -> Self:
        self._threads = torch.get_num_threads()
        if self._pool:
            torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)

    def step(self, work: Callable[[_Block], None], blocks: Sequence[_Block]) -> int:
        """Begin a step of all blocks; how many steps are done, of the one before and this."""
        if self._pool is None:
            for block in blocks:
                work(block)
            return 1
        before, self._ahead = (
            self._ahead,
            [self._pool.submit(self._next, work, block, self._last.get(block)) for block in blocks],
        )
        self._last = dict(zip(blocks, self._ahead, strict=True))
        return self._wait(before)

    def finish(self) -> int:
        """Wait for what was begun; how many steps that were."""
        return self._wait(self._ahead)

    @staticmethod
    def _next(work: Callable[[_Block], None], block: _Block, before: "Future[None] | None") -> None:
        if before:
            before.result()  # begun earlier, so by another lane if it is not done
        work(block)

    @staticmethod
    def _wait(steps: "list[Future[None]]") -> int:
        for one in steps:
            one.result()
        return bool(steps)


@contextmanager
def _tensor_cores(device: str) -> Iterator[None]:
    """TF32 for products of float32 on devices that have it."""
    before = torch.get_float32_matmul_precision()
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@once
def has_fast_bfloat16(device: str) -> bool:
    """Whether a bfloat16 product takes less than two thirds of the time of a float32 one here; measured in milliseconds."""
    seconds, size = {}, 384 if torch.device(device).type == "cpu" else 4096
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, device=device, dtype=dtype)
        each = []
        for _ in range(6):
            began = perf_counter()
            _ = float((a @ a)[0, 0])  # waits for the device
            each.append(perf_counter() - began)
        seconds[dtype] = min(each[1:])  # other work on the machine only ever adds
    return seconds[torch.bfloat16] < seconds[torch.float32] * 2 / 3


def resolve(precision: Precision, device: str) -> Precision:
    """'auto' → 'bfloat16' where it is faster, or 'float32'."""
    if precision == "auto":
        return "bfloat16" if has_fast_bfloat16(device) else "float32"
    return precision


def train(
    head: Head,
    tokens: Tokens,
    rows: np.ndarray,
    configurations: Sequence[Configuration],
    shape: HeadShape,
    schedule: Schedule,
    *,
    seed: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    precision: Precision = "float32",
    memory: int | None = None,
    layout: Layout | None = None,
    progress: Callable[[int], None] | None = None,
    loss: Loss | None = None,
    until: int | None = None,
) -> Iterator[tuple[slice, HeadModule]]:
    """Train all configurations on images `rows`, as many at once as fit into memory.

    Args:
        head: which probe.
        tokens: the split that `rows` points into.
        rows: images to train on [N].
        configurations: the population.
        shape: sizes of the probe.
        schedule: made for N images.
        seed: order of the images, jitter, and with a configuration its start and masks.
        device: where to train.
        dtype: of parameters, statistics and losses.
        precision: of matrix products: 'float32' is those of `dtype`, 'bfloat16' narrower ones (parameters, softmax, BatchNorm
            and loss stay as wide as `dtype`), 'auto' those where they are faster here.
        memory: bytes that may be taken, by default most of what is free; results do not depend on it.
        layout: in which parts, by default as fits `memory`; results do not depend on it either.
        progress: called after each step with the number of configurations that took it.
        loss: outputs [K, B, C] and labels → [K]; by default cross-entropy with class weights.
        until: stop after so many steps of the schedule.

    Yields:
        Some of the configurations and their probe, in evaluation mode. A configuration that diverged is not finite.

    Raises:
        BadData: not even one configuration fits.
    """
    if loss is None:
        weights = torch.from_numpy(class_weights(tokens.labels[rows], shape.classes)).to(device, dtype)
        loss = partial(losses, weights=weights)
    by = Arithmetic(device, dtype, resolve(precision, device) == "bfloat16")
    accelerated = torch.device(device).type != "cpu"
    if accelerated and not isinstance(tokens.values, Tensor) and tokens.nbytes < available(device) / 2:
        tokens = tokens.on(device)
    if layout is None:
        layout = Layout.of(
            len(configurations),
            needs(head, shape, schedule.batch_size, by),
            memory=int(SPARE * available(device)) if memory is None else memory,
            threads=torch.get_num_threads(),
            shared=accelerated,
        )
    for group in layout.groups(len(configurations)):
        blocks = [_Block(head, shape, configurations[part], seed, by, loss=loss) for part in group]
        with _tensor_cores(device), _Lanes(min(layout.lanes, len(blocks))) as lanes:
            passing = batches(tokens, rows, schedule, seed=seed, device=device, dtype=dtype)
            for step, (batch, labels) in enumerate(islice(passing, until)):
                one = partial(_Block.step, tokens=batch, labels=labels, step=step, steps=schedule.steps)
                if lanes.step(one, blocks) and progress:
                    progress(group[-1].stop - group[0].start)
            if lanes.finish() and progress:
                progress(group[-1].stop - group[0].start)
        for part, block in zip(group, blocks, strict=True):
            block.probe.eval()
            yield part, block.probe


@torch.no_grad()
def read(
    probe: HeadModule, tokens: Tokens, rows: np.ndarray, *, block: int, device: str, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """A probe's logits [K, b, C] for images `rows`, `block` at a time, each with the normalised tokens [b, T, D]."""
    for start in range(0, len(rows), block):
        batch = tokens.normalised(rows[start : start + block], device, dtype)
        yield probe(batch), batch
