"""Training of a whole grid of configurations in lockstep, on one pass over the tokens.

All configurations see the same images, in the same order, with the same jitter. Everything else (initialisation, dropout
masks, learning rate, weight decay, gradient clipping) is each configuration's own.

On a processor small configurations share products, in blocks whose width depends on their sizes alone, and one thread computes
each product. Libraries round the sums of a wide product by the place of a column, the number of columns and the number of
threads, and training amplifies what they round: so every configuration has a place of its own in a block, and a place that
none takes is filled. This way a configuration ends at the same bits in every population, whatever the memory and the number
of threads. A grid has more configurations than a machine has cores, so that threads need not share a product to be busy. An
accelerator, which is slow at small products, computes all configurations that fit into its memory at once, to rounding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mlfusion.errors import TooLittleMemory
from mlfusion.probing.heads import HEADS, HeadModule, HeadShape
from mlfusion.probing.losses import Loss, class_weights, cross_entropy
from mlfusion.probing.training.batches import Schedule, Tokens, batches, stream
from mlfusion.probing.training.optimizer import AdamW, cosine
from mlfusion.probing.training.precision import Numerics, tensor_cores
from mlfusion.shapes import Float, Int, Shaped
from mlfusion.specs.names import Head
from mlfusion.system import threads
from mlfusion.system.memory import Footprint, available
from mlfusion.system.threads import denormals, in_order

MEMORY_SHARE = 0.8  # share of the free memory that training may take
WIDTH = 7  # configurations of a block: the paper's grids, of 21 and 63, fill whole blocks
SHARED_WORK = 1 << 19  # largest number of numbers that a step of a configuration in a block reads and makes
BUNDLE = 3  # largest number of blocks that a worker steps one after another
BUNDLE_BYTES = 1 << 26  # size of the blocks of a bundle, with what a step takes
BATCHES_AHEAD = 2  # batches in memory if several workers share the configurations
TWIN_FACTOR = 2**-22  # relative change of a twin's initial weights: one or two units in the last place of float32


@dataclass(frozen=True)
class Configuration:
    """One point of the grid."""

    lr: float
    weight_decay: float
    dropout: float = 0.0
    twin: bool = False  # whether the initial weights are changed in their last places
    place: int = 0  # its place in a block, modulo the block's width: its number in the grid

    def seed(self, seed: int) -> int:
        """The seed of this configuration's own random streams: the same in every population, and that of its twin."""
        return stream("configuration", seed, self.lr, self.weight_decay, self.dropout)


@dataclass(frozen=True)
class Population:
    """Configurations of one head that are trained in lockstep."""

    head: Head
    shape: HeadShape
    configurations: Sequence[Configuration]
    seed: int  # determines order and jitter; with a configuration, its initialisation and dropout masks
    width: int = 1  # number of configurations that share products on a processor, see `width_of`

    def __len__(self) -> int:
        """K, the number of configurations."""
        return len(self.configurations)

    def some(self, members: Sequence[int]) -> "Population":
        """The configurations with these numbers."""
        return replace(self, configurations=[self.configurations[k] for k in members])

    def blocks(self) -> list[dict[int, int]]:
        """The blocks in which a processor trains them: place → number of the configuration."""
        blocks: list[dict[int, int]] = []
        for k, configuration in enumerate(self.configurations):
            place = configuration.place % self.width
            block = next((block for block in blocks if place not in block), None)
            if block is None:
                blocks.append(block := {})
            block[place] = k
        return blocks


def width_of(head: Head, shape: HeadShape, batch: int, configurations: int) -> int:
    """The width of the blocks of a grid: that many configurations share products, since small products waste time.

    It depends on nothing but the head, its shape, the images of a batch and the size of the grid.
    """
    probe = HEADS[head](shape, seeds=[0], dropouts=[0.0])
    parameters = sum(parameter.numel() for parameter in probe.parameters())
    work = parameters + batch * (shape.tokens * shape.heads + shape.width)
    return min(WIDTH, configurations) if work <= SHARED_WORK else 1


@dataclass(frozen=True)
class TrainingData:
    """The images that a population is trained on."""

    tokens: Tokens
    rows: np.ndarray  # [N], those of `tokens` to train on
    schedule: Schedule  # for N images
    until: int | None = None  # number of steps of the schedule after which training stops


