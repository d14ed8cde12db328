"""What a population is trained on: an image's tokens, of length 1 and jittered, in shuffled batches from memory or cache."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache as once
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlfusion.specs import digest

LARGEST_BATCH = 2048
FEWEST_BATCHES = 5  # an epoch
JITTER_STD = 0.05
JITTER_PROBABILITY = 0.5

_PIECE = 1 << 18  # numbers that are converted, normalised and jittered at a time, so that they stay in a core's cache


@runtime_checkable
class Source(Protocol):
    """Tokens that are read when they are asked for, as a reader of the cache gives them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, …, D]; what is between images and width are the tokens of an image."""

    @property
    def dtype(self) -> "np.dtype[Any]": ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: "slice | np.ndarray") -> np.ndarray:
        """Some images in the order asked for."""

    def batches(self, size: Sequence[int], *, seed: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One pass in a shuffled order over images `rows`, in batches of these sizes: their rows and tokens."""


@dataclass(frozen=True)
class Tokens:
    """What a probe is given for the images of one split; may be float16, and is converted batch by batch."""

    values: np.ndarray | Tensor | Source  # [N, T, D], as extracted: not normalised
    labels: np.ndarray  # [N] int64 in 0..C-1; or [N, C] of 0 and 1, or [N] floating, see `targets`
    ids: tuple[str, ...] | None = None  # [N], by which an image is named in errors

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, T, D)."""
        shape = tuple(self.values.shape)
        return (shape[0], math.prod(shape[1:-1]), shape[-1]) if isinstance(self.values, Source) else shape

    @property
    def nbytes(self) -> int:
        """Bytes that all of them take in memory, as they are kept."""
        return math.prod(self.values.shape) * self.values.dtype.itemsize

    def __getitem__(self, rows: slice | np.ndarray) -> Tensor:
        """Tokens of these images as they are kept [rows, T, D]."""
        if isinstance(self.values, Tensor):
            return self.values[rows if isinstance(rows, slice) else sent(torch.from_numpy(rows), self.values.device)]
        some = self.values[rows]
        return torch.from_numpy(some if some.flags.writeable else some.copy()).view(-1, *self.shape[1:])

    def of(self, rows: np.ndarray) -> "Tokens":
        """Some of the images, in memory."""
        return Tokens(self[rows], self.labels[rows], self.ids and tuple(self.ids[row] for row in rows))

    def on(self, device: torch.device | str) -> "Tokens":
        """All of them on a device."""
        return Tokens(self[:].to(device), self.labels, self.ids)

    def normalised(self, rows: np.ndarray, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Tokens of these images, each of length 1 over its width (a zero token stays zero): [rows, T, D]."""
        return _prepared(self[rows], device, dtype, None)

    def passed(
        self, rows: np.ndarray, sizes: Sequence[int], order: np.random.Generator
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """One pass in a shuffled order over images `rows`: rows and tokens, as kept, of every batch."""
        if isinstance(self.values, Source):
            for chosen, values in self.values.batches(sizes, seed=int(order.integers(2**63)), rows=rows):
                yield chosen, torch.from_numpy(values).view(-1, *self.shape[1:])
        else:
            for chosen in np.split(order.permutation(rows), np.cumsum(sizes)[:-1]):
                yield chosen, self[chosen]


def stream(*words: str | float) -> int:
    """64 bits that name a random stream, on every machine."""
    return int(digest(words), 16)


@dataclass(frozen=True)
class Schedule:
    """How long to train on N images, and in which batches."""

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


def batches(
    train: Tokens, rows: np.ndarray, schedule: Schedule, *, seed: int, device: str, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """Jittered tokens [B, T, D] and labels [B] of every step; order and jitter follow from `seed` alone."""
    order = np.random.default_rng(stream("order", seed))
    jitter = Jitter(seed, device)
    step = 0
    while True:
        for chosen, values in train.passed(rows, schedule.sizes, order):
            if step == schedule.steps:
                return
            yield _prepared(values, device, dtype, jitter), sent(torch.from_numpy(train.labels[chosen]), device)
            step += 1


def sent(values: Tensor, device: torch.device | str) -> Tensor:
    """On the device: to a GPU by a copy that goes on beside what it computes, so that nobody waits."""
    if values.device.type == "cpu" and torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class Jitter:
    """Noise from N(0, 0.05²) on about half of the images, one stream of it."""

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self._host = np.random.Generator(np.random.SFC64(stream("jitter", seed)))
        self._device = torch.Generator(device).manual_seed(stream("jitter", seed))

    def shaken(self, images: int) -> np.ndarray:
        """Which of so many images get it."""
        return np.flatnonzero(self._host.random(images) < JITTER_PROBABILITY)

    def noise(self, *size: int) -> Tensor:
        """On a processor by a table of quantiles, three times as fast as exact normals and as good for jitter."""
        if self._device.device.type != "cpu":
            return JITTER_STD * torch.randn(size, generator=self._device, device=self._device.device)
        count = math.prod(size)
        bits = np.frombuffer(self._host.bytes(2 * count), np.uint16).astype(np.int64)
        return _quantiles().take(torch.from_numpy(bits)).view(size)


@once
def _quantiles() -> Tensor:
    """The 65,536 quantiles in the middle of as many like parts of N(0, 0.05²), of just that variance: up to 4.3 deviations."""
    middles = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    return (JITTER_STD * middles / middles.std(correction=0)).float()


def _prepared(values: Tensor, device: torch.device | str, dtype: torch.dtype, jitter: Jitter | None) -> Tensor:
    """Tokens as kept [b, T, D] → of length 1, jittered, on the device."""
    where = torch.device(device)
    shaken = np.empty(0, np.int64) if jitter is None else jitter.shaken(len(values))
    if where.type == "cpu":
        out = torch.empty(values.shape, dtype=dtype)
        step = max(1, _PIECE // math.prod(values.shape[1:]))
        for start in range(0, len(values), step):
            some = slice(start, start + step)
            torch.nn.functional.normalize(values[some].to(dtype), dim=-1, out=out[some])
            if jitter is not None and (near := shaken[(start <= shaken) & (shaken < start + step)]).size:
                out[torch.from_numpy(near)] += jitter.noise(len(near), *values.shape[1:])
        return out
    out = F.normalize(sent(values, where).to(dtype), dim=-1)
    if jitter is not None:
        out[sent(torch.from_numpy(shaken), where)] += jitter.noise(len(shaken), *values.shape[1:]).to(dtype)
    return out
