"""Training batches: tokens scaled to length 1 and jittered, in a shuffled order, held in memory or streamed from the cache.

The order of an epoch follows from the seed, the rows and the size of an image alone: held and streamed tokens come in the same
batches.
"""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache as once
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlfusion.specs.identity import digest

LARGEST_BATCH = 2048
FEWEST_BATCHES = 5  # an epoch
JITTER_STD = 0.05
JITTER_PROBABILITY = 0.5
SHUFFLE_BYTES = 1 << 28  # of images that are shuffled together; streaming holds twice as many
RUN_NUMBERS = 1 << 19  # of neighbouring images that are read together: at least one chunk of the cache
MIN_RUNS = 8  # of the images that are shuffled together

_PIECE = 1 << 18  # numbers that are converted, normalised and jittered at a time, so that they stay in a core's cache


class Source(Protocol):
    """Tokens that are read on request, such as a reader of the cache."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, …, D]; what is between images and width are the tokens of an image."""

    @property
    def dtype(self) -> "np.dtype[Any]": ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: "slice | np.ndarray") -> np.ndarray:
        """Tokens of some images, in the order asked for."""


@dataclass(frozen=True)
class Tokens:
    """Tokens and labels of one split; tokens may be float16, and are converted batch by batch."""

    values: np.ndarray | Tensor | Source  # [N, T, D], as extracted: not normalised
    labels: np.ndarray  # [N] int64 in 0..C-1; or [N, C] of 0 and 1, or [N] floating, see `targets`
    ids: tuple[str, ...] | None = None  # [N], the images' names in error messages

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, T, D)."""
        shape = tuple(self.values.shape)
        return (shape[0], math.prod(shape[1:-1]), shape[-1]) if self.is_streamed else shape

    @property
    def is_streamed(self) -> bool:
        """Whether they are read on request, and not held in memory."""
        return not isinstance(self.values, np.ndarray | Tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens in memory, in their own type."""
        return math.prod(self.values.shape) * self.values.dtype.itemsize

    def __getitem__(self, rows: slice | np.ndarray) -> Tensor:
        """Tokens of these images, in their own type [rows, T, D]."""
        if isinstance(self.values, Tensor):
            return self.values[
                rows if isinstance(rows, slice) else to_device(torch.from_numpy(rows), self.values.device)
            ]
        some = self.values[rows]
        return torch.from_numpy(some if some.flags.writeable else some.copy()).view(-1, *self.shape[1:])

    def of(self, rows: np.ndarray) -> "Tokens":
        """The tokens of images `rows`, in memory."""
        return Tokens(self[rows], self.labels[rows], self.ids and tuple(self.ids[row] for row in rows))

    def on(self, device: torch.device | str) -> "Tokens":
        """All tokens on a device."""
        return Tokens(self[:].to(device), self.labels, self.ids)

    def normalised(self, rows: np.ndarray, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Tokens of these images, each scaled to length 1 over its width (a zero token stays zero): [rows, T, D]."""
        return _prepared(self[rows], device, dtype, None)

    def iter_batches(self, groups: Iterable[list[np.ndarray]]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Rows [b] and tokens [b, T, D], in their own type, of every batch of `Schedule.order`'s groups.

        Tokens from the cache are read a group at a time, the next one in a thread. Whoever asks for a batch should hold none
        before it, so that the memory of two groups is enough.
        """
        if not self.is_streamed:
            yield from ((rows, self[rows]) for group in groups for rows in group)
            return
        for group, values in _read_ahead(self, groups):
            start = 0
            for rows in group:
                yield rows, values[start : start + len(rows)]
                start += len(rows)
            del values


def _read_ahead(tokens: Tokens, groups: Iterable[list[np.ndarray]]) -> Iterator[tuple[list[np.ndarray], Tensor]]:
    """Every group with its tokens; a thread reads the next group meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        ready: Future[tuple[list[np.ndarray], Tensor]] | None = None
        for group in groups:
            begun = pool.submit(lambda rows: (rows, tokens[np.concatenate(rows)]), group)
            if ready:
                yield ready.result()
            ready = begun
        if ready:
            yield ready.result()


def stream(*words: str | float) -> int:
    """The seed of a random stream: 64 bits of a digest of its name, the same on every machine."""
    return int(digest(words), 16)


@dataclass(frozen=True)
class Schedule:
    """The number of training steps on N images, and their batches."""

    images: int  # N
    steps: int
    batch_size: int
    batches: int  # an epoch

    @classmethod
    def of(cls, images: int, *, epochs: int = 40, least_steps: int = 1000) -> "Schedule":
        """The study's: batches of 2,048, or smaller so that an epoch has five; never fewer than `least_steps`."""
        batches = max(FEWEST_BATCHES, math.ceil(images / LARGEST_BATCH))
        # BatchNorm has no statistics of one image: two at least in every batch.
        batches = max(1, min(batches, images // 2))
        return cls(images, max(epochs * batches, least_steps), math.ceil(images / batches), batches)

    @property
    def sizes(self) -> list[int]:
        """Images of each batch of an epoch; they differ by one at most."""
        each, more = divmod(self.images, self.batches)
        return [each + 1] * more + [each] * (self.batches - more)

    def order(self, tokens: Tokens, rows: np.ndarray, seed: int) -> Iterator[list[np.ndarray]]:
        """The rows of every batch of all steps, in groups of whole batches that are shuffled among themselves.

        Where an epoch is one group, all its orders are equally likely. Where it has several, runs of neighbouring rows are
        dealt to the groups at random: every group has images from the whole split, and streaming reads whole runs.

        Args:
            tokens: whose size decides how many images a group has.
            rows: images to train on [N], ascending.
            seed: names the order.
        """
        generator = np.random.default_rng(stream("order", seed))
        _, t, d = tokens.shape
        together = max(1, SHUFFLE_BYTES * len(tokens) // tokens.nbytes)  # images of a group
        run = min(1 << (RUN_NUMBERS // (t * d)).bit_length(), max(1, together // MIN_RUNS))
        count = math.ceil(self.batches / max(1, together // self.batch_size))
        left = self.steps
        while left > 0:
            for group in _epoch(rows, self.sizes, count, run, generator):
                yield group[:left]
                left -= len(group)
                if left <= 0:
                    return


def _epoch(
    rows: np.ndarray, sizes: list[int], groups: int, run: int, order: np.random.Generator
) -> Iterator[list[np.ndarray]]:
    """Rows of every batch of an epoch, in so many groups."""
    if groups > 1:
        runs = np.split(rows, np.flatnonzero(np.diff(rows // run)) + 1)
        rows = np.concatenate([runs[n] for n in order.permutation(len(runs))])
    start = 0
    for part in np.array_split(np.array(sizes), groups):
        stop = start + int(part.sum())
        yield np.split(order.permutation(rows[start:stop]), np.cumsum(part)[:-1])
        start = stop


def batches(
    train: Tokens, rows: np.ndarray, schedule: Schedule, *, seed: int, device: str, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """Jittered tokens [B, T, D] and labels [B, …] of every step; order and jitter follow from `seed` alone."""
    jitter = Jitter(seed, device)
    for chosen, values in train.iter_batches(schedule.order(train, rows, seed)):
        batch = _prepared(values, device, dtype, jitter)
        del values
        yield batch, to_device(torch.from_numpy(train.labels[chosen]), device)


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy to a device: to a GPU without waiting, beside what it computes."""
    if values.device.type == "cpu" and torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class Jitter:
    """A random stream of noise from N(0, 0.05²), added to about half of the images."""

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self._host = np.random.Generator(np.random.SFC64(stream("jitter", seed)))
        self._device = torch.Generator(device).manual_seed(stream("jitter", seed))

    def jittered_rows(self, images: int) -> np.ndarray:
        """The rows, among so many images, that get noise: each with a probability of one half."""
        return np.flatnonzero(self._host.random(images) < JITTER_PROBABILITY)

    def noise(self, *size: int) -> Tensor:
        """Noise of this shape, float32.

        A processor takes it from a table of quantiles, three times as fast as exact normals and as good for jitter.
        """
        if self._device.device.type != "cpu":
            return JITTER_STD * torch.randn(size, generator=self._device, device=self._device.device)
        count = math.prod(size)
        bits = np.frombuffer(self._host.bytes(2 * count), np.uint16).astype(np.int64)
        return _quantiles().take(torch.from_numpy(bits)).view(size)


@once
def _quantiles() -> Tensor:
    """Medians of 65,536 equally likely parts of N(0, 0.05²), scaled to that variance; the largest is 4.3 deviations."""
    middles = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    return (JITTER_STD * middles / middles.std(correction=0)).float()


def _prepared(values: Tensor, device: torch.device | str, dtype: torch.dtype, jitter: Jitter | None) -> Tensor:
    """Tokens in their own type [b, T, D] → scaled to length 1, jittered, on the device."""
    where = torch.device(device)
    jittered = np.empty(0, np.int64) if jitter is None else jitter.jittered_rows(len(values))
    if where.type == "cpu":
        out = torch.empty(values.shape, dtype=dtype)
        step = max(1, _PIECE // math.prod(values.shape[1:]))
        for start in range(0, len(values), step):
            some = slice(start, start + step)
            torch.nn.functional.normalize(values[some].to(dtype), dim=-1, out=out[some])
            if jitter is not None and (near := jittered[(start <= jittered) & (jittered < start + step)]).size:
                out[torch.from_numpy(near)] += jitter.noise(len(near), *values.shape[1:])
        return out
    out = F.normalize(to_device(values, where).to(dtype), dim=-1)
    if jitter is not None:
        out[to_device(torch.from_numpy(jittered), where)] += jitter.noise(len(jittered), *values.shape[1:]).to(dtype)
    return out