@dataclass(frozen=True)
class Needs:
    """Memory that training takes, in bytes."""

    batch: int  # a batch of tokens, and the tensors that all configurations share
    each: int  # parameters and moments of one configuration
    step: int  # temporary tensors of a step of one configuration

    def of_block(self, width: int) -> "Needs":
        """Those of a block of configurations, in place of one."""
        return Needs(self.batch, width * self.each, width * self.step)


@cache
def needs(head: Head, shape: HeadShape, images: int, numerics: Numerics = Numerics()) -> Needs:
    """Memory measured in a trial step of one configuration on a batch of `images`."""
    with Footprint() as batch:
        tokens = torch.ones(images, shape.tokens, shape.width, device=numerics.device, dtype=numerics.dtype)
        labels = torch.zeros(images, dtype=torch.int64, device=numerics.device)
    with Footprint() as block_memory:
        block = _Block(Population(head, shape, (Configuration(1e-3, 1e-2, 0.1),), seed=0), numerics, _mean_square)
    with Footprint() as step:
        block.step(tokens, labels, 0, 1)
    # Tensors that the probes share, such as standardised tokens, are made by the first probe and live as long as the batch.
    return Needs(batch.most + step.alive, block_memory.alive, step.most - step.alive)


def _mean_square(outputs: Float[Tensor, "K B C"], _: Shaped[Tensor, "B ..."]) -> Float[Tensor, " K"]:
    return outputs.float().square().mean((1, 2))


@dataclass(frozen=True)
class Layout:
    """Partition of the blocks of a population: groups that fit into memory, each split among workers.

    On an accelerator every configuration counts as a block, and a group is computed at once.
    """

    together: int  # blocks of a group
    bundle: int  # blocks that a worker steps one after another; on an accelerator, those of a group
    workers: int  # bundles that are stepped at the same time

    @classmethod
    def of(cls, count: int, need: Needs, *, memory: int, threads: int, shared: bool) -> "Layout":
        """The layout with as many of `count` blocks in a group as `memory` bytes hold; `need` is that of a block.

        `shared`: they run on a device that works on all at once, rather than one on each of `threads` cores.

        Raises:
            TooLittleMemory: not even one block fits into memory.
        """
        # A step of a small block is shorter than the overhead of Python: fewer workers, each with a few.
        bundle = max(1, min(BUNDLE, BUNDLE_BYTES // (need.each + need.step)))
        workers = 1 if shared else max(1, min(threads, count // bundle))
        while workers > 1 and BATCHES_AHEAD * need.batch + workers * (need.each + need.step) > memory:
            workers -= 1
        free = memory - need.batch * (BATCHES_AHEAD if workers > 1 else 1)
        together = min(count, free // (need.each + need.step) if shared else (free - workers * need.step) // need.each)
        if together < 1:
            raise TooLittleMemory(_too_little_memory(need, memory))
        return cls(together, together if shared else bundle, workers)

    def groups(self, count: int) -> list[slice]:
        """The groups, as slices of `count` blocks."""
        edges = np.linspace(0, count, math.ceil(count / self.together) + 1).round().astype(int)
        return [slice(a, b) for a, b in pairwise(edges.tolist())]


def _too_little_memory(need: Needs, memory: int) -> str:
    parts = (need.batch + need.step + need.each, need.batch, need.step + need.each, memory)
    least, tokens, probe, free = (f"{part / 1e6:,.1f} MB" for part in parts)
    return (
        f"not even one block of configurations can be trained: it needs {least} of memory ({tokens} for a batch of tokens, "
        f"{probe} for the probes), and {free} may be taken; allowed: a probe that fits. Free memory, raise --memory, or "
        "choose fewer layers or another head"
    )


class _Block:
    """Some configurations with their optimiser."""

    def __init__(self, population: Population, numerics: Numerics, loss: Loss) -> None:
        members = population.configurations
        self._population = population
        self.probe = HEADS[population.head](
            population.shape,
            seeds=[member.seed(population.seed) for member in members],
            dropouts=[member.dropout for member in members],
        )
        self.probe.to(torch.device(numerics.device), numerics.dtype)
        for k, member in enumerate(members):
            if member.twin:
                _shake([parameter.detach()[k] for parameter in self.probe.parameters()], member.seed(population.seed))
        self.probe.train()
        self._optimizer = AdamW(
            self.probe.parameters(),
            lr=[member.lr for member in members],
            weight_decay=[member.weight_decay for member in members],
        )
        self._dtype, self._loss = numerics.dtype, loss
        device = torch.device(numerics.device).type
        self._autocast = partial(torch.autocast, device, torch.bfloat16, enabled=numerics.bf16)

    def step(self, tokens: Float[Tensor, "B T D"], labels: Shaped[Tensor, "B ..."], step: int, steps: int) -> None:
        """Take one of `steps` steps, on a batch."""
        with self._autocast():
            logits = self.probe(tokens)
        # The sum over the population: no configuration's loss has a gradient for another's parameters.
        torch.autograd.backward(self._loss(logits.to(self._dtype), labels).sum())
        if self.probe.max_grad_norm is not None:
            self._optimizer.clip(self.probe.max_grad_norm)
        self._optimizer.step(cosine(self._optimizer.lr, step, steps))

    def probe_of(self, place: int) -> HeadModule:
        """The trained probe of one configuration."""
        alone = self._population.some([place])
        if len(self._population) == 1:
            return self.probe
        probe = HEADS[alone.head](alone.shape, seeds=[0], dropouts=[alone.configurations[0].dropout])
        state = {name: value[place : place + 1].clone() for name, value in self.probe.state_dict().items()}
        probe.load_state_dict(state, assign=True)
        return probe


def _shake(weights: Sequence[Float[Tensor, "..."]], seed: int) -> None:
    """Multiply every weight by 1 ± TWIN_FACTOR, in place, with signs that follow from the seed."""
    signs = torch.Generator().manual_seed(seed)
    for weight in weights:
        sign = 2 * torch.randint(2, weight.shape, generator=signs).to(weight) - 1
        weight.mul_(1 + TWIN_FACTOR * sign)


class _Workers:
    """Threads that step bundles of blocks, one bundle a thread.

    No worker waits for the others at the end of a step: it continues with the next batch, which is prepared meanwhile.
    """

    def __init__(self, count: int) -> None:
        self._pool = threads.pool(count) if count > 1 else None
        self._last: dict[Any, Future[None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def step(self, work: Callable[[Any], None], blocks: Sequence[Any]) -> int:
        """Begin a step of all bundles; return the number of steps that ended meanwhile: 0 or 1."""
        if self._pool is None:
            for block in blocks:
                work(block)
            return 1
        previous = self._last
        self._last = {block: self._pool.submit(self._next, work, block, previous.get(block)) for block in blocks}
        return self._wait(previous)

    def finish(self) -> int:
        """Wait for the step that was begun; return the number of steps that ended: 0 or 1."""
        return self._wait(self._last)

    @staticmethod
    def _next(work: Callable[[Any], None], block: Any, previous: "Future[None] | None") -> None:
        if previous:
            previous.result()  # it started earlier, so another worker runs it if it has not ended
        work(block)

    @staticmethod
    def _wait(steps: "dict[Any, Future[None]]") -> int:
        for future in steps.values():
            future.result()
        return bool(steps)


def train(
    population: Population,
    data: TrainingData,
    numerics: Numerics = Numerics(),
    *,
    memory: int | None = None,
    layout: Layout | None = None,
    progress: Callable[[int], None] | None = None,
    loss: Loss | None = None,
) -> Iterator[tuple[slice, HeadModule]]:
    """Train all configurations, as many at the same time as fit into memory.

    On a processor, a configuration ends at the same bits whatever it is trained with, and whatever memory and threads.

    Args:
        population: the configurations.
        data: the images to train on.
        numerics: device and types. With bfloat16 products, parameters, softmax, BatchNorm and loss stay as wide as `dtype`.
        memory: limit in bytes, by default most of the free memory.
        layout: the partition of the population, by default one that fits `memory`.
        progress: called after each step with the number of configurations that took it.
        loss: outputs [K, B, C] and labels → [K]; by default cross-entropy with class weights.

    Yields:
        Some of the configurations and their probe, in evaluation mode. A configuration that diverged is not finite.

    Raises:
        TooLittleMemory: not even one block fits into memory.
    """
    if loss is None:
        weights = torch.from_numpy(class_weights(data.tokens.labels[data.rows], population.shape.classes))
        loss = partial(cross_entropy, weights=weights.to(numerics.device, numerics.dtype))
    tokens, schedule = _move(data.tokens, numerics), replace(data.schedule, steps=data.until or data.schedule.steps)
    width = 1 if numerics.is_accelerated else population.width
    need = needs(population.head, population.shape, schedule.batch_size, numerics).of_block(width)
    every = [{0: k} for k in range(len(population))] if numerics.is_accelerated else population.blocks()
    layout = layout or Layout.of(
        len(every),
        need,
        memory=int(MEMORY_SHARE * available(numerics.device)) if memory is None else memory,
        threads=threads.count(),
        shared=numerics.is_accelerated,
    )
    for group in layout.groups(len(every)):
        blocks = _blocks(population, every[group], numerics, loss)
        members = sorted(k for places in every[group] for k in places.values())
        bundles = [tuple(blocks[n : n + layout.bundle]) for n in range(0, len(blocks), layout.bundle)]
        steps = batches(tokens, data.rows, schedule, seed=population.seed, device=numerics.device, dtype=numerics.dtype)
        report = partial(progress or (lambda _: None), len(members))
        with tensor_cores(numerics.device):
            _run(bundles, min(layout.workers, len(bundles)), steps, data.schedule.steps, report)
        if numerics.is_accelerated:
            yield slice(members[0], members[-1] + 1), blocks[0].probe.eval()
            continue
        where = {k: (block, place) for block, of in zip(blocks, every[group], strict=True) for place, k in of.items()}
        for k in members:
            block, place = where[k]
            yield slice(k, k + 1), block.probe_of(place).eval()


def _blocks(population: Population, places: Sequence[dict[int, int]], numerics: Numerics, loss: Loss) -> list[_Block]:
    """The blocks of a group, of which `places` has place → number of the configuration; on an accelerator a single one."""
    if numerics.is_accelerated:
        return [_Block(population.some([k for one in places for k in one.values()]), numerics, loss)]
    # A place that none takes is filled with the first of the block.
    filled = [[one.get(place, min(one.values())) for place in range(population.width)] for one in places]
    return [_Block(population.some(members), numerics, loss) for members in filled]


@in_order()
@denormals(kept=False)
def _run(
    bundles: Sequence[tuple[_Block, ...]],
    workers: int,
    data: Iterator[tuple[Float[Tensor, "B T D"], Shaped[Tensor, "B ..."]]],
    steps: int,
    report: Callable[[], None],
) -> None:
    """Step all blocks on every batch, by so many threads."""

    def work(bundle: tuple[_Block, ...], *, step: int, tokens: Tensor, labels: Tensor) -> None:
        for block in bundle:
            block.step(tokens, labels, step, steps)

    with _Workers(workers) as pool:
        for step, (batch, labels) in enumerate(data):
            if pool.step(partial(work, step=step, tokens=batch, labels=labels), bundles):
                report()
        if pool.finish():
            report()


def _move(tokens: Tokens, numerics: Numerics) -> Tokens:
    """The tokens, copied to an accelerator if they take less than half of its memory."""
    if not numerics.is_accelerated or isinstance(tokens.values, Tensor):
        return tokens
    if tokens.nbytes >= available(numerics.device) / 2:
        return tokens
    return Tokens(tokens[:].to(numerics.device), tokens.labels, tokens.ids, tokens.groups)


def read(
    probe: HeadModule, tokens: Tokens, rows: Int[np.ndarray, " N"], *, block: int, device: str
) -> Iterator[tuple[Float[Tensor, "K b C"], Float[Tensor, "b T D"]]]:
    """A probe's logits for images `rows`, `block` at a time, each with the normalised tokens."""
    for start in range(0, len(rows), block):
        with torch.no_grad(), in_order(), denormals(kept=False):
            batch = tokens.normalised(rows[start : start + block], device)
            outputs = probe(batch)
        yield outputs, batch
